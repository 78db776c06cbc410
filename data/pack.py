"""Best-fit decreasing: samples into bins of a fixed number of tokens."""

import numpy as np


def best_fit(lengths, capacity):
    """Bin number of each sample, int64 [samples]: the longest first, each into the fullest bin that still takes it.

    lengths: int [samples], each at most `capacity`. Bins by free space are stacks, and a bit mask says which are not empty, so that
    a sample costs a few operations on one integer of `capacity` bits. (trl's pack_dataset does the same on copies of the tokens; here
    nothing is moved.) Ties keep the samples' order, and the number of bins depends on the lengths alone.
    """
    lengths = np.asarray(lengths)
    bins = np.empty(len(lengths), dtype=np.int64)
    stacks, mask, count = {}, 0, 0
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    for sample, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = mask >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            stack = stacks[free]
            bin = stack.pop()
            if not stack:
                mask &= ~(1 << free)
        else:
            free, bin = capacity, count
            count += 1
        bins[sample] = bin
        left = free - length
        if left:
            stacks.setdefault(left, []).append(bin)
            mask |= 1 << left
    return bins


def members(bins):
    """List of arrays: the samples of each bin, in their order."""
    order = np.argsort(bins, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(bins[order])) + 1) if len(order) else []


def fill(lengths, capacity):
    """Share of the bins' tokens that are samples, 0 to 1."""
    if not len(lengths):
        return 0.0
    return float(np.sum(lengths, dtype=np.int64)) / (
        capacity * (int(best_fit(lengths, capacity).max()) + 1)
    )
