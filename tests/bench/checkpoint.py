"""Time and memory of saving and resuming, beside the disk's own speed in the same run.

    make bench-checkpoint, or
    python tests/bench/checkpoint.py [--config ds_z3_offload] [--ranks 1] [--saves 6]
                                     [--folder DIR] [--gpu]

The model is a random Llama of 114 million parameters (1.4 GB of fp32 weights and moments); with
--gpu of 540 million (6.5 GB), in bf16 on CUDA. For every save it prints the seconds, the seconds
that as many bytes take to be written and fsynced after it, and the peak of this process's memory
above what it used before. The same for the resumption.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
GIB = 2**30
FLAGS = (
    "--max_restarts 0 --validation_split 0 --max_length 64 --per_device_train_batch_size 1 "
    "--save_steps 1 --export false --report_to none"
).split()


def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def plain_write(folder, size):
    """Return the seconds that `size` bytes take to the disk."""
    block, path = os.urandom(2**24), Path(folder) / f".plain-{os.getpid()}"
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def measured(what, function, folder):
    """Return the function, which then prints its time and its peak of memory."""

    def wrapped(*args, **kwargs):
        import torch

        before = status("VmRSS")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            on_gpu = torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        began = time.perf_counter()
        result = function(*args, **kwargs)
        seconds, extra = time.perf_counter() - began, status("VmHWM") - before
        text = f"{what}: {seconds:.2f} s, peak memory {extra / GIB:+.2f} GiB"
        if torch.cuda.is_available():
            text += f", of the GPU {(torch.cuda.max_memory_allocated() - on_gpu) / GIB:+.2f} GiB"
        if what == "save" and result:
            size = sum(p.stat().st_size for p in Path(result).iterdir())
            ranks = torch.distributed.get_world_size()
            torch.distributed.barrier()
            disk = [plain_write(folder, size // ranks) for _ in range(3)]
            torch.distributed.barrier()
            alone = ", ".join(f"{d:.2f}" for d in disk)
            text += (
                f"; {size / 1e9:.2f} GB, {size / seconds / 1e9:.2f} GB/s; "
                f"the disk alone {alone} s: {seconds / statistics.median(disk):.2f} of their median"
            )
        print(f"BENCH rank {torch.distributed.get_rank()} {text}", flush=True)
        return result

    return wrapped


def inside():
    sys.path[0] = str(ROOT)
    from trainer import run

    def install():
        from trainer.checkpoint import load
        from trainer.checkpoint.save import Checkpointer

        folder = os.environ["BENCH_FOLDER"]
        Checkpointer.save = measured("save", Checkpointer.save, folder)
        load.restore = measured("resume", load.restore, folder)

    install()
    run.leave(run.main())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="ds_z3_offload")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--saves", type=int, default=6, help="before the resumption, and one after it"
    )
    parser.add_argument("--folder", default=None)
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    from conftest import make_model, make_tokenizer
    from tiny import flags

    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as name:
        folder = Path(name)
        large = {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        }
        small = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        }
        make_model(folder / "model", **(large if options.gpu else small))
        make_tokenizer(folder / "model")
        own = flags(
            num_gpus=options.ranks,
            script=__file__,
            deepspeed=f"{options.config}.json",
            precision="bf16" if options.gpu else "fp32",
            output_dir=folder / "run",
            model_name_or_path=folder / "model",
            dataset=ROOT / "data/samples/train.jsonl",
            nvme_path=folder / "swap",
        )
        command = [sys.executable, "launch/supervise.py", *own, *FLAGS]
        device = "cuda" if options.gpu else "cpu"
        environment = {**os.environ, "DS_ACCELERATOR": device, "BENCH_FOLDER": str(folder)}
        for more in (
            ["--max_steps", options.saves],
            ["--max_steps", options.saves + 1, "--resume_from_checkpoint", "auto"],
        ):
            done = subprocess.run(
                list(map(str, [*command, *more])),
                cwd=ROOT,
                env=environment,
                text=True,
                capture_output=True,
            )
            if done.returncode:
                raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
            print(
                "\n".join(
                    line.removeprefix("BENCH ")
                    for line in done.stdout.splitlines()
                    if line.startswith("BENCH") or "verified" in line
                ),
                flush=True,
            )


if __name__ == "__main__":
    inside() if "RANK" in os.environ else main()
