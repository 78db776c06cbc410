"""Write runs/<name>/export/: a Hugging Face model directory, or a PEFT adapter."""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from data.files import new_directory
from trainer.checkpoint.save import persistent_buffers
from trainer.distributed import is_main_process
from trainer.export import BASE, not_written


class BrokenOff(Exception):
    """Somebody asked the run to stop."""


def export(
    model: Any,
    tokenizer: Any,
    target: Path,
    card: str,
    limit: int,
    breaks_off: Callable[[], bool] = lambda: False,
    base: str | None = None,
) -> None:
    """Write the model, or its adapter, into a new directory. Every rank calls it; rank 0 writes.

    model: the transformers or PEFT model under ZeRO-3. card: the text of README.md. limit: bytes
    of one file. breaks_off: asked before each file, on all ranks. base: the fingerprint of an
    adapter's base model. Raises RunError where it cannot be written, and BrokenOff; then nothing is
    left of it.
    """
    try:
        with new_directory(target) if is_main_process() else nullcontext() as folder:
            if hasattr(model, "peft_config"):
                trained = {n: _whole(p) for n, p in model.named_parameters() if p.requires_grad}
                if folder:
                    model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)
                    (folder / BASE).write_text(json.dumps({"fingerprint": base}), encoding="utf-8")
            else:
                _write_model(model, folder, limit, breaks_off)
            if folder:
                tokenizer.save_pretrained(folder)
                (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise not_written(target, error) from None


def _write_model(
    model: Any, folder: Path | None, limit: int, breaks_off: Callable[[], bool]
) -> None:
    """Write weights and configuration; one file of at most `limit` bytes is in memory at a time.

    A tied parameter comes once; it is tied again when the model is loaded. folder: None on a rank
    that only takes part in gathering the tensors.
    """
    tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
    shapes = {
        name: torch.empty(
            getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta"
        )
        for name, tensor in tensors.items()
    }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=limit)
    for filename, names in split.filename_to_tensors.items():
        if breaks_off():
            raise BrokenOff
        shard = {name: _whole(tensors[name]) for name in names}
        if folder:
            save_file(shard, folder / filename, metadata={"format": "pt"})
    if folder is None:
        return
    if split.is_sharded:
        index = {
            "metadata": split.metadata,
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )
    config = copy.deepcopy(model.config)
    config.use_cache = True  # training switched it off
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _whole(tensor: torch.Tensor) -> Any:
    """Return a whole copy on the CPU on rank 0, else None. ZeRO-3 gathers it from all ranks."""
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().to("cpu", copy=True).contiguous() if is_main_process() else None
