"""The run's own swap directory: its lock, its space, its checks, and what dead runs left.

DeepSpeed 0.19.8 never looks at libaio's results: a disk that fills up gives files with holes, exit
code 0 and a spoilt model. So every swap file gets its blocks before it is first written, from space
that is reserved at the start. Does not import torch.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

from data import storage
from data.errors import disk_errors
from data.files import lock_or_refuse, try_lock
from trainer.console import say
from trainer.errors import DOES_NOT_FIT, FAILED, RunError
from trainer.system.hardware import existing

MARKER = "zero-offload-swap.json"  # in every swap directory of ours, locked while its run lives
NO_SWAP_HERE = ("tmpfs", "ramfs", *storage.NETWORK_FILESYSTEMS)
PROBE_SECONDS = 30
PROBE = """
import mmap, os, sys
try:
    os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
    handle = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600)
    block = mmap.mmap(-1, 4096)
    os.pwrite(handle, block, 0)
    os.fsync(handle)
except OSError as error:
    sys.exit(error.strerror)
"""


def _unusable(path: str | Path, found: object) -> RunError:
    return RunError(
        f"the NVMe directory {path} cannot hold swap files",
        found=found,
        needed="a writable directory on a local ext4 or xfs filesystem (O_DIRECT; not tmpfs, not a "
        "network disk)",
        fix="--nvme_path DIR, or NVME=DIR with make",
    )


def check_place(path: str | Path) -> None:
    """Raise RunError where the path is a file, or on a kind of disk that cannot hold swap files.

    Creates nothing.
    """
    filesystem = storage.filesystem_of(path)
    if filesystem.startswith(NO_SWAP_HERE):
        raise _unusable(path, f"it is on {filesystem}")
    nearest = existing(path)
    if not nearest.is_dir():
        raise _unusable(path, f"{nearest} is not a directory")


def check_directory(path: str | Path) -> None:
    """Make the directory and raise RunError where it cannot hold swap files.

    It may be read-only, in memory, on a network, without O_DIRECT, or not answer at all.
    """
    check_place(path)
    probe = Path(path).absolute() / f".probe-{os.getpid()}"
    problem = None
    try:
        # In another process, which is not waited for: a hung mount must not hang the check.
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", PROBE, str(probe)], stderr=subprocess.PIPE, text=True
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


def reclaim(path: str | Path) -> None:
    """Remove the swap directories of dead runs under the path, and say how much they held.

    Only a directory with our marker is removed. The marker's lock is the kernel's: a dead run holds
    none, and no other machine uses a local disk.
    """
    for marker in Path(path).glob(f"*/{MARKER}"):
        folder = marker.parent
        try:
            handle = None if folder.is_symlink() else try_lock(marker)
        except OSError:
            continue
        if handle is None:
            continue
        size = sum(f.stat().st_blocks * 512 for f in folder.rglob("*"))
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
        say(f"swap: {size / 1e9:.2f} GB of a dead run reclaimed ({folder.name})")


class SwapSpace:
    """One run's swap directory on this machine.

    The first local rank owns it. Each rank reserves the space that it will need.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}  # bytes of each file that this rank wrote
        self.lock: int | None = None  # the owner's
        self.reserve: Path | None = None
        self.reserved = 0  # bytes that are left in the reserve

    def own(self) -> None:
        """Make the directory and lock it, on the first rank of the machine.

        Raises RunError where it cannot be made, or another run holds it.
        """
        what = f"the swap directory {self.folder}"
        with disk_errors(f"{what} cannot be made", fix="--nvme_path DIR"):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.lock = lock_or_refuse(
                self.folder / MARKER, what, "another --nvme_path or --run_name"
            )

    def reserve_space(self, rank: int, size: int, ranks_here: int) -> None:
        """Take `size` bytes for this rank's swap files at once: no other user of the disk can.

        Raises RunError where the disk has less.
        """
        self.reserve, self.reserved = self.folder / f"reserve-{rank}", size
        try:
            with open(self.reserve, "wb") as file:
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
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
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
            raise RunError(
                f"a swap file is damaged: {path}",
                found=f"written up to byte {written:,}",
                needed=f"{size:,} bytes",
                fix="check the disk (dmesg), then resume from the last checkpoint",
                code=FAILED,
            )

    def audit(self) -> None:
        """Check this rank's swap files.

        Not those of gradients: after a skipped optimizer step they may still be written to. They
        are checked when they are read.
        """
        for path in self.files:
            if "_gradient_" not in path:
                self.check(path)

    def size(self) -> int:
        """Return the bytes of the swap files of all ranks on this machine."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.swp"))

    def close(self) -> None:
        """Remove the directory: it has our marker, and only this run wrote into it."""
        if self.lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self.lock)
            self.lock = None
