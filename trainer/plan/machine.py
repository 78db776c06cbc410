"""The machine that a plan is made for: this one, as probed and measured, or another one by flags.

`launch/bench.py machine` and `launch/bench.py io` measure. Does not import torch.
"""

import json
import math
import os
import re
import shutil
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.files import facts_cache, write_atomically
from trainer.errors import RunError, make_line
from trainer.system import hardware, swap_dir

# Of one GPU: dense bf16 operations a second, bytes a second of PCIe and to another GPU. H100 and
# H200 SXM were measured. The others are the vendors' figures, times 0.8 for the products and for
# the PCIe that H100 reaches of its 63 GB/s.
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
GPU_RATES = ("flops", "pcie", "link")
CPU_FLOPS = 1e11


@dataclass
class Machine:
    """One or several machines that are alike. Sizes are bytes, rates are a second.

    gpus: of one machine, 0 for none. cpu_ranks: processes of one machine without GPUs. gpu_memory,
    pcie, link: of one GPU; pcie from RAM, each way; link between GPUs. ram, nvme: of one machine.
    flops: operations of one GPU, or of the CPU. ram_rate: reads and writes together.
    exact_pinning: pinned RAM is not rounded up (hardware.set_allocators). memlock: RAM that a
    process may lock; None: all. network: between machines, of one. notes: what was assumed.

    The default rates are for what nobody measured: a small GPU, a disk slower than most, 200 Gbit/s
    between machines. ram_rate: the CPU's step reached 117 to 170 with 16 cores beside an H100.
    """

    gpus: int
    gpu_memory: float = 0
    ram: float = 0
    nvme: float = 0
    nvme_read: float = 3e9
    nvme_write: float = 2e9
    pcie: float = 25e9
    link: float = 25e9
    flops: float = 100e12
    ram_rate: float = 120e9
    nodes: int = 1
    name: str = "by flags"
    exact_pinning: bool = True
    memlock: int | None = None
    network: float = 25e9
    cpu_ranks: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def ranks_here(self) -> int:
        """Ranks of one machine."""
        return self.gpus or self.cpu_ranks

    @property
    def ranks(self) -> int:
        """Ranks of all machines."""
        return self.ranks_here * self.nodes


def measured_path() -> Path:
    """Return the file with what was measured on this machine."""
    return facts_cache() / "box.json"


def measured() -> dict[str, Any]:
    """Return what was measured on this machine; {} where nothing was."""
    try:
        values = json.loads(measured_path().read_text(encoding="utf-8"))
        if values["host"] != os.uname().nodename:
            return {}
        return {
            key: value
            for key, value in values.items()
            if isinstance(value, str) or 0 < value < math.inf
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def remember(**values: float | str) -> None:
    """Keep what was measured, beside what was measured before."""
    values = {**measured(), **values, "host": os.uname().nodename}
    write_atomically(measured_path(), json.dumps(values, indent=1))


def disk_of(path: str | Path) -> str:
    """Return what distinguishes the disk from others."""
    return str(os.stat(hardware.existing(path)).st_dev)


def probe(nvme_path: str, use_gpus: int | None = None, measure: bool = True) -> Machine:
    """Return this machine with `use_gpus` of its GPUs, None for all.

    measure: what was never measured is measured now, in a fraction of a second.
    """
    gpus, name, memory = (0, "CPU", 0) if use_gpus == 0 else hardware.gpus()
    if use_gpus is not None and use_gpus > gpus:
        raise RunError(
            "this machine has fewer GPUs",
            found=gpus,
            needed=f"--gpus {use_gpus}",
            fix="for another machine give --gpu_memory and --ram too",
        )
    values, notes, used = measured(), [], [*GPU_RATES, "ram_rate"]
    known = next((KNOWN[key] for key in KNOWN if re.search(rf"\b{key}\b", name)), ())
    rates: dict[str, Any] = dict(zip(GPU_RATES, known))
    if gpus and "flops" not in values:
        notes.append(
            f"rates of {name if known else 'a small GPU'} assumed "
            f"({make_line('bench-machine')} measures them)"
        )
    nvme = 0
    try:
        swap_dir.check_place(nvme_path, any_filesystem=True)  # the run refuses it
        nvme = shutil.disk_usage(hardware.existing(nvme_path)).free
    except RunError as error:
        notes.append(f"no NVMe: {error.found}")
    if values.get("nvme_disk") == disk_of(nvme_path):
        used += ["nvme_read", "nvme_write"]
    elif nvme:
        notes.append(f"a disk of {_disk_rates()} assumed ({make_line('bench-io')} measures it)")
    rates.update({key: values[key] for key in used if key in values})
    if not gpus:
        rates["flops"] = values.get("cpu_flops") or (_cpu_flops() if measure else CPU_FLOPS)
        if measure and "ram_rate" not in values:
            rates["ram_rate"] = _ram_rate()
    if (free := hardware.free_memory()) < 0.8 * hardware.ram():
        notes.append(f"only {free / 1e9:.1f} GB of the RAM are free now")
    return Machine(
        gpus=gpus if use_gpus is None else use_gpus,
        gpu_memory=memory,
        ram=hardware.ram(),
        nvme=nvme,
        name=name,
        exact_pinning=hardware.pins_exactly(),
        memlock=hardware.memlock_limit(),
        notes=notes,
        **rates,
    )


def _disk_rates() -> str:
    return f"{Machine.nvme_read / 1e9:.0f} GB/s read and {Machine.nvme_write / 1e9:.0f} written"


def _best_seconds(function: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of some calls: other programs take cores for moments."""
    return min(timeit.repeat(function, number=1, repeat=9))


def _cpu_flops() -> float:
    """Return the operations a second of an fp32 product on all cores."""
    import numpy as np

    matrix = np.ones((1024, 1024), dtype=np.float32)
    return 2 * 1024**3 / _best_seconds(lambda: matrix @ matrix)


def _ram_rate() -> float:
    """Return the bytes a second, read and written, of copies by one core; twice that by more."""
    import numpy as np

    source, target = np.zeros((2, 2**25), dtype=np.uint8)
    cores = min(2, os.cpu_count() or 1)
    return cores * 2 * source.nbytes / _best_seconds(lambda: np.copyto(target, source))


def from_flags(flags: Mapping[str, Any], here: Machine | None = None) -> Machine:
    """Return the machine that launch/plan.py's flags describe: {flag: value}, None if not given.

    here: this machine, for what is not given; without it that is assumed, and noted. Raises
    RunError for what cannot be assumed, and for contradictions.
    """
    given = {flag: value for flag, value in flags.items() if value is not None}
    gpus = given.get("gpus", here.gpus if here else 1)
    for flag in ("gpu_memory", "pcie", "gpu_tflops", "gpu_link"):
        if not gpus and flag in given:
            raise RunError(
                "a machine without GPUs has none of their memory or speed",
                found=f"--gpus 0 with --{flag}",
                fix=f"leave --{flag} out, or give --gpus",
            )
    assumed = []
    if here is None:
        for flag, example in (("gpu_memory", "80GB"), ("ram", "256GB")):
            if flag not in given and (gpus or flag == "ram"):
                raise RunError(
                    f"--{flag} is missing",
                    found=", ".join(f"--{name}" for name in given),
                    needed="--gpu_memory and --ram for another machine than this one",
                    fix=f"--{flag} {example}",
                )
        here = Machine(gpus, link=given.get("pcie", Machine.link))
        if not gpus:
            here.flops = CPU_FLOPS
        assumed = _assumptions(given, here)
    if given.get("nodes", 1) > 1 and "network" not in given:
        assumed.append(f"{here.network / 1e9:.0f} GB/s between machines (--network)")
    if "gpu_tflops" in given:
        given["flops"] = given.pop("gpu_tflops") * 1e12
    if "gpu_link" in given:
        given["link"] = given.pop("gpu_link")
    if assumed:
        here.notes.append("assumed: " + ", ".join(assumed))
    return replace(here, **given)


def _assumptions(given: Mapping[str, Any], machine: Machine) -> list[str]:
    rows = (
        ("gpu_tflops", machine.gpus, f"{machine.flops / 1e12:.0f} TFLOP/s"),
        ("pcie", machine.gpus, f"PCIe {machine.pcie / 1e9:.0f} GB/s"),
        ("nvme_read", given.get("nvme"), f"NVMe {_disk_rates()}"),
        ("ram_rate", True, f"RAM {machine.ram_rate / 1e9:.0f} GB/s"),
    )
    assumed = [
        f"{text} (--{flag})" for flag, matters, text in rows if matters and flag not in given
    ]
    return assumed + ([] if machine.gpus else [f"{machine.flops / 1e12:.1f} TFLOP/s of the CPU"])
