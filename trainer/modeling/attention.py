"""Attention for packed rows: which backend keeps samples apart exactly, and torch's own variable-length kernels as one of them."""

import inspect

import torch

from trainer.errors import RunError

# Proven by tests (logits of a packed sample against the same sample alone). `varlen` is registered below.
EXACT = ("varlen", "sdpa", "eager")
_LAYERS = {
    "full_attention",
    "sliding_attention",
}  # recurrent and linear layers carry state from sample to sample


def _varlen():
    """torch's varlen_attn (flash kernels, torch 2.11 or later), or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return (
        varlen_attn
        if {"window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters)
        else None
    )


def varlen_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    **kwargs,
):
    """Causal attention within the samples of a flattened batch; transformers' attention interface.

    query, key, value: [batch, heads, tokens, head size], bf16 or fp16 on CUDA; cu_seq_lens_q: int32 [samples + 1], where samples
    begin in batch · tokens. Returns ([batch, tokens, heads, head size], None).
    """
    unknown = [
        name for name in ("s_aux", "softcap", "position_bias") if kwargs.get(name) is not None
    ]
    if unknown:
        raise RunError(
            f"varlen attention does not compute {unknown[0]}", fix="--attn_implementation eager"
        )
    batch, heads, tokens, size = query.shape
    attend = _varlen()
    options = {}
    if key.shape[1] != heads:
        if "enable_gqa" in inspect.signature(attend).parameters:
            options["enable_gqa"] = True
        else:
            key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    flat = (
        t.transpose(1, 2).reshape(batch * tokens, t.shape[1], size) for t in (query, key, value)
    )
    window = (sliding_window - 1 if sliding_window else -1, 0)
    out = attend(
        *flat,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        **options,
    )
    return out.view(batch, tokens, heads, size), None


def _fits_varlen(config, names, gpu, precision):
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (
        getattr(config, "v_head_dim", size) != size
        or "sinks" in names
        or getattr(config, "qk_rope_head_dim", None)
    ):
        return False  # attention sinks, and values of another size than keys: not what the kernels compute
    return (
        gpu
        and precision in ("bf16", "fp16")
        and _varlen() is not None
        and not getattr(config, "attention_dropout", 0)
        and not getattr(config, "attn_logit_softcapping", None)
        and size <= 256
        and size % 8 == 0
    )


def choose(skeleton, settings, gpu, precision):
    """The attention backend by name, or None for the model's own choice. RunError where packed rows could not be kept apart."""
    asked = settings.attn_implementation
    if not settings.packing and asked != "varlen":
        return asked
    model = skeleton.get_base_model() if hasattr(skeleton, "peft_config") else skeleton
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - _LAYERS
    if (
        kinds
        or not getattr(model, "_supports_attention_backend", False)
        or getattr(model, "_is_stateful", False)
    ):
        raise RunError(
            f"packing is not exact for {type(model).__name__}: samples of one row would see each other",
            found=", ".join(sorted(kinds)) or "attention of its own",
            needed="plain attention layers",
            fix="--packing false; --train_sampling_strategy group_by_length keeps padding low",
        )
    if asked is not None and asked not in EXACT:
        raise RunError(
            f"--attn_implementation {asked} is not proven to keep packed samples apart",
            needed=" | ".join(EXACT),
            fix="leave --attn_implementation out: the fastest exact one is taken; or --packing false",
        )
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    fits = _fits_varlen(config, names, gpu, precision)
    if asked == "varlen" and not fits:
        raise RunError(
            "--attn_implementation varlen cannot run here",
            found=f"{'CUDA' if gpu else 'CPU'}, {precision}, torch {torch.__version__}",
            needed="CUDA, bf16 or fp16, torch 2.11 or later, no attention dropout",
            fix="leave --attn_implementation out",
        )
    if asked is None and fits:
        asked = "varlen"
    if asked == "varlen":
        from transformers import AttentionInterface

        AttentionInterface.register("varlen", varlen_attention)
    return asked
