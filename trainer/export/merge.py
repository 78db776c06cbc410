"""A run's LoRA adapter merged into its base model: a plain model directory."""

import argparse
import os
import shutil
from pathlib import Path

import yaml

from trainer.config.flags import RESOLVED
from trainer.errors import DONE, RunError, report
from trainer.system.hardware import free_memory


def merge(run, output):
    """Merge a run's LoRA adapter into its base model, in RAM, and write a plain model directory."""
    adapter = Path(run) / "export" if (Path(run) / "export").is_dir() else Path(run)
    if not (adapter / "adapter_config.json").is_file():
        raise RunError(
            f"{adapter} holds no LoRA adapter",
            needed="adapter_config.json; a run with --method lora that has ended",
            fix="a full fine-tune's export/ is a whole model already"
            if (adapter / "config.json").is_file()
            else None,
        )
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if Path(base).is_dir():
        needed = sum(f.stat().st_size for f in Path(base).glob("*.safetensors")) * 1.2
        if needed > free_memory():
            raise RunError(
                "the merged model does not fit in RAM",
                found=f"{free_memory() / 1e9:.1f} GB free",
                needed=f"{needed / 1e9:.1f} GB",
                code=3,
            )
    elif base.startswith("/"):
        raise RunError(
            f"the adapter's base model is gone: {base}",
            fix=f"put it back, or set base_model_name_or_path in {adapter / 'adapter_config.json'}",
        )
    output = Path(output or Path(run) / "export-merged")
    if output.exists():
        raise RunError(f"{output} exists", fix="choose another --output, or remove it")
    print(f"loading {base}", flush=True)
    # As the run loaded it: of the same revision, and with the model's own code only if that was allowed then.
    told = Path(run) / RESOLVED
    told = yaml.safe_load(told.read_text()) if told.is_file() else {}
    options = {
        "revision": told.get("model_revision", "main"),
        "trust_remote_code": told.get("trust_remote_code", False),
    }
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", low_cpu_mem_usage=True, **options
    )
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    work = output.parent / f".making-{output.name}"
    shutil.rmtree(work, ignore_errors=True)
    model.config.use_cache = True
    model.save_pretrained(work)
    AutoTokenizer.from_pretrained(str(adapter)).save_pretrained(work)
    if (adapter / "README.md").is_file():
        shutil.copy(adapter / "README.md", work)
    os.rename(work, output)
    print(f"merged model: {output}", flush=True)
    return output


def main(argv=None):
    """Exit code of `launch/export.py`."""
    parser = argparse.ArgumentParser(
        prog="launch/export.py", description="Merge a run's LoRA adapter into its base model."
    )
    parser.add_argument(
        "--merge",
        metavar="RUN",
        required=True,
        help="run directory, or a directory that holds an adapter",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where to write the model (default RUN/export-merged)"
    )
    args = parser.parse_args(argv)
    try:
        merge(args.merge, args.output)
    except RunError as error:
        report(error)
        return error.code
    return DONE
