"""Speed and parity on a GPU box: launch/train.py beside the yardstick in one run. Random weights of real shapes.

    python tests/gpu/bench.py --out OUT 8b-lora 3b-full nvme-8b-lora nvme-1b-full

Prints one line a measurement and writes OUT/bench.jsonl and a log for each run. Needs CUDA, about 100 GiB of RAM and, for the
NVMe cases, about 60 GiB of disk under --nvme.
"""
import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

SHAPES = {  # hidden, intermediate, layers, heads, kv heads: those of stock_baseline.py
    "1b": (2048, 8192, 16, 32, 8), "3b": (3072, 8192, 28, 24, 8), "8b": (4096, 14336, 32, 32, 8),
}
SEQUENCE = 2048


def make_inputs(work):
    """Model directories (configuration and tokenizer only) and rows that fill the sequence: {shape: directory}, data file."""
    from conftest import make_tokenizer, write_rows
    from transformers import LlamaConfig

    for name, (hidden, intermediate, layers, heads, kv_heads) in SHAPES.items():
        folder = work / name
        LlamaConfig(vocab_size=128256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                    num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32768,
                    rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
                    architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2).save_pretrained(folder)
        make_tokenizer(folder)
    text = (ROOT / "data" / "samples" / "train.jsonl").read_text()
    length = 6 * SEQUENCE
    rows = [{"instruction": "Go on.", "output": text[i * 977:i * 977 + length]} for i in range(256)]
    # Rows of all lengths, most of them short, as instruction data has them: for packing.
    rng = random.Random(0)
    sizes = [min(length, int(rng.lognormvariate(6.3, 0.9))) for _ in range(4000)]
    starts = [i * 97 % (len(text) - length) for i in range(len(sizes))]
    write_rows(work / "mixed.jsonl", [{"instruction": "Go on.", "output": text[at:at + n]} for at, n in zip(starts, sizes)])
    return write_rows(work / "rows.jsonl", rows)


def run(label, command, log, seconds):
    """Run a command with its own time limit; returns (exit code, output, wall seconds)."""
    began = time.time()
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            code = 124
    print(f"[{label}] exit {code} after {time.time() - began:.0f} s", flush=True)
    text = log.read_text(errors="replace")
    if code:
        print("\n".join(text.splitlines()[-15:]), flush=True)
    return code, text


def ours(out, work, label, shape, config, micro, steps, seconds, *flags, rows="rows.jsonl", profile=False):
    """Train through launch/train.py; medians over the steps after the second."""
    directory = out / "runs" / label
    subprocess.run(["rm", "-rf", str(directory)])
    script = "launch/train.py"
    if profile:
        script = "tests/gpu/profile_run.py"
        os.environ["PROFILE_OUT"] = str(out / f"profile-{label}.json")
    command = ["deepspeed", "--num_gpus", "1", script, "--deepspeed", config, "--model_name_or_path", str(work / shape),
               "--random_weights", "--dataset", str(work / rows), "--validation_split", "0", "--max_length", str(SEQUENCE),
               "--per_device_train_batch_size", str(micro), "--max_steps", str(steps), "--learning_rate", "1e-5",
               "--lr_scheduler_type", "constant", "--export", "false", "--save_strategy", "no", "--output_dir", str(directory),
               "--nvme_path", str(work / "swap"), *flags]
    code, text = run(label, command, out / f"{label}.log", seconds)
    path = directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    steady = records[5:] or records[2:] or records  # the layers that keep their activations are settled by then
    result = {"label": label, "exit": code, "micro_batch": micro, "steps": len(records), "losses": [r["loss"] for r in records]}
    for key in ("tokens_per_s_per_gpu", "model_tflops_per_gpu", "step_s", "data_wait_s", "forward_s", "backward_s", "optimizer_s",
                "gpu_util", "gpu_mem_gib", "host_rss_gib", "pinned_gib", "nvme_read_gbps", "nvme_write_gbps", "h2d_gbps", "d2h_gbps"):
        values = [r[key] for r in steady if r.get(key) is not None]
        if values:
            result[key] = round(statistics.median(values), 3)
    peak = re.search(r"peak RAM ([0-9.]+) GiB", text)
    result["host_peak_gib"] = float(peak[1]) if peak else None
    kept = re.search(r"activations: ([0-9]+) of ([0-9]+).*?\(([0-9.]+) GiB", text)
    result["kept_layers"] = kept and [int(kept[1]), int(kept[2]), float(kept[3])]
    result["all_step_s"] = [round(r["step_s"], 3) for r in records]
    if profile and Path(os.environ["PROFILE_OUT"]).is_file():
        found = json.loads(Path(os.environ["PROFILE_OUT"]).read_text())
        result["profile"] = {k: found[k] for k in ("step_s", "computing_s", "idle_s", "kinds_s", "launches")}
    return result


def yardstick(out, label, size, method, micro, accumulate, seconds, zero="peer", more=()):
    """The yardstick: `peer`, the most used peer's configuration, or `tuned`, the best of the stock engine."""
    command = ["torchrun", "--standalone", "--nproc-per-node", "1", "tests/gpu/stock_baseline.py", "--size", size, "--method", method,
               "--zero", zero, "--micro-batch", str(micro), "--accumulate", str(accumulate), "--steps", "5", *more]
    code, text = run(label, command, out / f"{label}.log", seconds)
    found = re.search(r"^RES (\{.*\})$", text, re.MULTILINE)
    keep = ("tokens_per_s_per_gpu", "model_tflops", "step_s", "gpu_peak_gib", "host_peak_gib_this_rank", "init_s")
    return {"label": label, "exit": code, "micro_batch": micro, **({k: json.loads(found[1])[k] for k in keep} if found else {})}


def disk(work):
    """O_DIRECT speed of the disk under the swap directory, by dd: GB/s written and read."""
    file, result = work / "dd", {"label": "disk"}
    for key, command in (("nvme_write_gbps", ["dd", "if=/dev/zero", f"of={file}", "bs=16M", "count=256", "oflag=direct"]),
                         ("nvme_read_gbps", ["dd", f"if={file}", "of=/dev/null", "bs=16M", "iflag=direct"])):
        began = time.time()
        subprocess.run(command, stderr=subprocess.DEVNULL)
        result[key] = round(256 * 16 * 2**20 / 1e9 / (time.time() - began), 2)
    file.unlink(missing_ok=True)
    return result


def default(out, label, seconds, *flags):
    """The embedded default on the GPU."""
    directory = out / "runs" / label
    code, text = run(label, ["deepspeed", "--num_gpus", "1", "launch/train.py", "--output_dir", str(directory), *flags],
                     out / f"{label}.log", seconds)
    path = directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    speeds = [r["tokens_per_s_per_gpu"] for r in records if "loss" in r][2:]
    return {"label": label, "exit": code, "perplexity": [r["eval_perplexity"] for r in records if "eval_perplexity" in r],
            "tokens_per_s_per_gpu": round(statistics.median(speeds), 1) if speeds else None,
            "losses": [r["loss"] for r in records if "loss" in r][:10]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    make_inputs(args.work)
    out, work = args.out, args.work
    lora = ("--method", "lora")
    plain = ("--fused_linear", "false", "--kept_layers", "0")

    def lora8(label, micro, *flags, steps=10, profile=False):
        return ours(out, work, f"8b-lora-{label}", "8b", "ds_z3_offload.json", micro, steps, 150, *lora, *flags, profile=profile)

    cases = {
        "tuned-8b-lora": lambda: [yardstick(out, "8b-lora-tuned", "8b", "lora", 16, 1, 150, "tuned", ("--leaf", "--liger"))],
        "m16": lambda: [lora8("m16", 16)],
        "m8": lambda: [lora8("m8", 8)],
        "m12": lambda: [lora8("m12", 12)],
        "m6": lambda: [lora8("m6", 6)],
        "m16-kept0": lambda: [lora8("m16-kept0", 16, "--kept_layers", "0", steps=8)],
        "m16-plain": lambda: [lora8("m16-plain", 16, *plain, steps=8)],
        "m16-stock": lambda: [lora8("m16-stock", 16, *plain, "--use_liger_kernel", "false", "--leaf_modules", "false", steps=9,
                                    profile=True)],
        "m8-profile": lambda: [lora8("m8-profile", 8, profile=True)],
        "8b-lora": lambda: [ours(out, work, "8b-lora-ours", "8b", "ds_z3_offload.json", 16, 7, 200, *lora),
                            yardstick(out, "8b-lora-peer", "8b", "lora", 1, 4, 150)],
        "8b-lora-noleaf": lambda: [ours(out, work, "8b-lora-noleaf", "8b", "ds_z3_offload.json", 16, 6, 200, *lora,
                                        "--leaf_modules", "false")],
        "8b-lora-packed": lambda: [
            ours(out, work, "8b-lora-mixed", "8b", "ds_z3_offload.json", 32, 6, 150, *lora, rows="mixed.jsonl"),
            ours(out, work, "8b-lora-packed", "8b", "ds_z3_offload.json", 16, 6, 150, *lora, "--packing", rows="mixed.jsonl")],
        "8b-lora-steps": lambda: [ours(out, work, "8b-lora-cpu-m4", "8b", "ds_z3_offload.json", 4, 5, 150, *lora)],
        "3b-full": lambda: [ours(out, work, "3b-full-ours", "3b", "ds_z3_offload.json", 16, 7, 200),
                            yardstick(out, "3b-full-peer", "3b", "full", 1, 4, 150)],
        "nvme-8b-lora": lambda: [disk(work), ours(out, work, "8b-lora-nvme", "8b", "ds_z3_nvme.json", 4, 5, 420, *lora)],
        "1b-full": lambda: [ours(out, work, "1b-full-cpu", "1b", "ds_z3_offload.json", 8, 5, 120)],
        "nvme-1b-full": lambda: [disk(work), ours(out, work, "1b-full-nvme", "1b", "ds_z3_nvme_optimizer.json", 8, 5, 400)],
        "default": lambda: [default(out, "default-full", 180)],
        "default-lora": lambda: [default(out, "default-lora", 180, *lora)],
    }
    for case in args.cases:
        for result in cases[case]():
            print("RES", json.dumps(result), flush=True)
            with open(out / "bench.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
