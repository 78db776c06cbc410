"""Tiny models of families with experts."""

from types import SimpleNamespace
from typing import Any

import torch

from tests import tiny

SHAPE = {
    **tiny.SHAPE,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
SIX = {"num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**SIX, "moe_intermediate_size": 24},
    "qwen2_moe": {**SIX, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "olmoe": SIX,
    "mixtral": LOCAL,
    "gpt_oss": {**LOCAL, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": LOCAL,
    "phimoe": LOCAL,
    "llama4_text": {
        **LOCAL,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 40,
        "layer_types": ["full_attention"] * 2,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
}


def make(family: str, device: str = "cpu", **changes: Any) -> Any:
    """Return a model of the family with weights that are not small."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**{**SHAPE, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def settings(targets: str, **changes: Any) -> Any:
    """Return the settings that add_adapters reads."""
    values = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "method": "lora", **changes}
    return SimpleNamespace(lora_target_modules=targets, **values)


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of one batch and the gradients of all trained parameters."""
    ids = 3 + torch.arange(48).reshape(2, 24) * 7 % 90
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
