"""What a run leaves: model directories, adapters, model cards."""

from pathlib import Path

from trainer.errors import FAILED, RunError

BASE = "base.json"  # beside an adapter: the fingerprint of the weights that it was trained on


def not_written(target: Path, error: OSError) -> RunError:
    """Return the error to raise where a model could not be written. It says what stands."""
    earlier = "the earlier export stands there" if target.exists() else "nothing was left there"
    return RunError(
        f"the export could not be written to {target}",
        found=f"{error.strerror or error}; {earlier}",
        needed="room for the whole model, beside an earlier one",
        fix="free space, then the same again: checkpoints and metrics are untouched",
        code=FAILED,
    )
