"""What a model is made of, from its config.json or its weights' headers. Imports no torch.

A model is its decoder layers, all alike, and what is beside them (embedding, head, last norm); sizes are elements.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from trainer.config.ds_config import Shapes
from trainer.config.flags import check_model
from trainer.errors import RunError, did_you_mean

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied head, biases of q, k and v: the published config.json files
BUILT_IN = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True, False),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True, False),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True, False),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False, False),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, False, False),
    "llama-3.1-405b": (16384, 53248, 126, 128, 8, 128256, False, False),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, False, False),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000, False, False),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32768, False, False),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False, True),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False, True),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, False, True),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064, False, True),
}
HUB = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in ("0.5", "7", "14", "32", "72")},
}
KNOWN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
)  # model_type of configurations that say all that is needed here
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass
class Model:
    """hidden, intermediate, head widths (query, key_value), layers, vocabulary: as in config.json. matrices: {name: (out, in)} of one
    layer's linear maps. small: elements of its norms and biases. tied: the head is the embedding."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    query: int
    key_value: int
    vocabulary: int
    tied: bool
    small: int

    @property
    def matrices(self):
        """The linear maps of one decoder layer, {name: (out, in)}."""
        h, q, kv, i = self.hidden, self.query, self.key_value, self.intermediate
        return {
            "q_proj": (q, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, q),
            "gate_proj": (i, h),
            "up_proj": (i, h),
            "down_proj": (h, i),
        }

    @property
    def layer(self):
        """Parameters of one decoder layer."""
        return sum(a * b for a, b in self.matrices.values()) + self.small

    @property
    def embedding(self):
        """Parameters of the embedding, and of the head where it is not tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self):
        """All of them; a tied head counts once."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2) + self.hidden

    def adapters(self, rank, targets="all-linear"):
        """{matrix: elements of its LoRA adapter in one layer}; targets as --lora_target_modules."""
        names = (
            list(self.matrices)
            if targets == "all-linear"
            else [t.strip() for t in str(targets).split(",") if t.strip()]
        )
        if not names:
            raise RunError(
                "lora_target_modules is empty",
                needed="all-linear, or some of " + ", ".join(self.matrices),
            )
        for name in names:
            if name not in self.matrices:
                raise RunError(
                    f"lora_target_modules {targets} is not in the model{did_you_mean(name, self.matrices)}",
                    needed="all-linear, or some of " + ", ".join(self.matrices),
                )
        return {n: rank * sum(self.matrices[n]) for n in names}

    def shapes(self, precision, method, rank=16, targets="all-linear"):
        """What the "auto" values of the JSON are made from, as model.shapes_of finds it in the model itself."""
        size, lora = ITEMSIZE[precision], method == "lora"
        maps = [a * b for a, b in self.matrices.values()]
        parts = (
            [rank * n for name in self.adapters(rank, targets) for n in self.matrices[name]]
            if lora
            else []
        )
        trainable = self.layers * sum(parts) if lora else self.parameters
        largest = max(parts) if lora else max(self.embedding, *maps)
        frozen = [
            *(
                [self.hidden] * 2 + [self.small - 2 * self.hidden]
                if self.small > 2 * self.hidden
                else [self.hidden] * 2
            ),
            *maps,
        ]
        small = (
            self.layers * sum(n for n in frozen if n <= largest)
            + (self.hidden if self.hidden <= largest else 0)
            if lora
            else 0
        )
        return Shapes(
            layer=self.layer + sum(parts),
            layer_tensors=sum(n * size >= 2**20 for n in [*maps, *parts]),
            largest=max(self.embedding, *maps),
            trainable=trainable,
            largest_trainable=largest,
            itemsize=size,
            small_frozen=small,
        )


def built_in(name):
    """One of BUILT_IN, by its name or that of its repository on the hub, or RunError with those near."""
    key = re.sub(
        r"^(meta-)?llama-3\.1-(8|70)b", r"llama-3-\2b", name.lower().rpartition("/")[2]
    ).removeprefix("meta-")
    key = re.sub(r"(-chat|-instruct|-hf|-v0\.\d)+$", "", key)
    if key not in BUILT_IN:
        raise RunError(
            f"no model {name[:80]}{did_you_mean(key, BUILT_IN)}",
            needed="a model directory, a config.json, or one of " + ", ".join(BUILT_IN),
        )
    h, i, layers, heads, kv, vocabulary, tied, biases = BUILT_IN[key]
    width = h // heads
    return Model(
        key,
        h,
        i,
        layers,
        heads * width,
        kv * width,
        vocabulary,
        tied,
        2 * h + (heads + 2 * kv) * width * biases,
    )


def from_config(path):
    """From a config.json."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is not readable as a model's configuration",
            found=" ".join(str(error).split())[:200],
            needed="the config.json of a causal language model",
        ) from None
    return from_dict(config, Path(path).absolute().parent.name, path)


def from_dict(config, name, path="config.json"):
    """From the content of a config.json, of a family that says all that is needed."""
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    kinds = config.get("architectures") or []
    kinds = [str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])]
    if kinds and not any(kind.endswith("ForCausalLM") for kind in kinds):
        raise RunError(
            f"{path} is not a causal language model", found=", ".join(kinds), needed="…ForCausalLM"
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
    try:
        h, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv, width = (
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or h // heads),
        )
        biases = (
            (heads + 2 * kv) * width if family == "qwen2" or config.get("attention_bias") else 0
        )
        norms = 2 * h + (2 * width if family == "qwen3" else 0)
        numbers = [
            h,
            int(config["intermediate_size"]),
            int(config["num_hidden_layers"]),
            heads * width,
            kv * width,
            int(config["vocab_size"]),
        ]
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise RunError(
            f"{path} lacks what the plan needs",
            found=f"{'no ' if isinstance(error, KeyError) else ''}{error}",
            needed="hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size",
        ) from None
    if min(numbers) < 1 or max(numbers) > 10**7:
        raise RunError(
            f"{path} holds an impossible size",
            found=min(numbers) if min(numbers) < 1 else max(numbers),
            needed="1 to 10,000,000",
        )
    tied = bool(config.get("tie_word_embeddings", family == "smollm3"))
    return Model(
        name,
        *numbers,
        tied,
        norms + biases + (h if config.get("attention_bias") and family != "qwen2" else 0),
    )


def find(name):
    """A model by directory, config.json or built-in name."""
    path = Path(name)
    if not name or len(name) > 4000:
        raise RunError(
            "--model is empty" if not name else "--model is too long",
            needed="a model directory, a config.json, or one of " + ", ".join(BUILT_IN),
        )
    if len(name) < 256 and path.is_dir():
        check_model(name)
        model = from_config(path / "config.json")
        stored = stored_shapes(path)
        have = sum(math.prod(shape) for shape in stored.values()) - (
            math.prod(stored.get("lm_head.weight", [0])) if model.tied else 0
        )
        if stored and abs(have - model.parameters) > 0.01 * model.parameters:
            raise RunError(
                f"the weights in {path} are not what its config.json says",
                found=f"{have:,} parameters",
                needed=f"{model.parameters:,}",
            )
        embedding = next((s for n, s in stored.items() if n.endswith("embed_tokens.weight")), None)
        if embedding and embedding != [model.vocabulary, model.hidden]:
            raise RunError(
                f"the weights in {path} are not what its config.json says",
                found=f"an embedding of {embedding}",
                needed=f"[{model.vocabulary}, {model.hidden}]: vocab_size, hidden_size",
            )
        return model
    if len(name) < 256 and path.is_file():
        return from_config(path)
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise RunError(
            f"no model {name}",
            found=f"nothing at {path.absolute()}",
            needed="a model directory, a config.json, or one of " + ", ".join(BUILT_IN),
        )
    return built_in(name)


def stored_shapes(folder):
    """{name: shape} of the weights in a directory, from the headers of its safetensors; {} where there are none."""
    index, found = Path(folder) / "model.safetensors.index.json", {}
    try:
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else ["model.safetensors"]
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(
            f"{index} is not readable",
            found=str(error)[:200],
            needed="the index of safetensors shards",
        ) from None
    for path in (Path(folder) / name for name in names):
        if not path.is_file():
            continue
        try:
            with open(path, "rb") as file:
                size = struct.unpack("<Q", file.read(8))[0]
                if size > min(path.stat().st_size, 10**8):
                    raise ValueError("its header would be longer than the file")
                header = json.loads(file.read(size))
            found.update(
                {
                    name: [int(n) for n in tensor["shape"]]
                    for name, tensor in header.items()
                    if name != "__metadata__"
                }
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            start = path.read_bytes()[:40] if path.stat().st_size < 1000 else b""
            raise RunError(
                f"{path} is not a safetensors file",
                found="a git-lfs pointer"
                if start.startswith(b"version https://git-lfs")
                else str(error)[:200] or "an empty file",
                needed="the weights",
                fix="git lfs pull, or download it again",
            ) from None
    return found
