"""`launch/data.py check`: output, JSON, exit codes; and training with the same flags."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, train, write_rows

DATA = ROOT / "tests" / "data"
NO_OUTPUT = "no output; needed: instruction and output; the keys are instruction"


def check(model, *flags, cwd=ROOT):
    command = [sys.executable, str(ROOT / "launch" / "data.py"), "check", *map(str, flags)]
    command += [] if "--model_name_or_path" in flags else ["--model_name_or_path", str(model)]
    done = subprocess.run(
        command, cwd=cwd, text=True, capture_output=True, stdin=subprocess.DEVNULL
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def every_format(tiny_model):
    return check(tiny_model, DATA / "formats", "--json")


def test_every_format(every_format):
    code, output, _ = every_format
    result = json.loads(output)
    assert code == 0
    found = {f["path"].rsplit("/", 1)[1]: f for f in result["files"]}
    assert {n: f["format"] for n, f in found.items()} == {
        "alpaca.jsonl": "alpaca",
        "sharegpt.jsonl": "sharegpt",
        "messages.jsonl": "messages",
        "text.jsonl": "text",
        "prompt_completion.jsonl": "prompt-completion",
        "list.json": "alpaca",
        "packed.jsonl.gz": "alpaca",
        "packed.jsonl.zst": "alpaca",
        "table.parquet": "alpaca",
    }
    assert found["list.json"]["rows"] == found["table.parquet"]["rows"] == 6
    for entry in found.values():
        assert set(entry) >= {
            "path",
            "format",
            "rows",
            "rejected",
            "tokens",
            "trained_share",
            "truncated",
        }
        assert (
            entry["rejected"] == []
            and 0 < entry["tokens"]["p50"] <= entry["tokens"]["p95"] <= entry["tokens"]["max"]
        )
        assert 0 < entry["trained_share"] <= 1 and entry["truncated"] == 0
    assert 0 < result["packing_fill"] <= 1
    notes = " ".join(note["text"] for note in found["messages.jsonl"]["notes"])
    assert "leaves tool calls out" in notes and "nothing reads: tools (1 row(s))" in notes


def test_every_fault(tiny_model):
    files = sorted((DATA / "faults").iterdir())
    code, output, errors = check(tiny_model, *files, "--json")
    assert code == 2 and "--on_bad_row skip" in errors
    for entry in json.loads(output)["files"]:
        assert (
            len(entry["rejected"]) == 1
            and entry["rejected"][0]["line"] >= 1
            and len(entry["rejected"][0]["reason"]) > 5
        ), entry
    shown = check(tiny_model, *files)[1]
    for entry in json.loads(output)["files"]:
        assert (
            f"{entry['path']}:{entry['rejected'][0]['line']}: {entry['rejected'][0]['reason']}"
            in shown
        )


def test_skip(tiny_model, tmp_path):
    code, output, errors = check(
        tiny_model,
        DATA / "faults" / "no_output.jsonl",
        "--json",
        "--on_bad_row",
        "skip",
        cwd=tmp_path,
    )
    entry = json.loads(output)["files"][0]
    assert (
        code == 0 and entry["rows"] == 1 and entry["rejected"] == [{"line": 2, "reason": NO_OUTPUT}]
    )
    (kept,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert (
        kept["line"] == 2
        and kept["reason"] == NO_OUTPUT
        and kept["row"] == {"instruction": "a"}
        and "rejected.jsonl" in errors
    )


def test_for_people(tiny_model):
    code, output, _ = check(
        tiny_model,
        DATA / "formats" / "messages.jsonl",
        DATA / "noted" / "crlf.jsonl",
        "--max_length",
        60,
    )
    assert (
        code == 0
        and "format messages, 2 rows, 0 rejected" in output
        and "longer than max_length 60" in output
    )
    assert (
        "⟦Goethe.<|im_end|>⟧" in output
        and output.count("trained tokens marked") == 2
        and "Windows line ends" in output
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["absent.jsonl"], ["nothing at"]),
        ([DATA / "formats" / "text.jsonl", "--max_lenght", 3], ["did you mean --max_length"]),
        (
            [DATA / "faults" / "no_format.jsonl", "--on_bad_row", "skip"],
            ["no row can be trained on"],
        ),
        ([DATA / "formats" / "text.jsonl", "--template", "vicuna"], ["no chat template vicuna"]),
        ([DATA / "formats" / "text.jsonl", "--on_bad_row", "ignore"], ["stop | skip"]),
        ([DATA / "formats" / "text.jsonl", "--max_length", "1e30"], ["whole number"]),
        (
            [DATA / "formats" / "text.jsonl", "--template", DATA / "formats" / "table.parquet"],
            ["not readable as text"],
        ),
        ([DATA / "formats" / "text.jsonl", "--dataset", "x.jsonl"], ["named twice"]),
        (["x" * 5000], ["no data file"]),
        (
            [DATA / "faults" / "no_output.jsonl", "--on_bad_row", "skip", "--rejected=/"],
            ["cannot be written"],
        ),
        (
            [DATA / "formats" / "text.jsonl", "--model_name_or_path", DATA / "quiz.jsonl"],
            ["is a file, not a model"],
        ),
    ],
)
def test_bad_input(tiny_model, tmp_path, flags, words):
    code, _, errors = check(tiny_model, *flags, cwd=tmp_path)
    assert code == 2 and all(w in errors for w in words), errors


def test_files_may_stand_after_flags(tiny_model):
    code, output, _ = check(
        tiny_model,
        "--max_length",
        "60",
        DATA / "formats" / "text.jsonl",
        "--packing",
        DATA / "formats" / "alpaca.jsonl",
        "--json",
    )
    assert code == 0 and [f["rows"] for f in json.loads(output)["files"]] == [2, 7]


def test_weights_and_train_on_prompt(tiny_model, tmp_path):
    turns = [("user", 1), ("assistant", 0), ("user", 1), ("assistant", 1)]
    rows = write_rows(
        tmp_path / "d.jsonl",
        [{"messages": [{"role": r, "content": "x", "weight": w} for r, w in turns]}],
    )
    code, _, errors = check(tiny_model, rows, "--train_on_prompt")
    assert code == 2 and "answers of weight 0" in errors


def test_a_tokenizer_of_another_model(tiny_model, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    for run in (
        lambda: check(model, DATA / "formats" / "text.jsonl")[::2],
        lambda: (
            (r := train(tmp_path / "run", "--model_name_or_path", model)) and (r.code, r.output)
        ),
    ):
        code, output = run()
        assert code == 2 and "token ids up to 511, embeddings for 300" in output, output


def test_training_skips_and_says_so(trains, tmp_path):
    rows = write_rows(
        tmp_path / "d.jsonl",
        [
            {"instruction": f"q{i}", "output": f"answer {i}"} if i % 10 else {"instruction": "q"}
            for i in range(40)
        ],
    )
    more = write_rows(tmp_path / "e.jsonl", [{"text": f"text {i}"} for i in range(30)])
    run = trains(
        "run",
        "--dataset",
        f"{rows}:0.75",
        f"{more}:0.25",
        "--validation_split",
        "0.1",
        "--on_bad_row",
        "skip",
        "--max_steps",
        1,
        "--train_sampling_strategy",
        "group_by_length",
    )
    assert (
        "alpaca, 36 rows, 4 rejected rows skipped" in run.output
        and "mixture: an epoch takes" in run.output
    )
    kept = [
        json.loads(line) for line in (run.directory / "rejected.jsonl").read_text().splitlines()
    ]
    assert [k["line"] for k in kept] == [1, 11, 21, 31] and {k["reason"] for k in kept} == {
        NO_OUTPUT
    }
    assert "train: " in run.output and run.evaluations
