"""Which memory each sub-group's weights, gradients and optimizer states are in.

ZeRO-3 puts each of the three kinds whole into one tier. Here each has a line of sub-groups, in the
order of the forward pass: the first ones are on the GPU, then come those in RAM, and then, of the
states, those on NVMe. So the GPU makes its own updates while the CPU makes those of layers that the
next forward pass needs later, and those that wait for a disk are needed last. A sub-group that is
too large for what is left of a tier (one may be an embedding, of eight times the size) goes to the
next one, and smaller ones after it take the rest.
"""

import itertools
import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from trainer.config.ds_config import RING_PIECE, RING_SLOTS, STAGED_PIECES, SWAPPED, Tiers
from trainer.distributed import all_gather_object, ranks_on_this_machine
from trainer.engine import pinned
from trainer.errors import DOES_NOT_FIT, RunError
from trainer.system import hardware

HBM, RAM, NVME = "hbm", "ram", "nvme"
accelerator: Any = get_accelerator()
GROWTH = 1.2 * hardware.GIB  # of a process with a GPU, in its first step: kernels are loaded


@dataclass(frozen=True)
class Placement:
    """The tier of each sub-group's weights, gradients and states: HBM, RAM or NVME."""

    weights: list[str]
    gradients: list[str]
    states: list[str]


def of_engine(zero: Any) -> Tiers:
    """Return where DeepSpeed's own keys put each kind of a ZeRO-3 optimizer's tensors."""
    on_gpu = 0 if zero.offload_optimizer else math.inf
    return Tiers(
        weights_in_hbm=0 if zero.offload_param else math.inf,
        gradients_in_hbm=on_gpu,
        states_in_hbm=on_gpu,
        states_in_ram=0 if zero.swap_optimizer else math.inf,
    )


def place(numels: list[int], tiers: Tiers, stay: Container[int] = ()) -> Placement:
    """Return the placement of sub-groups of so many elements.

    A sub-group is whole in one tier. States are on the GPU only beside their weights and gradients.
    Small ones, and those of `stay`, are not on NVMe.
    """
    indices = range(len(numels))

    def first(among: Iterable[int], elements: float) -> set[int]:
        chosen = set()
        for i in among:
            if numels[i] <= elements:
                chosen.add(i)
                elements -= numels[i]
        return chosen

    weights = first(indices, tiers.weights_in_hbm)
    gradients = first(indices, tiers.gradients_in_hbm)
    on_gpu = first(sorted(weights & gradients), tiers.states_in_hbm)
    always = {i for i in indices if 4 * numels[i] < SWAPPED or i in stay} - on_gpu
    others = (i for i in indices if i not in on_gpu | always)
    in_ram = always | first(others, tiers.states_in_ram)
    return Placement(
        [HBM if i in weights else RAM for i in indices],
        [HBM if i in gradients else RAM for i in indices],
        [HBM if i in on_gpu else RAM if i in in_ram else NVME for i in indices],
    )


class Sizes(NamedTuple):
    """Bytes of a trained element's weight, gradient and states."""

    weight: int
    gradient: int
    state: int


def fit_gpu(tiers: Tiers, sizes: Sizes, work: float) -> tuple[Tiers, list[str]]:
    """Return the places as far as the GPUs are free now, alike on all ranks, and what moved.

    Nothing is placed yet. work: bytes that training takes of a GPU beside it.
    """
    placed = sum(size * elements for size, elements in zip(sizes, tiers))
    lacking = placed + work - _least(hardware.gpu_room())
    moved = []
    if placed and lacking > 0:
        moved.append(f"the GPU has {lacking / 1e9:.2f} GB less than was planned with")
    for kind, size in reversed([*zip(("weights", "gradients", "states"), sizes)]):
        place = f"{kind}_in_hbm"
        less = min(getattr(tiers, place), max(0, lacking) / size)
        if less:
            moved.append(f"{kind} of {less / 1e6:,.0f}M parameters go to RAM")
            tiers = tiers._replace(**{place: getattr(tiers, place) - less})
            lacking -= less * size
            if kind == "states":
                tiers = tiers._replace(states_in_ram=tiers.states_in_ram + less)
    return tiers, moved


def without_states_in_hbm(tiers: Tiers) -> Tiers:
    """Return the places with the states of the GPU in RAM."""
    in_ram = tiers.states_in_ram + tiers.states_in_hbm
    return tiers._replace(states_in_hbm=0, states_in_ram=in_ram)


def fit_ram(
    tiers: Tiers, sizes: Sizes, numels: list[int], has_nvme: bool
) -> tuple[Tiers, list[str]]:
    """Return the places as far as RAM is free now, alike on all ranks, and what moved.

    The weights are in their places. What a GPU has no whole sub-group for goes to RAM. has_nvme:
    states can go there. Raises RunError (DOES_NOT_FIT) where they would have to and cannot.
    """
    trained, placed = sum(numels), place(numels, tiers)
    in_hbm = {
        kind: sum(n for n, tier in zip(numels, kinds, strict=True) if tier == HBM)
        for kind, kinds in (("gradients", placed.gradients), ("states", placed.states))
    }
    in_ram = tiers.states_in_hbm + tiers.states_in_ram - in_hbm["states"]
    in_ram = min(in_ram, trained - in_hbm["states"]) if has_nvme else trained - in_hbm["states"]
    buffers = RING_PIECE * (STAGED_PIECES * (sizes.weight + sizes.gradient))
    buffers += RING_PIECE * RING_SLOTS * sizes.state * has_nvme
    free = _least(hardware.ram_room() / ranks_on_this_machine())
    free -= GROWTH * torch.cuda.is_available()
    gradients = sizes.gradient * (trained - in_hbm["gradients"])
    lacking = gradients + sizes.state * in_ram + buffers - free
    less = min(in_ram, max(0, lacking) / sizes.state)
    if less and not has_nvme:
        raise RunError(
            "the optimizer states do not fit into what is free of RAM",
            found=f"{free / 1e9:.2f} GB free for a rank",
            needed=f"{(lacking + free) / 1e9:.2f} GB",
            fix="--nvme_path on a local NVMe, fewer rows, or less that runs beside it",
            code=DOES_NOT_FIT,
        )
    if not less:
        return tiers._replace(states_in_ram=in_ram), []
    moved = (
        f"the RAM has {lacking / 1e9:.2f} GB less than was planned with: states of "
        f"{less / 1e6:,.0f}M parameters go to NVMe"
    )
    return tiers._replace(states_in_ram=in_ram - less), [moved]


def _least(size: float) -> float:
    return min(all_gather_object(size))


def flat_parts(
    numels: list[int], tiers: list[str], dtype: torch.dtype, owner: Any, lock: bool = True
) -> list[torch.Tensor]:
    """Return a flat tensor of zeros for each sub-group, in its tier, HBM or RAM.

    Those of a tier lie in one buffer, in their order. owner, lock: see pinned.zeros.
    """
    sizes: dict[str, int] = dict.fromkeys((HBM, RAM), 0)
    starts = []
    for numel, tier in zip(numels, tiers, strict=True):
        starts.append(sizes[tier])
        sizes[tier] += numel
    buffers: dict[str, torch.Tensor] = {
        HBM: torch.zeros(sizes[HBM], dtype=dtype, device=accelerator.current_device_name()),
        RAM: pinned.zeros(sizes[RAM], dtype, owner, lock),
    }
    places = zip(numels, tiers, starts, strict=True)
    return [buffers[tier].narrow(0, start, numel) for numel, tier, start in places]


class FlatWeights:
    """The trained weights of a parameter group, each sub-group's in its tier: HBM or RAM.

    DeepSpeed takes it for a flat tensor, of which it narrows one sub-group after the other.
    """

    def __init__(self, zero: Any, numels: list[int], tiers: list[str]) -> None:
        starts = itertools.accumulate(numels[:-1], initial=0)
        parts = flat_parts(numels, tiers, zero.dtype, zero)
        self.parts = dict(zip(starts, parts, strict=True))

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Return the sub-group that begins at this element of the parameter group."""
        return self.parts[start]
