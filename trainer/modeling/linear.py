"""The decoder's linear layers, each with its LoRA adapter as one autograd function.

PEFT runs five small operations beside every matrix, and adds two tensors of the layer's size in the
forward and in the backward pass. Torch's checkpointing ends the recomputation of a layer when the
last tensor that the backward pass needs has been saved. DeepSpeed's linear function saves its input
after the multiplication, so the last matrix of each layer (27 % of a Llama layer) is multiplied
again for nothing. Here the input is saved before the multiplication, or made again (remake.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.modeling import remake


class _SaveInput(torch.autograd.Function):
    """Save a linear layer's input for the backward pass, and compute nothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _saved_input(node: Any) -> Tensor:
    """Return what a _SaveInput node has saved."""
    return node.saved_tensors[0]


class _FusedLinear(torch.autograd.Function):
    """Return input·weightᵀ + bias + scale·(input·lora_aᵀ)·lora_bᵀ.

    input: [tokens, in]. weight: [out, in]. bias: [out] or None. lora_a: [r, in] or None.
    lora_b: [out, r] or None. again: returns the input in the backward pass, or None where that does
    not need it. Parameters are kept as attributes, not saved: ZeRO-3 takes their
    data away after the forward pass and brings it back before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scale: float,
        again: Callable[[], Tensor] | None,
    ) -> Tensor:
        ctx.parameters, ctx.scale, ctx.again = (weight, lora_a, lora_b), scale, again
        out = torch.mm(input, weight.t()) if bias is None else torch.addmm(bias, input, weight.t())
        if lora_a is not None and lora_b is not None:
            out.addmm_(input @ lora_a.t(), lora_b.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, lora_a, lora_b = ctx.parameters
        grad_weight = grad_a = grad_b = None
        input = ctx.again and ctx.again()
        grad_input = grad @ weight
        if lora_a is not None:
            grad_low_rank = (grad @ lora_b).mul_(ctx.scale)
            grad_input.addmm_(grad_low_rank, lora_a)
            grad_a = grad_low_rank.t() @ input
            grad_b = (grad.t() @ (input @ lora_a.t())).mul_(ctx.scale)
        if input is not None and ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ input
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, grad_a, grad_b, None, None


def _fused_forward(
    module: Any,
    checkpointed: list[Any],
    adapter: str | None,
    plain: Callable,
    input: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Compute what `plain`, the module's own forward, computes.

    checkpointed: the modules around it that may be recomputed; none where the parameters of the
    decoder layer are not all there at the same time. adapter: the adapter's name, if any.
    """
    # More arguments of a PEFT layer choose adapters row by row.
    no_gradient = not (torch.is_grad_enabled() and input.requires_grad)
    without_adapter = adapter is not None and (module.disable_adapters or module.merged)
    if no_gradient or without_adapter or args or kwargs:
        return plain(input, *args, **kwargs)
    lora_a = lora_b = again = None
    scale = 1.0
    if adapter is not None:
        lora_a, lora_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        scale, module = module.scaling[adapter], module.base_layer
    weight, rows = module.weight, input.flatten(0, -2)
    if lora_a is not None or weight.requires_grad:
        # A layer that is recomputed makes its inputs anyway, and gives each of them out once.
        kept = checkpointed and not any(outer.gradient_checkpointing for outer in checkpointed)
        again = remake.of(input) if kept else None
        if again is None:
            rows = _SaveInput.apply(rows)
            again = functools.partial(_saved_input, rows.grad_fn)
    out = _FusedLinear.apply(rows, weight, module.bias, lora_a, lora_b, scale, again)
    return out.unflatten(0, input.shape[:-1])


def _plain_adapter(module: Any) -> str | None:
    """Return the name of a PEFT layer's one adapter; None where it does more than _FusedLinear."""
    if len(module.active_adapters) != 1:
        return None
    (name,) = module.active_adapters
    plain = (
        name in module.lora_A
        and type(module.base_layer) is nn.Linear
        and isinstance(module.lora_dropout[name], nn.Identity)
        and name not in module.lora_variant
        and not module.lora_bias.get(name)
    )
    return name if plain else None


def install(layers: list[nn.Module], leaf: bool) -> int:
    """Replace the forward of the linear modules in these decoder layers. Return their number.

    leaf: ZeRO-3 gathers each layer as a whole. Otherwise an adapter and its matrix are not gathered
    at the same time, and modules with adapters stay as they are.
    """
    count = 0
    for layer in layers:
        checkpointed: list[Any] = []
        if leaf:
            remake.watch(layer)
            checkpointed = [m for m in layer.modules() if hasattr(m, "gradient_checkpointing")]
        inside_lora = set()
        for module in layer.modules():
            adapter = None
            if hasattr(module, "lora_A"):
                inside_lora.update(module.modules())
                adapter = _plain_adapter(module)
                if not leaf or adapter is None:
                    continue
            elif type(module) is not nn.Linear or module in inside_lora:
                continue
            module.forward = functools.partial(
                _fused_forward, module, checkpointed, adapter, module.forward
            )
            count += 1
    return count
