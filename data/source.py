"""Where the rows come from, and which of them validate. Imports no torch."""
import hashlib
import json
import math

from . import DataError, formats


def split(rows, wanted, seed, source):
    """(train rows, validation rows): `wanted` is a share below 1, a count, or 0.

    Rows with the same conversation stay on the same side: the split is decided on the content.
    """
    number = float(wanted)
    if number == 0:
        return rows, []
    groups = {}
    for row in rows:
        groups.setdefault(json.dumps(row.messages, sort_keys=True), []).append(row)
    count = round(number * len(rows)) if number < 1 else int(number)
    if not 0 < count < len(rows) or len(groups) < 2:
        raise DataError(f"validation_split {wanted} leaves nothing to train on or to validate with\n  found:  {len(rows)} rows, "
                        f"{len(groups)} different, in {source}\n  needed: a share or count that leaves rows on both sides")
    order = sorted(groups, key=lambda content: hashlib.sha256(f"{seed}{content}".encode()).digest())
    train, validation = [], []
    for i, content in enumerate(order):
        into_validation = len(validation) < count and (i < len(order) - 1)
        (validation if into_validation else train).extend(groups[content])
    return sorted(train, key=lambda r: r.line), sorted(validation, key=lambda r: r.line)


def load(train_path, validation_split, seed, samples):
    """(train rows, validation rows, their sources). `samples` is the folder with the bundled set, taken where no path is given."""
    if train_path is None:
        train_path = samples / "train.jsonl"
        validation_split = str(samples / "validation.jsonl") if validation_split is None else validation_split
    wanted = "0.05" if validation_split is None else str(validation_split)
    try:
        share = float(wanted)
    except ValueError:
        share = None
    if share is not None and not (math.isfinite(share) and (0 <= share < 1 or share.is_integer() and share > 0)):
        raise DataError(f"validation_split {wanted} is neither a share nor a count\n  needed: a file, 0 to 1, a whole number, or 0")
    if share is None:
        formats.find(wanted)
    rows = formats.read(train_path)
    if share is None:
        return rows, formats.read(wanted), (str(train_path), wanted)
    if validation_split is None and len(rows) < 20:
        return rows, [], (str(train_path), None)  # too small to give a share away unasked
    return (*split(rows, wanted, seed, train_path), (str(train_path), str(train_path)))
