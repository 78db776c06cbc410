"""Resume a run: choose and verify a checkpoint, and set this rank's state from it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors.torch import load_file

from trainer.checkpoint.files import (
    BUFFERS,
    SavedCheckpoint,
    ShardIndex,
    checkpoints,
    read_checkpoint,
)
from trainer.console import say
from trainer.distributed import all_gather_object, broadcast_object
from trainer.engine.optimizer_state import OptimizerState
from trainer.errors import RunError

if TYPE_CHECKING:
    from trainer.system.swap_dir import SwapSpace


def choose(directory: Path, requested: str) -> SavedCheckpoint | None:
    """Return the checkpoint to resume from, verified by all ranks together.

    requested: "auto" for the newest one that is whole, or a path. Returns None where the run has no
    checkpoint. Raises RunError where the path is not a whole checkpoint, or no checkpoint is whole.
    """
    if requested != "auto":
        saved = _verify(Path(requested))
        if isinstance(saved, str):
            raise RunError(
                f"the checkpoint {requested} cannot be used",
                found=saved,
                needed="the files as they were written",
                fix="--resume_from_checkpoint auto takes the newest one that is whole",
            )
        return saved
    skipped = []
    for folder in broadcast_object([folder for _, folder in checkpoints(directory)]):
        saved = _verify(folder)
        if isinstance(saved, SavedCheckpoint):
            return saved
        skipped.append(f"{folder.name}: {saved}")
        say(f"resume: skipped {skipped[-1]}")
    if skipped:
        raise RunError(
            f"no checkpoint of {directory} is whole",
            found="; ".join(skipped),
            fix="another --run_name starts anew; move the damaged ones away to start this run from "
            "its beginning",
        )
    return None


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
