"""The files of a checkpoint: written whole and verified, or not visible. No torch, no pickle.

checkpoint-<step>/ holds
  rank-<rank>-group-<i>.safetensors  a shard of the optimizer's state
  rng-<rank>.json                    the random generators of a rank
  buffers.safetensors                the model's persistent buffers, where it has any
  trainer_state.json                 the state of transformers' Trainer
  manifest.json                      size and hash of these files; parameters, settings, versions
"""

import json
import math
import os
import shutil
import signal
import struct
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from data.files import hash_file
from trainer.errors import FAILED, RunError

if TYPE_CHECKING:
    from trainer.engine.optimizer_state import OptimizerState, ShardSlice

FORMAT = 1
MANIFEST, TRAINER_STATE, BUFFERS = "manifest.json", "trainer_state.json", "buffers.safetensors"
RNG = "rng-{:05}.json"  # rank
SHARD = "rank-{:05}-group-{:05}.safetensors"  # rank, sub-group
BLOCK_BYTES = 2**24
Chunks = Iterable[bytes | memoryview]
Json = dict[str, Any]
_PREFIX = "checkpoint-"
_TEMPORARY = ".tmp-checkpoint-"
_CHANGED = "is not what was written (its hash differs)"
_DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def kill_point(name: str) -> None:
    """End the process where a test says so: ZERO_OFFLOAD_KILL_AT=<name>[:<rank>]."""
    if os.environ.get("ZERO_OFFLOAD_KILL_AT") in (name, f"{name}:{os.environ.get('RANK', 0)}"):
        os.kill(os.getpid(), signal.SIGKILL)


# -- one file ----------------------------------------------------------------------------------
def write_file(path: Path, chunks: Chunks) -> Json:
    """Write and fsync a file. Return its entry in the manifest: {"bytes", "xxh3_128"}."""
    digest = xxhash.xxh3_128()
    size = flushed = 0
    with open(path, "wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += file.write(chunk)
            # The disk begins now, and what it has written leaves the page cache.
            if size - flushed >= 4 * BLOCK_BYTES:
                os.posix_fadvise(file.fileno(), flushed, size - flushed, os.POSIX_FADV_DONTNEED)
                flushed = size
        file.flush()
        os.fsync(file.fileno())
    kill_point("after-a-part")
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def verify_file(path: Path, entry: Json) -> str | None:
    """Return what is wrong with a file, as a sentence; None where it is as it was written."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path.name} has {size:,} bytes; needed: {entry['bytes']:,}"
        digest = hash_file(path)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if digest == entry["xxh3_128"] else f"{path.name} {_CHANGED}"


# -- one checkpoint ----------------------------------------------------------------------------
@dataclass
class SavedCheckpoint:
    """A checkpoint whose manifest is as it was written. Its other files may be damaged."""

    folder: Path
    manifest: Json

    @property
    def step(self) -> int:
        """The optimizer steps that were made."""
        return self.manifest["step"]

    def first_damage(self, names: Iterable[str]) -> str | None:
        """Return what is wrong with the first of these files that is damaged, or None."""
        entries = self.manifest["files"]
        problems = (verify_file(self.folder / name, entries[name]) for name in names)
        return next(filter(None, problems), None)


def read_checkpoint(folder: Path) -> SavedCheckpoint | str:
    """Return the checkpoint in a folder, or the sentence that says why its manifest is no good."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("hash") != _digest(manifest):
            return f"{MANIFEST} {_CHANGED}"
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: format {manifest['format']}; needed: {FORMAT}"
        if any(Path(name).name != name for name in manifest["files"]):
            return f"{MANIFEST} names files outside the checkpoint"
    except FileNotFoundError:
        return f"no {MANIFEST}: it was never finished, or is no checkpoint of this trainer"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({type(error).__name__})"
    return SavedCheckpoint(folder, manifest)


def is_whole(folder: Path) -> bool:
    """Return whether a folder is a checkpoint with all its files as they were written."""
    saved = read_checkpoint(folder)
    return isinstance(saved, SavedCheckpoint) and not saved.first_damage(saved.manifest["files"])


def publish(work: Path, target: Path, content: Json) -> None:
    """Write the manifest into the folder and rename it: from then on the checkpoint is visible.

    content: the manifest without its format and hash. Raises OSError.
    """
    kill_point("before-manifest")
    # The hash is of what a reader gets: JSON turns tuples into lists and keys into strings.
    manifest = json.loads(json.dumps({"format": FORMAT, **content}))
    text = json.dumps({**manifest, "hash": _digest(manifest)}, indent=1)
    write_file(work / MANIFEST, [text.encode()])
    _sync_folder(work)
    kill_point("before-rename")
    if target.exists():  # but is damaged
        os.rename(target, temporary(target.parent, "damaged"))
    os.rename(work, target)
    _sync_folder(target.parent)
    kill_point("after-rename")


def _digest(manifest: Json) -> str:
    return xxhash.xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- one shard ---------------------------------------------------------------------------------
# A safetensors file of one rank and optimizer sub-group. It holds the rank's slice of each
# parameter, without ZeRO's padding, as a flat tensor `<state key>/<parameter>`. Its metadata gives
# the slice's first element within the whole parameter, so any number of ranks can read the shards.
def shard_chunks(state: "OptimizerState", i: int) -> Iterator[bytes | memoryview]:
    """Yield the content of sub-group i's shard."""
    slices = [s for s in state.sub_groups[i] if s.numel]
    contents = [(state_key, s) for state_key in state.state_keys(i) for s in slices]
    header: Json = {}
    end = 0
    for state_key, shard_slice in contents:
        begin, end = end, end + shard_slice.numel * state.dtype.itemsize
        header[f"{state_key}/{shard_slice.name}"] = {
            "dtype": _DTYPES[str(state.dtype)],
            "shape": [shard_slice.numel],
            "data_offsets": [begin, end],
        }
    header["__metadata__"] = {s.name: str(s.start) for s in state.sub_groups[i]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for state_key, shard_slice in contents:
        yield from state.read(i, state_key, shard_slice)


class StoredSlice(NamedTuple):
    """A slice of a parameter's state in a shard. The numbers are bytes."""

    start: int  # within the whole parameter
    size: int
    path: Path
    offset: int  # within the file


class ShardIndex:
    """Finds the bytes of each parameter in the shards of a checkpoint, whichever rank wrote them.

    itemsize: bytes of an element.
    """

    def __init__(self, saved: SavedCheckpoint, itemsize: int) -> None:
        self.itemsize = itemsize
        self.slices = defaultdict(list)  # {(state key, parameter): [StoredSlice, ...]}
        for shard in sorted(saved.manifest["files"]):
            if not shard.startswith("rank-"):
                continue
            path = saved.folder / shard
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            starts = header.pop("__metadata__")
            for name, tensor in header.items():
                state_key, _, parameter = name.partition("/")
                begin, end = tensor["data_offsets"]
                start = int(starts[parameter]) * itemsize
                stored = StoredSlice(start, end - begin, path, 8 + length + begin)
                self.slices[state_key, parameter].append(stored)

    def fill(self, state_key: str, shard_slice: "ShardSlice", offset: int, view: Any) -> None:
        """Read the slice's bytes from `offset` on into the view.

        Raises RunError where the shards do not have all of them.
        """
        begin = shard_slice.start * self.itemsize + offset
        missing = len(view)
        for stored in self.slices[state_key, shard_slice.name]:
            first = max(begin, stored.start)
            last = min(begin + len(view), stored.start + stored.size)
            if first < last:
                with open(stored.path, "rb") as file:
                    file.seek(stored.offset + first - stored.start)
                    missing -= file.readinto(view[first - begin : last - begin])
        if missing:
            raise RunError(
                f"the checkpoint lacks a part of {shard_slice.name}",
                found=f"{missing:,} bytes of {state_key} are in no file",
                code=FAILED,
            )


# -- the checkpoints of a run ------------------------------------------------------------------
def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return [(step, folder), ...] of a run's checkpoints, the newest first."""
    folders = {p.name.removeprefix(_PREFIX): p for p in directory.glob(f"{_PREFIX}*") if p.is_dir()}
    return sorted(((int(n), p) for n, p in folders.items() if n.isdecimal()), reverse=True)


def rotate(directory: Path, limit: int, latest: Path) -> None:
    """Hide all checkpoints but the newest `limit`, the best by evaluation loss, and the latest.

    latest: the one that was just saved. remove_leftovers then deletes the hidden ones.
    """
    losses = {}  # the newest first; infinite where the step was not evaluated
    for _, folder in checkpoints(directory):
        saved = read_checkpoint(folder)
        if isinstance(saved, SavedCheckpoint):
            loss = saved.manifest["eval_loss"]
            losses[folder] = math.inf if loss is None else loss
    best = min(losses, key=losses.__getitem__, default=latest)
    for folder in losses.keys() - {latest, best, *list(losses)[:limit]}:
        # Renamed at once: nobody ever sees half of a checkpoint.
        os.rename(folder, temporary(directory, "old"))
        kill_point("during-rotation")


def supersede(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints after a step, and return their new paths.

    The run goes on from that step with other results; `auto` must not take the old ones again.
    """
    return [
        path.rename(path.with_name(f"superseded-{path.name}-{uuid.uuid4().hex[:8]}"))
        for later, path in checkpoints(directory)
        if later > step
    ]


def temporary(directory: Path, purpose: object) -> Path:
    """Return a new name in the run directory that remove_leftovers finds."""
    return directory / f"{_TEMPORARY}{purpose}-{uuid.uuid4().hex[:8]}"


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary folders: of killed saves, and of checkpoints that were rotated away."""
    for folder in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)
