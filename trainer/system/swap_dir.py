"""The run's own swap directory: its lock, its space, its checks, and what dead runs left.

DeepSpeed 0.19.8 never looks at libaio's results: a disk that fills up gives files with holes, exit
code 0 and a spoilt model. So every swap file gets its blocks before it is first written, from space
that is reserved at the start. What is read is compared with what was written (swap_stamps.py).
The place may be one that other users write to: no link is followed, and nothing of theirs is taken
or removed. Does not import torch.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data import storage
from data.errors import disk_errors
from data.files import lock_or_refuse
from trainer.console import say
from trainer.errors import BAD_INPUT, DOES_NOT_FIT, FAILED, RunError
from trainer.system.hardware import existing
from trainer.system.swap_stamps import Stamps, damaged

MARKER = "zero-offload-swap.json"  # in every swap directory of ours, locked while its run lives
RESERVING = ("ext4", "xfs")  # a reserved block is the one that is written to, for good
NO_SWAP_HERE = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs", *storage.NETWORK_FILESYSTEMS)
PROBE_SECONDS = 30
PROBE = """
import mmap, os, sys
try:
    os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
    handle = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_DIRECT, 0o600)
    block = mmap.mmap(-1, 4096)
    os.pwrite(handle, block, 0)
    os.fsync(handle)
except OSError as error:
    sys.exit(error.strerror)
"""


def _unusable(path: str | Path, found: object, fix: str = "--nvme_path DIR") -> RunError:
    return RunError(
        f"the NVMe directory {path} cannot hold swap files",
        found=found,
        needed="a writable directory on a local ext4 or xfs filesystem (O_DIRECT; not tmpfs, not a "
        "network disk), that no other user has put there",
        fix=f"{fix}, or NVME=DIR with make",
    )


def check_place(path: str | Path, any_filesystem: bool = False) -> None:
    """Raise RunError where the path is a file, another user's trap, or on an unfit kind of disk.

    any_filesystem: take local disks too whose file system cannot reserve space. Creates nothing.
    """
    if "://" in str(path):
        raise _unusable(storage.shown(str(path)), "an address")
    path = Path(path).absolute()
    real = Path(os.path.realpath(path))  # where links of ours lead to, others may have been first
    for part in (path, *path.parents, real, *real.parents):
        with suppress(OSError):
            status, above = part.lstat(), part.parent.stat()
            is_link = stat.S_ISLNK(status.st_mode)
            # Who may write to the directory above can have put it there, in wait for us.
            open_to = stat.S_IWOTH
            if is_link and status.st_uid != above.st_uid:
                open_to |= stat.S_IWGRP
            foreign = status.st_uid not in (0, os.geteuid()) and above.st_mode & open_to
            if foreign and (is_link or part in (path, real)):
                kind = "link" if is_link else "directory"
                raise _unusable(
                    path, f"{part} is a {kind} of user {status.st_uid}, where others can write"
                )
            if is_link and not os.path.exists(part):
                raise _unusable(path, f"{part} is a link to {os.readlink(part)}: nothing is there")
    filesystem = storage.filesystem_of(path)
    found = f"it is on {filesystem or 'an unknown filesystem'}"
    if filesystem.startswith(NO_SWAP_HERE):
        raise _unusable(path, found)
    if not any_filesystem and filesystem not in RESERVING:
        fix = "--nvme_path DIR, or --allow_any_swap_filesystem with nobody else on the disk"
        if filesystem == "overlay":
            fix = (
                f"a disk of the host in the container: docker run -v /mnt/nvme:{path} (or --mount "
                f"type=bind,source=/mnt/nvme,target={path})"
            )
        raise _unusable(path, f"{found}, which may not keep the space that is reserved", fix)
    nearest = existing(path)
    if not nearest.is_dir():
        raise _unusable(path, f"{nearest} is not a directory")


def check_directory(path: str | Path, any_filesystem: bool = False) -> None:
    """Make the directory and raise RunError where it cannot hold swap files.

    It may be read-only, in memory, on a network, without O_DIRECT, or not answer at all.
    any_filesystem: as in check_place.
    """
    _check_place_in_time(path, any_filesystem)
    probe = Path(path).absolute() / f".probe-{uuid.uuid4().hex}"
    problem = None
    try:
        # In another process, which is not waited for: a hung mount must not hang the check.
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", PROBE, str(probe)],
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        answer = process.communicate(timeout=PROBE_SECONDS)[1]
        if process.returncode:
            problem = answer.strip()
        probe.unlink(missing_ok=True)
    except subprocess.TimeoutExpired:
        problem = f"no answer in {PROBE_SECONDS} s"
    except OSError as error:
        problem = problem or error.strerror
    if problem:
        raise _unusable(path, problem)


def _check_place_in_time(path: str | Path, any_filesystem: bool) -> None:
    """Call check_place, which a hung mount can hold up, and wait for it so long only."""
    errors: list[Exception] = []

    def check() -> None:
        try:
            check_place(path, any_filesystem)
        except Exception as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if thread.is_alive():
        raise _unusable(path, f"no answer in {PROBE_SECONDS} s")
    if errors:
        raise errors[0]


def reclaim(path: str | Path) -> None:
    """Remove the swap directories of dead runs under the path, and say how much they held.

    Only a directory of this user with our marker is removed. The marker's lock is the kernel's: a
    dead run holds none, and no other machine uses a local disk.
    """
    for marker in Path(path).glob(f"*/{MARKER}"):
        folder = marker.parent
        with (
            suppress(OSError, ValueError, TypeError, KeyError),
            _own(folder, os.O_DIRECTORY) as handle,
            _own(MARKER, os.O_RDWR, handle) as lock,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _ = json.loads(os.pread(lock, 4096, 0))["pid"]  # not an empty file of that name
            size = sum(f.lstat().st_blocks * 512 for f in folder.rglob("*"))
            shutil.rmtree(folder, ignore_errors=True)  # follows no link
            say(f"swap: {size / 1e9:.2f} GB of a dead run reclaimed ({folder.name})")


@contextmanager
def _own(path: str | Path, flags: int, within: int | None = None) -> Iterator[int]:
    """Give the descriptor of a file or directory. Raise OSError for links and other users'."""
    handle = os.open(path, flags | os.O_NOFOLLOW, dir_fd=within)
    try:
        status = os.fstat(handle)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(errno.EPERM, f"user {status.st_uid} owns it, or others may write")
        yield handle
    finally:
        os.close(handle)


class SwapSpace:
    """One run's swap directory on this machine.

    The first local rank owns it. Each rank reserves the space that it will need. run_id: the run's.
    """

    def __init__(self, folder: Path, run_id: str = "") -> None:
        self.folder, self.run_id = folder, run_id
        self.stamps = Stamps()
        self.files: dict[str, int] = {}  # bytes of each file that this rank wrote
        self.lock: int | None = None  # the owner's
        self.reserve: Path | None = None
        self.reserved = 0  # bytes that are left in the reserve

    def own(self) -> None:
        """Make the directory and lock it, on the first rank of the machine.

        Raises RunError where it cannot be made, is a link or another user's, or another run holds
        it.
        """
        what = f"the swap directory {self.folder}"
        needed = "a directory of this user alone, or none of that name"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _own(self.folder, os.O_DIRECTORY):
                self.lock = lock_or_refuse(
                    self.folder / MARKER, what, "another --nvme_path or --run_name"
                )
            if others := sorted({*os.listdir(self.folder)} - {MARKER}):
                os.close(self.lock)
                self.lock = None  # so that nothing in it is removed
                found = ", ".join(others[:5])
                raise RunError(f"{what} is not empty", found=found, needed=needed)
            holder = {**json.loads(os.pread(self.lock, 4096, 0)), "run_id": self.run_id}
            os.pwrite(self.lock, json.dumps(holder).encode(), 0)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RunError(
                f"{what} cannot be made",
                found=error.strerror,
                needed="room for the swap files" if full else needed,
                fix="free space there, or --nvme_path DIR" if full else "--nvme_path DIR",
                code=DOES_NOT_FIT if full else BAD_INPUT,
            ) from None

    def reserve_space(self, rank: int, size: int, ranks_here: int) -> None:
        """Take `size` bytes for this rank's swap files at once: no other user of the disk can.

        Raises RunError where the disk has less.
        """
        self.reserve, self.reserved = self.folder / f"reserve-{rank}", size
        try:
            with open(self.reserve, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            self.reserve.unlink(missing_ok=True)
            raise RunError(
                "the swap disk is too small"
                if error.errno == errno.ENOSPC
                else f"no swap space in {self.folder}",
                found=f"{self._free_space()} ({error.strerror})",
                needed=f"{size * ranks_here / 1e9:.2f} GB ({ranks_here} rank(s) of "
                f"{size / 1e9:.2f} GB)",
                fix="--nvme_path on a larger disk, or --deepspeed ds_z3_offload.json",
                code=DOES_NOT_FIT,
            ) from None

    def prepare(self, path: str, size: int) -> None:
        """Give a swap file its blocks before it is first written. The reserve shrinks by as much.

        Raises RunError where the disk is full.
        """
        if self.files.get(path, 0) >= size:
            return
        try:
            if self.reserve:
                self.reserved = max(self.reserved - size, 0)
                os.truncate(self.reserve, self.reserved)
            new = 0 if path in self.files else os.O_CREAT | os.O_EXCL
            handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | new, 0o600)
            try:
                os.posix_fallocate(handle, 0, size)
            finally:
                os.close(handle)
        except OSError as error:
            raise RunError(
                f"no room for a swap file: {error.strerror}",
                found=f"{self._free_space()}, {len(self.files):,} files written",
                needed=f"{size / 1e9:.3f} GB more",
                fix="free space on the disk and resume; nothing was written wrong",
                code=FAILED,
            ) from None
        self.files[path] = size

    def _free_space(self) -> str:
        return f"{shutil.disk_usage(self.folder).free / 1e9:.2f} GB free under {self.folder.parent}"

    def check(self, path: str) -> None:
        """Raise RunError where a swap file is gone, short, or has a hole, which reads as zeros.

        Takes some ten microseconds.
        """
        size = self.files.get(path, 0)
        with (
            disk_errors(
                f"a swap file is gone: {path}",
                fix="resume from the last checkpoint; nobody else may touch the swap directory",
                code=FAILED,
            ),
            open(path, "rb", buffering=0) as file,
        ):
            # An empty file has no hole to look for.
            written = file.seek(0, os.SEEK_END) and file.seek(0, os.SEEK_HOLE)
        if written < size:
            raise damaged(path, f"written up to byte {written:,}", f"{size:,} bytes")

    def audit(self) -> None:
        """Check this rank's swap files, which nobody may be writing to."""
        for path in self.files:
            self.check(path)

    def size(self) -> int:
        """Return the bytes of the swap files of all ranks on this machine."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.swp"))

    def close(self) -> None:
        """Remove the directory, where it still has our marker: only this run wrote into it."""
        if self.lock is not None:
            with suppress(OSError):
                if os.path.samestat((self.folder / MARKER).lstat(), os.fstat(self.lock)):
                    shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self.lock)
            self.lock = None
