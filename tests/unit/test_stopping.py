"""Whether a run that was asked to stop has come to its end, without a run."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from trainer.errors import DONE, STOPPED
from trainer.monitor import stopping
from trainer.monitor.stopping import PreemptionCallback
from trainer.run_dir import RunDirectory


@pytest.fixture
def stop(tmp_path, monkeypatch):
    """stop(save_strategy, fits) → (callback, control) after the end of a step with a SIGTERM."""
    monkeypatch.setattr(stopping.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(PreemptionCallback, "__post_init__", lambda self: None)

    def go(save_strategy, fits):
        run = RunDirectory(tmp_path)
        request = PreemptionCallback(run, 0.0, lambda seconds: fits, torch.device("cpu"))
        request.signal_name = "SIGTERM"
        control = TrainerControl(should_save=True)  # as at the last step
        args = TrainingArguments(str(tmp_path), save_strategy=save_strategy, use_cpu=True)
        request.on_step_end(args, TrainerState(), control)
        return request, control

    return go


def ended(request, step, saved_step, max_steps=2):
    folder = request.run.path / f"checkpoint-{saved_step}"
    return stopping.exit_code(
        SimpleNamespace(
            parts=SimpleNamespace(preemption=request),
            state=SimpleNamespace(global_step=step, max_steps=max_steps),
            run=request.run,
            last_saved=None if saved_step is None else folder,
            saved_step=saved_step,
            failed_saves=0,
            write_heartbeat=lambda phase: None,
        )
    )


@pytest.mark.parametrize(
    "strategy, fits, step, saved_step, code, said",
    [
        ("steps", False, 2, None, STOPPED, "begin anew; a new one would not have been written"),
        ("epoch", False, 2, 1, STOPPED, "checkpoint-1; a new one would not have been written"),
        ("steps", True, 2, 2, DONE, ""),
        ("steps", False, 2, 2, DONE, ""),  # an earlier decision has saved it
        ("no", False, 2, None, DONE, ""),  # nobody asked for a checkpoint
        ("no", False, 1, None, STOPPED, "no checkpoint: it would begin anew\n"),
        ("steps", True, 1, 1, STOPPED, "after step 1; checkpoint-1\n"),
    ],
)
def test_a_stop_at_the_end(stop, capsys, strategy, fits, step, saved_step, code, said):
    """The last step counts as made once it is on disk, or where nobody wants it there."""
    request, control = stop(strategy, fits)
    assert control.should_save == (strategy != "no" and fits)
    assert ended(request, step, saved_step) == code
    assert said in capsys.readouterr().out


def test_an_export_that_was_broken_off(stop, capsys):
    """The last step was saved; whether there was time for another save is not said."""
    request, _ = stop("steps", False)
    assert request.breaks_off()
    assert ended(request, 2, 2) == STOPPED
    assert "after step 2; checkpoint-2\n" in capsys.readouterr().out
