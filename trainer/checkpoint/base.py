"""Which frozen weights an adapter belongs to. Does not import torch."""

import json
from pathlib import Path

import xxhash

from data import storage
from data.files import hash_file, read_json

# Keys of config.json that say where and how it was saved, not what the model computes.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
WHOLE = 2**28  # bytes of a file that is read as a whole
SAMPLES, BLOCK = 256, 2**16  # blocks of a larger file, and their bytes
HEADER = 2**20  # of a larger file's begin, where safetensors has names and shapes


def fingerprint(model: str, revision: str) -> str:
    """Return a digest of a model: its configuration, and its weight files.

    Of a weight file it is name, size, header and blocks of the content: a file of up to 256 MiB is
    read as a whole, of a larger one the header and 256 blocks of 64 KiB in equal steps, so a change
    of few of its weights may be missed, one of all is not. model: a directory, or a hub name whose
    files have been loaded. revision: of a hub name. Raises OSError.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
        folder = Path(str(found)).parent
    config = read_json(folder / "config.json")
    config = {key: value for key, value in config.items() if key not in NOT_THE_MODEL}
    files = [(path.name, path.stat().st_size, _content(path)) for path in _weight_files(folder)]
    return storage.digest(json.dumps(config, sort_keys=True), *files)


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
