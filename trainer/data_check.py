"""`python launch/data.py check`: look at data before anything is trained on it."""
import json
import os
import sys

import numpy as np

from data import DataError, dataset, source, validate
from data.tokenize import Encoder, tokenized

from . import embedded, rows
from .args import help_text, resolve
from .errors import BAD_INPUT, DONE, RunError, report

USAGE = """python launch/data.py check [FILE …] [--json] [--rejected FILE] [--FLAG VALUE …]

Reads, converts and tokenises rows, and says per file: rows, format, tokens, share trained, rows too long, rejected rows with their
reason, how full packed rows would be, and two examples with the trained tokens in colour. The flags are those of launch/train.py that
concern data and tokenizer: --dataset --model_name_or_path --template --max_length --too_long --on_bad_row --train_on_prompt …
Exit code 2 when a row is rejected and --on_bad_row is stop; with skip, rejected rows go to rejected.jsonl (or --rejected FILE).
"""


def main(argv=None):
    """Exit code of `launch/data.py`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        if "--help" in argv:
            print(help_text())
        return DONE if argv else BAD_INPUT
    try:
        if argv[0] != "check":
            raise RunError(f"unknown command {argv[0]}", needed="check")
        return check(argv[1:])
    except (RunError, DataError) as error:
        report(error)
        return error.code if isinstance(error, RunError) else BAD_INPUT


def _split(argv):
    """(settings, as JSON, file for rejected rows) of the command line."""
    files, rejected, rest, i = [], "rejected.jsonl", [], 0
    as_json = "--json" in argv
    argv = [a for a in argv if a != "--json"]
    while i < len(argv) and not argv[i].startswith("--"):
        files.append(argv[i])
        i += 1
    while i < len(argv):
        if argv[i] == "--rejected":
            if i + 1 == len(argv):
                raise RunError("command line: --rejected needs a file")
            rejected = argv[i + 1]
            i += 2
        else:
            rest.append(argv[i])
            i += 1
    settings = resolve([*rest, *(["--dataset", *files] if files else [])], default_recipe=None)
    return settings, as_json, rejected


def check(argv):
    """Print the report; the exit code."""
    settings, as_json, rejected = _split(argv)
    specs = settings.dataset or [str(rows.SAMPLES / "train.jsonl"), str(rows.SAMPLES / "validation.jsonl")]
    sources = source.resolve(specs, settings.dataset_dir)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here needs a GPU, and DeepSpeed would say that it looks for one
    from .model import load_tokenizer

    directory = embedded.ensure(quiet=as_json) if settings.model_name_or_path is None else settings.model_name_or_path
    tokenizer, given = load_tokenizer(str(directory), settings)
    rows.check_vocabulary(tokenizer, rows.vocabulary_of(directory))
    encoder = Encoder(tokenizer, settings.last_turn_only)
    files = [tokenized(s, encoder, rows.progress(s.shown)) for s in sources]
    samples, _ = dataset.cut(files, [(n, np.arange(len(f))) for n, f in enumerate(files)], settings.max_length, settings.too_long,
                             settings.train_on_prompt)
    result = validate.report(sources, files, samples, settings.max_length)
    bad = [(s, f) for s, f in zip(sources, files) if f.manifest["refused"]]
    if as_json:
        print(json.dumps(result))
    else:
        print(f"tokenizer: {directory}" + "".join(f"; given {what}" for what in given))
        print(validate.text(result, settings.max_length))
        for n in range(min(validate.EXAMPLES, len(samples))):
            file, line = samples.place(n)
            print(f"\n{sources[file].shown}:{line}, trained tokens marked:\n"
                  + validate.example(tokenizer, samples, n, sys.stdout.isatty()))
    if bad and settings.on_bad_row == "skip":
        rows.write_rejected(rejected, bad)
        print(f"rejected rows: {rejected}", file=sys.stderr)
    if bad and settings.on_bad_row == "stop":
        print("\nerror: rows were rejected\n  fix:    mend them, or leave them out with --on_bad_row skip", file=sys.stderr)
        return BAD_INPUT
    if not len(samples):
        raise RunError("no row can be trained on", needed="rows with an answer within max_length tokens")
    return DONE
