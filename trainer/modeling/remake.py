"""Inputs of linear layers that are made again in the backward pass, from what is kept anyway.

A linear layer that learns needs its input in the backward pass. In a decoder layer most of those
inputs come out of a norm or of the MLP's gate, which keep their own inputs: one small kernel makes
them again, with the same bits. So a layer that keeps its activations keeps a third less of them,
and more layers do.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Remade:
    """A tensor that its users in the backward pass make again: the first one of them for all.

    node: the autograd node that made it. Its own backward pass comes after its users'. make: as in
    _MAKERS. users: how many have asked for it in the forward pass.
    """

    def __init__(self, node: Any, make: Callable[[Any], Tensor]) -> None:
        self.node, self.make, self.users = node, make, 0
        self.tensor: Tensor | None = None

    def __call__(self) -> Tensor:
        """Return it as [tokens, width]."""
        tensor = self.make(self.node).flatten(0, -2) if self.tensor is None else self.tensor
        self.users -= 1
        self.tensor = tensor if self.users > 0 else None
        return tensor


def of(tensor: Any) -> Remade | None:
    """Return how a tensor is made again, for one user more; None where it has to be kept."""
    node, remade = tensor.grad_fn, getattr(tensor, "remade", None)
    if remade is None or remade.node is not node:  # or changed in place since then
        maker = _MAKERS.get(type(node).__name__)
        if maker is None or not maker[0](node):
            return None
        remade = tensor.remade = Remade(node, maker[1])
    remade.users += 1
    return remade


def watch(layer: nn.Module) -> None:
    """Let the norms of a decoder layer tell Liger's nodes what they are: those lack epsilon.

    Liger's kernels are put into the modules later, when training begins.
    """
    for module in layer.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_hook(_remember)


def _remember(module: nn.Module, _: Any, output: Any) -> None:
    node: Any = getattr(output, "grad_fn", None)
    if type(node).__name__ == "LigerRMSNormFunctionBackward":
        node.norm = module.forward


def _liger_swiglu(node: Any) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_forward

    return swiglu_forward(*node.saved_tensors, node.gate_multiplier)[2]


def _liger_geglu(node: Any) -> Tensor:
    from liger_kernel.ops.geglu import geglu_forward

    return geglu_forward(*node.saved_tensors)[2]


# By an autograd node's name: whether it keeps what is needed, and what makes its output from that.
# Liger's gates overwrite what they have kept, in their own backward pass.
_MAKERS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Tensor]]] = {
    # Of a gate, or of a norm and its weight, where both learn.
    "MulBackward0": (
        lambda node: node._saved_self is not None and node._saved_other is not None,
        lambda node: node._saved_self * node._saved_other,
    ),
    "LigerRMSNormFunctionBackward": (
        lambda node: hasattr(node, "norm"),
        lambda node: node.norm(node.saved_tensors[0]),
    ),
    "LigerSiLUMulFunctionBackward": (lambda node: node.down_multiplier == 1, _liger_swiglu),
    "LigerGELUMulFunctionBackward": (lambda node: True, _liger_geglu),
}
