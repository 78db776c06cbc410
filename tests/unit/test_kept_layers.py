"""Which layers keep their activations, and inputs of recomputed layers that wait in RAM."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trainer.engine.activation_offload import offload_inputs
from trainer.engine.kept_weights import KeptWeights
from trainer.errors import RunError
from trainer.modeling import kept_layers
from trainer.modeling.kept_layers import AUTO, SelectiveCheckpointing


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = checkpoint

    def forward(self, x):
        return self._gradient_checkpointing_func(
            lambda x: torch.tanh(self.linear(x)), x, use_reentrant=False
        )


def kept_by(layers):
    return [i for i, layer in enumerate(layers) if not layer.gradient_checkpointing]


def test_inputs_come_back(monkeypatch, capsys):
    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        _ActivationOffloadEngine as Engine,
    )

    moved, back = [], []
    plain_in, plain_out = Engine.offload_input, Engine.restore_input
    # On a CPU it leaves everything where it is.
    monkeypatch.setattr(Engine, "_should_skip", lambda self, tensor: False)
    monkeypatch.setattr(
        Engine, "offload_input", lambda self, t: moved.append(plain_in(self, t)) or moved[-1]
    )
    monkeypatch.setattr(
        Engine, "restore_input", lambda self, key: back.append(key) or plain_out(self, key)
    )
    torch.manual_seed(0)
    layers = [Layer() for _ in range(5)]
    x = torch.randn(3, 16, requires_grad=True)

    def gradients():
        out = x
        for layer in layers:
            out = layer(out)
        return torch.autograd.grad(
            out.square().sum(), [x, *(p for layer in layers for p in layer.parameters())]
        )

    before = gradients()
    offload_inputs(layers)
    for _ in range(3):
        for a, b in zip(before, gradients(), strict=True):
            assert torch.equal(a, b)
    assert moved == list(range(1, 16))
    # The backward pass takes the last layer's input first.
    assert back == [*range(5, 0, -1), *range(10, 5, -1), *range(15, 10, -1)]
    assert capsys.readouterr().out.count("wait in RAM") == 1


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 100 bytes, of which 40 are in use; 60 were at the peak. A layer keeps 4.

    So (95 - 60) / 4 = 8 layers more than the one fit.
    """
    stats = {"active_bytes.all.current": 40, "active_bytes.all.peak": 60, "num_alloc_retries": 5}
    for name, value in {
        "memory_stats": lambda: stats,
        "mem_get_info": lambda: (20, 100),
        "memory_reserved": lambda: 80,
        "memory_allocated": iter([1000, 1004]).__next__,
        "reset_peak_memory_stats": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(kept_layers, "all_gather_object", lambda value: [value])
    return stats


def test_as_many_as_fit_and_fewer_where_the_allocator_runs_short(gpu, capsys):
    layers = [Layer() for _ in range(20)]
    selective = SelectiveCheckpointing(layers, AUTO, 10, False)
    counts = []
    for step, retries in enumerate([0, 0, 0, 0, 3, 2, 1, 1, 0, 0, 5, 5], 1):
        gpu["num_alloc_retries"] += 7  # an evaluation's, which do not count
        selective.before_pass(True)
        if step == kept_layers.MEASURE:
            layers[-1](torch.ones(1, 16))
        gpu["num_alloc_retries"] += retries
        selective.after_pass(10, True)
        counts.append(len(kept_by(layers)))
    # Not in the step after a change; an eighth, rounded up, each time; and no longer than WATCHED
    # steps after the last change.
    assert counts == [0, 1, 1, 9, 9, 7, 7, 6, 6, 6, 5, 5]
    assert kept_by(layers) == [15, 16, 17, 18, 19]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and "9 of 20" in said[0] and "ran short 2 times, so 7" in said[1]
    layers[-1](torch.ones(1, 16))  # after the measurement nothing looks at the memory any more


def test_passes_of_long_optimizer_steps(gpu):
    """Of four micro-batches: measured where the second one is made, and watched after it."""
    layers = [Layer() for _ in range(20)]
    selective = SelectiveCheckpointing(layers, AUTO, 10, False)
    counts = []
    for micro_batch in range(24):
        last = micro_batch % 4 == 3
        selective.before_pass(last)
        if micro_batch == 7:
            layers[-1](torch.ones(1, 16))
        gpu["num_alloc_retries"] += micro_batch in (8, 12, 20)
        selective.after_pass(10, last)
        counts.append(len(kept_by(layers)))
    # The first pass after the change does not count, and those after three optimizer steps do not.
    assert counts == [0] * 4 + [1] * 3 + [9] * 5 + [7] * 8 + [6] * 4


def test_weights_stay_where_all_layers_fit(gpu, capsys):
    """Six layers leave 95 - 60 - 5 * 4 = 15 bytes, and the weights of one have 4."""
    layers, said = [Layer() for _ in range(6)], []
    weights = KeptWeights(layers, None, AUTO)
    assert weights.layer_bytes == 4 * (16 * 16 + 16)
    weights.layer_bytes = 4
    weights.keep_last = lambda count: said.append(count) or setattr(weights, "kept", count)
    selective = SelectiveCheckpointing(layers, AUTO, 10, False, weights)
    for step, retries in enumerate([0, 0, 0, 0, 0, 2, 0, 1, 0, 0], 1):
        selective.before_pass(True)
        if step == kept_layers.MEASURE:
            layers[-1](torch.ones(1, 16))
        gpu["num_alloc_retries"] += retries
        selective.after_pass(10, True)
    # They are the first to go.
    assert said == [3, 0] and len(kept_by(layers)) == 5
    assert "weights: 3 of 6 decoder layers" in capsys.readouterr().out
    with pytest.raises(RunError, match="more than there are"):
        KeptWeights(layers, None, 7)


@pytest.mark.parametrize("layers, moves, kept", [(20, True, 9), (6, False, 6)])
def test_no_weights_stay(gpu, layers, moves, kept):
    """Where layers are recomputed, and where none is fetched."""
    weights = KeptWeights([Layer()], None, AUTO)
    weights.layer_bytes, weights.moves = 4, moves
    selective = SelectiveCheckpointing([Layer() for _ in range(layers)], AUTO, 10, False, weights)
    for step in range(1, 8):
        selective.before_pass(True)
        if step == kept_layers.MEASURE:
            selective.layers[-1](torch.ones(1, 16))
        selective.after_pass(10, True)
    assert selective.kept == kept and weights.kept == 0


def test_a_number_stays():
    layers = [Layer() for _ in range(4)]
    selective = SelectiveCheckpointing(layers, 3, 10, False)
    assert kept_by(layers) == []
    for _ in range(9):
        selective.before_pass(True)
        selective.after_pass(10, True)
        assert kept_by(layers) == [1, 2, 3]
    with pytest.raises(RunError, match="more than there are"):
        SelectiveCheckpointing(layers, 5, 10, False)


def test_models_without_such_layers():
    selective = SelectiveCheckpointing([torch.nn.Linear(1, 1)], AUTO, 10, False)
    for _ in range(9):
        selective.before_pass(True)
        selective.after_pass(10, True)
