"""dataset_info.json: names of data sets and of their columns, as LLaMA-Factory writes them.

Imports no torch.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from data import storage
from data.errors import RunError, one_line

NAME = "dataset_info.json"
# A registry's name of a column -> ours, by the registry's name of a format.
_COLUMNS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "openai": {"messages": "messages", "system": "system", "tools": "tools"},
}


_MEDIA = ("images", "videos", "audios")


@dataclass
class Layout:
    """How rows are written, as far as a registry entry says it.

    columns: {our column: the file's}; tags: names of the keys and roles of a turn; limit: rows to
    take; format: one of data.formats, or None where the first row decides.
    """

    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    format: str | None = None


class Registry:
    """The entries of a dataset_info.json: none where there is no such file."""

    def __init__(self, folder: str | None) -> None:
        """Read the registry: a folder with it or the file; None: that of data/ or of this folder.

        Raise RunError for a given one that is no registry. A file that nobody named is passed
        over: it may be of the library `datasets`.
        """
        self.path = Path()
        self.entries: dict[str, dict] = {}
        for place in [Path(folder)] if folder else [Path("data"), Path()]:
            path = place if place.suffix == ".json" else place / NAME
            try:
                entries = json.loads(path.read_text(encoding="utf-8-sig"))
                if isinstance(entries, dict) and all(isinstance(e, dict) for e in entries.values()):
                    self.path, self.entries = path, entries
                    return
                fault = "another kind of file"
            except (OSError, ValueError, RecursionError) as error:
                fault = one_line(error, 200)
            if folder:
                raise RunError(
                    f"{path} is not a registry",
                    found=fault,
                    needed=f'a folder with {NAME}: {{"name": {{"file_name": "rows.jsonl", …}}, …}}',
                )

    def find(self, name: str) -> tuple[str, Layout]:
        """Return (path, how the rows are written) of an entry. Raise RunError for a bad entry."""
        entry, where = self.entries[name], f"{self.path}: {name}"
        if "file_name" in entry:
            path = str(entry["file_name"])
            if not storage.is_url(path):
                path = str(self.path.parent / path)
        elif "hf_hub_url" in entry:
            path = str(entry["hf_hub_url"])
            if "folder" in entry:
                path = _downloaded(path, str(entry["folder"]), where)
        else:
            raise RunError(f"{where} names no data", needed="file_name or hf_hub_url")
        if "hf_hub_url" in entry and entry.get("subset"):
            path += f"#{entry['subset']}"
        if entry.get("split"):
            path += f":{entry['split']}"
        return path, _layout(entry, where)


def _downloaded(name: str, folder: str, where: str) -> str:
    """Return the path of a folder of a data set of the hub."""
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(name, repo_type="dataset", allow_patterns=f"{folder}/**")
    except (OSError, ValueError) as error:
        raise RunError(
            f"{where}: the data set {name} cannot be read from the hub",
            found=type(error).__name__,
            needed="network and, for a gated data set, HF_TOKEN; or a file_name",
        ) from None
    return str(Path(root, folder))


def _layout(entry: dict, where: str) -> Layout:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in list(_COLUMNS):  # it may be a list, which has no hash
        raise RunError(
            f"{where}: formatting {formatting!r} is not known", needed=", ".join(_COLUMNS)
        )
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for key, value in (("columns", columns), ("tags", tags)):
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise RunError(
                f"{where}: {key} is {json.dumps(value)[:80]}", needed="an object of names"
            )
    if entry.get("ranking"):
        raise RunError(f"{where} is preference data (ranking)", needed="one answer a row")
    limit = entry.get("num_samples")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise RunError(f"{where}: num_samples is {limit!r}", needed="a whole number above 0")
    format = "messages" if formatting == "openai" else formatting
    ours = _COLUMNS[formatting]
    unknown = sorted(columns.keys() - ours.keys() - {"tools"})
    if unknown:
        text = ", as this trainer reads text alone" if unknown[0] in _MEDIA else ""
        raise RunError(
            f"{where}: column {unknown[0]!r} is not known for {formatting}",
            needed=", ".join(ours) + text,
        )
    layout = Layout(tags=tags, limit=limit)
    if columns or "formatting" in entry:
        layout.format = format
    if columns and format == "alpaca" and not {"response", "query", "history"} & columns.keys():
        # An alpaca entry without answers is plain text.
        layout.format = "text"
        layout.columns = {"text": columns.get("prompt", "instruction")}
    elif columns:
        layout.columns = {
            our_name: columns.get(name, our_name)
            for name, our_name in ours.items()
            if name in columns or name in ("prompt", "response", "messages")
        }
    return layout
