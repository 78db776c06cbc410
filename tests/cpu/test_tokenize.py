"""What is trained on, exactly: templates, masks, cuts, the cache, the order of rows; layers."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, samples, write_rows
from tokenizers import AddedToken
from transformers import AutoTokenizer

from data import dataset, source, template, tokenize
from data.encoder import Encoder
from data.errors import RowError, RunError
from data.formats import Row

CHAT = [
    {"role": "user", "content": "What is a dog?"},
    {"role": "assistant", "content": "an animal"},
]
LONG = [
    {"role": "system", "content": "s"},
    *CHAT,
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def encoded(tokenizer, messages, tools=None, **options):
    """(ids, spans) of one conversation; RowError raised."""
    encoder = Encoder(tokenizer, **options)
    rendered = encoder.render(Row(messages, tools))
    (by_parts,) = encoder.encode([rendered])
    encoder.can_encode_parts = False  # by character offsets, as with other kinds of tokenizers
    assert encoder.encode([rendered]) == [by_parts]
    return by_parts


def trained(tokenizer, messages, **options):
    ids, spans = encoded(tokenizer, messages, **options)
    return [tokenizer.decode(ids[a:b]) for a, b in spans]


# -- the model's own template ----------------------------------------------------------------------
def test_every_answer_and_its_end_are_trained(tokenizer):
    assert trained(tokenizer, CHAT) == ["an animal<|im_end|>"]
    assert trained(tokenizer, LONG) == ["an animal<|im_end|>", "yes<|im_end|>"]
    assert trained(tokenizer, LONG, last_turn_only=True) == ["yes<|im_end|>"]
    assert trained(tokenizer, [CHAT[0], {"role": "assistant", "content": "\nx"}]) == [
        "\nx<|im_end|>"
    ]
    assert trained(tokenizer, [LONG[0], CHAT[0], {**CHAT[1], "weight": 0}, *LONG[3:]]) == [
        "yes<|im_end|>"
    ]


SWITCH = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}%s"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"


def test_weight_0_is_never_trained(tokenizer, tmp_path):
    last = [*LONG[:-1], {**LONG[-1], "weight": 0}]
    for marked in (tokenizer.chat_template, SWITCH.replace("%s", MARKED)):
        tokenizer.chat_template = marked
        assert trained(tokenizer, last) == ["an animal<|im_end|>"]
        with pytest.raises(RowError, match="no trained token"):
            trained(tokenizer, last, last_turn_only=True)
    tokenizer.chat_template = SWITCH.replace("%s", 2 * (MARKED + "-"))
    assert len(trained(tokenizer, LONG)) == 4
    with pytest.raises(RowError, match="marks 4 spans in 2 answers"):
        trained(tokenizer, last)


def test_end_tokens_without_a_name(tokenizer):
    """No special_tokens_map names the special token `<|eot|>`. Text without an end stays whole."""
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)])
    tokenizer.chat_template = SWITCH.replace("%s", "{{ m['content'] + '<|eot|>' }}")
    assert trained(tokenizer, LONG) == ["an animal<|eot|>", "yes<|eot|>"]
    tokenizer.chat_template = SWITCH.replace("%s", "{{ m['content'] }}")
    assert trained(
        tokenizer, [CHAT[0], {"role": "assistant", "content": "a <|eot|> is a token"}]
    ) == ["a <|eot|> is a token\n"]


def test_calls_that_the_template_leaves_out_are_not_trained(tokenizer):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    assert trained(tokenizer, [CHAT[0], call, {"role": "tool", "content": "3"}, CHAT[1]]) == [
        "an animal<|im_end|>"
    ]


def test_pad_is_a_token_that_nothing_uses(tokenizer):
    tokenizer.add_tokens([AddedToken("<|spare|>", special=True)])
    tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
    template.prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<|spare|>"


def test_a_duplicate_group_larger_than_wanted_stays(tokenizer, tmp_path):
    rows = [{"text": "the same"}] * 40 + [{"text": f"row {i}"} for i in range(60)]
    file = tokenize.tokenized(
        source.resolve([str(write_rows(tmp_path / "d.jsonl", rows))])[0],
        Encoder(tokenizer),
    )
    for seed in range(8):
        assert dataset.split([file], "10", seed)[1].sum() == 10


def test_the_ids_are_the_templates(tokenizer):
    ids, _ = encoded(tokenizer, LONG)
    assert (
        ids
        == tokenizer(tokenizer.apply_chat_template(LONG, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
    )


def test_a_template_that_rewrites_earlier_turns_is_rejected(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' }}"
        "{% if m['role'] == 'assistant' and not loop.last %}(cut)"
        "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    with pytest.raises(RowError, match="answer of turn 3 out of the text"):
        encoded(tokenizer, LONG)
    assert trained(tokenizer, LONG, last_turn_only=True) == ["yes<|im_end|>"] and trained(
        tokenizer, CHAT
    ) == ["an animal<|im_end|>"]


@pytest.mark.parametrize(
    "written, words",
    [
        ("{{ raise_exception('no system') }}", "no system"),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
            "{% endfor %}",
            "leaves the answer of turn 2 out of the text",
        ),
    ],
)
def test_templates_that_refuse_or_train_nothing(tokenizer, tmp_path, written, words):
    tokenizer.chat_template = written
    path = write_rows(tmp_path / "d.jsonl", [{"messages": CHAT}] * 2)
    encoder = Encoder(tokenizer)
    file = tokenize.tokenized(source.resolve([str(path)])[0], encoder)
    assert len(file) == 0 and file.counts.rejected == 2 and words in file.counts.first[0][1]


def test_a_token_across_the_border_is_cut(tokenizer):
    # Without a separator, letters of the prompt and of the answer could become one token.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    whole = tokenizer("explanatory", add_special_tokens=False)["input_ids"]
    for cut in range(1, 10):
        asked, answered = "explanatory"[:cut], "explanatory"[cut:]
        ids, ((a, b),) = encoded(
            tokenizer,
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}],
        )
        assert tokenizer.decode(ids[:a]) == asked and tokenizer.decode(ids[a:b]) == answered
    assert len(whole) < 11


@pytest.mark.parametrize(
    "text", ["déjà vu", "日本語", "🙂 smile 🙂", " leading", "trailing \n", "👩‍👩‍👧"]
)
def test_characters_of_several_bytes(tokenizer, text):
    assert trained(tokenizer, [CHAT[0], {"role": "assistant", "content": text}]) == [
        text + "<|im_end|>"
    ]


# -- our templates ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", template.NAMES)
def test_our_templates(tokenizer, name):
    tokenizer.add_special_tokens(
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "additional_special_tokens": ["<|eot_id|>", "[INST]"],
        }
    )
    template.prepare_tokenizer(tokenizer, name)
    ids, spans = encoded(tokenizer, LONG)
    ends = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
    parts = [tokenizer.decode(ids[a:b]) for a, b in spans]
    assert [p.replace(" ", "") for p in parts] == [
        (a + ends.get(name, "</s>")).replace(" ", "") for a in ("an animal", "yes")
    ]
    begins = ids.count(tokenizer.bos_token_id)
    assert begins == {"chatml": 0, "llama2": 2}.get(
        name, 1
    )  # Llama-2 begins every exchange with one, as Meta trained it
    assert (ids[0] == tokenizer.bos_token_id) == (name != "chatml")
    assert tokenizer.pad_token_id not in [t for a, b in spans for t in ids[a:b]]


def test_tools(tokenizer):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    talk = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "clear"},
        {"role": "assistant", "content": "Clear."},
    ]
    for name, end in (("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")):
        template.prepare_tokenizer(tokenizer, name)
        ids, spans = encoded(tokenizer, talk, tools)
        first, last = (tokenizer.decode(ids[a:b]) for a, b in spans)
        assert (
            '"name": "weather"' in first
            and '"city": "Bern"' in first
            and first.endswith(end)
            and last == "Clear." + end
        )
        assert '"function": {"name": "weather"}' in tokenizer.decode(ids[: spans[0][0]])
    template.prepare_tokenizer(tokenizer, "llama2")
    with pytest.raises(RowError, match="no tool calls"):
        encoded(tokenizer, talk, tools)


def test_a_tokenizer_without_template_gets_the_one_it_was_made_for(tokenizer):
    tokenizer.chat_template, tokenizer.pad_token = None, None
    assert template.prepare_tokenizer(tokenizer) == [
        "the chatml chat template, as it has none",
        "<|endoftext|> as the pad token",
    ]
    assert trained(tokenizer, CHAT) == ["an animal<|im_end|>"]
    with pytest.raises(RunError, match="no chat template vicuna"):
        template.prepare_tokenizer(tokenizer, "vicuna")


def test_raw_text_begins_and_ends(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, spans = encoded(
        tokenizer,
        [{"role": "prompt", "content": "one two"}, {"role": "completion", "content": " three"}],
    )
    assert (
        ids[-1] == eos
        and ids[0] != bos
        and tokenizer.decode(ids[spans[0][0] : spans[0][1]]) == " three<|im_end|>"
    )
    ids, spans = encoded(tokenizer, [{"role": "completion", "content": "one <|im_end|> two"}])
    assert spans == [(0, len(ids))] and ids[-1] == eos
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    ids, spans = encoded(tokenizer, [{"role": "completion", "content": "one"}])
    assert ids[0] == bos and ids.count(bos) == 1 and spans == [(1, len(ids))]


def test_a_tokenizer_that_cuts_by_itself_does_not(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert len(encoded(tokenizer, LONG)[0]) > 5


# -- Meta's own tokenizer --------------------------------------------------------------------------
@pytest.fixture(scope="session")
def llama3():
    """(a tokenizer made from Meta's tokenizer.model, Meta's own), from the package llama-models."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                folder,
                "llama-models==0.3.0",
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.fail(f"llama-models could not be fetched: {done.stderr[-300:]}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            model = wheel.read("llama_models/llama3/tokenizer.model")
    import base64

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in model.splitlines() if line)
    }
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    letters = bytes_to_unicode()

    def name(token):
        return "".join(letters[b] for b in token)

    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            if (
                token[:cut] in ranks
                and token[cut:] in ranks
                and ranks[token[:cut]] < rank
                and ranks[token[cut:]] < rank
            ):
                merges.append(
                    (
                        ranks[token[:cut]],
                        ranks[token[cut:]],
                        rank,
                        name(token[:cut]),
                        name(token[cut:]),
                    )
                )
    merges.sort(key=lambda m: (m[2], m[0], m[1]))
    raw = Tokenizer(
        models.BPE(
            {name(t): r for t, r in ranks.items()},
            [(a, b) for *_, a, b in merges],
            ignore_merges=True,
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    specials = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ]
    raw.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    import tiktoken

    meta = tiktoken.Encoding(
        "llama3",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={s: len(ranks) + i for i, s in enumerate(specials)},
    )
    return tokenizer, meta


TALKS = [
    CHAT,
    LONG,
    [
        {"role": "system", "content": "Answer in German.\n\nBriefly."},
        {"role": "user", "content": "How many?  1234567 apples…"},
        {"role": "assistant", "content": "Über 1 000 000!\n- eins\n- zwei"},
        {"role": "user", "content": "日本語で 🙂?"},
        {"role": "assistant", "content": "はい、もちろん。\n```python\nprint('x')\n```"},
        {"role": "user", "content": "(ok)"},
        {"role": "assistant", "content": "'s fine"},
    ],
]


@pytest.mark.parametrize("talk", TALKS, ids=["short", "two turns", "hard"])
def test_llama3_token_by_token(llama3, talk):
    tokenizer, meta = llama3
    template.prepare_tokenizer(tokenizer)
    special = {s: meta.encode_single_token(s) for s in meta.special_tokens_set}
    expected, labels = [special["<|begin_of_text|>"]], [False]
    for message in (
        talk
    ):  # Meta's ChatFormat: header, blank line, content, end of turn; every part encoded by itself
        header = [
            special["<|start_header_id|>"],
            *meta.encode(message["role"]),
            special["<|end_header_id|>"],
            *meta.encode("\n\n"),
        ]
        body = [*meta.encode(message["content"]), special["<|eot_id|>"]]
        expected += header + body
        labels += [False] * len(header) + [message["role"] == "assistant"] * len(body)
    ids, spans = encoded(tokenizer, talk)
    assert ids == expected
    assert [any(a <= i < b for a, b in spans) for i in range(len(ids))] == labels
    assert ids.count(special["<|begin_of_text|>"]) == 1
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"


# -- cuts, split, cache ----------------------------------------------------------------------------
def test_too_long(tokenizer, tmp_path):
    long = {"instruction": "What is a dog?", "output": "an animal " * 40}
    path = write_rows(
        tmp_path / "d.jsonl",
        [
            {"instruction": "What is a dog?", "output": "an animal"},
            long,
            {"instruction": "word " * 99, "output": "b"},
        ],
    )
    cut, summary = samples(tokenizer, path, 40)
    assert (summary.rows, summary.too_long, summary.left_out) == (2, 2, 1) and cut.lengths.tolist()[
        1
    ] == 40
    assert "2 truncated, 1 left out" in str(summary)
    dropped, summary = samples(tokenizer, path, 40, too_long="drop")
    assert (summary.rows, summary.too_long) == (1, 2) and "2 dropped" in str(summary)
    whole, _ = samples(tokenizer, path, 10_000)
    parts, summary = samples(tokenizer, path, 40, too_long="split")
    pieces = [parts[i] for i in range(len(parts)) if parts.place(i) == (0, 2)]
    assert np.concatenate([ids for ids, _ in pieces]).tolist() == whole[1][0].tolist()
    assert np.concatenate([labels for _, labels in pieces]).tolist() == whole[1][1].tolist()
    assert summary.trained == sum(
        int((labels[1:] >= 0).sum()) for _, labels in (parts[i] for i in range(len(parts)))
    )


def test_train_on_prompt(tokenizer, rows_file):
    rows, summary = samples(tokenizer, rows_file[1], train_on_prompt=True)
    assert all((labels == ids).all() for ids, labels in (rows[i] for i in range(len(rows))))
    assert summary.trained == summary.tokens - summary.rows


def make_files(tmp_path, tokenizer, contents):
    """Token files of alpaca rows whose question is the given text."""
    files = []
    for n, texts in enumerate(contents):
        path = write_rows(
            tmp_path / f"{n}.jsonl", [{"instruction": t, "output": "a"} for t in texts]
        )
        files.append(tokenize.tokenized(source.resolve([str(path)])[0], Encoder(tokenizer)))
    return files


@pytest.mark.parametrize("wanted, count", [("0.2", 20), ("10", 10), ("0", 0)])
def test_split_by_content(tokenizer, tmp_path, wanted, count):
    files = make_files(
        tmp_path,
        tokenizer,
        [[f"q{i // 2}" for i in range(60)], [f"q{i // 2}" for i in range(60, 100)]],
    )
    train, validation = dataset.split(files, wanted, 1)
    assert count <= validation.sum() <= count + 1 and (train ^ validation).all()
    contents = np.concatenate([file.contents for file in files])
    assert len(train) == len(contents) == 100
    seen = [set(map(tuple, contents[rows])) for rows in (train, validation)]
    assert not seen[0] & seen[1]  # rows that are alike stay on one side
    assert (dataset.split(files, wanted, 1)[1] == validation).all()
    if count:
        assert (dataset.split(files, wanted, 2)[1] != validation).any()


def test_validation_without_what_is_trained(tokenizer, tmp_path):
    train, validation = make_files(tmp_path, tokenizer, [["q1", "q2", "q3"], ["q2", "q9", "q3"]])
    assert dataset.without([validation], [train]).tolist() == [False, True, False]


def test_a_damaged_cache_is_made_again(tokenizer, rows_file, capsys):
    (one,) = source.resolve([str(rows_file[1])])
    encoder = Encoder(tokenizer)
    file = tokenize.tokenized(one, encoder)
    before = file.tokens(0, 50).tolist()
    for damage in (
        lambda p: p.write_bytes(p.read_bytes()[:-4]),
        lambda p: p.write_bytes(b"\7" + p.read_bytes()[1:]),
        Path.unlink,
    ):
        damage(file.folder / "tokens.bin")
        assert tokenize.tokenized(one, encoder).tokens(0, 50).tolist() == before
        assert "made again" in capsys.readouterr().err
    (file.folder / "manifest.json").write_text("{")
    assert tokenize.tokenized(one, encoder).tokens(0, 50).tolist() == before


def test_a_full_disk_is_said(tokenizer, rows_file, tmp_path, monkeypatch):
    def full(work, *rest):
        (work / "tokens.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("ZERO_OFFLOAD_CACHE", str(tmp_path))
    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match="No space left.*\n.*ZERO_OFFLOAD_CACHE"),
    ):
        patch.setattr(tokenize, "_make", full)
        tokenize.tokenized(source.resolve([str(rows_file[1])])[0], Encoder(tokenizer))
    assert not list((tmp_path / "tokens").iterdir())
    assert len(tokenize.tokenized(source.resolve([str(rows_file[1])])[0], Encoder(tokenizer))) == 11


def test_one_writer(tiny_model, rows_file, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from transformers import AutoTokenizer\nfrom data import source, tokenize\n"
        "from data.encoder import Encoder\nmade = tokenize._make\n"
        "def make(*a):\n    print('made', flush=True)\n    return made(*a)\n"
        "tokenize._make = make\nencoder = Encoder(AutoTokenizer.from_pretrained(sys.argv[2]))\n"
        "f = tokenize.tokenized(source.resolve([sys.argv[3]])[0], encoder)\n"
        "print('rows', len(f))"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tiny_model), str(rows_file[0])]
    runs = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={"ZERO_OFFLOAD_CACHE": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"},
        )
        for _ in range(4)
    ]
    outputs = [r.communicate()[0] for r in runs]
    assert sum(o.count("made") for o in outputs) == 1 and all("rows 60" in o for o in outputs), (
        outputs
    )


def test_rejected_rows_are_kept_with_their_content(tokenizer, tmp_path):
    path = write_rows(
        tmp_path / "d.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "c"}]
    )
    file = tokenize.tokenized(source.resolve([str(path)])[0], Encoder(tokenizer))
    reason = "no output; needed: instruction and output; the keys are instruction"
    assert list(file.rejected()) == [{"line": 2, "reason": reason, "row": {"instruction": "c"}}]


def test_control_tokens_in_the_text_are_noted(tokenizer, tmp_path):
    template.prepare_tokenizer(tokenizer)
    path = write_rows(
        tmp_path / "d.jsonl",
        [{"instruction": "a", "output": "b"}, {"instruction": "say <|im_end|>", "output": "b"}],
    )
    file = tokenize.tokenized(source.resolve([str(path)])[0], Encoder(tokenizer))
    assert file.notes == [
        [2, "the text itself holds <|im_end|>, which the tokenizer reads as a control token"]
    ]


# -- order -----------------------------------------------------------------------------------------
LENGTHS = np.random.default_rng(0).integers(5, 60, 333)


def samplers(batch, accumulate, world, rows, **options):
    return [
        dataset.BatchSampler(LENGTHS[:rows], batch, accumulate, r, world, 1, **options)
        for r in range(world)
    ]


def steps(batch, accumulate, world, rows, epoch=0, **options):
    """Samples of each optimizer step, in the order of the global micro-batches."""
    ranks = samplers(batch, accumulate, world, rows, **options)
    for rank in ranks:
        rank.set_epoch(epoch)
    ranks = [list(r) for r in ranks]
    count = len(ranks[0]) // accumulate
    return [
        [
            pack
            for m in range(step * accumulate, (step + 1) * accumulate)
            for rank in ranks
            for pack in rank[m]
        ]
        for step in range(count)
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"pack_length": 64}, {"strategy": "sequential"}, {"strategy": "group_by_length"}],
)
@pytest.mark.parametrize("rows", [7, 16, 333])
def test_the_order_does_not_depend_on_the_ranks(rows, options):
    for epoch in (0, 1):
        reference = steps(8, 1, 1, rows, epoch, **options)
        assert all(
            steps(*shape, rows, epoch, **options) == reference
            for shape in ((1, 8, 1), (2, 1, 4), (2, 2, 2), (4, 1, 2))
        )
        assert {i for step in reference for pack in step for i in pack} == set(range(rows))
    if options.get("strategy") != "sequential" and rows == 333:
        assert steps(8, 1, 1, rows, 1, **options) != steps(8, 1, 1, rows, 0, **options)


def test_length_groups_have_less_padding():
    def padding(strategy, accumulate=1):
        longest = [
            max(LENGTHS[i] for (i,) in batch)
            for batch in samplers(8, accumulate, 1, 320, strategy=strategy)[0]
        ]
        return sum(longest) * 8 / LENGTHS[:320].sum()

    assert padding("group_by_length") < 1.06 < 1.3 < padding("random")
    assert (
        padding("random", 8) < 1.15 < 1.3 < padding("sequential", 8)
    )  # micro-batches of one step, whose rows stay the same


def test_skipping_reads_nothing():
    from accelerate import skip_first_batches

    class Counting(torch.utils.data.Dataset):
        read = 0

        def __len__(self):
            return 333

        def __getitem__(self, pack):
            Counting.read += 1
            return pack

    sampler = samplers(4, 2, 1, 333, pack_length=64)[0]
    everything = list(sampler)
    loader = torch.utils.data.DataLoader(Counting(), batch_sampler=sampler, collate_fn=list)
    rest = list(skip_first_batches(loader, 20))
    assert rest == everything[20:] and Counting.read == 4 * len(rest)


def test_mixture():
    groups = np.array([0] * 300 + [1] * 33)
    mixture = dataset.Mixture(groups, {0: 0.5, 1: 0.5}, 1)
    assert mixture.taken == {0: 33, 1: 33}
    seen = [mixture.rows(e) for e in range(10)]
    assert all((groups[rows] == 1).sum() == 33 and len(set(rows.tolist())) == 66 for rows in seen)
    assert (
        len({i for rows in seen for i in rows.tolist() if i < 300}) == 300
    )  # in time, all are seen
    uneven = dataset.Mixture(np.array([0] * 60 + [1] * 41), {0: 1, 1: 1}, 7)
    assert all(len(set(uneven.rows(e).tolist())) == 82 for e in range(5))
    reference = steps(6, 1, 1, 333, 2, mixture=mixture)
    assert steps(3, 1, 2, 333, 2, mixture=mixture) == reference
    with pytest.raises(RunError, match="source 2 of the mixture"):
        dataset.Mixture(groups[:300], {0: 1, 1: 1}, 1)


def test_collate():
    def sample(*ids):
        return np.array(ids, np.int32), np.array(ids, np.int64)

    batch = dataset.collate([[sample(1, 2, 3), sample(4, 5)], [sample(6)]], 9, 7)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9], [6, 9, 9, 9, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100], [-100] * 7]
    assert (
        batch["cu_seq_lens"].tolist() == [0, 3, 7, 14]
        and batch["max_length"] == 7
        and batch["tokens"] == 6
    )


def test_evaluation_covers_every_row_once(tokenizer, rows_file):
    rows, _ = samples(tokenizer, rows_file[1])
    for world in (1, 2, 3, 4):
        turns = [dataset.evaluation_batches(rows, 2, r, world) for r in range(world)]
        assert len({len(t) for t in turns}) == 1
        assert sorted(i for t in turns for batch in t for i in batch) == list(range(len(rows)))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral", "Gemma2", "GPTNeoX", "Phi3"])
def test_decoder_layers_are_found_by_structure(kind):
    import transformers

    from trainer.modeling.load import decoder_layers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layers = decoder_layers(model)
    assert len(layers) == 3 and "Layer" in type(layers[0]).__name__
