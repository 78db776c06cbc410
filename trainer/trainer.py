"""OffloadTrainer: transformers.Trainer with a chunked loss, an order of our own, exact evaluation, guards and measurements."""

import collections
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from data.dataset import IGNORED, Order, TrainLoader, collate, evaluation_batches
from trainer.checkpoint import checkpoints
from trainer.engine import patches
from trainer.errors import FAILED, RunError, say
from trainer.modeling import activations
from trainer.modeling.loss import ChunkedHead, whole_logits
from trainer.monitor.telemetry import heartbeat

FAILED_SAVES = 3  # in a row; then the run stops rather than go on without a net
DUMPS = 10  # updates that were not finite whose rows are written down
SPIKE = 6  # standard deviations of the last losses


def summed(tensor):
    """The tensor summed over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class OffloadTrainer(Trainer):
    """The thin place where engine, callbacks and guards meet.

    telemetry: Telemetry; tracker: Tracker or None; max_nonfinite_steps: updates in a row with a non-finite loss or gradient
    after which the run stops with exit 1. capacity: tokens of a packed row, or None; mixture: data.dataset.Mixture or None; varlen:
    the attention wants to be told where samples begin. checkpointer: checkpoint.Checkpointer; stopper: signals.Stopper; resume:
    (folder, manifest) of the checkpoint to go on from, or None; space: swap.SwapSpace or None. kept: recompute.KeptLayers or None.
    liger: the loss by Liger's kernel; fused_step: gradients and the CPU's optimizer step by offload.host_step, with overlap_step
    beside the next forward pass. offloaded: the decoder layers whose inputs wait in RAM (recompute.offload_inputs).
    """

    def __init__(
        self,
        *args,
        telemetry,
        tracker=None,
        fused_loss=True,
        max_nonfinite_steps=1,
        capacity=None,
        mixture=None,
        varlen=False,
        checkpointer=None,
        stopper=None,
        resume=None,
        space=None,
        kept=None,
        liger=False,
        fused_step=True,
        overlap_step=False,
        offloaded=(),
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.kept, self.fused_step, self.overlap_step, self.offloaded = (
            kept,
            fused_step,
            overlap_step,
            offloaded,
        )
        self.checkpointer, self.resume, self.space = checkpointer, resume, space
        self.saved, self.failed_saves = resume and resume[0], 0
        self.recent = collections.deque(maxlen=50)  # losses
        self.order = self.batches = None
        self.capacity, self.mixture, self.varlen = capacity, mixture, varlen
        self.telemetry, self.tracker = telemetry, tracker
        self.max_nonfinite_steps, self.nonfinite, self.nonfinite_unlogged = (
            max_nonfinite_steps,
            0,
            0,
        )
        self.last_good_step = resume[1]["step"] if resume else 0
        self.audited = False
        # The loss below is a sum over the update's answer tokens divided by their number on all ranks; transformers must
        # count them, and must not divide by the number of micro-batches again.
        self.model_accepts_loss_kwargs = True
        self.head = ChunkedHead.install(_language_model(self.model), liger) if fused_loss else None
        self.update_tokens = 0
        self.engine_timed = False
        self.evaluated = self.evaluated_at = None
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if self.is_world_process_zero():
            self.add_callback(Watch(self))
        if stopper:
            self.add_callback(stopper)

    # -- data ---------------------------------------------------------------------------------------------------------
    def get_train_dataloader(self):
        """Batches of this rank in the order of `Order`."""
        args = self.args
        order = Order(
            self.train_dataset.lengths,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
            args.data_seed if args.data_seed is not None else args.seed,
            args.train_sampling_strategy,
            self.capacity,
            self.mixture,
        )
        self.order = order
        return TrainLoader(
            self.train_dataset,
            batch_sampler=order,
            num_workers=args.dataloader_num_workers,
            collate_fn=functools.partial(self._collate, size=self.capacity),
        )

    def _collate(self, units, size=None):
        batch = collate(units, self.processing_class.pad_token_id, size)
        borders, longest = batch.pop("cu_seq_lens"), batch.pop("max_length")
        if self.varlen:
            batch.update(
                cu_seq_lens_q=borders,
                cu_seq_lens_k=borders,
                max_length_q=longest,
                max_length_k=longest,
            )
        return batch

    def get_batch_samples(self, *args, **kwargs):
        """The update's micro-batches; the wait for them is measured."""
        if self.kept:
            self.kept.begin()
        begin = time.perf_counter()
        samples, items = super().get_batch_samples(*args, **kwargs)
        self.telemetry.clock.add("data_wait", time.perf_counter() - begin)
        self.update_tokens = sum(batch.pop("tokens") for batch in samples)
        self.batches = samples
        return samples, items

    # -- one micro-batch ----------------------------------------------------------------------------------------------
    def _loss_and_hits(self, model, inputs):
        return self.head(model, inputs) if self.head else whole_logits(model, inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the answer tokens of the whole update, on all ranks and micro-batches."""
        if not self.engine_timed:
            self._time_engine_step()
        clock = self.telemetry.clock
        clock.start("forward")
        loss, _ = self._loss_and_hits(model, inputs)
        # ZeRO averages the gradients over the ranks; the sum was divided by the tokens of all of them.
        loss = loss / num_items_in_batch.clamp(min=1) * self.args.world_size
        # An infinite loss can have finite gradients. NaN has none, and ZeRO-3 then skips the update on every rank.
        loss = torch.where(torch.isfinite(loss), loss, torch.full_like(loss, float("nan")))
        clock.stop("forward")
        clock.start("backward")
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward, backward and, at the end of an update, the optimizer. Returns the loss; 0 in place of a non-finite one, which
        is counted, because NaN would stay in the Trainer's running sum for good."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.telemetry.clock.stop("backward")
        if self.accelerator.gradient_state.sync_gradients:
            self._update_ended()
        return torch.nan_to_num(loss)

    def _time_engine_step(self):
        """Measure the optimizer apart from the backward pass: accelerate runs both in one call."""
        engine, clock = self.model_wrapped, self.telemetry.clock
        plain = engine.step

        def step(*args, **kwargs):
            clock.stop("backward")
            clock.start("optimizer")
            try:
                return plain(*args, **kwargs)
            finally:
                clock.stop("optimizer")

        engine.step = step
        self.engine_timed = True
        self.telemetry.restart_window()

    def _update_ended(self):
        if self.kept:
            self.kept.end(max(b["labels"].numel() for b in self.batches))
        self.telemetry.step_done(self.update_tokens)
        optimizer = self.model_wrapped.optimizer
        skipped = bool(getattr(optimizer, "overflow", False))
        if skipped and optimizer.dtype == torch.float16 and float(optimizer.loss_scale) > 1:
            return  # fp16's loss scale is being lowered, as it should be
        if not skipped:
            if self.space and not self.audited:
                self.space.audit()
                self.audited = True
            self.nonfinite, self.last_good_step = 0, self.state.global_step + 1
            return
        self.nonfinite += 1
        self.nonfinite_unlogged += 1
        if self.nonfinite <= DUMPS:
            self._dump_update()

    def _dump_update(self):
        """nonfinite-<step>-rank-<rank>: the rows of this rank's part of the update (.json) and its batches (.safetensors)."""
        from safetensors.torch import save_file

        step, order, data = self.state.global_step, self.order, self.train_dataset
        first = step % order.updates * order.accumulate
        units = [order.batch_at(step // order.updates, first + i) for i in range(len(self.batches))]
        places = [data.place(i) for batch in units for unit in batch for i in unit]
        rows = [{"path": data.files[file].shown, "line": line} for file, line in places]
        path = Path(self.args.output_dir) / f"nonfinite-{step + 1}-rank-{self.args.process_index}"
        path.with_suffix(".json").write_text(json.dumps({"step": step + 1, "rows": rows}, indent=1))
        save_file(
            {
                f"{i}/{k}": v.contiguous().cpu()
                for i, b in enumerate(self.batches)
                for k, v in b.items()
                if torch.is_tensor(v)
            },
            path.with_suffix(".safetensors"),
        )

    def check_finite(self):
        """Stop the run after too many updates in a row that were not made."""
        if self.nonfinite >= self.max_nonfinite_steps:
            raise RunError(
                f"the loss or a gradient was not finite in {self.nonfinite} update(s) in a row; none of them was applied",
                found=f"step {self.state.global_step}; the last good step was {self.last_good_step}",
                fix="a lower --learning_rate, a look at the rows of this step (nonfinite-… in the run directory), or "
                "--max_nonfinite_steps N to go on longer",
                code=FAILED,
            )

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # Without the path: transformers would hand it to DeepSpeed, whose checkpoints are pickles and lose Adam's state on NVMe.
        made = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.fused_step:
            how = patches.install_step(self.model_wrapped.optimizer, self.overlap_step)
            if how:
                say(f"optimizer step on the CPU: {how}")
        if self.offloaded:
            activations.offload_inputs(self.offloaded, say)
        self.state.compute_steps(
            self.args, max_steps
        )  # trainer_state.json brings the saved run's intervals
        if self.resume:
            folder, manifest = self.resume
            engine = self.model_wrapped
            checkpoints.restore(engine, folder, manifest, self.space)
            scheduler = self._plain_scheduler()
            if manifest["schedule"] == self._schedule():
                scheduler.load_state_dict(manifest["scheduler"])
                for group, rate in zip(
                    engine.optimizer.param_groups, manifest["scheduler"]["_last_lr"]
                ):
                    group["lr"] = rate
            else:  # another rate or length: the new schedule, from this step on
                scheduler.last_epoch = manifest["scheduler"]["last_epoch"] - 1
                scheduler.step()
            scaler = getattr(engine.optimizer, "loss_scaler", None)
            if manifest["precision"] == str(engine.optimizer.dtype):
                for key, value in manifest["loss_scaler"].items():
                    setattr(scaler, key, value)
            self.telemetry.tokens = manifest["tokens"]
            self.evaluated_at, self.evaluated = manifest["evaluated"] or (None, None)
            if self.is_world_process_zero():
                print(f"resume: goes on after step {manifest['step']}", flush=True)
        return made

    def _run_epoch(self, *args, **kwargs):
        if (
            self.state.global_step >= self.state.max_steps
        ):  # resumed at the end; transformers would train one step more
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _plain_scheduler(self):
        """torch's scheduler behind accelerate's wrapper, or the one that DeepSpeed was given."""
        scheduler = self.model_wrapped.lr_scheduler or self.lr_scheduler
        return getattr(scheduler, "scheduler", scheduler)

    def _schedule(self):
        """What the learning rate of a step depends on."""
        args = self.args
        return [
            args.learning_rate,
            str(args.lr_scheduler_type),
            str(args.lr_scheduler_kwargs),
            args.warmup_steps,
            self.state.max_steps,
        ]

    def _load_rng_state(self, folder):
        if self.resume:
            checkpoints.restore_rng(self.resume[0])

    def _load_optimizer_and_scheduler(self, folder):
        pass  # done with the engine at hand, above

    def state_json(self):
        """trainer_state.json, as transformers reads it."""
        return json.dumps(dataclasses.asdict(self.state), indent=1, sort_keys=True)

    def progress(self):
        """What a checkpoint says of the run's position, for JSON."""
        engine = self.model_wrapped
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        plain = (
            {k: v for k, v in vars(scaler).items() if isinstance(v, (bool, int, float))}
            if scaler
            else {}
        )
        return {
            "scheduler": self._plain_scheduler().state_dict(),
            "schedule": self._schedule(),
            "loss_scaler": plain,
            "precision": str(engine.optimizer.dtype),
            "tokens": self.telemetry.tokens,
            "update_rows": self.order.update,
            "evaluated": self.evaluated and [self.evaluated_at, self.evaluated],
        }

    def _save_checkpoint(self, model, trial):
        began = time.perf_counter()
        if self.space:
            self.space.audit()
        self._beat("save")
        saved = self.checkpointer.save(self)
        if saved:
            self.saved, self.failed_saves = saved, 0
            if self.is_world_process_zero():
                print(f"saved {saved} in {time.perf_counter() - began:.1f} s", flush=True)
        else:
            self.failed_saves += 1
            if self.failed_saves >= FAILED_SAVES:
                raise RunError(
                    f"{self.failed_saves} checkpoints in a row could not be saved",
                    code=FAILED,
                    found=f"the last one that stands is {self.saved or 'none'}",
                    fix="free space on the disk of the run directory",
                )
        self._beat("train")
        self.telemetry.pause(time.perf_counter() - began)

    def _beat(self, phase):
        if self.is_world_process_zero():
            heartbeat(self.args.output_dir, self.state.global_step, phase)

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss, perplexity and accuracy over the answer tokens of the validation set: weighted by token, so the same for any
        batch size and number of ranks."""
        began = time.perf_counter()
        self._beat("eval")
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        model, device = self.model_wrapped, self.args.device
        training = model.training
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        batches = evaluation_batches(
            rows,
            self.args.per_device_eval_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        show = self.is_world_process_zero() and sys.stderr.isatty()
        for batch in tqdm(batches, desc="validation", leave=False, disable=not show):
            inputs = self._collate([[rows[i]] for i in batch or [0]])
            inputs.pop("tokens")
            if not batch:  # this rank has no rows left, but ZeRO-3 gathers on all ranks in step
                inputs["labels"].fill_(IGNORED)
            inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
            with torch.no_grad():
                loss, hits = self._loss_and_hits(model, inputs)
            count = inputs["labels"][:, 1:].ne(IGNORED).sum()
            totals += torch.stack(
                [loss.double(), torch.as_tensor(hits, device=device).double(), count.double()]
            )
        model.train(training)
        model.empty_partition_cache()  # what the last forward pass fetched ahead would stay in flight
        loss, hits, count = summed(totals).tolist()
        metrics = {
            "eval_loss": loss / count,
            "eval_perplexity": _exp(loss / count),
            "eval_token_accuracy": hits / count,
        }
        self.evaluated_at, self.evaluated = self.state.global_step, metrics
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.telemetry.pause(time.perf_counter() - began)
        return metrics

    # -- logging ------------------------------------------------------------------------------------------------------
    def log(self, logs, start_time=None):
        """One record to metrics.jsonl, W&B and the callbacks."""
        if "train_runtime" in logs:
            return  # transformers' closing summary: its speed counts evaluation and export too
        record = {"step": self.state.global_step, **logs}
        if "loss" in logs:
            record.update(self.telemetry.measures(self.args.world_size))
            if self.nonfinite_unlogged:
                record["loss"] = record["grad_norm"] = None
            self.nonfinite_unlogged = 0
        self.telemetry.write(record)
        if self.tracker:
            self.tracker.log(record)
        self.state.log_history.append(record)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, record)
        if "loss" in logs:
            self._look_for_spike(record["loss"])
            self.check_finite()

    def _look_for_spike(self, loss):
        if loss is None:
            return
        if len(self.recent) >= 20 and self.is_world_process_zero():
            mean, spread = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > mean + SPIKE * spread:
                print(
                    f"warning: the loss jumped to {loss:.4f} at step {self.state.global_step}; the last {len(self.recent)} were "
                    f"{mean:.4f} ± {spread:.4f}",
                    flush=True,
                )
        self.recent.append(loss)


def _language_model(model):
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _exp(value):
    try:
        return torch.tensor(value, dtype=torch.float64).exp().item()
    except OverflowError:
        return float("inf")


class Watch(TrainerCallback):
    """What a person sees: a bar on a terminal, a line a logging step elsewhere; and the heartbeat."""

    def __init__(self, trainer):
        self.trainer, self.bar = trainer, None
        self.terminal = sys.stderr.isatty()
        self.rates = []

    def _beat(self, state, phase):
        heartbeat(self.trainer.args.output_dir, state.global_step, phase)

    def on_train_begin(self, args, state, control, **kwargs):
        self._beat(state, "train")
        if self.terminal and not args.disable_tqdm:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        self._beat(state, "train")
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_substep_end(self, args, state, control, **kwargs):
        self._beat(state, "train")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._beat(state, "train")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_loss" in logs:
            self._line(
                f"step {state.global_step}/{state.max_steps}  validation loss {logs['eval_loss']:.4f}  perplexity "
                f"{logs['eval_perplexity']:.3f}  token accuracy {logs['eval_token_accuracy']:.3f}"
            )
            return
        if "loss" not in logs:
            return
        self.rates.append(logs["step_s"])
        left = (state.max_steps - state.global_step) * sum(self.rates[-20:]) / len(self.rates[-20:])
        loss = "not finite" if logs["loss"] is None else f"{logs['loss']:.4f}"
        speed = f"{logs['tokens_per_s_per_gpu'] * self.trainer.args.world_size:,.0f} tok/s"
        if self.bar:
            self.bar.set_postfix_str(f"loss {loss}, {speed}")
        else:
            self._line(
                f"step {state.global_step}/{state.max_steps}  loss {loss}  {speed}  {left / 60:.1f} min left"
            )

    def _line(self, text):
        if self.bar:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.close()
