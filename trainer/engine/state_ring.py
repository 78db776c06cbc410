"""Optimizer states on NVMe, on their way to the CPU's step and back through a ring of buffers.

DeepSpeed's swapper holds whole sub-groups: 9 buffers of the largest one. Here an optimizer step is
one line of pieces over all sub-groups. The next ones are read while one is stepped and those before
it are written, and a slot of the ring holds one piece. Each transfer is a system call in a thread:
past the page cache, its result checked, and what is read compared with what was written
(system/swap_stamps.py).
"""

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from trainer.config.ds_config import RING_PIECE, RING_SLOTS
from trainer.system.swap_stamps import BLOCK, damaged

ALIGNED = 4096  # bytes: O_DIRECT's positions and sizes
THREADS = 16  # transfers of one block at a time
# State keys: an fp32 weight, or the low half of one.
WEIGHT, LOW = "weight", "low"


class Piece(NamedTuple):
    """`numel` elements of a sub-group, from element `begin` on."""

    group: int
    begin: int
    numel: int


Tensors = dict[str, torch.Tensor]  # a piece's, by state key
Transfers = list[Future[None]]
Slot = tuple[memoryview, dict[str, int]]  # its bytes, and where those of each state key begin


def pieces(group: int, numel: int) -> list[Piece]:
    """Return the pieces of a sub-group of so many elements."""
    starts = range(0, numel, RING_PIECE)
    return [Piece(group, at, min(RING_PIECE, numel - at)) for at in starts]


def _rounded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class StateRing:
    """The states of one rank's sub-groups, a file for each of a sub-group's tensors.

    sizes: {sub-group: elements}. dtypes: {state key: type on disk}. space: the run's SwapSpace.
    on_disk: sub-groups that have been written; the tensors of the others begin as zeros.
    """

    def __init__(
        self, space: Any, rank: int, sizes: dict[int, int], dtypes: dict[str, torch.dtype]
    ) -> None:
        self.space, self.rank, self.sizes, self.dtypes = space, rank, sizes, dtypes
        self.on_disk: set[int] = set()
        self.pool = ThreadPoolExecutor(THREADS, "states")
        longest = min(RING_PIECE, max(sizes.values()))
        self.slots = [self._slot(longest) for _ in range(RING_SLOTS)]
        (space.folder / "states").mkdir(exist_ok=True, mode=0o700)

    def path(self, group: int, state_key: str) -> str:
        """Return the file of one tensor."""
        return str(self.space.folder / "states" / f"{group}_{state_key}.rank{self.rank}.swp")

    def step(
        self, groups: Iterable[int], make: Callable[[Piece, Tensors], None], read: bool = True
    ) -> None:
        """Read each piece of these sub-groups, let `make` change it, and write it.

        read: False leaves the pieces as they are in the buffers, for a `make` that fills them.
        Raises RunError where a transfer fails, or what was read is not what was written.
        """
        self.begin(groups, read)
        self.go_on(make)

    def begin(self, groups: Iterable[int], read: bool = True) -> None:
        """Begin to read these sub-groups' pieces, as many as there are slots; `go_on` follows."""
        self.groups, self.read = list(groups), read
        self.waiting = deque(p for group in self.groups for p in pieces(group, self.sizes[group]))
        self.free, self.reading = deque(self.slots), deque[tuple[Piece, Slot, Transfers]]()
        for group in self.groups:
            for key, dtype in self.dtypes.items():
                path, size = self.path(group, key), _rounded(self.sizes[group] * dtype.itemsize)
                if group not in self.on_disk:
                    self.space.prepare(path, size)
                elif read:
                    self.space.check(path)
        self._read_ahead()

    def _read_ahead(self) -> None:
        while self.waiting and self.free:
            piece, slot = self.waiting.popleft(), self.free.popleft()
            self.reading.append((piece, slot, self._read(piece, slot) if self.read else []))

    def go_on(self, make: Callable[[Piece, Tensors], None]) -> None:
        """Make and write all pieces of the sub-groups that were begun."""
        writing: deque[tuple[Slot, Transfers]] = deque()
        while self.reading:
            piece, slot, transfers = self.reading.popleft()
            _wait_for(transfers)
            make(piece, self._tensors(piece, slot))
            writing.append((slot, self._transfer(self._write_block, piece, slot)))
            # A slot is free once it is written; one is waited for only where none is left.
            while writing and (
                (self.waiting and not self.free and not self.reading) or _are_done(writing[0][1])
            ):
                slot, transfers = writing.popleft()
                _wait_for(transfers)
                self.free.append(slot)
            self._read_ahead()
        for _, transfers in writing:
            _wait_for(transfers)
        self.on_disk.update(self.groups)

    def _slot(self, numel: int) -> Slot:
        begins, size = {}, 0
        for key, dtype in self.dtypes.items():
            begins[key] = size
            size += _rounded(numel * dtype.itemsize)
        return memoryview(mmap.mmap(-1, size)), begins  # begins at a page

    def _tensors(self, piece: Piece, slot: Slot) -> Tensors:
        buffer, begins = slot
        return {
            key: torch.frombuffer(buffer, dtype=dtype, count=piece.numel, offset=begins[key])
            for key, dtype in self.dtypes.items()
        }

    def _read(self, piece: Piece, slot: Slot) -> Transfers:
        if piece.group in self.on_disk:
            return self._transfer(self._read_block, piece, slot)
        for tensor in self._tensors(piece, slot).values():
            tensor.zero_()
        return []

    def _transfer(
        self, transfer: Callable[[str, memoryview, int], None], piece: Piece, slot: Slot
    ) -> Transfers:
        """Begin the transfers of a piece, a block each."""
        buffer, begins = slot
        transfers = []
        for key, dtype in self.dtypes.items():
            path, begin = self.path(piece.group, key), piece.begin * dtype.itemsize
            size = _rounded(piece.numel * dtype.itemsize)
            for at in range(0, size, BLOCK):
                block = buffer[begins[key] + at : begins[key] + min(at + BLOCK, size)]
                transfers.append(self.pool.submit(transfer, path, block, begin + at))
        return transfers

    def _read_block(self, path: str, block: memoryview, offset: int) -> None:
        _call(os.preadv, os.O_RDONLY, path, block, offset)
        self.space.stamps.compare_block(path, block, offset)

    def _write_block(self, path: str, block: memoryview, offset: int) -> None:
        self.space.stamps.stamp_block(path, block, offset)
        _call(os.pwritev, os.O_WRONLY, path, block, offset)


def _call(
    call: Callable[[int, Any, int], int], mode: int, path: str, block: memoryview, offset: int
) -> None:
    """Make one transfer past the page cache. Raises RunError where it is not whole."""
    try:
        handle = os.open(path, mode | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            done = call(handle, [block], offset)
        finally:
            os.close(handle)
        found = f"{done:,} bytes"
    except OSError as error:
        done, found = 0, str(error.strerror)
    if done != len(block):
        raise damaged(path, found, f"a transfer of {len(block):,} bytes at {offset:,}")


def _are_done(transfers: Transfers) -> bool:
    return all(transfer.done() for transfer in transfers)


def _wait_for(transfers: Transfers) -> None:
    for transfer in transfers:
        transfer.result()
