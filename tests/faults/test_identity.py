"""Whose checkpoint it is: another run's, another line's, another base model's."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

OFFLOAD = ["--deepspeed", "ds_z3_offload.json", "--max_steps", 4, "--save_steps", 2]
KEEP = ["--save_total_limit", 9]
LORA = ["--method", "lora", "--lora_r", 8]


def content(directory):
    """{file: hash} of all under a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def identity(run):
    return json.loads((run.directory / "run.json").read_text())


def alone(starts, name, *flags, code=0, **options):
    return starts(name, *flags, supervised=False, **options).ends(code)


@pytest.fixture(scope="module")
def whole(calm):
    return calm(*OFFLOAD, *KEEP)


@pytest.mark.parametrize(
    "trace", ["metrics.jsonl", pytest.param("checkpoint-2", marks=pytest.mark.quick), "run.json"]
)
def test_a_used_directory_is_not_new(starts, whole, tmp_path, trace, row):
    """A run that died early left a part of this; the next one has another seed."""
    (tmp_path / "run").mkdir()
    source = whole.directory / trace
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "run" / trace)
    before = content(tmp_path / "run")
    run = alone(starts, "run", *OFFLOAD, "--seed", 7, code=2)
    assert "holds a run already" in run.output and f"found:  {trace}" in run.output
    assert content(tmp_path / "run") == before
    row(f"a new run in a directory with {trace}", "refused, nothing touched, exit 2")


@pytest.mark.quick
def test_another_runs_checkpoint(starts, whole, tmp_path, row):
    other = tmp_path / "other"
    shutil.copytree(whole.directory, other)
    (other / "run.json").write_text(json.dumps({**identity(whole), "id": "0" * 32}))
    before = content(other)
    checkpoint = whole.directory / "checkpoint-2"
    run = alone(starts, "other", *OFFLOAD, "--resume_from_checkpoint", checkpoint, code=2)
    assert "is of another run" in run.output and "0" * 32 in run.output
    assert content(other) == before
    # By `auto` the run finds only checkpoints that are not its own.
    run = alone(starts, "other", *OFFLOAD, "--resume_from_checkpoint", "auto", code=2)
    assert "it is of another run" in run.output and "can be used" in run.output
    assert {n for n in content(other) if "checkpoint" in n} == {
        n for n in before if "checkpoint" in n
    }
    row("a checkpoint of another run", "refused, nothing touched, exit 2")


def test_a_new_run_from_anothers_checkpoint(starts, whole, row):
    checkpoint = whole.directory / "checkpoint-2"
    run = alone(starts, "run", *OFFLOAD, *KEEP, "--resume_from_checkpoint", checkpoint)
    assert run.losses == whole.losses[2:]
    mine, parent = identity(run), identity(run)["parent"]
    assert mine["id"] != identity(whole)["id"] == parent["id"]
    assert parent["step"] == 2 and parent["checkpoint"] == str(checkpoint)
    saved = json.loads((run.directory / "checkpoint-4" / "manifest.json").read_text())
    assert saved["run"] == mine
    row("a new run from another's checkpoint", "bit-equal, and names it as its parent")


def test_a_crash_before_the_first_checkpoint(starts, whole, row):
    """A run from another's checkpoint must not begin with the model's weights after it."""
    checkpoint = whole.directory / "checkpoint-2"
    run = starts(
        "run",
        *OFFLOAD,
        *("--max_restarts", 1, "--resume_from_checkpoint", checkpoint),
        script="tests/cpu/inject.py",
        env={"FAULT_STEP": "1", "FAULT_VALUE": "crash"},
    ).ends(1)
    assert run.output.count(f"resume: {checkpoint}, verified") == 2
    assert "no new checkpoint yet, so as at first" in run.output
    run = alone(starts, "run", *OFFLOAD, "--resume_from_checkpoint", "auto")
    assert run.losses == whole.losses[2:] and identity(run)["line"] == 0
    row("a crash before the first checkpoint of a run from another's", "bit-equal")


def test_a_refused_start_touches_nothing(starts, whole, tmp_path, row):
    """Back to step 2 as another method: no line begins, and later checkpoints keep their names."""
    shutil.copytree(whole.directory, tmp_path / "run")
    before = content(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2"
    run = alone(starts, "run", *OFFLOAD, *LORA, "--resume_from_checkpoint", path, code=2)
    assert "is of another model, method or adapter shape" in run.output
    after = content(tmp_path / "run")
    assert {n for n in before | after if before.get(n) != after.get(n)} <= {
        *("heartbeat.json", ".running", "stacks-0.txt")
    }
    row("going back with settings that do not fit", "refused, nothing touched, exit 2")


def test_going_back(starts, whole, tmp_path, row):
    """Back to step 2 with another rate, a crash at the old last step, and on by itself."""
    shutil.copytree(whole.directory, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2"
    flags = [*OFFLOAD, *KEEP, "--max_steps", 6, "--learning_rate", 2e-3]
    fault = {"FAULT_STEP": "3", "FAULT_VALUE": "crash"}  # in step 5, after checkpoint-4
    run = starts(
        "run", *flags, "--resume_from_checkpoint", path, script="tests/cpu/inject.py", env=fault
    ).ends(0)
    assert "restart 1 of 3" in run.output and "goes on from checkpoint-4" in run.output
    after = identity(run)
    assert (after["id"], after["line"]) == (identity(whole)["id"], 1)
    assert after["parent"]["step"] == 2
    saved = json.loads((run.directory / "checkpoint-4" / "manifest.json").read_text())
    assert saved["run"]["line"] == 1
    assert len(list(run.directory.glob("superseded-checkpoint-4-*"))) == 1
    row("back to an older checkpoint, and a crash", "a line of its own, which goes on by itself")


@pytest.mark.quick
def test_another_base_under_an_adapter(starts, tiny_model, tmp_path, row):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    flags = [*OFFLOAD, *LORA, "--model_name_or_path", base]
    alone(starts, "run", *flags)
    weights = base / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1  # one bit, in place: same names, shapes and sizes
    weights.write_bytes(changed)
    resumed = [*flags, "--max_steps", 6, "--resume_from_checkpoint", "auto"]
    run = alone(starts, "run", *resumed, code=2)
    assert "belongs to another base model" in run.output, run.output[-3000:]
    changed[-2] ^= 1
    weights.write_bytes(changed)
    assert "verified" in alone(starts, "run", *resumed).output
    row("a base model that was changed under an adapter", "refused by its fingerprint, exit 2")


def test_another_configuration_of_the_model(starts, whole, tiny_model, tmp_path, row):
    """All weights are the checkpoint's: what they are multiplied by is not."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    shutil.copytree(whole.directory, tmp_path / "run")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    flags = ["--model_name_or_path", base, "--max_steps", 6, "--resume_from_checkpoint", "auto"]
    run = alone(starts, "run", *OFFLOAD, *flags, code=2)
    assert 'hidden_act: "silu" saved, "gelu" here' in run.output, run.output[-3000:]
    row("config.json was changed under a full fine-tune", "refused by its keys, exit 2")


def test_another_base_at_the_merge(starts, tiny_model, tmp_path, row):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    flags = ["--model_name_or_path", base, "--max_steps", 1, "--export", "true"]
    run = alone(starts, "run", *OFFLOAD, *LORA, *flags)
    weights = base / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(changed)
    command = [sys.executable, "launch/export.py", "--merge", str(run.directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "belongs to another base model" in done.stderr, done.stderr
    assert not (run.directory / "export-merged").exists()
    row("a merge with a base that was changed", "refused by its fingerprint, exit 2")


@pytest.mark.quick
def test_an_older_format(starts, whole, tmp_path, row):
    from trainer.checkpoint import files

    shutil.copytree(whole.directory, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/manifest.json"):
        manifest = json.loads(path.read_text()) | {"format": 1}
        del manifest["run"], manifest["base"], manifest["hash"]
        path.write_text(json.dumps({**manifest, "hash": files._digest(manifest)}))
    run = starts("run", *OFFLOAD, "--resume_from_checkpoint", "auto").ends(2)
    assert "format 1, saved by version" in run.output and "restart" not in run.output
    row("a checkpoint of an older format", "refused with both formats, no restart, exit 2")
