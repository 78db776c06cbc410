"""Gradients and weights of the GPU's memory on their way to the CPU's step, and weights back.

Where a sub-group's states are in RAM or on NVMe and its weights or gradients are on the GPU, the
CPU's step sees them a piece at a time: the next pieces come and the last one goes meanwhile.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from trainer.config.ds_config import RING_PIECE, STAGED_PIECES
from trainer.engine.placement import HBM, Placement
from trainer.engine.state_ring import Piece


class Slot(NamedTuple):
    """Buffers of a piece in RAM."""

    grad: torch.Tensor
    weight: torch.Tensor


class Staging:
    """Moves pieces: two come, one is stepped, one goes.

    grads, weights: flat tensors by sub-group, weights None where it is on NVMe. halved: whether a
    weight is read too, as the half of a master weight.
    """

    def __init__(
        self, placement: Placement, grads: list[torch.Tensor], weights: list[Any], halved: bool
    ) -> None:
        self.grads, self.weights, self.halved = grads, weights, halved
        self.staged_grads = [tier == HBM for tier in placement.gradients]
        self.staged_weights = [
            tier == HBM and weight is not None
            for tier, weight in zip(placement.weights, weights, strict=True)
        ]
        moved = [grads[i].numel() for i in range(len(grads)) if self.moves(i)]
        numel = min(RING_PIECE, max(moved, default=0))
        cuda = any(grads[i].is_cuda or self.staged_weights[i] for i in range(len(grads)))
        cuda &= torch.cuda.is_available()
        self.stream = torch.cuda.Stream() if cuda and numel else None
        dtype = next((w.dtype for w in weights if w is not None), torch.float32)
        self.free = deque(
            Slot(*(torch.empty(numel, dtype=d, pin_memory=cuda) for d in (grads[0].dtype, dtype)))
            for _ in range(STAGED_PIECES if numel else 0)
        )
        self.coming: deque[Piece] = deque()
        self.here: deque[tuple[Slot, Any]] = deque()
        self.going: deque[tuple[Slot, Any, Callable[[], None]]] = deque()

    def moves(self, i: int) -> bool:
        """Return whether anything of a sub-group has to move."""
        return self.staged_grads[i] or self.staged_weights[i]

    def begin(self, pieces: list[Piece]) -> None:
        """Prepare to move these, in this order, once what the GPU has been given is done."""
        self.coming = deque(piece for piece in pieces if self.moves(piece.group))
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())

    def take(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a piece's gradient and weight in RAM; None for one that is on NVMe."""
        i, span = piece.group, slice(piece.begin, piece.begin + piece.numel)
        if not self.moves(i):
            return self.grads[i][span], None if self.weights[i] is None else self.weights[i][span]
        while self.coming and self.free:
            self._fetch(self.coming.popleft())
        slot, event = self.here[0]
        if event:
            event.synchronize()
        grad = slot.grad[: piece.numel] if self.staged_grads[i] else self.grads[i][span]
        weight = slot.weight[: piece.numel]
        if not self.staged_weights[i]:
            weight = None if self.weights[i] is None else self.weights[i][span]
        return grad, weight

    def _fetch(self, piece: Piece) -> None:
        i, slot = piece.group, self.free.popleft()
        span = slice(piece.begin, piece.begin + piece.numel)
        with torch.cuda.stream(self.stream):
            if self.staged_grads[i]:
                slot.grad[: piece.numel].copy_(self.grads[i][span], non_blocking=True)
            if self.staged_weights[i] and self.halved:
                slot.weight[: piece.numel].copy_(self.weights[i][span], non_blocking=True)
            self.here.append((slot, self.stream.record_event() if self.stream else None))

    def give(self, piece: Piece, done: Callable[[], None]) -> None:
        """Let a piece that was taken go back, and call `done` once its weights are there."""
        i = piece.group
        if not self.moves(i):
            done()
            return
        slot, _ = self.here.popleft()
        event = None
        if self.staged_weights[i]:
            span = slice(piece.begin, piece.begin + piece.numel)
            with torch.cuda.stream(self.stream):
                self.weights[i][span].copy_(slot.weight[: piece.numel], non_blocking=True)
                event = self.stream.record_event() if self.stream else None
        self.going.append((slot, event, done))
        self.finish(but=1)

    def finish(self, but: int = 0) -> None:
        """Wait until all but so many pieces are back."""
        while len(self.going) > but:
            slot, event, done = self.going.popleft()
            if event:
                event.synchronize()
            done()
            self.free.append(slot)
