"""launch/train.py with a fault in the n-th micro-batch of a rank, or a signal at a moment.

FAULT_STEP is n, FAULT_RANK the rank (default 0). FAULT_VALUE is `hang`, `crash`, `stop` (a SIGTERM
to this rank), or a number by which the loss is multiplied (added to it where it begins with +).
SLOW_EVALUATION: seconds that a batch of an evaluation takes more.
SIGNAL_AT is "<phase> <step> <seconds>": so long after the first heartbeat of this phase and step,
or after the start of rank 0 ("start 0 <seconds>"), the supervisor gets SIGTERM. SIGNAL_SENT is a
file that then gets the time, as time.monotonic() says it.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)


def install_signal():
    phase, step, seconds = os.environ["SIGNAL_AT"].split()
    timer = threading.Timer(float(seconds), send_signal)
    timer.daemon = True
    if phase == "start":
        timer.start()
        return

    from trainer.run_dir import RunDirectory

    plain = RunDirectory.beat

    def beat(self, at_step, at_phase):
        plain(self, at_step, at_phase)
        if (at_phase, at_step) == (phase, int(step)) and timer.ident is None:
            timer.start()

    RunDirectory.beat = beat


def send_signal():
    Path(os.environ["SIGNAL_SENT"]).write_text(str(time.monotonic()))
    os.kill(os.getppid(), signal.SIGTERM)


def install_fault():
    from trainer.trainer import OffloadTrainer

    plain, count = OffloadTrainer._loss_and_correct, [0]

    def faulty(self, model, inputs):
        loss, correct = plain(self, model, inputs)
        if getattr(model, "module", model).training:
            count[0] += 1
            if count[0] == int(os.environ.get("FAULT_STEP", 0)) and os.environ[
                "RANK"
            ] == os.environ.get("FAULT_RANK", "0"):
                fault = os.environ["FAULT_VALUE"]
                if fault == "hang":
                    time.sleep(10**6)
                if fault == "crash":
                    raise ZeroDivisionError("injected")
                if fault == "stop":
                    os.kill(os.getpid(), signal.SIGTERM)
                    return loss, correct
                loss = loss + float(fault) if fault[0] == "+" else loss * float(fault)
        else:
            time.sleep(float(os.environ.get("SLOW_EVALUATION", 0)))
        return loss, correct

    OffloadTrainer._loss_and_correct = faulty


if __name__ == "__main__":
    from trainer.run import leave, main

    if "SIGNAL_AT" in os.environ and os.environ.get("RANK") == "0":
        install_signal()
    if {"FAULT_STEP", "SLOW_EVALUATION"} & os.environ.keys():
        install_fault()  # imports torch before the process is joined to the others
    leave(main())
