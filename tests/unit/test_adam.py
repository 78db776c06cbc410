"""Our AdamW (trainer/engine/adam.c) against torch's in double precision.

In every type, with several sizes and numbers of threads.
"""

import ctypes

import pytest
import torch

from trainer.engine import cpu_adam, split_master
from trainer.errors import RunError
from trainer.system import ops

GROUP = {
    "lr": 1e-2,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "bias_correction": True,
}
PIECE = 2**16  # elements, of adam.c
STEPS = 4


def trained(sizes, dtype, threads=2, scale=0.5, low=True, grad_dtype=None, halved=False):
    """Make STEPS steps. Return the tensors after them, and the gradients of each step.

    Of each tensor (weight, exp_avg, exp_avg_sq, copy in dtype or None). grad_dtype: dtype if None.
    halved: the weights are two halves meanwhile.
    """
    adam, generator = ops.adam(), torch.Generator().manual_seed(0)
    states = [{"step": 0, "exp_avg": torch.zeros(n), "exp_avg_sq": torch.zeros(n)} for n in sizes]
    weights = [torch.randn(n, generator=generator) for n in sizes]
    copies = [torch.full((n,), 9.0, dtype=dtype) if low else None for n in sizes]
    if halved:
        lows = [torch.empty(n, dtype=torch.int16) for n in sizes]
        for halves in zip(weights, copies, lows, strict=True):
            split_master.split(*halves)
        weights = lows
    grads = []
    for _ in range(STEPS):
        grads.append([torch.randn(n, generator=generator).to(grad_dtype or dtype) for n in sizes])
        updates = []
        for weight, grad, state, copy in zip(weights, grads[-1], states, copies, strict=True):
            state["step"] += 1
            updates.append(cpu_adam.update_of(weight, grad, state, GROUP, scale, copy))
        updates = (cpu_adam.Update * len(sizes))(*updates)
        cpu_adam.run(adam, updates, threads)
        for update in updates:
            assert update.left == 0
            adam.adam_wait(ctypes.byref(update))
    if halved:
        weights = list(map(split_master.join, copies, weights))
    return [
        (w, s["exp_avg"], s["exp_avg_sq"], c)
        for w, s, c in zip(weights, states, copies, strict=True)
    ], grads


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("dtype", cpu_adam.BITS)
def test_against_torch(dtype, summed):
    """summed: the gradients are fp32, sums of several micro-batches."""
    if dtype == torch.float16 and not ops.adam().adam_knows_fp16():
        pytest.skip("this compiler knows no fp16")
    sizes = [1, 7, 1000, PIECE, 3 * PIECE + 5]
    results, grads = trained(sizes, dtype, grad_dtype=torch.float32 if summed else None)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(n, generator=generator).double().requires_grad_() for n in sizes]
    optimizer = torch.optim.AdamW(
        exact,
        lr=GROUP["lr"],
        betas=GROUP["betas"],
        eps=GROUP["eps"],
        weight_decay=GROUP["weight_decay"],
    )
    for step in grads:
        for parameter, grad in zip(exact, step, strict=True):
            parameter.grad = grad.double() * 0.5
        optimizer.step()
    for (weight, exp_avg, exp_avg_sq, copy), parameter in zip(results, exact, strict=True):
        state = optimizer.state[parameter]
        for ours, theirs in (
            (weight, parameter.detach()),
            (exp_avg, state["exp_avg"]),
            (exp_avg_sq, state["exp_avg_sq"]),
        ):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6)
        assert torch.equal(copy, weight.to(dtype))


def test_threads_and_neighbours_change_nothing():
    """An element's new value depends on its own numbers alone.

    It does not depend on the threads, nor on where a piece or a vector ends.
    """
    sizes = [5 * PIECE + 77]
    one, two = (trained(sizes, torch.bfloat16, threads)[0][0] for threads in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    adam, (weight, grad) = ops.adam(), torch.randn(2, 1000)
    state = {"step": 3, "exp_avg": torch.randn(1000), "exp_avg_sq": torch.rand(1000)}
    alone = (
        weight.clone(),
        {"step": 3, "exp_avg": state["exp_avg"].clone(), "exp_avg_sq": state["exp_avg_sq"].clone()},
    )
    cpu_adam.run(
        adam, (cpu_adam.Update * 1)(cpu_adam.update_of(weight, grad, state, GROUP, 1.0)), 1
    )
    parts = [
        cpu_adam.update_of(
            alone[0][i : i + 1],
            grad[i : i + 1],
            {k: v if k == "step" else v[i : i + 1] for k, v in alone[1].items()},
            GROUP,
            1.0,
        )
        for i in range(1000)
    ]
    cpu_adam.run(adam, (cpu_adam.Update * 1000)(*parts), 2)
    assert torch.equal(weight, alone[0]) and torch.equal(state["exp_avg"], alone[1]["exp_avg"])


def test_the_copy():
    """It is rounded as torch does it, also infinities and NaN. Without it nothing else changes."""
    adam = ops.adam()
    weight = torch.cat(
        [
            torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, 1e-40]),
            torch.randn(100_000),
        ]
    )
    low, zero = torch.empty_like(weight, dtype=torch.bfloat16), torch.zeros_like(weight)
    grad = zero.bfloat16()
    state = {"step": 1, "exp_avg": zero.clone(), "exp_avg_sq": zero.clone()}
    group = {**GROUP, "weight_decay": 0.0}
    before = weight.clone()
    cpu_adam.run(
        adam, (cpu_adam.Update * 1)(cpu_adam.update_of(weight, grad, state, group, 1.0, low)), 2
    )
    assert torch.equal(weight.nan_to_num(7), before.nan_to_num(7))
    assert (
        torch.equal(low.float().nan_to_num(7), weight.bfloat16().float().nan_to_num(7))
        and low[0].isnan()
    )
    (with_copy,), (without,) = (
        trained([1000], torch.bfloat16, low=low)[0] for low in (True, False)
    )
    assert torch.equal(with_copy[0], without[0]) and without[3] is None


def test_two_halves_are_the_weight():
    """Every low half below every kind of high one: sums, ties, subnormals, infinities, NaN."""
    high = torch.tensor([0, 1, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80, 0x7FFF])
    high = torch.cat([high, high + 0x8000])
    bits = (high[:, None] * 2**16 + torch.arange(2**16)).flatten()
    bits = (bits - (bits >= 2**31) * 2**32).to(torch.int32)
    weight = bits.view(torch.float32)
    copy, low = torch.empty(len(bits), dtype=torch.bfloat16), torch.empty_like(bits).short()
    split_master.split(weight, copy, low)
    joined = split_master.join(copy, low)
    finite = ~weight.isnan()
    assert torch.equal(joined.view(torch.int32)[finite], bits[finite])
    assert joined[~finite].isnan().all() and copy[~finite].isnan().all()
    # The nearest bf16 value; of two that are as near, the one further from zero.
    tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(copy[finite & ~tie], weight[finite & ~tie].bfloat16())
    away = finite & tie
    assert (copy[away].double().abs() > weight[away].double().abs()).all()
    # The same halves from Adam, whose step of nothing changes nothing but -0 and NaN.
    zero = torch.zeros(len(bits))
    state = {"step": 1, "exp_avg": zero.clone(), "exp_avg_sq": zero.clone()}
    update = cpu_adam.update_of(low, zero, state, {**GROUP, "weight_decay": 0.0}, 1.0, copy)
    before = copy.clone(), low.clone()
    cpu_adam.run(ops.adam(), (cpu_adam.Update * 1)(update), 2)
    some = finite & (weight != 0)
    assert torch.equal(copy[some], before[0][some]) and torch.equal(low[some], before[1][some])
    assert copy[~finite].isnan().all()


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_halves_step_as_the_whole(grad_dtype):
    sizes = [1, 7, PIECE, 3 * PIECE + 5]
    whole, halves = (
        trained(sizes, torch.bfloat16, grad_dtype=grad_dtype, halved=halved)[0]
        for halved in (False, True)
    )
    for one, other in zip(whole, halves, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
        tie = (one[0].view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(one[3][~tie], other[3][~tie])


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RunError, match="could not be compiled"):
        ops.adam()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match="no C compiler"):
        ops.adam()
