"""Compiled ops: the lock of a killed build, which ones are needed, and what they measure."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.config import ds_schema
from trainer.system import ops

FLAGS = (
    "--max_steps 1 --eval_strategy no --eval_on_start false --export false "
    "--save_strategy no --per_device_train_batch_size 2"
).split()


def test_held_or_left_behind(tmp_path):
    lock = tmp_path / "lock"
    assert not ops.is_stale(lock)
    with open(lock, "x"):
        assert not ops.is_stale(lock)
    assert ops.is_stale(lock)


def test_a_run_goes_on(trains, tmp_path):
    """torch alone would wait for the lock for ever."""
    from torch.utils.cpp_extension import _get_build_directory

    # Times included, so nothing is compiled again.
    for name in ("cpu_adam", "pin_memory", "deepspeed_shm_comm"):
        built = Path(_get_build_directory(name, verbose=False))
        shutil.copytree(built, tmp_path / name)
    (tmp_path / "cpu_adam" / "lock").touch()
    run = trains("run", *FLAGS, timeout=120, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert "cpu_adam: ready after" in run.output and len(run.losses) == 1
    assert not (tmp_path / "cpu_adam" / "lock").exists()


def test_needed():
    assert ops.needed("none", "none", 1, True) == []
    assert ops.needed("cpu", "cpu", 2, True) == ["cpu_adam"]
    assert ops.needed("nvme", "cpu", 2, False) == ["cpu_adam", "shm_comm"]
    assert ops.needed("nvme", "nvme", 2, False) == ["cpu_adam", "async_io", "shm_comm"]
    assert ops.needed("none", "nvme", 1, False) == ["async_io"]


def test_bench_io(tmp_path):
    """The block that it writes has DeepSpeed's own key names, and the plan takes the figures."""
    cache = tmp_path / "cache"
    environment = {**os.environ, "ZERO_OFFLOAD_CACHE": str(cache)}
    done = subprocess.run(
        [
            sys.executable,
            "launch/bench.py",
            "io",
            tmp_path / "disk",
            *"--bytes 64MB --seconds 20".split(),
            "--out",
            tmp_path / "io.json",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "io.json").read_text())
    assert (
        found["aio"].keys() <= ds_schema.config().keys["aio"].kind.keys.keys()
        and found["aio"]["intra_op_parallelism"] >= 1
    )
    best = json.loads((cache / "box.json").read_text())
    assert best["nvme_read"] == pytest.approx(found["read_gbps"] * 1e9) and len(found["rows"]) > 1
    assert not list((tmp_path / "disk").iterdir())
    plan = subprocess.run(
        [
            sys.executable,
            "launch/plan.py",
            "--gpus",
            "0",
            "--json",
            "--nvme_path",
            tmp_path / "disk",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert json.loads(plan.stdout)["box"]["nvme_read"] == best["nvme_read"]
