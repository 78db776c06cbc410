"""The files of a checkpoint, their rotation, and what a resumed run takes from them. No torch."""

import errno
import json
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import base, files, resume
from trainer.checkpoint.files import (
    SHARD,
    SavedCheckpoint,
    ShardIndex,
    read_checkpoint,
    shard_chunks,
)
from trainer.config.settings import resolve, write_yaml
from trainer.errors import FAILED, RunError
from trainer.run_dir import RunDirectory, RunIdentity, versions

ROOT = Path(__file__).resolve().parent.parent.parent


# Fixed: test ids hold it, and are the same in each of xdist's processes.
RUN = RunIdentity("4f" * 16, "2026-11-30T14:00:00+0000")


def save(directory, step, eval_loss=None, run=RUN, **content):
    """Write a small checkpoint as a run does."""
    work = files.temporary(directory, run, step)
    work.mkdir()
    names = {"rng-00000.json": b"{}", files.TRAINER_STATE: b'{"global_step": 1}'}
    entries = {name: files.write_file(work / name, [data]) for name, data in names.items()}
    target = directory / f"checkpoint-{step}"
    keys = {key: kinds[-1]() for key, kinds in files.KEYS.items()}
    keys |= {"run": asdict(run), "versions": versions(), "evaluated": None}
    keys |= {"step": step, "files": entries, "eval_loss": eval_loss}
    files.publish(work, target, keys | content)
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
    assert saved.manifest["format"] == files.FORMAT
    assert saved.manifest["scheduler"] == {"1": [2, 3]}
    assert saved.first_damage(saved.manifest["files"]) is None
    assert files.read_whole(folder)
    assert names(tmp_path) == ["checkpoint-3"]


def test_the_first_damaged_file_is_named(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "rng-00000.json").unlink()
    saved = read_checkpoint(folder)
    assert isinstance(saved, SavedCheckpoint)
    assert saved.first_damage([files.TRAINER_STATE]) is None
    assert "rng-00000.json" in saved.first_damage([files.TRAINER_STATE, "rng-00000.json"])
    assert not files.read_whole(folder)


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda folder: (folder / files.MANIFEST).unlink(), "it was never finished"),
        (lambda folder: os.truncate(folder / files.MANIFEST, 50), "not readable (JSONDecodeError)"),
        (lambda folder: (folder / files.MANIFEST).write_text("[]"), "not readable (ValueError)"),
        (lambda folder: (folder / files.MANIFEST).write_text("[" * 10**5), "(ValueError)"),
        (lambda folder: (folder / files.MANIFEST).write_text("{}"), "not readable (KeyError)"),
        (lambda folder: (folder / files.MANIFEST).write_bytes(b"\xff"), "(UnicodeDecodeError)"),
        (lambda folder: rewrite(folder, format=4), "needed: 3"),
        (lambda folder: rewrite(folder, files={"../x": {}}), "names files outside"),
        (lambda folder: rewrite(folder, files={"/etc/passwd": {}}), "names files outside"),
    ],
    ids=["missing", "cut", "list", "deep", "empty", "binary", "format", "outside", "absolute"],
)
def test_a_damaged_manifest_says_why(tmp_path, damage, problem):
    folder = save(tmp_path, 3)
    damage(folder)
    assert problem in read_checkpoint(folder)
    assert not files.read_whole(folder)


@pytest.mark.parametrize("key", sorted(files.KEYS))
def test_a_key_of_another_type_is_named(tmp_path, key):
    folder = save(tmp_path, 3)
    rewrite(folder, **{key: {"a": 1} if list in files.KEYS[key] else [1]})
    assert read_checkpoint(folder) == f"manifest.json has another type of {key}"


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"run": {}}, "not readable (ValueError)"),
        ({"run": asdict(RUN) | {"parent": {}}}, "not readable (ValueError)"),
        ({"files": {"..": {"bytes": 1, "xxh3_128": ""}}}, "outside"),
        ({"files": {"a\0.json": {"bytes": 1, "xxh3_128": ""}}}, "outside"),
        ({"files": {"a.json": {}}}, "not readable (KeyError)"),
        ({"files": {"a.json": {"bytes": "1", "xxh3_128": ""}}}, "no size and hash of a.json"),
        ({"step": 2}, "a checkpoint of step 2 under another name"),
    ],
)
def test_a_manifest_that_nobody_could_have_written(tmp_path, changes, problem):
    folder = save(tmp_path, 3)
    rewrite(folder, **changes)
    assert problem in read_checkpoint(folder)


def test_a_changed_manifest_has_another_hash(tmp_path):
    path = save(tmp_path, 3, 1.5) / files.MANIFEST
    path.write_text(path.read_text().replace("1.5", "1.4"))
    assert "its hash differs" in read_checkpoint(path.parent)


def test_a_damaged_checkpoint_is_put_aside(tmp_path):
    folder = save(tmp_path, 3)
    (folder / files.TRAINER_STATE).unlink()
    assert save(tmp_path, 3) == folder
    assert files.read_whole(folder)
    files.remove_leftovers(tmp_path, RUN)
    kept, damaged = names(tmp_path)
    assert kept == "checkpoint-3" and damaged.startswith("damaged-checkpoint-3-")
    assert files.checkpoints(tmp_path) == [(3, folder)]


def test_a_whole_checkpoint_in_the_way_is_not_deleted(tmp_path):
    save(tmp_path, 3, 0.5)
    save(tmp_path, 3, 0.7)
    files.remove_leftovers(tmp_path, RUN)
    _, aside = names(tmp_path)
    assert aside.startswith("superseded-") and files.read_whole(tmp_path / aside)


def test_another_format_is_named(tmp_path):
    """A checkpoint from before runs had an identity: which version wrote it, and what is needed."""
    folder = save(tmp_path, 2)
    rewrite(folder, format=1)
    assert "format 1, saved by version" in read_checkpoint(folder)
    rewrite(folder, format=1, versions=None)
    assert "version unknown" in read_checkpoint(folder)


@pytest.mark.parametrize("key", sorted(files.KEYS))
def test_a_key_that_is_missing_is_named(tmp_path, key):
    folder = save(tmp_path, 2)
    manifest = json.loads((folder / files.MANIFEST).read_text())
    del manifest[key], manifest["hash"]
    (folder / files.MANIFEST).write_text(json.dumps({**manifest, "hash": files._digest(manifest)}))
    assert read_checkpoint(folder) == f"manifest.json lacks {key}"


# -- which run a checkpoint belongs to ---------------------------------------------------------
def saved_by(directory, step, run):
    return read_checkpoint(save(directory, step, run=run))


def test_a_line_owns_what_came_before_it_was_left(tmp_path):
    first = RunIdentity.new()
    at = {step: saved_by(tmp_path, step, first) for step in (10, 20, 30)}
    second = replace(first, line=1, parent=RunIdentity.after(at[20].manifest, at[20].folder))
    assert [second.owns(at[step].manifest) for step in (10, 20, 30)] == [True, True, False]
    late = saved_by(tmp_path, 40, second)
    third = replace(first, line=2, parent=RunIdentity.after(late.manifest, late.folder))
    owned = [third.owns(saved.manifest) for saved in (*at.values(), late)]
    assert owned == [True, True, False, True]
    assert not RunIdentity.new().owns(at[10].manifest)


def test_a_new_run_goes_on_from_anothers_checkpoint(tmp_path):
    (tmp_path / "a").mkdir()
    saved = saved_by(tmp_path / "a", 5, RUN)
    directory = RunDirectory(tmp_path / "b")
    identity = resume.identify(directory, str(saved.folder), saved)
    assert identity.id != RUN.id and identity.parent["id"] == RUN.id
    assert identity.parent["step"] == 5 and identity.owns(saved.manifest)


def test_another_runs_checkpoint_is_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    saved, directory = saved_by(tmp_path / "a", 5, RUN), RunDirectory(tmp_path / "b")
    directory.write_identity(RunIdentity.new())
    with pytest.raises(RunError, match="is of another run") as error:
        resume.check_same_run(directory, saved)
    assert error.value.code == 2 and RUN.id in str(error.value)
    directory.identity.unlink()
    directory.metrics.write_text("")  # somebody's, from before runs had an identity
    with pytest.raises(RunError, match="is of another run"):
        resume.identify(directory, str(saved.folder), saved)


def test_going_back_begins_a_line(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_identity(RUN)
    early, late = (saved_by(tmp_path, step, RUN) for step in (5, 10))
    assert resume.identify(directory, "auto", late) == RUN
    assert resume.identify(directory, str(late.folder), late) == RUN
    line = resume.identify(directory, str(early.folder), early)
    assert (line.id, line.line, line.parent["step"]) == (RUN.id, 1, 5)
    directory.write_identity(line)
    (aside,) = files.supersede(tmp_path, 5)
    # The same command again, as a supervisor gives it: not one more line.
    assert resume.identify(directory, str(early.folder), early) == line
    # Back to what was left: a line of its own.
    back = resume.identify(directory, str(aside), read_checkpoint(aside))
    assert (back.line, back.parent["step"]) == (2, 10)


def test_a_lost_identity_is_the_checkpoints(tmp_path):
    saved = saved_by(tmp_path, 5, RUN)
    assert resume.identify(RunDirectory(tmp_path), "auto", saved) == RUN


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1, "x": 2}'])
def test_a_damaged_identity_is_refused(tmp_path, content):
    directory = RunDirectory(tmp_path)
    directory.identity.write_text(content)
    with pytest.raises(RunError, match="does not say which run"):
        directory.read_identity()


def test_commits_are_told_apart(tmp_path):
    """The same step again is another commit: a step number says nothing of progress."""
    save(tmp_path, 5)
    before = files.commits(tmp_path)
    files.supersede(tmp_path, 4)
    assert files.commits(tmp_path) == {}
    save(tmp_path, 5, run=replace(RUN, line=1))
    assert files.commits(tmp_path).keys().isdisjoint(before)
    assert list(files.commits(tmp_path).values()) == list(before.values()) == [5]


@pytest.mark.parametrize(
    "trace", ["run.json", "metrics.jsonl", "checkpoint-3", "export", "plan.json"]
)
def test_a_directory_with_anything_of_a_run_is_not_new(tmp_path, trace):
    for harmless in ("heartbeat.json", "train.log", ".running"):
        (tmp_path / harmless).touch()
    settings = resolve(["--output_dir", str(tmp_path)])
    resume.check_request(settings)
    (tmp_path / trace).mkdir()
    (tmp_path / "resolved_config.yaml").touch()  # what the line to go on names
    with pytest.raises(RunError, match="holds a run already") as error:
        resume.check_request(settings)
    assert trace in str(error.value) and "--resume_from_checkpoint auto" in str(error.value)


def test_the_base_of_an_adapter(tmp_path, monkeypatch):
    """One changed byte of a small file, any header, and a large file that was trained on."""
    monkeypatch.setattr(base, "WHOLE", 2**16)
    (tmp_path / "config.json").write_text('{"rope_theta": 1, "_name_or_path": "/a"}')
    small, large = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    small.write_bytes(bytes(1000))
    large.write_bytes(bytes(2**25))
    seen = {base.fingerprint(str(tmp_path), "main", False)}
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    (moved / "config.json").write_text('{"_name_or_path": "/b", "rope_theta": 1}')
    assert base.fingerprint(str(moved), "main", False) in seen
    (moved / "config.json").write_text('{"rope_theta": 2}')
    seen.add(base.fingerprint(str(moved), "main", False))
    for path, offset, block in ((small, 999, b"x"), (large, 100, b"x"), (large, 0, b"y" * 2**25)):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(block)
        seen.add(base.fingerprint(str(tmp_path), "main", False))
    large.rename(tmp_path / "c.safetensors")
    assert len(seen | {base.fingerprint(str(tmp_path), "main", False)}) == 6


def test_what_a_model_computes(tmp_path):
    """Its configuration and its trusted code; where they were saved does not count."""
    config = {"hidden_act": "silu", "rope": {"theta": 1.0, "x": math.nan}, "_name_or_path": "/a"}
    config["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoT": ["t.T"]}
    for name, code in (("own", "from .part import A"), ("part", "A = 1"), ("t", "")):
        (tmp_path / f"{name}.py").write_text(code)
    path = tmp_path / "config.json"

    def now(trusted=True, **changes):
        path.write_text(json.dumps({**config, **changes}))
        return base.definition(str(tmp_path), "main", trusted)

    saved = json.loads(json.dumps(now()))
    assert not base.differences(saved, now(_name_or_path="/b", transformers_version="5"))
    rope = {"theta": 2.0, "x": math.nan}
    found = base.differences(saved, now(hidden_act="gelu", rope=rope, bias=True))
    assert found == [
        "bias: not there saved, true here",
        'hidden_act: "silu" saved, "gelu" here',
        "rope.theta: 1.0 saved, 2.0 here",
    ]
    (tmp_path / "t.py").write_text("the tokenizer's")
    assert not base.differences(saved, now())
    fingerprint = base.fingerprint(str(tmp_path), "main", True)
    (tmp_path / "part.py").write_text("A = 2")
    (changed,) = base.differences(saved, now())
    assert changed.startswith("part.py: ")
    assert base.fingerprint(str(tmp_path), "main", True) != fingerprint
    assert len(base.differences(saved, now(trusted=False))) == 2


def test_another_model_is_refused(tmp_path):
    from trainer.checkpoint import load

    model = {"config": {"rms_norm_eps": 1e-6}, "code": {}}
    saved = read_checkpoint(save(tmp_path, 1, model=model))
    load.check_same_model(model, saved)
    with pytest.raises(RunError, match="is not the one that") as error:
        load.check_same_model({"config": {"rms_norm_eps": 1e-5}, "code": {}}, saved)
    assert error.value.code == 2
    assert "rms_norm_eps: 1e-06 saved, 1e-05 here" in str(error.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_is_the_files_that_are_loaded(tmp_path, sharded):
    """Others, such as an optimizer's or an adapter's, may come and go."""
    (tmp_path / "config.json").write_text("{}")
    name = "model.safetensors"
    if sharded:
        name = "model-1-of-1.safetensors"
        index = {"weight_map": {"a": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / name).write_bytes(b"1")
    before = base.fingerprint(str(tmp_path), "main", False)
    (tmp_path / "training_args.bin").touch()
    (tmp_path / "adapter_model.safetensors").touch()
    assert base.fingerprint(str(tmp_path), "main", False) == before
    (tmp_path / name).write_bytes(b"2")
    assert base.fingerprint(str(tmp_path), "main", False) != before


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
        ([math.nan, 0.5, math.nan, None], [2, 3, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, losses, kept):
    for step, loss in enumerate(losses, 1):
        latest = save(tmp_path, step, loss)
    files.rotate(tmp_path, 2, latest, RUN)
    assert sorted(step for step, _ in files.checkpoints(tmp_path)) == kept
    files.remove_leftovers(tmp_path, RUN)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_rotation_keeps_the_one_that_was_just_saved(tmp_path):
    """After a resumption from an older checkpoint, later damaged ones may be left."""
    for step in (1, 2, 7, 8):
        save(tmp_path, step)
    files.rotate(tmp_path, 2, tmp_path / "checkpoint-2", RUN)
    assert names(tmp_path)[1:] == ["checkpoint-2", "checkpoint-7", "checkpoint-8"]


def test_rotation_leaves_what_it_cannot_read(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    latest = [save(tmp_path, step) for step in (2, 3)][-1]
    files.rotate(tmp_path, 1, latest, RUN)
    assert [step for step, _ in files.checkpoints(tmp_path)] == [3, 1]


def test_rotation_neither_counts_nor_deletes_another_runs(tmp_path):
    save(tmp_path, 9, 0.1, run=RunIdentity.new())
    latest = [save(tmp_path, step, loss) for step, loss in ((1, 0.5), (2, 0.7), (3, 0.8))][-1]
    files.rotate(tmp_path, 1, latest, RUN)
    assert [step for step, _ in files.checkpoints(tmp_path)] == [9, 3, 1]


def test_a_checkpoint_that_is_a_link_is_rotated_without_what_it_names(tmp_path):
    (tmp_path / "run").mkdir()
    save(tmp_path, 1)
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "checkpoint-1")
    gone = tmp_path / "run" / "checkpoint-3"
    gone.symlink_to(tmp_path / "nowhere")
    assert read_checkpoint(gone) == f"it is a link to {tmp_path / 'nowhere'}, where nothing is"
    latest = [save(tmp_path / "run", step) for step in (2, 3)][-1]
    files.rotate(tmp_path / "run", 1, latest, RUN)
    files.remove_leftovers(tmp_path / "run", RUN)
    kept, aside = names(tmp_path / "run")
    assert kept == "checkpoint-3" and aside.startswith("damaged-checkpoint-3-")
    assert files.read_whole(tmp_path / "checkpoint-1")


def test_later_checkpoints_are_superseded(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    renamed = files.supersede(tmp_path, 2)
    assert [step for step, _ in files.checkpoints(tmp_path)] == [2]
    assert [path.name.rsplit("-", 1)[0] for path in renamed] == [
        "superseded-checkpoint-6",
        "superseded-checkpoint-4",
    ]
    assert all(files.read_whole(path) for path in renamed)
    assert files.supersede(tmp_path, 2) == []


def test_what_a_killed_save_left_is_invisible_and_removed(tmp_path):
    save(tmp_path, 2)
    work = files.temporary(tmp_path, RUN, 3)
    work.mkdir()
    (work / "half").write_bytes(b"x")
    (tmp_path / ".tmp-checkpoint-of-the-user").mkdir()
    other = files.temporary(tmp_path, RunIdentity.new(), 3)
    other.mkdir()
    assert resume.newest(tmp_path) == 2
    files.remove_leftovers(tmp_path, RUN)
    assert names(tmp_path) == sorted([other.name, ".tmp-checkpoint-of-the-user", "checkpoint-2"])


@pytest.mark.parametrize(
    "point, visible",
    [("before-manifest", False), ("before-rename", False), ("after-rename", True)],
)
def test_a_kill_leaves_a_whole_checkpoint_or_none(tmp_path, point, visible):
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[1:3]\n"
        "import test_checkpoint_files as t\n"
        "t.save(Path(sys.argv[3]), 5, run=t.RunIdentity(sys.argv[4], ''))"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), here, str(tmp_path), RUN.id],
        env={**os.environ, "ZERO_OFFLOAD_KILL_AT": f"{point}:1", "RANK": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    assert bool(files.read_whole(tmp_path / "checkpoint-5")) == visible
    files.remove_leftovers(tmp_path, RUN)
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
    public = {**settings.public(), **changes}
    return {"settings": public, "update_rows": rows, "versions": versions()}


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
    flags = ("--seed", 1, "--learning_rate", 5e-4, "--run_name", "b", "--lora_alpha", 99)
    settings = settings_of(*BATCH, *flags)
    alpha = saved["settings"]["lora_alpha"]
    differences = sorted(resume.reconcile(settings, saved, 1))
    assert differences == [
        ("learning_rate", 1e-3, 5e-4, 5e-4),
        ("lora_alpha", alpha, 99, alpha),
        ("seed", 42, 1, 42),
    ]
    assert (settings.seed, settings.learning_rate, settings.run_name) == (42, 5e-4, "b")
    lines = resume.difference_table(differences).splitlines()
    assert [cell.strip() for cell in lines[0].split(" | ")] == ["key", "saved", "now", "used"]
    assert [cell.strip() for cell in lines[3].split(" | ")] == ["seed", "42", "1", "42"]


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
    path.write_bytes(b'{"step": 1}\n[]\n{"step": 2}\n\xff\xfe\n{"step": 3}\n{"step": 4, "lo')
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
    """Also by a link, a relative path and with a slash at its end."""
    (tmp_path / "run").mkdir()
    folder = save(tmp_path / "run", 1)
    (tmp_path / "best").symlink_to(folder)
    for name in (folder, tmp_path / "best", os.path.relpath(folder), f"{folder}/"):
        settings = settings_of("--resume_from_checkpoint", name)
        resume.check_request(settings)
        assert settings.output_dir == str(tmp_path / "run")


def test_a_path_that_is_no_checkpoint_is_refused_at_once(tmp_path):
    """The run directory in place of its checkpoint: the one above would become a run's."""
    save(tmp_path, 1)
    with pytest.raises(RunError, match="cannot be used"):
        resume.check_request(settings_of("--resume_from_checkpoint", tmp_path))
    other = RunIdentity.new()
    RunDirectory(tmp_path).write_identity(other)
    with pytest.raises(RunError, match="is of another run"):
        resume.check_request(settings_of("--resume_from_checkpoint", tmp_path / "checkpoint-1"))


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    RunDirectory(tmp_path / "a").write_identity(RUN)
    resolved = tmp_path / "a" / "resolved_config.yaml"
    write_yaml(resolved, settings_of("--output_dir", tmp_path / "a").public())
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    (tmp_path / "a").rename(tmp_path / "b")
    for name in ("copy", "b"):
        config = str(tmp_path / name / resolved.name)
        assert resolve(["--config", config]).output_dir == str(tmp_path / name)
    assert resolve(["--config", config, "--output_dir", "/x"]).output_dir == "/x"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", '{"id": "a"}', "[" * 10**5, "\udcff"]
    + [
        json.dumps(asdict(RUN) | changes)
        for changes in ({"id": None}, {"line": "1"}, {"parent": "x"}, {"parent": {}}, {"x": 1})
    ],
)
def test_a_run_json_that_is_none(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    settings = settings_of("--output_dir", tmp_path, "--resume_from_checkpoint", "auto")
    with pytest.raises(RunError, match="does not say which run this is"):
        resume.check_request(settings)


def test_a_line_begins_with_its_parent(tmp_path):
    """`auto` tries the checkpoint that a line began with before older ones, wherever it lies."""
    from trainer.checkpoint import load

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for step in (2, 6):
        save(tmp_path / "b", step)
    folder = save(tmp_path / "a", 4)
    parent = RunIdentity.after({"run": asdict(RUN), "step": 4}, folder)
    line = replace(RUN, line=1, parent=parent)
    found = load._candidates(tmp_path / "b", line)
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert load._candidates(tmp_path / "a", line) == [folder]


def test_going_back_to_a_copy_begins_a_line(tmp_path):
    """The same run's checkpoint of that step, from a copy of its directory."""
    (tmp_path / "a").mkdir()
    run = RunDirectory(tmp_path / "a")
    run.write_identity(RUN)
    for place in (tmp_path, tmp_path / "a"):
        save(place, 4)
    here = read_checkpoint(tmp_path / "a" / "checkpoint-4")
    there = read_checkpoint(tmp_path / "checkpoint-4")
    assert resume.identify(run, str(here.folder), here) == RUN
    line = resume.identify(run, str(there.folder), there)
    assert (line.line, line.parent["checkpoint"]) == (1, str(there.folder))
    run.write_identity(line)  # and a crash before the first checkpoint
    assert resume.identify(run, str(there.folder), there) == line


def test_requests_that_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    for flags, problem in (
        (["--resume_from_checkpoint", tmp_path / "absent"], "no checkpoint"),
        (["--resume_from_checkpoint", "auto"], "needs to know the run"),
        (["--output_dir", tmp_path], "holds a run already"),
    ):
        with pytest.raises(RunError, match=problem):
            resume.check_request(settings_of(*flags))


@pytest.mark.parametrize(
    "environment, argv, ranks, start",
    [
        ({}, [], None, "python launch/train.py"),
        ({}, ["--local_rank=0"], None, "deepspeed --num_gpus 1 launch/train.py"),
        ({"LOCAL_SIZE": "4"}, ["--local_rank=0"], None, "deepspeed --num_gpus 4 launch/train.py"),
        (
            {"LOCAL_SIZE": "4", "WORLD_SIZE": "8"},
            ["--local_rank=0"],
            None,
            "deepspeed --hostfile HOSTFILE launch/train.py",
        ),
        (
            {"LOCAL_SIZE": "2", "WORLD_SIZE": "4"},
            ["train.py", "--local_rank=0", "--launcher_hostfile", "/my hosts"],
            None,
            "python launch/supervise.py --hostfile '/my hosts'",
        ),
        (
            {"LOCAL_SIZE": "2", "ZERO_OFFLOAD_SUPERVISED": "1"},
            [],
            None,
            "python launch/supervise.py --num_gpus 2",
        ),
        ({}, [], 3, "python launch/supervise.py --num_gpus 3"),
    ],
)
def test_the_printed_command(monkeypatch, environment, argv, ranks, start):
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "ZERO_OFFLOAD_SUPERVISED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *argv])
    line = resume.command(RunDirectory("runs/it's a"), ranks)
    cd, folder, and_, program, *words = shlex.split(line)
    assert (cd, folder, and_) == ("cd", str(Path.cwd()), "&&")
    short = [Path(program).name.rstrip("0123456789.")]
    short += [word.removeprefix(f"{ROOT}/") for word in words]
    config = str(Path("runs/it's a/resolved_config.yaml").absolute())
    assert short == [*shlex.split(start), "--config", config.removeprefix(f"{ROOT}/")] + [
        "--resume_from_checkpoint",
        "auto",
    ]


@pytest.mark.parametrize("module", ["files", "resume"])
def test_no_torch(module):
    code = f"import sys, trainer.checkpoint.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
