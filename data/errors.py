"""The errors of data and trainer. Imports nothing of ours."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class RunError(Exception):
    """An error that ends the run: what is wrong, what was found and needed, and the fix.

    code: the exit code of the process, one of those in trainer/errors.py. 2 is bad input.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        needed: object = None,
        fix: str | None = None,
        code: int = 2,
    ) -> None:
        self.what, self.found, self.needed, self.fix, self.code = what, found, needed, fix, code
        lines = [what]
        for label, text in (("found", found), ("needed", needed), ("fix", fix)):
            if text is not None:
                lines.append(f"  {label + ':':<8}{text}")
        super().__init__("\n".join(lines))


@contextmanager
def disk_errors(what: str, **details: Any) -> Iterator[None]:
    """Raise RunError for an OSError of the block. details: `needed` and `fix` of the RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(what, found=error.strerror or error, **details) from None


class RowError(ValueError):
    """One row cannot be used, and why."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?`, or nothing where no known name is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: object, length: int = 300) -> str:
    """Return the text of an error on one line, cut to a length."""
    return " ".join(str(error).split())[:length]
