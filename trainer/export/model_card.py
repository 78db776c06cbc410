"""The exported model's README: where it comes from, how it was made, how well it does."""

import json
from pathlib import Path

import yaml

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
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def model_card(settings, base, data, evaluations, directory):
    """Text of README.md. base: the model trained from; data: the training file; evaluations: records with eval_* keys."""
    lora = settings.method == "lora"
    front = {
        "base_model": base,
        "library_name": "peft" if lora else "transformers",
        "tags": ["text-generation", "deepspeed", "zero-3", *(["lora"] if lora else [])],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(base).name}, fine-tuned",
        "",
        f"{'LoRA adapter' if lora else 'Full fine-tune'} of `{base}` on `{data}`, run `{directory.name}`.",
        "",
    ]
    if evaluations:
        lines += ["| step | validation loss | perplexity | token accuracy |", "|---|---|---|---|"]
        lines += [
            f"| {e['step']} | {e['eval_loss']:.4f} | {e['eval_perplexity']:.3f} | {e['eval_token_accuracy']:.4f} |"
            for e in evaluations
        ]
        lines.append("")
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| {k} | {settings.values[k]} |" for k in _SHOWN + (_LORA if lora else ())]
    versions = (
        json.loads((directory / "versions.json").read_text())
        if (directory / "versions.json").is_file()
        else {}
    )
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items() if v) + ".", ""]
    return "\n".join(lines)
