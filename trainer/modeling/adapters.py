"""LoRA adapters: which matrices of a model have one, and the PEFT model around it.

plan/matrices.py says what --lora_target_modules means.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trainer.config.settings import Settings
from trainer.errors import RunError, one_line
from trainer.modeling.survey import linear, survey
from trainer.plan import matrices
from trainer.plan.matrices import EXPERTS, Matrix


@dataclass
class Selection:
    """The matrices that have adapters, and those that have none."""

    chosen: list[Matrix]
    left_out: list[Matrix]

    def active(self, rank: int) -> float:
        """Return the parameters of the adapters that a token goes through."""
        return sum(m.used / m.copies * sum(m.adapter(rank)) for m in self.chosen)

    def report(self, rank: int) -> str:
        """Return what is adapted and what is not, with numbers of parameters, for a person."""
        kinds: dict[str, list[Matrix]] = {}
        for matrix in self.chosen:
            kinds.setdefault(matrix.kind, []).append(matrix)
        lines = [
            f"LoRA adapts {kind} ({_leaves(chosen)}): "
            f"{sum(sum(m.adapter(rank)) for m in chosen):,} parameters"
            for kind, chosen in kinds.items()
        ]
        reasons: dict[tuple[str, str], list[Matrix]] = {}
        for matrix in self.left_out:
            if matrix.reason:
                reasons.setdefault((matrix.kind, matrix.reason), []).append(matrix)
        lines += [
            f"LoRA leaves out {kind} ({_leaves(left_out)}; "
            f"{sum(m.size for m in left_out):,} parameters): {reason}"
            for (kind, reason), left_out in reasons.items()
        ]
        return "\n".join(lines)


def _leaves(found: Iterable[Matrix]) -> str:
    return ", ".join(sorted({matrix.leaf for matrix in found}))


def select(model: PreTrainedModel, targets: str) -> Selection:
    """Return which matrices have an adapter. targets: --lora_target_modules.

    Raise RunError for a name that the model lacks, and for what cannot be adapted.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(table, "weight", None)
    found = survey(model)
    chosen = matrices.adapted(found, targets, tied)
    known = set(chosen)
    also = f"--lora_target_modules {','.join([*matrices.words_of(targets), EXPERTS])}"
    left_out = [
        replace(m, reason=f"{also} adapts them too") if m.kind == EXPERTS and not m.reason else m
        for m in found
        if m not in known
    ]
    return Selection(chosen, left_out)


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


def _adapted_names(adapted: nn.Module) -> Iterator[str]:
    """Yield the names of the modules and stacks that PEFT has adapted."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    for path, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            path = re.sub(r"^base_model\.model\.", "", path).replace(".base_layer", "")
            if isinstance(module, ParamWrapper) and module.parameter_name != "weight":
                path = f"{path}.{module.parameter_name}"
            yield path


def _check_adapted(adapted: nn.Module, selection: Selection) -> None:
    """Raise RunError where PEFT has adapted more, or less, than was chosen."""
    made, chosen = set(_adapted_names(adapted)), {m.name for m in selection.chosen}
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
