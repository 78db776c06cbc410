"""A checkpoint that does not hold the model is refused before it is loaded, by name."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from trainer.errors import RunError
from trainer.modeling import weights

SHAPE = {
    **tiny.SHAPE,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture
def saved(tmp_path):
    """saved(kind, change of the file's weights, **change of config.json) → check of the folder."""

    def go(kind="Llama", change=None, shape=None, **config):
        torch.manual_seed(0)
        own = getattr(transformers, f"{kind}Config")(**{**SHAPE, **(shape or {})})
        transformers.AutoModelForCausalLM.from_config(own).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        if change:
            held = load_file(file)
            save_file(change(held) or held, file, {"format": "pt"})
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return weights.check(
            str(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path), "main", False
        )

    return go


def without(*names):
    return lambda held: {k: v for k, v in held.items() if not any(n in k for n in names)}


def with_more(**tensors):
    return lambda held: held.update({k.replace("__", "."): v for k, v in tensors.items()})


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("GPT2", {}),
        ("Gemma3Text", {"head_dim": 8, "tie_word_embeddings": True}),
        ("Mixtral", {"num_local_experts": 4}),
        ("GptOss", {"num_local_experts": 4, "head_dim": 8}),
    ],
)
def test_whole_checkpoints(saved, kind, shape):
    assert saved(kind, shape=shape) == []


def test_without_the_prefix_of_the_base_model(saved):
    strip = lambda held: {k.removeprefix("model."): v for k, v in held.items()}  # noqa: E731
    assert saved(change=strip) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("lm_head"), "lm_head.weight"),
        (without("layers.1.mlp"), "model.layers.1.mlp.down_proj.weight"),
        (without("model.norm"), "model.norm.weight"),
        (lambda held: {k.replace("model.", "decoder."): v for k, v in held.items()}, "and 15 more"),
    ],
)
def test_missing(saved, change, named):
    with pytest.raises(RunError, match="would stay random") as error:
        saved(change=change)
    assert named in str(error.value) and error.value.code == 2


def test_missing_experts(saved):
    with pytest.raises(RunError, match="experts"):
        saved("Mixtral", without("experts"), {"num_local_experts": 4})


def test_other_shapes(saved):
    with pytest.raises(RunError, match=r"gate_proj.weight: \[64, 32\]") as error:
        saved(intermediate_size=96)
    assert "[96, 32]" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1},
        {"change": with_more(model__layers__0__self_attn__q_proj__bias=torch.ones(32))},
        {"change": with_more(lm_head__bias=torch.ones(64))},
        {
            "change": with_more(
                base_model__model__model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(
                    2, 32
                )
            )
        },
        {"change": with_more(layers__9__mlp__up_proj__weight=torch.ones(2, 2))},
    ],
)
def test_weights_that_would_be_lost(saved, change):
    with pytest.raises(RunError, match="no place for"):
        saved(**change)


def test_other_parts_and_constants_are_left_out(saved):
    lines = saved(
        change=with_more(
            vision_tower__layers__0__weight=torch.ones(2, 2),
            vision_tower__layers__1__weight=torch.ones(2, 2),
            model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
            model__layers__0__self_attn__bias=torch.ones(1, 1, 8, 8, dtype=torch.bool),
            model__layers__0__self_attn__masked_bias=torch.tensor(-1e9),
        )
    )
    assert len(lines) == 1 and "vision_tower" in lines[0] and "(2)" in lines[0]


def test_a_head_of_its_own_that_the_configuration_ties(saved):
    with pytest.raises(RunError, match="lm_head.weight beside model.embed_tokens.weight"):
        saved(tie_word_embeddings=True)


def test_a_copy_of_the_tied_weight(saved):
    def copy(held):
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()

    assert saved(change=copy, tie_word_embeddings=True) == []


@pytest.mark.parametrize(
    ("kind", "named", "dtype"),
    [
        ("Llama", "model.layers.1.mlp.down_proj.weight", torch.int8),
        ("Llama", "lm_head.weight", torch.float8_e4m3fn),
        ("Mixtral", "model.layers.0.block_sparse_moe.experts.1.w1.weight", torch.uint8),
    ],
)
def test_quantized_weights_without_their_configuration(saved, kind, named, dtype):
    def quantize(held):
        held[named] = held[named].to(dtype)

    with pytest.raises(RunError, match="are quantized") as error:
        saved(kind, quantize, {"num_local_experts": 4} if kind == "Mixtral" else None)
    assert named in str(error.value) and error.value.code == 2


@pytest.mark.parametrize(
    ("file", "content"), [("model.safetensors.index.json", "{}"), ("pytorch_model.bin", "junk" * 9)]
)
def test_files_that_hold_no_weights(saved, tmp_path, file, content):
    saved()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text(content)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(RunError, match="cannot be loaded") as error:
        weights.check(str(tmp_path), config, "main", False)
    assert "KeyError" in str(error.value) and error.value.code == 2


def test_an_adapter_beside_the_weights(saved, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match="holds an adapter"):
        saved()


def test_a_run_from_a_checkpoint_with_a_hole(trains, tiny_model, tmp_path):
    """Before anything of it is loaded."""
    folder = shutil.copytree(tiny_model, tmp_path / "hole")
    held = without("layers.2.mlp")(load_file(folder / "model.safetensors"))
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    run = trains("run", "--model_name_or_path", folder, "--max_steps", 1, code=2)
    assert "would stay random" in run.output and "model.layers.2.mlp" in run.output
    assert "Traceback" not in run.output
