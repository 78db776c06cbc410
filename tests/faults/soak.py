"""A chaos soak: random faults of all kinds in one run, which must end as if nothing had happened.

python tests/faults/soak.py [--faults 100] [--steps N] [--seed 0] [--kinds a,b]
(make test-soak; needs root, for three small disks)

The run trains the tiny model on two ranks, parameters and optimizer on NVMe, with a checkpoint
every five steps. Each fault is injected for real at a random moment. Where the run ends, its exit
code and its words must be those of the fault, and the line that it printed is pasted into a shell
in another folder. At the end the last checkpoint and all losses must be bit-equal to those of an
undisturbed run.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import make_model, make_tokenizer, write_rows  # noqa: E402
from tiny import flags  # noqa: E402

from trainer.console import table  # noqa: E402

RANKS, SAVE_STEPS = 2, 5
FLAGS = (
    f"--validation_split 0 --precision fp32 --max_length 96 --learning_rate 1e-3 "
    f"--per_device_train_batch_size 2 --save_steps {SAVE_STEPS} --export false "
    f"--lr_scheduler_type cosine --report_to none --deepspeed ds_z3_nvme.json"
).split()
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu"}
SUPERVISE = [sys.executable, str(ROOT / "launch" / "supervise.py")]
PASTED = re.compile(r"(?:to go on(?: from it)?: |then )(cd .+)$", re.MULTILINE)
WENT_ON, RESTARTED = "went on", "restarted"  # how a fault ends where the run does not
PATIENCE = 120  # seconds for whatever must happen
SETTLED = 6  # optimizer steps after which a fault has had no effect; there is a save among them


class BrokenPromise(Exception):
    """The run did what no fault explains."""


class Finished(Exception):
    """The run has ended with 0."""


@dataclass
class ChaosRun:
    """The disturbed run: its shell, supervisor and ranks, and what it has said."""

    directory: Path
    swap: Path
    logs: Path
    chance: random.Random
    shell: subprocess.Popen = field(init=False)
    supervisor: psutil.Process = field(init=False)
    line: str = ""  # that started it last
    starts: int = 0
    reader: subprocess.Popen | None = None  # of its output
    output_lost: bool = False  # it could not all be written
    fault_at: int = 0  # characters of output before the last fault
    loading_since: float = 0.0  # 0: it trains
    unrecorded: set[int] = field(default_factory=set)  # steps made while metrics.jsonl had no room

    # -- what it does --------------------------------------------------------------------------
    def start(self, line: str, through_reader: bool = False) -> None:
        """Paste a line into a shell in another folder."""
        self.line, self.output_lost, self.fault_at = line, False, 0
        self.starts += 1
        self.reader, self.loading_since = None, time.time()
        with open(self.log, "wb") as log:
            if through_reader:
                self.reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
            out = self.reader.stdin if self.reader else log
            self.shell = subprocess.Popen(
                ["bash", "-c", line],
                cwd="/",
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        if self.reader and self.reader.stdin:
            self.reader.stdin.close()
        self.supervisor = self.until(self.find_supervisor, "a supervisor")

    def find_supervisor(self) -> psutil.Process | None:
        shell = psutil.Process(self.shell.pid)
        for process in (shell, *shell.children()):
            if any(word.endswith("supervise.py") for word in process.cmdline()):
                return process
        return None

    def ranks(self) -> list[psutil.Process]:
        """The living ranks of the last start."""
        try:
            children = self.supervisor.children()
            return [p for p in children if any(w.endswith("train.py") for w in p.cmdline())]
        except psutil.Error:
            return []

    def both_ranks(self) -> list[psutil.Process]:
        return self.until(lambda: len(r := self.ranks()) == RANKS and r, "two ranks")

    @property
    def log(self) -> Path:
        return self.logs / f"start-{self.starts}.log"

    def output(self) -> str:
        """What it has printed since its last start."""
        return self.log.read_text(errors="replace")

    def beat(self) -> dict:
        """Its last heartbeat."""
        try:
            return json.loads((self.directory / "heartbeat.json").read_text())
        except (OSError, ValueError):
            return {"phase": "load", "step": 0, "time": 0}

    def trains(self) -> bool:
        """Whether it trains since its last start."""
        beat = self.beat()
        if beat["phase"] == "train" and beat["time"] > self.loading_since:
            self.loading_since = 0.0
            return True
        return False

    def steps_recorded(self) -> int:
        path = self.directory / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def newest(self) -> list[Path]:
        """Its checkpoints, the newest first."""
        found = self.directory.glob("checkpoint-*")
        return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)

    # -- waiting -------------------------------------------------------------------------------
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal, as subprocess has it; None while it runs."""
        code = self.shell.poll()
        return 128 - code if code is not None and code > 128 else code

    def until(self, true: Callable[[], Any], what: str, pause: float = 0.02) -> Any:
        """Wait for something, and return it. The run must not end before."""
        end = time.monotonic() + PATIENCE
        while not (found := true()):
            if self.exit_code() == 0:
                raise Finished
            if self.exit_code() is not None:
                raise BrokenPromise(f"exit {self.exit_code()} before {what}")
            if time.monotonic() > end:
                raise BrokenPromise(f"{what}: not in {PATIENCE} s")
            time.sleep(pause)
        return found

    def until_recorded(self, steps: int) -> None:
        """Wait for more records of optimizer steps."""
        goal = self.steps_recorded() + steps
        self.until(lambda: self.steps_recorded() >= goal, f"{steps} more steps")

    def ends(self) -> int:
        """Wait for its end. Return its exit code."""
        try:
            self.shell.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise BrokenPromise(f"it did not end in {PATIENCE} s") from None
        if self.exit_code() == 0:
            raise Finished
        return self.exit_code() or 0

    def stop(self) -> None:
        """Stop it, as a part of a fault that needs it to be down, with two checkpoints."""
        self.until(self.trains, "training")
        self.until(lambda: len(self.newest()) > 1, "two checkpoints")
        self.supervisor.terminate()
        if self.ends() != 75:
            raise BrokenPromise(f"exit {self.exit_code()} after SIGTERM")

    # -- going on ------------------------------------------------------------------------------
    def line_to_go_on(self) -> str:
        """Return what a user pastes now. Only where the output was lost it is known otherwise."""
        code, text = self.exit_code() or 0, self.output()
        if self.output_lost or code < 0:
            config = self.directory / "resolved_config.yaml"
            resume = ["--config", str(config), "--resume_from_checkpoint", "auto"]
            return shlex.join([*SUPERVISE, "--num_gpus", str(RANKS), *resume])
        if lines := PASTED.findall(text):
            return lines[-1]
        if code in (2, 3) and "error: " in text and "fix: " in text:
            return self.line  # a refused start: the fix is named, then the same line again
        raise BrokenPromise(f"exit {code} without the line that goes on")

    def go_on(self, **options: bool) -> None:
        for aside in self.directory.glob("*-checkpoint-*"):  # damaged, superseded: a user's to keep
            if not aside.name.startswith("."):
                shutil.rmtree(aside)
        self.start(self.line_to_go_on(), **options)


# -- disks -------------------------------------------------------------------------------------
def make_disk(folder: Path, name: str, megabytes: int, stack: ExitStack) -> Path:
    """Return the directory of a small ext4 of its own."""
    image, place = folder / f"{name}.img", folder / name
    with open(image, "wb") as file:
        file.truncate(megabytes * 2**20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    mount = ["mount", "-o", "loop", str(image), str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the soak needs loop devices, for three small disks: {done.stderr}")
    stack.callback(subprocess.run, ["umount", "-l", str(place)])
    return place


def fill(place: Path, leave: int = 0) -> None:
    """Take all space of a disk but so many bytes."""
    with open(place / "filler", "wb") as file:
        end, size = 0, shutil.disk_usage(place).free
        while size >= 512:
            try:
                os.posix_fallocate(file.fileno(), end, size)
                end += size
            except OSError:
                size //= 2
        file.truncate(max(end - leave, 0))


def free(place: Path) -> None:
    (place / "filler").unlink(missing_ok=True)


def flip(path: Path, at: int) -> None:
    """Change one bit of a byte."""
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
        os.fsync(file.fileno())


# -- the kinds of faults -----------------------------------------------------------------------
@dataclass
class Kind:
    """inject(run) → a detail. ends: {exit code, WENT_ON or RESTARTED: what it says then}."""

    inject: Callable[[ChaosRun], str | None]
    ends: dict[int | str, str]
    moments: str
    copies: int


KINDS: dict[str, Kind] = {}
STOPS: dict[int | str, str] = {75: "to go on: "}


def kind(ends: dict[int | str, str], moments: str = "load train save", copies: int = 1) -> Callable:
    """Add a kind of fault. moments: at which it may come. copies: how often, beside the others."""

    def add(inject: Callable[[ChaosRun], str | None]) -> Callable:
        KINDS[inject.__name__] = Kind(inject, ends, moments, copies)
        return inject

    return add


@kind({RESTARTED: "was ended by SIGKILL"}, copies=3)
def kill_rank(run):
    """kill -9 of a rank."""
    run.chance.choice(run.both_ranks()).kill()


@kind({-9: ""})
def kill_supervisor(run):
    """kill -9 of the supervisor: no rank outlives it."""
    ranks = run.ranks()
    run.supervisor.kill()
    if psutil.wait_procs(ranks, 20)[1]:
        raise BrokenPromise("a rank outlives its supervisor by 20 s")


@kind(STOPS, copies=3)
def signal_supervisor(run):
    """A signal that asks to stop."""
    number = run.chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))
    run.supervisor.send_signal(number)
    return number.name


@kind({75: "to go on: ", RESTARTED: "was ended by SIGTERM"})
def signal_rank(run):
    """SIGTERM to one rank. One that does not listen yet dies of it."""
    run.chance.choice(run.both_ranks()).terminate()


@kind(STOPS)
def interrupt_twice(run):
    """Ctrl-C, and once more a moment later."""
    run.supervisor.send_signal(signal.SIGINT)
    time.sleep(run.chance.uniform(0, 2))
    if run.exit_code() is None:
        run.supervisor.send_signal(signal.SIGINT)


@kind({**STOPS, -15: ""}, "train")
def signal_first_moments(run):
    """SIGTERM in the first 200 ms. A Python that has not begun dies of it."""
    run.stop()
    run.go_on()
    delay = run.chance.uniform(0, 0.2)
    time.sleep(delay)
    run.supervisor.terminate()
    return f"{delay * 1000:.0f} ms"


@kind({RESTARTED: "has been stopped for"})
def suspend_rank(run):
    """SIGSTOP of a rank."""
    run.chance.choice(run.both_ranks()).suspend()


@kind(STOPS)
def stop_file(run):
    """The file STOP."""
    (run.directory / "STOP").touch()


@kind(STOPS, "train save")
def stop_command(run):
    """The command that `make stop` gives."""
    done = subprocess.run([*SUPERVISE, "--stop", str(run.directory)], capture_output=True)
    if done.returncode:
        raise BrokenPromise(f"--stop: exit {done.returncode}, {done.stderr.decode()}")


@kind({WENT_ON: "saved "})
def save_file(run):
    """The file SAVE."""
    (run.directory / "SAVE").touch()


@kind({WENT_ON: "", 1: "could not be saved", 2: "cannot be written to"})
def checkpoint_disk_full(run):
    """The disk of the checkpoints is full for some seconds."""
    saved = [int(p.name.removeprefix("checkpoint-")) for p in run.newest()]
    first = max(run.beat()["step"], *saved, 0)
    left = run.chance.choice((0, run.chance.randrange(50 * 2**20)))
    fill(run.directory.parent, left)
    end = time.monotonic() + run.chance.uniform(0.5, 6)
    while time.monotonic() < end and run.exit_code() is None:
        time.sleep(0.02)
    free(run.directory.parent)
    run.unrecorded |= {*range(first, run.beat()["step"] + 3)}
    return f"{left / 2**20:.0f} MiB left"


@kind({WENT_ON: "", 3: "the swap disk is too small"})
def swap_disk_full(run):
    """Somebody takes all that is left on the swap disk."""
    fill(run.swap)
    try:
        run.until(run.trains, "training")
        run.until_recorded(3)
    except BrokenPromise:
        if run.exit_code() != 3:
            raise
    finally:
        free(run.swap)


@kind({WENT_ON: "", 75: ""}, "train save")
def log_disk_full(run):
    """The disk of the log is full; at times the run is stopped meanwhile."""
    run.output_lost = True
    fill(run.logs)
    run.until_recorded(3)
    if stops := run.chance.random() < 0.5:
        run.supervisor.terminate()
        run.ends()
    free(run.logs)
    return "and SIGTERM" if stops else None


@kind({WENT_ON: ""}, "train")
def dead_reader(run):
    """The reader of the output dies."""
    run.stop()
    run.go_on(through_reader=True)
    run.until(run.trains, "training")
    run.output_lost = True
    run.reader.kill()
    run.reader.wait()


@kind({WENT_ON: "resume: skipped "}, "train", copies=2)
def damage_checkpoint(run):
    """The newest checkpoint is damaged while the run is down."""
    run.stop()
    newest = run.newest()[0]
    manifest = newest / "manifest.json"
    victim = run.chance.choice([p for p in newest.iterdir() if p.stat().st_size])
    size = victim.stat().st_size
    how = run.chance.choice("bit truncated missing no-manifest empty-manifest".split())
    if how == "bit":
        flip(victim, run.chance.randrange(size))
    elif how == "truncated":
        os.truncate(victim, run.chance.randrange(size))
    elif how == "missing":
        victim.unlink()
    elif how == "no-manifest":
        manifest.unlink()
    else:
        os.truncate(manifest, 0)
    run.go_on()
    return f"{how} {victim.name}" if "manifest" not in how else how


@kind({WENT_ON: "", 1: "a swap file is damaged"}, "train save")
def damage_swap(run):
    """A bit of a swap file changes. Where the next access is a write, nobody sees it."""
    own = max(run.swap.glob("*/zero-offload-swap.json"), key=lambda p: p.stat().st_mtime).parent
    victim = run.chance.choice([p for p in own.rglob("*.swp") if p.stat().st_size])
    flip(victim, run.chance.randrange(victim.stat().st_size))
    return victim.name


@kind({WENT_ON: ""})
def second_start(run):
    """The same run is started once more, with or without a supervisor: refused, exit 2."""
    run.both_ranks()
    # While the ranks load, the lock that train.py looks for is not taken yet.
    scripts = ["supervise.py"] if run.loading_since else ["supervise.py", "train.py"]
    script = run.chance.choice(scripts)
    config = run.directory / "resolved_config.yaml"
    run.until(config.exists, "its configuration")
    resume = ["--config", config, "--resume_from_checkpoint", "auto"]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / script, *resume],
        cwd="/",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if run.exit_code() is None and (done.returncode != 2 or "is in use" not in done.stderr):
        raise BrokenPromise(f"a second start: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return script


@kind({WENT_ON: ""}, "train save")
def lost_heartbeat(run):
    """heartbeat.json is removed; at times a directory lies in its place for some steps."""
    heartbeat = run.directory / "heartbeat.json"
    heartbeat.unlink()
    if run.chance.random() < 0.5:
        return "removed"
    try:
        heartbeat.mkdir()
        run.until_recorded(3)
        heartbeat.rmdir()
    except FileExistsError:  # the next step was faster
        pass
    return "unwritable"


@kind({WENT_ON: "is of the line that is left here"}, "train")
def go_back(run):
    """Resumed by the path of an older checkpoint."""
    run.stop()
    older = run.newest()[1]
    run.start(run.line_to_go_on().removesuffix("auto") + shlex.quote(str(older)))
    return older.name


@kind({WENT_ON: ""})
def stale_leftover(run):
    """A killed save has left a temporary checkpoint: the next save removes it."""
    identity = json.loads((run.directory / "run.json").read_text())
    stale = run.directory / f".tmp-checkpoint-{identity['id']}-3-0a1b2c3d"
    stale.mkdir()
    (stale / "rank-00000-group-00000.safetensors").write_bytes(bytes(2**16))
    run.until(lambda: not stale.exists(), "the end of a leftover")


# -- one fault ---------------------------------------------------------------------------------
@dataclass
class Fault:
    """One fault: where the run was, and how it ended."""

    number: int
    name: str
    began: float
    phase: str
    step: int
    detail: str = ""
    ended: int | str = ""

    def report(self, since: float, recovery: float | None) -> None:
        seconds = f"{recovery:5.1f} s" if recovery is not None else "-"
        ended = self.ended if isinstance(self.ended, str) else f"exit {self.ended}"
        print(
            f"{self.number:4} {self.began - since:6.0f} s  {self.phase:5} {self.step:4}  "
            f"{f'{self.name} {self.detail}'.strip():45} {ended:10} {seconds}",
            flush=True,
        )


def outcome(run: ChaosRun, one: Kind, before: set[int]) -> int | str:
    """Wait for what the fault leads to. before: pids of the ranks then."""
    injected, steps, end = time.time(), set(), time.monotonic() + PATIENCE
    while (code := run.exit_code()) is None:
        if RESTARTED in one.ends:
            fresh = {p.pid for p in run.ranks()}
            if len(fresh) == RANKS and not fresh & before:
                run.loading_since = time.time()
                return RESTARTED
        beat = run.beat()
        if WENT_ON in one.ends and beat["phase"] == "train" and beat["time"] > injected:
            steps.add(beat["step"])
            if len(steps) >= SETTLED:
                run.loading_since = 0.0
                return WENT_ON
        if time.monotonic() > end:
            raise BrokenPromise(f"none of {list(one.ends)} in {PATIENCE} s")
        time.sleep(0.02)
    return code


def check_words(run: ChaosRun, one: Kind, ended: int | str) -> None:
    """The exit code and the words must be those of the fault."""
    text = run.output()[run.fault_at :]
    spent = "restarts without a new checkpoint"
    if ended == 1 and RESTARTED in one.ends and spent in text:
        return
    if ended not in one.ends:
        raise BrokenPromise(f"{ended}; this fault explains {list(one.ends)} only")
    if run.output_lost:
        return
    if one.ends[ended] not in text:
        raise BrokenPromise(f"{ended} without the words {one.ends[ended]!r}")
    if ended in (1, 2, 3) and "error: " not in text:
        raise BrokenPromise(f"exit {ended} without an error")
    if ended == WENT_ON and re.search(r"^restart \d", text, re.MULTILINE):
        raise BrokenPromise("it was restarted, where it should have gone on")


def disturb(run: ChaosRun, options: argparse.Namespace, began: float) -> dict[str, list]:
    """Inject the faults. Return {kind: [(how it ended, seconds of recovery or None), ...]}."""
    done: dict[str, list] = defaultdict(list)
    last: Fault | None = None
    deck: list[str] = []

    def recovered(fault: Fault | None, seconds: float | None) -> None:
        if fault:
            fault.report(began, seconds)
            done[fault.name].append((fault.ended, seconds))

    try:
        for number in range(1, options.faults + 1):
            if not deck:  # every kind comes before one comes again
                deck = [name for name in options.kinds for _ in range(KINDS[name].copies)]
                run.chance.shuffle(deck)
            one = KINDS[name := deck.pop()]
            run.both_ranks()
            again = run.loading_since and "load" in one.moments and run.chance.random() < 0.25
            if again:
                time.sleep(run.chance.uniform(0, 6))
            else:
                run.until(run.trains, "training")
            recovered(last, None if again else time.monotonic() - last.began if last else None)
            last = None
            if not again and "save" in one.moments and run.chance.random() < 0.25:
                run.until(lambda: run.beat()["phase"] == "save", "a save", 0.001)
            elif not again:
                time.sleep(run.chance.uniform(0, 1.5))
            before = {p.pid for p in run.both_ranks()}
            beat, run.fault_at = run.beat(), len(run.output())
            last = Fault(number, name, time.monotonic(), beat["phase"], beat["step"])
            last.detail = one.inject(run) or ""
            last.ended = outcome(run, one, before)
            if last.ended == 0:
                raise Finished
            check_words(run, one, last.ended)
            if not isinstance(last.ended, str):
                run.go_on()
        run.until(run.trains, "training")
        recovered(last, time.monotonic() - last.began if last else None)
        last = None
        run.shell.wait(options.steps * 5)
        if code := run.exit_code():
            raise BrokenPromise(f"exit {code} after the last fault")
    except Finished:
        if last:
            last.ended = 0
        recovered(last, None)
    except BrokenPromise:
        if last:
            last.ended = "BROKEN"
            recovered(last, None)
        raise
    return done


# -- the whole soak ----------------------------------------------------------------------------
def shards(directory: Path, step: int) -> dict[str, str]:
    files = json.loads((directory / f"checkpoint-{step}" / "manifest.json").read_text())["files"]
    return {n: f["xxh3_128"] for n, f in files.items() if n.endswith(".safetensors")}


def losses(directory: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in lines if "loss" in r]


def start_line(folder: Path, directory: Path, swap: Path, steps: int) -> str:
    """Return the command that starts a run."""
    own = flags(
        num_gpus=RANKS,
        max_steps=steps,
        output_dir=directory,
        model_name_or_path=folder / "model",
        dataset=folder / "rows.jsonl",
        nvme_path=swap,
    )
    return f"cd {shlex.quote(str(ROOT))} && {shlex.join(map(str, [*SUPERVISE, *own, *FLAGS]))}"


def soak(folder: Path, options: argparse.Namespace, stack: ExitStack) -> None:
    """Run the calm and the disturbed run, and compare them."""
    make_model(folder / "model")
    make_tokenizer(folder / "model")
    samples = (ROOT / "data" / "samples" / "train.jsonl").read_text().splitlines()[:200]
    write_rows(folder / "rows.jsonl", map(json.loads, samples))
    sizes = {"runs": 450, "swap": 250, "logs": 16}
    runs, swap, logs = (make_disk(folder, name, size, stack) for name, size in sizes.items())

    began = time.monotonic()
    calm = start_line(folder, folder / "calm", swap, options.steps)
    with open(folder / "calm.log", "w") as log:
        code = subprocess.call(["bash", "-c", calm], env=ENVIRONMENT, stdout=log, stderr=log)
    if code:
        raise BrokenPromise(f"exit {code} of the undisturbed run: {folder / 'calm.log'}")
    calm_seconds = time.monotonic() - began
    print(f"undisturbed: {options.steps} steps in {calm_seconds:.0f} s", flush=True)

    began = time.monotonic()
    run = ChaosRun(runs / "a run", swap, logs, random.Random(options.seed))
    run.start(start_line(folder, run.directory, swap, options.steps))
    stack.callback(lambda: run.supervisor.is_running() and run.supervisor.kill())
    try:
        done = disturb(run, options, began)
    except BrokenPromise as error:
        tail = "\n".join(run.output().splitlines()[-40:])
        raise BrokenPromise(f"{error}\n--- the end of {run.log.name}\n{tail}\n---") from None

    rows = [("kind", "faults", "ended", "median recovery")]
    for name, faults in sorted(done.items()):
        seconds = [s for _, s in faults if s is not None]
        ends = ", ".join(f"{n} {e}" for e, n in Counter(str(e) for e, _ in faults).most_common())
        median = f"{statistics.median(seconds):.1f} s" if seconds else "-"
        rows.append((name, str(len(faults)), ends, median))
    count = sum(map(len, done.values()))
    print(
        f"\n{table(rows, '  ')}\n\n{count} faults over {options.steps} steps, {RANKS} ranks, "
        f"seed {options.seed}: {time.monotonic() - began:.0f} s against {calm_seconds:.0f} s"
    )
    same = shards(folder / "calm", options.steps) == shards(run.directory, options.steps)
    right, found = losses(folder / "calm"), losses(run.directory)
    missing = {step for step, _ in right} - {step for step, _ in found}
    same_losses = found == [(s, loss) for s, loss in right if s not in missing]
    same_losses &= missing <= run.unrecorded
    print(
        f"last checkpoint bit-equal: {same}; all losses equal: {same_losses} ({len(found)}; "
        f"{len(missing)} steps had no room in metrics.jsonl on a full disk)"
    )
    if not same or not same_losses:
        raise BrokenPromise("the disturbed run is another one than the undisturbed")
    if count < options.faults:
        raise BrokenPromise(f"it was done after {count} faults: more --steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--steps", type=int, default=0, help="default: 10 for each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=[*KINDS])
    options = parser.parse_args()
    options.steps = options.steps or 20 + 10 * options.faults
    if unknown := {*options.kinds} - {*KINDS}:
        parser.error(f"no kind {', '.join(unknown)}; there are: {', '.join(KINDS)}")
    if os.getuid() or not shutil.which("mkfs.ext4"):
        raise SystemExit("the soak needs root and mkfs.ext4, for three small disks: sudo make …")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the soak was stopped"))
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        with ExitStack() as stack:
            soak(folder, options, stack)
    except BrokenPromise as error:
        images = f"its disks are {folder}/*.img (mount -o loop)"
        raise SystemExit(f"\nBROKEN: {error}\nseed {options.seed}; {images}") from None
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
