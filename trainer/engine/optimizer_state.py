"""What ZeRO-3's optimizer holds on this rank: fp32 master weights and moments, in any tier.

DeepSpeed's public accessors (safe_get_local_...) swap a whole sub-group in for each tensor on NVMe,
cannot set weights that are swapped out, and reach neither Adam's step nor the low-precision copy.
This module goes to the optimizer itself, and so to one version of it.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from trainer.engine import aio, split_master
from trainer.engine.fused_step import FusedStepOptimizer
from trainer.engine.state_ring import LOW, WEIGHT, Piece, Tensors
from trainer.engine.values import is_finite
from trainer.errors import FAILED, RunError
from trainer.system.swap_dir import SwapSpace
from trainer.system.swap_stamps import BLOCK, damaged

CHUNK_BYTES = 4 * BLOCK  # that are read or written at once


class ShardSlice(NamedTuple):
    """A rank's share of one parameter.

    start: its first element within the whole parameter. numel: elements without ZeRO's padding.
    offset: its first element within the flat tensor of its sub-group.
    """

    name: str
    start: int
    numel: int
    offset: int


# fill(state_key, shard_slice, offset, view) writes the slice's bytes from `offset` into the view, a
# memoryview or an array of bytes.
Fill = Callable[[str, ShardSlice, int, Any], None]


class OptimizerState:
    """Reads and restores the optimizer's tensors of one rank, a sub-group at a time.

    State keys: "weight", the fp32 master, and what the optimizer keeps of the same size: exp_avg
    and exp_avg_sq. shapes: {parameter: shape} of all that is trained. sub_groups: the slices of
    each sub-group. dtype: of an element. space: the run's swap files; none: those that are watched.
    """

    def __init__(self, engine: Any, space: SwapSpace | None = None) -> None:
        self.zero: Any = engine.optimizer
        self.space: Any = space or aio.watched
        self.dtype = self._flat(0).dtype
        self.low: dict[int, torch.Tensor] = {}
        self.ring: Any = None
        if isinstance(self.zero, FusedStepOptimizer):
            self.zero.fused_step.wait_for_all()
            self.low, self.ring = self.zero.fused_step.low, self.zero.fused_step.ring
        names = {id(p): n for n, p in engine.module.named_parameters()}
        rank = torch.distributed.get_rank()
        self.shapes: dict[str, list[int]] = {}
        self.sub_groups: list[list[ShardSlice]] = []
        for group in self.zero.fp16_groups:
            slices, offset = [], 0
            for p in group:
                name, share = names[id(p)], p.partition_numel()
                numel = max(0, min(share, p.ds_numel - rank * share))
                slices.append(ShardSlice(name, rank * share, numel, offset))
                offset += share
                self.shapes[name] = list(p.ds_shape)
            self.sub_groups.append(slices)

    def _flat(self, i: int) -> Any:
        return self.zero.fp32_partitioned_groups_flat[i]

    def _param_lp(self, i: int) -> Any:
        return self.zero.fp16_partitioned_groups_flat[i]

    def _is_swapped(self, i: int) -> bool:
        return self.ring is not None and i in self.ring.sizes

    def _state(self, i: int) -> dict[str, Any]:
        return self.zero.optimizer.state.get(self._flat(i), {})

    def state_keys(self, i: int) -> list[str]:
        """Return the names of a sub-group's tensors."""
        return [WEIGHT, *(k for k, v in self._state(i).items() if torch.is_tensor(v) and v.dim())]

    def scalars(self) -> dict[str, float]:
        """Return the optimizer's counters, {"step": 5}; the same for every sub-group."""
        tensors = self.state_keys(0)
        return {k: float(v) for k, v in self._state(0).items() if k not in tensors}

    def read(self, i: int, state_key: str, shard_slice: ShardSlice) -> Iterator[Any]:
        """Yield the bytes of one slice, in order. Raises RunError where they are not finite."""
        for chunk in self._chunks(i, state_key, shard_slice):
            if not is_finite(torch.frombuffer(chunk, dtype=self.dtype)):
                raise RunError(
                    f"the weights are not finite: {state_key} of {shard_slice.name}",
                    needed="numbers that a run can go on from; nothing was saved",
                    fix="a lower --learning_rate, from the last checkpoint on",
                    code=FAILED,
                )
            yield chunk

    def _chunks(self, i: int, state_key: str, shard_slice: ShardSlice) -> Iterator[Any]:
        if self._is_swapped(i):
            yield from self._swapped_chunks(i, state_key, shard_slice)
            return
        for parts in self._parts(i, state_key, shard_slice):
            here = [part.cpu() for part in parts]
            chunk = split_master.join(*here) if len(here) == 2 else here[0]
            yield chunk.view(torch.uint8).numpy()

    def _swapped_chunks(self, i: int, state_key: str, shard_slice: ShardSlice) -> Iterator[Any]:
        high = self._param_lp(i)
        halved = state_key == WEIGHT and LOW in self.ring.dtypes
        if state_key == WEIGHT and i not in self.ring.on_disk:  # before the first step
            weight = high.narrow(0, shard_slice.offset, shard_slice.numel)
            for chunk in weight.split(CHUNK_BYTES // self.dtype.itemsize):
                yield chunk.float().cpu().view(torch.uint8).numpy()
            return
        key = LOW if halved else state_key
        size = self.ring.dtypes[key].itemsize
        begin, length = shard_slice.offset * size, shard_slice.numel * size
        chunks = _read_file(self.ring.path(i, key), begin, length, self.space)
        if not halved:
            yield from chunks
            return
        at = shard_slice.offset
        for chunk in chunks:
            low = torch.frombuffer(chunk, dtype=torch.int16)
            joined = split_master.join(high[at : at + len(low)].cpu(), low)
            yield joined.view(torch.uint8).numpy()
            at += len(low)

    def _parts(
        self, i: int, state_key: str, shard_slice: ShardSlice
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield a slice's chunks: the tensor itself, or the two halves of a split weight."""
        if state_key != WEIGHT:
            tensors = [self._state(i)[state_key]]
        elif i in self.low:
            tensors = [self._param_lp(i), self.low[i]]
        else:
            tensors = [self._flat(i)]
        elements = CHUNK_BYTES // self.dtype.itemsize
        slices = (t.detach().narrow(0, shard_slice.offset, shard_slice.numel) for t in tensors)
        yield from zip(*(part.split(elements) for part in slices), strict=True)

    def restore(self, state_keys: list[str], scalars: dict[str, float], fill: Fill) -> None:
        """Set all sub-groups to what `fill` gives."""
        self.zero._partition_all_parameters()  # releases every gathered parameter
        for i in range(len(self.sub_groups)):
            self._restore_group(i, state_keys, scalars, fill)
        self.zero._post_step(set())  # gathers anew what stays gathered
        adam = self.zero.optimizer
        if isinstance(adam, DeepSpeedCPUAdam):
            # Adam's C++ side multiplies beta**step up from step to step, in fp32. Begun anew it
            # would take pow(beta, step), which at times is another number in the last bit
            # (csrc/includes/cpu_adam.h, IncrementStep).
            group, (param, grad, m, v) = adam.param_groups[0], torch.zeros(4, 1).unbind()
            settings = (0.0, *group["betas"], group["eps"], 0.0, True)
            for step in range(1, int(scalars.get("step", 0)) + 1):
                adam.ds_opt_adam.adam_update(adam.opt_id, step, *settings, param, grad, m, v)

    def _restore_group(
        self, i: int, state_keys: list[str], scalars: dict[str, float], fill: Fill
    ) -> None:
        flat, state, swapped = self._flat(i), self.zero.optimizer.state, self._is_swapped(i)
        if len(state_keys) > 1:
            state[flat] = {key: self._scalar(value) for key, value in scalars.items()}
            numel = 0 if swapped else self.zero.fp16_partitioned_groups_flat_numel[i]
            if isinstance(self.zero, FusedStepOptimizer):
                self.zero.fused_step.moments.pop(i, None)
            for key in state_keys[1:]:
                state[flat][key] = flat.new_zeros(numel)
        if swapped:
            self._restore_swapped(i, state_keys, fill)
            return
        for key in state_keys:
            for shard_slice in self.sub_groups[i]:
                for n, parts in enumerate(self._parts(i, key, shard_slice)):
                    block = parts[0]
                    if len(parts) == 2 or not block.is_cpu:
                        block = torch.empty(len(block), dtype=self.dtype)
                    fill(key, shard_slice, n * CHUNK_BYTES, block.view(torch.uint8).numpy())
                    if len(parts) == 2:
                        split_master.split(block, *parts)
                    elif block is not parts[0]:
                        parts[0].copy_(block)
        if i not in self.low:  # else the parameter is a half of the weight
            DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters(self.zero, i)

    def _scalar(self, value: float) -> Any:
        """Return an Adam counter as the optimizer at hand keeps it."""
        optimizer = self.zero.optimizer
        if isinstance(optimizer, DeepSpeedCPUAdam) or isinstance(self.zero, FusedStepOptimizer):
            return int(value)
        device = self._flat(0).device if optimizer.param_groups[0].get("fused") else "cpu"
        return torch.tensor(value, dtype=torch.float32, device=device)

    def _restore_swapped(self, i: int, state_keys: list[str], fill: Fill) -> None:
        """Write a sub-group's files, and make its low-precision weights."""
        param_lp = self._param_lp(i)
        copy = torch.empty(self.ring.sizes[i]) if param_lp is None else param_lp

        def fill_piece(piece: Piece, tensors: Tensors) -> None:
            span, low = slice(piece.begin, piece.begin + piece.numel), tensors.pop(LOW, None)
            if low is not None:
                tensors[WEIGHT] = torch.empty(piece.numel)
            for key, tensor in tensors.items():
                # ZeRO's padding is zeros: nothing may look as if it was never written.
                tensor.zero_()
                if key in state_keys:
                    self._fill(key, piece, tensor, fill)
            if low is not None:
                split_master.split(tensors[WEIGHT], copy[span], low)
            else:
                copy[span] = tensors[WEIGHT]

        self.ring.step([i], fill_piece, read=False)
        if param_lp is None:
            self.zero.publish(i, copy)

    def _fill(self, state_key: str, piece: Piece, target: torch.Tensor, fill: Fill) -> None:
        for shard_slice in self.sub_groups[piece.group]:
            first = max(piece.begin, shard_slice.offset)
            end = min(piece.begin + piece.numel, shard_slice.offset + shard_slice.numel)
            if first < end:
                part = target[first - piece.begin : end - piece.begin].view(torch.uint8)
                at = (first - shard_slice.offset) * self.dtype.itemsize
                fill(state_key, shard_slice, at, part.numpy())


def _read_file(path: str, begin: int, size: int, space: SwapSpace) -> Iterator[Any]:
    """Yield `size` bytes of a swap file, each block of it compared with what was written.

    Raises RunError where they differ, or the file ends before.
    """
    end = begin + size
    with open(path, "rb", buffering=0) as file:
        while begin < end:
            # Whole blocks are read: a checksum needs them.
            first = begin // BLOCK * BLOCK
            os.lseek(file.fileno(), first, os.SEEK_SET)
            block = memoryview(bytearray(min(CHUNK_BYTES, -(-end // BLOCK) * BLOCK - first)))
            block = block[: file.readinto(block)]
            # The next blocks are read while the caller writes this one.
            ahead = first + CHUNK_BYTES
            os.posix_fadvise(file.fileno(), ahead, 2 * CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
            for compared in space.stamps.read(path, block, first):
                compared.result()
            found = block[begin - first : end - first]
            if not found:
                raise damaged(path, f"it ends at byte {begin:,}", f"{end:,} bytes")
            begin += len(found)
            # Not twice in memory: the page cache keeps only the block that the next slice shares.
            if done := begin // BLOCK * BLOCK - first:
                os.posix_fadvise(file.fileno(), first, done, os.POSIX_FADV_DONTNEED)
            yield found
