"""The layers of a model as the plan sees them: tensors, linear maps, what a backward pass keeps.

Sizes are elements. Does not import torch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from trainer.plan.matrices import ATTENTION, DENSE, EXPERTS, Matrix

# Tensors that attention without a fused kernel keeps, of the size of its scores: after the softmax
# in fp32, and in the model's type.
SCORES = 2


@dataclass
class Layer:
    """Decoder layers that are alike, or what is outside of them.

    count: of such layers. hidden: width of the residual stream. tensors: elements of each
    parameter. norms: elements of a token that go into norms; fused_norms: into torch's LayerNorm,
    which is one operation. modules: of the layer, itself too.
    query: width of softmax attention, 0 without. window: tokens that it looks back, None for all.
    rotated: width of queries and keys that are rotated into new tensors, while the output of the
    one map that they came from stays. scores: heads whose scores are kept, as no fused kernel
    computes them. beside: tensors of the MLP's width that its activation keeps beside its input;
    -1: it keeps its output alone.
    """

    hidden: int
    tensors: list[int]
    maps: list[Matrix]
    norms: int = 0
    modules: int = 0
    query: int = 0
    window: int | None = None
    fused_norms: int = 0
    rotated: int = 0
    scores: int = 0
    beside: int = 0
    norms_first: bool = True
    count: int = 1

    @cached_property
    def size(self) -> int:
        """Parameters of one such layer."""
        return sum(self.tensors)

    @cached_property
    def active(self) -> float:
        """Parameters of linear maps that a token is multiplied with."""
        return sum(map_.active for map_ in self.maps)

    @cached_property
    def unused(self) -> float:
        """Parameters of experts that a token does not go through."""
        return sum(map_.size - map_.active for map_ in self.maps)

    @cached_property
    def _groups(self) -> "list[_Group]":
        """The maps by the module that holds them, without routers."""
        groups: dict[str, _Group] = {}
        for map_ in self.maps:
            if map_.kind in (ATTENTION, DENSE, EXPERTS):
                groups.setdefault(map_.parent, _Group(self.hidden)).maps.append(map_)
        return list(groups.values())

    @cached_property
    def intermediate(self) -> float:
        """Width of what goes into the MLP's last map: of all experts that a token goes through.

        Where there is no MLP, the widest input of the layer.
        """
        mlp = [group.back.into * group.back.used for group in self._groups if group.is_mlp]
        return sum(mlp) or max((map_.into for map_ in self.maps), default=self.hidden)

    @cached_property
    def at_work(self) -> float:
        """Width of what a layer at work has beside what it keeps; experts have copies."""
        copies = [group.back.out * group.back.used for group in self._groups if group.routes]
        return max(self.intermediate, sum(copies))

    @cached_property
    def last(self) -> float:
        """Active parameters of the maps that end the layer."""
        mlp = [group.back.active for group in self._groups if group.is_mlp]
        return sum(mlp) or (self.maps[-1].active if self.maps else 0)

    def kept(self, length: float, liger: bool, full: bool) -> float:
        """Return the elements that a token keeps for the backward pass of one such layer.

        The inputs of norms; the inputs of linear maps, once where several have the same; their
        outputs, but for those that are added to the residual stream. Without Liger's kernels
        autograd keeps the activation of a gate too, and the quotients of norms whose weights are
        trained. length: tokens of a row, for attention without a fused kernel.
        """
        elements = self.norms + len(self._streams) * self.hidden
        for group in self._groups:
            elements += group.inputs + group.outputs
            # Experts are not computed by Liger's kernels (modeling/experts.py).
            if not liger or group.routes:
                elements += group.gated
        if not liger and full:
            elements += self.norms - self.fused_norms
        elements += self.rotated + SCORES * self.scores * length
        return elements + self.beside * self.intermediate

    def remade(self, liger: bool, full: bool) -> float:
        """Return those of the kept elements that are made again instead (modeling/remake.py).

        They are what comes out of RMSNorm into the maps, where torch's product keeps both factors
        or Liger's kernel computes it, and what comes out of the MLP's gate; but not what a router
        and its experts take as well.
        """
        gates = sum(group.gated for group in self._groups if not group.routes)
        streams = self._streams
        if any(group.routes for group in self._groups):
            streams = streams - {False}
        normed = self.norms_first and not self.fused_norms and (liger or full)
        return gates + normed * len(streams) * self.hidden

    @cached_property
    def _streams(self) -> set[bool]:
        """The tensors of the residual stream's width that go into maps: the attention's, others."""
        backs = [group.back for group in self._groups]
        return {
            map_.kind == ATTENTION
            for map_ in self.maps
            if map_.into == self.hidden and map_.kind != EXPERTS and map_ not in backs
        }


@dataclass
class _Group:
    """The maps of one module, in their order. hidden: width of the residual stream."""

    hidden: int
    maps: list[Matrix] = field(default_factory=list)

    @property
    def attention(self) -> bool:
        return self.maps[0].kind == ATTENTION

    @cached_property
    def back(self) -> Matrix:
        """The map whose output is added to the residual stream."""
        onto = [map_ for map_ in self.maps if map_.out == self.hidden]
        return (onto or self.maps)[-1]

    @property
    def is_mlp(self) -> bool:
        return not self.attention and self.back.out == self.hidden

    @property
    def routes(self) -> bool:
        return self.back.kind == EXPERTS

    @property
    def inputs(self) -> float:
        """Elements of a token that go into the maps, beside the residual stream.

        Each expert has a copy of that.
        """
        widths = {
            (map_.into, map_ is self.back): map_.into * map_.used
            for map_ in self.maps
            if map_.into != self.hidden or map_.kind == EXPERTS or map_ is self.back
        }
        return sum(widths.values())

    @property
    def outputs(self) -> float:
        """Elements of a token that come out of the maps; an expert's are weighted yet."""
        return sum(
            map_.out * map_.used
            for map_ in self.maps
            if map_ is not self.back or map_.kind == EXPERTS
        )

    @property
    def gated(self) -> float:
        """Elements of a gate's activation: the MLP's first maps give twice what its last takes."""
        if not self.is_mlp:
            return 0
        width = self.back.into * self.back.used
        given = sum(map_.out * map_.used for map_ in self.maps if map_ is not self.back)
        return width if given >= 2 * width else 0


def total(layers: Iterable[Layer], value: Callable[[Layer], float]) -> float:
    """Return the sum of a value over all layers."""
    return sum(layer.count * value(layer) for layer in layers)
