"""The machine that a plan is made for: probed, measured before (bench.py box, bench.py io), or given by flags. Imports no torch."""
import json
import os
import re
import shutil
from pathlib import Path

from . import hardware
from .args import parse_size
from .errors import RunError
from .plan import Box

# bf16 dense product rate in operations a second, PCIe each way and link between two GPUs in bytes a second. H100 and H200 SXM were
# measured; the others are the vendors' figures, times 0.8 for the products and the PCIe that H100 reaches of its 63 GB/s.
KNOWN = {"H200": (790e12, 54e9, 300e9), "H100": (790e12, 54e9, 300e9), "B200": (1800e12, 54e9, 600e9), "A100": (250e12, 25e9, 200e9),
         "L40S": (290e12, 25e9, 25e9), "L40": (145e12, 25e9, 25e9), "L4": (97e12, 25e9, 25e9), "A10": (100e12, 25e9, 25e9),
         "A6000": (124e12, 25e9, 25e9), "RTX 5090": (168e12, 50e9, 50e9), "RTX 4090": (132e12, 25e9, 25e9),
         "RTX 3090": (57e12, 25e9, 25e9)}
DEFAULT = (100e12, 25e9, 25e9)
RAM_RATE = 120e9  # reads and writes of the CPU's step: 117 to 170 were measured with 16 cores beside an H100
DISK = (3e9, 2e9)  # of an NVMe that nobody has measured: below what most give


def measured_path():
    """Where the benches keep what they measured."""
    return Path(os.environ.get("ZERO_OFFLOAD_CACHE") or "~/.cache/zero-offload-trainer").expanduser() / "box.json"


def measured():
    """What the benches measured on this machine: {} where they never ran."""
    try:
        found = json.loads(measured_path().read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("host") == os.uname().nodename else {}


def remember(values):
    """Add to it."""
    path = measured_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**measured(), **values, "host": os.uname().nodename}, indent=1))


def probe(nvme_path, use_gpus=None, measure=True):
    """This machine, with as many of its GPUs as asked. measure: what nobody measured is measured now, in a fraction of a second."""
    gpus, name, memory = 0, "CPU", 0
    if use_gpus != 0:
        gpus, name, memory = hardware.gpus()
    if use_gpus is not None and use_gpus > gpus:
        raise RunError("this machine has fewer GPUs", found=gpus, needed=f"--gpus {use_gpus}",
                       fix="for another machine give --gpu_memory and --ram too")
    have = measured()
    flops, pcie, link = next((v for k, v in KNOWN.items() if k in name), DEFAULT)
    if not gpus:
        flops = have.get("cpu_flops") or (_cpu_flops() if measure else 1e11)
    return Box(gpus=gpus if use_gpus is None else use_gpus, gpu_memory=memory, ram=hardware.ram(),
               nvme=shutil.disk_usage(hardware.existing(nvme_path)).free, nvme_read=have.get("nvme_read", DISK[0]),
               nvme_write=have.get("nvme_write", DISK[1]), pcie=have.get("pcie", pcie),
               link=have.get("link", link), flops=have.get("flops", flops) if gpus else flops,
               ram_rate=have.get("ram_rate") or (_ram_rate() if measure and not gpus else RAM_RATE), name=name,
               exact_pinning=hardware.pins_exactly())


def _cpu_flops():
    """Operations a second of an fp32 product on all cores, in a tenth of a second."""
    import time

    import numpy as np

    a = np.ones((1024, 1024), dtype=np.float32)
    a @ a
    began = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * 1024**3 / (time.perf_counter() - began)


def _ram_rate():
    """Bytes a second, read and written, of a copy by one core; more cores give more, by as much as twice."""
    import time

    import numpy as np

    a = np.zeros(2**25, dtype=np.uint8)
    b = a.copy()
    began = time.perf_counter()
    for _ in range(4):
        b[:] = a
    return min(2, os.cpu_count() or 1) * 4 * 2 * a.nbytes / (time.perf_counter() - began)


def given(flags):
    """A machine by flags: {flag: text}. What is not given and cannot be derived is an error that names it."""
    def number(name, default):
        text = flags.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not value >= 0 or value == float("inf"):
            raise RunError(f"--{name} is not a number", found=text, needed="0 or more")
        return value

    def size(name, default):
        if flags.get(name) is None:
            return default
        if str(flags[name]).strip() == "0":
            return 0
        return parse_size(flags[name], name)

    def rate(name, default):
        text = flags.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"\s*[0-9.]+\s*[KMGTkmgt][iI]?[Bb]/s\s*", str(text)):
            raise RunError(f"--{name} is not a rate", found=text, needed="such as 12GB/s")
        return parse_size(str(text).strip().removesuffix("/s"), name)

    gpus, nodes = number("gpus", 1), number("nodes", 1)
    if gpus != int(gpus) or nodes != int(nodes) or nodes < 1:
        raise RunError("--gpus and --nodes are whole numbers", found=f"{flags.get('gpus')} and {flags.get('nodes')}",
                       needed="GPUs of one machine, and machines")
    gpu_flags = [f for f in ("gpu_memory", "pcie", "gpu_tflops", "gpu_link") if flags.get(f) is not None]
    if not gpus and gpu_flags:
        raise RunError("a machine without GPUs has none of their memory or speed", found=f"--gpus 0 with --{gpu_flags[0]}",
                       fix=f"leave --{gpu_flags[0]} out, or give --gpus")
    for name in ("gpu_memory",) * bool(gpus) + ("ram",):
        if flags.get(name) is None:
            raise RunError(f"--{name} is missing", found=", ".join(f"--{k}" for k, v in flags.items() if v is not None),
                           needed="--gpu_memory and --ram for another machine than this one", fix=f"--{name} 80GB")
    nvme = size("nvme", 0)
    return Box(gpus=int(gpus), gpu_memory=size("gpu_memory", 0), ram=size("ram", 0), nvme=nvme,
               nvme_read=rate("nvme_read", DISK[0]), nvme_write=rate("nvme_write", DISK[1]), pcie=rate("pcie", DEFAULT[1]),
               link=rate("gpu_link", rate("pcie", DEFAULT[2])),
               flops=number("gpu_tflops", DEFAULT[0] / 1e12) * 1e12 if gpus else 1e11,
               ram_rate=rate("ram_rate", RAM_RATE), nodes=int(nodes), name="by flags")
