"""`python launch/data.py check`: look at data before anything is trained on it.

The report says rows, tokens, rejected rows, packing, and shows examples.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data import pack, source
from data.encoder import Encoder
from data.errors import disk_errors
from data.tokenize import TokenFile, tokenized
from trainer import data_setup
from trainer.config.command_line import command, split_own, words
from trainer.config.flags import all_keys, help_text
from trainer.config.settings import Settings, check_model, resolve
from trainer.console import answered
from trainer.errors import BAD_INPUT, DONE, RunError
from trainer.system import default_model

if TYPE_CHECKING:
    from data.dataset import Samples

GREEN, OFF = "\033[32m", "\033[0m"
EXAMPLES = 2
LINES = 10  # rejected rows and notes that are shown of a file
BOOLEANS = ("true", "false", "yes", "no", "1", "0")
USAGE = """python launch/data.py check [FILE …] [--json] [--rejected FILE] [--FLAG VALUE …]

Reads, converts and tokenizes rows, and says per file: rows, format, tokens, share trained, rows
too long, rejected rows with their reason, how full packed rows would be, and two examples with the
trained tokens in colour. The flags are those of launch/train.py that concern data and tokenizer:
--dataset --model_name_or_path --template --max_length --too_long --on_bad_row --train_on_prompt …
Exit code 2 when a row is rejected and --on_bad_row is stop; with skip, rejected rows go to
rejected.jsonl (or --rejected FILE).
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `launch/data.py` and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        if "--help" in argv:
            print(help_text())
        return answered(DONE) if argv else BAD_INPUT
    return check(argv)


def check(argv: Sequence[str]) -> int:
    """Print the report and return the exit code. argv: the command and its flags."""
    if argv[0] != "check":
        raise RunError(f"unknown command {argv[0]}", needed="check")
    own, rest = split_own(argv[1:], {"json": None, "rejected": "rejected.jsonl"})
    settings = _settings(rest)
    if settings.model_name_or_path is not None:
        check_model(settings.model_name_or_path)
    bundled = [str(data_setup.SAMPLES / f"{name}.jsonl") for name in ("train", "validation")]
    specs = settings.dataset or bundled
    sources = source.resolve(specs, settings.dataset_dir)
    sources += source.resolve(specs, settings.dataset_dir, "validation")
    for about in dict.fromkeys(one.about for one in sources if one.about):
        print(about, file=sys.stderr)
    # Nothing here needs a GPU, and DeepSpeed would print that it looks for one.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from data import dataset
    from trainer.modeling.load import load_tokenizer

    directory = settings.model_name_or_path or default_model.ensure(quiet=bool(own["json"]))
    tokenizer, given = load_tokenizer(str(directory), settings)
    data_setup.check_vocabulary(tokenizer, data_setup.vocabulary_of(directory))
    encoder = Encoder(tokenizer, settings.last_turn_only, settings.chat_template_kwargs)
    files = [tokenized(one, encoder, data_setup.progress(one.shown)) for one in sources]
    for file in files:
        data_setup.check_weights(file, settings)
    length = settings.max_length
    every_row = np.ones(sum(map(len, files)), bool)
    samples, _ = dataset.cut(files, every_row, length, settings.too_long, settings.train_on_prompt)
    result = report(files, samples, length)
    if own["json"]:
        print(json.dumps(result))
    else:
        print(f"tokenizer: {directory}" + "".join(f"; given {what}" for what in given))
        print(as_text(result, length))
        for n in range(min(EXAMPLES, len(samples))):
            number, line = samples.place(n)
            print(f"\n{files[number].shown}:{line}, trained tokens marked:")
            print(example(tokenizer, samples, n, sys.stdout.isatty()))
    bad = [file for file in files if file.counts.rejected]
    if bad and settings.on_bad_row == "stop":
        raise RunError(
            "rows were rejected", fix="correct them, or leave them out with --on_bad_row skip"
        )
    if bad:
        path = own["rejected"]
        what = f"the rejected rows cannot be written to {path}"
        with disk_errors(what, needed="--rejected FILE"):
            data_setup.write_rejected(path, bad)
        print(f"rejected rows: {path}", file=sys.stderr)
    if not len(samples):
        raise RunError(
            "no row can be trained on", needed="rows with an answer within max_length tokens"
        )
    return answered(DONE)


def _settings(argv: Sequence[str]) -> Settings:
    """Return the settings of the flags. Each word that no flag takes is a data file."""
    files: list[str] = []
    flags: list[str] = []
    for word in words(argv):
        if word.name is None:
            files.append(word.typed)
            continue
        key, values = all_keys().get(word.name), word.values
        taken = 1
        if key and key.type == "list":
            taken = len(values)
        elif key and key.type == "bool" and values and values[0].lower() not in BOOLEANS:
            taken = 0
        flags += [word.typed, *values[:taken]]
        files += values[taken:]
    settings = resolve(flags, default_recipe=None)
    if files and settings.given("dataset"):
        raise RunError(
            "the files are named twice",
            found=f"{' '.join(files)[:200]} and --dataset",
            needed="one of them",
        )
    if files:
        settings.set("dataset", files, "command line")
    return settings


# -- the report -----------------------------------------------------------------------------------
def report(files: list[TokenFile], samples: "Samples", max_length: int) -> dict:
    """Return the object that --json prints. samples: those of all files, cut to max_length.

    rows: those accepted. trained_share: of all their tokens, before any is cut off. truncated:
    rows of more than max_length tokens.
    """
    entries = []
    for file in files:
        tokens = int(file.lengths.sum(dtype=np.int64))
        p50, p95, longest = np.percentile(
            file.lengths if len(file) else [0], [50, 95, 100], method="higher"
        )
        trained = int(np.diff(file.spans).sum())
        if samples.train_on_prompt:
            trained = tokens - len(file)
        entries.append(
            {
                "path": file.shown,
                "format": file.format,
                "rows": len(file),
                "rejected": [{"line": e["line"], "reason": e["reason"]} for e in file.rejected()],
                "tokens": {"p50": int(p50), "p95": int(p95), "max": int(longest)},
                "trained_share": round(trained / tokens, 4) if tokens else 0.0,
                "truncated": int((file.lengths > max_length).sum()),
                "notes": [{"line": line, "text": text} for line, text in file.notes],
            }
        )
    return {"files": entries, "packing_fill": round(pack.fill(samples.lengths, max_length), 4)}


def as_text(result: dict, max_length: int) -> str:
    """Return the report for people."""
    lines = []
    for entry in result["files"]:
        path, tokens = entry["path"], entry["tokens"]
        lines += [
            path,
            f"  format {entry['format'] or 'unknown'}, {entry['rows']:,} rows, "
            f"{len(entry['rejected']):,} rejected",
            f"  tokens a row: {tokens['p50']:,} median, {tokens['p95']:,} p95, "
            f"{tokens['max']:,} longest; "
            f"{entry['truncated']:,} longer than max_length {max_length:,}",
            f"  {entry['trained_share']:.1%} of the tokens are trained",
        ]
        for key, word in (("rejected", "reason"), ("notes", "text")):
            rows = entry[key]
            lines += [f"  {path}:{row['line']}: {row[word]}" for row in rows[:LINES]]
            if len(rows) > LINES:
                lines.append(f"  … and {len(rows) - LINES:,} more")
    lines.append(f"packing fills {result['packing_fill']:.1%} of rows of {max_length:,} tokens")
    return "\n".join(lines)


def example(tokenizer: Any, samples: "Samples", index: int, colour: bool) -> str:
    """Return a sample as text, its trained tokens in green, or without colour between ⟦ ⟧."""
    ids, labels = samples[index]
    begin, end = (GREEN, OFF) if colour else ("⟦", "⟧")
    trained = labels >= 0
    borders = np.flatnonzero(np.diff(trained)) + 1
    parts = []
    for part, marks in zip(np.split(ids, borders), np.split(trained, borders)):
        written = tokenizer.decode(
            part.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        parts.append(f"{begin}{written}{end}" if marks.any() else written)
    return "".join(parts)
