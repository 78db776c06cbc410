"""The supervisor's own flags and the swap directory's lock. No torch."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.files import lock_or_refuse
from trainer import supervise
from trainer.errors import RunError
from trainer.run_dir import RunDirectory, RunIdentity
from trainer.system import swap_dir


def test_options():
    argv = ["--num_gpus", "2", "--lora_r", "8", "--detach", "--hang-timeout=60", "x.yaml"]
    options, flags = supervise.parse_options(argv)
    assert (options.num_gpus, options.detach, options.hang_timeout) == (2, True, 60)
    assert flags == ["--lora_r", "8", "x.yaml"]
    options, flags = supervise.parse_options([])
    assert options == supervise.Options() and (options.max_restarts, flags) == (3, [])
    assert not options.detach and options.script.endswith("/launch/train.py")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_gpus"], "--num_gpus needs a value"),
        (["--max_restarts", "many"], "--max_restarts is not a whole number\n  found:  many"),
        (["--hang_timeout=-1"], "--hang_timeout is not a whole number"),
        (["--num_gpus", "²"], "--num_gpus is not a whole number"),
        (["--stop="], "--stop needs a value"),
        (["--detach=false"], "--detach takes no value"),
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


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "cannot be read"),
        ("# all\n\n", "names no machine"),
        ("a slots=8\nb\n", "has a line that is none of a machine\n  found:  b"),
        ("a slots=0\n", "has a line"),
        ("a slots=8\na slots=8\n", "names a machine twice"),
    ],
)
def test_a_bad_hostfile(tmp_path, capsys, text, words):
    """deepspeed would train on this machine alone, or end with a traceback."""
    hosts = tmp_path / "hosts"
    if text is not None:
        hosts.write_text(text)
    assert supervise.main(["--hostfile", str(hosts)]) == 2
    assert f"the hostfile {hosts} {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, words",
    [
        ({"RANK": "x"}, "RANK=x"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"WORLD_SIZE": "0"}, "RANK=0, WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no LOCAL_RANK, no MASTER_ADDR, no MASTER_PORT"),
        ({"RANK": "5"}, "RANK=5, WORLD_SIZE=1"),
    ],
)
def test_an_environment_that_is_no_ranks(monkeypatch, values, words):
    from trainer import distributed

    for name in distributed.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    distributed.check_launcher()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    distributed.is_main_process(), distributed.local_rank(), distributed.ranks_on_this_machine()
    with pytest.raises(RunError, match=f"found:  {words}(?s:.*)fix:") as error:
        distributed.check_launcher()
    assert error.value.code == 2


def test_requests_of_any_kind_are_withdrawn(tmp_path):
    run = RunDirectory(tmp_path)
    for make in (Path.touch, Path.mkdir, lambda path: path.symlink_to("/nowhere")):
        make(tmp_path / "STOP")
        run.withdraw_requests()
        assert not os.path.lexists(tmp_path / "STOP")
    (tmp_path / "STOP" / "full").mkdir(parents=True)
    run.withdraw_requests()


def test_which_directory_a_run_has(tmp_path, monkeypatch):
    from trainer.checkpoint.files import SavedCheckpoint
    from trainer.config.settings import resolve

    monkeypatch.setattr(
        supervise.resume, "read_checkpoint", lambda folder: SavedCheckpoint(folder, {})
    )

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


COMMIT = (
    "folder = directory / f'checkpoint-{step}'\n"
    "    folder.mkdir(exist_ok=True)\n"
    "    (folder / 'manifest.json').write_text('{\"hash\": \"%d\"}' % start)\n"
)


def test_a_new_checkpoint_renews_the_restarts(supervised):
    code, output = supervised(
        f"if rank == '0' and start < 4:\n    step = start; {COMMIT}time.sleep(0.5)\nleave(70)",
        *("--max_restarts", 1),
    )
    assert code == 1 and output.count("restart 1 of 1") == 3, output
    assert "goes on from checkpoint-3" in output
    assert "error: 1 restarts without a new checkpoint" in output and "remove the cause" in output


def test_the_same_step_again_is_progress(supervised):
    """A run that went back makes the step of an old checkpoint: it goes on from the new one."""
    code, output = supervised(
        f"if rank == '0' and start in (1, 3):\n    step = 7; {COMMIT}time.sleep(0.5)\nleave(70)",
        *("--max_restarts", 2),
    )
    assert code == 1 and "error: 2 restarts without a new checkpoint" in output, output
    restarts = [line.split()[1] for line in output.splitlines() if line.startswith("restart ")]
    assert restarts == ["1", "2", "1", "2"]


@pytest.mark.parametrize("number", [1, 2, 3, 75])
def test_what_a_restart_would_not_change(supervised, tmp_path, number):
    code, output = supervised(f"leave({number})")
    assert code == number and "restart 1" not in output, output
    assert not list(tmp_path.glob(".*")), "of a start that was refused"


def test_a_signal_reaches_all_ranks(supervised):
    for sent in (signal.SIGTERM, signal.SIGHUP):
        code, output = supervised("time.sleep(30)", sent=sent)
        assert code == 75 and "restart 1" not in output, output


def test_nohup(supervised):
    """A terminal that goes away does not stop what nohup has started."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the child inherits it
    try:
        code, output = supervised("time.sleep(2)", sent=signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)
    assert code == 0, output


def test_a_stop_after_a_failure(supervised, tmp_path):
    """It comes while the ranks of a crash are ended: 75, and nothing is started again."""
    code, output = supervised(
        "if rank == '0': time.sleep(0.8); leave(70)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(6)",
        sent=signal.SIGTERM,
    )
    assert code == 75 and "start 2" not in output, output
    assert "stopped; no checkpoint\nto go on: " in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_without_a_supervisor_is_stopped_early(tmp_path, number):
    """It says how to go on also before it has a run directory."""
    stub = (
        "import os, sys; from trainer import run;"
        f"run.prepare = lambda settings: os.kill(os.getpid(), {int(number)});"
        "sys.exit(run.main())"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {n: v for n, v in os.environ.items() if n != "ZERO_OFFLOAD_SUPERVISED"}
    command = [sys.executable, "-c", stub, "--run_name", "a b"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 75, done.stderr
    assert f"{number.name}: stopped before the first optimizer step" in done.stderr
    assert f"to go on: cd {tmp_path} && {sys.executable} " in done.stderr
    assert "--run_name 'a b'" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_ranks_have_begun(supervised, tmp_path, sent):
    """The printed line starts it as the user did, as there are no settings to resume with."""
    code, output = supervised(
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "try: time.sleep(30)\nexcept KeyboardInterrupt: leave(1)  # as Python does while it starts",
        *("--run_name", "it's mine"),
        sent=sent,
    )
    assert code == 75, output
    line = output.partition("to go on: ")[2].strip()
    (cd, folder, _, *words) = shlex.split(line)
    assert (cd, words[1]) == ("cd", f"{folder}/launch/supervise.py")
    options, flags = supervise.parse_options(words[2:])
    assert options.num_gpus == 2 and flags == [
        *("--output_dir", str(tmp_path), "--run_name", "it's mine"),
        *("--resume_from_checkpoint", "auto"),
    ]


def test_detach_says_that_the_run_is_in_use(tmp_path):
    script = tmp_path / "rank.py"
    run = tmp_path / "run"
    script.write_text(
        "import json, time\n"
        f"with open('{run}/heartbeat.json', 'w') as file:\n"
        "    json.dump({'step': 1, 'phase': 'train', 'time': time.time()}, file)\n"
        "time.sleep(30)"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    flags = ["--script", script, "--output_dir", run, "--model_name_or_path", tmp_path / "model"]

    def detach():
        command = [sys.executable, "launch/supervise.py", "--detach", *map(str, flags)]
        root = Path(__file__).resolve().parents[2]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)

    first, second = detach(), detach()
    pid = RunDirectory(run).last_supervisor()
    os.kill(pid, signal.SIGKILL)
    assert first.returncode == 0 and f"pid {pid}" in first.stdout, first.stderr
    assert f"--stop {run}" in first.stdout
    assert second.returncode == 2 and f"is in use\n  found:  pid {pid}" in second.stderr


def test_detach_says_what_the_ranks_say(tmp_path):
    """Though a heartbeat of before, by a clock that was ahead, says that the run trains."""
    script, run = tmp_path / "rank.py", tmp_path / "run"
    script.write_text(
        "import sys, time\ntime.sleep(1)\n"
        "print('once more\\n\\nerror: not these rows')\nsys.exit(2)"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    run.mkdir()
    beat = {"step": 1, "phase": "train", "time": time.time() + 3600}
    (run / "heartbeat.json").write_text(json.dumps(beat))
    flags = ["--script", script, "--output_dir", run, "--model_name_or_path", tmp_path / "model"]
    done = subprocess.run(
        [sys.executable, "launch/supervise.py", "--detach", *map(str, flags)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "in the background" in done.stdout, done
    assert done.stderr == "error: not these rows\n"


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


@pytest.mark.parametrize(
    "argv",
    [["--stop", "runs/x", "y"], ["--status", "--num_gpus", "2"], ["--status", "--stop", "x"]],
)
def test_nothing_beside_stop_and_status(argv, capsys):
    assert supervise.main(argv) == 2
    assert "unexpected beside" in capsys.readouterr().err


def test_a_run_without_a_heartbeat_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory("runs/young")
    run.lock(run.supervisor_lock)
    assert supervise.main(["--status"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["young", "starts"]


def test_a_heartbeat_of_another_shape_is_none(tmp_path):
    run = RunDirectory(tmp_path)
    for beat in ({"time": "x"}, {"step": 1, "phase": "odd", "time": 1}):
        run.heartbeat.write_text(json.dumps(beat))
        assert run.read_heartbeat() == {}


def test_a_request_that_cannot_be_removed_is_refused(tmp_path):
    (tmp_path / "STOP" / "full").mkdir(parents=True)
    os.utime(tmp_path / "STOP", (1, 1))
    with pytest.raises(RunError, match=f"{tmp_path}/STOP"):
        RunDirectory(tmp_path).withdraw_old_requests()


def test_another_run_in_the_directory_is_noticed(tmp_path):
    run, mine = RunDirectory(tmp_path / "run"), RunIdentity.new()
    run.lock(run.rank_lock)
    run.write_identity(mine)
    run.check_ours(mine)
    with pytest.raises(RunError, match="no longer this run's") as error:
        run.check_ours(RunIdentity.new())
    assert error.value.code == 1
    again = RunDirectory(tmp_path / "again")
    again.lock(again.rank_lock)
    again.path.rename(tmp_path / "old")
    again.path.mkdir()
    again.beat(1, "train")
    with pytest.raises(RunError, match="another one"):
        again.check_ours()
    assert not list(again.path.iterdir())


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


# A signal to the supervisor at a moment of its n-th start of the ranks.
AT = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from trainer import supervise
moment, start = os.environ["MOMENT"], int(os.environ["START"])
def at(name, supervisor=None, count=[0]):
    count[0] += name == "before"
    if name == moment and count[0] == start:
        os.kill(os.getpid(), signal.SIGTERM)
stock_start, stock_popen = supervise.Supervisor._start, supervise.psutil.Popen
def start_ranks(self, *args):
    at("before")
    stock_start(self, *args)
    at("after")
def popen(*args, **kwargs):
    process = stock_popen(*args, **kwargs)
    if kwargs["env"]["RANK"] == "0":
        at("between ranks")
    return process
supervise.Supervisor._start, supervise.psutil.Popen = start_ranks, popen
sys.exit(supervise.main())
"""


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("moment", ["before", "between ranks", "after"])
def test_no_signal_is_lost(tmp_path, moment, start):
    script, at = tmp_path / "rank.py", tmp_path / "at.py"
    script.write_text(
        RANK + "if start == 1 and os.environ['START'] == '2': leave(70)\ntime.sleep(60)"
    )
    at.write_text(AT)
    own = ["--script", script, "--num_gpus", 2, "--output_dir", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, at, *map(str, own)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "MOMENT": moment, "START": str(start)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert "to go on: " in done.stderr and f"start {start + 1}" not in done.stdout
