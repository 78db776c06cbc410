"""The fused linear layers against PEFT and torch: same losses and gradients, one product less."""

import pytest
import torch

from trainer.modeling import linear


def make(method="lora", kind="Llama", **changes):
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "use_cache": False,
    }
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**shape)
    )
    if method == "lora":
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **changes)
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def step(model):
    ids = torch.arange(48).reshape(2, 24) % 64
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def decoder(model):
    from trainer.modeling.load import decoder_layers

    return decoder_layers(model)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])  # Qwen2 has biases
@pytest.mark.parametrize("method", ["lora", "full"])
def test_same_gradients(method, kind):
    model = make(method, kind)
    loss, gradients = step(model)
    assert linear.install(decoder(model), leaf=True) == 14
    fused_loss, fused = step(model)
    assert fused_loss == pytest.approx(loss, abs=1e-6)
    assert fused.keys() == gradients.keys() and len(fused) >= 14
    for name, gradient in gradients.items():
        assert torch.allclose(fused[name], gradient, atol=1e-6, rtol=1e-4), name


def test_the_last_matrix_is_not_recomputed():
    """The down projection is multiplied in the forward and backward pass, not recomputed."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make("full")
    linear.install(decoder(model), leaf=True)
    counts = {}
    for skipped in (False, True):
        with FlopCounterMode(display=False) as counter:
            for layer in decoder(model):
                layer.gradient_checkpointing = not skipped
            step(model)
        counts[skipped] = counter.get_total_flops()
    tokens = 48
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 96  # all matrices but the last
    attention = counts[False] - counts[True] - 2 * 2 * tokens * layer
    assert 0 <= attention < 2 * 2 * tokens * 32 * 96  # less than the last matrices would have cost


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}]
)
def test_what_it_does_not_compute_is_left_alone(changes):
    model = make(**changes)
    before = [m.forward for layer in decoder(model) for m in layer.modules()]
    assert linear.install(decoder(model), leaf=True) == 0
    assert [m.forward for layer in decoder(model) for m in layer.modules()] == before


def test_adapters_need_the_whole_layer():
    assert linear.install(decoder(make()), leaf=False) == 0


def test_what_plain_layers_allow():
    """A result changed in place, as OLMo's clip_qkv does, and an expert without tokens."""
    layer = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6)})
    assert linear.install([layer], leaf=True) == 1
    for shape in ((2, 3, 4), (0, 4), (5, 4)):
        x = torch.randn(shape, requires_grad=True)
        y = layer["q"](x)
        y.clamp_(-0.1, 0.1)
        layer.zero_grad()
        y.sum().backward()
        weight, inputs = layer["q"].weight.grad.clone(), x.grad.clone()
        layer.zero_grad()
        x.grad = None
        plain = torch.nn.functional.linear(x, layer["q"].weight, layer["q"].bias)
        plain.clamp(-0.1, 0.1).sum().backward()
        assert torch.allclose(weight, layer["q"].weight.grad) and torch.allclose(inputs, x.grad)


def test_no_gradient_means_the_plain_layer():
    model = make().eval()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        linear.install(decoder(model), leaf=True)
        assert torch.equal(model(input_ids=ids).logits, plain)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma", "Olmo2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_kept_layers_make_inputs_again(method, kind):
    """Same bits as where a layer is recomputed, which saves its inputs, and less is kept."""
    model = make(method, kind)
    linear.install(decoder(model), leaf=True)
    loss, gradients = step(model)
    for layer in decoder(model):
        layer.gradient_checkpointing = False
    kept_loss, kept = step(model)
    assert kept_loss == loss and kept.keys() == gradients.keys()
    assert all(torch.equal(kept[name], gradient) for name, gradient in gradients.items())


def kept_elements(model):
    """Elements of a token that a layer keeps: the difference that a second layer makes."""
    sizes, weights = [], {p.untyped_storage().data_ptr() for p in model.parameters()}
    for layers in (decoder(model)[:1], decoder(model)):
        seen = {}

        def pack(tensor, seen=seen):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage, storage.nbytes() // tensor.itemsize
            return tensor

        hidden = torch.randn(2, 24, 32, requires_grad=True)
        position = torch.arange(24)[None]
        rope = model.model.rotary_emb(hidden, position)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for layer in layers:
                hidden = layer(hidden, position_embeddings=rope)
        sizes.append(sum(size for _, size in seen.values()))
    return (sizes[1] - sizes[0]) / 48


def test_inputs_that_are_made_again_are_not_kept():
    model = make("full")
    for layer in decoder(model):
        layer.gradient_checkpointing = False
    before = kept_elements(model)
    linear.install(decoder(model), leaf=True)
    after = kept_elements(model)
    # What goes into the attention's maps and the MLP's, and what comes out of the gate.
    assert before - after == 2 * 32 + 96, (before, after)


def test_an_input_that_changes_in_place_between_two_maps():
    """The second map's is another tensor's: what was known of the first does not hold for it."""
    layer = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    layer.gradient_checkpointing = False
    x, scale = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)

    def gradients():
        layer.zero_grad()
        h = x * scale
        first = layer["a"](h.clone() if plain else h)
        h += 1
        (first + layer["b"](h)).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    plain = True
    expected = gradients()
    linear.install([layer], leaf=True)
    plain = False
    assert all(map(torch.allclose, gradients(), expected))
