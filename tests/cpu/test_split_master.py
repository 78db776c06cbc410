"""bf16 in RAM, where a master weight is the bf16 weight and 16 bits more, beside fp32 masters."""

import pytest
import torch
from safetensors.torch import load_file
from test_resume import CUT, FLAGS, LORA, STEPS
from test_speed import changed

from trainer.engine import split_master

BF16 = [*FLAGS, "--precision", "bf16", "--weight_decay", 0.1, "--learning_rate", 1e-3]
# The same run with fp32 master weights, whose bf16 copies are rounded as the halves are.
WHOLE = """
import torch
from trainer.engine import fused_step, split_master

start = fused_step.FusedStep.start
split_master.applies = lambda zero: False


def rounded(self, groups, worker=None):
    start(self, groups, worker)
    for i in groups:
        master = self.zero.fp32_partitioned_groups_flat[i].data
        copy = self.zero.fp16_partitioned_groups_flat[i].data
        assert master.dtype == torch.float32 and len(master) == len(copy)
        split_master.split(master, copy, torch.empty(len(master), dtype=torch.int16))


fused_step.FusedStep.start = rounded
"""


@pytest.fixture
def trains(trains):
    return lambda name, *flags, ranks=1, **options: trains(
        name, *BF16, *flags, ranks=ranks, launcher=ranks > 1, **options
    )


def masters(run, step=STEPS):
    found = {}
    for path in sorted((run.directory / f"checkpoint-{step}").glob("rank-*.safetensors")):
        for name, value in load_file(path).items():
            if name.startswith("weight/"):
                found.setdefault(name.removeprefix("weight/"), []).append(value)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize(
    "ranks, flags",
    [
        (1, []),
        (1, LORA),
        (1, ["--grad_accum_dtype", "fp32", "--export", "true"]),
        pytest.param(2, [], marks=pytest.mark.long),
    ],
)
def test_bit_equal_to_whole_masters(trains, tmp_path, ranks, flags):
    """Losses, norms, master weights and moments, and a run that begins where the other has been."""
    halves = trains("halves", *flags, ranks=ranks)
    script = changed(tmp_path / "whole.py", WHOLE)
    whole = trains("whole", *flags, ranks=ranks, script=script)
    assert halves.losses == whole.losses
    assert [s["grad_norm"] for s in halves.steps] == [s["grad_norm"] for s in whole.steps]
    assert halves.parts(STEPS) == whole.parts(STEPS)
    saved = ["--resume_from_checkpoint", whole.directory / f"checkpoint-{CUT}"]
    again = trains("again", *flags, *saved, ranks=ranks)
    assert again.losses == whole.losses[CUT:] and again.parts(STEPS) == whole.parts(STEPS)
    weights = masters(halves)
    assert any((w.view(torch.int32) & 0xFFFF).any() for w in weights.values())
    if "--export" in flags:
        for name, value in load_file(halves.directory / "export" / "model.safetensors").items():
            high, low = value.new_empty(value.numel()), torch.empty(value.numel()).short()
            split_master.split(weights[name], high, low)
            assert torch.equal(high.view(value.shape), value), name


def test_across_tiers(trains):
    """The low halves on NVMe, then in RAM, and the other way round: bit-equal."""
    nvme = ["--deepspeed", "ds_z3_nvme_optimizer.json"]
    runs = {name: trains(name, *flags) for name, flags in (("nvme", nvme), ("ram", []))}
    assert runs["nvme"].losses == runs["ram"].losses
    assert runs["nvme"].parts(STEPS) == runs["ram"].parts(STEPS)
    for name, flags in (("nvme", []), ("ram", nvme)):
        saved = ["--resume_from_checkpoint", runs[name].directory / f"checkpoint-{CUT}"]
        again = trains(f"after {name}", *flags, *saved)
        assert again.losses == runs["ram"].losses[CUT:]
        assert again.parts(STEPS) == runs["ram"].parts(STEPS)
    first, second, *_ = (s["nvme_written_bytes"] for s in runs["nvme"].steps)  # before a save
    trained = sum(w.numel() for w in masters(runs["nvme"]).values())
    assert second - first == pytest.approx(10 * trained, rel=0.05)
