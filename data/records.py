"""Files → raw records with their line numbers, block by block: a file never has to fit memory. Imports no torch."""

import codecs
import gzip
import io
import json
import re
import zlib
from pathlib import Path

from data import DataError, RowError

BLOCK = 2**22
MAX_ROW = 2**24  # bytes; a longer line is a missing line break, not a row
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")
_SPACE = re.compile(r"[ \t\r\n]*")
READABLE = ".jsonl, .json (also with .gz or .zst), .parquet"


def kind_of(path):
    """(suffix, compression or None) of a data file's name; (None, None) where it is not one."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else None
    suffix = suffixes[-1] if suffixes else None
    return (
        (suffix, packed)
        if suffix in SUFFIXES and not (packed and suffix == ".parquet")
        else (None, None)
    )


def _open(path, packed):
    if packed == ".gz":
        return gzip.open(path, "rb")
    if packed == ".zst":
        import pyarrow

        return io.BufferedReader(
            pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), BLOCK
        )
    return open(path, "rb")


def _unique(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise RowError(f"the key {twice[:40]!r} stands twice; needed: each key once")
    return found


def _integer(digits):
    try:
        return int(digits)
    except ValueError:  # Python converts at most 4,300 digits
        raise RowError(
            f"a number of {len(digits):,} digits; needed: at most 4,300, or text"
        ) from None


_DEEP = "JSON that is nested too deeply; needed: what Python's json reads (some hundred levels)"
_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _check_text(record, raw):
    """RowError for characters that no tokenizer takes; `raw` is the JSON text, where they can only stand escaped."""
    if "\\u" not in raw:
        return record
    plain = json.dumps(record, ensure_ascii=False)
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", plain):
        raise RowError("a NUL character; needed: text without it")
    try:
        plain.encode()
    except UnicodeEncodeError:
        raise RowError(
            "half of a surrogate pair (\\ud800 to \\udfff); needed: whole characters"
        ) from None
    return record


def loads(text, name):
    """The value of the JSON text that a row holds under `name`, checked as the row itself. RowError where it is not JSON."""
    try:
        return _check_text(_decoder.decode(text), text)
    except json.JSONDecodeError as error:
        raise RowError(
            f"{name} is not JSON: {error.msg} at character {error.pos + 1}; needed: JSON text"
        ) from None
    except RecursionError:
        raise RowError(f"{name}: {_DEEP}") from None


def parse(line):
    """The record of one JSON line (bytes). RowError says what is wrong and where."""
    if b"\0" in line:
        raise RowError(
            f"a NUL byte at column {line.index(0) + 1}; needed: text, not a binary or half-written file"
        )
    try:
        text = line.decode("utf-8")
        return _check_text(_decoder.decode(text), text)
    except UnicodeDecodeError as error:
        raise RowError(
            f"invalid UTF-8 at byte {error.start + 1}; mend: iconv -f LATIN1 -t UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        alone = (
            "; are its lines ended by CR alone? mend: tr '\\r' '\\n'"
            if b"\r" in line.rstrip()
            else ""
        )
        raise RowError(
            f"broken JSON at column {error.pos + 1}: {error.msg}{alone or '; needed: one JSON object a line'}"
        ) from None
    except RecursionError:
        raise RowError(_DEEP) from None


def _lines(stream):
    """Yield (number, line or None where it is longer than MAX_ROW, bytes in it)."""
    head, size, number = [], 0, 1
    while block := stream.read(BLOCK):
        first, *others = block.split(b"\n")
        size += len(first)
        head = [*head, first] if size <= MAX_ROW else []
        if not others:
            continue
        yield number, b"".join(head) if size <= MAX_ROW else None, size
        tail = others.pop()
        for line in others:
            number += 1
            yield number, line, len(line)
        number, head, size = number + 1, [tail], len(tail)
    if size:
        yield number, b"".join(head) if size <= MAX_ROW else None, size


def _too_long(size):
    return RowError(
        f"a row of {size:,} bytes; needed: at most {MAX_ROW:,}. Is a line break missing?"
    )


def _json_lines(stream, note):
    blank, crlf = [], None
    for number, line, size in _lines(stream):
        if number == 1 and line is not None:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                yield 1, RowError("UTF-16, not UTF-8; mend: iconv -f UTF-16 -t UTF-8")
                return
            if line.startswith(codecs.BOM_UTF8):
                note(
                    1,
                    "a byte order mark, ignored; iconv or `sed -i '1s/^\\xEF\\xBB\\xBF//'` takes it out",
                )
                line = line[3:]
        if line is None:
            yield number, _too_long(size)
            continue
        if not line.strip():
            blank.append(number)
            continue
        try:
            record = parse(line)
        except RowError as error:
            record = error
        else:
            crlf = number if crlf is None and line.endswith(b"\r") else crlf
        yield number, record
    if blank:
        note(blank[0], f"{len(blank):,} blank line(s), skipped")
    if crlf:
        note(crlf, "Windows line ends (CRLF), accepted; dos2unix makes them plain")


def _json_list(stream):
    """Elements of one JSON list, read as a stream. What follows a broken element cannot be told apart, so reading ends there."""
    reader = codecs.getreader("utf-8-sig")(stream)
    buffer, at, line, ended, expect = "", 0, 1, False, "["
    decode = _decoder.raw_decode
    while True:
        more = False
        begin = _SPACE.match(buffer, at).end()
        line += buffer.count("\n", at, begin)
        at = begin
        if at == len(buffer):
            more = True
        elif expect == "end":
            yield (
                line,
                RowError(
                    f"broken JSON: {buffer[at]!r} after the list's end; needed: one list, or one object a line"
                ),
            )
            return
        elif buffer[at] == "]" and expect in ("first", ","):
            at, expect = at + 1, "end"
            continue
        elif expect in ("[", ","):
            if buffer[at] != expect:
                yield (
                    line,
                    RowError(
                        f"broken JSON: {buffer[at]!r} where {expect!r} is needed; what follows was not read"
                    ),
                )
                return
            at, expect = at + 1, "first" if expect == "[" else "value"
            continue
        else:
            try:
                record, end = decode(buffer, at)
                if end == len(buffer) and not ended:
                    more = True
                else:
                    yield line, _check_text(record, buffer[at:end])
                    line += buffer.count("\n", at, end)
                    at, expect = end, ","
            except json.JSONDecodeError as error:
                if ended:
                    yield (
                        line,
                        RowError(
                            f"broken JSON: {error.msg}; is the file half-written? What follows was not read"
                        ),
                    )
                    return
                if len(buffer) - at > MAX_ROW:
                    yield (
                        line,
                        RowError(
                            f"broken JSON, or an element of over {MAX_ROW:,} bytes; what follows was not read"
                        ),
                    )
                    return
                more = True
            except (RowError, RecursionError) as error:
                yield (
                    line,
                    error
                    if isinstance(error, RowError)
                    else RowError(_DEEP + "; what follows was not read"),
                )
                if isinstance(error, RecursionError):
                    return
                _, end = json.JSONDecoder(parse_int=str).raw_decode(
                    buffer, at
                )  # the same element, to find its end
                line += buffer.count("\n", at, end)
                at, expect = end, ","
        if more:
            if ended and expect == "end":
                return
            if ended:
                yield (
                    line,
                    RowError(
                        "the list does not end with ]: is the file half-written? needed: the whole file"
                    ),
                )
                return
            try:
                added = reader.read(BLOCK)
            except UnicodeDecodeError:
                yield (
                    line,
                    RowError(
                        "invalid UTF-8; what follows was not read; mend: iconv -f LATIN1 -t UTF-8"
                    ),
                )
                return
            ended = not added
            if "\0" in added:
                yield (
                    line + buffer.count("\n", at) + added.count("\n", 0, added.index("\0")),
                    RowError(
                        "a NUL byte; needed: text, not a binary or half-written file; what follows was not read"
                    ),
                )
                return
            buffer, at = buffer[at:] + added, 0


def _without_nulls(value):
    """The value without the keys that Parquet fills with null because another row's object has them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _parquet(path):
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            rows, groups = file.metadata.num_rows, range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(g).total_byte_size for g in groups) // max(rows, 1)
            # Times are no text, and some have no Python value.
            columns = [c.name for c in file.schema_arrow if not pyarrow.types.is_temporal(c.type)]
            for batch in file.iter_batches(
                batch_size=min(max(BLOCK // max(size, 1), 1), 1024), columns=columns
            ):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {k: _without_nulls(v) for k, v in record.items()}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        yield number + 1, RowError(f"not readable as Parquet: {' '.join(str(error).split())[:200]}")


def _one_object(path, packed):
    """The object that a whole file is, written over several lines; None where it is not."""
    with _open(path, packed) as stream:
        content = stream.read(MAX_ROW + 1).removeprefix(codecs.BOM_UTF8)
    try:
        record = parse(content) if len(content) <= MAX_ROW else None
    except RowError:
        return None
    return record if isinstance(record, dict) else None


def read(path, name=None, note=lambda line, text: None):
    """Yield (line, record, or RowError for what cannot be read) of a data file; `note(line, text)` is told what was tolerated.

    name: decides the kind where the path is a cached copy. Line: that of the file, of a list's element, or a Parquet row; from 1.
    """
    suffix, packed = kind_of(name or path)
    if suffix is None:
        raise DataError(f"{name or path} is not a data file that can be read\n  needed: {READABLE}")
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    line, first = 0, True
    try:
        with _open(path, packed) as stream:
            records = _json_lines(stream, note)
            if suffix == ".json":
                head = stream.read(4096)
                stream.seek(0) if stream.seekable() else None
                if not stream.seekable():
                    stream.close()
                    stream = _open(path, packed)
                records = (
                    _json_list(stream)
                    if head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1] == b"["
                    else _json_lines(stream, note)
                )
            for line, record in records:
                if (
                    first
                    and suffix == ".json"
                    and isinstance(record, RowError)
                    and (whole := _one_object(path, packed))
                ):
                    yield line, whole
                    return
                first = False
                yield line, record
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise
        yield (
            line + 1,
            RowError(
                f"the compressed file is damaged or half-written ({' '.join(str(error).split())[:120]}); "
                "what follows was not read"
            ),
        )
