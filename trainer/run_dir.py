"""The run directory: its place, its files, its locks and its heartbeat. Does not import torch."""

import errno
import json
import sys
import time
from importlib import metadata
from pathlib import Path

from data.files import is_locked, lock_or_refuse, write_atomically
from trainer import __version__
from trainer.config.settings import Settings
from trainer.errors import RunError
from trainer.system import default_model

RUNS = Path("runs")
STOP, SAVE = "STOP", "SAVE"  # files by which a user asks a run to stop, or to save and go on
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "wandb",
)


class Phase:
    """What a run is doing, as its heartbeat says."""

    LOAD = "load"
    TRAIN = "train"
    EVAL = "eval"
    SAVE = "save"
    EXPORT = "export"
    DONE = "done"
    STOPPED = "stopped"


# Seconds without a heartbeat after which a run counts as hung.
SILENCE_LIMITS = {
    Phase.LOAD: 14400,
    Phase.TRAIN: 1800,
    Phase.EVAL: 7200,
    Phase.SAVE: 7200,
    Phase.EXPORT: 14400,
    Phase.DONE: 600,
    Phase.STOPPED: 600,
}


class RunDirectory:
    """The files of one run. Tests, tools and the supervisor read them under these names."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.plan = self.path / "plan.json"
        self.versions = self.path / "versions.json"
        self.resolved_config = self.path / "resolved_config.yaml"
        self.resolved_ds_config = self.path / "resolved_ds_config.json"
        self.rejected = self.path / "rejected.jsonl"
        self.export = self.path / "export"
        self.log = self.path / "train.log"
        self.heartbeat = self.path / "heartbeat.json"
        self.rank_lock = self.path / ".running"  # held by rank 0
        self.supervisor_lock = self.path / ".supervised"
        self.silence_limit_file = self.path / ".patience"

    def __str__(self) -> str:
        return str(self.path)

    def lock(self, lock: Path) -> None:
        """Make the directory and hold one of its locks until this process ends.

        Raises RunError where another process holds it, or where the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock_or_refuse(lock, f"the run {self}", "make stop, or another --run_name")
        except OSError as error:
            raise self.not_writable(error) from None

    def not_writable(self, error: OSError) -> RunError:
        """Return the error to raise where the directory cannot be written."""
        return RunError(
            f"the run directory {self} cannot be written to",
            found=error.strerror,
            fix="--output_dir",
        )

    def beat(self, step: int, phase: str) -> None:
        """Write heartbeat.json: step, phase, time."""
        text = json.dumps({"step": step, "phase": phase, "time": time.time()})
        try:
            write_atomically(self.heartbeat, text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.heartbeat.exists():
                raise
            with open(self.heartbeat, "r+") as file:  # the old file's place has room
                file.write(text + " " * 20)

    def read_heartbeat(self) -> dict:
        """Return the last heartbeat; {} where there is none."""
        try:
            return json.loads(self.heartbeat.read_text())
        except (OSError, ValueError):
            return {}

    def is_alive(self) -> bool:
        """Return whether a rank or a supervisor holds the run."""
        locks = (self.rank_lock, self.supervisor_lock)
        return any(lock.exists() and is_locked(lock) for lock in locks)

    def silence_limit(self, phase: str) -> float:
        """Return the seconds that the run may be silent: its supervisor's limit, or the phase's."""
        try:
            if is_locked(self.supervisor_lock):
                return float(self.silence_limit_file.read_text())
        except (OSError, ValueError):
            pass
        return SILENCE_LIMITS.get(phase, SILENCE_LIMITS[Phase.LOAD])

    def withdraw_requests(self) -> None:
        """Remove the files STOP and SAVE."""
        for name in (STOP, SAVE):
            (self.path / name).unlink(missing_ok=True)


def all_runs() -> list[RunDirectory]:
    """Return the runs under runs/ that ever had a heartbeat, by name."""
    return [RunDirectory(path.parent) for path in sorted(RUNS.glob("*/heartbeat.json"))]


def run_directory(settings: Settings, name: str | None = None) -> RunDirectory | None:
    """Return runs/<name>, or --output_dir; None while neither is known. Creates nothing."""
    if settings.output_dir:
        if "://" in str(settings.output_dir):
            raise RunError(
                "--output_dir is a directory of this machine",
                found=str(settings.output_dir).partition("?")[0],
                fix="a directory on a disk or NFS; copy runs/NAME to object storage afterwards, "
                "or while it trains",
            )
        return RunDirectory(settings.output_dir)
    name = name or settings.run_name
    if name and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise RunError(
            "--run_name is a name under runs/", found=name, fix="--output_dir takes any path"
        )
    return RunDirectory(RUNS / name) if name else None


def default_run_name(settings: Settings) -> str:
    """Return <model>-<method>-<configuration>-<time>."""
    model = Path(settings.model_name_or_path or default_model.NAME).name.lower()
    stem = Path(settings.deepspeed).stem if isinstance(settings.deepspeed, str) else "ds"
    return f"{model}-{settings.method}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def versions() -> dict[str, str | None]:
    """Return the versions of this product, Python and the packages that decide a run."""
    found: dict[str, str | None] = {
        "zero-offload-trainer": __version__,
        "python": sys.version.split()[0],
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
