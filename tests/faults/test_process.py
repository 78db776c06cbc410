"""Processes that die, stop, hang or get a signal to stop."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import FLAGS, ROOT

from trainer import run_dir

SAVES = ["--max_steps", 12, "--save_steps", 3]
POINTS = (
    "before-parts after-a-part before-manifest before-rename after-rename during-rotation"
).split()


@pytest.fixture(scope="module")
def undisturbed(calm):
    """undisturbed(ranks) → losses of the run that nothing happens to."""
    return functools.cache(lambda ranks: calm(*SAVES, ranks=ranks).losses)


def plain_inputs(model, rows_file):
    """The flags for a run without validation rows."""
    rows = ["--model_name_or_path", model, "--dataset", rows_file[0], "--validation_split", "0"]
    return [*rows, *FLAGS]


def timed(run, code=0):
    began = time.monotonic()
    run.ends(code)
    return time.monotonic() - began


@pytest.mark.quick
def test_a_rank_is_killed(starts, undisturbed, row):
    run = starts("run", *SAVES, ranks=2)
    victim = run.has_ranks(2)[1]
    run.until_step(4)
    victim.kill()
    began = time.monotonic()
    run.until(lambda r: "restart 1 of 3" in r.output, 60)
    assert (
        "rank 1 was ended by SIGKILL in train after step" in run.output
        and "MemAvailable fell to" in run.output
    )
    run.until(lambda r: "goes on after step" in r.output, 60)
    recovered = time.monotonic() - began
    run.ends(0)
    assert run.losses == undisturbed(2) and [r["step"] for r in run.records] == list(range(1, 13))
    row(
        "kill -9 of a rank in mid-step",
        "the others end, resumes from the last checkpoint, losses bit-equal",
        recovered,
    )


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_saving(starts, undisturbed, row, point):
    first = starts("run", *SAVES, supervised=False, env={"ZERO_OFFLOAD_KILL_AT": point})
    first.ends(-signal.SIGKILL)
    again = starts("run", *SAVES, "--resume_from_checkpoint", "auto", supervised=False)
    began = time.monotonic()
    again.until_step(1 + len(first.records) - len(first.records) % 3)
    recovered = time.monotonic() - began
    again.ends(0)
    assert again.losses == undisturbed(1)
    kept = sorted(p.name for p in again.directory.iterdir() if "checkpoint" in p.name)
    assert kept == ["checkpoint-12", "checkpoint-9"]  # no temporary one is left
    row(
        f"kill -9 of a save: {point}",
        "the checkpoint is whole or not there; the next start goes on, losses bit-equal",
        recovered,
    )


def test_one_rank_killed_while_saving(starts, undisturbed, row):
    """The other rank waits in a collective; the supervisor ends it.

    Each restart meets the same point: max_restarts ends it.
    """
    run = starts(
        "run", *SAVES, "--max_restarts", 2, ranks=2, env={"ZERO_OFFLOAD_KILL_AT": "after-a-part:1"}
    ).ends(1)
    assert (
        "2 restarts without a new checkpoint" in run.output
        and "restart 2 of 2" in run.output
        and "to go on" not in run.output
    )
    assert not list(run.directory.glob("checkpoint-*")) and "no checkpoint yet" in run.output
    assert "--resume_from_checkpoint auto" in run.output
    row(
        "the same fault at every start",
        "ends after the budget of restarts, exit 1, with the line that resumes",
    )


@pytest.mark.parametrize(
    "number, code",
    [
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.quick),
        (signal.SIGINT, 75),
        (signal.SIGUSR1, 75),
        (signal.SIGHUP, 75),
    ],
)
def test_signals(starts, undisturbed, row, number, code):
    run = starts("run", *SAVES, ranks=2).until_step(4).signal(number)
    seconds = timed(run, code)
    step = len(run.records)
    assert step < 12 and (run.directory / f"checkpoint-{step}").exists() and seconds < 30
    assert (
        f"after step {step}; checkpoint-{step}" in run.output
        and "--resume_from_checkpoint auto" in run.output
    )
    assert json.loads((run.directory / "heartbeat.json").read_text())["phase"] == "stopped"
    if number == signal.SIGTERM:
        again = starts("run", *SAVES, "--resume_from_checkpoint", "auto", ranks=2).ends(0)
        assert again.losses == undisturbed(2)
    row(
        signal.Signals(number).name,
        "all ranks stop after the same optimizer step, with a checkpoint; exit 75",
        seconds,
    )


def test_no_time_to_save(starts, row):
    run = (
        starts("run", *SAVES, "--grace_seconds", 0)
        .until_saved(3)
        .until_step(4)
        .signal(signal.SIGTERM)
        .ends(75)
    )
    assert "would not have been written in time" in run.output and "checkpoint-3" in run.output
    assert not (run.directory / f"checkpoint-{len(run.records)}").exists() or len(run.records) in (
        3,
        6,
        9,
    )
    row("SIGTERM with a grace period shorter than a save", "stops on the last checkpoint; exit 75")


def test_twice(starts, row):
    run = starts(
        "run",
        *"--max_steps 50 --save_steps 50".split(),
        env={"FAULT_STEP": "3", "FAULT_VALUE": "hang"},
        script="tests/cpu/inject.py",
    ).until_step(2)
    time.sleep(1)  # it is in the third step, which never ends
    run.signal(signal.SIGINT)
    time.sleep(1.5)
    assert run.process.poll() is None and "once more to stop at once" in run.output
    run.signal(signal.SIGINT)
    seconds = timed(run, 75)
    assert seconds < 5 and "stopped at once" in run.output
    row("Ctrl-C twice", "ends at once; exit 75", seconds)


def test_stop_and_save_files(starts, row):
    run = starts("run", "--max_steps", 4000, "--save_steps", 4000).until_step(2)
    (run.directory / "SAVE").touch()
    run.until(lambda r: list(r.directory.glob("checkpoint-*")))
    run.until_step(len(run.records) + 2)
    done = subprocess.run(
        [sys.executable, "launch/supervise.py", "--stop", str(run.directory)],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0 and "stopped at step" in done.stdout, done.stdout + done.stderr
    run.ends(75)
    assert (
        "stopped by the file STOP" in run.output
        and len(list(run.directory.glob("checkpoint-*"))) == 2
    )
    row("the files SAVE and STOP, make stop", "saves and goes on; stops with a checkpoint, exit 75")


@pytest.mark.quick
def test_the_supervisor_is_killed(starts, row):
    run = starts("run", "--max_steps", 4000, "--save_steps", 4000, ranks=2).until_step(2)
    ranks = run.ranks()
    assert len(ranks) == 2
    began = time.monotonic()
    run.process.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
    row(
        "the supervisor is killed with -9",
        "no rank outlives it, and its locks are free",
        time.monotonic() - began,
    )


def test_a_stopped_rank(starts, undisturbed, row):
    run = starts("run", *SAVES, ranks=2)
    victim = run.has_ranks(2)[1]
    run.until_step(4)
    began = time.monotonic()
    victim.suspend()
    run.until(lambda r: "restart 1 of 3" in r.output, 60)
    assert "rank 1" in run.output and "has been stopped for" in run.output
    stacks = [(run.directory / f"stacks-{rank}.txt").read_text() for rank in (0, 1)]
    run.ends(0)
    assert run.losses == undisturbed(2) and all("most recent call first" in s for s in stacks), (
        stacks
    )
    row(
        "SIGSTOP of a rank",
        "named, stacks of all ranks written, restarted, losses bit-equal",
        time.monotonic() - began,
    )


def test_a_hanging_rank(starts, row):
    """It does not come back from a step: no progress, though every process lives."""
    run = starts(
        "run",
        *SAVES,
        *"--hang_timeout 8 --max_restarts 0".split(),
        env={"FAULT_STEP": "4", "FAULT_VALUE": "hang"},
        script="tests/cpu/inject.py",
    )
    run.ends(1, 200)
    assert "no sign of life for" in run.output and "in train after step 3" in run.output
    assert "inject.py" in (run.directory / "stacks-0.txt").read_text()
    # For the image's health check.
    patience = float((run.directory / ".patience").read_text())
    assert 8 <= patience < run_dir.SILENCE_LIMITS["train"]
    row("a rank hangs", "no sign of life: stacks written, ended, restarted within its budget")


def test_a_crash_is_tried_again(starts, undisturbed, row):
    run = starts(
        "run",
        *SAVES,
        "--max_restarts",
        1,
        env={"FAULT_STEP": "5", "FAULT_VALUE": "crash"},
        script="tests/cpu/inject.py",
    )
    run.ends(0)  # at steps 5, 8 and 11, each time with a new checkpoint in between
    assert (
        run.output.count("rank 0 failed in train after step")
        == run.output.count("restart 1 of 1")
        == 3
    )
    assert run.losses == undisturbed(1)
    row(
        "an unforeseen exception",
        "traceback, restarted while there is progress, losses bit-equal",
    )


def test_detached(starts, row, tmp_path, tiny_model, rows_file):
    """The shell that started it is gone, as when an SSH session closes; the run goes on."""
    directory = tmp_path / "run"
    flags = ["--output_dir", directory, *plain_inputs(tiny_model, rows_file), "--max_steps", 3]
    shell = subprocess.run(
        ["setsid", sys.executable, "launch/supervise.py", "--detach", *map(str, flags)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        timeout=60,
    )
    assert shell.returncode == 0 and "train.log" in shell.stdout, shell.stdout + shell.stderr
    end = time.monotonic() + 120
    while "done: 3 optimizer steps" not in (directory / "train.log").read_text():
        assert time.monotonic() < end, (directory / "train.log").read_text()[-3000:]
        time.sleep(0.2)
    row("the SSH session closes (DETACH=1)", "the run goes on; train.log has its output")


def test_bare_launcher(starts, row, tiny_model, rows_file, tmp_path):
    """`deepspeed launch/train.py` without the supervisor: SIGTERM still stops both ranks."""
    directory = tmp_path / "run"
    command = [
        Path(sys.executable).with_name("deepspeed"),
        *"--num_gpus 2 --master_port 29390 launch/train.py --output_dir".split(),
        *[directory, *plain_inputs(tiny_model, rows_file), *SAVES],
    ]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
    end = time.monotonic() + 120
    metrics, log = directory / "metrics.jsonl", tmp_path / "log"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert time.monotonic() < end and process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    ranks = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if p.cmdline()[-1:] and "--local_rank=0" in p.cmdline()
    ]
    ranks[-1].terminate()  # One rank only: all ranks have to decide the same.
    assert process.wait(60) == 75, log.read_text()[-3000:]
    assert "stopped by SIGTERM" in log.read_text()
    assert list(directory.glob("checkpoint-*"))
    row(
        "SIGTERM to one rank under the deepspeed launcher",
        "all ranks stop after the same optimizer step, exit 75",
    )


@pytest.mark.parametrize("last", [False, True])
def test_a_stop_in_an_evaluation(starts, last, row):
    """An evaluation of 11 s, with a checkpoint after it or before it."""
    flags = ["--max_steps", 4, "--save_steps", 4, "--per_device_eval_batch_size", 1]
    strategy = [] if last else ["--eval_strategy", "steps", "--eval_steps", 2]
    run = starts(
        "run",
        *(*flags, *strategy),
        ranks=2,
        script="tests/cpu/inject.py",
        env={"SLOW_EVALUATION": "2"},
    )
    run.until(lambda r: '"phase": "eval"' in heartbeat_of(r), 60, "an evaluation")
    run.signal(signal.SIGTERM)
    seconds = timed(run, 75)
    assert "the evaluation was broken off" in run.output and seconds < 8, (seconds, run.output)
    step = 4 if last else 2
    assert (run.directory / f"checkpoint-{step}").exists() and "to go on: " in run.output
    again = starts("run", *flags, "--resume_from_checkpoint", "auto", ranks=2).ends(0)
    assert "validation loss" in again.output
    row(f"SIGTERM in {'the last' if last else 'an'} evaluation", "broken off; exit 75", seconds)


def heartbeat_of(run):
    path = run.directory / "heartbeat.json"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    "kind", [pytest.param("supervised", marks=pytest.mark.quick), "launcher", "plain"]
)
def test_the_printed_line_resumes_from_anywhere(tiny_model, rows_file, tmp_path, kind, row):
    """Pasted into a shell in another folder: names with blanks and quotes, a relative data file."""
    folder = tmp_path / "some where"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(rows_file[0].read_bytes())
    directory, launch = folder / "it's a run", ROOT / "launch"
    start = {
        "supervised": [sys.executable, launch / "supervise.py", "--num_gpus", 2],
        "launcher": [Path(sys.executable).with_name("deepspeed"), launch / "train.py"],
        "plain": [sys.executable, launch / "train.py"],
    }[kind]
    own = ["--model_name_or_path", tiny_model, "--dataset", "rows.jsonl", "--validation_split", 0]
    own += [*FLAGS, "--output_dir", directory, "--max_steps", 40]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        list(map(str, [*start, *own])),
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not (directory / "metrics.jsonl").exists():
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.1)
    (directory / "STOP").touch()
    output, _ = process.communicate(timeout=60)
    (line,) = (line for line in output.splitlines() if line.startswith("to go on: "))
    again = subprocess.run(
        ["bash", "-c", line.removeprefix("to go on: ")],
        cwd="/",
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert again.returncode == 0 and "resume: goes on after step" in again.stdout, (line, again)
    assert ("2 rank(s)" in again.stdout) == (kind == "supervised")
    row(f"the printed line, {kind}, from another folder", "resumes with its ranks")
