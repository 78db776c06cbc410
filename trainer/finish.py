"""The end of a run: the last evaluation, the export, and what is said of it."""

import os
from pathlib import Path
from typing import Any

from trainer import ROOT
from trainer.config.flags import parse_size
from trainer.console import say
from trainer.distributed import all_gather_object, is_main_process
from trainer.export.model import export
from trainer.export.model_card import model_card
from trainer.plan.report import PlanReport
from trainer.run_dir import Phase
from trainer.stages import Run
from trainer.system import default_model
from trainer.system.swap_dir import SwapSpace
from trainer.trainer import OffloadTrainer


def finish(
    run: Run, trainer: OffloadTrainer, prediction: PlanReport, space: SwapSpace | None
) -> None:
    """Evaluate once more, export, and say how the run went."""
    if len(trainer.data.validation) and trainer.evaluated_at != trainer.state.global_step:
        trainer.evaluate()
    if run.settings.export:
        trainer.write_heartbeat(Phase.EXPORT)
        export_model(run, trainer)
    peak = run.ram.peak()
    peaks = all_gather_object(peak)
    if is_main_process():
        trainer.write_heartbeat(Phase.DONE)
        host_bytes = sum(peaks[: run.ranks.here])
        swap_bytes = space.size() if space else 0
        prediction.compare(trainer.state.log_history, host_bytes, swap_bytes)
        _print_summary(run, trainer, peak)


def _evaluations(trainer: OffloadTrainer) -> list[dict[str, Any]]:
    return [record for record in trainer.state.log_history if "eval_perplexity" in record]


def export_model(run: Run, trainer: OffloadTrainer) -> None:
    """Write the model, or its adapter, with a model card."""
    settings, target = run.settings, run.directory.export
    say(f"exporting to {target}")
    is_default = run.model == str(default_model.model_directory())
    base = default_model.HUB_NAME if is_default else run.model
    files = [source.shown for source in run.prepared.data.train]
    data = ", ".join(
        os.path.relpath(file, ROOT) if Path(file).is_relative_to(ROOT) else file for file in files
    )
    card = model_card(settings, base, data, _evaluations(trainer), run.directory)
    limit = parse_size(settings.max_shard_size, "max_shard_size")
    export(trainer.model, trainer.processing_class, target, card, limit)


def _print_summary(run: Run, trainer: OffloadTrainer, peak: int) -> None:
    directory, settings = run.directory, run.settings
    steps = trainer.state.global_step
    print(f"\ndone: {steps} optimizer steps, peak RAM {peak / 2**30:.2f} GiB (rank 0)")
    evaluations = _evaluations(trainer)
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        print(
            f"validation perplexity {first['eval_perplexity']:.2f} -> "
            f"{last['eval_perplexity']:.2f}, token accuracy "
            f"{first['eval_token_accuracy']:.3f} -> {last['eval_token_accuracy']:.3f}"
        )
    print(f"run: {directory}")
    if settings.export and settings.method == "lora":
        merge = f"python launch/export.py --merge {directory}"
        print(f"adapter: {directory.export}; a merged model: {merge}")
    elif settings.export:
        print(f"model: {directory.export}")
