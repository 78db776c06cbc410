"""Atomic writes and locks: the one place that knows how a file or folder becomes visible whole."""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import RunError


def user_cache() -> Path:
    """Return the cache directory of this user: $XDG_CACHE_HOME or ~/.cache, with our name."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "zero-offload-trainer")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a name beside the target to write to. At the end of the block it becomes the target.

    An old target is replaced. After an exception nothing is left, and the old target stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str) -> None:
    """Write the file so that a reader sees the old content or the new one. Raises OSError."""
    with new_file(path) as partial:
        partial.write_text(content, encoding="utf-8")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Give an empty directory beside the target. At the end of the block it becomes the target.

    An old target is replaced. After an exception nothing is left, and the old target stays.
    """
    work = target.with_name(f".making-{target.name}")
    shutil.rmtree(work, ignore_errors=True)  # what a killed process left
    work.mkdir(parents=True)
    try:
        yield work
        if target.is_dir():
            shutil.rmtree(target)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file and hold it. The kernel frees the lock when its process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> int | None:
    """Return the descriptor of the locked file, or None where another process holds it."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def is_locked(path: Path) -> bool:
    """Return whether a living process holds the lock. The right to read the file is enough."""
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def lock_or_refuse(path: Path, what: str, fix: str) -> int:
    """Lock the file until this process ends and write our pid, host and start time into it.

    Returns the descriptor. Raises RunError that names the holder where another process has it.
    """
    import psutil

    handle = try_lock(path)
    if handle is None:
        try:
            holder = json.loads(path.read_text())
            found = f"pid {holder['pid']} on {holder['host']}, started {holder['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            found = "another process"
        raise RunError(f"{what} is in use", found=f"{found} holds {path}", fix=fix)
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time()))
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    os.truncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)
    return handle


def hash_file(path: Path) -> str:
    """Return the XXH3-128 of a file's bytes, as hex digits. Raises OSError."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
