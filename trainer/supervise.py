"""Start the ranks of this machine, pass signals on to them, and restart them after a fault.

`launch/supervise.py` calls main(). Does not import torch. The `deepspeed` launcher signals one rank
at a time, thirty seconds apart, and leaves its ranks alive when it is killed itself.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from data import storage
from trainer.checkpoint import resume
from trainer.config.command_line import WHERE, command, split_own
from trainer.config.device import uses_gpu
from trainer.config.flags import help_text
from trainer.config.settings import Settings, resolve
from trainer.console import drop_lost_terminals, say, table, terminals, to_stderr
from trainer.distributed import free_port
from trainer.errors import BAD_INPUT, CRASHED, DOES_NOT_FIT, DONE, FAILED, STOPPED, RunError
from trainer.run_dir import (
    RUNS,
    SILENCE_LIMITS,
    STOP,
    Phase,
    RunDirectory,
    all_runs,
    default_run_name,
    run_directory,
)
from trainer.system import hardware

USAGE = """python launch/supervise.py [--num_gpus N] [--detach] [--max_restarts 3]
                           [--hang_timeout SECONDS] [--FLAG VALUE ...]

Runs launch/train.py with the flags on every GPU of this machine (--num_gpus ranks; one rank without
a GPU). A rank that dies or hangs ends the others, and the run resumes from its last checkpoint, at
most --max_restarts times without a new one.
Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 stop all ranks after the same optimizer step, with a checkpoint:
exit code 75. Twice: at once.
--detach: in the background; the output goes to train.log in the run directory.
--hostfile FILE: several machines, by `deepspeed` alone.
--stop RUN: stop that run.   --status: what the runs here are doing.

"""
FINAL = (FAILED, BAD_INPUT, DOES_NOT_FIT, STOPPED)  # exit codes that a restart would not change
POLL = 0.2  # seconds
SUSPENDED_LIMIT = 20  # seconds that a rank may be suspended (SIGSTOP, a debugger)
SLACK = 20  # a step hangs when it takes so many times the longest one before it


@dataclass
class Options:
    """The supervisor's own flags. None: a switch that is off."""

    num_gpus: int = 0  # 0: all
    hostfile: str = ""
    max_restarts: int = 3
    hang_timeout: int = SILENCE_LIMITS[Phase.TRAIN]  # seconds
    script: str = "launch/train.py"
    stop: str = ""
    detach: bool | None = None
    status: bool | None = None


def parse_options(argv: list[str]) -> tuple[Options, list[str]]:
    """Return the supervisor's options, and the flags for launch/train.py."""
    values, flags = split_own(argv, vars(Options()))
    for name in ("num_gpus", "max_restarts", "hang_timeout"):
        number = str(values[name])
        if not number.isdigit():
            raise RunError(f"{WHERE}: --{name} is not a whole number", found=number)
        values[name] = int(number)
    return Options(**values), flags


@command
def main(argv: list[str] | None = None) -> int:
    """Do what the command line says, and return the exit code, that of a supervised run."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        say(USAGE + help_text())
        return DONE
    options, flags = parse_options(argv)
    if options.status:
        return status()
    if options.stop:
        path = Path(options.stop)
        if not path.is_dir():
            path = RUNS / options.stop.removeprefix("runs/")
        return stop(RunDirectory(path))
    if options.hostfile:
        become_deepspeed(options, flags)
    settings = resolve(flags)
    directory, identity = identify(settings)
    if options.detach:
        return detach([*argv, *identity], directory)
    ranks = options.num_gpus or (hardware.gpu_count() if uses_gpu(settings) else 1)
    return Supervisor(directory, options, ranks).run([*flags, *identity])


def become_deepspeed(options: Options, flags: list[str]) -> NoReturn:
    """Replace this process by the deepspeed launcher, which starts ranks on several machines."""
    refused = [
        f"--{name}"
        for name in ("detach", "max_restarts", "hang_timeout")
        if getattr(options, name) != getattr(Options, name)
    ]
    if refused:
        raise RunError(
            f"{', '.join(refused)}: only for one machine",
            fix="without --hostfile; or inside tmux or nohup",
        )
    say("several machines: started by deepspeed; nothing restarts them")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    gpus = ["--num_gpus", str(options.num_gpus)] if options.num_gpus else []
    os.execv(launcher, [launcher, "--hostfile", options.hostfile, *gpus, options.script, *flags])


def identify(settings: Settings) -> tuple[RunDirectory, list[str]]:
    """Return the run directory, and the flags that every restart needs to find it again."""
    directory = run_directory(settings)
    resume.check_request(settings)
    if directory:
        return directory, []
    if settings.output_dir:  # check_request took it from the checkpoint's path
        return RunDirectory(settings.output_dir), ["--output_dir", settings.output_dir]
    name = default_run_name(settings)
    return RunDirectory(RUNS / name), ["--run_name", name]


def detach(argv: list[str], directory: RunDirectory) -> int:
    """Start the same command in a session of its own, and say where its output goes."""
    if hardware.in_our_image() and os.getppid() == 1:  # the container ends with its command
        raise RunError(
            "--detach: the container would end at once, and the run with it",
            fix="without it: make docker-run DETACH=1, or docker run --detach",
        )
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        with open(directory.log, "a") as log:
            process = subprocess.Popen(
                [sys.executable, sys.argv[0], *(word for word in argv if word != "--detach")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except OSError as error:
        raise directory.not_writable(error) from None
    say(
        f"in the background, pid {process.pid}\n"
        f"log:  tail -f {directory.log}\n"
        f"stop: make stop RUN={directory.path.name}"
    )
    return DONE


def stop(directory: RunDirectory) -> int:
    """Ask a run to stop, and wait until it has."""
    if not directory.heartbeat.exists():
        raise RunError(
            f"no run {directory}",
            found=", ".join(path.name for path in RUNS.glob("*")) or "no runs here",
        )
    if not directory.is_alive():
        say(f"{directory} is not running ({directory.read_heartbeat().get('phase')})")
        return DONE
    (directory.path / STOP).touch()
    say(f"{directory} stops after its optimizer step, with a checkpoint")
    while directory.is_alive():
        time.sleep(POLL)
    beat = directory.read_heartbeat()
    say(f"{directory}: {beat.get('phase')} at step {beat.get('step')}")
    return DONE


def status() -> int:
    """Print what the runs under runs/ are doing."""
    rows = [("run", "state", "step", "last seen")]
    for run in all_runs():
        beat = run.read_heartbeat()
        state = beat.get("phase", "?")
        if not run.is_alive() and state not in (Phase.DONE, Phase.STOPPED):
            state = f"ended in {state}"
        ago = f"{time.time() - beat.get('time', 0):,.0f} s ago"
        rows.append((run.path.name, state, str(beat.get("step")), ago))
    say(table(rows, "  "))
    return DONE


def oom_kills() -> int:
    """Return how many processes the kernel has killed because RAM ran out, since it started."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return int(dict(line.split() for line in lines).get("oom_kill", 0))


def position(beat: dict) -> str:
    """Return a heartbeat's phase and step as text."""
    return f"in {beat.get('phase', 'start')} after step {beat.get('step', 0)}"


@dataclass
class Attempt:
    """One start of the ranks, and what was seen of them. Times but `began` are monotonic."""

    first_step: int = 0  # of the checkpoint that it resumes from
    processes: list[psutil.Popen] = field(default_factory=list)  # by rank
    began: float = field(default_factory=time.time)
    oom_kills: int = field(default_factory=oom_kills)  # before it began
    lowest_free: float = field(default_factory=hardware.free_memory)  # bytes of RAM
    sizes: dict[int, int] = field(default_factory=dict)  # rank: bytes of RAM
    suspended_since: dict[int, float] = field(default_factory=dict)  # rank: time
    heartbeat: dict = field(default_factory=dict)
    heartbeat_seen: float = 0.0
    longest_step: float = 0.0  # seconds

    def running(self) -> list[psutil.Popen]:
        """Return the ranks that have not ended."""
        return [process for process in self.processes if process.poll() is None]

    def check_processes(self) -> str | None:
        """Measure the memory of the ranks. Return what is wrong where one is suspended too long."""
        now = time.monotonic()
        self.lowest_free = min(self.lowest_free, hardware.free_memory())
        for rank, process in enumerate(self.processes):
            try:
                self.sizes[rank] = process.memory_info().rss
                state = process.status()
            except psutil.Error:  # it has just ended
                continue
            if state not in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                self.suspended_since.pop(rank, None)
                continue
            seconds = now - self.suspended_since.setdefault(rank, now)
            if seconds > SUSPENDED_LIMIT:
                return f"rank {rank} (pid {process.pid}) has been stopped for {seconds:.0f} s"
        return None

    def killed(self, rank: int, number: signal.Signals, where: str) -> RunError:
        """Return the error of a rank that a signal ended.

        After SIGKILL it says whether the kernel sent it because memory ran out.
        """
        what = f"rank {rank} was ended by {number.name} {where}"
        if number != signal.SIGKILL:
            return RunError(what)
        free, size = self.lowest_free / 2**30, self.sizes.get(rank, 0) / 2**30
        kernel, fix = "counts no kill for want of memory, so somebody sent it", None
        if kills := oom_kills() - self.oom_kills:
            kernel = f"killed {kills} process(es) for want of memory"
            fix = (
                "fewer ranks, or a configuration that keeps less in RAM "
                "(ds_z3_nvme_optimizer.json, ds_z3_nvme.json)"
            )
        memory = f"MemAvailable fell to {free:.2f} GiB, the rank held {size:.2f} GiB"
        return RunError(what, found=f"{memory}; the kernel {kernel}", fix=fix)

    def end(self, grace_period: float) -> None:
        """Kill the ranks that have not ended after so many seconds."""
        psutil.wait_procs(self.processes, grace_period)
        for process in self.processes:
            try:  # with the processes that it started: a loader's worker can hold its locks
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        psutil.wait_procs(self.processes)


@dataclass
class Supervisor:
    """One run: its ranks, started again after a fault as often as max_restarts allows."""

    directory: RunDirectory
    options: Options
    ranks: int
    starts: int = 0
    attempt: Attempt = field(default_factory=Attempt)
    stop_requested: bool = False  # by a signal
    published_limit: float = 0.0  # seconds

    def run(self, flags: list[str]) -> int:
        """Run launch/train.py with the flags until it ends well or is stopped.

        Return the exit code. Raise RunError after max_restarts restarts without a new checkpoint.
        """
        self.directory.lock(self.directory.supervisor_lock)
        self.terminals = terminals()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        say(f"{self.ranks} rank(s): {self.options.script} {' '.join(map(storage.shown, flags))}")
        checkpoint = first_checkpoint = resume.newest(self.directory.path)
        restarts, most, resume_flags = 0, self.options.max_restarts, []
        while True:
            self._start([*flags, *resume_flags], checkpoint or 0)
            code, fault = self._watch()
            if fault is None:
                return code
            to_stderr(f"\n{fault}")
            if self.stop_requested:
                return code
            previous, checkpoint = checkpoint, resume.newest(self.directory.path)
            restarts = restarts + 1 if checkpoint == previous else 1
            begin = "no checkpoint yet, so from the beginning"
            if checkpoint is not None:
                begin = f"goes on from checkpoint-{checkpoint}"
            progress = f"last seen {position(self.directory.read_heartbeat())}; {begin}"
            if restarts > most:
                raise RunError(
                    f"{most} restarts without a new checkpoint",
                    found=progress,
                    fix=f"remove the cause, then {resume.command(self.directory)}",
                    code=FAILED,
                )
            to_stderr(f"restart {restarts} of {most}: {progress}")
            # Until the run has a checkpoint of its own, it starts as the user asked.
            if checkpoint is None or checkpoint != first_checkpoint:
                resume_flags = ["--resume_from_checkpoint", "auto"]

    def _start(self, flags: list[str], step: int) -> None:
        """Start a process for each rank. step: of the checkpoint that they resume from."""
        self.starts += 1
        self.attempt = Attempt(step)
        ranks = str(self.ranks)
        shared = {
            **os.environ,
            "WORLD_SIZE": ranks,
            "LOCAL_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "ZERO_OFFLOAD_SUPERVISED": str(self.starts),
        }
        for rank in map(str, range(self.ranks)):
            # A session of its own: Ctrl-C comes through us, once, to all. And no rank outlives us.
            self.attempt.processes.append(
                psutil.Popen(
                    [sys.executable, "-u", self.options.script, *flags],
                    env={**shared, "RANK": rank, "LOCAL_RANK": rank},
                    start_new_session=True,
                    preexec_fn=hardware.die_with_parent,
                )
            )

    def _pass_on(self, number: int, frame: object) -> None:
        """Send a signal on to all ranks; SIGHUP as SIGTERM."""
        self.stop_requested = True
        drop_lost_terminals(self.terminals)
        for process in self.attempt.running():
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _watch(self) -> tuple[int, RunError | None]:
        """Wait until all ranks have ended. Return the exit code, and the fault or None.

        After a fault a restart may help: then the code counts only where a signal asked to stop.
        """
        next_check = 0.0
        while True:
            codes = [process.poll() for process in self.attempt.processes]
            failures = [(rank, code) for rank, code in enumerate(codes) if code]
            if failures:
                # A rank that was killed makes others fail: it is the one to name.
                return self._ended(
                    *min(failures, key=lambda pair: (pair[1] > 0, pair[1] == CRASHED))
                )
            if None not in codes:
                return DONE, None
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + 1
                if hang := self.attempt.check_processes() or self._silence():
                    self._dump_stacks()
                    self.attempt.end(0)
                    return FAILED, RunError(hang)
            time.sleep(POLL)

    def _ended(self, rank: int, code: int) -> tuple[int, RunError | None]:
        """End the other ranks after one has failed. Return what _watch returns."""
        where = position(self.directory.read_heartbeat())
        # A rank that knows of the stop ends alone; others wait in a collective for the lost one.
        self.attempt.end(60 if code == STOPPED else 5)
        if code in FINAL:
            return code, None
        if code > 0:
            return FAILED, RunError(f"rank {rank} failed {where}")
        return STOPPED, self.attempt.killed(rank, signal.Signals(-code), where)

    def _silence(self) -> str | None:
        """Return why the ranks count as hung: no new heartbeat for too long. None where not.

        Writes the limit that it took into the run directory.
        """
        attempt, now = self.attempt, time.monotonic()
        beat = self.directory.read_heartbeat()
        if beat.get("time", 0) < attempt.began:  # none yet, or an earlier attempt's
            beat = {"step": 0, "phase": Phase.LOAD}
        phase = beat["phase"]
        if beat != attempt.heartbeat:
            if phase == attempt.heartbeat.get("phase") == Phase.TRAIN:
                attempt.longest_step = max(attempt.longest_step, now - attempt.heartbeat_seen)
            attempt.heartbeat, attempt.heartbeat_seen = beat, now
        limit = SILENCE_LIMITS[phase]
        if phase == Phase.TRAIN:
            # Before the end of the first step nobody knows how long one takes.
            first = beat["step"] <= attempt.first_step
            longest = SILENCE_LIMITS[Phase.LOAD] if first else SLACK * attempt.longest_step
            limit = max(self.options.hang_timeout, longest)
        if limit != self.published_limit:
            self.published_limit = limit
            try:  # for others who watch the run, such as the image's health check
                self.directory.silence_limit_file.write_text(str(limit))
            except OSError:  # a full disk: the ranks report it
                pass
        silent = now - attempt.heartbeat_seen
        if silent <= limit:
            return None
        limit_text = f"limit: {limit:.0f} s (--hang_timeout)"
        return f"no sign of life for {silent:.0f} s {position(beat)}; {limit_text}"

    def _dump_stacks(self) -> None:
        """Make every rank write its stacks, suspended ranks too."""
        for process in self.attempt.running():
            process.send_signal(signal.SIGUSR2)
            process.send_signal(signal.SIGCONT)
        time.sleep(2)
        to_stderr(f"stacks of all ranks: {self.directory}/stacks-*.txt")
