"""A run's position in a checkpoint: schedule, loss scale, counters, random generators.

`trainer` is the OffloadTrainer everywhere here.
"""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.files import RNG, Json, SavedCheckpoint


def position(trainer: Any) -> Json:
    """Return what only the trainer knows, at the end of an optimizer step, for the manifest.

    eval_loss: None where this step was not evaluated.
    """
    optimizer, metrics = trainer.model_wrapped.optimizer, trainer.metrics
    at_this_step = metrics and trainer.evaluated_at == trainer.state.global_step
    return {
        "eval_loss": metrics["eval_loss"] if at_this_step else None,
        "scheduler": trainer.lr_scheduler.state_dict(),
        "schedule": _schedule(trainer),
        "loss_scaler": {
            name: value
            for name, value in vars(optimizer.loss_scaler).items()
            if isinstance(value, (int, float))
        },
        "precision": str(optimizer.dtype),
        "tokens": trainer.telemetry.tokens,
        "update_rows": trainer.sampler.rows_per_step,
        "evaluated": metrics and [trainer.evaluated_at, metrics],
        "last_good_step": trainer.guards.last_good_step,
        "skipped_steps": trainer.guards.skipped,
    }


def apply_position(trainer: Any, saved: SavedCheckpoint) -> None:
    """Set schedule, loss scale, counters, guards and evaluation as they were saved."""
    manifest, scheduler = saved.manifest, trainer.lr_scheduler
    optimizer = trainer.model_wrapped.optimizer
    if manifest["schedule"] == _schedule(trainer):
        scheduler.load_state_dict(manifest["scheduler"])
        for group, rate in zip(optimizer.param_groups, manifest["scheduler"]["_last_lr"]):
            group["lr"] = rate
    else:  # another rate or length: the new schedule, from this step on
        scheduler.last_epoch = manifest["scheduler"]["last_epoch"] - 1
        scheduler.step()
    if manifest["precision"] == str(optimizer.dtype):
        vars(optimizer.loss_scaler).update(manifest["loss_scaler"])
    trainer.telemetry.tokens = manifest["tokens"]
    # Not the checkpoint's step: each step before it may have been skipped.
    trainer.guards.last_good_step = manifest["last_good_step"]
    trainer.guards.skipped = manifest["skipped_steps"]
    trainer.evaluated_at, trainer.metrics = manifest["evaluated"] or (None, None)


def _schedule(trainer: Any) -> list[Any]:
    """Return what the learning rate of a step depends on."""
    args = trainer.args
    return [
        args.learning_rate,
        str(args.lr_scheduler_type),
        str(args.lr_scheduler_kwargs),
        args.warmup_steps,
        trainer.state.max_steps,
    ]


def rng_state() -> Json:
    """Return the state of this rank's generators as JSON: Python, numpy, torch and CUDA."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    for device, generator in _torch_generators().items():
        state[device] = base64.b64encode(generator.get_rng_state().numpy()).decode()
    return state


def restore_rng(folder: Path) -> None:
    """Set this rank's random generators; a rank that the saved run did not have keeps its seed."""
    path = folder / RNG.format(torch.distributed.get_rank())
    if not path.exists():
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    for device, generator in _torch_generators().items():
        if device in state:
            content = list(base64.b64decode(state[device]))
            generator.set_rng_state(torch.ByteTensor(content))


def _torch_generators() -> Json:
    generators: Json = {"torch": torch.random}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda
    return generators
