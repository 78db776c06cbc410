"""Weights, gradients and states over three tiers: the bits are those of all in RAM."""

import hjson
import json

import pytest
from conftest import ROOT
from test_resume import CUT, FLAGS, LORA, STEPS

MODEL = 3_080_192  # trained elements of the tiny model
BF16 = ["--precision", "bf16"]


@pytest.fixture
def trains(trains):
    return lambda name, *flags, ranks=1, **options: trains(
        name, *FLAGS, "--weight_decay", 0.1, *flags, ranks=ranks, launcher=ranks > 1, **options
    )


@pytest.fixture
def tiers(tmp_path):
    """Return a function that writes ds_z3_infinity.json with these places, as shares of a rank."""

    def write(*shares, ranks=1, trained=MODEL):
        config = hjson.loads((ROOT / "deepspeed_configs/ds_z3_infinity.json").read_text())
        names = "weights_in_hbm", "gradients_in_hbm", "states_in_hbm", "states_in_ram"
        for name, share in zip(names, shares, strict=True):
            config["tiers"][name] = int(share * trained / ranks)
        path = tmp_path / f"{'-'.join(map(str, shares))}-{ranks}.json"
        path.write_text(json.dumps(config))
        return ["--deepspeed", path]

    return write


SPLITS = [
    (1, 1, 1, 0),  # all on the GPU
    (0, 0, 0, 1),  # all in RAM
    (0, 0, 0, 0),  # states on NVMe
    (1, 1, 0, 1),  # weights and gradients on the GPU, states in RAM
    (1, 1, 0, 0),  # and on NVMe
    (0.8, 0.5, 0.3, 0.4),  # a bit of everything
    (0.5, 0.8, 0.3, 0.4),
    (0, 1, 0, 0.5),
    (1, 0, 0, 0.5),
]


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
