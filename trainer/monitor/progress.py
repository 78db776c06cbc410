"""What a person sees while a run trains, and the heartbeat that tools read."""

import sys
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.run_dir import Phase, RunDirectory

RECENT = 20  # steps whose mean time gives the time that is left


@dataclass
class ProgressCallback(TrainerCallback):
    """A bar on a terminal, else a line for each logging step; and heartbeat.json. Of rank 0."""

    run: RunDirectory
    world_size: int
    bar: Any = None
    step_seconds: list[float] = field(default_factory=list)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show life, and the bar where it is."""
        self.run.beat(state.global_step, Phase.TRAIN)
        if self.bar is None and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    on_train_begin = on_substep_end = on_evaluate = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Show a record of metrics.jsonl."""
        at = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            text = (
                f"{at}  validation loss {logs['eval_loss']:.4f}  "
                f"perplexity {logs['eval_perplexity']:.3f}  "
                f"token accuracy {logs['eval_token_accuracy']:.3f}"
            )
            if self.bar:
                self.bar.write(text)
            else:
                print(text, flush=True)
        elif "loss" in logs:
            self.step_seconds.append(logs["step_s"])
            recent = self.step_seconds[-RECENT:]
            left = (state.max_steps - state.global_step) * sum(recent) / len(recent)
            loss = "not finite" if logs["loss"] is None else f"{logs['loss']:.4f}"
            rate = f"{logs['tokens_per_s_per_gpu'] * self.world_size:,.0f} tok/s"
            if self.bar:
                self.bar.set_postfix_str(f"loss {loss}, {rate}")
            else:
                print(f"{at}  loss {loss}  {rate}  {left / 60:.1f} min left", flush=True)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar:
            self.bar.close()
