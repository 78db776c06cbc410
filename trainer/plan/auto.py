"""`--deepspeed auto`: train with what the plan chooses for this model on this machine.

Does not import torch.
"""

import json
import os
from pathlib import Path

from trainer.config.device import choose_precision, uses_gpu
from trainer.config.ds_config import CONFIGS, DeepSpeedConfig
from trainer.config.settings import Settings
from trainer.console import say
from trainer.distributed import ranks_on_this_machine
from trainer.errors import DOES_NOT_FIT, RunError, one_line, script_line
from trainer.plan import model_shapes
from trainer.plan.machine import Machine, probe
from trainer.plan.micro_batch import compare
from trainer.plan.output import as_table, comparison
from trainer.plan.remedy import remedy, why_not
from trainer.plan.skeleton import Source
from trainer.plan.workload import TrainingJob
from trainer.system import swap_dir

AUTO = "auto"
SHOWN = ("configuration", "rows x steps", "s a step", "tok/s a GPU", "")
MICRO_BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


def choose(settings: Settings) -> None:
    """Write the best configuration, micro-batch and accumulation into the settings.

    The rows of an optimizer step stay what was given. Raises RunError (DOES_NOT_FIT) where nothing
    fits.
    """
    gpu = uses_gpu(settings)
    precision, _ = choose_precision(settings, DeepSpeedConfig.load(CONFIGS / "ds_z3.json"), gpu)
    job = TrainingJob.of_run(settings, _model(settings), precision, gpu)
    machine = _machine(settings, gpu)
    if settings.given(MICRO_BATCH) or settings.given(ACCUMULATION):
        job.tokens_per_step = settings.rows_per_step(machine.ranks) * job.max_length
    predictions = compare(job, machine)
    best = predictions[0]
    if best.short:
        raise RunError(
            "no configuration fits this machine",
            found="; ".join(f"{other.name}: {why_not(other, best)}" for other in predictions),
            needed=remedy(job, machine) or "another machine",
            fix=script_line("plan", "--help"),
            code=DOES_NOT_FIT,
        )
    rows = [{column: row[column] for column in SHOWN} for row in comparison(predictions)]
    rows[0][""] = "chosen"
    say(f"--deepspeed auto\n{as_table(rows)}\n")
    settings.set("deepspeed", f"{best.name}.json", "plan")
    settings.set(MICRO_BATCH, best.micro_batch, "plan")
    settings.set(ACCUMULATION, best.accumulation, "plan")


def _model(settings: Settings) -> model_shapes.ModelSpec:
    """Return the run's model, by directory or hub name; the default model where it has none."""
    name, trusted = settings.model_name_or_path, settings.trust_remote_code
    if name is None:
        return model_shapes.built_in("smollm2-135m")
    if Path(name).is_dir():
        return model_shapes.find(name, trusted)
    try:
        from huggingface_hub import hf_hub_download

        revision = settings.model_revision
        path = Path(hf_hub_download(name, "config.json", revision=revision))
        content = json.loads(path.read_text(encoding="utf-8"))
        source = Source(name, revision, trusted)
        return model_shapes.from_dict(content, name, f"{name}/config.json", source)
    except RunError:
        raise
    except Exception as error:  # a dozen kinds, by network, right and name
        raise RunError(
            f"--deepspeed auto needs the shapes of {name}",
            found=one_line(error, 200),
            needed="its config.json: network, and for a gated model HF_TOKEN; or a local directory",
            fix="--deepspeed ds_z3_offload.json",
        ) from None


def _machine(settings: Settings, gpu: bool) -> Machine:
    """Return this machine, by what does not change from one rank or moment to the next."""
    ranks_here = ranks_on_this_machine()
    machine = probe(settings.nvme_path, ranks_here if gpu else 0, measure=False)
    machine.cpu_ranks = ranks_here
    machine.nodes = max(1, int(os.environ.get("WORLD_SIZE") or ranks_here) // ranks_here)
    try:
        swap_dir.check_directory(settings.nvme_path, settings.allow_any_swap_filesystem)
    except RunError:
        machine.nvme = 0
    return machine
