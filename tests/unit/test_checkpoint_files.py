"""The files of a checkpoint, their rotation, and what a resumed run takes from them. No torch."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import files, resume
from trainer.checkpoint.files import (
    SHARD,
    SavedCheckpoint,
    ShardIndex,
    read_checkpoint,
    shard_chunks,
)
from trainer.config.settings import resolve
from trainer.errors import FAILED, RunError

ROOT = Path(__file__).resolve().parent.parent.parent


def save(directory, step, eval_loss=None, **content):
    """Write a small checkpoint as a run does."""
    work = files.temporary(directory, step)
    work.mkdir()
    names = {"rng-00000.json": b"{}", files.TRAINER_STATE: b'{"global_step": 1}'}
    entries = {name: files.write_file(work / name, [data]) for name, data in names.items()}
    target = directory / f"checkpoint-{step}"
    files.publish(work, target, {"step": step, "files": entries, "eval_loss": eval_loss, **content})
    return target


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def rewrite(folder, **changes):
    """Change the manifest and give it the right hash."""
    path = folder / files.MANIFEST
    manifest = {**json.loads(path.read_text()), **changes}
    manifest.pop("hash")
    path.write_text(json.dumps({**manifest, "hash": files._digest(manifest)}))


# -- one file ----------------------------------------------------------------------------------
def test_a_file_is_written_and_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)  # so that the page cache is emptied in between
    chunks = [b"a" * 3000, memoryview(b"b" * 3000), b"", b"c" * 10]
    entry = files.write_file(tmp_path / "file", chunks)
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)
    assert entry["bytes"] == 6010
    assert len(entry["xxh3_128"]) == 32
    assert files.verify_file(tmp_path / "file", entry) is None


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda path: path.unlink(), "file: No such file or directory"),
        (lambda path: os.truncate(path, 9), "file has 9 bytes; needed: 10"),
        (lambda path: path.write_bytes(b"x" * 11), "file has 11 bytes; needed: 10"),
        (lambda path: path.write_bytes(b"0123456788"), "file is not what was written"),
    ],
    ids=["missing", "short", "long", "changed"],
)
def test_a_damaged_file_is_named(tmp_path, damage, problem):
    path = tmp_path / "file"
    entry = files.write_file(path, [b"0123456789"])
    damage(path)
    assert files.verify_file(path, entry).startswith(problem)


def test_a_full_disk_is_an_os_error():
    with pytest.raises(OSError) as caught:
        files.write_file(Path("/dev/full"), [b"x" * 10**6])
    assert caught.value.errno == errno.ENOSPC


# -- one checkpoint ----------------------------------------------------------------------------
def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    folder = save(tmp_path, 3, 1.5, scheduler={1: (2, 3)})
    saved = read_checkpoint(folder)
    assert isinstance(saved, SavedCheckpoint)
    assert (saved.folder, saved.step) == (folder, 3)
    assert saved.manifest["format"] == 1
    assert saved.manifest["scheduler"] == {"1": [2, 3]}
    assert saved.first_damage(saved.manifest["files"]) is None
    assert files.is_whole(folder)
    assert names(tmp_path) == ["checkpoint-3"]


def test_the_first_damaged_file_is_named(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "rng-00000.json").unlink()
    saved = read_checkpoint(folder)
    assert isinstance(saved, SavedCheckpoint)
    assert saved.first_damage([files.TRAINER_STATE]) is None
    assert "rng-00000.json" in saved.first_damage([files.TRAINER_STATE, "rng-00000.json"])
    assert not files.is_whole(folder)


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda folder: (folder / files.MANIFEST).unlink(), "it was never finished"),
        (lambda folder: os.truncate(folder / files.MANIFEST, 50), "not readable (JSONDecodeError)"),
        (lambda folder: (folder / files.MANIFEST).write_text("[]"), "not readable (TypeError)"),
        (lambda folder: (folder / files.MANIFEST).write_text("{}"), "not readable (KeyError)"),
        (lambda folder: (folder / files.MANIFEST).write_bytes(b"\xff"), "(UnicodeDecodeError)"),
        (lambda folder: rewrite(folder, format=2), "format 2; needed: 1"),
        (lambda folder: rewrite(folder, files={"../x": {}}), "names files outside"),
        (lambda folder: rewrite(folder, files={"/etc/passwd": {}}), "names files outside"),
    ],
    ids=["missing", "cut", "list", "empty", "binary", "format", "outside", "absolute"],
)
def test_a_damaged_manifest_says_why(tmp_path, damage, problem):
    folder = save(tmp_path, 3)
    damage(folder)
    assert problem in read_checkpoint(folder)
    assert not files.is_whole(folder)


def test_a_changed_manifest_has_another_hash(tmp_path):
    path = save(tmp_path, 3, 1.5) / files.MANIFEST
    path.write_text(path.read_text().replace("1.5", "1.4"))
    assert "its hash differs" in read_checkpoint(path.parent)


def test_a_damaged_checkpoint_is_replaced(tmp_path):
    folder = save(tmp_path, 3)
    (folder / files.TRAINER_STATE).unlink()
    assert save(tmp_path, 3) == folder
    assert files.is_whole(folder)
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_checkpoint_of_the_first_releases_is_read(tmp_path):
    """The format on disk stays: this manifest was written before the code was split."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / files.MANIFEST).write_text(
        '{"format": 1, "step": 2, "world_size": 1, "files": {"trainer_state.json": {"bytes": 2, '
        '"xxh3_128": "dc7048f8f8747f561349cde127705c16"}}, "kinds": ["weight"], "scalars": {}, '
        '"eval_loss": null, "hash": "5b648efe983305d0989ff3f54bae7ffa"}'
    )
    (folder / "trainer_state.json").write_text("{}")
    assert files.is_whole(folder), read_checkpoint(folder)


# -- the checkpoints of a run ------------------------------------------------------------------
def test_checkpoints_are_listed_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint-", "superseded-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert [step for step, _ in resume.checkpoints(tmp_path)] == [10, 9]
    assert resume.newest(tmp_path) == 10
    assert resume.newest(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "losses, kept",
    [
        ([None, None, None, None], [3, 4]),
        ([1.0, 2.0, 3.0, 4.0], [1, 3, 4]),
        ([None, 0.5, 0.5, 0.6], [3, 4]),
        ([None, 0.5, None, None], [2, 3, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, losses, kept):
    for step, loss in enumerate(losses, 1):
        latest = save(tmp_path, step, loss)
    files.rotate(tmp_path, 2, latest)
    assert sorted(step for step, _ in files.checkpoints(tmp_path)) == kept
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_rotation_keeps_the_one_that_was_just_saved(tmp_path):
    """After a resumption from an older checkpoint, later damaged ones may be left."""
    for step in (1, 2, 7, 8):
        save(tmp_path, step)
    files.rotate(tmp_path, 2, tmp_path / "checkpoint-2")
    assert names(tmp_path)[1:] == ["checkpoint-2", "checkpoint-7", "checkpoint-8"]


def test_rotation_leaves_what_it_cannot_read(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    latest = [save(tmp_path, step) for step in (2, 3)][-1]
    files.rotate(tmp_path, 1, latest)
    assert [step for step, _ in files.checkpoints(tmp_path)] == [3, 1]


def test_later_checkpoints_are_superseded(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    renamed = files.supersede(tmp_path, 2)
    assert [step for step, _ in files.checkpoints(tmp_path)] == [2]
    assert [path.name.rsplit("-", 1)[0] for path in renamed] == [
        "superseded-checkpoint-6",
        "superseded-checkpoint-4",
    ]
    assert all(files.is_whole(path) for path in renamed)
    assert files.supersede(tmp_path, 2) == []


def test_what_a_killed_save_left_is_invisible_and_removed(tmp_path):
    save(tmp_path, 2)
    work = files.temporary(tmp_path, 3)
    work.mkdir()
    (work / "half").write_bytes(b"x")
    (tmp_path / "tmp-checkpoint-of-the-user").mkdir()
    assert resume.newest(tmp_path) == 2
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "tmp-checkpoint-of-the-user"]


@pytest.mark.parametrize(
    "point, visible",
    [("before-manifest", False), ("before-rename", False), ("after-rename", True)],
)
def test_a_kill_leaves_a_whole_checkpoint_or_none(tmp_path, point, visible):
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[1:3]\n"
        "import test_checkpoint_files as t; t.save(Path(sys.argv[3]), 5)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, "ZERO_OFFLOAD_KILL_AT": f"{point}:1", "RANK": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    assert files.is_whole(tmp_path / "checkpoint-5") == visible
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == (["checkpoint-5"] if visible else [])


def test_another_rank_is_not_killed(monkeypatch):
    monkeypatch.setenv("ZERO_OFFLOAD_KILL_AT", "before-rename:1")
    monkeypatch.setenv("RANK", "0")
    files.kill_point("before-rename")
    files.kill_point("before")


# -- shards ------------------------------------------------------------------------------------
@dataclass
class Slice:
    name: str
    start: int
    numel: int
    offset: int


class Rank:
    """The state of one rank: a parameter of 10 elements and one of 3, dealt out to the ranks."""

    dtype = torch.float32

    def __init__(self, rank, ranks):
        self.sub_groups = [[]]
        for name, total in (("a", 10), ("b", 3)):
            share = -(-total // ranks)
            start = rank * share
            numel = max(0, min(share, total - start))
            self.sub_groups[0].append(Slice(name, start, numel, 0))

    def state_keys(self, i):
        return ["weight", "exp_avg"]

    def read(self, i, state_key, shard_slice):
        start = shard_slice.start + (100 if state_key == "exp_avg" else 0)
        for value in range(start, start + shard_slice.numel):
            yield struct.pack("<f", value)


def write_shards(folder, ranks):
    entries = {}
    for rank in range(ranks):
        name = SHARD.format(rank, 0)
        entries[name] = files.write_file(folder / name, shard_chunks(Rank(rank, ranks), 0))
    return SavedCheckpoint(folder, {"files": {**entries, "rng-00000.json": {}}})


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_shards_are_read_at_any_number_of_ranks(tmp_path, before, after):
    index = ShardIndex(write_shards(tmp_path, before), 4)
    for rank in range(after):
        state = Rank(rank, after)
        for state_key in state.state_keys(0):
            for shard_slice in state.sub_groups[0]:
                view = bytearray(shard_slice.numel * 4)
                for offset in range(0, len(view), 8):  # as the optimizer's state asks: in blocks
                    index.fill(state_key, shard_slice, offset, memoryview(view)[offset:][:8])
                assert bytes(view) == b"".join(state.read(0, state_key, shard_slice))


def test_a_shard_is_a_safetensors_file(tmp_path):
    from safetensors import safe_open

    write_shards(tmp_path, 2)
    with safe_open(tmp_path / "rank-00001-group-00000.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["exp_avg/a", "exp_avg/b", "weight/a", "weight/b"]
        assert file.metadata() == {"a": "5", "b": "2"}
        assert file.get_tensor("weight/a").tolist() == [5, 6, 7, 8, 9]


def test_missing_elements_are_refused(tmp_path):
    saved = write_shards(tmp_path, 2)
    path = tmp_path / "rank-00001-group-00000.safetensors"
    whole = Rank(0, 1).sub_groups[0][0]
    os.truncate(path, path.stat().st_size - 20)  # the last tensors: exp_avg/a and exp_avg/b
    with pytest.raises(RunError, match="lacks a part of a") as caught:
        ShardIndex(saved, 4).fill("exp_avg", whole, 0, memoryview(bytearray(40)))
    assert "16 bytes of exp_avg are in no file" in str(caught.value)
    assert caught.value.code == FAILED
    del saved.manifest["files"][path.name]
    with pytest.raises(RunError, match="20 bytes of weight"):
        ShardIndex(saved, 4).fill("weight", whole, 0, memoryview(bytearray(40)))


# -- resume ------------------------------------------------------------------------------------
def settings_of(*flags):
    return resolve(["--model_name_or_path", "x", *map(str, flags)])


def manifest_of(settings, rows=8, **changes):
    return {"settings": {**settings.public(), **changes}, "update_rows": rows}


BATCH = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)


@pytest.mark.parametrize(
    "ranks, flags, batch, accumulation",
    [
        (1, [], 4, 2),
        (2, [], 4, 1),
        (4, [], 2, 1),
        (1, ["--per_device_train_batch_size", 8], 8, 1),
        (1, ["--per_device_train_batch_size", 3], 4, 2),
        (8, ["--gradient_accumulation_steps", 4], 1, 1),
    ],
)
def test_the_rows_of_an_optimizer_step_stay(ranks, flags, batch, accumulation):
    settings = settings_of(*BATCH, *flags)
    resume.reconcile(settings, manifest_of(settings_of(*BATCH)), ranks)
    assert settings.rows_per_step(ranks) == 8
    assert settings.per_device_train_batch_size == batch
    assert settings.gradient_accumulation_steps == accumulation


def test_the_differing_batch_is_shown():
    settings = settings_of(*BATCH, "--per_device_train_batch_size", 3)
    assert resume.reconcile(settings, manifest_of(settings_of(*BATCH)), 1) == [
        ("rows of an optimizer step", 8, 6, 8),
        ("per_device_train_batch_size", 4, 3, 4),
    ]
    assert settings.sources["per_device_train_batch_size"] == "checkpoint"
    assert resume.reconcile(settings, manifest_of(settings_of(*BATCH)), 1) == []


def test_the_same_flags_differ_in_nothing():
    """The saved settings are complete: a size that follows from another one is decided there."""
    settings = settings_of(*BATCH)
    settings.freeze()
    assert resume.reconcile(settings_of(*BATCH), manifest_of(settings), 1) == []


def test_rows_that_the_ranks_cannot_share_are_refused():
    settings = settings_of(*BATCH)
    with pytest.raises(RunError, match="cannot be divided among 3 ranks"):
        resume.reconcile(settings, manifest_of(settings), 3)


def test_what_is_kept_and_what_is_new():
    saved = manifest_of(settings_of(*BATCH), seed=42, run_name="a", learning_rate=1e-3, gone_flag=1)
    settings = settings_of(*BATCH, "--seed", 1, "--learning_rate", 5e-4, "--run_name", "b")
    differences = sorted(resume.reconcile(settings, saved, 1))
    assert differences == [("learning_rate", 1e-3, 5e-4, 5e-4), ("seed", 42, 1, 42)]
    assert (settings.seed, settings.learning_rate, settings.run_name) == (42, 5e-4, "b")
    lines = resume.difference_table(differences).splitlines()
    assert [cell.strip() for cell in lines[0].split(" | ")] == ["key", "saved", "now", "used"]
    assert [cell.strip() for cell in lines[2].split(" | ")] == ["seed", "42", "1", "42"]


def test_what_the_checkpoint_decides_reaches_the_trainer():
    settings = settings_of()
    saved = manifest_of(settings, 16, seed=7, data_seed=5, train_sampling_strategy="sequential")
    resume.reconcile(settings, saved, 4)
    arguments = settings.training_arguments()
    assert (arguments["seed"], arguments["data_seed"]) == (7, 5)
    assert arguments["train_sampling_strategy"] == "sequential"
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 4


def test_metrics_are_trimmed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    resume.trim_metrics(path, 2)
    assert not path.exists()
    path.write_text('{"step": 1}\n[]\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    resume.trim_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "typed, requested", [("true", "auto"), ("auto", "auto"), ("false", None), ("None", None)]
)
def test_the_request_to_resume(typed, requested, tmp_path):
    settings = settings_of("--output_dir", tmp_path, "--resume_from_checkpoint", typed)
    resume.check_request(settings)
    assert settings.resume_from_checkpoint == requested


def test_a_path_names_the_run(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    settings = settings_of("--resume_from_checkpoint", tmp_path / "checkpoint-1")
    resume.check_request(settings)
    assert settings.output_dir == str(tmp_path)


def test_requests_that_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    for flags, problem in (
        (["--resume_from_checkpoint", tmp_path / "absent"], "no checkpoint"),
        (["--resume_from_checkpoint", "auto"], "needs to know the run"),
        (["--output_dir", tmp_path], "holds a run already"),
    ):
        with pytest.raises(RunError, match=problem):
            resume.check_request(settings_of(*flags))


def test_the_printed_command():
    assert resume.command("runs/a").endswith(
        "--config runs/a/resolved_config.yaml --resume_from_checkpoint auto"
    )


@pytest.mark.parametrize("module", ["files", "resume"])
def test_no_torch(module):
    code = f"import sys, trainer.checkpoint.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
