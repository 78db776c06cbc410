"""Proofs before the first optimizer step: the loss is the model's own, packed samples stay apart.

One forward pass of a few tokens shows both, so no list of model families is kept for either.

- The head answers with a probe in place of logits, of values that no change leaves as they are. The
  model's output must be the probe: then nothing lies between its head and its logits.
- The rows hold the same sample behind different ones, and once at the front. Every decoder layer
  must compute the same for it. After each layer the rows are made equal again: a difference is that
  layer's own, and rounding does not grow from layer to layer.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.dataset import Sample
from trainer.errors import RunError
from trainer.modeling.load import decoder_layers
from trainer.modeling.loss import ChunkedHead

TOKENS = 32  # of a row, at most
_SHARE = 4  # every so many of them belong to the sample that all rows have


def proof_rows(tokens: np.ndarray, packing: bool, limit: int) -> list[list[Sample]]:
    """Return the packs of the batch that proves: four with packing, else one.

    tokens: ids that the model may see, int [any]. limit: the most tokens of a row. Packed, the
    same sample is the last of the first three, and the first of the fourth. The sample before it
    is the same in the first and third: what differs there is rounding.
    """
    size = max(2, min(TOKENS, limit))
    same = max(1, size // _SHARE)
    different = np.unique(tokens)
    before = np.resize(different, size - same)
    other = np.resize(np.roll(different, 1), size - same)  # another token at every position
    last = np.resize(different[::-1], same)
    packs = [[before]]
    if packing:
        packs = [[before, last], [other, last], [before, last], [last, before]]
    return [[(ids.astype(np.int32), ids.astype(np.int64)) for ids in pack] for pack in packs]


def prove(engine: Any, model: Any, head: ChunkedHead | None, batch: dict[str, Any]) -> bool:
    """Return whether the head's chunked loss is the loss of the model's own logits.

    engine: called with the batch, which is `collate`'s of `proof_rows`. model: the causal model in
    it. Raise RunError where samples of a packed row see each other, or where the model has not the
    logits of every token. All ranks call it at once.
    """
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "tokens")}
    starts = _starts(inputs["position_ids"])
    watch = SampleWatch(starts) if len(starts) > 1 else None
    probe = HeadProbe(head, inputs["input_ids"].shape) if head else None
    training = engine.training
    engine.eval()
    try:
        with ExitStack() as hooks, torch.no_grad():
            if watch:
                watch.install(model, hooks)
            if head:
                head.probe = probe
            logits = engine(**inputs, use_cache=False).logits
    finally:
        if head:
            head.probe = None
        engine.train(training)
    if watch:
        watch.check(type(model).__name__)
    exact = probe is not None and probe.check(logits)
    if logits.shape[:-1] != inputs["input_ids"].shape:
        raise RunError(
            f"{type(model).__name__} does not return the logits of every token",
            found=f"logits of shape {list(logits.shape)}",
            needed=f"{[*inputs['input_ids'].shape, 'vocabulary']}",
        )
    return exact


def _starts(positions: Tensor) -> list[int]:
    """Return where the shared sample begins in each row. positions: [rows, tokens]."""
    if len(positions) == 1:
        return [0]
    (begins,) = positions[0].eq(positions.min()).nonzero(as_tuple=True)
    return [int(begins[-1])] * (len(positions) - 1) + [0]


class HeadProbe:
    """Answer for the head once, and find out whether the model's logits are what the head returns.

    `exact` is false where it is not asked once, with a hidden state for every token, or where the
    head is not one product of matrices.
    """

    def __init__(self, head: ChunkedHead, tokens: torch.Size) -> None:
        self.head, self.tokens = head, tokens
        self.answer: Tensor | None = None
        self.exact = True

    def __call__(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Return what the head returns in place of its logits."""
        weight, bias = self.head.head.weight, self.head.head.bias
        self.exact = (
            self.answer is None
            and hidden.shape[:-1] == self.tokens
            and hidden.dtype == weight.dtype
            and weight.shape == (logits.shape[-1], hidden.shape[-1])  # not packed codes
            and torch.equal(nn.functional.linear(hidden, weight, bias), logits)
        )
        # Large and small values of both signs, others for every token: a limit, a factor, a mask
        # and another order all show.
        values = torch.arange(logits.shape[-1], device=logits.device) * 7919 % 4001 - 2000
        levels = torch.linspace(1 / 16, 1 / 8, self.tokens.numel(), device=logits.device)
        answer = torch.outer(levels.to(logits.dtype), values.to(logits.dtype))
        self.answer = answer.view_as(logits) if answer.numel() == logits.numel() else logits
        return self.answer

    def check(self, logits: Tensor) -> bool:
        """Return whether these logits of the model are the answer, bit by bit."""
        if self.answer is None or not self.exact:
            return False
        if logits.dtype not in (self.answer.dtype, torch.float32):
            return False  # rounded once more than the loss in chunks is
        return torch.equal(logits, self.answer.to(logits.dtype))


class SampleWatch:
    """Compare the sample that all rows have, layer by layer.

    starts: where it begins in each row; it ends with the first row. leak: the first module for
    which the sample is not what it is elsewhere, or None.
    """

    def __init__(self, starts: list[int]) -> None:
        self.starts = starts
        self.before: Tensor | None = None
        self.leak: str | None = None
        self.waiting: set[str] = set()  # layers that have not been compared

    def install(self, model: Any, hooks: ExitStack) -> None:
        """Compare before the first layer, after every layer and before the head."""
        layers = decoder_layers(model)
        names = [f"layer {i} ({type(layer).__name__})" for i, layer in enumerate(layers)]
        self.waiting = set(names) or {"its layers"}

        def before(where: str) -> Callable[..., None]:
            return lambda _, args, kwargs: self.compare(where, [*args, *kwargs.values()])

        def after(where: str) -> Callable[..., None]:
            return lambda _, args, output: self.compare(
                where, output if isinstance(output, tuple) else [output]
            )

        for name, layer in zip(names, layers):
            if layer is layers[0]:
                hook = layer.register_forward_pre_hook(before("embeddings"), with_kwargs=True)
                hooks.callback(hook.remove)
            hooks.callback(layer.register_forward_hook(after(name)).remove)
        head = model.get_output_embeddings()
        if isinstance(head, nn.Module):
            hook = head.register_forward_pre_hook(before("the last norm"), with_kwargs=True)
            hooks.callback(hook.remove)

    def compare(self, where: str, values: Sequence[Any]) -> None:
        """Compare the sample in the first hidden state, and make it that of the first row."""
        hidden = values[0] if len(values) else None
        if not torch.is_tensor(hidden) or hidden.dim() != 3 or len(hidden) != len(self.starts):
            return
        self.waiting.discard(where)
        length = hidden.shape[1] - self.starts[0]
        parts = [hidden[i, at : at + length] for i, at in enumerate(self.starts)]
        first = parts[0].float()
        # A difference counts in proportion to what the layer has added.
        added = first if self.before is None else first - self.before
        size = added.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        apart = [(part.float() - first).norm(dim=-1) / size for part in parts[1:]]
        behind_others, rounding, at_the_front = apart
        eps = torch.finfo(hidden.dtype).eps
        # Behind other samples nothing may change but by rounding. At another place kernels round
        # otherwise, and a token may take another expert for it; what is wrong there is wrong for
        # most tokens.
        bound = 8 * rounding.max() + eps / 4
        exact = behind_others.max() <= bound and at_the_front.median() <= eps**0.5
        if self.leak is None and not exact:
            self.leak = where
        for part in parts[1:]:
            part.copy_(parts[0])
        self.before = first

    def check(self, name: str) -> None:
        """Raise RunError where samples of a row see each other, or where that is not known."""
        if self.leak or self.waiting:
            raise RunError(
                f"packing is not exact for {name}: samples of one row would see each other",
                found=f"a sample's values change with its neighbours after {self.leak}"
                if self.leak
                else f"cannot be shown for {min(self.waiting)}",
                needed="a block mask for every layer, from position_ids",
                fix="--packing false; --train_sampling_strategy group_by_length keeps padding low",
            )
