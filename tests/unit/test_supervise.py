"""The supervisor's own flags and the swap directory's lock. No torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.files import lock_or_refuse
from trainer import supervise
from trainer.errors import RunError
from trainer.system import swap_dir


def test_options():
    argv = ["--num_gpus", "2", "--lora_r", "8", "--detach", "--hang-timeout=60", "x.yaml"]
    options, flags = supervise.parse_options(argv)
    assert (options.num_gpus, options.detach, options.hang_timeout) == (2, True, 60)
    assert flags == ["--lora_r", "8", "x.yaml"]
    options, flags = supervise.parse_options([])
    assert options == supervise.Options() and (options.max_restarts, flags) == (3, [])
    assert not options.detach and options.script == "launch/train.py"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_gpus"], "--num_gpus needs a value"),
        (["--max_restarts", "many"], "--max_restarts is not a whole number\n  found:  many"),
        (["--hang_timeout=-1"], "--hang_timeout is not a whole number"),
    ],
)
def test_wrong_options(argv, message):
    with pytest.raises(RunError) as caught:
        supervise.parse_options(argv)
    assert str(caught.value).startswith("command line: " + message)


def test_several_machines(capsys):
    for flag in (["--detach"], ["--max_restarts", "5"], ["--hang_timeout", "9"]):
        assert supervise.main(["--hostfile", "hosts", *flag]) == 2
        assert f"{flag[0]}: only for one machine" in capsys.readouterr().err


def test_which_directory_a_run_has(tmp_path):
    from trainer.config.settings import resolve

    def identify(*flags):
        return supervise.identify(resolve(["--model_name_or_path", "a/b", *flags]))

    directory, flags = identify("--run_name", "mine")
    assert str(directory) == "runs/mine" and flags == []
    directory, flags = identify()
    assert flags == ["--run_name", directory.path.name] and str(directory).startswith("runs/b-")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    directory, flags = identify("--resume_from_checkpoint", str(checkpoint))
    assert directory.path == tmp_path / "run"
    assert flags == ["--output_dir", str(tmp_path / "run")]


# A stand-in for launch/train.py: what a rank does in its n-th start.
RANK = """
import json, os, pathlib, signal, sys, time
directory = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
rank, start = os.environ["RANK"], int(os.environ["ZERO_OFFLOAD_SUPERVISED"])
assert os.environ["WORLD_SIZE"] == "2" and os.environ["MASTER_PORT"]
print("start", start, *sys.argv[1:], flush=True)
def beat(step):
    text = json.dumps({"step": step, "phase": "train", "time": time.time()})
    (directory / "heartbeat.json").write_text(text)
def leave(code):
    os._exit(code)
signal.signal(signal.SIGTERM, lambda *_: leave(75))
"""


@pytest.fixture
def supervised(tmp_path):
    """supervised(code of a rank, *flags, sent=signal or None) → (exit code, output)."""

    def go(code, *flags, sent=None):
        script = tmp_path / "rank.py"
        script.write_text(RANK + code)
        own = ["--script", script, "--num_gpus", 2, "--output_dir", tmp_path, *flags]
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "launch/supervise.py", *map(str, own)],
                cwd=Path(__file__).resolve().parents[2],
                stdout=log,
                stderr=log,
            )
        while sent and process.poll() is None:
            if "start 1" in (tmp_path / "log").read_text():
                time.sleep(0.5)
                process.send_signal(sent)
                break
            time.sleep(0.05)
        code = process.wait(60)
        return code, (tmp_path / "log").read_text()

    return go


def test_a_killed_rank_is_restarted(supervised):
    code, output = supervised(
        "if start == 1 and rank == '1': beat(4); os.kill(os.getpid(), signal.SIGKILL)\n"
        "if start == 1: time.sleep(30)"
    )
    assert code == 0, output
    assert (
        "rank 1 was ended by SIGKILL in train after step 4\n  found:  MemAvailable fell" in output
    )
    assert "restart 1 of 3: last seen in train after step 4; no checkpoint yet" in output
    assert "start 2" in output and output.count("--resume_from_checkpoint auto") == 2


def test_a_new_checkpoint_renews_the_restarts(supervised):
    code, output = supervised(
        "if rank == '0' and start < 4: (directory / f'checkpoint-{start}').mkdir()\n"
        "time.sleep(0.5)\nleave(70)",
        *("--max_restarts", 1),
    )
    assert code == 1 and output.count("restart 1 of 1") == 3, output
    assert "goes on from checkpoint-3" in output
    assert "error: 1 restarts without a new checkpoint" in output and "remove the cause" in output


@pytest.mark.parametrize("number", [1, 2, 3, 75])
def test_what_a_restart_would_not_change(supervised, number):
    code, output = supervised(f"leave({number})")
    assert code == number and "restart 1" not in output, output


def test_a_signal_reaches_all_ranks(supervised):
    for sent in (signal.SIGTERM, signal.SIGHUP):
        code, output = supervised("time.sleep(30)", sent=sent)
        assert code == 75 and "restart 1" not in output, output


def test_silence_is_a_hang(supervised, tmp_path):
    code, output = supervised(
        "beat(1)\ntime.sleep(0.1)\nbeat(2)\ntime.sleep(60)",
        *("--hang_timeout", 1, "--max_restarts", 0),
    )
    assert code == 1 and "no sign of life for" in output, output
    assert "s in train after step 2; limit: " in output and "stacks of all ranks" in output
    assert float((tmp_path / ".patience").read_text()) >= 1


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
    assert lines[1].split()[:3] == ["a", "done", "7"]
    assert "ended in train" in lines[2]  # no process has its lock


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
    """Every key comes back as it was, also a learning rate that is transformers' default."""
    from trainer.config.settings import resolve, write_yaml

    first = resolve(flags)
    write_yaml(tmp_path / "resolved_config.yaml", first.public())
    assert resolve(["--config", str(tmp_path / "resolved_config.yaml")]).values == first.values


def test_a_lock_names_its_holder(tmp_path):
    handle = lock_or_refuse(tmp_path / "lock", "the run", "wait")
    with pytest.raises(RunError, match=f"pid {os.getpid()} on"):
        lock_or_refuse(tmp_path / "lock", "the run", "wait")
    os.close(handle)
    os.close(lock_or_refuse(tmp_path / "lock", "the run", "wait"))


def test_only_our_dead_directories_are_reclaimed(tmp_path, capsys):
    living, dead, foreign = (
        swap_dir.SwapSpace(tmp_path / "living"),
        swap_dir.SwapSpace(tmp_path / "dead"),
        tmp_path / "foreign",
    )
    for space in (living, dead):
        space.own()
        (space.folder / "a.swp").write_bytes(b"x" * 10**6)
    foreign.mkdir()
    os.close(dead.lock)
    swap_dir.reclaim(tmp_path)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "living"]
        and "reclaimed (dead)" in capsys.readouterr().out
    )
    living.close()


def test_the_image_is_as_patient_as_the_supervisor(tmp_path):
    """docker/health.py: silence that the run's supervisor allows is no illness.

    Without a supervisor the limit of the phase counts.
    """
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)

    def health(silent, patience=None, started=9000, host=None):
        (run / "heartbeat.json").write_text(
            json.dumps({"step": 1, "phase": "train", "time": time.time() - silent})
        )
        held = [lock_or_refuse(run / ".running", "the run", "wait")]
        if patience:
            held.append(lock_or_refuse(run / ".supervised", "the run", "wait"))
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
    assert health(4000) == 1  # the limit of an earlier supervisor does not count
    # Resumed a minute ago, and not at its first step yet.
    assert health(99999, 14400, started=60) == 0
    assert health(99999, 14400, started=15000) == 1
    assert health(4000, host="another container") == 0
