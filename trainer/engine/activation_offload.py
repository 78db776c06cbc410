"""The inputs of recomputed layers wait in pinned RAM from the forward to the backward pass."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing.offload_activations import _ActivationOffloadEngine
from torch.autograd.graph import saved_tensors_hooks

from trainer.console import say


def offload_inputs(layers: Sequence[Any]) -> None:
    """Keep the inputs of these decoder layers, all that a recomputed layer keeps, in pinned RAM.

    For one layer that is tokens x hidden size x 2 bytes in bf16. DeepSpeed's engine for it copies
    beside the computation. On a CPU the inputs are in RAM already.
    """
    engine = _ActivationOffloadEngine(max_cpu_buffer_pool_count=len(layers) + 2)

    def pack(tensor: torch.Tensor) -> Any:
        key = engine.offload_input(tensor)
        if key == 1:
            say(
                "activations: the inputs of recomputed layers wait in RAM, "
                f"{tensor.nbytes / 2**30:.2f} GiB each"
            )
        return tensor if key is None else key

    def unpack(packed: Any) -> torch.Tensor:
        return packed if torch.is_tensor(packed) else engine.restore_input(packed)

    def checkpoint(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The hooks see the layer's inputs; torch's own hooks take what is inside.
        with saved_tensors_hooks(pack, unpack):
            return stock(*args, **kwargs)

    for layer in layers:
        if hasattr(layer, "_gradient_checkpointing_func"):
            layer._gradient_checkpointing_func = functools.partial(
                checkpoint, layer._gradient_checkpointing_func
            )
