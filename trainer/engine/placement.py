"""Which memory each sub-group's weights, gradients and optimizer states are in.

ZeRO-3 puts each of the three kinds whole into one tier. Here each has a line of sub-groups, in the
order of the forward pass: the first ones are on the GPU, then come those in RAM, and then, of the
states, those on NVMe. So the GPU makes its own updates while the CPU makes those of layers that the
next forward pass needs later, and those that wait for a disk are needed last.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from trainer.config.ds_config import SWAPPED, Tiers
from trainer.engine import pinned

HBM, RAM, NVME = "hbm", "ram", "nvme"
accelerator: Any = get_accelerator()


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


def place(numels: list[int], tiers: Tiers) -> Placement:
    """Return the placement of sub-groups of so many elements.

    A sub-group is on the GPU if all of it is within what `tiers` allows there. States are there
    only beside their weights and gradients. Small ones are not on NVMe.
    """

    def on_gpu(elements: float) -> list[bool]:
        ends = [sum(numels[: i + 1]) for i in range(len(numels))]
        return [end <= elements for end in ends]

    weights, gradients = on_gpu(tiers.weights_in_hbm), on_gpu(tiers.gradients_in_hbm)
    states, left = [], tiers.states_in_ram
    for i, here in enumerate(on_gpu(tiers.states_in_hbm)):
        if here and weights[i] and gradients[i]:
            states.append(HBM)
        elif numels[i] <= left or 4 * numels[i] < SWAPPED:
            states.append(RAM)
            left -= numels[i]
        else:
            states.append(NVME)
            left = 0  # what follows is needed later still
    return Placement(
        [HBM if here else RAM for here in weights],
        [HBM if here else RAM for here in gradients],
        states,
    )


class FlatWeights:
    """The trained weights of a parameter group, each sub-group's in its tier: HBM or RAM.

    DeepSpeed takes it for a flat tensor, of which it narrows one sub-group after the other.
    """

    def __init__(self, zero: Any, numels: list[int], tiers: list[str]) -> None:
        sums: dict[str, int] = {
            tier: sum(n for n, t in zip(numels, tiers, strict=True) if t == tier)
            for tier in (HBM, RAM)
        }
        buffers: dict[str, torch.Tensor] = {
            HBM: torch.empty(sums[HBM], dtype=zero.dtype, device=accelerator.current_device_name()),
            RAM: pinned.zeros(sums[RAM], zero.dtype, zero),
        }
        self.parts: dict[int, torch.Tensor] = {}
        at, ends = 0, dict.fromkeys(buffers, 0)
        for numel, tier in zip(numels, tiers, strict=True):
            self.parts[at] = buffers[tier].narrow(0, ends[tier], numel)
            ends[tier] += numel
            at += numel

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Return the sub-group that begins at this element of the parameter group."""
        return self.parts[start]
