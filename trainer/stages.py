"""The stages of a run before its model is loaded. Each takes what it needs of those before it."""

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import disk_errors
from data.files import write_atomically
from trainer import data_setup
from trainer.checkpoint import base, load, resume
from trainer.checkpoint.files import SavedCheckpoint, supersede
from trainer.config.ds_config import DeepSpeedConfig, Tiers, ZeroShapes
from trainer.config.flags import all_keys
from trainer.config.settings import Settings, write_yaml
from trainer.console import say, table
from trainer.data_setup import TrainingData
from trainer.distributed import (
    all_gather_object,
    broadcast_object,
    is_main_process,
    on_all_ranks,
)
from trainer.engine.aio import watch_swap_files
from trainer.errors import DOES_NOT_FIT, RunError, one_line, script_line
from trainer.export.writer import rehearse
from trainer.modeling import attention, positions, weights
from trainer.modeling import load as modeling
from trainer.modeling.skeleton import describe
from trainer.monitor.stopping import dump_stacks_on_signal
from trainer.monitor.telemetry import RamSampler
from trainer.plan import output
from trainer.plan.micro_batch import smaller_batch
from trainer.plan.model_shapes import ModelSpec
from trainer.plan.remedy import remedy
from trainer.plan.report import PlannedRun, PlanReport
from trainer.prepare import Prepared
from trainer.process_group import Ranks
from trainer.run_dir import (
    Phase,
    RunDirectory,
    RunIdentity,
    default_run_name,
    run_directory,
    versions,
)
from trainer.system import default_model, hardware, swap_dir
from trainer.system.swap_dir import SwapSpace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments


@dataclass
class Run:
    """A run that has its directory. swap: its swap directory. model: a directory or hub name.

    is_new: the directory holds nothing of a run yet. ram: measures this rank's RAM from the start
    on. identity: known once the checkpoint to resume from is.
    """

    prepared: Prepared
    ranks: Ranks
    directory: RunDirectory
    swap: Path
    model: str
    is_new: bool
    ram: RamSampler
    identity: RunIdentity

    @property
    def settings(self) -> Settings:
        """The settings of the run."""
        return self.prepared.settings


def open_run(prepared: Prepared, ranks: Ranks) -> Run:
    """Make and lock the run directory, on rank 0, and say what runs."""
    from transformers.utils import logging

    settings = prepared.settings
    if not is_main_process():
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = settings.model_name_or_path or str(default_model.ensure())
    name = settings.run_name or default_run_name(settings)
    directory = RunDirectory(broadcast_object(str(run_directory(settings, name))))
    name, is_new = directory.path.name, broadcast_object(not directory.traces())
    # A part of the name: with the pid behind it, it must be a name as well.
    swap = broadcast_object(f"{Path(settings.nvme_path).absolute()}/{name[:40]}-{os.getpid()}")

    def begin() -> None:
        directory.lock(directory.rank_lock)
        try:
            directory.beat(0, Phase.LOAD)
            if "ZERO_OFFLOAD_SUPERVISED" not in os.environ:  # else its supervisor has done it
                directory.withdraw_old_requests()
        except OSError as error:
            raise directory.not_writable(error) from None

    on_all_ranks(lambda: is_main_process() and begin())
    for key, value in (("output_dir", str(directory)), ("run_name", name)):
        settings.set(key, value, settings.sources.get(key, "run"))
    dump_stacks_on_signal(directory, int(os.environ["RANK"]))
    say(f"configuration: {prepared.config.where}")
    device = "CUDA" if prepared.gpu else "CPU"
    say(f"precision: {prepared.precision} ({prepared.reason}); {device}, {ranks.world} rank(s)")
    identity = RunIdentity.new()
    return Run(prepared, ranks, directory, Path(swap), model, is_new, RamSampler(), identity)


def find_checkpoint(run: Run) -> SavedCheckpoint | None:
    """Return the checkpoint to resume from, and let it decide the settings that belong to it."""
    directory, requested = run.directory, run.settings.resume_from_checkpoint
    saved = None
    if requested:
        saved = load.choose(directory.path, requested, directory.read_identity())
    run.identity = broadcast_object(resume.identify(directory, requested, saved))
    if saved is None:
        if requested:
            say("resume: no checkpoint yet, so from the beginning")
        return None
    differences = resume.reconcile(run.settings, saved.manifest, run.ranks.world)
    if differences:
        rows = resume.difference_table(differences)
        say(f"resume: what differs from the run that was saved\n\n{rows}\n")
    return saved


@dataclass
class Inputs:
    """model_config: the model's transformers configuration."""

    model_config: Any
    tokenizer: "PreTrainedTokenizerBase"
    data: TrainingData


def load_inputs(run: Run) -> Inputs:
    """Read the model's configuration and tokenizer, and tokenise the rows."""
    model_config = modeling.load_config(run.model, run.settings)
    tokenizer, added = modeling.load_tokenizer(run.model, run.settings)
    for what in added:
        say(f"tokenizer: given {what}")
    data = data_setup.build_data(
        run.prepared.data,
        run.settings,
        tokenizer,
        model_config.get_text_config().vocab_size,
        data_setup.progress("tokenizing"),
    )
    for message in data.messages:
        say(message)
    if not len(data.validation):
        say("validation: no rows, so nothing is measured but the training loss")
    return Inputs(model_config, tokenizer, data)


@dataclass
class EnginePlan:
    """What follows from the model's shapes. parameters: all of them; attention: the backend.

    gpu_work: bytes of a GPU beside what is placed there by value; 0 where nothing is. active:
    parameters that compute a token, of the routed experts those it goes to. model: as the
    plan sees it. definition: what it computes, for every manifest.
    """

    config: DeepSpeedConfig
    shapes: ZeroShapes
    gpu_work: float
    parameters: int
    active: float
    attention: str | None
    model: ModelSpec
    definition: dict[str, Any]


def plan_engine(run: Run, inputs: Inputs, saved: SavedCheckpoint | None) -> EnginePlan:
    """Resolve DeepSpeed's configuration from the model's shapes, and check what it needs.

    The model is built without memory for this. Raises RunError where the checkpoint is of another
    model, the export would fail, buffers are too small, or locked memory is.
    """
    prepared, settings, ranks = run.prepared, run.settings, run.ranks.world
    skeleton: Any = modeling.skeleton(inputs.model_config, settings)
    choose_checkpointing(settings, skeleton)
    model = ModelSpec.from_description(describe(skeleton), run.model)
    skeleton = modeling.adapted(skeleton, settings)
    shapes = modeling.shapes_of(skeleton, prepared.precision)
    parameters = sum(p.numel() for p in skeleton.parameters())
    if settings.export:
        names = run.model, settings.model_revision
        on_all_ranks(lambda: is_main_process() and rehearse(skeleton, inputs.tokenizer, *names))
    if warning := positions.check(skeleton, _positions(settings, inputs.data)):
        say(warning)
    active = model.active
    if settings.method == "lora":
        say(skeleton.selection.report(settings.lora_r))
        active += skeleton.selection.active(settings.lora_r)
    backend = attention.choose(skeleton, settings, prepared.gpu, prepared.precision)
    if saved:
        trained = {n: list(p.shape) for n, p in skeleton.named_parameters() if p.requires_grad}
        load.check_fits(trained, saved)
    definition = define_model(run, saved)
    # 16 bits are those of the run's precision: the checkpoint may be of another one's.
    added = "fp32" if settings.grad_accum_dtype == "fp32" else prepared.precision
    prepared.config.set_grad_accum_dtype(added)
    config, gpu_work = prepared.config.resolved(shapes, ranks, run.swap), 0.0
    if prepared.gpu and (limit := config.limit("hbm")):
        hardware.limit_gpu(limit)
    if config.places_by_value:
        planned = _planned(run, inputs, model, config)
        planned.gpu_taken = max(all_gather_object(hardware.gpu_taken(prepared.gpu)))
        places, gpu_work = on_all_ranks(lambda: _places(planned))[0]
        config = config.placed(places, shapes, ranks)
    config.check_buffers(shapes, ranks)
    buffers = config.locked_bytes(shapes), config.ring_bytes(shapes, ranks)
    hardware.check_buffers(*buffers, run.ranks.here)
    say(
        f"model: {run.model}, {parameters:,} parameters, {shapes.trainable:,} trained "
        f"({settings.method})"
    )
    say(
        f"one optimizer step: {ranks} rank(s) x {settings.per_device_train_batch_size} "
        f"{'packed ' if settings.packing else ''}rows x {settings.gradient_accumulation_steps} "
        f"micro-batches = {settings.rows_per_step(ranks)} rows; gradients are added in {added}"
    )
    return EnginePlan(config, shapes, gpu_work, parameters, active, backend, model, definition)


def _planned(run: Run, inputs: Inputs, model: ModelSpec, config: DeepSpeedConfig) -> PlannedRun:
    summary = inputs.data.summary
    return PlannedRun(
        run.settings,
        config,
        model,
        run.prepared.precision,
        run.prepared.gpu,
        run.ranks.world,
        run.ranks.here,
        inputs.data.train.lengths,
        summary.trained / summary.tokens,
    )


def _places(planned: PlannedRun) -> tuple[Tiers, float]:
    """Return what goes where in this run, and what the work takes of a GPU: rank 0 plans for all.

    Raises RunError (DOES_NOT_FIT) where it does not fit what is free, or may be used.
    """
    if not is_main_process():
        return Tiers(0, 0, 0, 0), 0
    prediction = planned.predict()
    if prediction.short:
        job, machine = prediction.job, prediction.machine
        raise RunError(
            "the run does not fit into the memory that it may use",
            found="; ".join(
                f"{size / 1e9:,.1f} GB of {what} short" for what, size in prediction.short.items()
            ),
            needed=smaller_batch(prediction) or remedy(job, machine) or "another machine",
            fix=f"larger limits in the block tiers, if there are any; {script_line('plan')}",
            code=DOES_NOT_FIT,
        )
    say(output.places_table(prediction))
    return prediction.places, output.gpu_work(prediction)


def choose_checkpointing(settings: Settings, skeleton: Any) -> None:
    """Turn gradient checkpointing off for a model that has none; raise RunError where a flag asks.

    skeleton: the model without adapters.
    """
    if skeleton.supports_gradient_checkpointing or not settings.gradient_checkpointing:
        return
    name = type(skeleton).__name__
    if settings.given("gradient_checkpointing"):
        raise RunError(
            f"{name} does not support gradient checkpointing",
            found=f"gradient_checkpointing true ({settings.sources['gradient_checkpointing']})",
            fix="--gradient_checkpointing false, or leave it out",
        )
    settings.values["gradient_checkpointing"] = False
    if settings.kept_weights == "auto":
        settings.values["kept_weights"] = "0"  # as prepare.check_kept_weights would have it
    say(f"gradient checkpointing: off, as {name} does not support it")


def define_model(run: Run, saved: SavedCheckpoint | None) -> dict[str, Any]:
    """Return what the model computes: its config.json and its own code, once they are loaded.

    Raises RunError where the checkpoint was saved with another model.
    """
    settings = run.settings

    def define() -> dict[str, Any]:
        with disk_errors(f"the model {run.model} cannot be read"):
            found = base.definition(run.model, settings.model_revision, settings.trust_remote_code)
        if saved:
            load.check_same_model(found, saved)
        return found

    return on_all_ranks(lambda: define() if is_main_process() else {})[0]


def _positions(settings: Settings, data: TrainingData) -> int:
    """Return how many positions a sample takes at most; padding of a packed row has some too."""
    if settings.packing:
        return settings.max_length
    return max(int(max(s.lengths, default=0)) for s in (data.train, data.validation))


def check_weights(run: Run, inputs: Inputs) -> None:
    """Refuse a checkpoint that does not hold the model, before ZeRO-3 is on and any is read."""
    settings = run.settings
    if settings.random_weights:
        return

    def check() -> list[str]:
        return weights.check(
            run.model,
            inputs.model_config,
            settings.model_revision,
            settings.trust_remote_code,
        )

    for line in on_all_ranks(check)[0]:
        say(line)


def training_arguments(
    run: Run, inputs: Inputs, plan: EnginePlan, saved: SavedCheckpoint | None
) -> "TrainingArguments":
    """Return transformers' arguments. The model is loaded after this: they turn ZeRO-3 on."""
    from transformers import TrainingArguments

    prepared, settings = run.prepared, run.settings
    arguments = settings.training_arguments()
    arguments.update(
        deepspeed=plan.config.values,
        bf16=prepared.precision == "bf16",
        fp16=prepared.precision == "fp16",
        use_cpu=not prepared.gpu,
        report_to=[t for t in trackers(settings) if t not in ("wandb", "all", "none")] or "none",
        use_liger_kernel=modeling.uses_liger(settings, prepared.gpu),
        liger_kernel_config=modeling.liger_kernels(settings, inputs.model_config),
    )
    if not len(inputs.data.validation):
        arguments.update(eval_strategy="no", eval_on_start=False)
    elif saved:
        arguments["eval_on_start"] = False  # it was measured when the run began
    try:
        made = TrainingArguments(**arguments)
        _check_made(made)
    except RunError:
        raise
    except Exception as error:  # a dozen kinds, by what does not fit
        raise RunError(
            "the training arguments do not fit together", found=one_line(error, 400)
        ) from None
    return made


def _check_made(arguments: "TrainingArguments") -> None:
    """Raise what torch and transformers would raise for the arguments once the model is loaded.

    The learning rate's schedule is made once, to see that its --lr_scheduler_kwargs will do.
    """
    import torch
    from transformers import get_scheduler

    if arguments.torch_compile:
        backends, backend = torch.compiler.list_backends(()), arguments.torch_compile_backend
        if backend not in backends:
            raise RunError(
                f"--torch_compile_backend {backend} is not one of torch's",
                needed=" | ".join(backends),
            )
    options: Any = arguments.lr_scheduler_kwargs
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]),
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=options,
    )


def trackers(settings: Settings) -> list[str]:
    """Return the names of --report_to."""
    names = settings.report_to or []
    return names if isinstance(names, list) else [names]


def write_run_files(
    run: Run, inputs: Inputs, arguments: "TrainingArguments", saved: SavedCheckpoint | None
) -> None:
    """Write what runs into the run directory, on rank 0, and leave what was after the checkpoint.

    Where the directory holds a run, it comes when nothing can refuse this start any more: until
    then nothing there is touched.
    """
    directory, public = run.directory, run.settings.public()
    engine_config: Any = arguments.hf_deepspeed_config

    def write() -> None:
        try:
            # Before a checkpoint is renamed: a run that is killed in between passes it over.
            directory.write_identity(run.identity)
            resume.trim_metrics(directory.metrics, saved.step if saved else 0)
            if saved and run.settings.resume_from_checkpoint != "auto":
                for path in supersede(directory.path, saved.step):
                    say(f"resume: {path.name} is of the line that is left here")
            write_yaml(directory.resolved_config, {**public, "model_name_or_path": run.model})
            write_atomically(
                directory.resolved_ds_config, json.dumps(engine_config.config, indent=2)
            )
            write_atomically(directory.versions, json.dumps(versions(), indent=2))
            if inputs.data.rejected:
                data_setup.write_rejected(directory.rejected, inputs.data.rejected)
                say(f"rejected rows: {directory.rejected}")
        except OSError as error:
            raise directory.not_writable(error) from None

    on_all_ranks(lambda: is_main_process() and write())


def show_settings(run: Run) -> None:
    """Print the settings that are not the defaults, and where they come from."""
    settings, public = run.settings, run.settings.public()
    rows = [("key", "value", "from")]
    rows += [
        (key, str(public[key]), source)
        for key, source in settings.sources.items()
        if key in public and source != "run" and settings.values[key] != all_keys()[key].default
    ]
    say(f"\n{table(rows)}\n")


def predict(run: Run, inputs: Inputs, plan: EnginePlan) -> PlanReport:
    """Predict memory and time of the run, to be compared with what is measured."""
    return PlanReport(run.directory, _planned(run, inputs, plan.model, plan.config))


def reserve_swap_space(run: Run, plan: EnginePlan, resources: ExitStack) -> SwapSpace | None:
    """Take the disk space of the run's swap files, and have them watched. None without NVMe.

    The model is built after this: its parameters go to these files.
    """
    if not plan.config.uses_nvme():
        return None
    space, ranks, first_here = SwapSpace(run.swap, run.identity.id), run.ranks, run.ranks.local == 0
    resources.callback(space.close)
    size = plan.config.swap_bytes(plan.parameters, plan.shapes, ranks.world)
    nvme_path = run.settings.nvme_path
    on_all_ranks(
        lambda: first_here and swap_dir.reclaim(nvme_path), lambda: first_here and space.own()
    )
    rank = int(os.environ["RANK"])
    on_all_ranks(lambda: space.reserve_space(rank, size, ranks.here))
    watch_swap_files(space, plan.config.device("param") == "nvme")
    return space
