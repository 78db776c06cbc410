"""What ZeRO-3's optimizer holds on this rank: fp32 master weights and moments, one sub-group at a time, in RAM, on a GPU or on NVMe.

DeepSpeed's public accessors (safe_get_local_…) swap a whole sub-group in for each tensor on NVMe, cannot set swapped-out weights, and
reach neither Adam's step nor the low-precision copy. This module goes to the optimizer itself, and so to one version of it.
"""

import errno
import os
from dataclasses import dataclass

import torch

from trainer.engine.patches import SUPPORTED
from trainer.errors import RunError

CHUNK = 2**24  # bytes that are read or written at once
WEIGHT = "weight"


@dataclass(frozen=True)
class Slice:
    """A rank's share of one parameter. start: its first element within the whole parameter; numel: elements, without ZeRO's padding;
    at: where it begins in its sub-group's flat tensor."""

    name: str
    start: int
    numel: int
    at: int


class ZeroState:
    """Reads and restores the optimizer's tensors of one rank. kinds: `weight` (fp32 master) and what the optimizer keeps of the same
    size (exp_avg, exp_avg_sq)."""

    def __init__(self, engine, space=None):
        """space: the run's SwapSpace, where there is one."""
        import deepspeed
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

        self.optimizer, self.space = engine.optimizer, space
        if hasattr(self.optimizer, "host_step"):
            self.optimizer.host_step.drain()  # updates that still run beside the training
        version = deepspeed.__version__.split("+")[0]
        if version != SUPPORTED or not isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            raise RunError(
                "this DeepSpeed's optimizer state cannot be saved",
                found=f"{version}, {type(self.optimizer).__name__}",
                needed=f"DeepSpeed {SUPPORTED} with ZeRO stage 3",
                fix="--save_strategy no, or make setup",
            )
        names = {id(p): n for n, p in engine.module.named_parameters()}
        rank, zero = torch.distributed.get_rank(), self.optimizer
        self.shapes = {names[id(p)]: list(p.ds_shape) for group in zero.fp16_groups for p in group}
        self.groups = []
        for group in zero.fp16_groups:
            slices, at = [], 0
            for p in group:
                share = p.partition_numel()
                slices.append(
                    Slice(
                        names[id(p)],
                        rank * share,
                        max(0, min(share, p.ds_numel - rank * share)),
                        at,
                    )
                )
                at += share
            self.groups.append(slices)

    def _flat(self, i):
        return self.optimizer.fp32_partitioned_groups_flat[i]

    def _swapped(self, i):
        return self.optimizer._swappable_optimizer_subgroup(i)

    def _state(self, i):
        return self.optimizer.optimizer.state.get(self._flat(i), {})

    def kinds(self, i):
        """Names of the sub-group's tensors."""
        return [WEIGHT, *(k for k, v in self._state(i).items() if torch.is_tensor(v) and v.dim())]

    def itemsize(self):
        """Bytes of an element of a master weight or moment."""
        return self._flat(0).element_size()

    def dtype(self):
        """Their type, a torch.dtype."""
        return self._flat(0).dtype

    def scalars(self):
        """The optimizer's counters, {"step": 5}; the same for every sub-group."""
        found = [
            {k: float(v) for k, v in self._state(i).items() if not (torch.is_tensor(v) and v.dim())}
            for i in range(len(self.groups))
        ]
        if differing := [i for i, own in enumerate(found) if own != found[0]]:
            raise RunError(
                "the optimizer's sub-groups have made different numbers of steps",
                found=f"sub-group {differing[0]}",
                code=1,
            )
        return found[0]

    def chunks(self, i, kind, piece):
        """Yield the bytes of one slice, in order."""
        if self._swapped(i):
            path, size = self._swap_paths(i)[kind], self.itemsize()
            yield from _read(path, piece.at * size, piece.numel * size)
            return
        tensor = self._flat(i) if kind == WEIGHT else self._state(i)[kind]
        tensor = tensor.detach().narrow(0, piece.at, piece.numel).view(torch.uint8)
        for part in tensor.split(CHUNK):
            yield memoryview(part.cpu().numpy())

    def _swap_paths(self, i):
        info = self.optimizer.optimizer_swapper._get_param_swap_info(self._flat(i))
        paths = {}
        for context in info.tensors:
            own = context.compute_tensor
            paths[WEIGHT if own is self._flat(i) else own.ds_id.rpartition("-")[0]] = (
                context.swap_path
            )
        return paths

    def restore(self, i, kinds, scalars, fill):
        """Set a sub-group. fill(kind, slice, at, view) writes the slice's bytes from byte `at` on into the memoryview."""
        flat, state = self._flat(i), self.optimizer.optimizer.state
        if len(kinds) > 1:
            whole = [
                torch.empty(0) if self._swapped(i) else torch.zeros_like(flat, requires_grad=False)
                for _ in kinds[1:]
            ]
            state[flat] = {
                **{k: self._scalar(v) for k, v in scalars.items()},
                **dict(zip(kinds[1:], whole)),
            }
        if self._swapped(i):
            self._restore_swapped(i, kinds, fill)
        else:
            for kind in kinds:
                target = (flat if kind == WEIGHT else state[flat][kind]).detach()
                for piece in self.groups[i]:
                    _fill_tensor(
                        target.narrow(0, piece.at, piece.numel).view(torch.uint8), kind, piece, fill
                    )
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)

    def _scalar(self, value):
        """An Adam counter as the optimizer at hand keeps it."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        if isinstance(self.optimizer.optimizer, DeepSpeedCPUAdam):
            return int(value)
        group = self.optimizer.optimizer.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        return torch.tensor(
            value, dtype=torch.float32, device=self._flat(0).device if on_device else "cpu"
        )

    def _restore_swapped(self, i, kinds, fill):
        zero, flat = self.optimizer, self._flat(i)
        swapper, size = zero.optimizer_swapper, self.itemsize()
        for kind in kinds[
            1:
        ]:  # the swapper finds its tensors by this name (swap_tensor/optimizer_utils.py, _get_state_tensors)
            zero.optimizer.state[flat][kind].ds_id = f"{kind}-{flat.ds_id}"
        info = swapper._get_param_swap_info(flat)
        if len(kinds) > 1 and not info.has_state_tensors:
            info.add_state_tensors([zero.optimizer.state[flat][kind] for kind in kinds[1:]])
        total = swapper._io_aligned_numel(info.numel()) * size
        for kind, path in self._swap_paths(i).items():
            if self.space:
                self.space.prepare(path, total)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.truncate(handle, total)
                ends = [*(piece.at * size for piece in self.groups[i][1:]), total]
                for piece, end in zip(self.groups[i], ends):
                    length = (
                        end - piece.at * size
                    )  # with ZeRO's padding, as zeros: no part may look as if it was never written
                    for at in range(0, length, CHUNK):
                        block = bytearray(min(CHUNK, length - at))
                        if at < piece.numel * size:
                            fill(kind, piece, at, memoryview(block)[: piece.numel * size - at])
                        if os.pwrite(handle, block, piece.at * size + at) != len(block):
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
        # Swapped in once, to make the low-precision copy of it.
        zero._optimizer_states_and_gradient_swap_in(i)
        zero._reassign_or_swap_out_partitioned_parameters(i)
        zero._release_swap_buffers(i)

    def begin_restore(self):
        """Before the sub-groups are set: no parameter may be gathered."""
        self.optimizer._partition_all_parameters()

    def end_restore(self, steps):
        """After it: small parameters that stay gathered are gathered anew, and Adam's C++ side has made `steps` steps."""
        self.optimizer._post_step(set())
        adam = self.optimizer.optimizer
        if hasattr(adam, "ds_opt_adam"):
            # It multiplies beta**step up from step to step, in fp32. Begun anew it would take pow(beta, step), which at times is
            # another number in the last bit (csrc/includes/cpu_adam.h, IncrementStep).
            group, (p, g, m, v) = adam.param_groups[0], torch.zeros(4, 1).unbind()
            for step in range(1, int(steps) + 1):
                adam.ds_opt_adam.adam_update(
                    adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, p, g, m, v
                )


def _fill_tensor(target, kind, piece, fill):
    for at in range(0, target.numel(), CHUNK):
        part = target.narrow(0, at, min(CHUNK, target.numel() - at))
        if part.device.type == "cpu":
            fill(kind, piece, at, memoryview(part.numpy()))
        else:
            block = torch.empty(part.numel(), dtype=torch.uint8)
            fill(kind, piece, at, memoryview(block.numpy()))
            part.copy_(block)


def _read(path, begin, size):
    handle = os.open(path, os.O_RDONLY)
    try:
        end = begin + size
        while begin < end:
            os.posix_fadvise(
                handle, begin + CHUNK, 2 * CHUNK, os.POSIX_FADV_WILLNEED
            )  # read while the last block is written
            block = os.pread(handle, min(CHUNK, end - begin), begin)
            if not block:
                raise RunError(
                    f"a swap file is too short: {path}",
                    found=f"it ends at byte {begin:,}",
                    needed=f"{end:,} bytes",
                    code=1,
                )
            os.posix_fadvise(
                handle, begin, len(block), os.POSIX_FADV_DONTNEED
            )  # not twice in memory
            begin += len(block)
            yield block
    finally:
        os.close(handle)
