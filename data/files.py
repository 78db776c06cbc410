"""Atomic writes and locks: the one place that knows how a file or folder becomes visible whole."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from data.errors import RunError


def user_cache() -> Path:
    """Return the cache directory of this user: $XDG_CACHE_HOME or ~/.cache, with our name."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "zero-offload-trainer")


def facts_cache() -> Path:
    """Return where what was measured or found out once is kept: $ZERO_OFFLOAD_CACHE, or the user's.

    Raises RuntimeError for a user without a home.
    """
    return Path(os.environ.get("ZERO_OFFLOAD_CACHE") or user_cache()).expanduser()


@contextmanager
def new_file(target: Path, durable: bool = True) -> Iterator[Path]:
    """Give a name to write to. At the end of the block it becomes the target.

    An old target is replaced. After an exception nothing is left, and the old target stays. The
    mode is the umask's. durable: it is on the disk once the block has ended; False for what is made
    again after a power cut. Raises OSError. A device such as /dev/null is written to in place; a
    link to one is replaced, as every other link is.
    """
    replaced = not os.path.lexists(target) or stat.S_IFMT(target.lstat().st_mode) in (
        stat.S_IFREG,
        stat.S_IFLNK,
    )
    if target.parent == Path("/dev") or not replaced:
        yield target
        return
    with _made(target, durable, target.name) as path:
        yield path


def write_atomically(path: Path, content: str, durable: bool = True) -> None:
    """Write the file so that a reader sees the old content or the new one. Raises OSError.

    durable: see new_file.
    """
    with new_file(path, durable) as partial:
        partial.write_text(content, encoding="utf-8")


def is_own(path: Path, status: os.stat_result) -> bool:
    """Return whether this user put something where it is, or the owner of that directory did.

    status: of the file or directory. On a network disk that maps users both are somebody else's.
    """
    return status.st_uid in (os.geteuid(), os.stat(path.parent).st_uid)


def in_place(path: str, flags: int) -> int:
    """Open a file that is written to where it stands: the opener of open(path, mode, opener=…).

    Raises OSError for what may lead elsewhere: a link, a second name of a file (a hard link), a
    device or pipe, another user's file. Then nothing was changed. A device is meant where its own
    name is given.
    """
    if Path(path).parent == Path("/dev"):
        return os.open(path, flags)
    # A pipe that nobody reads would be waited for.
    safe = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    problem = None
    try:
        handle = os.open(path, safe, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        problem = "a link" if error.errno == errno.ELOOP else "a pipe"
    else:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            problem = "no regular file"
        elif status.st_nlink > 1:
            problem = f"one of {status.st_nlink} names of a file (hard links)"
        elif not is_own(Path(path), status):
            problem = f"of user {status.st_uid}"
        if problem is None:
            if flags & os.O_TRUNC:
                os.ftruncate(handle, 0)
            return handle
        os.close(handle)
    raise OSError(errno.EPERM, f"{path} is {problem}, and may lead elsewhere: remove it")


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, whole or not at all. Raises OSError."""
    with open(path, "ab", buffering=0, opener=in_place) as file:
        end, data = file.seek(0, os.SEEK_END), f"{line}\n".encode()
        if file.write(data) != len(data):  # the last block of the disk took a part
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OSError; ValueError where it holds none."""
    try:
        with open(path, encoding="utf-8", opener=_without_waiting) as file:
            content = json.load(file)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"an object is needed, not a {type(content).__name__}")
    return content


def _without_waiting(path: str, flags: int) -> int:
    """Open a file to read. Where there is a pipe, nobody's writing is waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def new_directory(target: Path, durable: bool = True) -> AbstractContextManager[Path]:
    """Give an empty directory to fill. At the end of the block it becomes the target.

    An old target is replaced, and removed last. Otherwise as new_file.
    """
    return _made(target, durable)


_OLD = "old"


@contextmanager
def _made(target: Path, durable: bool, name: str = "") -> Iterator[Path]:
    """Give a path for the new target: a directory, or a file of that name in it.

    It is made beside the target in a directory of random name that only this user can enter:
    nobody can put a link there. Host, pid and lock tell the next writer whether we live.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f".tmp-{target.name[:40]}-{os.uname().nodename}-"
    if durable or not name:  # small files of a cache are many, and looking for leftovers takes time
        _clear_leftovers(target, mark)
    work = Path(tempfile.mkdtemp(prefix=f"{mark}{os.getpid()}-", dir=target.parent))
    lock = try_lock(work, os.O_RDONLY)
    new = work / "new"
    try:
        new.mkdir()
        yield new / name
        mode = new.stat().st_mode & 0o666  # safetensors makes its files private
        for where, _, files in os.walk(new):
            for file in files:
                _settle(Path(where, file), durable, mode)
            _settle(where, durable)
        _put(new / name, target, work / _OLD)
        if durable:
            _settle(target.parent, durable)
    except OSError:
        raise
    except Exception as error:  # safetensors' and tokenizers' own, where a disk is full
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _settle(path: str | Path, durable: bool, mode: int | None = None) -> None:
    """Give a file or directory a mode, and write it to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if mode is not None:
            os.fchmod(handle, mode)
        if durable:
            os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(handle)


def _put(new: Path, target: Path, old: Path) -> None:
    """Rename the new one to the target. An old directory is kept under `old` until then."""
    aside = new.is_dir() and os.path.lexists(target)
    if aside:
        os.rename(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        if aside:
            os.rename(old, target)
        raise


def _clear_leftovers(target: Path, mark: str) -> None:
    """Remove what killed processes of this user and host left. What cannot be judged stays."""
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            pid = entry.name.removeprefix(mark).partition("-")[0]
            if (
                not (entry.name.startswith(mark) and pid.isdigit())
                or not entry.is_dir(follow_symlinks=False)
                or entry.stat(follow_symlinks=False).st_uid != os.geteuid()
                or Path("/proc", pid).exists()
                # Killed between two renames: the old target is there and nowhere else.
                or (not target.exists() and Path(entry.path, _OLD).exists())
            ):
                continue
            lock = try_lock(Path(entry.path), os.O_RDONLY | os.O_NOFOLLOW)
            if lock is not None:  # else it lives in another container, which has pids of its own
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(lock)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file and hold it. The kernel frees the lock when its process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Nothing is written to it: in a cache that users share it may be another's.
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def try_lock(path: Path, flags: int = os.O_CREAT | os.O_RDWR) -> int | None:
    """Return the descriptor of the locked file or directory, or None where a process holds it.

    flags: how it is opened. Raises OSError, also where a file that is to be written to is none of
    ours (see in_place).
    """
    handle = in_place(str(path), flags) if flags & os.O_RDWR else os.open(path, flags)
    # `is_locked` of another process holds it for a moment.
    for pause in (0.02, 0.05, 0):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(path, handle):
                return handle
            break  # its last holder has just removed it
        except OSError:
            time.sleep(pause)
    os.close(handle)
    return None


def is_at(path: Path, handle: int) -> bool:
    """Return whether the open file is still the one under this name."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except OSError:
        return False


def is_locked(path: Path) -> bool:
    """Return whether a living process holds the lock. The right to read the file is enough."""
    with open(path, "rb", opener=_without_waiting) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def lock_or_refuse(path: Path, what: str, fix: str) -> int:
    """Lock the file until this process ends and write our pid, host and start time into it.

    Returns the descriptor. Raises RunError that names the holder where another process has it, and
    OSError (see try_lock).
    """
    import psutil

    handle = try_lock(path)
    if handle is None:
        try:
            holder = read_json(path)
            found = f"pid {holder['pid']} on {holder['host']}, started {holder['started']}"
        except (OSError, ValueError, KeyError):
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


# Types of tensors, as torch and as safetensors names them.
STORED_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file says of its tensors, and where in it their bytes begin.

    Raises OSError; ValueError where it is another kind of file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is no safetensors file: it is shorter than its header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is no object")
    return header, 8 + length
