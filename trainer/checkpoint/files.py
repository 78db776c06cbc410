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
import re
import shutil
import signal
import struct
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from data.files import STORED_DTYPES, hash_file, in_place, is_own, read_json, safetensors_header
from trainer.errors import FAILED, RunError
from trainer.run_dir import RunIdentity

if TYPE_CHECKING:
    from trainer.engine.optimizer_state import OptimizerState, ShardSlice

FORMAT = 3  # 1 had no run's identity; 2 neither the model's definition nor the guards' counters
KEYS: dict[str, tuple[type, ...]] = {
    "base": (str, NoneType),
    "data": (str,),
    "eval_loss": (float, int, NoneType),
    "evaluated": (list, NoneType),
    "files": (dict,),
    "kinds": (list,),
    "last_good_step": (int,),
    "loss_scaler": (dict,),
    "model": (dict,),
    "parameters": (dict,),
    "precision": (str,),
    "run": (dict,),
    "scalars": (dict,),
    "schedule": (list,),
    "scheduler": (dict,),
    "settings": (dict,),
    "skipped_steps": (int,),
    "step": (int,),
    "tokens": (int,),
    "update_rows": (int,),
    "versions": (dict,),
    "world_size": (int,),
}
MANIFEST, TRAINER_STATE, BUFFERS = "manifest.json", "trainer_state.json", "buffers.safetensors"
RNG = "rng-{:05}.json"  # rank
SHARD = "rank-{:05}-group-{:05}.safetensors"  # rank, sub-group
BLOCK_BYTES = 2**24
Chunks = Iterable[bytes | memoryview]
Json = dict[str, Any]
_PREFIX = "checkpoint-"
_TEMPORARY = ".tmp-checkpoint-"
_NAME = re.compile(r"[\w-]+\.(json|safetensors)")  # of a file: nothing that leaves the folder
_CHANGED = "is not what was written (its hash differs)"


def kill_point(name: str) -> None:
    """End the process where a test says so: ZERO_OFFLOAD_KILL_AT=<name>[:<rank>]."""
    if os.environ.get("ZERO_OFFLOAD_KILL_AT") in (name, f"{name}:{os.environ.get('RANK', 0)}"):
        os.kill(os.getpid(), signal.SIGKILL)


# -- one file ----------------------------------------------------------------------------------
def write_file(path: Path, chunks: Chunks) -> Json:
    """Write and fsync a file. Return its entry in the manifest: {"bytes", "xxh3_128"}."""
    digest = xxhash.xxh3_128()
    size = flushed = 0
    with open(path, "wb", opener=in_place) as file:
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
        manifest = read_json(folder / MANIFEST)
        if manifest.pop("hash") != _digest(manifest):
            return f"{MANIFEST} {_CHANGED}"
        if manifest["format"] != FORMAT:
            saved_by = (manifest.get("versions") or {}).get("zero-offload-trainer", "unknown")
            return (
                f"{MANIFEST} has format {manifest['format']}, saved by version {saved_by} of this "
                f"trainer; needed: {FORMAT}"
            )
        if missing := KEYS - manifest.keys():
            return f"{MANIFEST} lacks {', '.join(sorted(missing))}"
        if wrong := [k for k, kinds in KEYS.items() if not isinstance(manifest[k], kinds)]:
            return f"{MANIFEST} has another type of {', '.join(wrong)}"
        RunIdentity.read(manifest["run"])
        for name, entry in manifest["files"].items():
            if not _NAME.fullmatch(name):
                return f"{MANIFEST} names files outside the checkpoint"
            if not (isinstance(entry["bytes"], int) and isinstance(entry["xxh3_128"], str)):
                return f"{MANIFEST} has no size and hash of {name}"
        named = folder.name.removeprefix(_PREFIX)
        if named != folder.name and named.isdecimal() and int(named) != manifest["step"]:
            return f"it is a checkpoint of step {manifest['step']} under another name"
    except FileNotFoundError:
        if folder.is_symlink() and not folder.exists():
            return f"it is a link to {os.readlink(folder)}, where nothing is"
        return f"no {MANIFEST}: it was never finished, or is no checkpoint of this trainer"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is not readable ({type(error).__name__})"
    return SavedCheckpoint(folder, manifest)


def read_whole(folder: Path) -> SavedCheckpoint | None:
    """Return the checkpoint in a folder where all its files are as they were written."""
    saved = read_checkpoint(folder)
    if isinstance(saved, str) or saved.first_damage(saved.manifest["files"]):
        return None
    return saved


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
    if os.path.lexists(target):
        put_aside(target, "superseded" if read_whole(target) else "damaged")
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
    """Yield the content of sub-group i's shard.

    Raises RunError (FAILED) where a weight or a moment is not finite.
    """
    slices = [s for s in state.sub_groups[i] if s.numel]
    contents = [(state_key, s) for state_key in state.state_keys(i) for s in slices]
    header: Json = {}
    end = 0
    for state_key, shard_slice in contents:
        begin, end = end, end + shard_slice.numel * state.dtype.itemsize
        header[f"{state_key}/{shard_slice.name}"] = {
            "dtype": STORED_DTYPES[str(state.dtype).removeprefix("torch.")],
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
            header, data = safetensors_header(path)
            starts = header.pop("__metadata__")
            for name, tensor in header.items():
                state_key, _, parameter = name.partition("/")
                begin, end = tensor["data_offsets"]
                start = int(starts[parameter]) * itemsize
                stored = StoredSlice(start, end - begin, path, data + begin)
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
    """Return [(step, folder), ...] of a run's checkpoints, the newest first.

    A link whose target is gone is one too: it is named when it is passed over.
    """
    folders = {p.name.removeprefix(_PREFIX): p for p in directory.glob(f"{_PREFIX}*")}
    found = {n: p for n, p in folders.items() if p.is_dir() or p.is_symlink()}
    return sorted(((int(n), p) for n, p in found.items() if n.isdecimal()), reverse=True)


def rotate(directory: Path, limit: int, latest: Path, identity: RunIdentity) -> None:
    """Hide all checkpoints but the newest `limit`, the best by evaluation loss, and the latest.

    latest: the one that was just saved. identity: of the run; those of others count for nothing,
    and stay. remove_leftovers then deletes the hidden ones.
    """
    losses = {}  # the newest first; infinite where the step has no evaluation that is a number
    for _, folder in checkpoints(directory):
        saved = read_checkpoint(folder)
        if isinstance(saved, SavedCheckpoint) and identity.owns(saved.manifest):
            loss = saved.manifest["eval_loss"]
            losses[folder] = math.inf if loss is None or math.isnan(loss) else loss
    best = min(losses, key=losses.__getitem__, default=latest)
    for folder in losses.keys() - {latest, best, *list(losses)[:limit]}:
        # Renamed at once: nobody ever sees half of a checkpoint.
        os.rename(folder, temporary(directory, identity, "old"))
        kill_point("during-rotation")


def supersede(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints after a step, and return their new paths.

    The run goes on from that step with other results; `auto` must not take the old ones again.
    """
    later = [path for other, path in checkpoints(directory) if other > step]
    return [put_aside(path, "superseded") for path in later]


def put_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint to <why>-checkpoint-…: nothing takes, counts or deletes it any more."""
    return folder.rename(folder.with_name(f"{why}-{folder.name}-{uuid.uuid4().hex[:8]}"))


def commits(directory: Path) -> dict[str, int]:
    """Return {hash: step} of the checkpoints in a run directory: no two commits have one hash."""
    found = {}
    for step, folder in checkpoints(directory):
        try:
            found[read_json(folder / MANIFEST)["hash"]] = step
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def temporary(directory: Path, identity: RunIdentity, purpose: object) -> Path:
    """Return a new name in the run directory that remove_leftovers finds."""
    return directory / f"{_TEMPORARY}{identity.id}-{purpose}-{uuid.uuid4().hex[:8]}"


def remove_leftovers(directory: Path, identity: RunIdentity) -> None:
    """Delete the run's temporary folders: of killed saves, and of rotated checkpoints.

    identity: of the run. Those of others, and of other users, stay.
    """
    for folder in directory.glob(f"{_TEMPORARY}{identity.id}-*"):
        with suppress(OSError):
            if not is_own(folder, folder.lstat()):
                continue
            if folder.is_symlink():  # a checkpoint that somebody has put elsewhere: it stays there
                folder.unlink()
            else:
                shutil.rmtree(folder, ignore_errors=True)
