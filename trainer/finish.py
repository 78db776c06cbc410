"""The end of a run: the last evaluation, the export, and what is said of it."""

import os
from pathlib import Path
from typing import Any

from trainer import ROOT
from trainer.checkpoint import resume
from trainer.config.flags import parse_size
from trainer.console import say
from trainer.distributed import all_gather_object, is_main_process
from trainer.errors import DONE, FAILED, RunError, script_line
from trainer.export.model import export
from trainer.export.model_card import model_card
from trainer.export.writer import BrokenOff, processor_files
from trainer.monitor import stopping
from trainer.plan.report import PlanReport
from trainer.run_dir import Phase
from trainer.stages import Run
from trainer.system import default_model
from trainer.system.swap_dir import SwapSpace
from trainer.trainer import OffloadTrainer


def finish(
    run: Run, trainer: OffloadTrainer, prediction: PlanReport, space: SwapSpace | None
) -> int:
    """Evaluate once more, export, and say how the run went. Returns the exit code."""
    if len(trainer.data.validation) and trainer.evaluated_at != trainer.state.global_step:
        trainer.evaluate()
    if code := stopping.exit_code(trainer):
        return code
    step = trainer.state.global_step
    trainer.guards.check_some_step_was_made(step)
    trainer.check_weights()
    trainer.check_directory()
    if run.settings.export:
        trainer.write_heartbeat(Phase.EXPORT)
        try:
            export_model(run, trainer)
        except BrokenOff:
            return stopping.exit_code(trainer)
    trainer.check_directory()
    peak = run.ram.peak()
    peaks = all_gather_object(peak)
    if is_main_process():
        trainer.write_heartbeat(Phase.DONE)
        host_bytes = sum(peaks[: run.ranks.here])
        swap_bytes = space.size() if space else 0
        prediction.compare(trainer.state.log_history, host_bytes, swap_bytes)
        _print_summary(run, trainer, peak)
    if trainer.failed_saves:
        stands = [str(trainer.last_saved)] if trainer.last_saved else []
        stands += [str(run.directory.export)] if run.settings.export else []
        raise RunError(
            "the last checkpoint could not be saved",
            found=f"on disk: {', '.join(stands) or 'nothing of this run'}",
            fix=f"free space under {run.directory}, then {resume.command(run.directory)}",
            code=FAILED,
        )
    if not run.settings.export and trainer.saved_step != step:
        say(
            f"note: the weights after step {step} are not on disk, as --export is false and "
            f"--save_strategy is {run.settings.save_strategy}"
        )
    return DONE


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
    breaks_off = trainer.parts.preemption.breaks_off
    fingerprint, others = trainer.parts.checkpointer.description["base"], []
    model: Any = trainer.model
    if settings.method != "lora" and is_main_process():
        others = processor_files(run.model, settings.model_revision, model.config)
    tokenizer = trainer.processing_class
    export(model, tokenizer, target, card, limit, breaks_off, fingerprint, others)


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
        merge = script_line("export", "--merge", str(directory))
        print(f"adapter: {directory.export}; a merged model: {merge}")
    elif settings.export:
        print(f"model: {directory.export}")
