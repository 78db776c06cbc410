"""The machine that a plan is made for: probed, measured before (bench.py box, bench.py io), or given by flags. Imports no torch."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from trainer.config.flags import parse_size
from trainer.errors import RunError
from trainer.plan.estimate import NETWORK, Box
from trainer.system import default_model, hardware, swap_dir

# bf16 dense product rate in operations a second, PCIe each way and link between two GPUs in bytes a second. H100 and H200 SXM were
# measured; the others are the vendors' figures, times 0.8 for the products and the PCIe that H100 reaches of its 63 GB/s.
KNOWN = {
    "H200": (790e12, 54e9, 300e9),
    "H100": (790e12, 54e9, 300e9),
    "B200": (1800e12, 54e9, 600e9),
    "A100": (250e12, 25e9, 200e9),
    "L40S": (290e12, 25e9, 25e9),
    "L40": (145e12, 25e9, 25e9),
    "L4": (97e12, 25e9, 25e9),
    "A10": (100e12, 25e9, 25e9),
    "A6000": (124e12, 25e9, 25e9),
    "RTX 5090": (168e12, 50e9, 50e9),
    "RTX 4090": (132e12, 25e9, 25e9),
    "RTX 3090": (57e12, 25e9, 25e9),
}
DEFAULT = (100e12, 25e9, 25e9)
RAM_RATE = 120e9  # reads and writes of the CPU's step: 117 to 170 were measured with 16 cores beside an H100
DISK = (3e9, 2e9)  # of an NVMe that nobody has measured: below what most give
CPU_FLOPS = 1e11


def measured_path():
    """Where the benches keep what they measured."""
    return (
        Path(os.environ.get("ZERO_OFFLOAD_CACHE") or default_model.cache_directory()).expanduser()
        / "box.json"
    )


def measured():
    """What the benches measured on this machine: {} where they never ran."""
    try:
        found = json.loads(measured_path().read_text())
        if found["host"] != os.uname().nodename:
            return {}
        return {
            k: v for k, v in found.items() if isinstance(v, str) or (v > 0 and math.isfinite(v))
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def remember(values):
    """Add to it."""
    path = measured_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**measured(), **values, "host": os.uname().nodename}, indent=1))


def disk_of(path):
    """What tells one disk from another."""
    return str(os.stat(hardware.existing(path)).st_dev)


def probe(nvme_path, use_gpus=None, measure=True):
    """This machine, with as many of its GPUs as asked. measure: what nobody measured is measured now, in a fraction of a second."""
    gpus, name, memory = 0, "CPU", 0
    if use_gpus != 0:
        gpus, name, memory = hardware.gpus()
    if use_gpus is not None and use_gpus > gpus:
        raise RunError(
            "this machine has fewer GPUs",
            found=gpus,
            needed=f"--gpus {use_gpus}",
            fix="for another machine give --gpu_memory and --ram too",
        )
    have, notes = measured(), []
    flops, pcie, link = next((v for k, v in KNOWN.items() if re.search(rf"\b{k}\b", name)), DEFAULT)
    if not gpus:
        flops = have.get("cpu_flops") or (_cpu_flops() if measure else CPU_FLOPS)
    elif "flops" not in have:
        notes.append(
            f"rates of {name if flops != DEFAULT[0] else 'a small GPU'} assumed (make bench-box measures them)"
        )
    try:
        swap_dir.check_place(nvme_path)
        nvme = shutil.disk_usage(hardware.existing(nvme_path)).free
    except RunError as error:
        nvme = 0
        notes.append("no NVMe: " + str(error).splitlines()[1].partition(":")[2].strip())
    own = have.get("nvme_disk") == disk_of(nvme_path)
    if nvme and not own:
        notes.append(
            f"a disk of {DISK[0] / 1e9:.0f} GB/s read and {DISK[1] / 1e9:.0f} written assumed (make bench-io measures it)"
        )
    if (free := hardware.free_memory()) < 0.8 * hardware.ram():
        notes.append(f"only {free / 1e9:.1f} GB of the RAM are free now")
    return Box(
        gpus=gpus if use_gpus is None else use_gpus,
        gpu_memory=memory,
        ram=hardware.ram(),
        nvme=nvme,
        nvme_read=have.get("nvme_read", DISK[0]) if own else DISK[0],
        nvme_write=have.get("nvme_write", DISK[1]) if own else DISK[1],
        pcie=have.get("pcie", pcie),
        link=have.get("link", link),
        flops=have.get("flops", flops) if gpus else flops,
        ram_rate=have.get("ram_rate") or (_ram_rate() if measure and not gpus else RAM_RATE),
        name=name,
        exact_pinning=hardware.pins_exactly(),
        notes=notes,
    )


def _cpu_flops():
    """Operations a second of an fp32 product on all cores: the best of a few tries, as other programs take cores for moments."""
    import time

    import numpy as np

    a = np.ones((1024, 1024), dtype=np.float32)
    a @ a
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


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


def _number(flags, name, default, least=1, most=1e6):
    text = flags.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise RunError(
            f"--{name} is not a number that can be", found=text, needed=f"{least:g} to {most:g}"
        )
    return value


def _size(flags, name, default, zero=False):
    text = flags.get(name)
    if text is None:
        return default
    if zero and str(text).strip() in ("0", "0GB"):
        return 0
    value = parse_size(text, name)
    if not 1e6 <= value <= 1e17:
        raise RunError(f"--{name} is not a size that can be", found=text, needed="1MB to 100000TB")
    return value


def _rate(flags, name, default):
    text = flags.get(name)
    if text is None:
        return default
    found = re.fullmatch(r"\s*([0-9.]+\s*[KMGTkmgt]i?)B/s\s*", str(text))
    if not found or not re.search("[1-9]", found[1]):
        raise RunError(
            f"--{name} is not a rate",
            found=text,
            needed="bytes a second, such as 12GB/s"
            + (" (b is bits: an eighth)" if "b/s" in str(text) else ""),
        )
    value = parse_size(f"{found[1]}B", name)
    if not 1e6 <= value <= 1e14:
        raise RunError(f"--{name} is not a rate that can be", found=text, needed="1MB/s to 100TB/s")
    return value


def given(flags, here=None):
    """A machine by flags, {flag: text}; what is not given is as `here` has it, another Box, or assumed and noted. What cannot be
    assumed is an error that names it."""
    gpus = _number(flags, "gpus", here.gpus if here else 1, 0, 4096)
    nodes = _number(flags, "nodes", 1, 1, 4096)
    if gpus != int(gpus) or nodes != int(nodes):
        raise RunError(
            "--gpus and --nodes are whole numbers",
            found=f"{flags.get('gpus')} and {flags.get('nodes')}",
            needed="GPUs of one machine, and machines",
        )
    gpu_flags = [
        f for f in ("gpu_memory", "pcie", "gpu_tflops", "gpu_link") if flags.get(f) is not None
    ]
    if not gpus and gpu_flags:
        raise RunError(
            "a machine without GPUs has none of their memory or speed",
            found=f"--gpus 0 with --{gpu_flags[0]}",
            fix=f"leave --{gpu_flags[0]} out, or give --gpus",
        )
    for name, example in [] if here else [("gpu_memory", "80GB")] * bool(gpus) + [("ram", "256GB")]:
        if flags.get(name) is None:
            raise RunError(
                f"--{name} is missing",
                found=", ".join(f"--{k}" for k, v in flags.items() if v is not None),
                needed="--gpu_memory and --ram for another machine than this one",
                fix=f"--{name} {example}",
            )
    nvme = _size(flags, "nvme", here.nvme if here else 0, zero=True)
    base = here or Box(
        gpus=int(gpus),
        gpu_memory=0,
        ram=0,
        nvme=nvme,
        nvme_read=DISK[0],
        nvme_write=DISK[1],
        pcie=DEFAULT[1],
        link=_rate(flags, "pcie", DEFAULT[2]),
        flops=DEFAULT[0] if gpus else CPU_FLOPS,
        ram_rate=RAM_RATE,
        name="by flags",
    )
    assumed = (
        []
        if here
        else [
            f"{text} (--{flag})"
            for flag, text, matters in (
                ("gpu_tflops", f"{DEFAULT[0] / 1e12:.0f} TFLOP/s", gpus),
                ("pcie", f"PCIe {DEFAULT[1] / 1e9:.0f} GB/s", gpus),
                (
                    "nvme_read",
                    f"NVMe {DISK[0] / 1e9:.0f} GB/s read, {DISK[1] / 1e9:.0f} written",
                    nvme,
                ),
                ("ram_rate", f"RAM {RAM_RATE / 1e9:.0f} GB/s", True),
            )
            if matters and flags.get(flag) is None
        ]
    )
    assumed += [f"{CPU_FLOPS / 1e12:.1f} TFLOP/s of the CPU"] * (not gpus and not here)
    assumed += [f"{NETWORK / 1e9:.0f} GB/s between machines (--network)"] * (
        nodes > 1 and flags.get("network") is None
    )
    notes = ([*here.notes] if here else []) + (
        ["assumed: " + ", ".join(assumed)] if assumed else []
    )
    return replace(
        base,
        gpus=int(gpus),
        gpu_memory=_size(flags, "gpu_memory", base.gpu_memory),
        ram=_size(flags, "ram", base.ram),
        nvme=nvme,
        nvme_read=_rate(flags, "nvme_read", base.nvme_read),
        nvme_write=_rate(flags, "nvme_write", base.nvme_write),
        pcie=_rate(flags, "pcie", base.pcie),
        link=_rate(flags, "gpu_link", base.link),
        flops=_number(flags, "gpu_tflops", base.flops / 1e12, 0.01) * 1e12,
        ram_rate=_rate(flags, "ram_rate", base.ram_rate),
        network=_rate(flags, "network", NETWORK),
        nodes=int(nodes),
        notes=notes,
    )
