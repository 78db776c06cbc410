"""Talk between ranks. Importing it does not import torch."""

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.errors import RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def is_main_process() -> bool:
    """Return whether this is rank 0, which talks to the user."""
    return int(os.environ.get("RANK", 0)) == 0


def ranks_on_this_machine() -> int:
    """Return the number of ranks here, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def local_rank() -> int:
    """Return this rank's number on this machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)


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
