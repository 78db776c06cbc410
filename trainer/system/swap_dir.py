"""The run's own swap directory: its lock, its space, its audit, and what dead runs left. Imports no torch.

libaio's completion results are never looked at by DeepSpeed 0.19.8: a disk that fills up gives files with holes, exit code 0 and a
model that is spoilt. So every swap file gets its blocks before it is first written, out of space that is reserved at the start.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from data import storage
from trainer.errors import DOES_NOT_FIT, FAILED, RunError
from trainer.system.hardware import existing

MARKER = "zero-offload-swap.json"  # in every swap directory of ours, locked while its run lives
_REFUSED = ("tmpfs", "ramfs", *storage.NETWORK_FILESYSTEMS)
PROBE_SECONDS = 30
_PROBE = """
import mmap, os, sys
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
handle = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600)
block = mmap.mmap(-1, 4096)
os.pwrite(handle, block, 0)
os.fsync(handle)
"""


def check_directory(path):
    """Refuse a directory that cannot hold swap files: read-only, in memory, on a network, without O_DIRECT, or hanging."""
    path = Path(path)
    needed, fix = check_place(path)
    probe, wrong = path / f".probe-{os.getpid()}", None
    try:
        # In another process, which is not waited for: a hung mount must not hang the check.
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _PROBE, str(probe.absolute())],
            stderr=subprocess.PIPE,
            text=True,
        )
        errors = process.communicate(timeout=PROBE_SECONDS)[1].strip().splitlines()
        wrong = (
            (errors or ["?"])[-1].partition("] ")[2].partition(":")[0]
            if process.returncode
            else None
        )
        probe.unlink(missing_ok=True)
    except subprocess.TimeoutExpired:
        wrong = f"no answer in {PROBE_SECONDS} s"
    except OSError as error:
        wrong = wrong or error.strerror
    if wrong:
        raise RunError(
            f"the NVMe directory {path} cannot hold swap files", found=wrong, needed=needed, fix=fix
        )


def check_place(path):
    """The part of it that looks only: a kind of disk that cannot hold them, or a file. Returns what is needed, and the mend."""
    path = Path(path)
    needed = "a writable directory on a local ext4 or xfs filesystem (O_DIRECT; not tmpfs, not a network disk)"
    fix = "--nvme_path DIR, or NVME=DIR with make"
    kind = storage.filesystem_of(path)
    if kind.startswith(_REFUSED):
        raise RunError(
            f"the NVMe directory {path} cannot hold swap files",
            found=f"it is on {kind}",
            needed=needed,
            fix=fix,
        )
    there = existing(path)
    if not there.is_dir():
        raise RunError(
            f"the NVMe directory {path} cannot hold swap files",
            found=f"{there} is not a directory",
            needed=needed,
            fix=fix,
        )
    return needed, fix


def _locked(path):
    """The open, locked file, or None where another process holds it. The lock is the kernel's: it ends with its process."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def is_held(path):
    """Whether a living process holds the lock. To look needs the right to read alone: another user's run may be asked for."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def take(path, what, fix):
    """Lock `path` for this process, whose pid, host and start it then tells. Returns the open file; RunError names the holder."""
    handle = _locked(path)
    if handle is None:
        try:
            own = json.loads(Path(path).read_text())
            found = f"pid {own['pid']} on {own['host']}, started {own['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            found = "another process"
        raise RunError(f"{what} is in use", found=f"{found} holds {path}", fix=fix)
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time()))
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    os.truncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)
    return handle


def reclaim(path, say):
    """Remove the swap directories of dead runs under `path`, and say how much they held. Only directories with our marker; the lock
    is the kernel's, so a dead run holds none (and no other machine uses a local disk)."""
    for marker in Path(path).glob(f"*/{MARKER}"):
        folder = marker.parent
        try:
            handle = None if folder.is_symlink() else _locked(marker)
        except OSError:
            continue
        if handle is None:
            continue
        size = sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file())
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
        say(f"swap: {size / 1e9:.2f} GB of a dead run reclaimed ({folder.name})")


class SwapSpace:
    """One run's swap directory on this machine. The first local rank owns it; each rank reserves the space that it will need."""

    def __init__(self, folder):
        self.folder, self.files, self.handle, self.reserve, self.left = (
            Path(folder),
            {},
            None,
            None,
            0,
        )

    def own(self):
        """Make the directory and lock it, on the first rank of the machine."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.handle = take(
                self.folder / MARKER,
                f"the swap directory {self.folder}",
                "another --nvme_path or --run_name",
            )
        except OSError as error:
            raise RunError(
                f"the swap directory {self.folder} cannot be made",
                found=error.strerror,
                fix="--nvme_path DIR",
            ) from None

    def reserve_space(self, rank, size, ranks_here):
        """Take `size` bytes for this rank's swap files at once, so that no other user of the disk can."""
        self.reserve, self.left = self.folder / f"reserve-{rank}", size
        free = shutil.disk_usage(self.folder).free
        try:
            with open(self.reserve, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            self.reserve.unlink(missing_ok=True)
            full = error.errno == errno.ENOSPC
            raise RunError(
                "the swap disk is too small" if full else f"no swap space in {self.folder}",
                found=f"{free / 1e9:.2f} GB free under {self.folder.parent} ({error.strerror})",
                needed=f"{size * ranks_here / 1e9:.2f} GB ({ranks_here} rank(s) of {size / 1e9:.2f} GB)",
                fix="--nvme_path on a larger disk, or --deepspeed ds_z3_offload.json",
                code=DOES_NOT_FIT,
            ) from None

    def size(self):
        """Bytes of the swap files of all ranks on this machine."""
        return sum(
            p.stat().st_size
            for p in self.folder.rglob("*")
            if p.is_file() and not p.name.startswith("reserve-")
        )

    def prepare(self, path, size):
        """Give a swap file its blocks before it is written for the first time. RunError where the disk is full."""
        if self.files.get(path, 0) >= size:
            return
        try:
            if self.reserve and self.left:
                self.left = max(self.left - size, 0)
                os.truncate(self.reserve, self.left)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(handle, 0, size)
            finally:
                os.close(handle)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise RunError(
                f"no room for a swap file: {error.strerror}",
                code=FAILED,
                needed=f"{size / 1e9:.3f} GB more",
                found=f"{free / 1e9:.2f} GB free under {self.folder.parent}, {len(self.files):,} files written",
                fix="free space on the disk and resume; nothing was written wrong",
            ) from None
        self.files[path] = size

    def audit(self):
        """Check this rank's swap files. Gradients only when they are read: after a skipped update writes may still be under way."""
        for path in self.files:
            if "_gradient_" not in path:
                self.check(path)

    def check(self, path):
        """RunError where a swap file is short, or has a part that was never written and reads as zeros. Some ten microseconds."""
        size = self.files.get(path, 0)
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise RunError(
                f"a swap file is gone: {path}",
                found=error.strerror,
                code=FAILED,
                fix="resume from the last checkpoint; nobody else may touch the swap directory",
            ) from None
        try:
            end = os.fstat(handle).st_size
            try:
                hole = os.lseek(handle, 0, os.SEEK_HOLE)
            except OSError:  # a filesystem that does not know
                hole = end
        finally:
            os.close(handle)
        if min(end, hole) < size:
            raise RunError(
                f"a swap file is damaged: {path}",
                found=f"written up to byte {min(end, hole):,}",
                needed=f"{size:,} bytes",
                code=FAILED,
                fix="check the disk (dmesg), then resume from the last checkpoint",
            )

    def close(self):
        """Remove the directory: it carries our marker, and only this run wrote into it."""
        if self.handle is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self.handle)
            self.handle = None


def needed_bytes(config, parameters, trainable, itemsize, world_size, fused_step=True):
    """Bytes of one rank's swap files. parameters, trainable: elements of the whole model; itemsize: bytes of a parameter.

    Optimizer: fp32 weights and both moments, 12 bytes an element; without fused_step gradients too, 16. A little too much: tensors
    under 1 MiB stay in memory.
    """
    zero = config["zero_optimization"]
    size = 0
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        size += parameters * itemsize
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        size += trainable * (12 if fused_step else 16)
    return -(-size // world_size) + 2**20


def watch(space):
    """Make every libaio write of DeepSpeed prepare its file first, and every read look at its file: the next write would fill a hole
    that nobody has seen."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load(verbose=False).aio_handle
    plain = getattr(handle.async_pwrite, "of_deepspeed", handle.async_pwrite)

    def async_pwrite(self, buffer, path, offset=0):
        space.prepare(path, buffer.numel() * buffer.element_size())
        return plain(self, buffer, path, offset)

    plain_read = getattr(handle.async_pread, "of_deepspeed", handle.async_pread)

    def async_pread(self, buffer, path, offset=0):
        space.check(path)
        return plain_read(self, buffer, path, offset)

    async_pwrite.of_deepspeed, async_pread.of_deepspeed = plain, plain_read
    handle.async_pwrite, handle.async_pread = async_pwrite, async_pread
