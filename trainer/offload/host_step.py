"""The way of a gradient to the host, and the optimizer's step there, for DeepSpeed 0.19.8 with the optimizer in CPU memory.

The stock engine copies a gradient to the host, back to the GPU for its norm, casts it to fp32 there and copies it once more: 8 bytes
a parameter over PCIe, 4 of host memory, and then three passes over all of it (scale, Adam, cast). Here it is copied once, as it is;
its norm is taken where it was made; and the step goes in pieces that stay in a core's caches between scaling, Adam and the cast. Each
thread takes the next piece when it is done with one: no thread waits for another, as all do at the end of each OpenMP loop, where one
core that the machine's host lends to somebody else for a moment holds up all of them. Adam is DeepSpeed's own kernel with the same
numbers. (runtime/zero/stage3.py: partition_grads, _optimizer_step, unscale_and_clip_grads)
"""
import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from . import stepping

PIECE = 2**19  # elements: 2 MB of each fp32 tensor
SMALL = 2**22  # elements; smaller tensors that lie side by side on the host travel together


def applies(zero):
    """Whether this optimizer takes the plain way: AdamW by DeepSpeed's CPU kernel, fp32 master weights in RAM, data parallel."""
    return (type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3" and isinstance(zero.optimizer, DeepSpeedCPUAdam)
            and zero.offload_optimizer and not zero.swap_optimizer and not getattr(zero, "zenflow", False) and not zero.use_muon
            and zero.master_weights_and_grads_dtype == torch.float32 and zero.optimizer.fp32_optimizer_states
            and set(zero.subgroup_to_device.values()) == {"cpu"} and not zero.torch_autocast_gradscaler
            and zero.model_parallel_rank == 0 and not zero.params_in_nvme_and_cpu)


def adam_update(op):
    """The op's `adam_update`, called past its Python binding, which holds the interpreter's lock for all of its work: all other threads
    would stand still. None where the op was built with other names. (A C++ reference to a tensor is the address of a pointer to its
    implementation.)"""
    try:
        function = ctypes.CDLL(op.__file__)["_Z12ds_adam_stepimfffffbRN2at6TensorES1_S1_S1_"]
    except (AttributeError, OSError):
        return None
    tensor = ctypes.POINTER(ctypes.c_void_p)
    function.argtypes = [ctypes.c_int, ctypes.c_size_t, *[ctypes.c_float] * 5, ctypes.c_bool, *[tensor] * 4]

    def update(optimizer, step, *rest):
        *numbers, bias_correction = rest[:-4]
        function(optimizer, step, *numbers, bias_correction, *(ctypes.byref(ctypes.c_void_p(t._cdata)) for t in rest[-4:]))

    return update


def install(zero, overlap=False):
    """Take over where `applies`. overlap: the step goes on in a thread beside the next forward pass, whose layers wait for their own
    update only. Returns what it does, in words; nothing where it does not apply."""
    update = adam_update(zero.optimizer.ds_opt_adam) if applies(zero) else None
    if update is None:
        return ""
    flats = zero.fp16_partitioned_groups_flat
    overlap = overlap and dist.get_world_size() == 1 and all(f is not None and f.device.type == "cpu" for f in flats)
    state = zero.host_step = _HostStep(zero, update, overlap)
    if overlap:
        stepping[:] = [state]
    names = ["partition_grads", "_get_norm_groups", "has_overflow", "reset_cpu_buffers", "unscale_and_clip_grads",
             "_optimizer_step", "_reassign_or_swap_out_partitioned_parameters"]
    if dist.get_world_size() == 1:  # with more ranks the parameters that stay have to be gathered anew
        names += ["_partition_all_parameters", "_post_step"]
    for name in names:
        setattr(zero, name, getattr(state, name.lstrip("_")))
    for flat in zero.fp32_partitioned_groups_flat:
        flat.grad = None  # the fp32 copies of the gradients
    if torch.cuda.is_available():
        torch._C._host_emptyCache()  # pinned memory that the parameters had before they moved into one buffer
    return "in pieces, beside the next forward pass" if overlap else "in pieces"


class _HostStep:
    def __init__(self, zero, adam_update, overlap):
        self.zero, self.adam_update, self.overlap = zero, adam_update, overlap
        self.table = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        self.reassign_plain, self.post_step_plain = zero._reassign_or_swap_out_partitioned_parameters, zero._post_step
        self.real = {p.ds_id for group in zero.fp16_groups for p in group
                     if p.partition_numel() * zero._get_param_partition_rank(p) < p.ds_numel}
        self.everything = list(zero.parameter_offload.module.parameters())
        self.scale, self.written = 1.0, set()
        self.queue, self.pending, self.failure = [], {}, None  # updates to make, {sub-group: [pieces left, when there are none]}
        self.group_of = {p.ds_id: i for i, group in enumerate(zero.fp16_groups) for p in group}
        # What stays on the GPU gets its new values at once.
        self.first = {self.group_of[p.ds_id] for p in zero.persistent_parameters if p.ds_id in self.group_of}
        self.lock, self.adams, self.step, cores = threading.Lock(), [], 0, torch.get_num_threads()
        threads = max(1, cores - overlap)  # beside the forward pass one core is left to launch the GPU's work
        self.pool, started = ThreadPoolExecutor(threads, "optimizer", self._alone), threading.Barrier(threads)
        list(self.pool.map(lambda _: started.wait(), range(threads)))
        torch.set_num_threads(cores)  # the threads' own number had become that of all threads to come
        size = min(PIECE, max(f.numel() for f in zero.fp32_partitioned_groups_flat))
        self.staging = [torch.empty(size, dtype=torch.float32) for _ in range(threads)]
        self.offsets, at = [], 0
        for flat in zero.fp32_partitioned_groups_flat:
            self.offsets.append(at)
            at += flat.numel()
        self.reset_cpu_buffers()

    # -- the backward pass -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def partition_grads(self, params, partitions):
        zero, pairs = self.zero, []
        self.drain()  # the gradients of the last update are done with
        for param, part in zip(params, partitions):
            if param.ds_id in self.real:
                zero._offload_boundary_param_ids.add(param.ds_id)
                held = self.table[param.ds_id].narrow(0, 0, part.numel())
                part = part.view(-1)
                if param.ds_id in self.seen:  # an earlier micro-batch of this update
                    part = held.to(part.device, non_blocking=True).add_(part)
                pairs.append((held, part))
                self.seen.add(param.ds_id)
                if param.grad is not None and param.grad.is_cuda:
                    param.grad.record_stream(torch.cuda.current_stream())
            param.grad = None
        if pairs:
            norms = torch._foreach_norm([part for _, part in pairs], 2, dtype=torch.float32)
            self.norms.update(zip((p.ds_id for p in params if p.ds_id in self.real), norms))  # the last word of each parameter
        for held, parts in _runs(pairs):
            held.copy_(parts[0] if len(parts) == 1 else torch.cat(parts), non_blocking=True)
        return [held for held, _ in pairs]

    def reset_cpu_buffers(self):
        self.norms, self.seen, self.norm = {}, set(), None

    # -- the step ----------------------------------------------------------------------------------------------------
    def total_norm(self):
        """The norm of all gradients on all ranks, times the loss scale; infinite or NaN where one is."""
        if self.norm is None:
            found = list(self.norms.values()) or [torch.zeros((), device=get_accelerator().current_device_name())]
            total = torch.stack(found).square_().sum()
            dist.all_reduce(total, group=self.zero.dp_process_group)
            self.norm = total.sqrt().cpu()
        return self.norm

    def get_norm_groups(self):
        return [self.total_norm()]

    def has_overflow(self, partition_gradients=True):
        return not bool(torch.isfinite(self.total_norm()))

    def unscale_and_clip_grads(self, sub_group_id, total_norm):
        scale = float(self.zero.loss_scale)
        if self.zero.clip_grad > 0:
            scale *= max(1.0, (float(total_norm) / scale + 1e-6) / self.zero.clip_grad)
        self.scale = 1.0 / scale

    def optimizer_step(self, i):
        zero = self.zero
        flat, low = zero.fp32_partitioned_groups_flat[i], zero.fp16_partitioned_groups_flat[i]
        group, state = dict(zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]), zero.optimizer.state[flat]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(flat, requires_grad=False),
                         exp_avg_sq=torch.zeros_like(flat, requires_grad=False))
        state["step"] += 1
        for param in zero.fp16_groups[i]:
            if param.ds_id in self.real and param.ds_id not in self.seen:
                self.table[param.ds_id].zero_()  # no gradient this time; what lies there is an older one
        if low is not None:
            self.written.add(i)
        self.queue.append((i, group, state, self.scale))
        if low is None:  # its values go out by the stock way, at once
            self._start()
            self._wait([i])
        elif i == len(zero.fp16_groups) - 1:
            self.queue.sort(key=lambda update: update[0] not in self.first)
            self._start()
            self._wait(self.first & self.pending.keys() if self.overlap else list(self.pending))

    def _start(self):
        """Have all queued updates made."""
        zero, pieces = self.zero, []
        for i, group, state, scale in self.queue:
            flat, low = zero.fp32_partitioned_groups_flat[i].detach(), zero.fp16_partitioned_groups_flat[i]
            grads = zero.grad_partitions_flat_buffer.narrow(0, self.offsets[i], flat.numel())
            self._count_to(state["step"], group)
            numbers = (state["step"], group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
            tensors = flat, grads, state["exp_avg"], state["exp_avg_sq"], low
            starts = range(0, flat.numel(), PIECE)
            pieces += [(i, at, min(PIECE, flat.numel() - at), scale, numbers, tensors) for at in starts]
            self.pending[i] = [len(starts), threading.Event()]
        self.queue.clear()
        self.pieces = iter(pieces)
        for adam, staging in zip(self.adams, self.staging, strict=True):
            self.pool.submit(self._work, self.pieces, adam, staging)

    def _count_to(self, step, group):
        """Bring each thread's Adam to `step`. It multiplies beta**step up from step to step, in fp32: so all have the same."""
        op, settings = self.zero.optimizer.ds_opt_adam, (*group["betas"], group["eps"], 0.0)
        if not self.adams:
            for _ in self.staging:
                op.create_adam(DeepSpeedCPUAdam.optimizer_id, 0.0, *settings, self.zero.optimizer.adam_w_mode, False)
                self.adams.append(DeepSpeedCPUAdam.optimizer_id)
                DeepSpeedCPUAdam.optimizer_id += 1
        nothing = torch.zeros(4, 1).unbind()
        for number in range(self.step + 1, step + 1):
            for adam in self.adams:
                op.adam_update(adam, number, 0.0, *settings, True, *nothing)
        self.step = step

    @torch.no_grad()
    def _work(self, pieces, adam, staging):
        """Make pieces, until there are none, in one of the threads; others take from the same iterator."""
        try:
            for i, at, size, scale, numbers, tensors in pieces:
                self._update(at, size, scale, numbers, tensors, adam, staging)
                with self.lock:
                    self.pending[i][0] -= 1
                    if not self.pending[i][0]:
                        self.pending[i][1].set()
        except Exception as error:  # it is raised where somebody waits
            self.failure = error
            for _, done in list(self.pending.values()):
                done.set()

    def _update(self, at, size, scale, numbers, tensors, adam, staging):
        weight, grad, first, second, low = (t if t is None else t.narrow(0, at, size) for t in tensors)
        grad = staging[:size].copy_(grad)
        if scale != 1.0:
            grad.mul_(scale)
        self.adam_update(adam, *numbers, weight, grad, first, second)
        if low is not None:
            low.copy_(weight)

    def _alone(self):
        """One of the optimizer's threads uses one core, in torch and in Adam's own OpenMP."""
        torch.set_num_threads(1)
        ctypes.CDLL(self.zero.optimizer.ds_opt_adam.__file__).omp_set_num_threads(1)

    def _wait(self, groups):
        for group in groups:
            self.pending[group][1].wait()
            if self.failure:
                raise self.failure
            del self.pending[group]

    # -- the step beside the next forward pass -----------------------------------------------------------------------
    def wait_for(self, params):
        """Before parameters are fetched: their update is done."""
        self._wait({self.group_of[p.ds_id] for p in params if p.ds_id in self.group_of} & self.pending.keys())

    def drain(self):
        """All updates are done."""
        self._wait(list(self.pending))

    def reassign_or_swap_out_partitioned_parameters(self, i):
        if i in self.written:  # the low-precision copy was made piece by piece
            self.written.discard(i)
            self.zero._unflatten_partitioned_parameters(i)
        else:
            self.reassign_plain(i)

    # -- parameters that stay on the GPU -----------------------------------------------------------------------------
    def partition_all_parameters(self):
        """Before the step: release what is gathered, but what stays for good (adapters, norms; hundreds of small tensors) stays."""
        coordinator = self.zero._get_param_coordinator()
        inflight = coordinator._PartitionedParameterCoordinator__inflight_param_registry
        release = coordinator._PartitionedParameterCoordinator__release_param
        for param in self.everything:
            if param.ds_status == ZeroParamStatus.INFLIGHT:
                inflight.pop(param).wait()
            param.ds_active_sub_modules.clear()
            if not param.ds_persist:
                release(param)

    @torch.no_grad()
    def post_step(self, timer_names):
        """After it: what stayed gets its new values, neighbours in one copy."""
        stayed = [p for p in self.zero.persistent_parameters if p.requires_grad and p.ds_status == ZeroParamStatus.AVAILABLE]
        self.post_step_plain(timer_names)
        for held, params in _runs([(p.ds_tensor.data, p) for p in stayed]):
            new = held.to(params[0].device, non_blocking=True).split([p.ds_numel for p in params])
            torch._foreach_copy_([p.data.view(-1) for p in params], list(new))


def _runs(pairs):
    """(host tensor, tensor) pairs → (host tensor, [tensors]), where small neighbours in one host buffer became one."""
    found, end = [], None
    for host, other in sorted(pairs, key=lambda p: p[0].data_ptr()):
        place = host.untyped_storage().data_ptr(), host.data_ptr()
        if end == place and host.numel() < SMALL:
            found[-1][1].append(other)
        else:
            found.append((host, [other]))
        end = (place[0], place[1] + host.numel() * host.element_size()) if host.numel() < SMALL else None
    return [(host if len(own) == 1 else host.as_strided((sum(t.numel() for t in own),), (1,), host.storage_offset()), own)
            for host, own in found]
