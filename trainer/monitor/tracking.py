"""Weights & Biases: the same numbers as metrics.jsonl.

Offline unless the user is logged in or sets WANDB_MODE. Never a prompt.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import is_own
from trainer.console import say
from trainer.doctor.network import logged_in
from trainer.errors import one_line
from trainer.monitor.telemetry import finite
from trainer.run_dir import RunDirectory

# {key in metrics.jsonl: name in W&B}
_NAMES = {
    "step": "train/global_step",
    **{
        name.replace("eval/", "eval_").split("/")[-1]: name
        for name in (
            "train/loss",
            "train/learning_rate",
            "train/grad_norm",
            "eval/loss",
            "eval/perplexity",
            "eval/token_accuracy",
            "perf/tokens",
            "perf/tokens_per_s_per_gpu",
            "perf/model_tflops_per_gpu",
            "perf/step_s",
            "perf/data_wait_s",
            "perf/forward_s",
            "perf/backward_s",
            "perf/optimizer_s",
            "perf/gpu_util",
            "mem/gpu_mem_gib",
            "mem/host_rss_gib",
            "mem/pinned_gib",
            "io/nvme_read_gbps",
            "io/nvme_write_gbps",
            "io/nvme_read_bytes",
            "io/nvme_written_bytes",
            "io/h2d_gbps",
            "io/d2h_gbps",
        )
    },
}
INIT_TIMEOUT = 20  # seconds; W&B's own default is 90


def _try(function: Callable, *arguments: Any) -> Any:
    """Return what a function of W&B returns; None where it raises, which is printed."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever W&B does, training goes on
        say(f"W&B: {type(error).__name__}: {one_line(error, 200)}")
        return None


def _try_for(seconds: float, function: Callable, *arguments: Any) -> Any:
    """Call _try and wait for it so many seconds; then return None and leave it alone."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(_try(function, *arguments)), daemon=True
    )
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _init(run: RunDirectory, name: str, config: dict, mode: Any) -> Any:
    """Start a W&B run. mode: online, offline or another of WANDB_MODE.

    Raises PermissionError where its files would go where another user's link leads.
    """
    import wandb

    place = run.path / "wandb"
    if place.is_symlink() and not is_own(place, place.lstat()):
        raise PermissionError(f"{place} is another user's link: remove it")
    wandb_run = wandb.init(
        dir=os.environ.get("WANDB_DIR", str(run)),
        name=os.environ.get("WANDB_NAME", name),
        group=os.environ.get("WANDB_RUN_GROUP", name),
        config=config,
        mode=mode,
        job_type="train",
        project=os.environ.get("WANDB_PROJECT", "zero-offload-trainer"),
        settings=wandb.Settings(init_timeout=INIT_TIMEOUT, console="off"),
    )
    wandb_run.define_metric("train/global_step")
    wandb_run.define_metric("*", step_metric="train/global_step")
    return wandb_run


class Tracker:
    """A W&B run of rank 0. Tracking never stops or slows training: without W&B it does nothing."""

    def __init__(self, run: RunDirectory, name: str, config: dict) -> None:
        self.wandb_run: Any = None
        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        for attempt in dict.fromkeys((mode, "offline")):
            # A host name that does not resolve can hold `init` beyond its own timeout.
            self.wandb_run = _try_for(INIT_TIMEOUT + 5, _init, run, name, config, attempt)
            if self.wandb_run:
                return
        say("W&B did not start; the run goes on without it, metrics.jsonl has every number")

    def log(self, record: dict) -> None:
        """Send one record of metrics.jsonl."""
        if self.wandb_run:
            numbers = {
                _NAMES[key]: number
                for key, value in record.items()
                if key in _NAMES and (number := finite(value)) is not None
            }
            _try(self.wandb_run.log, numbers)

    def finish(self) -> None:
        """End the W&B run. An upload of more than a minute is left to `wandb sync`."""
        if self.wandb_run:
            _try_for(60, self.wandb_run.finish)
            if self.wandb_run.offline:
                say(f"W&B ran offline; to upload: wandb sync {Path(self.wandb_run.dir).parent}")
