"""The trainer's guards, without a trainer.

Skipped optimizer steps, their rows, and a loss that jumps.
"""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trainer.checkpoint import contents
from trainer.checkpoint.files import SavedCheckpoint
from trainer.errors import RunError
from trainer.monitor.guards import DUMPS, ENOUGH, Guards

ROWS = [{"path": "a.jsonl", "line": 3}]


def batches():
    return [{"input_ids": torch.tensor([[1, 2]]), "max_length_q": 2}, {"labels": torch.zeros(2)}]


def test_a_skipped_step_stops_the_run(tmp_path):
    guards = Guards(tmp_path, rank=1, limit=1, last_good_step=4)
    assert guards.too_many(4) is None
    guards.step_was_skipped(5, ROWS, batches())
    error = guards.too_many(5)
    assert error is not None and "not finite in 1 optimizer step" in error.what
    assert error.code == 1 and "the last good step was 4" in str(error)
    written = json.loads((tmp_path / "nonfinite-5-rank-1.json").read_text())
    assert written == {"step": 5, "rows": ROWS}
    tensors = load_file(tmp_path / "nonfinite-5-rank-1.safetensors")
    assert set(tensors) == {"0/input_ids", "1/labels"} and tensors["0/input_ids"].tolist() == [
        [1, 2]
    ]


def test_a_dump_never_hides_the_error(tmp_path, capsys):
    """Two tensors that are one, and a directory in the place of the file."""
    guards = Guards(tmp_path, rank=0, limit=1, last_good_step=0)
    borders = torch.arange(3)
    guards.step_was_skipped(1, ROWS, [{"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}])
    assert len(load_file(tmp_path / "nonfinite-1-rank-0.safetensors")) == 2
    (tmp_path / "nonfinite-2-rank-0.json").mkdir()
    guards.step_was_skipped(2, ROWS, batches())
    assert "the rows of step 2 are not in" in capsys.readouterr().err
    assert guards.too_many(2)


@pytest.mark.parametrize("first, made, refused", [(0, [], True), (0, [2], False), (4, [], False)])
def test_a_run_that_changed_no_weight(tmp_path, first, made, refused):
    """Skipped by --max_nonfinite_steps, or while fp16's loss scale was being lowered."""
    guards = Guards(tmp_path, rank=0, limit=100, last_good_step=first)
    for step in made:
        guards.step_was_made(step)
    with pytest.raises(RunError, match="no optimizer step") if refused else nullcontext():
        guards.check_some_step_was_made(first + 3)


def test_only_steps_in_a_row_count(tmp_path):
    guards = Guards(tmp_path, rank=0, limit=3, last_good_step=0)
    for step in range(1, 20):
        if step % 3:
            guards.step_was_skipped(step, ROWS, [])
        else:
            guards.step_was_made(step)
        assert guards.too_many(step) is None
    assert guards.last_good_step == 18
    guards.step_was_skipped(20, ROWS, [])
    guards.step_was_skipped(21, ROWS, [])
    assert "in 3 optimizer step" in str(guards.too_many(21))


def test_the_disk_is_not_filled(tmp_path):
    guards = Guards(tmp_path, rank=0, limit=10**6, last_good_step=0)
    for step in range(1, 3 * DUMPS):
        guards.step_was_skipped(step, ROWS, [])
    assert len(list(tmp_path.glob("nonfinite-*.json"))) == DUMPS


def test_a_skipped_step_is_logged_as_null(tmp_path):
    guards = Guards(tmp_path, rank=0, limit=5, last_good_step=0)
    record = {"loss": 0.0, "grad_norm": 1.0}
    guards.mask(record)
    assert record == {"loss": 0.0, "grad_norm": 1.0}
    guards.step_was_skipped(1, ROWS, [])
    guards.mask(record)
    assert record == {"loss": None, "grad_norm": None}
    record = {"loss": 2.0, "grad_norm": 1.0}
    guards.mask(record)  # counted once
    assert record["loss"] == 2.0


@pytest.mark.parametrize("loss, warned", [(1.05, False), (9.0, True)])
def test_a_jump_is_reported(tmp_path, capsys, loss, warned):
    guards = Guards(tmp_path, rank=0, limit=1, last_good_step=0)
    for step in range(ENOUGH):
        guards.watch(step, 1.0 + 0.1 * (step % 2))
    guards.watch(ENOUGH, loss)
    assert ("the loss jumped" in capsys.readouterr().out) == warned


def test_a_jump_too_early_is_not(tmp_path, capsys):
    guards = Guards(tmp_path, rank=0, limit=1, last_good_step=0)
    for step in range(ENOUGH - 1):
        guards.watch(step, 1.0)
    guards.watch(ENOUGH, 100.0)
    assert not capsys.readouterr().out


class Trainer(SimpleNamespace):
    """What contents.position and apply_position look at."""

    def __init__(self, guards):
        optimizer = SimpleNamespace(
            loss_scaler=SimpleNamespace(cur_scale=1.0), dtype=torch.float32, param_groups=[]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), lambda step: 1.0
        )
        names = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
        super().__init__(
            guards=guards,
            model_wrapped=SimpleNamespace(optimizer=optimizer),
            lr_scheduler=schedule,
            metrics=None,
            evaluated_at=None,
            telemetry=SimpleNamespace(tokens=0),
            sampler=SimpleNamespace(rows_per_step=8),
            args=SimpleNamespace(**dict.fromkeys(names, 0)),
            state=SimpleNamespace(global_step=2, max_steps=2),
        )


def test_a_resumption_is_no_good_step(tmp_path):
    """A checkpoint of steps that were all skipped: their number says nothing of the weights."""
    guards = Guards(tmp_path, rank=0, limit=4)
    for step in (1, 2):
        guards.step_was_skipped(step, ROWS, [])
    manifest = json.loads(json.dumps(contents.position(Trainer(guards))))
    resumed = Guards(tmp_path, rank=0, limit=4)
    saved = SavedCheckpoint(tmp_path, {"step": 2, **manifest})
    contents.apply_position(Trainer(resumed), saved)
    with pytest.raises(RunError, match="no optimizer step"):
        resumed.check_some_step_was_made(2)
    for step in (3, 4):  # in a row, also over the resumption
        resumed.step_was_skipped(step, ROWS, [])
    assert resumed.too_many(4)
