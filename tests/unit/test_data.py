"""Rows in: formats, bad rows, the split, and the bundled samples."""
import json

import pytest

from data import DataError, formats, source
from trainer.args import ROOT

SAMPLES = ROOT / "data" / "samples"


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_alpaca_rows(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"instruction": "a", "input": "b", "output": "c"}', "",
                 '{"instruction": "a", "output": "c", "system": "s", "history": [["q", "r"]]}')
    one, two = formats.read(path)
    assert one.messages == [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]
    assert [m["role"] for m in two.messages] == ["system", "user", "assistant", "user", "assistant"] and two.line == 3


def test_json_list_bom_and_crlf(tmp_path):
    assert len(formats.read(write(tmp_path / "d.json", '[{"instruction": "a", "output": "b"}]'))) == 1
    assert len(formats.read(write(tmp_path / "d.jsonl", b'\xef\xbb\xbf{"instruction": "a", "output": "b"}\r\n'))) == 1


@pytest.mark.parametrize("line, reason", [
    ('{"instruction": "a"}', "no output"), ('{"instruction": "a", "output": ""}', "output is empty"),
    ('{"instruction": "a", "output": null}', "output is empty"), ('{"output": "a"}', "no instruction"),
    ('{"instruction": " ", "output": "b"}', "instruction is empty"), ('{"instruction": 3, "output": "b"}', "not text"),
    ('{"instruction": "a", "output"', "not readable as JSON"), ('[1]', "not an object"), (b'{"instruction": "\xff"}', "not UTF-8"),
    ('{"instruction": "a", "output": "b", "history": ["x"]}', "history"),
])
def test_bad_rows_are_named(tmp_path, line, reason):
    path = write(tmp_path / "d.jsonl", '{"instruction": "a", "output": "b"}', line)
    with pytest.raises(DataError) as error:
        formats.read(path)
    assert f"{path}:2: " in str(error.value) and reason in str(error.value)


def test_many_bad_rows_are_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", *['{"instruction": "a"}'] * 30)
    with pytest.raises(DataError, match="30 of 30") as error:
        formats.read(path)
    assert "20 more" in str(error.value)


def test_empty_and_missing(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        formats.read(write(tmp_path / "e.jsonl", ""))
    with pytest.raises(DataError, match="nothing at"):
        formats.read(tmp_path / "absent.jsonl")


def rows(tmp_path, n):
    return write(tmp_path / "n.jsonl", *[json.dumps({"instruction": f"q{i // 2}", "output": "a"}) for i in range(n)])


@pytest.mark.parametrize("wanted, count", [("0.2", 20), ("10", 10), ("0", 0), (None, 5)])
def test_split(tmp_path, wanted, count):
    train, validation, _ = source.load(rows(tmp_path, 100), wanted, 1, SAMPLES)
    assert count <= len(validation) <= count + 1 and len(train) + len(validation) == 100
    asked = [{r.messages[0]["content"] for r in part} for part in (train, validation)]
    assert not asked[0] & asked[1]  # rows that are alike stay on one side
    again = source.load(rows(tmp_path, 100), wanted, 1, SAMPLES)[1]
    assert [r.line for r in again] == [r.line for r in validation]


@pytest.mark.parametrize("wanted", ["1.5", "-1", "nan", "absent.jsonl", "100", "0.999"])
def test_split_refused(tmp_path, wanted):
    with pytest.raises(DataError):
        source.load(rows(tmp_path, 100), wanted, 1, SAMPLES)


def test_samples_do_not_leak():
    import re

    train, validation = (formats.read(SAMPLES / f"{n}.jsonl") for n in ("train", "validation"))
    assert len(train) >= 2000 and len(validation) >= 50
    words = [{re.search(r"'([^']+)'", r.messages[0]["content"])[1] for r in part} for part in (train, validation)]
    answers = [{r.messages[-1]["content"] for r in part} for part in (train, validation)]
    assert not words[0] & words[1] and not answers[0] & answers[1]
    assert len(words[0]) == len(train) and len(answers[0]) == len(train)
    questions = {re.sub(r"'[^']+'", "X", r.messages[0]["content"].split("\n")[0]) for r in train}
    assert len(questions) > 10
