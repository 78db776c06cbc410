"""Which rows of a place are trained on: folders of the hub, saved data sets, names of the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from data import source, splits
from data.errors import RunError
from trainer import ROOT, data_setup
from trainer.config import settings


@pytest.fixture
def place(tmp_path):
    """Return a function that makes a folder; each file's only row is its own name."""

    def make(*files, readme=None):
        folder = tmp_path / "place"
        folder.mkdir()
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps({"text": file}) + "\n", encoding="utf-8")
        if readme is not None:
            (folder / "README.md").write_text(f"---\n{readme}---\n# x\n", encoding="utf-8")
        return folder

    return make


def rows(spec, role="train"):
    """The texts of the rows that a spec gives for a role."""
    sources = source.resolve([str(spec)], None, role)
    return [row.messages[0]["content"] for one in sources for _, row in source.read(one)]


HUB = tuple(
    f"data/{split}-0000{shard}-of-00002.jsonl"
    for split in ("train", "validation", "test")
    for shard in (0, 1)
)
TRAIN, VALIDATION, TEST = HUB[:2], HUB[2:4], HUB[4:]


def test_a_folder_in_the_hubs_shape(place):
    folder = place(*HUB, "dataset_info.json", ".cache/train.jsonl", readme="license: mit\n")
    assert rows(folder) == [*TRAIN]
    assert rows(folder, "validation") == [*VALIDATION]
    assert rows(folder, "evaluate") == [*VALIDATION]
    assert rows(f"{folder}:test", "evaluate") == [*TEST]
    assert rows(f"{folder}:validation") == [*VALIDATION]
    assert rows(f"{folder}:validation", "validation") == []  # it is trained on already
    (first, _) = source.resolve([f"{folder}:0.5"])
    assert first.weight == 0.5
    assert first.about == f"{folder}: split train (of test, train, validation)"
    for glob in (f"{folder}/data/*", f"{folder}/**/*.jsonl", f"file://{folder}/data"):
        assert rows(glob) == [*TRAIN] and rows(glob, "validation") == [*VALIDATION], glob
    assert rows(f"{folder}/data/test-*") == [*TEST]  # these files, by name


@pytest.mark.parametrize(
    "files, spec, words",
    [
        (HUB, "{}:test", "test is a test split, which is never trained on"),
        (HUB, "{}:trian", "no split trian; did you mean train"),
        (["test.jsonl"], "{}", "no split to train on"),
        (["eval/a.jsonl", "val/a.jsonl"], "{}", "no split to train on"),
        (
            ["data/train_a-00000-of-00001.jsonl", "data/train_b-00000-of-00001.jsonl"],
            "{}",
            "several splits to train on",
        ),
        (HUB, "{}#none", "BuilderConfig 'none' not found"),
    ],
)
def test_splits_refused(place, files, spec, words):
    folder = place(*files)
    with pytest.raises(RunError, match=words) as error:
        rows(spec.format(folder))
    for fix in str(error.value).split("fix:    --dataset ")[1:]:
        if "PLACE" not in fix:
            assert rows(fix)  # the advice works


@pytest.mark.parametrize(
    "files",
    [
        ["a.jsonl", "b.jsonl"],
        ["train.jsonl", "test.jsonl"],
        ["my-train-file.jsonl", "my_val_file.jsonl", "more.jsonl"],
        ["train/a.jsonl", "dev/b.jsonl", "other/c.jsonl"],
        ["trainings.jsonl", "contest.jsonl", "validated.jsonl"],
        ["en/train.jsonl", "en/evaluation.jsonl", "de/train.jsonl"],
        ["training 2.jsonl", "valid.jsonl", "testing.1.jsonl"],
        ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
        ["train/test.jsonl", "test/train.jsonl"],
        HUB,
    ],
    ids=lambda files: files[0],
)
def test_names_are_split_as_datasets_splits_them(place, files):
    folder = place(*files)
    theirs = datasets.load_dataset_builder(str(folder)).config.data_files
    ours = {split: sorted(paths()) for split, paths in splits.of_folder(folder, None).items()}
    rest = ours.pop(splits.NONE, [])
    assert ours or len(theirs) == 1
    assert (ours or {"train": rest}) == {
        str(split): sorted(map(str, paths)) for split, paths in theirs.items()
    }


def test_capitals_are_a_split_too(place):
    assert rows(place("Train.jsonl", "TEST.jsonl")) == ["Train.jsonl"]


README = """configs:
- config_name: talk
  default: true
  data_files:
  - {split: train_sft, path: "a/*.jsonl"}
  - {split: test_sft, path: train.jsonl}
- config_name: plain
  data_files: [{split: train, path: c.jsonl}, {split: validation, path: d.jsonl}]
"""


def test_a_readme_says_what_the_splits_are(place):
    folder = place("a/1.jsonl", "a/2.jsonl", "train.jsonl", "c.jsonl", "d.jsonl", readme=README)
    assert rows(folder) == ["a/1.jsonl", "a/2.jsonl"]
    assert rows(folder, "evaluate") == ["train.jsonl"]
    assert rows(f"{folder}#plain") == ["c.jsonl"]
    assert rows(f"{folder}#plain", "validation") == ["d.jsonl"]


def test_a_format_that_datasets_reads(place):
    folder = place(readme="configs: [{config_name: default, data_files: lines.txt}]\n")
    (folder / "lines.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert rows(folder) == ["one", "two"]


def test_data_sets_saved_to_disk(tmp_path):
    parts = {
        split: datasets.Dataset.from_dict({"text": [f"{split}{n}" for n in range(3)]})
        for split in ("train", "validation", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    parts["train"].select([2, 0]).save_to_disk(tmp_path / "one", num_shards=2)
    assert rows(tmp_path / "all") == ["train0", "train1", "train2"]
    assert rows(tmp_path / "all", "validation")[0] == "validation0"
    assert rows(f"{tmp_path}/all:test", "evaluate")[0] == "test0"
    assert rows(f"file://{tmp_path}/all") == ["train0", "train1", "train2"]
    assert rows(tmp_path / "one") == ["train2", "train0"]
    (sources, _) = source.resolve([str(tmp_path / "one")])
    content = Path(sources.path).read_bytes()
    Path(sources.path).write_bytes(content[: len(content) // 2])
    assert "not readable as Arrow" in next(source.read(sources))[1].reason
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(RunError, match="state.json is not readable"):
        rows(tmp_path / "one")


@pytest.mark.parametrize(
    "file, content",
    [(file, content) for file in ("dataset_dict", "state") for content in ("{", "{}", "[]", "5")]
    + [("dataset_dict", '{"splits": "train"}'), ("state", '{"_data_files": ["a.arrow"]}')],
)
def test_a_data_set_saved_to_disk_that_is_broken(tmp_path, file, content):
    (tmp_path / f"{file}.json").write_text(content)
    with pytest.raises(RunError, match=f"{file}.json is not readable") as error:
        rows(tmp_path)
    assert error.value.code == 2


def test_a_run_validates_with_the_validation_split(place):
    folder = place(*HUB)

    def planned(*flags):
        plan = data_setup.plan_data(settings.resolve(["--dataset", str(folder), *flags]), iter)
        return [[Path(s.path).name.split("-")[0] for s in p] for p in (plan.train, plan.validation)]

    assert planned() == [["train"] * 2, ["validation"] * 2]
    assert planned("--validation_split", "0.5") == [["train"] * 2, []]
    assert planned("--validation_split", f"{folder}:test") == [["train"] * 2, ["test"] * 2]


@pytest.mark.parametrize(
    "text, spec",
    [
        ("org/name", ("org/name", None, None, None)),
        ("org/name:train_sft", ("org/name", None, None, "train_sft")),
        ("org/name@v1.0#en:dev", ("org/name", "v1.0", "en", "dev")),
        ("org/name#en", ("org/name", None, "en", None)),
        ("data/none", ("data/none", None, None, None)),
        ("s3://bucket/a:b", ("s3://bucket/a:b", None, None, None)),
        ("rows.jsonl:train", ("rows.jsonl:train", None, None, None)),
    ],
)
def test_names_of_the_hub(text, spec, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = source._spec(text)
    assert (found.path, found.revision, found.config, found.split) == spec
    is_name = spec[0] == "org/name"
    assert splits.is_hub_name(spec[0]) == is_name  # data/ is a folder here


def test_the_hub_without_network(tmp_path):
    """A snapshot that `hf download` brought, a data set that `datasets` prepared, and neither."""
    snapshot = tmp_path / "hub" / "datasets--org--shelf" / "snapshots" / ("a" * 40)
    for split in ("train", "test"):
        path = snapshot / "data" / f"{split}-00000-of-00001.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": split}) + "\n", encoding="utf-8")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    shutil.copytree(snapshot, tmp_path / "made")
    datasets.load_dataset(str(tmp_path / "made"), cache_dir=str(tmp_path / "datasets"))
    (tmp_path / "datasets" / "made").rename(tmp_path / "datasets" / "org___made")
    code = """if True:
        import sys
        from data import source
        from data.errors import RunError
        for spec in sys.argv[1:]:
            try:
                (one,) = source.resolve([spec])
                ((_, row),) = source.read(one)
                print(one.name, one.weight, row.messages[0]["content"])
            except RunError as error:
                print(error.code, str(error).replace("\\n", " "))
        print("torch" in sys.modules)
    """
    specs = ["org/shelf", "org/shelf@main:train:0.5", "org/made", "org/made@v1", "org/none"]
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *specs],
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    shelf, half, made, revision, none, torch = done.stdout.splitlines()
    assert (shelf, half) == ("None None train", "None 0.5 train")
    assert made == "org/made:train None train"
    assert revision.startswith("2 ") and "no revision v1 of it" in revision
    assert none.startswith("2 ") and "hf download" in none and "org/none" in none
    assert torch == "False"
