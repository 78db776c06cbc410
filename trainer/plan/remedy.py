"""Why a configuration is not recommended, and what would make a job fit. Does not import torch."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from trainer.plan.estimate import MODES, Prediction
from trainer.plan.machine import Machine
from trainer.plan.micro_batch import evaluate
from trainer.plan.workload import TrainingJob

MOST_SHOWN = 3
MOST_GPU_MEMORY = 192e9


def remedy(job: TrainingJob, machine: Machine) -> str | None:
    """Return the smallest changes after which some configuration fits, each on its own.

    At most three, the cheapest first; None where none of them is enough.
    """
    changes = list(islice(_changes(job, machine), MOST_SHOWN))
    return "; or ".join(changes) or _more_machines(job, machine)


def why_not(other: Prediction, best: Prediction) -> str:
    """Return why a configuration is not the recommended one, `best`, or that it is."""
    if other.short:
        return "; ".join(
            f"{size / 1e9:,.1f} GB of {tier} short" for tier, size in other.short.items()
        )
    if other is best:
        return "recommended"
    if other.score == best.score:
        return f"as fast; {best.name} is simpler"
    slower = best.tokens_per_s / other.tokens_per_s
    words = f"{slower:.1f} times slower" if slower >= 1.1 else f"{slower - 1:.0%} slower"

    def more(part: str) -> float:  # seconds of a token
        return other.time[part] / other.step_tokens - best.time[part] / best.step_tokens

    part = max(best.time, key=more)
    return words + (f", by its {part}" if more(part) > 0 else "")


def _changes(job: TrainingJob, machine: Machine) -> Iterator[str]:
    if _fits(replace(job, activation_offload=True), machine):
        yield "--activation_offload true"
    if _fits(replace(job, grad_accum_dtype=job.precision), machine):
        yield f"--grad_accum_dtype {job.precision}"
    if size := _smallest(job, machine, "nvme"):
        yield f"{size} GB free on a local NVMe (--nvme)"
    else:
        yield from _ram_and_disk(job, machine)
    if size := _smallest(job, machine, "ram"):
        yield f"{size} GB of RAM"
    yield from _shorter_rows(job, machine)
    if job.full and _fits(replace(job, method="lora"), machine):
        yield "--method lora"
    if machine.gpus and (size := _smallest(job, machine, "gpu_memory", 8)):
        yield f"GPUs of {size} GB"


def _fits(job: TrainingJob, machine: Machine) -> bool:
    return any(evaluate(job, machine, mode).fits for mode in MODES)


def _most_disk(job: TrainingJob, machine: Machine) -> float:
    return max(30 * job.model.parameters, 2 * machine.nvme)


def _smallest(job: TrainingJob, machine: Machine, resource: str, multiple: int = 5) -> int | None:
    """Return the smallest size of a resource that fits, to 2 %; None where the largest does not.

    In GB, rounded up to a multiple.
    """
    largest = {
        "nvme": _most_disk(job, machine),
        "ram": 64 * max(machine.ram, 64e9),
        "gpu_memory": MOST_GPU_MEMORY,
    }
    high = largest[resource]

    def fits(size: float) -> bool:
        return _fits(job, replace(machine, **{resource: size}))

    if not fits(high):
        return None
    low = max(getattr(machine, resource), 1e9)
    while high > 1.02 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return math.ceil(high / 1e9 / multiple) * multiple


def _ram_and_disk(job: TrainingJob, machine: Machine) -> Iterator[str]:
    """Yield both, where one of them is not enough."""
    if ram := _smallest(job, replace(machine, nvme=_most_disk(job, machine)), "ram"):
        with_ram = replace(machine, ram=ram * 1e9)
        if not _fits(job, with_ram):
            disk = _smallest(job, with_ram, "nvme")
            yield f"{ram} GB of RAM and {disk} GB free on a local NVMe"


def _shorter_rows(job: TrainingJob, machine: Machine) -> Iterator[str]:
    length = job.max_length // 2
    while length >= 256:
        shorter = replace(job, max_length=length, tokens_per_step=None)
        for flag, offload in (("", job.activation_offload), (" --activation_offload true", True)):
            if _fits(replace(shorter, activation_offload=offload), machine):
                yield f"--max_length {length}{flag}"
                return
        length //= 2


def _more_machines(job: TrainingJob, machine: Machine) -> str | None:
    job = replace(job, tokens_per_step=None)
    for count in (2, 4, 8, 16, 32) if machine.gpus else ():
        if _fits(job, replace(machine, nodes=count)):
            return f"{count} such machines"
    return None
