"""Tiny models of many families: what is changed in each family's transformers configuration.

`COMMON` holds what all have where their configuration knows it. `FAMILIES` has transformers' model
types. Each model has every kind of layer of its family. Its larger matrices are 1 MiB or more in
fp32: DeepSpeed keeps smaller ones in RAM, and nothing would go to NVMe.
"""

import re
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    # Dropout would need the same random numbers on both sides of a comparison.
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "router_jitter_noise": 0.0,
}
WINDOW = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
MOE = {"intermediate_size": 256, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
DENSE_THEN_MOE = {
    **MOE,
    "intermediate_size": 1024,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
}
LINEAR = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
SSM = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "ministral": {**WINDOW, "head_dim": 64},
    "ministral3": {"head_dim": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "smollm3": {"num_hidden_layers": 4},
    "phi": {},
    "phi3": {"original_max_position_embeddings": 512},
    "olmo2": {},
    "olmo3": WINDOW,
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 3.0,
    },
    "gemma": {"head_dim": 64},
    "gemma2": {**WINDOW, "head_dim": 64, "query_pre_attn_scalar": 64},
    "gemma3_text": {**WINDOW, "head_dim": 64, "query_pre_attn_scalar": 64},
    "gpt_neox": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_bigcode": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "falcon": {},
    "bloom": {},
    "mpt": {"max_seq_len": 512},
    "opt": {"ffn_dim": 1024, "dropout": 0.0},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**WINDOW, "logit_scale": 0.5},
    "stablelm": {"num_key_value_heads": 4},
    "starcoder2": {"embedding_dropout": 0.0},
    "glm4": {"head_dim": 64},
    "exaone4": WINDOW,
    "seed_oss": {"head_dim": 64},
    "nemotron": {},
    # Mixtures of experts.
    "mixtral": {**MOE, "num_local_experts": 4},
    "qwen2_moe": {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {**MOE, "num_experts": 4, "head_dim": 64, "norm_topk_prob": True},
    "qwen3_next": {
        **MOE,
        **LINEAR,
        "num_experts": 4,
        "shared_expert_intermediate_size": 256,
    },
    "gpt_oss": {**MOE, **WINDOW, "num_local_experts": 4, "head_dim": 64},
    "deepseek_v3": {**DENSE_THEN_MOE, **MLA},
    "glm4_moe": {**DENSE_THEN_MOE, "head_dim": 64, "use_qk_norm": True},
    "olmoe": {**MOE, "num_experts": 4},
    "granitemoe": {
        **MOE,
        "num_local_experts": 4,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 3.0,
    },
    "phimoe": {**MOE, "num_local_experts": 4},
    "llama4_text": {
        **MOE,
        "intermediate_size_mlp": 1024,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 64,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 16,
    },
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    # State space models and hybrids.
    "falcon_h1": {**SSM, "mamba_d_ssm": 512, "lm_head_multiplier": 0.25},
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 16, "chunk_size": 32},
    "granitemoehybrid": {
        **MOE,
        **SSM,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 256,
        "logits_scaling": 3.0,
    },
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    # Positions, embeddings and experts of other kinds.
    "openai-gpt": {
        "n_embd": 256,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "xglm": {
        "d_model": 256,
        "ffn_dim": 1024,
        "num_layers": 2,
        "attention_heads": 4,
        "dropout": 0.0,
        "layerdrop": 0.0,
        "activation_dropout": 0.0,
    },
    "roberta": {  # its padding is no token of a text: transformers gives that no position
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "is_decoder": True,
    },
    "diffllama": {"head_dim": 64, "num_key_value_heads": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "sliding_window": 16,
        "head_dim": 64,
        "intermediate_size": [1024, 1024, 1024, 1024],
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 32,
        "laurel_rank": 16,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "deepseek_v2": {
        **MLA,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "jetmoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "kv_channels": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
    },
}
# Smaller ones, in the place of those above: for tests that go through many families.
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "intermediate_size_mlp": 40,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
}


def config_of(family: str, small: bool = False, **changes: Any) -> Any:
    """Return the tiny transformers configuration of a family. changes: fields that differ."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = kind()

    values = {name: value for name, value in COMMON.items() if hasattr(known, name)}
    values |= FAMILIES[family]
    if small:
        names = {*values, *known.to_dict()}
        values |= {name: value for name, value in SMALL.items() if name in names}
    return kind(**{**values, **changes})


def make_model(
    family: str, folder: Path | str | None = None, std: float = 0.1, **changes: Any
) -> Any:
    """Return the tiny model of a family with random fp32 weights; it is saved in `folder`, if any.

    std: standard deviation of the matrices. With transformers' 0.02 attention is nearly uniform,
    and whether one sample sees another hardly shows. changes: fields of the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(family, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        # What a state space decays by keeps the values that its family begins with.
        if not parameter.is_floating_point() or re.search(r"A_log|\.D$|dt_bias", name):
            continue
        noise = torch.randn(parameter.shape)
        if parameter.dim() > 1:
            parameter.data = noise * std
        else:  # norms stay near one, biases near zero
            parameter.data += noise * 0.05
    if folder:
        model.save_pretrained(folder)
    return model
