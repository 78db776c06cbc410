"""What the machine has. Does not import torch."""

import ctypes
import math
import os
import re
import resource
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.errors import DOES_NOT_FIT, RunError

# MB. Larger blocks are neither rounded up nor kept when they are freed. The two are equal, or torch
# may write past a block (pytorch#192722).
EXACT_PINNED = "pinned_max_round_threshold_mb:16,pinned_max_cached_size_mb:16"
EXPANDABLE = "expandable_segments:True"
CAP_IPC_LOCK = 1 << 14  # linux/capability.h: with it, mlock has no limit
# Of each version of the memory control groups: its root, its name in /proc/self/cgroup, the files
# of the limit and of the bytes in use, and what the keys of file pages begin with.
CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "", "memory.max", "memory.current", ""),
    (
        "/sys/fs/cgroup/memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
)
MACHINE_RAM = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
GIB = 2**30
# NVML's memory of a process before it has a tensor: CUDA, cuBLAS, Triton.
CONTEXT = int(0.9 * GIB)
SPARE_FREE = 0.01  # of the RAM, when a run fills what is free
_gpu_limit = math.inf  # bytes of tensors, by limit_gpu


def _devices() -> list[str]:
    """Return the CUDA devices this process may use, by NVML; none without a driver.

    CUDA_VISIBLE_DEVICES renumbers the devices, or names them by UUID.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        numbers = [*map(str, range(pynvml.nvmlDeviceGetCount()))]
    except Exception:  # no driver or no library: there is no GPU to use
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return numbers
    return [name for name in re.findall(r"[^,\s]+", visible) if name != "-1"][: len(numbers)]


def gpu_count() -> int:
    """Return the number of CUDA devices this process may use."""
    return len(_devices())


def nvml_handle(index: int) -> Any:
    """Return NVML's handle of this process's CUDA device `index`."""
    import pynvml

    name = _devices()[index]
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _handles() -> list[Any]:
    return [nvml_handle(i) for i in range(gpu_count())]


def gpus() -> tuple[int, str, int]:
    """Return (usable CUDA devices, the first one's name, bytes of memory of the smallest)."""
    handles = _handles()
    if not handles:
        return 0, "", 0
    import pynvml

    smallest = min(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles)
    return len(handles), pynvml.nvmlDeviceGetName(handles[0]), smallest


def gpu_has_bf16() -> bool:
    """Return whether every usable GPU has bf16 (compute capability 8.0, Ampere, or later)."""
    try:
        import pynvml

        return all(pynvml.nvmlDeviceGetCudaComputeCapability(gpu)[0] >= 8 for gpu in _handles())
    except Exception:  # NVML cannot say, and torch can
        import torch

        return torch.cuda.is_bf16_supported()


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 in hardware (AVX-512-BF16 or AMX).

    Other CPUs emulate it and are hundreds of times slower.
    """
    return bool(
        re.search(r"^flags.* (avx512_bf16|amx_bf16)\b", _read("/proc/cpuinfo"), re.MULTILINE)
    )


def existing(path: str | Path) -> Path:
    """Return the absolute path, or the nearest directory above it that exists."""
    path = Path(path).absolute()
    while not os.path.exists(path):  # Path.exists raises where a name is too long or forbidden
        path = path.parent
    return path


def _read(path: str) -> str:
    """Return the text of one of the kernel's files; "" where it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _control_groups() -> Iterator[tuple[int, int]]:
    """Give (limit, bytes free) of this process's memory control groups that have a limit."""
    groups = _read("/proc/self/cgroup")
    for root, controller, limit_file, usage_file, prefix in CONTROL_GROUPS:
        match = re.search(rf"^\d+:{controller}:(.*)", groups, re.MULTILINE)
        group = Path(match[1] if match else "/")
        for parent in (group, *group.parents):
            try:
                limit, used = (int(_read(f"{root}{parent}/{n}")) for n in (limit_file, usage_file))
            except ValueError:  # no such file, or "max"
                continue
            statistics = _read(f"{root}{parent}/memory.stat")
            pages = re.findall(rf"^{prefix}(?:in)?active_file (\d+)", statistics, re.MULTILINE)
            # The kernel gives file pages back when memory is short.
            yield limit, max(0, limit - max(0, used - sum(map(int, pages))))


def ram() -> int:
    """Return the bytes of RAM this process may ever have.

    That is the machine's RAM, or the smallest limit of its control groups.
    """
    return min([MACHINE_RAM, *(limit for limit, _ in _control_groups())])


def free_memory() -> int:
    """Return the bytes of RAM that are free: MemAvailable, or what a control group leaves."""
    match = re.search(r"MemAvailable: *(\d+)", _read("/proc/meminfo"))
    available = int(match[1]) * 1024 if match else 0
    return min([available, *(free for _, free in _control_groups())])


def ram_room() -> float:
    """Return the bytes of RAM that may be filled now: SPARE_FREE of the machine's stay free.

    What starts later takes them: compilers, libraries, the kernel's tables.
    """
    return free_memory() - SPARE_FREE * ram()


def ram_in_use() -> int:
    """Return the bytes of RAM that this process needs: anonymous and shared memory.

    Mapped files are left out: their pages are the page cache's, which gives way to others.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.MULTILINE)))


def trim_heap() -> None:
    """Give memory back to the system that was freed; other C libraries than glibc do it at once."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def gpu_taken(gpu: bool) -> int:
    """Return the bytes of this rank's GPU that other processes use, 0 without one."""
    if not gpu:
        return 0
    import torch

    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - torch.cuda.memory_reserved() - CONTEXT)


def limit_gpu(size: float) -> None:
    """Let this process use so many bytes of its GPU, with what CUDA itself takes."""
    import torch

    global _gpu_limit
    _gpu_limit = max(0, size - CONTEXT)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, _gpu_limit / total))


def gpu_room(spare: float = 0) -> float:
    """Return the bytes of its GPU that this process has or may take, less a share of all."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    room = min(free + torch.cuda.memory_reserved(), _gpu_limit)
    return room - spare * gpu_size()


def gpu_size() -> float:
    """Return the bytes of its GPU that this process could have."""
    import torch

    return min(torch.cuda.mem_get_info()[1], _gpu_limit)


def container() -> str | None:
    """Return where this process runs.

    "cpu" or "cuda": in our container image of that kind. "other": in another container. None: in
    no container.
    """
    if image := os.environ.get("ZERO_OFFLOAD_IMAGE"):
        return image
    in_container = any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))
    return "other" if in_container else None


def in_our_image() -> bool:
    """Return whether this is the container image of this project, for CPUs or for GPUs."""
    return container() in ("cpu", "cuda")


def raise_memlock() -> str:
    """Return what raises the limit of locked memory here."""
    if not container():
        return (
            "ulimit -l unlimited (/etc/security/limits.conf); in a container: --ulimit memlock=-1"
        )
    if os.path.exists("/run/.containerenv"):
        # podman without root cannot raise a limit above the host's.
        return (
            "podman run --ulimit memlock=-1; without root: memlock unlimited in the host's "
            "limits.conf, and a new login"
        )
    return "docker run --ulimit memlock=-1"


def memlock_limit() -> int | None:
    """Return the bytes this process may lock; None for no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return None
    match = re.search(r"CapEff:\s*(\w+)", _read("/proc/self/status"))
    return None if match and int(match[1], 16) & CAP_IPC_LOCK else soft


def check_buffers(parameter_bytes: int, optimizer_bytes: int, ranks_here: int) -> None:
    """Raise RunError where a rank's NVMe buffers do not fit the locked-memory limit or the RAM.

    Those of parameters are locked: DeepSpeed's allocator aborts the process where it may not.
    """
    size, free, limit = parameter_bytes + optimizer_bytes, free_memory(), memlock_limit()
    needed = (
        f"{size / GIB:.2f} GiB a rank (parameters {parameter_bytes / GIB:.2f}, "
        f"optimizer {optimizer_bytes / GIB:.2f})"
    )
    fix = "a smaller buffer_count for offload_param in the JSON"
    if limit is not None and parameter_bytes > limit:
        raise RunError(
            "locked memory is too small for the NVMe buffers",
            found=f"{limit / GIB:.4g} GiB (ulimit -l)",
            needed=needed,
            fix=f"ulimit -l unlimited (a container: --ulimit memlock=-1), or {fix}",
            code=DOES_NOT_FIT,
        )
    if size * ranks_here > free:
        raise RunError(
            "not enough free RAM for the NVMe buffers",
            found=f"{free / GIB:.1f} GiB free",
            needed=f"{needed}, {ranks_here} rank(s)",
            fix=fix,
            code=DOES_NOT_FIT,
        )


def die_with_parent() -> None:
    """Let the kernel kill this child when its parent ends. Call it in the child, before exec."""
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def set_allocators(torch: Any) -> None:
    """Set torch's allocators, unless the user did.

    On the GPU: segments that grow, or the gaps between blocks of all sizes cost gigabytes. In
    pinned RAM: blocks of the size that was asked for, as rounding up to a power of two costs 12 %
    of a Llama's weights.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ:
        return
    os.environ["PYTORCH_ALLOC_CONF"] = EXPANDABLE
    try:
        torch._C._accelerator_setAllocatorSettings(f"{EXPANDABLE},{EXACT_PINNED}")
    except (AttributeError, RuntimeError, ValueError):  # an older torch lacks the name or the keys
        torch.cuda.memory._set_allocator_settings(EXPANDABLE)


def pins_exactly() -> bool:
    """Return whether set_allocators makes pinned blocks exact.

    It does where the user set nothing and the installed torch knows EXACT_PINNED: 2.13 does and
    2.11 does not. True where no torch is installed.
    """
    try:
        major, minor = metadata.version("torch").split(".")[:2]
    except metadata.PackageNotFoundError:
        return True
    setting = os.environ.get("PYTORCH_ALLOC_CONF", EXPANDABLE)  # EXPANDABLE: by set_allocators
    unset = "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and setting == EXPANDABLE
    return unset and (int(major), int(minor)) >= (2, 13)
