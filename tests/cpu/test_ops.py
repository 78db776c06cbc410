"""The lock of an op build that was killed."""

import shutil
from pathlib import Path

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

    built = Path(_get_build_directory("cpu_adam", verbose=False))
    shutil.copytree(built, tmp_path / "cpu_adam")  # times included, so nothing is compiled again
    (tmp_path / "cpu_adam" / "lock").touch()
    run = trains(
        "run", *FLAGS, launcher=False, timeout=120, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    )
    assert "cpu_adam: ready after" in run.output and len(run.losses) == 1
    assert not (tmp_path / "cpu_adam" / "lock").exists()


def test_needed():
    assert ops.needed("none", "none", 1, True) == []
    assert ops.needed("cpu", "cpu", 2, True) == ["cpu_adam"]
    assert ops.needed("nvme", "cpu", 2, False) == ["cpu_adam", "async_io", "shm_comm"]
    assert ops.needed("none", "nvme", 1, False) == ["async_io"]
