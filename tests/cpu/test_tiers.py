"""Weights, gradients and states over three tiers: the bits are those of all in RAM."""

import pytest
from test_resume import CUT, FLAGS, STEPS
from tiny import SPLITS, tiers_flags

MODEL = 3_080_192  # trained elements of the tiny model


@pytest.fixture
def trains(trains):
    return lambda name, *flags, ranks=1, **options: trains(
        name, *FLAGS, "--weight_decay", 0.1, *flags, ranks=ranks, launcher=ranks > 1, **options
    )


@pytest.fixture
def tiers(tmp_path):
    return lambda *shares, ranks=1: tiers_flags(tmp_path, shares, MODEL / ranks)


def same(run, other, steps=slice(None)):
    assert run.losses == other.losses[steps]
    assert [s["grad_norm"] for s in run.steps] == [s["grad_norm"] for s in other.steps[steps]]
    assert run.parts(STEPS) == other.parts(STEPS)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_split(trains, tiers, precision):
    """Bit-equal, and so is going on in another placement from the middle."""
    ram = trains("ram", "--precision", precision)
    before = ram
    for split in SPLITS:
        name = "-".join(map(str, split))
        flags = ["--precision", precision, *tiers(*split)]
        run = trains(name, *flags)
        same(run, ram)
        saved = ["--resume_from_checkpoint", before.directory / f"checkpoint-{CUT}"]
        same(trains(f"{name} goes on", *flags, *saved), ram, slice(CUT, None))
        before = run
