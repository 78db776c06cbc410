"""The DeepSpeed JSON: found, read as hjson, held against the schema, its "auto" values resolved. Imports no torch."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import hjson
import yaml

from trainer import ROOT
from trainer.config import ds_schema
from trainer.errors import RunError, did_you_mean

CONFIGS = ROOT / "deepspeed_configs"


def find_config(name):
    """The JSON's path: in the working directory first, then in deepspeed_configs/."""
    looked = [Path(name), CONFIGS / name, CONFIGS / f"{name}.json"]
    for path in looked:
        if path.is_file():
            return path
    have = sorted(p.name for p in CONFIGS.glob("*.json"))
    hint = did_you_mean(Path(name).name, have)
    raise RunError(
        f"no DeepSpeed configuration {name}{hint}",
        found="none of " + ", ".join(map(str, looked)),
        needed=f"a JSON file; deepspeed_configs/ has {', '.join(have)}",
    )


def read_config(path):
    """The JSON with comments, as plain dicts."""

    def plain(node):
        if isinstance(node, dict):
            return {k: plain(v) for k, v in node.items()}
        return [plain(v) for v in node] if isinstance(node, list) else node

    def unique(pairs):
        keys = [k for k, _ in pairs]
        if len(keys) != len(set(keys)):
            twice = next(k for k in keys if keys.count(k) > 1)
            raise RunError(f"{path}: the key {twice} stands twice in one block")
        return dict(pairs)

    try:
        config = hjson.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (hjson.HjsonDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not readable as JSON", found=str(error)) from None
    if not isinstance(config, dict):
        raise RunError(
            f"{path} is not a DeepSpeed configuration",
            found=type(config).__name__,
            needed="a JSON object",
        )
    return plain(config)


def _is(value, kind):
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )
    return isinstance(value, kind)


def _check_block(block, schema, where, prefix=""):
    for key, value in block.items():
        name = f"{prefix}{key}"
        if key not in schema:
            if key in ("fp8", "float8"):
                raise RunError(
                    f"{where}: fp8 is not supported",
                    found=name,
                    needed="bf16, fp16 or fp32: ZeRO-3 offload keeps its parameters in one of these",
                )
            raise RunError(
                f"{where}: unknown key {name}{did_you_mean(key, schema)}",
                fix="DeepSpeed would ignore it without a word; correct or remove it",
            )
        kind = schema[key]
        if value == "auto":
            parent = prefix[:-1]
            if key not in ds_schema.AUTO_MODEL.get(
                parent, ()
            ) and key not in ds_schema.AUTO_TRAINING.get(parent, ()):
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
        elif value is not None and not _is(value, kind):
            raise RunError(
                f"{where}: {name} has the wrong type", found=repr(value), needed=kind.__name__
            )
        elif kind is int and key != "stage" and value is not None and value < 0:
            raise RunError(f"{where}: {name} is negative", found=value, needed="0 or more")


def check_config(config, where):
    """Refuse what DeepSpeed would accept without a word and what this trainer cannot run."""
    _check_block(config, ds_schema.CONFIG, where)
    zero = config.get("zero_optimization")
    if zero is None:
        raise RunError(
            f"{where}: no zero_optimization block", needed='"zero_optimization": {"stage": 3, …}'
        )
    for tier in ("offload_param", "offload_optimizer"):
        block = zero.get(tier) or {}
        device = block.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise RunError(
                f"{where}: zero_optimization.{tier}.device{did_you_mean(device, ('none', 'cpu', 'nvme'))}",
                found=device,
                needed="none, cpu or nvme",
            )
        if tier == "offload_param" and device != "none" and zero.get("stage") != 3:
            raise RunError(
                f"{where}: parameter offload works with ZeRO stage 3 only",
                found=f"stage {zero.get('stage')}",
                fix='"stage": 3, or remove offload_param',
            )
        if device == "nvme" and not block.get("nvme_path"):
            raise RunError(
                f"{where}: zero_optimization.{tier}.device is nvme without an nvme_path",
                fix='"nvme_path": "auto" takes --nvme_path; or write the directory',
            )
    if zero.get("stage") != 3:
        raise RunError(
            f"{where}: this trainer runs ZeRO stage 3",
            found=f"stage {zero.get('stage', 0)}",
            fix='"stage": 3',
        )
    if config.get("optimizer") or config.get("scheduler"):
        raise RunError(
            f"{where}: optimizer and scheduler belong to the recipe",
            fix="remove them; use --learning_rate, --weight_decay, --adam_beta1, --lr_scheduler_type, --warmup_steps",
        )
    aio = config.get("aio") or {}
    for key in ("block_size", "queue_depth", "intra_op_parallelism"):
        if aio.get(key, 1) < 1:
            raise RunError(f"{where}: aio.{key} is too small", found=aio[key], needed="1 or more")
    return config


def check_agreement(config, settings, where):
    """Batch, clip and precision belong to the recipe. A JSON that says otherwise than the flags is refused before torch."""
    pairs = (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
        ("gradient_clipping", "max_grad_norm"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    )
    for key, flag in pairs:
        value = config.get(key, "auto")
        if value != "auto" and value != settings.values[flag]:
            raise RunError(
                f"{where}: {key} contradicts --{flag}",
                found=f"{value} in the JSON, {settings.values[flag]} in the run",
                fix=f'"{key}": "auto"',
            )
        config[key] = "auto"
    config.setdefault("train_batch_size", "auto")


def uses_nvme(config, tier=None):
    """True where `tier` (offload_param or offload_optimizer), or either, goes to NVMe."""
    zero = config["zero_optimization"]
    tiers = [tier] if tier else ["offload_param", "offload_optimizer"]
    return any((zero.get(t) or {}).get("device") == "nvme" for t in tiers)


@dataclass
class Shapes:
    """What the "auto" values are made from; counts are elements.

    layer: parameters of the largest decoder layer. layer_tensors: its tensors that are large enough for NVMe.
    largest: the largest parameter.
    trainable, largest_trainable: what the optimizer sees. small_frozen: all frozen parameters that are not larger than the latter.
    itemsize: bytes of one parameter in the run's precision.
    """

    layer: int
    layer_tensors: int
    largest: int
    trainable: int
    largest_trainable: int
    itemsize: int
    small_frozen: int = 0


def _swap_buffers(optimizer, fused_step):
    """The optimizer's NVMe swapper holds weight and both moments of the current sub-group, and of the previous and the next one where
    it reads or writes ahead; without fused_step gradients too (DeepSpeed, swap_tensor/pipelined_optimizer_swapper.py)."""
    return (3 if fused_step else 4) * (
        1 + bool(optimizer.get("pipeline_read")) + bool(optimizer.get("pipeline_write"))
    )


def resolve_auto(config, shapes, world_size, swap_directory, fused_step=True):
    """A copy of the configuration with every "auto" of ours replaced.

    Whole-layer prefetch: DeepSpeed's own defaults look ahead by less than one matrix. The live and reuse limits then have
    to allow three layers, or a layer is dropped after its recomputation and fetched a third time.
    """
    config = copy.deepcopy(config)
    zero = config["zero_optimization"]
    parameters, optimizer = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}
    on_nvme = (
        parameters.get("device") == "nvme"
    )  # there, what stays on the GPU would be read at once, into too few buffers
    adapters = (
        not on_nvme
        and shapes.largest_trainable < 4e6
        and shapes.trainable * shapes.itemsize < 1e9
        and shapes.trainable < shapes.layer
        and shapes.small_frozen < 1e8
    )
    values = {
        # At least 2e7: the many small gradients of adapters travel together.
        "reduce_bucket_size": min(max(shapes.largest_trainable, int(2e7)), int(5e8)),
        # 1e8: the CPU step of one sub-group overlaps nothing, so smaller buffers cost no time. Small models: eighths.
        "sub_group_size": max(min(int(1e8), math.ceil(shapes.trainable / world_size / 8)), 1),
        "stage3_prefetch_bucket_size": shapes.layer,
        # Norms and biases stay on the GPU; adapters too, which are hundreds of small tensors and a hundredth of the model.
        "stage3_param_persistence_threshold": max(
            int(1e5), shapes.largest_trainable + 1 if adapters else 0
        ),
        "stage3_max_live_parameters": 3 * shapes.layer
        + shapes.largest
        + (shapes.trainable if adapters else 0),
        "stage3_max_reuse_distance": 2 * shapes.layer,
    }
    if on_nvme:
        # What is on the GPU holds its buffer too: no more than a layer in use and one on its way.
        values["stage3_max_live_parameters"] = 2 * shapes.layer
    for key, value in values.items():
        if zero.get(key) == "auto":
            zero[key] = value
    if parameters.get("buffer_size") == "auto":
        parameters["buffer_size"] = math.ceil(shapes.largest / world_size) + 4096
    if parameters.get("buffer_count") == "auto":
        # One parameter a buffer, held until the GPU's copy is released: the layer in use, the two within the reuse distance,
        # embedding, head, and one to spare. With fewer the step fails with "Not enough buffers".
        parameters["buffer_count"] = 3 * shapes.layer_tensors + 3
    if optimizer.get("buffer_count") == "auto":
        optimizer["buffer_count"] = _swap_buffers(optimizer, fused_step)
    for block in (parameters, optimizer):
        if block.get("device") == "nvme":
            block["nvme_path"] = str(swap_directory)
        elif block.get("nvme_path") == "auto":
            del block["nvme_path"]
    return config


def locked_bytes(config, shapes, world_size):
    """Locked memory that one rank's NVMe buffers take, in bytes: (parameter buffers, optimizer buffers)."""
    zero = config["zero_optimization"]
    parameters, optimizer = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}
    first = second = 0
    if parameters.get("device") == "nvme":
        first = (
            int(parameters.get("buffer_count", 5))
            * int(parameters.get("buffer_size", 1e8))
            * shapes.itemsize
        )
    if optimizer.get("device") == "nvme":
        # A sub-group closes once it has reached sub_group_size, so it can be larger by one parameter.
        share = math.ceil(shapes.trainable / world_size)
        group = min(
            share,
            int(zero.get("sub_group_size", 1e9)) + math.ceil(shapes.largest_trainable / world_size),
        )
        second = int(optimizer.get("buffer_count", 4)) * group * 4
    return first, second


def check_buffers(config, shapes, world_size, where, fused_step=True):
    """Refuse NVMe buffers that DeepSpeed would fail on with an assertion in mid-step."""
    zero = config["zero_optimization"]
    parameters, optimizer = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}
    if parameters.get("device") == "nvme":
        needed = math.ceil(shapes.largest / world_size)
        if int(parameters.get("buffer_size", 1e8)) < needed:
            raise RunError(
                f"{where}: offload_param.buffer_size is smaller than the largest parameter",
                found=f"{int(parameters.get('buffer_size', 1e8)):,} elements",
                needed=f"{needed:,}",
                fix='"buffer_size": "auto"',
            )
    if optimizer.get("device") == "nvme":
        needed = _swap_buffers(optimizer, fused_step)
        if int(optimizer.get("buffer_count", 4)) < needed:
            raise RunError(
                f"{where}: offload_optimizer.buffer_count is too small for its pipelining",
                found=optimizer.get("buffer_count", 4),
                needed=needed,
                fix='"buffer_count": "auto"',
            )


def write_yaml(path, content):
    """Write a mapping as YAML, keys in their own order."""
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
