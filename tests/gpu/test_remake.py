"""Liger's kernels make the inputs of linear layers again with the same bits."""

import pytest
import torch

from tests.unit.test_linear import decoder, make, step
from trainer.modeling import linear

pytest.importorskip("liger_kernel")


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_kept_layers_make_inputs_again(method, kind):
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = make(method, kind).to("cuda", torch.bfloat16)
    made = []
    real = linear.remake.of
    linear.remake.of = lambda tensor: made.append(real(tensor)) or made[-1]
    try:
        linear.install(decoder(model), leaf=True)
        # Later, as transformers' Trainer does it when training begins.
        _apply_liger_kernel_to_instance(model=getattr(model, "base_model", model))
        loss, gradients = step(model)
        for layer in decoder(model):
            layer.gradient_checkpointing = False
        kept_loss, kept = step(model)
    finally:
        linear.remake.of = real
    makers = {type(each.node).__name__ for each in made if each}
    assert {name for name in makers if name.startswith("LigerRMSNorm")}, makers
    assert {name for name in makers if "Mul" in name and name.startswith("Liger")}, makers
    assert kept_loss == loss and kept.keys() == gradients.keys()
    # Attention's gradients are sums in no order: its maps' are compared where they come before it.
    same = {name for name, gradient in gradients.items() if torch.equal(kept[name], gradient)}
    assert {name for name in gradients if "layers.1.mlp" in name} <= same
    for name, gradient in gradients.items():
        assert torch.allclose(kept[name], gradient, atol=1e-3, rtol=2e-2), name
