"""The command launch/plan.py. Does not import torch."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from trainer.config.command_line import WHERE, Parser, command
from trainer.config.flags import all_keys, convert, parse_size
from trainer.console import answered
from trainer.errors import DOES_NOT_FIT, DONE, RunError, did_you_mean
from trainer.plan import output
from trainer.plan.machine import Machine, from_flags, probe
from trainer.plan.micro_batch import compare
from trainer.plan.model_shapes import BUILT_IN, NEEDED, find
from trainer.plan.workload import JOB_FLAGS, TrainingJob


def number(least: float, most: float = 1e18, whole: bool = True) -> Callable[[str, str], float]:
    """Return a function (text, flag) that returns the number, or raises RunError."""

    def converter(text: str, flag: str) -> float:
        try:
            value = float(text.replace(",", "") if whole else text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (whole and not value.is_integer()):
            raise RunError(
                f"--{flag} is not a number in its range",
                found=text,
                needed=f"{'a whole number ' if whole else ''}from {least:g} to {most:g}",
            )
        return int(value) if whole else value

    return converter


def size(text: str, flag: str, most: float = 1e17) -> float:
    """Return the bytes of a size such as 80GB."""
    value = parse_size(text, flag)
    if not 1e6 <= value <= most:
        raise RunError(
            f"--{flag} is too small or too large", found=text, needed=f"1MB to {most / 1e12:g}TB"
        )
    return value


def rate(text: str, flag: str) -> float:
    """Return the bytes a second of a rate such as 12GB/s."""
    match = re.fullmatch(r"\s*([0-9.]+\s*[KMGTkmgt]i?B)/s\s*", text)
    if not match or not re.search("[1-9]", match[1]):
        raise RunError(
            f"--{flag} is not a rate",
            found=text,
            needed="bytes a second, such as 12GB/s; b is bits, an eighth",
        )
    return size(match[1], flag, 1e14)


MACHINE = {
    "gpus": (number(0, 4096), "of one machine (default: those of this one)"),
    "gpu_memory": (size, "memory of one GPU: 80GB"),
    "ram": (size, "of one machine: 1TB"),
    "nvme": (size, "free on a local NVMe: 4TB, 0 for none"),
    "nvme_read": (rate, "12GB/s"),
    "nvme_write": (rate, "6GB/s"),
    "pcie": (rate, "RAM to one GPU, each way: 50GB/s"),
    "gpu_link": (rate, "GPU to GPU: 300GB/s (default: as --pcie)"),
    "gpu_tflops": (number(0.01, 1e6, whole=False), "dense bf16 products of one GPU: 700"),
    "ram_rate": (rate, "RAM traffic of the CPU's step: 90GB/s"),
    "nodes": (number(1, 4096), "machines"),
    "network": (rate, "between machines, of one of them: 25GB/s"),
}
TOKENS = {
    "tokens_per_step": (
        number(1),
        "tokens of one optimizer step over all GPUs (default: one micro-batch each)",
    ),
    "dataset_tokens": (number(1), "then the hours of one epoch are shown"),
}
# Flags of launch/train.py, with the same defaults.
TRAINING = (
    "method",
    "lora_r",
    "lora_target_modules",
    "max_length",
    "precision",
    "grad_accum_dtype",
    "nvme_path",
)


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return {flag: value}. Raises RunError for a flag or a value that cannot be."""
    parser = Parser(
        prog="launch/plan.py",
        description="What fits which configuration and how fast, before anything is loaded.",
    )
    parser.add_argument(
        "--model", help=f"{NEEDED} (default: %(default)s)", default=next(iter(BUILT_IN))
    )
    keys, own = all_keys(), {**TOKENS, **MACHINE}
    for flag in TRAINING:
        parser.add_argument(f"--{flag}", help=keys[flag].help, default=keys[flag].default)
    for flag in ("activation_offload", "trust_remote_code"):
        parser.add_argument(f"--{flag}", nargs="?", const="true", default="false")
    for flag, (_, text) in own.items():
        parser.add_argument(f"--{flag}", help=text)
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="memory by tier, as a picture")
    namespace, unknown = parser.parse_known_args(argv)
    flags = vars(namespace)
    if unknown:
        hint = did_you_mean(unknown[0].lstrip("-"), flags)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    for flag, text in flags.items():
        if isinstance(text, str) and not text.strip():
            raise RunError(f"--{flag} is empty", fix=f"leave --{flag} out, or give a value")
        if flag in keys:
            flags[flag] = convert(keys[flag], text, WHERE)
        elif flag in own and text is not None:
            no_disk = flag == "nvme" and text.strip() in ("0", "0GB")
            flags[flag] = 0 if no_disk else own[flag][0](text, flag)
    return flags


def job_and_machine(flags: dict[str, Any]) -> tuple[TrainingJob, Machine]:
    """Return what the plan is made for. Raises RunError for flags that contradict each other."""
    here, model = None, find(flags["model"], flags["trust_remote_code"])
    # Another machine is described by its memory; without that it is this one, with some changes.
    if flags["gpu_memory"] is None and (flags["gpus"] != 0 or flags["ram"] is None):
        here = probe(flags["nvme_path"], flags["gpus"])
    machine = from_flags({flag: flags[flag] for flag in MACHINE}, here)
    precision = flags["precision"]
    if precision == "auto":
        precision = "bf16" if machine.gpus else "fp32"
    elif precision == "fp16" and not machine.gpus:
        raise RunError("--precision fp16 needs a GPU", found="no GPUs", fix="--precision fp32")
    job = TrainingJob(
        model,
        precision=precision,
        overlap_step=machine.gpus > 0,
        **{flag: flags[flag] for flag in (*JOB_FLAGS, *TOKENS)},
    )
    row = job.max_length * machine.ranks
    if job.tokens_per_step and job.tokens_per_step < row:
        raise RunError(
            "--tokens_per_step is less than one row a GPU",
            found=job.tokens_per_step,
            needed=f"at least {row} ({machine.ranks} x --max_length {job.max_length})",
        )
    job.model.adapted(job.lora_target_modules)
    return job, machine


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of launch/plan.py: DOES_NOT_FIT where no configuration fits."""
    flags = parse(argv)
    picture = flags["plot"]
    if picture and not picture.endswith((".png", ".pdf", ".svg")):
        raise RunError(
            "--plot is not a picture's name", found=picture, needed="FILE.png, .pdf or .svg"
        )
    predictions = compare(*job_and_machine(flags))
    if flags["json"]:
        print(json.dumps(output.as_json(predictions), indent=1))
    else:
        print(output.as_text(predictions))
    if picture:
        output.draw(predictions, picture)
    return answered(DONE if predictions[0].fits else DOES_NOT_FIT)
