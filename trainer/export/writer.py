"""A model as files that other programs read: the one writer of exports and of merged models.

transformers 5 joins and renames weights when it reads them; the experts of a layer become one
stack. What is written has the names and shapes of the checkpoint that was read, or of the model
hub where there was none, as `PreTrainedModel.save_pretrained` writes them.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import cached_file

from data.files import STORED_DTYPES
from trainer.console import say
from trainer.errors import RunError, one_line
from trainer.modeling.experts import shape

Tensors = dict[str, torch.Tensor]
# Of a model that reads images or sound too: without them it does not start elsewhere.
_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class BrokenOff(Exception):
    """Somebody asked the run to stop."""


@dataclass
class Layout:
    """Which tensors a model has, and what is written of them.

    tensors: of the model, by its names; a tied one comes once. groups: (names in the model, names
    that are written), in the order of the files: what is converted together. written: on the meta
    device. split: the files.
    """

    tensors: Tensors
    groups: list[tuple[list[str], set[str]]]
    written: Tensors
    split: StateDictSplit


def layout(model: Any, limit: int) -> Layout:
    """Return how a model is written. It may be on the meta device, or partitioned by ZeRO-3.

    limit: bytes of one file; a larger tensor has a file of its own.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:  # under ZeRO-3 also those that the checkpoint had no weight for
        model._weight_conversions = [c for c in conversions if c.was_used()]
    tensors: Tensors = model.state_dict(keep_vars=True)
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    shapes = {name: _shape_of(tensor) for name, tensor in tensors.items()}
    shapes = remove_tied_weights_from_state_dict(shapes, model)
    reverted = _revert(model, shapes)
    # Those of one stack are views of one tensor, and would each count as the whole of it.
    written = {name: _shape_of(tensor) for name, tensor in reverted.items()}
    split = split_torch_state_dict_into_shards(written, max_shard_size=limit)
    return Layout(tensors, _groups(model, shapes, reverted), written, split)


def _shape_of(tensor: Any) -> torch.Tensor:
    """Return a tensor without memory, of the shape that a partitioned one has as a whole."""
    return torch.empty(shape(tensor), dtype=tensor.dtype, device="meta")


def _revert(model: PreTrainedModel, tensors: Tensors) -> Tensors:
    return revert_weight_conversion(model, dict(tensors))


def _groups(
    model: PreTrainedModel, shapes: Tensors, reverted: Tensors
) -> list[tuple[list[str], set[str]]]:
    """Return the smallest groups of tensors that can be converted without the others.

    Most are one tensor; where a conversion makes one of several, those are a group. shapes: tensors
    on the meta device. reverted: all of them converted.
    """

    def alone(names: list[str]) -> Tensors:
        try:
            found = _revert(model, {name: shapes[name] for name in names})
        except Exception:  # each conversion has its own for a tensor that is missing
            return {}
        return found if found.keys() <= reverted.keys() else {}

    def is_whole(found: Tensors) -> bool:
        return bool(found) and all(found[name].shape == reverted[name].shape for name in found)

    source = {id(tensor): name for name, tensor in shapes.items()}
    groups = [([source[id(t)]], {name}) for name, t in reverted.items() if id(t) in source]
    parts: dict[str, list[str]] = {}  # a name of which the others are missing: names in the model
    rest = []
    converted = shapes.keys() - {names[0] for names, _ in groups}
    for name in (name for name in shapes if name in converted):  # in one order on all ranks
        found = alone([name])
        if is_whole(found):
            groups.append(([name], set(found)))
        elif found:
            parts.setdefault(next(iter(found)), []).append(name)
        else:
            rest.append(name)
    for names in parts.values():
        found = alone(names)
        if is_whole(found):
            groups.append((names, set(found)))
        else:
            rest += names
    if rest:
        groups.append((rest, reverted.keys() - {name for _, names in groups for name in names}))
    order = {name: number for number, name in enumerate(reverted)}
    return sorted(groups, key=lambda group: min((order[name] for name in group[1]), default=0))


def write_model(
    model: PreTrainedModel,
    folder: Path | None,
    plan: Layout,
    gather: Callable[[list[torch.Tensor]], AbstractContextManager] = lambda _: nullcontext(),
    breaks_off: Callable[[], bool] = lambda: False,
) -> None:
    """Write weights and configuration.

    In memory is what is converted together, twice: a tensor, or the experts of a layer. folder:
    None on a rank that only takes part in gathering. gather: gives whole tensors for as long as its
    context lives. breaks_off: asked before each file, on all ranks. Raises OSError, and BrokenOff.
    """
    groups, ready = iter(plan.groups), {}

    def take(name: str) -> Any:
        while name not in ready:
            ready.update(_converted(model, plan.tensors, next(groups), folder is not None, gather))
        return ready.pop(name)

    for filename, names in plan.split.filename_to_tensors.items():
        if breaks_off():
            raise BrokenOff
        # Each begins at a multiple of its type's size.
        names = sorted(names, key=lambda name: -plan.written[name].itemsize)
        if folder:
            _write_tensors(folder / filename, {name: plan.written[name] for name in names}, take)
        else:
            for name in names:
                take(name)
    if folder:
        _write_index(plan.split, folder)
        write_configuration(model, folder)


def _write_tensors(path: Path, shapes: Tensors, take: Callable[[str], torch.Tensor]) -> None:
    """Write a safetensors file, one tensor after the other: save_file needs all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shapes.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": STORED_DTYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, promised in shapes.items():
            tensor = take(name)
            if (tensor.shape, tensor.dtype) != (promised.shape, promised.dtype):
                raise RunError(
                    f"{name} is not what was to be written",
                    found=f"{tensor.dtype} {list(tensor.shape)}",
                    needed=f"{promised.dtype} {list(promised.shape)}",
                )
            array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(array)


def _converted(
    model: PreTrainedModel,
    tensors: Tensors,
    group: tuple[list[str], set[str]],
    keep: bool,
    gather: Callable[[list[torch.Tensor]], AbstractContextManager],
) -> dict[str, Any]:
    """Return what is written of a group, on the CPU; where nothing is kept, the names alone."""
    names, written = group
    with gather([tensors[name] for name in names]):
        if not keep:
            return dict.fromkeys(written)
        # Gathered tensors live no longer than this block, and conversions return views of them.
        whole = {name: tensors[name].detach().to("cpu", copy=True) for name in names}
        return _revert(model, whole)


def _write_index(split: StateDictSplit, folder: Path) -> None:
    """Write which tensor is in which file, where there are several."""
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


def write_configuration(model: Any, folder: Path) -> None:
    """Write config.json, generation_config.json and the code of a model that brings its own."""
    config: Any = copy.deepcopy(model.config)
    config.use_cache = True  # training switched it off
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    # They belong to generation_config.json, where transformers has put them; here it refuses them.
    for name in config._get_generation_parameters():
        vars(config).pop(name, None)
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        _write_generation_config(model.generation_config, folder)


def _write_generation_config(generation: GenerationConfig, folder: Path) -> None:
    """Write generation_config.json without the fields that contradict others, and name those."""
    try:
        generation.save_pretrained(folder)
    except (ValueError, TypeError):
        kept, dropped = without_contradictions(generation)
        kept.save_pretrained(folder)
        say(
            "note: generation_config.json is written without "
            + ", ".join(f"{name} {value}" for name, value in dropped.items())
            + ", which its other fields contradict"
        )


def without_contradictions(
    generation: GenerationConfig,
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return (a generation config that transformers saves, the fields that it does not have)."""
    left = {name: getattr(generation, name) for name in generation.to_diff_dict()}
    left.pop("transformers_version", None)
    kept, found = GenerationConfig(), True
    while found:  # a field may need another one: top_p needs do_sample
        found = False
        for name, value in list(left.items()):
            larger = copy.deepcopy(kept)
            setattr(larger, name, value)
            try:
                larger.validate(strict=True)
            except (ValueError, TypeError, AttributeError):
                continue
            kept, found = larger, True
            del left[name]
    return kept, left


def processor_files(name: str, revision: str | None, config: Any) -> list[Path]:
    """Return the files of a base model that reads more than text. A text model has none.

    name: a directory or hub name.
    """
    found: list[Path] = []
    if config.get_text_config() is config:
        return found
    for file in _PROCESSOR:
        with suppress(OSError):  # it has none
            if path := cached_file(name, file, revision=revision):
                found.append(Path(path))
    return found


def rehearse(model: Any, tokenizer: Any, name: str, revision: str | None) -> None:
    """Write all but the weights into a folder that is removed. Raise RunError where that fails.

    Else a run would train first, and end without a model. model: on the meta device, with its
    adapters. name: of the base model, a directory or hub name.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            if hasattr(model, "peft_config"):
                return
            processor_files(name, revision, model.config)  # in the cache when the run ends
            layout(model, 2**30)
            write_configuration(model, Path(folder))
    except Exception as error:  # transformers', tokenizers' and those of a model's own code
        if isinstance(error, OSError) or "(os error" in str(error):
            return  # the disk for temporary files; the export has another one
        raise RunError(
            "what this model and tokenizer become could not be exported",
            found=one_line(error),
            needed="a configuration, a tokenizer and weights that transformers can save",
            fix="mend the file that is named, or --export false",
        ) from None
