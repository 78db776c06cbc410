"""What a person sees: lines, tables and errors."""

import os
import sys
from collections.abc import Iterable, Sequence

from data.errors import RunError
from trainer.distributed import is_main_process


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if is_main_process():
        print(text, flush=True)


def to_stderr(text: str) -> None:
    """Print a line to stderr, on each rank that calls."""
    print(text, file=sys.stderr, flush=True)


def report(error: RunError, every_rank: bool = False) -> None:
    """Print an error to stderr, once for all ranks; on each rank that calls with every_rank."""
    if every_rank or is_main_process():
        to_stderr(f"\nerror: {error}")


def table(rows: Sequence[Sequence[str]], between: str = " | ") -> str:
    """Return rows of strings as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        between.join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )


def terminals() -> list[int]:
    """Return which of stdout and stderr are terminals, as descriptors."""
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def drop_lost_terminals(were: Iterable[int]) -> None:
    """Redirect the descriptors that were terminals and are none any more: writing would fail."""
    for descriptor in were:
        if not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
