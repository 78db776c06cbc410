"""DeepSpeed's configuration: read, checked against the schema, its "auto" values resolved.

Does not import torch.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson

from trainer import ROOT
from trainer.config import ds_schema
from trainer.config.settings import Settings, find_shipped
from trainer.errors import RunError, did_you_mean

CONFIGS = ROOT / "deepspeed_configs"
TIERS = ("param", "optimizer")  # what offload_<tier> moves
DEVICES = ("none", "cpu", "nvme")
# The recipe decides these; the JSON says "auto" or the same.
AGREEMENT = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_clipping": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
# DeepSpeed's own defaults, where a JSON leaves the key out.
BUFFER_SIZE, PARAM_BUFFERS, OPTIMIZER_BUFFERS, SUB_GROUP_SIZE = 10**8, 5, 4, 10**9
SWAP_FILE_SLACK = 2**20


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
        values = _without_nulls(values)
        _check_block(values, ds_schema.CONFIG, where)
        _check_zero(values.get("zero_optimization"), where)
        if values.get("optimizer") or values.get("scheduler"):
            raise RunError(
                f"{where}: optimizer and scheduler belong to the recipe",
                fix="remove them; use --learning_rate, --weight_decay, --adam_beta1, "
                "--lr_scheduler_type, --warmup_steps",
            )
        aio = values.get("aio") or {}
        for key in ("block_size", "queue_depth", "intra_op_parallelism"):
            if aio.get(key, 1) < 1:
                raise RunError(
                    f"{where}: aio.{key} is too small", found=aio[key], needed="1 or more"
                )
        if aio.get("use_gds"):
            raise RunError(
                f"{where}: aio.use_gds is not supported",
                found="GPUDirect Storage, whose reads nothing compares with what was written",
                fix="leave the key out",
            )
        self.values, self.where = values, where

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

    def uses_nvme(self) -> bool:
        """Return whether anything is on NVMe."""
        return any(self.device(tier) == "nvme" for tier in TIERS)

    def agree_with(self, settings: Settings) -> None:
        """Raise RunError where the JSON and the flags name different batches or clip norms."""
        for key, flag in AGREEMENT.items():
            value = self.values.get(key, "auto")
            if value not in ("auto", settings.values[flag]):
                raise RunError(
                    f"{self.where}: {key} contradicts --{flag}",
                    found=f"{value} in the JSON, {settings.values[flag]} in the run",
                    fix=f'"{key}": "auto"',
                )
            self.values[key] = "auto"
        self.values.setdefault("train_batch_size", "auto")

    def set_precision(self, precision: str) -> None:
        """Write bf16, fp16 or fp32 into DeepSpeed's own switches."""
        for name in ("bf16", "fp16"):
            self.values[name] = {**(self.values.get(name) or {}), "enabled": precision == name}

    def resolved(
        self, shapes: ZeroShapes, ranks: int, swap_directory: str | Path, fused_step: bool = True
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
            (optimizer, {"buffer_count": made._swap_buffers(fused_step)}),
        ):
            for key, value in values.items():
                if block.get(key) == "auto":
                    block[key] = value
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

    def _swap_buffers(self, fused_step: bool) -> int:
        """Return the buffers that the optimizer's swapper needs.

        It holds weight and both moments of the current sub-group, and of the previous and the next
        one where it reads or writes ahead; without fused_step gradients too (DeepSpeed,
        swap_tensor/pipelined_optimizer_swapper.py).
        """
        optimizer = self.offload("optimizer")
        ahead = bool(optimizer.get("pipeline_read")) + bool(optimizer.get("pipeline_write"))
        return (3 if fused_step else 4) * (1 + ahead)

    def locked_bytes(self, shapes: ZeroShapes, ranks: int) -> tuple[int, int]:
        """Return the locked memory of one rank's NVMe buffers: (parameters, optimizer), bytes."""
        parameters, optimizer = self.offload("param"), self.offload("optimizer")
        for_parameters = for_optimizer = 0
        if self.device("param") == "nvme":
            elements = int(parameters.get("buffer_count", PARAM_BUFFERS)) * int(
                parameters.get("buffer_size", BUFFER_SIZE)
            )
            for_parameters = elements * shapes.itemsize
        if self.device("optimizer") == "nvme":
            # A sub-group closes once it has reached its size: it can be larger by one parameter.
            group = int(self.zero.get("sub_group_size", SUB_GROUP_SIZE))
            group += math.ceil(shapes.largest_trainable / ranks)
            group = min(group, math.ceil(shapes.trainable / ranks))
            for_optimizer = int(optimizer.get("buffer_count", OPTIMIZER_BUFFERS)) * group * 4
        return for_parameters, for_optimizer

    def check_buffers(self, shapes: ZeroShapes, ranks: int, fused_step: bool = True) -> None:
        """Raise RunError for NVMe buffers on which DeepSpeed would fail in the middle of a step."""
        size, count = math.ceil(shapes.largest / ranks), self._swap_buffers(fused_step)
        for tier, key, default, needed, what in (
            (
                "param",
                "buffer_size",
                BUFFER_SIZE,
                size,
                "short of the largest parameter (elements)",
            ),
            ("optimizer", "buffer_count", OPTIMIZER_BUFFERS, count, "too small for its pipelining"),
        ):
            found = self.offload(tier).get(key, default)
            if self.device(tier) == "nvme" and int(found) < needed:
                raise RunError(
                    f"{self.where}: offload_{tier}.{key} is {what}",
                    found=f"{int(found):,}",
                    needed=f"{needed:,}",
                    fix=f'"{key}": "auto"',
                )

    def swap_bytes(
        self, parameters: int, shapes: ZeroShapes, ranks: int, fused_step: bool = True
    ) -> int:
        """Return the bytes of one rank's swap files. parameters: elements of the whole model.

        An element of the optimizer takes 12 bytes, fp32 weight and both moments; without
        fused_step 16, as gradients are written too. This is slightly too much: tensors under
        1 MiB stay in memory.
        """
        size = 0
        if self.device("param") == "nvme":
            size += parameters * shapes.itemsize
        if self.device("optimizer") == "nvme":
            size += shapes.trainable * (12 if fused_step else 16)
        return -(-size // ranks) + SWAP_FILE_SLACK


def read(path: str | Path) -> dict[str, Any]:
    """Return the JSON with comments as plain dicts. Raises RunError where it cannot be read."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        block = {}
        for key, value in pairs:
            if key in block:
                raise RunError(f"{path}: the key {key} stands twice in one block")
            block[key] = value
        return block

    try:
        values = hjson.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:  # hjson's own is a ValueError
        raise RunError(f"{path} is not readable as JSON", found=error) from None
    if not isinstance(values, dict):
        raise RunError(
            f"{path} is not a DeepSpeed configuration",
            found=type(values).__name__,
            needed="a JSON object",
        )
    return values


def _without_nulls(block: dict[str, Any]) -> dict[str, Any]:
    """Return the block without keys that are null: they say the same as no key."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if value is not None
    }


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    if kind is int and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, kind)


def _check_block(
    block: dict[str, Any], schema: dict[str, Any], where: str | Path, prefix: str = ""
) -> None:
    """Raise RunError for the first key of a block that is not in the schema, or not of its type."""
    for key, value in block.items():
        name = f"{prefix}{key}"
        if key in ("fp8", "float8"):
            raise RunError(
                f"{where}: fp8 is not supported",
                found=name,
                needed="bf16, fp16 or fp32: ZeRO-3 offload keeps its parameters in one of these",
            )
        if key not in schema:
            raise RunError(
                f"{where}: unknown key {name}{did_you_mean(key, schema)}",
                fix="DeepSpeed would ignore it in silence; correct or remove it",
            )
        kind = schema[key]
        if value == "auto":
            if key not in ds_schema.AUTO.get(prefix[:-1], ()):
                raise RunError(
                    f'{where}: {name} cannot be "auto"', needed="a value, or leave the key out"
                )
        elif isinstance(kind, dict):
            if not isinstance(value, dict):
                raise RunError(
                    f"{where}: {name} has the wrong type",
                    found=repr(value),
                    needed="an object { … }",
                )
            _check_block(value, kind, where, f"{name}.")
        elif not _has_type(value, kind):
            raise RunError(
                f"{where}: {name} has the wrong type", found=repr(value), needed=kind.__name__
            )
        elif kind is int and key != "stage" and value < 0:
            raise RunError(f"{where}: {name} is negative", found=value, needed="0 or more")


def _check_zero(zero: dict[str, Any] | None, where: str | Path) -> None:
    """Raise RunError for a block zero_optimization that this trainer cannot run."""
    if zero is None:
        raise RunError(
            f"{where}: no zero_optimization block", needed='"zero_optimization": {"stage": 3, …}'
        )
    for tier in TIERS:
        block = zero.get(f"offload_{tier}") or {}
        device = block.get("device", "none")
        key = f"zero_optimization.offload_{tier}.device"
        if device not in DEVICES:
            raise RunError(
                f"{where}: {key}{did_you_mean(device, DEVICES)}",
                found=device,
                needed="none, cpu or nvme",
            )
        if device == "nvme" and not block.get("nvme_path"):
            raise RunError(
                f"{where}: {key} is nvme without an nvme_path",
                fix='"nvme_path": "auto" takes --nvme_path; or write the directory',
            )
    if zero.get("stage") != 3:
        raise RunError(
            f"{where}: this trainer runs ZeRO stage 3",
            found=f"stage {zero.get('stage', 0)}",
            fix='"stage": 3',
        )
