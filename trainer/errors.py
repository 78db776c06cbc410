"""The exit codes, the one error class that users see, and the lines that a fix tells to paste."""

import os
import shlex
import sys

from data.errors import RunError, did_you_mean, one_line
from trainer import ROOT

__all__ = [
    "BAD_INPUT",
    "CRASHED",
    "DOES_NOT_FIT",
    "DONE",
    "FAILED",
    "STOPPED",
    "RunError",
    "did_you_mean",
    "make_line",
    "named",
    "one_line",
    "script_line",
]

DONE = 0
FAILED = 1
BAD_INPUT = 2  # or a bad configuration
DOES_NOT_FIT = 3  # or a preflight check failed
STOPPED = 75  # and can be resumed: monitor/stopping.py makes it
CRASHED = 70  # an unforeseen failure, told by a rank to its supervisor; outside it is FAILED


def named(error: Exception) -> str:
    """Return another library's error on one line, with its class where the text is no sentence.

    A KeyError's is the key alone.
    """
    speaks = isinstance(error, (OSError, ValueError))
    return one_line(error if speaks else f"{type(error).__name__}: {error}")


def script_line(name: str, *words: str) -> str:
    """Return the line that runs launch/<name>.py from the working directory, to be pasted."""
    if _in_root():
        return shlex.join(["python", f"launch/{name}.py", *words])
    return shlex.join([sys.executable, str(ROOT / "launch" / f"{name}.py"), *words])


def make_line(target: str) -> str:
    """Return the line that makes a target of our Makefile from the working directory."""
    return f"make {target}" if _in_root() else f"make -C {shlex.quote(str(ROOT))} {target}"


def _in_root() -> bool:
    return os.path.samefile(".", ROOT)  # os.getcwd() fails where it has been removed
