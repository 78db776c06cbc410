"""From the data flags to token samples: what a run trains on and validates with.

Torch is imported only when tokens are made.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import source, storage
from data.files import new_file
from data.source import Progress, Source
from trainer import ROOT
from trainer.config.settings import Settings
from trainer.errors import RunError

if TYPE_CHECKING:
    from data.dataset import Mixture, Samples, Summary
    from data.encoder import Encoder
    from data.tokenize import TokenFile

SAMPLES = ROOT / "data" / "samples"
LINE_EVERY = 15  # seconds
SHARE = "0.05"  # of the rows validate where nobody said so
SMALL = 20  # rows; too few to validate with some of them then
NOTES = 5  # that are shown of a file


def progress(label: str) -> Progress:
    """Return a wrapper for rows that shows how many are done.

    It is a bar on a terminal, else a line now and then.
    """

    def show(rows: Iterable[Any]) -> Iterator[Any]:
        from tqdm import tqdm

        if sys.stderr.isatty():
            yield from tqdm(rows, desc=label, unit=" rows", leave=False)
            return
        began = printed = time.monotonic()
        for count, row in enumerate(rows, 1):
            if not count % 1024 and (now := time.monotonic()) - printed >= LINE_EVERY:
                rate = count / (now - began)
                print(f"{label}: {count:,} rows, {rate:,.0f} rows/s", file=sys.stderr, flush=True)
                printed = now
            yield row

    return show


@dataclass
class DataPlan:
    """Where the rows come from, decided without torch.

    share: the training rows that validate, a share or a count as text; None where nobody said so.
    """

    train: list[Source]
    validation: list[Source]
    share: str | None


def plan_data(settings: Settings, show: Progress) -> DataPlan:
    """Look at every row once and return the plan. Raise RunError for what cannot be used."""
    specs, share = settings.dataset, settings.validation_split
    if not specs:
        specs = [str(SAMPLES / "train.jsonl")]
        share = str(SAMPLES / "validation.jsonl") if share is None else share
    folder = settings.dataset_dir
    plan = DataPlan(source.resolve(specs, folder), [], share)
    if share is None:
        plan.validation = source.resolve(specs, folder, "validation")
    try:
        number = float(SHARE if share is None else share)
    except ValueError:  # it names a file
        plan.validation = source.resolve([str(share)], folder, "evaluate")
    else:
        if not 0 <= number < 1 and not (number > 0 and number.is_integer()):
            raise RunError(
                f"validation_split {share} is neither a share nor a count",
                needed="a file, 0 to 1, a whole number, or 0",
            )
    source.check_all(plan.train, settings.on_bad_row, show)
    if plan.validation:
        source.check_all(plan.validation, settings.on_bad_row, show)
    return plan


@dataclass
class TrainingData:
    """What the trainer takes.

    summary: what became of the training rows. messages: lines for the user. rejected: the files
    with rejected rows. key: the same for the same training rows, cuts and order.
    """

    train: "Samples"
    validation: "Samples"
    summary: "Summary"
    mixture: "Mixture | None"
    messages: list[str]
    rejected: list["TokenFile"]
    key: str


def build_data(
    plan: DataPlan, settings: Settings, tokenizer: Any, vocabulary: int | None, show: Progress
) -> TrainingData:
    """Tokenize the rows or take them from the cache, split them, and cut them to max_length.

    vocabulary: rows of the model's embedding. Raises RunError where nothing is left to train on.
    """
    import numpy as np

    from data import dataset
    from data.encoder import Encoder

    check_vocabulary(tokenizer, vocabulary)
    encoder = Encoder(tokenizer, settings.last_turn_only, settings.chat_template_kwargs)
    files = [_token_file(one, encoder, settings, show) for one in plan.train]
    validation_files = [_token_file(one, encoder, settings, show) for one in plan.validation]
    messages = list(
        dict.fromkeys(one.about for one in [*plan.train, *plan.validation] if one.about)
    )
    messages += [*_describe("train", files), *_describe("validation", validation_files)]
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    count, share = sum(map(len, files)), plan.share
    if validation_files or (share is None and count < SMALL):
        share = "0"
    train_rows, validation_rows = dataset.split(files, share or SHARE, seed)
    if validation_files:
        validation_rows = dataset.without(validation_files, files)
        if repeated := int((~validation_rows).sum()):
            text = f"{repeated:,} row(s) left out, as they are in the training data too"
            messages.append(f"validation: {text}")
    limits = settings.max_length, settings.too_long, settings.train_on_prompt
    train, summary = dataset.cut(files, train_rows, *limits)
    if not len(train):
        names = ", ".join(file.shown for file in files)
        raise RunError(
            f"0 trainable tokens in {count:,} rows of {names}",
            found=f"every label is masked; {summary.too_long:,} rows exceed max_length "
            f"{settings.max_length}",
            needed="answers within max_length tokens; raise --max_length",
        )
    validation, left = dataset.cut(validation_files or files, validation_rows, *limits)
    messages.append(f"train: {summary}")
    if len(validation):
        messages.append(f"validation: {left}")
    mixture = None
    if plan.train[0].weight is not None:
        groups = np.array([one.group for one in plan.train])[train.table[:, 0]]
        mixture = dataset.Mixture(groups, {one.group: one.weight for one in plan.train}, seed)
        names = {one.group: one.shown for one in reversed(plan.train)}
        parts = [
            f"{taken:,} of {len(mixture.samples[group]):,} from {names[group]}"
            for group, taken in mixture.taken.items()
        ]
        messages.append("mixture: an epoch takes " + ", ".join(parts))
    rejected = [file for file in [*files, *validation_files] if file.counts.rejected]
    table = hashlib.sha256(train.table.tobytes()).hexdigest()
    key = storage.digest(*(file.folder.name for file in files), table)
    return TrainingData(train, validation, summary, mixture, messages, rejected, key)


def _token_file(one: Source, encoder: "Encoder", settings: Settings, show: Progress) -> "TokenFile":
    from data.tokenize import tokenized

    file = tokenized(one, encoder, show)
    check_weights(file, settings)
    if file.counts.rejected and settings.on_bad_row == "stop":
        raise file.counts.refusal(file.shown)
    return file


def _describe(name: str, files: list["TokenFile"]) -> Iterator[str]:
    for file in files:
        rejected = file.counts.rejected
        skipped = f", {rejected:,} rejected rows skipped" if rejected else ""
        yield f"{name} data: {file.shown}: {file.format}, {len(file):,} rows{skipped}"
        for line, text in file.notes[:NOTES]:
            yield f"  {file.shown}:{line}: {text}"


def check_weights(file: "TokenFile", settings: Settings) -> None:
    """Raise RunError where rows keep answers out of the loss and the flags take everything in."""
    if file.weighted and settings.train_on_prompt:
        raise RunError(
            f"{file.weighted:,} row(s) of {file.shown} have answers of weight 0, "
            "which are not to be trained",
            found="--train_on_prompt true, which trains all tokens",
            needed="one of them",
        )


def check_vocabulary(tokenizer: Any, vocabulary: int | None) -> None:
    """Raise RunError where the tokenizer has tokens that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise RunError(
            "the tokenizer and the model disagree",
            found=f"token ids up to {largest:,}, embeddings for {vocabulary:,}",
            needed="the tokenizer that belongs to the model",
            fix="copy its tokenizer files beside the weights",
        )


def write_rejected(path: str | Path, rejected: list["TokenFile"]) -> None:
    """Write {"path", "line", "reason", "row"} of every rejected row. Raises OSError."""
    Path(path).parent.stat()  # one that is missing is a slip of the pen
    with new_file(Path(path)) as partial, open(partial, "w", encoding="utf-8") as lines:
        for file in rejected:
            for entry in file.rejected():
                lines.write(json.dumps({"path": file.shown, **entry}, ensure_ascii=False) + "\n")


def vocabulary_of(directory: str | Path) -> int | None:
    """Return the rows of the embedding by a local model's config.json, or None."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
