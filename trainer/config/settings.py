"""The settings of a run: defaults < recipe < command line. Does not import torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data import storage
from data.files import write_atomically
from trainer import ROOT
from trainer.config.command_line import parse_training_flags
from trainer.config.flags import (
    CHOICES,
    LEARNING_RATE,
    OPTIMIZATIONS,
    REFUSED,
    RENAMED,
    TRAINING_DEFAULTS,
    all_keys,
    convert,
    find_key,
)
from trainer.errors import RunError, did_you_mean, one_line

RESOLVED = "resolved_config.yaml"
RECIPES = ROOT / "launch" / "recipes"
SECRET = ("hub_token",)
# --precision, --bf16 and --fp16 say the same thing.
_PRECISION = {"precision", "bf16", "fp16"}
_OLD_NAMES = {new: old for old, new in RENAMED.items()}


class Settings:
    """The value of every key, and where it came from.

    values: every key. sources: those that were set, with "command line", "recipe NAME", "plan" or
    "checkpoint". A key is read as an attribute.
    """

    def __init__(self, values: dict[str, Any], sources: dict[str, str]) -> None:
        self.values, self.sources = values, sources
        self.frozen = False

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def given(self, name: str) -> bool:
        """Return whether anything but the default decided the key."""
        return name in self.sources

    def set(self, name: str, value: Any, source: str) -> None:
        """Set a key. source says who decided it."""
        if self.frozen:
            raise RuntimeError(f"{name} is set after the run was prepared")
        self.values[name], self.sources[name] = value, source

    def freeze(self) -> None:
        """Allow no more changes."""
        if not self.given("per_device_eval_batch_size"):  # a batch that fits in training fits
            self.values["per_device_eval_batch_size"] = self.per_device_train_batch_size
        self.frozen = True

    def optimizes(self, name: str, gains: bool = True) -> bool:
        """Return whether one of OPTIMIZATIONS is on. gains: whether it gains on this hardware."""
        disabled = self.disable_optimizations.split(",")
        return not {"all", name} & {*disabled} and (gains or "none" in disabled)

    def rows_per_step(self, ranks: int) -> int:
        """Return the rows of an optimizer step on all ranks."""
        return ranks * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def public(self) -> dict[str, Any]:
        """Return the values without secrets: tokens, and what an address holds besides its path."""
        public = {key: value for key, value in self.values.items() if key not in SECRET}
        for key in ("dataset", "validation_split"):
            value = public[key]
            if isinstance(value, list):
                public[key] = [storage.shown(v) for v in value]
            elif value:
                public[key] = storage.shown(value)
        return public

    def training_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for TrainingArguments: what was set, and our defaults."""
        ours = {*TRAINING_DEFAULTS, "learning_rate", "per_device_eval_batch_size"}
        arguments = {
            name: self.values[name]
            for name, key in all_keys().items()
            if not key.ours and (self.given(name) or name in ours)
        }
        for old, new in RENAMED.items():
            if new in all_keys():
                arguments[new] = arguments.pop(old)
        return arguments


def resolve(argv: Sequence[str], default_recipe: str | None = "tiny_cpu") -> Settings:
    """Return the settings of a command line. Raises RunError for what is unknown or contradictory.

    Without a model and a recipe default_recipe is taken: tiny_cpu trains the default model.
    """
    typed = parse_training_flags(argv)
    recipe = typed.pop("config", None)
    if recipe is None and "model_name_or_path" not in typed:
        recipe = default_recipe
    plain, blocks, label = {}, {}, ""
    if recipe is not None:
        path = find_shipped(recipe, RECIPES, ".yaml", "recipe")
        plain, blocks = read_recipe(path)
        label = f"recipe {path.name}"
    settings = Settings({name: key.default for name, key in all_keys().items()}, {})
    method = {**settings.values, **plain, **typed}["method"]
    settings.values["learning_rate"] = LEARNING_RATE[method]
    _apply(settings, plain, label)
    _apply(settings, blocks.get(method, {}), f"{label}, {method}")
    _apply(settings, typed, "command line")
    _check(settings)
    return settings


def _apply(settings: Settings, layer: dict[str, Any], source: str) -> None:
    """Set a layer's keys over those of earlier ones."""
    layer = {_OLD_NAMES.get(name, name): value for name, value in layer.items()}
    if _PRECISION & layer.keys():  # it replaces what an earlier layer said under another name
        for name in _PRECISION:
            settings.values[name] = all_keys()[name].default
            settings.sources.pop(name, None)
    for name, value in layer.items():
        settings.set(name, value, source)


def _check(settings: Settings) -> None:
    """Raise RunError for values that are of the right type and still cannot be."""
    if settings.packing and settings.train_sampling_strategy == "group_by_length":
        raise RunError(
            "packed rows are all of one length",
            found="--packing and --train_sampling_strategy group_by_length",
            needed="one of them",
        )
    if isinstance(settings.chat_template_kwargs, str):
        raise RunError(
            "chat_template_kwargs is not a mapping",
            found=settings.chat_template_kwargs[:200],
            needed="a JSON object, as '{\"enable_thinking\": false}', or a mapping in the recipe",
        )
    for name in ("kept_layers", "kept_weights"):
        value = settings.values[name]
        if value != "auto" and not value.isdigit():
            raise RunError(
                f"{name} is not a number of layers", found=value, needed="0 or more, or auto"
            )
    for name in settings.disable_optimizations.split(","):
        if name not in ("auto", "none", "all", *OPTIMIZATIONS):
            raise RunError(
                f"disable_optimizations: no optimization {name}{did_you_mean(name, OPTIMIZATIONS)}",
                found=settings.disable_optimizations,
                needed="auto, none, all, or some of " + ",".join(OPTIMIZATIONS),
            )


def find_shipped(name: str | Path, folder: Path, suffix: str, what: str) -> Path:
    """Return a file as it is named, or of this name in a folder of ours. Raises RunError."""
    candidates = [Path(name), folder / name, folder / f"{name}{suffix}"]
    for path in candidates:
        if os.path.isfile(path):  # False also for a name that is too long
            return path
    shipped = sorted(p.name for p in folder.glob(f"*{suffix}"))
    raise RunError(
        f"no {what} {name}{did_you_mean(Path(name).name, shipped)}",
        found="none of " + ", ".join(map(str, candidates)),
        needed=f"a {suffix} file; {folder.relative_to(ROOT)} has {', '.join(shipped)}",
    )


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return (keys of both methods, {method: its own keys}) of a recipe.

    The blocks `full:` and `lora:` hold keys that count for that method only. Raises RunError for
    what is no YAML mapping, and for a key that is unknown or of the wrong type.
    """
    try:
        # Bytes: YAML tells UTF-8 and UTF-16 apart by their byte order mark.
        content = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is not readable as YAML", found=one_line(error)) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RunError(
            f"{path} is not a recipe",
            found=type(content).__name__,
            needed="a YAML mapping of key: value",
        )
    if path.name == RESOLVED:
        # It lists all keys: those count that somebody set, and the learning rate, whose default
        # depends on the method.
        keys = all_keys()
        content = {
            name: value
            for name, value in content.items()
            if name in keys
            and name not in REFUSED
            and (name == "learning_rate" or value != keys[name].default)
        }
        if (path.parent / "run.json").exists():
            # The run may have been moved or copied: it is where its settings are.
            content["output_dir"] = str(path.parent)
    blocks = {
        method: content.pop(method) or {} for method in CHOICES["method"] if method in content
    }
    for method, block in blocks.items():
        if not isinstance(block, dict):
            raise RunError(
                f"{path}: the block {method} is not a mapping",
                found=repr(block),
                needed=f"{method}: and indented keys",
            )

    def converted(block: dict[str, Any]) -> dict[str, Any]:
        where = str(path)
        keys = {name: find_key(str(name), where, str(name)) for name in block}
        # A key without a value says nothing.
        return {
            keys[name].name: convert(keys[name], value, where)
            for name, value in block.items()
            if value is not None
        }

    return converted(content), {method: converted(block) for method, block in blocks.items()}


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as YAML, keys in their own order. Raises OSError."""
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def check_model(name: str) -> None:
    """Raise RunError for a path that is not a model directory; a hub name passes."""
    path = Path(name)
    if os.path.isdir(path):  # False also for a name that is too long
        if not (path / "config.json").is_file():
            raise RunError(
                f"{path} is not a model directory",
                needed="config.json, weights and tokenizer files",
                found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty directory",
            )
    elif os.path.exists(path):
        raise RunError(f"{path} is a file, not a model directory")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise RunError(
            f"no model directory {name}",
            found=f"nothing at {path.absolute()}",
            needed="a directory with config.json, or a hub name such as org/model",
        )
