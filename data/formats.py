"""Records in → one canonical conversation: a list of {"role", "content"} that ends with the assistant's answer."""
import json
from dataclasses import dataclass
from pathlib import Path

from . import DataError

SHOWN = 10  # bad rows that an error lists


@dataclass
class Row:
    """One conversation and where it stood."""

    messages: list
    line: int


def find(path):
    """The data file; DataError says what was looked for."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"no data file {path}\n  found:  nothing at {path.absolute()}\n  needed: a .jsonl or .json file "
                        "of objects with instruction, input and output")
    if path.is_dir():
        raise DataError(f"{path} is a directory\n  needed: a .jsonl or .json file")
    return path


def instruction_row(record):
    """instruction/input/output, with optional system and history, as messages. ValueError says what is wrong with the row."""
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    if "instruction" not in record:
        raise ValueError(f"no instruction; the keys are {', '.join(map(str, record)) or 'none'}")
    for key in ("instruction", "input", "output", "system"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise ValueError(f"{key} is not text but {type(record[key]).__name__}")
    question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part and part.strip())
    if not question:
        raise ValueError("instruction is empty")
    if not (record.get("output") or "").strip():
        raise ValueError("no output" if "output" not in record else "output is empty")
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError("history is not a list of [question, answer]")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise ValueError("history is not a list of [question, answer]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _records(path):
    """Yield (line, record or ValueError) of a JSONL file, or of a JSON file that holds a list."""
    raw = path.read_bytes()
    if raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]
    if path.suffix == ".json" and raw.lstrip()[:1] == b"[":
        try:
            for number, record in enumerate(json.loads(raw), 1):
                yield number, record
        except ValueError as error:
            yield getattr(error, "lineno", 1), ValueError(f"not readable as JSON: {error}")
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield number, ValueError("not UTF-8")
            except ValueError as error:
                yield number, ValueError(f"not readable as JSON: {error}")


def read(path):
    """All rows of a file. DataError lists the first bad rows as `file:line: reason` and counts the rest."""
    path = find(path)
    rows, bad = [], []
    for line, record in _records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            rows.append(Row(instruction_row(record), line))
        except ValueError as error:
            bad.append(f"{path}:{line}: {error}")
    if bad:
        more = f"\n  … and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{len(bad)} of {len(bad) + len(rows)} rows of {path} cannot be used\n  "
                        + "\n  ".join(bad[:SHOWN]) + more + "\n  needed: every row with an instruction and an output")
    if not rows:
        raise DataError(f"{path} has no rows\n  found:  {path.stat().st_size} bytes\n  needed: one JSON object a line")
    return rows
