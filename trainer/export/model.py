"""Write runs/<name>/export/: a Hugging Face model directory, or a PEFT adapter."""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch

from data.files import new_directory
from trainer.distributed import is_main_process
from trainer.export import BASE, not_written
from trainer.export.writer import layout, write_model


def export(
    model: Any,
    tokenizer: Any,
    target: Path,
    card: str,
    limit: int,
    breaks_off: Callable[[], bool] = lambda: False,
    base: str | None = None,
    others: Iterable[Path] = (),
) -> None:
    """Write the model, or its adapter, into a new directory. Every rank calls it; rank 0 writes.

    model: the transformers or PEFT model under ZeRO-3. card: the text of README.md. limit: bytes
    of one file. breaks_off: asked before each file, on all ranks. base: the fingerprint of an
    adapter's base model. others: files to copy beside it. Raises RunError where
    it cannot be written, and BrokenOff; then nothing is left of it.
    """
    try:
        with new_directory(target) if is_main_process() else nullcontext() as folder:
            if hasattr(model, "peft_config"):
                trained = {n: _whole(p) for n, p in model.named_parameters() if p.requires_grad}
                if folder:
                    model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)
                    (folder / BASE).write_text(json.dumps({"fingerprint": base}), encoding="utf-8")
            else:
                gather = deepspeed.zero.GatheredParameters
                write_model(model, folder, layout(model, limit), gather, breaks_off)
            if folder:
                for file in others:
                    shutil.copy(file, folder)
                tokenizer.save_pretrained(folder)
                # A path need not be UTF-8.
                (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    except OSError as error:
        raise not_written(target, error) from None


def _whole(tensor: torch.Tensor) -> Any:
    """Return a whole copy on the CPU on rank 0, else None. ZeRO-3 gathers it from all ranks."""
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().to("cpu", copy=True).contiguous() if is_main_process() else None
