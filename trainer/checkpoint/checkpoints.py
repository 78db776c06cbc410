"""Checkpoints: written whole and verified, or not visible; read back at any number of ranks. No pickle anywhere.

checkpoint-<step>/ holds a manifest.json (every file with bytes and hash, parameters and shapes, settings, versions),
trainer_state.json, rng-<rank>.json, and safetensors parts: one per rank and optimizer sub-group, with each parameter's share without
padding as a flat tensor `<kind>/<parameter>`; the file's metadata gives its first element within the whole parameter. So parts do not
depend on the world size.
"""

import base64
import json
import os
import random
import shutil
import struct
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from trainer.checkpoint.resume import checkpoints
from trainer.engine.optimizer_state import CHUNK, ZeroState
from trainer.errors import FAILED, RunError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "trainer_state.json"
_TEMPORARY = ".tmp-checkpoint-"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _point(name):
    """A named point of a save, where tests end the process: ZERO_OFFLOAD_KILL_AT=<name>[:<rank>]."""
    asked, _, rank = os.environ.get("ZERO_OFFLOAD_KILL_AT", "").partition(":")
    if asked == name and rank in ("", str(dist.get_rank())):
        os.kill(os.getpid(), 9)


def gathered(value):
    """[value of rank 0, value of rank 1, …] on every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_main(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# -- files ---------------------------------------------------------------------------------------------------------------
def write_file(path, chunks):
    """Write and fsync a file. Returns {"bytes", "xxh3_128"}."""
    hashed, size, started = xxhash.xxh3_128(), 0, 0
    with open(path, "wb", buffering=0) as file:
        for chunk in chunks:
            hashed.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
            size += len(chunk)
            if (
                size - started >= 4 * CHUNK
            ):  # the disk begins now, and what it has leaves the page cache
                os.posix_fadvise(file.fileno(), started, size - started, os.POSIX_FADV_DONTNEED)
                started = size
        os.fsync(file.fileno())
    return {"bytes": size, "xxh3_128": hashed.hexdigest()}


def _sync_folder(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _part(state, i):
    """The bytes of one sub-group's safetensors file."""
    size, at, header, order = state.itemsize(), 0, {}, []
    for kind in state.kinds(i):
        for piece in state.groups[i]:
            if piece.numel:
                end = at + piece.numel * size
                header[f"{kind}/{piece.name}"] = {
                    "dtype": _DTYPES[state.dtype()],
                    "shape": [piece.numel],
                    "data_offsets": [at, end],
                }
                order.append((kind, piece))
                at = end
    header["__metadata__"] = {piece.name: str(piece.start) for piece in state.groups[i]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for kind, piece in order:
        yield from state.chunks(i, kind, piece)


def verify_file(path, known):
    """What is wrong with a file of a checkpoint, in words; None where it is as it was written."""
    try:
        size = path.stat().st_size
        if size != known["bytes"]:
            return f"{path.name} has {size:,} bytes; needed: {known['bytes']:,}"
        hashed = xxhash.xxh3_128()
        with open(path, "rb", buffering=0) as file:
            block = bytearray(CHUNK)
            while count := file.readinto(block):
                hashed.update(memoryview(block)[:count])
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return (
        None
        if hashed.hexdigest() == known["xxh3_128"]
        else f"{path.name} is not what was written (its hash differs)"
    )


def read_manifest(folder):
    """(manifest, None), or (None, what is wrong with it)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own = manifest.pop("hash")
        if own != _digest(manifest):
            return None, f"{MANIFEST} is not what was written (its hash differs)"
        if manifest["format"] != FORMAT:
            return None, f"{MANIFEST}: format {manifest['format']}; needed: {FORMAT}"
        if any(Path(name).name != name for name in manifest["files"]):
            return None, f"{MANIFEST} names files outside the checkpoint"
        return manifest, None
    except FileNotFoundError:
        return None, f"no {MANIFEST}: it was never finished, or is no checkpoint of this trainer"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{MANIFEST} is not readable ({type(error).__name__})"


def _digest(value):
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def listed(directory):
    """Checkpoint folders of a run, the newest first."""
    return [folder for _, folder in checkpoints(directory)]


def supersede(directory, step):
    """Put aside the checkpoints after `step`: the run goes another way from there, and must not take up the old one again."""
    return [
        path.rename(path.with_name(f"superseded-{path.name}-{uuid.uuid4().hex[:8]}"))
        for later, path in checkpoints(directory)
        if later > step
    ]


# -- save ----------------------------------------------------------------------------------------------------------------
class Checkpointer:
    """Saves one run. directory: the run's; limit: checkpoints kept (the best by evaluation loss comes on top)."""

    def __init__(self, directory, limit, describe):
        """describe: what the manifest says besides the files: settings, versions, data."""
        self.directory, self.limit, self.describe = Path(directory), limit, describe
        self.seconds = None  # that the last save took
        self.removal = None

    def save(self, trainer):
        """Write checkpoint-<step>. All ranks call it. Returns its path, or None, with the reason printed, where it could not be
        written: what was there before is still there."""
        began, step = time.monotonic(), trainer.state.global_step
        target, main = self.directory / f"checkpoint-{step}", dist.get_rank() == 0
        if from_main(main and self._is_whole(target)):
            return target  # a resumed run comes by again
        failure, work, entries = None, None, {}
        if main:
            try:
                self.finish()
                self._clean()
                work = self.directory / f"{_TEMPORARY}{step}-{uuid.uuid4().hex[:8]}"
                work.mkdir()
            except OSError as error:
                failure = f"{self.directory}: {error.strerror}"
        work, failure = from_main((work, failure))
        state = ZeroState(trainer.model_wrapped)
        if not failure:
            failure, entries = self._write_parts(trainer, state, work)
        reports = gathered((failure, entries, state.shapes))
        failure = next((f for f, _, _ in reports if f), None)
        if main and not failure:
            files = {name: entry for _, own, _ in reports for name, entry in own.items()}
            failure = self._commit(trainer, state, work, target, files)
        failure = from_main(failure)
        if failure:
            if main:
                shutil.rmtree(work, ignore_errors=True)
                print(
                    f"checkpoint-{step} was not saved: {failure}; earlier checkpoints are untouched",
                    flush=True,
                )
            return None
        if main:
            self._rotate(target)
        self.seconds = time.monotonic() - began
        dist.barrier()
        return target

    def _is_whole(self, folder):
        if not folder.exists():
            return False
        manifest, wrong = read_manifest(folder)
        return not wrong and all(
            verify_file(folder / name, known) is None for name, known in manifest["files"].items()
        )

    def _clean(self):
        """Remove what killed saves left."""
        for old in self.directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(old, ignore_errors=True)

    def _write_parts(self, trainer, state, work):
        rank, entries = dist.get_rank(), {}
        try:
            _point("before-parts")
            # Two at once: while one waits for the disk at its end, the other is copied and hashed.
            with ThreadPoolExecutor(2) as pool:
                names = [
                    f"rank-{rank:05}-group-{i:05}.safetensors" for i in range(len(state.groups))
                ]
                for name, entry in zip(
                    names,
                    pool.map(
                        lambda i: write_file(work / names[i], _part(state, i)), range(len(names))
                    ),
                ):
                    entries[name] = entry
                    _point("after-a-part")
            entries[f"rng-{rank:05}.json"] = write_file(
                work / f"rng-{rank:05}.json", [json.dumps(_rng_state()).encode()]
            )
            if rank == 0:
                module = trainer.model_wrapped.module
                buffers = {n: b for n, b in module.named_buffers() if _is_saved(module, n)}
                if buffers:
                    from safetensors.torch import save

                    entries["buffers.safetensors"] = write_file(
                        work / "buffers.safetensors",
                        [save({n: b.contiguous().cpu() for n, b in buffers.items()})],
                    )
        except OSError as error:
            return f"{work.parent}: {error.strerror}", entries
        except RunError as error:
            return str(error), entries
        return None, entries

    def _commit(self, trainer, state, work, target, files):
        """Rank 0: the manifest, then the name. What is wrong, or None."""
        try:
            text = trainer.state_json()
            files[STATE] = write_file(work / STATE, [text.encode()])
            last = trainer.evaluated if trainer.evaluated_at == trainer.state.global_step else None
            manifest = {
                "format": FORMAT,
                "step": trainer.state.global_step,
                "world_size": dist.get_world_size(),
                "files": files,
                "parameters": state.shapes,
                "kinds": state.kinds(0),
                "scalars": state.scalars(),
                "eval_loss": last and last["eval_loss"],
                **trainer.progress(),
                **self.describe,
            }
            manifest = json.loads(json.dumps(manifest))
            _point("before-manifest")
            write_file(
                work / MANIFEST,
                [json.dumps({**manifest, "hash": _digest(manifest)}, indent=1).encode()],
            )
            _sync_folder(work)
            _point("before-rename")
            if target.exists():  # one that was found damaged
                os.rename(target, self.directory / f"{_TEMPORARY}damaged-{uuid.uuid4().hex[:8]}")
            os.rename(work, target)
            _sync_folder(self.directory)
            _point("after-rename")
            self._clean()
        except OSError as error:
            return f"{self.directory}: {error.strerror}"
        return None

    def _rotate(self, newest):
        """Keep the newest `limit` checkpoints and the best one."""
        if self.limit is None:
            return
        found = [(p, read_manifest(p)[0]) for p in listed(self.directory)]
        whole = [(p, m) for p, m in found if m]
        losses = [(m["eval_loss"], p) for p, m in whole if m["eval_loss"] is not None]
        kept = {
            newest,
            *(p for p, _ in whole[: self.limit]),
            *([min(losses, key=lambda pair: pair[0])[1]] if losses else []),
        }
        doomed = {
            path: self.directory / f"{_TEMPORARY}old-{uuid.uuid4().hex[:8]}"
            for path, _ in whole
            if path not in kept
        }
        for path, away in doomed.items():
            os.rename(path, away)  # gone at once: half of a checkpoint is never seen
            _point("during-rotation")
        if (
            doomed
        ):  # freeing gigabytes takes a file system long enough to be seen in the time of a step
            self.removal = threading.Thread(
                target=lambda: [shutil.rmtree(away, True) for away in doomed.values()], daemon=True
            )
            self.removal.start()

    def finish(self):
        """Wait until what was rotated away is gone."""
        if self.removal:
            self.removal.join()


def _is_saved(module, name):
    owner, _, own = name.rpartition(".")
    return own not in module.get_submodule(owner)._non_persistent_buffers_set


def _rng_state():
    numpy_state = np.random.get_state()
    result = {
        "python": random.getstate(),
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": base64.b64encode(torch.random.get_rng_state().numpy().tobytes()).decode(),
    }
    if torch.cuda.is_available():
        result["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return result


def restore_rng(folder):
    """Set this rank's generators as they were; a rank that the saved run did not have keeps its seed."""
    path = Path(folder) / f"rng-{dist.get_rank():05}.json"
    if not path.exists():
        return
    saved = json.loads(path.read_text())
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))

    def tensor(text):
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.random.set_rng_state(tensor(saved["torch"]))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(saved["cuda"]))


# -- resume --------------------------------------------------------------------------------------------------------------
def choose(directory, asked, say):
    """(folder, manifest) of the checkpoint to go on from, verified by all ranks together; (None, None) where `auto` finds none.

    asked: "auto" takes the newest that is whole and says which it skipped and why; a path must be whole.
    """
    auto = asked == "auto"
    candidates = from_main(listed(directory) if auto else [Path(asked)])
    skipped = []
    for folder in candidates:
        if not auto and not folder.is_dir():
            raise RunError(
                f"no checkpoint {folder}",
                found=", ".join(p.name for p in listed(directory)) or "none in the run",
                needed="a checkpoint-<step> directory, or auto",
            )
        manifest, wrong = from_main(read_manifest(folder))
        if not wrong:
            began, names = time.monotonic(), sorted(manifest["files"])
            mine = names[dist.get_rank() :: dist.get_world_size()]
            wrong = next(
                (w for name in mine if (w := verify_file(folder / name, manifest["files"][name]))),
                None,
            )
            wrong = next((w for w in gathered(wrong) if w), None)
        if not wrong:
            seconds, size = (
                time.monotonic() - began,
                sum(f["bytes"] for f in manifest["files"].values()),
            )
            say(
                f"resume: {folder}, verified ({size / 1e9:.2f} GB at {size / 1e9 / max(seconds, 1e-3):.1f} GB/s)"
            )
            return folder, manifest
        skipped.append(f"{folder.name}: {wrong}")
        if not auto:
            raise RunError(
                f"the checkpoint {folder} cannot be used",
                found=wrong,
                needed="the files as they were written",
                fix="--resume_from_checkpoint auto takes the newest one that is whole",
            )
        say(f"resume: skipped {skipped[-1]}")
    if skipped:
        raise RunError(
            f"no checkpoint of {directory} is whole",
            found="; ".join(skipped),
            fix="another --run_name starts anew; move the damaged ones away to start this run from its beginning",
        )
    return None, None


class _Index:
    """Where each parameter's elements lie in the parts of a checkpoint."""

    def __init__(self, folder, manifest):
        self.places, self.handles = {}, {}
        for name in sorted(manifest["files"]):
            if not name.startswith("rank-"):
                continue
            with open(folder / name, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            starts = header.pop("__metadata__")
            for key, entry in header.items():
                kind, _, parameter = key.partition("/")
                begin, end = entry["data_offsets"]
                size = (end - begin) // entry["shape"][0]
                self.places.setdefault((kind, parameter), []).append(
                    (int(starts[parameter]) * size, end - begin, folder / name, 8 + length + begin)
                )

    def fill(self, kind, piece, at, view, size):
        """Read bytes [at, at + len(view)) of a slice, wherever they are."""
        begin = piece.start * size + at
        missing = len(view)
        for start, length, path, offset in self.places[kind, piece.name]:
            first, last = max(begin, start), min(begin + len(view), start + length)
            if first < last:
                if path not in self.handles:
                    self.handles[path] = os.open(path, os.O_RDONLY)
                target, place = view[first - begin : last - begin], offset + first - start
                while target:
                    count = os.preadv(self.handles[path], [target], place)
                    if not count:
                        raise OSError(5, f"{path} ends too early")
                    target, place = target[count:], place + count
                missing -= last - first
        if missing:
            raise RunError(
                f"the checkpoint lacks a part of {piece.name}",
                found=f"{missing:,} bytes of {kind} are in no file",
                code=FAILED,
            )

    def close(self):
        for handle in self.handles.values():
            os.close(handle)


def check_fits(shapes, manifest, folder):
    """Refuse a checkpoint of another model or adapter."""
    saved = {name: list(shape) for name, shape in manifest["parameters"].items()}
    if saved == shapes:
        return
    rows = [
        f"{name}: {saved.get(name, 'not there')} saved, {shapes.get(name, 'not there')} here"
        for name in sorted({**saved, **shapes})
        if saved.get(name) != shapes.get(name)
    ]
    more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
    raise RunError(
        f"{folder} is of another model, method or adapter shape",
        found="; ".join(rows[:5]) + more,
        needed="the --model_name_or_path, --method and --lora_… of the run that saved it",
    )


def restore(engine, folder, manifest, space=None):
    """Set weights, moments and counters of this rank from the checkpoint's parts. space: the run's SwapSpace, where there is one."""
    state = ZeroState(engine, space)
    check_fits(state.shapes, manifest, folder)
    index, size = _Index(folder, manifest), state.itemsize()
    if manifest["kinds"][1:] and sorted(manifest["kinds"][1:]) != ["exp_avg", "exp_avg_sq"]:
        raise RunError(
            f"{folder} was saved with another optimizer",
            found=", ".join(manifest["kinds"]),
            needed="Adam's moments",
        )
    state.begin_restore()
    for i in range(len(state.groups)):
        state.restore(
            i,
            manifest["kinds"],
            manifest["scalars"],
            lambda kind, piece, at, view: index.fill(kind, piece, at, view, size),
        )
    state.end_restore(manifest["scalars"].get("step", 0))
    index.close()
    if "buffers.safetensors" in manifest["files"]:
        from safetensors.torch import load_file

        own = dict(engine.module.named_buffers())
        for name, value in load_file(folder / "buffers.safetensors").items():
            own[name].copy_(value)
    engine.global_steps = manifest["step"]
    dist.barrier()
