"""The run directory: its place, its files, its locks and its heartbeat. Does not import torch."""

import errno
import json
import math
import os
import shlex
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from data.files import in_place, is_at, is_locked, lock_or_refuse, read_json, write_atomically
from trainer import __version__
from trainer.config.settings import Settings
from trainer.console import say
from trainer.errors import FAILED, RunError
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


# What only a run leaves: a directory with any of it is not taken for a new one.
TRACES = (
    "run.json",
    "metrics.jsonl",
    "resolved_config.yaml",
    "resolved_ds_config.json",
    "plan.json",
    "versions.json",
    "*checkpoint-*",
    "export",
    "report.html",
    "wandb",
)


@dataclass(frozen=True)
class RunIdentity:
    """Which run this is, and which line of it: in run.json, in every manifest, in W&B.

    id: of the run, for as long as it lives. created: ISO 8601, with the time zone. line: 0, and one
    more each time the run goes back to an earlier checkpoint. parent: the checkpoint that this line
    goes on from, {"id", "line", "step", "checkpoint", "parent"}, where the last one is that line's
    own parent. None: the line begins with the model's weights.
    """

    id: str
    created: str
    line: int = 0
    parent: dict[str, Any] | None = None

    @classmethod
    def new(cls, parent: dict[str, Any] | None = None) -> "RunIdentity":
        """Return the identity of a new run. parent: where it goes on from another run."""
        return cls(uuid.uuid4().hex, time.strftime("%Y-%m-%dT%H:%M:%S%z"), 0, parent)

    @classmethod
    def read(cls, content: Any) -> "RunIdentity":
        """Return the identity that JSON content describes. Raises ValueError where it is none."""
        try:
            identity = cls(**content)
            line, kinds = asdict(identity), {"id": str, "created": str, "line": int}
            while line is not None:
                for key, kind in kinds.items():
                    if not isinstance(line[key], kind):
                        raise ValueError(f"{key} is {line[key]!r}")
                line = line["parent"]
                kinds = {"id": str, "line": int, "step": int, "checkpoint": str}
        except (TypeError, KeyError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return identity

    @staticmethod
    def after(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return the parent of a line that goes on from this checkpoint."""
        run = manifest["run"]
        at = {"step": manifest["step"], "checkpoint": str(folder.absolute())}
        return {"id": run["id"], "line": run["line"], **at, "parent": run["parent"]}

    def owns(self, manifest: dict[str, Any]) -> bool:
        """Return whether a checkpoint is of this line, or of those before it until they were left.

        manifest: its "run" and "step" count.
        """
        run, step = manifest["run"], manifest["step"]
        line: dict[str, Any] | None = asdict(self)
        limit = math.inf
        while line is not None:
            if (run["id"], run["line"]) == (line["id"], line["line"]):
                return step <= limit
            line = line["parent"]
            limit = min(limit, line["step"]) if line else limit
        return False


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
        self.identity = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.plan = self.path / "plan.json"
        self.versions = self.path / "versions.json"
        self.resolved_config = self.path / "resolved_config.yaml"
        self.resolved_ds_config = self.path / "resolved_ds_config.json"
        self.rejected = self.path / "rejected.jsonl"
        self.export = self.path / "export"
        self.log = self.path / "train.log"
        self.heartbeat = self.path / "heartbeat.json"
        self.heartbeat_lost = False  # it could not be written
        self.rank_lock = self.path / ".running"  # held by rank 0
        self.supervisor_lock = self.path / ".supervised"
        self.silence_limit_file = self.path / ".patience"
        self.held: dict[Path, int] = {}  # the locks that this process has, and their descriptors
        self.lost = False  # the directory is another run's now
        self.stuck: set[str] = set()  # requests that cannot be removed

    def __str__(self) -> str:
        return str(self.path)

    def lock(self, lock: Path) -> None:
        """Make the directory and hold one of its locks until this process ends.

        Raises RunError where another process holds it, or where the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            what = f"the run {self}"
            self.held[lock] = lock_or_refuse(lock, what, "make stop, or another --run_name")
        except OSError as error:
            raise self.not_writable(error) from None

    def is_ours(self) -> bool:
        """Return whether the locks that this process took are still the ones in the directory."""
        self.lost |= not all(is_at(lock, handle) for lock, handle in self.held.items())
        return not self.lost

    def check_ours(self, identity: "RunIdentity | None" = None) -> None:
        """Raise RunError where the directory has been replaced since this process locked it.

        identity: the run and line that run.json must name.
        """
        found = None if self.is_ours() else "its lock file is gone, or another one"
        if found is None and identity:
            try:
                there = RunIdentity.read(read_json(self.identity))
                if (there.id, there.line) != (identity.id, identity.line):
                    found = f"run {there.id}, line {there.line}"
            except (OSError, ValueError) as error:
                found = f"no {self.identity.name} of a run ({type(error).__name__})"
        if found:
            self.lost = True
            needed = f" of run {identity.id}, line {identity.line}" if identity else ""
            raise RunError(
                f"the run directory {self} is no longer this run's",
                found=found,
                needed=f"the directory{needed} that it was started in",
                fix="put that one back, then resume; what stands there now was not touched",
                code=FAILED,
            )

    def not_writable(self, error: OSError) -> RunError:
        """Return the error to raise where the directory cannot be written."""
        return RunError(
            f"the run directory {self} cannot be written to",
            found=error.strerror,
            fix="free space there, or --output_dir on another disk"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "--output_dir",
        )

    def forget_refused_start(self) -> None:
        """Remove the supervisor's files where no run came of it: the directory is not one of a run.

        A start is refused in any directory that a mistyped --output_dir names.
        """
        if self.is_ours() and not os.path.lexists(self.heartbeat) and not self.traces():
            for path in (self.silence_limit_file, self.supervisor_lock):
                with suppress(OSError):
                    path.unlink()

    def beat(self, step: int, phase: str) -> None:
        """Write heartbeat.json: step, phase, time.

        Raises OSError while the run loads: it cannot begin. Later a warning is printed, once.
        Writes nothing where the directory is another run's now.
        """
        if not self.is_ours():
            return
        text = json.dumps({"step": step, "phase": phase, "time": time.time()})
        try:
            # In place, and always as long: it is quick, and a full disk has room for it.
            with open(in_place(str(self.heartbeat), os.O_WRONLY | os.O_CREAT), "wb") as file:
                file.write(f"{text:<100}\n".encode())
        except OSError as error:
            if phase == Phase.LOAD:
                raise
            if not self.heartbeat_lost:
                say(f"warning: {self.heartbeat}: {error.strerror}; the supervisor may see a hang")
            self.heartbeat_lost = True

    def read_heartbeat(self) -> dict:
        """Return the last heartbeat; {} where there is none, or no heartbeat of a run."""
        try:
            beat = read_json(self.heartbeat)
            kinds = {"step": int, "phase": str, "time": (int, float)}
            if (
                all(isinstance(beat[key], kind) for key, kind in kinds.items())
                and beat["phase"] in SILENCE_LIMITS
                and math.isfinite(beat["time"])
            ):
                return beat
        except (OSError, ValueError, KeyError, OverflowError):
            pass
        return {}

    def is_alive(self) -> bool:
        """Return whether a rank or a supervisor holds the run."""
        for lock in (self.rank_lock, self.supervisor_lock):
            with suppress(OSError):  # not there, or not for us to read
                if is_locked(lock):
                    return True
        return False

    def last_supervisor(self) -> int | None:
        """Return the pid of the run's last supervisor; None where there was none."""
        try:
            return read_json(self.supervisor_lock)["pid"]
        except (OSError, ValueError, KeyError):  # not there yet, or half-written
            return None

    def silence_limit(self, phase: str) -> float:
        """Return the seconds that the run may be silent: its supervisor's limit, or the phase's."""
        try:
            if is_locked(self.supervisor_lock):
                return float(self.silence_limit_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
        return SILENCE_LIMITS.get(phase, SILENCE_LIMITS[Phase.LOAD])

    def traces(self) -> list[str]:
        """Return the names of what a run has left here.

        Raises RunError where there cannot be such a directory: its name is too long, for one.
        """
        try:
            return sorted({path.name for trace in TRACES for path in self.path.glob(trace)})
        except OSError as error:
            raise self.not_writable(error) from None

    def read_identity(self) -> RunIdentity | None:
        """Return the identity in run.json; None where there is no such file.

        Raises RunError for a file that is none of ours.
        """
        try:
            return RunIdentity.read(read_json(self.identity))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.identity} does not say which run this is",
                found=f"{type(error).__name__}: {error}"[:200],
                fix='take the value of "run" from the manifest.json of the run\'s last checkpoint',
            ) from None

    def write_identity(self, identity: RunIdentity) -> None:
        """Write run.json. Raises OSError."""
        write_atomically(self.identity, json.dumps(asdict(identity), indent=1))

    def withdraw_requests(self, before: float = math.inf) -> None:
        """Remove the files STOP and SAVE, or those that were made before a time.

        One that cannot be removed is named, and asks no more of this process.
        """
        for name in (STOP, SAVE):
            path = self.path / name
            try:
                if path.lstat().st_mtime < before:
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                if name not in self.stuck:
                    say(f"warning: {path} cannot be removed: {error.strerror}")
                self.stuck.add(name)

    def is_asked(self, name: str) -> bool:
        """Return whether the file STOP or SAVE is there, and asks for something new."""
        return name not in self.stuck and os.path.lexists(self.path / name)

    def withdraw_old_requests(self) -> None:
        """Remove the files STOP and SAVE from before this process began: of an earlier run.

        What is asked while a run starts is asked of this one. Raises RunError where one cannot be
        removed: it would stop the run again and again.
        """
        import psutil

        self.withdraw_requests(psutil.Process().create_time())
        if self.stuck:
            paths = [str(self.path / name) for name in sorted(self.stuck)]
            raise RunError(
                f"an earlier request cannot be removed: {', '.join(paths)}",
                needed="a file or an empty directory, which this user may remove",
                fix=f"rm -r {shlex.join(paths)}",
            )


def all_runs() -> list[RunDirectory]:
    """Return the runs under runs/ that ever had a heartbeat or are starting, by name."""
    runs = [RunDirectory(path) for path in sorted(RUNS.glob("*"))]
    return [run for run in runs if run.heartbeat.exists() or run.is_alive()]


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
    parts = Path(name or "x").parts
    if not parts or Path(name or "").is_absolute() or ".." in parts:  # `.` has no parts
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
