"""The chunked loss against torch's own, values and gradients, and its memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trainer.modeling import loss as losses


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_values_and_gradients(monkeypatch, bias, chunk_rows):
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk_rows * 4 * 50)
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    offset = torch.randn(50, requires_grad=True) if bias else None
    labels = torch.randint(0, 50, (3, 20))
    labels[:, :9] = -100
    leaves = [t for t in (hidden, weight, offset) if t is not None]
    total, correct_tokens = losses.cross_entropy_sum(hidden, weight, offset, labels)
    ours = torch.autograd.grad(total * 0.37, leaves)
    logits = torch.nn.functional.linear(hidden, weight, offset)[:, :-1].reshape(-1, 50)
    plain = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    theirs = torch.autograd.grad(plain * 0.37, leaves)
    assert total.item() == pytest.approx(plain.item(), rel=1e-5)
    assert int(correct_tokens) == int((logits.argmax(-1) == labels[:, 1:].reshape(-1)).sum())
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-5)


def test_nothing_to_predict_keeps_the_graph():
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    total, _ = losses.cross_entropy_sum(hidden, weight, None, torch.full((1, 4), -100))
    total.backward()
    assert total.item() == 0 and hidden.grad.abs().sum() == 0


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_to_predict_in_fp16(grad):
    """Values whose sum fp16 does not hold; also a validation batch of a rank without rows."""
    hidden = torch.full((1, 40, 80), 6e4, dtype=torch.float16, requires_grad=True)
    weight = torch.full((50, 80), -6e4, dtype=torch.float16, requires_grad=True)
    with torch.set_grad_enabled(grad):
        total, correct_tokens = losses.cross_entropy_sum(
            hidden, weight, None, torch.full((1, 40), -100)
        )
    assert total.item() == 0 and correct_tokens.item() == 0
    if grad:
        total.backward()
        assert hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_never_more_than_one_chunk_of_logits(monkeypatch):
    seen = []
    plain = torch.logsumexp
    monkeypatch.setattr(
        torch, "logsumexp", lambda t, *a, **k: seen.append(t.numel() * 4) or plain(t, *a, **k)
    )
    losses.cross_entropy_sum(
        torch.randn(4, 600, 4), torch.randn(128256, 4), None, torch.zeros(4, 600, dtype=torch.long)
    )
    assert len(seen) > 1 and max(seen) <= losses.CHUNK_BYTES <= 2**30


def test_head_of_a_model():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 64, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    expected = losses.whole_logits(model, inputs)
    head = losses.ChunkedHead.install(model)
    assert [float(v) for v in head(model, inputs)] == pytest.approx(
        [float(v) for v in expected], rel=1e-5
    )
    assert model(ids).logits.shape == (2, 12, 64)  # without labels the head is what it was
