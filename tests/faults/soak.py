"""Sixty random kills in one run: its last checkpoint must be bit-equal to an undisturbed run's.

python tests/faults/soak.py [--kills 60] [--steps 600] [--ranks 2] [--config ds_z3_nvme] [--seed 0]
(make test-soak)
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import make_model, make_tokenizer, write_rows  # noqa: E402
from tiny import flags  # noqa: E402

FLAGS = (
    "--max_restarts 30 --validation_split 0 --precision fp32 --max_length 96 --learning_rate 1e-3 "
    "--per_device_train_batch_size 2 --save_steps 5 --export false --lr_scheduler_type cosine "
    "--report_to none"
).split()


def start(folder, name, options):
    own = flags(
        num_gpus=options.ranks,
        deepspeed=f"{options.config}.json",
        max_steps=options.steps,
        output_dir=folder / name,
        model_name_or_path=folder / "model",
        dataset=folder / "rows.jsonl",
        nvme_path=folder / "swap",
    )
    command = [sys.executable, "launch/supervise.py", *own, *FLAGS]
    log = open(folder / f"{name}.log", "w")  # noqa: SIM115 the process writes to it
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=log,
        stderr=log,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )


def beat(directory):
    try:
        return json.loads((directory / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return {"phase": "start", "step": 0}


def shards(directory, step):
    files = json.loads((directory / f"checkpoint-{step}" / "manifest.json").read_text())["files"]
    return {n: f["xxh3_128"] for n, f in files.items() if n.endswith(".safetensors")}


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in lines if "loss" in r]


def main():
    parser = argparse.ArgumentParser()
    for flag, default in (("kills", 60), ("steps", 600), ("ranks", 2), ("seed", 0)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--config", default="ds_z3_nvme")
    options = parser.parse_args()
    chance, killed = random.Random(options.seed), collections.Counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        make_model(folder / "model")
        make_tokenizer(folder / "model")
        rows = [
            json.loads(line)
            for line in (ROOT / "data" / "samples" / "train.jsonl").read_text().splitlines()[:200]
        ]
        write_rows(folder / "rows.jsonl", rows)
        began = time.monotonic()
        calm = start(folder, "calm", options)
        if calm.wait():
            raise SystemExit((folder / "calm.log").read_text()[-3000:])
        calm_seconds = time.monotonic() - began
        began = time.monotonic()
        run, directory, seen = start(folder, "killed", options), folder / "killed", set()
        while run.poll() is None and sum(killed.values()) < options.kills:
            children = psutil.Process(run.pid).children()
            fresh = [p for p in children if p.pid not in seen]
            if len(fresh) < options.ranks:
                time.sleep(0.05)
                continue
            seen |= {p.pid for p in fresh}
            if chance.random() < 0.2:
                time.sleep(chance.uniform(0, 8))  # while it loads
            else:
                started = time.time()
                while run.poll() is None and not (
                    beat(directory)["phase"] == "train" and beat(directory)["time"] > started
                ):
                    time.sleep(0.05)
                time.sleep(chance.uniform(0, 4))
            try:
                at = beat(directory)
                chance.choice(fresh).kill()
                killed[at["phase"]] += 1
                print(
                    f"kill {sum(killed.values())}: {at['phase']} after step {at['step']}",
                    flush=True,
                )
            except psutil.Error:
                pass
        code = run.wait()
        seconds = time.monotonic() - began
        if code:
            raise SystemExit(f"exit {code}\n" + (folder / "killed.log").read_text()[-3000:])
        same = shards(folder / "calm", options.steps) == shards(directory, options.steps)
        same_losses = losses(folder / "calm") == losses(directory)
        kills = sum(killed.values())
        print(
            f"{kills} kills ({', '.join(f'{n} in {p}' for p, n in killed.items())}) "
            f"over {options.steps} steps, {options.ranks} ranks, {options.config}: "
            f"{seconds:.0f} s against {calm_seconds:.0f} s undisturbed"
        )
        print(f"last checkpoint bit-equal: {same}; all {options.steps} losses equal: {same_losses}")
        if not same or not same_losses or kills < options.kills:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
