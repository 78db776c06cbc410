"""What a model's matrices are, by its structure: for the plan, for LoRA and for its own size.

What a module is called says nothing here: families name the same things differently.
"""

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.modeling import experts
from trainer.plan.matrices import (
    ATTENTION,
    DENSE,
    EMBEDDING,
    EXPERTS,
    HEAD,
    OTHER,
    ROUTER,
    Matrix,
)

_ROUTER = "it routes tokens"


def survey(model: PreTrainedModel) -> list[Matrix]:
    """Return the matrices of a model without adapters: of the decoder layers, then the others."""
    found: dict[str, Matrix] = {}
    names = {module: name for name, module in model.named_modules()}
    for layer in experts.decoder_layers(model) or [model]:
        for matrix in of_layer(layer, model):
            name = f"{names[layer]}.{matrix.name}".removeprefix(".")
            found[name] = replace(matrix, name=name)
    # Where the model has no list of layers, the head was among them.
    return list({**found, **{matrix.name: matrix for matrix in outside(model)}}.values())


def of_layer(layer: nn.Module, model: PreTrainedModel) -> Iterator[Matrix]:
    """Yield the matrices of a decoder layer, by their names in it."""
    config = model.config.get_text_config()
    walk = _Walk(layer, experts.count(layer, config), width(model), config)
    return walk.matrices(layer, "", None)


def outside(model: PreTrainedModel) -> Iterator[Matrix]:
    """Yield the matrices outside of the decoder layers that an adapter could stand beside."""
    layers = experts.decoder_layers(model)
    inside = {module for layer in layers for module in layer.modules()}
    kinds = {model.get_input_embeddings(): EMBEDDING, model.get_output_embeddings(): HEAD}
    for name, module in model.named_modules():
        known = module in kinds or bool(layers)
        if module not in inside and known and (linear(module) or isinstance(module, nn.Embedding)):
            out, into = _widths(module)
            yield Matrix(name, out, into, kinds.get(module, OTHER))


def width(model: PreTrainedModel) -> int:
    """Return the width of the residual stream."""
    embedding: Any = model.get_input_embeddings()
    return getattr(model.config.get_text_config(), "hidden_size", None) or _widths(embedding)[1]


def mixers(layer: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Return {name: module} of what mixes tokens in a layer, without what is inside of another."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if module is not layer and not inside and _mixes_tokens(module, config):
            found[name] = module
    return found


def _mixes_tokens(module: nn.Module, config: Any) -> bool:
    """Return whether a module computes on a whole row: it is told of positions, cache or mask.

    MLPs and experts see each token alone.
    """
    parameters = inspect.signature(type(module).forward).parameters
    told = {word for word in ("position", "past", "cache", "mask") if word in " ".join(parameters)}
    return bool(told - {"mask"}) or bool(told and not experts.count(module, config))


def linear(module: nn.Module) -> bool:
    """Return whether PEFT can put an adapter beside this module: it returns one product.

    A router may be an nn.Linear that returns a tuple.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, (nn.Linear, Conv1D))
    meta = {
        name: torch.empty(experts.shape(parameter), device="meta")
        for name, parameter in module.named_parameters()
    }
    try:
        out = functional_call(module, meta, torch.empty(2, module.in_features, device="meta"))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return torch.is_tensor(out) and out.shape == (2, module.out_features)


@dataclass
class _Walk:
    """A decoder layer. experts: their number; 0 in a dense layer. width: of the residual stream.

    config: of the text model.
    """

    root: nn.Module
    experts: int
    width: int
    config: Any

    def matrices(self, module: nn.Module, name: str, kind: str | None) -> Iterator[Matrix]:
        """Yield the matrices in a module. kind: what is known from the modules around it."""
        if kind is None and module is not self.root and _mixes_tokens(module, self.config):
            kind = ATTENTION
        elif kind == ATTENTION and experts.count(module, self.config):
            kind = None  # experts of an attention: they and their router are what they are
        if isinstance(module, (nn.Linear, Conv1D)):
            yield self._linear(module, name, kind)
            return
        yield from self._parameters(module, name, kind)
        used = 1.0
        if kind is None and experts.is_list(module, self.config):
            count = experts.count(module, self.config)
            kind, used = EXPERTS, self._used(count) / count
        convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
        for short, child in module.named_children():
            for matrix in self.matrices(child, f"{name}.{short}".removeprefix("."), kind):
                # Fused kernels of state space layers do so: an adapter would not be seen.
                if convolves and linear(child) and f"self.{short}.weight" in source(module):
                    reason = f"{_class(module)} reads its weight and does not call it"
                    matrix = replace(matrix, reason=reason)
                yield replace(matrix, used=used * matrix.used)

    def _used(self, count: int) -> int:
        """Return how many of some experts a token goes through: all, where nothing says it."""
        return min(experts.per_token(self.config) or count, count)

    def _parameters(self, module: nn.Module, name: str, kind: str | None) -> Iterator[Matrix]:
        stacks = experts.stacks(module)
        transposed = stacks and self._is_transposed(module, stacks)
        for short, parameter in module.named_parameters(recurse=False):
            shape, path = experts.shape(parameter), f"{name}.{short}".removeprefix(".")
            if short in stacks:
                reason = None if experts.supported(module) else _foreign(module)
                copies, *widths = shape
                out, into = widths[::-1] if transposed else widths
                used = self._used(copies)
                yield Matrix(path, out, into, EXPERTS, copies, used, True, reason)
            elif len(shape) > 1 and not stacks:  # beside stacks they are biases
                router = self.experts and shape[0] == self.experts and kind is None
                reason = _ROUTER if router else f"no linear map: {_class(module)}"
                kind_here = ROUTER if router else OTHER
                out, into = shape[0], shape[1:].numel()
                yield Matrix(path, out, into, kind_here, stacked=True, reason=reason)

    def _is_transposed(self, module: Any, stacks: list[str]) -> bool:
        """Return whether the stacks of a module are [experts, into, out].

        Where the module does not say so, the first one is read: it takes the residual stream.
        """
        _, out, into = experts.shape(module.get_parameter(stacks[0]))
        guess = len(stacks) > 1 and out == self.width != into
        return getattr(module, "is_transposed", guess)

    def _linear(self, module: nn.Module, name: str, kind: str | None) -> Matrix:
        (out, into), reason = _widths(module), None
        if kind is None and self.experts and out in (1, self.experts):
            kind, reason = ROUTER, _ROUTER
        elif not linear(module):
            reason = f"{_class(module)} does not return one product"
        return Matrix(name, out, into, kind or DENSE, reason=reason)


def _widths(module: Any) -> list[int]:
    """Return (out, into) of a module with a weight."""
    shape = list(experts.shape(module.weight))
    return shape[::-1] if isinstance(module, Conv1D) else shape


def source(module: nn.Module) -> str:
    """Return the source of a module's class; nothing where there is none."""
    return _source(type(module))


def read_past_forward(module: nn.Module) -> bool:
    """Return whether others call a method of this module that reads the weight of a child.

    Neither forward runs then, and it is for those that ZeRO-3 gathers.
    """
    reads = [f"self.{name}.weight" for name, _ in module.named_children()]
    text = source(module)
    if not any(read in text for read in reads):
        return False
    for name, method in inspect.getmembers(type(module), inspect.isfunction):
        outside = not name.startswith("__") and name != "forward" and f"self.{name}(" not in text
        body = inspect.getsource(method) if outside and f"def {name}(" in text else ""
        if any(read in body for read in reads):
            return True
    return False


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _foreign(module: nn.Module) -> str:
    # PEFT's own wrapper would make W + BA of all experts in every pass.
    return f"{_class(module)} does not use transformers' experts interface"
