"""The losses are the same with every offload, number of ranks and micro-batch size.

They are those of a plain PyTorch loop.
"""

import json
import re

import pytest
from conftest import ROOT, inputs, make_model, make_tokenizer, samples, train
from safetensors.torch import load_file

from tests import moe_models

CONFIGS = ["ds_z3", "ds_z3_offload", "ds_z3_nvme_optimizer", "ds_z3_nvme"]
TEN = ["--max_steps", 10, "--per_device_train_batch_size", 4, "--lr_scheduler_type", "constant"]


def close(a, b, tolerance=1e-3):
    assert len(a) == len(b)
    assert max(abs(x - y) for x, y in zip(a, b)) <= tolerance, (a, b)


def plain_torch(model_folder, data, steps, batch, learning_rate, seed=42):
    """Train without DeepSpeed and Trainer, with the rows in the trainer's order.

    AdamW, gradients clipped at 1.0, the mean loss of the answers' tokens. Return (losses, norms).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.dataset import BatchSampler, collate

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows, _ = samples(tokenizer, data)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    batches = iter(BatchSampler(rows.lengths, batch, 1, 0, 1, seed))
    losses, norms = [], []
    for _ in range(steps):
        packs = [rows[pack] for pack in next(batches)]
        inputs = collate(packs, tokenizer.pad_token_id)
        # The usual padded call. The trainer leaves the mask out: no token sees the padding to its
        # right.
        width = inputs["input_ids"].shape[1]
        lengths = [len(pack[0][0]) for pack in packs]
        mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
        logits = model(input_ids=inputs["input_ids"], attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        )
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms


def test_four_configurations_and_plain_torch(trains, tiny_model, rows_file):
    expected, norms = plain_torch(tiny_model, rows_file[0], 10, 4, 1e-3)
    for config in CONFIGS:
        run = trains(config, *TEN, "--deepspeed", f"{config}.json")
        close(run.losses, expected)
        close([s["grad_norm"] for s in run.steps], norms)
        if "nvme" in config:
            read = [s["nvme_read_bytes"] for s in run.steps]
            written = [s["nvme_written_bytes"] for s in run.steps]
            # The first step has no states to read yet.
            assert all(b > a for a, b in zip(read, read[1:])), read
            assert all(b > a for a, b in zip(written, written[1:])) and written[0] > 0, written


def test_lora(trains):
    lora = [*TEN, "--method", "lora", "--lora_r", 8]
    runs = {config: trains(config, *lora, "--deepspeed", f"{config}.json") for config in CONFIGS}
    for run in runs.values():
        close(run.losses, runs["ds_z3"].losses)
        assert json.loads((run.directory / "export" / "adapter_config.json").read_text())["r"] == 8
    off = ["--disable_optimizations", "none,overlap_step,fetch_ahead"]
    leaf = trains("leaf", *lora, *off, "--gradient_checkpointing", "false")
    close(leaf.losses, runs["ds_z3"].losses)


def test_experts(trains, rows_file, tmp_path):
    folder = tmp_path / "experts"
    shape = {"vocab_size": 512, "max_position_embeddings": 512}
    moe_models.make("qwen2_moe", **shape).save_pretrained(folder)
    make_tokenizer(folder)
    flags = [*TEN, "--max_steps", 5, "--model_name_or_path", folder]
    expected, norms = plain_torch(folder, rows_file[0], 5, 4, 1e-3)
    full = trains("full", *flags)
    close(full.losses, expected)
    close([s["grad_norm"] for s in full.steps], norms, 1e-2)
    lora = [*flags, "--method", "lora", "--lora_target_modules", "all-linear,experts"]
    apart = trains("apart", *lora)
    assert "LoRA adapts experts (down_proj, gate_up_proj)" in apart.output
    off = ["--disable_optimizations", "none,overlap_step,fetch_ahead"]
    whole = trains("whole", *lora, *off, "--gradient_checkpointing", "false")
    close(whole.losses, apart.losses)
    half = ["--per_device_train_batch_size", 2]
    two = trains("full on two", *flags, *half, "--deepspeed", "ds_z3_nvme.json", ranks=2)
    close(two.losses, expected)
    close([s["grad_norm"] for s in two.steps], norms, 1e-2)
    close(trains("lora on two", *lora, *half, *off, ranks=2).losses, apart.losses)
    adapter = load_file(apart.directory / "export" / "adapter_model.safetensors")
    experts = {
        name: b for name, b in adapter.items() if ".mlp.experts." in name and "lora_B" in name
    }
    assert len(experts) == 4 and all(b.any() for b in experts.values())


@pytest.mark.parametrize(
    "method, checkpointing",
    [
        pytest.param("full", "false", marks=pytest.mark.long),
        pytest.param("full", "true", marks=pytest.mark.long),
        ("lora", "true"),
    ],
)
def test_nvme_look_ahead(trains, tmp_path, method, checkpointing):
    # Many small layers and a large tied embedding: the look-ahead passes the turn from forward to
    # backward, and the buffers are few.
    make_model(tmp_path / "deep", num_hidden_layers=12, tie_word_embeddings=True, vocab_size=8192)
    make_tokenizer(tmp_path / "deep")
    flags = [
        "--model_name_or_path",
        tmp_path / "deep",
        *"--max_steps 5 --per_device_train_batch_size 2".split(),
        "--method",
        method,
        "--gradient_checkpointing",
        checkpointing,
    ]
    close(
        trains("nvme", *flags, "--deepspeed", "ds_z3_nvme.json").losses,
        trains("cpu", *flags).losses,
    )


def test_accumulation(trains):
    whole = trains("whole", *TEN)
    parts = trains(
        "parts",
        *(
            "--max_steps 10 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 "
            "--lr_scheduler_type constant"
        ).split(),
    )
    close(whole.losses, parts.losses)
    close([s["grad_norm"] for s in whole.steps], [s["grad_norm"] for s in parts.steps])


@pytest.mark.parametrize(
    "config", [pytest.param("ds_z3_offload", marks=pytest.mark.long), "ds_z3_nvme"]
)
def test_two_ranks(trains, config):
    # 20 steps are more than one epoch of 60 rows, so the end of an epoch is covered too.
    one = trains(
        "one",
        *"--max_steps 20 --per_device_train_batch_size 4".split(),
        "--deepspeed",
        f"{config}.json",
    )
    two = trains(
        "two",
        *"--max_steps 20 --per_device_train_batch_size 2".split(),
        "--deepspeed",
        f"{config}.json",
        ranks=2,
    )
    close(one.losses, two.losses)
    for key in ("eval_loss", "eval_perplexity", "eval_token_accuracy"):
        assert [e[key] for e in two.evaluations] == pytest.approx(
            [e[key] for e in one.evaluations], rel=1e-3
        )


@pytest.mark.long
def test_jsons_of_other_trainers(tiny_model, rows_file, tmp_path):
    """The configurations of ten other projects train; ours is as they are where the batch is."""
    flags = [*inputs(tiny_model, rows_file, tmp_path), "--max_length", 96, "--max_steps", 3]
    paths = sorted((ROOT / "tests" / "data" / "deepspeed").glob("*.json"))
    runs = [
        train(tmp_path / f"run-{path.stem}", *flags, "--deepspeed", path)
        for path in (ROOT / "deepspeed_configs" / "ds_z3_offload.json", *paths)
    ]
    for run in runs:
        assert run.code == 0 and len(run.losses) == 3, run.output[-6000:]
    rows = [re.search(r"= \d+ rows", run.output)[0] for run in runs]
    same = [run for run, batch in zip(runs, rows) if batch == rows[0]]
    assert len(runs) == 11 and len(same) == 9
    for run in same:
        assert run.losses[0] == pytest.approx(runs[0].losses[0], abs=1e-2)  # bf16 in some
