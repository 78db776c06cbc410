"""Measurements of a run: time by phase, tokens, memory, GPU, PCIe and NVMe. One object a logging step in metrics.jsonl."""

import errno
import json
import math
import threading
import time
from pathlib import Path

import psutil
import torch

from trainer.system import hardware

GIB = 2**30


def finite(value):
    """A number for a JSON file: NaN and infinity become null, never 0."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return round(value, 6) if isinstance(value, float) and abs(value) >= 1e-3 else value


class PhaseClock:
    """Seconds spent in named phases. On a GPU by CUDA events, read only when asked, so that measuring does not stall it."""

    def __init__(self, cuda):
        self.cuda, self.open, self.pairs, self.seconds = cuda, {}, [], {}

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, phase):
        self.open[phase] = self._now()

    def stop(self, phase):
        if phase in self.open:
            self.pairs.append((phase, self.open.pop(phase), self._now()))

    def add(self, phase, seconds):
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def read(self):
        """{phase: seconds} since the last read."""
        if self.cuda and self.pairs:
            torch.cuda.synchronize()
        for phase, begin, end in self.pairs:
            self.add(phase, begin.elapsed_time(end) / 1e3 if self.cuda else end - begin)
        self.pairs, result, self.seconds = [], self.seconds, {}
        return result


class GpuSampler(threading.Thread):
    """GPU utilisation (%), PCIe throughput (GB/s) as NVML tells them, averaged between reads. Nothing where there is no NVML."""

    def __init__(self, index, interval=0.5):
        super().__init__(daemon=True, name="gpu-sampler")
        self.index, self.interval, self.samples, self.stopped, self.lock = (
            index,
            interval,
            [],
            False,
            threading.Lock(),
        )
        self.handle = None

    def run(self):
        try:
            import pynvml

            self.handle = hardware.nvml_handle(self.index)
        except Exception:  # measuring must never stop a run
            return
        while not self.stopped:
            sample = {}
            for key, read in (
                ("gpu_util", lambda: pynvml.nvmlDeviceGetUtilizationRates(self.handle).gpu),
                ("gpu_mem_gib", lambda: pynvml.nvmlDeviceGetMemoryInfo(self.handle).used / GIB),
                (
                    "h2d_gbps",
                    lambda: (
                        pynvml.nvmlDeviceGetPcieThroughput(
                            self.handle, pynvml.NVML_PCIE_UTIL_RX_BYTES
                        )
                        / 1e6
                    ),
                ),
                (
                    "d2h_gbps",
                    lambda: (
                        pynvml.nvmlDeviceGetPcieThroughput(
                            self.handle, pynvml.NVML_PCIE_UTIL_TX_BYTES
                        )
                        / 1e6
                    ),
                ),
            ):
                try:
                    sample[key] = read()
                except Exception:  # a counter that this card or driver lacks
                    pass
            with self.lock:
                self.samples.append(sample)
            time.sleep(self.interval)

    def read(self):
        """Means since the last read; the largest memory."""
        with self.lock:
            samples, self.samples = self.samples, []
        result = {}
        for key in ("gpu_util", "gpu_mem_gib", "h2d_gbps", "d2h_gbps"):
            values = [s[key] for s in samples if key in s]
            if values:
                result[key] = max(values) if key == "gpu_mem_gib" else sum(values) / len(values)
        return result


def pinned_gib():
    """Pinned host memory of this process: torch's pinned allocator on a GPU, and what libaio's buffers hold locked."""
    locked = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            locked = int(line.split()[1]) * 1024
    if torch.cuda.is_available():
        try:
            locked += torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
        except (AttributeError, RuntimeError):  # older torch
            pass
    return locked / GIB


class DiskCounter:
    """Bytes that this process read from and wrote to block devices: with O_DIRECT, exactly the swap traffic and the logs."""

    def __init__(self):
        self.process = psutil.Process()
        self.first = self.last = self._now()

    def _now(self):
        try:
            counters = self.process.io_counters()
        except (
            OSError,
            AttributeError,
            NotImplementedError,
        ):  # kernels without task I/O accounting
            return None
        return counters.read_bytes, counters.write_bytes

    def read(self, seconds):
        """GB/s since the last read, and bytes since the start."""
        now = self._now()
        if now is None or self.last is None:
            return {}
        rates = [(a - b) / 1e9 / max(seconds, 1e-9) for a, b in zip(now, self.last)]
        self.last = now
        return {
            "nvme_read_gbps": rates[0],
            "nvme_write_gbps": rates[1],
            "nvme_read_bytes": now[0] - self.first[0],
            "nvme_written_bytes": now[1] - self.first[1],
        }


class Telemetry:
    """All of it for one rank. `record` makes the object for one logging step; rank 0 writes it to metrics.jsonl."""

    def __init__(self, run_directory, main, nvme, flops_per_token, cuda_index):
        self.path, self.main = Path(run_directory) / "metrics.jsonl", main
        self.clock = PhaseClock(cuda_index is not None)
        self.flops_per_token = flops_per_token
        self.disk = DiskCounter() if nvme else None
        self.gpu = GpuSampler(cuda_index) if cuda_index is not None else None
        if self.gpu:
            self.gpu.start()
        self.tokens = self.window_tokens = self.window_steps = 0
        self.window_start = time.perf_counter()
        self.paused = 0.0

    def restart_window(self):
        """Begin the window of the next logging step: what went before (evaluation, loading) is not counted."""
        self.clock.read()
        self.window_tokens = self.window_steps = 0
        self.paused = 0.0
        self.window_start = time.perf_counter()
        if self.disk:
            self.disk.last = self.disk._now()

    def pause(self, seconds):
        """Seconds in this window that were not training."""
        self.paused += seconds

    def step_done(self, tokens):
        """One update with `tokens` (without padding) on this rank."""
        self.window_tokens += tokens
        self.window_steps += 1

    def measures(self, world_size):
        """What was measured since the last call. Tokens are summed over the ranks; memory and times are this rank's."""
        seconds = max(time.perf_counter() - self.window_start - self.paused, 1e-9)
        steps = max(self.window_steps, 1)
        tokens = self.window_tokens
        if world_size > 1:
            device = (
                torch.device("cuda", torch.cuda.current_device())
                if self.clock.cuda
                else torch.device("cpu")
            )
            total = torch.tensor(float(tokens), dtype=torch.float64, device=device)
            torch.distributed.all_reduce(total)
            tokens = int(total.item())
        self.tokens += tokens
        rate = tokens / seconds / world_size
        phases = self.clock.read()
        result = {
            "tokens": self.tokens,
            "tokens_per_s_per_gpu": rate,
            "model_tflops_per_gpu": rate * self.flops_per_token / 1e12,
            "step_s": seconds / steps,
        }
        for phase in ("data_wait", "forward", "backward", "optimizer"):
            result[f"{phase}_s"] = phases.get(phase, 0.0) / steps
        result["host_rss_gib"] = psutil.Process().memory_info().rss / GIB
        result["pinned_gib"] = pinned_gib()
        if self.gpu:
            result.update(self.gpu.read())
        if self.disk:
            result.update(self.disk.read(seconds))
        self.restart_window()
        return result

    def write(self, record):
        """Append one object to metrics.jsonl; NaN and infinity as null."""
        if self.main:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps({k: finite(v) for k, v in record.items()}) + "\n")
            except OSError as error:  # a full disk: the run can go on without its diary
                print(f"warning: {self.path}: {error.strerror}", flush=True)

    def close(self):
        """Stop sampling."""
        if self.gpu:
            self.gpu.stopped = True


def heartbeat(run_directory, step, phase):
    """heartbeat.json: step, phase, time. Replaced whole, so that a reader never sees half of it."""
    path = Path(run_directory) / "heartbeat.json"
    temporary = path.with_suffix(".tmp")
    text = json.dumps({"step": step, "phase": phase, "time": time.time()})
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        with open(path, "r+") as file:  # in its old place there is room
            file.write(text + " " * 20)
