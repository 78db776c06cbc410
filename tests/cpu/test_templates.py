"""Templates that write earlier turns differently: what is trained is exactly what they render.

The templates in tests/data/templates have the shape of public ones. ⟦ ⟧ stand around what is
trained.
"""

import pytest
from conftest import ROOT, write_rows
from tokenizers import AddedToken
from transformers import AutoTokenizer

from data import formats, source, tokenize
from data.encoder import Encoder
from data.errors import RowError, RunError

TEMPLATES = ROOT / "tests" / "data" / "templates"
CONTROLS = (
    "<|User|> <|Assistant|> <|end|> <|start|> <|message|> <|channel|> <|return|> <|call|> <s> </s>"
)
TOOLS = [{"type": "function", "function": {"name": "f"}}]
THINK = "<think>\nhm\n</think>\n\n"


@pytest.fixture
def tokenizer(tiny_model):
    made = AutoTokenizer.from_pretrained(tiny_model)
    made.add_tokens([AddedToken(token, special=True) for token in CONTROLS.split()])
    made.bos_token, made.eos_token = "<s>", "</s>"
    return made


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(**arguments):
    return answer("", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


RESULT = {"role": "tool", "content": "3"}


def marked(tokenizer, name, turns, tools=None, **options):
    """(the text with marks, notes, unread keys). The trained tokens are those of the marks."""
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    encoder = Encoder(tokenizer, **options)
    row = formats.convert({"messages": turns, "tools": tools}, "messages", {})
    rendered = encoder.render(row)
    ((ids, spans),) = encoder.encode([rendered])
    assert tokenizer.decode(ids) == rendered.text
    text = rendered.text
    for (begin, end), (first, last) in zip(reversed(rendered.spans), reversed(spans)):
        assert tokenizer.decode(ids[first:last]) == rendered.text[begin:end].rstrip("\n")
        text = f"{text[:begin]}⟦{text[begin:end]}⟧{text[end:]}"
    return text, rendered.notes, row.unread


R1 = [
    ([user("q"), answer("a")], "<s><|User|>q<|Assistant|>⟦a<|end|>⟧"),
    # An answer that begins as the header's rest does.
    ([user("q"), answer("<b>")], "<s><|User|>q<|Assistant|>⟦<b><|end|>⟧"),
    (
        [user("q"), answer(THINK + "<b> a"), user("r"), answer(THINK + "<c>")],
        "<s><|User|>q<|Assistant|>⟦\n\n<b> a<|end|>⟧<|User|>r<|Assistant|>⟦\n\n<c><|end|>⟧",
    ),
]
# The header opens <think>, and every answer closes it.
NEMOTRON = [
    (
        [user("q"), answer("a"), user("r"), answer("b", reasoning="hm")],
        "<s><|User|>q<|Assistant|><think>⟦</think>a<|end|>⟧"
        "<|User|>r<|Assistant|><think>⟦hm</think>b<|end|>⟧",
    ),
    ([user("q"), answer("a")], "<s><|User|>q<|Assistant|><think>⟦</think>a<|end|>⟧"),
]
ASK, SAY = "<|im_start|>user\n", "<|im_start|>assistant\n"
END, EMPTY = "<|im_end|>\n", "<think>\n\n</think>\n\n"
CALL, EMPTY_CALL = (
    f'\n<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    for arguments in ('{"x": 1}', "{}")
)
QWEN3 = [
    (
        [user("q"), answer("a"), user("r"), answer("b")],
        f"{ASK}q{END}{SAY}⟦a{END}⟧{ASK}r{END}{SAY}⟦{EMPTY}b{END}⟧",
    ),
    (
        [user("q"), answer(THINK + "a"), user("r"), answer("b", thinking="hm")],
        f"{ASK}q{END}{SAY}⟦a{END}⟧{ASK}r{END}{SAY}⟦{THINK}b{END}⟧",
    ),
    (
        [user("q"), call(x=1), RESULT, answer("a"), user("r"), call(), RESULT, answer("b")],
        f"{ASK}q{END}{SAY}⟦{CALL}{END}⟧<|im_start|>tool\n3{END}{SAY}⟦a{END}⟧"
        f"{ASK}r{END}{SAY}⟦{EMPTY_CALL}{END}⟧<|im_start|>tool\n3{END}{SAY}⟦{EMPTY}b{END}⟧",
    ),
]
BEGIN = "<|start|>system<|message|>Reasoning: medium<|end|>"
Q, R = (f"<|start|>user<|message|>{text}<|end|>" for text in "qr")
FINAL = "<|channel|>final<|message|>"
HM = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
TO_F = ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>'
CHANNELS = [
    (
        [user("q"), answer("a", thinking="hm"), user("r"), answer("b", thinking="hm")],
        f"{BEGIN}{Q}<|start|>assistant⟦{FINAL}a<|end|>⟧{R}<|start|>assistant⟦{HM}{FINAL}b<|return|>⟧",
    ),
    (
        [user("q"), {**call(x=1), "thinking": "oh"}, RESULT, answer("b", reasoning="hm")],
        f"{BEGIN}{Q}<|start|>assistant⟦{TO_F}⟧<|start|>functions.f to=assistant<|message|>3<|end|>"
        f"<|start|>assistant⟦{HM}{FINAL}b<|return|>⟧",
    ),
]
CASES = [
    *[("r1", *case) for case in R1],
    *[("qwen3", *case) for case in QWEN3],
    *[("channels", *case) for case in CHANNELS],
    *[("closed", *case) for case in NEMOTRON],
]


@pytest.mark.parametrize("name, turns, expected", CASES)
def test_trained_as_rendered(tokenizer, name, turns, expected):
    assert marked(tokenizer, name, turns)[0] == expected
    last = expected.rpartition("⟦")  # the advice that notes and refusals give
    only = last[0].replace("⟦", "").replace("⟧", "") + last[1] + last[2]
    assert marked(tokenizer, name, turns, last_turn_only=True)[0] == only


def test_tools_before_the_last_question(tokenizer):
    text, _, _ = marked(
        tokenizer, "tools_last", [user("q"), answer("a"), user("r"), answer("b")], TOOLS
    )
    tools = '[TOOLS][{"type": "function", "function": {"name": "f"}}][/TOOLS]'
    assert text == f"<s>[INST] q[/INST]⟦ a</s>⟧{tools}[INST] r[/INST]⟦ b</s>⟧"


def test_reasoning_that_is_left_out_is_said(tokenizer):
    turns = [user("q"), answer(THINK + "a"), user("r"), answer(THINK + "b")]
    assert "last answer's reasoning" in str(marked(tokenizer, "r1", turns[:2])[1])
    (note,) = marked(tokenizer, "qwen3", turns)[1]
    assert "reasoning of earlier turns out; a row for each answer, with --last_turn_only" in note
    # What it advises: the earlier answer in a row of its own, and no earlier answer in this one.
    assert marked(tokenizer, "qwen3", turns[:2])[:2] == (
        f"{ASK}q{END}{SAY}⟦{THINK}a{END}⟧",
        (),
    )
    assert marked(tokenizer, "qwen3", turns, last_turn_only=True)[1] == ()


PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_wants_other_content_is_refused(tokenizer):
    """It writes nothing of a plain text: only the end of turn would be trained."""
    tokenizer.chat_template = PARTS
    row = formats.convert({"messages": [user("q"), answer("a")]}, "messages", {})
    with pytest.raises(RowError, match="the answer of turn 2 out of the text; fix: --template"):
        Encoder(tokenizer).render(row)


@pytest.mark.parametrize(
    "written, form",
    [
        ("{{ m.content }}{{ m.tool_calls[0].function.arguments | tojson }}", ("", False)),
        ("{{ m.content or '' }}{{ m.tool_calls[0].function.arguments }}", (None, True)),
        ("{{ m.content + m.tool_calls[0].function.arguments }}", ("", True)),
        (
            "{% if m.content is not none %}X{% endif %}"
            "{% for key, value in m.tool_calls[0].function.arguments.items() %}"
            "{{ key }}={{ value }}{% endfor %}",
            (None, False),
        ),
    ],
)
def test_calls_in_the_form_that_the_template_takes(tokenizer, written, form):
    """OpenAI has null and JSON text; some templates want "" or an object."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.tool_calls %}"
        + written
        + "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    encoder = Encoder(tokenizer)
    assert encoder.template._form_of_calls == form
    row = formats.convert({"messages": [user("q"), call(x="é")]}, "messages", {})
    rendered = encoder.render(row)
    learned = [rendered.text[begin:end] for begin, end in rendered.spans]
    assert learned == ["x=é<|im_end|>" if form == (None, False) else '{"x": "é"}<|im_end|>']


def test_an_answer_that_the_template_hides_is_refused(tokenizer):
    turns = [user("q"), answer(THINK), user("r"), answer("b")]
    with pytest.raises(RowError, match="the answer of turn 2 out of the text.*--last_turn_only"):
        marked(tokenizer, "r1", turns)
    assert marked(tokenizer, "r1", turns, last_turn_only=True)[0].endswith("⟦b<|end|>⟧")


def test_the_templates_own_variables(tokenizer):
    turns = [user("q"), answer("a"), user("r"), answer("b")]
    text, *_ = marked(tokenizer, "qwen3", turns, variables={"enable_thinking": False})
    assert text == f"{ASK}q{END}{SAY}⟦a{END}⟧{ASK}r{END}{SAY}{EMPTY}⟦b{END}⟧"
    text, *_ = marked(tokenizer, "channels", turns, variables={"reasoning_effort": "high"})
    assert "Reasoning: high" in text
    with pytest.raises(RunError, match="enable_thinkin.*did you mean enable_thinking"):
        marked(tokenizer, "qwen3", turns, variables={"enable_thinkin": False})
    for name in ("messages", "bos_token", "raise_exception", "loop"):
        with pytest.raises(RunError, match=f"does not read {name}"):
            marked(tokenizer, "channels", turns, variables={name: 1})
    with pytest.raises(RunError, match="no variables to set"):
        marked(tokenizer, "r1", turns, variables={"x": 1})


def test_variables_are_part_of_the_cache(tokenizer):
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    options = [None, {"enable_thinking": False}, {"enable_thinking": True}]
    assert len({Encoder(tokenizer, variables=each).fingerprint for each in options}) == 3


def test_a_template_that_is_no_jinja(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(RunError, match="not readable as Jinja"):
        Encoder(tokenizer)


@pytest.mark.parametrize(
    "name, key, role, is_read",
    [
        ("qwen3", "thinking", "assistant", True),  # as reasoning_content
        ("r1", "thinking", "assistant", False),
        ("qwen3", "thinking", "user", False),
        ("qwen3", "name", "user", False),  # a call's function has a name, a turn's is not read
        ("qwen3", "persona", "assistant", False),
        ("names", "name", "user", True),
    ],
)
def test_keys_of_a_turn(tokenizer, name, key, role, is_read):
    turns = [user("q"), answer("a")]
    turns[role == "assistant"][key] = "Ada"
    text, _, unread = marked(tokenizer, name, turns)
    assert ("Ada" in text, unread) == (is_read, [] if is_read else [f"{key} of {role} turns"])


def test_keys_that_nothing_reads_are_named_once(tokenizer, tmp_path):
    tokenizer.chat_template = (TEMPLATES / "r1.jinja").read_text(encoding="utf-8")
    rows = [
        {"messages": [user("q") | {"id": 3}, answer(f"a{n}", thinking="hm")], "source": "web"}
        for n in range(30)
    ]
    rows[4]["tools"] = TOOLS
    rows[5] |= {"source": None, "meta": {}}
    (one,) = source.resolve([str(write_rows(tmp_path / "d.jsonl", rows))])
    notes = tokenize.tokenized(one, Encoder(tokenizer)).notes
    assert notes == [
        [
            1,
            "keys that nothing reads: source (29 row(s)), id of user turns (30 row(s)), "
            "thinking of assistant turns (30 row(s)), tools (1 row(s))",
        ]
    ]
