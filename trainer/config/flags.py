"""Flags and recipe keys. The names of `transformers.TrainingArguments` verbatim, and ours. Imports no torch.

defaults < `--config recipe.yaml` < command line. The fields of TrainingArguments are read from its source, because importing
it imports torch, and a misspelt flag should be answered at once.
"""

import ast
import dataclasses
import functools
import importlib.util
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from trainer import ROOT
from trainer.errors import RunError, did_you_mean

RESOLVED = "resolved_config.yaml"


def _flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class RunArguments:
    """What this trainer adds to TrainingArguments."""

    model_name_or_path: str | None = _flag(
        None, "model directory or hub name; none: the embedded SmolLM2-135M-Instruct"
    )
    model_revision: str = _flag(
        "main", "hub revision; pin a commit for a model that you do not own"
    )
    trust_remote_code: bool = _flag(False, "run Python code that comes with the model")
    attn_implementation: str | None = _flag(
        None, "attention backend of transformers; none: the model's default"
    )
    random_weights: bool = _flag(
        False, "random weights in the shape of the model's config.json: for benchmarks"
    )
    dataset: list | None = _flag(
        None,
        "files, folders, globs, s3:// gs:// https:// addresses or registered names, each with :SHARE "
        "for a mixture; none: the bundled samples",
    )
    dataset_dir: str | None = _flag(
        None, "folder with dataset_info.json, the registry of names; none: data/, then here"
    )
    validation_split: str | None = _flag(
        None, "validation rows: a file, a share (0.05), a count (200), or 0 for none"
    )
    max_length: int = _flag(2048, "tokens a row, or of a packed row")
    too_long: str = _flag(
        "truncate", "rows of more than max_length tokens: truncate, split into several, or drop"
    )
    packing: bool = _flag(
        False,
        "fill every row of a batch with samples (best-fit decreasing); they do not see each other",
    )
    template: str = _flag(
        "auto",
        "chat template: auto (the model's own), llama3, chatml, llama2, mistral, alpaca, or a file",
    )
    train_on_prompt: bool = _flag(False, "take the loss over the prompt too")
    last_turn_only: bool = _flag(False, "take the loss over the last answer of a conversation only")
    on_bad_row: str = _flag(
        "stop", "a row that cannot be used: stop, or skip it and write it to rejected.jsonl"
    )
    method: str = _flag("full", "full: all parameters; lora: low-rank adapters on a frozen model")
    lora_r: int = _flag(16, "rank of the LoRA adapters")
    lora_alpha: int = _flag(32, "LoRA scaling: the update is multiplied by alpha / r")
    lora_dropout: float = _flag(0.0, "dropout before the adapters")
    lora_target_modules: str = _flag("all-linear", "comma-separated module names, or all-linear")
    precision: str = _flag(
        "auto",
        "auto, bf16, fp16 or fp32; auto: bf16 where the hardware has it, fp16 on other GPUs, else fp32",
    )
    fused_loss: bool = _flag(
        True, "compute the loss in chunks and never hold the logits of a whole batch"
    )
    fused_linear: bool = _flag(
        True, "matrix and LoRA adapter as one function; a layer's last is not redone"
    )
    kept_layers: str = _flag(
        "auto",
        "decoder layers that keep their activations on the GPU and do not recompute them: a number, or "
        "auto, as many as fit (0 on a CPU)",
    )
    activation_offload: bool = _flag(
        False, "the inputs of recomputed layers wait in RAM: for long rows, where they fill the GPU"
    )
    bind_cores: bool | None = _flag(
        None,
        "give each rank CPU cores of its own, near its GPU; none: where GPU ranks share a machine",
    )
    fused_step: bool = _flag(
        True, "gradients go to the host once, and the CPU's optimizer step is one pass over RAM"
    )
    overlap_step: bool | None = _flag(
        None, "with fused_step: the CPU steps beside the next forward pass; none: on a GPU"
    )
    leaf_modules: bool | None = _flag(None, "fetch each decoder layer as one unit; none: on a GPU")
    fetch_ahead: bool = _flag(
        True,
        "on a GPU, with leaf_modules and parameters in RAM: the host does not wait for a layer's copy",
    )
    calibrate: bool | None = _flag(
        None,
        "with --deepspeed auto: try out the micro-batch in short runs; none: on GPUs of one machine",
    )
    nvme_path: str = _flag(".swap", "directory for the NVMe configurations' swap files")
    grace_seconds: int = _flag(
        570
        if os.environ.get("ZERO_OFFLOAD_IMAGE")
        else 30,  # a container's stop waits for ten minutes
        "seconds between a scheduler's SIGTERM and its kill; a save that takes longer is not begun then",
    )
    max_nonfinite_steps: int = _flag(
        1, "stop with exit 1 after so many updates in a row with a non-finite loss or gradient"
    )
    export: bool = _flag(True, "write runs/<name>/export/ at the end")
    max_shard_size: str = _flag("4GB", "largest file of the exported model")


CHOICES = {
    "method": ("full", "lora"),
    "too_long": ("truncate", "split", "drop"),
    "on_bad_row": ("stop", "skip"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
}
MINIMUM = {
    "lora_r": 1,
    "lora_alpha": 1,
    "max_length": 2,
    "max_nonfinite_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "lora_dropout": 0,
    "grace_seconds": 0,
    "save_total_limit": 2,
}

# Ours where TrainingArguments has another default. learning_rate depends on the method: see `resolve`.
TRAINING_DEFAULTS = {
    "output_dir": None,
    "deepspeed": "ds_z3_offload.json",
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # the stock filter logs a NaN loss as 0.0
    "eval_strategy": "steps",
    "eval_steps": 0.5,  # a share of the run: once half way, and at the end
    "eval_on_start": True,
    "save_strategy": "steps",
    "save_total_limit": 2,
    "remove_unused_columns": False,
    "report_to": "wandb",
    "use_liger_kernel": None,  # on a GPU, where the package is installed
    "num_train_epochs": 1.0,
}
LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}

RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_PRECISION = {"precision", "bf16", "fp16"}
_OLD = {new: old for old, new in RENAMED.items()}

# Names that tutorials still use and transformers 5 dropped: what to do instead.
RETIRED = {
    "warmup_ratio": "--warmup_steps takes a share of the run when it is below 1",
    "overwrite_output_dir": "a run never overwrites another; choose a --run_name",
    "logging_dir": "logs go to the run directory",
    "save_safetensors": "weights are always saved as safetensors",
    "evaluation_strategy": "use --eval_strategy",
    "no_cuda": "use --use_cpu",
    "fp8": "fp8 is not supported: DeepSpeed's ZeRO-3 offload keeps bf16, fp16 or fp32 parameters; use --precision auto",
}
REFUSED = {
    "fsdp": "this trainer shards with DeepSpeed ZeRO-3",
    "fsdp_config": "this trainer shards with DeepSpeed ZeRO-3",
    "load_best_model_at_end": "the best checkpoint is kept beside the newest; resume from it, or export it",
    "auto_find_batch_size": "a change of batch size in mid-run would change the result",
    "label_smoothing_factor": "the chunked loss has no label smoothing",
    "hub_token": "HF_TOKEN in the environment, or hf auth login: command lines are logged, and seen by other users",
    "push_to_hub": "hf upload ORG/NAME runs/NAME/export",
    "save_safetensors": "weights are always saved as safetensors",
}


@dataclass
class Key:
    """One flag: its type ('bool', 'int', 'float', 'list', 'dict' or 'str'), default, help, and whose it is."""

    name: str
    type: str
    default: object
    help: str
    ours: bool


def _type_of(annotation):
    for needle, name in (("dict", "dict"), ("list", "list"), ("float", "float"), ("int", "int")):
        if needle in annotation:
            return name
    return "bool" if annotation.replace(" | None", "") == "bool" else "str"


@functools.cache
def training_keys():
    """The fields of TrainingArguments, read from the installed transformers without importing it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None:
        raise RunError(
            "transformers is not installed", fix="make setup, then use .venv/bin/deepspeed", code=3
        )
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text())
    body = next(
        n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments"
    ).body
    keys = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        parts = {k.arg: k.value for k in node.value.keywords}
        try:
            default = ast.literal_eval(parts["default"])
        except (KeyError, ValueError):
            default = None
        help = " ".join(
            c.value
            for c in ast.walk(parts.get("metadata", node))
            if isinstance(c, ast.Constant) and isinstance(c.value, str) and c.value != "help"
        )
        keys[node.target.id] = Key(
            node.target.id, _type_of(ast.unparse(node.annotation)), default, help, False
        )
    for name, default in TRAINING_DEFAULTS.items():
        keys[name].default = default
    return keys


@functools.cache
def all_keys():
    """Every flag by name."""
    ours = {
        f.name: Key(
            f.name,
            _type_of(
                f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
            ),
            f.default,
            f.metadata["help"],
            True,
        )
        for f in dataclasses.fields(RunArguments)
    }
    return {**training_keys(), **ours}


def convert(key, value, where):
    """The value as the key's type; RunError names where it stood."""

    def wrong(needed):
        return RunError(f"{where}: {key.name} has the wrong type", found=repr(value), needed=needed)

    if value is None or (
        isinstance(value, str) and value.lower() in ("none", "null") and key.default is None
    ):
        return None
    if key.type == "bool":
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "1", "yes"):
            return True
        if str(value).lower() in ("false", "0", "no"):
            return False
        raise wrong("true or false")
    if key.type in ("int", "float"):
        if isinstance(value, bool):
            raise wrong(f"a number ({key.type})")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise wrong(f"a number ({key.type})") from None
        if key.type == "int" and not number.is_integer():
            raise wrong("a whole number")
        if key.type == "int" and abs(number) >= 2**63:
            raise wrong("a whole number of at most 63 bits")
        if number != number or number < MINIMUM.get(key.name, float("-inf")):
            raise RunError(
                f"{where}: {key.name} is too small",
                found=value,
                needed=f"at least {MINIMUM.get(key.name)}",
            )
        return int(number) if key.type == "int" else number
    if key.type == "dict":
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = json.loads(value)
        return value
    if key.type == "list":
        return value if isinstance(value, list) else [value]
    if isinstance(value, list):
        value = ",".join(map(str, value))
    value = str(value)
    if key.name in CHOICES and value not in CHOICES[key.name]:
        if value == "fp8":
            raise RunError(f"{where}: {RETIRED['fp8']}", found="fp8", needed="bf16, fp16 or fp32")
        raise RunError(
            f"{where}: {key.name} is not one of its choices{did_you_mean(value, CHOICES[key.name])}",
            found=value,
            needed=" | ".join(CHOICES[key.name]),
        )
    return value


def _lookup(name, where, shown):
    keys = all_keys()
    if name in REFUSED:
        raise RunError(f"{where}: {shown} is not supported", fix=REFUSED[name])
    if name in keys:
        return keys[name]
    if name in RETIRED:
        raise RunError(f"{where}: {shown} is not a flag of this trainer", fix=RETIRED[name])
    prefix = shown[: len(shown) - len(shown.lstrip("-"))]
    hint = did_you_mean(name, keys)
    raise RunError(
        f"{where}: unknown {'flag' if prefix else 'key'} {shown}"
        + (hint.replace("did you mean ", f"did you mean {prefix}") if hint else ""),
        fix="python launch/train.py --help lists them all",
    )


def parse_command_line(argv):
    """argv -> {key: value} of what the user wrote, plus 'config' for the recipe. Dashes and underscores are the same."""
    values, i = {}, 0
    while i < len(argv):
        token = argv[i]
        i += 1
        if not token.startswith("--"):
            if token.endswith((".yaml", ".yml")) and "config" not in values:
                values["config"] = token
                continue
            raise RunError(f"command line: unexpected argument {token!r}", needed="--flag value")
        name, equals, inline = token[2:].partition("=")
        name = name.replace("-", "_")
        following = []
        if equals:
            following = [inline]
        else:
            while i < len(argv) and (not argv[i].startswith("--")):
                following.append(argv[i])
                i += 1
        if name == "config":
            if not following:
                raise RunError(
                    "command line: --config needs a recipe",
                    needed="--config launch/recipes/NAME.yaml",
                )
            values["config"] = following[0]
            continue
        if name == "local_rank":  # the launcher writes it; the rank comes from the environment
            continue
        known = all_keys()
        if (
            name.startswith("no_")
            and name not in known
            and name[3:] in known
            and known[name[3:]].type == "bool"
        ):
            values[name[3:]] = False
            continue
        key = _lookup(name, "command line", token.partition("=")[0])
        if not following:
            if key.type != "bool":
                raise RunError(
                    f"command line: --{name} needs a value", needed=f"--{name} {key.type.upper()}"
                )
            values[name] = True
        elif key.type == "list" or name == "lora_target_modules":
            values[name] = convert(key, following, "command line")
        elif len(following) > 1:
            raise RunError(
                f"command line: unexpected argument {following[1]!r} after --{name} {following[0]}"
            )
        else:
            values[name] = convert(key, following[0], "command line")
    return values


def find_recipe(name):
    """The recipe's path: as given, or a name under launch/recipes/."""
    folder = ROOT / "launch" / "recipes"
    looked = [Path(name), folder / name, folder / f"{name}.yaml"]
    for path in looked:
        if path.is_file():
            return path
    raise RunError(
        f"no recipe {name}",
        found="none of " + ", ".join(map(str, looked)),
        needed="a YAML file; launch/recipes has "
        + ", ".join(sorted(p.name for p in folder.glob("*.yaml"))),
    )


def read_recipe(path):
    """Recipe -> {key: value}; blocks `full:` and `lora:` hold keys that count for that method only."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path} is not readable as YAML", found=" ".join(str(error).split())
        ) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RunError(
            f"{path} is not a recipe",
            found=type(content).__name__,
            needed="a YAML mapping of key: value",
        )
    if (
        Path(path).name == RESOLVED
    ):  # it lists every key: those that have their default were not given
        # The learning rate's default depends on the method; that of TrainingArguments is not ours.
        content = {
            n: v
            for n, v in content.items()
            if n not in REFUSED
            and n in all_keys()
            and (n == "learning_rate" or v != all_keys()[n].default)
        }
    blocks = {m: content.pop(m) or {} for m in CHOICES["method"] if m in content}
    for method, block in blocks.items():
        if not isinstance(block, dict):
            raise RunError(
                f"{path}: the block {method} is not a mapping",
                found=repr(block),
                needed=f"{method}: and indented keys",
            )
    where = str(path)
    plain = {n: convert(_lookup(n, where, str(n)), v, where) for n, v in content.items()}
    return plain, {
        m: {n: convert(_lookup(n, where, str(n)), v, where) for n, v in b.items()}
        for m, b in blocks.items()
    }


@dataclass
class Settings:
    """The resolved keys: `values` of every key, and `sources` of those that differ from the default."""

    values: dict
    sources: dict

    def __getattr__(self, name):
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def given(self, name):
        """True where the recipe or the command line set the key."""
        return name in self.sources

    def training(self):
        """The keyword arguments for TrainingArguments: what was set, and our defaults."""
        names = [n for n, key in all_keys().items() if not key.ours]
        chosen = {
            n: self.values[n]
            for n in names
            if n in self.sources or n in TRAINING_DEFAULTS or n == "learning_rate"
        }
        if not self.given("per_device_eval_batch_size"):  # rows that train fit
            self.values["per_device_eval_batch_size"] = chosen["per_device_eval_batch_size"] = (
                self.per_device_train_batch_size
            )
        for (
            old,
            new,
        ) in RENAMED.items():  # transformers 5.23 renamed them and warns about the old names
            if new in all_keys():
                chosen[new] = chosen.pop(old)
        return chosen


def resolve(argv, default_recipe="tiny_cpu"):
    """argv -> Settings. Without a model and a recipe, the recipe is `tiny_cpu`, which describes training the embedded default."""
    command_line = parse_command_line(argv)
    recipe = command_line.pop("config", None)
    plain, blocks, path = {}, {}, None
    if recipe is None and "model_name_or_path" not in command_line:
        recipe = default_recipe
    if recipe is not None:
        path = find_recipe(recipe)
        plain, blocks = read_recipe(path)
    values = {n: key.default for n, key in all_keys().items()}
    sources = {}
    method = command_line.get("method", plain.get("method", RunArguments.method))
    values["learning_rate"] = LEARNING_RATE[method]
    label = f"recipe {path.name}" if path else ""
    for layer, source in (
        (plain, label),
        (blocks.get(method, {}), f"{label}, {method}"),
        (command_line, "command line"),
    ):
        layer = {_OLD.get(n, n): v for n, v in layer.items()}
        # --precision, --bf16 and --fp16 say one thing: what a later layer says of it replaces what an earlier one said.
        if _PRECISION & layer.keys():
            for name in _PRECISION:
                values[name] = all_keys()[name].default
                sources.pop(name, None)
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    if "lora_target_modules" in values:
        values["lora_target_modules"] = str(values["lora_target_modules"])
    if values["train_sampling_strategy"] not in ("random", "sequential", "group_by_length"):
        raise RunError(
            "train_sampling_strategy is not supported",
            found=values["train_sampling_strategy"],
            needed="random, sequential or group_by_length",
        )
    if values["packing"] and values["train_sampling_strategy"] == "group_by_length":
        raise RunError(
            "packed rows are all of one length",
            found="--packing and --train_sampling_strategy group_by_length",
            needed="one of them",
        )
    if values["kept_layers"] != "auto" and not str(values["kept_layers"]).isdigit():
        raise RunError(
            "kept_layers is not a number of layers",
            found=values["kept_layers"],
            needed="0 or more, or auto",
        )
    return Settings(values, sources)


def check_model(name):
    """Refuse what looks like a path and is not a model directory; a hub name passes."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RunError(
                f"{path} is not a model directory",
                needed="config.json, weights and tokenizer files",
                found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty directory",
            )
    elif path.exists():
        raise RunError(f"{path} is a file, not a model directory")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise RunError(
            f"no model directory {name}",
            found=f"nothing at {path.absolute()}",
            needed="a directory with config.json, or a hub name such as org/model",
        )


_UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text, flag):
    """ "4GB" → bytes."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?B)\s*", str(text).upper())
    if not match or float(match[1]) <= 0:
        raise RunError(f"--{flag} is not a size", found=text, needed="such as 4GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def help_text():
    """What `--help` prints."""
    lines = [
        "deepspeed launch/train.py [--deepspeed NAME.json] [--config RECIPE.yaml] [--FLAG VALUE ...]",
        "",
        "Defaults < recipe < command line. Dashes and underscores are the same. A boolean flag alone means true.",
        "",
        "This trainer's flags:",
        "  --config RECIPE",
        "      a recipe, as a path or a name under launch/recipes/",
    ]
    for ours in (True, False):
        if not ours:
            lines += ["", "Flags of transformers.TrainingArguments, with this trainer's defaults:"]
        for key in all_keys().values():
            if key.ours == ours and key.name not in REFUSED and key.name != "local_rank":
                default = LEARNING_RATE if key.name == "learning_rate" else key.default
                lines += [
                    f"  --{key.name} {key.type.upper()}  (default {default})",
                    f"      {' '.join(key.help.split())[:160]}",
                ]
    return "\n".join(lines)
