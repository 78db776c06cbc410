"""Build DeepSpeed's compiled ops once, into torch's extension cache, with progress.

Run as: python -m trainer.system.ops cpu_adam async_io
"""

import argparse
import ctypes
import glob
import hashlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from data.errors import disk_errors
from data.files import locked, new_file, user_cache
from trainer import ROOT
from trainer.console import guard_output, report
from trainer.errors import DOES_NOT_FIT, DONE, RunError, make_line, one_line
from trainer.system.hardware import gpu_count

BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "shm_comm": "ShareMemCommBuilder",
    "pin_memory": "PinMemoryBuilder",
    "async_io": "AsyncIOBuilder",
}
CPU_RANKS_ONLY = ("shm_comm", "pin_memory")  # all-reduce and page locking without CUDA
SECONDS = {"cpu_adam": 84, "shm_comm": 45, "pin_memory": 45, "async_io": 307}  # on two slow cores
ADAM_SOURCE = Path(__file__).parent.parent / "engine" / "adam.c"
CannotBuild = partial(RunError, code=DOES_NOT_FIT)
_SECTION_HEADERS = (40, 48), (58, 60), (60, 62)  # in the ELF header: e_shoff, e_shentsize, e_shnum
COMPILER_FLAGS = "-O3 -fno-math-errno -ffp-contract=off -fopenmp -shared -fPIC"


def cache_directory() -> Path:
    """Return where torch keeps its extensions, without importing torch."""
    return Path(
        os.environ.get("TORCH_EXTENSIONS_DIR") or user_cache().with_name("torch_extensions")
    )


def folders() -> list[Path]:
    """Return the directories that may hold built ops: torch adds one a Python and CUDA version."""
    root = cache_directory()
    return [root, *root.glob("py*")]


def use_own_ninja() -> None:
    """Put this environment's programs first on PATH: torch calls `ninja` by name.

    Without the environment activated torch would find none, or another version, and one version
    builds again what the other has built.
    """
    programs = f"{Path(sys.executable).parent}{os.pathsep}"
    path = os.environ.get("PATH", "")
    if not path.startswith(programs):
        os.environ["PATH"] = programs + path


# -- can this machine build? --------------------------------------------------------------------


def check_tools(names: list[str], gpu: bool) -> None:
    """Raise RunError where the machine cannot build these ops. The error names the fix."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    include_aio = "g++ -x c++ -fsyntax-only -include libaio.h /dev/null"
    lacks_aio = "async_io" in names and subprocess.getstatusoutput(include_aio)[0]
    for missing, what, needed, package in (
        (not shutil.which("g++"), "no C++ compiler", "g++", "g++"),
        (not header.is_file(), "Python's headers are missing", header, "python3-dev"),
        (lacks_aio, "libaio's header is missing", "libaio.h", "libaio-dev"),
    ):
        if missing:
            raise CannotBuild(what, needed=needed, fix=f"apt-get install {package}")
    if gpu:
        check_nvcc()
        check_architectures()


def torch_cuda() -> str | None:
    """Return the CUDA version of the installed torch; None for a CPU build. Imports no torch."""
    file = metadata.distribution("torch").locate_file("torch/version.py")
    return runpy.run_path(str(file))["cuda"]  # assignments that torch's setup.py wrote


def check_nvcc() -> str:
    """Return which nvcc there is. Raise RunError where it cannot build for the installed torch."""
    cuda = torch_cuda()
    if cuda is None:
        raise CannotBuild(
            "there is a GPU, but this torch is a CPU build",
            found=f"torch {metadata.version('torch')}",
            fix=f"rm -r {ROOT}/.venv; "
            + make_line("setup TORCH_INDEX=https://download.pytorch.org/whl/cu130"),
        )
    # In the order in which torch looks for it.
    path = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        path = Path(home, "bin/nvcc")
    if not path.is_file():
        raise CannotBuild(
            "nvcc is missing, and DeepSpeed's ops are compiled with it",
            found=f"none at {path}",
            needed=f"the CUDA {cuda} toolkit, as torch was built with",
            fix=f"apt-get install cuda-toolkit-{cuda.replace('.', '-')}, "
            "or export CUDA_HOME=/path/to/cuda",
        )
    text = subprocess.getoutput(f"'{path}' --version")
    release = text.partition("release ")[2].partition(",")[0] or "unknown"
    if release.split(".")[0] != cuda.split(".")[0]:
        raise CannotBuild(
            "nvcc and torch are of different CUDA versions",
            found=f"nvcc {release}",
            needed=f"CUDA {cuda}",
            fix=f"export CUDA_HOME to the matching toolkit, or "
            f"{make_line('setup TORCH_INDEX=…')} with torch built for CUDA {release}",
        )
    return f"{release} at {path}, torch is built for {cuda}"


def check_architectures() -> str:
    """Return the GPU architectures to build for.

    Raises RunError where TORCH_CUDA_ARCH_LIST has one that DeepSpeed's builder cannot read.
    """
    value = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    number = r"[1-9][0-9]?\.[0-9]"
    if not re.fullmatch(rf"[;\s]*({number}(\+PTX)?([;\s]+|$))*", value):
        readable = ";".join(re.findall(rf"\b{number}", value))
        raise CannotBuild(
            "TORCH_CUDA_ARCH_LIST holds an architecture that DeepSpeed cannot read",
            found=value,
            needed="numbers such as 8.0;9.0",
            fix=f"export TORCH_CUDA_ARCH_LIST='{readable}'"
            if readable
            else "unset TORCH_CUDA_ARCH_LIST",
        )
    return f"TORCH_CUDA_ARCH_LIST={value}" if value else "those of this machine's GPUs"


# -- DeepSpeed's ops ----------------------------------------------------------------------------


def needed(optimizer: str, param: str, ranks_here: int, gpu: bool) -> list[str]:
    """Return the ops that a run loads.

    optimizer, param: where states and weights are offloaded to, "none", "cpu" or "nvme".
    """
    loads = {
        "cpu_adam": optimizer != "none",
        "async_io": param == "nvme",  # states on NVMe come through our own ring
        "shm_comm": not gpu and ranks_here > 1,
    }
    return [name for name, loaded in loads.items() if loaded]


def installed(name: str, gpu: bool) -> bool:
    """Return whether DeepSpeed's package came with the op compiled, as in our container image.

    gpu: compiled for CUDA, else for the CPU. Imports no torch.
    """
    try:
        file = metadata.distribution("deepspeed").locate_file(
            "deepspeed/git_version_info_installed.py"
        )
        scope = runpy.run_path(str(file))  # assignments that DeepSpeed's setup.py wrote
    except (metadata.PackageNotFoundError, OSError):
        return False
    compiled = any(scope["installed_ops"].get(key) for key in (name, f"deepspeed_{name}"))
    return compiled and scope["accelerator_name"] == ("cuda" if gpu else "cpu")


def is_stale(lock: Path) -> bool:
    """Return whether a killed build left this lock of torch, which would wait for it for ever.

    The lock is a file that a living build has open.
    """
    if not lock.exists():
        return False
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(lock.resolve()):
                return False
        except OSError:  # closed in between, or another user's
            continue
    return lock.exists()


def ensure(names: list[str]) -> None:
    """Load the ops of a run. What it lacks is built first, with progress.

    The locks of killed builds are removed. Raises RunError where an op cannot be built or loaded.
    """
    gpu = gpu_count() > 0
    what = f"the directory of compiled ops {cache_directory()} cannot be used"
    elsewhere = "export TORCH_EXTENSIONS_DIR=DIR, which this user can write to"
    with disk_errors(what, fix=elsewhere, code=DOES_NOT_FIT):
        directories = [_directory(_builder(name)) for name in names if not installed(name, gpu)]
        if any(is_stale(d / "lock") or not (d / f"{d.name}.so").exists() for d in directories):
            build(names)
        for name in names:
            _load(name, f"DeepSpeed's {name} cannot be loaded")
        if "cpu_adam" in names and adam_is_built():
            adam()  # else it is compiled where it is needed


def build(names: list[str]) -> None:
    """Build the ops that are not installed, one build at a time on a machine.

    Raises RunError where tools are missing or a build fails.
    """
    use_own_ninja()
    gpu = gpu_count() > 0
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    missing = [
        name for name in names if not (gpu and name in CPU_RANKS_ONLY) and not installed(name, gpu)
    ]
    if not missing:
        return
    check_tools(missing, gpu)
    with locked(cache_directory() / ".zero-offload-trainer.lock"):
        for name in missing:
            _build_one(name)
    if "cpu_adam" in missing:
        adam()


def _builder(name: str) -> Any:
    """Return the accelerator's own builder of an op.

    The CPU's and CUDA's builder of an op have the same name and different sources.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return accelerator.create_op_builder(BUILDERS[name])


def _directory(builder: Any) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(builder.name, verbose=False))


def _build_one(name: str) -> None:
    builder = _builder(name)
    lock = _directory(builder) / "lock"
    if is_stale(lock):
        lock.unlink(missing_ok=True)
    done = threading.Event()
    started = time.time()

    def print_progress() -> None:
        while not done.wait(10):
            seconds = f"{time.time() - started:.0f} s (about {SECONDS[name]} s on two slow cores)"
            print(f"  {name}: compiling, {seconds}", flush=True)

    print(f"building DeepSpeed's {name}", flush=True)
    threading.Thread(target=print_progress, daemon=True).start()
    try:
        _load(name, f"DeepSpeed's {name} could not be built")
    finally:
        done.set()
    print(f"  {name}: ready after {time.time() - started:.0f} s", flush=True)


def _load(name: str, failed: str) -> None:
    """Load an op; DeepSpeed builds it where it is missing. Raises RunError, or OSError of a disk.

    failed: what the error says.
    """
    builder = _builder(name)
    try:
        folder = _directory(builder)
        for library in (*folder.glob("*.so"), *folder.with_name("pin_memory").glob("*.so")):
            _check_whole(library)  # async_io loads pin_memory too
        builder.load(verbose=False)
    except OSError:
        raise
    except Exception as error:  # it is damaged, of another Python or machine, or lacks a library
        fix = f"rm -r {_directory(builder)}, then {make_line('setup')}"
        if name == "async_io":
            fix = f"apt-get install libaio-dev (it brings libaio.so.1); or {fix}-aio"
        raise CannotBuild(failed, found=one_line(error, None)[-600:], fix=fix) from None


def _check_whole(library: Path) -> None:
    """Raise ImportError for a library that is cut short: to load it would kill the process.

    The headers of its sections come last (System V ABI, ELF header; 64 bits, little-endian).
    """
    with open(library, "rb") as file:
        header = file.read(64)
    begin, size, count = (int.from_bytes(header[a:b], "little") for a, b in _SECTION_HEADERS)
    needed, found = max(begin + size * count, 64), library.stat().st_size
    if found < needed:
        raise ImportError(f"{library} is cut short: {found:,} of {needed:,} bytes")


# -- our own AdamW (engine/adam.c) --------------------------------------------------------------


def adam() -> ctypes.CDLL:
    """Load our AdamW. It is compiled first where it is not yet, in a second.

    Raises RunError where that fails.
    """
    library_path = _adam_library(cache_directory())
    if not library_path.exists():
        _compile_adam(library_path)
    try:
        _check_whole(library_path)
        library = ctypes.CDLL(str(library_path))
    except (OSError, ImportError) as error:
        raise CannotBuild(
            "our AdamW cannot be loaded", found=error, fix=f"rm {library_path}, and start again"
        ) from None
    library.adam_step.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.adam_wait.argtypes = [ctypes.c_void_p]
    return library


def adam_is_built() -> bool:
    """Return whether adam() has nothing to compile."""
    return _adam_library(cache_directory()).is_file()


def _adam_library(root: Path) -> Path:
    """Return where our AdamW is once it is compiled. The name is the hash of source and machine."""
    content = ADAM_SOURCE.read_bytes() + platform.machine().encode()
    return root / "zero-offload-adam" / f"{hashlib.sha256(content).hexdigest()[:16]}.so"


def _compile_adam(target: Path) -> None:
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "cc", "clang")), None)
    if not compiler:
        raise CannotBuild("no C compiler", needed="gcc", fix="apt-get install gcc")
    with new_file(target) as output:  # another rank may compile it too
        process = subprocess.run(
            [*f"{compiler} {COMPILER_FLAGS}".split(), ADAM_SOURCE, "-o", output, "-lm"],
            encoding="utf-8",
            errors="replace",
            capture_output=True,
        )
        if process.returncode:
            raise CannotBuild(
                "engine/adam.c could not be compiled",
                found=one_line(process.stderr, None)[-600:],
            )


def main() -> int:
    """Return the exit code of `python -m trainer.system.ops`."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.system.ops", description="Build DeepSpeed's compiled ops once."
    )
    parser.add_argument("ops", nargs="+", choices=BUILDERS)
    guard_output()
    try:
        build(parser.parse_args().ops)
    except RunError as error:
        report(error)
        return error.code
    return DONE


if __name__ == "__main__":
    sys.exit(main())
