"""Training in plain PyTorch: what a run of the trainer is compared with.

A model of transformers in fp32, torch's AdamW, padded rows with their mask. Nothing of DeepSpeed,
of transformers' Trainer or of `trainer/` is in it. Only the rows and their order are the trainer's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, get_scheduler

from data.dataset import IGNORED, BatchSampler, Samples
from tests.families.matrix import STEPS

SEED = 42  # of the trainer's flags
LEARNING_RATE, EPSILON, CLIP = 5e-4, 1e-6, 1.0
WARMUP = 1  # steps: the first one has a rate of 0, so what is saved after it are the first values


def batches(rows: Samples, batch_size: int, pack_length: int | None) -> Iterator[list[Any]]:
    """Yield the samples of each optimizer step; those of a packed row one by one."""
    epoch = 0
    while True:
        sampler = BatchSampler(rows.lengths, batch_size, 1, 0, 1, SEED, pack_length=pack_length)
        sampler.set_epoch(epoch)
        for packs in sampler:
            yield [rows[index] for pack in packs for index in pack]
        epoch += 1


def padded(samples: list[Any], pad: int) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels of samples, each int64 [samples, longest]."""
    shape = len(samples), max(len(ids) for ids, _ in samples)
    ids, mask = np.full(shape, pad), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED)
    for row, (tokens, targets) in enumerate(samples):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = targets
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


def plain(folder: Path) -> Any:
    """Return the model of a directory in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(folder: Path, adapter: Path, initial: dict[str, torch.Tensor]) -> Any:
    """Return the model of a directory with adapters as PEFT makes them.

    adapter: a directory with the adapter_config.json that says where they are. initial: the first
    values of each trained parameter. Raise KeyError where one is not there.
    """
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = False
    model: Any = get_peft_model(plain(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(initial[name].view_as(parameter))
    return model


def train(model: Any, steps: Iterator[list[Any]], pad: int) -> tuple[list[float], list[float]]:
    """Train the model. Return its loss and the norm of its gradient, before clipping, by step."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, WARMUP, STEPS)
    losses, norms = [], []
    for _, samples in zip(range(STEPS), steps):
        batch = padded(samples, pad)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses, norms


@torch.no_grad()
def logits(model: Any, samples: list[Any]) -> list[torch.Tensor]:
    """Return the logits of each sample alone, [tokens, vocabulary]."""
    ids = [torch.from_numpy(tokens.astype(np.int64))[None] for tokens, _ in samples]
    return [model.eval()(input_ids=one, use_cache=False).logits[0] for one in ids]
