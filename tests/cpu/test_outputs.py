"""What a run leaves: its metrics, its evaluations and its export.

An evaluation does not depend on the batch. Plain transformers loads the export.
"""

import json
import math
import os
import stat
import subprocess
import sys

import pytest
from conftest import ROOT, make_tokenizer, samples

QUICK = ["--max_steps", 2, "--per_device_train_batch_size", 2]


def plain_evaluation(model_folder, data, max_length=96):
    """Return (mean loss, token accuracy) of the answers, row by row with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows, _ = samples(tokenizer, data, max_length)
    loss = correct_tokens = count = 0
    with torch.no_grad():
        for ids, labels in (rows[i] for i in range(len(rows))):
            labels = torch.tensor(labels[1:])
            logits = model(torch.tensor([ids.tolist()])).logits[0, :-1]
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            correct_tokens += int((logits.argmax(-1) == labels).sum())
            count += int((labels != -100).sum())
    return loss / count, correct_tokens / count


def test_full_run(trains, rows_file, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trains(
        "full",
        *QUICK,
        *"--per_device_eval_batch_size 3 --max_shard_size 3MB".split(),
        launcher=True,
        env={"WANDB_MODE": "offline"},
    )
    first, *_, last = run.evaluations
    assert len(run.evaluations) >= 3  # before, during, after
    for record, folder in ((first, tiny_model), (last, run.directory / "export")):
        loss, accuracy = plain_evaluation(folder, rows_file[1])
        assert record["eval_loss"] == pytest.approx(loss, abs=1e-4)
        assert record["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert record["eval_token_accuracy"] == pytest.approx(accuracy, abs=1e-5)
    for key in (
        "step loss learning_rate grad_norm tokens tokens_per_s_per_gpu model_tflops_per_gpu step_s "
        "data_wait_s forward_s backward_s optimizer_s host_rss_gib pinned_gib"
    ).split():
        assert all(key in s for s in run.steps), key
    assert all(
        s["forward_s"] > 0 and s["backward_s"] > 0 and s["optimizer_s"] > 0 for s in run.steps
    )
    for name in (
        "resolved_config.yaml",
        "resolved_ds_config.json",
        "versions.json",
        "heartbeat.json",
    ):
        assert (run.directory / name).is_file()
    assert json.loads((run.directory / "heartbeat.json").read_text())["phase"] == "done"
    assert '"auto"' not in (run.directory / "resolved_ds_config.json").read_text()
    assert list((run.directory / "wandb").glob("offline-run-*")) and "wandb sync" in run.output
    export = run.directory / "export"
    assert (export / "model.safetensors.index.json").is_file() and (
        export / "chat_template.jinja"
    ).is_file()
    assert "base_model" in (export / "README.md").read_text() and not list(
        run.directory.glob(".tmp-*")
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(export),
        AutoTokenizer.from_pretrained(export),
    )
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        assert (
            model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1]
            > inputs["input_ids"].shape[1]
        )


def test_evaluation_does_not_depend_on_the_batch(trains):
    runs = [
        trains(f"b{size}", "--max_steps", 1, "--per_device_eval_batch_size", size, *extra)
        for size, extra in ((1, []), (16, []), (4, ["--disable_optimizations", "fused_loss"]))
    ]
    for run in runs[1:]:
        for a, b in zip(runs[0].evaluations, run.evaluations):
            assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-5)
            assert a["eval_token_accuracy"] == b["eval_token_accuracy"]
    assert runs[0].losses == pytest.approx(runs[2].losses, abs=1e-5)


def test_export_is_exact(trains, tiny_model):
    import torch
    from safetensors.torch import load_file

    run = trains("still", *QUICK, "--learning_rate", 0, "--deepspeed", "ds_z3_nvme.json")
    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(run.directory / "export" / "model.safetensors"),
    )
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not list((run.directory.parent / "swap").iterdir())  # the run's swap files are gone


def test_a_model_keeps_its_special_tokens(trains, rows_file, tmp_path):
    """XGLM's table of positions depends on the token for padding; the tokenizer brings another."""
    import torch
    from transformers import XGLMConfig, XGLMForCausalLM

    torch.manual_seed(0)
    shape = {"d_model": 64, "ffn_dim": 128, "num_layers": 1, "attention_heads": 4}
    config = XGLMConfig(vocab_size=512, **shape, pad_token_id=5, layerdrop=0.0)
    XGLMForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    flags = ["--model_name_or_path", tmp_path / "model", "--learning_rate", 0]
    export = trains("xglm", *QUICK, *flags).directory / "export"
    config, generation = (
        json.loads((export / f"{name}.json").read_text())
        for name in ("config", "generation_config")
    )
    assert (config["pad_token_id"], generation["pad_token_id"]) == (5, 0)
    before = plain_evaluation(tmp_path / "model", rows_file[1])
    assert plain_evaluation(export, rows_file[1]) == before


def test_positions_that_begin_after_the_padding(trains, rows_file, tmp_path):
    import torch
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "vocab_size": 512, "initializer_range": 0.5}
    config = RobertaConfig(**shape, pad_token_id=0, is_decoder=True, max_position_embeddings=97)
    RobertaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    run = trains("roberta", "--model_name_or_path", tmp_path / "model", "--max_steps", 1)
    loss, _ = plain_evaluation(tmp_path / "model", rows_file[1])
    assert run.evaluations[0]["eval_loss"] == pytest.approx(loss, abs=1e-4)


def test_lora_and_merge(trains, tmp_path):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trains("lora", *QUICK, "--method", "lora", "--deepspeed", "ds_z3_nvme.json")
    export = run.directory / "export"
    assert (export / "adapter_model.safetensors").is_file() and not (
        export / "model.safetensors"
    ).exists()
    merge = [sys.executable, "launch/export.py", "--merge"]
    small = [*merge, run.directory, "--max_shard_size", "4MB"]
    done = subprocess.run(small, cwd=ROOT, capture_output=True, text=True, umask=0o27)
    assert done.returncode == 0, done.stderr
    weights = [p.stat() for p in (run.directory / "export-merged").glob("*.safetensors")]
    assert len(weights) > 2 and all(s.st_size < 4.1e6 for s in weights)
    assert {stat.S_IMODE(s.st_mode) for s in weights} == {0o640}
    tokenizer = AutoTokenizer.from_pretrained(export)
    inputs = tokenizer("hello there", return_tensors="pt")
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(export)(**inputs).logits
        merged = AutoModelForCausalLM.from_pretrained(run.directory / "export-merged")(
            **inputs
        ).logits
        base = AutoModelForCausalLM.from_pretrained(
            json.loads((export / "adapter_config.json").read_text())["base_model_name_or_path"]
        )(**inputs).logits
    assert torch.allclose(adapted, merged, atol=1e-4) and not torch.allclose(
        adapted, base, atol=1e-4
    )
    again = subprocess.run([*merge, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "no LoRA adapter" in again.stderr


@pytest.mark.skipif(os.environ.get("WANDB_API_KEY") is not None, reason="logged in")
def test_wandb_never_asks_and_never_fails(trains, tmp_path):
    blackhole = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "x" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    run = trains(
        "wandb",
        *"--max_steps 1 --per_device_train_batch_size 2 --eval_strategy no".split(),
        env=blackhole,
    )
    assert "done: 1 optimizer steps" in run.output
