"""The optimizer step, for DeepSpeed 0.19.8.

The stock engine makes three passes over all of it: scale, Adam, cast. Here one pass scales, steps
and casts, on the CPU (adam.c) or on the GPU (gpu_adam.py), with the same bits; the gradients come
to it once (gradients.py). In bf16, with no parameters on NVMe, a master weight is the weight and 16
bits more (split_master.py). Each sub-group's weights, gradient and states are where placement.py
says. States on NVMe come and go through a ring of buffers (state_ring.py): 10 bytes a parameter
each way, 12 with an fp32 weight, where the stock engine moves 16, as it writes the fp32 gradient
too (runtime/zero/stage3.py: _optimizer_step, unscale_and_clip_grads).
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from trainer.config.ds_config import RING_PIECE, Tiers
from trainer.console import say
from trainer.distributed import all_gather_object
from trainer.engine import (
    aio,
    all_gather,
    cpu_adam,
    gpu_adam,
    gradients,
    placement,
    resident,
    split_master,
    state_ring,
)
from trainer.engine.cpu_adam import Update
from trainer.engine.placement import HBM, NVME, RAM
from trainer.engine.staging import Staging
from trainer.engine.state_ring import LOW, WEIGHT, Piece, StateRing, Tensors
from trainer.errors import RunError
from trainer.system import ops

accelerator: Any = get_accelerator()


class Job(NamedTuple):
    """The step of a sub-group that is made in pieces. group: the optimizer's settings."""

    group: dict[str, Any]
    step: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Wanted:
    """overlap: the CPU's step runs in a thread beside the next forward pass, whose layers wait for
    their own update only. tiers: None: as DeepSpeed's keys have it. gpu_work: bytes that the plan
    wants on the GPU beside what is placed there. resident: see resident.settle.
    """

    overlap: bool
    tiers: Tiers | None = None
    gpu_work: float = 0
    resident: bool = True


_wanted: Wanted | None = None


@contextlib.contextmanager
def wanted(step: Wanted | None) -> Iterator[None]:
    """Let an engine that is made within have this step; None: DeepSpeed's own."""
    global _wanted
    _wanted = step
    try:
        yield
    finally:
        _wanted = None


def take_over(zero: Any) -> bool:
    """Make a ZeRO-3 optimizer that is being set up a FusedStepOptimizer, and say so.

    Its parameters are in their places, and nothing else is there. Returns False where DeepSpeed's
    own goes on. Raises RunError where that cannot be, as states are on NVMe or placed by value.
    """
    if _wanted is None:
        return False
    reason, on_gpu = (
        next(filter(None, reasons), "") for reasons in zip(*all_gather_object(_why_not(zero)))
    )
    if not zero.offload_optimizer:
        reason = reason or on_gpu
    if not reason:
        zero.__class__ = FusedStepOptimizer
        zero.fused_step = FusedStep(zero, ops.adam(), _wanted, on_gpu)
        # Or DeepSpeed would tell a swapper when the backward pass begins.
        zero.swap_optimizer = False
        if _wanted.resident:
            resident.settle(zero)
        say(zero.fused_step.describe())
        return True
    if zero.swap_optimizer or _wanted.tiers:
        raise RunError(
            "the fused optimizer step, which this configuration needs, does not fit this run",
            found=reason,
            fix="--deepspeed ds_z3_offload.json, with the optimizer in RAM",
        )
    if applies(zero):
        say(f"optimizer step: DeepSpeed's own, {reason}")
    return False


def _why_not(zero: Any) -> tuple[str, str]:
    """Return why our step cannot be made, and why not on this rank's GPU; "" where it can."""
    if not applies(zero):
        return type(zero.optimizer).__name__, ""
    try:
        adam = ops.adam()
    except RunError as error:
        return str(error), ""
    if zero.offload_param and not zero.offload_optimizer:
        return "as parameters are in RAM and their states on the GPU", ""
    if zero.dtype == torch.float16 and not adam.adam_knows_fp16():
        return "this C compiler does not know fp16", ""
    if zero.gradient_accumulation_dtype not in (torch.float32, zero.dtype):
        return f"gradients are added in {zero.gradient_accumulation_dtype}", ""
    tiers = _wanted.tiers if _wanted else None
    on_gpu = tiers.states_in_hbm > 0 if tiers else not zero.offload_optimizer
    if not (on_gpu and torch.cuda.is_available()):
        return "", ""
    halved = split_master.applies(zero)
    return "", gpu_adam.differs(adam, zero.dtype, zero.gradient_accumulation_dtype, halved)


def tiers_of_weights(zero: Any, numels: list[int]) -> list[str]:
    """Return the tier of each sub-group's weights, of so many elements: HBM or RAM.

    Nothing is on the GPU yet: where less of it is free than was planned with, less will be there.
    """
    global _wanted
    if _wanted is None or _wanted.tiers is None or not applies(zero):
        return placement.place(numels, placement.of_engine(zero)).weights
    tiers, moved = _wanted.tiers, []
    if torch.cuda.is_available():
        tiers, moved = placement.fit_gpu(tiers, _sizes(zero), _wanted.gpu_work)
    for line in moved:
        say(line)
    _wanted = dataclasses.replace(_wanted, tiers=tiers)
    return placement.place(numels, tiers).weights


def _sizes(zero: Any) -> placement.Sizes:
    itemsize, state = zero.dtype.itemsize, 10 if zero.dtype == torch.bfloat16 else 12
    return placement.Sizes(itemsize, zero.gradient_accumulation_dtype.itemsize, state)


def finish(zero: Any) -> None:
    """Wait until the last optimizer step is made."""
    if isinstance(zero, FusedStepOptimizer):
        zero.fused_step.wait_for_all()


def applies(zero: Any) -> bool:
    """Return whether the optimizer is AdamW, on fp32 master weights; without offload, in bf16."""
    optimizer = zero.optimizer
    if isinstance(optimizer, DeepSpeedCPUAdam):
        known = optimizer.adam_w_mode and optimizer.fp32_optimizer_states
    else:
        settings = getattr(optimizer, "defaults", {})
        known = isinstance(optimizer, torch.optim.AdamW) and zero.dtype == torch.bfloat16
        known &= not (settings.get("amsgrad") or settings.get("maximize"))
        known &= not zero.offload_optimizer
    return (
        known
        and not zero.zenflow
        and zero.partial_offload == 1.0
        and zero.master_weights_and_grads_dtype == torch.float32
    )


class FusedStepOptimizer(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's optimizer with our way of a gradient and our step. `fused_step`: its state."""

    fused_step: "FusedStep"

    def reduce_ready_partitions_and_remove_grads(self, param: Any) -> None:
        """Add a complete gradient to its place at once, where no other rank has a part in it.

        DeepSpeed's bucket is for what is reduced. On one rank it is two copies on the GPU more, a
        wait of the host in each micro-batch, and a fifth of the host's time (docs/infinity.md).
        """
        step = self.fused_step
        if self._coalesce_grad_reduction or not step.gradients.stay(param):
            super().reduce_ready_partitions_and_remove_grads(param)
        elif getattr(param, "ds_grad_is_ready", True):  # not between the tiles of one computation
            step.wait_for_gradients()
            step.gradients.add(param, param.grad)
            param.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """End a backward pass; gradients that came after their layer's end are not left behind.

        A parameter of two decoder layers has its gradient when both are through. DeepSpeed asks for
        it at the end of each, takes it for zero, and adds it only if its bucket is still open then.
        """
        waiting = {id(p) for bucket in self.ipg_buckets.values() for p in bucket.params}
        for param in itertools.chain(*self.fp16_groups):
            if param.grad is not None and id(param) not in waiting:
                self.reduce_ready_partitions_and_remove_grads(param)
        super().independent_gradient_partition_epilogue()

    def partition_grads(self, params: list[Any], partitions: list[Any]) -> None:
        """Bring this rank's shards of complete gradients to their places."""
        self.fused_step.wait_for_gradients()
        self.fused_step.gradients.take(params, partitions)

    def reset_cpu_buffers(self) -> None:
        """Forget the gradients of the last step."""
        self.fused_step.gradients.forget()
        self.fused_step.total_norm = None

    def _total_norm(self) -> torch.Tensor:
        """Return the norm of all gradients on all ranks, times the loss scale."""
        step = self.fused_step
        if step.total_norm is None:
            total = torch.stack(step.gradients.norms()).square_().sum()
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
        self.fused_step.scale = 1.0 / scale

    def _overflow_clean_up(self, prev_scale: Any) -> None:
        super()._overflow_clean_up(prev_scale)
        self.reset_cpu_buffers()

    def _optimizer_step(self, sub_group_id: int) -> None:
        """Make the update of sub-group i on the GPU, or queue it; the last one starts the queue."""
        step, i = self.fused_step, sub_group_id
        if i == 0:
            step.wait_for_all()  # of the last step: ring and staging are one step's at a time
        flat, flat_lp = self.fp32_partitioned_groups_flat[i], self.fp16_partitioned_groups_flat[i]
        group = self.optimizer.param_groups[self.sub_group_to_group_id[i]]
        state, tier = self.optimizer.state[flat], step.placement.states[i]
        numel = self.fp16_partitioned_groups_flat_numel[i]
        if not state:
            moments = step.moments.pop(i, None)
            if moments is None:
                moments = _moments(0 if tier == NVME else numel, flat.device)
            state.update(zip(("step", "exp_avg", "exp_avg_sq"), (0, *moments)))
        state["step"] += 1
        step.gradients.clear(self.fp16_groups[i])
        grad = step.gradients.flat[i]
        parts: Any = step.low.get(i, flat), grad, state, group, step.scale, flat_lp
        if flat.is_cuda:
            gpu_adam.run(*parts)
        elif tier == NVME or step.staging.moves(i):
            step.queue[i] = Job(dict(group), state["step"], step.scale)
        else:
            step.queue[i] = cpu_adam.update_of(*parts)
            if flat_lp is None:
                step.start([i])  # the parameters on NVMe get their values at once
        if i == len(self.fp16_groups) - 1:
            step.start([k for k in step.queue if not step.worker or k in step.at_once])
            step.start(list(step.queue), step.worker)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        """Give the parameters on NVMe their values. Others have them from the step itself."""
        flat_lp = self.fp16_partitioned_groups_flat[sub_group_id]
        # States on NVMe: `publish` does it, when the ring has made the weights.
        if flat_lp is None and self.fused_step.placement.states[sub_group_id] != NVME:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)

    def publish(self, i: int, weight: torch.Tensor) -> None:
        """Give a sub-group, whose parameters are on NVMe, its new fp32 weights."""
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
            if param in inflight:
                inflight.pop(param).wait()
            param.ds_active_sub_modules.clear()
            if not param.ds_persist:
                release(param)

    def empty_partition_cache(self) -> None:
        """Release what is gathered, but for what stays."""
        self._partition_all_parameters()

    def _post_step(self, timer_names: Any) -> None:
        stayed = [
            param
            for param in self.persistent_parameters
            if param.requires_grad
            and param.ds_status == ZeroParamStatus.AVAILABLE
            and not resident.is_resident(param)
            and not self.params_in_nvme_and_cpu
        ]
        super()._post_step(timer_names)
        self.reset_cpu_buffers()
        coordinator: Any = self._get_param_coordinator()
        all_gather.wait_for_updates(coordinator._PartitionedParameterCoordinator__allgather_stream)
        self._refresh(stayed)

    @torch.no_grad()
    def _refresh(self, params: list[Any]) -> None:
        """After the step: give parameters that stayed gathered their new values.

        Neighbours in one buffer travel in one copy and one all-gather.
        """
        group = self.dp_process_group
        ranks = dist.get_world_size(group)
        joined = gradients.join_neighbours((p.ds_tensor.data, p) for p in params)
        # Addresses, and so their order, differ between ranks.
        for place, together in sorted(joined, key=lambda pair: pair[1][0].ds_id):
            new = place.to(together[0].device, non_blocking=True).view(1, -1)
            if ranks > 1:
                shard, new = new, new.new_empty(ranks, place.numel())
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


class FusedStep:
    """What FusedStepOptimizer knows beside DeepSpeed.

    placement: the tiers of each sub-group. low: {sub-group: low halves of its master weights},
    where the high ones are its bf16 weights and there is no fp32 tensor. moments: those on the GPU
    before the first step. queue, pending: {sub-group: its update}, to be made and being made.
    worker: the thread of steps beside the forward pass, or None. total_norm: of one step's
    gradients on all ranks.
    """

    def __init__(self, zero: Any, adam: ctypes.CDLL, wanted: Wanted, not_on_gpu: str) -> None:
        """not_on_gpu: why the GPU cannot make the CPU's updates, or ""."""
        self.adam = adam
        self.zero: Any = weakref.proxy(zero)
        self.numels = zero.fp16_partitioned_groups_flat_numel
        self.weights: list[Any] = zero.fp16_partitioned_groups_flat
        self.halved = split_master.applies(zero)
        self.placement = _placement(zero, wanted, not_on_gpu)
        params = [(i, param) for i, group in enumerate(zero.fp16_groups) for param in group]
        self.scale = 1.0
        self.low: dict[int, torch.Tensor] = {}
        self.moments: dict[int, tuple[torch.Tensor, ...]] = {}
        self.queue: dict[int, Update | Job] = {}
        self.pending: dict[int, Update] = {}
        self.group_of = {param.ds_id: i for i, param in params}
        # What stays on the GPU gets its new values at once.
        self.at_once = {self.group_of.get(param.ds_id) for param in zero.persistent_parameters}
        overlap = wanted.overlap and all(weight is not None for weight in self.weights)
        overlap &= any(tier != HBM for tier in self.placement.states)
        # Beside the forward pass one core is left to launch the GPU's work.
        self.threads = max(1, torch.get_num_threads() - overlap)
        self.worker = None
        if overlap:
            device = torch.cuda.current_device() if torch.cuda.is_available() else -1  # none
            self.worker = ThreadPoolExecutor(1, "optimizer", torch.cuda.set_device, (device,))
        self.made: Future[None] | None = None
        self.failure: BaseException | None = None
        if overlap:
            for _, param in params:
                param.pending_step = self  # patches.ensure_availability waits for it
        self.total_norm: torch.Tensor | None = None
        self.ring = self._make_ring()
        self._make_masters()
        self.gradients = gradients.Gradients(zero, self.placement.gradients, self)
        self.staging = Staging(self.placement, self.gradients.flat, self.weights, self.halved)

    def _make_ring(self) -> StateRing | None:
        tiers = enumerate(self.placement.states)
        sizes = {i: self.numels[i] for i, tier in tiers if tier == NVME}
        weight = {LOW: torch.int16} if self.halved else {WEIGHT: torch.float32}
        dtypes = {**weight, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        return StateRing(aio.watched, dist.get_rank(), sizes, dtypes) if sizes else None

    def _make_masters(self) -> None:
        """Make the master weights: halves, or fp32 tensors, empty where states are on NVMe."""
        zero = self.zero
        for i, tier in enumerate(self.placement.states):
            device, weight = self._device(tier), self.weights[i]
            flat = torch.empty(0, device=device)
            if self.halved and tier != NVME:
                # Made from the bf16 weights, they have nothing more.
                self.low[i] = torch.zeros(self.numels[i], dtype=torch.int16, device=device)
            elif not self.halved and (weight is None or tier != NVME):
                flat = torch.empty(self.numels[i], device=device)
                if weight is None:
                    zero._swap_in_sub_group_to_flat_buffer(flat, i)
                else:
                    flat.copy_(weight)
                if tier == NVME:
                    flat = self._write(i, flat)
            if flat.is_cuda:  # now: a GPU that is too small for them shows it at the start
                self.moments[i] = _moments(self.numels[i], flat.device)
            flat.requires_grad = True
            zero.fp32_partitioned_groups_flat.append(flat)
        for group in zero.optimizer.param_groups:
            group["params"] = []

    def _write(self, i: int, master: torch.Tensor) -> torch.Tensor:
        """Write the fp32 weights of parameters on NVMe, and return an empty tensor."""

        def fill(piece: Piece, tensors: Tensors) -> None:
            for tensor in tensors.values():
                tensor.zero_()
            tensors[WEIGHT].copy_(master[piece.begin : piece.begin + piece.numel])

        ring: Any = self.ring
        ring.step([i], fill, read=False)
        return torch.empty(0)

    @staticmethod
    def _device(tier: str) -> str:
        return accelerator.current_device_name() if tier == HBM else "cpu"

    def describe(self) -> str:
        """Return where the optimizer step is made, for people."""
        sums: dict[str, int] = dict.fromkeys((HBM, RAM, NVME), 0)
        for numel, tier in zip(self.numels, self.placement.states, strict=True):
            sums[tier] += numel
        shares = {tier: numel / sum(sums.values()) for tier, numel in sums.items() if numel}
        places = {HBM: "on the GPU", RAM: "on the CPU", NVME: "on the CPU, states on NVMe"}
        if self._device(HBM) == "cpu":
            places[HBM] = places[RAM]
        where = ", ".join(f"{share:.0%} {places[tier]}" for tier, share in shares.items())
        if len(shares) == 1:
            where = places[next(iter(shares))]
        beside = ", beside the next forward pass" if self.worker else ""
        return f"optimizer step {where}: in one pass{beside}"

    def is_on_nvme(self, i: int) -> bool:
        """Return whether a sub-group's states are there."""
        return self.placement.states[i] == NVME

    def start(self, groups: list[int], worker: ThreadPoolExecutor | None = None) -> None:
        """Make the queued updates of these sub-groups: now, or in the worker."""
        if not groups:
            return
        queued = {i: self.queue.pop(i) for i in groups}
        jobs = {i: job for i, job in queued.items() if isinstance(job, Job)}
        whole = [i for i in groups if i not in jobs]
        updates = (Update * len(whole))(*(queued[i] for i in whole))
        # What a layer waits for. A job's counts the elements of the pieces that are made.
        counts = {i: Update(left=self.numels[i]) for i in jobs}
        in_order = sorted(jobs, key=self.is_on_nvme)  # as `_make` takes them
        self.staging.begin([p for i in in_order for p in state_ring.pieces(i, self.numels[i])])
        make = functools.partial(self._make, updates, jobs, counts)
        if worker:
            self.pending.update(zip(whole, updates, strict=True))
            self.pending.update(counts)
            self.made = worker.submit(make)
        else:
            make()

    def _make(self, updates: Any, jobs: dict[int, Job], counts: dict[int, Update]) -> None:
        """Make all updates in RAM, and then those whose states are on NVMe."""
        masters: dict[int, torch.Tensor] = {}  # fp32, of the sub-group that goes to NVMe

        def make_piece(piece: Piece, tensors: Tensors) -> None:
            i, job = piece.group, jobs[piece.group]
            grad, param_lp = self.staging.take(piece)
            master = tensors.get(LOW)
            if master is None:
                master = tensors[WEIGHT]
                if self.is_on_nvme(i) and i not in ring.on_disk and param_lp is not None:
                    master.copy_(self.weights[i][piece.begin : piece.begin + piece.numel])
            state = {**tensors, "step": job.step}
            update = cpu_adam.update_of(master, grad, state, job.group, job.scale, param_lp)
            cpu_adam.run(self.adam, (Update * 1)(update), self.threads)
            if param_lp is None:  # the parameters are on NVMe too
                if i not in masters:
                    masters[i] = torch.empty(self.numels[i])
                masters[i][piece.begin : piece.begin + piece.numel] = master
                if piece.begin + piece.numel == self.numels[i]:
                    self.zero.publish(i, masters.pop(i))
            self.staging.give(piece, functools.partial(_count, counts[i], piece.numel))

        ring: Any = self.ring
        try:
            in_ram = [i for i in jobs if not self.is_on_nvme(i)]
            if len(in_ram) < len(jobs):
                ring.begin([i for i in jobs if self.is_on_nvme(i)])
            for piece in (piece for i in in_ram for piece in state_ring.pieces(i, self.numels[i])):
                make_piece(piece, self._tensors(piece))
            if len(updates):
                cpu_adam.run(self.adam, updates, self.threads)
            if len(in_ram) < len(jobs):
                ring.go_on(make_piece)
            self.staging.finish()
        except BaseException as error:
            self.failure = error  # before anybody who waits goes on
            for update in (*updates, *counts.values()):
                update.left = 0
            raise

    def _tensors(self, piece: Piece) -> Tensors:
        """Return a piece's states that are in RAM."""
        i, span = piece.group, slice(piece.begin, piece.begin + piece.numel)
        flat = self.zero.fp32_partitioned_groups_flat[i]
        state = self.zero.optimizer.state[flat]
        master = {LOW: self.low[i]} if self.halved else {WEIGHT: flat.data}
        moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
        return {key: tensor[span] for key, tensor in {**master, **moments}.items()}

    def wait_for(self, params: Iterable[Any]) -> None:
        """Wait until these parameters have their new values."""
        # The group of a frozen parameter is None.
        self.wait_for_groups(self.pending.keys() & {self.group_of.get(p.ds_id) for p in params})

    def wait_for_groups(self, groups: Iterable[int]) -> None:
        """Wait until the updates of these sub-groups are made."""
        for group in groups:
            self.adam.adam_wait(ctypes.byref(self.pending.pop(group)))
            if self.failure:
                raise self.failure

    def wait_for_gradients(self) -> None:
        """Wait until no update reads a gradient any more; the disk may still be written."""
        self.wait_for_groups(list(self.pending))

    def wait_for_all(self) -> None:
        """Wait until every update is made, and is on disk where it goes there."""
        made, self.made = self.made, None
        self.pending.clear()
        if made:
            made.result()


def _moments(numel: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    return torch.zeros(numel, device=device), torch.zeros(numel, device=device)


def _count(update: Update, numel: int) -> None:
    update.left -= numel


def _placement(zero: Any, wanted: Wanted, not_on_gpu: str) -> placement.Placement:
    """Return the tiers of the sub-groups. What one cannot take goes to the next, and it is said.

    States are on a GPU only if it makes the CPU's updates.
    """
    numels, tiers = zero.fp16_partitioned_groups_flat_numel, wanted.tiers
    if tiers is None:
        return placement.place(numels, placement.of_engine(zero))
    if not_on_gpu:
        say(f"optimizer states: none on the GPU, as it cannot make their updates ({not_on_gpu})")
        tiers = placement.without_states_in_hbm(tiers)
    tiers, moved = placement.fit_ram(tiers, _sizes(zero), numels, aio.watched is not None)
    for line in moved:
        say(line)
    # Norms, which stay gathered, are stepped before the forward pass begins: not on NVMe.
    norms = {
        i
        for i, params in enumerate(zero.fp16_groups)
        if numels[i] < RING_PIECE and all(param.ds_persist for param in params)
    }
    return placement.place(numels, tiers, norms)
