"""Weights that are whole on their device, and so are never gathered, for DeepSpeed 0.19.8.

One rank whose weights are in the memory that computes with them has nothing to fetch and nothing to
release. The stock engine does both all the same, in Python, around each decoder layer of each pass:
half of the host's time, and with small micro-batches the GPU waits for the host (docs/speed.md).
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import nn

from trainer.engine.all_gather import is_plain

accelerator: Any = get_accelerator()
_stock_partition = Init._partition
_stock_get: Any = ZeROOrderedDict.__getitem__


def is_resident(param: Any) -> bool:
    """Return whether a parameter of ZeRO-3 is always there: its data is its shard."""
    return getattr(param, "ds_resident", False)


def partition(self: Init, param_list: list[Any], *args: Any, **kwargs: Any) -> None:
    """Release these parameters, but for those that are resident. In place of Init._partition."""
    _stock_partition(self, [p for p in param_list if not is_resident(p)], *args, **kwargs)


def get_parameter(self: ZeROOrderedDict, key: str) -> Any:
    """Return a parameter to its module, once its update is made. In place of __getitem__.

    What is fetched waits there (patches.ensure_availability); a resident parameter waits here.
    """
    param: Any = OrderedDict.__getitem__(self, key)
    if not is_resident(param):
        return _stock_get(self, key)
    step = getattr(param, "pending_step", None)
    if step is not None and step.pending:
        step.wait_for([param])
    return param


def settle(zero: Any) -> None:
    """Make parameters resident that are whole on this rank's device, and unhook their modules.

    zero: a FusedStepOptimizer whose tensors are in their places.
    """
    model = zero.module
    if zero.partition_count > 1 or zero.params_in_nvme_and_cpu:
        return
    for param in model.parameters():
        shard = param.ds_tensor
        if shard.device.type == accelerator.device_name() and is_plain(param):
            param.data = shard.data[: param.ds_numel].view(param.ds_shape)
            param.ds_status = ZeroParamStatus.AVAILABLE
            param.ds_resident = param.ds_persist = True
    # Each module has two of either kind.
    hooks = zip(*2 * [iter(zero.parameter_offload.forward_hooks)], strict=True)
    backward_hooks = zip(*2 * [iter(zero.parameter_offload.backward_hooks)], strict=True)
    for module, *own_hooks in zip(_hooked_modules(model), hooks, backward_hooks, strict=True):
        if all(map(is_resident, module.parameters())):
            for hook in itertools.chain(*own_hooks):
                hook.remove()


def _hooked_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield modules in the order in which DeepSpeed hooks them (_register_deepspeed_module)."""
    if not z3_leaf_module(module):
        for child in module.children():
            yield from _hooked_modules(child)
    yield module
