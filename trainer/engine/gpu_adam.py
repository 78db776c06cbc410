"""AdamW on a GPU with the bits that adam.c gives: each operation is rounded by itself, as IEEE 754.

A flat tensor in one pass: 26 bytes of the GPU's memory a parameter of bf16, where DeepSpeed's own
step takes 62. A run may so have any sub-group in any memory, and go on from any checkpoint.
"""

import ctypes
import functools
from typing import Any

import torch

from trainer.engine import cpu_adam

BLOCK = 1024  # elements of one program


@functools.cache
def _kernel() -> Any:
    """Return the compiled kernel. Raises ImportError where there is no Triton."""
    import triton
    import triton.language as tl

    # Without annotations: Triton looks each one up, and compiles none but tl.constexpr.
    @triton.jit
    def step(  # noqa: PLR0913
        weight,
        exp_avg,
        exp_avg_sq,
        grad,
        param_lp,
        size,
        scale,
        beta1,
        rest1,
        beta2,
        rest2,
        eps,
        rate,
        correction2,
        kept,
        HALVED: tl.constexpr,
        COPIED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32) * scale
        m = beta1 * tl.load(exp_avg + at, mask=inside, other=0) + rest1 * g
        v = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0) + rest2 * g * g
        old = tl.load(weight + at, mask=inside, other=0)
        if HALVED:
            high = tl.load(param_lp + at, mask=inside, other=0).to(tl.int16, bitcast=True)
            bits = (high.to(tl.int32) << 16) + old.to(tl.int32)
            old = bits.to(tl.float32, bitcast=True)
        w = old * kept - rate * tl.div_rn(m, tl.sqrt_rn(v) * correction2 + eps)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        if HALVED:
            bits = tl.where(w != w, 0x7FC00000, w.to(tl.int32, bitcast=True))
            high = ((bits + 0x8000) >> 16).to(tl.int16)
            tl.store(weight + at, bits.to(tl.int16), mask=inside)
            tl.store(param_lp + at, high.to(tl.bfloat16, bitcast=True), mask=inside)
        else:
            tl.store(weight + at, w, mask=inside)
            if COPIED:
                tl.store(param_lp + at, w.to(param_lp.dtype.element_ty), mask=inside)

    return step


def _rounded(value: float) -> float:
    return ctypes.c_float(value).value


def run(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    scale: float,
    param_lp: torch.Tensor | None,
) -> None:
    """Make one update, in the current stream. The arguments are those of cpu_adam.update_of."""
    update = cpu_adam.update_of(weight, grad, state, group, scale, param_lp)
    size = weight.numel()
    _kernel()[(-(-size // BLOCK),)](
        weight,
        state["exp_avg"],
        state["exp_avg_sq"],
        grad,
        weight if param_lp is None else param_lp,
        size,
        update.scale,
        update.beta1,
        _rounded(1 - update.beta1),
        update.beta2,
        _rounded(1 - update.beta2),
        update.eps,
        _rounded(update.lr / update.correction1),
        update.correction2,
        _rounded(1 - _rounded(update.lr * update.decay)),
        HALVED=weight.dtype == torch.int16,
        COPIED=param_lp is not None,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )


def differs(adam: ctypes.CDLL, dtype: torch.dtype, grad_dtype: torch.dtype, halved: bool) -> str:
    """Return why this GPU does not make the CPU's updates, bit for bit, or "".

    dtype: of the weights that the layers use. halved: whether a master weight is two halves.
    """
    numbers, size = torch.Generator().manual_seed(0), 2**16 + 3
    # Half of the numbers are smaller by up to 10^-40: denormal ones too.
    smaller = 10 ** -(80 * torch.rand(size, generator=numbers) - 40).clamp(min=0)

    def normal(scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(size, generator=numbers) * scale * smaller).to(dtype)

    state = {"exp_avg": normal(1e-3), "exp_avg_sq": normal(1e-3).square_(), "step": 3}
    weight = torch.randint(-(2**15), 2**15, (size,), generator=numbers).short()
    tensors = [weight if halved else normal(0.02), normal(0.1, grad_dtype), normal(0.02, dtype)]
    group = {"betas": (0.9, 0.95), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}
    try:
        there = [t.cuda() for t in tensors]
        state_there = {k: v.cuda() if torch.is_tensor(v) else v for k, v in state.items()}
        run(there[0], there[1], state_there, group, 0.7, there[2])
        back = [t.cpu() for t in (*there, state_there["exp_avg"], state_there["exp_avg_sq"])]
    except Exception as error:  # a dozen kinds, by Triton's version, compiler and driver
        return f"Triton: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    update = cpu_adam.update_of(tensors[0], tensors[1], state, group, 0.7, tensors[2])
    cpu_adam.run(adam, (cpu_adam.Update * 1)(update), 1)
    here = (*tensors, state["exp_avg"], state["exp_avg_sq"])
    same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(here, back))
    return "" if same else "its sums are rounded otherwise"
