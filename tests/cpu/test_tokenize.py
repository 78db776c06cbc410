"""What is trained on, the order of rows, and the model's structure."""
import pytest
import torch
from transformers import AutoTokenizer

from data import DataError
from data.dataset import GlobalBatches, collate, evaluation_batches
from data.formats import Row
from data.tokenize import Tokens, prepare_tokenizer, tokenize, tokenize_row

CHAT = [{"role": "user", "content": "What is a dog?"}, {"role": "assistant", "content": "an animal"}]


def trained(tokenizer, messages, max_length=100):
    ids, labels, _ = tokenize_row(tokenizer, messages, max_length)
    assert all(label in (-100, token) for token, label in zip(ids, labels))
    return tokenizer.decode([label for label in labels if label != -100])


def test_answer_and_its_end_are_trained(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert trained(tokenizer, CHAT) == "an animal<|im_end|>"
    assert trained(tokenizer, [{"role": "system", "content": "s"}, *CHAT, *CHAT]) == "an animal<|im_end|>"
    assert trained(tokenizer, [CHAT[0], {"role": "assistant", "content": "\nx"}]) == "\nx<|im_end|>"


def test_template_of_our_own(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    assert len(prepare_tokenizer(tokenizer)) == 2
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == "### Instruction:\nWhat is a dog?\n\n### Response:\nan animal<|im_end|>"
    assert trained(tokenizer, CHAT) == "an animal<|im_end|>"


def test_truncation_is_counted(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    length = len(tokenize_row(tokenizer, CHAT, 1000)[0])
    rows, summary = tokenize(tokenizer, [Row(CHAT, 1), Row([{**CHAT[0], "content": "word " * 99}, CHAT[1]], 2)], length - 2, "d")
    assert (summary.rows, summary.truncated, summary.left_out) == (1, 2, 1) and len(rows[0].input_ids) == length - 2
    with pytest.raises(DataError, match="0 trainable tokens in 1 rows"):
        tokenize(tokenizer, [Row(CHAT, 1)], 5, "d")


def test_collate():
    batch = collate([Tokens([1, 2, 3], [-100, 2, 3], 1), Tokens([4], [4], 2)], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


@pytest.mark.parametrize("rows", [7, 16, 33])
def test_order_does_not_depend_on_the_ranks(rows):
    def updates(batch, accumulate, world):
        """Set of rows of each update."""
        ranks = [list(GlobalBatches(rows, batch, accumulate, r, world, 1)) for r in range(world)]
        count = len(ranks[0]) // accumulate
        parts = [[rank[u * accumulate:(u + 1) * accumulate] for rank in ranks] for u in range(count)]
        return [sorted(i for micros in part for micro in micros for i in micro) for part in parts]

    reference = updates(8, 1, 1)
    assert all(updates(*shape) == reference for shape in ((1, 8, 1), (2, 1, 4), (2, 2, 2), (4, 1, 2)))
    assert {i for update in reference for i in update} == set(range(rows))


def test_epochs_differ_and_repeat():
    batches = GlobalBatches(32, 4, 1, 0, 1, 1)
    first = list(batches)
    batches.set_epoch(1)
    assert list(batches) != first
    batches.set_epoch(0)
    assert list(batches) == first


def test_evaluation_covers_every_row_once():
    rows = [Tokens([0] * n, [0] * n, n) for n in range(1, 12)]
    for world in (1, 2, 3, 4):
        turns = [evaluation_batches(rows, 2, r, world) for r in range(world)]
        assert len({len(t) for t in turns}) == 1
        assert sorted(row.line for t in turns for batch in t for row in batch) == list(range(1, 12))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral", "Gemma2", "GPTNeoX", "Phi3"])
def test_decoder_layers_are_found_by_structure(kind):
    import transformers

    from trainer.model import decoder_layers

    config = getattr(transformers, f"{kind}Config")(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                                    num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layers = decoder_layers(model)
    assert len(layers) == 3 and "Layer" in type(layers[0]).__name__
