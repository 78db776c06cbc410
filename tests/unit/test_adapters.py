"""Which matrices have a LoRA adapter: the same meaning of --lora_target_modules in all families."""

import pytest
import torch

from tests import moe_models
from trainer.errors import RunError
from trainer.modeling.adapters import add_adapters, select

FAMILIES = [*moe_models.FAMILIES, "llama", "gpt2", "falcon", "mamba"]
CHANGES = {"gpt2": {"n_layer": 2, "n_head": 4}, "falcon": {"ffn_hidden_size": 64}}


def adapted(family, targets, **changes):
    model = moe_models.make(family, "meta", **CHANGES.get(family, {}))
    return add_adapters(model, moe_models.settings(targets, **changes))


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_leaves_out_experts_routers_and_head(family):
    model = adapted(family, "all-linear")
    names = trained(model)
    assert names and not any(".experts." in name for name in names)
    wrapped = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert not wrapped & {"gate", "router", "shared_expert_gate", "lm_head", "embed_out"}
    assert len(names) == 2 * len(model.selection.chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_what_mixes_tokens(family):
    names = trained(adapted(family, "attention"))
    part = {"gpt2": ".attn.", "falcon": ".self_attention.", "mamba": ".mixer."}
    assert names and all(part.get(family, ".self_attn.") in name for name in names)


def test_experts_and_a_sum_of_keywords():
    experts = trained(adapted("deepseek_v3", "experts"))
    assert experts and all(".mlp.experts." in name for name in experts)
    both = trained(adapted("deepseek_v3", "all-linear,experts"))
    assert both == experts | trained(adapted("deepseek_v3", "all-linear"))


@pytest.mark.parametrize(
    "family, part", [("qwen2_moe", ".shared_expert."), ("deepseek_v3", ".shared_experts.")]
)
def test_shared_experts_stay_what_they_are(family, part):
    """PEFT takes these names of DeepSeek-V3 for the routed experts of transformers 4."""
    names = trained(adapted(family, "gate_proj,up_proj"))
    assert any(part in name for name in names) and not any(".experts." in name for name in names)


def test_a_name_is_the_end_of_a_module_or_of_an_expert_matrix():
    assert {m.name for m in adapted("mixtral", "gate_up_proj").selection.chosen} == {
        f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)
    }
    assert len(adapted("llama", "layers.1.self_attn.q_proj,v_proj").selection.chosen) == 3


@pytest.mark.parametrize(
    "family, targets, words",
    [
        ("llama", "q_porj", ["not in the model", "did you mean q_proj"]),
        ("llama", "atention", ["did you mean attention"]),
        ("llama", ",", ["is empty"]),
        ("llama", "experts", ["none that can be adapted", "no experts"]),
        ("llama4_text", "experts", ["Llama4TextExperts", "all-linear"]),
        ("llama4_text", "router", ["router cannot be adapted", "routes tokens"]),
        ("phimoe", "q_proj,router", ["router cannot be adapted"]),
        ("qwen3_moe", "gate", ["gate cannot be adapted", "routes tokens"]),
        ("mamba", "out_proj", ["out_proj cannot be adapted", "reads its weight"]),
    ],
)
def test_refused_by_name(family, targets, words):
    with pytest.raises(RunError) as refused:
        adapted(family, targets)
    assert all(word in str(refused.value) for word in words), refused.value
    assert refused.value.code == 2


def test_what_peft_refuses_is_told_in_its_own_words():
    with pytest.raises(RunError, match="lora_dropout != 0") as refused:
        adapted("mixtral", "experts", lora_dropout=0.1)
    assert "--lora_dropout 0" in str(refused.value) and "not in the model" not in str(refused.value)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_adapters_on_tied_embeddings_are_refused(name):
    tied = moe_models.make("llama", "meta", tie_word_embeddings=True)
    with pytest.raises(RunError, match=f"{name}.*one tensor"):
        select(tied, f"q_proj,{name}")
    untied = moe_models.make("llama", "meta", tie_word_embeddings=False)
    assert len(select(untied, f"q_proj,{name}").chosen) == 3


def test_what_is_adapted_is_told():
    model = adapted("qwen2_moe", "all-linear")
    text = model.selection.report(4)
    assert "adapts attention (k_proj, o_proj, q_proj, v_proj): 1,792 parameters" in text
    assert "adapts dense (down_proj, gate_proj, up_proj): 1,728 parameters" in text
    assert "leaves out experts (down_proj, gate_up_proj; 18,432 parameters)" in text
    assert "--lora_target_modules all-linear,experts" in text
    assert "leaves out router (gate, shared_expert_gate" in text
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == 1792 + 1728


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_the_export_is_an_adapter_that_peft_reads_and_merges(family, tmp_path):
    from peft import PeftModel

    model = add_adapters(moe_models.make(family), moe_models.settings("all-linear,experts")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = torch.arange(3, 51).reshape(2, 24)
    with torch.no_grad():
        expected = model(ids).logits
        again = PeftModel.from_pretrained(moe_models.make(family), tmp_path).eval()
        assert (expected - again.get_base_model()(ids).logits).abs().max() < 1e-5
        merged = again.merge_and_unload()
        assert (expected - merged(ids).logits).abs().max() < 1e-5
        assert (expected - moe_models.make(family).eval()(ids).logits).abs().max() > 1e-3
