"""Weights, gradients and states over three tiers: the bits are those of all in RAM.

Without a GPU what would be in its memory is in RAM too, but goes the same ways.
"""

import hjson
import pytest
from conftest import ROOT
from test_resume import CUT, FLAGS, LORA, STEPS
from test_speed import changed as changed_script
from tiny import SPLITS, tiers_flags

MODEL = 3_213_056  # trained elements of the tiny model
long = pytest.mark.long


@pytest.fixture
def trains(trains):
    """The step runs beside the next forward pass, as on a GPU."""
    own = [*FLAGS, "--weight_decay", 0.1, "--disable_optimizations", "none"]
    return lambda name, *flags, ranks=1, **options: trains(
        name, *own, *flags, ranks=ranks, launcher=ranks > 1, **options
    )


def same(run, other, steps=slice(None)):
    assert run.losses == other.losses[steps]
    assert [s["grad_norm"] for s in run.steps] == [s["grad_norm"] for s in other.steps[steps]]
    if not run.code:
        assert run.parts(STEPS) == other.parts(STEPS)


@pytest.mark.parametrize(
    "precision, ranks, splits",
    [
        ("bf16", 1, [SPLITS[0], SPLITS[3], SPLITS[4]]),
        pytest.param("bf16", 1, SPLITS, marks=long),
        pytest.param("fp32", 1, SPLITS, marks=long),
        pytest.param("bf16", 2, SPLITS[2:6], marks=long),
    ],
)
def test_splits(trains, tmp_path, precision, ranks, splits):
    """Bit-equal, and so is going on in another placement from the middle."""
    own = ["--precision", precision]
    ram = trains("ram", *own, ranks=ranks)
    before = ram
    for split in splits:
        name = "-".join(map(str, split))
        flags = [*own, *tiers_flags(tmp_path, split, MODEL / ranks)]
        run = trains(name, *flags, ranks=ranks)
        same(run, ram)
        saved = ["--resume_from_checkpoint", before.directory / f"checkpoint-{CUT}"]
        same(trains(f"{name} goes on", *flags, *saved, ranks=ranks), ram, slice(CUT, None))
        before = run


SLOW_DISK = """
import time
from trainer.engine import state_ring

plain = state_ring.StateRing._write_block

def write(self, *args):
    time.sleep(0.3)
    plain(self, *args)

state_ring.StateRing._write_block = write
"""


def test_a_slow_disk(trains, tmp_path):
    """It still writes when the backward pass is over: the next step, saves and the end wait."""
    flags = ["--precision", "bf16", "--gradient_accumulation_steps", 1, "--eval_strategy", "steps"]
    flags += ["--eval_steps", CUT]
    script = changed_script(tmp_path / "slow_disk.py", SLOW_DISK)
    ram = trains("ram", *flags)
    slow = trains("slow", *flags, *tiers_flags(tmp_path, SPLITS[1], MODEL), script=script)
    same(slow, ram)
    assert slow.parts(CUT) == ram.parts(CUT)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=long)])
def test_nothing_offloaded(trains, ranks):
    """The step of ds_z3.json is the same one in bf16, and goes on where offload has been."""
    flags = ["--precision", "bf16"]
    offload = trains("offload", *flags, "--deepspeed", "ds_z3_offload.json", ranks=ranks)
    gpu = [*flags, "--deepspeed", "ds_z3.json"]
    run = trains("gpu", *gpu, ranks=ranks)
    assert "in one pass" in run.output
    same(run, offload)
    saved = ["--resume_from_checkpoint", offload.directory / f"checkpoint-{CUT}"]
    same(trains("goes on", *gpu, *saved, ranks=ranks), offload, slice(CUT, None))


@pytest.mark.long
def test_adapters(trains, tmp_path):
    """Few are trained: where their states are changes nothing."""
    flags = ["--precision", "bf16", *LORA]
    trained = 8 * (3 * (256 + 256) + 3 * (256 + 128) * 2 + 3 * 3 * (256 + 1024) + 3 * 2 * 256)
    ram = trains("ram", *flags)
    for split in SPLITS[:1] + SPLITS[4:5]:
        same(trains(str(split[1]), *flags, *tiers_flags(tmp_path, split, trained)), ram)


def changed(tmp_path, **tiers):
    config = hjson.loads((ROOT / "deepspeed_configs/ds_z3_infinity.json").read_text())
    config["tiers"].update(tiers)
    path = tmp_path / "changed.json"
    path.write_text(hjson.dumpsJSON(config))
    return ["--deepspeed", path]


def test_what_fits_ram_takes_no_disk(trains, tmp_path):
    """And a limit that is too small is refused, with what would do."""
    run = trains("free", "--precision", "bf16", *changed(tmp_path))
    assert "states on NVMe" not in run.output and "by tier" in run.output
    resolved = hjson.loads((run.directory / "resolved_ds_config.json").read_text())
    assert resolved["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert resolved["tiers"]["states_in_ram"] == MODEL
    small = changed(tmp_path, ram="200MB", nvme="0GB")
    refused = trains("small", "--precision", "bf16", *small, code=3)
    assert "GB of RAM short" in refused.output and "GB of RAM" in refused.output
