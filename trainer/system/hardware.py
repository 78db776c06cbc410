"""What the machine has. Imports no torch."""

import os
import re
import resource
from pathlib import Path

from trainer.errors import DOES_NOT_FIT, RunError

# MB; larger blocks are neither rounded up nor kept when they are freed. Equal, or torch may write past a block (pytorch#192722).
EXACT_PINNED = "pinned_max_round_threshold_mb:16,pinned_max_cached_size_mb:16"
EXPANDABLE = "expandable_segments:True"
PASS_GPUS = "docker run --gpus all (podman: --device nvidia.com/gpu=all), or the image of make docker-build TARGET=cpu"
CAP_IPC_LOCK = 1 << 14  # linux/capability.h: with it, mlock has no limit


def gpu_count():
    """CUDA devices that this process may use, by NVML; 0 without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            count = pynvml.nvmlDeviceGetCount()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no driver, no library: there is no GPU to use
        return 0
    return min(count, len(visible.split(","))) if visible is not None else count


def gpus():
    """(CUDA devices that this process may use, the first one's name, bytes of the smallest)."""
    count = gpu_count()
    if not count:
        return 0, "", 0
    import pynvml

    handles = [nvml_handle(i) for i in range(count)]
    name = pynvml.nvmlDeviceGetName(handles[0])
    return (
        count,
        name.decode() if isinstance(name, bytes) else name,
        min(pynvml.nvmlDeviceGetMemoryInfo(h).total for h in handles),
    )


def existing(path):
    """The path, or the nearest folder above it that is there."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def _control_groups():
    """(limit, bytes in use) of the memory control groups that this process is in and that have a limit, both versions of them."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    for root, kind, names in (
        ("/sys/fs/cgroup", "", ("memory.max", "memory.current", "inactive_file", "active_file")),
        (
            "/sys/fs/cgroup/memory",
            "memory",
            (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
                "total_active_file",
            ),
        ),
    ):
        inside = next((line[2] for line in lines if len(line) == 3 and line[1] == kind), "/")
        folders = {
            Path(root),
            *(Path(root + str(p)) for p in (Path(inside), *Path(inside).parents)),
        }
        for folder in folders:
            try:
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):  # not there, or "max"
                continue
            yield (
                limit,
                max(0, used - sum(int(stat.get(name, 0)) for name in names[2:])),
            )  # the kernel gives file pages back


def ram():
    """Bytes of RAM that this process may ever have: the machine's, or the smallest limit of its control groups."""
    return min(
        [
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            *(limit for limit, _ in _control_groups()),
        ]
    )


def nvml_handle(index):
    """NVML's handle of the CUDA device `index` of this process: CUDA_VISIBLE_DEVICES renumbers them, or names them by UUID."""
    import pynvml

    pynvml.nvmlInit()
    visible = [
        v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()
    ]
    name = visible[index] if index < len(visible) else str(index)
    return (
        pynvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdigit()
        else pynvml.nvmlDeviceGetHandleByUUID(name)
    )


def gpu_has_bf16():
    """True where every visible GPU has bf16 (compute capability 8.0, Ampere, or later)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return all(pynvml.nvmlDeviceGetCudaComputeCapability(h)[0] >= 8 for h in handles)
    except Exception:  # an NVML that cannot tell: torch can
        import torch

        return torch.cuda.is_bf16_supported()


def cpu_has_bf16():
    """True where the CPU multiplies bf16 itself (AVX-512-BF16 or AMX). Elsewhere it is emulated, hundreds of times slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def uses_gpu(settings):
    """Whether the run is on CUDA; RunError where CUDA was asked for and there is none."""
    on_cpu = settings.use_cpu or os.environ.get("DS_ACCELERATOR") == "cpu"
    found = 0 if on_cpu else gpu_count()
    if (
        container() == "cuda" and not found
    ):  # the ops in it are CUDA's, and there is no compiler for others
        raise RunError(
            "this is the image for GPUs",
            needed="an NVIDIA GPU",
            found="--use_cpu, or DS_ACCELERATOR=cpu" if on_cpu else "no GPU was passed through",
            fix=PASS_GPUS,
            code=DOES_NOT_FIT,
        )
    if on_cpu:
        return False
    asked = None
    if settings.given("use_cpu"):
        asked = "--use_cpu false"
    elif os.environ.get("DS_ACCELERATOR") == "cuda":
        asked = "DS_ACCELERATOR=cuda"
    elif settings.tf32:
        asked = "--tf32 true"
    if asked and not found:
        raise RunError(
            f"CUDA was asked for ({asked}) and there is none",
            found="no NVIDIA GPU that this process may use",
            fix="nvidia-smi shows what the driver sees, CUDA_VISIBLE_DEVICES what is hidden; or run on the CPU",
        )
    return found > 0


def free_memory():
    """Bytes of RAM that can still be taken: MemAvailable, and what the control groups' limits leave."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0
    )
    return min([free, *(max(0, limit - used) for limit, used in _control_groups())])


def container():
    """Where this process runs: "cpu" or "cuda" in our container image of that kind, "other" in another container, None outside."""
    return os.environ.get("ZERO_OFFLOAD_IMAGE") or (
        "other" if any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) else None
    )


def in_our_image():
    """Whether this is the container image of this project, for CPUs or for GPUs."""
    return container() in ("cpu", "cuda")


def lock_more():
    """What raises the limit of locked memory in a container."""
    if os.path.exists(
        "/run/.containerenv"
    ):  # podman's, which without root raises no limit beyond the host's own
        return "podman run --ulimit memlock=-1; without root: memlock unlimited in the host's limits.conf, and a new login"
    return "docker run --ulimit memlock=-1"


def memlock_limit():
    """Bytes that this process may lock, or None for no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return None
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) & CAP_IPC_LOCK:
            return None
    return soft


def die_with_parent():
    """In a child before exec: the kernel kills it when its parent ends."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def set_allocators(torch):
    """On the GPU segments that grow: the gaps between blocks of all sizes cost gigabytes otherwise. In pinned RAM blocks of their own
    size: torch rounds up to a power of two, 12 % of a Llama's weights. What the user has set stays as it is."""
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ:
        return
    os.environ["PYTORCH_ALLOC_CONF"] = EXPANDABLE
    try:
        torch._C._accelerator_setAllocatorSettings(f"{EXPANDABLE},{EXACT_PINNED}")
    except (
        AttributeError,
        RuntimeError,
        ValueError,
    ):  # an older torch, which does not know these keys, or not this variable
        try:
            torch.cuda.memory._set_allocator_settings(EXPANDABLE)
        except (AttributeError, RuntimeError, ValueError):
            pass


def pins_exactly():
    """Whether set_allocators has its way: the user set nothing, and the torch that is installed knows EXACT_PINNED, as 2.13 does and
    2.11 does not. True where none is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = re.match(r"(\d+)\.(\d+)", version("torch"))
    except PackageNotFoundError:
        return True
    own = (
        "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
        and os.environ.get("PYTORCH_ALLOC_CONF", EXPANDABLE) == EXPANDABLE
    )
    return own and (found is None or (int(found[1]), int(found[2])) >= (2, 13))


def _cpus(path):
    """The CPU numbers of a list such as 0-3,8; empty where the file is not there."""
    try:
        parts = [part.split("-") for part in Path(path).read_text().strip().split(",") if part]
    except OSError:
        return set()
    return {n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)}


def share_cores(allowed, near, siblings):
    """The CPUs of each rank: its part of those near its GPU, and of those near none, whole cores.

    allowed: CPU numbers that may be used. near: a set of CPUs for each rank, empty where unknown. siblings: CPU → the CPUs of its
    core (two with hyperthreading, numbered far apart)."""
    ranks = range(len(near))
    near = [frozenset(n & allowed) for n in near]
    if not all(near):
        near = [frozenset(allowed) for _ in ranks]
    shares = [set() for _ in ranks]
    for pool in {*near, frozenset(allowed - frozenset.union(*near))}:
        cores = sorted({tuple(sorted(siblings(cpu) & pool)) or (cpu,) for cpu in pool})
        own = [rank for rank in ranks if near[rank] == pool] or list(ranks)
        for i, rank in enumerate(own):
            shares[rank].update(
                cpu
                for core in cores[i * len(cores) // len(own) : (i + 1) * len(cores) // len(own)]
                for cpu in core
            )
    return [share or set(allowed) for share in shares]


def _cpus_near(gpu):
    """The CPUs on the NUMA node of a CUDA device; empty where the machine does not say."""
    try:
        import pynvml

        place = pynvml.nvmlDeviceGetPciInfo(
            nvml_handle(gpu)
        ).busId  # 00000000:1B:00.0, where the kernel has 0000:1b:00.0
        place = place.decode() if isinstance(place, bytes) else place
        return _cpus(f"/sys/bus/pci/devices/{place.lower()[-12:]}/local_cpulist")
    except Exception:  # no NVML, or a virtual machine that hides its buses
        return set()


def bind_cores(local_rank, ranks_here, gpu):
    """Bind this process, all its threads and those to come, to the rank's own cores. Memory that it takes from then on lies beside
    them. Returns the CPU numbers."""
    near = [_cpus_near(i) if gpu else set() for i in range(ranks_here)]
    mine = share_cores(
        os.sched_getaffinity(0),
        near,
        lambda cpu: _cpus(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"),
    )[local_rank]
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), mine)
        except ProcessLookupError:  # it has just ended
            pass
    return mine


def check_locked_memory(parameter_bytes, optimizer_bytes, ranks_here):
    """Refuse NVMe buffers beyond the locked-memory limit: DeepSpeed's allocator aborts the process there."""
    needed = parameter_bytes + optimizer_bytes
    limit = memlock_limit()
    detail = f"{needed / 2**30:.2f} GiB a rank (parameters {parameter_bytes / 2**30:.2f}, optimizer {optimizer_bytes / 2**30:.2f})"
    if limit is not None and needed > limit:
        raise RunError(
            "locked memory is too small for the NVMe buffers",
            found=f"{limit / 2**30:.4g} GiB (ulimit -l)",
            needed=detail,
            fix="ulimit -l unlimited (a container: --ulimit memlock=-1), or a smaller "
            "sub_group_size and buffer_count in the JSON",
            code=3,
        )
    if needed * ranks_here > free_memory():
        raise RunError(
            "not enough free RAM for the NVMe buffers",
            found=f"{free_memory() / 2**30:.1f} GiB free",
            needed=f"{detail}, {ranks_here} rank(s)",
            fix="a smaller sub_group_size and buffer_count in the JSON",
            code=3,
        )


def choose_precision(settings, config, gpu, path):
    """(bf16, fp16 or fp32, why). Writes the choice into the configuration's own switches."""
    asked = {}
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise RunError(
            "fp8 is not supported",
            found="ACCELERATE_MIXED_PRECISION=fp8",
            needed="bf16, fp16 or fp32: ZeRO-3 offload keeps its parameters in one of these",
        )
    if settings.precision != "auto":
        asked[f"--precision {settings.precision}"] = settings.precision
    refused = False
    for name in ("bf16", "fp16"):
        if settings.given(name):
            if settings.values[name]:
                asked[f"--{name}"] = name
            else:
                refused = True
        switch = (config.get(name) or {}).get("enabled", "auto")
        if switch is True:
            asked[f"{path}: {name}.enabled"] = name
    if len(set(asked.values())) > 1:
        raise RunError(
            "two precisions were asked for", found=", ".join(asked), needed="one of them"
        )
    if asked:
        reason, precision = next(iter(asked.items()))
    elif refused:
        precision, reason = "fp32", "bf16 or fp16 was switched off"
    elif gpu:
        bf16 = gpu_has_bf16()
        precision, reason = ("bf16", "the GPU has it") if bf16 else ("fp16", "the GPU has no bf16")
    elif cpu_has_bf16():
        precision, reason = "bf16", "the CPU has AVX-512-BF16 or AMX"
    else:
        precision, reason = "fp32", "the CPU would emulate bf16"
    if precision == "fp16" and not gpu:
        raise RunError("fp16 needs a GPU", found=reason, needed="--precision auto, bf16 or fp32")
    if precision == "bf16" and gpu and not gpu_has_bf16():
        raise RunError(
            "the GPU has no bf16",
            found=reason,
            needed="--precision auto or fp16; bf16 came with Ampere",
        )
    for name in ("bf16", "fp16"):
        config[name] = {**(config.get(name) or {}), "enabled": precision == name}
    return precision, reason
