"""DeepSpeed's libaio op: loaded, and its writes and reads of swap files checked."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from types import ModuleType
from typing import Any

import torch
from deepspeed.ops import op_builder

from trainer.system.swap_dir import SwapSpace
from trainer.system.swap_stamps import damaged

Check = Callable[[], list[Future[None]]]
watched: SwapSpace | None = None  # by watch_swap_files


def load_aio() -> ModuleType:
    """Return the compiled op, with the class `aio_handle`; it is built where it is missing."""
    builder: Any = op_builder
    return builder.AsyncIOBuilder().load(verbose=False)


def _bytes_of(buffer: torch.Tensor) -> memoryview:
    array: Any = buffer.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return memoryview(array)


def watch_swap_files(space: SwapSpace, libaio: bool) -> None:
    """Let every write prepare its swap file first and stamp it, and every read check it.

    libaio: whether parameters are on NVMe, which go through DeepSpeed's op.

    DeepSpeed never looks at what libaio answers: a full disk leaves holes in files, and an
    overwrite that fails leaves the old bytes. So a read is compared with what was written, when it
    has completed and before anybody has its bytes. It looks for holes too: the next write would
    fill one that nobody has seen.
    """
    global watched
    watched = space
    if not libaio:
        return
    handle = load_aio().aio_handle
    stock_write, stock_read, stock_wait = handle.async_pwrite, handle.async_pread, handle.wait
    # Of each handle: what checks its operations in flight, once they have completed.
    in_flight: dict[Any, list[Check]] = defaultdict(list)

    def begun(self: Any, answer: int, path: str, check: Check) -> int:
        if answer:
            raise damaged(path, f"its transfer was not begun ({answer})", "a file of this run")
        in_flight[self].append(check)
        return 0

    def async_pwrite(self: Any, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        space.prepare(path, offset + buffer.nbytes)
        answer = stock_write(self, buffer, path, offset)
        stamps = space.stamps.written(path, _bytes_of(buffer), offset)
        return begun(self, answer, path, lambda: stamps)

    def async_pread(self: Any, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        space.check(path)
        answer = stock_read(self, buffer, path, offset)
        return begun(self, answer, path, lambda: space.stamps.read(path, _bytes_of(buffer), offset))

    def wait(self: Any) -> int:
        checks = in_flight.pop(self, [])
        done = stock_wait(self)
        if done != len(checks):
            raise damaged(str(space.folder), f"{done} transfers completed", f"{len(checks)}")
        for future in [future for check in checks for future in check()]:
            future.result()
        return done

    def unchecked(*_: Any) -> None:
        raise NotImplementedError("this call of libaio's handle is not checked")

    handle.async_pwrite, handle.async_pread, handle.wait = async_pwrite, async_pread, wait
    # No swapper of DeepSpeed calls these.
    handle.pwrite = handle.pread = handle.sync_pwrite = handle.sync_pread = unchecked
