"""What a run is called and where it lies. Imports no torch."""

import time
from pathlib import Path

from trainer.errors import RunError
from trainer.system import default_model


def run_directory(settings, name=None):
    """runs/<name>, or --output_dir; None while neither is known."""
    if settings.output_dir:
        if "://" in str(settings.output_dir):
            raise RunError(
                "--output_dir is a directory of this machine",
                found=str(settings.output_dir).partition("?")[0],
                fix="a directory on a disk or NFS; copy runs/NAME to object storage afterwards, or while it trains",
            )
        return Path(settings.output_dir)
    name = name or settings.run_name
    if name and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise RunError(
            "--run_name is a name under runs/", found=name, fix="--output_dir takes any path"
        )
    return Path("runs") / name if name else None


def default_run_name(settings):
    """<model>-<method>-<configuration>-<time>."""
    model = Path(settings.model_name_or_path or default_model.NAME).name.lower()
    stem = Path(settings.deepspeed).stem if isinstance(settings.deepspeed, str) else "ds"
    return f"{model}-{settings.method}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
