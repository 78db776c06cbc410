"""What a model is made of, from its config.json or the headers of its weights.

A model is its decoder layers, all alike, and what is outside them: embedding, head, last norm.
Sizes are elements. Does not import torch.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.ds_config import ZeroShapes
from trainer.config.settings import check_model
from trainer.errors import RunError, did_you_mean, one_line

# Keys of a config.json that every model has.
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
}
# model_type of configurations that say all that is needed.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# Forward, the gradient of the inputs, and that of the weights where they are trained.
PASSES = {"full": 3, "lora": 2}
NEEDED = "a model directory, a config.json, or one of " + ", ".join(BUILT_IN)


def flops_per_token(parameters: int, layers: int, hidden: int, length: float, method: str) -> float:
    """Return the operations of training one token, without what is recomputed.

    A product of a weight and a token is two operations. Attention's two products see half of the
    row on average. length: tokens of a row.
    """
    return PASSES[method] * (2 * parameters + 2 * layers * length * hidden)


@dataclass
class ModelSpec:
    """The sizes in a config.json. small: elements of one layer's norms and biases.

    tied: the head is the embedding, which then is one tensor in place of two. query, key_value:
    widths. matrix_sizes, layer, embedding: parameters of each linear map of one decoder layer, of
    the layer, and of the embedding, or the head where it is not tied.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    small: int

    def __post_init__(self) -> None:
        hidden, intermediate = self.hidden, self.intermediate
        self.query, self.key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        # The linear maps of one decoder layer: (out, in).
        self.matrices = {
            "q_proj": (self.query, hidden),
            "k_proj": (self.key_value, hidden),
            "v_proj": (self.key_value, hidden),
            "o_proj": (hidden, self.query),
            "gate_proj": (intermediate, hidden),
            "up_proj": (intermediate, hidden),
            "down_proj": (hidden, intermediate),
        }
        self.matrix_sizes = [rows * columns for rows, columns in self.matrices.values()]
        self.layer = sum(self.matrix_sizes) + self.small
        self.embedding = self.vocabulary * hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model. A tied head counts once."""
        return self.layers * self.layer + self.embedding * (2 - self.tied) + self.hidden

    def activations(
        self, tokens: int, itemsize: int, liger: bool = True, full: bool = True
    ) -> tuple[int, int]:
        """Return the bytes that a layer keeps for its backward pass, and those of its input alone.

        Counted from the model and Liger's kernels: input and output of both norms, q, k and v
        after the rotary embedding, the attention's output, gate, up and their product. Measured:
        2.75 GiB for 32,768 tokens of Llama-3.2-3B in bf16, exactly this. Without Liger's kernels
        autograd keeps the activation of gate too, and the quotients of both norms where their
        weights are trained.
        """
        numbers = 4 * self.hidden + 2 * self.query + 2 * self.key_value + 3 * self.intermediate
        if not liger:
            numbers += self.intermediate + (2 * self.hidden if full else 0)
        return numbers * tokens * itemsize, self.hidden * tokens * itemsize

    def loss_chunk(self, tokens: float) -> int:
        """Return the rows of a chunk of Liger's loss (fused_linear_cross_entropy.py)."""
        rows = tokens / math.ceil(self.vocabulary / self.hidden)
        return 2 ** math.ceil(math.log2(max(1, rows)))

    def adapters(self, rank: int, targets: str) -> dict[str, tuple[int, int]]:
        """Return {matrix: elements of both tensors of its LoRA adapter} of one layer.

        targets: as --lora_target_modules. Raises RunError for a module that the model lacks.
        """
        needed = "all-linear, or some of " + ", ".join(self.matrices)
        names = [name.strip() for name in targets.split(",") if name.strip()]
        if not names:
            raise RunError("lora_target_modules is empty", needed=needed)
        sizes = {}
        for name in self.matrices if names == ["all-linear"] else names:
            if name not in self.matrices:
                raise RunError(
                    f"lora_target_modules {targets} is not in the model"
                    f"{did_you_mean(name, self.matrices)}",
                    needed=needed,
                )
            rows, columns = self.matrices[name]
            sizes[name] = rank * rows, rank * columns
        return sizes

    def shapes(self, precision: str, adapters: dict[str, tuple[int, int]]) -> ZeroShapes:
        """Return what "auto" values are made from, as modeling/load.py does for a loaded model.

        adapters: of one layer; {} where all parameters are trained.
        """
        itemsize, matrices = ITEMSIZE[precision], self.matrix_sizes
        added = [size for pair in adapters.values() for size in pair]
        largest = largest_trainable = max(self.embedding, *matrices)
        trainable, small_frozen = self.parameters, 0
        if added:
            trainable, largest_trainable = self.layers * sum(added), max(added)
            # Two norms, what else is small as one tensor, and the last norm outside the layers.
            frozen = [self.hidden, self.hidden, self.small - 2 * self.hidden, *matrices]
            frozen = frozen * self.layers + [self.hidden]
            small_frozen = sum(size for size in frozen if size <= largest_trainable)
        return ZeroShapes(
            layer=self.layer + sum(added),
            layer_tensors=sum(size * itemsize >= 2**20 for size in matrices + added),
            largest=largest,
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
    key = re.sub(r"(-chat|-instruct|-hf|-v0\.\d)+$", "", key)
    if key not in BUILT_IN:
        raise RunError(f"no model {name[:80]}{did_you_mean(key, BUILT_IN)}", needed=NEEDED)
    *sizes, kv_heads, tied = BUILT_IN[key]
    config = dict(zip(SIZES, sizes), num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    family = "qwen2" if "qwen" in key else "llama"
    return from_dict(config | {"model_type": family}, key)


def from_config(path: Path) -> ModelSpec:
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
    return from_dict(config, path.absolute().parent.name, path)


def from_dict(config: dict[str, Any], name: str, path: str | Path = "config.json") -> ModelSpec:
    """Return the model of a config.json's content. path: for errors.

    Raises RunError for a family that is not known, and for sizes that are missing or impossible.
    """
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    _check_family(config, path)
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
        raise RunError(
            f"{path} holds an impossible size", found=impossible[0], needed="1 to 10,000,000"
        )
    small = 2 * hidden
    if family == "qwen3":
        small += 2 * head_dim
    if family == "qwen2" or biases:
        small += (heads + 2 * kv_heads) * head_dim
    if family != "qwen2" and biases:
        small += hidden
    tied = bool(config.get("tie_word_embeddings", family == "smollm3"))
    return ModelSpec(name, *sizes, tied, small)


def _check_family(config: dict[str, Any], path: str | Path) -> None:
    classes = config.get("architectures") or []
    classes = [str(name) for name in (classes if isinstance(classes, list) else [classes])]
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
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
    family = config.get("model_type")
    if family not in KNOWN:
        raise RunError(
            f"{path} is of a family that the plan does not know",
            found=family,
            needed=" | ".join(KNOWN),
            fix="make train-zero3 runs other causal models too, without a plan",
        )


def find(name: str) -> ModelSpec:
    """Return a model by directory, config.json or built-in name. Raises RunError for none."""
    path = Path(name)
    if not name or len(name) > 4000:
        raise RunError("--model is too long" if name else "--model is empty", needed=NEEDED)
    if os.path.isfile(name):  # unlike Path's, it answers for a name that is too long, too
        return from_config(path)
    if os.path.isdir(name):
        check_model(name)
        return _check_weights(from_config(path / "config.json"), path)
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise RunError(f"no model {name}", found=f"nothing at {path.absolute()}", needed=NEEDED)
    return built_in(name)


def _check_weights(model: ModelSpec, folder: Path) -> ModelSpec:
    """Return the model. Raise RunError where the stored weights are not what config.json says."""
    stored = stored_shapes(folder)
    total = sum(map(math.prod, stored.values()))
    if model.tied:
        total -= math.prod(stored.get("lm_head.weight", [0]))
    found = None
    if stored and abs(total - model.parameters) > 0.01 * model.parameters:
        found, needed = f"{total:,} parameters", f"{model.parameters:,}"
    for name, shape in stored.items():
        if name.endswith("embed_tokens.weight") and shape != [model.vocabulary, model.hidden]:
            found = f"an embedding of {shape}"
            needed = f"[{model.vocabulary}, {model.hidden}]: vocab_size, hidden_size"
    if found:
        raise RunError(
            f"the weights in {folder} are not what its config.json says", found=found, needed=needed
        )
    return model


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Return {name: shape} of the weights in a directory, from the headers of its safetensors.

    {} where there are none. Raises RunError for a file that is not readable.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors.index.json"
    shapes, names = {}, ["model.safetensors"]
    try:
        if path.is_file():
            names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        for path in (folder / name for name in names):
            if path.is_file():
                with safe_open(path, framework="np") as file:
                    for name in file.keys():  # noqa: SIM118
                        shapes[name] = file.get_slice(name).get_shape()
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        with open(path, "rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        raise RunError(
            f"{path} is not readable",
            found="a git-lfs pointer" if pointer else str(error)[:200],
            needed="the weights as safetensors",
            fix="git lfs pull, or download it again",
        ) from None
    return shapes
