"""Disks that are full, small, read-only or shared, and files that are damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.system import ops

NVME = ["--deepspeed", "ds_z3_nvme.json"]
SAVES = ["--max_steps", 6, "--save_steps", 2]


@pytest.fixture(scope="module")
def solo(calm):
    """Losses of the NVMe run alone on its disk."""
    return calm(*NVME, *SAVES).losses


# -- swap --------------------------------------------------------------------------------------
@pytest.mark.quick
def test_swap_disk_too_small(starts, disk, row):
    run = starts("run", *NVME, *SAVES, "--nvme_path", disk(40)).ends(3)
    assert (
        "the swap disk is too small" in run.output
        and "GB free under" in run.output
        and "needed: 0.0" in run.output
    )
    row("swap disk too small", "refused at the start with found and needed, exit 3")


def test_swap_disk_fills_up(starts, disk, solo, row):
    """Somebody takes all that is left, as soon as the run has begun: its own space was reserved."""
    place = disk(130)
    run = starts("run", *NVME, *SAVES, "--nvme_path", place).until_step(1)
    with open(place / "filler", "wb") as file:
        try:
            while True:
                file.write(b"x" * 2**20)
        except OSError:
            pass
    assert shutil.disk_usage(place).free < 2**20
    run.ends(0)
    assert run.losses == solo
    row(
        "swap disk filled by somebody else",
        "the space was reserved: the run ends well, losses bit-equal",
    )


def test_no_room_for_a_file(disk):
    """Beyond what was reserved: refused before the write."""
    from trainer.errors import RunError
    from trainer.system import swap_dir

    space = swap_dir.SwapSpace(disk(20) / "own")
    space.own()
    space.reserve_space(0, 4 * 2**20, 1)
    space.prepare(str(space.folder / "a.swp"), 4 * 2**20)
    with pytest.raises(RunError, match="no room for a swap file"):
        space.prepare(str(space.folder / "b.swp"), 60 * 2**20)
    space.close()
    assert not space.folder.exists()


@pytest.mark.parametrize("damage", [pytest.param("hole", marks=pytest.mark.quick), "short", "gone"])
def test_damaged_swap_file(starts, row, damage):
    run = starts(
        "run", *NVME, "--max_steps", 4000, "--save_steps", 4000, supervised=False
    ).until_step(2)
    victim = max(
        next((run.directory.parent / "swap").glob("run-*")).rglob("*exp_avg*.swp"),
        key=lambda p: p.stat().st_size,
    )
    # Between its reading and its writing in an optimizer step, damage is written over without harm.
    for _ in range(20):
        if damage == "hole":
            subprocess.run(["fallocate", "--punch-hole", "-o", "4096", "-l", "65536", str(victim)])
        elif damage == "short":
            os.truncate(victim, 4096)
        else:
            victim.unlink(missing_ok=True)
        try:
            run.process.wait(2)
            break
        except subprocess.TimeoutExpired:
            assert damage != "gone"
    run.ends(1)
    assert f"a swap file is {'gone' if damage == 'gone' else 'damaged'}: {victim}" in run.output
    row(
        f"a swap file is damaged ({damage})",
        "found before it is read: no optimizer step is made with it, exit 1",
    )


def test_two_runs_one_swap_path(starts, solo, row):
    pair = [starts(name, *NVME, *SAVES) for name in ("one", "two")]
    assert all(run.ends(0, 240).losses == solo for run in pair)
    assert not list((pair[0].directory.parent / "swap").iterdir())
    row("two runs with one --nvme_path", "each has its own directory there: both losses bit-equal")


@pytest.mark.quick
def test_the_same_run_twice(starts, row):
    run = starts("run", *SAVES, "--max_steps", 400).until_step(1)
    again = starts("run", *SAVES, "--resume_from_checkpoint", "auto", supervised=False).ends(2)
    assert "is in use" in again.output and f"pid {run.ranks()[0].pid} on" in again.output
    row(
        "the same run started twice",
        "the second is refused: pid, host and start of the first; exit 2",
    )


def test_leftovers_are_reclaimed(starts, row):
    run = (
        starts("run", *NVME, "--max_steps", 400, supervised=False)
        .until_step(1)
        .signal(signal.SIGKILL)
    )
    run.process.wait()
    swap = run.directory.parent / "swap"
    (left,) = swap.glob("run-*")
    foreign = swap / "somebody-elses"
    foreign.mkdir()
    (foreign / "file.swp").write_bytes(b"x")
    again = starts("again", *NVME, "--max_steps", 1).ends(0)
    assert (
        f"GB of a dead run reclaimed ({left.name})" in again.output
        and not left.exists()
        and (foreign / "file.swp").exists()
    )
    row(
        "swap files of a killed run",
        "reclaimed by the next one, reported in GB; what is not ours stays",
    )


@pytest.mark.parametrize("kind", ["tmpfs", "read-only"])
def test_swap_place_refused(starts, disk, tmp_path, row, kind):
    place = Path("/dev/shm/zero-offload-test-swap") if kind == "tmpfs" else disk(20)
    if kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    run = starts("run", *NVME, "--nvme_path", place).ends(2)
    assert "cannot hold swap files" in run.output and "O_DIRECT" in run.output, run.output
    row(f"swap directory on {kind}", "refused before the model is loaded, exit 2")


# -- checkpoints -------------------------------------------------------------------------------
@pytest.mark.quick
def test_checkpoint_disk_full(starts, disk, row):
    place = disk(70)
    run = starts(
        "run", "--max_steps", 12, "--save_steps", 1, "--max_restarts", 0, directory=place / "run"
    ).ends(1)
    assert (
        run.output.count("was not saved") == 3 and "earlier checkpoints are untouched" in run.output
    )
    assert "the last checkpoint is of step 1; to go on from it: cd " in run.output
    assert (
        "3 checkpoints in a row could not be saved" in run.output
        and "checkpoint-1" in run.output.split("in a row")[1]
    )
    assert [p.name for p in run.directory.iterdir() if "checkpoint" in p.name] == ["checkpoint-1"]
    row(
        "the disk of the checkpoints is full",
        "the old one stays, training goes on, after 3 failed saves it stops; exit 1",
    )


def test_no_inodes_left(starts, disk, row):
    place = disk(120)
    run = starts(
        "run", "--max_steps", 400, "--save_steps", 1, "--max_restarts", 0, directory=place / "run"
    ).until_saved(2)
    try:
        for i in range(10**6):
            (place / f"empty-{i}").touch()
    except OSError:
        pass
    run.ends(1)
    assert (
        "was not saved" in run.output
        and "No space left on device" in run.output
        and list(run.directory.glob("checkpoint-*"))
    )
    row("no inodes left for a checkpoint", "as with a full disk")


def test_output_read_only(starts, disk, row):
    place = disk(20)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    run = starts("run", *SAVES, supervised=False, directory=place / "run").ends(2)
    assert "cannot be written to" in run.output and "Read-only" in run.output
    row("the run directory is read-only", "refused before the model is loaded, exit 2")


@pytest.fixture(scope="module")
def saved(calm):
    """A finished run of two ranks with checkpoints 2, 4 and 6."""
    return calm(*SAVES, "--save_total_limit", 5, ranks=2).directory


def damage(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def test_every_file_damaged(saved, tmp_path, capsys, row):
    """Cut, change and remove each file of the newest checkpoint: named, and the older is taken."""
    import torch.distributed as dist

    from trainer.checkpoint import load
    from trainer.errors import RunError

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        names = sorted(p.name for p in (saved / "checkpoint-6").iterdir())
        assert len([n for n in names if n.startswith("rank-00001-")]) > 3 and {
            "manifest.json",
            "trainer_state.json",
        } <= set(names)
        for name in names:
            for kind in ("truncated", "flipped", "missing"):
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
                shutil.copytree(saved, tmp_path / "run")
                damage(tmp_path / "run" / "checkpoint-6" / name, kind)
                chosen = load.choose(tmp_path / "run", "auto")
                assert chosen.folder.name == "checkpoint-4" and chosen.step == 4
                first, *_ = capsys.readouterr().out.splitlines()
                assert "skipped checkpoint-6" in first and name in first
                with pytest.raises(RunError, match="cannot be used"):
                    load.choose(tmp_path / "run", str(tmp_path / "run" / "checkpoint-6"))
        for step in (2, 4, 6):
            (tmp_path / "run" / f"checkpoint-{step}" / "manifest.json").unlink(missing_ok=True)
        with pytest.raises(RunError, match="no checkpoint of .* can be used"):
            load.choose(tmp_path / "run", "auto")
    finally:
        dist.destroy_process_group()
    row(
        "a file of a checkpoint truncated, changed or missing",
        f"named, the next older is taken ({len(names)} files, 3 ways each)",
    )


@pytest.mark.quick
def test_a_damaged_checkpoint_is_skipped(saved, tmp_path, starts, row):
    shutil.copytree(saved, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-6" / "rank-00001-group-00000.safetensors", "flipped")
    run = starts(
        "run", *SAVES, "--save_total_limit", 5, "--resume_from_checkpoint", "auto", ranks=2
    ).ends(0)
    assert (
        "skipped checkpoint-6: rank-00001-group-00000.safetensors is not what was written"
        in run.output
    )
    assert "goes on after step 4" in run.output
    before = [json.loads(line) for line in (saved / "metrics.jsonl").read_text().splitlines()]
    assert run.losses == [r["loss"] for r in before if "loss" in r]
    manifests = [
        json.loads((d / "checkpoint-6" / "manifest.json").read_text())["files"]
        for d in (saved, run.directory)
    ]
    # Written again, and the same.
    assert all(
        manifests[0][n] == manifests[1][n] for n in manifests[0] if n.endswith(".safetensors")
    )
    row(
        "resume with a damaged newest checkpoint",
        "skipped by name, goes on from the older one, losses bit-equal",
    )


def test_going_back(starts, row):
    """Resume by path, under the supervisor, without naming the run.

    It goes on in the same directory, and the later checkpoints are out of the way.
    """
    first = starts("run", *SAVES, "--save_total_limit", 5).ends(0)
    again = starts(
        "run",
        *SAVES,
        *"--save_total_limit 5 --learning_rate 5e-4".split(),
        "--resume_from_checkpoint",
        first.directory / "checkpoint-2",
        named=False,
    ).ends(0)
    assert "superseded-checkpoint-4" in again.output and "learning_rate" in again.output
    names = sorted(p.name.rsplit("-", 1)[0] for p in first.directory.glob("*checkpoint-*"))
    assert names == [*["checkpoint"] * 3, "superseded-checkpoint-4", "superseded-checkpoint-6"]
    assert len(again.records) == 6
    row(
        "resume from an older checkpoint by its path",
        "goes on in the run's directory; later checkpoints are put aside",
    )


def test_the_best_is_kept(trains, row):
    run = trains(
        "run",
        *(
            "--max_steps 8 --save_steps 1 --eval_strategy steps --eval_steps 1 "
            "--learning_rate 0.2 --export false --lr_scheduler_type constant"
        ).split(),
    )
    best = min((e for e in run.evaluations if e["step"]), key=lambda e: e["eval_loss"])["step"]
    kept = {int(p.name[11:]) for p in run.directory.glob("checkpoint-*")}
    assert kept == {7, 8, best}
    row("rotation", "the newest two and the best by evaluation loss are kept")


# -- guards ------------------------------------------------------------------------------------
@pytest.mark.quick
def test_not_finite_on_one_rank(starts, row):
    run = starts(
        "run",
        "--max_steps",
        6,
        ranks=2,
        env={"FAULT_STEP": "3", "FAULT_VALUE": "nan", "FAULT_RANK": "1"},
        script="tests/cpu/inject.py",
    ).ends(1)
    assert (
        "none of them was applied" in run.output
        and "restart" not in run.output
        and "to go on from it" not in run.output
    )
    for rank in (0, 1):
        dumped = json.loads((run.directory / f"nonfinite-3-rank-{rank}.json").read_text())
        assert (
            dumped["step"] == 3
            and len(dumped["rows"]) == 2
            and all(r["line"] >= 1 and "train.jsonl" in r["path"] for r in dumped["rows"])
        )
        from safetensors.torch import load_file

        assert (
            load_file(run.directory / f"nonfinite-3-rank-{rank}.safetensors")["0/input_ids"].shape[
                0
            ]
            == 2
        )
    row(
        "NaN in the loss of one rank",
        "no optimizer step on any rank, its rows and batches written down, exit 1",
    )


def test_loss_spike(starts, row):
    run = starts(
        "run",
        *"--max_steps 28 --learning_rate 1e-5 --max_grad_norm 0.01".split(),
        env={"FAULT_STEP": "26", "FAULT_VALUE": "50"},
        script="tests/cpu/inject.py",
    ).ends(0)
    assert "warning: the loss jumped to" in run.output and "at step 26" in run.output
    row("the loss jumps", "a warning with step, loss and the last losses' mean and spread")


def test_wandb_unreachable(starts, row):
    run = starts(
        "run",
        *"--max_steps 3 --report_to wandb".split(),
        env={
            "WANDB_MODE": "online",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": "http://127.0.0.1:9",
        },
    ).ends(0, 180)
    assert len(run.records) == 3 and all(r["step_s"] < 5 for r in run.records)
    row("W&B is unreachable", "the run goes on without it, no step is slower")


# -- compiled ops ------------------------------------------------------------------------------
LOAD = """
from trainer.config.command_line import command
from trainer.system import ops
ops.use_own_ninja()
raise SystemExit(command(lambda: ops.ensure([{name!r}]) or 0)())
"""


@pytest.mark.parametrize(
    "name, fault, words",
    [
        ("async_io", "a library is missing", "libaio-dev"),
        ("cpu_adam", "cut short", "cpu_adam, then make setup"),
        ("cpu_adam", "ours is cut short", "our AdamW cannot be loaded"),
        ("cpu_adam", "read-only", "export TORCH_EXTENSIONS_DIR=DIR"),
    ],
)
def test_an_op_that_cannot_be_loaded(tmp_path, row, name, fault, words):
    """Refused with a fix, and not by three restarts. A library that is cut short kills a process.

    The cache is a copy in a mount namespace of its own: elsewhere it would be built anew.
    """
    cache = ops.cache_directory()
    if os.getuid() or not list(cache.glob(f"**/{name}.so")):
        pytest.skip("needs root and the built ops")
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    # Those of other versions of torch, or of adam.c, may lie there too.
    for library in copy.glob("zero*/*.so" if "ours" in fault else f"**/{name}.so"):
        times = library.stat()
        if fault == "a library is missing":
            library.write_bytes(library.read_bytes().replace(b"libaio.so.1", b"libno0.so.1"))
        elif "cut short" in fault:
            os.truncate(library, 4096)
        os.utime(library, ns=(times.st_atime_ns, times.st_mtime_ns))
    mount = 'mount --bind "$1" "$2"; [ "$3" != read-only ] || mount -o remount,bind,ro "$2"; '
    load = [sys.executable, "-c", LOAD.format(name=name)]
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f'{mount} exec "${{@:4}}"', "-", copy, cache, fault, *load],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and words in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    row(f"a compiled op that cannot be loaded: {fault}", "refused with the fix, exit 3")


def test_a_compiler_that_is_killed(tmp_path, row):
    """As by the out-of-memory killer. The next build is not kept waiting."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *" -c "*) kill -9 $$; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    build = [sys.executable, "-m", "trainer.system.ops", "pin_memory"]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 200}
    killed = subprocess.run(build, env={**environment, "CXX": str(compiler)}, **options)
    assert killed.returncode == 3 and "pin_memory could not be built" in killed.stderr, killed
    assert "Traceback" not in killed.stderr
    done = subprocess.run(build, env=environment, **options)
    assert done.returncode == 0 and "pin_memory: ready" in done.stdout, done
    row("a compiler is killed", "refused with the fix, exit 3; the next build succeeds")
