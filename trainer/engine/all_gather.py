"""The way of partitioned parameters in RAM to several GPUs, for DeepSpeed 0.19.8.

The stock engine copies each parameter's part to the GPU while the host stands still, joins the parts, gathers them from all ranks and
copies each parameter out of the whole, in one stream, one after the other. Here the parts are copied in a stream of their own, each
to its place in the parameter, where it is gathered: nothing waits but the gathering for its own layer's copy, and nothing is copied
twice. (runtime/zero/partition_parameters.py: all_gather_coalesced)
"""

import functools

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus, get_allgather_dtype


def install():
    """Every parameter that is partitioned from now on is gathered this way, where `_plain` finds nothing special about it."""
    convert_plain = Init._convert_to_deepspeed_param

    @functools.wraps(convert_plain)
    def convert(self, param):
        convert_plain(self, param)
        param.all_gather_coalesced = functools.partial(_gather, self, param.all_gather_coalesced)

    Init._convert_to_deepspeed_param = convert
    return "parameters are copied to the GPUs and gathered side by side"


def _plain(param):
    return (
        param.ds_secondary_tensor is None
        and param.nvme_swapper is None
        and not param.ds_tensor.is_cuda
        and not hasattr(param.ds_tensor, "ds_quant_scale")
        and get_allgather_dtype(param, param.ds_tensor) == param.ds_tensor.dtype
    )


def _gather(init, stock, params, safe_mode=False, quantize=False):
    params = sorted(params, key=lambda p: p.ds_id)
    groups = {id(init.get_partition_dp_group(p)) for p in params}
    if (
        len(groups) != 1
        or safe_mode
        or quantize
        or init._partition_world_size(params[0]) == 1
        or not all(map(_plain, params))
        or init.use_all_reduce_for_fetch_params
    ):
        return stock(params, safe_mode=safe_mode, quantize=quantize)
    init._ensure_availability_of_partitioned_params(params)
    group, ranks = init.get_partition_dp_group(params[0]), init._partition_world_size(params[0])
    rank = init._partition_rank(params[0])
    device, copies, own = torch.device(get_accelerator().current_device_name()), _copies(), []
    # What is made in this stream is first used in it, so a copy need not wait for any other; free_param holds memory back until the
    # compute stream is done with it, and that waits for the gathering.
    with get_accelerator().stream(copies):
        for param in params:
            part = param.ds_tensor
            whole = torch.empty(part.numel() * ranks, dtype=part.dtype, device=device)
            own.append((whole, whole.narrow(0, part.numel() * rank, part.numel())))
            own[-1][1].copy_(part, non_blocking=True)
            param.data = whole.narrow(0, 0, param.ds_numel).view(param.ds_shape)
            param.ds_status = ZeroParamStatus.INFLIGHT
    if copies is not None:
        torch.cuda.current_stream().wait_stream(copies)
    with dist._coalescing_manager(group, async_ops=True) as work:
        for whole, part in own:
            dist.all_gather_into_tensor(whole, part, group)
    return _Gathered(params, work)


@functools.cache
def _copies():
    return torch.cuda.Stream() if get_accelerator().device_name() == "cuda" else None


class _Gathered:
    """DeepSpeed's handle of a gathering."""

    def __init__(self, params, work):
        self.params, self.work = params, work

    def wait(self, handle_dependency=True):
        """The current stream waits for it."""
        if self.work:
            self.work.wait()
            for param in self.params:
                param.ds_status = ZeroParamStatus.AVAILABLE
        self.work = None
