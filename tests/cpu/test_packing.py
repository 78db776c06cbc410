"""A packed sample gives the same as the sample alone: logits, losses, whole runs.

What cannot be exact is refused.
"""

import copy

import numpy as np
import pytest
import torch
import transformers
from conftest import samples

from data.dataset import collate
from trainer.config.settings import resolve
from trainer.errors import RunError
from trainer.modeling import attention

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 16},
    "Gemma2": {"sliding_window": 16, "head_dim": 16},
    "Phi3": {},
    "GPTNeoX": {},
    "Olmo2": {},
}


def make(kind, backend="sdpa", **changes):
    shape = {**SHAPE, **FAMILIES[kind], **changes}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape)
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=backend, dtype=torch.float32
    ).eval()


def make_packs(seed=0):
    """Two packs of samples of different lengths."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 512, n).astype(np.int32) for n in (40, 3, 31, 1, 77, 12)]
    rows = [(i, i.astype(np.int64)) for i in ids]
    return [rows[:3], rows[3:]]


def logits_apart(model, batch, packs):
    """Largest difference between packed logits and those of each sample alone."""
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        worst = 0.0
        for row, samples_of_pack in enumerate(packs):
            at = 0
            for ids, _ in samples_of_pack:
                alone = model(
                    input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False
                ).logits[0]
                worst = max(worst, float((packed[row, at : at + len(ids)] - alone).abs().max()))
                at += len(ids)
    return worst


@pytest.mark.parametrize(
    "kind, backend",
    [(k, "eager" if k == "Gemma2" else "sdpa") for k in FAMILIES] + [("Llama", "eager")],
)
def test_logits(kind, backend):
    packs = make_packs()
    batch = collate(packs, 0, 100)
    model = make(kind, backend)
    assert logits_apart(model, batch, packs) < 1e-4
    # The test can fail: one row of positions lets samples see each other.
    batch["position_ids"] = torch.arange(100)[None].expand(2, -1)
    assert logits_apart(model, batch, packs) > 1e-3


def test_gradients():
    packs = make_packs()
    model = make("Llama")
    batch = collate(packs, 0, 100)

    def gradients(batches):
        model.zero_grad()
        for b in batches:
            logits = model(
                input_ids=b["input_ids"], position_ids=b["position_ids"], use_cache=False
            ).logits
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="sum"
            ).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    samples_alone = [[s] for samples_of_pack in packs for s in samples_of_pack if len(s[0]) > 1]
    packed, alone = gradients([batch]), gradients([collate([s], 0) for s in samples_alone])
    assert torch.allclose(packed, alone, atol=1e-4) and packed.abs().max() > 1e-2


def settings(*flags):
    return resolve(["--model_name_or_path", "x", *flags])


def test_backends():
    model = make("Llama")
    assert attention.choose(model, settings(), False, "fp32") is None
    assert attention.choose(model, settings("--packing"), False, "fp32") is None
    assert (
        attention.choose(
            model, settings("--packing", "--attn_implementation", "eager"), False, "fp32"
        )
        == "eager"
    )
    for name in ("flash_attention_2", "flex_attention", "varlen"):
        with pytest.raises(RunError, match=name):
            attention.choose(
                model, settings("--packing", "--attn_implementation", name), False, "fp32"
            )
    assert (
        attention.choose(model, settings("--attn_implementation", "flex_attention"), False, "fp32")
        == "flex_attention"
    )


def test_models_that_mix_samples_are_refused():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    hybrid = copy.deepcopy(make("Llama"))
    hybrid.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    for model in (transformers.AutoModelForCausalLM.from_config(config), hybrid):
        with pytest.raises(RunError, match="packing is not exact"):
            attention.choose(model, settings("--packing"), False, "fp32")


def test_a_packed_run_is_the_unpacked_run(trains, rows_file, tiny_model):
    # All 60 rows in one optimizer step: packed or not, the same tokens, so the same loss, gradient
    # and next loss.
    from transformers import AutoTokenizer

    rows, _ = samples(AutoTokenizer.from_pretrained(tiny_model), rows_file[0], 256)
    flags = "--max_steps 3 --lr_scheduler_type constant --max_length 256 --deepspeed".split()
    plain = trains("plain", *flags, "ds_z3_offload.json", "--per_device_train_batch_size", 60)
    from data import pack

    count = int(pack.best_fit(rows.lengths, 256).max()) + 1
    packed = trains(
        "packed", *flags, "ds_z3_nvme.json", "--packing", "--per_device_train_batch_size", count
    )
    assert packed.losses == pytest.approx(plain.losses, abs=1e-4)
    assert [s["grad_norm"] for s in packed.steps] == pytest.approx(
        [s["grad_norm"] for s in plain.steps], rel=1e-3
    )
    assert [s["tokens"] for s in packed.steps] == [s["tokens"] for s in plain.steps]
    assert [e["eval_loss"] for e in packed.evaluations] == pytest.approx(
        [e["eval_loss"] for e in plain.evaluations], abs=1e-4
    )


def test_packed_ranks(trains):
    flags = ["--max_steps", 8, "--packing", "--max_length", 128]
    one = trains("one", *flags, "--per_device_train_batch_size", 4)
    two = trains(
        "two",
        *flags,
        *"--per_device_train_batch_size 1 --gradient_accumulation_steps 2".split(),
        ranks=2,
    )
    assert two.losses == pytest.approx(one.losses, abs=1e-3)
