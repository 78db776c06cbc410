"""Selective activation checkpointing: which decoder layers keep their activations on the GPU.

Gradient checkpointing runs every layer's forward pass twice. That is half as much arithmetic again
for LoRA, and a third for a full fine-tune. Offloading the weights leaves most of a GPU empty, so as
many layers as fit keep their activations, and only the others are recomputed in the backward pass.
The results are the same.
"""

from typing import Any

import torch
from torch import nn

from trainer.console import say
from trainer.distributed import all_gather_object
from trainer.engine.kept_weights import AUTO, KeptWeights
from trainer.errors import RunError
from trainer.plan.estimate import SPARE_GPU
from trainer.system import hardware

# The passes in which AUTO acts, counted from 1. A pass is a micro-batch, forward and backward; the
# first optimizer step counts as one, in which the optimizer makes its state. It recomputes all
# layers. A new number of kept layers changes the order in which modules run. ZeRO-3 then drops its
# record of that order, makes a new one during the next pass, and fetches no parameters ahead until
# it is complete. So the second pass after KEEP_ONE is the first that uses as much memory as the
# later ones.
KEEP_ONE = 2
MEASURE = KEEP_ONE + 2
# The optimizer steps after a change in which the allocator is watched, from the second pass on: in
# the one right after the change, the allocator may have to make room for other blocks.
WATCHED = 3


class SelectiveCheckpointing:
    """Set `gradient_checkpointing` of the decoder layers: False keeps activations on the GPU.

    keep: the number of layers that keep theirs, or AUTO: as many as fit. Raise RunError where there
    are fewer layers. largest_batch_tokens: tokens of the largest micro-batch that can come.
    quadratic: activations grow with the square of the tokens, not in proportion.

    A number is set before the first pass and stays. AUTO goes through these states:

    - before pass KEEP_ONE: keep one layer.
    - from pass MEASURE on, in the first one with an optimizer step at its end: measure that layer's
      bytes and the peak. After it: keep as many as fit.
    - from the second pass after each change, for WATCHED optimizer steps: watch the allocator.
      Where it ran short, keep an eighth fewer, which is a change again.
    - done: in all other passes nothing happens.

    weights: where all layers fit and memory is left, their weights stay as well. Where the
    allocator ran short, they are the first to go.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        keep: int | str,
        largest_batch_tokens: int,
        quadratic: bool,
        weights: KeptWeights | None = None,
    ) -> None:
        self.layers: list[Any] = [m for m in layers if hasattr(m, "gradient_checkpointing")]
        # A model without such layers has nothing to measure.
        self.keep = keep if self.layers or keep != AUTO else 0
        self.largest_batch_tokens, self.quadratic = largest_batch_tokens, quadratic
        self.weights = weights
        self.passes = self.kept = self.layer_bytes = self.retries = 0
        self.stepped = self.measured = self.acts = False
        self.watch_from = self.watched = 0
        if isinstance(self.keep, int) and self.keep > len(self.layers):
            raise RunError(
                "--kept_layers is more than there are",
                found=keep,
                needed=f"at most {len(self.layers)}, or auto",
            )

    def before_pass(self, last: bool) -> None:
        """Prepare the next micro-batch. last: the optimizer step is made after it."""
        if self.passes and not self.stepped:
            return
        self.passes += 1
        self.acts = False
        if isinstance(self.keep, int):
            # Not earlier: when training begins, transformers makes all layers recompute.
            if self.passes == 1:
                self._keep_last(self.keep)
        elif self.passes == KEEP_ONE:
            self._keep_last(1)
        elif self.passes >= MEASURE and not self.measured:
            if last:
                self._start_measuring()
                self.acts = True
        elif self.passes >= self.watch_from and self.watched:
            # Read anew before each pass: an evaluation in between may have run short too.
            self.retries, self.acts = _allocator_retries(), True

    def after_pass(self, tokens: int, last: bool) -> None:
        """Decide after a micro-batch of so many tokens, with padding."""
        self.stepped |= last
        if not self.acts:
            return
        if not self.measured:
            self._keep_as_many_as_fit(tokens)
            self.measured = True
            return
        self.watched -= last
        self._keep_fewer_if_short()

    def _keep_last(self, count: int) -> None:
        # The backward pass frees the last layers first, before a recomputed layer needs room.
        for i, layer in enumerate(self.layers):
            layer.gradient_checkpointing = i < len(self.layers) - count
        self.kept = count
        self.watch_from, self.watched = self.passes + 2, WATCHED

    def _start_measuring(self) -> None:
        layer = self.layers[-1]
        # Inside of ZeRO-3's hooks, which gather the layer's parameters before the forward pass and
        # release them after it: a pre-hook runs after theirs, and the other one before theirs.
        self.hooks = (
            layer.register_forward_pre_hook(self._before_layer),
            layer.register_forward_hook(self._after_layer, prepend=True),
        )
        torch.cuda.reset_peak_memory_stats()

    def _before_layer(self, *_: Any) -> None:
        self.allocated = torch.cuda.memory_allocated()

    def _after_layer(self, *_: Any) -> None:
        self.layer_bytes = max(self.layer_bytes, torch.cuda.memory_allocated() - self.allocated)

    def _keep_as_many_as_fit(self, tokens: int) -> None:
        for hook in self.hooks:
            hook.remove()
        scale = max(1.0, self.largest_batch_tokens / tokens)
        if self.quadratic:
            scale **= 2
        layer_bytes = self.layer_bytes * scale
        # "active" counts what is freed and still in use by a kernel, too.
        stats = torch.cuda.memory_stats()
        current = stats["active_bytes.all.current"]
        peak = current + (stats["active_bytes.all.peak"] - current) * scale
        limit = hardware.gpu_room(SPARE_GPU)
        # One layer is kept already, and part of the peak.
        fitting = max(1 + int((limit - peak) / max(layer_bytes, 1)), 0)
        left = limit - peak - (len(self.layers) - 1) * layer_bytes
        weights = 0
        if self.weights and self.weights.moves:
            weights = int(left / self.weights.layer_bytes)
        # ZeRO-3 needs the same order of modules on all ranks.
        fits = [min(those) for those in zip(*all_gather_object((fitting, weights)))]
        self._keep_last(min(fits[0], len(self.layers)))
        say(
            f"activations: {self.kept} of {len(self.layers)} decoder layers keep theirs on the GPU "
            f"({layer_bytes / 2**30:.2f} GiB each), the others are recomputed"
        )
        if self.weights and fits[1] > 0:
            self.weights.keep_last(min(fits[1], len(self.layers)))
            say(
                f"weights: {self.weights.kept} of {len(self.layers)} decoder layers keep theirs on "
                "the GPU from the forward to the backward pass"
            )

    def _keep_fewer_if_short(self) -> None:
        retries = max(all_gather_object(_allocator_retries() - self.retries))
        if not retries:
            return
        if self.weights and self.weights.kept:
            self.weights.keep_last(0)
            self._keep_last(self.kept)  # and is watched again
            say(f"weights: the allocator ran short {retries} times, so they do not stay on the GPU")
        elif self.kept:
            self._keep_last(self.kept * 7 // 8)
            say(
                f"activations: the allocator ran short {retries} times, "
                f"so {self.kept} layers keep theirs"
            )


def _allocator_retries() -> int:
    """Return how often the allocator has given memory back to CUDA and asked again."""
    return torch.cuda.memory_stats()["num_alloc_retries"]
