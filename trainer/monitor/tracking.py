"""Weights & Biases: the same numbers as metrics.jsonl. Offline unless the user is logged in or set WANDB_MODE; never a prompt."""

import os
import threading
from pathlib import Path

from trainer.doctor.network import logged_in
from trainer.monitor.telemetry import finite

_GROUPS = {
    "train": ("loss", "learning_rate", "grad_norm"),
    "eval": ("eval_loss", "eval_perplexity", "eval_token_accuracy"),
    "perf": (
        "tokens",
        "tokens_per_s_per_gpu",
        "model_tflops_per_gpu",
        "step_s",
        "data_wait_s",
        "forward_s",
        "backward_s",
        "optimizer_s",
        "gpu_util",
    ),
    "mem": ("gpu_mem_gib", "host_rss_gib", "pinned_gib"),
    "io": (
        "nvme_read_gbps",
        "nvme_write_gbps",
        "nvme_read_bytes",
        "nvme_written_bytes",
        "h2d_gbps",
        "d2h_gbps",
    ),
}
_NAMES = {
    name: f"{group}/{name.removeprefix('eval_')}"
    for group, names in _GROUPS.items()
    for name in names
}
INIT_TIMEOUT = 20  # seconds; W&B's own default is 90


class Tracker:
    """A W&B run of rank 0, or nothing where W&B is off or fails: tracking never stops or slows training."""

    def __init__(self, run_directory, name, config):
        self.run = self.offline = None
        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        directory = Path(run_directory)
        opened = []

        def start(chosen):
            import wandb

            run = wandb.init(
                dir=os.environ.get("WANDB_DIR", str(directory)),
                name=os.environ.get("WANDB_NAME", name),
                group=os.environ.get("WANDB_RUN_GROUP", name),
                config=config,
                mode=chosen,
                job_type="train",
                project=os.environ.get("WANDB_PROJECT", "zero-offload-trainer"),
                settings=wandb.Settings(init_timeout=INIT_TIMEOUT, console="off"),
            )
            run.define_metric("train/global_step")
            run.define_metric("*", step_metric="train/global_step")
            opened.append(run)

        for chosen in dict.fromkeys((mode, "offline")):
            # In a thread, because a name that does not resolve can hold `init` beyond its own timeout.
            thread = threading.Thread(target=self._quietly, args=(start, chosen), daemon=True)
            thread.start()
            thread.join(INIT_TIMEOUT + 5)
            if opened:
                self.run, self.offline = opened[0], chosen == "offline"
                break
        if self.run is None:
            print(
                "W&B did not start; the run goes on without it, metrics.jsonl has every number",
                flush=True,
            )

    @staticmethod
    def _quietly(function, *arguments):
        try:
            function(*arguments)
        except Exception as error:  # whatever W&B does, training goes on
            print(f"W&B: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)

    def log(self, record):
        """Send one record of metrics.jsonl."""
        if self.run is None:
            return
        named = {
            _NAMES[k]: finite(v) for k, v in record.items() if k in _NAMES and finite(v) is not None
        }
        self._quietly(self.run.log, {**named, "train/global_step": record["step"]})

    def finish(self, seconds=60):
        """End the W&B run; give an upload `seconds`, then leave it to `wandb sync`."""
        if self.run is None:
            return
        thread = threading.Thread(target=self._quietly, args=(self.run.finish,), daemon=True)
        thread.start()
        thread.join(seconds)
        if self.offline:
            print(f"W&B ran offline; to upload: wandb sync {Path(self.run.dir).parent}", flush=True)
