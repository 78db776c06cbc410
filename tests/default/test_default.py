"""The default model with every configuration, full and LoRA, by the commands that a user types.

Measured are the time, the memory, and what the model has learnt.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = ["train-zero3", "train-zero3-gpu", "train-zero3-nvme-optimizer", "train-zero3-nvme"]
RATIO = {"full": 0.5, "lora": 0.7}  # validation perplexity after ÷ before
MINUTES, RSS_GIB = 8, 8


def peak_rss(process):
    """Largest RSS (GiB) of one process of the tree while it runs."""
    import psutil

    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        for child in root.children(recursive=True):
            try:
                peak = max(peak, child.memory_info().rss)
            except psutil.NoSuchProcess:
                pass
        time.sleep(0.5)
    return peak / 2**30


def answer(export, question):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    if (export / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(export)
    else:
        model = AutoModelForCausalLM.from_pretrained(export)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(
        out[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("target", TARGETS)
def test_default(target, method):
    name = f"test-{target}-{method}"
    run = ROOT / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    subprocess.run(["make", "setup-aio"], cwd=ROOT, check=True)
    began = time.time()
    (ROOT / "runs").mkdir(exist_ok=True)
    with open(ROOT / "runs" / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            ["make", target, f"METHOD={method}", f"RUN={name}"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "WANDB_MODE": "offline"},
        )
        peak = peak_rss(process)
    minutes = (time.time() - began) / 60
    assert process.returncode == 0, (ROOT / "runs" / f"{name}.log").read_text()[-4000:]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [r["eval_perplexity"] for r in records if "eval_perplexity" in r]
    said = answer(run / "export", "Define the noun 'garden'.")
    print(
        f"\n{target} {method}: {minutes:.1f} min, {peak:.2f} GiB, "
        f"perplexity {before:.2f} -> {after:.2f}, answer {said!r}"
    )
    assert after <= RATIO[method] * before
    assert len(said.split()) >= 3
    assert minutes <= MINUTES and peak <= RSS_GIB
    if "nvme" in target:
        for key in ("nvme_read_bytes", "nvme_written_bytes"):
            values = [r[key] for r in records if key in r]
            grow = [b > a for a, b in zip(values, values[1:])]
            # With LoRA nothing large is trained. The frozen weights are read, and written only
            # once.
            assert (
                all(grow)
                or (method == "lora" and target.endswith("optimizer"))
                or (method == "lora" and "written" in key)
            )
