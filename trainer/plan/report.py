"""A run's plan beside what was measured: at the start, at the end, and in plan.json.

Does not import torch.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.files import write_atomically
from trainer.config.ds_config import DeepSpeedConfig
from trainer.config.settings import Settings
from trainer.console import say, table
from trainer.distributed import all_gather_object, is_main_process
from trainer.errors import RunError
from trainer.plan import tiers
from trainer.plan.estimate import GIB, SPARE_RAM, Prediction
from trainer.plan.machine import probe
from trainer.plan.model_shapes import ModelSpec
from trainer.plan.workload import TrainingJob
from trainer.run_dir import RunDirectory
from trainer.system import hardware

if TYPE_CHECKING:
    import numpy as np

LIMIT = 0.15  # relative error from which a warning is printed
# The first steps are not counted: compilation, ZeRO's trace, and the choice of the layers that
# keep their activations.
SETTLED_STEPS = 6
# What is compared: (name, unit, size of the unit).
QUANTITIES = {
    "gpu_bytes": ("GPU peak", "GiB", GIB),
    "host_bytes": ("RAM peak", "GiB", GIB),
    "nvme_bytes": ("NVMe", "GB", 1e9),
    "step_s": ("optimizer step", "s", 1),
}


@dataclass
class PlannedRun:
    """What a run's plan is made from.

    config: "auto" values resolved or not. world_size, ranks_here: ranks of all machines, and of
    this one. lengths: tokens of each training row. labelled_share: of tokens with a loss.
    gpu_taken: bytes of a GPU that others use.
    """

    settings: Settings
    config: DeepSpeedConfig
    model: ModelSpec
    precision: str
    gpu: bool
    world_size: int
    ranks_here: int
    lengths: "np.ndarray"
    labelled_share: float
    gpu_taken: float = 0

    def predict(self) -> Prediction:
        """Return the prediction. Raises RunError for adapters that the plan does not know."""
        settings = self.settings
        machine = probe(settings.nvme_path, self.ranks_here if self.gpu else 0)
        machine.cpu_ranks, machine.nodes = self.ranks_here, self.world_size // self.ranks_here
        tiers.check_limits(machine, self.config)
        if self.config.places_by_value:  # not more than is free now, and what the ranks have
            machine.gpu_memory -= self.gpu_taken
            ours = self.ranks_here * hardware.ram_in_use()
            machine.ram = min(machine.ram, (hardware.ram_room() + ours) / (1 - SPARE_RAM))
        if not self.gpu:  # its ranks share the CPU
            machine.flops /= self.ranks_here
        job = TrainingJob.of_run(settings, self.model, self.precision, self.gpu)
        job.longest = None if settings.packing else int(self.lengths.max())
        job.mean, job.labelled = self.mean_length(), self.labelled_share
        return tiers.predict(job, machine, self.config, *_batch(settings))

    def mean_length(self) -> float:
        """Return the tokens of an average row with its padding."""
        settings, lengths = self.settings, self.lengths
        if settings.packing:
            return settings.max_length
        if settings.train_sampling_strategy == "group_by_length":
            return float(lengths.mean())
        # A row is as long as the longest one beside it.
        rows = min(settings.per_device_train_batch_size, len(lengths))
        batches = lengths[: len(lengths) // rows * rows].reshape(-1, rows)
        return float(batches.max(1).mean())


class PlanReport:
    """The prediction for one run, and its comparison with the run."""

    def __init__(self, run: RunDirectory, planned: PlannedRun) -> None:
        """Print the plan. Every rank calls it.

        Raises RunError where --deepspeed auto chose differently on two machines.
        """
        self.path = run.plan
        self.predicted: dict[str, float] = {}
        choices = all_gather_object([planned.settings.deepspeed, *_batch(planned.settings)])
        if any(choice != choices[0] for choice in choices):
            raise RunError(
                "--deepspeed auto chose differently on the machines of this run",
                found="; ".join(map(str, choices)),
                needed="machines that are alike",
                fix="--deepspeed NAME.json and --per_device_train_batch_size N",
            )
        if not is_main_process():
            return
        try:
            prediction = planned.predict()
        except RunError as error:
            say(f"plan: none, {error.what}")
            return
        self.predicted = {f"{tier}_bytes": size for tier, size in prediction.totals.items()}
        sizes = [
            f"{name.removesuffix(' peak')} {self.predicted[key] / scale:.1f} {unit}, "
            for key, (name, unit, scale) in QUANTITIES.items()
            if self.predicted.get(key)
        ]
        self.predicted["step_s"] = prediction.step_s
        say(f"plan: {''.join(sizes)}{prediction.step_s:.3g} s a step")
        self.details = {
            **prediction.tiers,
            "time_s": prediction.time,
            "kept_layers": prediction.kept_layers,
            "kept_weights": prediction.kept_weights,
        }
        self._write({})

    def _write(self, measured: dict[str, float]) -> dict[str, float]:
        """Write plan.json and return the relative error of each quantity that was measured."""
        error = {
            name: round(measured[name] / size - 1, 4)
            for name, size in self.predicted.items()
            if size and measured.get(name)
        }
        content = {
            "predicted": self.predicted,
            "measured": measured,
            "error": error,
            **self.details,
        }
        try:
            write_atomically(self.path, json.dumps(content, indent=1))
        except OSError as problem:  # a full disk: the run can go on without it
            say(f"warning: {self.path}: {problem.strerror}")
        return error

    def compare(
        self, records: Sequence[dict[str, Any]], host_bytes: float, nvme_bytes: float
    ) -> None:
        """Print and write plan and measurement, at the end of a run.

        records: of metrics.jsonl. host_bytes: the sum of the peaks of all ranks on this machine.
        nvme_bytes: of the swap files on this machine.
        """
        if not self.predicted:
            return
        steps = [record["step_s"] for record in records if record.get("step_s")]
        gpu = max((record.get("gpu_mem_gib") or 0 for record in records), default=0)
        measured = {"gpu_bytes": gpu * GIB, "host_bytes": host_bytes, "nvme_bytes": nvme_bytes}
        if len(steps) > SETTLED_STEPS:
            measured["step_s"] = statistics.median(steps[SETTLED_STEPS:])
        rows = [["", "planned", "measured", "off by"]]
        warnings = ""
        for key, relative in self._write(measured).items():
            name, unit, scale = QUANTITIES[key]
            values = (f"{size[key] / scale:.3g}" for size in (self.predicted, measured))
            rows.append([f"{name}, {unit}", *values, f"{relative:+.0%}"])
            if abs(relative) > LIMIT:
                warnings += f"\nwarning: {name} is {relative:+.0%} off the plan ({self.path})"
        say(f"\n{table(rows)}{warnings}")


def _batch(settings: Settings) -> tuple[int, int]:
    return settings.per_device_train_batch_size, settings.gradient_accumulation_steps
