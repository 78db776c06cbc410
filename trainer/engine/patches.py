"""Our extension of DeepSpeed's offload path. It fits one version and steps aside for any other."""

import functools
import weakref

from trainer.errors import RunError

SUPPORTED = "0.19.8"
stepping = []  # the host_step of the run, where its steps run beside the forward pass
_mended = {}
LAYERS_AHEAD = 2  # that the host may be before the GPU


def apply(fetch_ahead=False):
    """Mend DeepSpeed 0.19.8 in place, once. fetch_ahead: with whole layers as leaf modules on a GPU. Returns what was mended, in
    words; nothing for another version."""
    import deepspeed

    if deepspeed.__version__.split("+")[0] != SUPPORTED:
        return []
    from trainer.engine import all_gather

    mends = [
        _prefetch_each_parameter_once,
        _make_room_for_what_is_needed,
        _copy_out_of_swap_buffers,
        _give_back_the_first_moments,
        _start_in_less_memory,
    ]
    for mend in mends + [_let_the_host_run_ahead, all_gather.install] * fetch_ahead:
        if mend not in _mended:
            _mended[mend] = mend()
    return list(_mended.values())


def install_step(zero, overlap=False):
    """Take over gradients and optimizer step of this ZeRO-3 optimizer where the extension knows how. Returns how, in words."""
    import deepspeed

    from trainer.engine import cpu_step

    how = (
        cpu_step.install(zero, overlap) if deepspeed.__version__.split("+")[0] == SUPPORTED else ""
    )
    if getattr(zero, "swap_optimizer", False) and not hasattr(
        zero, "host_step"
    ):  # swap space and buffers have no room for gradients
        raise RunError(
            "the fused optimizer step does not fit this run, whose optimizer is on NVMe",
            found=how or f"deepspeed {deepspeed.__version__}, {type(zero.optimizer).__name__}",
            fix="--fused_step false",
        )
    return how


def _prefetch_each_parameter_once():
    # The NVMe look-ahead walks the list of coming uses. Where forward turns into backward the last layers stand in it twice,
    # and the swapper fails with "already assigned swap buffer" (runtime/zero/partitioned_param_coordinator.py,
    # __prefetch_nvme_param_partitions). A look-ahead of a whole layer, or a small model, meets this at once.
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
        AsyncPartitionedParameterSwapper as Swapper,
    )

    plain = Swapper.swap_in

    @functools.wraps(plain)
    def swap_in(self, params, *args, **kwargs):
        params = list(dict.fromkeys(params))
        ahead = self.__dict__.setdefault("read_ahead", {})  # id → parameter, the latest read last
        for param in params:
            ahead.pop(param.ds_id, None)
            ahead[param.ds_id] = param
        return plain(self, params, *args, **kwargs)

    Swapper.swap_in = swap_in
    return "NVMe prefetch takes each parameter once"


def _make_room_for_what_is_needed():
    # The NVMe look-ahead passes over parameters that are on the GPU at that moment and fills every buffer with later ones. Where one
    # of the former is released and needed again at once (the head between forward and backward), the step fails with "Not enough
    # buffers". What was only read ahead, and is on no GPU yet, is given up for it; it is read again when its turn comes.
    # Every fetch comes by here, so it is also where one waits for an update that still runs (host_step.py).
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus

    plain = Init._ensure_availability_of_partitioned_params

    @functools.wraps(plain)
    def ensure(self, params):
        if stepping:
            stepping[-1].wait_for(params)
        missing = [
            p
            for p in params
            if p.nvme_swapper is not None
            and p.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE
        ]
        if missing:
            swapper = missing[0].nvme_swapper
            lacking = len(missing) - swapper.available_swap_in_buffers()
            if lacking > 0:
                swapper.synchronize_reads()
                needed = {p.ds_id for p in params}
                ahead = getattr(swapper, "read_ahead", {})
                idle = [
                    p
                    for i, p in ahead.items()
                    if i not in needed
                    and i in swapper.available_params
                    and p.ds_status == ZeroParamStatus.NOT_AVAILABLE
                ]
                swapper.remove_partition_and_release_buffers(idle[-lacking:])
        return plain(self, params)

    Init._ensure_availability_of_partitioned_params = ensure
    return "a needed parameter takes the buffer of one that was only read ahead"


def _copy_out_of_swap_buffers():
    # On one CPU rank a fetched parameter is the swap buffer itself, not a copy as it is on a GPU. The forward pass saves views of
    # it, the buffer is read over with another parameter, and the backward pass computes with that one's values: the losses drift
    # and nothing fails (runtime/zero/partition_parameters.py, NoGatherHandle and NoGatherCoalescedHandle).
    from deepspeed.runtime.zero import partition_parameters as zero

    def mended(handle):
        plain = handle.__init__

        @functools.wraps(plain)
        def init(self, params):
            plain(self, params)
            for param in params if isinstance(params, (list, tuple, set)) else [params]:
                if (
                    param.nvme_swapper is not None
                    and param.data.data_ptr() == param.ds_tensor.data_ptr()
                ):
                    param.data = param.data.clone()

        return init

    for handle in (zero.NoGatherHandle, zero.NoGatherCoalescedHandle):
        handle.__init__ = mended(handle)
    return "parameters fetched from NVMe on a CPU are copied out of the swap buffers"


def _give_back_the_first_moments():
    # Adam makes its moments in the first update, in plain memory. They are copied into swap buffers and written, but kept until the
    # second update reads them: 8 bytes a parameter of RAM, which a run with its optimizer on NVMe is there to save
    # (runtime/swap_tensor/pipelined_optimizer_swapper.py, _swap_out_optimizer_state).
    import torch
    from deepspeed.runtime.swap_tensor.pipelined_optimizer_swapper import (
        PipelinedOptimizerSwapper as Swapper,
    )

    plain = Swapper.swap_out_optimizer_state

    @functools.wraps(plain)
    def swap_out(self, parameter, async_swap):
        plain(self, parameter, async_swap)
        for own in self.swap_params_info[self.parameter_id(parameter)].get_unpinned_state_tensors():
            own.data = torch.Tensor()

    Swapper.swap_out_optimizer_state = swap_out
    return "the optimizer's first moments leave RAM once they are on NVMe"


def _start_in_less_memory():
    # torch's pinned allocator keeps what the parameters had before they moved into one buffer: 2 bytes a parameter. And the buffer of
    # the gradients is filled with zeros and then copied to pinned memory: another 2 at the worst moment with the optimizer on NVMe;
    # there it is locked where it lies. (runtime/zero/stage3.py, _setup_for_real_optimizer)
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    plain = Zero._setup_for_real_optimizer

    @functools.wraps(plain)
    def set_up(self):
        if not self.offload_optimizer or get_accelerator().device_name() != "cuda":
            plain(self)
            return
        torch._C._host_emptyCache()
        pinned = self.offload_optimizer_pin_memory
        in_place = pinned and self.swap_optimizer
        self.offload_optimizer_pin_memory = pinned and not in_place
        plain(self)
        self.offload_optimizer_pin_memory = pinned
        if in_place and _lock_in_place(self.grad_partitions_flat_buffer):
            address = self.grad_partitions_flat_buffer.data_ptr()
            weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, address).atexit = False

    Zero._setup_for_real_optimizer = set_up
    return "a start without the parameters' old memory and a second buffer of gradients"


def _lock_in_place(tensor):
    """Whether the CPU tensor's memory is now pinned for CUDA. Where the driver refuses, copies of it are slower, no more."""
    import torch

    runtime = torch.cuda.cudart()
    if runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) == runtime.cudaError.success:
        return True
    try:  # CUDA keeps the error until somebody asks: that must not be the next launch of the run
        torch.zeros(1, device="cuda")
    except RuntimeError:
        pass
    return False


def _let_the_host_run_ahead():
    # On one GPU the engine stops the host until a layer's copy has arrived, and only then orders the next copy and launches the
    # layer: between two layers PCIe idles, and a small micro-batch leaves the GPU idle too. The compute stream waits for the copy
    # stream anyway (partitioned_param_coordinator.py, fetch_sub_module), so the host need not. It is held to LAYERS_AHEAD layers,
    # or it would ask for the memory of all of them at once.
    from collections import deque

    import torch
    from deepspeed.runtime.zero import partition_parameters as zero
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )
    from deepspeed.utils import z3_leaf_module

    plain = Coordinator.fetch_sub_module

    def arrived(handle, params):
        def wait(self, **kwargs):
            for param in params(self):
                param.ds_status = zero.ZeroParamStatus.AVAILABLE
            setattr(self, f"_{handle.__name__}__complete", True)

        handle.wait = wait

    arrived(zero.NoGatherHandle, lambda h: [h._NoGatherHandle__param])
    arrived(
        zero.NoGatherCoalescedHandle,
        lambda h: [
            p
            for p in h._NoGatherCoalescedHandle__params
            if p.ds_status == zero.ZeroParamStatus.INFLIGHT
        ],
    )
    begun = deque()  # events on the compute stream, where the last layers began

    @functools.wraps(plain)
    def fetch(self, module, forward):
        self._PartitionedParameterCoordinator__max_ongoing_fetch_events = 1 << 30
        plain(self, module, forward)
        if z3_leaf_module(module):
            begun.append(torch.cuda.Event())
            begun[-1].record()
            if len(begun) > LAYERS_AHEAD:
                begun.popleft().synchronize()

    Coordinator.fetch_sub_module = fetch
    return "the host does not wait for the copy of a layer to the GPU"
