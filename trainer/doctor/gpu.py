"""Checks of the GPUs, their driver and their links, by NVML. No torch."""

import os
from pathlib import Path
from typing import Any

from trainer.doctor.check import FAILURE, GIB, OK, WARNING, Check, Options, judge
from trainer.errors import make_line
from trainer.system import hardware, ops

# GB/s of a PCIe lane in one direction, by generation.
PCIE_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}
PCIE_LINK = ("MaxPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkWidth")
NVLINKS = 18  # at most, of one GPU


def _nvml(question: str, gpu: int | None = None, *arguments: int) -> Any:
    """Return NVML's answer, of the driver or of a GPU; None where card or driver has none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = [] if gpu is None else [hardware.nvml_handle(gpu)]
        return getattr(pynvml, question)(*handle, *arguments)
    except Exception:
        return None


def gpu(options: Options) -> Check:
    if options.gpus:
        _, name, memory = hardware.gpus()
        return Check(OK, f"{options.gpus} x {name}, {memory / GIB:.1f} GiB")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible and any(Path("/dev").glob("nvidia[0-9]*")):
        return Check(
            FAILURE,
            "/dev has NVIDIA devices and the driver's library does not answer",
            "libnvidia-ml.so, from the driver",
            "install the driver; in a container: --gpus all (nvidia-container-toolkit)",
        )
    image = hardware.container()
    if image == "cpu":
        return Check(OK, "none: this is the CPU's image")
    found = "none" if visible is None else f"none (CUDA_VISIBLE_DEVICES={visible})"
    if image == "cuda":  # who takes the image for GPUs wants one
        # Not above: it imports hjson, and the doctor has to work where packages are missing.
        from trainer.config.device import PASS_GPUS

        found = "none was passed through" if visible is None else found
        return Check(FAILURE, found, "an NVIDIA GPU", PASS_GPUS)
    return Check(
        WARNING,
        found,
        "an NVIDIA GPU, or --use_cpu: the run is on the CPU",
        "in a container: --gpus all",
    )


def driver(options: Options) -> Check:
    if not options.gpus:
        return Check(OK, "not needed without a GPU")
    version, newest = _nvml("nvmlSystemGetDriverVersion"), _nvml("nvmlSystemGetCudaDriverVersion")
    cuda = ops.torch_cuda()
    major, minor = newest // 1000, newest % 1000 // 10
    fix = "a newer driver"
    if hardware.container():
        fix += " on the host"
    if major == 12 and not hardware.in_our_image():
        fix += ", or " + make_line("setup TORCH_INDEX=https://download.pytorch.org/whl/cu126")
    return judge(
        cuda is None or major >= int(float(cuda)),
        f"{version}, up to CUDA {major}.{minor}",
        f"CUDA {cuda}, as torch is built for",
        fix,
        fatal=True,
    )


def gpu_processes(options: Options) -> Check:
    used = []
    for i in range(options.gpus):
        memory = _nvml("nvmlDeviceGetMemoryInfo", i)
        if memory and memory.used > 1.5 * GIB:
            used.append(f"GPU {i}: {memory.used / GIB:.1f} GiB")
    return judge(
        not used,
        "; ".join(used) or "no other process holds GPU memory",
        "the GPUs' memory",
        "fuser -v /dev/nvidia*, or nvidia-smi: stop the process, or choose another GPU with "
        "CUDA_VISIBLE_DEVICES",
    )


def pcie(options: Options) -> Check:
    links, slow = [], []
    for i in range(options.gpus):
        generation, lanes, most = (_nvml(f"nvmlDeviceGet{name}", i) for name in PCIE_LINK)
        if None in (generation, lanes, most):
            continue
        links.append(f"gen {generation} x{lanes}: {PCIE_LANE.get(generation, 0) * lanes:.0f} GB/s")
        if lanes < min(most, 16):
            slow.append(f"GPU {i} x{lanes} of x{most}")
    text = ", ".join(dict.fromkeys(links)) or "no GPU tells its link"
    return judge(
        not slow,
        "; ".join([text, *slow]),
        "16 lanes: offload moves all weights twice a micro-batch",
        "another slot, or larger micro-batches",
    )


def gpu_links(options: Options) -> Check:
    if options.gpus < 2:
        return Check(OK, "one GPU" if options.gpus else "no GPU")
    links = min(_nvlinks(other) for other in range(1, options.gpus))
    if links:
        return Check(OK, f"NVLink, {links} links from GPU 0 to each other")
    return Check(
        WARNING,
        "PCIe between the GPUs",
        "NVLink: each layer is gathered from all GPUs, over the same PCIe that brings it from RAM, "
        "so that a micro-batch has to be about twice as large to hide it",
        "a larger --per_device_train_batch_size",
    )


def _nvlinks(other: int) -> int:
    """Return how many NVLinks of GPU 0 lead to another one, or to a switch that leads to all."""
    import pynvml

    address = _nvml("nvmlDeviceGetPciInfo", other)
    count = 0
    for link in range(NVLINKS):
        if not _nvml("nvmlDeviceGetNvLinkState", 0, link):
            continue
        remote = _nvml("nvmlDeviceGetNvLinkRemotePciInfo", 0, link)
        kind = _nvml("nvmlDeviceGetNvLinkRemoteDeviceType", 0, link)
        to_other = remote and remote.busId == address.busId
        count += bool(to_other or kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH)
    return count


QUICK = [driver, gpu_processes, pcie, gpu_links]
CHECKS = [gpu, *QUICK]
