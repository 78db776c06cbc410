"""How a run is asked to stop or to save: by signals, and by files in the run directory.

All ranks decide together, at the end of an optimizer step. The way of exit code STOPPED (75):
PreemptionCallback sets its reason, `exit_code` below makes 75 of it, the supervisor passes it on.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data.files import in_place
from trainer.checkpoint import resume
from trainer.console import say, tell_at_once
from trainer.distributed import is_main_process
from trainer.errors import DONE, STOPPED
from trainer.run_dir import SAVE, STOP, Phase, RunDirectory

SIGNALS: dict[int, str] = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGUSR1: "SIGUSR1",
}
# Why a run stops. The ranks exchange the position; the highest one counts.
REASONS = ("", "the file STOP", *SIGNALS.values())
SAME_REQUEST = 1  # seconds within which a second signal is the first one's echo


@dataclass
class PreemptionCallback(TrainerCallback):
    """Stops all ranks after the same optimizer step when a signal or the file STOP asks for it.

    A checkpoint is written where there is time for it. The file SAVE asks for a checkpoint only.
    grace_period: seconds between a scheduler's signal and its SIGKILL.
    save_fits(seconds): whether a checkpoint would be written in that time.
    reason: why the run stopped, the same on all ranks; "" while it has not.
    unsaved: it stopped without the checkpoint that --save_strategy asks for, because the grace
    period is too short for one.
    unfinished: an evaluation or an export was broken off.
    """

    run: RunDirectory
    grace_period: float
    save_fits: Callable[[float], bool]
    device: torch.device
    reason: str = ""
    unsaved: bool = False
    unfinished: bool = False
    signal_name: str = ""  # of the first signal to this rank
    signal_time: float = 0.0

    def __post_init__(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        """Note the request. The same signal a second time ends the process."""
        name, now = SIGNALS[number], time.monotonic()
        if not self.signal_name:
            self.signal_name, self.signal_time = name, now
            if is_main_process():
                text = f"\n{name}: stopping after this optimizer step; once more to stop at once\n"
                tell_at_once(text)
        # The deepspeed launcher sends SIGTERM after a terminal's Ctrl-C, and schedulers signal
        # every process of a job: one request can reach a rank twice.
        elif name == self.signal_name and now - self.signal_time >= SAME_REQUEST:
            if is_main_process():
                tell_at_once(f"\nstopped at once, without a new checkpoint{self._how_to_go_on()}\n")
            os._exit(STOPPED)  # also where the process hangs

    def _how_to_go_on(self) -> str:
        """Return what remains to be said by a rank that no supervisor speaks for."""
        if "ZERO_OFFLOAD_SUPERVISED" not in os.environ:
            with suppress(OSError):
                last = resume.newest(self.run.path)
                kept = "there is none" if last is None else f"the last one is of step {last}"
                return f"; {kept}\nto go on: {resume.command(self.run)}"
        return ""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide on all ranks together whether to stop and whether to save."""
        stop, save, unsaved = self._agree()
        if stop:
            saves = args.save_strategy != "no"
            self.reason, self.unsaved = REASONS[stop], saves and bool(unsaved)
            control.should_training_stop, control.should_evaluate = True, False
            control.should_save = saves and not unsaved
        elif save:
            control.should_save = True
        if is_main_process() and (stop or save):
            self.run.withdraw_requests()

    def breaks_off(self) -> bool:
        """Return whether to break off what is not training. All ranks call it and get the same."""
        stop = self._agree()[0]
        if stop:
            self.reason, self.unfinished = REASONS[stop], True
        return bool(stop)

    def _agree(self) -> list[int]:
        """Return what some rank was asked for: [number of the reason, a save, no time for one]."""
        main = is_main_process()
        reason = self.signal_name
        if main and not reason and self.run.is_asked(STOP):
            reason = "the file STOP"
        save = main and self.run.is_asked(SAVE)
        # A scheduler sends these two, and SIGKILL after the grace period.
        killed_in = self.signal_time + self.grace_period - time.monotonic()
        too_slow = reason in ("SIGTERM", "SIGUSR1") and not self.save_fits(killed_in)
        request = torch.tensor([REASONS.index(reason), save, too_slow], device=self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(request, op=dist.ReduceOp.MAX)
        return request.tolist()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do nothing more at the end of an epoch that ends because the run stops."""
        if self.reason:
            control.should_evaluate = control.should_save = False


def dump_stacks_on_signal(run: RunDirectory, rank: int) -> None:
    """Make SIGUSR2 write the stacks of all threads to stacks-<rank>.txt in the run directory."""
    with suppress(OSError):  # on a full disk the run goes on without it
        # It stays open: the handler writes to its descriptor.
        file = open(run.path / f"stacks-{rank}.txt", "ab", opener=in_place)  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def exit_code(trainer: Any) -> int:
    """Return 75 where somebody stopped the run before its end, and say how it goes on; else 0.

    A run whose last step was made, and was not saved because of the stop, has not come to its end.
    trainer: the OffloadTrainer, after its training, its last evaluation or its export.
    """
    request, step = trainer.parts.preemption, trainer.state.global_step
    unsaved = request.unsaved and trainer.saved_step != step
    finished = step >= trainer.state.max_steps and not (request.unfinished or unsaved)
    if not request.reason or finished:
        return DONE
    last = trainer.last_saved
    kept = last.name if last else "no checkpoint: it would begin anew"
    if trainer.failed_saves:
        kept += "; the new one could not be saved"
    if unsaved:
        kept += "; a new one would not have been written in time"
    say(
        f"\nstopped by {request.reason} after step {step}; {kept}\n"
        f"to go on: {resume.command(trainer.run)}"
    )
    trainer.write_heartbeat(Phase.STOPPED)
    return STOPPED
