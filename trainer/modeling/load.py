"""The model: its shapes before it is loaded, its weights as ZeRO-3 shards, and LoRA adapters."""

import traceback
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_liger_kernel_available

from data.template import prepare_tokenizer
from trainer.config.ds_config import SWAPPED, ZeroShapes
from trainer.config.settings import Settings
from trainer.engine import shard_reader
from trainer.errors import RunError, make_line, named, one_line
from trainer.modeling import experts, weights
from trainer.modeling.adapters import add_adapters
from trainer.modeling.experts import decoder_layers

# DeepSpeed keeps smaller tensors in RAM (swap_tensor/utils.py, MIN_AIO_BYTES).
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_config(name: str, settings: Settings) -> PreTrainedConfig:
    """Return the model's transformers configuration. Raise RunError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
    # What a configuration's class raises for values that it does not expect is of any class.
    except Exception as error:
        raise RunError(
            f"the model {name} cannot be read",
            found=named(error),
            needed="a local model directory with a config.json that transformers takes, or a hub "
            "name, network and, for a gated model, HF_TOKEN",
        ) from None


def load_tokenizer(name: str, settings: Settings) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return (tokenizer, what it was given beyond its files). Raise RunError where it is broken."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
    # transformers raises half a dozen classes for a missing or broken tokenizer.
    except Exception as error:
        raise RunError(
            f"the tokenizer of {name} cannot be read",
            found=one_line(error),
            needed="tokenizer.json and tokenizer_config.json beside the weights",
        ) from None
    return tokenizer, prepare_tokenizer(tokenizer, settings.template)


def skeleton(config: PreTrainedConfig, settings: Settings) -> PreTrainedModel:
    """Return the model on the meta device, without memory or adapters: for shapes.

    Raise RunError where transformers cannot build a causal model of this configuration.
    """
    name = config.name_or_path or config.model_type
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            )
    except Exception as error:  # whatever a model's code raises for values that it does not expect
        if "Unrecognized configuration class" in str(error):
            two = ", an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else ""
            raise RunError(
                f"{name} is not a causal language model",
                found=f"{config.model_type}{two}",
                needed="a model_type that AutoModelForCausalLM takes",
            ) from None
        raise RunError(
            f"transformers cannot build the model that config.json of {name} describes",
            found=named(error),
        ) from None


def adapted(skeleton: PreTrainedModel, settings: Settings) -> Any:
    """Return the skeleton with the adapters of a LoRA run, else as it is."""
    with torch.device("meta"):
        return add_adapters(skeleton, settings) if settings.method == "lora" else skeleton


def shapes_of(model: nn.Module, precision: str) -> ZeroShapes:
    """Return the sizes of a skeleton, in elements, and the bytes of one in this precision."""
    itemsize = DTYPES[precision].itemsize
    layers = ([p.numel() for p in m.parameters()] for m in decoder_layers(model) or [model])
    layer = max(layers, key=sum)
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    return ZeroShapes(
        layer=sum(layer),
        layer_tensors=sum(numel * itemsize >= SWAPPED for numel in layer),
        largest=max(trainable + frozen),
        trainable=sum(trainable),
        largest_trainable=max(trainable),
        itemsize=itemsize,
        small_frozen=sum(numel for numel in frozen if numel <= max(trainable)),
    )


def build(
    name: str,
    config: PreTrainedConfig,
    settings: Settings,
    precision: str,
    attention: str | None,
) -> PreTrainedModel:
    """Return the model in this precision, with adapters, partitioned by ZeRO-3 as it is loaded.

    attention: the backend's name, or None for the model's own choice. TrainingArguments must exist
    already. Without them transformers does not know about ZeRO-3, and every rank would load the
    whole model. Raise RunError where the weights cannot be loaded.
    """
    options = {"dtype": DTYPES[precision], "trust_remote_code": settings.trust_remote_code}
    if attention:
        options["attn_implementation"] = attention
    try:
        if settings.random_weights:
            model = AutoModelForCausalLM.from_config(config, **options)
            _randomize(model)
        else:
            with shard_reader.own_shards():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    name,
                    revision=settings.model_revision,
                    config=config,
                    output_loading_info=True,
                    **options,
                )
            model, info = loaded
            weights.check_loaded(name, info)
    except weights.LOAD_ERRORS as error:
        raise weights.not_loaded(name, error) from None
    except (IndexError, RuntimeError) as error:
        stack = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = [frame for frame in stack if frame.f_code.co_name == "_init_weights"]
        if not own or type(error) not in (IndexError, RuntimeError):  # out of memory, say
            raise
        raise RunError(
            f"{type(own[0].f_locals['self']).__name__} cannot be loaded under ZeRO-3",
            found=f"{named(error)}, in its own _init_weights",
            needed="an initialisation that works on weights that are partitioned",
        ) from None
    model.config.use_cache = False
    if settings.method == "lora":
        model = add_adapters(model, settings)
        # Else nothing before the first adapter needs a gradient. Checkpointing would skip the
        # layer. And where a first layer is a ZeRO-3 leaf, its backward hook would fire, and release
        # its parameters, before their gradients are computed.
        model.enable_input_require_grads()
    return model


def _randomize(model: PreTrainedModel) -> None:
    """Draw weights from the configuration's normal distribution, and set norms to one.

    The weights are the same on any number of ranks.
    """
    import deepspeed

    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for i, parameter in enumerate(model.parameters()):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(
                    0, std, generator=torch.Generator(parameter.device).manual_seed(i)
                )
            else:
                parameter.fill_(1.0)


def uses_liger(settings: Settings, gpu: bool) -> bool:
    """Return whether Liger's kernels (norms, rotary embedding, gated MLP, loss) run.

    Without the flag they run where there is a GPU and the package. Raise RunError where the flag
    demands them and they cannot run.
    """
    available = gpu and is_liger_kernel_available()
    if settings.use_liger_kernel and not available:
        raise RunError(
            "Liger's kernels cannot run here",
            found="no package liger-kernel" if gpu else "a CPU",
            needed="CUDA and liger-kernel",
            fix=make_line("setup") + " on the GPU machine, or leave --use_liger_kernel out",
        )
    return available and settings.use_liger_kernel is not False


def liger_kernels(settings: Settings, config: PreTrainedConfig) -> dict[str, bool]:
    """Return which of Liger's kernels run, as Liger's keyword arguments.

    Its losses do not: loss.py calls its kernel itself. Its MLPs run for SiLU and for GELU by tanh
    only: Liger does not look at the activation when it patches a model that exists already. Its
    fused experts, which come with the MLP, do not run either: in liger-kernel 0.8.5 they cannot
    take the place of PEFT's wrapper, and their kernels try 32 to 40 variants each in the first
    step, more than 100 s on an H100. experts.py runs torch's grouped products instead.

    Raise RunError where --liger_kernel_config demands them.
    """
    text = config.get_text_config()
    activation = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    kernels = dict(
        settings.liger_kernel_config or {}, cross_entropy=False, fused_linear_cross_entropy=False
    )
    if experts.routes(text):
        if kernels.get("swiglu"):
            raise RunError(
                "--liger_kernel_config swiglu is not for a model with experts",
                found="swiglu: true, which replaces the experts too",
                fix="leave swiglu out: experts run as grouped products of torch",
            )
        kernels["swiglu"] = False
    elif activation not in ("silu", "swish"):
        kernels.setdefault("swiglu", False)
    if activation not in ("gelu_pytorch_tanh", "gelu_new"):
        kernels.setdefault("geglu", False)
    return kernels


def make_leaves(model: nn.Module) -> str | None:
    """Let ZeRO-3 gather each decoder layer as a whole, not matrix by matrix.

    Return the class name of the layers, or None where there are none.
    """
    from deepspeed.utils import set_z3_leaf_modules

    layers = decoder_layers(model)
    if not layers:
        return None
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    return type(layers[0]).__name__
