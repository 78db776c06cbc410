"""adam.c from Python: one AdamW update of flat tensors in RAM."""

import ctypes
import math
from typing import Any

import torch

BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: -16}  # as adam.c has them


class Update(ctypes.Structure):
    """`update` of adam.c."""

    _fields_ = [
        (name, kind)
        for kind, names in (
            (ctypes.c_void_p, ("weight", "low", "exp_avg", "exp_avg_sq", "grad", "param_lp")),
            (ctypes.c_int64, ("size", "left")),
            (ctypes.c_float, ("scale", "lr", "beta1", "beta2", "eps", "decay")),
            (ctypes.c_float, ("correction1", "correction2")),
            (ctypes.c_int, ("grad_bits", "lp_bits")),
        )
        for name in names
    ]


def update_of(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    scale: float,
    param_lp: torch.Tensor | None = None,
) -> Update:
    """Return Adam's update of one flat tensor.

    weight: fp32, or int16: the low half of one whose high half is param_lp. grad: a type of BITS;
    param_lp: the low-precision copy of the weight, of the same type or, beside an fp32 gradient, of
    any. state: exp_avg, exp_avg_sq, and step, counted from 1.
    group: the optimizer's settings. scale multiplies the gradient.
    """
    (beta1, beta2), step = group["betas"], state["step"]
    halved = weight.dtype == torch.int16
    return Update(
        None if halved else weight.data_ptr(),
        weight.data_ptr() if halved else None,
        state["exp_avg"].data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        grad.data_ptr(),
        None if param_lp is None else param_lp.data_ptr(),
        weight.numel(),
        weight.numel(),
        scale,
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        1 - beta1**step,
        1 / math.sqrt(1 - beta2**step),
        BITS[grad.dtype],
        BITS[(grad if param_lp is None else param_lp).dtype],
    )


def run(adam: ctypes.CDLL, updates: Any, threads: int) -> None:
    """Make an array of updates, begun in their order. Other Python threads go on meanwhile."""
    adam.adam_step(updates, len(updates), threads)
