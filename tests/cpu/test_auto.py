"""`--deepspeed auto`, and the comparison of a run with its plan."""

import json

import pytest

FLAGS = [
    "--max_steps",
    9,
    "--eval_strategy",
    "no",
    "--eval_on_start",
    "false",
    "--export",
    "false",
    "--save_strategy",
    "no",
    "--max_length",
    64,
    "--precision",
    "fp32",
]


def test_chosen_and_compared(trains):
    """The rows of a step stay what was given; plan.json and the table have plan and measurement."""
    run = trains(
        "auto",
        *FLAGS,
        "--deepspeed",
        "auto",
        "--per_device_train_batch_size",
        3,
        "--gradient_accumulation_steps",
        2,
    )
    assert "chosen" in run.output and "= 6 rows" in run.output and len(run.losses) == 9
    assert "RAM peak, GiB" in run.output and "planned" in run.output
    plan = json.loads((run.directory / "plan.json").read_text())
    assert plan["measured"]["host_bytes"] > 0 and plan["measured"]["step_s"] > 0
    assert plan["error"]["host_bytes"] == pytest.approx(
        plan["measured"]["host_bytes"] / plan["predicted"]["host_bytes"] - 1, abs=1e-3
    )
    assert abs(plan["error"]["host_bytes"]) < 0.25
    chosen = json.loads((run.directory / "resolved_ds_config.json").read_text())
    assert chosen["train_batch_size"] == 6 and chosen["zero_optimization"]["stage"] == 3


def test_nvme_is_counted(trains):
    run = trains(
        "nvme",
        *FLAGS,
        "--deepspeed",
        "ds_z3_nvme_optimizer.json",
        "--per_device_train_batch_size",
        2,
    )
    plan = json.loads((run.directory / "plan.json").read_text())
    assert plan["predicted"]["nvme_bytes"] > 0 and abs(plan["error"]["nvme_bytes"]) < 0.1


def test_two_ranks_choose_alike(trains):
    run = trains("two", *FLAGS, "--deepspeed", "auto", "--per_device_train_batch_size", 2, ranks=2)
    assert "2 rank(s) x 2 rows" in run.output and len(run.losses) == 9
    plan = json.loads((run.directory / "plan.json").read_text())
    assert abs(plan["error"]["host_bytes"]) < 0.25  # both processes are counted


def test_nothing_fits(trains, tmp_path):
    """Llama-3-405B in the RAM of this machine: exit code 3 before torch, with what would fix it."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "405b")
    run = trains(
        "405b",
        *FLAGS,
        "--deepspeed",
        "auto",
        "--model_name_or_path",
        tmp_path / "405b",
        "--random_weights",
        code=3,
    )
    assert (
        "no configuration fits this machine" in run.output
        and "GB of RAM short" in run.output
        and "needed:" in run.output
    )
