"""What a causal model consists of, read from its modules: for the plan.

`python -m trainer.modeling.skeleton '{"name": …}'` builds the model on the meta device and prints
its description as JSON, in one line. plan/skeleton.py runs it.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.settings import Settings
from trainer.errors import RunError, one_line
from trainer.modeling import load

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
# Classes that mix tokens; of those, classes whose attention is no softmax over all tokens.
MIXERS = re.compile(r"Attention|Attn|Mixer|Mamba|DeltaNet|ShortConv|SSM|Recurrent|TimeMix|KDA")
NOT_SOFTMAX = re.compile(r"Linear|Lightning|Mixer|Mamba|DeltaNet|Conv|SSM|Recurrent|TimeMix|KDA")
ROUTER = re.compile(r"(^|\.)(gate|router|wg)(\.|$)|router")
EXPERTS_PER_TOKEN = re.compile(r"expert.*per_tok|top_?k.*expert|moe.*top_?k|moe_k$|^num_selects$")


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return what plan.model_shapes.ModelSpec.from_description takes, without a name.

    The model may have LoRA adapters: they are left out.
    """
    config, hidden = model.config.get_text_config(), _hidden(model)
    layers = load.decoder_layers(model) or [model]
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    weight = embedding.weight if head is None else head.weight
    seen: set[int] = set()
    kinds: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        values = _layer(layer, model, index, seen)
        kind = kinds.setdefault(json.dumps(values, sort_keys=True), {**values, "count": 0})
        kind["count"] += 1
    inside = {id(module) for layer in layers for module in layer.modules()}
    maps = [
        {**map_, "kind": "head" if module is head else map_["kind"]}
        for name, module in model.named_modules()
        if id(module) not in inside
        for map_ in _own_maps(_plain(name), module, hidden)
    ]
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
            "maps": [*maps, *_embedding(model, embedding)],
        },
        "whole_logits": changed or not isinstance(head, nn.Linear),
    }


def _hidden(model: PreTrainedModel) -> int:
    """Return the width of the residual stream."""
    embedding: Any = model.get_input_embeddings()
    return getattr(model.config.get_text_config(), "hidden_size", None) or embedding.weight.shape[1]


def _plain(name: str) -> str:
    """Return a module's name in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer").removeprefix(
        "base_model.model."
    )


def _tensors(module: nn.Module, seen: set[int]) -> list[int]:
    """Return the elements of the module's parameters that are not in `seen`, and put them there."""
    sizes = []
    for name, parameter in module.named_parameters():
        if "lora_" not in name and id(parameter) not in seen:
            seen.add(id(parameter))
            sizes.append(parameter.numel())
    return sizes


def _embedding(model: nn.Module, embedding: Any) -> Iterator[dict[str, Any]]:
    for name, module in model.named_modules():
        if module is embedding:
            rows, width = embedding.weight.shape
            yield {"name": _plain(name), "out": rows, "into": width, "kind": "embedding"}


def _layer(layer: nn.Module, model: PreTrainedModel, index: int, seen: set[int]) -> dict[str, Any]:
    """Return the fields of plan.layers.Layer for one layer, but for its count."""
    config, hidden = model.config.get_text_config(), _hidden(model)
    modules = {name: module for name, module in layer.named_modules() if "lora_" not in name}
    mixers = [name for name, module in modules.items() if MIXERS.search(type(module).__name__)]
    maps: dict[tuple, dict[str, Any]] = {}
    for name, module in modules.items():
        mixing = any(name == mixer or name.startswith(f"{mixer}.") for mixer in mixers)
        for map_ in _own_maps(_plain(name), module, hidden, mixing):
            # The experts of a ModuleList are one map with copies.
            map_["name"] = re.sub(r"\.\d+(?=\.|$)", ".*", map_["name"])
            same = maps.setdefault((map_["name"], map_["out"], map_["into"]), map_)
            if same is not map_:
                same["copies"] += 1
                same["used"] += 1
    per_token = _experts_per_token(modules, config)
    for map_ in maps.values():
        if "expert" in map_["name"] and map_["copies"] > max(1, per_token):
            map_.update(kind="expert", used=per_token or map_["copies"])
    found = list(maps.values())
    softmax = [name for name in mixers if not NOT_SOFTMAX.search(type(modules[name]).__name__)]
    query = _query(softmax, found, hidden)
    return {
        "hidden": hidden,
        "tensors": _tensors(layer, seen),
        "maps": found,
        "norms": sum(_norms(modules, found)),
        "beside": sum({BESIDE.get(type(module).__name__, 0) for module in modules.values()}),
        "modules": len([name for name in modules if not name.endswith("base_layer")]),
        "query": query,
        "window": _window(modules[softmax[0]], config, index) if softmax else None,
        "scores": getattr(config, "num_attention_heads", 0)
        if query and not model._supports_sdpa
        else 0,
    }


def _own_maps(
    name: str, module: nn.Module, hidden: int, mixing: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the linear maps that a module itself holds: of its own class, or as parameters.

    Stacks of experts are parameters of three dimensions, some with the input first.
    """
    kind = "attention" if mixing else "mlp"
    if isinstance(module, (nn.Linear, Conv1D)):
        out, into = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
        if not mixing and ROUTER.search(name):
            kind = "router"
        yield _map(name, out, into, kind)
        return
    if isinstance(module, nn.Embedding) or re.search("Conv|Norm|Embedding", type(module).__name__):
        return
    for key, weight in module.named_parameters(recurse=False):
        full = f"{name}.{key}".removeprefix(".")
        if weight.dim() == 2 and key == "weight" and weight.shape[1] == hidden:
            yield _map(name, weight.shape[0], hidden, "attention" if mixing else "router")
        elif weight.dim() == 3 and min(weight.shape) > 1:
            copies, out, into = weight.shape
            down = "down" in key or key in ("w2", "output_linear")
            if into != out and (out if not down else into) == hidden:
                out, into = into, out
            yield {**_map(full, out, into, kind), "copies": copies, "used": copies, "stacked": True}


def _map(name: str, out: int, into: int, kind: str) -> dict[str, Any]:
    return {"name": name, "out": out, "into": into, "kind": kind, "copies": 1, "used": 1}


def _experts_per_token(modules: dict[str, nn.Module], config: Any) -> int:
    """Return how many experts a token goes through; 0 where nothing says it."""
    for module in modules.values():
        top_k = getattr(module, "top_k", None)
        if isinstance(top_k, int):
            return top_k
    for name, value in config.to_dict().items():
        if EXPERTS_PER_TOKEN.search(name) and isinstance(value, int):
            return value
    return 0


def _query(softmax: list[str], maps: list[dict[str, Any]], hidden: int) -> int:
    """Return the width of softmax attention, 0 where there is none. softmax: its modules' names."""
    names = tuple(f"{_plain(name)}." for name in softmax)
    back = [
        map_["into"] for map_ in maps if map_["name"].startswith(names) and map_["out"] == hidden
    ]
    return (back or [hidden])[-1] if softmax else 0


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


def _norms(modules: dict[str, nn.Module], maps: list[dict[str, Any]]) -> Iterator[int]:
    """Yield the elements of a token that go into each norm.

    A norm of one head's width takes all heads of the map before it, such as q_norm after q_proj.
    """
    outputs = {map_["name"]: map_["out"] for map_ in maps}
    for name, module in modules.items():
        if "Norm" not in type(module).__name__:
            continue
        parent, _, leaf = _plain(name).rpartition(".")
        width = max((p.numel() for p in module.parameters(recurse=False)), default=0)
        before = [
            out
            for key, out in outputs.items()
            if leaf and key.startswith(f"{parent}.{leaf[0]}") and width and out % width == 0
        ]
        yield before[0] if before and parent else width


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
