"""Rows that are longer than a model's table of positions are refused; others are told."""

import pytest
import torch
import transformers

from trainer.errors import RunError
from trainer.modeling import positions


def skeleton(kind, **shape):
    sizes = {"vocab_size": 300, "max_position_embeddings": 128, "num_hidden_layers": 1}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, f"{kind}Config")(**{**sizes, **shape})
        )


@pytest.mark.parametrize(
    ("kind", "shape", "named"),
    [
        ("GPT2", {}, "transformer.wpe"),
        ("OPT", {"pad_token_id": 0}, "embed_positions"),
        ("GPTJ", {}, "embed_positions"),
        ("BioGpt", {}, "embed_positions"),
        ("Roberta", {"max_position_embeddings": 130, "pad_token_id": 1}, "position_embeddings"),
    ],
)
def test_tables(kind, shape, named):
    model = skeleton(kind, **shape)
    assert positions.check(model, 128) is None
    with pytest.raises(RunError, match=named) as error:
        positions.check(model, 129)
    assert "--max_length 128" in str(error.value.fix) and error.value.code == 2


def test_adapters_around_the_model():
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = get_peft_model(
            skeleton("OPT", pad_token_id=0), LoraConfig(target_modules=["q_proj"])
        )
    with pytest.raises(RunError, match="OPTForCausalLM"):
        positions.check(model, 129)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
def test_positions_without_a_table(kind):
    assert "max_position_embeddings" in positions.check(skeleton(kind), 129)


def test_a_model_without_a_limit():
    with torch.device("meta"):
        model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=300, n_layer=1))
    assert positions.check(model, 10**6) is None


def test_a_table_of_words_is_none_of_positions():
    assert positions.check(skeleton("Llama", vocab_size=128), 4096)
