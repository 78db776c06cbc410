"""From the data flags to token samples: what a run trains on and validates with. Torch comes in only when tokens are made."""

import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data import DataError, source, storage
from trainer import ROOT
from trainer.errors import RunError, is_main_process

SAMPLES = ROOT / "data" / "samples"
LINE_EVERY = 15  # seconds
SMALL = 20  # rows; too few to give a share away unasked


def progress(label):
    """A wrapper for rows that shows how many are done: a bar on a terminal, else a line now and then. On the rank that does it."""

    def show(rows):
        from tqdm import tqdm

        if sys.stderr.isatty():
            yield from tqdm(rows, desc=label, unit=" rows", leave=False)
            return
        began = said = time.monotonic()
        for count, row in enumerate(rows, 1):
            if not count % 1024 and (now := time.monotonic()) - said >= LINE_EVERY:
                print(
                    f"{label}: {count:,} rows, {count / (now - began):,.0f} rows/s",
                    file=sys.stderr,
                    flush=True,
                )
                said = now
            yield row

    return show


@dataclass
class Plan:
    """Where the rows come from, decided without torch. share: of the training rows that validate, as text; None with a file."""

    train: list
    validation: list
    share: str | None
    asked: bool


def plan(settings, show):
    """The Plan, every row looked at once. DataError for what cannot be used."""
    given, wanted = settings.dataset, settings.validation_split
    specs = [str(SAMPLES / "train.jsonl")] if given is None else given
    if given is None and wanted is None:
        wanted = str(SAMPLES / "validation.jsonl")
    share = "0.05" if wanted is None else str(wanted)
    try:
        number = float(share)
    except ValueError:
        number = None
    if number is not None and not (
        math.isfinite(number) and (0 <= number < 1 or number.is_integer() and number > 0)
    ):
        raise DataError(
            f"validation_split {share} is neither a share nor a count\n  needed: a file, 0 to 1, a whole number, or 0"
        )
    train = source.resolve(specs, settings.dataset_dir)
    validation = source.resolve([share], settings.dataset_dir) if number is None else []
    for sources in (train, validation):
        if sources:
            source.check_all(sources, settings.on_bad_row, show)
    return Plan(train, validation, share if number is not None else None, wanted is not None)


@dataclass
class Data:
    """What the trainer takes. train, validation: data.dataset.Samples; mixture: Mixture or None; lines: what to tell the user."""

    train: object
    validation: object
    summary: object
    mixture: object
    lines: list
    refused: list  # (source, TokenFile) with refused rows
    key: str  # of the training samples: the same for the same rows, cuts and order


def build(plan, settings, tokenizer, vocabulary, show):
    """Tokenise (or take from the cache), split and cut. vocabulary: rows of the model's embedding."""
    import numpy as np

    from data import dataset
    from data.tokenize import Encoder

    check_vocabulary(tokenizer, vocabulary)
    encoder = Encoder(tokenizer, settings.last_turn_only)
    seed = settings.data_seed if settings.data_seed is not None else settings.seed
    files = [_tokens(s, encoder, settings, show) for s in plan.train]
    held_out = [_tokens(s, encoder, settings, show) for s in plan.validation]
    lines = []
    for name, sources, made in (
        ("train", plan.train, files),
        ("validation", plan.validation, held_out),
    ):
        for s, file in zip(sources, made):
            skipped = (
                f", {file.manifest['refused']:,} refused rows skipped"
                if file.manifest["refused"]
                else ""
            )
            lines.append(f"{name} data: {s.shown}: {s.format}, {len(file):,} rows{skipped}")
            lines += [f"  {s.shown}:{line}: {text}" for line, text in file.manifest["notes"][:5]]
    if held_out:
        train_rows = [(n, np.arange(len(file))) for n, file in enumerate(files)]
        validation_rows, twice = dataset.without(held_out, files)
        if twice:
            lines.append(
                f"validation: {twice:,} row(s) left out, as they are in the training data too"
            )
    else:
        held_out, share = files, plan.share
        if not plan.asked and sum(map(len, files)) < SMALL:
            share = "0"
        train_rows, validation_rows = dataset.split(files, share, seed)

    def cut(made, rows):
        return dataset.cut(
            made, rows, settings.max_length, settings.too_long, settings.train_on_prompt
        )

    train, summary = cut(files, train_rows)
    if not len(train):
        rows = sum(map(len, files))
        raise DataError(
            f"0 trainable tokens in {rows:,} rows of {', '.join(s.shown for s in plan.train)}\n"
            f"  found:  every label is masked; {summary.too_long:,} rows exceed max_length {settings.max_length}\n"
            "  needed: answers within max_length tokens; raise --max_length"
        )
    lines.append(f"train: {summary}")
    validation, summary_v = cut(held_out, validation_rows)
    if len(validation):
        lines.append(f"validation: {summary_v}")
    mixture = None
    if plan.train[0].weight is not None:
        groups = np.array([s.group for s in plan.train])[train.table[:, 0]]
        mixture = dataset.Mixture(groups, {s.group: s.weight for s in plan.train}, seed)
        lines.append(
            "mixture: an epoch takes "
            + ", ".join(
                f"{taken:,} of {len(mixture.samples[g]):,} from {next(s.shown for s in plan.train if s.group == g)}"
                for g, taken in mixture.taken.items()
            )
        )
    refused = [
        (s, f)
        for s, f in zip(
            [*plan.train, *plan.validation], [*files, *(held_out if plan.validation else [])]
        )
        if f.manifest["refused"]
    ]
    key = storage.digest(
        *(f.folder.name for f in files), hashlib.sha256(train.table.tobytes()).hexdigest()
    )
    return Data(train, validation, summary, mixture, lines, refused, key)


def _tokens(s, encoder, settings, show):
    from data.tokenize import tokenized

    file = tokenized(s, encoder, show)
    check_weights(s, file, settings)
    if file.manifest["refused"] and settings.on_bad_row == "stop":
        raise source.refuse(s, len(file), file.manifest["refused"], file.manifest["first"])
    return file


def check_weights(s, file, settings):
    """DataError where rows keep answers out of the loss and the flags take everything in."""
    if file.manifest["weighted"] and settings.train_on_prompt:
        raise DataError(
            f"{file.manifest['weighted']:,} row(s) of {s.shown} have answers of weight 0, which are not to be trained\n"
            "  found:  --train_on_prompt true, which trains all tokens\n  needed: one of them"
        )


def check_vocabulary(tokenizer, vocabulary):
    """RunError where the tokenizer has tokens that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise RunError(
            "the tokenizer and the model disagree",
            found=f"token ids up to {largest:,}, embeddings for {vocabulary:,}",
            needed="the tokenizer that belongs to the model",
            fix="copy its tokenizer files beside the weights",
        )


def write_rejected(path, refused):
    """rejected.jsonl: {"path", "line", "reason", "row"} of every refused row."""
    if not is_main_process():
        return
    with open(path, "w", encoding="utf-8") as file:
        for s, tokens in refused:
            for entry in tokens.rejected():
                file.write(json.dumps({"path": s.shown, **entry}, ensure_ascii=False) + "\n")


def vocabulary_of(directory):
    """Rows of the embedding by a local model's config.json, or None."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
