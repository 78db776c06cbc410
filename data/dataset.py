"""Which rows, in which order, in which batch. Order is a pure function of seed, epoch and position, whatever the world size."""

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import DataError, pack

IGNORED = -100  # the label that the loss skips
LENGTH_GROUPS = 50  # updates whose rows are sorted by length together


@dataclass
class Summary:
    """What became of the rows: samples kept, tokens, trained tokens, rows longer than max_length, rows without a trained token in
    what is kept of them."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    too_long: int = 0
    left_out: int = 0
    policy: str = "truncate"

    def __str__(self):
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained:,} trained"
        if self.too_long:
            done = {"truncate": "truncated", "split": "split", "drop": "dropped as too long"}[
                self.policy
            ]
            text += f", {self.too_long:,} {done}"
        return text + (
            f", {self.left_out:,} left out (no answer token within max_length)"
            if self.left_out
            else ""
        )


class Samples(Dataset):
    """Rows of token files, cut to max_length. An item is (ids int32 [tokens], labels int64 [tokens]); of a list, a list of them.

    table: int64 [samples, 4]: file, row, first token within the row, tokens.
    """

    def __init__(self, files, table, train_on_prompt=False):
        self.files, self.table, self.train_on_prompt = files, table, train_on_prompt

    def __len__(self):
        return len(self.table)

    @property
    def lengths(self):
        return self.table[:, 3]

    def __getitem__(self, index):
        if isinstance(index, (tuple, list)):
            return [self[i] for i in index]
        file, row, begin, length = self.table[index].tolist()
        source = self.files[file]
        ids = source.tokens(source.starts[row] + begin, length)
        labels = np.full(length, IGNORED, dtype=np.int64)
        spans = [(0, begin + length)] if self.train_on_prompt else source.trained(row).tolist()
        for first, end in spans:
            first, end = max(first - begin, 0), min(end - begin, length)
            if first < end:
                labels[first:end] = ids[first:end]
        return ids, labels

    def place(self, index):
        """(file number, line) where a sample stood."""
        file, row, _, _ = self.table[index].tolist()
        return file, int(self.files[file].lines[row])


def cut(files, rows, max_length, too_long="truncate", train_on_prompt=False):
    """(Samples, Summary) of the rows: [(file number, array of rows), …], longer ones truncated, split or dropped."""
    summary = Summary(policy=too_long)
    parts = []
    for number, chosen in rows:
        file = files[number]
        lengths = file.lengths[chosen].astype(np.int64)
        long = lengths > max_length
        summary.too_long += int(long.sum())
        if too_long == "drop":
            chosen, lengths = chosen[~long], lengths[~long]
        pieces = (
            np.ones(len(lengths), np.int64)
            if too_long != "split"
            else np.maximum(-(-lengths // max_length), 1)
        )
        row = np.repeat(chosen, pieces)
        begin = (np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_length
        size = np.minimum(np.repeat(lengths, pieces) - begin, max_length)
        trained = np.maximum(size - 1, 0) if train_on_prompt else _trained(file, row, begin, size)
        kept = trained > 0
        summary.left_out += len(np.unique(row)) - len(np.unique(row[kept]))
        summary.trained += int(trained[kept].sum())
        parts.append(
            np.stack([np.full(int(kept.sum()), number), row[kept], begin[kept], size[kept]], axis=1)
        )
    table = np.concatenate(parts) if parts else np.empty((0, 4), np.int64)
    summary.rows, summary.tokens = len(table), int(table[:, 3].sum())
    return Samples(files, table, train_on_prompt), summary


def _trained(file, row, begin, size):
    """Tokens of [begin, begin + size) of each row that are trained and have a token before them: int64 [rows]."""
    counts = np.diff(file.first_span)[row]
    owner = np.repeat(np.arange(len(row)), counts)
    index = (
        np.arange(len(owner))
        - np.repeat(np.cumsum(counts) - counts, counts)
        + np.repeat(file.first_span[row], counts)
    )
    first = np.maximum(file.spans[index, 0], begin[owner] + 1)
    end = np.minimum(file.spans[index, 1], (begin + size)[owner])
    return np.bincount(owner, np.maximum(end - first, 0), len(row)).astype(np.int64)


# -- validation --------------------------------------------------------------------------------------------------------
def content_keys(files):
    """One number a row that is the same for the same conversation: list of uint64 arrays."""
    return [file.contents[:, 0] ^ (file.contents[:, 1] << np.uint64(1)) for file in files]


def split(files, wanted, seed):
    """(train rows, validation rows), each [(file number, rows)]: `wanted` is a share below 1, a count, or 0.

    Rows with the same conversation stay on the same side: the split is decided on the content.
    """
    everything = [(n, np.arange(len(file))) for n, file in enumerate(files)]
    number = float(wanted)
    if number == 0:
        return everything, []
    keys = np.concatenate(content_keys(files))
    unique, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    count = round(number * len(keys)) if number < 1 else int(number)
    if not 0 < count < len(keys) or len(unique) < 2:
        raise DataError(
            f"validation_split {wanted} leaves nothing to train on or to validate with\n  found:  {len(keys)} rows, "
            f"{len(unique)} different\n  needed: a share or count that leaves rows on both sides"
        )
    order = np.argsort(_mixed(unique, seed), kind="stable")
    chosen, left = np.zeros(len(unique), bool), count
    for group, size in zip(order.tolist(), sizes[order].tolist()):
        if size <= left:  # a group of more equal rows than are still wanted stays to train on
            chosen[group] = True
            left -= size
        if not left:
            break
    if left == count:
        chosen[np.argmin(sizes)] = True
    held_out = chosen[inverse]
    ends = np.cumsum([len(file) for file in files])
    parts = np.split(held_out, ends[:-1])
    return (
        [(n, np.flatnonzero(~part)) for n, part in enumerate(parts)],
        [(n, np.flatnonzero(part)) for n, part in enumerate(parts) if part.any()],
    )


def _mixed(keys, seed):
    """The keys in another order for each seed (splitmix64)."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64((seed * 2 + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def without(files, train_files):
    """(rows of `files` that no training row equals, number of those left out)."""
    known = np.unique(np.concatenate(content_keys(train_files)))
    rows = [
        (n, np.flatnonzero(~np.isin(keys, known))) for n, keys in enumerate(content_keys(files))
    ]
    return rows, sum(map(len, files)) - sum(len(r) for _, r in rows)


# -- order -------------------------------------------------------------------------------------------------------------
class Mixture:
    """How many samples of each group an epoch takes, by the groups' shares: none twice, and the next epoch goes on where the last
    one ended, so that in time all are seen."""

    def __init__(self, groups, weights, seed):
        """groups: group of each sample, int [samples]; weights: {group: share}."""
        self.seed = seed
        self.samples = {g: np.flatnonzero(groups == g) for g in weights}
        empty = [g for g, s in self.samples.items() if not len(s)]
        if empty:
            raise DataError(
                f"source {empty[0] + 1} of the mixture has no sample left\n  needed: rows in every source with a share"
            )
        total = sum(weights.values())
        size = min(len(self.samples[g]) / (w / total) for g, w in weights.items())
        self.taken = {
            g: max(1, min(round(size * w / total), len(self.samples[g])))
            for g, w in weights.items()
        }

    def rows(self, epoch):
        """The samples of an epoch."""
        parts = []
        for group, taken in self.taken.items():
            own = self.samples[group]
            order = list(range(len(own)))
            random.Random(f"{self.seed}/{group}").shuffle(order)
            # Round and round the same circle: an epoch takes no more than one lap, so none twice.
            parts.append(
                own[np.take(order, range(epoch * taken, (epoch + 1) * taken), mode="wrap")]
            )
        return np.concatenate(parts)


class Order:
    """Batch sampler for one rank. Update k of an epoch takes the units [k·G, (k+1)·G) of the epoch's permutation.

    A unit is a sample, or with `capacity` a bin of samples packed into so many tokens. G = world_size · batch · accumulate units make
    one update, so the rows of an update do not depend on how they are dealt out to ranks and micro-batches. The last update of an
    epoch is filled up from the epoch's beginning. Every epoch has as many updates as the first: where packing a mixture's later epoch
    makes more bins than fit them, the last of its shuffled bins wait for another epoch. strategy: random, sequential, or
    group_by_length, which fills whole updates with rows of about one length; random does so with the micro-batches of an update.
    """

    def __init__(
        self,
        lengths,
        batch,
        accumulate,
        rank,
        world_size,
        seed,
        strategy="random",
        capacity=None,
        mixture=None,
    ):
        self.lengths, self.batch, self.accumulate = np.asarray(lengths), batch, accumulate
        self.rank, self.world_size, self.seed, self.strategy = rank, world_size, seed, strategy
        self.capacity, self.mixture = capacity, mixture
        self.epoch = 0
        self.batch_size, self.drop_last, self.sampler = batch, False, range(len(self.lengths))
        self._units = functools.lru_cache(maxsize=1)(self._make_units)
        self.updates = math.ceil(len(self._units(0)) / self.update)

    @property
    def update(self):
        """Units of one update."""
        return self.batch * self.accumulate * self.world_size

    @property
    def batch_sampler(self):
        """Where transformers looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.updates * self.accumulate

    def _make_units(self, epoch):
        """The epoch's units in order: list of tuples of samples."""
        shuffler = random.Random(f"{self.seed}/{epoch}")
        if self.mixture:
            order = self.mixture.rows(epoch).tolist()
        else:
            order = list(range(len(self.lengths)))
        if self.strategy != "sequential":
            shuffler.shuffle(order)
        if self.capacity:
            order = np.asarray(order)
            bins = [
                tuple(order[m].tolist())
                for m in pack.members(pack.best_fit(self.lengths[order], self.capacity))
            ]
            if self.strategy != "sequential":
                shuffler.shuffle(bins)
            return bins
        if self.strategy == "group_by_length":
            order = self._by_length(order, self.update * LENGTH_GROUPS)
            updates = [order[at : at + self.update] for at in range(0, len(order), self.update)]
            last = updates.pop() if len(updates[-1]) < self.update else []
            shuffler.shuffle(updates)
            order = [i for update in [*updates, last] for i in update]
        elif self.strategy == "random":
            # Rows of one length share a micro-batch. The update's rows, and with them its gradient, stay the same.
            order = self._by_length(order, self.update)
        return [(i,) for i in order]

    def _by_length(self, order, span):
        """The samples sorted by length, the longest first, within every `span` of them."""
        lengths = self.lengths[order]
        parts = [
            np.argsort(-lengths[at : at + span], kind="stable") + at
            for at in range(0, len(order), span)
        ]
        return np.asarray(order)[np.concatenate(parts)].tolist()

    def __iter__(self):
        for micro in range(len(self)):
            yield self.batch_at(self.epoch, micro)

    def batch_at(self, epoch, micro):
        """This rank's units of the epoch's micro-batch number `micro`."""
        units = self._units(epoch)
        start = (micro * self.world_size + self.rank) * self.batch
        return [units[i % len(units)] for i in range(start, start + self.batch)]


class TrainLoader(DataLoader):
    """DataLoader over `Order` that knows its epoch, as transformers' loop expects it."""

    def set_epoch(self, epoch):
        self.batch_sampler.set_epoch(epoch)


# -- batches -----------------------------------------------------------------------------------------------------------
def collate(units, pad_token_id, size=None):
    """List of units (lists of samples) → tensors of one batch.

    input_ids, position_ids, labels: int64 [units, tokens], `size` tokens or as many as the longest unit has. Positions restart at
    every sample, by which attention is kept within samples; the first label of a sample is ignored, as what comes before it is
    another one's. Padding goes on at the end of the last sample, where no real token sees it. tokens: real tokens, an int.
    cu_seq_lens: int32 [samples + 1], where samples begin in the flattened batch, and max_length, the longest of them: for
    variable-length attention.
    """
    longest = size or max(sum(len(ids) for ids, _ in unit) for unit in units)
    shape = (len(units), longest)
    input_ids, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORED, np.int64)
    positions, borders, tokens = np.zeros(shape, np.int64), [], 0
    for row, unit in enumerate(units):
        at = 0
        for ids, targets in unit:
            end = at + len(ids)
            input_ids[row, at:end], labels[row, at:end], positions[row, at:end] = (
                ids,
                targets,
                np.arange(len(ids)),
            )
            labels[row, at] = IGNORED
            borders.append(row * longest + at)
            at = end
        tokens += at
        positions[row, at:] = positions[row, at - 1] + 1 + np.arange(longest - at)
    borders = np.asarray([*borders, len(units) * longest], np.int32)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
        "cu_seq_lens": torch.from_numpy(borders),
        "max_length": int(np.diff(borders).max()),
        "tokens": tokens,
    }


def evaluation_batches(samples, batch, rank, world_size):
    """This rank's evaluation batches as lists of sample numbers, longest first; the same number on every rank, as ZeRO-3 gathers in
    step. A rank with nothing left gets an empty list in its turn."""
    order = np.argsort(-samples.lengths, kind="stable").tolist()
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    turns = math.ceil(len(batches) / world_size)
    return [
        batches[t * world_size + rank] if t * world_size + rank < len(batches) else []
        for t in range(turns)
    ]
