"""Which decoder layers keep their activations on the GPU, and which recompute them in the backward pass.

Gradient checkpointing computes every layer's forward pass twice: half as much arithmetic again for LoRA, a third for a full
fine-tune. Offloading the weights leaves most of a GPU empty, so as many layers as fit keep what they have computed. The numbers are
the same.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks

from trainer.errors import RunError

SPARE = 0.05  # of the GPU's memory that is left free: the allocator's gaps, and what libraries allocate by themselves
MEASURED = 4  # the update whose memory decides
WATCHED = 4  # updates after a change in which the allocator must not have to give memory back and ask again; not the first of them
AUTO = "auto"


class KeptLayers:
    """Sets `gradient_checkpointing` of the decoder layers. wanted: how many keep theirs, or "auto": one from the second update on, it
    is measured in the fourth, and from then on as many as fit; an eighth fewer where the allocator then runs short. (ZeRO records the
    order of layers anew in between, and fetches none ahead while it does.) largest: tokens of the largest micro-batch that can come;
    quadratic: memory grows with their square."""

    def __init__(self, layers, wanted, largest, quadratic, say):
        self.layers = [m for m in layers if getattr(m, "gradient_checkpointing", None) is not None]
        self.wanted, self.largest, self.quadratic, self.say = wanted, largest, quadratic, say
        self.update, self.kept, self.bytes, self.retries, self.changed = 0, 0, 0, 0, 0
        if wanted != AUTO and wanted > len(self.layers):
            raise RunError(
                "--kept_layers is more than there are",
                found=wanted,
                needed=f"at most {len(self.layers)}, or auto",
            )

    def _keep(self, count):
        """The last ones: they are the first to be done with in the backward pass, before a recomputed layer needs room."""
        for i, layer in enumerate(self.layers):
            layer.gradient_checkpointing = i < len(self.layers) - count
        self.kept, self.changed = count, self.update

    def begin(self):
        """Before each update."""
        self.update += 1
        if self.update == 1 and self.wanted != AUTO:
            self._keep(self.wanted)
        elif self.update == 2 and self.wanted == AUTO and self.layers:
            self._keep(1)
        elif self.update == MEASURED and self.wanted == AUTO and self.layers:
            self._measure(self.layers[-1])
            torch.cuda.reset_peak_memory_stats()  # "active": also what is freed and still in use by a kernel
        elif self._watched():
            self.retries = torch.cuda.memory_stats()["num_alloc_retries"]

    def _measure(self, layer):
        plain = self.plain = layer.forward

        def forward(*args, **kwargs):
            before = torch.cuda.memory_allocated()
            out = plain(*args, **kwargs)
            self.bytes = max(self.bytes, torch.cuda.memory_allocated() - before)
            return out

        layer.forward = forward

    def end(self, tokens):
        """After each update. tokens: of its largest micro-batch, padding included."""
        if self._watched():
            self._watch()
        if self.update != MEASURED or self.wanted != AUTO or not self.layers:
            return
        self.layers[-1].forward = self.plain
        free, total = torch.cuda.mem_get_info()
        limit = free + torch.cuda.memory_reserved() - SPARE * total
        stats, scale = (
            torch.cuda.memory_stats(),
            max(1.0, self.largest / tokens) ** (2 if self.quadratic else 1),
        )
        held = stats["active_bytes.all.current"]
        peak = held + (stats["active_bytes.all.peak"] - held) * scale
        more = int((limit - peak) / max(self.bytes * scale, 1))
        fits = torch.tensor(min(max(1 + more, 0), len(self.layers)), device="cuda")
        torch.distributed.all_reduce(
            fits, torch.distributed.ReduceOp.MIN
        )  # ZeRO-3 wants one order of layers on all ranks
        self._keep(int(fits))
        self.say(
            f"activations: {self.kept} of {len(self.layers)} decoder layers keep theirs on the GPU "
            f"({self.bytes * scale / 2**30:.2f} GiB each), the others are recomputed"
        )

    def _watched(self):
        return (
            self.wanted == AUTO
            and bool(self.layers)
            and self.update > MEASURED
            and self.changed + 1 < self.update <= self.changed + WATCHED
        )

    def _watch(self):
        retries = torch.tensor(
            torch.cuda.memory_stats()["num_alloc_retries"] - self.retries, device="cuda"
        )
        torch.distributed.all_reduce(retries, torch.distributed.ReduceOp.MAX)
        if int(retries) and self.kept:
            self._keep(self.kept - -(-self.kept // 8))
            self.say(
                f"activations: the allocator ran short {int(retries)} times, so {self.kept} layers keep theirs"
            )


def offload_inputs(layers, say):
    """Let the inputs of recomputed layers, all that they keep, wait in pinned RAM from the forward to the backward pass: for one
    layer tokens x hidden size x 2 bytes in bf16. The copies go beside the computation, by DeepSpeed's engine for it. On a CPU they
    are in RAM already."""
    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        _ActivationOffloadEngine,
    )

    engine = _ActivationOffloadEngine(max_cpu_buffer_pool_count=len(layers) + 2)

    def pack(tensor):
        key = engine.offload_input(tensor)
        if key == 1:
            say(
                f"activations: the inputs of recomputed layers wait in RAM, {tensor.nbytes / 2**30:.2f} GiB each"
            )
        return tensor if key is None else key

    def unpack(packed):
        return packed if torch.is_tensor(packed) else engine.restore_input(packed)

    def install(layer, plain):
        def checkpoint(function, *args, **kwargs):
            with saved_tensors_hooks(
                pack, unpack
            ):  # sees the layer's inputs; what is inside, torch's own hooks take
                return plain(function, *args, **kwargs)

        layer._gradient_checkpointing_func = checkpoint

    for layer in layers:
        if getattr(layer, "_gradient_checkpointing_func", None) is not None:
            install(layer, layer._gradient_checkpointing_func)
