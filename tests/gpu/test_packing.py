"""Packed rows on a GPU: a packed sample against the sample alone.

In fp32 with a block mask, and in bf16 with variable-length kernels.
Run as a script for the times of the backends: python tests/gpu/test_packing.py
"""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from data import pack  # noqa: E402
from data.dataset import collate  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SHAPES = {"Llama": {}, "Qwen2": {}, "Mistral": {"sliding_window": 128}}


def make(kind, backend, dtype, layers=4, hidden=1024, heads=16, kv_heads=4):
    import transformers

    from trainer.modeling import attention

    transformers.AttentionInterface.register("varlen", attention.varlen_attention)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        pad_token_id=0,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        **SHAPES[kind],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=backend, dtype=torch.float32
    )
    return model.to("cuda", dtype).eval()


def make_packs(pack_length, count, seed=0):
    """`count` packs of samples with long-tailed lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(5.3, 0.9, count * 40), 8, pack_length).astype(int)
    rows = [rng.integers(3, 1024, n).astype(np.int32) for n in lengths]
    packs = pack.members(pack.best_fit(lengths, pack_length))
    return [[(rows[i], rows[i].astype(np.int64)) for i in p] for p in packs if len(p) > 1][:count]


def inputs_of(batch, varlen):
    inputs = {k: batch[k].cuda() for k in ("input_ids", "position_ids")}
    if varlen:
        borders = batch["cu_seq_lens"].cuda()
        longest = batch["max_length"]
        inputs.update(
            cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest
        )
    return inputs


def packed_logits(model, packs, pack_length, varlen):
    """Logits of every sample out of packed rows."""
    with torch.no_grad():
        out = model(**inputs_of(collate(packs, 0, pack_length), varlen), use_cache=False).logits
    result = []
    for row, samples in enumerate(packs):
        ends = np.cumsum([len(ids) for ids, _ in samples])
        result += [out[row, e - len(ids) : e].float() for e, (ids, _) in zip(ends, samples)]
    return result


def alone_logits(model, packs, varlen=False):
    """Logits of every sample alone."""
    with torch.no_grad():
        return [
            model(**inputs_of(collate([[s]], 0), varlen), use_cache=False).logits[0].float()
            for samples in packs
            for s in samples
        ]


def worst(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


def mean(a, b):
    return float(torch.cat([(x - y).abs().mean(1) for x, y in zip(a, b)]).mean())


@pytest.mark.parametrize("kind", SHAPES)
def test_fp32_block_mask(kind):
    torch.backends.cuda.matmul.allow_tf32 = False
    packs = make_packs(1024, 3)
    model = make(kind, "sdpa", torch.float32)
    assert worst(packed_logits(model, packs, 1024, False), alone_logits(model, packs)) < 1e-4


@pytest.mark.parametrize("kind", SHAPES)
def test_bf16_varlen(kind):
    # Against fp32, packed bf16 is as good as unpacked bf16.
    packs = make_packs(1024, 3)
    exact = alone_logits(make(kind, "sdpa", torch.float32), packs)
    plain = alone_logits(make(kind, "sdpa", torch.bfloat16), packs)
    varlen = packed_logits(make(kind, "varlen", torch.bfloat16), packs, 1024, True)
    assert mean(varlen, exact) <= 1.02 * mean(plain, exact), (
        mean(varlen, exact),
        mean(plain, exact),
    )
    assert worst(varlen, exact) <= 1.5 * worst(plain, exact), (
        worst(varlen, exact),
        worst(plain, exact),
    )


def test_bf16_varlen_gradients():
    packs = make_packs(1024, 2)
    batch = collate(packs, 0, 1024)

    def gradients(model, varlen):
        logits = model(**inputs_of(batch, varlen), use_cache=False).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten().cuda()
        ).backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])

    exact = gradients(make("Llama", "sdpa", torch.float32), False)
    plain = gradients(make("Llama", "sdpa", torch.bfloat16), False)  # the block mask in bf16
    varlen = gradients(make("Llama", "varlen", torch.bfloat16), True)
    assert (varlen - exact).norm() <= 1.05 * (plain - exact).norm()


def times():
    """Print the milliseconds of each backend: forward and backward of two 8B layers.

    Over 8 packed rows of 2,048 tokens.
    """
    packs = make_packs(2048, 8)
    batch = collate(packs, 0, 2048)
    for backend in ("varlen", "sdpa", "flex_attention"):
        model = make(
            "Llama", backend, torch.bfloat16, layers=2, hidden=4096, heads=32, kv_heads=8
        ).train()
        inputs = inputs_of(batch, backend == "varlen")
        try:
            for timed in (3, 10):
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(timed):
                    model(**inputs, use_cache=False).logits.sum().backward()
            torch.cuda.synchronize()
            milliseconds = (time.perf_counter() - began) * 100
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"{backend:15} {milliseconds:7.1f} ms, {peak:.1f} GiB", flush=True)
        except Exception as error:
            print(f"{backend:15} {type(error).__name__}: {str(error)[:200]}", flush=True)
        if backend == "flex_attention":
            with torch.no_grad():
                small = make_packs(1024, 3)
                model = make("Llama", backend, torch.bfloat16)
                exact = alone_logits(make("Llama", "sdpa", torch.float32), small)
                print(
                    "flex error against fp32:",
                    mean(packed_logits(model, small, 1024, False), exact),
                    flush=True,
                )
        del model
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    times()
