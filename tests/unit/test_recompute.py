"""Which layers keep their activations, and inputs of recomputed layers that wait in RAM."""

import torch
from torch.utils.checkpoint import checkpoint

from trainer.modeling import activations


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)
        self._gradient_checkpointing_func = checkpoint

    def forward(self, x):
        return self._gradient_checkpointing_func(
            lambda x: torch.tanh(self.linear(x)), x, use_reentrant=False
        )


def test_inputs_come_back(monkeypatch):
    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        _ActivationOffloadEngine as Engine,
    )

    moved, back = [], []
    plain_in, plain_out = Engine.offload_input, Engine.restore_input
    monkeypatch.setattr(
        Engine, "_should_skip", lambda self, tensor: False
    )  # on a CPU it leaves everything where it is
    monkeypatch.setattr(
        Engine, "offload_input", lambda self, t: moved.append(plain_in(self, t)) or moved[-1]
    )
    monkeypatch.setattr(
        Engine, "restore_input", lambda self, key: back.append(key) or plain_out(self, key)
    )
    torch.manual_seed(0)
    layers, said = [Layer() for _ in range(5)], []
    x = torch.randn(3, 16, requires_grad=True)

    def gradients():
        out = x
        for layer in layers:
            out = layer(out)
        return torch.autograd.grad(
            out.square().sum(), [x, *(p for layer in layers for p in layer.parameters())]
        )

    before = gradients()
    activations.offload_inputs(layers, said.append)
    for _ in range(3):
        for a, b in zip(before, gradients(), strict=True):
            assert torch.equal(a, b)
    assert moved == list(range(1, 16)) and back == [
        5,
        4,
        3,
        2,
        1,
        10,
        9,
        8,
        7,
        6,
        15,
        14,
        13,
        12,
        11,
    ]
    assert len(said) == 1 and "wait in RAM" in said[0]


def test_as_many_as_fit_and_fewer_where_the_allocator_runs_short(monkeypatch):
    """A GPU of 100 bytes of which 40 are held and 60 were at the peak; a layer keeps 4: (95 - 60) / 4 = 8 more than the one."""
    stats = {"active_bytes.all.current": 40, "active_bytes.all.peak": 60, "num_alloc_retries": 5}
    made = torch.tensor
    for name, value in {
        "memory_stats": lambda: stats,
        "mem_get_info": lambda: (20, 100),
        "memory_reserved": lambda: 80,
        "memory_allocated": iter([1000, 1004]).__next__,
        "reset_peak_memory_stats": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "tensor", lambda value, device=None: made(value))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    layers, said = [Layer() for _ in range(20)], []
    for layer in layers:
        layer.gradient_checkpointing = True
    kept = activations.KeptLayers(layers, "auto", 10, False, said.append)
    counts = []
    for update, more in enumerate([0, 0, 0, 0, 3, 2, 1, 1, 0, 0, 5, 5], 1):
        stats["num_alloc_retries"] += 7  # an evaluation's, which does not count
        kept.begin()
        if update == activations.MEASURED:
            layers[-1](torch.ones(1, 16))
        stats["num_alloc_retries"] += more
        kept.end(10)
        counts.append(sum(not layer.gradient_checkpointing for layer in layers))
    # Not in the update after a change, an eighth, rounded up, each time, and no longer than WATCHED updates after the last.
    assert counts == [0, 1, 1, 9, 9, 7, 7, 6, 6, 6, 5, 5]
    assert not layers[-1].gradient_checkpointing and layers[0].gradient_checkpointing
    assert len(said) == 4 and "9 of 20" in said[0] and "ran short 2 times, so 7" in said[1]
