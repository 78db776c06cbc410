"""Attention for packed rows: which backend keeps the samples of a row apart exactly.

Torch's kernels for samples of variable length are registered as a backend of ours, "varlen".
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from trainer.config.settings import Settings
from trainer.errors import RunError

# Proven by tests: a packed sample has the same logits as the sample alone.
EXACT = ("varlen", "sdpa", "eager")
# Recurrent and linear layers carry state from one sample to the next. What another family does with
# these layers is proven by proof.py, once the model is loaded.
_EXACT_LAYERS = {"full_attention", "sliding_attention"}

# Settings of model families that torch's kernels do not compute.
_NOT_IN_VARLEN = ("qk_rope_head_dim", "attention_dropout", "attn_logit_softcapping")


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within the samples of a flattened batch.

    This is transformers' attention interface. query, key, value: [batch, heads, tokens, head size],
    bf16 or fp16 on CUDA. options: cu_seq_lens_q, int32 [samples + 1], where samples begin in
    batch · tokens, and max_length_q, the tokens of the longest. Return ([batch, tokens, heads, head
    size], None). Raise RunError for options that the kernels do not have.
    """
    from torch.nn.attention.varlen import varlen_attn

    for name in ("s_aux", "softcap", "position_bias"):
        if options.get(name) is not None:
            raise RunError(
                f"varlen attention does not compute {name}", fix="--attn_implementation eager"
            )
    batch, heads, tokens, _ = query.shape
    borders, longest = options["cu_seq_lens_q"], options["max_length_q"]
    grouped = {}
    if key.shape[1] != heads:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:
            key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out: Any = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        **grouped,
    )
    return out.unflatten(0, (batch, tokens)), None


def choose(skeleton: Any, settings: Settings, gpu: bool, precision: str) -> str | None:
    """Return the name of the attention backend, or None for the model's own choice.

    skeleton: the model, or the PEFT model around it. Raise RunError where samples of a packed row
    could not be kept apart.
    """
    backend = settings.attn_implementation
    if not settings.packing and backend != "varlen":
        return backend
    model = skeleton.get_base_model() if hasattr(skeleton, "peft_config") else skeleton
    config = model.config.get_text_config()
    inexact = set(getattr(config, "layer_types", None) or ()) - _EXACT_LAYERS
    if inexact or getattr(model, "_is_stateful", False):
        raise RunError(
            f"packing is not exact for {type(model).__name__}: "
            "samples of one row would see each other",
            found=", ".join(sorted(inexact)) or "layers that carry state",
            needed="plain attention layers",
            fix="--packing false; --train_sampling_strategy group_by_length keeps padding low",
        )
    if backend not in (None, *EXACT):
        raise RunError(
            f"--attn_implementation {backend} is not proven to keep packed samples apart",
            needed=" | ".join(EXACT),
            fix="leave --attn_implementation out: the fastest exact one is taken; "
            "or --packing false",
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Whether torch's kernels compute this model's attention on this hardware.
    fits = (
        gpu
        and model._supports_attention_backend
        and precision != "fp32"
        and torch.__version__ >= "2.11"  # its kernels have a window and a scale
        and size <= 256
        and size % 8 == 0
        and getattr(config, "v_head_dim", size) == size
        and not any(getattr(config, name, None) for name in _NOT_IN_VARLEN)
        and not any(name.endswith(".sinks") for name, _ in model.named_parameters())
    )
    if backend == "varlen" and not fits:
        raise RunError(
            "--attn_implementation varlen cannot run here",
            found=f"{'CUDA' if gpu else 'CPU'}, {precision}, torch {torch.__version__}",
            needed="CUDA, bf16 or fp16, torch 2.11 or later, no attention dropout",
            fix="leave --attn_implementation out",
        )
    if fits and backend in (None, "varlen"):
        backend = "varlen"
        AttentionInterface.register(backend, varlen_attention)
    return backend
