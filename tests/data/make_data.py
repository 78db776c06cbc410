"""Write one small file of every format and every fault beside this script.

Run as: python tests/data/make_data.py
"""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

HERE = Path(__file__).parent
ALPACA = [
    {
        "instruction": f"What is {a} plus {a}?",
        "input": "" if a % 2 else "Answer with a number.",
        "output": str(2 * a),
    }
    for a in range(1, 7)
]
TURNS = [
    ("user", "Who wrote Faust?"),
    ("assistant", "Goethe."),
    ("user", "And Hamlet?"),
    ("assistant", "Shakespeare."),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
}
FORMATS = {
    "alpaca": [
        *ALPACA,
        {
            "instruction": "And 7?",
            "output": "14",
            "system": "You add.",
            "history": [["What is 6 plus 6?", "12"]],
        },
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in TURNS
            ],
            "system": "Be brief.",
        },
        {
            "conversations": [
                {"from": "human", "value": "Weather in Bern?"},
                {
                    "from": "function_call",
                    "value": '{"name": "weather", "arguments": {"city": "Bern"}}',
                },
                {"from": "observation", "value": '{"sky": "clear"}'},
                {"from": "gpt", "value": "Clear."},
            ],
            "tools": json.dumps([TOOL]),
        },
    ],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *({"role": r, "content": t} for r, t in TURNS),
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Weather in Bern?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear"}'},
                {"role": "assistant", "content": "Clear."},
            ],
            "tools": [TOOL],
        },
    ],
    "prompt_completion": [
        {"prompt": "The capital of France is", "completion": " Paris."},
        {"prompt": "2, 4, 6,", "completion": " 8"},
    ],
    "text": [
        {"text": "A garden is a plot of ground where plants grow."},
        {"text": "Water boils at 100 degrees at sea level."},
    ],
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*turns):
    return {"messages": [{"role": r, "content": t} for r, t in turns]}


GOOD = lines(ALPACA[:1])
# name → content; each of them has a rejected row. Those of NOTED are only reported.
FAULTS = {
    "broken_json": GOOD + b'{"instruction": "a", "output": \n' + GOOD,
    "nul": GOOD + b'{"instruction": "a\0", "output": "b"}\n',
    "invalid_utf8": GOOD + b'{"instruction": "caf\xe9", "output": "b"}\n',
    "utf16": json.dumps(ALPACA[0]).encode("utf-16"),
    "surrogate": GOOD + b'{"instruction": "\\ud800", "output": "b"}\n',
    "empty": b"",
    "null_content": lines([chat(*TURNS), chat(("user", "a"), ("assistant", None))]),
    "not_text": lines([chat(*TURNS), chat(("user", 3), ("assistant", "b"))]),
    "no_output": GOOD + lines([{"instruction": "a"}]),
    "wrong_role": lines([chat(*TURNS), chat(("user", "a"), ("asistant", "b"))]),
    "role_order": lines([chat(*TURNS), chat(("user", "a"), ("user", "b"), ("assistant", "c"))]),
    "no_assistant": lines([chat(*TURNS), chat(("user", "a"))]),
    "ends_with_user": lines([chat(*TURNS), chat(*TURNS, ("user", "a"))]),
    "duplicate_keys": GOOD + b'{"instruction": "a", "output": "b", "output": "c"}\n',
    "mixed_formats": GOOD + lines([chat(*TURNS)]),
    "no_format": lines([{"question": "a", "answer": "b"}]),
    "preference": lines([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    "not_an_object": GOOD + b"[1, 2]\n",
}
NOTED = {
    "bom": b"\xef\xbb\xbf" + GOOD,
    "crlf": lines(ALPACA).replace(b"\n", b"\r\n"),
    "blank_lines": GOOD + b"\n  \n" + GOOD,
}


def main():
    for folder in ("formats", "faults", "noted"):
        (HERE / folder).mkdir(exist_ok=True)
    for name, rows in FORMATS.items():
        (HERE / "formats" / f"{name}.jsonl").write_bytes(lines(rows))
    (HERE / "formats" / "list.json").write_text(json.dumps(ALPACA, indent=1))
    (HERE / "formats" / "packed.jsonl.gz").write_bytes(gzip.compress(lines(ALPACA), mtime=0))
    with pyarrow.CompressedOutputStream(
        str(HERE / "formats" / "packed.jsonl.zst"), "zstd"
    ) as stream:
        stream.write(lines(ALPACA))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ALPACA), HERE / "formats" / "table.parquet"
    )
    registry = {
        "sums": {"file_name": "formats/alpaca.jsonl", "num_samples": 4},
        "quiz": {
            "file_name": "quiz.jsonl",
            "columns": {"prompt": "question", "response": "answer"},
        },
        "talk": {
            "file_name": "talk.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {
                "role_tag": "who",
                "content_tag": "says",
                "user_tag": "guest",
                "assistant_tag": "host",
            },
        },
    }
    (HERE / "dataset_info.json").write_text(json.dumps(registry, indent=2) + "\n")
    (HERE / "quiz.jsonl").write_bytes(lines([{"question": "1 + 1?", "answer": "2"}]))
    (HERE / "talk.jsonl").write_bytes(
        lines(
            [{"turns": [{"who": "guest", "says": "Hello?"}, {"who": "host", "says": "Welcome."}]}]
        )
    )
    for name, content in FAULTS.items():
        (HERE / "faults" / f"{name}.jsonl").write_bytes(content)
    (HERE / "faults" / "half_list.json").write_bytes(json.dumps(ALPACA, indent=1).encode()[:-40])
    (HERE / "faults" / "half_written.jsonl.gz").write_bytes(
        gzip.compress(lines(ALPACA) * 50, mtime=0)[:-20]
    )
    (HERE / "faults" / "not_parquet.parquet").write_bytes(GOOD)
    for name, content in NOTED.items():
        (HERE / "noted" / f"{name}.jsonl").write_bytes(content)


if __name__ == "__main__":
    main()
