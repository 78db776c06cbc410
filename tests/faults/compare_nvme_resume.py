"""Resume with the optimizer on NVMe: stock DeepSpeed's checkpoint beside ours, on one tiny model.

    python tests/faults/compare_nvme_resume.py

Prints for both the losses of six optimizer steps, and of the last three of them after a resumption
from a checkpoint of the third.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import flags  # noqa: E402

STEPS, CUT = 6, 3
FLAGS = (
    f"--deepspeed ds_z3_nvme_optimizer.json --max_steps {STEPS} --save_steps {CUT} "
    "--validation_split 0 --max_length 96 --precision fp32 --learning_rate 1e-3 "
    "--per_device_train_batch_size 2 --export false --report_to none"
).split()


def stock(folder, name, resume):
    """Make six steps with plain DeepSpeed and call save_checkpoint at the third.

    resume: make the last three of them after load_checkpoint.
    """
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    device = {"device": "nvme", "nvme_path": str(folder / f"stock-{name}"), "buffer_count": 4}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": device,
            "offload_param": {"device": "cpu"},
            "sub_group_size": 1000000,
        },
    }
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    if resume:
        engine.load_checkpoint(folder / "stock-saved")
    for step in range(CUT if resume else 0, STEPS):
        ids = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(step))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        print(f"LOSS {loss.item():.6f}", flush=True)
        if step + 1 == CUT and not resume:
            engine.save_checkpoint(folder / "stock-saved")


def ours(folder, name, resume):
    command = [sys.executable, "launch/train.py", *FLAGS]
    command += flags(
        output_dir=folder / f"ours-{name}",
        model_name_or_path=folder / "model",
        dataset=ROOT / "data/samples/train.jsonl",
        nvme_path=folder / "swap",
    )
    if resume:
        command += ["--resume_from_checkpoint", folder / f"ours-whole/checkpoint-{CUT}"]
    subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    lines = [
        json.loads(line)
        for line in (folder / f"ours-{name}" / "metrics.jsonl").read_text().splitlines()
    ]
    return [f"{r['loss']:.6f}" for r in lines if "loss" in r]


def main():
    # Another ninja than the environment's would build DeepSpeed's ops again.
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    if len(sys.argv) > 1:
        os.environ.update(
            DS_ACCELERATOR="cpu",
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=sys.argv[3],
        )
        stock(Path(sys.argv[1]), sys.argv[2], sys.argv[2] == "resumed")
        return
    from conftest import make_model, make_tokenizer

    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        folder = Path(name)
        make_model(folder / "model")
        make_tokenizer(folder / "model")
        for label in ("stock", "ours"):
            losses = {}
            for port, part in ((29371, "whole"), (29372, "resumed")):
                if label == "ours":
                    losses[part] = ours(folder, part, part == "resumed")
                    continue
                done = subprocess.run(
                    [sys.executable, __file__, str(folder), part, str(port)],
                    text=True,
                    capture_output=True,
                )
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                losses[part] = [
                    line.split()[1] for line in done.stdout.splitlines() if line.startswith("LOSS")
                ]
            same = "equal" if losses["whole"][CUT:] == losses["resumed"] else "DIFFERENT"
            print(f"{label}: {' '.join(losses['whole'])}", flush=True)
            resumed = " ".join(losses["resumed"])
            print(f"  resumed after {CUT}: {resumed}   {same}", flush=True)


if __name__ == "__main__":
    main()
