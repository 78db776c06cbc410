"""What a resumed run takes from its checkpoint and what from its flags. Does not import torch."""

import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from data.files import write_atomically
from trainer import ROOT
from trainer.checkpoint.files import Json, SavedCheckpoint, checkpoints, read_checkpoint
from trainer.config.command_line import LAUNCHER_HOSTFILE
from trainer.config.settings import Settings
from trainer.console import table
from trainer.distributed import ranks_on_this_machine
from trainer.errors import RunError
from trainer.run_dir import RunDirectory, RunIdentity, run_directory, versions
from trainer.system import hardware

# They decide which rows an optimizer step has, how their gradients are added, and what adapters do:
# with other values it would be another run.
KEPT = (
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "packing",
    "max_length",
    "too_long",
    "template",
    "chat_template_kwargs",
    "train_on_prompt",
    "last_turn_only",
    "lora_alpha",
    "grad_accum_dtype",
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


def check_request(settings: Settings, ranks: int | None = None) -> None:
    """Check --resume_from_checkpoint and make it "auto", a path or None.

    Raises RunError for a resumption that names no run, and for a run directory that is not new.
    A path also decides the run directory, where no flag does. ranks: that this process, which is
    their supervisor, will start.
    """
    requested = str(settings.resume_from_checkpoint)
    requested = {"true": "auto", "false": None, "none": None, "": None}.get(
        requested.lower(), requested
    )
    settings.values["resume_from_checkpoint"] = requested
    run = run_directory(settings)
    if requested is None:
        if run is not None and (traces := run.traces()):
            raise RunError(
                f"the run directory {run} holds a run already",
                found=", ".join(traces[:5]),
                fix="another --run_name (RUN= with make)"
                + (
                    f"; or to go on with it: {command(run, ranks)}"
                    if run.resolved_config.is_file()
                    else ""
                ),
            )
    elif requested == "auto":
        if run is None:
            raise RunError(
                "--resume_from_checkpoint auto needs to know the run",
                fix="--run_name NAME (RUN= with make), or --output_dir",
            )
        run.read_identity()  # what is wrong with it is said before anything is touched
    elif not os.path.isdir(requested):  # False also for a name that is too long
        raise RunError(
            f"no checkpoint {requested}", needed="a checkpoint-<step> directory of a run, or auto"
        )
    else:
        saved = read_checkpoint(Path(requested))
        if isinstance(saved, str):
            raise unusable(requested, saved)
        if run is None:
            run = RunDirectory(Path(requested).resolve().parent)
            settings.values["output_dir"] = str(run)
        check_same_run(run, saved)


def unusable(requested: str, why: str) -> RunError:
    """Return the error to raise where the checkpoint that was named is not whole."""
    return RunError(
        f"the checkpoint {requested} cannot be used",
        found=why,
        needed="the files as they were written",
        fix="--resume_from_checkpoint auto takes the newest one that is whole",
    )


def check_same_run(run: RunDirectory, saved: SavedCheckpoint) -> None:
    """Raise RunError where the directory holds a run that the checkpoint does not belong to.

    A new directory may go on from any run's checkpoint: then it is a run of its own, which names
    the checkpoint as its parent.
    """
    identity, manifest = run.read_identity(), saved.manifest
    if identity is None:
        known = run.path.resolve() == saved.folder.resolve().parent
        other = None if known else ", ".join(run.traces()[:5]) or None
    elif identity.owns(manifest) or identity.id == manifest["run"]["id"]:
        other = None
    else:
        other = f"run {identity.id} of {identity.created}"
    if other:
        raise RunError(
            f"the checkpoint {saved.folder} is of another run",
            found=f"{run} holds {other}; the checkpoint is of run {manifest['run']['id']}",
            needed="a checkpoint of this run, or a new directory",
            fix="--run_name NEW: a new run that goes on from the checkpoint; or leave "
            f"--run_name and --output_dir out: {saved.folder.parent} goes on",
        )


def identify(
    run: RunDirectory, requested: str | None, saved: SavedCheckpoint | None
) -> RunIdentity:
    """Return the identity of a run that starts, or goes on from a checkpoint.

    requested: as check_request leaves it. A run that goes back to an earlier checkpoint, or to one
    of a line that it had left or in another directory, begins a new line.
    """
    known = run.read_identity()
    if saved is None:
        return (known if requested else None) or RunIdentity.new()
    check_same_run(run, saved)
    is_here = run.path.resolve() == saved.folder.resolve().parent
    if known is None and is_here:
        known = RunIdentity(**saved.manifest["run"])  # run.json is gone
    parent = RunIdentity.after(saved.manifest, saved.folder)
    if known is None:
        return RunIdentity.new(parent)
    goes_back = (newest(run.path) or 0) > saved.step
    is_next = (is_here and known.owns(saved.manifest)) or known.parent == parent
    if requested == "auto" or (is_next and not goes_back):
        return known
    return dataclasses.replace(known, line=known.line + 1, parent=parent)


def reconcile(settings: Settings, manifest: Json, world_size: int) -> list[Difference]:
    """Set the keys that the checkpoint decides. Return all settings that differ from it.

    Raises RunError where the rows of an optimizer step cannot be divided among the ranks.
    """
    public = json.loads(json.dumps(settings.public()))  # with the types that a manifest has
    differences = []
    now_versions = versions()
    for package, saved in manifest["versions"].items():
        if (now := now_versions.get(package)) != saved:
            differences.append(Difference(f"version of {package}", saved, now, now))
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
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))


def newest(directory: Path) -> int | None:
    """Return the step of a run's newest checkpoint, or None."""
    return next((step for step, folder in checkpoints(directory) if folder.is_dir()), None)


def command(directory: RunDirectory, ranks: int | None = None) -> str:
    """Return the line that resumes a run, from any folder, with its ranks, as it was started.

    ranks: of this machine; None: as the launcher of this process says. In our container it starts
    the supervisor, which saves a checkpoint when the container stops.
    """
    count = str(ranks or ranks_on_this_machine())
    world = os.environ.get("WORLD_SIZE", count)
    config = directory.path.absolute() / "resolved_config.yaml"
    flags = ["--config", str(config), "--resume_from_checkpoint", "auto"]
    if hardware.in_our_image():
        return shlex.join(["python", "launch/supervise.py", *flags])
    if f"--{LAUNCHER_HOSTFILE}" in sys.argv:
        hostfile = sys.argv[sys.argv.index(f"--{LAUNCHER_HOSTFILE}") + 1]
        start = [sys.executable, f"{ROOT}/launch/supervise.py", "--hostfile", hostfile]
    elif ranks or "ZERO_OFFLOAD_SUPERVISED" in os.environ:
        start = [sys.executable, f"{ROOT}/launch/supervise.py", "--num_gpus", count]
    elif any(word.startswith("--local_rank") for word in sys.argv):  # of DeepSpeed's launcher
        start = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", count]
        if world != count:  # `deepspeed` alone tells its ranks of no file
            start = [start[0], "--hostfile", "HOSTFILE"]
        start.append(f"{ROOT}/launch/train.py")
    else:
        start = [sys.executable, f"{ROOT}/launch/train.py"]
    return from_here([*start, *flags])


def from_here(words: list[str]) -> str:
    """Return the line that runs a command from any folder as from this one.

    Files in flags and settings may be relative to it.
    """
    try:
        return f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
    except FileNotFoundError:  # it has been removed
        return shlex.join(words)
