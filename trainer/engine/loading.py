"""Where a model's weights are while it is loaded, before each trained one has its place.

DeepSpeed pins each weight in RAM by itself, in torch's blocks of powers of two (1.9 times the size
for a matrix of Qwen2.5-14B), and copies them all once more, into the sub-groups' buffers.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import Init

_stock_init: Any = Init.__init__


@contextlib.contextmanager
def trained_weights(on_gpu: bool) -> Iterator[None]:
    """Load weights that are all trained: they move into buffers, and are not pinned before.

    on_gpu: their places are there, and twice their size is free there: they do not go through RAM.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _stock_init(self, *args, **kwargs)
        if self.remote_device == OffloadDeviceEnum.cpu:
            self.pin_memory = False
            if on_gpu:
                self.remote_device = self.local_device

    Init.__init__ = init
    try:
        yield
    finally:
        Init.__init__ = _stock_init
