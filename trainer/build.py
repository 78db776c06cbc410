"""The model in ZeRO-3's shards, and the trainer around it."""

import json
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, TrainingArguments, set_seed

from data import storage
from data.errors import disk_errors
from trainer.checkpoint.base import fingerprint
from trainer.checkpoint.files import SavedCheckpoint
from trainer.checkpoint.save import Checkpointer
from trainer.console import say
from trainer.distributed import all_gather_object, is_main_process, on_all_ranks
from trainer.engine import loading
from trainer.engine.fused_step import Wanted
from trainer.engine.kept_weights import KeptWeights
from trainer.errors import RunError
from trainer.modeling import experts, linear
from trainer.modeling import load as modeling
from trainer.modeling.kept_layers import AUTO, SelectiveCheckpointing
from trainer.modeling.survey import read_past_forward
from trainer.monitor.stopping import PreemptionCallback
from trainer.monitor.telemetry import Telemetry
from trainer.monitor.tracking import Tracker
from trainer.plan.estimate import SPARE_GPU
from trainer.plan.model_shapes import flops_per_token
from trainer.run_dir import versions
from trainer.stages import EnginePlan, Inputs, Run, trackers
from trainer.system import hardware
from trainer.system.swap_dir import SwapSpace
from trainer.trainer import OffloadTrainer, TrainerParts

SAVE_RATE = 5e8  # bytes a second of a save, before one was measured


@dataclass
class RunParts:
    """All that the trainer is built from."""

    run: Run
    inputs: Inputs
    plan: EnginePlan
    arguments: TrainingArguments
    saved: SavedCheckpoint | None
    space: SwapSpace | None


def build_trainer(parts: RunParts, resources: ExitStack) -> OffloadTrainer:
    """Load the model into ZeRO-3's shards and put the trainer together."""
    prepared, settings, plan = parts.run.prepared, parts.run.settings, parts.plan
    set_seed(settings.seed)
    model = load_model(parts)
    layers = modeling.decoder_layers(model)
    keep: Any = settings.kept_layers
    if keep != AUTO or not prepared.gpu:
        keep = int(keep.replace(AUTO, "0"))
    weights: Any = settings.kept_weights
    if weights != AUTO:
        weights = int(weights)
    kept_weights = None
    if weights:
        kept_weights = KeptWeights(layers, model.get_output_embeddings(), weights)
    selective = None
    if keep and settings.gradient_checkpointing:
        largest_batch = settings.per_device_train_batch_size * settings.max_length
        selective = SelectiveCheckpointing(
            layers,
            keep,
            largest_batch,
            plan.attention == "eager",
            kept_weights if weights == AUTO else None,
        )
    base = base_of(parts)
    telemetry = _telemetry(parts)
    resources.callback(telemetry.close)
    tracker = _tracker(parts)
    if tracker:
        resources.callback(tracker.finish)
    checkpointer = _checkpointer(parts, base)
    resources.callback(checkpointer.finish)
    return OffloadTrainer(
        model,
        parts.arguments,
        parts.inputs.data,
        parts.inputs.tokenizer,
        TrainerParts(
            run=parts.run.directory,
            telemetry=telemetry,
            checkpointer=checkpointer,
            preemption=_preemption(parts, checkpointer),
            max_nonfinite_steps=settings.max_nonfinite_steps,
            tracker=tracker,
            saved=parts.saved,
            space=parts.space,
            selective=selective,
            kept_weights=kept_weights,
            pack_length=settings.max_length if settings.packing else None,
            varlen=plan.attention == "varlen",
            fused_loss=settings.optimizes("fused_loss"),
            liger=bool(parts.arguments.use_liger_kernel),
            step=_step(parts),
            offloaded_layers=layers
            if settings.activation_offload and settings.gradient_checkpointing
            else (),
        ),
    )


def _step(parts: RunParts) -> Wanted | None:
    """Return our optimizer step of a run; None where DeepSpeed's own was asked for."""
    prepared, settings = parts.run.prepared, parts.run.settings
    if not prepared.fused_step:
        return None
    overlap = settings.optimizes("overlap_step", gains=prepared.gpu)
    stay = settings.optimizes("resident_weights")
    return Wanted(overlap, parts.plan.config.tiers, parts.plan.gpu_work, stay)


def _load_to_gpu(parts: RunParts) -> bool:
    """Return whether all ranks have their weights on the GPU, and room for them twice."""
    tiers, shapes = parts.plan.config.tiers, parts.plan.shapes
    own = shapes.trainable / parts.run.ranks.world
    if not (parts.run.prepared.gpu and tiers and tiers.weights_in_hbm >= own):
        return False
    return all(all_gather_object(2 * own * shapes.itemsize <= hardware.gpu_room(SPARE_GPU)))


def load_model(parts: RunParts) -> PreTrainedModel:
    """Load the model, and replace its experts and linear layers. Leaf modules come before that."""
    prepared, settings = parts.run.prepared, parts.run.settings
    full = settings.method == "full"
    with loading.trained_weights(_load_to_gpu(parts)) if full else nullcontext():
        model = modeling.build(
            parts.run.model,
            parts.inputs.model_config,
            settings,
            prepared.precision,
            parts.plan.attention,
        )
    layers = modeling.decoder_layers(model)
    # Else ZeRO-3 does not gather all that such a layer reads.
    needed = any(read_past_forward(module) for layer in layers for module in layer.modules())
    leaf = prepared.leaf_modules or needed
    if leaf:
        say(f"leaf module: {modeling.make_leaves(model)}")
    if count := experts.install(model, leaf):
        say(f"experts as grouped products: {count} layers")
    if settings.optimizes("fused_linear"):
        say(f"fused linear layers: {linear.install(layers, leaf)}")
    return model


def base_of(parts: RunParts) -> str | None:
    """Return the fingerprint of the frozen weights beside an adapter; None for a full fine-tune.

    Raises RunError where the checkpoint's adapter belongs to other weights.
    """
    settings, saved = parts.run.settings, parts.saved
    if settings.method != "lora":
        return None

    def read() -> str:
        with disk_errors(f"the weights of {parts.run.model} cannot be read"):
            return fingerprint(parts.run.model, settings.model_revision, settings.trust_remote_code)

    base = "random"
    if not settings.random_weights:
        base, *_ = on_all_ranks(lambda: read() if is_main_process() else None)
    if saved and saved.manifest["base"] != base:
        raise RunError(
            f"the adapter in {saved.folder} belongs to another base model",
            found=f"{parts.run.model} with fingerprint {base}",
            needed=f"the weights with fingerprint {saved.manifest['base']}",
            fix="--model_name_or_path of the run that saved it, unchanged; or a new run",
        )
    return base


def _telemetry(parts: RunParts) -> Telemetry:
    summary, text = parts.inputs.data.summary, parts.inputs.model_config.get_text_config()
    flops = flops_per_token(
        parts.plan.active,
        text.num_hidden_layers,
        text.hidden_size,
        summary.tokens / summary.rows,
        parts.run.settings.method,
    )
    gpu = parts.run.ranks.local if parts.run.prepared.gpu else None
    return Telemetry(parts.run.directory, parts.plan.config.uses_nvme(), flops, gpu)


def _tracker(parts: RunParts) -> Tracker | None:
    settings = parts.run.settings
    if not is_main_process() or not {"wandb", "all"} & set(trackers(settings)):
        return None
    config = {**settings.public(), "run": asdict(parts.run.identity)}
    return Tracker(parts.run.directory, parts.run.directory.path.name, config)


def _checkpointer(parts: RunParts, base: str | None) -> Checkpointer:
    settings, data = parts.run.settings, parts.inputs.data
    if parts.saved and parts.saved.manifest["data"] != data.key:
        say(
            "resume: the training rows are not those of the saved run: the order of the new ones "
            "goes on at the same step"
        )
    public = settings.public()
    description = {
        "settings": public,
        "versions": versions(),
        "data": data.key,
        "base": base,
        "model": parts.plan.definition,
        "config_hash": storage.digest(json.dumps(public, sort_keys=True)),
    }
    run = parts.run
    return Checkpointer(run.directory.path, run.identity, settings.save_total_limit, description)


def _preemption(parts: RunParts, checkpointer: Checkpointer) -> PreemptionCallback:
    guess = 12 * parts.plan.shapes.trainable / parts.run.ranks.world / SAVE_RATE

    def save_fits(seconds: float) -> bool:
        return (checkpointer.seconds or guess) * 1.2 < seconds

    return PreemptionCallback(
        parts.run.directory,
        parts.run.settings.grace_seconds,
        save_fits,
        parts.arguments.device,
    )
