"""RAM that a GPU copies from at full speed: locked where it is.

torch's allocator of pinned memory rounds each block up to a power of two where it cannot be told
otherwise (torch before 2.13, system/hardware.py): 2.6 GiB of 13.4 for a model of 3.6B.
"""

import weakref
from typing import Any

import torch


def zeros(numel: int, dtype: torch.dtype, owner: Any, lock: bool = True) -> torch.Tensor:
    """Return a flat tensor of zeros in RAM, touched by all cores.

    lock: on a CUDA machine it is locked until `owner` ends. Where that fails copies are slower.
    """
    tensor = torch.empty(numel, dtype=dtype)
    tensor.zero_()
    if not (numel and lock and torch.cuda.is_available()):
        return tensor
    runtime: Any = torch.cuda.cudart()
    address = tensor.data_ptr()
    if runtime.cudaHostRegister(address, tensor.nbytes, 0) == runtime.cudaError.success:
        weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
        return tensor
    # CUDA keeps the error until somebody asks for it: that must not be the next launch of the run.
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        pass
    return tensor
