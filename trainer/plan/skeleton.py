"""The skeleton of a model whose config.json alone does not tell its shapes.

transformers builds it without memory, in a process of its own: this package does not import torch.
Its answer is kept in the user's cache.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from data.files import facts_cache, locked, read_json, write_atomically
from trainer import ROOT
from trainer.errors import RunError, one_line

MODULE = "trainer.modeling.skeleton"
SECONDS = 600  # that building a skeleton may take: importing torch from a slow disk is most of it
Model = TypeVar("Model")


@dataclass(frozen=True)
class Source:
    """Where transformers finds the configuration: a directory, a config.json, or a hub name.

    trust_remote_code: run the Python code that comes with it.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


def describe(
    source: Source,
    config: dict[str, Any],
    path: str | Path,
    read: Callable[[dict[str, Any]], Model],
) -> Model:
    """Return what `read` makes of the model's description, which modeling/skeleton.py writes.

    config: the configuration's content; path: its name, for errors. The cache is looked at first,
    and what `read` cannot read there counts as none. Raises RunError where transformers cannot
    build the model.
    """
    kept = _kept(source, config)
    if kept is None:
        return read(_build(source, path))
    broken = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError)
    with suppress(*broken):
        return read(read_json(kept))
    with ExitStack() as stack:
        # One process of those that start together builds it; where no lock can be had, each does.
        with suppress(OSError):
            stack.enter_context(locked(kept.with_suffix(".lock")))
        with suppress(*broken):
            return read(read_json(kept))
        description = _build(source, path)
        with suppress(OSError):  # a full disk, or no right to write
            write_atomically(kept, json.dumps(description), durable=False)
    return read(description)


def _kept(source: Source, config: dict[str, Any]) -> Path | None:
    """Return the cache's file for a configuration. None: code that we do not know decides, too."""
    if source.trust_remote_code and config.get("auto_map"):
        return None
    describers = sorted(Path(ROOT, *MODULE.split(".")).parent.glob("*.py"))
    facts = [
        json.dumps(config, sort_keys=True),
        metadata.version("transformers"),
        *(path.read_text(encoding="utf-8") for path in describers),
    ]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
    try:
        folder = facts_cache()
    except RuntimeError:  # a user without a home
        return None
    return folder / "skeletons" / f"{key}.json"


def _build(source: Source, path: str | Path) -> dict[str, Any]:
    """Return the description that a process of its own makes. Raises RunError."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", MODULE, json.dumps(asdict(source))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _no_skeleton(path, f"nothing in {SECONDS} s") from None
    except OSError as error:
        raise _no_skeleton(path, error) from None
    *_, answer = done.stdout.splitlines() or [""]  # libraries may print before it
    try:
        description = json.loads(answer)
        problem = description.get("error")
    except (ValueError, AttributeError):
        *_, last = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        raise _no_skeleton(path, last) from None
    if problem:
        raise _no_skeleton(path, problem)
    return description


def _no_skeleton(path: str | Path, found: object) -> RunError:
    remote = "trust_remote_code" in str(found) or "custom code" in str(found)
    return RunError(
        f"transformers cannot build the model of {path}",
        found=one_line(found),
        needed="a configuration that AutoModelForCausalLM takes",
        fix="--trust_remote_code true, where its code can be trusted" if remote else None,
    )
