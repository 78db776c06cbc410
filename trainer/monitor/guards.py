"""Guards: a run whose loss or gradient is not finite stops; a loss that jumps is reported."""

import json
import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data.files import new_file, write_atomically
from trainer.console import say, to_stderr
from trainer.errors import FAILED, RunError, one_line

DUMPS = 10  # optimizer steps that were not finite whose rows are written down
SPIKE = 6  # standard deviations of the last losses
Record = dict[str, Any]
RECENT, ENOUGH = 50, 20  # losses that are compared with, and how many it takes


@dataclass
class Guards:
    """Counts optimizer steps that were skipped, and watches the loss.

    limit: skipped steps in a row after which the run stops. last_good_step: the last one that
    changed the weights, also before a resumption; 0: none has.
    """

    directory: Path
    rank: int
    limit: int
    last_good_step: int = 0
    skipped: int = 0  # in a row
    skipped_since_log: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def step_was_made(self, step: int) -> None:
        """Note an optimizer step that changed the weights."""
        self.skipped, self.last_good_step = 0, step

    def step_was_skipped(self, step: int, rows: list[Record], batches: list[Record]) -> None:
        """Note a step that was skipped because of a loss or gradient that is not finite.

        rows: where this rank's rows came from; batches: its micro-batches. The first ones are
        written to nonfinite-<step>-rank-<rank>, rows as .json and tensors as .safetensors.
        """
        self.skipped += 1
        self.skipped_since_log += 1
        if self.skipped > DUMPS:
            return
        path = self.directory / f"nonfinite-{step}-rank-{self.rank}"
        tensors = {
            # Copies: two of a batch may be one tensor, which safetensors refuses.
            f"{i}/{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for i, batch in enumerate(batches)
            for name, value in batch.items()
            if torch.is_tensor(value)
        }
        try:
            write_atomically(
                path.with_suffix(".json"), json.dumps({"step": step, "rows": rows}, indent=1)
            )
            with new_file(path.with_suffix(".safetensors")) as partial:
                save_file(tensors, partial)
        except Exception as error:  # the guard decides without them
            why = getattr(error, "strerror", None) or one_line(error)
            to_stderr(f"warning: the rows of step {step} are not in {path}: {why}")

    def check_some_step_was_made(self, step: int) -> None:
        """Raise RunError where a run ends after this step, and all of its steps were skipped.

        fp16's loss scale may have been lowered in each of them, which is no fault by itself.
        """
        if step > self.last_good_step == 0:
            raise RunError(
                "no optimizer step changed the weights",
                found=f"a loss or gradient was not finite in all {step}",
                fix="a lower --learning_rate, another --precision, more steps with fp16, or a look "
                "at the rows (nonfinite-… in the run directory)",
                code=FAILED,
            )

    def mask(self, record: Record) -> None:
        """Write null for loss and norm where a step since the last record was skipped."""
        if self.skipped_since_log:
            record["loss"] = record["grad_norm"] = None
        self.skipped_since_log = 0

    def watch(self, step: int, loss: float | None) -> None:
        """Report a loss that jumps."""
        if loss is not None and math.isfinite(loss):
            if len(self.recent) >= ENOUGH:
                mean, deviation = statistics.fmean(self.recent), statistics.stdev(self.recent)
                if loss > mean + SPIKE * deviation:
                    say(
                        f"warning: the loss jumped to {loss:.4f} at step {step}; the last "
                        f"{len(self.recent)} were {mean:.4f} ± {deviation:.4f}"
                    )
            self.recent.append(loss)

    def too_many(self, step: int) -> RunError | None:
        """Return the error that stops the run after too many skipped steps in a row, or None.

        Here a NaN stops a run, on every rank alike: they all skip the same steps.
        """
        if self.skipped < self.limit:
            return None
        return RunError(
            f"the loss or a gradient was not finite in {self.skipped} optimizer step(s) in a "
            "row; none of them was applied",
            found=f"step {step}; the last good step was {self.last_good_step}",
            fix="a lower --learning_rate, a look at the rows of this step (nonfinite-… in the "
            "run directory), or --max_nonfinite_steps N to go on longer",
            code=FAILED,
        )
