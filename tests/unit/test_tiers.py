"""What goes where: the plan's choice, and what becomes of it where less memory is free."""

import copy
from dataclasses import replace

import pytest

from trainer.config.ds_config import Tiers
from trainer.engine import placement
from trainer.engine.placement import HBM, NVME, RAM
from trainer.errors import RunError
from trainer.plan import estimate, micro_batch, model_shapes, tiers
from trainer.plan.machine import Machine
from trainer.plan.workload import TrainingJob

GIB = 2**30
# One H100 of 78 GiB beside 125 GiB of RAM and a disk of 64 GiB.
BOX = Machine(
    1, 84e9, 134e9, 68e9, nvme_read=2e9, nvme_write=3e9, pcie=54e9, link=300e9, flops=790e12
)
INFINITY = "ds_z3_infinity"


def config(**block):
    made = copy.deepcopy(estimate.config_of(INFINITY))
    made.values["tiers"].update(block)
    return made


def planned(name, machine=BOX, rows=4, accumulation=8, method="full", **block):
    job = TrainingJob(model_shapes.built_in(name), method)
    return tiers.predict(job, machine, config(**block), rows, accumulation)


def test_a_model_that_fits_no_tier_alone():
    """Qwen2.5-14B: 207 GB of weights, gradients and states in 84, 134 and 68 GB."""
    found = planned("qwen2.5-14b")
    assert found.fits and not any(
        micro_batch.evaluate(found.job, BOX, mode).fits
        for mode in estimate.MODES
        if mode != INFINITY
    )
    places, trained = found.places, found.trainable
    assert places.weights_in_hbm == trained and 0 < places.states_in_ram < trained
    # Each byte is somewhere, and counted once.
    sizes = [found.tiers[tier] for tier in ("gpu", "host", "nvme")]
    for what, size in (("parameters", 2), ("gradients", 2), ("optimizer", 10)):
        total = sum(tier.get(what, 0) for tier in sizes)
        assert total == pytest.approx(size * trained)


def test_the_disk_comes_last():
    """With more RAM nothing is on NVMe; with a larger GPU less; and neither makes it slower."""
    small = planned("qwen2.5-14b")
    ram = planned("qwen2.5-14b", replace(BOX, ram=260e9))
    gpu = planned("qwen2.5-14b", replace(BOX, gpu_memory=141e9))
    assert ram.on_nvme == 0 < small.on_nvme and gpu.on_nvme < small.on_nvme
    assert max(ram.step_s, gpu.step_s) < small.step_s


def test_all_on_a_gpu_that_holds_it():
    found = planned("llama-3.2-1b")
    assert found.places[:3] == (found.trainable,) * 3 and found.time["transfer"] == 0


def test_it_is_never_slower_than_offload():
    for name in ("llama-3.2-3b", "llama-3-8b"):
        for rows in (1, 4, 16):
            job = TrainingJob(model_shapes.built_in(name))
            offload = estimate.Prediction(job, BOX, estimate.config_of("ds_z3_offload"), rows)
            found = tiers.predict(job, BOX, config(), rows, 1)
            assert found.fits and found.step_s <= offload.step_s * 1.001, (name, rows)


def test_70b_on_four_gpus():
    """988 GB in 4 x 139 GiB, 512 GiB of RAM and 235 GiB of disk: each tier within its room."""
    machine = replace(BOX, gpus=4, gpu_memory=139 * GIB, ram=512 * GIB, nvme=235 * GIB)
    found = planned("llama-3-70b", machine, 2, 8)
    assert found.fits, found.short
    assert found.totals["host"] <= 0.97 * 512 * GIB and found.totals["gpu"] <= 0.95 * 139 * GIB
    assert 4096 * 8 / found.step_s > 700


def test_limits():
    """They are kept, whatever is there."""
    free = planned("llama-3-8b")
    hbm = planned("llama-3-8b", hbm="30GB")
    assert hbm.totals["gpu"] <= 0.95 * 30e9 < free.totals["gpu"]
    ram = planned("llama-3-8b", hbm="30GB", ram="80GB")
    assert ram.totals["host"] <= 0.97 * 80e9 and ram.on_nvme > 0
    none = planned("llama-3-8b", hbm="30GB", ram="80GB", nvme="0GB")
    assert none.short.keys() == {"NVMe"} or none.short.keys() == {"RAM"}
    with pytest.raises(RunError, match="more than a GPU has"):
        tiers.check_limits(BOX, config(hbm="90GB"))
    tiers.check_limits(replace(BOX, gpus=0, gpu_memory=0), config(hbm="90GB"))


@pytest.mark.parametrize(
    "block, message",
    [
        ({"hbm": "lots"}, "tiers.hbm is not a size"),
        ({"ram": "0GB"}, "tiers.ram is 0"),
        ({"hbm": "0 GB"}, "tiers.hbm is 0"),
        (dict(zip(Tiers._fields, (8, 0, 8, 0))), "without their weights and gradients"),
        ({"hmb": "1GB"}, "did you mean hbm"),
        ({"weights_in_hbm": 5}, "all four places or none"),
        ({"states_in_ram": -1}, "out of range"),
    ],
)
def test_wrong_blocks(block, message):
    values = copy.deepcopy(estimate.config_of(INFINITY).values)
    values["tiers"].update(block)
    with pytest.raises(RunError) as error:
        type(config())(values, "own.json")
    assert message in str(error.value)


@pytest.mark.parametrize("block", ["offload_param", "offload_optimizer"])
def test_keys_that_contradict_it(block):
    values = copy.deepcopy(estimate.config_of(INFINITY).values)
    del values["zero_optimization"][block]
    with pytest.raises(RunError, match="contradict each other"):
        type(config())(values, "own.json")


def test_places_of_sub_groups():
    """A sub-group is whole in one tier; states are on a GPU only beside weights and gradients."""
    numels = [10**6] * 6
    found = placement.place(numels, Tiers(4.5e6, 3e6, 9e6, 2.2e6))
    assert found.weights == [HBM] * 4 + [RAM] * 2
    assert found.gradients == [HBM] * 3 + [RAM] * 3
    assert found.states == [HBM] * 3 + [RAM] * 2 + [NVME]
    assert placement.place([100, 10**6], Tiers(0, 0, 0, 0)).states == [RAM, NVME]


SIZES = placement.Sizes(2, 2, 10)


def test_a_gpu_with_less_memory_than_planned(monkeypatch):
    """States leave it first, then gradients, then weights."""
    monkeypatch.setattr(placement, "_least", lambda size: size)

    def fit(free):
        monkeypatch.setattr(placement.hardware, "gpu_room", lambda: free)
        return placement.fit_gpu(Tiers(1e9, 1e9, 1e9, 0), SIZES, 3e9)

    assert fit(17e9) == (Tiers(1e9, 1e9, 1e9, 0), [])
    found, said = fit(12e9)
    assert found == Tiers(1e9, 1e9, 0.5e9, 0.5e9) and "5.00 GB less" in said[0]
    assert fit(6e9)[0] == Tiers(1e9, 0.5e9, 0, 1e9)
    assert fit(4e9)[0] == Tiers(0.5e9, 0, 0, 1e9)
    assert fit(1e9)[0] == Tiers(0, 0, 0, 1e9)


def test_less_ram_than_planned(monkeypatch):
    monkeypatch.setattr(placement, "_least", lambda size: size)
    monkeypatch.setattr(placement, "ranks_on_this_machine", lambda: 2)

    def fit(free, has_nvme=True):
        monkeypatch.setattr(placement.hardware, "ram_room", lambda: 2 * free)
        tiers = Tiers(0.3e9, 0.5e9, 0.3e9, 0.5e9)
        return placement.fit_ram(tiers, SIZES, [10**8] * 9 + [10**8 - 1, 1], has_nvme)

    slots = 2**23 * (4 * 4 + 12 * 10)
    assert fit(6e9 + slots) == (Tiers(0.3e9, 0.5e9, 0.3e9, 0.5e9), [])
    found, said = fit(5e9 + slots)
    assert found.states_in_ram == pytest.approx(0.4e9) and "go to NVMe" in said[0]
    slots = 2**23 * 4 * 4
    assert fit(8e9 + slots, has_nvme=False)[0].states_in_ram == 0.7e9  # there is nowhere else
    with pytest.raises(RunError, match="do not fit into what is free") as error:
        fit(7e9, has_nvme=False)
    assert error.value.code == 3


def test_what_is_cut_off_on_the_gpu_goes_to_ram(monkeypatch):
    """Half a sub-group has no place on a GPU, and was not counted in RAM: no disk because of it."""
    monkeypatch.setattr(placement, "_least", lambda size: size)
    monkeypatch.setattr(placement, "ranks_on_this_machine", lambda: 1)
    monkeypatch.setattr(placement.hardware, "ram_room", lambda: 1e12)
    numels, planned = [10**8] * 10, Tiers(1e9, 1e9, 0.55e9, 0.45e9)
    for has_nvme in (True, False):
        found, moved = placement.fit_ram(planned, SIZES, numels, has_nvme)
        assert placement.place(numels, found).states == [HBM] * 5 + [RAM] * 5 and not moved
    # Norms come last, and are stepped before the forward pass begins.
    on_disk = Tiers(0, 0, 0, 0.5e9)
    assert placement.place(numels, on_disk, {9}).states == [RAM] * 5 + [NVME] * 4 + [RAM]


def test_a_plan_without_a_disk_takes_none():
    found = planned("llama-3-8b", replace(BOX, gpu_memory=150e9), 8, 1)
    assert found.on_nvme == 0
    shapes = found.job.shapes
    made = found.config.placed(found.places, shapes, 1)
    assert not made.uses_nvme() and made.tiers.states_in_ram == shapes.trainable
    del made.zero["sub_group_size"]  # DeepSpeed's own, then
    assert made.placed(Tiers(0, 0, 0, 0), shapes, 1).swap_bytes(0, shapes, 1)


def test_kept_layers_are_counted_first():
    for kept in (0, 4, 8):
        job = TrainingJob(model_shapes.built_in("qwen2.5-14b"), kept_layers=kept)
        found = tiers.predict(job, BOX, config(), 4, 8)
        assert found.fits and found.kept_layers == kept


def test_the_remedy_of_too_many_rows_is_fewer():
    large = planned("qwen2.5-14b", rows=64, accumulation=2)
    assert not large.fits
    flags = micro_batch.smaller_batch(large).split()
    assert flags[::2] == ["--per_device_train_batch_size", "--gradient_accumulation_steps"]
    rows, accumulation = map(int, flags[1::2])
    assert rows * accumulation == 128 and planned("qwen2.5-14b", BOX, rows, accumulation).fits


def test_nothing_crosses_pcie_from_a_gpu_that_holds_all():
    """Also where the head is a matrix of its own."""
    found = planned("llama-3-8b", replace(BOX, gpu_memory=200e9))
    assert not found.gathers and found.time["transfer"] == 0
