"""What a person sees: lines, tables and errors. Output never decides: nothing here raises.

`guard_output` is called once, at the start of each command and rank. From then on whatever prints
in this process, ours or a library's, can write to a full disk, a dead pipe or a lost terminal.
"""

import codecs
import io
import locale
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from data.errors import RunError
from trainer.distributed import first_rank_ends, first_rank_here, is_main_process, local_rank
from trainer.errors import FAILED

ECHO = 7  # seconds in which a first rank finds what others find, and launchers end them
_lost: dict[int, OSError] = {}  # descriptor: why something was not written to it, at first


class _Output(io.FileIO):
    """stdout or stderr, that drops what cannot be written.

    patience: seconds to wait for a reader that does not read; None: as long as it takes. stuck: it
    has been waited for, and does not read yet.
    """

    patience: float | None = None
    stuck = False

    def write(self, text: Any) -> int:
        size, written = memoryview(text).nbytes, None
        try:
            if self.patience is None:
                written = super().write(text)
            elif self._is_ready(0 if self.stuck else self.patience):
                # A pipe that is ready takes so many bytes without blocking.
                written = super().write(memoryview(text)[: select.PIPE_BUF])
        except OSError as error:
            _lost.setdefault(self.fileno(), error)
        return size if written is None else written  # None: it would block

    def _is_ready(self, seconds: float) -> bool:
        self.stuck = not _is_ready(self.fileno(), seconds)
        return not self.stuck


def _is_ready(descriptor: int, seconds: float) -> bool:
    """Return whether the descriptor can be written to without blocking, in so many seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def drop_when_blocked(seconds: float = 60) -> None:
    """Drop the output of this process where its reader reads nothing for so long.

    A run goes on then: a pager that waits, or a terminal after Ctrl-S, must not stop it.
    """
    _Output.patience = seconds


def guard_output() -> None:
    """Make stdout and stderr of this process survive everything.

    What cannot be written is dropped; a character that the encoding does not have becomes `?`.
    Streams that a notebook or a test has put there stay.
    """
    # A file that is opened next would take the number of a closed one, and get our lines.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _unfailing(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _unfailing(2, sys.stderr)
    if local_rank():
        first_rank_here()  # now, as `report` may come when it has ended


def use_utf8() -> None:
    """Start this process again with a UTF-8 locale, where the locale has another encoding.

    Libraries read their sources, models their configuration, and what compilers and tools print,
    without naming an encoding: in a GBK or ISO-8859-1 locale they would fail, or read other
    characters. What we print stays in the locale's encoding. It is for commands, at their begin.
    The process stays the same to its parent.
    """
    if locale.getpreferredencoding(False).lower().replace("-", "") == "utf8":
        return
    if os.environ.get("PYTHONUTF8") == "1":  # it has been tried: Python was told to ignore it
        return
    own = locale.nl_langinfo(locale.CODESET)
    with suppress(LookupError):
        if codecs.lookup(own).name != "ascii":  # the C locale, which says nothing
            os.environ.setdefault("PYTHONIOENCODING", f"{own}:replace")
    os.environ.update(PYTHONUTF8="1", LC_ALL="C.UTF-8")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _unfailing(number: int, stream: TextIO | None) -> TextIO:
    """Return a stream to the descriptor. stream: Python's own; None where it was closed."""
    buffer = io.BufferedWriter(_Output(number, "w", closefd=False))
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(buffer, encoding, errors="replace", line_buffering=True)


def answered(code: int) -> int:
    """Return the exit code of a command whose result is what it prints.

    It is FAILED where stdout did not take all of it; silently where a reader such as `head` had
    seen enough.
    """
    sys.stdout.flush()
    error = _lost.get(1)
    if error is None:
        return code
    if not isinstance(error, BrokenPipeError):
        report(RunError("the output could not be written", found=error.strerror))
    return FAILED


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if is_main_process():
        print(text, flush=True)


def to_stderr(text: str) -> None:
    """Print a line to stderr, on each rank that calls."""
    print(text, file=sys.stderr, flush=True)


def tell_at_once(text: str) -> None:
    """Write to stderr from a signal handler, where its stream may be in use. It never raises."""
    with suppress(OSError):
        if _is_ready(2, 0):
            os.write(2, text.encode(errors="replace"))


def report(error: RunError) -> bool:
    """Print an error to stderr, and return whether this rank did.

    What several ranks of a machine find is printed once, by the first, which ends with it. What
    only another rank finds is printed by that one, when the first has had the time to find it too.
    """
    if local_rank() and first_rank_ends(ECHO):
        return False
    to_stderr(f"\nerror: {error}")
    return True


def table(rows: Sequence[Sequence[str]], between: str = " | ") -> str:
    """Return rows of strings as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        between.join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )
