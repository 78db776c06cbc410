"""How a run is asked to stop or to save: signals and files. All ranks decide together, at the end of an update."""

import faulthandler
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from trainer.errors import STOPPED, drop_lost_terminal

STOP, SAVE = "STOP", "SAVE"  # files in the run directory
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGUSR1: "SIGUSR1"}
ONE_WISH = 1  # second
_HURRIED = ("SIGTERM", "SIGUSR1")  # a scheduler's: after the grace period comes SIGKILL


class Stopper(TrainerCallback):
    """Sees a request on any rank or in the run directory and stops every rank at the same update, with a checkpoint where it fits.

    directory: the run's; grace: seconds between a scheduler's signal and its kill; fits(seconds): whether a save would end within
    so many seconds.
    """

    def __init__(self, directory, grace, fits, device):
        self.directory, self.grace, self.fits, self.device = Path(directory), grace, fits, device
        self.asked = self.since = None  # by a signal to this rank
        self.reason = None  # why the run stopped, the same on all ranks
        self.unsaved = False
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        drop_lost_terminal(self.terminals)
        # The deepspeed launcher sends SIGTERM after a terminal's Ctrl-C, and schedulers signal every process of a job, so that a rank
        # hears of it twice: one wish, not two.
        if self.asked and (
            _SIGNALS[number] != self.asked or time.monotonic() - self.since < ONE_WISH
        ):
            return
        if self.asked:
            os.write(2, b"\nstopped at once; the last checkpoint stands\n")
            os._exit(STOPPED)
        self.asked, self.since = _SIGNALS[number], time.monotonic()
        if dist.get_rank() == 0:
            os.write(
                2,
                f"\n{self.asked}: stopping after this update; once more to stop at once\n".encode(),
            )

    def on_step_end(self, args, state, control, **kwargs):
        main = dist.get_rank() == 0
        stop = 0
        if self.asked:
            stop = 2 + list(_SIGNALS.values()).index(self.asked)
        elif main and (self.directory / STOP).exists():
            stop = 1
        save = int(main and (self.directory / SAVE).exists())
        unfit = int(
            bool(
                self.asked in _HURRIED
                and not self.fits(self.grace - (time.monotonic() - self.since))
            )
        )
        flags = torch.tensor([stop, save, unfit], device=self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, save, unfit = flags.tolist()
        if stop:
            self.reason = "the file STOP" if stop == 1 else list(_SIGNALS.values())[stop - 2]
            self.unsaved = bool(unfit)
            control.should_training_stop, control.should_evaluate = True, False
            control.should_save = args.save_strategy != "no" and not unfit
        elif save:
            control.should_save = True
        if main and (save or stop):
            for name in (STOP, SAVE):
                (self.directory / name).unlink(missing_ok=True)
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.reason:  # the epoch ends because the run does: nothing more is due
            control.should_evaluate = control.should_save = False
        return control


def dump_stacks_on_signal(directory, rank):
    """SIGUSR2 writes the stacks of all threads to stacks-<rank>.txt in the run directory: what a hung rank was doing."""
    file = open(Path(directory) / f"stacks-{rank}.txt", "a")  # noqa: SIM115 stays open: the handler writes to its descriptor
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
