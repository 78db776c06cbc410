"""The way of a gradient to the host, and the optimizer's step there, for DeepSpeed 0.19.8 with the optimizer in RAM or on NVMe.

The stock engine copies a gradient to the host, back to the GPU for its norm, casts it to fp32 there and copies it once more: 8 bytes
a parameter over PCIe, 4 of host memory, and then three passes over all of it (scale, Adam, cast). Here it is copied once, as it is;
its norm is taken where it was made; and one pass (adam.c) scales, steps and casts. On NVMe the stock engine writes the fp32 copy too
and reads it back: 16 bytes a parameter each way, where weight and moments are 12. (runtime/zero/stage3.py: partition_grads,
_optimizer_step, unscale_and_clip_grads)
"""

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from trainer.engine.patches import stepping
from trainer.errors import RunError
from trainer.system import ops

BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: -16}  # as adam.c has them
SMALL = 2**22  # elements; smaller tensors that lie side by side on the host travel together


def applies(zero):
    """Whether this optimizer takes the plain way: AdamW by DeepSpeed's CPU kernel, fp32 master weights, data parallel."""
    return (
        type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3"
        and isinstance(zero.optimizer, DeepSpeedCPUAdam)
        and zero.offload_optimizer
        and not getattr(zero, "zenflow", False)
        and not zero.use_muon
        and zero.master_weights_and_grads_dtype == torch.float32
        and zero.optimizer.fp32_optimizer_states
        and set(zero.subgroup_to_device.values()) == {"cpu"}
        and not zero.torch_autocast_gradscaler
        and zero.model_parallel_rank == 0
        and zero.optimizer.adam_w_mode
    )


class Update(ctypes.Structure):
    """`update` of adam.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "first", "second", "grad", "low")),
        *((name, ctypes.c_int64) for name in ("size", "left")),
        *(
            (name, ctypes.c_float)
            for name in (
                "scale",
                "lr",
                "beta1",
                "beta2",
                "eps",
                "decay",
                "correction1",
                "correction2",
            )
        ),
    ]


def update_of(weight, grad, state, group, scale, low=None):
    """Adam's update of one flat tensor: fp32 weight and moments, a gradient of any of BITS, its low-precision copy of the same type.
    state: step, counted from 1, exp_avg, exp_avg_sq. group: the optimizer's settings. scale: multiplies the gradient."""
    (beta1, beta2), step = group["betas"], state["step"]
    corrections = (
        (1 - beta1**step, 1 / math.sqrt(1 - beta2**step)) if group["bias_correction"] else (1, 1)
    )
    return Update(
        weight.data_ptr(),
        state["exp_avg"].data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        grad.data_ptr(),
        None if low is None else low.data_ptr(),
        weight.numel(),
        weight.numel(),
        scale,
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        *corrections,
    )


def run(adam, updates, bits, threads):
    """Make an array of them, begun in order, by so many threads. Other Python threads go on."""
    adam.adam_step(updates, len(updates), bits, threads)


def install(zero, overlap=False):
    """Take over where `applies`. overlap: the step goes on in a thread beside the next forward pass, whose layers wait for their own
    update only. Returns what it does, in words; nothing where it does not apply."""
    if not applies(zero):
        return ""
    try:
        adam = ops.adam()
    except RunError as error:
        return f"DeepSpeed's own, {error}"
    if zero.dtype == torch.float16 and not adam.adam_knows_fp16():
        return "DeepSpeed's own, this C compiler does not know fp16"
    flats = zero.fp16_partitioned_groups_flat
    overlap = (
        overlap
        and not zero.swap_optimizer
        and all(f is not None and f.device.type == "cpu" for f in flats)
    )
    state = zero.host_step = _HostStep(zero, adam, overlap)
    if overlap:
        stepping[:] = [state]
    names = [
        "partition_grads",
        "_get_norm_groups",
        "has_overflow",
        "reset_cpu_buffers",
        "unscale_and_clip_grads",
        "_optimizer_step",
        "_reassign_or_swap_out_partitioned_parameters",
    ]
    for name in names + ["_partition_all_parameters", "_post_step"] * (
        not zero.params_in_nvme_and_cpu
    ):
        setattr(zero, name, getattr(state, name.lstrip("_")))
    for flat in zero.fp32_partitioned_groups_flat:
        flat.grad = None  # the fp32 copies of the gradients
    if torch.cuda.is_available():
        torch._C._host_emptyCache()
    return "in one pass, beside the next forward pass" if overlap else "in one pass"


class _HostStep:
    def __init__(self, zero, adam, overlap):
        self.zero, self.adam = zero, adam
        self.bits = BITS[zero.grad_partitions_flat_buffer.dtype]
        self.table = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        self.reassign_plain, self.post_step_plain = (
            zero._reassign_or_swap_out_partitioned_parameters,
            zero._post_step,
        )
        self.real = {
            p.ds_id
            for group in zero.fp16_groups
            for p in group
            if p.partition_numel() * zero._get_param_partition_rank(p) < p.ds_numel
        }
        self.everything = list(zero.parameter_offload.module.parameters())
        self.scale, self.written = 1.0, set()
        self.queue, self.pending = {}, {}  # {sub-group: update}: to be made, being made
        self.group_of = {p.ds_id: i for i, group in enumerate(zero.fp16_groups) for p in group}
        # What stays on the GPU gets its new values at once.
        self.first = {
            self.group_of[p.ds_id] for p in zero.persistent_parameters if p.ds_id in self.group_of
        }
        cores = torch.get_num_threads()
        self.threads = max(
            1, cores - overlap
        )  # beside the forward pass one core is left to launch the GPU's work
        self.worker = ThreadPoolExecutor(1, "optimizer") if overlap else None
        self.offsets, at = [], 0
        for numel in (
            zero.fp16_partitioned_groups_flat_numel
        ):  # an fp32 flat on NVMe is empty until it is read
            self.offsets.append(at)
            at += numel
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
            self.norms.update(
                zip((p.ds_id for p in params if p.ds_id in self.real), norms)
            )  # the last word of each parameter
        for held, parts in _runs(pairs):
            held.copy_(parts[0] if len(parts) == 1 else torch.cat(parts), non_blocking=True)
        return [held for held, _ in pairs]

    def reset_cpu_buffers(self):
        self.norms, self.seen, self.norm = {}, set(), None

    # -- the step ----------------------------------------------------------------------------------------------------
    def total_norm(self):
        """The norm of all gradients on all ranks, times the loss scale; infinite or NaN where one is."""
        if self.norm is None:
            found = list(self.norms.values()) or [
                torch.zeros((), device=get_accelerator().current_device_name())
            ]
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
        group, state = (
            dict(zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]),
            zero.optimizer.state[flat],
        )
        if not state:
            state.update(
                step=0,
                exp_avg=torch.zeros_like(flat, requires_grad=False),
                exp_avg_sq=torch.zeros_like(flat, requires_grad=False),
            )
        state["step"] += 1
        for param in zero.fp16_groups[i]:
            if param.ds_id in self.real and param.ds_id not in self.seen:
                self.table[
                    param.ds_id
                ].zero_()  # no gradient this time; what lies there is an older one
        own = (
            low is not None
            and low.device.type == "cpu"
            and low.dtype == zero.grad_partitions_flat_buffer.dtype
        )
        if own:
            self.written.add(i)
        grads = zero.grad_partitions_flat_buffer.narrow(0, self.offsets[i], flat.numel())
        self.queue[i] = update_of(flat, grads, state, group, self.scale, low if own else None)
        if (
            not own or zero.swap_optimizer
        ):  # its values go out by the stock way, or to NVMe, at once
            self._start([i])
        if i == len(zero.fp16_groups) - 1:  # also where its own values are out already
            self._start([i for i in self.queue if not self.worker or i in self.first])
            self._start(list(self.queue), self.worker)

    def _start(self, groups, worker=None):
        """Have these updates made: now, or by the worker."""
        if not groups:
            return
        updates = (Update * len(groups))(*(self.queue.pop(i) for i in groups))
        if worker:
            self.pending.update(zip(groups, updates, strict=True))
            self.made = worker.submit(run, self.adam, updates, self.bits, self.threads)
        else:
            run(self.adam, updates, self.bits, self.threads)

    # -- the step beside the next forward pass -----------------------------------------------------------------------
    def wait_for(self, params):
        """Before parameters are fetched: their update is done."""
        for group in {
            self.group_of[p.ds_id] for p in params if p.ds_id in self.group_of
        } & self.pending.keys():
            self.adam.adam_wait(ctypes.byref(self.pending.pop(group)))

    def drain(self):
        """All updates are done."""
        if self.pending:
            self.made.result()
            self.pending.clear()

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
        """After it: what stayed gets its new values, neighbours in one copy and one gathering."""
        stayed = [
            p
            for p in self.zero.persistent_parameters
            if p.requires_grad and p.ds_status == ZeroParamStatus.AVAILABLE
        ]
        self.post_step_plain(timer_names)
        group, ranks = self.zero.dp_process_group, dist.get_world_size(self.zero.dp_process_group)
        runs = _runs([(p.ds_tensor.data, p) for p in stayed])
        for held, params in sorted(
            runs, key=lambda run: run[1][0].ds_id
        ):  # addresses, and so their order, differ between ranks
            new = held.to(params[0].device, non_blocking=True).view(1, -1)
            if ranks > 1:
                own, new = new, new.new_empty(ranks, held.numel())
                dist.all_gather_into_tensor(new, own, group)
            parts = new.split(
                [p.ds_tensor.numel() for p in params], dim=1
            )  # of each parameter: (ranks, elements of a rank)
            pairs = [
                (to, part)
                for p, of in zip(params, parts, strict=True)
                for to, part in zip(p.data.view(-1).split(of.shape[1]), of)
            ]
            torch._foreach_copy_([to for to, _ in pairs], [part[: len(to)] for to, part in pairs])


def _runs(pairs):
    """(host tensor, what belongs to it) pairs → (host tensor, [what belongs to it]), where small neighbours in one host buffer became
    one."""
    found, end = [], None
    for host, other in sorted(pairs, key=lambda p: p[0].data_ptr()):
        place = host.untyped_storage().data_ptr(), host.data_ptr()
        if end == place and host.numel() < SMALL:
            found[-1][1] += host.numel()
            found[-1][2].append(other)
        else:
            found.append([host, host.numel(), [other]])
        end = (
            (place[0], place[1] + host.numel() * host.element_size())
            if host.numel() < SMALL
            else None
        )
    return [
        (host if len(own) == 1 else host.as_strided((size,), (1,), host.storage_offset()), own)
        for host, size, own in found
    ]
