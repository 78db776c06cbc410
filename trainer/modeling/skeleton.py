"""What a causal model consists of, read from its modules: for the plan.

`python -m trainer.modeling.skeleton '{"name": …}'` builds the model on the meta device and prints
its description as JSON, in one line. plan/skeleton.py runs it.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trainer.config.settings import Settings
from trainer.errors import RunError, one_line
from trainer.modeling import load
from trainer.modeling.experts import decoder_layers
from trainer.modeling.survey import mixers, of_layer, outside, source, width
from trainer.plan.matrices import OTHER, Matrix

# Settings of model families that change the logits after the head.
LOGIT_CHANGES = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_multiplier_scale",
)
# What an activation keeps beside its input: GELU as a polynomial in tanh, operation by operation,
# three tensors more; ReLU its output alone.
BESIDE = {"NewGELUActivation": 3, "FastGELUActivation": 3, "ReLU": -1}
ROTARY = "Rotary"
# What attention over all tokens calls. Linear attention and state spaces do not.
SOFTMAX = re.compile("softmax|scaled_dot_product|attention_interface", re.IGNORECASE)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return what plan.model_shapes.ModelSpec.from_description takes, without a name.

    The model has no adapters.
    """
    config, hidden = model.config.get_text_config(), width(model)
    layers = decoder_layers(model) or [model]
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    weight = embedding.weight if head is None else head.weight
    seen: set[int] = set()
    kinds: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        values = _layer(layer, model, index, seen)
        kind = kinds.setdefault(json.dumps(values, sort_keys=True), {**values, "count": 0})
        kind["count"] += 1
    changed = any(getattr(config, name, None) not in (None, 1) for name in LOGIT_CHANGES)
    return {
        "family": model.config.model_type,
        "hidden": hidden,
        "vocabulary": weight.shape[0],
        "embedding": weight.numel(),
        "tied": head is None or head.weight is embedding.weight,
        "kinds": list(kinds.values()),
        "rest": {
            "hidden": hidden,
            "tensors": _tensors(model, seen),
            "maps": [asdict(matrix) for matrix in outside(model)],
        },
        "whole_logits": changed or not isinstance(head, nn.Linear),
    }


def _tensors(module: nn.Module, seen: set[int]) -> list[int]:
    """Return the elements of the module's parameters that are not in `seen`, and put them there."""
    new = [parameter for parameter in module.parameters() if id(parameter) not in seen]
    seen.update(map(id, new))
    return [parameter.numel() for parameter in new]


def _layer(layer: nn.Module, model: PreTrainedModel, index: int, seen: set[int]) -> dict[str, Any]:
    """Return the fields of plan.layers.Layer for one layer, but for its count."""
    config, hidden = model.config.get_text_config(), width(model)
    modules = dict(layer.named_modules())
    found: dict[tuple[str, int, int], Matrix] = {}
    for matrix in of_layer(layer, model):
        if matrix.kind == OTHER:
            continue
        # The experts of a list are one matrix with copies.
        key = re.sub(r"\.\d+(?=\.|$)", ".*", matrix.name), matrix.out, matrix.into
        same = found.get(key, replace(matrix, copies=0, used=0))
        copies, used = same.copies + matrix.copies, same.used + matrix.used
        found[key] = replace(matrix, name=key[0], copies=copies, used=used)
    maps = list(found.values())
    norms = list(_norms(modules, maps))
    softmax = [
        (name, module)
        for name, module in mixers(layer, config).items()
        if any(SOFTMAX.search(source(inner)) for inner in module.modules())
    ]
    query = rotated = 0
    if softmax:
        inside = [m for m in maps if m.name.startswith(tuple(f"{name}." for name, _ in softmax))]
        query = ([m.into for m in inside if m.out == hidden] or [hidden])[-1]
        fused = [m.out for m in inside if m.out > query]
        if len(inside) == 2 and fused and any(ROTARY in type(m).__name__ for m in model.modules()):
            rotated = (fused[0] + query) // 2
    scores = query and not model._supports_sdpa and getattr(config, "num_attention_heads", 0)
    return {
        "hidden": hidden,
        "tensors": _tensors(layer, seen),
        "maps": list(map(asdict, maps)),
        "norms": sum(width for _, width in norms),
        "fused_norms": sum(width for norm, width in norms if isinstance(norm, nn.LayerNorm)),
        "beside": sum({BESIDE.get(type(module).__name__, 0) for module in modules.values()}),
        "norms_first": _norms_first(layer),
        "modules": len(modules),
        "query": query,
        "rotated": rotated,
        "window": _window(softmax[0][1], config, index) if softmax else None,
        "scores": int(scores),
    }


def _norms_first(layer: nn.Module) -> bool:
    """Return whether a layer begins with a norm, as most do; OLMo 2's do not."""
    calls = re.findall(r"self\.(\w+)\(", source(layer))
    children = dict(layer.named_children())
    first = next((children[call] for call in calls if call in children), None)
    return "Norm" in type(first).__name__


def _window(attention: nn.Module, config: Any, index: int) -> int | None:
    """Return how many tokens a layer's attention looks back; None for all."""
    types = getattr(config, "layer_types", None)
    window = getattr(attention, "sliding_window", None)
    if types and index < len(types):
        sizes = {
            "sliding_attention": getattr(config, "sliding_window", None),
            "chunked_attention": getattr(config, "attention_chunk_size", None),
        }
        window = sizes.get(types[index])
    return window if isinstance(window, int) else None


def _norms(modules: dict[str, nn.Module], maps: list[Matrix]) -> Iterator[tuple[nn.Module, int]]:
    """Yield each norm and the elements of a token that go into it.

    A norm of one head's width takes all heads of the map before it, such as q_norm after q_proj.
    """
    outputs = {matrix.name: matrix.out for matrix in maps}
    for name, module in modules.items():
        if "Norm" not in type(module).__name__:
            continue
        parent, _, leaf = name.rpartition(".")
        width = max((p.numel() for p in module.parameters(recurse=False)), default=0)
        before = [
            out
            for key, out in outputs.items()
            if leaf and key.startswith(f"{parent}.{leaf[0]}") and width and out % width == 0
        ]
        yield module, before[0] if before and parent else width


def main(arguments: str) -> dict[str, Any]:
    """Return the description, or {"error": …}. arguments: plan.skeleton.Source as JSON."""
    source = json.loads(arguments)
    values = {
        "model_revision": source["revision"],
        "trust_remote_code": source["trust_remote_code"],
        "method": "full",
    }
    settings = Settings(values, {})
    try:
        return describe(load.skeleton(load.load_config(source["name"], settings), settings))
    except RunError as error:
        return {"error": str(error.found or error.what)}
    except Exception as error:  # whatever a model's own code raises
        return {"error": one_line(f"{type(error).__name__}: {error}")}


if __name__ == "__main__":
    print(f"\n{json.dumps(main(sys.argv[1]))}")
