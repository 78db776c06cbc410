"""Checks of Python, its packages, and what compiles DeepSpeed's ops. No torch."""

import subprocess
import sys
from importlib import metadata

from trainer.doctor.check import FAILURE, OK, WARNING, Check, Options, judge
from trainer.errors import make_line
from trainer.system import hardware, ops

DEEPSPEED = "0.19.8"
# What every run imports. Others are needed by a flag, or come with one of these.
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "hjson",
    "pyyaml",
    "numpy",
    "psutil",
    "tqdm",
    "xxhash",
)


def python(options: Options) -> Check:
    return judge(
        (3, 10) <= sys.version_info[:2] <= (3, 12),
        sys.version.split()[0],
        "3.10 to 3.12",
        make_line("setup PYTHON=/path/to/python3.11"),
        fatal=True,
    )


def packages(options: Options) -> Check:
    versions, missing = {}, []
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check(
            FAILURE, f"missing: {', '.join(missing)}", "what setup.py names", make_line("setup")
        )
    return judge(
        versions["deepspeed"].split("+")[0] == DEEPSPEED,
        ", ".join(f"{name} {versions[name]}" for name in PACKAGES[:3]),
        f"deepspeed {DEEPSPEED}: this trainer extends the inside of one version",
        make_line("setup"),
        fatal=True,
    )


def compiler(options: Options) -> Check:
    names = _ops_of(options)
    if all(map(_is_built, names)) and ops.adam_is_built():
        return Check(OK, "not needed: the ops are built")
    ops.check_tools(names, False)
    version = subprocess.getoutput("g++ -dumpfullversion")
    libaio = ", libaio" if options.nvme else ""
    return Check(OK, f"g++ {version}, Python's headers{libaio}")


def nvcc(options: Options) -> Check:
    if not options.gpus:
        return Check(OK, "not needed without a GPU")
    if _is_built("cpu_adam") and ops.torch_cuda():
        return Check(OK, "not needed: the ops are built")
    return Check(OK, ops.check_nvcc())


def architectures(options: Options) -> Check:
    return Check(OK, ops.check_architectures())


def op_builds(options: Options) -> Check:
    locks = [str(p) for root in ops.folders() for p in root.glob("*/lock") if ops.is_stale(p)]
    if locks:
        return Check(
            FAILURE,
            f"locks of builds that were killed: {', '.join(locks)}",
            "none: torch waits for them for ever",
            f"rm {' '.join(locks)}",
        )
    names = _ops_of(options)
    missing = [name for name in names if not _is_built(name)]
    if not missing:
        return Check(OK, f"{', '.join(names)} are built")
    seconds = sum(ops.SECONDS[name] for name in missing)
    return Check(
        WARNING,
        f"not built yet: {', '.join(missing)}",
        f"built once, about {seconds} s on two slow cores",
        make_line("setup-aio" if options.nvme else "setup"),
    )


def _ops_of(options: Options) -> list[str]:
    return ["cpu_adam", "async_io"] if options.nvme else ["cpu_adam"]


def _is_built(name: str) -> bool:
    # The GPUs' image without one has CUDA's ops: only the GPU is missing.
    gpu = hardware.gpu_count() > 0 or hardware.container() == "cuda"
    return ops.installed(name, gpu) or any(
        (root / name / f"{name}.so").is_file() for root in ops.folders()
    )


CHECKS = [python, packages, compiler, nvcc, architectures, op_builds]
