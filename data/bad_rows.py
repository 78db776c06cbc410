"""Rows that cannot be used: found, counted, shown as `file:line: reason`, kept with their content.

`checked` gives a bad row its line and reason. The reason is the text of a RowError: from records.py
where a row is not readable, from formats.py where it is no conversation, from template.py where the
chat template does not take it. Imports no torch.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from data.errors import RowError, RunError

SHOWN = 10  # bad rows that an error lists
KEPT = 100  # bad rows of a file whose reasons are remembered
RAW = 2000  # characters of a bad row that rejected.jsonl keeps

T = TypeVar("T")


class BadRow(NamedTuple):
    """A row that cannot be used. row: as the file has it, or None where it is not readable."""

    line: int
    reason: str
    row: Any = None

    def entry(self) -> str:
        """Return a line of rejected.jsonl: {"line", "reason", "row"}. A long row is cut off."""
        text = json.dumps(self.row, default=str)
        row = self.row if len(text) <= RAW else text[:RAW]
        return json.dumps(self._replace(row=row)._asdict(), default=str) + "\n"


def checked(line: int, record: Any, make: Callable[[Any], T]) -> T | BadRow:
    """Return make(record), or a BadRow where that raises RowError or the record is one."""
    try:
        if isinstance(record, RowError):
            raise record
        return make(record)
    except RowError as error:
        return BadRow(line, str(error), None if error is record else record)


@dataclass
class RowCount:
    """How many rows of a file can be used and how many cannot.

    first: [line, reason] of the first rejected rows.
    """

    accepted: int = 0
    rejected: int = 0
    first: list = field(default_factory=list)

    def reject(self, bad: BadRow) -> None:
        """Count a row that cannot be used."""
        self.rejected += 1
        if len(self.first) < KEPT:
            self.first.append([bad.line, bad.reason])

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
            "launch/data.py check shows them all",
        )


def located(path: str, rows: Iterable) -> list[str]:
    """Return `file:line: reason` of each [line, reason]."""
    return [f"{path}:{line}: {reason}" for line, reason in rows]
