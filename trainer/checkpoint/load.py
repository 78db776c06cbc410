"""Resume a run: choose and verify a checkpoint, and set this rank's state from it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors.torch import load_file

from trainer.checkpoint import base, resume
from trainer.checkpoint.files import (
    BUFFERS,
    Json,
    SavedCheckpoint,
    ShardIndex,
    checkpoints,
    put_aside,
    read_checkpoint,
)
from trainer.console import say
from trainer.distributed import all_gather_object, broadcast_object, is_main_process
from trainer.engine.optimizer_state import OptimizerState
from trainer.errors import RunError
from trainer.run_dir import RunIdentity

if TYPE_CHECKING:
    from trainer.system.swap_dir import SwapSpace


def choose(
    directory: Path, requested: str, identity: RunIdentity | None = None
) -> SavedCheckpoint | None:
    """Return the checkpoint to resume from, verified by all ranks together.

    requested: "auto" for the newest one that is whole, or a path. identity: of the run in this
    directory, which takes its own checkpoints only, and the one that it began with; None where it
    is not known. Returns None where the run has no checkpoint. Damaged ones that are newer than the
    chosen one are put aside. Raises RunError where the path is not a whole checkpoint, or no
    checkpoint is whole.
    """
    if requested != "auto":
        saved = _verify(Path(requested))
        if isinstance(saved, str):
            raise resume.unusable(requested, saved)
        return saved
    skipped, damaged = [], []
    for folder in broadcast_object(_candidates(directory, identity)):
        saved = _verify(folder)
        if isinstance(saved, str):
            if folder.parent == directory:
                damaged.append(folder)
        elif identity is None or identity.owns(saved.manifest):
            for other in damaged if is_main_process() else ():
                say(f"resume: {other.name} is {put_aside(other, 'damaged').name} now")
            return saved
        else:
            saved = "it is of another run, or of a line that this run has left"
        name = folder.name if folder.parent == directory else folder
        skipped.append(f"{name}: {saved}")
        say(f"resume: skipped {skipped[-1]}")
    if skipped:
        raise RunError(
            f"no checkpoint of {directory} can be used",
            found="; ".join(skipped),
            fix="another --run_name starts anew; move the damaged ones away to start this run from "
            "its beginning",
        )
    return None


def _candidates(directory: Path, identity: RunIdentity | None) -> list[Path]:
    """Return the checkpoints that `auto` tries, the first one first.

    They are those of the directory, and the one that this line began with, which may lie elsewhere:
    a line that has no checkpoint yet must not begin with another one, or with the model's weights.
    """
    found = checkpoints(directory)
    folders = [folder for _, folder in found]
    parent = identity.parent if identity else None
    if parent and Path(parent["checkpoint"]).resolve() not in [f.resolve() for f in folders]:
        later = sum(step > parent["step"] for step, _ in found)
        folders.insert(later, Path(parent["checkpoint"]))
    return folders


def _verify(folder: Path) -> SavedCheckpoint | str:
    """Return the checkpoint, or what is wrong with it. Each rank reads some of the files."""
    began = time.monotonic()
    saved = broadcast_object(read_checkpoint(folder))
    if isinstance(saved, str):
        return saved
    entries = saved.manifest["files"]
    damage = saved.first_damage(sorted(entries)[dist.get_rank() :: dist.get_world_size()])
    for problem in all_gather_object(damage):
        if problem:
            return problem
    seconds = max(time.monotonic() - began, 1e-3)
    gigabytes = sum(entry["bytes"] for entry in entries.values()) / 1e9
    say(f"resume: {folder}, verified ({gigabytes:.2f} GB at {gigabytes / seconds:.1f} GB/s)")
    return saved


def check_fits(shapes: dict[str, list[int]], saved: SavedCheckpoint) -> None:
    """Raise RunError for a checkpoint of another model or adapter.

    shapes: the trained parameters of this run, with their whole shapes.
    """
    saved_shapes = saved.manifest["parameters"]
    rows = [
        f"{name}: {saved_shapes.get(name, 'not there')} saved, {shapes.get(name, 'not there')} here"
        for name in sorted({**saved_shapes, **shapes})
        if saved_shapes.get(name) != shapes.get(name)
    ]
    if rows:
        more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise RunError(
            f"{saved.folder} is of another model, method or adapter shape",
            found="; ".join(rows[:5]) + more,
            needed="the --model_name_or_path, --method and --lora_… of the run that saved it",
        )


def check_same_model(definition: Json, saved: SavedCheckpoint) -> None:
    """Raise RunError where the checkpoint's weights belong to a model that computes otherwise.

    definition: of this run's model, see base.definition.
    """
    if rows := base.differences(saved.manifest["model"], definition):
        more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise RunError(
            f"the model is not the one that {saved.folder} was saved with",
            found="; ".join(rows[:5]) + more,
            needed="its config.json, and the code that it brings, as they were",
            fix="put them back, or name their --model_revision; a new run takes the new ones",
        )


def restore(engine: Any, saved: SavedCheckpoint, space: "SwapSpace | None") -> None:
    """Set this rank's weights, moments and counters. All ranks call it.

    engine: DeepSpeed's. space: the run's swap space, where it has one.
    """
    state = OptimizerState(engine, space)
    manifest, index = saved.manifest, ShardIndex(saved, state.dtype.itemsize)
    state.restore(manifest["kinds"], manifest["scalars"], index.fill)
    if BUFFERS in manifest["files"]:
        engine.module.load_state_dict(load_file(saved.folder / BUFFERS), strict=False)
    engine.global_steps = saved.step
    dist.barrier()
