"""Each rank reads its own shards of a checkpoint's weights from the files, in parallel.

transformers lets rank 0 read every weight, one after the other: it is copied into the gathered
parameter, sent to all ranks and cut again (integrations/deepspeed.py,
_load_state_dict_into_zero3_model). Here the bytes of a shard go from the file to where the shard
is, in several threads. What is renamed by a pattern, joined or converted, and buffers, take the
other way still.
"""

import contextlib
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import modeling_utils

from data.files import STORED_DTYPES, safetensors_header
from trainer.console import say
from trainer.distributed import on_all_ranks
from trainer.errors import RunError, named

PIECE = 2**24  # bytes of one read
THREADS = 8
SAMPLE = 64  # bytes of a weight, by which machines are compared
QUIET = 10.0  # seconds without a line about the progress
DTYPES = {
    STORED_DTYPES[dtype]: getattr(torch, dtype)
    for dtype in ("bfloat16", "float16", "float32", "float64")
}


class Stored(NamedTuple):
    """A tensor in a safetensors file. begin: of its bytes in the file."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: list[int]


class Weight(NamedTuple):
    """A parameter of the model, its name there, and where it is stored."""

    name: str
    param: Any
    stored: Stored


@dataclass
class Read:
    """One read: so many bytes of a file, from `begin` on, to a part of a shard."""

    path: Path
    begin: int
    dtype: torch.dtype
    place: torch.Tensor

    @property
    def size(self) -> int:
        """The bytes in the file."""
        return self.place.numel() * self.dtype.itemsize


@contextlib.contextmanager
def own_shards() -> Iterator[None]:
    """Let from_pretrained, under ZeRO-3, read this way."""
    stock = modeling_utils._load_state_dict_into_zero3_model
    stock_open = modeling_utils.load_state_dict
    files: list[Path] = []  # those that transformers takes, in its order

    def open_file(file: Any, *args: Any, **kwargs: Any) -> Any:
        files.append(Path(file))
        return stock_open(file, *args, **kwargs)

    def load(model: Any, state: dict[str, Any], load_config: Any = None) -> tuple[Any, set[str]]:
        transforms = getattr(load_config, "weight_mapping", None) or []
        found: dict[str, Weight] = {}

        def look() -> dict[str, bytes]:
            found.update(_direct(model, state, transforms, _stored(files)))
            return {key: _sample(weight.stored) for key, weight in found.items()}

        direct = {key: found[key] for key in _agreed(on_all_ranks(lambda: _refused(look)))}
        files.clear()
        reads = [read for w in direct.values() for read in _reads(w.param, w.stored)]
        on_all_ranks(lambda: _refused(lambda: _run(reads)))
        for weight in direct.values():
            weight.param._is_hf_initialized = True
        rest = {key: value for key, value in state.items() if key not in direct}
        errors, missing = stock(model, rest, load_config)
        return errors, missing - {weight.name for weight in direct.values()}

    modeling_utils._load_state_dict_into_zero3_model = load
    modeling_utils.load_state_dict = open_file
    try:
        yield
    finally:
        modeling_utils._load_state_dict_into_zero3_model = stock
        modeling_utils.load_state_dict = stock_open


def _refused(step: Callable[[], Any]) -> Any:
    """Return the step's result. Raise RunError for what the others would wait for in vain."""
    try:
        return step()
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise RunError(
            "the weights cannot be read", found=named(error), needed="the weights as safetensors"
        ) from None


def _agreed(samples: list[dict[str, bytes]]) -> list[str]:
    """Return the keys that all ranks have, in one order. Raise RunError where weights differ.

    samples: {key: a few bytes of the weight} of each rank.
    """
    keys = sorted(set.intersection(*map(set, samples)))
    for key in keys:
        if len({sample[key] for sample in samples}) > 1:
            raise RunError(
                "the machines have other weights under the same name",
                found=key,
                needed="the same checkpoint on all machines",
            )
    return keys


def _sample(stored: Stored) -> bytes:
    """Return the middle bytes of a tensor."""
    size = math.prod(stored.shape) * stored.dtype.itemsize
    with open(stored.path, "rb") as file:
        file.seek(stored.begin + size // 2)
        return file.read(min(size - size // 2, SAMPLE))


def _stored(files: Iterable[Path]) -> dict[str, Stored]:
    """Return {name: its place} of the floating-point tensors in these safetensors files.

    {} where one of the files is another kind. Of tensors with the same name the last one counts.
    """
    found: dict[str, Stored] = {}
    for path in files:
        if path.suffix != ".safetensors":
            return {}
        header, data = safetensors_header(path)
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            found.pop(name, None)
            if dtype := DTYPES.get(tensor["dtype"]):
                begin = data + tensor["data_offsets"][0]
                found[name] = Stored(path, begin, dtype, tensor["shape"])
    return found


def _direct(
    model: Any, state: dict[str, Any], transforms: list[Any], stored: dict[str, Stored]
) -> dict[str, Weight]:
    """Return {key of the checkpoint: what it is} of what is one parameter as it is stored.

    A parameter that has several keys, or that ZeRO-3 has not partitioned yet, is none.
    """
    transforms = copy.deepcopy(transforms)  # they remember what they have met
    params = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    special = {
        name
        for name, module in model.named_modules()
        if type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        or module._load_state_dict_pre_hooks
    }
    found, times = {}, Counter[int]()
    for key in state:
        if any(t.rename_source_key(key) != (key, None) for t in transforms):
            continue
        names = (key, prefix + key, key.removeprefix(prefix))
        name = next((n for n in names if n in params), None)
        if name is None:
            continue
        param, place = params[name], stored.get(key)
        times[id(param)] += 1
        if place is None or name.rpartition(".")[0] in special or not hasattr(param, "ds_tensor"):
            continue
        plain = param.ds_tensor.final_location is None and param.ds_secondary_tensor is None
        if plain and list(param.ds_shape) == place.shape:
            found[key] = Weight(name, param, place)
    return {key: weight for key, weight in found.items() if times[id(weight.param)] == 1}


def _reads(param: Any, stored: Stored) -> Iterator[Read]:
    """Yield the reads of this rank's shard of a parameter, each of at most PIECE bytes."""
    shard, dtype = param.ds_tensor.data, stored.dtype
    begin = shard.numel() * dist.get_rank(param.ds_process_group)
    own = max(0, min(shard.numel(), param.ds_numel - begin))
    shard[own:].zero_()  # what rounds it up
    step = PIECE // dtype.itemsize
    for at in range(0, own, step):
        place = shard[at : min(at + step, own)]
        yield Read(stored.path, stored.begin + (begin + at) * dtype.itemsize, dtype, place)


def _run(reads: list[Read]) -> None:
    """Make the reads. Raises RunError where a file cannot be read, or ends too early."""
    total, made, began = sum(read.size for read in reads), 0, time.monotonic()
    said = began
    with ThreadPoolExecutor(THREADS) as pool:
        for size in pool.map(_read, reads):
            made += size
            now = time.monotonic()
            if now - said > QUIET:
                said, rate = now, made / (now - began)
                say(f"weights: {made / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s")


def _read(read: Read) -> int:
    """Read it, and return its bytes."""
    place = read.place
    direct = place.dtype == read.dtype and place.device.type == "cpu"
    into = place if direct else torch.empty(place.numel(), dtype=read.dtype)
    array: Any = into.view(torch.uint8).numpy()
    try:
        with open(read.path, "rb") as file:
            file.seek(read.begin)
            if missing := read.size - file.readinto(array):
                raise OSError(f"it ends {missing} bytes too early")
    except OSError as error:
        raise RunError(
            f"{read.path} is not readable",
            found=str(error),
            needed="the weights as safetensors",
            fix="download it again",
        ) from None
    if not direct:
        place.copy_(into)
    return read.size
