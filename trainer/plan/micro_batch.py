"""The choice of a micro-batch, for each configuration: launch/plan.py and `--deepspeed auto`.

Does not import torch.
"""

from trainer.plan import tiers
from trainer.plan.estimate import MODES, Prediction, config_of
from trainer.plan.machine import Machine
from trainer.plan.workload import TrainingJob

MICRO_BATCHES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128]
MOST_ROWS = 1024  # of a micro-batch, where an optimizer step has a number of rows


def evaluate(job: TrainingJob, machine: Machine, mode: str) -> Prediction:
    """Return the prediction of a mode with its best micro-batch; of one row where nothing fits.

    A larger micro-batch has to be faster by 1 %. tokens_per_step is rounded to whole rows.
    """
    rows, sizes = 0, MICRO_BATCHES
    if job.tokens_per_step:
        rows = max(1, round(job.tokens_per_step / (job.max_length * machine.ranks)))
        sizes = [size for size in range(1, min(rows, MOST_ROWS) + 1) if rows % size == 0]
    best, *others = (
        tiers.predict(job, machine, config_of(mode), size, max(1, rows // size)) for size in sizes
    )
    for other in others:
        if other.fits and (best.short or other.tokens_per_s > 1.01 * best.tokens_per_s):
            best = other
    return best


def compare(job: TrainingJob, machine: Machine) -> list[Prediction]:
    """Return the prediction of every mode, the best first.

    It fits, it is the fastest, and it is the simplest of those alike.
    """
    predictions = (evaluate(job, machine, mode) for mode in MODES)
    return sorted(predictions, key=lambda prediction: prediction.score, reverse=True)


def smaller_batch(prediction: Prediction) -> str | None:
    """Return the flags with which fewer rows at a time would fit, None where none would.

    The rows of an optimizer step stay what they are.
    """
    job, machine, config = prediction.job, prediction.machine, prediction.config
    rows, step = prediction.micro_batch, prediction.micro_batch * prediction.accumulation
    for fewer in (size for size in range(rows - 1, 0, -1) if step % size == 0):
        if tiers.predict(job, machine, config, fewer, step // fewer).fits:
            return (
                f"--per_device_train_batch_size {fewer} "
                f"--gradient_accumulation_steps {step // fewer}"
            )
    return None
