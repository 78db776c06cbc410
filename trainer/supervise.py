"""`launch/supervise.py`: starts the ranks of this machine, passes signals on, and brings a run back that a fault has ended. No torch.

The `deepspeed` launcher signals one rank at a time, thirty seconds apart, and leaves its ranks alive when it is killed itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from data import storage
from trainer.checkpoint import resume
from trainer.config.flags import help_text, resolve
from trainer.errors import (
    BAD_INPUT,
    CRASHED,
    DOES_NOT_FIT,
    DONE,
    FAILED,
    STOPPED,
    RunError,
    drop_lost_terminal,
    report,
    table,
)
from trainer.run import check_resume
from trainer.run_dir import default_run_name, run_directory
from trainer.system import hardware, swap_dir

USAGE = """python launch/supervise.py [--num_gpus N] [--detach] [--max_restarts 3] [--hang_timeout SECONDS] [--FLAG VALUE ...]

Runs launch/train.py with the flags on every GPU of this machine (--num_gpus ranks; one rank without a GPU). A rank that dies or hangs
ends the others, and the run resumes from its last checkpoint, at most --max_restarts times without a new one.
Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 stop all ranks at the same update, with a checkpoint: exit code 75. Twice: at once.
--detach: in the background; the output goes to train.log in the run directory.
--hostfile FILE: several machines, by `deepspeed` alone.
--stop RUN: stop that run.   --status: what the runs here are doing.
"""
_OWN = {
    "num_gpus": "",
    "hostfile": "",
    "max_restarts": "3",
    "hang_timeout": "",
    "script": "launch/train.py",
    "stop": "",
    "detach": None,
    "status": None,
}
POLL = 0.2  # seconds
STOPPED_LIMIT = 20  # seconds that a rank may be stopped (SIGSTOP, a debugger)
LIMITS = {
    "load": 14400,
    "train": 1800,
    "eval": 7200,
    "save": 7200,
    "export": 14400,
    "done": 600,
    "stopped": 600,
}
SLACK = 20  # a step that takes so many times the longest one before it hangs


def split(argv):
    """(our options, the rest for launch/train.py)."""
    own, rest, i = dict(_OWN), [], 0
    while i < len(argv):
        name, equals, value = argv[i].partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else None
        i += 1
        if key not in _OWN:
            rest.append(argv[i - 1])
        elif _OWN[key] is None:
            own[key] = True
        else:
            if not equals:
                if i == len(argv):
                    raise RunError(f"command line: {name} needs a value")
                value, i = argv[i], i + 1
            own[key] = value
    for key in ("num_gpus", "max_restarts", "hang_timeout"):
        if own[key] and not own[key].isdigit():
            raise RunError(f"command line: --{key} is not a whole number", found=own[key])
    return own, rest


def main(argv=None):
    """Exit code of the supervised run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE + "\n" + help_text())
        return DONE
    try:
        own, rest = split(argv)
        if own["status"]:
            return status()
        if own["stop"]:
            return stop(
                Path(own["stop"])
                if Path(own["stop"]).is_dir()
                else Path("runs") / own["stop"].removeprefix("runs/")
            )
        if own["hostfile"]:
            if lost := [
                f"--{n}"
                for n in ("detach", "max_restarts", "hang_timeout")
                if own[n] and own[n] != _OWN[n]
            ]:
                raise RunError(
                    f"{', '.join(lost)}: only for one machine",
                    fix="without --hostfile; or inside tmux or nohup",
                )
            print("several machines: started by deepspeed; nothing restarts them", flush=True)
            command = [
                str(Path(sys.executable).with_name("deepspeed")),
                "--hostfile",
                own["hostfile"],
                *(["--num_gpus", own["num_gpus"]] if own["num_gpus"] else []),
                own["script"],
                *rest,
            ]
            os.execv(command[0], command)
        settings, added = resolve(rest), []
        check_resume(settings)
        if run_directory(settings) is None:
            added = ["--run_name", default_run_name(settings)]
            settings = resolve([*rest, *added])
        elif settings.output_dir and not settings.given("output_dir"):  # that of the checkpoint
            added = ["--output_dir", settings.output_dir]
        if own["detach"]:
            if hardware.in_our_image() and os.getppid() == 1:  # the container ends with its command
                raise RunError(
                    "--detach: the container would end at once, and the run with it",
                    fix="without it: make docker-run DETACH=1, or docker run --detach",
                )
            return detach([*argv, *added], run_directory(settings))
        ranks = int(own["num_gpus"] or 0) or (
            hardware.gpu_count() if hardware.uses_gpu(settings) else 1
        )
        return Supervisor([*rest, *added], run_directory(settings), ranks, own).run()
    except RunError as error:
        report(error)
        return error.code


def detach(argv, directory):
    """Start the same in a session of its own; say where it can be seen."""
    argv = [a for a in argv if a != "--detach"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "train.log", "a") as log:
            made = subprocess.Popen(
                [sys.executable, sys.argv[0], *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except OSError as error:
        raise RunError(
            f"the run directory {directory} cannot be written to",
            found=error.strerror,
            fix="--output_dir",
        ) from None
    print(
        f"in the background, pid {made.pid}\nlog:  tail -f {directory / 'train.log'}\nstop: make stop RUN={directory.name}"
    )
    return DONE


def heartbeat(directory):
    """What the run last said of itself; {} where it never did."""
    try:
        return json.loads((directory / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return {}


def stop(directory):
    """Ask a run to stop, and wait for it."""
    if not (directory / "heartbeat.json").exists():
        raise RunError(
            f"no run {directory}",
            found=", ".join(p.name for p in Path("runs").glob("*")) or "no runs here",
        )
    if not is_alive(directory):
        print(f"{directory} is not running ({heartbeat(directory).get('phase')})")
        return DONE
    (directory / "STOP").touch()
    print(f"{directory} stops after its update, with a checkpoint", flush=True)
    while is_alive(directory):
        time.sleep(POLL)
    print(
        f"{directory}: {heartbeat(directory).get('phase')} at step {heartbeat(directory).get('step')}"
    )
    return DONE


def patience(directory, phase):
    """Seconds that the run may be silent in `phase`: as its supervisor has it now, else the phase's own."""
    try:
        if swap_dir.is_held(directory / ".supervised"):
            return float((directory / ".patience").read_text())
    except (OSError, ValueError):
        pass
    return LIMITS.get(phase, LIMITS["load"])


def is_alive(directory):
    """Whether a rank or a supervisor holds the run."""
    return any(
        (directory / name).exists() and swap_dir.is_held(directory / name)
        for name in (".running", ".supervised")
    )


def status():
    """Print what the runs under runs/ are doing."""
    lines = [("run", "state", "step", "last seen")]
    for path in sorted(Path("runs").glob("*/heartbeat.json")):
        beat = heartbeat(path.parent)
        phase = beat.get("phase", "?")
        state = (
            phase if is_alive(path.parent) or phase in ("done", "stopped") else f"ended in {phase}"
        )
        lines.append(
            (
                path.parent.name,
                state,
                str(beat.get("step")),
                f"{time.time() - beat.get('time', 0):,.0f} s ago",
            )
        )
    print(table(lines, "  "))
    return DONE


def _oom_kills():
    """Processes that the kernel killed for want of memory since it started."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


class Supervisor:
    """One run: its ranks, started as often as it takes."""

    def __init__(self, flags, directory, ranks, own):
        self.flags, self.directory, self.ranks, self.script = flags, directory, ranks, own["script"]
        self.max_restarts = int(own["max_restarts"])
        self.limits = {**LIMITS, "train": int(own["hang_timeout"] or LIMITS["train"])}
        self.asked, self.attempt = 0, 0  # signals from outside; starts
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        self.processes, self.stopped_since, self.longest, self.beats = [], {}, 0.0, None
        self.lowest, self.sizes, self.oom, self.told = None, {}, 0, None

    def run(self):
        """Exit code."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            swap_dir.take(
                self.directory / ".supervised",
                f"the run {self.directory}",
                "make stop, or another --run_name",
            )
        except OSError as error:
            raise RunError(
                f"the run directory {self.directory} cannot be written to",
                found=error.strerror,
                fix="--output_dir",
            ) from None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        flags, restarts, committed = self.flags, 0, resume.newest(self.directory)
        before = committed
        print(
            f"{self.ranks} rank(s): {self.script} {' '.join(map(storage.shown, flags))}", flush=True
        )
        while True:
            self._start(flags)
            code, cause = self._watch()
            if self.asked and cause:
                print(f"\n{cause}", file=sys.stderr, flush=True)
            if (
                code in (DONE, STOPPED, BAD_INPUT, DOES_NOT_FIT)
                or (code == FAILED and cause is None)
                or self.asked
            ):
                return code
            now = resume.newest(self.directory)
            restarts = 1 if now != committed else restarts + 1
            committed = now
            print(f"\n{cause}", file=sys.stderr, flush=True)
            if restarts > self.max_restarts:
                print(
                    f"error: {self.max_restarts} restarts without a new checkpoint\n  found:  {self._place()}\n"
                    f"  fix:    mend the cause, then {resume.command(self.directory)}",
                    file=sys.stderr,
                    flush=True,
                )
                return FAILED
            print(
                f"restart {restarts} of {self.max_restarts}: {self._place()}",
                file=sys.stderr,
                flush=True,
            )
            # Until the run has a checkpoint of its own, it begins as it was asked to.
            flags = [
                *self.flags,
                *(["--resume_from_checkpoint", "auto"] if now != before or now is None else []),
            ]

    def _place(self):
        beat, last = heartbeat(self.directory), resume.newest(self.directory)
        return f"last seen in {beat.get('phase', 'start')} after step {beat.get('step', 0)}; " + (
            f"goes on from checkpoint-{last}"
            if last is not None
            else "no checkpoint yet, so from the beginning"
        )

    def _start(self, flags):
        self.attempt, self.base = self.attempt + 1, resume.newest(self.directory) or 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            "WORLD_SIZE": self.ranks,
            "LOCAL_SIZE": self.ranks,
            "LOCAL_WORLD_SIZE": self.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ZERO_OFFLOAD_SUPERVISED": self.attempt,
        }
        self.processes, self.stopped_since, self.longest, self.beats = [], {}, 0.0, None
        self.lowest, self.sizes, self.oom, self.began = None, {}, _oom_kills(), time.time()
        for rank in range(self.ranks):
            environment = {
                **os.environ,
                **{k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
            }
            # A session of its own: Ctrl-C comes through us, once, to all. And no rank outlives us.
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", self.script, *flags],
                    env=environment,
                    start_new_session=True,
                    preexec_fn=hardware.die_with_parent,
                )
            )

    def _pass_on(self, number, frame):
        self.asked += 1
        drop_lost_terminal(self.terminals)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _watch(self):
        """(exit code, cause that a restart may mend or None) once all ranks are gone."""
        looked = 0.0
        while True:
            codes = [p.poll() for p in self.processes]
            bad = [(rank, code) for rank, code in enumerate(codes) if code not in (None, DONE)]
            if bad:  # one that was killed makes others fail: it is the one to name
                return self._ended(*min(bad, key=lambda pair: (pair[1] >= 0, pair[1] == CRASHED)))
            if all(code == DONE for code in codes):
                return DONE, None
            if time.monotonic() - looked >= 1:
                looked = time.monotonic()
                self._measure()
                if hung := self._hung():
                    self._dump()
                    self._kill(0)
                    return FAILED if self.asked else CRASHED, hung
            time.sleep(POLL)

    def _ended(self, rank, code):
        """A rank has ended before the others: end them, and say why it did."""
        beat = heartbeat(self.directory)
        at = f"in {beat.get('phase', 'start')} after step {beat.get('step', 0)}"
        # Those that know of the end come by themselves; the others wait for it in a collective.
        self._kill(60 if code == STOPPED else 5)
        if code < 0:
            cause = f"rank {rank} was ended by {signal.Signals(-code).name} {at}"
            if code == -signal.SIGKILL:
                cause += self._memory(rank)
            return (STOPPED if self.asked else CRASHED), cause
        if code == CRASHED:
            return (FAILED if self.asked else CRASHED), f"rank {rank} failed {at}"
        return code, None

    def _memory(self, rank):
        killed = _oom_kills() - self.oom
        text = (
            f"\n  found:  MemAvailable fell to {(self.lowest or 0) / 2**30:.2f} GiB, the rank held "
            f"{self.sizes.get(rank, 0) / 2**30:.2f} GiB; "
        )
        if not killed:
            return text + "the kernel counts no kill for want of memory, so somebody sent it"
        return text + (
            f"the kernel killed {killed} process(es) for want of memory\n  fix:    fewer ranks, or a configuration that "
            "keeps less in RAM (ds_z3_nvme_optimizer.json, ds_z3_nvme.json)"
        )

    def _measure(self):
        free = hardware.free_memory()
        self.lowest = free if self.lowest is None else min(free, self.lowest)
        for rank, process in enumerate(self.processes):
            try:
                self.sizes[rank] = psutil.Process(process.pid).memory_info().rss
            except psutil.Error:
                pass

    def _hung(self):
        """Why a rank counts as hung, or None."""
        now = time.monotonic()
        for rank, process in enumerate(self.processes):
            try:
                stopped = psutil.Process(process.pid).status() in (
                    psutil.STATUS_STOPPED,
                    psutil.STATUS_TRACING_STOP,
                )
            except psutil.Error:
                continue
            since = (
                self.stopped_since.setdefault(rank, now)
                if stopped
                else self.stopped_since.pop(rank, None)
            )
            if stopped and now - since > STOPPED_LIMIT:
                return f"rank {rank} (pid {process.pid}) has been stopped for {now - since:.0f} s"
        beat = heartbeat(self.directory)
        stamp = (beat.get("step"), beat.get("phase"), beat.get("time", 0))
        if beat.get("time", 0) < self.began:
            stamp = (0, "load", self.began)  # an earlier attempt's
        if self.beats is None or stamp != self.beats[0]:
            if self.beats and stamp[1] == self.beats[0][1] == "train":
                self.longest = max(self.longest, now - self.beats[1])
            self.beats = (stamp, now)
        silent = now - self.beats[1]
        limit = self.limits.get(stamp[1], 1800)
        if stamp[1] == "train":  # before the first update nothing is known of how long one takes
            limit = max(
                limit, SLACK * self.longest if stamp[0] > self.base else self.limits["load"]
            )
        self._tell(limit)
        if silent > limit:
            return f"no sign of life for {silent:.0f} s in {stamp[1]} after step {stamp[0]}; limit: {limit:.0f} s (--hang_timeout)"
        return None

    def _tell(self, limit):
        """For others that watch the run, as the image's health check."""
        if limit != self.told:
            self.told = limit
            try:
                (self.directory / ".patience").write_text(str(limit))
            except OSError:  # a full disk is the ranks' own matter
                pass

    def _dump(self):
        """Ask every rank for its stacks, stopped ones too."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR2)
                process.send_signal(signal.SIGCONT)
        time.sleep(2)
        print(f"stacks of all ranks: {self.directory}/stacks-*.txt", file=sys.stderr, flush=True)

    def _kill(self, grace):
        """End the ranks that are left, after `grace` seconds to do it themselves."""
        until = time.monotonic() + grace
        while time.monotonic() < until and any(p.poll() is None for p in self.processes):
            time.sleep(POLL)
        for process in self.processes:
            try:  # with what it has started: a loader's worker can hold its locks
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self.processes:
            process.wait()
