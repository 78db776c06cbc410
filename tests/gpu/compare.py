"""Optimizer steps of two commits in turn on one machine: before, after, before, after.

    mkdir DIR && git archive COMMIT | tar x -C DIR
    python tests/gpu/compare.py DIR CASE … [--turns 2] [--steps N] [--seconds 500]
                                [--out bench] [--work DIR]

DIR has the tree of the commit before; after is this tree. For each run it prints the median, the
smallest and the largest of the counted steps, and the same for the optimizer's part; at the end
after ÷ before, and what two runs of one commit differ by. With the optimizer on NVMe a run also
measures, in each step, the seconds that libaio's calls take by themselves and those that the
trainer's checks add to them.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NVME = "ds_z3_nvme_optimizer.json"


def cases():
    """Return {name: (case, steps)}.

    The number of layers that are not recomputed is set: two runs must not choose two.
    """
    from tests.bench.train import CASES, Case

    tiny = CASES["tiny"]
    # 1.1 billion parameters.
    nvme = Case("1b", "full", 16, NVME, layers=10, flags=["--kept_layers", "10"], uncounted=2)
    return {
        "8b-lora": (replace(CASES["8b-lora"], flags=["--kept_layers", "32"]), 27),
        "1b-full": (replace(CASES["1b-full"], flags=["--kept_layers", "16"]), 27),
        "1b-full-nvme": (nvme, 5),
        "tiny": (replace(tiny, uncounted=2), 8),
        "tiny-nvme": (replace(tiny, config=NVME, uncounted=2), 8),
    }


# -- a run of the tree in the working directory ------------------------------------------------
def timed(function, seconds, key):
    """Return the function, which then adds its time to seconds[key]."""

    def call(*args):
        began = time.perf_counter()
        try:
            return function(*args)
        finally:
            seconds[key] += time.perf_counter() - began

    return call


def time_handle(handle, seconds, key):
    handle.async_pwrite = timed(handle.async_pwrite, seconds, key)
    handle.async_pread = timed(handle.async_pread, seconds, key)
    handle.wait = timed(handle.wait, seconds, key)


def install():
    from trainer import stages, trainer
    from trainer.engine import aio

    seconds = {"libaio": 0.0, "checked": 0.0}
    watch, ended = stages.watch_swap_files, trainer.OffloadTrainer._step_ended

    def watched(space):
        handle = aio.load_aio().aio_handle
        time_handle(handle, seconds, "libaio")
        watch(space)
        time_handle(handle, seconds, "checked")

    def step_ended(self):
        ended(self)
        checks = seconds["checked"] - seconds["libaio"]
        print(f"\nSWAP libaio {seconds['libaio']:.4f} s, checks {checks:.4f} s", flush=True)
        seconds.update(libaio=0.0, checked=0.0)

    stages.watch_swap_files, trainer.OffloadTrainer._step_ended = watched, step_ended


def inside():
    """Be launch/train.py of the working directory, with a line for each step's swapping."""
    sys.path[0] = os.getcwd()
    from trainer import run

    join = run.join

    def start(*args):
        ranks = join(*args)
        install()
        return ranks

    run.join = start
    run.leave(run.main())


# -- the runs and their figures ----------------------------------------------------------------
def spread(values):
    if not values:
        return "-"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def swap_times(log, uncounted):
    """Return ([seconds in libaio], [seconds of the checks]) of the counted steps."""
    found = re.findall(r"^SWAP libaio ([0-9.]+) s, checks ([0-9.]+) s", log.read_text(), re.M)
    libaio, checks = zip(*found[uncounted:]) if found[uncounted:] else ((), ())
    return list(map(float, libaio)), list(map(float, checks))


def compare(name, before, options):
    """Run a case of both trees in turn and print its figures. Return whether all ran well."""
    from tests.bench import train as bench
    from tests.tiny import swap_flags
    from trainer.system.hardware import gpu_count

    case, steps = cases()[name]
    steps, gpu = options.steps or steps, gpu_count() > 0
    trees = {"before": before, "after": ROOT}
    of, all_checks = {tree: [] for tree in trees}, {tree: [] for tree in trees}
    began, longest, well = time.monotonic(), 0, True
    nvme = case.config == NVME
    os.environ["BENCH_SCRIPT"] = str(Path(__file__).resolve()) if nvme else "launch/train.py"
    for turn, tree in ((turn, tree) for turn in range(1, options.turns + 1) for tree in trees):
        left = options.seconds - (time.monotonic() - began)
        if left < longest:
            print(f"{name}: no time for {tree} {turn}: {left:.0f} s are left", flush=True)
            break
        bench.ROOT, label, start = trees[tree], f"{name}-{tree}-{turn}", time.monotonic()
        more = swap_flags(options.work) if nvme and tree == "after" else []
        result = bench.ours(label, case, options.out, options.work, steps, left, gpu, more)
        longest = max(longest, time.monotonic() - start)
        with open(options.out / "bench.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        counted = result["all_step_s"][case.uncounted :]
        well &= result["exit"] == 0
        if result["exit"] or not counted:
            continue
        of[tree].append(counted)
        text = f"{label}: s a step {spread(counted)}"
        text += f", of it the optimizer's {result.get('optimizer_s', '-')} (median)"
        text += f"; {result.get('tokens_per_s_per_gpu', 0):,.0f} tok/s, "
        text += f"last loss {result['losses'][-1]}, kept {result.get('kept_layers', '-')}"
        if nvme:
            log = options.out / f"{label}-m{case.micro_batch}.log"
            libaio, checks = swap_times(log, case.uncounted)
            all_checks[tree].extend(checks)
            text += f"\n  s a step in libaio {spread(libaio)}, in the checks {spread(checks)}"
            text += f"; swap GB/s read {result.get('nvme_read_gbps')}, "
            text += f"written {result.get('nvme_write_gbps')}"
        print(text, flush=True)
    print(summary(name, of, all_checks), flush=True)
    return well


def summary(name, of, checks):
    """Return after ÷ before of all counted steps, and what the runs of one commit differ by."""
    if not all(of.values()):
        return f"{name}: nothing to compare"
    whole = {tree: statistics.median(sum(runs, [])) for tree, runs in of.items()}
    alike = [[statistics.median(run) for run in runs] for runs in of.values()]
    noise = max(max(runs) / min(runs) for runs in alike) - 1
    text = f"{name}: a step {whole['before']:.3f} s before, {whole['after']:.3f} s after: "
    text += f"{whole['after'] / whole['before'] - 1:+.1%}; the runs of one commit are up to "
    text += f"{noise:.1%} apart"
    if checks["after"]:
        share = statistics.median(checks["after"]) / whole["after"]
        text += f"; the checks of swap files are {share:.2%} of a step"
    return text


def main():
    sys.path[0] = str(ROOT)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("cases", nargs="+", choices=cases())
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, help="in place of the case's own")
    parser.add_argument("--seconds", type=float, default=500, help="for all runs of one case")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--work", type=Path, help="inputs, runs and swap files")
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.work = (options.work or options.out / "work").absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    before = options.before.absolute()
    if not (before / "launch" / "train.py").is_file():
        parser.error(f"{before} is no tree of this repository")
    well = [compare(name, before, options) for name in options.cases]
    return 0 if all(well) else 1


if __name__ == "__main__":
    inside() if "RANK" in os.environ else sys.exit(main())
