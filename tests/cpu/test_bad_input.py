"""Bad input ends with exit code 2 and a message that says what is wrong, found and needed.

It ends before torch is imported, where torch is not needed to see the mistake.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT, train, write_rows

JSON = {
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
    }
}


def quick(*flags, env=None):
    """Run launch/train.py. Return (exit code, output, whether torch was imported)."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "launch/train.py", *map(str, flags)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return (
        done.returncode,
        "\n".join(lines),
        "| torch\n" in done.stderr or "|   torch\n" in done.stderr,
    )


CONFIG_FAULTS = {
    "zero_optimisation": ({"zero_optimisation": {"stage": 3}}, "did you mean zero_optimization"),
    "que_depth": ({**JSON, "aio": {"que_depth": 8}}, "did you mean queue_depth"),
    "lots": ({**JSON, "aio": {"queue_depth": "lots"}}, "lots"),
    "no path": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "nvme_path",
    ),
    "stage 2": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
        "stage 3",
    ),
    "auto": ({**JSON, "steps_per_print": "auto"}, "auto"),
}


@pytest.mark.parametrize("case", CONFIG_FAULTS)
def test_config(tmp_path, case):
    content, word = CONFIG_FAULTS[case]
    (tmp_path / "c.json").write_text(json.dumps(content))
    code, output, torch = quick("--deepspeed", tmp_path / "c.json")
    assert (code, torch) == (2, False) and word in output, output


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lerning_rate", "1"], ["did you mean --learning_rate"]),
        (["--model_name_or_path", "/nowhere/model"], ["/nowhere/model", "config.json"]),
        (["--dataset", "/nowhere/rows.jsonl"], ["/nowhere/rows.jsonl"]),
        (["--deepspeed", "ds_z4.json"], ["ds_z4.json", "deepspeed_configs", "did you mean"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--use_cpu", "false"], ["CUDA"]),
        (["--tf32", "true"], ["CUDA"]),
        (["--fp16"], ["fp16", "GPU"]),
        (["--precision", "fp8"], ["fp8"]),
        (["--deepspeed", "ds_z3_nvme.json", "--nvme_path", "/proc/swap"], ["/proc/swap"]),
        (["--resume_from_checkpoint", "auto"], ["needs to know the run", "--run_name"]),
        (["--save_total_limit", "1"], ["at least 2"]),
        (["--max_shard_size", "big"], ["max_shard_size"]),
        (["--run_name", "../x"], ["run_name"]),
    ],
)
def test_flags(flags, words):
    code, output, torch = quick(*flags, env={"CUDA_VISIBLE_DEVICES": ""})
    assert (code, torch) == (2, False), output
    assert all(word in output for word in words), output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"instruction": "a", "output": "b"}, {"instruction": "c"}], [":2: no output"]),
        ([], ["no rows"]),
    ],
)
def test_rows(tmp_path, rows, words):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    code, output, torch = quick("--dataset", path)
    assert (code, torch) == (2, False) and all(w in output for w in words), output


def test_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    code, output, _ = quick("--output_dir", tmp_path)
    assert code == 2 and "holds a run already" in output


def test_help_is_quick():
    code, _, torch = quick("--help")
    assert code == 0 and not torch


def test_every_label_masked(tiny_model, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "word " * 200, "output": "b"}] * 3)
    flags = ["--model_name_or_path", tiny_model, "--dataset", path, "--max_length", 64]
    run = train(tmp_path / "run", *flags)
    assert run.code == 2 and "0 trainable tokens in 3 rows" in run.output, run.output


def test_unknown_target_module(tiny_model, tmp_path):
    lora = ["--method", "lora", "--lora_target_modules", "q_prj"]
    run = train(tmp_path / "run", "--model_name_or_path", tiny_model, *lora)
    assert run.code == 2 and "did you mean q_proj" in run.output, run.output


def test_launcher_keeps_the_exit_code(tmp_path):
    run = train(tmp_path / "run", "--lerning_rate", "1", ranks=2)
    assert run.code == 2 and run.output.count("did you mean --learning_rate") == 1, run.output


def test_locked_memory(tiny_model, tmp_path):
    def little():
        # PR_CAPBSET_DROP CAP_IPC_LOCK, so that root too has a limit
        ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**20, 2**20))

    nvme = ["--deepspeed", "ds_z3_nvme.json", "--nvme_path", tmp_path / "swap"]
    flags = ["--model_name_or_path", tiny_model, *nvme]
    run = train(tmp_path / "run", *flags, preexec_fn=little)
    assert run.code == 3, run.output
    assert "locked memory is too small" in run.output and "ulimit -l" in run.output, run.output
    assert not list((tmp_path / "swap").iterdir())
