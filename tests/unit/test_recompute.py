"""Inputs of recomputed layers that wait in RAM."""
import torch
from torch.utils.checkpoint import checkpoint

from trainer import recompute


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)
        self._gradient_checkpointing_func = checkpoint

    def forward(self, x):
        return self._gradient_checkpointing_func(lambda x: torch.tanh(self.linear(x)), x, use_reentrant=False)


def test_inputs_come_back(monkeypatch):
    from deepspeed.runtime.activation_checkpointing.offload_activations import _ActivationOffloadEngine as Engine

    moved, back = [], []
    plain_in, plain_out = Engine.offload_input, Engine.restore_input
    monkeypatch.setattr(Engine, "_should_skip", lambda self, tensor: False)  # on a CPU it leaves everything where it is
    monkeypatch.setattr(Engine, "offload_input", lambda self, t: moved.append(plain_in(self, t)) or moved[-1])
    monkeypatch.setattr(Engine, "restore_input", lambda self, key: back.append(key) or plain_out(self, key))
    torch.manual_seed(0)
    layers, said = [Layer() for _ in range(5)], []
    x = torch.randn(3, 16, requires_grad=True)

    def gradients():
        out = x
        for layer in layers:
            out = layer(out)
        return torch.autograd.grad(out.square().sum(), [x, *(p for layer in layers for p in layer.parameters())])

    before = gradients()
    recompute.offload_inputs(layers, said.append)
    for _ in range(3):
        for a, b in zip(before, gradients(), strict=True):
            assert torch.equal(a, b)
    assert moved == list(range(1, 16)) and back == [5, 4, 3, 2, 1, 10, 9, 8, 7, 6, 15, 14, 13, 12, 11]
    assert len(said) == 1 and "wait in RAM" in said[0]
