"""What a model is made of, from its config.json or its weights' headers. Imports no torch.

A model is its decoder layers, all alike, and what is beside them (embedding, head, last norm); sizes are elements.
"""
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from .args import check_model
from .config import Shapes
from .errors import RunError, did_you_mean

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied head, biases of q, k and v: the published config.json files
BUILT_IN = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True, False), "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True, False),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True, False), "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False, False),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, False, False),
    "llama-3.1-405b": (16384, 53248, 126, 128, 8, 128256, False, False),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, False, False), "llama-2-13b": (5120, 13824, 40, 40, 40, 32000, False, False),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32768, False, False), "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False, True), "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False, True),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, False, True), "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064, False, True)}
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model_type of configurations that say all that is needed here
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
        return {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q), "gate_proj": (i, h), "up_proj": (i, h),
                "down_proj": (h, i)}

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
        names = list(self.matrices) if targets == "all-linear" else [t.strip() for t in str(targets).split(",") if t.strip()]
        for name in names:
            if name not in self.matrices:
                raise RunError(f"lora_target_modules {targets} is not in the model{did_you_mean(name, self.matrices)}",
                               needed="all-linear, or some of " + ", ".join(self.matrices))
        return {n: rank * sum(self.matrices[n]) for n in names}

    def shapes(self, precision, method, rank=16, targets="all-linear"):
        """What the "auto" values of the JSON are made from, as model.shapes_of finds it in the model itself."""
        size, lora = ITEMSIZE[precision], method == "lora"
        maps = [a * b for a, b in self.matrices.values()]
        parts = [rank * n for name in self.adapters(rank, targets) for n in self.matrices[name]] if lora else []
        trainable = self.layers * sum(parts) if lora else self.parameters
        largest = max(parts) if lora else max(self.embedding, *maps)
        frozen = [*([self.hidden] * 2 + [self.small - 2 * self.hidden] if self.small > 2 * self.hidden else [self.hidden] * 2), *maps]
        small = self.layers * sum(n for n in frozen if n <= largest) + (self.hidden if self.hidden <= largest else 0) if lora else 0
        return Shapes(layer=self.layer + sum(parts), layer_tensors=sum(n * size >= 2**20 for n in [*maps, *parts]),
                      largest=max(self.embedding, *maps), trainable=trainable, largest_trainable=largest, itemsize=size,
                      small_frozen=small)


def built_in(name):
    """One of BUILT_IN, or RunError with those near."""
    key = name.lower().removesuffix("-instruct")
    if key not in BUILT_IN:
        raise RunError(f"no model {name}{did_you_mean(key, BUILT_IN)}",
                       needed="a model directory, a config.json, or one of " + ", ".join(BUILT_IN))
    h, i, layers, heads, kv, vocabulary, tied, biases = BUILT_IN[key]
    width = h // heads
    return Model(key, h, i, layers, heads * width, kv * width, vocabulary, tied, 2 * h + (heads + 2 * kv) * width * biases)


def from_config(path):
    """From a config.json."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not readable as a model's configuration", found=" ".join(str(error).split())[:200],
                       needed="the config.json of a causal language model") from None
    return from_dict(config, Path(path).absolute().parent.name, path)


def from_dict(config, name, path="config.json"):
    """From the content of a config.json, of a family that says all that is needed."""
    config = {**config, **(config.get("text_config") or {})}
    kinds = config.get("architectures") or []
    if kinds and not any(kind.endswith("ForCausalLM") for kind in kinds):
        raise RunError(f"{path} is not a causal language model", found=", ".join(kinds), needed="…ForCausalLM")
    family = config.get("model_type")
    if family not in KNOWN:
        raise RunError(f"{path} is of a family that the plan does not know", found=family, needed=" | ".join(KNOWN),
                       fix="make train-zero3 runs other causal models too, without a plan")
    try:
        h, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv, width = int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or h // heads)
        biases = (heads + 2 * kv) * width if family == "qwen2" or config.get("attention_bias") else 0
        norms = 2 * h + (2 * width if family == "qwen3" else 0)
        numbers = [h, int(config["intermediate_size"]), int(config["num_hidden_layers"]), heads * width, kv * width,
                   int(config["vocab_size"])]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise RunError(f"{path} lacks what the plan needs", found=f"no usable {error}",
                       needed="hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size") from None
    if min(numbers) < 1:
        raise RunError(f"{path} holds an impossible size", found=min(numbers), needed="1 or more")
    tied = bool(config.get("tie_word_embeddings", family == "smollm3"))
    return Model(name, *numbers, tied, norms + biases + (h if config.get("attention_bias") and family != "qwen2" else 0))


def find(name):
    """A model by directory, config.json or built-in name."""
    path = Path(name)
    if path.is_dir():
        check_model(name)
        model = from_config(path / "config.json")
        stored = stored_parameters(path)
        if stored and abs(stored - model.parameters) > 0.01 * model.parameters:
            raise RunError(f"the weights in {path} are not what its config.json says", found=f"{stored:,} parameters",
                           needed=f"{model.parameters:,}")
        return model
    if path.is_file():
        return from_config(path)
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise RunError(f"no model {name}", found=f"nothing at {path.absolute()}",
                       needed="a model directory, a config.json, or one of " + ", ".join(BUILT_IN))
    return built_in(name)


def stored_parameters(folder):
    """Elements in a directory's safetensors, from their headers; 0 where there are none."""
    total = 0
    for path in Path(folder).glob("*.safetensors"):
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        except (OSError, ValueError, struct.error):
            return 0
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for n in tensor["shape"]:
                    count *= n
                total += count
    return total
