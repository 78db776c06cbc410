"""Decoder layers whose weights stay on the GPU from the forward to the backward pass.

ZeRO-3 releases a layer after its forward pass and fetches it again for the backward pass, unless
it is used again within `stage3_max_reuse_distance` parameters. Where memory is left, that distance
is made longer: what stays crosses PCIe, or the links between GPUs, once in place of twice. The
results are the same.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from trainer.engine import patches
from trainer.engine.resident import is_resident
from trainer.errors import RunError

AUTO = "auto"
_PRIVATE = "_PartitionedParameterCoordinator__"
_DISTANCE = f"{_PRIVATE}max_reuse_dist_in_numel"
_LIVE = f"{_PRIVATE}max_n_available_params"


class KeptWeights:
    """Keeps the weights of the last layers, which the backward pass needs first.

    layers: the decoder's, each a leaf module of ZeRO-3. head: what comes after them. keep: their
    number, or AUTO: another one calls `keep_last`. Raises RunError where there are fewer layers.
    """

    def __init__(
        self, layers: Sequence[nn.Module], head: nn.Module | None, keep: int | str
    ) -> None:
        self.layers, self.after = layers, head or nn.Identity()
        self._measure()
        parameters = [p for layer in layers for p in layer.parameters()]
        itemsize = max((p.element_size() for p in parameters), default=0)
        self.layer_bytes = max(self.sizes, default=0) * itemsize
        self.keep, self.kept = keep, 0
        if isinstance(keep, int) and keep > len(layers):
            raise RunError(
                "--kept_weights is more than there are layers",
                found=keep,
                needed=f"at most {len(layers)}, or auto",
            )

    def attach(self, engine: Any) -> None:
        """Take over the engine's fetching of parameters. Call it before the first step."""
        self.coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        self.distance = getattr(self.coordinator, _DISTANCE)
        self.live = getattr(self.coordinator, _LIVE)
        self._measure()  # it is known now what is resident
        if isinstance(self.keep, int) and self.keep:
            self.keep_last(self.keep)

    def _measure(self) -> None:
        self.sizes = [_elements(layer) for layer in self.layers]
        self.head = _elements(self.after)
        self.moves = any(self.sizes)  # whether any layer is fetched and released at all

    def keep_last(self, count: int) -> None:
        """Let the weights of the last `count` layers stay from now on."""
        self.kept = count
        more = sum(self.sizes[len(self.sizes) - count :])
        # From a layer's forward pass ZeRO-3 goes over the layers after it and the head, and then
        # over the whole model, with which the backward pass begins.
        setattr(self.coordinator, _DISTANCE, max(self.distance, more + self.head if count else 0))
        setattr(self.coordinator, _LIVE, self.live + more)
        patches.forget_releases()


def _elements(module: nn.Module) -> int:
    """Return the elements that ZeRO-3 fetches for a module."""
    params = (p for p in module.parameters() if not is_resident(p))
    # One that it has partitioned is empty.
    return sum(getattr(p, "ds_numel", p.numel()) for p in params)
