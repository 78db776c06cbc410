"""A run that is stopped, or that cannot write, at a moment when little of it is there yet."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import FLAGS, ROOT, inputs

SAVES = ["--max_steps", 4, "--save_steps", 2]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu"}


def pasted(run):
    """Paste the line that resumes into a shell in another folder. Return the finished process."""
    lines = {line for line in run.output.splitlines() if line.startswith("to go on: ")}
    assert len(lines) == 1, run.output[-3000:]
    line = lines.pop().removeprefix("to go on: ")
    options = {"cwd": "/", "env": ENVIRONMENT, "text": True, "capture_output": True}
    return subprocess.run(["bash", "-c", line], timeout=120, **options)


def test_no_time_to_save_the_last_step(starts, row):
    """The step was made, and nothing of it is on disk: the run has not come to its end."""
    flags = ["--max_steps", 2, "--save_steps", 10, "--grace_seconds", 0, "--validation_split", 0]
    fault = {"FAULT_STEP": "2", "FAULT_VALUE": "stop"}
    run = starts("run", *flags, supervised=False, env=fault, script="tests/cpu/inject.py").ends(75)
    assert "stopped by SIGTERM after step 2; no checkpoint: it would begin anew" in run.output
    assert "to go on: " in run.output and not list(run.directory.glob("checkpoint-*"))
    row("SIGTERM in the last step, with no time to save", "exit 75, with what stands on disk")


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_stop_before_the_first_file(starts, tmp_path, row, seconds):
    """The ranks import their packages: no configuration is written that a line could name."""
    at = {"SIGNAL_AT": f"start 0 {seconds}", "SIGNAL_SENT": str(tmp_path / "sent")}
    run = starts("run", *SAVES, env=at, script="tests/cpu/inject.py").ends(75)
    assert not run.records
    done = pasted(run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(run.records) == 4
    row(f"SIGTERM {seconds} s after the start of a rank", "exit 75, and its line starts the run")


def test_a_stop_before_a_run_has_gone_back(starts, tmp_path, row):
    """Its settings are those of before, whose newest checkpoint is not the one that was asked."""
    first = starts("run", *SAVES).ends(0)
    at = {"SIGNAL_AT": "start 0 1", "SIGNAL_SENT": str(tmp_path / "sent")}
    resume = ["--resume_from_checkpoint", first.directory / "checkpoint-2"]
    run = starts("run", *SAVES, *resume, env=at, script="tests/cpu/inject.py").ends(75)
    done = pasted(run)
    assert done.returncode == 0 and "goes on after step 2" in done.stdout, done
    row("SIGTERM before a run has gone back", "exit 75, and its line goes back")


def test_a_stop_file_while_a_resumed_run_loads(starts, row):
    first = starts("run", *SAVES, "--max_steps", 2).ends(0)
    again = starts("run", "--max_steps", 4000, "--resume_from_checkpoint", "auto")
    again.has_ranks(1)
    (first.directory / "STOP").touch()
    began = time.monotonic()
    again.ends(75)
    assert "stopped by the file STOP" in again.output and len(again.records) == 3
    row(
        "make stop while a resumed run loads",
        "stops after its first step",
        time.monotonic() - began,
    )


def test_a_stop_on_a_full_disk(starts, disk, row):
    """The first checkpoint fits, and the one of the stop does not."""
    place = disk(70)
    run = starts("run", "--max_steps", 4000, "--save_steps", 1, directory=place / "run")
    run.until_saved(1).signal(signal.SIGTERM).ends(75)
    assert "the new one could not be saved" in run.output and "to go on: " in run.output
    assert [p.name for p in run.directory.glob("*checkpoint-*")] == ["checkpoint-1"]
    row("SIGTERM on a full disk", "stops on the last checkpoint and says so, exit 75")


def test_the_first_step_hangs(starts, row):
    """No step was made that could tell how long one takes."""
    run = starts(
        "run",
        *("--hang_timeout", 8, "--max_restarts", 0),
        env={"FAULT_STEP": "1", "FAULT_VALUE": "hang"},
        script="tests/cpu/inject.py",
    ).ends(1, 90)
    assert "no sign of life for" in run.output and "in train after step 0" in run.output
    row("the first step hangs", "ended after --hang_timeout, as any other")


def test_a_resumption_on_a_full_disk(starts, disk, row):
    """Its settings cannot be written: the old ones stand, whole, and so does all else."""
    place = disk(150)
    run = starts("run", *SAVES, directory=place / "run").ends(0)
    kept = {p: p.read_bytes() for p in run.directory.rglob("*") if p.suffix in (".yaml", ".json")}
    kept.pop(run.directory / "heartbeat.json")
    with open(place / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 2**12)
    resume = ["--max_steps", 6, "--learning_rate", 5e-4, "--resume_from_checkpoint", "auto"]
    run = starts("run", *SAVES, *resume, directory=place / "run").ends(2)
    assert "No space left on device" in run.output and "Traceback" not in run.output
    assert "restart" not in run.output and all(p.read_bytes() == kept[p] for p in kept)
    row("the disk is full when a run resumes", "refused, the settings stay whole, exit 2")


def test_a_heartbeat_that_cannot_be_written(starts, row):
    """Something else stands in its place, in the middle of a run."""
    run = starts("run", "--max_steps", 12, "--save_steps", 6).until_step(2)
    run.directory.joinpath("heartbeat.json").unlink()
    run.directory.joinpath("heartbeat.json").mkdir()
    run.ends(0)
    assert run.output.count("heartbeat.json") == 1 and len(run.records) == 12
    row("a heartbeat that cannot be written", "a warning, the run goes on")


def test_the_newest_two_are_whole(starts, row):
    """A damaged checkpoint that was skipped counts for nothing when old ones are deleted."""
    run = starts("run", *SAVES).ends(0)
    shard = next((run.directory / "checkpoint-4").glob("rank-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    flags = [*SAVES, "--max_steps", 6, "--resume_from_checkpoint", "auto"]
    run = starts("run", *flags).ends(0)
    names = sorted(p.name.rsplit("-", 1)[0] for p in run.directory.glob("*checkpoint-*"))
    assert names == ["checkpoint", "checkpoint", "damaged-checkpoint-4"]
    assert {p.name for p in run.directory.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    row("a damaged checkpoint and rotation", "put aside, and the newest two are whole")


def test_memory_of_two_ranks_against_the_plan(calm, row):
    """Two processes of torch are in the plan, and no mapped file is in what is measured."""
    run = calm("--max_steps", 2, ranks=2)
    assert "RAM" not in "".join(w for w in run.output.splitlines() if w.startswith("warning: "))
    assert abs(json.loads((run.directory / "plan.json").read_text())["error"]["host_bytes"]) < 0.2
    row("RAM of two ranks", "as the plan says, within a fifth")


def test_detach_says_what_is_wrong(tiny_model, rows_file, tmp_path, row):
    """Before it goes into the background: nothing is started, and no log has to be read."""
    flags = [*inputs(tiny_model, rows_file, tmp_path), *FLAGS, "--output_dir", tmp_path / "run"]
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a"}\n')
    for wrong, words in (
        (["--lerning_rate", "1"], "did you mean --learning_rate"),
        (["--dataset", tmp_path / "rows.jsonl"], "no output"),
        (["--resume_from_checkpoint", tmp_path / "run" / "checkpoint-3"], "checkpoint-3"),
        (["--deepspeed", "ds_z3_nvme.json", "--nvme_path", "/proc/swap"], "/proc/swap"),
    ):
        command = [sys.executable, "launch/supervise.py", "--detach", *flags, *wrong]
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True
        )
        assert done.returncode == 2 and words in done.stderr, (wrong, done)
        assert "in the background" not in done.stdout and not (tmp_path / "run").exists()
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    command = [sys.executable, "launch/supervise.py", "--detach", *flags]
    command += ["--model_name_or_path", broken]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True
    )
    assert done.returncode == 2, done
    assert done.stderr.startswith(f"error: the tokenizer of {broken} cannot be read"), done.stderr
    row("bad input with DETACH=1", "said at once, exit 2; also what only the ranks find")
