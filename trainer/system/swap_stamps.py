"""Checksums of what a rank wrote to its swap files, and the check of what it reads back.

They are in memory, so an overwrite that a disk lost or put elsewhere cannot look right. Every byte
is hashed. 64 bytes of each page would take a fifth of the time, but a stale page would pass where
those belong to rows of an embedding that no batch had. XXH3 does 19 GB/s a core, where a disk does
1 to 7 (AMD EPYC, 2026-11-29). A write is hashed while the disk writes, a read on several cores.
Does not import torch.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from trainer.errors import FAILED, RunError

BLOCK = 2**22  # bytes under one checksum, and of a thread's turn


class Stamp(NamedTuple):
    """The checksum of a block. before: that of what the block held before, where it is known."""

    length: int
    checksum: int
    before: int | None


def damaged(path: str, found: str, needed: str) -> RunError:
    """Return the error for a swap file that does not hold what was written."""
    return RunError(
        f"a swap file is damaged: {path}",
        found=found,
        needed=needed,
        fix="check the disk (dmesg), then resume from the last checkpoint",
        code=FAILED,
    )


class Stamps:
    """The stamps of one rank's swap files: {path: {first byte: stamp}}."""

    def __init__(self) -> None:
        self.files: dict[str, dict[int, Stamp]] = {}
        self.pool = ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "stamps")

    def written(self, path: str, data: memoryview, offset: int = 0) -> list[Future[None]]:
        """Begin to stamp bytes that go to the file at the offset.

        They must not change until every future returned is done.
        """
        from xxhash import xxh3_64_intdigest

        stamps, end = self.files.setdefault(path, {}), offset + len(data)
        old = {at: stamps.pop(at) for at in self._overlapping(path, offset, end)}

        def stamp(at: int) -> None:
            block = data[at - offset : at - offset + BLOCK]
            before = old[at].checksum if at in old else None
            stamps[at] = Stamp(len(block), xxh3_64_intdigest(block), before)

        return [self.pool.submit(stamp, at) for at in range(offset, end, BLOCK)]

    def read(self, path: str, data: memoryview, offset: int = 0) -> list[Future[None]]:
        """Begin to compare bytes that were read at the offset. A future may raise RunError.

        Raises RunError where a byte was never written.
        """
        end = offset + len(data)
        begins, at = self._overlapping(path, offset, end), offset
        for begin in begins:
            if begin > at:
                break
            at = begin + self.files[path][begin].length
        if at < end:
            raise damaged(path, f"byte {at:,} was never written", f"{offset:,} to {end:,}")
        return [self.pool.submit(self._compare, path, data, offset, begin) for begin in begins]

    def stamp_block(self, path: str, block: memoryview, offset: int) -> None:
        """Stamp a block, in this thread. Every write of the file has the same blocks."""
        from xxhash import xxh3_64_intdigest

        stamps = self.files.setdefault(path, {})
        old = stamps.get(offset)
        stamps[offset] = Stamp(len(block), xxh3_64_intdigest(block), old and old.checksum)

    def compare_block(self, path: str, block: memoryview, offset: int) -> None:
        """Compare a block that was read, in this thread. Raises RunError where it differs."""
        if offset not in self.files.get(path, {}):
            raise damaged(path, f"byte {offset:,} was never written", f"{len(block):,} bytes there")
        self._compare(path, block, offset, offset)

    def _overlapping(self, path: str, begin: int, end: int) -> list[int]:
        stamps = self.files.get(path, {})
        return sorted(at for at, stamp in stamps.items() if at < end and at + stamp.length > begin)

    def _compare(self, path: str, data: memoryview, offset: int, begin: int) -> None:
        from xxhash import xxh3_64_intdigest

        stamp, stop = self.files[path][begin], offset + len(data)
        end = begin + stamp.length
        block: Any = data[max(begin - offset, 0) : end - offset]
        if begin < offset or end > stop:  # of a partial read: the file has the rest
            with open(path, "rb") as file:
                before = os.pread(file.fileno(), max(offset - begin, 0), begin)
                block = b"".join((before, block, os.pread(file.fileno(), max(end - stop, 0), stop)))
        checksum = xxh3_64_intdigest(block)
        if checksum != stamp.checksum:
            stale = checksum == stamp.before
            found = "what was there before the last write" if stale else "other bytes"
            raise damaged(path, f"{found}, from byte {begin:,} to {end:,}", "what was written")
