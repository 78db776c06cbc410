"""Rows that cannot be used: found, counted, shown as `file:line: reason`, kept with their content.

The reason is a RowError: from records.py where a row is not readable, from formats.py where it is
no conversation, from template.py where the chat template does not take it. source.read gives it
its line. Imports no torch.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from data import formats, storage
from data.errors import RowError, RunError
from data.source import Source, read

SHOWN = 10  # bad rows that an error lists
KEPT = 100  # bad rows of a file whose reasons are remembered
RAW = 2000  # characters of a bad row that rejected.jsonl keeps

# Passes rows on and shows how many came.
Progress = Callable[[Iterable], Iterable]


@dataclass
class RowCount:
    """How many rows of a file can be used and how many cannot.

    first: [line, reason] of the first rejected rows.
    """

    accepted: int = 0
    rejected: int = 0
    first: list = field(default_factory=list)

    def reject(self, line: int, reason: object) -> None:
        """Count a row that cannot be used."""
        self.rejected += 1
        if len(self.first) < KEPT:
            self.first.append([line, str(reason)])

    def refusal(self, path: str) -> RunError:
        """Return the error that lists the first rejected rows and counts the others."""
        lines = [
            f"{self.rejected:,} of {self.rejected + self.accepted:,} rows of {path} cannot be used"
        ]
        lines += located(path, self.first[:SHOWN])
        if self.rejected > SHOWN:
            lines.append(f"… and {self.rejected - SHOWN:,} more")
        return RunError(
            "\n  ".join(lines),
            fix="correct them, or leave them out with --on_bad_row skip; "
            "python launch/data.py check shows them all",
        )


def located(path: str, rows: Iterable) -> list[str]:
    """Return `file:line: reason` of each [line, reason]."""
    return [f"{path}:{line}: {reason}" for line, reason in rows]


def entry(line: int, reason: object, record: Any) -> str:
    """Return a line of rejected.jsonl: {"line", "reason", "row"}. A long row is cut off."""
    text = json.dumps(record, default=str)
    row = record if len(text) <= RAW else text[:RAW]
    return json.dumps({"line": line, "reason": str(reason), "row": row}, default=str) + "\n"


def check(source: Source, progress: Progress = iter) -> RowCount:
    """Read and convert every row, keep none, and count them.

    The result is remembered by the file's content, for other ranks and runs.
    """

    def count() -> dict:
        counted = RowCount()
        for line, row, _ in progress(read(source)):
            if isinstance(row, RowError):
                counted.reject(line, row)
            else:
                counted.accepted += 1
        return dataclasses.asdict(counted)

    return RowCount(**storage.remembered("checked", source.key(), count))


def check_all(sources: list[Source], on_bad_row: str, progress: Progress = iter) -> int:
    """Check every source and return the number of rows that can be used.

    Raise RunError for bad rows, unless they are to be skipped, and where no good row is left.
    """
    accepted, reasons = 0, []
    for source in sources:
        counted = check(source, progress)
        if counted.rejected and on_bad_row == "stop":
            raise counted.refusal(source.shown)
        accepted += counted.accepted
        reasons += located(source.shown, counted.first)
    if not accepted:
        raise RunError(
            "no row can be used",
            found=reasons[0],
            needed="rows in one of the formats " + ", ".join(formats.FORMATS),
        )
    return accepted
