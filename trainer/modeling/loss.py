"""Cross-entropy over the vocabulary without the logits of a whole batch.

A 128k vocabulary and 16 x 2,048 tokens make 16 GB of fp32 logits, more than anything else on an offloaded GPU. Here the head and
the loss go chunk by chunk, and the gradients of the head's input and weight are made in the forward pass while the chunk's logits
exist (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989), in plain torch.
"""

import torch

CHUNK_BYTES = 2**28  # fp32 logits of one chunk; two more tensors of the size live for a moment
IGNORED = -100

# Families that change the logits after the head; for these the model's own forward is kept.
LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_multiplier_scale",
)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden [T, H], weight [V, H], labels [T] → (summed loss, correct tokens), fp32 scalars."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        )
        for start in range(0, len(hidden), chunk):
            rows, targets = hidden[start : start + chunk], labels[start : start + chunk]
            logits = rows @ weight.T
            if bias is not None:
                logits = logits + bias
            logits = logits.float()
            correct += (logits.argmax(-1) == targets).sum()
            logits -= torch.logsumexp(logits, -1, keepdim=True)  # log-probabilities, in place
            loss -= logits.gather(1, targets[:, None]).sum()
            if not any(needs[:3]):
                continue
            grad = logits.exp_()
            grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + len(rows)])
            if grad_weight is not None:
                grad_weight += grad.T @ rows
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        hidden, weight, bias = ctx.grads
        ctx.grads = None
        if hidden is not None:
            hidden = hidden.mul_(grad_loss)
        if weight is not None:
            weight = weight.mul_(grad_loss).to(ctx.dtypes[1])
        if bias is not None:
            bias = bias.mul_(grad_loss).to(ctx.dtypes[1])
        return hidden, weight, bias, None


def cross_entropy_sum(hidden, weight, bias, labels, liger=False):
    """(summed loss, correct tokens) over the labelled positions; next-token shift included.

    hidden: [B, S, H]; weight: [V, H]; labels: [B, S], -100 where nothing is predicted. liger: by Liger's kernel where there is a
    gradient; it counts no correct tokens.
    """
    targets = labels[:, 1:].reshape(-1)
    kept = targets.ne(IGNORED).nonzero(as_tuple=True)[0]
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept].contiguous()
    if len(kept) == 0:  # keeps the graph whole, so that every rank runs the same backward pass
        return hidden.sum() * 0.0 + weight.sum() * 0.0, torch.zeros((), device=hidden.device)
    if liger and torch.is_grad_enabled():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        loss = liger_fused_linear_cross_entropy(
            rows, weight, targets[kept], bias=bias, reduction="sum", accum_dtype=torch.float32
        )
        return loss, torch.zeros_like(loss)
    return _ChunkedCrossEntropy.apply(rows, weight, bias, targets[kept])


class ChunkedHead:
    """Makes a causal model's head return `[summed loss, correct tokens]` instead of logits while labels are set.

    The loss is computed inside the head's own forward, because there, and only there, ZeRO-3 has the head's weight gathered.
    """

    def __init__(self, head, liger=False):
        self.labels = None
        self._plain = head.forward

        def forward(hidden):
            if self.labels is None:
                return self._plain(hidden)
            return torch.stack(
                [
                    t.float()
                    for t in cross_entropy_sum(hidden, head.weight, head.bias, self.labels, liger)
                ]
            )

        head.forward = forward

    @classmethod
    def install(cls, model, liger=False):
        """A ChunkedHead on the model's output embedding, or None where the model does more than one linear layer there."""
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        changed = any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_CHANGES)
        if type(head) is not torch.nn.Linear or changed:
            return None
        return cls(head, liger)

    def __call__(self, model, inputs):
        """(summed loss, correct tokens) of one batch with labels."""
        self.labels = inputs["labels"]
        try:
            output = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
        finally:
            self.labels = None
        return output.logits[0], output.logits[1].detach()


def whole_logits(model, inputs):
    """The same numbers from the model's own logits, row by row in fp32: for heads that ChunkedHead does not take."""
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    loss = correct = 0.0
    for row, labels in zip(logits[:, :-1], inputs["labels"][:, 1:]):
        loss = loss + torch.nn.functional.cross_entropy(
            row.float(), labels, ignore_index=IGNORED, reduction="sum"
        )
        correct = correct + (row.argmax(-1) == labels).sum()
    return loss, correct
