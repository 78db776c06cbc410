"""Which model a checkpoint or an adapter belongs to. Does not import torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from data import storage
from data.files import hash_file, read_json

# Keys of config.json that say where and how it was saved, not what the model computes.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
# What transformers loads a model with, where its config.json names code of its own for it.
CODE = ("AutoConfig", "AutoModelForCausalLM")
WHOLE = 2**28  # bytes of a file that is read as a whole
SAMPLES, BLOCK = 256, 2**16  # blocks of a larger file, and their bytes
HEADER = 2**20  # of a larger file's begin, where safetensors has names and shapes


def definition(model: str, revision: str, trusted: bool) -> dict[str, Any]:
    """Return what a model computes: {"config": config.json, "code": {file: hash}}.

    The code is what the model brings with it, and is empty where it is not trusted: then
    transformers runs its own. model: a directory, or a hub name whose files have been loaded.
    revision: of a hub name. Raises OSError, and ValueError where config.json is no object.
    """
    config = read_json(_file(model, revision, "config.json"))
    files = _code_files(model, revision, config) if trusted else ()
    code = {path.name: hash_file(path) for path in files}
    return {"config": {k: v for k, v in config.items() if k not in NOT_THE_MODEL}, "code": code}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys and files in which two definitions differ, as "key: 1 saved, 2 here"."""
    saved, now = _flat(saved), _flat(now)
    return [
        f"{key}: {saved.get(key, 'not there')} saved, {now.get(key, 'not there')} here"
        for key in sorted({**saved, **now})
        if saved.get(key) != now.get(key)
    ]


def _flat(definition: dict[str, Any]) -> dict[str, str]:
    """Return {key or file: JSON}; keys of nested objects are joined by dots."""
    flat: dict[str, str] = {}
    waiting = [("", definition.get("code")), ("", definition.get("config"))]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{key}.{k}" if key else k, v) for k, v in value.items()]
        elif key:
            flat[key] = json.dumps(value)  # NaN equals NaN, and true is not 1
    return flat


def fingerprint(model: str, revision: str, trusted: bool) -> str:
    """Return a digest of a model: its definition, and its weight files.

    Of a weight file it is name, size, header and blocks of the content: a file of up to 256 MiB is
    read as a whole, of a larger one the header and 256 blocks of 64 KiB in equal steps, so a change
    of few of its weights may be missed, one of all is not. The rest is as in `definition`.
    """
    parts = definition(model, revision, trusted)
    folder = _file(model, revision, "config.json").parent
    files = [(path.name, path.stat().st_size, _content(path)) for path in _weight_files(folder)]
    config = json.dumps(parts["config"], sort_keys=True)
    return storage.digest(config, *files, *sorted(parts["code"].items()))


def _file(model: str, revision: str | None, name: str) -> Path:
    """Return a file of a model: in its directory, or in the hub's cache."""
    if Path(model).is_dir():
        return Path(model) / name
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(model, name, revision=revision)))


def _code_files(model: str, revision: str, config: dict[str, Any]) -> Iterator[Path]:
    """Yield the files of code that config.json names, and those that they import."""
    for name in CODE:
        reference = (config.get("auto_map") or {}).get(name)
        if not reference:
            continue
        from transformers.dynamic_module_utils import get_relative_import_files

        # "module.Class", or "repository--module.Class": another one's is of its main branch.
        repository, _, place = reference.rpartition("--")
        module = f"{place.partition('.')[0]}.py"
        main = _file(repository or model, revision if repository in ("", model) else None, module)
        yield main
        yield from map(Path, get_relative_import_files(main))


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads; what else lies there does not count."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return sorted({folder / shard for shard in read_json(index)["weight_map"].values()})
    return sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def _content(path: Path) -> str:
    size = path.stat().st_size
    if size <= WHOLE:
        return hash_file(path)
    with open(path, "rb") as file:
        digest = xxhash.xxh3_128(file.read(HEADER))
        for i in range(SAMPLES):
            file.seek(i * (size - BLOCK) // (SAMPLES - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
