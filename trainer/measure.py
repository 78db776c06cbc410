"""What the machine gives: the disk through DeepSpeed's own libaio op, the GPUs, PCIe, RAM, and what lies between GPUs.

`python launch/bench.py io PATH` and `… box`. Both keep their figures for the plan (trainer/plan/machine.py).
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from trainer import ROOT
from trainer.config.flags import parse_size
from trainer.errors import DONE, FAILED, RunError, report
from trainer.plan.machine import disk_of, remember
from trainer.system import hardware, ops, swap_dir

BLOCKS, DEPTHS, THREADS = (2**20, 2**23), (16, 64), (1, 4, 8)


def io(path, size, seconds, out=None):
    """Sequential O_DIRECT writes and reads of one file of `size` bytes for every setting, within `seconds` in all. Returns
    {"aio": the best block for a DeepSpeed JSON, "read_gbps", "write_gbps", "rows": [...]} and writes it to `out`."""
    import torch

    if not 1 <= seconds <= 3600:
        raise RunError("--seconds is not a time that can be", found=seconds, needed="1 to 3600")
    if (
        not 64e6 <= size <= hardware.free_memory() / 3
    ):  # a buffer of the size, page-locked, and its copies
        raise RunError(
            "--bytes is not a size for this test",
            found=f"{size / 1e9:.2f} GB",
            needed=f"64MB to {hardware.free_memory() / 3e9:.1f}GB, a third of the free RAM",
            fix="--bytes 1GB",
        )
    if out and not Path(out).absolute().parent.is_dir():
        raise RunError(
            "--out cannot be written", found=f"no directory {Path(out).absolute().parent}"
        )
    # The op gives each thread an equal part, and writes less, without a word, where that is no multiple of a page.
    size = size // 2**23 * 2**23
    swap_dir.check_directory(path)
    free = shutil.disk_usage(hardware.existing(path)).free
    if size > free:
        raise RunError(
            "the disk is too small for the test",
            found=f"{free / 1e9:.2f} GB free",
            needed=f"{size / 1e9:.2f} GB",
            fix="--bytes 256MB",
            code=3,
        )
    ops.build(["async_io"])
    from deepspeed.ops.op_builder import AsyncIOBuilder

    op, folder = AsyncIOBuilder().load(verbose=False), Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    file, rows, began = folder / f".bench-io-{os.getpid()}", [], time.monotonic()
    settings = [
        (block, depth, threads) for threads in THREADS for block in BLOCKS for depth in DEPTHS
    ]
    try:
        for block, depth, threads in settings:
            if rows and time.monotonic() - began > seconds * (1 - 1 / len(settings)):
                print(
                    f"after {len(rows)} of {len(settings)} settings the time is over (--seconds)",
                    flush=True,
                )
                break
            handle = op.aio_handle(block, depth, False, True, threads)
            buffer = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
            buffer.fill_(len(rows) + 1)
            rates = []
            for move in (handle.sync_pwrite, handle.sync_pread):
                start = time.perf_counter()
                move(buffer, str(file), 0)
                rates.append(size / (time.perf_counter() - start))
                if len(rates) == 1:
                    buffer.zero_()
            wrong = int((buffer[::4096] != len(rows) + 1).sum())
            handle.free_cpu_locked_tensor(buffer)
            if wrong or file.stat().st_size != size:
                raise RunError(
                    "the disk gave back something else than was written",
                    found=f"{wrong} of {size // 4096} pages",
                    fix="another disk",
                    code=FAILED,
                )
            rows.append(
                {
                    "block_size": block,
                    "queue_depth": depth,
                    "intra_op_parallelism": threads,
                    "write_gbps": rates[0] / 1e9,
                    "read_gbps": rates[1] / 1e9,
                }
            )
            print(
                f"  block {block >> 20} MiB, depth {depth}, {threads} thread(s): {rates[0] / 1e9:.2f} GB/s written, "
                f"{rates[1] / 1e9:.2f} read",
                flush=True,
            )
    finally:
        file.unlink(missing_ok=True)
    # The slower way limits a step that reads and writes as much.
    best = max(rows, key=lambda r: 1 / (1 / r["write_gbps"] + 1 / r["read_gbps"]))
    aio = {k: best[k] for k in ("block_size", "queue_depth", "intra_op_parallelism")}
    found = {
        "aio": {**aio, "single_submit": False, "overlap_events": True},
        "read_gbps": best["read_gbps"],
        "write_gbps": best["write_gbps"],
        "path": str(folder.absolute()),
        "bytes": size,
        "rows": rows,
    }
    remember(
        {
            "nvme_disk": disk_of(path),
            "nvme_read": best["read_gbps"] * 1e9,
            "nvme_write": best["write_gbps"] * 1e9,
        }
    )
    if out:
        Path(out).write_text(json.dumps(found, indent=1))
    print(
        f"best: {best['write_gbps']:.2f} GB/s written, {best['read_gbps']:.2f} read; for the DeepSpeed JSON:\n"
        f'  "aio": {json.dumps(found["aio"])}'
    )
    return found


def box(links=True):
    """A dict of what the machine can do, which the plan remembers. bf16 products (TFLOP/s) and pinned copies (GB/s) of the first GPU,
    or fp32 products of the CPU; the optimizer's step (GB/s of RAM); between GPUs all-gather and reduce-scatter (GB/s, bytes that one
    GPU receives)."""
    import torch

    found = {}
    if torch.cuda.is_available():
        found.update(_gpu(torch))
    else:
        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        found["cpu_tflops"] = round(2 * 2048**3 / _seconds(lambda: a @ b, 5) / 1e12, 4)
        remember({"cpu_flops": found["cpu_tflops"] * 1e12})
    found["ram_gbps"] = round(_ram(torch), 1)
    remember({"ram_rate": found["ram_gbps"] * 1e9})
    if torch.cuda.device_count() > 1 and links:
        found.update(_links(torch))
    return found


def _seconds(function, times, wait=lambda: None):
    function()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - began) / times


def _gpu(torch):
    wait, size = torch.cuda.synchronize, 2**30
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    host, there = (
        torch.empty(size, dtype=torch.uint8, pin_memory=True),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    back, other, stream = (
        torch.empty_like(host, pin_memory=True),
        torch.empty_like(there),
        torch.cuda.Stream(),
    )

    def both():
        with torch.cuda.stream(stream):
            back.copy_(other, non_blocking=True)
        there.copy_(host, non_blocking=True)

    rates = {
        "h2d_gbps": lambda: there.copy_(host, non_blocking=True),
        "d2h_gbps": lambda: back.copy_(other, non_blocking=True),
        "duplex_gbps_each": both,
    }
    found = {
        "device": torch.cuda.get_device_name(),
        "matmul_tflops": round(2 * 8192**3 / _seconds(lambda: a @ b, 20, wait) / 1e12),
    }
    found.update({k: round(size / _seconds(f, 5, wait) / 1e9, 1) for k, f in rates.items()})
    remember({"flops": found["matmul_tflops"] * 1e12, "pcie": found["h2d_gbps"] * 1e9})
    return found


def _ram(torch, count=10**8):
    """GB/s of RAM traffic in our Adam (28 bytes a parameter of bf16), all threads."""
    from trainer.engine import cpu_step

    adam, weight = ops.adam(), torch.zeros(count)
    state = {"step": 1, "exp_avg": torch.zeros(count), "exp_avg_sq": torch.ones(count)}
    grad, low = torch.ones(count, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.bfloat16)
    group = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "bias_correction": True,
    }

    def step():
        update = cpu_step.update_of(weight, grad, state, group, 1.0, low)
        cpu_step.run(adam, (cpu_step.Update * 1)(update), 16, torch.get_num_threads())

    return 28 * count / statistics.median(_seconds(step, 1) for _ in range(3)) / 1e9


def _links(torch):
    """Between all GPUs of the machine, by NCCL, one process each."""
    import subprocess

    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(torch.cuda.device_count()),
        "-m",
        "trainer.measure",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    except subprocess.TimeoutExpired:
        raise RunError(
            "the links between the GPUs could not be measured",
            found="no end after 120 s",
            code=FAILED,
        ) from None
    line = next((line for line in done.stdout.splitlines() if line.startswith("LINKS ")), None)
    if line is None:
        raise RunError(
            "the links between the GPUs could not be measured",
            found=done.stderr[-300:],
            code=FAILED,
        )
    found = json.loads(line.removeprefix("LINKS "))
    remember({"link": found["all_gather_gbps"] * 1e9})
    return found


def _rank():
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    ranks, share = dist.get_world_size(), torch.ones(2**28, dtype=torch.bfloat16, device="cuda")
    whole = torch.empty(ranks * 2**28, dtype=torch.bfloat16, device="cuda")
    found = {}
    for name, call in (
        ("all_gather_gbps", lambda: dist.all_gather_into_tensor(whole, share)),
        ("reduce_scatter_gbps", lambda: dist.reduce_scatter_tensor(share, whole)),
    ):
        seconds = _seconds(call, 5, torch.cuda.synchronize)
        found[name] = round((ranks - 1) * share.nbytes / seconds / 1e9, 1)
    if dist.get_rank() == 0:
        print("LINKS " + json.dumps(found), flush=True)
    dist.destroy_process_group()


def main(argv=None):
    """Exit code of launch/bench.py."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    machine = commands.add_parser(
        "box",
        help="what GPU, PCIe, RAM and the links between GPUs give, as JSON; the plan remembers it",
    )
    machine.add_argument("--no_links", action="store_true", help="not between the GPUs")
    disk = commands.add_parser(
        "io",
        help="the disk through DeepSpeed's libaio op: the best aio block; the plan remembers it",
    )
    disk.add_argument(
        "path", nargs="?", default=".swap", help="directory on it (default: %(default)s)"
    )
    disk.add_argument("--bytes", default="1GB", help="of the file (default: %(default)s)")
    disk.add_argument("--seconds", type=float, default=60, help="in all (default: %(default)s)")
    disk.add_argument("--out", type=Path, help="the result as JSON")
    options = parser.parse_args(argv)
    try:
        if options.command == "box":
            print(json.dumps(box(not options.no_links)))
        else:
            io(options.path, parse_size(options.bytes, "bytes"), options.seconds, options.out)
        return DONE
    except (RunError, OSError) as error:
        if not isinstance(error, RunError):
            error = RunError("it could not be measured", found=str(error))
        report(error)
        return error.code


if __name__ == "__main__":  # one rank of `_links`
    _rank()
