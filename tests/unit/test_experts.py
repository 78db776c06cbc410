"""The experts' grouped products against transformers' and PEFT's own: same loss and gradients."""

from types import SimpleNamespace

import pytest
import torch

from tests import moe_models
from trainer.errors import RunError
from trainer.modeling import adapters, experts, load, skeleton
from trainer.plan.model_shapes import ModelSpec

GROUPED = sorted(set(moe_models.FAMILIES) - {"llama4_text"})


def with_adapters(model, targets, **changes):
    model = adapters.add_adapters(model, moe_models.settings(targets, **changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.enable_input_require_grads()
    return model


def assert_same(model, layers):
    model.train()
    loss, gradients = moe_models.step(model)
    assert experts.install(model, leaf=True) == layers
    again, after = moe_models.step(model)
    assert again == pytest.approx(loss, rel=1e-6) and after.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            after[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("targets", ["experts", "down_proj", None])
def test_same_as_w_plus_ba(family, targets):
    model = moe_models.make(family)
    if targets:
        model = with_adapters(model, targets)
    assert_same(model, 1 if hasattr(model.config, "first_k_dense_replace") else 2)


def test_with_checkpointing_and_an_expert_without_tokens():
    model = moe_models.make("qwen3_moe", num_experts=64)
    model = with_adapters(model, "all-linear,experts")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(model, 2)


def test_no_whole_stack_is_made(monkeypatch):
    """PEFT's wrapper adds B·A to all experts, with one baddbmm."""
    model = with_adapters(moe_models.make("mixtral"), "experts")
    experts.install(model, leaf=True)
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: pytest.fail("the whole stack is made"))
    monkeypatch.setattr(
        torch.nn.utils.parametrize,
        "register_parametrization",
        lambda *a, **k: pytest.fail("the whole stack is made"),
    )
    moe_models.step(model)


def test_without_the_adapter():
    model = with_adapters(moe_models.make("mixtral"), "experts").eval()
    experts.install(model, leaf=True)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad(), model.disable_adapter():
        disabled = model(ids).logits
    base = moe_models.make("mixtral").eval()
    with torch.no_grad():
        torch.testing.assert_close(disabled, base(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(experts._GROUPED is None, reason="torch has no grouped product")
def test_products_one_by_one_are_torchs():
    torch.manual_seed(0)
    rows, matrices = torch.randn(32, 16), torch.randn(5, 16, 24)
    ends = torch.tensor([4, 4, 20, 31, 32], dtype=torch.int32)
    expected = experts._GROUPED(rows, matrices, offs=ends)
    torch.testing.assert_close(experts.grouped_product(rows, matrices, ends), expected)
    outer = experts.grouped_outer(rows, expected, ends)
    assert outer.shape == (5, 16, 24) and not outer[1].any()
    torch.testing.assert_close(outer[2], rows[4:20].T @ expected[4:20])


def active(model):
    """Parameters that compute a token, as a run counts them."""
    return ModelSpec.from_description(skeleton.describe(model), "x").active


@pytest.mark.parametrize("targets", [None, "experts"])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "deepseek_v3", "mixtral"])
def test_active_parameters(family, targets):
    model = moe_models.make(family, "meta")
    stacks = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    everything = sum(p.numel() for p in model.parameters())
    k, count = {"llama4_text": (1, 4), "deepseek_v3": (2, 8)}.get(family, (2, 4))
    assert active(model) == everything - stacks + stacks * k // count
    if targets and family != "llama4_text":
        adapted = adapters.add_adapters(model, moe_models.settings(targets))
        added = sum(p.numel() for p in adapted.parameters()) - everything
        assert adapted.selection.active(4) == pytest.approx(added * k / count)


def test_active_parameters_of_a_dense_model():
    model = moe_models.make("llama", "meta")
    assert active(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "family, demanded, swiglu",
    [("mixtral", None, False), ("deepseek_v3", {"rope": True}, False), ("llama", None, None)],
)
def test_ligers_experts_do_not_run(family, demanded, swiglu):
    config = moe_models.make(family, "meta").config
    wanted = SimpleNamespace(liger_kernel_config=demanded)
    assert load.liger_kernels(wanted, config).get("swiglu") is swiglu


def test_ligers_experts_are_refused():
    wanted = SimpleNamespace(liger_kernel_config={"swiglu": True})
    with pytest.raises(RunError, match="swiglu"):
        load.liger_kernels(wanted, moe_models.make("mixtral", "meta").config)
    assert load.liger_kernels(wanted, moe_models.make("llama", "meta").config)["swiglu"]


@pytest.mark.parametrize("activation, geglu", [("gelu_pytorch_tanh", None), ("gelu", False)])
def test_ligers_gelu_is_the_one_by_tanh(activation, geglu):
    config = moe_models.make("gemma3_text", "meta", hidden_activation=activation, head_dim=8).config
    kernels = load.liger_kernels(SimpleNamespace(liger_kernel_config=None), config)
    assert kernels.get("geglu") is geglu and kernels["swiglu"] is False
