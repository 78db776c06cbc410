"""Is this machine ready? One function a check, each gives what was found, what is needed and the command that mends it. No torch.

Run as: python launch/doctor.py [--json] [--io] [--nvme_path DIR] [--model ORG/NAME]        (make doctor)
"""

import argparse
import ctypes
import errno
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from data import storage
from trainer.config.flags import RunArguments
from trainer.doctor.network import FAILURE, OK, WARNING, Check, clock, hub, wandb
from trainer.errors import DOES_NOT_FIT, DONE, RunError, report, say, table
from trainer.system import default_model, hardware, ops, swap_dir

GB, GIB = 1e9, 2**30
SECONDS = 17  # that all checks together may take
GENERATIONS = {
    1: 0.25,
    2: 0.5,
    3: 0.985,
    4: 1.97,
    5: 3.94,
    6: 7.56,
}  # GB/s a PCIe lane and direction
COMPUTE = "fuser -v /dev/nvidia*, or nvidia-smi: stop the process, or choose another GPU with CUDA_VISIBLE_DEVICES"


def _nvml(function, default=None):
    """What an NVML call gives; `default` where this card or driver does not know it."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return function(pynvml)
    except Exception:
        return default


# -- programs and packages ---------------------------------------------------------------------------------------------
def python(options):
    wanted, here = "3.10 to 3.12", sys.version.split()[0]
    fits = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Check(
        "python",
        OK if fits else FAILURE,
        here,
        wanted,
        "" if fits else "make setup PYTHON=/path/to/python3.11",
    )


def packages(options):
    missing = []
    for name in (
        "torch",
        "deepspeed",
        "transformers",
        "datasets",
        "peft",
        "hjson",
        "accelerate",
        "safetensors",
    ):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check(
            "packages",
            FAILURE,
            f"missing: {', '.join(missing)}",
            "what setup.py names",
            "make setup",
        )
    versions = {n: importlib.metadata.version(n) for n in ("torch", "deepspeed", "transformers")}
    text = ", ".join(f"{k} {v}" for k, v in versions.items())
    if versions["deepspeed"].split("+")[0] != "0.19.8":
        return Check(
            "packages",
            WARNING,
            text,
            "deepspeed 0.19.8: the offload extension steps aside for any other",
            "make setup",
        )
    return Check("packages", OK, text)


def compiler(options):
    if all(map(_built, _wanted(options))) and ops.adam_is_built():
        return Check("compiler", OK, "not needed: the ops are built")
    ops.check_tools(["async_io"] if options.nvme else [], False)
    version = subprocess.run(
        ["g++", "-dumpfullversion"], capture_output=True, text=True
    ).stdout.strip()
    return Check(
        "compiler", OK, f"g++ {version}, Python's headers{', libaio' if options.nvme else ''}"
    )


def nvcc(options):
    if not options.gpus:
        return Check("nvcc", OK, "not needed without a GPU")
    if _built("cpu_adam") and ops.torch_cuda():
        return Check("nvcc", OK, "not needed: the ops are built")
    return Check("nvcc", OK, ops.check_nvcc())


def architectures(options):
    return Check("architectures", OK, ops.check_architectures())


def _wanted(options):
    return ["cpu_adam", *(["async_io"] if options.nvme else [])]


def _built(name):
    on_gpu = (
        hardware.gpu_count() > 0 or hardware.container() == "cuda"
    )  # the GPUs' image without one: only the GPU is missing
    return ops.installed(name, on_gpu) or any(
        (root / name / f"{name}.so").is_file() for root in ops.folders()
    )


def op_builds(options):
    locks = [str(p) for root in ops.folders() for p in root.glob("*/lock") if ops.is_stale(p)]
    if locks:
        return Check(
            "op builds",
            FAILURE,
            f"locks of builds that were killed: {', '.join(locks)}",
            "none: torch waits for them for ever",
            f"rm {' '.join(locks)}",
        )
    wanted = _wanted(options)
    missing = [n for n in wanted if not _built(n)]
    if missing:
        return Check(
            "op builds",
            WARNING,
            f"not built yet: {', '.join(missing)}",
            f"built once, about {sum(ops.SECONDS[n] for n in missing)} s on two slow cores",
            "make setup-aio" if options.nvme else "make setup",
        )
    return Check("op builds", OK, f"{', '.join(wanted)} are built")


# -- the GPUs ----------------------------------------------------------------------------------------------------------
def gpu(options):
    if options.gpus:
        _, name, memory = hardware.gpus()
        return Check("gpu", OK, f"{options.gpus} x {name}, {memory / GIB:.1f} GiB")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    nodes = list(Path("/dev").glob("nvidia[0-9]*"))
    if nodes and hidden in (None, ""):
        return Check(
            "gpu",
            FAILURE,
            "/dev has NVIDIA devices and the driver's library does not answer",
            "libnvidia-ml.so, from the driver",
            "install the driver; in a container: --gpus all (nvidia-container-toolkit)",
        )
    if hardware.container() == "cpu":
        return Check("gpu", OK, "none: this is the CPU's image")
    in_ours = hardware.container() == "cuda"  # whoever takes the image for GPUs wants one
    return Check(
        "gpu",
        FAILURE if in_ours else WARNING,
        "none"
        + (
            f" (CUDA_VISIBLE_DEVICES={hidden})"
            if hidden is not None
            else " was passed through"
            if in_ours
            else ""
        ),
        "an NVIDIA GPU" + ("" if in_ours else ", or --use_cpu: the run is on the CPU"),
        hardware.PASS_GPUS if in_ours else "in a container: --gpus all",
    )


def driver(options):
    if not options.gpus:
        return Check("driver", OK, "not needed without a GPU")
    version = _nvml(lambda n: n.nvmlSystemGetDriverVersion(), "?")
    most = _nvml(lambda n: n.nvmlSystemGetCudaDriverVersion(), 0)
    wanted = ops.torch_cuda()
    have = (most // 1000, most % 1000 // 10)
    if not most:
        return Check(
            "driver",
            WARNING,
            f"{version}; it does not say up to which CUDA",
            f"CUDA {wanted}",
            "nvidia-smi",
        )
    fits = wanted is None or have[0] >= int(wanted.split(".")[0])
    return Check(
        "driver",
        OK if fits else FAILURE,
        f"{version}, up to CUDA {have[0]}.{have[1]}",
        f"CUDA {wanted}, as torch is built for",
        ""
        if fits
        else "a newer driver"
        + " on the host" * bool(hardware.container())
        + (
            ", or make setup TORCH_INDEX=https://download.pytorch.org/whl/cu126"
            if have[0] == 12 and not hardware.in_our_image()
            else ""
        ),
    )


def gpu_processes(options):
    used = []
    for i in range(options.gpus):
        memory = _nvml(lambda n, i=i: n.nvmlDeviceGetMemoryInfo(hardware.nvml_handle(i)))
        if memory and memory.used > 1.5 * GIB:
            used.append(f"GPU {i}: {memory.used / GIB:.1f} GiB")
    return Check(
        "gpu processes",
        WARNING if used else OK,
        "; ".join(used) or "no other process holds GPU memory",
        "the GPUs' memory",
        COMPUTE if used else "",
    )


def pcie(options):
    slow, found = [], []
    for i in range(options.gpus):
        now = [
            _nvml(lambda n, i=i, f=f: getattr(n, f)(hardware.nvml_handle(i)))
            for f in (
                "nvmlDeviceGetMaxPcieLinkGeneration",
                "nvmlDeviceGetCurrPcieLinkWidth",
                "nvmlDeviceGetMaxPcieLinkWidth",
            )
        ]
        if None in now:
            continue
        found.append(f"gen {now[0]} x{now[1]}: {GENERATIONS.get(now[0], 0) * now[1]:.0f} GB/s")
        if now[1] < now[2] and now[1] < 16:
            slow.append(f"GPU {i} x{now[1]} of x{now[2]}")
    text = ", ".join(dict.fromkeys(found)) or "no GPU tells its link"
    return Check(
        "pcie",
        WARNING if slow else OK,
        "; ".join([text, *slow]),
        "16 lanes: offload moves all weights twice a micro-batch",
        "another slot, or larger micro-batches" if slow else "",
    )


def gpu_links(options):
    if options.gpus < 2:
        return Check("gpu links", OK, "one GPU" if options.gpus else "no GPU")

    def linked(n, a, b):
        other = n.nvmlDeviceGetPciInfo(hardware.nvml_handle(b)).busId
        lanes = 0
        for link in range(18):
            try:
                handle = hardware.nvml_handle(a)
                if n.nvmlDeviceGetNvLinkState(handle, link) and (
                    n.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId == other
                    or n.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link)
                    == n.NVML_NVLINK_DEVICE_TYPE_SWITCH
                ):
                    lanes += 1
            except n.NVMLError:
                break
        return lanes

    lanes = [_nvml(lambda n, b=b: linked(n, 0, b), 0) for b in range(1, options.gpus)]
    if all(lanes):
        return Check("gpu links", OK, f"NVLink, {min(lanes)} links from GPU 0 to each other")
    return Check(
        "gpu links",
        WARNING,
        "PCIe between the GPUs",
        "NVLink: each layer is gathered from all GPUs, over the same PCIe that brings "
        "it from RAM, so that a micro-batch has to be about twice as large to hide it",
        "a larger --per_device_train_batch_size",
    )


# -- memory ------------------------------------------------------------------------------------------------------------
def ram(options):
    total, free = hardware.ram(), hardware.free_memory()
    low = free < 4 * GIB
    group = (
        ""
        if total >= 0.99 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        else " (the control group's limit)"
    )
    return Check(
        "ram",
        WARNING if low else OK,
        f"{free / GIB:.1f} GiB free of {total / GIB:.1f}{group}",
        "16 bytes a parameter for a full fine-tune, 2 for LoRA: make plan",
        "free some, or in a container: --memory" if low else "",
    )


def locked_memory(options):
    limit = hardware.memlock_limit()
    needed = "unlimited: NVMe buffers and pinned memory are locked"
    if limit is None:
        return Check("locked memory", OK, "unlimited")
    small = limit < 2 * GIB
    return Check(
        "locked memory",
        (FAILURE if options.nvme or hardware.container() else WARNING) if small else OK,
        f"{limit / GIB:.4g} GiB" if limit >= 2**20 else f"{limit / 2**10:.0f} KiB",
        needed,
        ""
        if not small
        else hardware.lock_more()
        if hardware.container()
        else "ulimit -l unlimited (/etc/security/limits.conf); in a container: --ulimit memlock=-1",
    )


def pinned_memory(options):
    """By locking pages, as pinning does; what CUDA would say, torch has to ask."""
    import mmap

    size = 2**28
    area = mmap.mmap(-1, size)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mlock(ctypes.byref(ctypes.c_char.from_buffer(area)), ctypes.c_size_t(size))
    if failed:
        return Check(
            "pinned memory",
            FAILURE if options.nvme or hardware.container() else WARNING,
            f"256 MiB cannot be locked: {os.strerror(ctypes.get_errno())}",
            "memory that can be locked",
            hardware.lock_more()
            if hardware.container()
            else "ulimit -l unlimited; in a container: --ulimit memlock=-1",
        )
    return Check("pinned memory", OK, "256 MiB could be locked")


def shared_memory(options):
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Check(
            "shared memory",
            FAILURE,
            "no /dev/shm",
            "1 GiB for NCCL, gloo and the data loader",
            "--shm-size=8g, or --ipc=host",
        )
    small = size < GIB
    needs = getattr(options, "ranks", options.gpus) > 1 or (
        hardware.container() and not hasattr(options, "ranks")
    )
    return Check(
        "shared memory",
        (FAILURE if needs else WARNING) if small else OK,
        f"/dev/shm {size / GIB:.2f} GiB",
        "1 GiB",
        ""
        if not small
        else "docker run --shm-size=8g, or --ipc=host"
        if hardware.container()
        else "mount -o remount,size=8G /dev/shm; in a container: --shm-size=8g, or --ipc=host",
    )


def open_files(options):
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    small = limit != resource.RLIM_INFINITY and limit < 4096
    return Check(
        "open files",
        WARNING if small else OK,
        "unlimited" if limit == resource.RLIM_INFINITY else str(limit),
        "4096: one swap file a tensor, sockets, shards",
        ""
        if not small
        else f"ulimit -n {hard if hard > 0 else 65536}"
        if not 0 <= hard < 4096
        else "in a container: --ulimit nofile=65536; else a nofile line in /etc/security/limits.conf",
    )


def aio_requests(options):
    # A container whose filter of system calls lacks this one: DeepSpeed would ask for its results again and again, for ever.
    number = {"x86_64": 333, "aarch64": 292}.get(os.uname().machine)
    if (
        number
        and ctypes.CDLL(None, use_errno=True).syscall(number, 0, 0, 0, None, None, None)
        and ctypes.get_errno() == errno.EPERM
    ):
        return Check(
            "aio requests",
            FAILURE if options.nvme else WARNING,
            "io_pgetevents is forbidden (seccomp)",
            "libaio's system calls",
            "podman as docker/image.sh starts it, with a filter that allows it; or --security-opt seccomp=unconfined",
        )
    try:
        most, taken = (int(Path(f"/proc/sys/fs/aio-{n}").read_text()) for n in ("max-nr", "nr"))
    except (OSError, ValueError):
        return Check(
            "aio requests",
            WARNING if options.nvme else OK,
            "this kernel does not say",
            "/proc/sys/fs/aio-max-nr",
        )
    small = most - taken < 16384
    return Check(
        "aio requests",
        (FAILURE if options.nvme else WARNING) if small else OK,
        f"{most - taken:,} of {most:,} free",
        "16,384 for libaio's queues",
        "sysctl -w fs.aio-max-nr=1048576" if small else "",
    )


# -- disks -------------------------------------------------------------------------------------------------------------
def nvme(options):
    path = Path(options.nvme_path)
    if hardware.container() and path.is_dir() and (wrong := _unwritable(path)):
        return Check(
            "nvme",
            FAILURE,
            wrong,
            "a directory on a local NVMe, writable for this user",
            _make_writable(path.absolute()),
        )
    try:
        swap_dir.check_place(path) if not path.is_dir() else swap_dir.check_directory(path)
    except RunError as error:
        found = _from_error("nvme", error)
        found.status = FAILURE if options.nvme else WARNING
        return found
    there = hardware.existing(path)
    kind, free = storage.filesystem_of(path), shutil.disk_usage(there).free
    good = kind.startswith(("ext", "xfs"))
    text = f"{there}: {kind}, {'O_DIRECT' if path.is_dir() else f'{path} is not there yet'}, {free / GB:.0f} GB free"
    return Check(
        "nvme",
        OK if good and free > 2e10 else WARNING,
        text,
        "a local ext4 or xfs; 12 bytes a trained parameter",
        "" if good and free > 2e10 else "--nvme_path DIR on a local NVMe (NVME= with make)",
    )


def nvme_speed(options):
    if not options.io:
        return Check(
            "nvme speed",
            OK,
            "not measured",
            "",
            "python launch/doctor.py --io, or python launch/bench.py io",
        )
    path = Path(options.nvme_path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write, read = direct_rates(path)
    except OSError as error:
        return Check(
            "nvme speed",
            FAILURE if options.nvme else WARNING,
            f"{path}: {error.strerror}",
            "a directory that can be written to",
            "--nvme_path DIR",
        )
    slow = min(write, read) < 1 * GB
    return Check(
        "nvme speed",
        WARNING if slow else OK,
        f"{write / GB:.2f} GB/s written, {read / GB:.2f} GB/s read (one stream, O_DIRECT)",
        "1 GB/s and more: a full fine-tune moves 32 bytes a parameter and update",
        "a local NVMe, or make train-zero3 with more RAM" if slow else "",
    )


def direct_rates(folder, size=2**29, block=2**24):
    """(written, read) bytes a second of one file with O_DIRECT, in at most about 8 s."""
    import mmap

    path = Path(folder) / f".doctor-{os.getpid()}"
    buffer = mmap.mmap(-1, block)
    buffer.write(os.urandom(2**20) * (block // 2**20))
    rates = []
    try:
        for flags, move in ((os.O_CREAT | os.O_RDWR, os.pwrite), (os.O_RDONLY, os.preadv)):
            handle = os.open(path, flags | os.O_DIRECT, 0o600)
            began, at = time.perf_counter(), 0
            while at < size and time.perf_counter() - began < 4:
                at += move(handle, buffer if move is os.pwrite else [buffer], at)
            if move is os.pwrite:
                os.fsync(handle)
                size = at
            rates.append(at / (time.perf_counter() - began))
            os.close(handle)
    finally:
        path.unlink(missing_ok=True)
    return rates


def run_disk(options):
    path = Path("runs").absolute() if Path("runs").exists() else Path.cwd()
    if wrong := _unwritable(path):
        return Check(
            "run disk",
            FAILURE,
            wrong,
            "a directory that this user can write to",
            _make_writable(path),
        )
    free = shutil.disk_usage(path).free
    return Check(
        "run disk",
        WARNING if free < 1e10 else OK,
        f"{path}: {free / GB:.0f} GB free",
        "room for checkpoints: 14 bytes a trained parameter, twice",
        "--output_dir on a larger disk" if free < 1e10 else "",
    )


def cache(options):
    """The directory of converted models, tokenised data and what the benches measured."""
    path = default_model.cache_directory()
    there = hardware.existing(path)
    if wrong := _unwritable(there):
        return Check(
            "cache",
            FAILURE,
            wrong,
            "a directory that this user can write to",
            _make_writable(there, "export XDG_CACHE_HOME=DIR"),
        )
    return Check(
        "cache",
        OK,
        f"{path}: {storage.filesystem_of(path)}, {shutil.disk_usage(there).free / GB:.0f} GB free",
    )


def _unwritable(path):
    """Why this process cannot write there; "" where it can."""
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"{path}: mounted read-only"
    if os.access(path, os.W_OK | os.X_OK):
        return ""
    owner, user = path.stat(), f"{os.getuid()}:{os.getgid()}"
    return f"{path}: owned by {owner.st_uid}:{owner.st_gid}, mode {owner.st_mode & 0o7777:o}; this is user {user}"


def _make_writable(path, otherwise="--output_dir DIR"):
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return (
            f"docker run -v DIR:{path} (without :ro)"
            if hardware.container()
            else f"mount -o remount,rw, or {otherwise}"
        )
    owner, user = path.stat(), f"{os.getuid()}:{os.getgid()}"
    if hardware.container():
        return f"docker run --user {owner.st_uid}:{owner.st_gid}, or on the host chown {user} of the mounted directory"
    return f"chown {user} {path}, or {otherwise}"


CHECKS = (
    python,
    packages,
    compiler,
    nvcc,
    architectures,
    op_builds,
    gpu,
    driver,
    gpu_processes,
    pcie,
    gpu_links,
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
    wandb,
    hub,
    clock,
)
# Before every run: what takes no time, and what the run does not look at itself, more exactly, once it knows the model.
QUICK = (driver, gpu_processes, pcie, gpu_links, ram, shared_memory, open_files, aio_requests)


def _from_error(name, error):
    """A RunError as a failure."""
    what, *rest = str(error).splitlines()
    parts = dict(line.strip().split(":", 1) for line in rest if ":" in line)
    found = ": ".join(p for p in (what, parts.get("found", "").strip()) if p)
    return Check(
        name, FAILURE, found, parts.get("needed", "").strip(), parts.get("fix", "").strip()
    )


def examine(options, checks=CHECKS):
    """All checks, in order; they run side by side, as some wait for servers."""

    def one(check):
        try:
            return check(options)
        except RunError as error:
            return _from_error(check.__name__.replace("_", " "), error)
        except Exception as error:  # a check that fails must not hide the others
            return Check(
                check.__name__.replace("_", " "),
                WARNING,
                f"could not be checked: {type(error).__name__}: {error}",
                "an answer",
                "python launch/doctor.py once more",
            )

    if not hasattr(options, "gpus"):
        options.gpus = hardware.gpu_count()
    found, threads = {}, []
    for check in (
        checks
    ):  # in threads that end with the process: a hung mount or a slow server holds up nobody
        threads.append(
            threading.Thread(
                target=lambda check=check: found.update({check: one(check)}), daemon=True
            )
        )
        threads[-1].start()
    until = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))
    return [
        found.get(check)
        or Check(
            check.__name__.replace("_", " "),
            WARNING,
            f"no answer in {SECONDS} s",
            "an answer",
            "look at what it asks: a server, a mount",
        )
        for check in checks
    ]


def quick(gpu, nvme):
    """QUICK before a run on a GPU or not, with NVMe or not: warnings are printed, a failure is a RunError with exit code 3."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    found = examine(
        argparse.Namespace(nvme=nvme, ranks=ranks, **({} if gpu else {"gpus": 0})), QUICK
    )
    for check in found:
        if check.status == FAILURE:
            raise RunError(
                f"this machine is not ready: {check.name}",
                found=check.found,
                needed=check.needed,
                fix=check.fix,
                code=DOES_NOT_FIT,
            )
        if check.status == WARNING:
            say(f"warning: {check.name}: {check.found}; needed: {check.needed}; fix: {check.fix}")


def main(argv=None):
    """Exit code of launch/doctor.py: 3 where a check failed."""
    parser = argparse.ArgumentParser(
        prog="doctor.py", description="Is this machine ready to train?"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--io",
        action="store_true",
        help="measure the NVMe directory too: half a GB, written and read",
    )
    parser.add_argument(
        "--nvme", action="store_true", help="what the NVMe configurations need is needed"
    )
    parser.add_argument(
        "--nvme_path",
        default=RunArguments.nvme_path,
        help="the NVMe directory (default: %(default)s)",
    )
    parser.add_argument("--model", help="a model on the hub that has to be readable: ORG/NAME")
    options = parser.parse_args(argv)
    try:
        found = examine(options)
    except RunError as error:
        report(error)
        return error.code
    if options.json:
        print(json.dumps([asdict(check) for check in found], indent=1))
    else:
        print(table([("", "check", "found"), *((c.status, c.name, c.found) for c in found)], "  "))
        for check in found:
            if check.status != OK:
                print(
                    f"\n{check.status}: {check.name}\n  found:  {check.found}\n  needed: {check.needed}\n  fix:    {check.fix}"
                )
        count = {s: sum(c.status == s for c in found) for s in (FAILURE, WARNING)}
        print(f"\n{count[FAILURE]} failure(s), {count[WARNING]} warning(s)")
    return DOES_NOT_FIT if any(c.status == FAILURE for c in found) else DONE
