"""Partitioned parameters in RAM on their way to several GPUs, for DeepSpeed 0.19.8.

The stock engine copies each parameter's shard to the GPU while the host waits, joins the shards,
gathers them from all ranks and copies each parameter out of the whole, one after the other in one
stream. Here the shards are copied in a stream of their own, each to its place in the parameter,
where it is gathered: only the gathering of a layer waits for that layer's copy, and nothing is
copied twice (runtime/zero/partition_parameters.py, all_gather_coalesced).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus, get_allgather_dtype

accelerator: Any = get_accelerator()
_stock_convert_to_deepspeed_param = Init._convert_to_deepspeed_param


def convert_to_deepspeed_param(self: Init, param: Any) -> None:
    """Partition a parameter as the stock engine does, and gather it by `all_gather_coalesced`."""
    _stock_convert_to_deepspeed_param(self, param)
    param.all_gather_coalesced = functools.partial(
        all_gather_coalesced, self, param.all_gather_coalesced
    )


def is_plain(param: Any) -> bool:
    """Return whether a parameter is not quantized, and gathered in its own type."""
    return (
        param.ds_secondary_tensor is None
        and not hasattr(param.ds_tensor, "ds_quant_scale")
        and get_allgather_dtype(param, param.ds_tensor) == param.ds_tensor.dtype
    )


def all_gather_coalesced(
    init: Any, stock: Any, params: list[Any], safe_mode: bool = False, quantize: bool = False
) -> Any:
    """Start gathering these parameters on all ranks. Return the handle to wait with.

    stock: DeepSpeed's own function, which takes what is not plain.
    """
    params = sorted(params, key=lambda p: p.ds_id)
    group, ranks = init.get_partition_dp_group(params[0]), init._partition_world_size(params[0])
    if (
        safe_mode
        or quantize
        or ranks == 1
        or not all(map(is_plain, params))
        or all(param.ds_tensor.is_cuda for param in params)
        or init.use_all_reduce_for_fetch_params
    ):
        return stock(params, safe_mode=safe_mode, quantize=quantize)
    rank = init._partition_rank(params[0])
    init._ensure_availability_of_partitioned_params(params)
    device, copy_stream = torch.device(accelerator.current_device_name()), _copy_stream()
    gathered = []  # a whole parameter, and our shard of it
    # Memory that is taken in this stream is first used in it, so a copy need not wait for any other
    # stream. free_param holds memory back until the compute stream is done with it, and that one
    # waits for the gathering.
    with accelerator.stream(copy_stream):
        for param in params:
            shard = param.ds_tensor
            size = shard.numel()
            whole = torch.empty(size * ranks, dtype=shard.dtype, device=device)
            place = whole.narrow(0, size * rank, size)
            place.copy_(shard, non_blocking=True)
            gathered.append((whole, place))
            param.data = whole[: param.ds_numel].view(param.ds_shape)
            param.ds_status = ZeroParamStatus.INFLIGHT
    if copy_stream is not None:
        torch.cuda.current_stream().wait_stream(copy_stream)
    with dist._coalescing_manager(group, async_ops=True) as work:
        for whole, place in gathered:
            dist.all_gather_into_tensor(whole, place, group)
    return AllGatherHandle(params, work)


def wait_for_updates(gathers: Any) -> None:
    """Let copies and gathering that follow wait for what the GPU has been given: updates of shards.

    gathers: the stream in which DeepSpeed gathers.
    """
    if stream := _copy_stream():
        for other in (stream, gathers):
            other.wait_stream(torch.cuda.current_stream())


@functools.cache
def _copy_stream() -> "torch.cuda.Stream | None":
    return torch.cuda.Stream() if accelerator.device_name() == "cuda" else None


@dataclass
class AllGatherHandle:
    """What DeepSpeed waits with. params: those that are under way; work: torch's handle."""

    params: list[Any]
    work: Any

    def wait(self, handle_dependency: bool = True) -> None:
        """Let the current stream wait until the parameters are there."""
        if self.work:
            self.work.wait()
            for param in self.params:
                param.ds_status = ZeroParamStatus.AVAILABLE
        self.work = None
