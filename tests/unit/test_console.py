"""Output never decides: a command goes on whatever happens to its stdout and stderr."""

import os
import pty
import subprocess
import sys
import time

import pytest
from conftest import ROOT

COMMANDS = ("train", "supervise", "plan", "data", "doctor", "export", "bench")
PLAN = "--model llama-3.1-8b --gpus 1 --gpu_memory 80GB --ram 500GB --nvme 0".split()

EVERYTHING = """
import logging, sys, warnings
from tqdm import tqdm
from trainer.console import guard_output, say, to_stderr
guard_output()
for _ in range(3):
    print("a line")
    print("no end", end="")
    say("said")
    to_stderr("told")
    sys.stdout.write("x" * 100_000)
    sys.stdout.buffer.write(b"bytes")
    sys.stdout.flush()
    warnings.warn("a warning")
    logging.getLogger("library").error("logged")
    list(tqdm(range(3)))
if "raise" in sys.argv:
    raise ZeroDivisionError
sys.exit(5)
"""


def python(code, *arguments, **options):
    """Run code with our packages on the path. Return the finished process."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})},
        timeout=60,
        **options,
    )


def launch(name, *flags, **options):
    """Run a command. Return the finished process."""
    command = [sys.executable, f"launch/{name}.py", *flags]
    return subprocess.run(command, cwd=ROOT, timeout=60, text=True, **options)


@pytest.fixture(params=["full", "dead pipe", "lost terminal", "blocked pipe"])
def broken(request):
    """A descriptor that cannot be written to."""
    others = []
    if request.param == "full":
        handle = os.open("/dev/full", os.O_WRONLY)
    elif request.param == "lost terminal":
        other, handle = pty.openpty()
        os.close(other)
    else:
        other, handle = os.pipe()
        if request.param == "dead pipe":
            os.close(other)
        else:
            os.set_blocking(handle, False)
            others.append(other)
            while True:
                try:
                    os.write(handle, b"x" * 4096)
                except BlockingIOError:
                    break
    yield handle
    for descriptor in (handle, *others):
        os.close(descriptor)


@pytest.mark.parametrize("arguments, code", [([], 5), (["raise"], 1)])
def test_nothing_ends_for_a_line(broken, arguments, code):
    """Not by print, a library's log, a bar, a warning, the traceback, nor the flush at the end."""
    assert python(EVERYTHING, *arguments, stdout=broken, stderr=broken).returncode == code


def test_a_reader_that_stops_reading():
    """A pager that waits, or Ctrl-S: a run waits a while, and goes on without its output."""
    code = (
        "import sys, time; from trainer import console; console.guard_output();"
        "console.drop_when_blocked(0.3); began = time.monotonic();"
        "[(print('x' * 10_000), console.to_stderr('y')) for _ in range(500)];"
        "console.tell_at_once('z'); sys.exit(5 if time.monotonic() - began < 5 else 1)"
    )
    reader, writer = os.pipe()
    done = python(code, stdout=writer, stderr=writer)
    assert done.returncode == 5 and os.read(reader, 100) == b"x" * 100
    os.close(reader)
    os.close(writer)


def test_a_slow_reader_misses_nothing():
    code = (
        "from trainer import console; console.guard_output(); console.drop_when_blocked(20);"
        "[print('x' * 9_999) for _ in range(100)]"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        time.sleep(0.7)
        assert len(process.stdout.read()) == 10**6
    assert process.returncode == 0


def test_output_comes_through():
    done = python(EVERYTHING, "raise", capture_output=True, text=True)
    assert done.stdout.count("a line\nno endsaid\n") == 3 and done.stdout.count("bytes") == 3
    assert done.stdout.count("x") == 300_000
    for word, count in (("told", 3), ("a warning", 1), ("logged", 3), ("ZeroDivisionError", 1)):
        assert done.stderr.count(word) >= count, done.stderr


@pytest.mark.parametrize(
    "encoding, written",
    [("ascii", b"caf? ??\n"), ("gbk", b"caf\xa8\xa6 ??\n")],
)
def test_a_character_that_the_encoding_does_not_have(encoding, written):
    code = "from trainer.console import guard_output; guard_output(); print('café 😀⟦')"
    done = python(code, env={"PYTHONIOENCODING": encoding}, capture_output=True)
    assert (done.returncode, done.stdout) == (0, written), done.stderr


def test_closed_streams_do_not_write_into_files(tmp_path):
    code = (
        "import os, sys; from trainer.console import guard_output; guard_output();"
        "file = open(sys.argv[1], 'wb', 0); print('lost'); os.write(2, b'lost');"
        "print('lost', file=sys.stderr, flush=True); assert not sys.stderr.isatty()"
    )
    shell = f'exec "{sys.executable}" -c "$0" "$1" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", shell, code, tmp_path / "file"], env=environment)
    assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_into_a_dead_pipe(name):
    reader, writer = os.pipe()
    os.close(reader)
    done = launch(name, "--help", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")  # as of other commands, without a word


@pytest.mark.parametrize("name", ("train", "plan"))
def test_help_in_an_ascii_locale(name):
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = launch(name, "--help", env={**os.environ, **locale}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "") and "--max_length" in done.stdout


def test_a_result_that_is_lost_is_an_error():
    with open("/dev/full", "w") as full:
        done = launch("plan", *PLAN, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and "cannot be written" not in done.stderr
    assert done.stderr.count("the output could not be written") == 1
    assert "No space left" in done.stderr and "Traceback" not in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = launch("plan", *PLAN, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    with open("/dev/full", "w") as full:
        assert launch("plan", *PLAN, stdout=full, stderr=full).returncode == 1
        assert launch("plan", "--gpus", "x", stdout=full, stderr=full).returncode == 2


def test_ctrl_c_is_no_traceback():
    code = (
        "import os, signal; from trainer.config.command_line import command;"
        "raise SystemExit(command(lambda: os.kill(os.getpid(), signal.SIGINT))())"
    )
    done = python(code, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "\nstopped\n")


# -- one word for all ranks --------------------------------------------------------------------
RANKS = """
import os, sys, time
from trainer import console
from trainer.errors import RunError
console.guard_output()
console.ECHO = 1.5
rank = os.environ["RANK"]
time.sleep(0.7)  # all are there
if rank in sys.argv[1]:
    time.sleep(0.3 * int(rank))  # rank 0 may have ended before
    console.report(RunError(f"refused by {rank}"))
    os._exit(3)
time.sleep(3)
"""


def ranks(failing, count=2):
    """Start ranks of which some are refused. Return (what they print, their exit codes)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = []
    for rank in map(str, range(count)):
        command = [sys.executable, "-c", RANKS, failing]
        env = {**environment, "RANK": rank, "LOCAL_RANK": rank}
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    while any(process.poll() is None for process in started):  # as a launcher does
        time.sleep(0.1)
    output = "".join(process.stderr.read() for process in started)
    return output, [process.returncode for process in started]


@pytest.mark.parametrize(
    "failing, output, codes",
    [
        ("1", "refused by 1", [0, 3]),
        ("0", "refused by 0", [3, 0]),
        ("01", "refused by 0", [3, 3]),
        ("012", "refused by 0", [3, 3, 3]),
    ],
)
def test_a_refusal_is_printed_once(failing, output, codes):
    assert ranks(failing, len(codes)) == (f"\nerror: {output}\n", codes)


# -- diagnostics -------------------------------------------------------------------------------
def test_a_heartbeat_decides_only_at_the_start(tmp_path, capsys):
    from trainer.run_dir import Phase, RunDirectory

    run = RunDirectory(tmp_path)
    run.beat(0, Phase.LOAD)
    first = run.heartbeat.read_bytes()
    run.beat(123456, Phase.STOPPED)
    assert run.read_heartbeat()["step"] == 123456
    run.beat(7, Phase.TRAIN)
    assert run.read_heartbeat()["phase"] == "train" and len(first) == run.heartbeat.stat().st_size
    run.heartbeat.unlink()
    (tmp_path / "victim").write_text("precious")
    run.heartbeat.symlink_to(tmp_path / "victim")
    for step in range(5):
        run.beat(step, Phase.TRAIN)
    assert (tmp_path / "victim").read_text() == "precious"
    assert capsys.readouterr().out.count("warning: ") == 1
    with pytest.raises(OSError, match="is a link"):
        RunDirectory(tmp_path).beat(0, Phase.LOAD)


@pytest.mark.parametrize("fault", ["directory gone", "safetensors"])
def test_a_dump_that_cannot_be_written(tmp_path, monkeypatch, capsys, fault):
    """The guard counts on, and a line says that the rows are not there."""
    import torch
    from safetensors import SafetensorError

    from trainer.monitor import guards

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if fault == "safetensors":
        monkeypatch.setattr(guards, "save_file", full)
    directory = tmp_path if fault == "safetensors" else tmp_path / "file" / "run"
    (tmp_path / "file").touch()
    guard = guards.Guards(directory, rank=1, limit=1, last_good_step=0)
    guard.step_was_skipped(3, [{"line": 1}], [{"input_ids": torch.ones(2)}])
    assert guard.skipped == 1
    text = capsys.readouterr().err
    assert text.count("warning: the rows of step 3 are not in") == 1
    assert fault != "safetensors" or "No space left" in text
    assert not list(tmp_path.glob(".tmp-*"))
