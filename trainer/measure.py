"""What this machine gives: its disk through DeepSpeed's libaio op, its GPUs, PCIe and RAM.

`python launch/bench.py io PATH` and `python launch/bench.py machine`. The plan takes these figures
in place of its own (plan/machine.py).
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from timeit import timeit
from typing import Any

from data.files import write_atomically
from trainer import ROOT
from trainer.config.command_line import Parser, command
from trainer.config.flags import parse_size
from trainer.console import answered
from trainer.distributed import local_rank
from trainer.errors import DONE, FAILED, RunError
from trainer.plan.machine import disk_of, remember
from trainer.plan.timing import STEP_BYTES
from trainer.system import hardware, ops, swap_dir

PAGE = 4096


def io(path: str, size: int, seconds: float, out: Path | None = None) -> None:
    """Measure sequential O_DIRECT writes and reads of one file of `size` bytes.

    Every setting is tried, within `seconds` in all. Prints the best block for a DeepSpeed JSON, and
    writes {"aio": that block, "read_gbps", "write_gbps", "rows": [...]} to `out`. Raises RunError
    where the test cannot be made, or where something else is read than was written.
    """
    _check_io(path, size, seconds, out)
    ops.build(["async_io"])
    # The op gives each thread an equal part, and writes less, without an error, where that is no
    # multiple of a page.
    size = size // 2**23 * 2**23
    folder, rows, began = Path(path), [], time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".bench-io-{os.getpid()}"
    settings = list(product((1, 4, 8), (2**20, 2**23), (16, 64)))
    try:
        for threads, block, depth in settings:
            if rows and time.monotonic() - began > seconds * (1 - 1 / len(settings)):
                print(f"--seconds is over after {len(rows)} of {len(settings)} settings")
                break
            aio = {"block_size": block, "queue_depth": depth, "intra_op_parallelism": threads}
            write, read = _rates(file, size, aio, fill=len(rows) + 1)
            rows.append((aio, write, read))
            print(
                f"  block {block >> 20} MiB, depth {depth}, {threads} thread(s): "
                f"{write:.2f} GB/s written, {read:.2f} read",
                flush=True,
            )
    finally:
        file.unlink(missing_ok=True)
    # An optimizer step reads and writes as much.
    aio, write, read = min(rows, key=lambda row: 1 / row[1] + 1 / row[2])
    aio = {**aio, "single_submit": False, "overlap_events": True}
    remember(nvme_disk=disk_of(path), nvme_read=read * 1e9, nvme_write=write * 1e9)
    if out:
        tried = [{**aio, "write_gbps": write, "read_gbps": read} for aio, write, read in rows]
        result = {"aio": aio, "write_gbps": write, "read_gbps": read, "rows": tried}
        write_atomically(out, json.dumps(result, indent=1))
    print(
        f"best: {write:.2f} GB/s written, {read:.2f} read; for the DeepSpeed JSON:\n"
        f'  "aio": {json.dumps(aio)}'
    )


def _check_io(path: str, size: int, seconds: float, out: Path | None) -> None:
    if not 1 <= seconds <= 3600:
        raise RunError("--seconds is not in its range", found=seconds, needed="1 to 3600")
    if out and not out.absolute().parent.is_dir():
        raise RunError("--out cannot be written", found=f"no directory {out.absolute().parent}")
    swap_dir.check_directory(path, any_filesystem=True)
    # A page-locked buffer of the size, and its copies.
    most = min(hardware.free_memory() / 3, shutil.disk_usage(hardware.existing(path)).free)
    if not 64e6 <= size <= most:
        raise RunError(
            "--bytes is not a size for this test",
            found=f"{size / 1e9:.2f} GB",
            needed=f"64MB to {most / 1e9:.1f}GB: a third of the free RAM, and room on the disk",
            fix="--bytes 256MB",
        )


def _rates(file: Path, size: int, aio: dict[str, int], fill: int) -> tuple[float, float]:
    """Write and read a file once: (GB/s written, GB/s read). fill: the value of every byte."""
    import torch

    from trainer.engine.aio import load_aio

    block, depth, threads = aio.values()
    handle = load_aio().aio_handle(block, depth, False, True, threads)
    buffer = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))

    def rate(move: Callable[..., Any]) -> float:
        return size / timeit(lambda: move(buffer, str(file), 0), number=1) / 1e9

    buffer.fill_(fill)
    write = rate(handle.sync_pwrite)
    buffer.zero_()
    read = rate(handle.sync_pread)
    wrong = int((buffer[::PAGE] != fill).sum())
    handle.free_cpu_locked_tensor(buffer)
    if wrong or file.stat().st_size != size:
        raise RunError(
            "the disk gave back something else than was written",
            found=f"{wrong} of {size // PAGE} pages",
            fix="another disk",
            code=FAILED,
        )
    return write, read


def machine(links: bool = True) -> dict[str, Any]:
    """Measure the machine, except its disk, and keep the figures for the plan.

    bf16 products (TFLOP/s) and pinned copies (GB/s) of the first GPU, or fp32 products of the CPU;
    the optimizer step's RAM traffic (GB/s). links: also all-gather and reduce-scatter between the
    GPUs (GB/s that one GPU receives).
    """
    import torch

    if torch.cuda.is_available():
        figures = _gpu()
        remember(flops=figures["matmul_tflops"] * 1e12, pcie=figures["h2d_gbps"] * 1e9)
    else:
        first, second = torch.randn(2, 2048, 2048)
        seconds = _repeated(lambda: first @ second, 5)
        figures = {"cpu_tflops": round(2 * 2048**3 / seconds / 1e12, 4)}
        remember(cpu_flops=figures["cpu_tflops"] * 1e12)
    figures["ram_gbps"] = round(_ram(), 1)
    remember(ram_rate=figures["ram_gbps"] * 1e9)
    if torch.cuda.device_count() > 1 and links:
        figures.update(_links())
        remember(link=figures["all_gather_gbps"] * 1e9)
    return figures


def _repeated(function: Callable[[], Any], times: int) -> float:
    """Return the seconds of one call, after a first one that is not counted."""
    import torch

    def calls(count: int) -> None:
        for _ in range(count):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    calls(1)
    return timeit(lambda: calls(times), number=1) / times


def _gpu() -> dict[str, Any]:
    import torch

    size = 2**30
    first, second = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    on_host, to_host = torch.empty(2, size, dtype=torch.uint8, pin_memory=True)
    on_gpu, to_gpu = torch.empty(2, size, dtype=torch.uint8, device="cuda")

    def rate(copy: Callable[[], Any]) -> float:
        return round(size / _repeated(copy, 5) / 1e9, 1)

    seconds = _repeated(lambda: first @ second, 20)
    return {
        "device": torch.cuda.get_device_name(),
        "matmul_tflops": round(2 * 8192**3 / seconds / 1e12),
        "h2d_gbps": rate(partial(to_gpu.copy_, on_host, non_blocking=True)),
        "d2h_gbps": rate(partial(to_host.copy_, on_gpu, non_blocking=True)),
    }


def _ram() -> float:
    """Return the GB/s of RAM traffic in our Adam, on all threads."""
    import torch

    from trainer.engine import cpu_adam

    count, adam = 10**8, ops.adam()
    weight, exp_avg, exp_avg_sq = torch.zeros(count), torch.zeros(count), torch.ones(count)
    grad = torch.ones(count, dtype=torch.bfloat16)
    state = {"step": 1, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    group["bias_correction"] = True
    param_lp = torch.zeros_like(grad)

    def step() -> None:
        update = cpu_adam.update_of(weight, grad, state, group, 1.0, param_lp)
        cpu_adam.run(adam, (cpu_adam.Update * 1)(update), torch.get_num_threads())

    seconds = statistics.median(_repeated(step, 1) for _ in range(3))
    return (STEP_BYTES + 2 * grad.itemsize) * count / seconds / 1e9


def _links() -> dict[str, float]:
    """Return what NCCL moves between all GPUs of the machine, one process each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "gpu", "-m", "trainer.measure"]
    found = "no end after 120 s"
    try:
        done = subprocess.run(
            torchrun, capture_output=True, encoding="utf-8", errors="replace", timeout=120, cwd=ROOT
        )
        found = done.stderr[-300:]
        if figures := re.search("^LINKS (.*)", done.stdout, re.MULTILINE):
            return json.loads(figures[1])
    except subprocess.TimeoutExpired:
        pass
    raise RunError("the links between the GPUs could not be measured", found=found, code=FAILED)


def _links_of_rank() -> None:
    """Run as one rank of `_links`; rank 0 prints the figures."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl")
    ranks = dist.get_world_size()
    share = torch.ones(2**28, dtype=torch.bfloat16, device="cuda")
    whole = torch.empty(ranks * 2**28, dtype=torch.bfloat16, device="cuda")

    def rate(collective: Callable[..., Any], *tensors: Any) -> float:
        seconds = _repeated(lambda: collective(*tensors), 5)
        return round((ranks - 1) * share.nbytes / seconds / 1e9, 1)

    figures = {
        "all_gather_gbps": rate(dist.all_gather_into_tensor, whole, share),
        "reduce_scatter_gbps": rate(dist.reduce_scatter_tensor, share, whole),
    }
    if dist.get_rank() == 0:
        print("LINKS " + json.dumps(figures), flush=True)
    dist.destroy_process_group()


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do what launch/bench.py is asked for, and return its exit code."""
    parser = Parser(
        prog="launch/bench.py", description="What this machine gives. The plan takes the figures."
    )
    what = (
        "machine: GPU, PCIe, RAM and the links between GPUs, as JSON; io: the disk, by DeepSpeed's "
    )
    parser.add_argument("command", choices=("machine", "io"), help=what + "op: the best aio block")
    shown = "(default: %(default)s)"
    parser.add_argument("path", nargs="?", default=".swap", help="directory on the disk (.swap)")
    parser.add_argument("--bytes", default="1GB", help=f"of the file {shown}")
    parser.add_argument("--seconds", type=float, default=60, help=f"in all {shown}")
    parser.add_argument("--out", type=Path, help="the disk's result as JSON")
    parser.add_argument("--no_links", action="store_true", help="nothing between the GPUs")
    options = parser.parse_intermixed_args(argv)
    try:
        if options.command == "machine":
            print(json.dumps(machine(not options.no_links)))
        else:
            io(options.path, parse_size(options.bytes, "bytes"), options.seconds, options.out)
    except OSError as error:
        raise RunError("it could not be measured", found=error) from None
    return answered(DONE)


if __name__ == "__main__":
    _links_of_rank()
