"""Build DeepSpeed's compiled ops once, into torch's extension cache, with progress.

Run as: python -m trainer.system.ops cpu_adam async_io
"""

import argparse
import ctypes
import fcntl
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from importlib import metadata
from pathlib import Path

from trainer.errors import DOES_NOT_FIT, DONE, RunError, report
from trainer.system.hardware import gpu_count

BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "shm_comm": "ShareMemCommBuilder",
    "pin_memory": "PinMemoryBuilder",
    "async_io": "AsyncIOBuilder",
}
CPU_RANKS_ONLY = ("shm_comm", "pin_memory")  # all-reduce and page locking without CUDA
SECONDS = {"cpu_adam": 84, "shm_comm": 45, "pin_memory": 45, "async_io": 307}  # on two slow cores


def cache_directory():
    """Where torch keeps its extensions."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def use_own_ninja():
    """Put this environment's programs first on PATH. torch calls `ninja` by name: without the environment activated it would find
    none, or another version, and one version builds again what the other has built."""
    own = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != own:
        os.environ["PATH"] = own + os.pathsep + os.environ.get("PATH", "")


def check_tools(names, gpu):
    """Refuse a machine that cannot build, with the line that mends it."""
    if not shutil.which("g++"):
        raise RunError(
            "no C++ compiler", needed="g++", fix="apt-get install g++", code=DOES_NOT_FIT
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise RunError(
            "Python's headers are missing",
            needed=str(header),
            fix="apt-get install python3-dev",
            code=DOES_NOT_FIT,
        )
    if (
        "async_io" in names
        and subprocess.run(
            ["g++", "-x", "c++", "-fsyntax-only", "-"],
            input="#include <libaio.h>\n",
            text=True,
            capture_output=True,
        ).returncode
    ):
        raise RunError(
            "libaio's header is missing",
            needed="libaio.h",
            fix="apt-get install libaio-dev",
            code=DOES_NOT_FIT,
        )
    if gpu:
        check_nvcc()
        check_architectures()


def torch_cuda():
    """The CUDA version that the installed torch was built for, without importing it; None for a CPU build."""
    folder = metadata.distribution("torch").locate_file("torch")
    found = re.search(
        r"^cuda[^=]*= *'([0-9.]+)'", (Path(folder) / "version.py").read_text(), re.MULTILINE
    )
    return found and found[1]


def check_nvcc():
    """Refuse an nvcc that cannot build for this torch. Returns what is there, in words."""
    wanted = torch_cuda()
    if wanted is None:
        raise RunError(
            "there is a GPU, but this torch is a CPU build",
            found=f"torch {metadata.version('torch')}",
            fix="rm -r .venv; make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130",
            code=DOES_NOT_FIT,
        )
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")  # as torch looks for it
    path = (
        Path(home) / "bin" / "nvcc"
        if home
        else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    )
    if not path.is_file():
        raise RunError(
            "nvcc is missing, and DeepSpeed's ops are compiled with it",
            found=f"none at {path}",
            needed=f"the CUDA {wanted} toolkit, as torch was built with",
            fix=f"apt-get install cuda-toolkit-{wanted.replace('.', '-')}, or export CUDA_HOME=/path/to/cuda",
            code=DOES_NOT_FIT,
        )
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = text.split("release ")[1].split(",")[0] if "release " in text else "unknown"
    if found.split(".")[0] != wanted.split(".")[0]:
        raise RunError(
            "nvcc and torch are of different CUDA versions",
            found=f"nvcc {found}",
            needed=f"CUDA {wanted}",
            fix="export CUDA_HOME to the matching toolkit, or make setup TORCH_INDEX=… with torch built for "
            f"CUDA {found}",
            code=DOES_NOT_FIT,
        )
    return f"{found} at {path}, torch is built for {wanted}"


def check_architectures():
    """Refuse GPU architectures that DeepSpeed's builder cannot read."""
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    parts = arch.replace(";", " ").split()
    if any(not re.fullmatch(r"[1-9][0-9]?\.[0-9](\+PTX)?", part) for part in parts):
        mended = [
            m[0]
            for part in re.split("[;, ]+", arch)
            if (m := re.match(r"[1-9][0-9]?\.[0-9]", part))
        ]
        raise RunError(
            "TORCH_CUDA_ARCH_LIST holds an architecture that DeepSpeed cannot read",
            found=arch,
            needed="numbers such as 8.0;9.0",
            fix=f"export TORCH_CUDA_ARCH_LIST='{';'.join(mended)}'"
            if mended
            else "unset TORCH_CUDA_ARCH_LIST",
            code=DOES_NOT_FIT,
        )
    return f"TORCH_CUDA_ARCH_LIST={arch}" if arch else "those of this machine's GPUs"


def needed(config, ranks_here, gpu):
    """The ops that a run with this DeepSpeed configuration loads."""
    zero = config["zero_optimization"]
    devices = [
        (zero.get(tier) or {}).get("device", "none")
        for tier in ("offload_optimizer", "offload_param")
    ]
    names = ["cpu_adam"] if devices[0] != "none" else []
    names += ["async_io"] if "nvme" in devices else []
    return names if gpu or ranks_here == 1 else [*names, "shm_comm"]


def ensure(names):
    """Build what a run lacks, so that the user sees what takes a minute, and a build that was killed holds up nobody for ever."""
    gpu = gpu_count() > 0
    names = [name for name in names if not installed(name, gpu)]
    directories = [_directory(_builder(name)) for name in names]
    if any(is_stale(d / "lock") or not (d / f"{d.name}.so").exists() for d in directories):
        build(names)


def installed(name, gpu):
    """Whether the op came compiled with DeepSpeed's package, as in the container image, for a GPU or for none. Imports no torch."""
    try:
        path, scope = (
            metadata.distribution("deepspeed").locate_file(
                "deepspeed/git_version_info_installed.py"
            ),
            {},
        )
        exec(Path(path).read_text(), scope)  # assignments that DeepSpeed's setup.py wrote
    except (metadata.PackageNotFoundError, OSError):
        return False
    there = scope["installed_ops"]
    return bool(there.get(name) or there.get(f"deepspeed_{name}")) and scope[
        "accelerator_name"
    ] == ("cuda" if gpu else "cpu")


def _builder(name):
    from deepspeed.accelerator import get_accelerator

    # The accelerator's own builder: the CPU one and the CUDA one of an op have the same name and different sources.
    return get_accelerator().create_op_builder(BUILDERS[name])


def _directory(builder):
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(builder.name, verbose=False))


def is_stale(lock):
    """True where the file by which torch locks a build is there and nobody has it open: torch would wait for it for ever."""
    if not lock.exists():
        return False
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(lock.resolve()):
                return False
        except OSError:  # closed in between, or another user's
            continue
    return lock.exists()


def _adam(root):
    source = Path(__file__).parent.parent / "engine" / "adam.c"
    name = hashlib.sha256(source.read_bytes() + platform.machine().encode()).hexdigest()[:16]
    return source, root / "zero-offload-adam" / f"{name}.so"


def folders():
    """Where built ops may lie, as torch finds it. Imports no torch."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(root)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return [cache, *cache.glob("py*")]


def adam_is_built():
    """Whether adam() has nothing to compile."""
    return any(_adam(folder)[1].is_file() for folder in folders())


def adam():
    """Our AdamW (engine/adam.c), loaded; compiled where it is not yet, in a second. RunError where that fails."""
    source, target = _adam(cache_directory())
    if not target.exists():
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "cc", "clang")), None)
        if not compiler:
            raise RunError(
                "no C compiler", needed="gcc", fix="apt-get install gcc", code=DOES_NOT_FIT
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        own = target.with_suffix(f".{os.getpid()}")  # another rank may be at it
        command = [
            *compiler.split(),
            "-O3",
            "-fno-math-errno",
            "-ffp-contract=off",
            "-fopenmp",
            "-shared",
            "-fPIC",
            source,
        ]
        done = subprocess.run([*command, "-o", own, "-lm"], text=True, capture_output=True)
        if done.returncode:
            raise RunError(
                "engine/adam.c could not be compiled",
                found=" ".join(done.stderr.split())[-600:],
                code=DOES_NOT_FIT,
            )
        os.replace(own, target)
    library = ctypes.CDLL(str(target))
    library.adam_step.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    library.adam_wait.argtypes = [ctypes.c_void_p]
    return library


def build(names):
    """Build what is not built yet. One build at a time on a machine; a lock that a killed build left behind is removed."""
    use_own_ninja()
    gpu = gpu_count() > 0
    if gpu:
        names = [n for n in names if n not in CPU_RANKS_ONLY]
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    missing = [n for n in names if not installed(n, gpu)]
    if not missing:
        return
    check_tools(missing, gpu)
    root = cache_directory()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".zero-offload-trainer.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in missing:
            _build_one(name)
    if "cpu_adam" in missing:
        adam()


def _build_one(name):
    builder = _builder(name)
    lock = _directory(builder) / "lock"
    if is_stale(lock):
        lock.unlink(missing_ok=True)
    done = threading.Event()
    started = time.time()

    def tick():
        while not done.wait(10):
            print(
                f"  {name}: compiling, {time.time() - started:.0f} s (about {SECONDS[name]} s on two slow cores)",
                flush=True,
            )

    print(f"building DeepSpeed's {name}", flush=True)
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        builder.load(verbose=False)
    except Exception as error:
        raise RunError(
            f"DeepSpeed's {name} could not be built",
            found=" ".join(str(error).split())[-600:],
            code=DOES_NOT_FIT,
        ) from None
    finally:
        done.set()
    print(f"  {name}: ready after {time.time() - started:.0f} s", flush=True)


def main(argv=None):
    """Exit code of `python -m trainer.system.ops`."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.system.ops", description=__doc__.splitlines()[0]
    )
    parser.add_argument("ops", nargs="+", choices=BUILDERS)
    try:
        build(parser.parse_args(argv).ops)
    except RunError as error:
        report(error)
        return error.code
    return DONE


if __name__ == "__main__":
    sys.exit(main())
