"""The exported model's README: where it comes from, how it was made, how well it does."""

from pathlib import Path
from typing import Any

import yaml

from trainer.config.settings import Settings
from trainer.run_dir import RunDirectory, versions

_SHOWN = (
    "method",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
_TEMPLATE = ("template", "chat_template_kwargs")  # shown where they are set
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_EVALUATIONS = """| step | validation loss | perplexity | token accuracy |
|---|---|---|---|
"""
_EVALUATION = "| {step} | {eval_loss:.4f} | {eval_perplexity:.3f} | {eval_token_accuracy:.4f} |\n"


def model_card(
    settings: Settings, base: str, data: str, evaluations: list[dict[str, Any]], run: RunDirectory
) -> str:
    """Return the text of README.md.

    base: the model trained from. data: the training files. evaluations: records with step and
    eval_... keys.
    """
    lora = settings.method == "lora"
    front = {
        "base_model": base,
        "library_name": "peft" if lora else "transformers",
        "tags": ["text-generation", "deepspeed", "zero-3", *(["lora"] if lora else [])],
    }
    method = "LoRA adapter" if lora else "Full fine-tune"
    rows = "".join(_EVALUATION.format(**record) for record in evaluations)
    evaluated = f"{_EVALUATIONS}{rows}\n" if rows else ""
    shown = (*_SHOWN, *filter(settings.given, _TEMPLATE), *(_LORA if lora else ()))
    values = "\n".join(f"| {name} | {settings.values[name]} |" for name in shown)
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {Path(base).name}, fine-tuned

{method} of `{base}` on `{data}`, run `{run.path.name}`.

{evaluated}| setting | value |
|---|---|
{values}

Versions: {known}.
"""
