"""Where rows come from: files, folders, globs, addresses and registered names, with their shares.

Imports no torch.
"""

import dataclasses
import functools
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import bad_rows, formats, records, registry, splits, storage
from data.bad_rows import BadRow, RowCount
from data.errors import RowError, RunError, did_you_mean
from data.registry import Layout, Registry

VERSION = 5  # of the code that makes rows: a change makes cached results invalid
# Passes rows on and shows how many came.
Progress = Callable[[Iterable], Iterable]
# What can follow a path: @revision and #config of the hub, :split, and :share.
_SPEC = re.compile(
    r"(?P<path>[^@#]+?)(@(?P<revision>[^#:]+))?(#(?P<config>[^:]+))?(:(?P<split>[A-Za-z][\w.]*))?"
)


@dataclass
class Source:
    """One file of rows.

    group: the files of one share of a mixture have the same number. weight: that share, or None.
    name: what messages call it, where that is not the path. about: which split it is of which, ""
    where there are none.
    """

    path: str
    group: int = 0
    weight: float | None = None
    layout: Layout = field(default_factory=Layout)
    name: str | None = None
    about: str = ""
    format: str | None = None  # known once a row was read

    @functools.cached_property
    def file(self) -> Path:
        """The file on a local disk. What is remote is downloaded first."""
        return storage.fetch(self.path) if storage.is_url(self.path) else Path(self.path)

    @property
    def shown(self) -> str:
        """What messages call it: of an address without secrets and query."""
        return self.name or storage.shown(self.path)

    def key(self) -> str:
        """Return a digest of everything that the rows depend on."""
        content = storage.content_hash(self.file)
        return storage.digest(
            VERSION, content, records.kind_of(storage.shown(self.path)), self.layout
        )


@dataclass
class Spec:
    """What the user named: a path, address or name, and what follows it."""

    path: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @property
    def place(self) -> str:
        """The spec without its split, for messages."""
        revision = f"@{self.revision}" if self.revision else ""
        return storage.shown(self.path) + revision + (f"#{self.config}" if self.config else "")


def resolve(specs: list[str], dataset_dir: str | None = None, role: str = "train") -> list[Source]:
    """Return the sources of ["a.jsonl:0.7", "b.parquet:0.3"]. Raise RunError for what is no data.

    dataset_dir: the folder of the registry; None: data/ or this folder. role: what the rows are
    for, as splits.choose takes it; "validation" gives nothing where no place has such a split.
    """
    sources = []
    names = Registry(dataset_dir)
    for group, text in enumerate(specs):
        path, weight = _weighted(text)
        layout = Layout()
        if path in names.entries and not os.path.exists(path):
            path, layout = names.find(path)
        spec = _spec(path)
        found = _splits(spec, names)
        split = splits.choose(found, spec.split, role, spec.place)
        if split is None or (role == "validation" and split == spec.split):
            continue
        about = ""
        if len(found) > 1:
            about = f"{spec.place}: {splits.named(split)} (of {splits.listed(found)})"
        files = found[split]()
        for file in files:
            source = Source(file, group, weight, layout, about=about)
            if file.endswith(".arrow") and splits.is_hub_name(spec.path):
                shard = f" ({Path(file).name})" if len(files) > 1 else ""
                source.name = f"{spec.place}:{split}{shard}"
            sources.append(source)
    weighted = {source.group for source in sources if source.weight is not None}
    if weighted and len(weighted) < len({source.group for source in sources}):
        raise RunError(
            "some sources have a share and some have none",
            needed="a share for each (a.jsonl:0.7 b.jsonl:0.3), or none",
        )
    return sources


def _weighted(spec: str) -> tuple[str, float | None]:
    """Return ("a.jsonl", 0.7) of "a.jsonl:0.7"; without a share ("a.jsonl", None)."""
    match = re.fullmatch(r"(.+):([0-9]*\.?[0-9]+)", spec)
    if not match or os.path.exists(spec):
        return spec, None
    path, share = match[1], float(match[2])
    if storage.is_url(spec) and "/" not in path.partition("://")[2]:
        return spec, None  # it is a port
    if share <= 0:
        raise RunError(f"the share of {path} is {match[2]}", needed="a number above 0")
    return path, share


def _spec(text: str) -> Spec:
    """Return the parts of folder[#config][:split] and org/name[@revision][#config][:split]."""
    match = _SPEC.fullmatch(text)
    if match and not os.path.exists(text) and not storage.is_url(text):
        spec = Spec(**match.groupdict())
        local = os.path.isdir(os.path.expanduser(spec.path))
        if (local and not spec.revision) or splits.is_hub_name(spec.path):
            return spec
    return Spec(text)


def _splits(spec: Spec, names: Registry) -> splits.Splits:
    """Return the splits of a path, folder, glob, address or name of the hub."""
    path = spec.path
    if storage.is_url(path):
        files = storage.expand(path)
        if files == [path]:
            return {splits.NONE: lambda: files}
        folder = path if any(sign in path for sign in "*[?") else f"{path.rstrip('/')}/*"
        return splits.of_glob(folder, files)
    place = Path(path).expanduser() if path else Path("''")
    if os.path.isfile(place):
        if records.kind_of(place) is None:
            raise RunError(f"{path} is not a data file that can be read", needed=records.READABLE)
        return {splits.NONE: lambda: [str(place)]}
    if os.path.isdir(place):
        return splits.of_folder(place, spec.config)
    if any(character in path for character in "*?["):
        found = map(Path, glob.glob(str(place), recursive=True))
        files = sorted(str(p) for p in found if p.is_file() and records.kind_of(p))
        if not files:
            raise RunError(f"no data file matches {path}", needed=records.READABLE)
        return splits.of_glob(str(place), files)
    if splits.is_hub_name(path):
        return splits.of_hub(path, spec.config, spec.revision)
    unregistered = f", and no such name in {names.path}" if names.entries else ""
    raise RunError(
        f"no data file {path[:200]}{did_you_mean(path, names.entries)}",
        found=f"nothing at {str(place.absolute())[:300]}{unregistered}",
        needed=f"a file ({records.READABLE}), a folder, a glob, an s3://, gs:// or https:// "
        f"address, org/name of the hub, or a name in {registry.NAME}",
    )


def read(
    source: Source, note: records.Note = lambda line, text: None
) -> Iterator[tuple[int, formats.Row | BadRow]]:
    """Yield (line, Row) of a source; a BadRow in place of a row that cannot be used.

    note(line, text) is called for what is odd and still accepted.
    """
    layout, count, line = source.layout, 0, 0
    source.format = layout.format
    for line, record in records.read(source.file, storage.shown(source.path), note):
        row = bad_rows.checked(line, record, functools.partial(_row, source))
        yield line, row
        count += not isinstance(row, BadRow)
        if count == layout.limit:
            return
    if not line:
        size = source.file.stat().st_size
        reason = f"no rows: the file has {size:,} byte(s)"
        yield 1, BadRow(1, reason if size else f"{reason}; was it written to the end?")


def _row(source: Source, record: Any) -> formats.Row:
    """Return the Row of a record. Raise RowError where it is of another format, or has faults.

    The registry's entry decides the format of a file, or else its first good row.
    """
    layout, columns = source.layout, source.layout.columns
    unread = []
    if columns and isinstance(record, dict):
        unread = formats.unread_keys(record, set(columns.values()))
        record = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    if layout.format is None:
        format = formats.detect(record)
        source.format = source.format or format
        if format != source.format:
            raise RowError(
                f"format {format} in a file of {source.format}; needed: one format a file"
            )
    else:
        key = formats.KEY[layout.format]
        if not isinstance(record, dict) or key not in record:
            raise RowError(
                f"no {columns.get(key, key)}, which the registry's entry names; "
                "needed: every row with it"
            )
    row = formats.convert(record, str(source.format), layout.tags)
    row.unread += unread
    return row


def check(source: Source, progress: Progress = iter) -> RowCount:
    """Read and convert every row, keep none, and count them.

    The result is remembered by the file's content, for other ranks and runs.
    """

    def count() -> dict:
        counted = RowCount()
        for _, row in progress(read(source)):
            if isinstance(row, BadRow):
                counted.reject(row)
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
        reasons += bad_rows.located(source.shown, counted.first)
    if not accepted:
        raise RunError(
            "no row can be used",
            found=reasons[0],
            needed="rows in one of the formats " + ", ".join(formats.FORMATS),
        )
    return accepted
