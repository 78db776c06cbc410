"""The trainer's guards, without a trainer.

Skipped optimizer steps, their rows, and a loss that jumps.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from trainer.errors import RunError
from trainer.monitor.guards import DUMPS, ENOUGH, Guards

ROWS = [{"path": "a.jsonl", "line": 3}]


def batches():
    return [{"input_ids": torch.tensor([[1, 2]]), "max_length_q": 2}, {"labels": torch.zeros(2)}]


def test_a_skipped_step_stops_the_run(tmp_path):
    guards = Guards(tmp_path, rank=1, limit=1, last_good_step=4)
    guards.check(4, 1.0)
    guards.step_was_skipped(5, ROWS, batches())
    with pytest.raises(RunError, match="not finite in 1 optimizer step") as error:
        guards.check(5, None)
    assert error.value.code == 1 and "the last good step was 4" in str(error.value)
    written = json.loads((tmp_path / "nonfinite-5-rank-1.json").read_text())
    assert written == {"step": 5, "rows": ROWS}
    tensors = load_file(tmp_path / "nonfinite-5-rank-1.safetensors")
    assert set(tensors) == {"0/input_ids", "1/labels"} and tensors["0/input_ids"].tolist() == [
        [1, 2]
    ]


def test_only_steps_in_a_row_count(tmp_path):
    guards = Guards(tmp_path, rank=0, limit=3, last_good_step=0)
    for step in range(1, 20):
        if step % 3:
            guards.step_was_skipped(step, ROWS, [])
        else:
            guards.step_was_made(step)
        guards.check(step, None)
    assert guards.last_good_step == 18
    guards.step_was_skipped(20, ROWS, [])
    guards.step_was_skipped(21, ROWS, [])
    with pytest.raises(RunError, match="in 3 optimizer step"):
        guards.check(21, None)


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
        guards.check(step, 1.0 + 0.1 * (step % 2))
    guards.check(ENOUGH, loss)
    assert ("the loss jumped" in capsys.readouterr().out) == warned


def test_a_jump_too_early_is_not(tmp_path, capsys):
    guards = Guards(tmp_path, rank=0, limit=1, last_good_step=0)
    for step in range(ENOUGH - 1):
        guards.check(step, 1.0)
    guards.check(ENOUGH, 100.0)
    assert not capsys.readouterr().out
