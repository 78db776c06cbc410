"""The router's auxiliary loss: what transformers adds to the loss of the labels, no more."""

import pytest
import torch

from data.dataset import IGNORED
from tests import moe_models
from trainer.modeling import experts
from trainer.modeling.loss import ChunkedHead, whole_logits
from trainer.modeling.router_loss import RouterLoss

COEFFICIENT = {"output_router_logits": True, "router_aux_loss_coef": 0.7}


def batch():
    ids = 3 + torch.arange(48).reshape(2, 24) * 7 % 90
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :9] = IGNORED
    labels[1, 18:], mask[1, 18:] = IGNORED, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe"])
def test_one_batch_is_what_transformers_computes(family):
    model, inputs = moe_models.make(family, **COEFFICIENT).train(), batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = model(**inputs, use_cache=False)
    expected.loss.backward()
    assert COEFFICIENT["router_aux_loss_coef"] * expected.aux_loss > 0.1
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    experts.install(model, leaf=True)
    # Granite scales its logits after the head.
    head = None if family == "granitemoe" else ChunkedHead.install(model)
    router_loss = RouterLoss.install(model)
    loss, _ = (head or whole_logits)(model, inputs)
    loss = (loss + router_loss.summed(inputs["labels"])) / inputs["labels"][:, 1:].ne(IGNORED).sum()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_only_where_the_configuration_asks_and_while_training():
    assert RouterLoss.install(moe_models.make("mixtral")) is None
    assert RouterLoss.install(moe_models.make("llama")) is None
    model = moe_models.make("mixtral", **COEFFICIENT)
    router_loss, inputs = RouterLoss.install(model), batch()
    with torch.no_grad():
        model(**inputs)
    assert router_loss.summed(inputs["labels"]) == 0.0
    model(**inputs)
    inputs["labels"].fill_(IGNORED)  # a micro-batch without labels weighs nothing
    assert router_loss.summed(inputs["labels"]) == 0.0
