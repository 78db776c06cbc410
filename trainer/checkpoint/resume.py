"""What a resumed run takes from its checkpoint and what from its flags. Imports no torch."""

import json
import os
import re
from pathlib import Path

from trainer import errors
from trainer.errors import RunError
from trainer.system import hardware

_NAME = re.compile(r"checkpoint-(\d+)")

# They decide which rows an update has: the saved value goes on, or the run would not be the one that was stopped.
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
# They name the run or where it is, and change nothing in it.
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
    *_BATCH,
)


def settle(settings, public, manifest, world_size):
    """Set the keys that the checkpoint decides. Returns a table of what differs: [(key, saved, now, used), …].

    public: today's settings as a checkpoint has them. A world of another size keeps the rows of an update: its micro-batches change.
    """
    rows = []
    for key, old in manifest["settings"].items():
        new = json.loads(json.dumps(public.get(key)))
        if key in _FREE or key not in settings.values or new == old:
            continue
        if key in KEPT:
            settings.values[key], settings.sources[key] = old, "checkpoint"
        rows.append((key, old, new, settings.values[key] if key in KEPT else new))
    wanted, values = manifest["update_rows"], settings.values
    batch, accumulate = (values[k] for k in _BATCH)
    if world_size * batch * accumulate != wanted:
        old = manifest["settings"]["per_device_train_batch_size"]
        fitting = [
            b
            for b in dict.fromkeys((batch, old, *range(min(batch, wanted), 0, -1)))
            if wanted % (world_size * b) == 0
        ]
        if not fitting:
            raise RunError(
                f"an update of {wanted} rows cannot be dealt out to {world_size} ranks",
                needed=f"a divisor of {wanted}",
                found=f"the checkpoint's update has {wanted} rows; the order of rows belongs to it",
                fix="another number of ranks, or a new run from the exported model",
            )
        values.update(zip(_BATCH, (fitting[0], wanted // (world_size * fitting[0]))))
        settings.sources.update(
            dict.fromkeys(_BATCH, "checkpoint")
        )  # or TrainingArguments would not hear of them
        rows.append(("rows of an update", wanted, world_size * batch * accumulate, wanted))
        for key, before in zip(_BATCH, (batch, accumulate)):
            if values[key] != before or manifest["settings"][key] != before:
                rows.append((key, manifest["settings"][key], before, values[key]))
    return rows


def table(rows):
    """The rows of `settle` as text."""
    return errors.table([("key", "saved", "now", "used"), *(tuple(map(str, row)) for row in rows)])


def trim_metrics(path, step):
    """Drop from metrics.jsonl what was logged after the step that the run goes on from, and what a kill left of its last line."""
    path, kept = Path(path), []
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def checkpoints(directory):
    """[(step, folder), …] of a run's checkpoints, the newest first."""
    found = [
        (int(m[1]), p)
        for p in Path(directory).glob("checkpoint-*")
        if (m := _NAME.fullmatch(p.name)) and p.is_dir()
    ]
    return sorted(found, reverse=True)


def newest(directory):
    """Step of the newest checkpoint of a run, or None."""
    return next((step for step, _ in checkpoints(directory)), None)


def command(directory):
    """The line that resumes a run. In our container the supervisor's, which makes a checkpoint of its stop."""
    start = "python launch/supervise.py" if hardware.in_our_image() else "deepspeed launch/train.py"
    return f"{start} --config {directory}/resolved_config.yaml --resume_from_checkpoint auto"
