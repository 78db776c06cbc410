"""Gradients on their way to their places, in RAM or on the GPU, for DeepSpeed 0.19.8.

The stock engine copies a gradient to the host, back to the GPU for its norm, casts it to fp32 there
and copies it once more: 8 bytes a parameter over PCIe, 4 of host memory
(runtime/zero/stage3.py: partition_grads). Here a gradient is copied once, in the type in which
micro-batches are added, and its norm is taken where it is made.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from trainer.engine import placement

accelerator: Any = get_accelerator()
SMALL = 2**22  # elements; smaller tensors that are neighbours in one buffer are copied together


class Gradients:
    """One rank's shards of one optimizer step's gradients, added over its micro-batches.

    flat: each sub-group's, in its place; of: {ds_id: a parameter's part of it}. given: ds_ids of
    parameters that have a gradient of this step so far. real: those of which this rank holds more
    than padding: of the smallest, some ranks hold padding alone.
    """

    def __init__(self, zero: Any, tiers: list[str], owner: Any) -> None:
        """zero: a ZeRO-3 optimizer, whose buffers these replace. tiers: of each sub-group.

        owner: see pinned.zeros.
        """
        self.flat = placement.flat_parts(
            zero.fp16_partitioned_groups_flat_numel,
            tiers,
            zero.gradient_accumulation_dtype,
            owner,
            zero.offload_optimizer_pin_memory,
        )
        self.of: dict[int, torch.Tensor] = {}
        for group, flat in zip(zero.fp16_groups, self.flat, strict=True):
            parts = flat.split([param.partition_numel() for param in group])
            self.of.update(zip((param.ds_id for param in group), parts, strict=True))
        self.real = {
            param.ds_id
            for group in zero.fp16_groups
            for param in group
            if param.partition_numel() * zero._get_param_partition_rank(param) < param.ds_numel
        }
        # No other rank has a part in a gradient, and nothing changes it on its way.
        scaled = zero.postscale_gradients and zero.gradient_predivide_factor != 1.0
        self._alone = zero.partition_count == 1 and not scaled
        self._alone &= zero.communication_data_type == zero.dtype
        zero.grad_partitions_flat_buffer = None  # `take` and the step use the parts
        zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = self.of
        here = accelerator.device_name()
        reduced = not (self._alone and all(flat.device.type == here for flat in self.flat))
        buckets = zero.ipg_buckets if zero.contiguous_gradients and reduced else {}
        for dtype, bucket in buckets.items():
            bucket.buffer = torch.empty(
                zero.reduce_bucket_size, dtype=dtype, device=accelerator.current_device_name()
            )
        # `take` adds to the places in their type. DeepSpeed would first make a copy of each shard
        # in that type on the GPU.
        zero.gradient_accumulation_dtype = zero.communication_data_type
        self.forget()

    def forget(self) -> None:
        """Let the next gradients be those of a new step."""
        self.given: set[int] = set()
        self._norms: dict[int, torch.Tensor] = {}  # of those that left the device that made them

    def stay(self, param: Any) -> bool:
        """Return whether a gradient is whole where it was made, and its place is there."""
        grad, place = param.grad, self.of[param.ds_id]
        return self._alone and grad.device == place.device and grad.numel() == param.ds_numel

    @torch.no_grad()
    def add(self, param: Any, shard: torch.Tensor) -> None:
        """Add this rank's shard of a micro-batch's gradient to its place on the same device."""
        place, shard = self.of[param.ds_id][: shard.numel()], shard.reshape(-1)
        if param.ds_id in self.given:
            place.add_(shard)
        else:
            place.copy_(shard)
            self.given.add(param.ds_id)

    @torch.no_grad()
    def take(self, params: list[Any], partitions: list[Any]) -> None:
        """Copy or add this rank's shards of gradients to their places.

        params: parameters whose gradient is complete. partitions: this rank's shard of each.
        """
        copies = {}
        for param, shard in zip(params, partitions):
            if param.ds_id in self.real:
                place = self.of[param.ds_id][: shard.numel()]
                if place.device == shard.device:
                    self.add(param, shard)
                else:
                    shard = shard.view(-1)
                    if param.ds_id in self.given:
                        shard = place.to(shard.device, non_blocking=True).add_(shard)
                    copies[param.ds_id] = place, shard
                if param.grad is not None and param.grad.is_cuda:
                    param.grad.record_stream(torch.cuda.current_stream())
            param.grad = None
        if not copies:
            return
        self.given.update(copies)
        norms = _norms([shard for _, shard in copies.values()])
        self._norms.update(zip(copies, norms))  # the last micro-batch's is the whole one
        for place, shards in join_neighbours(copies.values()):
            whole = shards[0] if len(shards) == 1 else torch.cat(shards)
            place.copy_(whole, non_blocking=True)

    def clear(self, params: list[Any]) -> None:
        """Zero what these parameters have of an older step, where they have none of this one."""
        for param in params:
            if param.ds_id in self.real and param.ds_id not in self.given:
                self.of[param.ds_id].zero_()

    def norms(self) -> list[torch.Tensor]:
        """Return the norms of this step's gradients, in an order that all placements share."""
        here = sorted(self.given - self._norms.keys())
        of = {**self._norms, **dict(zip(here, _norms([self.of[i] for i in here]), strict=True))}
        if not of:
            return [torch.zeros((), device=accelerator.current_device_name())]
        return [of[i] for i in sorted(of)]


def _norms(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return the norm of each flat tensor, with the same bits wherever it lies.

    torch's kernel sums in another order where a tensor does not begin at a multiple of four
    elements (MultiTensorApply.cuh, is_aligned).
    """
    aligned = [t if t.data_ptr() % (4 * t.itemsize) == 0 else t.clone() for t in tensors]
    return torch._foreach_norm(aligned, 2, dtype=torch.float32) if aligned else []


def join_neighbours(pairs: Iterable[tuple[torch.Tensor, Any]]) -> list[tuple[torch.Tensor, list]]:
    """Join small tensors that are neighbours in one buffer.

    pairs: (tensor, what belongs to it). Returns (tensor, all that belongs to it).
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
