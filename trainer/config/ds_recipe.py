"""What a DeepSpeed JSON says of the keys that belong to the recipe. Does not import torch.

Batch, learning rate, clip and schedule are the recipe's and the command line's. A number in the
JSON is taken where neither says one, and has to be the same where one does.
"""

from pathlib import Path
from typing import Any

from trainer.config.flags import all_keys, convert
from trainer.config.settings import Settings
from trainer.errors import RunError

MICRO, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
# The JSON's key: the flag.
FLAGS = {
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "data_types.grad_accum_dtype": "grad_accum_dtype",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "max_steps",
}
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
BETAS = "optimizer.params.betas"
# What else may stand there: the value that changes nothing.
NEUTRAL = {
    "optimizer.params.adam_w_mode": True,
    "optimizer.params.bias_correction": True,
    "optimizer.params.amsgrad": False,
    "optimizer.params.torch_adam": None,  # None: any; another implementation of the same
    "optimizer.params.fused": None,
    "scheduler.params.warmup_min_lr": 0,
    "scheduler.params.warmup_type": None,
    "scheduler.params.last_batch_iteration": -1,
}
SCHEDULES = {
    "warmuplr": "constant_with_warmup",
    "warmupdecaylr": "linear",
    "warmupcosinelr": "cosine",
}


def take_over(values: dict[str, Any], settings: Settings, where: str | Path, world: int) -> None:
    """Let the settings have what the JSON says of their keys; the JSON says "auto" from then on.

    world: ranks of the run. Raises RunError where the two contradict, or for another optimizer
    than AdamW.
    """
    said = _said(values, where)
    for name, value in said.items():
        if value == "auto":
            continue
        if name == BETAS:
            if not isinstance(value, list) or len(value) != 2:
                raise RunError(f"{where}: {name} is not two numbers", found=value)
            for flag, beta in zip(("adam_beta1", "adam_beta2"), value):
                _take(settings, flag, beta, where, name)
        elif name in FLAGS:
            _take(settings, FLAGS[name], value, where, name)
        elif name not in NEUTRAL:
            raise RunError(
                f"{where}: {name} is not supported",
                found=value,
                fix="remove it; --help lists the flags of optimizer and schedule",
            )
        elif NEUTRAL[name] not in (None, value):
            raise RunError(f"{where}: {name} is not supported", found=value, needed=NEUTRAL[name])
    _take_schedule(values.get("scheduler", {}), settings, where)
    total = values.get("train_batch_size", "auto")
    if total != "auto":
        _take_total(total, values, settings, where, world)
    for name in ("optimizer", "scheduler"):
        values.pop(name, None)
    values.get("data_types", {}).pop("grad_accum_dtype", None)
    for name in ("train_batch_size", *FLAGS):
        if "." not in name:
            values[name] = "auto"


def _said(values: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Return {path: value} of all keys that are the recipe's."""
    said = {name: values[name] for name in FLAGS if name in values}
    for block in ("optimizer", "scheduler"):
        for name, value in (values.get(block, {}).get("params") or {}).items():
            said[f"{block}.params.{name}"] = value
    if dtype := values.get("data_types", {}).get("grad_accum_dtype"):
        said["data_types.grad_accum_dtype"] = DTYPES.get(dtype.lower(), dtype.lower())
    kind = values.get("optimizer", {}).get("type", "AdamW")
    if kind.lower() not in ("adam", "adamw"):
        raise RunError(
            f"{where}: the optimizer is AdamW here",
            found=f"optimizer.type {kind}",
            fix='remove the optimizer block, or "type": "AdamW"',
        )
    return said


def _take(settings: Settings, flag: str, value: Any, where: str | Path, name: str) -> None:
    """Set a flag that nothing else has set. Raises RunError where something else was set."""
    value = convert(all_keys()[flag], value, f"{where}: {name}")
    if not settings.given(flag):
        settings.set(flag, value, str(where))
    elif settings.values[flag] != value:
        raise RunError(
            f"{where}: {name} contradicts --{flag}",
            found=f"{value} in the JSON, {settings.values[flag]} by {settings.sources[flag]}",
            fix=f'"{name.rpartition(".")[2]}": "auto"',
        )


def _take_schedule(scheduler: dict[str, Any], settings: Settings, where: str | Path) -> None:
    """Take the schedule's kind; one that the recipe names goes before it."""
    kind = scheduler.get("type")
    if kind is None:
        return
    if kind.lower() not in SCHEDULES:
        raise RunError(
            f"{where}: scheduler.type {kind} is not supported",
            needed=" | ".join(("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")),
            fix="remove the scheduler block; use --lr_scheduler_type",
        )
    if not settings.given("lr_scheduler_type"):
        settings.set("lr_scheduler_type", SCHEDULES[kind.lower()], str(where))


def _take_total(
    total: int, values: dict[str, Any], settings: Settings, where: str | Path, world: int
) -> None:
    """Let micro-batch and accumulation follow from the rows of an optimizer step, as DeepSpeed."""

    def known(name: str) -> int | None:
        flag = FLAGS[name]
        decided = settings.given(flag) or values.get(name) == "auto"
        return settings.values[flag] if decided else None

    micro, accumulation = map(known, ("train_micro_batch_size_per_gpu", ACCUMULATION))
    if micro and accumulation and settings.given("resume_from_checkpoint"):
        return  # the checkpoint decides the rows of a step, also on another number of ranks
    if micro is None:
        accumulation = accumulation or 1
        micro = total // (world * accumulation)
    elif accumulation is None:
        accumulation = total // (world * micro)
    if micro * accumulation * world != total or not total:
        raise RunError(
            f"{where}: train_batch_size contradicts micro-batch x accumulation x ranks",
            found=f"{total} in the JSON; {micro} x {accumulation} x {world} in the run",
            fix='"train_batch_size": "auto"',
        )
    for flag, value in ((MICRO, micro), (ACCUMULATION, accumulation)):
        if settings.values[flag] != value:
            settings.set(flag, value, str(where))
