"""Fine-tune language models that do not fit the GPU: DeepSpeed ZeRO-3, offload to CPU and NVMe."""

import os
import shlex
import sys
from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).resolve().parent.parent  # holds deepspeed_configs/ and launch/


def script_line(name: str, *words: str) -> str:
    """Return the line that runs launch/<name>.py from the working directory, to be pasted."""
    if _in_root():
        return shlex.join(["python", f"launch/{name}.py", *words])
    return shlex.join([sys.executable, str(ROOT / "launch" / f"{name}.py"), *words])


def make_line(target: str) -> str:
    """Return the line that makes a target of our Makefile from the working directory."""
    return f"make {target}" if _in_root() else f"make -C {shlex.quote(str(ROOT))} {target}"


def _in_root() -> bool:
    return os.path.exists(".") and os.getcwd() == str(ROOT)  # it may have been removed
