"""SIGTERM to a run at named moments, many times each: none may be lost, and each run goes on.

python tests/faults/signal_storm.py [--times 50] [--moments load,save] [--jobs 2] [--seed 0]
(make test-signals)

Each is a real run of the tiny model under launch/supervise.py. It must end in time with 75 and the
line that resumes it, or with 0 where it was done before the signal counted. Of each moment the
first run and every tenth are resumed by their own line, pasted in another folder: then all losses
must be those of a run that nothing happened to.
"""

import argparse
import collections
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit")]

from conftest import FLAGS, make_model, make_tokenizer, write_rows  # noqa: E402
from test_supervise import AT  # noqa: E402
from tiny import flags as flags_of  # noqa: E402

STEPS = 6
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu"}
TO_GO_ON = "to go on: "
LIMIT = 30  # seconds from the signal to the end: what `--grace_seconds` allows
RESUMED = 10  # one of so many is resumed


@dataclass
class Moment:
    """When a run gets its signal.

    env(random number from 0 to 1) → what chooses the moment, for inject.py or for the supervisor
    that is in AT. done: the run may be done before the signal counts.
    """

    env: collections.abc.Callable[[float], dict]
    supervisor: bool = False
    ranks: int = 1
    done: bool = False


def at_start(number, ranks, *moments):
    """At a moment of the supervisor's n-th start of the ranks. Before a second one they crash."""
    crash = {"FAULT_STEP": "4", "FAULT_VALUE": "crash"} if number > 1 else {}

    def env(chance):
        return {"MOMENT": moments[int(chance * len(moments))], "START": str(number), **crash}

    return Moment(env, supervisor=True, ranks=ranks)


def in_rank(phase, step, spread, done=False, **env):
    """Up to `spread` seconds after a phase of the run began, at a random time."""
    return Moment(
        lambda chance: {"SIGNAL_AT": f"{phase} {step} {chance * spread}", **env}, done=done
    )


def moments(load_seconds):
    """{name: Moment}. load_seconds: from the start of a run to its first optimizer step."""
    return {
        "before": at_start(1, 1, "before"),
        "between": at_start(1, 2, "between ranks"),
        "restart": at_start(2, 1, "before", "between ranks", "after"),
        "load": in_rank("start", 0, load_seconds),
        "train": in_rank("train", 1, 0.3),
        "save": in_rank("save", 2, 0.2),
        "evaluation": in_rank("eval", 3, 1.5, SLOW_EVALUATION="1"),
        "export": in_rank("export", STEPS, 0.1, done=True),
        "last step": in_rank("train", STEPS - 1, 0.3, done=True),
    }


@dataclass
class Outcome:
    """How a run ended. seconds: from the signal, or from the start for the supervisor's moments."""

    code: int
    seconds: float
    resumed: bool
    wrong: str = ""


@dataclass
class Storm:
    """The inputs that all runs share, and the losses of runs that nothing happens to."""

    folder: Path
    calm: dict[int, list[float]] = field(default_factory=dict)  # by ranks
    load_seconds: float = 0.0

    def __post_init__(self):
        make_model(self.folder / "model")
        make_tokenizer(self.folder / "model")
        text = (ROOT / "data" / "samples" / "train.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()[:62]]
        write_rows(self.folder / "rows.jsonl", rows[:60])
        write_rows(self.folder / "validation.jsonl", rows[60:])
        (self.folder / "at.py").write_text(AT)
        for ranks in (1, 2):
            began = time.monotonic()
            run = self.start(f"calm-{ranks}", ["launch/supervise.py"], ranks, {})
            while not (self.folder / f"calm-{ranks}" / "metrics.jsonl").exists():
                if run.poll():
                    raise SystemExit(run.communicate()[0])
                time.sleep(0.05)
            self.load_seconds = self.load_seconds or time.monotonic() - began
            if run.wait():
                raise SystemExit(run.communicate()[0])
            self.calm[ranks] = losses(self.folder / f"calm-{ranks}")

    def start(self, name, entry, ranks, env):
        own = flags_of(
            model_name_or_path=self.folder / "model",
            dataset=self.folder / "rows.jsonl",
            validation_split=self.folder / "validation.jsonl",
            deepspeed="ds_z3_offload.json",
            output_dir=self.folder / name,
            num_gpus=ranks,
            max_steps=STEPS,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=3,
            per_device_eval_batch_size=1,
            export="true",
            max_shard_size="1MB",
        )
        return subprocess.Popen(
            list(map(str, [sys.executable, *entry, *FLAGS, *own])),
            cwd=ROOT,
            env={**ENVIRONMENT, **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def send(self, name, moment, chance, resume):
        """Start a run that gets its signal, and judge its end. Return its Outcome."""
        directory, sent = self.folder / name, self.folder / f"{name}.sent"
        script = ["--script", "tests/cpu/inject.py"]
        entry = [self.folder / "at.py" if moment.supervisor else "launch/supervise.py", *script]
        env = {**moment.env(chance), "SIGNAL_SENT": str(sent)}
        began = time.monotonic()
        process = self.start(name, entry, moment.ranks, env)
        try:
            output = process.communicate(timeout=180)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return Outcome(-9, 180, False, "no end in 180 s\n" + process.communicate()[0])
        ended = time.monotonic()
        if sent.exists():
            began = float(sent.read_text())
        elif process.returncode == 0 and not moment.supervisor:
            shutil.rmtree(directory)  # done before its time: once more, earlier
            return self.send(name, moment, chance / 2, resume)
        outcome = Outcome(process.returncode, ended - began, False)
        outcome.wrong = wrong(outcome, moment, directory, output)
        if resume and outcome.code == 75 and not outcome.wrong:
            outcome.resumed, outcome.wrong = True, self.resume(directory, output, moment.ranks)
        if outcome.wrong:
            outcome.wrong += f"\n{env}\n{output[-6000:]}"
        shutil.rmtree(directory, ignore_errors=True)
        return outcome

    def resume(self, directory, output, ranks):
        """Paste the line into a shell in another folder. Return what is wrong, or ""."""
        done = subprocess.run(
            ["bash", "-c", line_of(output)],
            cwd="/",
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=180,
        )
        if done.returncode or not (directory / "export").is_dir():
            return f"resumed with {done.returncode}\n{done.stdout[-6000:]}"
        if losses(directory) != self.calm[ranks]:
            return f"losses {losses(directory)}, needed: {self.calm[ranks]}\n{done.stdout}"
        return ""


def line_of(output):
    lines = {line for line in output.splitlines() if line.startswith(TO_GO_ON)}
    return lines.pop().removeprefix(TO_GO_ON) if len(lines) == 1 else ""


def losses(directory):
    path = directory / "metrics.jsonl"
    return [r["loss"] for r in map(json.loads, path.read_text().splitlines()) if "loss" in r]


def wrong(outcome, moment, directory, output):
    """Return what is wrong with the end of a run, or ""."""
    if outcome.seconds > LIMIT:
        return f"ended after {outcome.seconds:.0f} s"
    if "Traceback" in output and "ZeroDivisionError: injected" not in output:
        return "a traceback"
    if outcome.code == 75:
        return "" if line_of(output) else "no line to go on, or several that differ"
    if outcome.code == 0 and moment.done:
        whole = (directory / "export").is_dir()
        return "" if whole else "0 without a model"
    return f"ended with {outcome.code}"


def times(storm, name, moment, options):
    """Send the signal so many times. Print a row and what was wrong; return whether it was."""
    chance = random.Random(f"{options.seed} {name}")
    draws = [chance.random() for _ in range(options.times)]

    def once(i):
        return storm.send(f"{name}-{i}", moment, draws[i], resume=i % RESUMED == 0)

    with ThreadPoolExecutor(options.jobs) as pool:
        ends = list(pool.map(once, range(options.times)))
    wrongs = [end for end in ends if end.wrong]
    right = collections.Counter(end.code for end in ends if not end.wrong)
    resumed, seconds = sum(end.resumed for end in ends), [end.seconds for end in ends]
    print(
        f"{name:<12} {right[75]:>4} {right[0]:>4} {len(wrongs):>5} {resumed:>7}  "
        f"{statistics.median(seconds):.1f}, {max(seconds):.1f}",
        flush=True,
    )
    for end in wrongs:
        print(f"  {name}: {end.wrong}", flush=True)
    return bool(wrongs)


def main():
    parser = argparse.ArgumentParser()
    for flag, default in (("times", 50), ("jobs", os.cpu_count()), ("seed", 0)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--moments", default=",".join(moments(0)))
    options = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        storm = Storm(Path(name))
        known = moments(storm.load_seconds)
        print("moment         75    0 other resumed  seconds: median, max", flush=True)
        wrong_ones = [
            name for name in options.moments.split(",") if times(storm, name, known[name], options)
        ]
    raise SystemExit(bool(wrong_ones))


if __name__ == "__main__":
    main()
