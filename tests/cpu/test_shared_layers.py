"""A weight of several decoder layers: its gradient comes when the last of them is through."""

import json

import hjson
import pytest
from conftest import ROOT, inputs, make_tokenizer, only, train

FLAGS = (
    "--precision fp32 --max_length 64 --learning_rate 1e-3 --max_steps 3 --max_grad_norm 0.5"
    " --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --eval_strategy no"
    " --eval_on_start false --export false --save_strategy no"
).split()
MODULES = ("fused_loss", "fused_linear", "fused_step", "resident_weights")
LAYERS = only(*MODULES, "leaf_modules")


@pytest.fixture(scope="module")
def zamba(tmp_path_factory):
    """Save a tiny Zamba 2 of four layers, of which two share an attention and an MLP."""
    import torch
    from transformers import Zamba2Config, Zamba2ForCausalLM

    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[1, 3],
        num_mem_blocks=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_mamba_heads=8,
        mamba_headdim=16,
        mamba_d_state=16,
        chunk_size=16,
        use_mamba_kernels=False,
    )
    folder = tmp_path_factory.mktemp("zamba")
    Zamba2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def bucket(folder):
    """A configuration whose gradients go through DeepSpeed's bucket, which is always full."""
    config = hjson.loads((ROOT / "deepspeed_configs" / "ds_z3_offload.json").read_text())
    config["zero_optimization"] |= {"reduce_bucket_size": 1000, "reduce_scatter": False}
    path = folder / "bucket.json"
    path.write_text(hjson.dumpsJSON({**config, "gradient_predivide_factor": 2.0}))
    return path


def test_gradients_of_shared_layers(zamba, rows_file, tmp_path):
    cases = {
        "each module by itself": only(*MODULES),
        "each layer as a whole": LAYERS,
        "one layer kept": [*LAYERS, "--kept_layers", 1],
        "through the bucket": [*LAYERS, "--deepspeed", bucket(tmp_path)],
    }
    norms = {}
    for i, (name, flags) in enumerate(cases.items()):
        run = train(tmp_path / str(i), *inputs(zamba, rows_file, tmp_path), *FLAGS, *flags)
        assert run.code == 0, run.output[-4000:]
        rows = map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
        norms[name] = [row["grad_norm"] for row in rows if "grad_norm" in row]
    expected = norms.pop("each module by itself")
    assert len(expected) == 3
    for name, found in norms.items():
        assert found == pytest.approx(expected, rel=1e-4), (name, norms, expected)
