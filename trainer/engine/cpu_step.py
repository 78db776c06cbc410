"""Gradients on their way to the host, and the optimizer step there, for DeepSpeed 0.19.8.

The stock engine copies a gradient to the host, back to the GPU for its norm, casts it to fp32 there
and copies it once more: 8 bytes a parameter over PCIe, 4 of host memory. Then it makes three passes
over all of it: scale, Adam, cast. Here a gradient is copied once, in the type in which
micro-batches are added; its norm is taken where it was made; and one pass (adam.c) scales, steps
and casts. In bf16, with the parameters in RAM, a master weight is the weight and 16 bits more
(split_master.py). States on NVMe come and go through a ring of buffers (state_ring.py): 10 bytes a
parameter each way, 12 with an fp32 weight, where the stock engine moves 16, as it writes the fp32
gradient too (runtime/zero/stage3.py: partition_grads, _optimizer_step, unscale_and_clip_grads).
"""

import ctypes
import functools
import itertools
import math
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from trainer.console import say
from trainer.engine import split_master, state_ring
from trainer.errors import RunError
from trainer.system import ops

accelerator: Any = get_accelerator()
BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: -16}  # as adam.c has them
SMALL = 2**22  # elements; smaller tensors that are neighbours on the host are copied together


class Update(ctypes.Structure):
    """`update` of adam.c."""

    _fields_ = [
        (name, kind)
        for kind, names in (
            (ctypes.c_void_p, ("weight", "low", "exp_avg", "exp_avg_sq", "grad", "param_lp")),
            (ctypes.c_int64, ("size", "left")),
            (ctypes.c_float, ("scale", "lr", "beta1", "beta2", "eps", "decay")),
            (ctypes.c_float, ("correction1", "correction2")),
            (ctypes.c_int, ("grad_bits", "lp_bits")),
        )
        for name in names
    ]


class Job(NamedTuple):
    """The step of a sub-group whose states are on NVMe. group: the optimizer's settings.

    param_lp: as `update_of` has it; None where it is in no RAM.
    """

    grad: torch.Tensor
    group: dict[str, Any]
    step: int
    scale: float
    param_lp: torch.Tensor | None


def update_of(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    scale: float,
    param_lp: torch.Tensor | None = None,
) -> Update:
    """Return Adam's update of one flat tensor.

    weight: fp32, or int16: the low half of one whose high half is param_lp. grad: a type of BITS;
    param_lp: the low-precision copy of the weight, of the same type or, beside an fp32 gradient, of
    any. state: exp_avg, exp_avg_sq, and step, counted from 1.
    group: the optimizer's settings. scale multiplies the gradient.
    """
    (beta1, beta2), step = group["betas"], state["step"]
    halved = weight.dtype == torch.int16
    return Update(
        None if halved else weight.data_ptr(),
        weight.data_ptr() if halved else None,
        state["exp_avg"].data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        grad.data_ptr(),
        None if param_lp is None else param_lp.data_ptr(),
        weight.numel(),
        weight.numel(),
        scale,
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        1 - beta1**step,
        1 / math.sqrt(1 - beta2**step),
        BITS[grad.dtype],
        BITS[(grad if param_lp is None else param_lp).dtype],
    )


def run(adam: ctypes.CDLL, updates: Any, threads: int) -> None:
    """Make an array of updates, begun in their order. Other Python threads go on meanwhile."""
    adam.adam_step(updates, len(updates), threads)


def install(zero: Any, overlap: bool) -> None:
    """Turn this ZeRO-3 optimizer into a CpuStepOptimizer where `applies`, and say so.

    overlap: the step runs in a thread beside the next forward pass, whose layers wait for their own
    update only. Raises RunError where an optimizer on NVMe cannot be taken over.
    """
    reason = _take_over(zero, overlap)
    if reason is None:
        beside = ", beside the next forward pass" if zero.cpu_step.worker else ""
        say(f"optimizer step on the CPU: in one pass{beside}")
    elif zero.swap_optimizer:
        raise RunError(
            "the fused optimizer step does not fit this run, whose optimizer is on NVMe",
            found=reason,
            fix="--deepspeed ds_z3_offload.json, with the optimizer in RAM",
        )
    elif applies(zero):
        say(f"optimizer step on the CPU: DeepSpeed's own, {reason}")


def finish(zero: Any) -> None:
    """Wait until the last optimizer step is made."""
    if isinstance(zero, CpuStepOptimizer):
        zero.cpu_step.wait_for_all()


def applies(zero: Any) -> bool:
    """Return whether the optimizer is AdamW by DeepSpeed's CPU kernel on fp32 master weights."""
    return (
        isinstance(zero.optimizer, DeepSpeedCPUAdam)
        and zero.optimizer.adam_w_mode
        and zero.optimizer.fp32_optimizer_states
        and not zero.zenflow
        and zero.master_weights_and_grads_dtype == torch.float32
        and set(zero.subgroup_to_device.values()) == {"cpu"}
        and not zero.torch_autocast_gradscaler
    )


def _take_over(zero: Any, overlap: bool) -> str | None:
    """Take over the optimizer and return None, or the reason why not."""
    if not applies(zero):
        return type(zero.optimizer).__name__
    try:
        adam = ops.adam()
    except RunError as error:
        return str(error)
    if zero.dtype == torch.float16 and not adam.adam_knows_fp16():
        return "this C compiler does not know fp16"
    zero.cpu_step = CpuStep(zero, adam, overlap and split_master.parameters_in_ram(zero))
    zero.__class__ = CpuStepOptimizer
    for flat in zero.fp32_partitioned_groups_flat:
        flat.grad = None  # the fp32 copies of the gradients
    if split_master.applies(zero):
        zero.cpu_step.split(zero)
    if torch.cuda.is_available():
        torch._C._host_emptyCache()
    return None


class CpuStepOptimizer(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's optimizer with our way of a gradient and our step. `cpu_step` holds our state."""

    cpu_step: "CpuStep"

    @torch.no_grad()
    def partition_grads(self, params: list[Any], partitions: list[Any]) -> None:
        """Copy this rank's shards of the gradients to the host. Here a gradient leaves the GPU.

        params: parameters whose gradient is complete. partitions: this rank's shard of each.
        """
        step = self.cpu_step
        step.wait_for_all()  # the last step still reads its gradients
        copies = {}
        for param, shard in zip(params, partitions):
            if param.ds_id in step.real:
                on_host = step.host_gradients[param.ds_id][: shard.numel()]
                shard = shard.view(-1)
                if param.ds_id in step.norms:  # an earlier micro-batch of this step
                    shard = on_host.to(shard.device, non_blocking=True).add_(shard)
                copies[param.ds_id] = on_host, shard
                if param.grad is not None and param.grad.is_cuda:
                    param.grad.record_stream(torch.cuda.current_stream())
            param.grad = None
        if copies:
            shards = [shard for _, shard in copies.values()]
            norms = torch._foreach_norm(shards, 2, dtype=torch.float32)
            step.norms.update(zip(copies, norms))  # the last micro-batch's is the whole one
        for on_host, shards in _join_neighbours(copies.values()):
            whole = shards[0] if len(shards) == 1 else torch.cat(shards)
            on_host.copy_(whole, non_blocking=True)

    def reset_cpu_buffers(self) -> None:
        """Forget the gradients of the last step."""
        self.cpu_step.norms, self.cpu_step.total_norm = {}, None

    def _total_norm(self) -> torch.Tensor:
        """Return the norm of all gradients on all ranks, times the loss scale."""
        step = self.cpu_step
        if step.total_norm is None:
            norms = list(step.norms.values()) or [
                torch.zeros((), device=accelerator.current_device_name())
            ]
            total = torch.stack(norms).square_().sum()
            dist.all_reduce(total, group=self.dp_process_group)
            step.total_norm = total.sqrt().cpu()
        return step.total_norm

    def _get_norm_groups(self) -> list[torch.Tensor]:
        return [self._total_norm()]

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """Return whether a gradient on any rank is not finite."""
        return not torch.isfinite(self._total_norm())

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Any) -> None:
        """Set the factor that undoes the loss scale and clips; the step multiplies by it."""
        scale = float(self.loss_scale)
        if self.clip_grad > 0:
            scale *= max(1.0, (float(total_norm) / scale + 1e-6) / self.clip_grad)
        self.cpu_step.scale = 1.0 / scale

    def _optimizer_step(self, sub_group_id: int) -> None:
        """Queue the update of sub-group i; the last one starts all that are queued."""
        step, i = self.cpu_step, sub_group_id
        flat, flat_lp = self.fp32_partitioned_groups_flat[i], self.fp16_partitioned_groups_flat[i]
        group = self.optimizer.param_groups[self.sub_group_to_group_id[i]]
        state = self.optimizer.state[flat]
        numel, on_nvme = self.fp16_partitioned_groups_flat_numel[i], step.is_on_nvme(i)
        if not state:
            in_ram = 0 if on_nvme else numel
            state.update(step=0, exp_avg=torch.zeros(in_ram), exp_avg_sq=torch.zeros(in_ram))
        state["step"] += 1
        for param in self.fp16_groups[i]:
            if param.ds_id in step.real and param.ds_id not in step.norms:
                step.host_gradients[param.ds_id].zero_()  # an older step's gradient lies there
        buffer = self.grad_partitions_flat_buffer
        casts = (
            flat_lp is not None
            and flat_lp.device.type == "cpu"
            and buffer.dtype in (torch.float32, flat_lp.dtype)
        )
        if casts:
            step.written.add(i)
        grads = buffer.narrow(0, step.offsets[i], numel)
        copy = flat_lp if casts else None
        if on_nvme:
            step.queue[i] = Job(grads, dict(group), state["step"], step.scale, copy)
        else:
            weight: Any = step.low.get(i, flat)
            step.queue[i] = update_of(weight, grads, state, group, step.scale, copy)
            if not casts:
                step.start([i])  # the stock engine takes its values at once
        if i == len(self.fp16_groups) - 1:
            step.start([k for k in step.queue if not step.worker or k in step.at_once])
            step.start(list(step.queue), step.worker)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        step = self.cpu_step
        if sub_group_id in step.written or sub_group_id in step.low:
            # The low-precision copy is made: by adam.c, or as a half of the weight.
            step.written.discard(sub_group_id)
            self._unflatten_partitioned_parameters(sub_group_id)
        elif not step.is_on_nvme(sub_group_id):  # else `publish` does it, when the ring has made it
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)

    def publish(self, i: int, weight: torch.Tensor) -> None:
        """Give a sub-group, whose parameters are on the GPU or on NVMe, its new fp32 weights."""
        flat = self.fp32_partitioned_groups_flat[i]
        flat.data = weight
        super()._reassign_or_swap_out_partitioned_parameters(i)
        flat.data = torch.empty(0)

    def _prepare_sub_group(self, sub_group_id: int, timer_names: Any) -> None:
        """Swap nothing in: the ring does."""

    def _release_sub_group(self, sub_group_id: int, timer_names: Any) -> None:
        """Swap nothing out."""

    def _partition_all_parameters(self) -> None:
        """Before the step: release what is gathered.

        Adapters and norms stay: hundreds of small tensors, which `_refresh` updates in place.
        """
        if self.params_in_nvme_and_cpu:
            super()._partition_all_parameters()
            return
        coordinator: Any = self._get_param_coordinator()
        inflight = coordinator._PartitionedParameterCoordinator__inflight_param_registry
        release = coordinator._PartitionedParameterCoordinator__release_param
        for param in self.parameter_offload.module.parameters():
            if param.ds_status == ZeroParamStatus.INFLIGHT:
                inflight.pop(param).wait()
            param.ds_active_sub_modules.clear()
            if not param.ds_persist:
                release(param)

    def _post_step(self, timer_names: Any) -> None:
        stayed = [
            param
            for param in self.persistent_parameters
            if param.requires_grad
            and param.ds_status == ZeroParamStatus.AVAILABLE
            and not self.params_in_nvme_and_cpu
        ]
        super()._post_step(timer_names)
        self._refresh(stayed)

    @torch.no_grad()
    def _refresh(self, params: list[Any]) -> None:
        """After the step: give parameters that stayed gathered their new values.

        Neighbours on the host travel in one copy and one all-gather.
        """
        group = self.dp_process_group
        ranks = dist.get_world_size(group)
        joined = _join_neighbours((p.ds_tensor.data, p) for p in params)
        # Addresses, and so their order, differ between ranks.
        for on_host, together in sorted(joined, key=lambda pair: pair[1][0].ds_id):
            new = on_host.to(together[0].device, non_blocking=True).view(1, -1)
            if ranks > 1:
                shard, new = new, new.new_empty(ranks, on_host.numel())
                dist.all_gather_into_tensor(new, shard, group)
            targets, sources = [], []
            # Of each parameter: (ranks, elements of one rank's shard).
            shards = new.split([p.ds_tensor.numel() for p in together], dim=1)
            for param, of_ranks in zip(together, shards, strict=True):
                # The last ranks' shards may be padding, which the parameter lacks.
                for target, source in zip(param.data.view(-1).split(of_ranks.shape[1]), of_ranks):
                    targets.append(target)
                    sources.append(source[: len(target)])
            torch._foreach_copy_(targets, sources)


class CpuStep:
    """What CpuStepOptimizer knows beside DeepSpeed.

    queue, pending: {sub-group: its update}, to be made and being made. written: sub-groups whose
    low-precision copy adam.c makes. low: {sub-group: low halves of its master weights}, where the
    high ones are its bf16 weights and there is no fp32 tensor. worker: the thread of steps beside
    the forward pass, or None. norms: {ds_id of a parameter: norm} of one step's gradients so far;
    total_norm: of all of them.
    """

    def __init__(self, zero: Any, adam: ctypes.CDLL, overlap: bool) -> None:
        self.adam = adam
        # partition_grads adds to the buffer in the buffer's type. DeepSpeed would first make a copy
        # of each shard in that type on the GPU.
        zero.gradient_accumulation_dtype = zero.communication_data_type
        self.host_gradients = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        params = [(i, param) for i, group in enumerate(zero.fp16_groups) for param in group]
        # Of the smallest parameters some ranks hold padding alone.
        self.real = {
            param.ds_id
            for _, param in params
            if param.partition_numel() * zero._get_param_partition_rank(param) < param.ds_numel
        }
        self.scale = 1.0
        self.written: set[int] = set()
        self.low: dict[int, torch.Tensor] = {}
        self.queue: dict[int, Update | Job] = {}
        self.pending: dict[int, Update] = {}
        self.group_of = {param.ds_id: i for i, param in params}
        # What stays on the GPU gets its new values at once.
        self.at_once = {self.group_of.get(param.ds_id) for param in zero.persistent_parameters}
        # Beside the forward pass one core is left to launch the GPU's work.
        self.threads = max(1, torch.get_num_threads() - overlap)
        self.worker = ThreadPoolExecutor(1, "optimizer") if overlap else None
        self.made: Future[None] | None = None
        self.failure: BaseException | None = None
        self.zero = weakref.proxy(zero)
        self.ring: state_ring.StateRing | None = None
        if isinstance(zero.optimizer_swapper, state_ring.RingSwapper):
            self.ring = zero.optimizer_swapper.ring
        if overlap:
            for _, param in params:
                param.pending_step = self  # patches.ensure_availability waits for it
        # An fp32 tensor on NVMe is empty until it is read: the offsets come from the 16-bit ones.
        self.offsets = [0, *itertools.accumulate(zero.fp16_partitioned_groups_flat_numel)]
        self.norms: dict[int, torch.Tensor] = {}
        self.total_norm: torch.Tensor | None = None

    def split(self, zero: Any) -> None:
        """Give the fp32 master weights back. Made from the bf16 weights, they have nothing more."""
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if not self.is_on_nvme(i):
                self.low[i] = torch.zeros(flat.numel(), dtype=torch.int16)
                flat.data = torch.empty(0)

    def is_on_nvme(self, i: int) -> bool:
        """Return whether a sub-group's states are there."""
        return self.ring is not None and i in self.ring.sizes

    def start(self, groups: list[int], worker: ThreadPoolExecutor | None = None) -> None:
        """Make the queued updates of these sub-groups: now, or in the worker."""
        if not groups:
            return
        queued = {i: self.queue.pop(i) for i in groups}
        jobs = {i: job for i, job in queued.items() if isinstance(job, Job)}
        in_ram = [i for i in groups if i not in jobs]
        updates = (Update * len(in_ram))(*(queued[i] for i in in_ram))
        # What a layer waits for. A job's counts the elements of the pieces that are made.
        counts = {i: Update(left=job.grad.numel()) for i, job in jobs.items()}
        make = functools.partial(self._make, updates, jobs, counts)
        if worker:
            self.pending.update(zip(in_ram, updates, strict=True))
            self.pending.update(counts)
            self.made = worker.submit(make)
        else:
            make()

    def _make(self, updates: Any, jobs: dict[int, Job], counts: dict[int, Update]) -> None:
        """Make all updates in RAM, and then those whose states are on NVMe."""
        whole: dict[int, torch.Tensor] = {}  # the fp32 weights of the sub-group that is made

        def make_piece(piece: state_ring.Piece, tensors: state_ring.Tensors) -> None:
            i, job = piece.group, jobs[piece.group]
            span = slice(piece.begin, piece.begin + piece.numel)
            param_lp = None if job.param_lp is None else job.param_lp[span]
            master = tensors.get(state_ring.LOW)
            if master is None:
                master = tensors[state_ring.WEIGHT]
                if param_lp is not None and i not in ring.on_disk:
                    master.copy_(param_lp)
            state = {**tensors, "step": job.step}
            update = update_of(master, job.grad[span], state, job.group, job.scale, param_lp)
            run(self.adam, (Update * 1)(update), self.threads)
            counts[i].left -= piece.numel
            if param_lp is None:  # the parameters are on NVMe too, or on the GPU
                if i not in whole:
                    whole[i] = torch.empty(job.grad.numel())
                whole[i][span] = master
                if not counts[i].left:
                    self.zero.publish(i, whole.pop(i))

        try:
            if len(updates):
                run(self.adam, updates, self.threads)
            if jobs:
                ring: Any = self.ring
                ring.step(jobs, make_piece)
        except BaseException as error:
            self.failure = error  # before anybody who waits goes on
            for update in (*updates, *counts.values()):
                update.left = 0
            raise

    def wait_for(self, params: Iterable[Any]) -> None:
        """Wait until these parameters have their new values."""
        # The group of a frozen parameter is None.
        for group in self.pending.keys() & {self.group_of.get(p.ds_id) for p in params}:
            self.adam.adam_wait(ctypes.byref(self.pending.pop(group)))
            if self.failure:
                raise self.failure

    def wait_for_all(self) -> None:
        """Wait until every update is made."""
        if self.pending and self.made:
            self.made.result()
            self.pending.clear()


def _join_neighbours(pairs: Iterable[tuple[torch.Tensor, Any]]) -> list[tuple[torch.Tensor, list]]:
    """Join small tensors that are neighbours in one host buffer.

    pairs: (host tensor, what belongs to it). Returns (host tensor, all that belongs to it).
    """
    joined, end = [], None
    for tensor, other in sorted(pairs, key=lambda pair: pair[0].data_ptr()):
        buffer, address = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
        small = tensor.numel() < SMALL
        if end == (buffer, address) and small:
            first, others = joined[-1]
            joined[-1] = first.as_strided((first.numel() + tensor.numel(),), (1,)), [*others, other]
        else:
            joined.append((tensor, [other]))
        end = (buffer, address + tensor.nbytes) if small else None
    return joined
