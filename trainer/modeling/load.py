"""The model: its shapes beforehand, weights into ZeRO-3 partitions, adapters, and the decoder layer as one fetch unit."""

import importlib.util
import json
import pickle

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.template import prepare_tokenizer
from trainer.config.ds_config import Shapes
from trainer.errors import BAD_INPUT, RunError, did_you_mean
from trainer.system import default_model

SWAPPED_BYTES = (
    2**20
)  # DeepSpeed keeps smaller tensors in RAM (swap_tensor/utils.py, MIN_AIO_BYTES)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def locate(name):
    """The model's directory or hub name; the embedded default where there is none."""
    return str(default_model.ensure()) if name is None else name


def load_config(name, settings):
    """The model's transformers configuration."""
    try:
        return AutoConfig.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise RunError(
            f"the model {name} cannot be read",
            found=" ".join(str(error).split())[:300],
            needed="a local model directory, or a hub name, network and, for a gated model, HF_TOKEN",
        ) from None


def load_tokenizer(name, settings):
    """(tokenizer, what was added to it in words)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
    except (
        Exception
    ) as error:  # transformers raises half a dozen kinds for a missing or broken tokenizer
        raise RunError(
            f"the tokenizer of {name} cannot be read",
            found=" ".join(str(error).split())[:300],
            needed="tokenizer.json and tokenizer_config.json beside the weights",
        ) from None
    return tokenizer, prepare_tokenizer(tokenizer, settings.template)


def decoder_layers(model):
    """The decoder's list of layers, found by structure: the ModuleList with the most parameters, whose members are of one class
    or a few. Empty where the model has none."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    return list(max(lists, key=lambda m: sum(_numel(p) for p in m.parameters()), default=[]))


def _numel(parameter):
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def skeleton(config, settings):
    """The model without memory (meta device), adapters included: for shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=settings.trust_remote_code
        )
        return add_adapters(model, settings) if settings.method == "lora" else model


def shapes_of(model, precision):
    """Shapes (elements) of a skeleton for the run's precision."""
    layers = decoder_layers(model) or [model]
    layer = max(layers, key=lambda m: sum(p.numel() for p in m.parameters()))
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    itemsize = DTYPES[precision].itemsize
    return Shapes(
        layer=sum(p.numel() for p in layer.parameters()),
        layer_tensors=sum(p.numel() * itemsize >= SWAPPED_BYTES for p in layer.parameters()),
        largest=max(p.numel() for p in model.parameters()),
        trainable=sum(trainable),
        largest_trainable=max(trainable),
        itemsize=itemsize,
        small_frozen=sum(
            p.numel()
            for p in model.parameters()
            if not p.requires_grad and p.numel() <= max(trainable)
        ),
    )


def add_adapters(model, settings):
    """The model with LoRA adapters, its own weights frozen."""
    from peft import LoraConfig, get_peft_model

    targets = settings.lora_target_modules
    targets = (
        targets if targets == "all-linear" else [t.strip() for t in targets.split(",") if t.strip()]
    )
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        # fp32 adapters beside a bf16 model would make two precisions of one ZeRO group.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        names = sorted(
            {
                n.rsplit(".", 1)[-1]
                for n, m in model.named_modules()
                if isinstance(m, torch.nn.Linear)
            }
        )
        hint = did_you_mean(targets[0], names) if isinstance(targets, list) and targets else ""
        raise RunError(
            f"lora_target_modules {settings.lora_target_modules} is not in the model{hint}",
            found=" ".join(str(error).split())[:200],
            needed="all-linear, or some of " + ", ".join(names),
        ) from None
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def build(name, config, settings, precision, attention=None):
    """The model in `precision`, partitioned by ZeRO-3 as it is loaded. TrainingArguments must exist already: without them
    transformers does not know about ZeRO-3 and every rank would load the whole model."""
    options = {"dtype": DTYPES[precision], "trust_remote_code": settings.trust_remote_code}
    if attention:
        options["attn_implementation"] = attention
    try:
        if settings.random_weights:
            model = AutoModelForCausalLM.from_config(config, **options)
            _randomize(model)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=settings.model_revision, config=config, **options
            )
    except (OSError, ValueError, ImportError, pickle.UnpicklingError, SafetensorError) as error:
        raise RunError(
            f"the model {name} cannot be loaded",
            found=" ".join(str(error).split())[:300],
            fix="--random_weights true trains a random model of its shape"
            if "no file named" in str(error)
            else None,
            code=BAD_INPUT,
        ) from None
    model.config.use_cache = False
    if settings.method == "lora":
        model = add_adapters(model, settings)
        # Else nothing upstream of the first adapter asks for a gradient: checkpointing would skip the layer, and the backward
        # hook of a first layer that is a ZeRO-3 leaf would fire, and release its parameters, before their gradients are made.
        model.enable_input_require_grads()
    return model


def _randomize(model):
    """Normal weights with the configuration's own deviation, norms at one; the same on any number of ranks."""
    import deepspeed

    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for i, parameter in enumerate(model.parameters()):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if parameter.numel() and parameter.dim() > 1:
                parameter.normal_(
                    0, std, generator=torch.Generator(parameter.device).manual_seed(i)
                )
            elif parameter.numel():
                parameter.fill_(1.0)


def uses_liger(settings, gpu):
    """Whether Liger's kernels (norms, rotary embedding, gated MLP, loss) run: where there is a GPU and the package, or as asked."""
    found = gpu and importlib.util.find_spec("liger_kernel") is not None
    if settings.use_liger_kernel and not found:
        raise RunError(
            "Liger's kernels cannot run here",
            found="a CPU" if not gpu else "no package liger-kernel",
            needed="CUDA and liger-kernel",
            fix="make setup on the GPU machine, or leave --use_liger_kernel out",
        )
    return found if settings.use_liger_kernel is None else settings.use_liger_kernel


def liger_kernels(settings, config):
    """Which of Liger's kernels: not its loss, which is taken in loss.py; not its MLP where the activation is another than SiLU, which
    Liger does not look at when it patches a model that exists."""
    text = config.get_text_config()
    activation = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    silu = {} if activation in ("silu", "swish") else {"swiglu": False}
    return {
        **silu,
        **(settings.liger_kernel_config or {}),
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }


def make_leaves(model):
    """Tell ZeRO-3 to fetch each decoder layer as one unit, not matrix by matrix. Returns the layer's class name, or None."""
    from deepspeed.utils import set_z3_leaf_modules

    layers = decoder_layers(model)
    if not layers:
        return None
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    return type(layers[0]).__name__
