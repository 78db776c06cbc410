"""DeepSpeed's configuration: read, checked against the schema, its "auto" values resolved.

Does not import torch.
"""

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer import ROOT
from trainer.config import ds_reader, ds_recipe
from trainer.config.ds_reader import TIERS, read
from trainer.config.ds_schema import LIMITS, PLACES
from trainer.config.flags import parse_size
from trainer.config.settings import Settings, find_shipped
from trainer.errors import RunError

CONFIGS = ROOT / "deepspeed_configs"
# DeepSpeed's own defaults, where a JSON leaves the key out.
BUFFER_SIZE, PARAM_BUFFERS, SUB_GROUP_SIZE = 10**8, 5, 10**9
SWAP_FILE_SLACK = 2**20
# Bytes: a smaller part of a tensor stays in RAM (swap_tensor/utils.py, MIN_AIO_BYTES), and so does
# a sub-group that is smaller in fp32.
SWAPPED = 2**20
# The ring of optimizer states on NVMe (engine/state_ring.py): elements of a piece, and pieces. With
# half as many a disk turned more often between reading and writing, and took 13 % longer.
RING_PIECE, RING_SLOTS = 2**23, 12
# Such pieces of weights and gradients that are between GPU and CPU at a time (engine/staging.py).
STAGED_PIECES = 4


class Tiers(NamedTuple):
    """Trained elements of one rank by place, each kind counted from the first sub-group on.

    weights_in_hbm, gradients_in_hbm: the others are in RAM. states_in_hbm, states_in_ram: those
    after the two are on NVMe.
    """

    weights_in_hbm: float
    gradients_in_hbm: float
    states_in_hbm: float
    states_in_ram: float


@dataclass
class ZeroShapes:
    """The model's sizes from which "auto" values are made. Counts are elements.

    layer: of the largest decoder layer. layer_tensors: its tensors that are large enough for NVMe.
    largest: the largest parameter. trainable, largest_trainable: what the optimizer sees.
    itemsize: bytes of one parameter in the run's precision.
    small_frozen: all frozen parameters that are not larger than largest_trainable.
    """

    layer: int
    layer_tensors: int
    largest: int
    trainable: int
    largest_trainable: int
    itemsize: int
    small_frozen: int = 0


class DeepSpeedConfig:
    """A DeepSpeed configuration that this trainer can run.

    values: the JSON as plain dicts, handed to DeepSpeed in the end. where: its path, for errors.
    """

    def __init__(self, values: dict[str, Any], where: str | Path) -> None:
        """Raises RunError for what DeepSpeed would silently ignore, or this trainer cannot run."""
        self.values, self.where = ds_reader.checked(values, where), where
        if "tiers" in self.values:
            self._check_tiers()

    @classmethod
    def load(cls, name: str | Path | dict[str, Any]) -> "DeepSpeedConfig":
        """Return the configuration of this file name, or of a mapping in a recipe.

        A name is looked for in the working directory, then in deepspeed_configs/.
        """
        if isinstance(name, dict):
            return cls(copy.deepcopy(name), "--deepspeed")
        path = find_shipped(name, CONFIGS, ".json", "DeepSpeed configuration")
        return cls(read(path), path)

    @property
    def zero(self) -> dict[str, Any]:
        """The block zero_optimization."""
        return self.values["zero_optimization"]

    def offload(self, tier: str) -> dict[str, Any]:
        """The block offload_<tier>, {} where it is missing. tier: "param" or "optimizer"."""
        return self.zero.get(f"offload_{tier}") or {}

    def device(self, tier: str) -> str:
        """Return where the parameters or the optimizer are: "none" (the GPU), "cpu" or "nvme"."""
        return self.offload(tier).get("device", "none")

    @property
    def tiers(self) -> Tiers | None:
        """Where a rank's trained elements are; None where each kind is whole in one tier."""
        block = self.values.get("tiers") or {}
        found = [block.get(place, "auto") for place in PLACES]
        return None if "auto" in found else Tiers(*map(int, found))

    @property
    def places_by_value(self) -> bool:
        """Whether the plan says where each sub-group is (plan/tiers.py)."""
        return "tiers" in self.values and self.tiers is None

    def placed(self, tiers: Tiers, shapes: ZeroShapes, ranks: int) -> "DeepSpeedConfig":
        """Return a copy with these places, without NVMe where nothing is there."""
        made, trained = copy.deepcopy(self), -(-shapes.trainable // ranks)
        if trained - tiers.states_in_hbm - tiers.states_in_ram < 1:
            tiers = tiers._replace(states_in_ram=trained)
        made.values["tiers"] |= {
            place: int(min(elements, trained))
            for place, elements in zip(PLACES, tiers, strict=True)
        }
        if not made._states_on_nvme(shapes, ranks):
            made.leave_nvme()
        return made

    def _check_tiers(self) -> None:
        """Raise RunError for other keys that contradict the block tiers, and let 0GB be no disk."""
        places = self.values["tiers"]
        needed = {
            "offload_param": ("cpu",),
            "offload_optimizer": ("cpu", "nvme"),
        }
        for block, devices in needed.items():
            if (found := (self.zero.get(block) or {}).get("device", "none")) not in devices:
                raise RunError(
                    f"{self.where}: tiers and zero_optimization.{block} contradict each other",
                    found=f'"device": "{found}"',
                    needed=" or ".join(devices),
                    fix="leave the block tiers out, where each kind is to be whole in one tier",
                )
        given = [place for place in PLACES if places.get(place, "auto") != "auto"]
        if given and len(given) < len(PLACES):
            missing = [place for place in PLACES if place not in given]
            raise RunError(
                f"{self.where}: tiers says where a part is",
                found=", ".join(given),
                needed=f"all four places or none: {', '.join(missing)} too",
                fix='"auto" in all of them, and limits: "hbm", "ram", "nvme"',
            )
        if self.tiers and self.tiers.states_in_hbm > min(self.tiers[:2]):
            raise RunError(
                f"{self.where}: tiers has states on the GPU without their weights and gradients",
                found=f"states_in_hbm {self.tiers.states_in_hbm:,}",
                needed=f"at most {int(min(self.tiers[:2])):,}, as of the others",
            )
        for tier in LIMITS:
            if self.limit(tier) == 0 and tier != "nvme":
                raise RunError(
                    f"{self.where}: tiers.{tier} is 0",
                    needed="a size: layers are computed on the GPU, and what goes there passes "
                    "through RAM",
                )
        if self.device("optimizer") == "nvme" and self.limit("nvme") == 0:
            self.leave_nvme()

    def leave_nvme(self) -> None:
        """Let states be in RAM that would be on NVMe."""
        self.offload("optimizer")["device"] = "cpu"
        self.offload("optimizer").pop("nvme_path", None)

    def limit(self, tier: str) -> float | None:
        """Return the bytes of "hbm", "ram" or "nvme" that may be used, None for all."""
        said = (self.values.get("tiers") or {}).get(tier, "auto")
        if re.fullmatch(r"\s*0(\.0*)?\s*([KMGT]i?B)?\s*", said, re.IGNORECASE):
            return 0
        return None if said == "auto" else parse_size(said, f"tiers.{tier}")

    def uses_nvme(self) -> bool:
        """Return whether anything is on NVMe."""
        return any(self.device(tier) == "nvme" for tier in TIERS)

    def agree_with(self, settings: Settings, world: int = 1) -> None:
        """Let the settings have what the JSON says of their keys. world: ranks of the run.

        Raises RunError where JSON and flags contradict each other.
        """
        ds_recipe.take_over(self.values, settings, self.where, world)
        paths = {
            path
            for tier in TIERS
            if self.device(tier) == "nvme" and (path := self.offload(tier)["nvme_path"]) != "auto"
        }
        if not paths or settings.given("nvme_path"):
            return
        if len(paths) > 1:
            raise RunError(
                f"{self.where}: parameters and optimizer have two nvme_path",
                found=" and ".join(sorted(paths)),
                needed="one: the space of a run is reserved, checked and given back in one place",
                fix="--nvme_path DIR, or the same path in both blocks",
            )
        settings.set("nvme_path", paths.pop(), str(self.where))

    def set_precision(self, precision: str) -> None:
        """Write bf16, fp16 or fp32 into DeepSpeed's own switches."""
        for name in ("bf16", "fp16"):
            self.values[name] = {**(self.values.get(name) or {}), "enabled": precision == name}

    def set_grad_accum_dtype(self, dtype: str) -> None:
        """Write the type in which gradients are added over micro-batches."""
        self.values["data_types"] = {**self.values.get("data_types", {}), "grad_accum_dtype": dtype}

    def resolved(
        self, shapes: ZeroShapes, ranks: int, swap_directory: str | Path
    ) -> "DeepSpeedConfig":
        """Return a copy in which every "auto" that only we understand is a value.

        Whole layers are prefetched: DeepSpeed's defaults look ahead by less than one matrix. The
        live and reuse limits then have to allow three layers, or a layer is released after its
        recomputation and fetched a third time.
        """
        made = copy.deepcopy(self)
        parameters, optimizer = made.offload("param"), made.offload("optimizer")
        # A buffer holds one parameter until the GPU's copy is released: the layer in use, the two
        # within the reuse distance, embedding, head, and one to spare. With fewer the step fails
        # with "Not enough buffers".
        count = 3 * shapes.layer_tensors + 3
        size = math.ceil(shapes.largest / ranks) + 4096
        for block, values in (
            (made.zero, made._zero_values(shapes, ranks)),
            (parameters, {"buffer_count": count, "buffer_size": size}),
            (optimizer, {"buffer_count": RING_SLOTS}),
        ):
            for key, value in values.items():
                if block.get(key) == "auto":
                    block[key] = value
        if made.device("param") == "nvme":
            # What stays on the GPU keeps its buffer: a longer distance would take them all.
            distance = made.zero.get("stage3_max_reuse_distance", math.inf)
            made.zero["stage3_max_reuse_distance"] = int(min(distance, 2 * shapes.layer))
        if tiers := made.values.get("tiers"):  # transformers would fill in what is "auto"
            made.values["tiers"] = {key: said for key, said in tiers.items() if said != "auto"}
        for block in (parameters, optimizer):
            if block.get("device") == "nvme":
                block["nvme_path"] = str(swap_directory)
            elif block.get("nvme_path") == "auto":
                del block["nvme_path"]
        return made

    def _zero_values(self, shapes: ZeroShapes, ranks: int) -> dict[str, int]:
        # On NVMe, parameters that stay on the GPU would be read at once, into too few buffers.
        on_nvme = self.device("param") == "nvme"
        keep_adapters = (
            not on_nvme
            and shapes.largest_trainable < 4e6
            and shapes.trainable * shapes.itemsize < 1e9
            and shapes.trainable < shapes.layer
            and shapes.small_frozen < 1e8
        )
        adapters = shapes.trainable if keep_adapters else 0
        live = 3 * shapes.layer + shapes.largest + adapters
        return {
            # At least 2e7: the many small gradients of adapters travel together.
            "reduce_bucket_size": min(max(shapes.largest_trainable, int(2e7)), int(5e8)),
            # 1e8: the CPU's step of a sub-group overlaps nothing, so smaller buffers cost no time.
            # A small model is cut into eighths.
            "sub_group_size": max(min(int(1e8), math.ceil(shapes.trainable / ranks / 8)), 1),
            "stage3_prefetch_bucket_size": shapes.layer,
            # Norms and biases stay on the GPU. So do adapters: hundreds of small tensors, and a
            # hundredth of the model.
            "stage3_param_persistence_threshold": max(
                int(1e5), shapes.largest_trainable + 1 if adapters else 0
            ),
            # On NVMe what is on the GPU holds its buffer too: one layer in use, one on its way.
            "stage3_max_live_parameters": 2 * shapes.layer if on_nvme else live,
            "stage3_max_reuse_distance": 2 * shapes.layer,
        }

    def locked_bytes(self, shapes: ZeroShapes) -> int:
        """Return the locked memory of one rank's buffers for parameters on NVMe."""
        if self.device("param") != "nvme":
            return 0
        block = self.offload("param")
        elements = int(block.get("buffer_count", PARAM_BUFFERS))
        return elements * int(block.get("buffer_size", BUFFER_SIZE)) * shapes.itemsize

    def ring_bytes(self, shapes: ZeroShapes, ranks: int) -> int:
        """Return the RAM of one rank's buffers for states on NVMe.

        Where the parameters are there too, also the fp32 weights of the sub-group that is made.
        """
        if self.device("optimizer") != "nvme":
            return 0
        trainable = math.ceil(shapes.trainable / ranks)
        # A sub-group closes once it has reached its size: it can be larger by one parameter.
        group = int(self.zero.get("sub_group_size", SUB_GROUP_SIZE))
        group = min(group + math.ceil(shapes.largest_trainable / ranks), trainable)
        size = RING_SLOTS * min(RING_PIECE, group) * self.state_bytes(shapes)
        return size + (self.device("param") == "nvme") * 4 * group

    def state_bytes(self, shapes: ZeroShapes) -> int:
        """Return the bytes of a trained parameter's optimizer states: fp32 weight and two moments.

        In bf16 with no parameters on NVMe the weight is two bytes that the model's own lacks
        (engine/split_master.py).
        """
        split = shapes.itemsize == 2 and self.device("param") != "nvme" and not self.fp16
        return 10 if split else 12

    @property
    def fp16(self) -> bool:
        """Whether it trains in fp16."""
        return (self.values.get("fp16") or {}).get("enabled") is True

    def check_buffers(self, shapes: ZeroShapes, ranks: int) -> None:
        """Raise RunError for NVMe buffers on which DeepSpeed would fail in the middle of a step."""
        needed = math.ceil(shapes.largest / ranks)
        found = self.offload("param").get("buffer_size", BUFFER_SIZE)
        if self.device("param") == "nvme" and int(found) < needed:
            raise RunError(
                f"{self.where}: offload_param.buffer_size is short of the largest parameter",
                found=f"{int(found):,} elements",
                needed=f"{needed:,}",
                fix='"buffer_size": "auto"',
            )

    def swap_bytes(self, parameters: int, shapes: ZeroShapes, ranks: int) -> int:
        """Return the bytes of one rank's swap files. parameters: elements of the whole model.

        This is slightly too much: tensors under 1 MiB stay in memory.
        """
        size = 0
        if self.device("param") == "nvme":
            size += parameters * shapes.itemsize
        if self.device("optimizer") == "nvme":
            size += self._states_on_nvme(shapes, ranks) * ranks * self.state_bytes(shapes)
        return -(-size // ranks) + SWAP_FILE_SLACK

    def _states_on_nvme(self, shapes: ZeroShapes, ranks: int) -> int:
        """Return one rank's trained elements whose states may be on NVMe."""
        trained = -(-shapes.trainable // ranks)
        if self.tiers is None:
            return trained
        # A sub-group that a tier has no room for goes whole to the next one.
        group = int(self.zero.get("sub_group_size", SUB_GROUP_SIZE))
        group += -(-shapes.largest_trainable // ranks)
        below = trained - int(self.tiers.states_in_hbm + self.tiers.states_in_ram)
        return min(trained, below + 2 * group) if below > 0 else 0
