"""Checks of the RAM, the kernel's limits, and the directories of swap files, runs and the cache.

Imports no torch.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from data import storage
from data.files import user_cache
from trainer.doctor.check import FAILURE, GB, GIB, OK, Check, Options, from_error, judge
from trainer.errors import RunError, make_line, script_line
from trainer.system import hardware, swap_dir

LIBC = ctypes.CDLL(None, use_errno=True)
IO_PGETEVENTS = {"x86_64": 333, "aarch64": 292}  # the number of the system call
PROBE_BYTES, PROBE_BLOCK, PROBE_SECONDS = 2**29, 2**24, 4  # written and read; seconds of each


# -- memory and limits --------------------------------------------------------------------------


def ram(options: Options) -> Check:
    total, free = hardware.ram(), hardware.free_memory()
    limited = " (the control group's limit)" if total < 0.99 * hardware.MACHINE_RAM else ""
    return judge(
        free >= 4 * GIB,
        f"{free / GIB:.1f} GiB free of {total / GIB:.1f}{limited}",
        "16 bytes a parameter for a full fine-tune, 2 for LoRA: " + make_line("plan"),
        "free some, or in a container: --memory",
    )


def locked_memory(options: Options) -> Check:
    limit = hardware.memlock_limit()
    if limit is None:
        return Check(OK, "unlimited")
    return judge(
        limit >= 2 * GIB,
        f"{limit / GIB:.4g} GiB" if limit >= 2**20 else f"{limit / 2**10:.0f} KiB",
        "unlimited: NVMe buffers and pinned memory are locked",
        hardware.raise_memlock(),
        fatal=options.nvme or bool(hardware.container()),
    )


def pinned_memory(options: Options) -> Check:
    """Lock pages, as pinning does; what CUDA would say, only torch can ask."""
    area = ctypes.create_string_buffer(2**28)
    if not LIBC.mlock(area, ctypes.c_size_t(len(area))):
        return Check(OK, "256 MiB could be locked")
    return judge(
        False,
        f"256 MiB cannot be locked: {os.strerror(ctypes.get_errno())}",
        "memory that can be locked",
        hardware.raise_memlock(),
        fatal=options.nvme or bool(hardware.container()),
    )


def shared_memory(options: Options) -> Check:
    size = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    several = options.gpus > 1
    fix = "mount -o remount,size=8G /dev/shm; in a container: --shm-size=8g, or --ipc=host"
    if hardware.container():
        several, fix = True, "docker run --shm-size=8g, or --ipc=host"
    if options.ranks is not None:
        several = options.ranks > 1
    found = f"/dev/shm {size / GIB:.2f} GiB" if size else "no /dev/shm"
    return judge(size >= GIB, found, "1 GiB", fix, several or not size)


def open_files(options: Options) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {hard}"
    if hard < 4096:
        fix = (
            "in a container: --ulimit nofile=65536; else a nofile line in /etc/security/limits.conf"
        )
    return judge(soft >= 4096, str(soft), "4096: one swap file a tensor, sockets, shards", fix)


def aio_requests(options: Options) -> Check:
    # A container's filter of system calls may lack io_pgetevents. DeepSpeed would ask for its
    # results again and again, for ever.
    number = IO_PGETEVENTS.get(os.uname().machine)
    failed = number and LIBC.syscall(number, 0, 0, 0, None, None, None)
    if failed and ctypes.get_errno() == errno.EPERM:
        return judge(
            False,
            "io_pgetevents is forbidden (seccomp)",
            "libaio's system calls",
            "podman as docker/image.sh starts it, with a filter that allows it; or "
            "--security-opt seccomp=unconfined",
            options.nvme,
        )
    try:
        most, used = (
            int(Path(f"/proc/sys/fs/aio-{n}").read_text(encoding="utf-8")) for n in ("max-nr", "nr")
        )
    except OSError:
        return judge(not options.nvme, "this kernel does not say", "/proc/sys/fs/aio-max-nr", "")
    return judge(
        most - used >= 16384,
        f"{most - used:,} of {most:,} free",
        "16,384 for libaio's queues",
        "sysctl -w fs.aio-max-nr=1048576",
        fatal=options.nvme,
    )


# -- directories --------------------------------------------------------------------------------


def nvme(options: Options) -> Check:
    path = Path(options.nvme_path).absolute()
    if hardware.container() and path.is_dir() and (failure := _unwritable(path)):
        return failure
    try:
        swap_dir.check_directory(path) if path.is_dir() else swap_dir.check_place(path)
    except RunError as error:
        return from_error(error, fatal=options.nvme)
    nearest = hardware.existing(path)
    filesystem, free = storage.filesystem_of(path), shutil.disk_usage(nearest).free
    state = "O_DIRECT" if path == nearest else f"{options.nvme_path} is not there yet"
    return judge(
        filesystem.startswith(("ext", "xfs")) and free > 2e10,
        f"{nearest}: {filesystem}, {state}, {free / GB:.0f} GB free",
        "a local ext4 or xfs; 12 bytes a trained parameter",
        "--nvme_path DIR on a local NVMe (NVME= with make)",
    )


def nvme_speed(options: Options) -> Check:
    if not options.io:
        how = f"{script_line('doctor', '--io')}, or {script_line('bench', 'io')}"
        return Check(OK, "not measured", fix=how)
    path = Path(options.nvme_path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write, read = _direct_rates(path)
    except OSError as error:
        return judge(
            False,
            f"{path}: {error.strerror}",
            "a directory that can be written to",
            "--nvme_path DIR",
            options.nvme,
        )
    return judge(
        min(write, read) >= GB,
        f"{write / GB:.2f} GB/s written, {read / GB:.2f} GB/s read (one stream, O_DIRECT)",
        "1 GB/s and more: a full fine-tune moves 24 bytes a parameter and optimizer step",
        "a local NVMe, or ds_z3_offload.json with more RAM",
    )


def _direct_rates(directory: Path) -> list[float]:
    """Return bytes a second [written, read] of one file with O_DIRECT."""
    block = mmap.mmap(-1, PROBE_BLOCK)  # begins at a page, as O_DIRECT needs it
    block.write(os.urandom(PROBE_BLOCK))
    rates, moved = [], PROBE_BYTES
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
        for move in (file.write, file.readinto):
            file.seek(0)
            began, size, moved = time.perf_counter(), moved, 0
            while moved < size and time.perf_counter() - began < PROBE_SECONDS:
                moved += move(block)
            os.fsync(file)
            rates.append(moved / (time.perf_counter() - began))
    return rates


def run_disk(options: Options) -> Check:
    path = hardware.existing("runs")
    if failure := _unwritable(path):
        return failure
    free = shutil.disk_usage(path).free
    return judge(
        free >= 1e10,
        f"{path}: {free / GB:.0f} GB free",
        "room for checkpoints: 14 bytes a trained parameter, twice",
        "--output_dir on a larger disk",
    )


def cache(options: Options) -> Check:
    """Check the directory of converted models, tokenised data and what benchmarks measured."""
    path = user_cache()
    nearest = hardware.existing(path)
    if failure := _unwritable(nearest, "export XDG_CACHE_HOME=DIR"):
        return failure
    free = shutil.disk_usage(nearest).free
    return Check(OK, f"{path}: {storage.filesystem_of(path)}, {free / GB:.0f} GB free")


def _unwritable(path: Path, elsewhere: str = "--output_dir DIR") -> Check | None:
    """Return a failure where this process cannot write to the directory, with what changes it."""
    if os.access(path, os.W_OK | os.X_OK):
        return None
    in_container = hardware.container()
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        found = "mounted read-only"
        fix = f"mount -o remount,rw, or {elsewhere}"
        if in_container:
            fix = f"docker run -v DIR:{path} (without :ro)"
    else:
        status, user = path.stat(), f"{os.getuid()}:{os.getgid()}"
        owner = f"{status.st_uid}:{status.st_gid}"
        found = f"owned by {owner}, mode {status.st_mode & 0o7777:o}; this is user {user}"
        fix = f"chown {user} {path}, or {elsewhere}"
        if in_container:
            fix = f"docker run --user {owner}, or on the host chown {user} of the mounted directory"
    return Check(FAILURE, f"{path}: {found}", "a directory that this user can write to", fix)


QUICK = [ram, shared_memory, open_files, aio_requests]
CHECKS = [
    ram,
    locked_memory,
    pinned_memory,
    shared_memory,
    open_files,
    aio_requests,
    nvme,
    nvme_speed,
    run_disk,
    cache,
]
