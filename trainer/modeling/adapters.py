"""LoRA adapters: which matrices of a model have one, and the PEFT model around it.

--lora_target_modules means the same in every family. "attention": the linear maps of the modules
that mix tokens (attention, linear attention, state space). "experts": the matrices of the routed
experts. "all-linear": the linear maps of the decoder layers without those of the experts, so
attention, dense MLPs and shared experts. Anything else is the end of a module's or an expert
matrix' name. What a module is, is told by its structure, not by its name.
"""

import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.settings import Settings
from trainer.errors import RunError, did_you_mean, one_line
from trainer.modeling import experts

ATTENTION, DENSE, EXPERTS, ROUTER, OTHER = "attention", "dense", "experts", "router", "other"
_ROUTER = "it routes tokens"
# What a keyword of --lora_target_modules adapts.
KEYWORDS = {"all-linear": (ATTENTION, DENSE), "attention": (ATTENTION,), "experts": (EXPERTS,)}


@dataclass
class Matrix:
    """A matrix, or a stack of them, that an adapter could stand beside.

    name: of the module, or of the parameter where `stacked`. layer: the name's part inside the
    decoder layer. numel: elements. reason: why it cannot have an adapter; None where it can.
    """

    name: str
    layer: str
    kind: str
    numel: int
    stacked: bool = False
    reason: str | None = None

    @property
    def leaf(self) -> str:
        """The last part of the name that tells something."""
        return self.name.removesuffix(".weight").rpartition(".")[2]


@dataclass
class Selection:
    """The matrices that have adapters, and those of the decoder layers that have none."""

    chosen: list[Matrix]
    left_out: list[Matrix] = field(default_factory=list)

    def report(self, adapted: nn.Module) -> str:
        """Return what is adapted and what is not, with numbers of parameters, for a person.

        adapted: the PEFT model.
        """
        owners = {matrix.name: matrix.kind for matrix in self.chosen}
        sizes = dict.fromkeys(owners.values(), 0)
        for name, numel in _adapter_sizes(adapted):
            sizes[owners[name]] += numel
        lines = [
            f"LoRA adapts {kind} ({_leaves(m for m in self.chosen if m.kind == kind)}): "
            f"{size:,} parameters"
            for kind, size in sizes.items()
        ]
        reasons: dict[tuple[str, str], list[Matrix]] = {}
        for matrix in self.left_out:
            if matrix.reason:
                reasons.setdefault((matrix.kind, matrix.reason), []).append(matrix)
        lines += [
            f"LoRA leaves out {kind} ({_leaves(matrices)}; "
            f"{sum(m.numel for m in matrices):,} parameters): {reason}"
            for (kind, reason), matrices in reasons.items()
        ]
        return "\n".join(lines)


def _leaves(matrices: Iterable[Matrix]) -> str:
    return ", ".join(sorted({matrix.leaf for matrix in matrices}))


# -- what a model is made of -------------------------------------------------------------------
def survey(model: PreTrainedModel) -> list[Matrix]:
    """Return the matrices of the decoder layers, each with its kind."""
    found: list[Matrix] = []
    names = {module: name for name, module in model.named_modules()}
    for layer in experts.decoder_layers(model) or [model]:
        walk = _Walk(names[layer], experts.count(layer))
        found += walk.matrices(layer, names[layer], None)
    head = model.get_output_embeddings()
    return [matrix for matrix in found if head is None or matrix.name != names.get(head)]


@dataclass
class _Walk:
    """One decoder layer, by its name. experts: their number; 0 in a dense layer."""

    root: str
    experts: int

    def matrices(self, module: nn.Module, name: str, kind: str | None) -> Iterator[Matrix]:
        """Yield the matrices in a module. kind: what is known from the modules around it."""
        if kind is None and name != self.root and _mixes_tokens(module):
            kind = ATTENTION
        elif kind == ATTENTION and experts.count(module):
            kind = None  # experts of an attention: they and their router are what they are
        if isinstance(module, (nn.Linear, Conv1D)):
            yield self._linear(module, name, kind)
            return
        yield from self._parameters(module, name, kind)
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1
        if listed and kind is None and name != self.root:
            kind = EXPERTS
        convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
        for short, child in module.named_children():
            for matrix in self.matrices(child, f"{name}.{short}" if name else short, kind):
                # Fused kernels of state space layers do so: an adapter would not be seen.
                if convolves and linear(child) and f"self.{short}.weight" in _source(type(module)):
                    matrix.reason = f"{_class(module)} reads its weight and does not call it"
                yield matrix

    def _parameters(self, module: nn.Module, name: str, kind: str | None) -> Iterator[Matrix]:
        stacks = experts.stacks(module)
        for short, parameter in module.named_parameters(recurse=False):
            shape, path = experts.shape(parameter), f"{name}.{short}"
            if short in stacks:
                reason = None if experts.supported(module) else _foreign(module)
                yield self._matrix(path, EXPERTS, shape.numel(), True, reason)
            elif len(shape) > 1 and not stacks:  # beside stacks they are biases
                if self.experts and shape[0] == self.experts and kind is None:
                    yield self._matrix(path, ROUTER, shape.numel(), True, _ROUTER)
                else:
                    reason = f"no linear map: {_class(module)}"
                    yield self._matrix(path, OTHER, shape.numel(), True, reason)

    def _linear(self, module: nn.Module, name: str, kind: str | None) -> Matrix:
        weight: Any = module.weight
        shape, reason = experts.shape(weight), None
        if kind is None and self.experts and shape[0] in (1, self.experts):
            kind, reason = ROUTER, _ROUTER
        elif not linear(module):
            reason = f"{_class(module)} does not return one product"
        return self._matrix(name, kind or DENSE, shape.numel(), False, reason)

    def _matrix(
        self, name: str, kind: str, numel: int, stacked: bool, reason: str | None
    ) -> Matrix:
        return Matrix(name, name.removeprefix(f"{self.root}."), kind, numel, stacked, reason)


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


def _mixes_tokens(module: nn.Module) -> bool:
    """Return whether a module computes on a whole row: it is told of positions, cache or mask.

    MLPs and experts see each token alone.
    """
    parameters = inspect.signature(type(module).forward).parameters
    told = {word for word in ("position", "past", "cache", "mask") if word in " ".join(parameters)}
    return bool(told - {"mask"}) or bool(told and not experts.count(module))


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


# -- what the user asks for --------------------------------------------------------------------
def select(model: PreTrainedModel, targets: str) -> Selection:
    """Return which matrices have an adapter. targets: --lora_target_modules.

    Raise RunError for a name that the model lacks, and for what cannot be adapted.
    """
    names = targets.replace(",", " ").split()
    if not names:
        raise RunError("lora_target_modules is empty", needed=_NEEDED)
    matrices = survey(model)
    chosen: dict[str, Matrix] = {}
    for name in names:
        kinds = KEYWORDS.get(name)
        if kinds:
            found = [m for m in matrices if m.kind in kinds and m.reason is None]
            _check_any(name, kinds, found, matrices)
        else:
            found = _named(model, name, matrices)
        chosen.update((matrix.name, matrix) for matrix in found)
    _refuse_tied(model, chosen)
    left_out = [m for m in matrices if m.name not in chosen]
    for matrix in left_out:
        if matrix.kind == EXPERTS and matrix.reason is None:
            matrix.reason = f"--lora_target_modules {','.join(names)},experts adapts them too"
    return Selection(list(chosen.values()), left_out)


_NEEDED = "all-linear, attention, experts, or the ends of modules' names; several with commas"


def _check_any(
    name: str, kinds: tuple[str, ...], found: list[Matrix], matrices: list[Matrix]
) -> None:
    if found:
        return
    refused = next((m for m in matrices if m.kind in kinds), None)
    raise RunError(
        f"lora_target_modules {name}: this model has none that can be adapted",
        found=f"{refused.name}: {refused.reason}" if refused else f"no {' or '.join(kinds)}",
        needed=_NEEDED,
        fix="--lora_target_modules all-linear" if name != "all-linear" else None,
    )


def _named(model: PreTrainedModel, name: str, matrices: list[Matrix]) -> list[Matrix]:
    """Return the matrices whose names end with this one, also outside of the decoder layers."""
    known = {matrix.name: matrix for matrix in matrices}
    for path, module in model.named_modules():
        if linear(module) or isinstance(module, nn.Embedding):
            known.setdefault(path, Matrix(path, path, OTHER, 0))
    found = [
        m for path, m in known.items() if f".{path}".removesuffix(".weight").endswith(f".{name}")
    ]
    refused = next((m for m in found if m.reason), None)
    if refused:
        raise RunError(
            f"lora_target_modules {name} cannot be adapted",
            found=f"{refused.name}: {refused.reason}",
            fix=f"leave {name} out",
        )
    if not found:
        leaves = sorted({m.leaf for m in known.values() if m.reason is None})
        raise RunError(
            f"lora_target_modules {name} is not in the model"
            f"{did_you_mean(name, [*leaves, *KEYWORDS])}",
            needed=f"{', '.join(KEYWORDS)}, or some of {', '.join(leaves)}",
        )
    return found


def _refuse_tied(model: PreTrainedModel, chosen: dict[str, Matrix]) -> None:
    """Raise RunError for an adapter on one side of an embedding that is the head, too.

    Merged, the adapter would change both.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not getattr(table, "weight", None):
        return
    for path, module in model.named_modules():
        if path in chosen and module in (table, head):
            raise RunError(
                f"lora_target_modules {path.rpartition('.')[2]}: embedding and head are one tensor",
                found="tie_word_embeddings: an adapter on one of them would change both when "
                "it is merged",
                fix=f"leave {path.rpartition('.')[2]} out of --lora_target_modules",
            )


# -- the PEFT model ----------------------------------------------------------------------------
def add_adapters(model: PreTrainedModel, settings: Settings) -> Any:
    """Return the PEFT model: LoRA adapters around the model, whose own weights are frozen.

    Its `selection` says what is adapted. Raise RunError where lora_target_modules names what the
    model lacks, or what cannot be adapted exactly.
    """
    from peft import LoraConfig, get_peft_model

    selection = select(model, settings.lora_target_modules)
    converted = _converted_names(model)
    stacks = [
        m.name if m.stacked else f"{m.name}.weight"
        for m in selection.chosen
        if m.stacked or m.leaf in converted
    ]
    modules = [m.name for m in selection.chosen if not m.stacked and m.leaf not in converted]
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_shortened(modules, [name for name, _ in model.named_modules()]),
        target_parameters=_shortened(stacks, [name for name, _ in model.named_parameters()])
        or None,
        task_type="CAUSAL_LM",
    )
    dtype = next(model.parameters()).dtype
    try:
        # fp32 adapters beside a bf16 model would make two precisions of one ZeRO group.
        adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RunError(
            "PEFT does not make these adapters",
            found=one_line(error),
            fix="--lora_dropout 0" if stacks and settings.lora_dropout else None,
        ) from None
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    _check_adapted(adapted, selection)
    _use_linear_forward(adapted)
    adapted.selection = selection
    return adapted


def _shortened(names: list[str], everything: list[str]) -> list[str]:
    """Return the shortest ends that name these and nothing else, as PEFT matches them."""
    wanted, short = set(names), set()
    for name in names:
        parts = name.split(".")
        for i in reversed(range(len(parts))):
            end = ".".join(parts[i:])
            matched = {n for n in everything if n == end or n.endswith(f".{end}")}
            if matched <= wanted:
                short.add(end)
                break
    return sorted(short)


def _converted_names(model: PreTrainedModel) -> set[str]:
    """Return the ends of modules' names that PEFT takes for expert matrices of transformers 4.

    An adapter on a shared expert of that name would become one on all routed experts, here and
    when the export is loaded. Named as parameters they stay what they are.
    """
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers as convert,
        )
    except ImportError:
        return set()
    from peft import LoraConfig

    converted = set()
    for leaf in {name.rpartition(".")[2] for name, m in model.named_modules() if linear(m)}:
        trial = LoraConfig(target_modules=[leaf])
        try:
            convert(trial, model=model, conversions=None)
        except ValueError:  # one of two matrices that are fused
            converted.add(leaf)
        if leaf not in (trial.target_modules or ()):
            converted.add(leaf)
    return converted


def _adapter_sizes(adapted: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (name of the adapted module or stack, elements of its adapter)."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    for path, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            path = re.sub(r"^base_model\.model\.", "", path).replace(".base_layer", "")
            if isinstance(module, ParamWrapper) and module.parameter_name != "weight":
                path = f"{path}.{module.parameter_name}"
            tensors = [module.lora_A, module.lora_B, module.lora_embedding_A]
            tensors.append(module.lora_embedding_B)
            yield path, sum(experts.shape(p).numel() for t in tensors for p in t.parameters())


def _check_adapted(adapted: nn.Module, selection: Selection) -> None:
    """Raise RunError where PEFT has adapted more, or less, than was chosen."""
    made, chosen = {n for n, _ in _adapter_sizes(adapted)}, {m.name for m in selection.chosen}
    if made != chosen:
        raise RunError(
            "PEFT adapts other matrices than lora_target_modules says",
            found=f"not adapted: {sorted(chosen - made)[:3]}, adapted: {sorted(made - chosen)[:3]}",
            fix="--lora_target_modules attention, or the names that it should adapt",
        )


def _use_linear_forward(adapted: nn.Module) -> None:
    """Let a linear map that PEFT knows by its parameter compute as PEFT's linear layers do.

    PEFT's wrapper adds B·A to the matrix in every pass.
    """
    from peft.tuners.lora.layer import Linear, ParamWrapper

    forward: Any = Linear.forward
    for module in adapted.modules():
        if isinstance(module, ParamWrapper) and linear(module.base_layer):
            module.forward = functools.partial(forward, module)
