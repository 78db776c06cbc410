"""Rows -> token files in the cache, made once.

A file keeps whole rows and their assistant spans: length, mask and packing are decided afterwards.
Imports no torch.
"""

import array
import collections
import dataclasses
import functools
import gc
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from data import bad_rows, storage
from data.bad_rows import BadRow, RowCount
from data.encoder import Encoded, Encoder
from data.errors import disk_errors
from data.files import locked, new_directory
from data.formats import Row
from data.source import Progress, Source, read
from data.template import Rendered

CHUNK = 1024  # rows that are encoded together; fewer where they have more than
CHARACTERS = 2**22
# Chunks that the tokenizer works on at once: where one ends, the other keeps the cores busy.
AHEAD = 2
VERSION = 5  # of the files below
_NO_CALLS = "the chat template leaves tool calls out, which are not trained; fix: --template chatml"
_NO_TOKENS = "no trained token: the tokenizer makes nothing of the answer"
_CONTROL = "which the tokenizer reads as a control token"
_UNREAD = 20  # keys that nothing reads and that are named
_COLUMNS = {"lengths": "i", "lines": "q", "contents": "Q", "spans": "i", "span_counts": "i"}

_Chunk = list[tuple[int, Row, Rendered]]  # line, row, text


class TokenFile:
    """The tokens of one source, in the cache.

    lengths, lines: int [rows]; contents: uint64 [rows, 2], a hash of each conversation as
    rendered; spans: int32 [spans, 2], the assistant's token ranges within their row;
    first_span: int64 [rows + 1]; starts: int64 [rows + 1], the first token of a row in the file.
    shown: the source's path without secrets; counts: its rows; notes: [[line, text], …];
    weighted: rows with an answer that is kept out of the loss.
    """

    def __init__(self, folder: Path, manifest: dict, shown: str) -> None:
        self.folder, self.shown = folder, shown
        self.format: str | None = manifest["format"]
        self.notes, self.weighted = manifest["notes"], manifest["weighted"]
        self.counts = RowCount(**manifest["rows"])
        self.lengths, self.lines, contents, spans, span_counts = (
            np.load(folder / f"{name}.npy") for name in _COLUMNS
        )
        self.contents, self.spans = contents.reshape(-1, 2), spans.reshape(-1, 2)
        self.first_span = _starts(span_counts)
        self.starts = _starts(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def _handle(self) -> int:
        return os.open(self.folder / "tokens.bin", os.O_RDONLY)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Return the ids from token `start` of the file, int32 [length].

        By pread: it is safe in forks, and no mapping counts as memory.
        """
        return np.frombuffer(os.pread(self._handle, 4 * length, 4 * start), dtype=np.int32)

    def assistant_spans(self, row: int) -> np.ndarray:
        """Return the assistant's token ranges of a row, int32 [spans, 2]."""
        return self.spans[self.first_span[row] : self.first_span[row + 1]]

    def rejected(self) -> Iterator[dict]:
        """Yield {"line", "reason", "row"} of the rejected rows."""
        with open(self.folder / "rejected.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, file)


def _starts(counts: np.ndarray) -> np.ndarray:
    """Return where each of the counted things begins, and the end: int64 [counts + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def tokenized(source: Source, encoder: Encoder, progress: Progress = iter) -> TokenFile:
    """Return the TokenFile of a source, from the cache or made.

    One process of the machine makes it, while the others wait. Raises RunError.
    """
    key = storage.digest(VERSION, encoder.fingerprint, source.key())
    folder = storage.cache_directory() / "tokens" / key
    with locked(storage.lock_of(folder)):
        manifest = storage.read_manifest(folder)
        if manifest is None:
            gc.freeze()  # the collector need not look through what was made before, again and again
            try:
                with (
                    disk_errors(
                        f"the tokens of {source.shown} cannot be written to {folder.parent}",
                        needed="4 bytes a token; ZERO_OFFLOAD_CACHE names another place",
                    ),
                    new_directory(folder, durable=False) as work,  # it has checksums
                ):
                    manifest = _make(work, source, encoder, progress)
            finally:
                gc.unfreeze()
    return TokenFile(folder, manifest, source.shown)


def _make(work: Path, source: Source, encoder: Encoder, progress: Progress) -> dict:
    """Write the token file of a source into the folder `work` and return its manifest.

    This thread reads and renders rows and writes them in the order of the file. The pool's threads
    encode them meanwhile.
    """
    with (
        open(work / "tokens.bin", "wb") as tokens,
        open(work / "rejected.jsonl", "w", encoding="utf-8") as rejected,
        ThreadPoolExecutor(AHEAD) as pool,
    ):
        writer = _Writer(tokens, rejected, encoder)
        pending = collections.deque()
        for chunk in writer.chunks(progress(read(source, writer.note))):
            pending.append((chunk, pool.submit(encoder.encode, [text for *_, text in chunk])))
            if len(pending) > AHEAD:
                writer.write(*pending.popleft())
        while pending:
            writer.write(*pending.popleft())
    for name, column in writer.columns.items():
        np.save(work / f"{name}.npy", column)
    notes = [
        [line, text if count == 1 else f"{text} ({count:,} rows)"]
        for text, (line, count) in writer.notes.items()
    ]
    if writer.unread:
        notes.insert(0, writer.unread_note())
    manifest = {
        "format": source.format,
        "notes": notes,
        "rows": dataclasses.asdict(writer.counts),
        "weighted": writer.weighted,
    }
    storage.write_manifest(work, manifest)
    return manifest


class _Writer:
    """What a token file will hold, while it is made: the good rows and the rejected ones."""

    def __init__(self, tokens: IO[bytes], rejected: IO[str], encoder: Encoder) -> None:
        self.tokens, self.rejected, self.encoder = tokens, rejected, encoder
        self.columns = {name: array.array(code) for name, code in _COLUMNS.items()}
        self.notes: dict[str, list[int]] = {}  # text: [first line, number of rows]
        self.unread: dict[str, list[int]] = {}  # key: [first line, number of rows]
        self.counts = RowCount()
        self.weighted = 0

    def reject(self, bad: BadRow) -> None:
        self.counts.reject(bad)
        self.rejected.write(bad.entry())

    def note(self, line: int, text: str) -> None:
        self.notes.setdefault(text, [line, 0])[1] += 1

    def unread_note(self) -> list:
        """Return the one note that names the keys which nothing reads, with their rows."""
        named = [f"{key[:60]} ({count:,} row(s))" for key, (_, count) in self.unread.items()]
        more = f" and {len(named) - _UNREAD:,} more" if len(named) > _UNREAD else ""
        first = min(line for line, _ in self.unread.values())
        return [first, "keys that nothing reads: " + ", ".join(named[:_UNREAD]) + more]

    def chunks(self, rows: Iterable) -> Iterator[_Chunk]:
        """Yield the rows that can be used, with their text, many at a time."""
        chunk, size = [], 0
        for line, row in rows:
            if isinstance(row, BadRow):
                self.reject(row)
                continue
            self.weighted += any("weight" in message for message in row.messages)
            text = bad_rows.checked(line, row, self.encoder.render)
            if isinstance(text, BadRow):
                self.reject(text._replace(row=row.messages))
                continue
            chunk.append((line, row, text))
            size += len(text.text)
            if len(chunk) == CHUNK or size > CHARACTERS:
                yield chunk
                chunk, size = [], 0
        yield chunk

    def write(self, chunk: _Chunk, encoded: Future[list[Encoded]]) -> None:
        """Wait for the ids of the rows and write them."""
        all_ids = []
        for (line, row, text), (ids, spans) in zip(chunk, encoded.result()):
            if not spans:
                self.reject(BadRow(line, _NO_TOKENS, row.messages))
                continue
            if not self.encoder.writes_calls and any("tool_calls" in m for m in row.messages):
                self.note(line, _NO_CALLS)
            for note in text.notes:
                self.note(line, note)
            for key in dict.fromkeys(row.unread):
                self.unread.setdefault(key, [line, 0])[1] += 1
            if control := self.encoder.control_in(row):
                self.note(line, f"the text itself holds {control}, {_CONTROL}")
            all_ids += ids
            self.counts.accepted += 1
            columns = self.columns
            columns["lengths"].append(len(ids))
            columns["lines"].append(line)
            columns["contents"].frombytes(
                hashlib.blake2b(text.text.encode(), digest_size=16).digest()
            )
            columns["span_counts"].append(len(spans))
            for span in spans:
                columns["spans"].extend(span)
        self.tokens.write(np.array(all_ids, np.int32).data)
