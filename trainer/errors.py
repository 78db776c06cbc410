"""The exit codes, and the one error class that users see."""

from data.errors import RunError, did_you_mean, one_line

__all__ = [
    "BAD_INPUT",
    "CRASHED",
    "DOES_NOT_FIT",
    "DONE",
    "FAILED",
    "STOPPED",
    "RunError",
    "did_you_mean",
    "one_line",
]

DONE = 0
FAILED = 1
BAD_INPUT = 2  # or a bad configuration
DOES_NOT_FIT = 3  # or a preflight check failed
STOPPED = 75  # and can be resumed: monitor/stopping.py makes it
CRASHED = 70  # an unforeseen failure, told by a rank to its supervisor; outside it is FAILED
