"""An fp32 master weight as the bf16 weight that the layers use, and 16 bits more.

The high half is the weight rounded to bf16, the low half its lower 16 bits. A weight that was
rounded up has a low half that is negative as int16, so that

    bits of the weight = high * 2^16 + low

for every value. That holds if a weight exactly between two bf16 values is rounded away from zero:
rounded to even, as torch does it, it would not tell which of the two it came from. So one weight
in 2^16 is a bf16 value further than torch would have it; the master is the same bit for bit. Every
NaN becomes one NaN, whose halves are NaN too.
"""

from typing import Any

import torch

from trainer.engine.values import is_finite

NAN = 0x7FC00000


def applies(zero: Any) -> bool:
    """Return whether a ZeRO-3 optimizer's master weights are two halves: in bf16, none on NVMe."""
    flats = zero.fp16_partitioned_groups_flat
    return zero.dtype == torch.bfloat16 and all(flat is not None for flat in flats)


@torch.no_grad()
def split(weight: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Write the halves of a flat fp32 tensor into a bf16 and an int16 tensor of its size."""
    bits = weight.view(torch.int32)
    if not is_finite(weight):
        bits = torch.where(weight.isnan(), NAN, bits)
    low.copy_(bits)
    high.view(torch.int16).copy_(bits.add(0x8000).bitwise_right_shift_(16))


@torch.no_grad()
def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the fp32 tensor of two halves."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(low).view(torch.float32)
