"""runs/<name>/export/: a Hugging Face model directory, or a PEFT adapter. Written beside its name and renamed when whole."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from trainer.errors import FAILED, RunError


def _tensors(model, wanted):
    """Yield (name, whole tensor on the CPU, or None off rank 0), one at a time: ZeRO-3 gathers each for a moment."""
    import deepspeed

    for name, parameter in model.named_parameters():
        if wanted(name, parameter):
            with deepspeed.zero.GatheredParameters([parameter]):
                keep = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
                tensor = parameter.detach().to("cpu", copy=True).contiguous() if keep else None
            yield name, tensor
    persistent = set(model.state_dict().keys())
    for name, buffer in model.named_buffers():
        if name in persistent and wanted(name, buffer):
            yield name, buffer.detach().to("cpu", copy=True).contiguous()


def _write_shards(folder, tensors, limit):
    """Write tensors as sharded safetensors with an index; memory is one shard."""
    index, shard, size, files, total = {}, {}, 0, [], 0

    def flush():
        if shard:
            files.append(folder / f"part-{len(files) + 1}")
            save_file(dict(shard), files[-1], metadata={"format": "pt"})
            shard.clear()

    for name, tensor in tensors:
        if tensor is None:
            continue
        nbytes = tensor.numel() * tensor.element_size()
        if size and size + nbytes > limit:
            flush()
            size = 0
        shard[name] = tensor
        index[name] = len(files)
        size += nbytes
        total += nbytes
    flush()
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    for file, name in zip(files, names):
        file.rename(folder / name)
    if len(files) > 1:
        content = {
            "metadata": {"total_size": total},
            "weight_map": {n: names[i] for n, i in sorted(index.items())},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def export(model, tokenizer, target, card, limit, main):
    """Write the model, or its adapter, into `target`. Every rank calls it; rank 0 (`main`) writes.

    model: the transformers or PEFT model under ZeRO-3. card: the README's text. limit: bytes of one file.
    """
    target = Path(target)
    work = target.parent / f".making-{target.name}"
    adapter = hasattr(model, "peft_config")
    failure = None
    if main:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    if adapter:
        state = dict(_tensors(model, lambda name, p: getattr(p, "requires_grad", False)))
    else:
        tensors = _tensors(
            model, lambda name, p: True
        )  # a tied parameter comes once, and is tied again on load
    try:
        if main and adapter:
            model.save_pretrained(work, state_dict=state, save_embedding_layers=False)
        elif main:
            _write_shards(work, tensors, limit)
            model.config.use_cache, before = True, model.config.use_cache
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(work)
            model.config.use_cache = before
            if model.can_generate():
                model.generation_config.save_pretrained(work)
        elif not adapter:
            for _ in tensors:
                pass
        if main:
            tokenizer.save_pretrained(work)
            (work / "README.md").write_text(card)
            for file in work.iterdir():
                os.chmod(file, 0o644)
            if target.exists():
                shutil.rmtree(target)
            os.rename(work, target)
    except OSError as error:
        failure = error
    if failure is not None:
        shutil.rmtree(work, ignore_errors=True)
        raise RunError(
            f"the export could not be written to {target}",
            found=str(failure),
            fix="free space there; the run's checkpoints and metrics are untouched",
            code=FAILED,
        )
    return target
