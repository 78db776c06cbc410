"""The first forward pass proves whose logits are the head's, and whose packed samples are apart.

Each family is judged by its computation: nothing here or there knows it by name.
"""

import numpy as np
import pytest
import torch
import transformers
from conftest import inputs, make_tokenizer, samples, train

from data.dataset import collate
from tests.tiny import SHAPE
from trainer.errors import RunError
from trainer.modeling import loss as losses
from trainer.modeling.proof import TOKENS, proof_rows, prove

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
FALCON_H1 = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}


def make(kind, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batch(packing=False):
    return collate(proof_rows(np.arange(3, 200), packing, 128), 0)


def judged(model, packing=False):
    """What the proof says of the model's head; afterwards all is as before."""
    head = losses.ChunkedHead.install(model)
    before = model(batch()["input_ids"]).logits
    exact = prove(model, model, head, batch(packing))
    assert torch.equal(model(batch()["input_ids"]).logits, before)
    if head:
        # What the verdict means: the loss in chunks is that of the model's own logits.
        ids = batch()["input_ids"]
        inputs = {"input_ids": ids, "labels": ids}
        with torch.no_grad():
            chunked = float(head(model, inputs)[0])
            head.remove()
            whole = float(losses.whole_logits(model, inputs)[0])
        assert not exact or chunked == pytest.approx(whole, rel=1e-5)
    return head is not None and exact


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("GPT2", {}),
        ("Phi", {}),  # its head has a bias
        ("Cohere", {"logit_scale": 1.0}),
        ("Granite", {"logits_scaling": 1.0}),
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": None}),
        ("Mixtral", EXPERTS),
    ],
)
def test_heads_whose_logits_are_the_models(kind, changes):
    assert judged(make(kind, **changes))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("FalconH1", {**FALCON_H1, "lm_head_multiplier": 0.5}),
        ("Cohere", {"logit_scale": 0.5}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Gemma2", {"head_dim": 16}),
        ("RecurrentGemma", {"block_types": ["attention"]}),
    ],
)
def test_heads_that_are_not_the_end(kind, changes):
    model = make(kind, **changes)
    with torch.no_grad():  # larger logits: a cap at 30 changes small ones by little
        model.get_output_embeddings().weight.mul_(100)
    assert not judged(model)


class Llama(transformers.LlamaForCausalLM):
    """Changes its logits by `change`, whose name no list has."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def changed(change, model_class=Llama):
    torch.manual_seed(0)
    model = model_class(transformers.LlamaConfig(**SHAPE))
    model.change = change
    return model


def verdict(model):
    return prove(model, model, losses.ChunkedHead.install(model), batch())


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.000001,
        lambda logits: logits.clamp(-100, 100),
        lambda logits: 40 * torch.tanh(logits / 40),
        lambda logits: logits - logits.logsumexp(-1, keepdim=True),
        lambda logits: torch.cat([logits[..., :-1], logits[..., -1:] - 50], -1),
        lambda logits: logits.bfloat16(),
        lambda logits: logits.flip(-1),
        lambda logits: logits.roll(1, dims=1),
        lambda logits: logits[..., :250],
    ],
)
def test_any_change_is_seen(change):
    assert verdict(changed(lambda logits: logits))
    assert not verdict(changed(change))


def test_a_head_that_is_not_called_or_twice():
    class Around(Llama):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0 * self.lm_head(output.logits @ self.lm_head.weight)
            return output

    assert not verdict(changed(lambda logits: logits, Around))
    model = changed(lambda logits: logits)
    plain = model.lm_head.weight

    def beside(**inputs):
        hidden = model.model(inputs["input_ids"]).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=hidden @ plain.T)

    model.forward = beside
    assert not verdict(model)


def test_heads_of_another_class():
    class Scaled(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    class InDouble(torch.nn.Linear):
        def forward(self, input):
            return torch.nn.functional.linear(input.double(), self.weight)

    class Same(torch.nn.Linear):
        pass

    class WithMore(torch.nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.more = torch.nn.Parameter(torch.zeros(1))

    for head, expected in ((Scaled, False), (InDouble, False), (Same, True)):
        model = changed(lambda logits: logits)
        model.lm_head = head(64, 256)
        if head is InDouble:
            model.lm_head.double()
        assert verdict(model) is expected
    model.lm_head = WithMore(64, 256)
    assert losses.ChunkedHead.install(model) is None


def test_logits_of_the_last_token_only():
    with pytest.raises(RunError, match="logits of every token"):
        verdict(changed(lambda logits: logits[:, -1:]))


def test_a_trained_scale_that_is_still_one():
    """Its value changes nothing, so the probe cannot see it; the first backward graph does."""
    model = changed(lambda logits: logits)
    head = losses.ChunkedHead.install(model)
    inputs = {**batch(), "use_cache": False}
    inputs = {name: inputs[name] for name in ("input_ids", "labels")}
    head(model, inputs)[0].backward()
    scale = torch.nn.Parameter(torch.ones(()))
    model.change = lambda logits: logits * scale
    other = losses.ChunkedHead(model.lm_head, False)
    assert prove(model, model, other, batch())
    with pytest.raises(RunError, match="while it trains"):
        other(model, inputs)


# -- packing -------------------------------------------------------------------------------------
def test_rows():
    packs = proof_rows(np.asarray([7, 7, 5, 9]), True, 4096)
    batch = collate(packs, 0)
    ids, positions = batch["input_ids"], batch["position_ids"]
    assert ids.shape == (4, TOKENS)
    assert (ids[0, :24] != ids[1, :24]).all() and torch.equal(ids[0, 24:], ids[1, 24:])
    assert torch.equal(ids[0], ids[2]) and torch.equal(ids[3, :8], ids[0, 24:])
    assert torch.equal(positions[3, :8], positions[0, 24:])
    assert collate(proof_rows(np.asarray([7]), True, 5), 0)["input_ids"].shape == (4, 5)
    assert collate(proof_rows(np.asarray([7]), False, 3), 0)["input_ids"].shape[0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("GPT2", {}),
        ("Gemma2", {"head_dim": 16}),
        ("Gemma3Text", {"head_dim": 16}),
        ("StableLm", {}),
        ("Mixtral", EXPERTS),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ],
)
def test_packed_samples_are_apart(kind, changes, dtype):
    model = make(kind, dtype, **changes)
    prove(model, model, None, batch(packing=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("GptOss", {**EXPERTS, "head_dim": 16}),
        ("FalconH1", FALCON_H1),
        ("Mamba", {}),
        ("Falcon", {}),
        ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
        ("Bloom", {"n_layer": 2, "n_head": 4}),
    ],
)
def test_packed_samples_that_see_each_other(kind, changes, dtype):
    model = make(kind, dtype, **changes)
    with pytest.raises(RunError, match="packing is not exact"):
        prove(model, model, None, batch(packing=True))


class Positions(transformers.LlamaForCausalLM):
    """Adds learned positions, counted from the begin of the row."""

    def forward(self, input_ids=None, **kwargs):
        table = torch.linspace(-1, 1, input_ids.shape[1])[:, None]
        embedded = self.model.embed_tokens(input_ids) + table
        return super().forward(inputs_embeds=embedded, **kwargs)


class Shifted(transformers.LlamaForCausalLM):
    """Mixes each hidden state with the one before it, after the layers."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        output.logits = self.lm_head(hidden + 0.1 * hidden.roll(1, dims=1))
        return output


@pytest.mark.parametrize("model_class", [Positions, Shifted])
def test_leaks_outside_the_layers(model_class):
    torch.manual_seed(0)
    model = model_class(transformers.LlamaConfig(**SHAPE))
    with pytest.raises(RunError, match="packing is not exact"):
        prove(model, model, None, batch(packing=True))


def test_layers_that_cannot_be_compared():
    model = make("Llama")
    model.config.num_hidden_layers = 1  # the second one is not called
    with pytest.raises(RunError, match="layer 1"):
        prove(model, model, None, batch(packing=True))


# -- runs ----------------------------------------------------------------------------------------
def run_of(model, rows_file, folder, *flags):
    """A run of the model, whose tokenizer is made here. Return it and its validation rows."""
    model.save_pretrained(folder / "model")
    tokenizer = make_tokenizer(folder / "model")
    done = train(
        folder / "run",
        *inputs(folder / "model", rows_file, folder),
        *"--precision fp32 --max_length 96 --max_steps 1 --export false".split(),
        *"--save_strategy no --deepspeed ds_z3_nvme.json".split(),
        *flags,
    )
    return done, samples(tokenizer, rows_file[1])[0]


def test_a_run_takes_whole_logits_where_it_must(rows_file, tmp_path):
    model = make("Cohere", vocab_size=512, logit_scale=4.0)
    run, rows = run_of(model, rows_file, tmp_path)
    assert run.code == 0 and "CohereForCausalLM changes its logits after the head" in run.output
    loss = tokens = 0.0
    for ids, labels in rows:
        ids, labels = torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(labels)[None]
        with torch.no_grad():
            total, _ = losses.whole_logits(model, {"input_ids": ids, "labels": labels})
        loss, tokens = loss + float(total), tokens + int((labels[:, 1:] >= 0).sum())
    assert run.evaluations[0]["eval_loss"] == pytest.approx(loss / tokens, abs=1e-4)


def test_a_packed_run_is_refused(rows_file, tmp_path):
    model = make("GptOss", **EXPERTS, vocab_size=512, head_dim=16)
    run, _ = run_of(model, rows_file, tmp_path, "--packing")
    assert run.code == 2 and "packing is not exact for GptOssForCausalLM" in run.output
    assert "layer 0" in run.output and "Traceback" not in run.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not run.steps
