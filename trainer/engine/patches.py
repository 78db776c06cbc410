"""What we correct in DeepSpeed 0.19.8, by named assignment. The table is in docs/architecture.md.

Each patch keeps the stock function under `_stock_...` and says what is wrong there.
"""

import inspect
import itertools
from collections import deque
from typing import Any

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
    AsyncPartitionedParameterSwapper,
    PartitionedParamStatus,
)
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import (
    Init,
    NoGatherCoalescedHandle,
    NoGatherHandle,
    ZeroParamStatus,
)
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import z3_leaf_module

from trainer.engine import all_gather, fused_step, placement, resident
from trainer.plan.estimate import LAYERS_AHEAD
from trainer.system import hardware

_stock_swap_in = AsyncPartitionedParameterSwapper.swap_in
_stock_ensure_availability = Init._ensure_availability_of_partitioned_params
_stock_no_gather_init = NoGatherHandle.__init__
_stock_no_gather_coalesced_init = NoGatherCoalescedHandle.__init__
_stock_setup_for_real_optimizer = DeepSpeedZeroOptimizer_Stage3._setup_for_real_optimizer
_stock_create_flat_cpu_memory = (
    DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory
)
_stock_fetch_sub_module = PartitionedParameterCoordinator.fetch_sub_module
_stock_invalidate_trace = PartitionedParameterCoordinator._invalidate_trace


def apply(fetch_ahead: bool) -> None:
    """Patch DeepSpeed's classes. A second call changes nothing.

    fetch_ahead: also let the host run ahead of the GPU, which needs whole layers as leaf modules,
    parameters in RAM and a GPU.
    """
    AsyncPartitionedParameterSwapper.swap_in = swap_in
    Init._ensure_availability_of_partitioned_params = ensure_availability
    Init._partition = resident.partition
    ZeROOrderedDict.__getitem__ = resident.get_parameter
    NoGatherHandle.__init__ = no_gather_init
    NoGatherCoalescedHandle.__init__ = no_gather_coalesced_init
    DeepSpeedZeroOptimizer_Stage3._configure_tensor_swapping = configure_tensor_swapping
    DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory = create_flat_cpu_memory
    DeepSpeedZeroOptimizer_Stage3._setup_for_real_optimizer = setup_for_real_optimizer
    PartitionedParameterCoordinator._invalidate_trace = invalidate_trace
    if fetch_ahead:
        NoGatherHandle.wait = no_gather_wait
        NoGatherCoalescedHandle.wait = no_gather_coalesced_wait
        PartitionedParameterCoordinator.fetch_sub_module = fetch_sub_module
        Init._convert_to_deepspeed_param = all_gather.convert_to_deepspeed_param


def swap_in(self: Any, params: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Read each parameter from NVMe once.

    The look-ahead walks the list of coming uses. Where forward turns into backward the last layers
    stand in it twice, and the swapper fails with "already assigned swap buffer"
    (partitioned_param_coordinator.py, __prefetch_nvme_param_partitions). A look-ahead of a whole
    layer, or a small model, meets this at once.
    """
    params = list(dict.fromkeys(params))
    read_ahead = self.__dict__.setdefault("read_ahead", {})  # id -> parameter, the latest read last
    for param in params:
        read_ahead.pop(param.ds_id, None)
        read_ahead[param.ds_id] = param
    return _stock_swap_in(self, params, *args, **kwargs)


def ensure_availability(self: Any, params: list[Any]) -> Any:
    """Wait for the parameters' optimizer step, and free swap buffers for those that are needed.

    The NVMe look-ahead passes over parameters that are on the GPU at that moment and fills every
    buffer with later ones. Where one of the former is released and needed again at once (the head
    between forward and backward), the step fails with "Not enough buffers". A parameter that was
    only read ahead, and is on no GPU yet, is given up for it and read again when its turn comes.
    Every fetch comes through here, so it is also where one waits for a step that still runs.
    """
    for step in {param.pending_step for param in params if hasattr(param, "pending_step")}:
        step.wait_for(params)
    missing = [
        param
        for param in params
        if param.nvme_swapper is not None
        and param.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE
    ]
    if missing:
        swapper = missing[0].nvme_swapper
        lacking = len(missing) - swapper.available_swap_in_buffers()
        if lacking > 0:
            swapper.synchronize_reads()
            needed = {param.ds_id for param in params}
            idle = [
                param
                for i, param in getattr(swapper, "read_ahead", {}).items()
                if i not in needed
                and i in swapper.available_params
                and param.ds_status == ZeroParamStatus.NOT_AVAILABLE
            ]
            swapper.remove_partition_and_release_buffers(idle[-lacking:])
    return _stock_ensure_availability(self, params)


def _copy_out_of_swap_buffer(param: Any) -> None:
    """Give a parameter memory of its own where it is a swap buffer.

    On one CPU rank a fetched parameter is the swap buffer itself, not a copy as on a GPU. The
    forward pass saves views of it, the buffer is read over with another parameter, and the
    backward pass computes with that one's values: the losses drift and nothing fails.
    """
    if param.nvme_swapper is not None and param.data.data_ptr() == param.ds_tensor.data_ptr():
        param.data = param.data.clone()


def no_gather_init(self: Any, param: Any) -> None:
    """Fetch one parameter on one rank: see _copy_out_of_swap_buffer."""
    _stock_no_gather_init(self, param)
    _copy_out_of_swap_buffer(param)


def no_gather_coalesced_init(self: Any, params: list[Any]) -> None:
    """Fetch several parameters on one rank: see _copy_out_of_swap_buffer."""
    _stock_no_gather_coalesced_init(self, params)
    for param in params:
        _copy_out_of_swap_buffer(param)


def configure_tensor_swapping(self: Any, offload_optimizer_config: Any, aio_config: Any) -> None:
    """Make no swapper: states on NVMe go through our ring (fused_step.take_over)."""


def create_flat_cpu_memory(self: Any) -> None:
    """Let trained parameters have their places at once: in RAM, locked there, or on the GPU."""
    if self.params_in_nvme_and_cpu:
        _stock_create_flat_cpu_memory(self)
        return
    numels = [
        [sum(p.partition_numel() for p in params) for params in sub_groups]
        for group in self.trainable_param_groups
        if (sub_groups := self._create_fp16_sub_groups(group["params"]))
    ]
    tiers = iter(fused_step.tiers_of_weights(self, [n for group in numels for n in group]))
    self.param_groups_fp16_flat_cpu_memory = [
        placement.FlatWeights(self, group, list(itertools.islice(tiers, len(group))))
        for group in numels
    ]


def setup_for_real_optimizer(self: Any) -> None:
    """Set up our optimizer step, or DeepSpeed's with less RAM.

    torch's pinned allocator keeps what the parameters had before they moved into one buffer: 2
    bytes a parameter; and glibc's what loading them took.
    """
    if torch.cuda.is_available():
        torch._C._host_emptyCache()
    hardware.trim_heap()  # before anybody looks at what is free
    self.param_groups_fp16_flat_cpu_memory.clear()  # each sub-group has its part
    if not fused_step.take_over(self):
        _stock_setup_for_real_optimizer(self)
    hardware.trim_heap()


def forget_releases() -> None:
    """Let the engine decide anew which parameters it releases after which module."""
    # It has two decorators, of which only the inner one can forget.
    coordinator: Any = PartitionedParameterCoordinator
    outer = coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(outer).nonlocals["func"].cache_clear()


def invalidate_trace(self: Any) -> None:
    """Forget the order of modules, and with it what was to be released after each.

    The stock engine remembers the latter for good (functools.lru_cache of __params_to_release). The
    first pass is one without a backward pass: the proof's, or an evaluation. So the layers that the
    backward pass begins with were released before it and fetched again, in every step.
    """
    _stock_invalidate_trace(self)
    forget_releases()


# On one GPU the stock engine stops the host until a layer's copy has arrived, and only then orders
# the next copy and launches the layer: between two layers PCIe idles, and with a small micro-batch
# the GPU idles too. The compute stream waits for the copy stream anyway
# (partitioned_param_coordinator.py, fetch_sub_module), so the host need not. It may be LAYERS_AHEAD
# layers ahead, or it would ask for the memory of all of them at once.
_layer_starts: deque[Any] = deque()  # events on the compute stream


def no_gather_wait(self: Any, **kwargs: Any) -> None:
    """Count the parameter as available without stopping the host."""
    self._NoGatherHandle__param.ds_status = ZeroParamStatus.AVAILABLE
    self._NoGatherHandle__complete = True


def no_gather_coalesced_wait(self: Any, **kwargs: Any) -> None:
    """Count the parameters that are under way as available without stopping the host."""
    for param in self._NoGatherCoalescedHandle__params:
        if param.ds_status == ZeroParamStatus.INFLIGHT:
            param.ds_status = ZeroParamStatus.AVAILABLE
    self._NoGatherCoalescedHandle__complete = True


def fetch_sub_module(self: Any, current_submodule: torch.nn.Module, forward: bool) -> None:
    """Fetch a module, and let the host be at most LAYERS_AHEAD layers before the GPU."""
    self._PartitionedParameterCoordinator__max_ongoing_fetch_events = 1 << 30
    _stock_fetch_sub_module(self, current_submodule, forward)
    if z3_leaf_module(current_submodule):
        _layer_starts.append(torch.cuda.current_stream().record_event())
        if len(_layer_starts) > LAYERS_AHEAD:
            _layer_starts.popleft().synchronize()


def time_step(engine: Any, clock: Any) -> None:
    """Measure the optimizer apart from the backward pass: accelerate runs both in one call.

    clock: a telemetry.PhaseClock, in which the backward pass has begun.
    """
    stock_step = engine.step

    def step(*args: Any, **kwargs: Any) -> Any:
        clock.stop("backward")
        clock.start("optimizer")
        try:
            return stock_step(*args, **kwargs)
        finally:
            clock.stop("optimizer")

    engine.step = step
