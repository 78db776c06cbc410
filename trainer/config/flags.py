"""The flags: names, types, defaults and help. Does not import torch.

The names of `transformers.TrainingArguments` are taken verbatim, and a few are ours. The fields of
TrainingArguments are read from its source: importing it imports torch, and a misspelt flag should
be answered at once.
"""

import ast
import functools
import importlib.util
import json
import math
import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import not_a_name
from trainer.config import elsewhere
from trainer.errors import DOES_NOT_FIT, RunError, did_you_mean, make_line, script_line

# The stop of a container waits for ten minutes.
GRACE_SECONDS = 570 if os.environ.get("ZERO_OFFLOAD_IMAGE") else 30
# What --disable_optimizations can leave out. docs/speed.md says what each one gains.
OPTIMIZATIONS = {
    "fused_loss": "the loss in chunks, without the logits of a whole batch",
    "fused_linear": "matrix and LoRA adapter as one function; a layer's last one is not recomputed",
    "fused_step": "one copy of a gradient to the host, and the CPU's optimizer step in one pass "
    "(always, with the optimizer on NVMe)",
    "overlap_step": "the CPU's optimizer step beside the next forward pass (needs fused_step)",
    "leaf_modules": "each decoder layer is fetched as one unit",
    "resident_weights": "weights that are whole where they are used are never fetched or released "
    "(one rank; needs fused_step)",
    "fetch_ahead": "the host does not wait for a layer's copy to the GPU (needs leaf_modules)",
}


# What this trainer adds to TrainingArguments: default and help, and the type where that is None.
RUN_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "model_name_or_path": (
        None,
        "model directory or hub name; none: the default model, SmolLM2-135M-Instruct",
        "str",
    ),
    "model_revision": ("main", "hub revision; pin a commit for a model that you do not own"),
    "trust_remote_code": (False, "run Python code that comes with the model"),
    "attn_implementation": (
        None,
        "attention backend of transformers; none: the model's default",
        "str",
    ),
    "random_weights": (
        False,
        "random weights in the shape of the model's config.json: for benchmarks",
    ),
    "dataset": (
        None,
        "files, folders, globs, s3:// gs:// https:// addresses, hub names (org/name:split) or "
        "registered names, each with :SHARE for a mixture; none: the bundled samples",
        "list",
    ),
    "dataset_dir": (
        None,
        "folder with dataset_info.json, the registry of names; none: data/, then here",
        "str",
    ),
    "validation_split": (
        None,
        "validation rows: a file, folder:split, a share (0.05), a count (200), or 0 for none; "
        "unset: the data set's own validation split, else 0.05",
        "str",
    ),
    "max_length": (2048, "tokens a row, or of a packed row"),
    "too_long": (
        "truncate",
        "rows of more than max_length tokens: truncate, split into several, or drop",
    ),
    "packing": (
        False,
        "fill every row of a batch with samples (best-fit decreasing); they do not see each other",
    ),
    "template": (
        "auto",
        "chat template: auto (the model's own), llama3, chatml, llama2, mistral, alpaca, or a file",
    ),
    "chat_template_kwargs": (
        None,
        "variables of the chat template, as JSON or a mapping: '{\"enable_thinking\": false}'",
        "dict",
    ),
    "train_on_prompt": (False, "take the loss over the prompt too"),
    "last_turn_only": (False, "take the loss over the last answer of a conversation only"),
    "on_bad_row": (
        "stop",
        "a row that cannot be used: stop, or skip it and write it to rejected.jsonl",
    ),
    "method": ("full", "full: all parameters; lora: low-rank adapters on a frozen model"),
    "lora_r": (16, "rank of the LoRA adapters"),
    "lora_alpha": (32, "LoRA scaling: the update is multiplied by alpha / r"),
    "lora_dropout": (0.0, "dropout before the adapters"),
    "lora_target_modules": (
        "all-linear",
        "all-linear: the linear maps of the decoder layers, without routed experts; attention; "
        "experts; or module names. Several with commas",
    ),
    "precision": (
        "auto",
        "auto, bf16, fp16 or fp32; auto: bf16 where the hardware has it, fp16 on other GPUs, "
        "else fp32",
    ),
    "grad_accum_dtype": (
        None,
        "the sum of the micro-batches' gradients: fp32, or the run's precision; none: fp32 with "
        "LoRA and from 16 micro-batches on",
        "str",
    ),
    "disable_optimizations": (
        "auto",
        "speed optimizations to leave out, for comparisons and reports of errors: some of "
        + ", ".join(OPTIMIZATIONS)
        + "; all; auto: those that gain nothing on this hardware; none: not even those",
    ),
    "kept_layers": (
        "auto",
        "decoder layers that keep their activations on the GPU and do not recompute them: "
        "a number, or auto, as many as fit (0 on a CPU)",
    ),
    "kept_weights": (
        "auto",
        "decoder layers whose weights stay on the GPU from the forward to the backward pass: a "
        "number, or auto, as many as fit beside the activations of all layers (0 on a CPU)",
    ),
    "activation_offload": (
        False,
        "the inputs of recomputed layers wait in RAM: for long rows, where they fill the GPU",
    ),
    "nvme_path": (".swap", "directory for the NVMe configurations' swap files"),
    "allow_any_swap_filesystem": (
        False,
        "swap files on a disk that is not ext4 or xfs: copy-on-write file systems cannot reserve "
        "space, and a disk that others fill ends the run",
    ),
    "grace_seconds": (
        GRACE_SECONDS,
        "seconds between a scheduler's SIGTERM and its kill; a save that would take longer is not "
        "begun then",
    ),
    "max_nonfinite_steps": (
        1,
        "stop with exit 1 after so many optimizer steps in a row with a loss or gradient that is "
        "not finite",
    ),
    "export": (True, "write runs/<name>/export/ at the end"),
    "max_shard_size": ("4GB", "largest file of the exported model"),
}


_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
CHOICES = {
    "method": ("full", "lora"),
    "too_long": ("truncate", "split", "drop"),
    "on_bad_row": ("stop", "skip"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
    "grad_accum_dtype": ("fp32", "bf16", "fp16"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
}
# Texts that may be true or false too.
_ALSO_BOOLEAN = ("resume_from_checkpoint", "include_num_input_tokens_seen")
NESTED = 20  # blocks within blocks of a value
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
    "dataloader_prefetch_factor": 1,
    "eval_accumulation_steps": 1,
    "torch_empty_cache_steps": 1,
    **dict.fromkeys(
        (
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "data_seed",
            "dataloader_num_workers",
            "eval_delay",
            "eval_steps",
            "logging_steps",
            "max_grad_norm",
            "neftune_noise_alpha",
            "save_steps",
            "seed",
            "warmup_steps",
            "weight_decay",
        ),
        0,
    ),
}
MAXIMUM = {
    "adam_beta1": 1 - 2**-53,  # below 1
    "adam_beta2": 1 - 2**-53,
    "data_seed": 2**32 - 1,
    "lora_dropout": 1 - 2**-53,
    "seed": 2**32 - 1,  # of NumPy's generator
}

# Where TrainingArguments has another default. That of learning_rate depends on the method.
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

# transformers 5.23 renamed these and warns about the old names.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Names that are gone and that tutorials or old recipes still use, and what to do instead.
RETIRED = {
    "warmup_ratio": "--warmup_steps takes a share of the run when it is below 1",
    "overwrite_output_dir": "a run never overwrites another; choose a --run_name",
    "logging_dir": "logs go to the run directory",
    "evaluation_strategy": "use --eval_strategy",
    "no_cuda": "use --use_cpu",
    "calibrate": "--deepspeed auto (AUTO=1) takes the micro-batch that the plan chooses",
    "fp8": "fp8 is not supported: DeepSpeed's ZeRO-3 offload keeps bf16, fp16 or fp32 parameters; "
    "use --precision auto",
    **{name: f"use --disable_optimizations {name}" for name in OPTIMIZATIONS},
}
# Fields of TrainingArguments that this trainer does not support, and what to do instead.
REFUSED = {
    "fsdp": "this trainer shards with DeepSpeed ZeRO-3",
    "fsdp_config": "this trainer shards with DeepSpeed ZeRO-3",
    "load_best_model_at_end": "the best checkpoint is kept beside the newest; resume from it, "
    "or export it",
    "auto_find_batch_size": "a change of batch size in mid-run would change the result",
    "label_smoothing_factor": "the chunked loss has no label smoothing",
    "hub_token": "HF_TOKEN in the environment, or hf auth login: command lines are logged, and "
    "other users see them",
    "push_to_hub": "hf upload ORG/NAME runs/NAME/export",
    "save_safetensors": "weights are always saved as safetensors",
}


@dataclass
class Key:
    """One flag.

    type: bool, int, float, list, dict or str. ours: not a field of TrainingArguments. choices: ()
    where any text will do.
    """

    name: str
    type: str
    default: Any
    help: str
    ours: bool
    choices: tuple[str, ...] = ()


def _type_of(annotation: str) -> str:
    for name in ("dict", "list", "float", "int"):
        if name in annotation:
            return name
    return "bool" if annotation.replace(" | None", "") == "bool" else "str"


@functools.cache
def training_keys() -> dict[str, Key]:
    """Return the fields of TrainingArguments, read from the installed transformers' source."""
    classes = {**_classes("trainer_utils.py"), **_classes("training_args.py")}
    definition = classes["TrainingArguments"]
    keys = {}
    for node in definition.body:
        match node:
            case ast.AnnAssign(ast.Name(name), annotation, ast.Call(keywords=keywords)):
                parts = {keyword.arg: keyword.value for keyword in keywords}
                try:
                    default = ast.literal_eval(parts["default"])
                except (KeyError, ValueError):
                    default = None
                help = " ".join(
                    constant.value
                    for constant in ast.walk(parts.get("metadata", node))
                    if isinstance(constant, ast.Constant)
                    and isinstance(constant.value, str)
                    and constant.value != "help"
                )
                default = TRAINING_DEFAULTS.get(name, default)
                kind = ast.unparse(annotation)
                choices = CHOICES.get(name) or _members(classes.get(kind.partition(" ")[0]))
                keys[name] = Key(name, _type_of(kind), default, help, False, choices)
    return keys


def _classes(file: str) -> dict[str, ast.ClassDef]:
    """Return the classes of a module of transformers, as source."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise RunError(
            "transformers is not installed",
            fix=make_line("setup") + ", then use its .venv/bin/deepspeed",
            code=DOES_NOT_FIT,
        )
    source = Path(spec.origin).with_name(file).read_text(encoding="utf-8")
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _members(enum: ast.ClassDef | None) -> tuple[str, ...]:
    """Return the values of an enumeration of texts; () for None."""
    return tuple(
        node.value.value
        for node in (enum.body if enum else ())
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@functools.cache
def all_keys() -> dict[str, Key]:
    """Return every flag by name."""
    ours = {
        name: Key(
            name,
            kind[0] if kind else type(default).__name__,
            default,
            help,
            True,
            CHOICES.get(name, ()),
        )
        for name, (default, help, *kind) in RUN_ARGUMENTS.items()
    }
    return {**training_keys(), **ours}


def find_key(name: str, where: str, shown: str) -> Key:
    """Return the flag of this name. Raises RunError for one that is unknown or not supported.

    shown: the name as it was typed, with its dashes.
    """
    if name in REFUSED:
        raise RunError(f"{where}: {shown} is not supported", fix=REFUSED[name])
    keys = all_keys()
    if name in keys:
        return keys[name]
    if name in RETIRED:
        raise RunError(f"{where}: {shown} is not a flag of this trainer", fix=RETIRED[name])
    dashes = shown[: len(shown) - len(shown.lstrip("-"))]
    if ours := elsewhere.FLAGS.get(name):
        raise RunError(
            f"{where}: {shown} is {dashes}{ours} here", fix=" ".join(keys[ours].help.split())
        )
    if advice := elsewhere.ADVICE.get(name):
        raise RunError(f"{where}: this trainer has no {shown}", fix=advice)
    known = [key for key in keys if key != "local_rank"]  # of the launchers, for themselves
    hint = did_you_mean(name, known).replace("did you mean ", f"did you mean {dashes}")
    raise RunError(
        f"{where}: unknown {'flag' if dashes else 'key'} {shown}{hint}",
        fix=f"{script_line('train', '--help')} lists them all",
    )


def convert(key: Key, value: Any, where: str) -> Any:
    """Return the value in the flag's type. Raises RunError that names where it stood."""
    _check_plain(key, value, where)
    text = value.lower() if isinstance(value, str) else None
    if value is None or (text in ("none", "null") and key.default is None):
        return None
    if key.type == "bool":
        return _to_bool(key, value, where)
    if key.type in ("int", "float"):
        return _to_number(key, value, where)
    if key.type == "dict":
        return _to_dict(key, value, where)
    if key.type == "list":
        if value is False and key.name == "report_to":
            return ["none"]
        values = value if isinstance(value, list) else [value]
        for item in values:
            if not isinstance(item, str):
                raise _wrong_type(key, item, where, "a text, or a list of texts")
        return values
    return _to_text(key, value, where)


def _check_plain(key: Key, value: Any, where: str, depth: int = 0) -> None:
    """Raise RunError for what JSON cannot hold, or no file can be named."""
    if depth > NESTED:
        raise RunError(f"{where}: {key.name} is nested too deeply", needed=f"{NESTED} blocks")
    if isinstance(value, str) and (problem := not_a_name(value)):
        raise RunError(f"{where}: {key.name} cannot be written", found=problem)
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise _wrong_type(key, name, where, "names that are texts")
            _check_plain(key, name, where)
            if not isinstance(item, (dict, list, str, int, float, type(None))):
                raise _wrong_type(key, item, where, "a text, a number, true or false")
            _check_plain(key, item, where, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(key, item, where, depth + 1)


def _wrong_type(key: Key, value: Any, where: str, needed: str) -> RunError:
    found = reprlib.repr(value)  # short, whatever it is
    return RunError(f"{where}: {key.name} has the wrong type", found=found, needed=needed)


def _to_bool(key: Key, value: Any, where: str) -> bool:
    text = str(value).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise _wrong_type(key, value, where, "true or false")


def _to_number(key: Key, value: Any, where: str) -> int | float:
    try:
        number = float("bool" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong_type(key, value, where, f"a number ({key.type})") from None
    if key.type == "int" and math.isfinite(number) and not number.is_integer():
        raise _wrong_type(key, value, where, "a whole number")
    if key.type == "int" and 2**63 <= abs(number) < math.inf:
        raise _wrong_type(key, value, where, "a whole number of at most 63 bits")
    if not math.isfinite(number):
        raise _wrong_type(key, value, where, "a finite number")
    low, high = MINIMUM.get(key.name, -math.inf), MAXIMUM.get(key.name, math.inf)
    if not low <= number <= high:
        raise RunError(
            f"{where}: {key.name} is too {'small' if number < low else 'large'}",
            found=value,
            needed=f"at least {low}" if number < low else f"at most {high:.10g}",
        )
    return int(number) if key.type == "int" else number


def _to_dict(key: Key, value: Any, where: str) -> Any:
    """Return a mapping as it is, or as JSON. Other texts stay: some keys take a name too."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            made = json.loads(value)
        except (ValueError, RecursionError):
            raise _wrong_type(key, value, where, "a JSON object, as '{\"name\": value}'") from None
        _check_plain(key, made, where)
        return made
    if not isinstance(value, (dict, str)):
        raise _wrong_type(key, value, where, "a mapping")
    return value


def _to_text(key: Key, value: Any, where: str) -> str:
    if isinstance(value, dict):
        raise _wrong_type(key, value, where, "a text")
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    choices = key.choices
    if "no" in choices and text.lower() in ("false", "off", "no"):
        return "no"  # YAML reads no and off as a boolean
    if isinstance(value, bool) and not choices and key.name not in _ALSO_BOOLEAN:
        raise _wrong_type(key, value, where, "a text; in quotes where YAML takes it for a boolean")
    if not choices or text in choices:
        return text
    if text == "fp8":
        raise RunError(f"{where}: {RETIRED['fp8']}", found="fp8", needed="bf16, fp16 or fp32")
    raise RunError(
        f"{where}: {key.name} is not one of its choices{did_you_mean(text, choices)}",
        found=text,
        needed=" | ".join(choices),
    )


def parse_size(text: str, flag: str) -> int:
    """Return the bytes of a size such as 4GB. Raises RunError that names the flag."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT])(I?)B\s*", str(text).upper())
    if not match or float(match[1]) <= 0:
        raise RunError(f"--{flag} is not a size", found=text, needed="such as 4GB or 500MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2]))


def help_text() -> str:
    """Return what `--help` prints."""
    lines = [
        "deepspeed launch/train.py [--deepspeed NAME.json] [--config RECIPE.yaml] [--FLAG VALUE …]",
        "",
        "Defaults < recipe < command line. Dashes and underscores are the same. A boolean flag "
        "alone means true.",
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
