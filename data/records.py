"""Files -> raw records with their line numbers. Imports no torch.

All but a JSON list are read block by block: a file never has to fit into memory.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import RowError, RunError, one_line

BLOCK = 2**22
MAX_ROW = 2**24  # bytes; a longer line is a missing line break, not a row
MAX_LIST = 10**9  # bytes of a JSON list, which is read as a whole
READABLE = ".jsonl, .json, .csv, .tsv (also with .gz or .zst), .parquet, .arrow"
_DEEP = "JSON that is nested too deeply; needed: what Python's json reads (some hundred levels)"
_BOM = "a byte order mark, ignored; iconv or `sed -i '1s/^\\xEF\\xBB\\xBF//'` takes it out"
_NOT_READ = "What follows was not read"
_KIND = re.compile(r"(?<=[^/])\.((jsonl|ndjson|json|csv|tsv)(\.gz|\.zst)?|parquet|arrow)$")
# What stands before and after an element of a JSON list.
_MARK = re.compile(r"[ \t\r\n]*([\[\],]?)[ \t\r\n]*")
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

# (line, record); a RowError in place of a record that cannot be read.
Records = Iterator[tuple[int, Any]]
Note = Callable[[int, str], object]


def kind_of(path: str | Path) -> str | None:
    """Return the suffix of a data file's name, such as ".jsonl.gz", or None for another file."""
    match = _KIND.search(str(path).lower())
    return match[0] if match else None


def _open(path: Path, kind: str) -> Any:
    if kind.endswith(".gz"):
        return gzip.open(path)
    if kind.endswith(".zst"):
        import pyarrow

        raw: Any = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(raw, BLOCK)
    return open(path, "rb")


# -- JSON ------------------------------------------------------------------------------------------
def _unique(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"the key {twice[:40]!r} stands twice; needed: each key once")
    return record


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python converts at most 4,300 digits
        raise RowError(
            f"a number of {len(digits):,} digits; needed: at most 4,300, or text"
        ) from None


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)
_unchecked = json.JSONDecoder(parse_int=str)


def _check_text(record: Any, raw: str) -> Any:
    """Return the record of the JSON text. Raise RowError for characters that no tokenizer takes.

    Only an escape (\\u…) can write them.
    """
    if "\\u" not in raw:
        return record
    plain = json.dumps(record, ensure_ascii=False)
    if _NUL.search(plain):
        raise RowError("a NUL character; needed: text without it")
    try:
        plain.encode()
    except UnicodeEncodeError:
        raise RowError(
            "half of a surrogate pair (\\ud800 to \\udfff); needed: whole characters"
        ) from None
    return record


def loads(value: Any, name: str) -> Any:
    """Return the value of JSON text inside a row, or a value that is no text as it is.

    name: what the row calls it. The value passes the same checks as a row: raises RowError.
    """
    if not isinstance(value, str):
        return value
    try:
        return _check_text(_decoder.decode(value), value)
    except json.JSONDecodeError as error:
        reason = f"{name} is not JSON: {error.msg} at character {error.pos + 1}; needed: JSON text"
    except RecursionError:
        reason = f"{name}: {_DEEP}"
    raise RowError(reason)


def parse(line: bytes) -> Any:
    """Return the record of one JSON line. Raise RowError that says what is wrong, and where."""
    if b"\0" in line:
        raise RowError(
            f"a NUL byte at column {line.index(0) + 1}; "
            "needed: text, not a binary or half-written file"
        )
    try:
        text = line.decode()
        return _check_text(_decoder.decode(text), text)
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {error.start + 1}; fix: iconv -f LATIN1 -t UTF-8"
    except json.JSONDecodeError as error:
        reason = f"broken JSON at column {error.pos + 1}: {error.msg}; "
        if b"\r" in line.rstrip():
            reason += "are its lines ended by CR alone? fix: tr '\\r' '\\n'"
        else:
            reason += "needed: one JSON object a line"
    except RecursionError:
        reason = _DEEP
    raise RowError(reason)


# -- kinds of files --------------------------------------------------------------------------------
def _lines(stream: Any) -> Iterator[bytes | int]:
    """Yield each line; of a line longer than MAX_ROW only its number of bytes."""
    while line := stream.readline(MAX_ROW + 1):
        size = len(line)
        if size <= MAX_ROW or line.endswith(b"\n"):
            yield line.removesuffix(b"\n")
            continue
        while not line.endswith(b"\n") and (line := stream.readline(BLOCK)):
            size += len(line)
        yield size


def _too_long(size: int) -> RowError:
    return RowError(
        f"a row of {size:,} bytes; needed: at most {MAX_ROW:,}. Is a line break missing?"
    )


def _json_lines(path: Path, kind: str, note: Note) -> Records:
    blank, crlf = [], 0
    with _open(path, kind) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if isinstance(line, int):
                yield number, _too_long(line)
                continue
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    yield 1, RowError("UTF-16, not UTF-8; fix: iconv -f UTF-16 -t UTF-8")
                    return
                if line.startswith(codecs.BOM_UTF8):
                    note(1, _BOM)
                    line = line[3:]
            if not line.strip():
                blank.append(number)
                continue
            try:
                yield number, parse(line)
            except RowError as error:
                yield number, error
                continue
            if line.endswith(b"\r"):
                crlf = crlf or number
    if blank:
        note(blank[0], f"{len(blank):,} blank line(s), skipped")
    if crlf:
        note(crlf, "Windows line ends (CRLF), accepted; dos2unix makes them plain")


def _json(path: Path, kind: str, note: Note) -> Records:
    """Yield the records of a .json file: one list, one object, or one object a line."""
    with _open(path, kind) as stream:
        content = stream.read(MAX_ROW + 1).removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        yield from _json_list(path, kind)
        return
    try:
        whole = parse(content)
    except RowError:
        whole = None
    if isinstance(whole, dict) and len(content) <= MAX_ROW:
        yield 1, whole
    else:
        yield from _json_lines(path, kind, note)


def _json_list(path: Path, kind: str) -> Records:
    """Yield the elements of one JSON list. Nothing can be read after a broken element."""
    with _open(path, kind) as stream:
        content = stream.read(MAX_LIST + 1)
    if len(content) > MAX_LIST:
        raise RunError(
            f"{path} is a JSON list of more than {MAX_LIST:,} bytes",
            needed="one JSON object a line, which is read without holding the file in memory",
            fix="jq -c '.[]' ROWS.json > ROWS.jsonl",
        )
    fault = "is the file half-written?"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = content[: error.start].decode("utf-8-sig")
        fault = f"invalid UTF-8 at byte {error.start + 1}; fix: iconv -f LATIN1 -t UTF-8."
    line, end, expected = 1, 0, "["
    while True:
        mark: Any = _MARK.match(text, end)
        line += text.count("\n", end, mark.end())
        end = mark.end()
        if mark[1] == "]" and expected == ",":
            break
        if mark[1] != expected:
            wrong = mark[1] or text[end : end + 1]
            reason = f"broken JSON: {wrong!r} where {expected!r} is needed. {_NOT_READ}"
            if not wrong:
                reason = f"the list does not end with ]: {fault} needed: the whole file"
            yield line, RowError(reason)
            return
        is_empty = expected == "[" and text.startswith("]", end)
        expected, begin = ",", end
        if is_empty:
            continue
        try:
            record, end = _element(text, begin)
        except RecursionError:
            yield line, RowError(f"{_DEEP}. {_NOT_READ}")
            return
        except json.JSONDecodeError as error:
            reason = f"broken JSON: {error.msg}; {fault}"
            if text.startswith("\0", error.pos):
                reason = "a NUL byte; needed: text, not a binary or half-written file."
            yield line, RowError(f"{reason} {_NOT_READ}")
            return
        yield line, record
        line += text.count("\n", begin, end)
    if end < len(text):
        wrong = f"broken JSON: {text[end]!r} after the list's end"
        yield line, RowError(wrong + "; needed: one list, or one object a line")


def _element(text: str, begin: int) -> tuple[Any, int]:
    """Return (record, where it ends) of the list element that begins there.

    The record is a RowError where it is JSON that cannot be used.
    """
    try:
        record, end = _decoder.raw_decode(text, begin)
        if end - begin > MAX_ROW:
            return _too_long(end - begin), end
        return _check_text(record, text[begin:end]), end
    except RowError as error:
        return error, _unchecked.raw_decode(text, begin)[1]


def _without_nulls(value: Any) -> Any:
    """Return the value without null keys: Parquet adds the keys that another row's object has."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _csv(path: Path, kind: str, note: Note) -> Records:
    """Yield the rows of a table whose first line names the columns. Every value is text."""
    csv.field_size_limit(MAX_ROW)
    with _open(path, kind) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        first = text.readline(MAX_ROW)
        sign = "\t" if kind.startswith(".tsv") else ","
        if sign not in first and (other := next((s for s in ";\t" if s in first), "")):
            note(1, f"its columns are separated by {other!r}, accepted")
            sign = other
        rows = csv.reader(itertools.chain([first], text), delimiter=sign, strict=True)
        names: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
                if row is None:
                    return
                _check_table_row(row, names)
            except csv.Error as error:
                yield line, RowError(f"broken CSV: {error}; needed: quotes closed and doubled")
            except RowError as error:
                yield line, error
            else:
                if names and row:
                    yield line, {name: value for name, value in zip(names, row) if value}
                names = names or [name.strip() for name in row]
                continue
            if not names:  # what follows cannot be understood
                return


def _check_table_row(row: list[str], names: list[str]) -> None:
    """Raise RowError where a row of a table cannot be used. No names: it is the names' row."""
    text = "".join(row)
    if "\0" in text:
        raise RowError("a NUL character; needed: text, not a binary or UTF-16 file")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("invalid UTF-8; fix: iconv -f LATIN1 (or UTF-16) -t UTF-8") from None
    twice = next((name for name in row if not names and row.count(name) > 1), None)
    if twice is not None:
        raise RowError(f"the column {twice[:40]!r} stands twice; needed: each name once")
    if names and row and len(row) != len(names):
        raise RowError(f"{len(row)} values; needed: {len(names)}, one for each column")


def _arrow(path: Path) -> Records:
    """Yield the rows of an Arrow file, as `datasets` keeps them in its cache and saves them."""
    import pyarrow

    number = 0
    try:
        with pyarrow.OSFile(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                table = pyarrow.ipc.open_file(file)
                batches = map(table.get_batch, range(table.num_record_batches))
            else:
                table = batches = pyarrow.ipc.open_stream(file)
            columns = [c.name for c in table.schema if not pyarrow.types.is_temporal(c.type)]
            for batch in batches:
                for record in batch.select(columns).to_pylist():
                    number += 1
                    yield number, {k: _without_nulls(v) for k, v in record.items()}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        yield number + 1, RowError(f"not readable as Arrow: {one_line(error, 200)}")


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            rows, groups = file.metadata.num_rows, range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(g).total_byte_size for g in groups) // max(rows, 1)
            # Times are no text, and some have no Python value.
            columns = [c.name for c in file.schema_arrow if not pyarrow.types.is_temporal(c.type)]
            at_once = min(max(BLOCK // max(size, 1), 1), 1024)
            for batch in file.iter_batches(batch_size=at_once, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {k: _without_nulls(v) for k, v in record.items()}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        yield number + 1, RowError(f"not readable as Parquet: {one_line(error, 200)}")


def read(path: Path, name: str, note: Note) -> Records:
    """Yield (line, record) of a data file; a RowError in place of a record that cannot be read.

    name: decides the kind of file, as the path may be a cached copy. line: counts from 1; in a JSON
    list the line where the element begins, in Parquet and Arrow the row. note(line, text) is called
    for what is odd and still accepted. Raises RunError for another kind of file, and OSError.
    """
    kind = kind_of(name)
    if kind is None:
        raise RunError(f"{name} is not a data file that can be read", needed=READABLE)
    if kind in (".parquet", ".arrow"):
        yield from _parquet(path) if kind == ".parquet" else _arrow(path)
        return
    readers = {"json": _json, "csv": _csv, "tsv": _csv}
    rows, line = readers.get(kind.split(".")[1], _json_lines), 0
    try:
        for line, record in rows(path, kind, note):
            yield line, record
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (EOFError, zlib.error, OSError) as error:
        reason = f"the compressed file is damaged or half-written ({one_line(error, 120)}). "
        yield line + 1, RowError(reason + _NOT_READ)
