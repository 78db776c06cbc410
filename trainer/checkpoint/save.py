"""Save a run: all ranks write a checkpoint under a temporary name, then it becomes visible."""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as safetensors_bytes
from transformers import TrainerState

from trainer.checkpoint import contents, files
from trainer.checkpoint.files import Json
from trainer.console import say
from trainer.distributed import broadcast_object, is_main_process, on_all_ranks
from trainer.engine.optimizer_state import OptimizerState
from trainer.errors import FAILED, RunError
from trainer.run_dir import RunIdentity


@dataclass
class Checkpointer:
    """Saves one run.

    directory: the run's. identity: which run and line it is. limit: checkpoints that are kept
    besides the best by evaluation loss, or None for all. description: keys of every manifest:
    settings, versions, data, model, base. seconds: that the last save took.
    """

    directory: Path
    identity: RunIdentity
    limit: int | None
    description: Json
    seconds: float | None = None
    # One thread deletes: to free gigabytes takes a file system longer than a step should wait.
    deletions: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def save(self, engine: Any, trainer_state: TrainerState, position: Json) -> Path | None:
        """Write checkpoint-<step> and return its path. All ranks call it.

        position: more keys of the manifest, see contents.position. Where the checkpoint cannot be
        written, print why, leave the earlier ones and return None. Raises RunError where what is to
        be saved is damaged or not finite.
        """
        began = time.monotonic()
        step = trainer_state.global_step
        target = self.directory / f"checkpoint-{step}"
        if broadcast_object(is_main_process() and self._is_saved(target)):
            return target  # a resumed run comes to this step again
        work = broadcast_object(files.temporary(self.directory, self.identity, step))
        state = OptimizerState(engine)
        try:
            self._on_all_ranks(lambda: is_main_process() and self._make_folder(work))
            text = json.dumps(asdict(trainer_state), indent=1, sort_keys=True)
            entries = self._on_all_ranks(lambda: _write_files(work, engine, state, text))
            content = {
                "step": step,
                "run": asdict(self.identity),
                "world_size": dist.get_world_size(),
                "files": {name: entry for rank in entries for name, entry in rank.items()},
                "parameters": state.shapes,
                "kinds": state.state_keys(0),
                "scalars": state.scalars(),
                **position,
                **self.description,
            }
            self._on_all_ranks(lambda: is_main_process() and files.publish(work, target, content))
            if is_main_process() and self.limit is not None:
                files.rotate(self.directory, self.limit, target, self.identity)
        except RunError as error:
            if error.code == FAILED:  # not the disk that is written to
                raise
            say(f"{target.name} was not saved: {error}; earlier checkpoints are untouched")
            return None
        finally:
            if is_main_process():
                self._delete_leftovers()
        self.seconds = time.monotonic() - began
        dist.barrier()
        return target

    def _is_saved(self, target: Path) -> bool:
        """Return whether this step of this line stands there, as it was written."""
        saved = files.read_whole(target)
        return saved is not None and self.identity.owns(saved.manifest)

    def _on_all_ranks(self, step: Callable[[], Any]) -> list[Any]:
        """Run a step on all ranks and return their results. An OSError becomes a RunError."""

        def run() -> Any:
            try:
                return step()
            except OSError as error:
                raise RunError(f"{self.directory}: {error.strerror}") from None

        return on_all_ranks(run)

    def _make_folder(self, work: Path) -> None:
        self._delete_leftovers().result()
        work.mkdir()

    def _delete_leftovers(self) -> Future:
        return self.deletions.submit(files.remove_leftovers, self.directory, self.identity)

    def finish(self) -> None:
        """Wait until the rotated checkpoints are deleted. No save comes after it."""
        self.deletions.shutdown()


def _write_files(work: Path, engine: Any, state: OptimizerState, trainer_state: str) -> Json:
    """Write the files of this rank. Return their entries in the manifest."""
    files.kill_point("before-parts")
    rank = dist.get_rank()
    chunks: dict[str, files.Chunks] = {
        files.SHARD.format(rank, i): files.shard_chunks(state, i)
        for i in range(len(state.sub_groups))
    }
    chunks[files.RNG.format(rank)] = [json.dumps(contents.rng_state()).encode()]
    if is_main_process():
        chunks[files.TRAINER_STATE] = [trainer_state.encode()]
        if buffers := persistent_buffers(engine.module):
            chunks[files.BUFFERS] = [safetensors_bytes(buffers)]
    # Two at once: while one waits for the disk at its end, the other is copied and hashed.
    with ThreadPoolExecutor(2) as pool:
        entries = pool.map(lambda name: files.write_file(work / name, chunks[name]), chunks)
        return dict(zip(chunks, entries))


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to the model's state, by name, on the CPU."""
    saved = model.state_dict().keys()
    return {name: b.contiguous().cpu() for name, b in model.named_buffers() if name in saved}
