"""Which rows, in which order, in which batch.

The order is a function of seed, epoch and position alone, whatever the number of ranks.
"""

import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data import pack
from data.errors import RunError
from data.tokenize import TokenFile

IGNORED = -100  # the label that the loss skips
LENGTH_GROUPS = 50  # optimizer steps whose rows are sorted by length together

Array = np.ndarray
Files = Sequence[TokenFile]
Sample = tuple[Array, Array]  # ids int32 [tokens], labels int64 [tokens]
Pack = tuple[int, ...]  # the numbers of samples that share a row of a batch


# -- samples ---------------------------------------------------------------------------------------
@dataclass
class Summary:
    """What became of the rows.

    rows, tokens, trained: samples, their tokens, and those that the loss covers. too_long: rows of
    more than max_length tokens. left_out: rows without a trained token in what is kept of them.
    """

    policy: str
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    too_long: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained:,} trained"
        done = {"truncate": "truncated", "drop": "dropped as too long"}
        if self.too_long:
            text += f", {self.too_long:,} {done.get(self.policy, self.policy)}"
        if self.left_out:
            text += f", {self.left_out:,} left out (no answer token within max_length)"
        return text


@dataclass(eq=False)
class Samples(Dataset):
    """Rows of token files, cut to max_length. Of a list of numbers it gives a list of samples.

    table: int64 [samples, 4]: file, row, first token within the row, tokens.
    """

    files: Files
    table: Array
    train_on_prompt: bool

    def __len__(self) -> int:
        return len(self.table)

    @property
    def lengths(self) -> Array:
        """Tokens of each sample, int64 [samples]."""
        return self.table[:, 3]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (tuple, list)):
            return [self[i] for i in index]
        number, row, begin, length = self.table[index].tolist()
        file = self.files[number]
        ids = file.tokens(int(file.starts[row]) + begin, length)
        if self.train_on_prompt:
            return ids, ids.astype(np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        for first, end in file.assistant_spans(row).tolist():
            learned = slice(max(first - begin, 0), max(end - begin, 0))
            labels[learned] = ids[learned]
        return ids, labels

    def place(self, index: int) -> tuple[int, int]:
        """Return (file number, line) of a sample."""
        number, row, _, _ = self.table[index].tolist()
        return number, int(self.files[number].lines[row])


def cut(
    files: Files,
    rows: Array,
    max_length: int,
    too_long: str = "truncate",
    train_on_prompt: bool = False,
) -> tuple[Samples, Summary]:
    """Return the samples of the files' rows, and what became of the rows.

    rows: bool, those to take of the rows of all files, one file after the other.
    too_long: rows of more than max_length tokens are cut off ("truncate"), made into several
    samples ("split") or left out ("drop"). Samples without a trained token are left out.
    """
    summary = Summary(too_long)
    tables = []
    ends = np.cumsum([len(file) for file in files])[:-1]
    for number, (file, mask) in enumerate(zip(files, np.split(rows, ends))):
        chosen = np.flatnonzero(mask)
        lengths = file.lengths[chosen].astype(np.int64)
        is_long = lengths > max_length
        summary.too_long += int(is_long.sum())
        if too_long == "drop":
            chosen, lengths = chosen[~is_long], lengths[~is_long]
        counts = np.ones_like(lengths)  # samples of each row
        if too_long == "split":
            counts = -(-lengths // max_length)
        row = np.repeat(chosen, counts)
        begin = _position_in_group(counts) * max_length
        size = np.minimum(np.repeat(lengths, counts) - begin, max_length)
        trained = size - 1 if train_on_prompt else _trained_tokens(file, row, begin, size)
        table = np.stack([np.full_like(row, number), row, begin, size], axis=1)[trained > 0]
        tables.append(table)
        summary.left_out += len(chosen) - len(np.unique(table[:, 1]))
        summary.trained += int(trained.sum())
    table = np.concatenate(tables)
    summary.rows, summary.tokens = len(table), int(table[:, 3].sum())
    return Samples(files, table, train_on_prompt), summary


def _position_in_group(counts: Array) -> Array:
    """Return 0, 1, …, n - 1 for each n of the counts, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _trained_tokens(file: TokenFile, row: Array, begin: Array, size: Array) -> Array:
    """Count the assistant tokens in [begin, begin + size) of each row, int64 [rows].

    The first token of a sample does not count: nothing stands before it to predict it from.
    """
    counts = np.diff(file.first_span)[row]
    owner = np.repeat(np.arange(len(row)), counts)
    spans = file.spans[np.repeat(file.first_span[row], counts) + _position_in_group(counts)]
    first = np.maximum(spans[:, 0], begin[owner] + 1)
    end = np.minimum(spans[:, 1], (begin + size)[owner])
    return np.bincount(owner, np.maximum(end - first, 0), len(row)).astype(np.int64)


# -- validation ------------------------------------------------------------------------------------
def _contents(files: Files) -> Array:
    """Return a number for each row that is the same for equal conversations: uint64 [rows]."""
    contents = np.concatenate([file.contents for file in files])
    return contents[:, 0] ^ (contents[:, 1] << np.uint64(1))


def split(files: Files, validation: str, seed: int) -> tuple[Array, Array]:
    """Return the rows to train on and to validate with, each bool [rows of all files].

    validation: a share below 1, a count, or 0 for none.
    Rows with the same conversation stay on one side: the content decides. Raise RunError where a
    side would be empty.
    """
    amount, contents = float(validation), _contents(files)
    if amount == 0:
        nothing = np.zeros(len(contents), bool)
        return ~nothing, nothing
    unique, inverse, sizes = np.unique(contents, return_inverse=True, return_counts=True)
    count = round(amount * len(contents)) if amount < 1 else int(amount)
    if not 0 < count < len(contents) or len(unique) < 2:
        raise RunError(
            f"validation_split {validation} leaves nothing to train on or to validate with",
            found=f"{len(contents)} rows, {len(unique)} different",
            needed="a share or count that leaves rows on both sides",
        )
    order = np.argsort(_shuffled(unique, seed), kind="stable")
    held_out, left = np.zeros(len(unique), bool), count
    for group, size in zip(order.tolist(), sizes[order].tolist()):
        if size <= left:  # a larger group of equal rows stays to train on
            held_out[group] = True
            left -= size
    if left == count:
        held_out[np.argmin(sizes)] = True
    return ~held_out[inverse], held_out[inverse]


def _shuffled(keys: Array, seed: int) -> Array:
    """Return other keys, whose order is another one for each seed (splitmix64)."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64((seed * 2 + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return z ^ (z >> np.uint64(31))


def without(files: Files, train_files: Files) -> Array:
    """Return which rows equal no training row, bool [rows of all files]."""
    return np.isin(_contents(files), _contents(train_files), invert=True)


# -- order -----------------------------------------------------------------------------------------
class Mixture:
    """How many samples of each group an epoch takes, by the groups' shares.

    An epoch takes none twice, and the next one goes on where it ended: in time all are seen.
    """

    def __init__(self, groups: Array, weights: dict[int, Any], seed: int) -> None:
        """groups: the group of each sample, int [samples]; weights: {group: share}."""
        self.seed = seed
        self.samples = {group: np.flatnonzero(groups == group) for group in weights}
        sizes = {group: len(samples) for group, samples in self.samples.items()}
        for group, size in sizes.items():
            if not size:
                raise RunError(
                    f"source {group + 1} of the mixture has no sample left",
                    needed="rows in every source with a share",
                )
        total = sum(weights.values())
        epoch = min(sizes[group] / (weight / total) for group, weight in weights.items())
        self.taken = {
            group: max(1, min(round(epoch * weight / total), sizes[group]))
            for group, weight in weights.items()
        }

    def rows(self, epoch: int) -> Array:
        """Return the samples of an epoch, int [samples]."""
        parts = []
        for group, taken in self.taken.items():
            samples = self.samples[group]
            order = list(range(len(samples)))
            random.Random(f"{self.seed}/{group}").shuffle(order)
            # Round and round the same circle: an epoch takes no more than one lap, so none twice.
            positions = range(epoch * taken, (epoch + 1) * taken)
            parts.append(samples[np.take(order, positions, mode="wrap")])
        return np.concatenate(parts)


@dataclass(eq=False)
class BatchSampler:
    """The batches of one rank, as lists of packs.

    A pack is a tuple of samples: of one, or with pack_length of as many as fit into so many tokens.
    An epoch is a list of packs, and optimizer step k takes the next rows_per_step of them. They
    are dealt out to micro-batches and ranks afterwards, so the rows of a step do not depend on the
    number of ranks. The last step is filled up from the epoch's beginning. Every epoch has as many
    steps as the first: where a later epoch of a mixture needs more packs, the last ones wait.

    strategy: "random" shuffles; rows of about one length share a micro-batch, and the rows of a
    step stay the same. "group_by_length" fills whole steps with rows of about one length.
    "sequential" keeps the order of the files.
    """

    lengths: Array
    batch_size: int  # packs of a micro-batch on one rank
    accumulation: int  # micro-batches of an optimizer step
    rank: int
    world_size: int
    seed: int
    strategy: str = "random"
    pack_length: int | None = None
    mixture: Mixture | None = None

    epoch = 0
    drop_last = False  # accelerate reads it, and `sampler`

    def __post_init__(self) -> None:
        # transformers looks for set_epoch at the batch_sampler of the loader's batch_sampler.
        self.batch_sampler = self
        self.sampler = range(len(self.lengths))
        self.packs = functools.lru_cache(maxsize=1)(self._packs)
        self.rows_per_step = self.batch_size * self.accumulation * self.world_size
        self.steps_per_epoch = math.ceil(len(self.packs(0)) / self.rows_per_step)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[Pack]]:
        for micro_batch in range(len(self)):
            yield self.batch_at(self.epoch, micro_batch)

    def batch_at(self, epoch: int, micro_batch: int) -> list[Pack]:
        """Return this rank's packs of a micro-batch of the epoch."""
        packs = self.packs(epoch)
        start = (micro_batch * self.world_size + self.rank) * self.batch_size
        return [packs[i % len(packs)] for i in range(start, start + self.batch_size)]

    def _packs(self, epoch: int) -> list[Pack]:
        """Return the packs of an epoch in their order."""
        shuffler = random.Random(f"{self.seed}/{epoch}")
        rows = self.mixture.rows(epoch).tolist() if self.mixture else list(self.sampler)
        if self.strategy != "sequential":
            shuffler.shuffle(rows)
        order, step = np.asarray(rows), self.rows_per_step
        if self.pack_length:
            packs = pack.members(pack.best_fit(self.lengths[order], self.pack_length))
            packs = [tuple(order[members].tolist()) for members in packs]
            if self.strategy != "sequential":
                shuffler.shuffle(packs)
            return packs
        if self.strategy == "random":
            order = self._sorted_by_length(order, step)
        elif self.strategy == "group_by_length":
            order = self._sorted_by_length(order, step * LENGTH_GROUPS)
            steps = np.split(order, range(step, len(order), step))
            last = steps.pop() if len(steps[-1]) < step else order[:0]
            shuffler.shuffle(steps)
            order = np.concatenate([*steps, last])
        return [(row,) for row in order.tolist()]

    def _sorted_by_length(self, order: Array, span: int) -> Array:
        """Return the samples, in every `span` of them the longest first."""
        place = np.arange(len(order)) // span
        return order[np.lexsort((-self.lengths[order], place))]


# -- batches ---------------------------------------------------------------------------------------
def collate(
    packs: Sequence[Sequence[Sample]], pad_token_id: int, pack_length: int | None = None
) -> dict:
    """Return the tensors of one batch, a row for each pack.

    input_ids, position_ids, labels: int64 [packs, tokens]; pack_length tokens, or as many as the
    longest pack has. Positions begin again at every sample, which keeps attention within samples.
    The first label of a sample is ignored: the token before it is another sample's. Padding goes
    on at the end of the last sample, where no real token sees it. tokens: the number of real
    tokens. For variable-length attention: cu_seq_lens, int32 [samples + 1], where the samples
    begin in the flattened batch, and max_length, the tokens of the longest.
    """
    longest = pack_length or max(sum(len(ids) for ids, _ in samples) for samples in packs)
    input_ids = np.full((len(packs), longest), pad_token_id, np.int64)
    labels = np.full_like(input_ids, IGNORED)
    borders, tokens = [], 0
    for row, samples in enumerate(packs):
        begin = 0
        for ids, targets in samples:
            end = begin + len(ids)
            input_ids[row, begin:end] = ids
            labels[row, begin + 1 : end] = targets[1:]
            borders.append(row * longest + begin)
            begin = end
        tokens += begin
    cu_seq_lens = np.asarray([*borders, input_ids.size], np.int32)
    lengths = np.diff(cu_seq_lens)
    positions = np.arange(input_ids.size) - np.repeat(cu_seq_lens[:-1], lengths)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(positions.reshape(input_ids.shape)),
        "labels": torch.from_numpy(labels),
        "cu_seq_lens": torch.from_numpy(cu_seq_lens),
        "max_length": int(lengths.max()),
        "tokens": tokens,
    }


def evaluation_batches(
    samples: Samples, batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Return this rank's evaluation batches as lists of sample numbers, the longest first.

    Every rank gets the same number of batches, as ZeRO-3 gathers on all ranks at once. The last
    one of a rank may be empty.
    """
    order = np.argsort(-samples.lengths, kind="stable").tolist()
    first = rank * batch_size
    starts = range(first, first + len(order), batch_size * world_size)
    return [order[start : start + batch_size] for start in starts]
