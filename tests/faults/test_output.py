"""Output that cannot be written, diagnostics on a full disk, and exports that do not fit."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import FLAGS, ROOT, inputs

STEPS = ["--max_steps", 2, "--save_strategy", "no"]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu"}


PLAN = [sys.executable, "launch/plan.py"]
KEPT = {"filler", "lost+found"}


def fill(place, leave=0):
    """Fill a disk, and give back so many bytes."""
    with open(place / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 2**16)
        except OSError:
            pass
        os.fsync(file.fileno())  # frees what was set aside for its own bookkeeping
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass
        size = file.tell()
    os.truncate(place / "filler", size - leave)


def phase(directory):
    try:
        return json.loads((directory / "heartbeat.json").read_text())["phase"]
    except (OSError, ValueError):
        return None


def test_the_log_is_on_a_full_disk(disk, tiny_model, rows_file, tmp_path, row):
    place, directory = disk(10), tmp_path / "run"
    directory.mkdir()
    for log in (place / "train.log", directory / "train.log"):
        log.touch()
    # A link would be refused.
    subprocess.run(["mount", "--bind", place / "train.log", directory / "train.log"], check=True)
    fill(place)
    flags = [*inputs(tiny_model, rows_file, tmp_path), *FLAGS, *STEPS, "--output_dir", directory]
    shell = subprocess.run(
        [sys.executable, "launch/supervise.py", "--detach", *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=60,
    )
    try:
        assert shell.returncode == 0, shell.stderr
        end = time.monotonic() + 120
        while phase(directory) != "done":
            assert time.monotonic() < end, phase(directory)
            time.sleep(0.2)
    finally:
        subprocess.run(["umount", "-l", directory / "train.log"], check=True)
    assert len((directory / "metrics.jsonl").read_text().splitlines()) >= 2
    assert (place / "train.log").stat().st_size < 4096
    row("train.log is on a full disk (DETACH=1)", "supervisor and ranks go on without it")


def test_the_reader_of_the_output_is_dead(tiny_model, rows_file, tmp_path, row):
    """`make train | tee log`, and tee is gone: two ranks train to the end."""
    directory = tmp_path / "run"
    flags = [*inputs(tiny_model, rows_file, tmp_path), *FLAGS, *STEPS, "--output_dir", directory]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "launch/supervise.py", "--num_gpus", "2", *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=writer,
        stderr=writer,
        timeout=120,
    )
    os.close(writer)
    assert done.returncode == 0 and phase(directory) == "done"
    row("the reader of the output has died (a dead tee)", "the run ends well, exit 0")


def test_export_on_a_full_disk(starts, disk, row):
    """It ends at once, with what stands; the export of before is still whole."""
    place = disk(150)
    flags = ["--export", "true", "--save_steps", 1]
    run = starts("run", *flags, "--max_steps", 1, directory=place / "run").ends(0)
    before = {p.name: p.read_bytes() for p in (run.directory / "export").iterdir()}
    assert "model.safetensors" in before
    fill(place, leave=6 * 2**20)
    resume = ["--resume_from_checkpoint", "auto", "--max_steps", 2, "--save_strategy", "no"]
    run = starts("run", "--export", "true", *resume, directory=place / "run").ends(1)
    assert run.output.count("the export could not be written") == 1, run.output
    assert "No space left on device; the earlier export stands there" in run.output
    assert "restart" not in run.output and "the last checkpoint is of step 1" in run.output
    after = {p.name: p.read_bytes() for p in (run.directory / "export").iterdir()}
    assert after == before and not list(run.directory.glob(".tmp-*"))
    row(
        "the disk is full at the export",
        "ends with what stands, exit 1; the earlier export and all checkpoints stay",
    )


@pytest.mark.quick
def test_a_model_on_a_full_disk(disk):
    """safetensors and tokenizers have errors of their own: each is an OSError here."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    from data.files import new_directory

    place = disk(8)
    words = {f"word {i} {'x' * 50}": i for i in range(100_000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    for write in (
        lambda work: save_file({"a": torch.zeros(2**22)}, work / "model.safetensors"),
        lambda work: tokenizer.save(str(work / "tokenizer.json")),
        lambda work: (work / "text").write_text("x" * 2**24),
    ):
        with pytest.raises(OSError, match="No space left"), new_directory(place / "e") as work:
            write(work)
        assert [p.name for p in place.iterdir()] == ["lost+found"]


def test_merge_on_a_full_disk(disk, tiny_model, tmp_path, row):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "adapter")
    place = disk(8)
    merge = ["launch/export.py", "--merge", tmp_path / "adapter", "--output", place / "merged"]
    done = subprocess.run([sys.executable, *merge], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "No space left on device; nothing was left" in done.stderr
    assert "Traceback" not in done.stderr and [p.name for p in place.iterdir()] == ["lost+found"]
    row("the disk is full at a merge", "exit 1, nothing is left of it")


@pytest.mark.quick
def test_guard_dump_on_a_full_disk(disk, capsys, row):
    import torch

    from trainer.monitor.guards import Guards

    place = disk(8)
    for free in (0, 2**16):  # neither rows nor tensors, and rows only
        fill(place, leave=free)
        guard = Guards(place, rank=0, limit=1, last_good_step=0)
        guard.step_was_skipped(1, [{"line": 3}], [{"input_ids": torch.zeros(2**20)}])
        assert guard.skipped == 1
        assert "the rows of step 1 are not in" in capsys.readouterr().err
        assert not list(place.glob(".tmp-*")) and not list(place.glob("*.safetensors"))
    row("the disk is full when a batch is not finite", "a warning; the guard stops the run")


REFUSAL = """
import os, sys
sys.path[0] = {root!r}
from trainer import run, stages
from trainer.errors import RunError

def refuse(*_):
    raise RunError("refused by " + os.environ["RANK"], code=3)

if os.environ["RANK"] in {ranks!r}:
    {where}
run.leave(run.main())
"""


@pytest.mark.parametrize("ranks", ["1", "01"])
@pytest.mark.parametrize("where", ["run.prepare = refuse", "stages.load_inputs = refuse"])
def test_a_refusal_is_printed_once(starts, tmp_path, row, ranks, where):
    script = tmp_path / "refuse.py"
    script.write_text(REFUSAL.format(root=str(ROOT), ranks=ranks, where=where))
    run = starts("run", *STEPS, ranks=2, script=script).ends(3)
    assert run.output.count("error: refused by") == 1, run.output
    assert f"refused by {ranks[0]}" in run.output
    # Once the ranks are joined, those that are left see the connection break.
    assert "Traceback" not in run.output or "stages" in where and ranks == "1"
    row(f"a refusal of rank {' and '.join(ranks)}", "printed once, exit 3")


def test_a_picture_on_a_full_disk(disk, row):
    place = disk(10)
    fill(place)
    machine = "--gpus 1 --gpu_memory 80GB --ram 1TB".split()
    done = subprocess.run(
        [*PLAN, "--model", "llama-3-8b", *machine, "--plot", place / "plan.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "No space left on device" in done.stderr, done
    assert "Traceback" not in done.stderr and {p.name for p in place.iterdir()} <= KEPT
    row("`plan --plot` on a full disk", "exit 1, nothing is left there")
