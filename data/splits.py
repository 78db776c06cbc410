"""The splits of a place: a folder as the hub has it, a data set saved to disk, a name of the hub.

`datasets` reads what a README.md says of its splits, and brings data sets of the hub. It is
imported only there. Imports no torch.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from data import records, storage
from data.errors import RunError, did_you_mean, one_line

# The split of each name, as `datasets` finds it in the names of files and folders.
_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_KINDS = {
    split: re.compile(rf"(?<![^-._ 0-9/])({words})(?![^-._ 0-9/])", re.IGNORECASE)
    for split, words in _WORDS.items()
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}[^/]*")
# Files that stand beside data and are none.
_BESIDE = {
    "dataset_info.json",
    "rejected.jsonl",
    "config.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NONE = ""  # the split of files in a place that has none

# {split: what gives its files}. Files of the hub are downloaded only when they are asked for.
Splits = dict[str, Callable[[], list[str]]]


def kind(name: str) -> str | None:
    """Return "train", "validation" or "test" for the name of a split, file or folder, or None."""
    return next((split for split, words in _KINDS.items() if words.search(name)), None)


def is_hub_name(path: str) -> bool:
    """Return whether it can be org/name: no data file, and no path into a folder that exists."""
    fits = _HUB.fullmatch(path) and records.kind_of(path) is None
    return bool(fits) and not os.path.isdir(path.partition("/")[0])


# -- the splits of a place -------------------------------------------------------------------------
def of_files(root: str, files: Iterable[str]) -> Splits:
    """Return the splits of files by their names below the root: of folders, else of the files."""
    paths = {file: file.removeprefix(root) for file in files if not _is_beside(file)}
    found: dict[str, list[str]] = {}
    for name in (
        _shard,
        lambda path: kind(os.path.dirname(path)),
        lambda path: kind(os.path.basename(path)),
    ):
        found = {}
        for file, path in paths.items():
            found.setdefault(name(path) or NONE, []).append(file)
        if found.keys() != {NONE}:
            break
    return {split: functools.partial(list, members) for split, members in found.items()}


def _shard(path: str) -> str | None:
    match = _SHARD.fullmatch(path)
    return match and match[1]


def _is_beside(file: str) -> bool:
    return os.path.basename(file) in _BESIDE


def of_glob(pattern: str, files: list[str]) -> Splits:
    """Return the splits of the files that a pattern matches. One of test files alone names them."""
    found = of_files(os.path.dirname(re.split(r"[*?[]", pattern)[0]) + "/", files)
    if NONE in found or any(kind(split) != "test" for split in found):
        return found
    return {NONE: lambda: files}


def of_folder(folder: Path, config: str | None) -> Splits:
    """Return the splits of a local folder. Raise RunError where it holds no data."""
    if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        names = _names(folder / "dataset_dict.json", lambda content: content["splits"])
        return {name: functools.partial(_saved, folder / name) for name in names}
    if (folder / "state.json").is_file():  # Dataset.save_to_disk
        return {NONE: functools.partial(_saved, folder)}
    if config is None and not _configs(folder):
        files = sorted(map(str, _visible(folder)))
        if not files:
            raise RunError(f"no data file in {folder}", needed=records.READABLE)
        return of_files(f"{folder}/", files)
    builder = _builder(str(folder), config, None)
    found = {str(name): [*map(str, paths)] for name, paths in builder.config.data_files.items()}
    if all(records.kind_of(file) for paths in found.values() for file in paths):
        return {split: functools.partial(list, paths) for split, paths in found.items()}
    return _of_builder(builder, str(folder), config, None)


def _visible(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
        and records.kind_of(path)
        and not _is_beside(str(path))
    ]


def _configs(folder: Path) -> bool:
    """Return whether the folder's README.md says which files belong to which split."""
    try:
        front = (folder / "README.md").read_text(encoding="utf-8").split("---\n")
        return front[0] == "" and "configs" in (yaml.safe_load(front[1]) or {})
    except (OSError, ValueError, IndexError, TypeError, yaml.YAMLError):
        return False


def _names(path: Path, read: Callable[[Any], list[str]]) -> list[str]:
    """Return what `read` takes from a JSON file of a data set saved to disk: a list of names."""
    try:
        names = read(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(one_line(names, 80))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is not readable",
            found=f"no {error}" if isinstance(error, KeyError) else one_line(error),
            needed="what save_to_disk of `datasets` writes",
        ) from None
    return names


def _saved(folder: Path) -> list[str]:
    """Return the Arrow files of a data set that `datasets` saved to disk."""

    def files(state: Any) -> list[str]:
        return [entry["filename"] for entry in state["_data_files"]]

    return [str(folder / name) for name in _names(folder / "state.json", files)]


@functools.cache
def of_hub(name: str, config: str | None, revision: str | None) -> Splits:
    """Return the splits of a data set of the hub. Raise RunError where it cannot be had.

    Without network: one that `datasets` or `hf download` brought before.
    """
    try:
        builder = _builder(name, config, revision)
        if revision and not builder.config.data_files:  # prepared earlier, of any revision
            raise _unreadable(name, FileNotFoundError(f"no revision {revision} of it"))
    except RunError:
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                name, repo_type="dataset", revision=revision, local_files_only=True
            )
        except (OSError, ValueError):
            folder = None
        if folder is None:
            raise
        return of_folder(Path(folder), config)
    return _of_builder(builder, name, config, revision)


def _builder(path: str, config: str | None, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(
            path, config, revision=revision, cache_dir=_cache_directory(path)
        )
    except Exception as error:  # a dozen classes: network, names, rights, formats
        raise _unreadable(path, error) from None


def _of_builder(builder: Any, path: str, config: str | None, revision: str | None) -> Splits:
    names = builder.config.data_files or builder.info.splits or {}
    return {
        str(name): functools.partial(_prepared, path, config, revision, str(name)) for name in names
    }


def _prepared(path: str, config: str | None, revision: str | None, split: str) -> list[str]:
    """Return the Arrow files of a split, which `datasets` makes in its own cache."""
    import datasets

    try:
        rows = datasets.load_dataset(
            path, config, split=split, revision=revision, cache_dir=_cache_directory(path)
        )
    except Exception as error:  # as above, and what each format's reader raises
        raise _unreadable(path, error.__cause__ or error) from None
    return [file["filename"] for file in rows.cache_files]


def _cache_directory(path: str) -> str | None:
    """Return where `datasets` prepares a local folder. Of the hub: None, where other tools look."""
    return str(storage.cache_directory() / "datasets") if os.path.isdir(path) else None


def _unreadable(path: str, error: BaseException) -> RunError:
    if os.path.isdir(path):
        return RunError(
            f"the folder {path} is not readable as a data set of the hub",
            found=one_line(error),
            needed="files that `datasets.load_dataset` takes; or name the files, or a glob",
        )
    return RunError(
        f"no data file, and no data set of the hub: {path}",
        found=one_line(error),
        needed="a path that exists; or org/name[@revision][#config][:split] of the hub, network "
        "and, for a gated data set, HF_TOKEN",
        fix="without network: hf download --repo-type dataset ORG/NAME where there is one",
    )


def named(split: str) -> str:
    """Return the name of a split for messages."""
    return f"split {split}" if split else "files of no split"


def listed(splits: Splits) -> str:
    """Return the names of the splits for messages."""
    return ", ".join(name or named(name) for name in sorted(splits))


# -- the choice ------------------------------------------------------------------------------------
def choose(splits: Splits, wanted: str | None, role: str, place: str) -> str | None:
    """Return the split to take, or None where there is none to validate with.

    wanted: as the user named it. role: "train"; "validation": what validates where nobody said
    what; "evaluate": the user validates with this place. A test split is never trained on.
    """
    names = listed(splits)
    if wanted is not None and role != "validation":
        if wanted not in splits:
            raise RunError(
                f"{place} has no split {wanted}{did_you_mean(wanted, splits)}", found=names
            )
        if role == "train" and kind(wanted) == "test":
            raise RunError(
                f"{place}: {wanted} is a test split, which is never trained on",
                found=names,
                fix=f"--validation_split {place}:{wanted} validates with it",
            )
        return wanted
    order = {"train": ["train"], "validation": ["validation"]}
    for sort in order.get(role, ["validation", "test", NONE, "train"]):
        fitting = [name for name in splits if (kind(name) or NONE) == sort]
        if sort in splits or len(fitting) == 1 or (fitting and role != "train"):
            return sort if sort in splits else fitting[0]
        if fitting:
            raise RunError(
                f"{place} has several splits to train on",
                found=names,
                fix=f"--dataset {place}:{fitting[0]}",
            )
    if role == "validation":
        return None
    others = [name for name in splits if kind(name) is None]
    if NONE in splits or len(others) == 1:
        return NONE if NONE in splits else others[0]
    raise RunError(
        f"{place} has no split to train on",
        found=names,
        needed="a split train, or one that is named",
        fix="--dataset PLACE:SPLIT, or name the files themselves",
    )
