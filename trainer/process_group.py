"""Join the ranks: environment, allocators, DeepSpeed's ops and patches, the process group."""

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.config.ds_config import DeepSpeedConfig
from trainer.distributed import free_port, local_rank, ranks_on_this_machine
from trainer.errors import RunError
from trainer.system import hardware, ops


@dataclass(frozen=True)
class Ranks:
    """world: ranks of the run. here: those on this machine. local: the number of this one here."""

    world: int
    here: int
    local: int


def join(config: DeepSpeedConfig, gpu: bool, fetch_ahead: bool) -> Ranks:
    """Join the ranks of the run. fetch_ahead: see engine.patches.apply.

    This comes before TrainingArguments, or DeepSpeed would take the number of CPU ranks for 1.
    """
    _set_environment()
    import torch

    here, local = ranks_on_this_machine(), local_rank()
    if "OMP_NUM_THREADS" not in os.environ:
        # Without this every rank's CPU Adam takes all cores at once.
        threads = max(1, len(os.sched_getaffinity(0)) // here)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if gpu:
        hardware.set_allocators(torch)
        if local >= torch.cuda.device_count():
            raise RunError(
                "more ranks than GPUs",
                found=f"rank {local} of this machine, {torch.cuda.device_count()} GPU(s)",
                fix="deepspeed --num_gpus N, or GPUS=N with make",
            )
        torch.cuda.set_device(local)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ops.use_own_ninja()
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    if local == 0:  # the other ranks wait where they join
        ops.ensure(ops.needed(config.device("optimizer"), config.device("param"), here, gpu))
    from trainer.engine import patches

    patches.apply(fetch_ahead)
    deepspeed.init_distributed("nccl" if gpu else "gloo", verbose=False)
    if not gpu:
        _remove_shared_memory_name(torch.distributed.get_rank())
        torch.distributed.barrier()
    return Ranks(torch.distributed.get_world_size(), here, local)


def _set_environment() -> None:
    """Let a process that no launcher started be a world of its own."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        # Nobody else has to know it: a free port, so that a second run here does not fail on it.
        MASTER_PORT=str(free_port()),
    )


def _remove_shared_memory_name(rank: int) -> None:
    """Remove the name of the 66 MiB that each CPU rank shares: DeepSpeed never does.

    Called once all ranks have mapped them: then the names are not needed.
    """
    import torch

    torch.distributed.barrier()
    parts = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank)
    name = "_".join(map(str, ("deepspeed_allreduce_buffer", *parts)))
    Path("/dev/shm", name).unlink(missing_ok=True)
