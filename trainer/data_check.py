"""`python launch/data.py check`: look at data before anything is trained on it."""

import json
import os
import sys

import numpy as np

from data import DataError, dataset, source, validate
from data.tokenize import Encoder, tokenized
from trainer import data_setup
from trainer.config.flags import all_keys, check_model, help_text, resolve
from trainer.errors import BAD_INPUT, DONE, FAILED, RunError, report
from trainer.system import default_model

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
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _split(argv):
    """(settings, as JSON, file for rejected rows) of the command line."""
    files, rejected, rest, i = [], "rejected.jsonl", [], 0
    while i < len(argv):
        word, equals, value = argv[i].partition("=")
        i += 1
        if word == "--json":
            continue
        if not word.startswith("--"):
            files.append(argv[i - 1])
            continue
        key = all_keys().get(word[2:].replace("-", "_"))
        if not equals and not (
            key and key.type == "bool" and argv[i : i + 1] not in (["true"], ["false"])
        ):
            # One value a flag, but for lists: what comes after is a file.
            many = key is not None and key.type == "list"
            start = i
            while i < len(argv) and not argv[i].startswith("--") and (many or i == start):
                i += 1
            value = argv[start:i]
        else:
            value = [value] if equals else []
        if word != "--rejected":
            rest += [word, *value]
        elif not value or not value[0]:
            raise RunError("command line: --rejected needs a file")
        else:
            rejected = value[0]
    settings = resolve(rest, default_recipe=None)
    if files and settings.given("dataset"):
        raise RunError(
            "the files are named twice",
            found=f"{' '.join(files)[:200]} and --dataset",
            needed="one of them",
        )
    if files:
        settings.values["dataset"] = files
    return settings, "--json" in argv, rejected


def check(argv):
    """Print the report; the exit code."""
    settings, as_json, rejected = _split(argv)
    specs = settings.dataset or [
        str(data_setup.SAMPLES / "train.jsonl"),
        str(data_setup.SAMPLES / "validation.jsonl"),
    ]
    if settings.model_name_or_path is not None:
        check_model(settings.model_name_or_path)
    sources = source.resolve(specs, settings.dataset_dir)
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # nothing here needs a GPU, and DeepSpeed would say that it looks for one
    from trainer.modeling.load import load_tokenizer

    directory = (
        default_model.ensure(quiet=as_json)
        if settings.model_name_or_path is None
        else settings.model_name_or_path
    )
    tokenizer, given = load_tokenizer(str(directory), settings)
    data_setup.check_vocabulary(tokenizer, data_setup.vocabulary_of(directory))
    encoder = Encoder(tokenizer, settings.last_turn_only)
    files = [tokenized(s, encoder, data_setup.progress(s.shown)) for s in sources]
    for s, file in zip(sources, files):
        data_setup.check_weights(s, file, settings)
    samples, _ = dataset.cut(
        files,
        [(n, np.arange(len(f))) for n, f in enumerate(files)],
        settings.max_length,
        settings.too_long,
        settings.train_on_prompt,
    )
    result = validate.report(sources, files, samples, settings.max_length)
    bad = [(s, f) for s, f in zip(sources, files) if f.manifest["refused"]]
    if as_json:
        print(json.dumps(result))
    else:
        print(f"tokenizer: {directory}" + "".join(f"; given {what}" for what in given))
        print(validate.text(result, settings.max_length))
        for n in range(min(validate.EXAMPLES, len(samples))):
            file, line = samples.place(n)
            print(
                f"\n{sources[file].shown}:{line}, trained tokens marked:\n"
                + validate.example(tokenizer, samples, n, sys.stdout.isatty())
            )
    if bad and settings.on_bad_row == "skip":
        try:
            data_setup.write_rejected(rejected, bad)
        except OSError as error:
            raise RunError(
                f"the rejected rows cannot be written to {rejected}",
                found=error.strerror,
                needed="--rejected FILE",
            ) from None
        print(f"rejected rows: {rejected}", file=sys.stderr)
    if bad and settings.on_bad_row == "stop":
        print(
            "\nerror: rows were rejected\n  fix:    mend them, or leave them out with --on_bad_row skip",
            file=sys.stderr,
        )
        return BAD_INPUT
    if not len(samples):
        raise RunError(
            "no row can be trained on", needed="rows with an answer within max_length tokens"
        )
    return DONE
