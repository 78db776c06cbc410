"""Rows → token ids on disk, once: what is trained is kept as spans, so that length, masks and packing are decided afterwards."""

import array
import collections
import functools
import gc
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import DataError, RowError, storage
from data import source as sources
from data.template import Template

CHUNK = 1024  # rows that are rendered and encoded together; fewer where they have more than
CHARACTERS = 2**22
AHEAD = (
    2  # chunks that the tokenizer works on at once: where one ends, the other keeps the cores busy
)
VERSION = 2  # of the files below
RAW = 2000  # characters of a refused row that rejected.jsonl keeps
_ARRAYS = {
    "lengths": np.int32,
    "lines": np.int64,
    "contents": np.uint64,
    "spans": np.int32,
    "span_counts": np.int32,
}
_CODES = {np.int32: "i", np.int64: "q", np.uint64: "Q"}


class Encoder:
    """A tokenizer and its template: rows → ids and trained token ranges. Adds no special token that the template does not write."""

    def __init__(self, tokenizer, last_turn_only=False):
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"{type(tokenizer).__name__} is a tokenizer in plain Python, without character offsets\n"
                "  needed: a tokenizer.json beside the model's weights"
            )
        written = backend.to_str()
        self.backend = Tokenizer.from_str(
            written
        )  # a copy: a truncation set in the file must not cut rows unseen
        self.backend.no_truncation()
        self.backend.no_padding()
        self.template = Template(tokenizer, last_turn_only)
        # Not only the tokens with a name (eos, pad, …): models have end-of-turn tokens without one.
        added = {
            i: t.content for i, t in self.backend.get_added_tokens_decoder().items() if t.special
        }
        self.special = {
            **added,
            **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens)),
        }
        self.pad = tokenizer.pad_token_id
        ends = (tokenizer.eos_token, tokenizer.bos_token)
        self.controls = tuple(
            t for t in self.special.values() if t in self.template.text or t in ends
        )
        self.is_blank = functools.lru_cache(maxsize=None)(
            lambda i: not self.backend.decode([i], skip_special_tokens=False).strip()
        )
        self.writes_calls = "tool_calls" in self.template.text
        self.apart = self._can_encode_apart()
        # Raw text gets what the tokenizer would add to it by itself, and an end.
        first = tokenizer("")["input_ids"][:1]
        self.bos = first if first and first[0] == tokenizer.bos_token_id else []
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.fingerprint = storage.digest(
            VERSION,
            written,
            self.template.text,
            sorted(self.template.variables.items()),
            last_turn_only,
        )

    def render(self, rows):
        """[(text, character ranges, raw) or RowError]: the part before the tokenizer."""
        if not self.writes_calls:  # what such a template leaves of a call is an empty answer
            for message in (
                m
                for row in rows
                for m in row.messages
                if "tool_calls" in m and not m["content"].strip()
            ):
                message["weight"] = 0
        raw = [row.messages[0]["role"] in ("prompt", "completion") for row in rows]
        chats = iter(
            self.template.render([row for row, r in zip(rows, raw) if not r])
            if not all(raw)
            else []
        )
        result = []
        for row, is_raw in zip(rows, raw):
            if is_raw:
                text = "".join(m["content"] for m in row.messages)
                result.append(
                    (text, [(len(text) - len(row.messages[-1]["content"]), len(text))], True)
                )
            else:
                chat = next(chats)
                result.append(chat if isinstance(chat, RowError) else (*chat, False))
        return result

    def control_in(self, row):
        """A control token that stands in the row's own text, where the tokenizer reads it as the real one; or None."""
        return next((c for c in self.controls for m in row.messages if c in m["content"]), None)

    def _can_encode_apart(self):
        """Whether a text's parts have the text's tokens: not where a tokenizer puts a blank before each text (SentencePiece)."""
        parts = [("Hi there:\n", "Yes"), ("ok", " so"), ("a\n\n", "1 b"), ("x.", "\ny")]
        return all(
            [i for p in pair for i in self._ids(p)] == self._ids("".join(pair)) for pair in parts
        )

    def _ids(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(self, rendered, pool=None):
        """A function that gives the encodings of rendered rows. With a pool, the tokenizer works there at once, without the
        interpreter's lock, while the next rows are rendered.

        A row's encoding is a list, of the text between the borders of its ranges, where that gives the text's own tokens: a model
        that answers has seen the prompt's tokens, and control tokens border the answer's end. Other rows get an encoding with
        character offsets, which costs more.
        """
        parts, whole, plan = [], [], []
        for text, ranges, _ in rendered:
            if self.apart and all(self._is_border(text, end) for _, end in ranges):
                pieces = self._pieces(text, ranges)
                plan.append(pieces)
                parts += filter(None, pieces)
            else:
                plan.append(None)
                whole.append(text)

        def work():
            return (
                self.backend.encode_batch_fast(parts, add_special_tokens=False),
                self.backend.encode_batch(whole, add_special_tokens=False) if whole else [],
            )

        job = pool.submit(work).result if pool else work

        def collect():
            made, others = map(iter, job())
            return [
                next(others)
                if pieces is None
                else [next(made).ids if piece else [] for piece in pieces]
                for pieces in plan
            ]

        return collect

    @staticmethod
    def _pieces(text, ranges):
        cuts = [0, *(c for r in ranges for c in r), len(text)]
        return [text[a:b] for a, b in zip(cuts, cuts[1:])]

    def _is_border(self, text, at):
        return (
            at == len(text)
            or text.endswith(self.controls, 0, at)
            or text.startswith(self.controls, at)
        )

    def finish(self, text, ranges, raw, encoding):
        """(ids, [(begin, end), …]): token ranges of the character ranges."""
        if isinstance(encoding, list):
            return self._joined(encoding, raw)
        ids, spans = encoding.ids, []
        for begin, end in ranges:
            first = _token_at(encoding, begin, end, 1)
            if first is not None and encoding.token_to_chars(first)[0] < begin:
                # A token crosses the border; a model that answers sees the prompt's own tokens, so both are encoded apart.
                return self._joined([self._ids(piece) for piece in self._pieces(text, ranges)], raw)
            last = _token_at(encoding, end - 1, begin - 1, -1)
            if first is None or last is None:
                continue
            while (
                last + 1 < len(ids)
                and (chars := encoding.token_to_chars(last + 1))
                and chars[0] < end
            ):
                last += 1  # one character of several tokens
            spans.append((first, last + 1) if raw else self._trimmed(ids, first, last + 1))
        return self._ended(ids, spans) if raw else (ids, spans)

    def _joined(self, parts, raw):
        """ids and spans of parts that are prompt, answer, prompt, answer, …, rest."""
        ids, spans = [], []
        for number, part in enumerate(parts):
            first = len(ids)
            ids += part
            if number % 2 and len(ids) > first:
                spans.append((first, len(ids)) if raw else self._trimmed(ids, first, len(ids)))
        return self._ended(ids, spans) if raw else (ids, spans)

    def _trimmed(self, ids, first, end):
        # Without marks an answer's range goes on to what the template writes after the end-of-turn token: not the model's to learn.
        if not self.template.marked:
            stop = end
            while (
                stop > first and ids[stop - 1] not in self.special and self.is_blank(ids[stop - 1])
            ):
                stop -= 1
            end = stop if stop > first and ids[stop - 1] in self.special else end
        return first, end

    def _ended(self, ids, spans):
        shift = len(self.bos)
        ids = [*self.bos, *ids, *self.eos]
        return ids, [
            (a + shift, b + shift + (len(self.eos) if i == len(spans) - 1 else 0))
            for i, (a, b) in enumerate(spans)
        ]


def _token_at(encoding, start, stop, step):
    """The token of the first character from `start` towards `stop` that has one."""
    for position in range(start, stop, step):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None


class TokenFile:
    """The tokens of one source, in the cache.

    lengths, lines: [rows]; contents: [rows, 2], a hash of each conversation as rendered; spans: [spans, 2], trained token ranges
    within their row; first_span: [rows + 1]. manifest: format, notes, refused (their number), first (the first of these), weighted
    (rows with an answer that is kept out of the loss).
    """

    def __init__(self, folder, manifest):
        self.folder, self.manifest = Path(folder), manifest
        arrays = {name: np.load(self.folder / f"{name}.npy") for name in _ARRAYS}
        self.lengths, self.lines = arrays["lengths"], arrays["lines"]
        self.contents = arrays["contents"].reshape(-1, 2)
        self.spans = arrays["spans"].reshape(-1, 2)
        self.first_span = np.concatenate([[0], np.cumsum(arrays["span_counts"], dtype=np.int64)])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[:-1]
        self._handle = None

    def __len__(self):
        return len(self.lengths)

    def __getstate__(self):
        return {**self.__dict__, "_handle": None}

    def tokens(self, start, length):
        """`length` ids from token `start` of the file; int32. By pread: no mapping that counts as memory, safe in forks."""
        if self._handle is None:
            self._handle = os.open(self.folder / "tokens.bin", os.O_RDONLY)
        return np.frombuffer(
            os.pread(self._handle, 4 * int(length), 4 * int(start)), dtype=np.int32
        )

    def trained(self, row):
        """Trained token ranges of a row: [spans, 2]."""
        return self.spans[self.first_span[row] : self.first_span[row + 1]]

    @property
    def trained_tokens(self):
        return int((self.spans[:, 1] - self.spans[:, 0]).sum()) if len(self.spans) else 0

    def rejected(self):
        """Yield {"line", "reason", "row"} of the refused rows."""
        with open(self.folder / "rejected.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, file)


def tokenized(source, encoder, progress=lambda rows: rows):
    """The TokenFile of a source, from the cache or made: by one process of this machine, while the others wait."""
    folder = (
        storage.cache_directory() / "tokens" / storage.digest(encoder.fingerprint, *source.key())
    )
    with storage.locked(folder):
        manifest = storage.read_manifest(folder)
        if manifest is None:
            work = folder.with_name(
                f".making-{folder.name}"
            )  # a killed maker's half is removed by the next
            for old in (folder, work):
                shutil.rmtree(old, ignore_errors=True)
                if old.is_file():
                    old.unlink()
            gc.freeze()  # what was made before is not looked through again and again for garbage
            try:
                work.mkdir(parents=True)
                _make(work, source, encoder, progress)
                os.rename(work, folder)
            except OSError as error:
                shutil.rmtree(work, ignore_errors=True)
                raise DataError(
                    f"the tokens of {source.shown} cannot be written to {folder.parent}\n"
                    f"  found:  {error.strerror or error}\n  needed: 4 bytes a token; ZERO_OFFLOAD_CACHE names another "
                    "place"
                ) from None
            finally:
                gc.unfreeze()
            manifest = storage.read_manifest(folder)
    source.format = manifest["format"]
    file = TokenFile(folder, manifest)
    file.shown = source.shown
    return file


def _make(work, source, encoder, progress):
    notes, refused, first, odd, weighted = [], 0, [], {}, 0
    columns = {name: array.array(_CODES[kind]) for name, kind in _ARRAYS.items()}
    with (
        open(work / "tokens.bin", "wb") as tokens,
        open(work / "rejected.jsonl", "w", encoding="utf-8") as rejected,
    ):

        def refuse(line, reason, record):
            nonlocal refused
            refused += 1
            if len(first) < sources.KEPT:
                first.append([line, str(reason)])
            text = json.dumps(record, ensure_ascii=True, default=str)
            rejected.write(
                json.dumps(
                    {
                        "line": line,
                        "reason": str(reason),
                        "row": record if len(text) <= RAW else text[:RAW],
                    },
                    default=str,
                )
                + "\n"
            )

        def note(line, text):
            odd.setdefault(text, [line, 0])[1] += 1

        def keep(rows, rendered, collect):
            written = []
            for row, (text, ranges, raw), encoding in zip(rows, rendered, collect()):
                ids, spans = encoder.finish(text, ranges, raw, encoding)
                if not spans:
                    refuse(
                        row.line,
                        "no trained token: the tokenizer makes nothing of the answer",
                        row.messages,
                    )
                    continue
                if not encoder.writes_calls and any("tool_calls" in m for m in row.messages):
                    note(
                        row.line,
                        "the chat template leaves tool calls out, which are not trained; mend: --template chatml",
                    )
                if control := encoder.control_in(row):
                    note(
                        row.line,
                        f"the text itself holds {control}, which the tokenizer reads as a control token",
                    )
                written += ids
                columns["lengths"].append(len(ids))
                columns["lines"].append(row.line)
                columns["contents"].frombytes(
                    hashlib.blake2b(text.encode(), digest_size=16).digest()
                )
                columns["span_counts"].append(len(spans))
                for span in spans:
                    columns["spans"].extend(span)
            tokens.write(np.array(written, np.int32).data)

        def chunks():
            nonlocal weighted
            good, size = [], 0
            for line, row, record in progress(
                sources.read(source, lambda line, text: notes.append([line, text]))
            ):
                if isinstance(row, RowError):
                    refuse(line, row, record)
                    continue
                good.append(row)
                weighted += any("weight" in m for m in row.messages)
                size += sum(len(m["content"]) for m in row.messages)
                if len(good) == CHUNK or size > CHARACTERS:
                    yield good
                    good, size = [], 0
            yield good

        with ThreadPoolExecutor(AHEAD) as pool:
            waiting = collections.deque()
            for rows in chunks():
                kept_rows, kept = [], []
                for row, rendered in zip(rows, encoder.render(rows)):
                    if isinstance(rendered, RowError):
                        refuse(row.line, rendered, row.messages)
                    else:
                        kept_rows.append(row)
                        kept.append(rendered)
                waiting.append((kept_rows, kept, encoder.encode(kept, pool)))
                if len(waiting) > AHEAD:
                    keep(*waiting.popleft())
            while waiting:
                keep(*waiting.popleft())
    for name, kind in _ARRAYS.items():
        np.save(work / f"{name}.npy", np.frombuffer(columns[name].tobytes(), dtype=kind))
    notes += [
        [line, text if count == 1 else f"{text} ({count:,} rows)"]
        for text, (line, count) in odd.items()
    ]
    manifest = {
        "format": source.format,
        "notes": notes,
        "refused": refused,
        "first": first,
        "weighted": weighted,
    }
    storage.write_manifest(work, manifest)
