"""The one version of DeepSpeed that this package extends. Does not import torch."""

from importlib import metadata

from trainer.errors import RunError, make_line

SUPPORTED = "0.19.8"


def check_version() -> None:
    """Raise RunError unless the installed DeepSpeed is the one whose inside we know."""
    try:
        installed = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        installed = "none"
    if installed.split("+")[0] != SUPPORTED:
        raise RunError(
            "this trainer extends the inside of one DeepSpeed version",
            found=f"deepspeed {installed}",
            needed=f"deepspeed {SUPPORTED}",
            fix=f"{make_line('setup')}, or pip install deepspeed=={SUPPORTED}",
        )
