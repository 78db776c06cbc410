"""What goes where, for the shortest optimizer step: `tiers` of a DeepSpeed JSON.

Memory of a GPU that the work leaves free can hold weights, which then are not fetched, gradients,
which then are not copied to the host, optimizer states, which the GPU steps, or activations, which
then are not made again; and all of it relieves RAM, and RAM a disk. Which is worth most depends on
the job: so a number of ways to divide that memory are compared by their time. Does not import
torch.
"""

from dataclasses import replace

from trainer.config.ds_config import DeepSpeedConfig, Tiers
from trainer.errors import RunError
from trainer.plan.estimate import SPARE_GPU, SPARE_RAM, Prediction, staging_bytes
from trainer.plan.machine import Machine
from trainer.plan.workload import TrainingJob

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of a GPU's free memory for weights, gradients and states
FINER = (0.125, -0.125, 0.0625, -0.0625)  # and around the best of them
ORDERS = ("whole sub-groups", "weights", "gradients")  # what comes first


def predict(
    job: TrainingJob, machine: Machine, config: DeepSpeedConfig, rows: int, accumulation: int
) -> Prediction:
    """Return the prediction of a batch; where the plan says what goes where, with the best way."""
    if "tiers" in config.values:
        machine = limited(machine, config)
    if not config.places_by_value:
        return Prediction(job, machine, config, rows, accumulation)
    alone = replace(job, kept_layers=job.kept_layers or 0, kept_weights=job.kept_weights or 0)
    bare = Prediction(alone, machine, config, rows, accumulation, Tiers(0, 0, 0, 0))

    def tried(order: str, share: float) -> Prediction:
        places = _fill(bare, order, share)
        return Prediction(job, machine, config, rows, accumulation, places)

    best = tried("weights", 1.0)  # what relieves RAM and disk most, and is used most
    if best.short:
        return best
    ways = ((order, share) for order in ORDERS for share in SHARES)
    order, share = "weights", 1.0
    for way in ways:
        if (other := tried(*way)) and _better(other, best):
            best, (order, share) = other, way
    finer = [share + change for change in FINER]
    if room := _room(bare):  # and with what that leaves free
        finer.append(share + 0.99 * _room(best) / room)
    for share in finer:
        if share >= 0 and _better(other := tried(order, share), best):
            best = other
    return best


def _room(made: Prediction) -> float:
    """Return the bytes of a GPU that a prediction leaves free."""
    free = made.machine.gpu_memory * (1 - SPARE_GPU) - made.totals["gpu"]
    return max(0.0, free) if made.on_gpu else 0.0


def _better(other: Prediction, best: Prediction) -> bool:
    return other.fits and (other.step_s, other.on_nvme) < (best.step_s * 0.999, best.on_nvme)


def check_limits(machine: Machine, config: DeepSpeedConfig) -> None:
    """Raise RunError for a limit that is larger than a GPU of the machine, with all its memory."""
    hbm = config.limit("hbm")
    if hbm is not None and machine.gpus and hbm > machine.gpu_memory:
        raise RunError(
            f"{config.where}: tiers.hbm is more than a GPU has",
            found=f"{hbm / 1e9:.1f} GB",
            needed=f"at most {machine.gpu_memory / 1e9:.1f} GB ({machine.name})",
            fix='"hbm": "auto"',
        )


def limited(machine: Machine, config: DeepSpeedConfig) -> Machine:
    """Return the machine as far as the configuration allows it to be used."""
    sizes = (machine.gpu_memory, machine.ram, machine.nvme)
    limits = (config.limit(tier) for tier in ("hbm", "ram", "nvme"))
    hbm, ram, nvme = (
        size if limit is None else min(size, limit)
        for size, limit in zip(sizes, limits, strict=True)
    )
    return replace(machine, gpu_memory=hbm, ram=ram, nvme=nvme)


def _fill(bare: Prediction, order: str, share: float) -> Tiers:
    """Return the places when a share of a GPU's free memory is filled in an order.

    bare: with nothing placed. What is left of the states goes to RAM, as far as that reaches.
    """
    work, machine, trained = bare, bare.machine, bare.trainable
    room = share * _room(bare)
    sizes = {"weights": work.itemsize, "gradients": work.grad_itemsize, "states": work.state_bytes}
    if order == "whole sub-groups":
        here = dict.fromkeys(sizes, min(trained, room / sum(sizes.values())))
    else:
        here = {}
        for kind in dict.fromkeys((order, *sizes)):
            here[kind] = min(trained, room / sizes[kind])
            room -= here[kind] * sizes[kind]
            if kind == "weights" and here[kind] == trained and work.ranks == 1:
                room += share * work.tiers["gpu"].get("gathered layers", 0)  # nothing is, then
    ram = machine.ram * (1 - SPARE_RAM) - bare.totals["host"]
    ram += machine.ranks_here * sum(here[kind] * sizes[kind] for kind in ("weights", "gradients"))
    if max(here["weights"], here["gradients"]) > here["states"]:
        ram -= machine.ranks_here * staging_bytes(work)
    left = trained - here["states"]
    if left * work.state_bytes * machine.ranks_here <= ram + bare.ring * machine.ranks_here:
        in_ram = left  # and no buffers of a ring
    else:
        in_ram = max(0.0, ram / machine.ranks_here / work.state_bytes)
    return Tiers(here["weights"], here["gradients"], here["states"], min(left, in_ram))
