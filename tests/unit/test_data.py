"""Rows in: every format and every fault, sources and mixtures, packing. No torch."""

import csv
import gzip
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import formats, pack, records, source
from data.bad_rows import BadRow
from data.errors import RowError, RunError
from data.template_reads import reads
from trainer import ROOT

DATA = ROOT / "tests" / "data"
SAMPLES = ROOT / "data" / "samples"


def read(path, **options):
    """(rows, rejected as [(line, reason)], notes) of one file."""
    (one,) = source.resolve([str(path)], **options)
    notes = []
    found = list(source.read(one, lambda line, text: notes.append((line, text))))
    return (
        [r for _, r in found if not isinstance(r, BadRow)],
        [(r.line, r.reason) for _, r in found if isinstance(r, BadRow)],
        notes,
    )


def contents(row):
    return [(m["role"], m["content"]) for m in row.messages]


# -- formats ---------------------------------------------------------------------------------------
def test_alpaca():
    rows, rejected, _ = read(DATA / "formats" / "alpaca.jsonl")
    assert not rejected and len(rows) == 7
    assert contents(rows[1]) == [
        ("user", "What is 2 plus 2?\n\nAnswer with a number."),
        ("assistant", "4"),
    ]
    assert contents(rows[6]) == [
        ("system", "You add."),
        ("user", "What is 6 plus 6?"),
        ("assistant", "12"),
        ("user", "And 7?"),
        ("assistant", "14"),
    ]


def test_sharegpt_and_messages_say_the_same():
    for name in ("sharegpt", "messages"):
        (talk, tools), rejected, _ = read(DATA / "formats" / f"{name}.jsonl")
        assert not rejected
        assert contents(talk) == [
            ("system", "Be brief."),
            ("user", "Who wrote Faust?"),
            ("assistant", "Goethe."),
            ("user", "And Hamlet?"),
            ("assistant", "Shakespeare."),
        ]
        call = tools.messages[1]["tool_calls"][0]["function"]
        assert (
            call == {"name": "weather", "arguments": {"city": "Bern"}}
            and tools.messages[1]["content"] == ""
        )
        assert (
            tools.tools[0]["function"]["name"] == "weather" and tools.messages[2]["role"] == "tool"
        )


def test_raw_text():
    assert contents(read(DATA / "formats" / "prompt_completion.jsonl")[0][0]) == [
        ("prompt", "The capital of France is"),
        ("completion", " Paris."),
    ]
    assert [role for role, _ in contents(read(DATA / "formats" / "text.jsonl")[0][0])] == [
        "completion"
    ]


@pytest.mark.parametrize(
    "name", ["list.json", "packed.jsonl.gz", "packed.jsonl.zst", "table.parquet"]
)
def test_the_same_rows_in_every_container(name):
    plain, _, _ = read(DATA / "formats" / "alpaca.jsonl")
    rows, rejected, _ = read(DATA / "formats" / name)
    assert not rejected and [r.messages for r in rows] == [r.messages for r in plain[:6]]


def test_null_columns_do_not_decide_the_format(tmp_path):
    (tmp_path / "q?.jsonl").write_text(
        '{"instruction": "q", "output": "a", "messages": null, "text": null}\n'
    )  # an odd name, too
    rows, rejected, _ = read(tmp_path / "q?.jsonl")
    assert not rejected and contents(rows[0]) == [("user", "q"), ("assistant", "a")]


ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "record, messages",
    [
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [ANSWER]},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {"messages": json.dumps([{"role": "user", "content": "a"}, ANSWER])},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}, ANSWER]},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    {"role": "user", "content": "a"},
                    ANSWER,
                ]
            },
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "conversations": [
                    {"role": "user", "value": "a"},
                    {"role": "assistant", "value": "b"},
                ]
            },
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {"instruction": "c", "output": "d", "history": '[["a", "b"]]'},
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
    ],
)
def test_other_spellings(record, messages):
    assert contents(formats.convert(record, formats.detect(record), {})) == messages


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [{"function": {"name": "f", "arguments": None}}]},
        {"tool_calls": '[{"function": {"name": "f", "arguments": ""}}]'},
        {"function_call": {"name": "f", "arguments": "{}"}},
    ],
)
def test_tool_calls_in_every_spelling(turn):
    record = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, **turn},
        ],
        "functions": [{"name": "f", "parameters": {}}],
    }
    row = formats.convert(record, "messages", {})
    assert row.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]
    assert row.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "text, words",
    [
        (DEEP, "nested too deeply"),
        (r'[{"role": "user", "content": "\ud800"}]', "surrogate"),
        ('[{"role": "user", "role": "user"}]', "stands twice"),
        ("[{", "not JSON"),
    ],
)
def test_json_within_json(tmp_path, text, words):
    """Lists, tools and calls that stand as JSON text in a row pass the same checks as the row."""
    text = text.replace("\\\\", "\\")
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": text}}],
    }
    ask = {"role": "user", "content": "a"}
    for record in (
        {"messages": text},
        {"instruction": "a", "output": "b", "tools": text},
        {"messages": [ask, call]},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": text},
            ]
        },
        {"instruction": "a", "output": "b", "history": text},
    ):
        (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
        rows, rejected, _ = read(tmp_path / "d.jsonl")
        assert not rows and len(rejected) == 1, (record.keys(), rejected)
        assert words in rejected[0][1], (record.keys(), rejected)


@pytest.mark.parametrize(
    "text, line, words",
    [
        ('[{"text": "a"}]\n\nrubbish', 3, "after the list's end"),
        ('[{"text": "a"},]', 1, "broken JSON"),
        ('[{"text": "a"},\n{"text": "\0"}]', 2, "NUL byte"),
        ("[]", 1, "no rows"),
        ('[{"text": {"a": 1, "a": 2}, "b"]', 1, "broken JSON"),
    ],
)
def test_json_lists_to_their_end(tmp_path, text, line, words):
    (tmp_path / "d.json").write_text(text)
    _, rejected, _ = read(tmp_path / "d.json")
    assert len(rejected) == 1 and rejected[0][0] == line and words in rejected[0][1], rejected


def test_a_json_list_too_large_to_read_as_a_whole(tmp_path, monkeypatch):
    (tmp_path / "d.json").write_text('[{"text": "a"}]')
    monkeypatch.setattr(records, "MAX_LIST", 10)
    with pytest.raises(RunError, match="jq -c"):
        read(tmp_path / "d.json")
    (tmp_path / "d.json").write_text('{"text": "a"}\n' * 3)  # lines are read one by one
    assert len(read(tmp_path / "d.json")[0]) == 3


def test_rows_before_the_damage_of_a_json_list_are_read(tmp_path):
    (tmp_path / "d.json").write_bytes(b'[{"text": "a"},\n{"text": "b\xff"}]')
    rows, rejected, _ = read(tmp_path / "d.json")
    assert len(rows) == 1 and rejected[0][0] == 2 and "invalid UTF-8 at byte 28" in rejected[0][1]


def test_lines_ended_by_cr_alone(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    _, rejected, notes = read(tmp_path / "d.jsonl")
    assert "tr '\\r' '\\n'" in rejected[0][1] and not notes


TABLE = [
    {"instruction": "a, b", "output": 'say "c"\nd', "input": None},
    {"instruction": "é", "output": "f", "input": "x"},
]


@pytest.mark.parametrize(
    "name, sign, encoding, line_end",
    [
        ("d.csv", ",", "utf-8", "\n"),
        ("d.CSV", ",", "utf-8-sig", "\r\n"),
        ("d.tsv", "\t", "utf-8", "\n"),
        ("d.csv", ";", "utf-8", "\r\n"),
        ("d.csv.gz", ",", "utf-8", "\n"),
    ],
)
def test_tables_of_text(tmp_path, name, sign, encoding, line_end):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(TABLE[0]), delimiter=sign, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(TABLE)
    content = text.getvalue().encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (one,) = source.resolve([str(tmp_path / name)])
    notes = []
    first, second = source.read(one, lambda line, text: notes.append(text))
    assert (first[0], second[0]) == (2, 4)  # the lines where they begin
    assert contents(first[1]) == [("user", "a, b"), ("assistant", 'say "c"\nd')]
    assert contents(second[1]) == [("user", "é\n\nx"), ("assistant", "f")]
    assert ("separated by ';'" in str(notes)) == (sign == ";")


@pytest.mark.parametrize(
    "content, line, words",
    [
        (b"text,x\na,b\nc\nd,e\n", 3, "1 values; needed: 2"),
        (b"text\na\nb\0c\n", 3, "NUL"),
        (b"text\na\n\xff\n", 3, "invalid UTF-8"),
        ("text,x\na,b\n".encode("utf-16"), 1, "UTF-16"),
        (b'text,x\na,b\n"c" d,e\nf,g\n', 3, "broken CSV"),
        (b'text,x\na,b\n"c,d\ne,f\n', 3, "broken CSV: unexpected end"),
        (b"text,text\na,b\n", 1, "'text' stands twice"),
        (b"question,answer\na,b\n", 2, "the keys are question, answer"),
        (b"", 1, "no rows"),
        (b"text\n", 1, "no rows"),
        (b"messages\n\"[{'role': 'user'}]\"\n", 2, "messages is not JSON"),
    ],
)
def test_tables_refused(tmp_path, content, line, words):
    (tmp_path / "d.csv").write_bytes(content)
    _, rejected, _ = read(tmp_path / "d.csv")
    assert len(rejected) == 1 and rejected[0][0] == line and words in rejected[0][1], rejected


def test_parquet_with_what_it_adds(tmp_path):
    """Times without a Python value, objects that Parquet made alike, NUL."""
    import pyarrow
    import pyarrow.parquet

    def call(name, **arguments):
        return [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
            },
        ]

    table = pyarrow.table(
        {
            "messages": [call("f", x=1), call("g", y=2)],
            "made": pyarrow.array([2**50, 1], pyarrow.timestamp("s")),
            "tools": [None, [{"type": "function"}]],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    rows, rejected, _ = read(tmp_path / "d.parquet")
    assert not rejected and [
        r.messages[1]["tool_calls"][0]["function"]["arguments"] for r in rows
    ] == [{"x": 1}, {"y": 2}]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b\0"]}), tmp_path / "d.parquet")
    rows, rejected, _ = read(tmp_path / "d.parquet")
    assert len(rows) == 1 and rejected[0][0] == 2 and "NUL" in rejected[0][1]


def test_weights(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    with pytest.raises(RowError, match="every assistant turn has weight 0"):
        formats.convert({"messages": turns}, "messages", {})


def talk(**keys):
    """An answer with these keys, and one without."""
    return {"messages": [ASK, ANSWER | keys, ASK, ANSWER]}


@pytest.mark.parametrize(
    "keys, trained",
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": 1}, True),
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"loss": None, "train": None}, True),
        ({"train": False}, False),
        ({"train": 0, "weight": 0}, False),
        ({"loss": "false"}, "loss 'false'; needed: true or false"),
        ({"loss": [1, 2]}, "needed: true or false"),
        ({"weight": 0.5}, "weight '0.5'; needed: 0 or 1"),
        ({"weight": float("nan")}, "needed: 0 or 1"),
        ({"weight": 1, "loss": False}, "weight and loss contradict each other"),
    ],
)
def test_answers_that_are_kept_out_of_the_loss(keys, trained):
    if isinstance(trained, str):
        with pytest.raises(RowError, match=trained):
            formats.convert(talk(**keys), "messages", {})
        return
    message = formats.convert(talk(**keys), "messages", {}).messages[1]
    assert message == ANSWER | ({} if trained else {"weight": 0})


def test_a_call_that_is_kept_out_of_the_loss():
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f"}', "loss": False},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "b", "loss": True},
    ]
    row = formats.convert({"conversations": turns}, "sharegpt", {})
    assert ["weight" in message for message in row.messages] == [False, True, False, False]


def test_keys_of_turns_go_on():
    """Names, ids and reasoning are the template's to read; which of them it reads, it says."""
    keys = {"name": "Ada", "thinking": "hm", "reasoning_content": "hm", "persona": {"age": 3}}
    message = formats.convert(talk(**keys, empty=None), "messages", {}).messages[1]
    assert message == ANSWER | {"name": "Ada", "reasoning_content": "hm", "persona": {"age": 3}}
    for keys, reason in (
        ({"thinking": "x", "reasoning": "y"}, "thinking and reasoning differ"),
        ({"thinking": ["x"]}, "thinking holds more than text"),
        ({"thinking": "\0"}, "NUL"),
    ):
        with pytest.raises(RowError, match=reason):
            formats.convert(talk(**keys), "messages", {})


def test_keys_of_rows_that_nothing_reads():
    record = talk() | {"id": 3, "split": "train", "none": None, "tags": [], "system": "s"}
    assert formats.convert(record, "messages", {}).unread == ["id", "split"]
    assert formats.convert({"text": "a", "system": "s"}, "text", {}).unread == ["system"]


PICTURE = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}


@pytest.mark.parametrize(
    "record",
    [
        talk() | {"images": ["a.png"]},
        talk() | {"image": {"bytes": b"x", "path": None}},
        talk() | {"videos": ["a.mp4"]},
        talk() | {"Audio": "a.wav"},
        talk() | {"image_path": "a.png"},
        {"text": "<image> a dog", "image_id": 3},
        {"instruction": "What is <image_1>?", "output": "a dog", "picture": 7},
        {"conversations": [{"from": "human", "value": "a"}], "image": "a.png"},
        talk(images=["a.png"]),
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, PICTURE]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    ],
)
def test_images_and_sound_are_refused(record):
    with pytest.raises(RowError, match="needed: text alone"):
        formats.convert(record, formats.detect(record), {})


@pytest.mark.parametrize(
    "record",
    [
        talk() | {"images": [], "image": None, "audio": ""},
        {"text": "an <image> tag of HTML"},
        {"text": "a dog", "image_id": 3, "image_caption": "a dog"},
    ],
)
def test_text_about_images_is_text(record):
    formats.convert(record, formats.detect(record), {})


@pytest.mark.parametrize(
    "text, variables, keys",
    [
        (
            "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}"
            "{% for m in messages %}{% if m['role'] == 'x' %}{% set y = m.get('name') %}{% endif %}"
            "{% if 'thinking' in m %}{{ m.thinking }}{{ y }}{{ tool.title }}{% endif %}"
            "{% endfor %}",
            {"thinking", "messages", "tool"},
            {"role", "name", "thinking"},
        ),
        (
            "{% generation %}{{ messages[0].content }}{{ messages[-1]['persona'] }}"
            "{% endgeneration %}{{ raise_exception('x') }}{{ date | default('today') }}",
            {"messages", "date"},
            {"content", "persona"},
        ),
        ("{% for m in messages %}{{ m.role }}{{ m | tojson }}{% endfor %}", {"messages"}, None),
        (
            "{{ messages | selectattr('role', 'equalto', 'x') | map(attribute='note') | list }}"
            "{{ messages[0].role }}",
            {"messages"},
            {"role", "equalto", "x", "note"},
        ),
    ],
)
def test_what_a_template_reads(text, variables, keys):
    found = reads(text)
    assert found.variables == variables and (keys is None) == (found.keys is None)
    assert keys is None or {key for key in found.keys if key != "get"} == keys


# -- faults ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, line, words",
    [
        ("broken_json", 2, "broken JSON at column"),
        ("nul", 2, "NUL byte"),
        ("invalid_utf8", 2, "iconv"),
        ("utf16", 1, "UTF-16"),
        ("surrogate", 2, "surrogate"),
        ("empty", 1, "no rows"),
        ("null_content", 2, "null"),
        ("not_text", 2, "not text but int"),
        ("no_output", 2, "no output"),
        ("wrong_role", 2, "unknown role 'asistant'"),
        ("role_order", 2, "user after user"),
        ("no_assistant", 2, "no assistant turn"),
        ("ends_with_user", 2, "ends with a user turn"),
        ("duplicate_keys", 2, "'output' stands twice"),
        ("mixed_formats", 2, "format messages in a file of alpaca"),
        ("no_format", 1, "the keys are question, answer"),
        ("preference", 1, "preference data"),
        ("not_an_object", 2, "not an object but list"),
        ("half_list.json", 27, "half-written"),
        ("half_written.jsonl.gz", None, "damaged or half-written"),
        ("not_parquet.parquet", 1, "not readable as Parquet"),
    ],
)
def test_faults_are_named(name, line, words):
    path = DATA / "faults" / (name if "." in name else f"{name}.jsonl")
    _, rejected, _ = read(path)
    assert len(rejected) == 1 and words in rejected[0][1], rejected
    assert line in (None, rejected[0][0]), rejected
    with pytest.raises(RunError) as error:
        source.check_all(source.resolve([str(path)]), "stop")
    assert (
        f"{path}:{rejected[0][0]}: " in str(error.value)
        and words in str(error.value)
        and "--on_bad_row skip" in str(error.value)
    )


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"instruction": "q", "output": "a", "id": ' + "1" * 5000 + "}", "5,000 digits"),
        (r'{"instruction": "what is \\u0000 in C?", "output": "NUL"}', None),
        (r'{"instruction": "a\u0000", "output": "b"}', "NUL"),
    ],
)
def test_odd_numbers_and_characters(tmp_path, line, reason):
    for name, text in (("d.jsonl", line + "\n"), ("d.json", f"[{line}]")):
        (tmp_path / name).write_text(text)
        rows, rejected, _ = read(tmp_path / name)
        assert (len(rows), len(rejected)) == ((1, 0) if reason is None else (0, 1)) and (
            reason is None or reason in rejected[0][1]
        )


def test_json_that_is_one_object(tmp_path):
    for text, reason in (
        ('{\n "instruction": "a",\n "output": "b"\n}\n', None),
        ('{"data": [\n{}]}', "the keys are data"),
        ('\n\ufeff{\n "text": "a"}'.replace("\n\ufeff", "\ufeff\n"), None),
        ('{\n "instruction": "a"', "broken JSON"),
    ):
        (tmp_path / "d.json").write_text(text)
        rows, rejected, _ = read(tmp_path / "d.json")
        assert (len(rows), len(rejected)) == (1, 0) if reason is None else reason in rejected[0][1]


@pytest.mark.parametrize(
    "name, words",
    [("bom", "byte order mark"), ("crlf", "CRLF"), ("blank_lines", "2 blank line(s)")],
)
def test_noted_and_accepted(name, words):
    rows, rejected, notes = read(DATA / "noted" / f"{name}.jsonl")
    assert rows and not rejected and words in notes[0][1]


def test_every_fault_file_is_tested():
    named = {p.name for p in (DATA / "faults").iterdir()}
    assert len(named) == 21


def test_a_huge_line_costs_no_memory(tmp_path):
    path = tmp_path / "huge.jsonl"
    path.write_bytes(
        b'{"instruction": "a", "output": "'
        + b"x" * 50_000_000
        + b'"}\n{"instruction": "a", "output": "b"}\n'
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from data import source\n"
        "found = list(source.read(source.resolve([sys.argv[1]])[0]))\n"
        "print((found[0][0], found[0][1].reason[:40]), len(found), "
        "open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )  # its own peak; ru_maxrss is inherited
    out = subprocess.run(
        [sys.executable, "-c", code, str(path), str(ROOT)],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert "(1, 'a row of 50,000,03" in out and int(out.split()[-1]) < 200_000, out


def test_skipping_leaves_the_good_rows():
    found = source.check_all(source.resolve([str(DATA / "faults")]), "skip")
    assert found > 10
    with pytest.raises(RunError, match="no row can be used"):
        source.check_all(source.resolve([str(DATA / "faults" / "no_format.jsonl")]), "skip")


def test_many_bad_rows_are_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"instruction": "a"}\n' * 30)
    with pytest.raises(RunError, match="30 of 30") as error:
        source.check_all(source.resolve([str(path)]), "stop")
    assert "20 more" in str(error.value)


# -- sources ---------------------------------------------------------------------------------------
def test_files_folders_globs_and_shares(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "rejected.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert [Path(s.path).name for s in source.resolve([str(tmp_path)])] == ["a.jsonl", "b.jsonl"]
    assert [Path(s.path).name for s in source.resolve([f"{tmp_path}/b*"])] == ["b.jsonl"]
    one, two = source.resolve([f"{tmp_path}/a.jsonl:0.7", f"{tmp_path}/b.jsonl:.3"])
    assert (one.weight, two.weight, one.group, two.group) == (0.7, 0.3, 0, 1)


@pytest.mark.parametrize(
    "specs, words",
    [
        (["absent.jsonl"], "nothing at"),
        (["{}/c.txt"], "not a data file"),
        (["{}/a.jsonl:0"], "above 0"),
        (["{}/z*"], "no data file matches"),
        (["x" * 5000], "no data file xxx"),
        ([""], "no data file"),
        (["{}/a.jsonl:1", "{}/b.jsonl"], "a share for each"),
        (["ftp://x/y.jsonl"], "not supported"),
        (["{}/none"], "no data file in"),
    ],
)
def test_sources_refused(tmp_path, specs, words):
    (tmp_path / "none").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(RunError, match=words):
        source.resolve([s.format(tmp_path) for s in specs])


def test_registry():
    (sums,) = source.resolve(["sums"], str(DATA))
    assert len([r for _, r in source.read(sums)]) == 4
    (quiz,), (talk,) = (
        source.resolve(["quiz"], str(DATA)),
        source.resolve(["talk"], str(DATA / "dataset_info.json")),
    )
    assert contents(next(r for _, r in source.read(quiz))) == [
        ("user", "1 + 1?"),
        ("assistant", "2"),
    ]
    assert contents(next(r for _, r in source.read(talk))) == [
        ("user", "Hello?"),
        ("assistant", "Welcome."),
    ]
    with pytest.raises(RunError, match="did you mean quiz"):
        source.resolve(["quizz"], str(DATA))


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"file_name": "a.jsonl", "formatting": "vicuna"}, "formatting"),
        ({"file_name": "a.jsonl", "ranking": True}, "preference"),
        ({"file_name": "a.jsonl", "columns": {"promt": "q"}}, "column 'promt'"),
        ({}, "names no data"),
        ({"file_name": "a.jsonl", "num_samples": 0}, "num_samples"),
        ({"file_name": "a.jsonl", "columns": "q"}, "columns"),
        ({"file_name": "a.jsonl", "columns": {"prompt": 3}}, "columns"),
        ({"file_name": "a.jsonl", "tags": ["x"]}, "tags"),
        ({"file_name": "a.jsonl", "formatting": ["alpaca"]}, "formatting"),
    ],
)
def test_registry_refused(tmp_path, entry, words):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(RunError, match=words):
        source.resolve(["x"], str(tmp_path))


@pytest.mark.parametrize(
    "entry, record, found",
    [
        (
            {"columns": {"prompt": "q", "response": "a"}},
            {"q": "x", "a": "y", "messages": "id 7"},
            ("alpaca", [("user", "x"), ("assistant", "y")]),
        ),
        (
            {"columns": {"prompt": "body"}},
            {"body": "x", "instruction": "y"},
            ("text", [("completion", "x")]),
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "talk"}},
            {
                "talk": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
                "messages": 3,
            },
            ("sharegpt", [("user", "x"), ("assistant", "y")]),
        ),
        ({"columns": {"prompt": "q", "response": "a"}}, {"q": "x"}, "no output"),
        ({"columns": {"prompt": "q", "response": "a"}}, {"a": "x"}, "no q, which"),
    ],
)
def test_the_registry_decides_the_format(tmp_path, entry, record, found):
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"x": {"file_name": "d.jsonl", **entry}}), encoding="utf-8-sig"
    )
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    (one,) = source.resolve(["x"], str(tmp_path))
    ((_, row),) = source.read(one)
    assert found in row.reason if isinstance(row, BadRow) else (one.format, contents(row)) == found


def test_another_librarys_dataset_info_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_info.json").write_text('{"features": [], "splits": 3}')
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n')
    assert len(source.resolve(["d.jsonl"])) == 1
    with pytest.raises(RunError, match="not a registry"):
        source.resolve(["d.jsonl"], str(tmp_path))


def test_damaged_memory_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ZERO_OFFLOAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n')
    first = source.check(source.resolve([str(tmp_path / "d.jsonl")])[0])
    for memo in [
        *(tmp_path / "cache" / "hashes").iterdir(),
        *(tmp_path / "cache" / "checked").iterdir(),
    ]:
        for damage in (b"\xff\xfe", b"", memo.read_bytes().replace(b"1", b"7")):
            memo.write_bytes(damage)
            assert source.check(source.resolve([str(tmp_path / "d.jsonl")])[0]) == first


def test_a_check_is_remembered_until_the_content_changes(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "x"}\n')
    (one,) = source.resolve([str(path)])
    first = source.check(one)
    with monkeypatch.context() as patch:
        patch.setattr(records, "read", lambda *a: pytest.fail("read again"))
        assert source.check(source.resolve([str(path)])[0]) == first
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    assert source.check(source.resolve([str(path)])[0]).accepted == 2


def test_samples_do_not_leak():
    import re

    (train, _, _), (validation, _, _) = (
        read(SAMPLES / f"{n}.jsonl") for n in ("train", "validation")
    )
    assert len(train) >= 2000 and len(validation) >= 50
    words = [
        {re.search(r"'([^']+)'", r.messages[0]["content"])[1] for r in part}
        for part in (train, validation)
    ]
    answers = [{r.messages[-1]["content"] for r in part} for part in (train, validation)]
    assert not words[0] & words[1] and not answers[0] & answers[1]
    assert len(words[0]) == len(train) and len(answers[0]) == len(train)
    questions = {re.sub(r"'[^']+'", "X", r.messages[0]["content"].split("\n")[0]) for r in train}
    assert len(questions) > 10


# -- packing ---------------------------------------------------------------------------------------
def long_tailed(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(5.3, 0.9, count), 8, 2048).astype(np.int64)


def slow_best_fit(lengths, capacity):
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b in bins if b[0] >= lengths[i]]
        if not fitting:
            bins.append([capacity, []])
            fitting = bins[-1:]
        best = min(fitting, key=lambda b: b[0])
        best[0] -= lengths[i]
        best[1].append(i)
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_decreasing(seed):
    rng = random.Random(seed)
    capacity = rng.choice([16, 100, 2048])
    lengths = np.array([rng.randint(1, capacity) for _ in range(rng.randint(1, 200))])
    groups = pack.members(pack.best_fit(lengths, capacity))
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(lengths[g].sum() <= capacity for g in groups)
    slow = slow_best_fit(lengths.tolist(), capacity)
    assert sorted(int(lengths[g].sum()) for g in groups) == sorted(capacity - b[0] for b in slow)


def test_the_number_of_bins_does_not_depend_on_the_order():
    lengths = long_tailed(5000)
    counts = {
        int(pack.best_fit(np.random.default_rng(s).permutation(lengths), 2048).max())
        for s in range(5)
    }
    assert len(counts) == 1


def test_fill_and_speed():
    lengths = long_tailed(200_000)
    began = time.perf_counter()
    assert pack.fill(lengths, 2048) >= 0.97
    assert (
        len(lengths) / (time.perf_counter() - began) > 100_000
    )  # rows/s; 5 times that on a machine of its own
