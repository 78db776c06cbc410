"""Start the ranks of this machine, pass signals on to them, and restart them after a fault.

`launch/supervise.py` calls main(). Does not import torch. The `deepspeed` launcher signals one rank
at a time, thirty seconds apart, and leaves its ranks alive when it is killed itself.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from data import storage
from data.errors import disk_errors
from data.files import in_place
from trainer import ROOT
from trainer.checkpoint import resume
from trainer.checkpoint.files import commits
from trainer.config.command_line import LAUNCHER_HOSTFILE, WHERE, command, split_own
from trainer.config.device import uses_gpu
from trainer.config.flags import help_text
from trainer.config.settings import Settings, resolve
from trainer.console import answered, drop_when_blocked, say, table, to_stderr
from trainer.distributed import LAUNCHER, free_port
from trainer.errors import BAD_INPUT, CRASHED, DOES_NOT_FIT, DONE, FAILED, STOPPED, RunError
from trainer.prepare import prepare
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
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # that ask to stop
FINAL = (FAILED, BAD_INPUT, DOES_NOT_FIT, STOPPED)  # exit codes that a restart would not change
POLL = 0.2  # seconds
START_SECONDS = 30  # that --detach watches a start
START_LINES = 40  # of the log that it shows
SUSPENDED_LIMIT = 20  # seconds that a rank may be suspended (SIGSTOP, a debugger)
KILL_ROUNDS = 5  # of kills, for processes that are started meanwhile
SLACK = 20  # a step hangs when it takes so many times the longest one before it


@dataclass
class Options:
    """The supervisor's own flags. None: a switch that is off."""

    num_gpus: int = 0  # 0: all
    hostfile: str = ""
    max_restarts: int = 3
    hang_timeout: int = SILENCE_LIMITS[Phase.TRAIN]  # seconds
    script: str = str(ROOT / "launch" / "train.py")
    stop: str = ""
    detach: bool | None = None
    status: bool | None = None


def parse_options(argv: list[str]) -> tuple[Options, list[str]]:
    """Return the supervisor's options, and the flags for launch/train.py."""
    values, flags = split_own(argv, vars(Options()))
    for name in ("num_gpus", "max_restarts", "hang_timeout"):
        number = str(values[name])
        if not number.isdecimal():
            raise RunError(f"{WHERE}: --{name} is not a whole number", found=number)
        values[name] = int(number)
    return Options(**values), flags


@command
def main(argv: list[str] | None = None) -> int:
    """Do what the command line says, and return the exit code, that of a supervised run."""
    argv = sys.argv[1:] if argv is None else argv
    for name in LAUNCHER:  # of a launcher around this one: it is no rank
        os.environ.pop(name, None)
    if {"-h", "--help"} & {*argv}:
        say(USAGE + help_text())
        return answered(DONE)
    options, flags = parse_options(argv)
    if options.status or options.stop:
        check_alone(options, flags)
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
    ranks = options.num_gpus or (hardware.gpu_count() if uses_gpu(settings) else 1)
    directory, identity = identify(settings, ranks)
    if options.detach:
        prepare(settings, ranks)  # here it can still be said what is wrong
        return detach([*argv, *identity], directory)
    from_path = settings.resume_from_checkpoint not in (None, "auto")
    return Supervisor(directory, options, ranks, from_path).run([*flags, *identity])


def check_alone(options: Options, flags: list[str]) -> None:
    """Raise RunError for words beside --stop RUN or --status: they would mean nothing."""
    asked = "stop" if options.stop else "status"
    given = vars(options).items()
    others = [f"--{k}" for k, v in given if k != asked and v != getattr(Options, k)]
    if others or flags:
        raise RunError(
            f"{WHERE}: unexpected beside --{asked}",
            found=shlex.join([*others, *flags]),
            needed="--stop RUN, a name with blanks in quotes" if options.stop else "--status alone",
        )


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
    check_hostfile(Path(options.hostfile))
    say("several machines: started by deepspeed; nothing restarts them")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    gpus = ["--num_gpus", str(options.num_gpus)] if options.num_gpus else []
    start = [launcher, "--hostfile", options.hostfile, *gpus, options.script, *flags]
    os.execv(launcher, [*start, f"--{LAUNCHER_HOSTFILE}", str(Path(options.hostfile).absolute())])


def check_hostfile(path: Path) -> None:
    """Raise RunError for a hostfile that deepspeed cannot read.

    Where there is none it would train on this machine alone.
    """
    needed = "a line `HOST slots=GPUS` for each machine"
    with disk_errors(f"the hostfile {path} cannot be read", needed=needed):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    hosts: set[str] = set()
    for line in filter(None, map(str.strip, lines)):
        entry = re.match(r"(\S+)\s+slots=[1-9]", line)
        if line.startswith("#"):
            continue
        if not entry or entry[1] in hosts:
            what = "names a machine twice" if entry else "has a line that is none of a machine"
            raise RunError(f"the hostfile {path} {what}", found=line, needed=needed)
        hosts.add(entry[1])
    if not hosts:
        raise RunError(f"the hostfile {path} names no machine", needed=needed)


def identify(settings: Settings, ranks: int = 1) -> tuple[RunDirectory, list[str]]:
    """Return the run directory, and the flags that every restart needs to find it again."""
    directory = run_directory(settings)
    resume.check_request(settings, ranks)
    if directory:
        return directory, []
    if settings.output_dir:  # check_request took it from the checkpoint's path
        return RunDirectory(settings.output_dir), ["--output_dir", settings.output_dir]
    name = default_run_name(settings)
    return RunDirectory(RUNS / name), ["--run_name", name]


def detach(argv: list[str], directory: RunDirectory) -> int:
    """Start the same command in a session of its own, and say where its output goes.

    Then watch it for START_SECONDS, or until it trains: what only the ranks can find out is said
    here too, and the exit code is theirs.
    """
    end, before = time.monotonic() + START_SECONDS, directory.read_heartbeat()
    if hardware.in_our_image() and os.getppid() == 1:  # the container ends with its command
        raise RunError(
            "--detach: the container would end at once, and the run with it",
            fix="without it: make docker-run DETACH=1, or docker run --detach",
        )
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        with open(directory.log, "ab", opener=in_place) as log:
            began = log.tell()
            process = subprocess.Popen(
                [sys.executable, sys.argv[0], *(word for word in argv if word != "--detach")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except OSError as error:
        raise directory.not_writable(error) from None

    def ended_badly() -> int | None:
        """Return the exit code of a start that has failed, and say what it has said."""
        code = process.poll()
        if code:
            said = directory.log.read_bytes()[began:].decode(errors="replace").strip()
            if code in (BAD_INPUT, DOES_NOT_FIT):
                said = said[max(0, said.rfind("\nerror: ")) :].strip()
            last = "\n".join(said.splitlines()[-START_LINES:])
            to_stderr(last or f"error: exit {code}, and nothing in {directory.log}")
        return code

    # It takes the run's lock first of all, or says why it cannot. Ctrl-C leaves it running.
    with suppress(KeyboardInterrupt):
        while process.poll() is None and directory.last_supervisor() != process.pid:
            time.sleep(POLL)
    if code := ended_badly():
        return code
    path = directory.path.absolute()
    stop_line = [sys.executable, f"{ROOT}/launch/supervise.py", "--stop", str(path)]
    say(
        f"in the background, pid {process.pid}\n"
        f"log:  {shlex.join(['tail', '-f', str(path / directory.log.name)])}\n"
        f"stop: {shlex.join(stop_line)}"
    )
    with suppress(KeyboardInterrupt):
        while process.poll() is None and time.monotonic() < end:
            beat = directory.read_heartbeat()
            if beat and beat != before and beat["phase"] != Phase.LOAD:
                break
            time.sleep(POLL)
    return ended_badly() or DONE


def stop(directory: RunDirectory) -> int:
    """Ask a run to stop, and wait until it has."""
    if not (directory.heartbeat.exists() or directory.is_alive()):
        raise RunError(
            f"no run {directory}",
            found=", ".join(run.path.name for run in all_runs()) or "no runs here",
        )
    if not directory.is_alive():
        say(f"{directory} is not running ({directory.read_heartbeat().get('phase')})")
        return DONE
    try:
        with suppress(FileExistsError):  # whatever has that name is such a request
            open(directory.path / STOP, "xb").close()
    except OSError as error:
        raise directory.not_writable(error) from None
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
        if run.is_alive():
            state = beat.get("phase", "starts")
        elif state not in (Phase.DONE, Phase.STOPPED):
            state = f"ended in {state}"
        ago = f"{max(0, time.time() - beat['time']):,.0f} s ago" if beat else "?"
        rows.append((run.path.name, state, str(beat.get("step", "?")), ago))
    say(table(rows, "  "))
    return answered(DONE)


def oom_kills() -> int:
    """Return how many processes the kernel has killed because RAM ran out, since it started."""
    lines = Path("/proc/vmstat").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split() for line in lines).get("oom_kill", 0))


def position(beat: dict) -> str:
    """Return a heartbeat's phase and step as text."""
    return f"in {beat.get('phase', 'start')} after step {beat.get('step', 0)}"


def _session(pid: int) -> int:
    """Return the session of a process; 0 where it has ended."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


@dataclass
class Attempt:
    """One start of the ranks, and what was seen of them. Times are monotonic: clocks may jump."""

    heartbeat_before: dict = field(default_factory=dict)  # an earlier attempt's
    processes: list[psutil.Popen] = field(default_factory=list)  # by rank
    oom_kills: int = field(default_factory=oom_kills)  # before it began
    lowest_free: float = field(default_factory=hardware.free_memory)  # bytes of RAM
    sizes: dict[int, int] = field(default_factory=dict)  # rank: bytes of RAM
    suspended_since: dict[int, float] = field(default_factory=dict)  # rank: time
    heartbeat: dict = field(default_factory=dict)
    heartbeat_seen: float = 0.0
    longest_step: float = 0.0  # seconds
    asked_to_stop: bool = False
    starting: bool = False  # when it was asked, there was no heartbeat yet

    def running(self) -> list[psutil.Popen]:
        """Return the ranks that have not ended."""
        return [process for process in self.processes if process.poll() is None]

    def send(self, *numbers: int) -> None:
        """Send signals to the ranks that have not ended."""
        for process in self.running():
            with suppress(psutil.Error):  # it ends just now
                for number in numbers:
                    process.send_signal(number)

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
                "(ds_z3_infinity.json, ds_z3_nvme.json)"
            )
        memory = f"MemAvailable fell to {free:.2f} GiB, the rank held {size:.2f} GiB"
        return RunError(what, found=f"{memory}; the kernel {kernel}", fix=fix)

    def end(self, grace_period: float) -> None:
        """Kill the ranks that have not ended after so many seconds."""
        psutil.wait_procs(self.processes, grace_period)
        # With the processes that they started: a loader's worker can hold its locks, and a
        # compiler's has a process group of its own. Each rank leads a session.
        ranks, killed = {process.pid for process in self.processes}, 0
        while members := [pid for pid in psutil.pids() if _session(pid) in ranks]:
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed += 1
            if killed == KILL_ROUNDS:  # what is left waits in the kernel, or for its parent
                break
            psutil.wait_procs(self.processes, POLL)
        psutil.wait_procs(self.processes)


@dataclass
class Supervisor:
    """One run: its ranks, started again after a fault as often as max_restarts allows."""

    directory: RunDirectory
    options: Options
    ranks: int
    from_path: bool = False  # the user has named a checkpoint
    flags: list[str] = field(default_factory=list)  # of launch/train.py
    settings_before: tuple[int, int] | None = None  # the version of an earlier start
    starts: int = 0
    attempt: Attempt = field(default_factory=Attempt)
    stop_signal: int = 0  # the last one that asked to stop
    published_limit: float = 0.0  # seconds

    def run(self, flags: list[str]) -> int:
        """Run launch/train.py with the flags until it ends well or is stopped.

        Return the exit code. Raise RunError after max_restarts restarts without a new checkpoint.
        """
        self.directory.lock(self.directory.supervisor_lock)
        self.directory.withdraw_old_requests()
        drop_when_blocked()
        for number in SIGNALS:
            # nohup ignores it: the run is to outlive its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        self.flags, self.settings_before = flags, self._settings_version()
        try:
            return self._run()
        finally:
            for number in SIGNALS:  # one that comes now must not change the exit code
                signal.signal(number, signal.SIG_IGN)
            self.directory.forget_refused_start()

    def _run(self) -> int:
        shown = " ".join(map(storage.shown, self.flags))
        say(f"{self.ranks} rank(s): {self.options.script} {shown}")
        at_first = before = commits(self.directory.path)
        restarts, most, resume_flags = 0, self.options.max_restarts, []
        while not self.stop_signal:
            self._start([*self.flags, *resume_flags])
            code, fault = self._watch()
            if fault is None:
                return code
            to_stderr(f"\n{fault}")
            if self.stop_signal:
                break
            # Progress is a checkpoint that was not there. A step number is none: a run that went
            # back makes the old ones again.
            now = commits(self.directory.path)
            restarts = 1 if now.keys() - before.keys() else restarts + 1
            before = now
            begin = "no checkpoint yet, so from the beginning"
            if now.keys() - at_first.keys():
                begin = f"goes on from checkpoint-{max(now.values())}"
            elif now or self.from_path:
                begin = "no new checkpoint yet, so as at first"
            progress = f"last seen {position(self.directory.read_heartbeat())}; {begin}"
            if restarts > most:
                raise RunError(
                    f"{most} restarts without a new checkpoint",
                    found=progress,
                    fix=f"remove the cause, then {self._resume_command()}",
                    code=FAILED,
                )
            self.directory.check_ours()
            to_stderr(f"restart {restarts} of {most}: {progress}")
            # Until the run has a checkpoint of its own, it starts as the user asked.
            if now.keys() - at_first.keys() or not (now or self.from_path):
                resume_flags = ["--resume_from_checkpoint", "auto"]
        # No rank is there any more, or one had failed when the stop was asked for.
        self._say_how_to_go_on()
        return STOPPED

    def _say_how_to_go_on(self) -> None:
        newest = max(commits(self.directory.path).values(), default=None)
        last = "no checkpoint" if newest is None else f"checkpoint-{newest}"
        to_stderr(f"stopped; {last}\nto go on: {self._resume_command()}")

    def _settings_version(self) -> tuple[int, int] | None:
        """Return what changes when a rank writes the run's settings; None without them."""
        with suppress(FileNotFoundError):
            status = self.directory.resolved_config.stat()
            return status.st_ino, status.st_mtime_ns
        return None

    def _resume_command(self) -> str:
        if self._settings_version() != self.settings_before:
            return resume.command(self.directory, self.ranks)
        # It has not come so far as to write its settings: as it was started.
        start = [sys.executable, f"{ROOT}/launch/supervise.py", "--num_gpus", str(self.ranks)]
        flags = [*self.flags]
        if not self.from_path:
            flags += ["--resume_from_checkpoint", "auto"]
        return resume.from_here([*start, *flags])

    def _start(self, flags: list[str]) -> None:
        """Start a process for each rank."""
        self.starts += 1
        self.attempt = Attempt(self.directory.read_heartbeat())
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

    def _on_signal(self, number: int, frame: object) -> None:
        """Note the signal and pass it on; _watch does that where not all ranks are there yet."""
        self.stop_signal = number
        if len(self.attempt.processes) == self.ranks:
            self._pass_on()

    def _pass_on(self) -> None:
        """Send the last signal on to all ranks; SIGHUP as SIGTERM, and SIGINT while they start."""
        if not self.attempt.asked_to_stop:
            beat = self.directory.read_heartbeat()
            self.attempt.starting = not beat or beat == self.attempt.heartbeat_before
        self.attempt.asked_to_stop = True
        # Python that starts makes of SIGINT a traceback and FAILED.
        early = self.stop_signal == signal.SIGINT and self.attempt.starting
        as_sigterm = early or self.stop_signal == signal.SIGHUP
        self.attempt.send(signal.SIGTERM if as_sigterm else self.stop_signal)

    def _watch(self) -> tuple[int, RunError | None]:
        """Wait until all ranks have ended. Return the exit code, and None.

        Where a restart may help, return the fault in place of None.
        """
        next_check = 0.0
        while True:
            if self.stop_signal and not self.attempt.asked_to_stop:
                self._pass_on()
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
        # Rank 0 says it, unless it was ended before that, or stopped before its first step.
        killed = code == FAILED and self.attempt.processes[0].poll() == -signal.SIGKILL
        beat = self.directory.read_heartbeat()
        unsaid = beat == self.attempt.heartbeat_before or beat.get("phase") != Phase.STOPPED
        if killed or (code == STOPPED and unsaid):
            self._say_how_to_go_on()
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
        if not beat or beat == attempt.heartbeat_before:
            beat = {"step": 0, "phase": Phase.LOAD}
        phase = beat["phase"]
        if beat != attempt.heartbeat:
            if phase == attempt.heartbeat.get("phase") == Phase.TRAIN:
                attempt.longest_step = max(attempt.longest_step, now - attempt.heartbeat_seen)
            attempt.heartbeat, attempt.heartbeat_seen = beat, now
        limit = SILENCE_LIMITS[phase]
        if phase == Phase.TRAIN:
            limit = max(self.options.hang_timeout, SLACK * attempt.longest_step)
        if limit != self.published_limit:
            self.published_limit = limit
            self._publish(limit)
        silent = now - attempt.heartbeat_seen
        if silent <= limit:
            return None
        limit_text = f"limit: {limit:.0f} s (--hang_timeout)"
        return f"no sign of life for {silent:.0f} s {position(beat)}; {limit_text}"

    def _publish(self, limit: float) -> None:
        """Write the limit for others who watch the run, such as the image's health check."""
        with suppress(OSError):  # a full disk: the ranks report it
            if self.directory.is_ours():
                path = self.directory.silence_limit_file
                with open(path, "w", encoding="utf-8", opener=in_place) as file:
                    file.write(str(limit))

    def _dump_stacks(self) -> None:
        """Make every rank write its stacks, suspended ranks too."""
        self.attempt.send(signal.SIGUSR2, signal.SIGCONT)
        time.sleep(2)
        to_stderr(f"stacks of all ranks: {self.directory}/stacks-*.txt")
