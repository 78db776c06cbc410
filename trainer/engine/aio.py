"""DeepSpeed's libaio op: loaded, and its writes and reads of swap files checked."""

from types import ModuleType
from typing import Any

import torch
from deepspeed.ops import op_builder

from trainer.system.swap_dir import SwapSpace


def load_aio() -> ModuleType:
    """Return the compiled op, with the class `aio_handle`; it is built where it is missing."""
    builder: Any = op_builder
    return builder.AsyncIOBuilder().load(verbose=False)


def watch_swap_files(space: SwapSpace) -> None:
    """Let every write prepare its swap file first, and every read check it.

    DeepSpeed never looks at what libaio answers, so a full disk leaves holes in files. A read has
    to look too: the next write would fill a hole that nobody has seen.
    """
    handle = load_aio().aio_handle
    stock_write, stock_read = handle.async_pwrite, handle.async_pread

    def async_pwrite(self: Any, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        space.prepare(path, buffer.nbytes)
        return stock_write(self, buffer, path, offset)

    def async_pread(self: Any, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        space.check(path)
        return stock_read(self, buffer, path, offset)

    handle.async_pwrite, handle.async_pread = async_pwrite, async_pread
