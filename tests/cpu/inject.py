"""launch/train.py with a fault in the n-th micro-batch of a rank.

FAULT_STEP is n, FAULT_RANK the rank (default 0). FAULT_VALUE is `hang`, `crash`, or a number by
which the loss is multiplied.
"""

import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from trainer.run import leave, main  # noqa: E402


def install():
    from trainer.trainer import OffloadTrainer

    plain, count = OffloadTrainer._loss_and_correct, [0]

    def faulty(self, model, inputs):
        loss, correct = plain(self, model, inputs)
        if getattr(model, "module", model).training:
            count[0] += 1
            if count[0] == int(os.environ["FAULT_STEP"]) and os.environ["RANK"] == os.environ.get(
                "FAULT_RANK", "0"
            ):
                fault = os.environ["FAULT_VALUE"]
                if fault == "hang":
                    time.sleep(10**6)
                if fault == "crash":
                    raise ZeroDivisionError("injected")
                loss = loss * float(fault)
        return loss, correct

    OffloadTrainer._loss_and_correct = faulty


if __name__ == "__main__":
    install()
    leave(main())
