"""The GPU's optimizer step without a GPU: Triton compiles it, and its interpreter runs it."""

import os
import subprocess
import sys

import pytest
import torch

from trainer import ROOT
from trainer.engine import gpu_adam

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# dtype of the weights, of the gradients, and whether a master weight is two halves
KINDS = [(BF16, BF16, True), (BF16, FP32, True), (BF16, BF16, False), (FP16, FP16, False)]
triton = pytest.importorskip("triton")

INTERPRETED = """
import torch
from trainer.engine import gpu_adam
from trainer.system import ops
torch.Tensor.cuda = torch.Tensor.clone
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
for dtype, grad_dtype, halved in [(bf16, fp32, True), (fp16, fp32, False), (fp16, fp16, False)]:
    print(repr(gpu_adam.differs(ops.adam(), dtype, grad_dtype, halved)))
"""


def test_it_has_the_bits_of_the_cpu():
    """But for conversions of bf16, which the interpreter truncates: tests/gpu/test_tiers.py."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["''"] * 3, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("dtype, grad_dtype, halved", KINDS)
def test_it_compiles(dtype, grad_dtype, halved):
    """For Hopper: and no instruction flushes a denormal number or joins two roundings."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32"}
    kernel = gpu_adam._kernel()
    constants = {"HALVED": halved, "COPIED": True, "BLOCK": gpu_adam.BLOCK}
    signature = {
        **dict.fromkeys(kernel.arg_names, "fp32"),
        **dict.fromkeys(("exp_avg", "exp_avg_sq"), "*fp32"),
        "weight": "*i16" if halved else "*fp32",
        "grad": name[grad_dtype],
        "param_lp": name[dtype],
        "size": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    made = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": False},
    )
    code = made.asm["ptx"]
    assert "sqrt.rn.f32" in code and "div.rn.f32" in code
    assert ".ftz" not in code and "fma." not in code and ".approx" not in code
