"""The one error that users see, and the exit codes."""

import difflib
import os
import sys

DONE, FAILED, BAD_INPUT, DOES_NOT_FIT, STOPPED = 0, 1, 2, 3, 75
CRASHED = (
    70  # a failure that nobody foresaw, between a rank and its supervisor; outside it is FAILED
)


class RunError(Exception):
    """What is wrong, what was found and needed, and how to mend it.

    `code` is the process's exit code: 1 the run failed, 2 bad input or configuration, 3 does not fit or preflight failed.
    """

    def __init__(self, what, *, found=None, needed=None, fix=None, code=BAD_INPUT):
        self.code = code
        lines = [what]
        for label, text in (("found", found), ("needed", needed), ("fix", fix)):
            if text is not None:
                lines.append(f"  {label + ':':<8}{text}")
        super().__init__("\n".join(lines))


def did_you_mean(word, known):
    """A sentence end such as `; did you mean --x?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def is_main_process():
    """True on the rank that talks to the user."""
    return int(os.environ.get("RANK", 0)) == 0


def table(rows, between=" | "):
    """Rows of strings as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        between.join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )


def drop_lost_terminal(terminals):
    """Send what goes to a terminal that is gone to nowhere: writing there would be an error. terminals: descriptors that were one."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def say(text):
    """A line for the user, once for the run."""
    if is_main_process():
        print(text, flush=True)


def report(error, everywhere=False):
    """Print an error once for the run. A failure that only one rank sees must be printed there: `everywhere`."""
    if is_main_process() or everywhere:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
