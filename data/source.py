"""Where the rows come from: files, folders, globs, addresses, a registry; with shares of a mixture. Imports no torch."""

import difflib
import glob
import itertools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from data import DataError, RowError, formats, records, storage

SHOWN = 10  # bad rows that an error lists
KEPT = 100  # bad rows that are remembered of a check
VERSION = 2  # of what rows are made of: a change makes cached results invalid
_REGISTRY = "dataset_info.json"
_OURS = (_REGISTRY, "rejected.jsonl")  # what lies beside data and is none
_FORMATTING = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}


@dataclass
class Source:
    """One file of rows. group: files of one mixture share have the same number; weight: that share, or None for all rows."""

    path: str
    group: int = 0
    weight: float | None = None
    columns: dict = field(default_factory=dict)  # our column → the file's
    tags: dict = field(default_factory=dict)
    limit: int | None = None
    formatting: str | None = None  # the registry's word for the format
    local: Path | None = None
    format: str | None = None  # known once a row was read

    def file(self):
        """The file on a local disk; an address is fetched first."""
        if self.local is None:
            self.local = storage.fetch(self.path) if storage.is_url(self.path) else Path(self.path)
        return self.local

    @property
    def name(self):
        """The path as a file's name: an address without its query."""
        return self.path.partition("?")[0] if storage.is_url(self.path) else self.path

    @property
    def shown(self):
        """The path without what may be secret in it."""
        return storage.shown(self.path)

    def key(self):
        """What the rows depend on."""
        return (
            VERSION,
            storage.content_hash(self.file()),
            records.kind_of(self.name),
            json.dumps([self.columns, self.tags, self.limit, self.formatting], sort_keys=True),
        )


def _weighted(spec):
    """ "a.jsonl:0.7" → ("a.jsonl", 0.7)."""
    match = re.fullmatch(r"(.+):([0-9]*\.?[0-9]+)", spec)
    if (
        not match
        or os.path.exists(spec)
        or (storage.is_url(spec) and "/" not in match[1].partition("://")[2])
    ):
        return spec, None
    if float(match[2]) <= 0:
        raise DataError(f"the share of {match[1]} is {match[2]}\n  needed: a number above 0")
    return match[1], float(match[2])


def _registry(folder):
    """(path, entries) of the registry, or (None, {})."""
    for place in [Path(folder)] if folder else [Path("data"), Path()]:
        path = place if place.suffix == ".json" else place / _REGISTRY
        if os.path.isfile(path):
            try:
                entries, found = (
                    json.loads(path.read_text(encoding="utf-8-sig")),
                    "another kind of file",
                )
                if isinstance(entries, dict) and all(isinstance(e, dict) for e in entries.values()):
                    return path, entries
            except (OSError, ValueError, RecursionError) as error:
                found = " ".join(str(error).split())[:200]
            # A file of that name that nobody named may be the `datasets` library's.
            if folder:
                raise DataError(
                    f"{path} is not a registry\n  found:  {found}\n"
                    '  needed: JSON such as {"name": {"file_name": "rows.jsonl", …}, …}'
                )
    if folder:
        raise DataError(
            f"no registry {folder}\n  needed: a folder with {_REGISTRY}, or such a file"
        )
    return None, {}


def _registered(name, entry, registry):
    """(paths, options) of a registry entry in the form of LLaMA-Factory's dataset_info.json."""
    where = f"{registry}: {name}"
    formatting = entry.get("formatting", "alpaca")
    if formatting not in list(_FORMATTING):
        raise DataError(
            f"{where}: formatting {formatting!r} is not known\n  needed: {', '.join(_FORMATTING)}"
        )
    for key in ("columns", "tags"):
        value = entry.get(key) or {}
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise DataError(
                f"{where}: {key} is {json.dumps(value)[:80]}\n  needed: an object of names"
            )
    if entry.get("ranking"):
        raise DataError(f"{where} is preference data (ranking)\n  needed: one answer a row")
    theirs = dict(entry.get("columns") or {})
    if formatting == "alpaca":
        ours = {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "system": "system",
            "history": "history",
        }
    else:
        ours = {
            "messages": "conversations" if formatting == "sharegpt" else "messages",
            "system": "system",
            "tools": "tools",
        }
    unknown = sorted(set(theirs) - set(ours) - {"tools"})
    if unknown:
        raise DataError(
            f"{where}: column {unknown[0]!r} is not known for {formatting}\n  needed: {', '.join(ours)}"
        )
    limit = entry.get("num_samples")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"{where}: num_samples is {limit!r}\n  needed: a whole number above 0")
    if theirs and formatting == "alpaca" and not {"response", "query", "history"} & set(theirs):
        columns, form = (
            {"text": theirs.get("prompt", "instruction")},
            "text",
        )  # an alpaca entry without answers is plain text
    else:
        needed = ("prompt", "response") if formatting == "alpaca" else ("messages",)
        columns = (
            {ours[k]: theirs.get(k, ours[k]) for k in ours if k in theirs or k in needed}
            if theirs
            else {}
        )
        form = _FORMATTING[formatting]
    options = {
        "columns": columns,
        "tags": entry.get("tags") or {},
        "limit": limit,
        "formatting": form if theirs or "formatting" in entry else None,
    }
    if "file_name" in entry:
        given = str(entry["file_name"])
        return (given if storage.is_url(given) else str(registry.parent / given)), options
    if "hf_hub_url" in entry:
        return _from_hub(
            str(entry["hf_hub_url"]), where, entry.get("folder") or entry.get("subset")
        ), options
    raise DataError(f"{where} names no data\n  needed: file_name or hf_hub_url")


def _from_hub(name, where, folder):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        local = snapshot_download(
            name, repo_type="dataset", allow_patterns=[f"*{suffix}*" for suffix in records.SUFFIXES]
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"{where}: the dataset {name} cannot be read from the hub\n  found:  {type(error).__name__}\n"
            "  needed: network and, for a gated dataset, HF_TOKEN; or a file_name"
        ) from None
    return str(Path(local) / folder) if folder else local


def _files(path, names=(), registry=None):
    """The files that a path, folder, glob or address stands for."""
    if storage.is_url(path):
        return storage.expand(path)
    place = Path(path).expanduser() if path else Path("''")
    if os.path.isdir(place):
        found = sorted(
            str(p)
            for p in place.rglob("*")
            if p.is_file() and records.kind_of(p)[0] and p.name not in _OURS
        )
        if not found:
            raise DataError(f"no data file in {path}\n  needed: {records.READABLE}")
        return found
    if os.path.isfile(place):
        if records.kind_of(place)[0] is None:
            raise DataError(
                f"{path} is not a data file that can be read\n  needed: {records.READABLE}"
            )
        return [str(place)]
    if any(c in str(path) for c in "*?["):
        found = sorted(
            p
            for p in glob.glob(str(place), recursive=True)
            if Path(p).is_file() and records.kind_of(p)[0]
        )
        if not found:
            raise DataError(f"no data file matches {path}\n  needed: {records.READABLE}")
        return found
    near = difflib.get_close_matches(str(path), list(names), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    looked = f", and no such name in {registry}" if registry else ""
    raise DataError(
        f"no data file {str(path)[:200]}{hint}\n  found:  nothing at {str(place.absolute())[:300]}{looked}\n"
        f"  needed: a file ({records.READABLE}), a folder, a glob, an s3://, gs:// or "
        f"https:// address, or a name in {_REGISTRY}"
    )


def resolve(specs, dataset_dir=None):
    """["a.jsonl:0.7", "b.parquet:0.3"] → list of Source. DataError says what was looked for."""
    sources = []
    registry, entries = _registry(dataset_dir)
    for group, spec in enumerate(specs):
        path, weight = _weighted(spec)
        options = {}
        if path in entries and not os.path.exists(path):
            path, options = _registered(path, entries[path], registry)
        sources += [
            Source(file, group, weight, **options) for file in _files(path, entries, registry)
        ]
    given = {s.group for s in sources if s.weight is not None}
    if given and len(given) < len(specs):
        raise DataError(
            "some sources have a share and some have none\n  needed: a share for each (a.jsonl:0.7 b.jsonl:0.3), or none"
        )
    return sources


def _mapped(record, source):
    """The record under our column names; checks that it is of the source's format, which the first record decides."""
    if source.columns and isinstance(record, dict):
        record = {
            ours: record[theirs] for ours, theirs in source.columns.items() if theirs in record
        }
    if source.formatting is None:
        found = formats.detect(record)
        source.format = source.format or found
        if found != source.format:
            raise RowError(
                f"format {found} in a file of {source.format}; needed: one format a file"
            )
        return record
    key = formats.KEY[source.format]
    if not isinstance(record, dict) or key not in record:
        raise RowError(
            f"no {source.columns.get(key, key)}, which the registry's entry names; needed: every row with it"
        )
    return record


def read(source, note=lambda line, text: None):
    """Yield (line, Row or RowError, record) of a source; a file is of one format, that of its first good row."""
    count, bare, source.format = 0, True, source.formatting
    for line, record in records.read(source.file(), source.name, note):
        bare = False
        try:
            if isinstance(record, RowError):
                raise record
            row = formats.convert(_mapped(record, source), source.format, line, source.tags)
        except RowError as error:
            yield line, error, None if isinstance(record, RowError) else record
            continue
        count += 1
        yield line, row, record
        if count == source.limit:
            return
    if bare:
        size = source.file().stat().st_size
        yield (
            1,
            RowError(
                f"no rows: the file has {size:,} byte(s){'' if size else '; was it written to the end?'}"
            ),
            None,
        )


@dataclass
class Checked:
    """What a first look at a file found: its format, rows accepted, rows refused, and the first of these as [line, reason]."""

    format: str | None
    rows: int
    refused: int
    first: list


def check(source, progress=lambda rows: rows):
    """Read and convert every row, keep none. Remembered by the file's content, so that other ranks and runs do not do it again."""
    memo = (
        storage.cache_directory() / "checked" / f"{storage.digest('checked', *source.key())}.json"
    )
    with storage.locked(memo):
        if memo.is_file():
            sum_, _, body = memo.read_bytes().partition(b"\n")
            if sum_ == storage.digest(body).encode():  # else damaged: looked at again
                return Checked(**json.loads(body))
        found = Checked(None, 0, 0, [])
        for line, row, _ in progress(read(source)):
            if isinstance(row, RowError):
                found.refused += 1
                if len(found.first) < KEPT:
                    found.first.append([line, str(row)])
            else:
                found.rows += 1
        found.format = source.format
        body = json.dumps(found.__dict__).encode()
        storage.write_atomically(memo, storage.digest(body).encode() + b"\n" + body)
    return found


def refuse(source, accepted, refused, first):
    """DataError that lists the first refused rows of a source as `file:line: reason` and counts the rest."""
    lines = [f"{source.shown}:{line}: {reason}" for line, reason in itertools.islice(first, SHOWN)]
    more = f"\n  … and {refused - len(lines):,} more" if refused > len(lines) else ""
    return DataError(
        f"{refused:,} of {refused + accepted:,} rows of {source.shown} cannot be used\n  "
        + "\n  ".join(lines)
        + more
        + "\n  fix:    mend them, or leave them out with --on_bad_row skip; python launch/data.py check shows them all"
    )


def check_all(sources, on_bad_row, progress=lambda rows: rows):
    """First look at every source. DataError for rows that cannot be used, unless they are to be skipped, and where none is left."""
    total = 0
    for source in sources:
        found = check(source, progress)
        if found.refused and on_bad_row == "stop":
            raise refuse(source, found.rows, found.refused, found.first)
        total += found.rows
    if not total:
        first = next(
            f"{s.shown}:{c.first[0][0]}: {c.first[0][1]}" for s in sources if (c := check(s)).first
        )
        raise DataError(
            f"no row can be used\n  found:  {first}\n  needed: rows in one of the formats {', '.join(formats.FORMATS)}"
        )
    return total
