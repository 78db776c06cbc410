"""The supervisor's own flags, what a resumed run takes from where, and the swap directory's lock. No torch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import supervise
from trainer.checkpoint import resume
from trainer.errors import RunError
from trainer.system import swap_dir


def test_split():
    own, rest = supervise.split(
        ["--num_gpus", "2", "--lora_r", "8", "--detach", "--hang-timeout=60", "x.yaml"]
    )
    assert (own["num_gpus"], own["detach"], own["hang_timeout"]) == ("2", True, "60") and rest == [
        "--lora_r",
        "8",
        "x.yaml",
    ]
    for wrong in (["--num_gpus"], ["--max_restarts", "many"]):
        with pytest.raises(RunError):
            supervise.split(wrong)


def test_bad_input_starts_nothing(capsys):
    assert (
        supervise.main(["--lerning_rate", "1"]) == 2
        and "did you mean --learning_rate" in capsys.readouterr().err
    )
    for name in ("absent", "runs/absent"):
        assert (
            supervise.main(["--stop", name]) == 2
            and "no run runs/absent" in capsys.readouterr().err
        )


def test_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, phase in (("a", "done"), ("b", "train")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "heartbeat.json").write_text(
            json.dumps({"step": 7, "phase": phase, "time": time.time()})
        )
    assert supervise.main(["--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1].split()[:3] == ["a", "done", "7"] and "ended in train" in lines[2]
    )  # nobody holds it


class Settings:
    def __init__(self, **values):
        self.values, self.sources = values, {}


SAVED = {
    "seed": 42,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "run_name": "a",
}


@pytest.mark.parametrize(
    "ranks, now, batch, accumulate",
    [
        (1, {}, 4, 2),
        (2, {}, 4, 1),
        (4, {}, 2, 1),
        (1, {"per_device_train_batch_size": 8}, 8, 1),
        (1, {"per_device_train_batch_size": 3}, 4, 2),
        (8, {"gradient_accumulation_steps": 4}, 1, 1),
    ],
)
def test_the_rows_of_an_update_stay(ranks, now, batch, accumulate):
    settings = Settings(**{**SAVED, **now})
    resume.settle(settings, settings.values, {"settings": SAVED, "update_rows": 8}, ranks)
    assert (
        settings.values["per_device_train_batch_size"],
        settings.values["gradient_accumulation_steps"],
    ) == (batch, accumulate)


def test_what_the_checkpoint_decides_reaches_the_trainer():
    from trainer.config.flags import resolve

    settings = resolve(["--model_name_or_path", "x"])
    saved = {**settings.values, "seed": 7, "data_seed": 5, "train_sampling_strategy": "sequential"}
    resume.settle(settings, dict(settings.values), {"settings": saved, "update_rows": 16}, 4)
    options = settings.training()
    assert (options["seed"], options["data_seed"], options["train_sampling_strategy"]) == (
        7,
        5,
        "sequential",
    )
    assert (options["per_device_train_batch_size"], options["gradient_accumulation_steps"]) == (
        4,
        1,
    )


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--method", "lora"],
        ["--learning_rate", "5e-5", "--model_name_or_path", "x"],
        ["--model_name_or_path", "x"],
    ],
)
def test_a_resolved_configuration_says_all(tmp_path, flags):
    """Every key comes back as it was, also a learning rate that happens to be transformers' default."""
    from trainer.config.ds_config import write_yaml
    from trainer.config.flags import resolve
    from trainer.run import _public

    first = resolve(flags)
    write_yaml(tmp_path / "resolved_config.yaml", _public(first))
    assert resolve(["--config", str(tmp_path / "resolved_config.yaml")]).values == first.values


def test_what_is_kept_and_what_is_new():
    settings = Settings(**{**SAVED, "seed": 1, "learning_rate": 5e-4, "run_name": "b"})
    rows = resume.settle(settings, dict(settings.values), {"settings": SAVED, "update_rows": 8}, 1)
    assert (
        rows == [("seed", 42, 1, 42), ("learning_rate", 1e-3, 5e-4, 5e-4)]
        and settings.values["seed"] == 42
    )
    assert resume.table(rows).splitlines()[1].split(" | ")[1].strip() == "42"
    with pytest.raises(RunError, match="cannot be dealt out to 3 ranks"):
        resume.settle(Settings(**SAVED), SAVED, {"settings": SAVED, "update_rows": 8}, 3)


def test_trimmed_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    resume.trim_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_lock_names_its_holder(tmp_path):
    handle = swap_dir.take(tmp_path / "lock", "the run", "wait")
    with pytest.raises(RunError, match=f"pid {os.getpid()} on"):
        swap_dir.take(tmp_path / "lock", "the run", "wait")
    os.close(handle)
    os.close(swap_dir.take(tmp_path / "lock", "the run", "wait"))


def test_only_our_dead_directories_are_reclaimed(tmp_path):
    living, dead, foreign = (
        swap_dir.SwapSpace(tmp_path / "living"),
        swap_dir.SwapSpace(tmp_path / "dead"),
        tmp_path / "foreign",
    )
    for space in (living, dead):
        space.own()
        (space.folder / "a.swp").write_bytes(b"x" * 10**6)
    foreign.mkdir()
    os.close(dead.handle)
    said = []
    swap_dir.reclaim(tmp_path, said.append)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "living"]
        and "reclaimed (dead)" in said[0]
    )
    living.close()


def test_the_image_is_as_patient_as_the_supervisor(tmp_path):
    """docker/health.py: a silence that the supervisor of the run allows is no illness; without one the phase's own limit counts."""
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)

    def health(silent, patience=None, started=9000, host=None):
        (run / "heartbeat.json").write_text(
            json.dumps({"step": 1, "phase": "train", "time": time.time() - silent})
        )
        held = [swap_dir.take(run / ".running", "the run", "wait")]
        if patience:
            held.append(swap_dir.take(run / ".supervised", "the run", "wait"))
            (run / ".patience").write_text(str(patience))
            os.utime(run / ".supervised", (time.time() - started,) * 2)
        if host:
            (run / ".running").write_text(json.dumps({"pid": 1, "host": host}))
        done = subprocess.run(
            [sys.executable, Path(__file__).resolve().parents[2] / "docker/health.py"],
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        for handle in held:
            os.close(handle)
        assert ("x: train, last seen" if not host else "no run") in done.stdout, done
        return done.returncode

    assert [health(10), health(4000)] == [0, 1]
    assert [health(4000, 14400), health(100, 60)] == [0, 1]
    assert health(4000) == 1  # what an earlier supervisor said is not asked
    assert [health(99999, 14400, started=60), health(99999, 14400, started=15000)] == [
        0,
        1,
    ]  # resumed, still on its way
    assert health(4000, host="another container") == 0
