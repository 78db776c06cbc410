"""Measurements of a run: the clock, the counters, the keys of metrics.jsonl, and a full disk."""

import builtins
import errno
import json
import math
import mmap
import time

import pytest

from trainer.monitor import telemetry
from trainer.monitor.telemetry import (
    DiskCounter,
    GpuSampler,
    PhaseClock,
    RamSampler,
    Telemetry,
    finite,
    ram_in_use,
)
from trainer.run_dir import RunDirectory

KEYS = {
    "tokens",
    "tokens_per_s_per_gpu",
    "model_tflops_per_gpu",
    "step_s",
    "data_wait_s",
    "forward_s",
    "backward_s",
    "optimizer_s",
    "host_rss_gib",
    "pinned_gib",
}
ON_GPU = {"gpu_util", "gpu_mem_gib", "h2d_gbps", "d2h_gbps"}
WITH_NVME = {"nvme_read_gbps", "nvme_write_gbps", "nvme_read_bytes", "nvme_written_bytes"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    return RunDirectory(tmp_path)


@pytest.mark.parametrize(
    "value, expected",
    [
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (1.23456789, 1.234568),
        (1.23456789e-5, 1.23456789e-5),
        (0.0, 0.0),
        (7, 7),
        (None, None),
        ("text", "text"),
        (True, True),
    ],
)
def test_finite(value, expected):
    assert finite(value) == expected and type(finite(value)) is type(expected)


def test_the_clock_adds_the_seconds_of_a_phase():
    clock = PhaseClock(cuda=False)
    for _ in range(2):
        clock.start("forward")
        time.sleep(0.02)
        clock.stop("forward")
    clock.stop("backward")  # it has not begun
    clock.add("data_wait", 1.5)
    clock.add("data_wait", 0.5)
    clock.start("optimizer")  # it is not over
    seconds = clock.read()
    assert set(seconds) == {"forward", "data_wait"}
    assert 0.04 <= seconds["forward"] < 1 and seconds["data_wait"] == 2.0
    assert clock.read() == {}
    clock.stop("optimizer")
    assert set(clock.read()) == {"optimizer"}


def test_disk_counter(monkeypatch):
    counts = iter([(1000, 0), (1000 + 4 * 10**9, 10**9), (1000 + 4 * 10**9, 10**9)])
    monkeypatch.setattr(DiskCounter, "_now", lambda self: next(counts))
    disk = DiskCounter()
    assert disk.read(seconds=2) == {
        "nvme_read_gbps": 2.0,
        "nvme_write_gbps": 0.5,
        "nvme_read_bytes": 4 * 10**9,
        "nvme_written_bytes": 10**9,
    }
    disk.restart()
    counts = iter([(1000 + 5 * 10**9, 10**9)])
    second = disk.read(seconds=1)  # rates since the restart, bytes since the start
    assert second["nvme_read_gbps"] == 1.0 and second["nvme_read_bytes"] == 5 * 10**9


def test_a_kernel_without_disk_counters(monkeypatch):
    monkeypatch.setattr(DiskCounter, "_now", lambda self: None)
    assert DiskCounter().read(seconds=1) == {}


def test_what_is_measured_on_a_cpu(run):
    measures = Telemetry(run, nvme=True, flops_per_token=1e12, cuda_index=None)
    measures.clock.add("forward", 3.0)
    measures.restart_window()  # what was before does not count
    measures.clock.add("forward", 1.0)
    measures.step_done(100)
    measures.step_done(200)
    time.sleep(0.05)
    measures.pause(0.04)
    result = measures.measures(world_size=1)
    assert KEYS <= set(result) <= KEYS | WITH_NVME
    assert result["tokens"] == measures.tokens == 300 and result["forward_s"] == 0.5
    assert result["optimizer_s"] == 0.0 and result["step_s"] < 1
    assert result["step_s"] * 2 * result["tokens_per_s_per_gpu"] == pytest.approx(300)
    assert result["model_tflops_per_gpu"] == pytest.approx(result["tokens_per_s_per_gpu"])
    again = measures.measures(world_size=1)  # a window without a step
    assert again["tokens"] == 300 and again["tokens_per_s_per_gpu"] == 0
    assert again["forward_s"] == 0.0


def test_without_nvme_there_are_no_disk_counters(run):
    result = Telemetry(run, nvme=False, flops_per_token=1, cuda_index=None).measures(1)
    assert set(result) == KEYS


def test_the_gpu_is_sampled(monkeypatch):
    def broken():
        raise OSError("this card has no such counter")

    values = {"gpu_util": [10.0, 30.0], "gpu_mem_gib": [3.0, 1.0], "h2d_gbps": [1.0, 2.0]}
    counters = {key: iter(numbers).__next__ for key, numbers in values.items()}
    monkeypatch.setattr(telemetry, "nvml_counters", lambda i: {**counters, "d2h_gbps": broken})
    monkeypatch.setattr(telemetry.time, "sleep", lambda seconds: None)
    sampler = GpuSampler(0)
    end = time.monotonic() + 10
    while len(sampler.samples["h2d_gbps"]) < 2 and time.monotonic() < end:
        pass
    sampler.stopped = True
    assert sampler.read() == {"gpu_util": 20.0, "gpu_mem_gib": 3.0, "h2d_gbps": 1.5}


def test_without_nvml_nothing_is_sampled(monkeypatch):
    def broken(index):
        raise ImportError("no pynvml")

    monkeypatch.setattr(telemetry, "nvml_counters", broken)
    assert GpuSampler(0).read() == {}


def test_records_are_appended(run, monkeypatch):
    measures = Telemetry(run, nvme=False, flops_per_token=1, cuda_index=None)
    measures.write({"step": 1, "loss": math.nan})
    measures.write({"step": 2, "loss": 0.5})
    monkeypatch.setenv("RANK", "1")  # another rank writes nothing
    measures.write({"step": 3})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_a_full_disk_is_a_warning(run, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    measures = Telemetry(run, nvme=False, flops_per_token=1, cuda_index=None)
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", full)
        measures.write({"step": 1})
    assert "metrics.jsonl: No space left on device" in capsys.readouterr().out
    measures.write({"step": 2})
    assert json.loads(run.metrics.read_text()) == {"step": 2}


def test_mapped_files_are_no_ram_in_use(tmp_path):
    """A checkpoint that is mapped and read counts nothing; memory of its own does, at its peak."""
    size = 2**27
    (tmp_path / "weights").write_bytes(bytes(size))
    sampler, before = RamSampler(), ram_in_use()
    with (
        open(tmp_path / "weights", "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        assert not any(mapped[::4096])  # every page is touched
        assert ram_in_use() - before < size / 4
    block = bytearray(size)
    held = ram_in_use()
    assert size * 0.9 < held - before < size * 1.3
    time.sleep(0.3)
    del block
    assert ram_in_use() < held - size / 2 and sampler.peak() >= held - size / 4
