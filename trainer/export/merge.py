"""Merge a run's LoRA adapter into its base model: a plain model directory."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from data.files import new_directory
from trainer.config.command_line import Parser, command
from trainer.config.settings import RESOLVED
from trainer.console import say
from trainer.errors import DOES_NOT_FIT, DONE, RunError
from trainer.system.hardware import free_memory


def merge(run: Path, output: Path) -> None:
    """Merge a run's adapter into its base model, in RAM, and write a new model directory.

    run: a run directory, or a directory that holds an adapter.
    """
    adapter = run / "export" if (run / "export").is_dir() else run
    if not (adapter / "adapter_config.json").is_file():
        whole = (adapter / "config.json").is_file()
        raise RunError(
            f"{adapter} holds no LoRA adapter",
            needed="adapter_config.json; a run with --method lora that has ended",
            fix="a full fine-tune's export/ is a whole model already" if whole else None,
        )
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
    _check_base(base, adapter)
    if output.exists():
        raise RunError(f"{output} exists", fix="choose another --output, or remove it")
    say(f"loading {base}")
    resolved = run / RESOLVED
    settings = yaml.safe_load(resolved.read_text()) if resolved.is_file() else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        base,
        dtype="auto",
        revision=settings.get("model_revision", "main"),
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.config.use_cache = True
    with new_directory(output) as work:
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(adapter).save_pretrained(work)
        if (adapter / "README.md").is_file():
            shutil.copy(adapter / "README.md", work)
    say(f"merged model: {output}")


def _check_base(base: str, adapter: Path) -> None:
    """Raise RunError where the base model is gone or does not fit in RAM; a hub name passes."""
    if Path(base).is_dir():
        needed = sum(f.stat().st_size for f in Path(base).glob("*.safetensors")) * 1.2
        free = free_memory()
        if needed > free:
            raise RunError(
                "the merged model does not fit in RAM",
                found=f"{free / 1e9:.1f} GB free",
                needed=f"{needed / 1e9:.1f} GB",
                code=DOES_NOT_FIT,
            )
    elif base.startswith("/"):
        raise RunError(
            f"the adapter's base model is gone: {base}",
            fix=f"put it back, or set base_model_name_or_path in {adapter / 'adapter_config.json'}",
        )


@command
def main(argv: list[str] | None = None) -> int:
    """Return the exit code of `launch/export.py`."""
    parser = Parser(
        prog="launch/export.py", description="Merge a run's LoRA adapter into its base model."
    )
    parser.add_argument(
        "--merge",
        metavar="RUN",
        required=True,
        type=Path,
        help="run directory, or a directory that holds an adapter",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where to write the model (default RUN/export-merged)",
    )
    args = parser.parse_args(argv)
    merge(args.merge, args.output or args.merge / "export-merged")
    return DONE
