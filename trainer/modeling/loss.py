"""Cross-entropy over the vocabulary without the logits of a whole batch.

A vocabulary of 128k and 16 x 2,048 tokens make 16 GB of fp32 logits. That is more than anything
else on a GPU whose weights are offloaded. Here the head and the loss are computed chunk by chunk.
The gradients of the head's input and weight are made in the forward pass, while the chunk's logits
exist. This is the idea of Liger's fused linear cross-entropy (arXiv 2410.10989), in plain torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from transformers import PreTrainedModel

from data.dataset import IGNORED
from trainer.errors import RunError
from trainer.plan.model_shapes import loss_widening

CHUNK_BYTES = 2**28  # fp32 logits of one chunk; two more tensors of that size exist for a moment
_OF_A_MATRIX = {"weight", "bias"}


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Return (summed loss, correct tokens) as fp32 scalars.

    hidden: [T, H]. weight: [V, H]. bias: [V] or None. labels: [T].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, CHUNK_BYTES // (4 * len(weight)))
        loss = torch.zeros((), device=hidden.device)
        correct_tokens = torch.zeros_like(loss)
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = loss.new_zeros(len(weight)) if needs_bias else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            rows, targets = hidden[part], labels[part, None]
            logits = nn.functional.linear(rows, weight, bias).float()
            correct_tokens += (logits.argmax(-1, keepdim=True) == targets).sum()
            logits -= torch.logsumexp(logits, -1, keepdim=True)  # log-probabilities, in place
            loss -= logits.gather(1, targets).sum()
            if not any(ctx.needs_input_grad):
                continue
            grad = logits.exp_()
            grad.scatter_add_(1, targets, grad.new_full(targets.shape, -1.0))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ rows
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(correct_tokens)
        return loss, correct_tokens

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g.mul_(grad_loss).to(ctx.dtype) for g in ctx.grads]
        ctx.grads = None
        return *grads, None


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, liger: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (summed loss, correct tokens), fp32, where each token predicts the next label.

    hidden: [B, S, H]. weight: [V, H]. labels: [B, S], IGNORED where nothing is predicted.
    liger: use Liger's kernel where gradients are needed. It counts no correct tokens.
    """
    targets = labels[:, 1:].flatten()
    (positions,) = targets.ne(IGNORED).nonzero(as_tuple=True)
    # Without labels no row is left, and the graph is whole: every rank runs the same backward pass.
    rows = hidden[:, :-1].flatten(0, 1)[positions]
    targets = targets[positions]
    if liger and torch.is_grad_enabled() and len(positions):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        vocabulary, width = weight.shape
        memory = torch.cuda.mem_get_info()[1] if weight.requires_grad else 0
        loss = liger_fused_linear_cross_entropy(
            rows,
            weight,
            targets,
            bias=bias,
            reduction="sum",
            accum_dtype=torch.float32,
            chunk_mem_const=loss_widening(len(rows), vocabulary, width, memory),
        )
        return loss, torch.zeros_like(loss)
    return _ChunkedCrossEntropy.apply(rows, weight, bias, targets)


class ChunkedHead:
    """Make a causal model's head return `[summed loss, correct tokens]` while labels are set.

    Without labels it returns logits. The loss is computed inside the head's own forward: only there
    has ZeRO-3 gathered the head's weight. `proof.py` shows that this is the model's own loss.
    probe: asked for what the head returns in place of logits, while it is set.
    """

    def __init__(self, head: Any, liger: bool) -> None:
        self.head, self.liger = head, liger
        self.labels: Tensor | None = None
        self.probe: Callable[[Tensor, Tensor], Tensor] | None = None
        self.made: Tensor | None = None  # what the head has returned, until it is checked
        self.checked = False
        self.plain_forward = head.forward
        head.forward = self.head_forward

    def head_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the head returns. input: [B, S, H]."""
        if self.probe is not None:
            return self.probe(input, self.plain_forward(input, *args, **kwargs))
        if self.labels is None:
            return self.plain_forward(input, *args, **kwargs)
        loss = torch.stack(
            cross_entropy_sum(input, self.head.weight, self.head.bias, self.labels, self.liger)
        )
        self.made = None if self.checked else loss
        return loss

    @classmethod
    def install(cls, model: PreTrainedModel, liger: bool = False) -> "ChunkedHead | None":
        """Install it on the model's head. Return None where the head is more than one matrix."""
        head = model.get_output_embeddings()
        # A parameter beside the matrix would be trained without a gradient.
        if isinstance(head, nn.Linear) and {n for n, _ in head.named_parameters()} <= _OF_A_MATRIX:
            return cls(head, liger)
        return None

    def remove(self) -> None:
        """Give the head its own forward back."""
        self.head.forward = self.plain_forward

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (summed loss, correct tokens) of one batch with labels.

        Raise RunError where the model changes what its head returns.
        """
        self.labels = inputs["labels"]
        try:
            output = _logits(model, inputs)
        finally:
            self.labels = None
        if self.made is not None and torch.is_grad_enabled():
            _check_unchanged(self.made, output, model)
            self.checked = True
        self.made = None
        loss, correct_tokens = output
        return loss, correct_tokens.detach()


def _check_unchanged(made: Tensor, output: Tensor, model: nn.Module) -> None:
    """Raise RunError where an operation lies between what the head made and the model's output.

    Also one that changes nothing yet, such as a trained scale of 1. DeepSpeed's hooks are no
    operations: they are autograd functions in Python, with one input.
    """
    node = output.grad_fn
    while node is not made.grad_fn:
        above = node.next_functions if isinstance(node, BackwardCFunction) else ()
        if not above or above[0][0] is None:
            name = type(getattr(model, "module", model)).__name__  # of DeepSpeed's engine
            raise RunError(
                f"{name} changes its logits while it trains",
                found=type(node).__name__,
                fix="--disable_optimizations fused_loss",
            )
        node = above[0][0]


def whole_logits(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return (summed loss, correct tokens) from the model's own logits, row by row in fp32.

    For heads on which ChunkedHead cannot be installed.
    """
    logits = _logits(model, inputs)
    loss = correct_tokens = torch.zeros((), device=logits.device)
    for row, targets in zip(logits[:, :-1], inputs["labels"][:, 1:]):
        loss = loss + nn.functional.cross_entropy(
            row.float(), targets, ignore_index=IGNORED, reduction="sum"
        )
        correct_tokens = correct_tokens + (row.argmax(-1) == targets).sum()
    return loss, correct_tokens


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    inputs = dict(inputs)
    del inputs["labels"]
    return model(**inputs, use_cache=False).logits
