"""What a resumed run takes from its checkpoint and what from its flags. Does not import torch."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from data.files import write_atomically
from trainer.checkpoint.files import Json, checkpoints
from trainer.config.settings import Settings
from trainer.console import table
from trainer.errors import RunError
from trainer.run_dir import run_directory
from trainer.system import hardware

# They decide which rows an optimizer step has: with other values it would be another run.
KEPT = (
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "packing",
    "max_length",
    "too_long",
    "template",
    "train_on_prompt",
    "last_turn_only",
)
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# They name the run or its place, and change nothing in it.
_FREE = (
    "run_name",
    "output_dir",
    "resume_from_checkpoint",
    "nvme_path",
    "report_to",
    "eval_on_start",
    "deepspeed",
    "export",
    "max_shard_size",
    "config",
    "per_device_eval_batch_size",
    *_BATCH,
)


class Difference(NamedTuple):
    """A setting that differs: its value in the checkpoint, in today's flags, and the one used."""

    key: str
    saved: Any
    now: Any
    used: Any


def check_request(settings: Settings) -> None:
    """Check --resume_from_checkpoint and make it "auto", a path or None.

    Raises RunError for a resumption that names no run, and for a run directory that is not new.
    A path also decides the run directory, where no flag does.
    """
    requested = str(settings.resume_from_checkpoint)
    requested = {"true": "auto", "false": None, "none": None, "": None}.get(
        requested.lower(), requested
    )
    settings.values["resume_from_checkpoint"] = requested
    run = run_directory(settings)
    if requested is None:
        if run is not None and run.metrics.exists():
            raise RunError(
                f"the run directory {run} holds a run already",
                fix="another --run_name (RUN= with make); or to go on with it: " + command(run),
            )
    elif requested == "auto":
        if run is None:
            raise RunError(
                "--resume_from_checkpoint auto needs to know the run",
                fix="--run_name NAME (RUN= with make), or --output_dir",
            )
    elif not Path(requested).is_dir():
        raise RunError(
            f"no checkpoint {requested}", needed="a checkpoint-<step> directory of a run, or auto"
        )
    elif run is None:
        settings.values["output_dir"] = str(Path(requested).absolute().parent)


def reconcile(settings: Settings, manifest: Json, world_size: int) -> list[Difference]:
    """Set the keys that the checkpoint decides. Return all settings that differ from it.

    Raises RunError where the rows of an optimizer step cannot be divided among the ranks.
    """
    public = json.loads(json.dumps(settings.public()))  # with the types that a manifest has
    differences = []
    for key, saved in manifest["settings"].items():
        now = public.get(key)
        if now == saved or key in _FREE or key not in settings.values:
            continue
        if key in KEPT:
            settings.set(key, saved, "checkpoint")
        differences.append(Difference(key, saved, now, saved if key in KEPT else now))
    return differences + _reconcile_batch(settings, manifest, world_size)


def _reconcile_batch(settings: Settings, manifest: Json, world_size: int) -> list[Difference]:
    """Keep the rows of an optimizer step: for another number of ranks change the micro-batches."""
    rows, rows_now = manifest["update_rows"], settings.rows_per_step(world_size)
    if rows_now == rows:
        return []
    if rows % world_size:
        raise RunError(
            f"an optimizer step of {rows} rows cannot be divided among {world_size} ranks",
            needed=f"a divisor of {rows}",
            found=f"the checkpoint's optimizer step has {rows} rows; the order of rows needs it",
            fix="another number of ranks, or a new run from the exported model",
        )
    saved = manifest["settings"]
    batch = settings.per_device_train_batch_size
    candidates = (batch, saved["per_device_train_batch_size"], *range(min(batch, rows), 0, -1))
    batch = next(size for size in candidates if rows % (world_size * size) == 0)
    differences = [Difference("rows of an optimizer step", rows, rows_now, rows)]
    for key, used in zip(_BATCH, (batch, rows // (world_size * batch))):
        now = settings.values[key]
        settings.set(key, used, "checkpoint")
        if not saved[key] == now == used:
            differences.append(Difference(key, saved[key], now, used))
    return differences


def difference_table(differences: list[Difference]) -> str:
    """Return the differences as text with aligned columns."""
    return table([Difference._fields, *(tuple(map(str, row)) for row in differences)])


def trim_metrics(path: Path, step: int) -> None:
    """Drop the records of metrics.jsonl after a step, and what a kill left of the last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))


def newest(directory: Path) -> int | None:
    """Return the step of a run's newest checkpoint, or None."""
    return next((step for step, _ in checkpoints(directory)), None)


def command(directory: object) -> str:
    """Return the line that resumes a run.

    In our container it starts the supervisor, which saves a checkpoint when the container stops.
    """
    start = "python launch/supervise.py" if hardware.in_our_image() else "deepspeed launch/train.py"
    return f"{start} --config {directory}/resolved_config.yaml --resume_from_checkpoint auto"
