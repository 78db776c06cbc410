"""Which rows, in which order, in which batch. Order is a pure function of seed, epoch and position, whatever the world size."""
import math
import random

import torch
from torch.utils.data import DataLoader

from .tokenize import IGNORED


class GlobalBatches:
    """Batch sampler for one rank. Update k of an epoch takes the rows [k·G, (k+1)·G) of the epoch's permutation.

    G = world_size · batch · accumulate rows make one update, so the rows of an update do not depend on how they are dealt out
    to ranks and micro-batches. The last update of an epoch is filled up from the epoch's beginning.
    """

    def __init__(self, rows, batch, accumulate, rank, world_size, seed, shuffle=True):
        self.rows, self.batch, self.accumulate = rows, batch, accumulate
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.epoch = 0
        self.batch_size, self.drop_last, self.sampler = batch, False, range(rows)

    @property
    def batch_sampler(self):
        """Where transformers looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return math.ceil(self.rows / (self.batch * self.accumulate * self.world_size)) * self.accumulate

    def __iter__(self):
        order = list(range(self.rows))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        group = self.batch * self.world_size
        for micro in range(len(self)):
            start = micro * group + self.rank * self.batch
            yield [order[i % self.rows] for i in range(start, start + self.batch)]


def collate(rows, pad_token_id):
    """List of Tokens → input_ids, attention_mask, labels; int64, shape [rows, longest]."""
    longest = max(len(row.input_ids) for row in rows)

    def stack(lists, fill):
        return torch.tensor([values + [fill] * (longest - len(values)) for values in lists])

    return {"input_ids": stack([r.input_ids for r in rows], pad_token_id),
            "attention_mask": stack([[1] * len(r.input_ids) for r in rows], 0),
            "labels": stack([r.labels for r in rows], IGNORED)}


class TrainLoader(DataLoader):
    """DataLoader over GlobalBatches that knows its epoch, as transformers' loop expects it."""

    def set_epoch(self, epoch):
        self.batch_sampler.set_epoch(epoch)


def evaluation_batches(rows, batch, rank, world_size):
    """This rank's evaluation batches, longest rows first; the same number on every rank, as ZeRO-3 gathers in step.

    A rank with nothing left gets an empty list in its turn.
    """
    order = sorted(rows, key=lambda row: -len(row.input_ids))
    batches = [order[i:i + batch] for i in range(0, len(order), batch)]
    turns = math.ceil(len(batches) / world_size)
    return [batches[t * world_size + rank] if t * world_size + rank < len(batches) else [] for t in range(turns)]
