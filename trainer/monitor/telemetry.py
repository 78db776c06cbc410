"""Measurements of a run: time by phase, tokens, memory, GPU, PCIe and NVMe."""

import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from data.files import append_line
from trainer.console import say
from trainer.distributed import all_reduce_sum, is_main_process
from trainer.run_dir import RunDirectory
from trainer.system import hardware
from trainer.system.hardware import ram_in_use

GIB = 2**30
Measures = dict[str, float]  # key in metrics.jsonl: number


def finite(value: Any) -> Any:
    """Return the value as JSON can hold it: NaN and infinity become null, never 0."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return round(value, 6) if abs(value) >= 1e-3 else value


class PhaseClock:
    """Seconds spent in named phases.

    On a GPU, CUDA events mark the times. They are read only in read(), so that measuring does not
    make the CPU wait for the GPU.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.begins: dict = {}  # of the phases that are under way
        self.intervals: list[tuple] = []  # phase, begin, end
        self.seconds = defaultdict[str, float](float)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, phase: str) -> None:
        """Begin a phase."""
        self.begins[phase] = self._now()

    def stop(self, phase: str) -> None:
        """End a phase. A phase that has not begun is ignored."""
        if phase in self.begins:
            self.intervals.append((phase, self.begins.pop(phase), self._now()))

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds that somebody else measured."""
        self.seconds[phase] += seconds

    def read(self) -> defaultdict[str, float]:
        """Return {phase: seconds} since the last read."""
        if self.cuda and self.intervals:
            torch.cuda.synchronize()
        for phase, begin, end in self.intervals:
            self.add(phase, begin.elapsed_time(end) / 1e3 if self.cuda else end - begin)
        self.intervals.clear()
        seconds, self.seconds = self.seconds, defaultdict(float)
        return seconds


def nvml_counters(index: int) -> dict[str, Callable[[], float]]:
    """Return functions that read the counters of a GPU: use in %, memory in GiB, PCIe in GB/s."""
    import pynvml

    nvml: Any = pynvml  # pyright misreads the types of its structures
    handle = hardware.nvml_handle(index)

    def pcie(direction: int) -> float:  # NVML counts KB/s
        return nvml.nvmlDeviceGetPcieThroughput(handle, direction) / 1e6

    return {
        "gpu_util": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "gpu_mem_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
        "h2d_gbps": lambda: pcie(nvml.NVML_PCIE_UTIL_RX_BYTES),
        "d2h_gbps": lambda: pcie(nvml.NVML_PCIE_UTIL_TX_BYTES),
    }


class GpuSampler:
    """Reads the counters of a GPU twice a second, in a thread, until `stopped` is set.

    Measures nothing where NVML does not work.
    """

    def __init__(self, index: int) -> None:
        self.stopped, self.lock = False, threading.Lock()
        self.samples = defaultdict[str, list[float]](list)
        threading.Thread(target=self._sample, args=(index,), daemon=True).start()

    def _sample(self, index: int) -> None:
        try:
            counters = nvml_counters(index)
        except Exception:  # measuring must never stop a run
            return
        while not self.stopped:
            for key, counter in counters.items():
                try:
                    value = counter()
                except Exception:  # a counter that this card or driver lacks
                    continue
                with self.lock:
                    self.samples[key].append(value)
            time.sleep(0.5)

    def read(self) -> Measures:
        """Return the means since the last read; of memory the maximum."""
        with self.lock:
            samples, self.samples = self.samples, defaultdict(list)
        return {
            key: max(values) if key == "gpu_mem_gib" else sum(values) / len(values)
            for key, values in samples.items()
        }


class RamSampler:
    """The peak of ram_in_use since it was made. The kernel's own peaks count mapped files."""

    def __init__(self) -> None:
        self._peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.peak()
            time.sleep(0.1)

    def peak(self) -> int:
        """Return the largest size so far, bytes."""
        self._peak = max(self._peak, ram_in_use())
        return self._peak


def pinned_gib() -> float:
    """Return the pinned RAM of this process, GiB: torch's on a GPU, and libaio's locked buffers."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    locked = sum(int(line.split()[1]) * 1024 for line in status if line.startswith("VmLck:"))
    # Empty where CUDA is not in use.
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    return (locked + pinned) / GIB


class DiskCounter:
    """Bytes that this process read from and wrote to block devices.

    The swap files bypass the page cache (O_DIRECT), so these are the swap traffic and the logs.
    """

    def __init__(self) -> None:
        self.first = self.last = self._now()

    def _now(self) -> tuple[int, int] | None:
        try:
            counters = psutil.Process().io_counters()
        except (OSError, NotImplementedError, psutil.Error):  # a kernel that does not count
            return None
        return counters.read_bytes, counters.write_bytes

    def restart(self) -> None:
        """Begin the time over which read() takes the rates."""
        self.last = self._now()

    def read(self, seconds: float) -> Measures:
        """Return GB/s since the last restart, `seconds` ago, and bytes since the start."""
        now = self._now()
        if not (now and self.last and self.first):
            return {}
        return {
            "nvme_read_gbps": (now[0] - self.last[0]) / seconds / 1e9,
            "nvme_write_gbps": (now[1] - self.last[1]) / seconds / 1e9,
            "nvme_read_bytes": now[0] - self.first[0],
            "nvme_written_bytes": now[1] - self.first[1],
        }


class Telemetry:
    """All measurements of one rank.

    measures() returns those of one logging step. write() appends a record to metrics.jsonl, on
    rank 0. tokens: trained so far on all ranks, without padding.
    nvme: the run swaps to NVMe. flops_per_token: of forward and backward, for TFLOP/s.
    cuda_index: the rank's GPU, or None on a CPU.
    """

    def __init__(
        self, run: RunDirectory, nvme: bool, flops_per_token: float, cuda_index: int | None
    ) -> None:
        self.run, self.flops_per_token = run, flops_per_token
        self.clock = PhaseClock(cuda_index is not None)
        self.disk = DiskCounter() if nvme else None
        self.gpu = None if cuda_index is None else GpuSampler(cuda_index)
        self.tokens = 0
        self.restart_window()

    def restart_window(self) -> None:
        """Begin the window of the next logging step: nothing from before it is counted."""
        self.clock.read()
        self.window_tokens = self.window_steps = 0
        self.window_start = time.perf_counter()
        if self.disk:
            self.disk.restart()

    def pause(self, seconds: float) -> None:
        """Exclude seconds of this window that were not training."""
        self.window_start += seconds

    def step_done(self, tokens: int) -> None:
        """Count an optimizer step with so many tokens on this rank, without padding."""
        self.window_tokens += tokens
        self.window_steps += 1

    def measures(self, world_size: int) -> Measures:
        """Return what was measured since the last call, and begin a new window.

        Tokens are summed over the ranks; memory and times are this rank's.
        """
        seconds = max(time.perf_counter() - self.window_start, 1e-9)
        steps = max(self.window_steps, 1)
        device = "cuda" if self.clock.cuda else "cpu"
        tokens = int(all_reduce_sum(torch.tensor(self.window_tokens, device=device)))
        self.tokens += tokens
        rate = tokens / seconds / world_size
        phases = self.clock.read()
        result = {
            "tokens": self.tokens,
            "tokens_per_s_per_gpu": rate,
            "model_tflops_per_gpu": rate * self.flops_per_token / 1e12,
            "step_s": seconds / steps,
            **{
                f"{phase}_s": phases[phase] / steps
                for phase in ("data_wait", "forward", "backward", "optimizer")
            },
            "host_rss_gib": ram_in_use() / GIB,
            "pinned_gib": pinned_gib(),
        }
        if self.gpu:
            result.update(self.gpu.read())
        if self.disk:
            result.update(self.disk.read(seconds))
        self.restart_window()
        return result

    def write(self, record: dict) -> None:
        """Append a record to metrics.jsonl, on rank 0. A full disk is a warning, not an error."""
        if not is_main_process() or not self.run.is_ours():
            return
        try:
            append_line(self.run.metrics, json.dumps({k: finite(v) for k, v in record.items()}))
        except OSError as error:  # the run can go on without its diary
            say(f"warning: {self.run.metrics}: {error.strerror}")

    def close(self) -> None:
        """Stop sampling."""
        if self.gpu:
            self.gpu.stopped = True
