"""The optimizer step in every tier, on a GPU: its updates are the CPU's, bit for bit."""

import pytest
import torch
from test_checkpoint import NOISE, trains  # noqa: F401
from tiny import SPLITS, tiers_flags

from trainer.engine import gpu_adam
from trainer.system import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "dtype, grad_dtype, halved",
    [(BF16, BF16, True), (BF16, FP32, True), (BF16, BF16, False), (FP16, FP16, False)],
)
def test_updates(dtype, grad_dtype, halved):
    assert gpu_adam.differs(ops.adam(), dtype, grad_dtype, halved) == ""


def test_every_split(trains, tmp_path, capsys):  # noqa: F811
    """20 steps: within the noise of CUDA's atomic additions."""
    flags = ["--max_steps", 20, "--weight_decay", 0.1]
    ram = trains("ram", *flags, "--deepspeed", "ds_z3_offload.json")
    for split in SPLITS:
        run = trains("-".join(map(str, split)), *flags, *tiers_flags(tmp_path, split, 3_213_056))
        off = max(abs(a - b) for a, b in zip(run.losses, ram.losses, strict=True))
        same = "bit-equal" if run.parts(18) == ram.parts(18) else "differ"
        with capsys.disabled():
            print(f"\n{split}: largest difference of 20 losses {off:.1e}, files {same}", flush=True)
        assert off < NOISE
