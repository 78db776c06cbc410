"""OffloadTrainer: transformers.Trainer with our loss, our order of rows and our logging.

The loop itself is transformers'. Evaluation, guards, progress and checkpoint contents are in
export/evaluation.py, monitor/guards.py, monitor/progress.py and checkpoint/contents.py.
"""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from data.dataset import BatchSampler, collate, evaluation_batches
from trainer.checkpoint import contents, load
from trainer.checkpoint.files import SavedCheckpoint
from trainer.checkpoint.save import Checkpointer
from trainer.console import say
from trainer.data_setup import TrainingData
from trainer.distributed import on_all_ranks
from trainer.engine import finite, fused_step, patches
from trainer.engine.activation_offload import offload_inputs
from trainer.engine.kept_weights import KeptWeights
from trainer.errors import FAILED, RunError
from trainer.export.evaluation import evaluate
from trainer.modeling import positions
from trainer.modeling.kept_layers import SelectiveCheckpointing
from trainer.modeling.loss import ChunkedHead, whole_logits
from trainer.modeling.proof import proof_rows, prove
from trainer.modeling.router_loss import RouterLoss
from trainer.monitor import progress
from trainer.monitor.guards import Guards
from trainer.monitor.stopping import PreemptionCallback
from trainer.monitor.telemetry import Telemetry
from trainer.monitor.tracking import Tracker
from trainer.run_dir import Phase, RunDirectory
from trainer.system.swap_dir import SwapSpace

FAILED_SAVES = 3  # in a row; then the run stops rather than go on without a checkpoint
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class TrainerParts:
    """What OffloadTrainer needs beside model, arguments, data and tokenizer.

    saved: the checkpoint to resume from. space: the run's swap files. pack_length: tokens of a
    packed row, or None. varlen: the attention wants to know where samples begin. fused_loss, liger:
    the loss in chunks, by Liger's kernel. step: see engine/fused_step.py; None: DeepSpeed's.
    offloaded_layers: decoder layers whose inputs wait in RAM.
    """

    run: RunDirectory
    telemetry: Telemetry
    checkpointer: Checkpointer
    preemption: PreemptionCallback
    max_nonfinite_steps: int
    tracker: Tracker | None = None
    saved: SavedCheckpoint | None = None
    space: SwapSpace | None = None
    selective: SelectiveCheckpointing | None = None
    kept_weights: KeptWeights | None = None
    pack_length: int | None = None
    varlen: bool = False
    fused_loss: bool = True
    liger: bool = False
    step: fused_step.Wanted | None = None
    offloaded_layers: Sequence[torch.nn.Module] = field(default_factory=list)


def special_tokens(model: Any) -> dict[str, Any]:
    """Return the special tokens that the model's own configuration names."""
    config = model.config.get_text_config()
    tokens = {name: getattr(config, name, None) for name in SPECIAL_TOKENS}
    return {name: token for name, token in tokens.items() if token is not None}


class OffloadTrainer(Trainer):
    """The thin place where engine, callbacks and guards meet."""

    args: TrainingArguments
    model_wrapped: Any  # DeepSpeed's engine, once training begins
    processing_class: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        data: TrainingData,
        tokenizer: PreTrainedTokenizerBase,
        parts: TrainerParts,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation if len(data.validation) else None,
            processing_class=tokenizer,
        )
        self.data, self.parts, self.run = data, parts, parts.run
        self.telemetry = parts.telemetry
        self.guards = Guards(self.run.path, args.process_index, parts.max_nonfinite_steps)
        self.last_saved = parts.saved.folder if parts.saved else None
        self.saved_step = parts.saved.step if parts.saved else None
        self.failed_saves = 0
        self.sampler: Any = None
        self.batches: list[dict[str, Any]] = []  # of the optimizer step that is being made
        self.tokens_of_step = 0
        self.audited = False  # the swap files, after the first optimizer step
        self.metrics: dict[str, float] | None = None  # of the last evaluation
        self.evaluated_at: int | None = None
        # The loss below is a sum over the step's answer tokens divided by their number on all
        # ranks. transformers must count them, and not divide by the micro-batches again.
        self.model_accepts_loss_kwargs = True
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.own_tokens = special_tokens(self.base)
        self.first_position = positions.first(self.base)
        self.head = ChunkedHead.install(self.base, parts.liger) if parts.fused_loss else None
        self.router_loss = RouterLoss.install(self.base)
        self.timed_engine: Any = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.is_world_process_zero():
            self.add_callback(progress.ProgressCallback(self.run, args.world_size))
        self.add_callback(parts.preemption)

    # -- data ----------------------------------------------------------------------------------
    def get_train_dataloader(self) -> Any:
        """Return this rank's batches in the order of BatchSampler."""
        args = self.args
        self.sampler = BatchSampler(
            self.data.train.lengths,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
            args.data_seed if args.data_seed is not None else args.seed,
            str(args.train_sampling_strategy),
            self.parts.pack_length,
            self.data.mixture,
        )
        return torch.utils.data.DataLoader(
            self.data.train,
            batch_sampler=self.sampler,
            num_workers=args.dataloader_num_workers,
            collate_fn=functools.partial(self._collate, pack_length=self.parts.pack_length),
        )

    def _collate(self, packs: list[Any], pack_length: int | None = None) -> dict[str, Any]:
        batch = collate(packs, self.processing_class.pad_token_id, pack_length)
        batch["position_ids"] += self.first_position
        borders, longest = batch.pop("cu_seq_lens"), batch.pop("max_length")
        if self.parts.varlen:
            batch.update(cu_seq_lens_q=borders, cu_seq_lens_k=borders)
            batch.update(max_length_q=longest, max_length_k=longest)
        return batch

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of the next optimizer step; the wait for them is measured."""
        begin = time.perf_counter()
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.telemetry.clock.add("data_wait", time.perf_counter() - begin)
        self.tokens_of_step = sum(batch.pop("tokens") for batch in batches)
        self.batches = batches
        return batches, items

    # -- one micro-batch -----------------------------------------------------------------------
    def _loss_and_correct(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(model, inputs) if self.head else whole_logits(model, inputs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss over the answer tokens of the whole step, on all ranks."""
        clock = self.telemetry.clock
        clock.start("forward")
        loss, _ = self._loss_and_correct(model, inputs)
        if self.router_loss:
            loss = loss + self.router_loss.summed(inputs["labels"])
        # ZeRO averages gradients over the ranks; the sum was divided by the tokens of all of them.
        loss = loss / num_items_in_batch.clamp(min=1) * self.args.world_size
        # An infinite loss can have finite gradients. Times NaN it has none, and ZeRO-3 then skips
        # the optimizer step on every rank. The factor is not chosen after the product: torch.where
        # gives what it leaves out a gradient of 0.
        loss = loss * torch.where(torch.isfinite(loss), 1.0, math.nan)
        clock.stop("forward")
        clock.start("backward")
        return loss

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward, backward and, after the last micro-batch, the optimizer step.

        Returns the loss, and 0 in place of one that is not finite: NaN would stay in the Trainer's
        running sum for good. The guards count it.
        """
        if self.timed_engine is not self.model_wrapped:
            patches.time_step(self.model_wrapped, self.telemetry.clock)
            self.timed_engine = self.model_wrapped
            self.telemetry.restart_window()
        selective, last = self.parts.selective, self.accelerator.gradient_state.sync_gradients
        if selective:
            selective.before_pass(last)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.telemetry.clock.stop("backward")
        if selective:
            selective.after_pass(inputs["labels"].numel(), last)
        if last:
            self._step_ended()
        return torch.nan_to_num(loss)

    def _step_ended(self) -> None:
        """After an optimizer step, or one that DeepSpeed has skipped."""
        step, optimizer = self.state.global_step + 1, self.model_wrapped.optimizer
        self.telemetry.step_done(self.tokens_of_step)
        if not getattr(optimizer, "overflow", False):
            if not self.audited:
                self._audit()
                self.audited = True
            self.guards.step_was_made(step)
        elif getattr(scaler := optimizer.loss_scaler, "dynamic", False) and (
            scaler.cur_scale > scaler.min_scale
        ):
            return  # fp16's loss scale is being lowered, as it should be
        else:
            self.guards.step_was_skipped(step, self._rows_of_step(), self.batches)
            if error := self.guards.too_many(step):
                # Now, whatever is logged and when.
                self.log({"step": step, "loss": math.nan, "grad_norm": math.nan})
                raise error

    def _audit(self) -> None:
        """Check the swap files, of an optimizer step that is made."""
        if self.parts.space:
            fused_step.finish(self.model_wrapped.optimizer)
            self.parts.space.audit()

    def _rows_of_step(self) -> list[dict[str, Any]]:
        """Return file and line of this rank's rows in the optimizer step that is being made."""
        sampler, data = self.sampler, self.data.train
        epoch, step = divmod(self.state.global_step, sampler.steps_per_epoch)
        first = step * sampler.accumulation
        batches = [sampler.batch_at(epoch, first + i) for i in range(len(self.batches))]
        places = [data.place(i) for batch in batches for pack in batch for i in pack]
        return [{"path": data.files[file].shown, "line": line} for file, line in places]

    # -- checkpoints ---------------------------------------------------------------------------
    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        # transformers has given it those of the tokenizer. A model may compute with its own: XGLM
        # makes its positions around the padding's. The generation config keeps the tokenizer's.
        for name, token in self.own_tokens.items():
            setattr(self.base.config.get_text_config(), name, token)
        # Without the path: transformers would hand it to DeepSpeed, whose checkpoints are pickles
        # and lose Adam's state on NVMe.
        parts = self.parts
        with fused_step.wanted(parts.step):
            made = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = self.model_wrapped
        if parts.kept_weights:
            parts.kept_weights.attach(engine)
        if parts.offloaded_layers:
            offload_inputs(parts.offloaded_layers)
        # trainer_state.json brings the saved run's intervals; this run's flags decide.
        self.state.compute_steps(self.args, max_steps)
        if parts.saved:
            load.restore(engine, parts.saved, parts.space)
            contents.apply_position(self, parts.saved)
            say(f"resume: goes on after step {parts.saved.step}")
        self._prove()
        return made

    def _prove(self) -> None:
        """Show with one forward pass that loss and packing are exact. Else whole logits are taken.

        Raises RunError where packed samples see each other.
        """
        tokens, *_ = self.data.train[0]
        length = self.parts.pack_length
        batch = self._collate(proof_rows(tokens, length is not None, length or len(tokens)))
        batch = {k: v.to(self.args.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        engine = self.model_wrapped
        exact = on_all_ranks(lambda: prove(engine, self.base, self.head, batch))
        engine.empty_partition_cache()  # as after an evaluation
        if self.head and not all(exact):
            self.head.remove()
            self.head = None
            say(
                f"loss: {type(self.base).__name__} changes its logits after the head, so they are "
                "made as a whole"
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # A run that is resumed at its end would make one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.parts.saved:
            contents.restore_rng(self.parts.saved.folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        pass  # _prepare_for_training has done it, with the engine at hand

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.perf_counter()
        self._audit()
        self.check_directory()
        self.write_heartbeat(Phase.SAVE)
        position = contents.position(self)
        saved = self.parts.checkpointer.save(self.model_wrapped, self.state, position)
        if saved:
            self.last_saved, self.saved_step = saved, self.state.global_step
            self.failed_saves = 0
            say(f"saved {saved} in {time.perf_counter() - began:.1f} s")
        else:
            self.failed_saves += 1
            if self.failed_saves >= FAILED_SAVES:
                raise RunError(
                    f"{self.failed_saves} checkpoints in a row could not be saved",
                    found=f"the last one that stands is {self.last_saved or 'none'}",
                    fix="free space on the disk of the run directory",
                    code=FAILED,
                )
        self.write_heartbeat(Phase.TRAIN)
        self.telemetry.pause(time.perf_counter() - began)

    def check_directory(self) -> None:
        """Raise RunError, on all ranks, where the run directory is another run's now."""
        identity = self.parts.checkpointer.identity
        on_all_ranks(lambda: self.is_world_process_zero() and self.run.check_ours(identity))

    def check_weights(self) -> None:
        """Raise RunError where a trained weight is not finite: it is not exported."""
        name = finite.first_nonfinite(self.model_wrapped)
        if name is not None:
            raise RunError(
                f"the weights are not finite after step {self.state.global_step}: {name}",
                found=f"the last checkpoint is {self.last_saved or 'none'}",
                fix="a lower --learning_rate, from that checkpoint on",
                code=FAILED,
            )

    def write_heartbeat(self, phase: str) -> None:
        """Write heartbeat.json, on rank 0."""
        if self.is_world_process_zero():
            self.run.beat(self.state.global_step, phase)

    # -- evaluation ----------------------------------------------------------------------------
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure loss, perplexity and token accuracy on the validation rows, and log them."""
        began = time.perf_counter()
        self.write_heartbeat(Phase.EVAL)
        args, rows = self.args, self.data.validation
        metrics = evaluate(
            self.model_wrapped,
            self._loss_and_correct,
            evaluation_batches(
                rows, args.per_device_eval_batch_size, args.process_index, args.world_size
            ),
            lambda batch: self._collate([[rows[i]] for i in batch]),
            args.device,
            self.parts.preemption.breaks_off,
        )
        if metrics is None:
            # Training ends after this, with a checkpoint; the saved run evaluates again.
            self.parts.preemption.on_step_end(args, self.state, self.control)
            say("the evaluation was broken off, as the run stops")
            return {}
        self.evaluated_at, self.metrics = self.state.global_step, metrics
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        self.telemetry.pause(time.perf_counter() - began)
        if not math.isfinite(metrics["eval_loss"]):
            raise RunError(
                f"the validation loss is not finite after step {self.state.global_step}",
                found=f"the last checkpoint is {self.last_saved or 'none'}",
                fix="a lower --learning_rate, from an earlier checkpoint, or another --precision",
                code=FAILED,
            )
        return metrics

    # -- logging -------------------------------------------------------------------------------
    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Write one record to metrics.jsonl, W&B and the callbacks, and let the guards watch it."""
        if "train_runtime" in logs:
            return  # transformers' closing summary: its speed counts evaluation and export too
        record = {"step": self.state.global_step, **logs}
        if "loss" in logs:
            record.update(self.telemetry.measures(self.args.world_size))
            self.guards.mask(record)
        self.telemetry.write(record)
        if self.parts.tracker:
            self.parts.tracker.log(record)
        self.state.log_history.append(record)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, record)
        if "loss" in logs:
            self.guards.watch(self.state.global_step, record["loss"])
