"""Tiny models of families with experts."""

from types import SimpleNamespace
from typing import Any

import torch

from tests.families.configs import config_of

FAMILIES = (
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "mixtral",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "llama4_text",
    "deepseek_v3",
    "glm4_moe",
)


def make(family: str, device: str = "cpu", **changes: Any) -> Any:
    """Return a model of the family with weights that are not small."""
    from transformers import AutoModelForCausalLM

    config = config_of(family, small=True, **changes)
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
