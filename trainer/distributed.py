"""Talk between ranks. Importing it does not import torch."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.errors import RunError, script_line

if TYPE_CHECKING:
    import psutil
    import torch

T = TypeVar("T")
# What a launcher sets for each rank.
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT")
LAUNCHER = (*_NUMBERS, "MASTER_ADDR")


def _number(name: str, default: int) -> int:
    """Return a number of the environment. `check_launcher` refuses what is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def check_launcher() -> None:
    """Raise RunError where the environment does not describe a rank of a run."""
    given = {name: os.environ[name] for name in LAUNCHER if os.environ.get(name)}
    wrong = [f"{n}={given[n]}" for n in _NUMBERS if n in given and not given[n].isdecimal()]
    world = _number("WORLD_SIZE", 1)
    if world > 1:  # else the process is a world of its own
        names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        wrong += [f"no {name}" for name in names if name not in given]
    if wrong or not _number("RANK", 0) < world:
        found = ", ".join(wrong) or f"RANK={given.get('RANK', 0)}, WORLD_SIZE={world}"
        raise RunError(
            "the environment does not say which rank this is",
            found=found,
            needed="RANK < WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as launchers set "
            "them; or none of them",
            fix=f"start it with {script_line('supervise')}, or: unset {' '.join(LAUNCHER)}",
        )


def is_main_process() -> bool:
    """Return whether this is rank 0, which talks to the user."""
    return _number("RANK", 0) == 0


@cache
def first_rank_here() -> "psutil.Process | None":
    """Return the process of this machine's first rank, where the same launcher has started it."""
    import psutil

    try:
        for process in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error):  # it has ended
                if process.environ().get("LOCAL_RANK") == "0":
                    return process
    except psutil.Error:
        pass
    return None


def first_rank_ends(seconds: float) -> bool:
    """Return whether this machine's first rank has ended, or does so in the next seconds.

    Where it cannot be found it may have ended before this one began. Then the launcher ends this
    rank too, while it waits here.
    """
    import psutil

    process = first_rank_here()
    if process is None:
        time.sleep(seconds)
        return False
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


def world_size() -> int:
    """Return the number of ranks of the run, as the launcher says."""
    return max(1, _number("WORLD_SIZE", 1))


def ranks_on_this_machine() -> int:
    """Return the number of ranks here, as the launcher says."""
    return _number("LOCAL_WORLD_SIZE", 0) or _number("LOCAL_SIZE", 0) or 1


def local_rank() -> int:
    """Return this rank's number on this machine."""
    return _number("LOCAL_RANK", 0)


def all_gather_object(value: T) -> list[T]:
    """Return [value of rank 0, value of rank 1, ...] on every rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_sum(tensor: "torch.Tensor") -> "torch.Tensor":
    """Sum the tensor over all ranks, in place, and return it."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def on_all_ranks(*steps: Callable[[], Any]) -> list[Any]:
    """Run the steps and return [result of rank 0's last step, of rank 1's, ...].

    Where a step raises RunError on any rank, all ranks raise it.
    """
    result = failure = None
    try:
        for step in steps:
            result = step()
    except RunError as error:
        failure = error
    gathered = all_gather_object((result, failure))
    for _, first in gathered:
        if first:
            raise failure or first
    return [result for result, _ in gathered]


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
