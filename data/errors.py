"""The errors of data and trainer. Imports nothing of ours."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any


@dataclass(eq=False)
class RunError(Exception):
    """An error that ends the run: what is wrong, what was found and needed, and the fix.

    code: the exit code of the process, one of those in trainer/errors.py. 2 is bad input.
    """

    what: str
    _: KW_ONLY
    found: object = None
    needed: object = None
    fix: str | None = None
    code: int = 2

    def __str__(self) -> str:
        lines = [self.what]
        for label in ("found", "needed", "fix"):
            text = getattr(self, label)
            if text is not None:
                lines.append(f"  {label + ':':<8}{text}")
        return "\n".join(lines)


@contextmanager
def disk_errors(what: str, **details: Any) -> Iterator[None]:
    """Raise RunError for an OSError of the block. details: what else RunError takes."""
    try:
        yield
    except OSError as error:
        raise RunError(what, found=error.strerror or error, **details) from None


class RowError(ValueError):
    """One row cannot be used, and why."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?`, or nothing where no known name is similar."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def not_a_name(text: str) -> str | None:
    """Return why no file or flag can have this text: what the system cannot write; or None."""
    if "\0" in text:
        return f"{text!r}: a NUL character"
    try:
        text.encode("utf-8", "surrogateescape")  # a file's name may have bytes that are no UTF-8
    except UnicodeEncodeError:
        return f"{text!r}: half of a character (a lone surrogate)"
    return None


def one_line(error: object, length: int | None = 300) -> str:
    """Return the text of an error on one line, cut to a length. None: whole."""
    return " ".join(str(error).split())[:length]
