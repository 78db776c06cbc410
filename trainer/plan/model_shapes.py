"""What a model is made of, from its config.json, its skeleton, or the headers of its weights.

The configurations of a few families say all that is needed. Of the others transformers builds the
skeleton, in a process of its own (plan/skeleton.py). Sizes are elements. Does not import torch.
"""

import functools
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.ds_config import ZeroShapes
from trainer.config.settings import check_model
from trainer.errors import RunError, did_you_mean, one_line
from trainer.plan import matrices, skeleton
from trainer.plan.layers import Layer, total
from trainer.plan.matrices import ATTENTION, DENSE, EMBEDDING, HEAD, Matrix

# Keys of a config.json that every model of a known family has.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# Of the published config.json files: SIZES, num_key_value_heads, tie_word_embeddings.
BUILT_IN = {
    "smollm2-135m": (576, 1536, 30, 9, 49152, 3, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 128256, 8, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 128256, 8, True),
    "llama-3-8b": (4096, 14336, 32, 32, 128256, 8, False),
    "llama-3-70b": (8192, 28672, 80, 64, 128256, 8, False),
    "llama-3.1-405b": (16384, 53248, 126, 128, 128256, 8, False),
    "llama-2-7b": (4096, 11008, 32, 32, 32000, 32, False),
    "llama-2-13b": (5120, 13824, 40, 40, 32000, 40, False),
    "mistral-7b": (4096, 14336, 32, 32, 32768, 8, False),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 151936, 2, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 152064, 4, False),
    "qwen2.5-14b": (5120, 13824, 48, 40, 152064, 8, False),
    "qwen2.5-32b": (5120, 27648, 64, 40, 152064, 8, False),
    "qwen2.5-72b": (8192, 29568, 80, 64, 152064, 8, False),
    "qwen3-0.6b": (1024, 3072, 28, 16, 151936, 8, True),
    "qwen3-4b": (2560, 9728, 36, 32, 151936, 8, True),
    "qwen3-8b": (4096, 12288, 36, 32, 151936, 8, False),
    "qwen3-14b": (5120, 17408, 40, 40, 151936, 8, False),
    "qwen3-32b": (5120, 25600, 64, 64, 151936, 8, False),
    "qwen3-30b-a3b": (2048, 6144, 48, 32, 151936, 4, False),
    "gemma-2-2b": (2304, 9216, 26, 8, 256000, 4, True),
    "gemma-2-9b": (3584, 14336, 42, 16, 256000, 8, True),
    "gemma-3-1b": (1152, 6912, 26, 4, 262144, 1, True),
    "phi-4": (5120, 17920, 40, 40, 100352, 10, False),
    "mixtral-8x7b": (4096, 14336, 32, 32, 32000, 8, False),
    "gpt-oss-20b": (2880, 2880, 24, 64, 201088, 8, False),
    "deepseek-v3": (7168, 18432, 61, 128, 129280, 128, False),
}
# What the configurations of built-in models have beside these sizes, by how their names begin.
# All that is missing is transformers' default, which is the published model's.
MORE: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gemma-2": {"model_type": "gemma2", "head_dim": 256},
    "gemma-3": {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 512},
    "phi": {"model_type": "phi3", "pad_token_id": 0},
    "mixtral": {"model_type": "mixtral"},
    "gpt-oss": {
        "model_type": "gpt_oss",
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
    },
    "deepseek-v3": {"model_type": "deepseek_v3"},
}
# model_type of configurations that say all that is needed.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Parts of the names of classes that generate text.
GENERATES = ("ForCausalLM", "LMHead", "ForConditionalGeneration")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# Forward, the gradient of the inputs, and that of the weights where they are trained.
PASSES = {"full": 3, "lora": 2}
NEEDED = "a model directory, a config.json, or one of " + ", ".join(BUILT_IN)
# Modules of a Llama's layer: seven maps, attention, MLP, activation, two norms, itself.
MODULES = 13

LOSS_LOGITS = 1 / 256  # of a GPU's memory


def flops_per_token(
    parameters: float, layers: int, hidden: int, length: float, method: str
) -> float:
    """Return the operations of training one token, without what is recomputed.

    A product of a weight and a token is two operations. Attention's two products see half of the
    row on average. length: tokens of a row.
    """
    return PASSES[method] * (2 * parameters + 2 * layers * length * hidden)


def loss_widening(tokens: float, vocabulary: int, hidden: int, gpu_memory: float) -> int:
    """Return by how much a chunk of Liger's loss may be wider than Liger would have it.

    Each chunk reads and writes the head's whole gradient, so where the head is trained fewer ones
    are better: the 16-bit logits of one get a share of the GPU's memory.
    """
    logits = LOSS_LOGITS * gpu_memory / 2
    rows = 2 ** int(math.log2(max(1, logits / vocabulary)))
    return max(1, int(vocabulary * rows / max(1, tokens) / hidden))


@dataclass
class ModelSpec:
    """A model: its decoder layers, and what is outside of them.

    family: its model_type. kinds: layers that differ, each with the number of layers alike. rest:
    embedding, head, last norm, and what no decoder layer holds. vocabulary: rows of the head.
    embedding: parameters of the head. tied: the head is the embedding, which then is one tensor in
    place of two. whole_logits: the loss is taken from the logits of all tokens, not chunk by chunk.
    """

    name: str
    family: str
    hidden: int
    vocabulary: int
    embedding: int
    tied: bool
    kinds: list[Layer]
    rest: Layer
    whole_logits: bool = False

    def __post_init__(self) -> None:
        self.layers = sum(kind.count for kind in self.kinds)

    @classmethod
    def from_description(cls, description: dict[str, Any], name: str) -> "ModelSpec":
        """Return the model of what modeling/skeleton.py says about it."""

        def layer(values: dict[str, Any]) -> Layer:
            return Layer(**{**values, "maps": [Matrix(**map_) for map_ in values["maps"]]})

        description = dict(description, name=name, rest=layer(description["rest"]))
        return cls(**{**description, "kinds": list(map(layer, description["kinds"]))})

    @property
    def parameters(self) -> int:
        """Parameters of the model. A tied head counts once."""
        return int(total(self.kinds, lambda layer: layer.size)) + self.rest.size

    @property
    def active(self) -> int:
        """Parameters without those of experts that a token does not go through."""
        return round(self.parameters - total(self.kinds, lambda layer: layer.unused))

    def activations(
        self, tokens: int, itemsize: int, liger: bool = True, full: bool = True, length: int = 0
    ) -> tuple[float, float, int]:
        """Return the bytes that a layer keeps for its backward pass, and those of its input alone.

        Of the largest layer, of an average one, of an input. Counted from the modules and Liger's
        kernels (Layer.kept). Measured: 2.75 GiB for 32,768 tokens of Llama-3.2-3B in bf16, exactly
        this. length: tokens of a row.
        """
        kept = [kind.kept(length, liger, full) for kind in self.kinds]
        counts = [kind.count for kind in self.kinds]
        mean = sum(map(math.prod, zip(kept, counts))) / self.layers
        size = tokens * itemsize
        return max(kept) * size, mean * size, self.hidden * size

    def remade(self, tokens: int, itemsize: int, liger: bool, full: bool) -> float:
        """Return the bytes of an average layer that is kept which are made again (Layer.remade)."""
        elements = total(self.kinds, lambda kind: kind.remade(liger, full))
        return elements / self.layers * tokens * itemsize

    @property
    def at_work(self) -> float:
        """The largest Layer.at_work."""
        return max(kind.at_work for kind in self.kinds)

    def loss_chunk(self, tokens: float, gpu_memory: float) -> int:
        """Return the rows of a chunk of Liger's loss (fused_linear_cross_entropy.py).

        gpu_memory: 0 where the head is not trained.
        """
        wider = loss_widening(tokens, self.vocabulary, self.hidden, gpu_memory)
        rows = tokens / math.ceil(self.vocabulary / self.hidden / wider)
        return 2 ** math.ceil(math.log2(max(1, rows)))

    def adapted(self, targets: str) -> list[list[Matrix]]:
        """Return the maps that LoRA adapts: of each of `kinds`, and of `rest`.

        targets: as --lora_target_modules. Raises RunError for what the model lacks.
        """
        everything = [*self.kinds, self.rest]
        maps = [matrix for layer in everything for matrix in layer.maps]
        chosen = set(matrices.adapted(maps, targets, self.tied))
        return [[matrix for matrix in layer.maps if matrix in chosen] for layer in everything]

    def adapters(self, rank: int, targets: str) -> list[list[int]]:
        """Return the elements of each tensor of the adapters, for each of `adapted`."""
        return [
            [size for map_ in maps for size in map_.adapter(rank)] for maps in self.adapted(targets)
        ]

    def shapes(self, precision: str, adapters: list[list[int]]) -> ZeroShapes:
        """Return what "auto" values are made from, as modeling/load.py does for a loaded model.

        adapters: as `adapters` returns them; [] where all parameters are trained.
        """
        itemsize = ITEMSIZE[precision]
        everything, added = [*self.kinds, self.rest], adapters or [[]] * (len(self.kinds) + 1)
        largest = max(size for layer in everything for size in layer.tensors)
        largest_trainable, trainable, small_frozen = largest, self.parameters, 0
        if adapters:
            largest_trainable = max(size for sizes in added for size in sizes)
            pairs = list(zip(everything, added))
            trainable = sum(layer.count * sum(sizes) for layer, sizes in pairs)
            small_frozen = sum(
                layer.count * size
                for layer in everything
                for size in layer.tensors
                if size <= largest_trainable
            )
        layers = [layer.tensors + more for layer, more in zip(self.kinds, added)]
        widest = max(layers, key=sum)
        return ZeroShapes(
            layer=sum(widest),
            layer_tensors=sum(size * itemsize >= 2**20 for size in widest),
            largest=max(largest, largest_trainable),
            trainable=trainable,
            largest_trainable=largest_trainable,
            itemsize=itemsize,
            small_frozen=small_frozen,
        )


def built_in(name: str) -> ModelSpec:
    """Return one of BUILT_IN, by its name or that of its repository on the hub.

    Raises RunError that names a similar one.
    """
    key = name.lower().rpartition("/")[2]
    key = re.sub(r"^(meta-)?llama-3\.1-(8|70)b", r"llama-3-\2b", key).removeprefix("meta-")
    key = re.sub(r"(-chat|-instruct|-hf|-it|-base|-v0\.\d)+$", "", key)
    if key not in BUILT_IN:
        raise RunError(f"no model {name[:80]}{did_you_mean(key, BUILT_IN)}", needed=NEEDED)
    config = built_in_config(key)
    if _is_known(config):
        return from_dict(config, key)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        return from_config(path, name=key)


def built_in_config(key: str) -> dict[str, Any]:
    """Return the configuration of one of BUILT_IN."""
    *sizes, kv_heads, tied = BUILT_IN[key]
    config: dict[str, Any] = dict(zip(SIZES, sizes))
    config.update(num_key_value_heads=kv_heads, tie_word_embeddings=tied, model_type="llama")
    for begin, more in MORE.items():
        if key.startswith(begin):
            config.update(more)
    return config


def from_config(path: Path, trust_remote_code: bool = False, name: str = "") -> ModelSpec:
    """Return the model of a config.json. Raises RunError where it is not readable as one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is not readable as a model's configuration",
            found=one_line(error, 200),
            needed="the config.json of a causal language model",
        ) from None
    # transformers reads a directory: the code that comes with a model lies in it.
    source = path.absolute()
    source = skeleton.Source(
        str(source.parent if path.name == "config.json" else source),
        trust_remote_code=trust_remote_code,
    )
    return from_dict(config, name or path.absolute().parent.name, path, source)


def from_dict(
    config: dict[str, Any],
    name: str,
    path: str | Path = "config.json",
    source: "skeleton.Source | None" = None,
) -> ModelSpec:
    """Return the model of a config.json's content. path: for errors. source: of its skeleton.

    Raises RunError for what is no causal model, and for sizes that are missing or impossible.
    """
    _check_causal(config, path)
    if _is_known(config):
        return _llama_like(config, name, path)
    if source is None:
        raise RunError(f"{path} has no skeleton", found=config["model_type"], needed=KNOWN)
    _check_layers(config, path)
    read = functools.partial(ModelSpec.from_description, name=name)
    return skeleton.describe(source, config, path, read)


def _is_known(config: dict[str, Any]) -> bool:
    return (
        config["model_type"] in KNOWN
        and not config.get("mlp_bias")
        and not isinstance(config.get("text_config"), dict)
    )


def _llama_like(config: dict[str, Any], name: str, path: str | Path) -> ModelSpec:
    """Return the model of a known family."""
    family, biases = config["model_type"], config.get("attention_bias")
    try:
        hidden, intermediate, layers, heads, vocabulary = (int(config[key]) for key in SIZES)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise RunError(
            f"{path} lacks what the plan needs",
            found=f"{'no ' if isinstance(error, KeyError) else ''}{error}",
            needed=", ".join(SIZES),
        ) from None
    sizes = (hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary)
    if impossible := [size for size in sizes if not 1 <= size <= 10**7]:
        raise _impossible(path, impossible[0])
    query, key_value = heads * head_dim, kv_heads * head_dim
    maps = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    small, norms, modules = [hidden, hidden], 2 * hidden, MODULES
    if family == "qwen3":  # of each head's query and key
        small += [head_dim, head_dim]
        norms += query + key_value
        modules += 2
    if family == "qwen2" or biases:
        small += [query, key_value, key_value]
    if family != "qwen2" and biases:
        small.append(hidden)
    layer = Layer(
        hidden,
        [rows * columns for rows, columns in maps.values()] + small,
        [Matrix(key, *shape, ATTENTION if "attn" in key else DENSE) for key, shape in maps.items()],
        norms,
        modules,
        query,
        count=layers,
    )
    tied = bool(config.get("tie_word_embeddings", family == "smollm3"))
    embedding = vocabulary * hidden
    rest = Layer(
        hidden,
        [embedding] * (2 - tied) + [hidden],
        [
            Matrix("embed_tokens", vocabulary, hidden, EMBEDDING),
            Matrix("lm_head", vocabulary, hidden, HEAD),
        ],
    )
    return ModelSpec(name, family, hidden, vocabulary, embedding, tied, [layer], rest)


def _check_causal(config: dict[str, Any], path: str | Path) -> None:
    classes = config.get("architectures") or []
    classes = [str(name) for name in (classes if isinstance(classes, list) else [classes])]
    own_code = "AutoModelForCausalLM" in str(config.get("auto_map"))
    generates = any(part in name for name in classes for part in GENERATES)
    if classes and not generates and not own_code:
        raise RunError(
            f"{path} is not a causal language model",
            found=", ".join(classes),
            needed="…ForCausalLM",
        )
    if config.get("quantization_config"):
        raise RunError(
            f"{path} is of quantized weights, which the trainer does not offload",
            found="quantization_config",
            needed="the model's own weights in bf16, fp16 or fp32",
        )
    if not isinstance(config.get("model_type"), str):
        raise RunError(
            f"{path} names no family", found="no model_type", needed="that of a causal model"
        )


def _check_layers(config: dict[str, Any], path: str | Path) -> None:
    """Raise RunError for more layers than a model has: its skeleton would take for ever."""
    for block in (config, config.get("text_config")):
        for key, value in block.items() if isinstance(block, dict) else ():
            count = value if isinstance(value, (int, float)) else 0
            if "layer" in key and not isinstance(value, bool) and count > 10**4:
                raise _impossible(path, f"{key} {value}", "at most 10,000")


def _impossible(path: str | Path, found: object, needed: str = "1 to 10,000,000") -> RunError:
    return RunError(f"{path} holds an impossible size", found=found, needed=needed)


def find(name: str, trust_remote_code: bool = False) -> ModelSpec:
    """Return a model by directory, config.json or built-in name. Raises RunError for none."""
    path = Path(name)
    if not name or len(name) > 4000:
        raise RunError("--model is too long" if name else "--model is empty", needed=NEEDED)
    if os.path.isfile(name):  # unlike Path's, it answers for a name that is too long, too
        return from_config(path, trust_remote_code)
    if os.path.isdir(name):
        check_model(name)
        return _check_weights(from_config(path / "config.json", trust_remote_code), path)
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise RunError(f"no model {name}", found=f"nothing at {path.absolute()}", needed=NEEDED)
    return built_in(name)


def _check_weights(model: ModelSpec, folder: Path) -> ModelSpec:
    """Return the model. Raise RunError where the stored weights are not what config.json says.

    Checkpoints of some families hold layers beside these, which transformers leaves out.
    """
    stored = {name: shape for name, (_, shape) in stored_tensors(folder).items()}
    count = sum(map(math.prod, stored.values()))
    if model.tied:
        count -= math.prod(stored.get("lm_head.weight", [0]))
    found = None
    missing, allowed = model.parameters - count, 0.01 * model.parameters
    if stored and (missing > allowed or (-missing > allowed and model.family in KNOWN)):
        found, needed = f"{count:,} parameters", f"{model.parameters:,}"
    for name, shape in stored.items():
        rows = [model.vocabulary, model.hidden]
        if name in ("model.embed_tokens.weight", "embed_tokens.weight") and shape != rows:
            found = f"an embedding of {shape}"
            needed = f"{rows}: vocab_size, hidden_size"
    if found:
        raise RunError(
            f"the weights in {folder} are not what its config.json says", found=found, needed=needed
        )
    return model


def stored_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return {name: (type, shape)} of the weights in a directory, from their safetensors' headers.

    {} where there are none. Raises RunError for a file that is not readable.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors.index.json"
    tensors, names = {}, ["model.safetensors"]
    try:
        if path.is_file():
            names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        for path in (folder / name for name in names):
            if path.is_file():
                with safe_open(path, framework="np") as file:
                    for name in file.keys():  # noqa: SIM118
                        tensor = file.get_slice(name)
                        tensors[name] = tensor.get_dtype(), tensor.get_shape()
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        with open(path, "rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        raise RunError(
            f"{path} is not readable",
            found="a git-lfs pointer" if pointer else str(error)[:200],
            needed="the weights as safetensors",
            fix="git lfs pull, or download it again",
        ) from None
    return tensors
