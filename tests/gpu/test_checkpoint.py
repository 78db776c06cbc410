"""Saving and resuming on a GPU, in bf16 and fp16.

The checks are those on the CPU, as far as CUDA's kernels give the same result twice.
"""

import pytest
import torch
from conftest import train
from tiny import swap_flags

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
STEPS, CUT = 6, 3
FLAGS = (
    f"--max_steps {STEPS} --save_steps {CUT} --save_total_limit 5 --per_device_train_batch_size 2 "
    "--eval_strategy no --eval_on_start false --export false --max_length 96 --learning_rate 1e-3 "
    "--validation_split 0"
).split()
# The losses of two runs that differ only in the order of CUDA's atomic additions differ by less
# (bf16, a loss of about 6).
NOISE = 5e-3


@pytest.fixture
def trains(tiny_model, rows_file, tmp_path):
    def go(name, *flags):
        inputs = ["--model_name_or_path", tiny_model, "--dataset", rows_file[0]]
        swap = ["--nvme_path", tmp_path / "swap", *swap_flags(tmp_path)]
        own = [*inputs, *swap, *FLAGS, *flags]
        run = train(tmp_path / name, *own, env={"DS_ACCELERATOR": "cuda"})
        assert run.code == 0, run.output[-6000:]
        return run

    return go


@pytest.mark.parametrize(
    "config, method, precision",
    [
        *((f"ds_z3{c}", "full", "bf16") for c in ("", "_offload", "_nvme_optimizer", "_nvme")),
        ("ds_z3_offload", "lora", "bf16"),
        ("ds_z3_offload", "full", "fp16"),
    ],
)
def test_resume(trains, config, method, precision, capsys):
    flags = ["--deepspeed", f"{config}.json", "--method", method, "--precision", precision]
    whole = trains("whole", *flags)
    again = trains(
        "again", *flags, "--resume_from_checkpoint", whole.directory / f"checkpoint-{CUT}"
    )
    off = max(abs(a - b) for a, b in zip(again.losses, whole.losses[CUT:], strict=True))
    with capsys.disabled():
        same = "bit-equal" if again.parts(STEPS) == whole.parts(STEPS) else "differ"
        print(
            f"\n{config} {method} {precision}: largest difference of {STEPS - CUT} losses "
            f"{off:.2e}; files of step {STEPS} {same}",
            flush=True,
        )
    assert off < NOISE and whole.parts(STEPS) != whole.parts(CUT)
    # What was restored is what was saved: the first loss comes from the same weights and rows.
    assert again.losses[0] == pytest.approx(whole.losses[CUT], abs=1e-4)
