"""DeepSpeed's JSON, read and checked against the schema. Does not import torch."""

import re
from pathlib import Path
from typing import Any

import hjson

from data.errors import not_a_name
from trainer.config import ds_schema
from trainer.config.ds_schema import Block, Key
from trainer.errors import RunError, did_you_mean, one_line

TIERS = ("param", "optimizer")  # what offload_<tier> moves
DEVICES = ("none", "cpu", "nvme")
_TRUE, _FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")
# They are of what this trainer does itself, or does not do at all.
_UNUSED = ("checkpoint", "data_efficiency", "hybrid_engine", "autotuning", "tensor_parallel")
_UNUSED += ("expert_parallel", "pipeline", "sequence_parallel_size", "activation_checkpointing")


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
        text = Path(path).read_text(encoding="utf-8-sig")
        values = hjson.loads(text, object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:  # hjson's own is a ValueError
        raise RunError(
            f"{path} is not readable as JSON", found=one_line(error), needed="JSON in UTF-8"
        ) from None
    if not isinstance(values, dict):
        raise RunError(
            f"{path} is not a DeepSpeed configuration",
            found=type(values).__name__,
            needed="a JSON object",
        )
    return values


def checked(values: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Return the configuration as DeepSpeed 0.19.8 understands it, in its names of today.

    Keys that are null, and those of what this trainer does itself, are left out. Raises RunError
    for what DeepSpeed would ignore in silence or refuse, and for what this trainer cannot run.
    """
    try:
        made = _checked_block(_without_nulls(values), ds_schema.config(), where)
    except RecursionError:
        raise RunError(f"{where}: blocks are nested too deeply") from None
    zero = made.get("zero_optimization")
    if zero is None:
        raise RunError(
            f"{where}: no zero_optimization block", needed='"zero_optimization": {"stage": 3, …}'
        )
    _rename(zero, where)
    _check_supported(made, where)
    _check_zero(zero, where)
    return {key: value for key, value in made.items() if key not in _UNUSED}


def _without_nulls(block: dict[str, Any]) -> dict[str, Any]:
    """Return the block without keys that are null: they say the same as no key."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if value is not None
    }


def _checked_block(
    values: dict[str, Any], block: Block, where: str | Path, prefix: str = ""
) -> dict[str, Any]:
    """Return a block under the names of today. Raises RunError for the first key that is wrong."""
    made: dict[str, Any] = {}
    for name, value in values.items():
        shown = f"{prefix}{name}"
        if reason := ds_schema.GONE.get(name):
            raise RunError(f"{where}: {name} is not supported", found=shown, fix=reason)
        key = block.keys.get(name)
        if key is None:
            raise RunError(
                f"{where}: unknown key {shown}{did_you_mean(str(name), block.keys)}",
                fix="DeepSpeed would ignore it in silence; correct or remove it",
            )
        if key.name in made:
            raise RunError(
                f"{where}: {shown} and {prefix}{key.name} are the same key", fix="one of them"
            )
        if value != "auto":
            made[key.name] = _checked_value(value, key, block.typed, where, shown)
        elif key.name in ds_schema.AUTO.get(prefix[:-1], ()):
            made[key.name] = value
        elif not block.typed:  # a typed block's default is what DeepSpeed makes of it
            raise RunError(
                f'{where}: {shown} cannot be "auto"', needed="a value, or leave the key out"
            )
    return made


def _checked_value(value: Any, key: Key, typed: bool, where: str | Path, shown: str) -> Any:
    """Return a value in its key's type."""
    if isinstance(key.kind, Block):
        if not isinstance(value, dict):
            raise RunError(
                f"{where}: {shown} has the wrong type", found=repr(value), needed="an object { … }"
            )
        return _checked_block(value, key.kind, where, f"{shown}.")
    made = _from_text(value, key.kind) if typed else value
    if not _has_type(made, key.kind):
        raise RunError(
            f"{where}: {shown} has the wrong type", found=repr(value), needed=key.kind.__name__
        )
    if key.kind is int:
        made = int(made)
    if isinstance(made, (int, float)) and not (
        (key.low is None or made >= key.low)
        and (key.high is None or made <= key.high)
        and (key.above is None or made > key.above)
    ):
        raise RunError(f"{where}: {shown} is out of range", found=value, needed=key.limits)
    if not isinstance(made, str):
        return made
    if key.choices and made.lower() not in key.choices:
        raise RunError(
            f"{where}: {shown} is not one of its choices{did_you_mean(made, key.choices)}",
            found=made,
            needed=" | ".join(key.choices),
        )
    if problem := not_a_name(made):
        raise RunError(f"{where}: {shown} cannot be a name", found=problem)
    return made


def _from_text(value: Any, kind: type) -> Any:
    """Return the number, switch or list that DeepSpeed's classes read from a text; else value."""
    if kind is list and isinstance(value, str):
        return [value]
    text = str(value).strip().lower()
    if kind is bool and (switch := text.removesuffix(".0")) in _TRUE + _FALSE:
        return switch in _TRUE
    if kind is int and isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,300}", text):
        return int(text)
    if kind is float and isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", text):
        try:
            return float(text)
        except ValueError:  # 1.2.3
            pass
    return value


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    if kind is int and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, kind)


def _rename(zero: dict[str, Any], where: str | Path) -> None:
    """Replace the old names that DeepSpeed takes, as it does."""
    for old in ds_schema.IGNORED:
        zero.pop(old, None)
    for old, new in (*ds_schema.RENAMED.items(), *ds_schema.SWITCHES.items()):
        if old not in zero:
            continue
        if new in zero:
            raise RunError(f"{where}: {old} is the old name of {new}", fix="one of them")
        value = zero.pop(old)
        if old in ds_schema.RENAMED:
            zero[new] = value
        elif value:
            zero[new] = {"device": "cpu"}


def _check_supported(values: dict[str, Any], where: str | Path) -> None:
    """Raise RunError for what DeepSpeed can do and this trainer does not."""
    for path, (off, reason) in ds_schema.OFF.items():
        node: Any = values
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is not None and node != off:
            raise RunError(f"{where}: {path} is not supported", found=node, fix=reason)


def _check_zero(zero: dict[str, Any], where: str | Path) -> None:
    """Raise RunError for a block zero_optimization that this trainer cannot run."""
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
