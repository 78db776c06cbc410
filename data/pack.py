"""Best-fit decreasing: samples into packs of a fixed number of tokens."""

import numpy as np


def best_fit(lengths: np.ndarray, pack_length: int) -> np.ndarray:
    """Return the pack number of each sample, int64 [samples].

    The longest sample comes first, and each goes into the fullest pack that still takes it.
    lengths: int64 [samples], each at most pack_length. Samples of one length keep their order, and
    the number of packs depends on the lengths alone.

    Packs with the same free space are a stack, and bit n of a mask says whether the stack of n
    free tokens holds any, so a sample costs a few operations on one integer. (trl's pack_dataset
    does the same on copies of the tokens; here nothing is moved.)
    """
    packs = np.empty(len(lengths), dtype=np.int64)
    stacks: dict[int, list[int]] = {}
    mask, count = 0, 0
    order = np.argsort(-lengths, kind="stable")
    for sample, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = mask >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            stack = stacks[free]
            pack = stack.pop()
            if not stack:
                mask &= ~(1 << free)
        else:
            free, pack = pack_length, count
            count += 1
        packs[sample] = pack
        left = free - length
        if left:
            stacks.setdefault(left, []).append(pack)
            mask |= 1 << left
    return packs


def members(packs: np.ndarray) -> list[np.ndarray]:
    """Return the samples of each pack, in their order."""
    order = np.argsort(packs, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(packs[order])) + 1) if len(order) else []


def fill(lengths: np.ndarray, pack_length: int) -> float:
    """Return the share of the packs' tokens that are samples, 0 to 1."""
    if not len(lengths):
        return 0.0
    packs = int(best_fit(lengths, pack_length).max()) + 1
    return int(lengths.sum()) / (pack_length * packs)
