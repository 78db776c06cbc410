"""The doctor's checks, each with the fault that it is for; GPUs by a stand-in for NVML."""

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.doctor import cli, gpu, resources
from trainer.doctor.check import Options
from trainer.errors import RunError
from trainer.system import hardware, ops

PYNVML = '''
"""Two GPUs behind a slow link, by the names that NVML has."""
import os
from types import SimpleNamespace as S
GIB = 2**30
NVML_NVLINK_DEVICE_TYPE_SWITCH = 2
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlDeviceGetName(h): return "NVIDIA Test 24GB"
def nvmlDeviceGetMemoryInfo(h): return S(total=24 * GIB, used=(10 if h else 0) * GIB, free=14 * GIB)
def nvmlSystemGetDriverVersion(): return "535.1"
def nvmlSystemGetCudaDriverVersion(): return 12020
def nvmlDeviceGetMaxPcieLinkGeneration(h): return 4
def nvmlDeviceGetCurrPcieLinkWidth(h): return 4
def nvmlDeviceGetMaxPcieLinkWidth(h): return 16
def nvmlDeviceGetPciInfo(h): return S(busId=f"0000:0{h}:00.0")
def nvmlDeviceGetNvLinkState(h, link): raise NVMLError()
'''


def doctor(*flags, env=None, limits=(), code=None):
    """{name: check} and the whole output."""

    def limit():
        for which, value in limits:
            resource.setrlimit(which, value)

    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_MODE": "online",
        "CUDA_VISIBLE_DEVICES": "",
        **(env or {}),
    }
    done = subprocess.run(
        [sys.executable, "launch/doctor.py", "--json", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=limit if limits else None,
    )
    assert "Traceback" not in done.stderr, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == (3 if any(c["status"] == "failure" for c in checks.values()) else 0)
    for check in checks.values():
        assert check["status"] in ("ok", "warning", "failure") and check["found"], check
        assert check["status"] == "ok" or check["fix"], check
    return checks, done.stdout + done.stderr


def test_this_machine(tmp_path):
    began = time.perf_counter()
    checks, _ = doctor("--nvme_path", tmp_path)
    assert time.perf_counter() - began < 20
    assert (
        checks["packages"]["status"]
        == checks["compiler"]["status"]
        == checks["python"]["status"]
        == "ok"
    )
    assert (
        checks["nvme"]["found"].startswith(str(tmp_path)) and checks["gpu"]["status"] == "warning"
    )


def test_without_packages():
    """The doctor itself needs none: it says which are missing."""
    done = subprocess.run(
        [sys.executable, "-S", "launch/doctor.py", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 3 and "torch, deepspeed" in checks["packages"]["found"]
    assert checks["ram"]["status"] == "ok"


@pytest.mark.parametrize(
    "value, fix",
    [
        ("8.0;9.0a", "'8.0;9.0'"),
        ("9.0a,8.6", "'9.0;8.6'"),
        ("8.6 9.0+PTX;Hopper", "'8.6;9.0'"),
        ("Hopper", "unset TORCH_CUDA_ARCH_LIST"),
        ("90", "unset TORCH_CUDA_ARCH_LIST"),
    ],
)
def test_architectures(value, fix):
    checks, _ = doctor(env={"TORCH_CUDA_ARCH_LIST": value})
    assert checks["architectures"]["status"] == "failure" and checks["architectures"][
        "fix"
    ].endswith(fix)


def test_stale_lock(tmp_path):
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    checks, _ = doctor(env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert (
        checks["op builds"]["status"] == "failure"
        and checks["op builds"]["fix"] == f"rm {tmp_path}/cpu_adam/lock"
    )
    (tmp_path / "cpu_adam" / "lock").unlink()
    if ops.installed("cpu_adam", False):
        return  # in the container's environment they are there anyway
    checks, _ = doctor(
        "--nvme", "--nvme_path", tmp_path, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    )
    assert (
        checks["op builds"]["status"] == "warning"
        and "cpu_adam, async_io" in checks["op builds"]["found"]
    )


def test_no_compiler(tmp_path):
    bare = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    checks, _ = doctor(env=bare)
    assert (
        checks["compiler"]["status"] == "failure"
        and checks["compiler"]["fix"] == "apt-get install g++"
    )
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    # Our own optimizer step is still to be compiled.
    assert doctor(env=bare)[0]["compiler"]["status"] == "failure"
    ops._adam_library(tmp_path).parent.mkdir()
    ops._adam_library(tmp_path).touch()
    assert doctor(env=bare)[0]["compiler"]["found"] == "not needed: the ops are built"


def test_disks(tmp_path):
    checks, _ = doctor("--nvme", "--nvme_path", "/dev/shm/swap")
    assert checks["nvme"]["status"] == "failure" and "tmpfs" in checks["nvme"]["found"]
    checks, _ = doctor("--nvme_path", "/proc/nowhere", "--io")
    assert checks["nvme"]["status"] == "warning" and checks["nvme speed"]["status"] == "warning"
    checks, _ = doctor("--nvme_path", tmp_path, "--io")
    assert "GB/s written" in checks["nvme speed"]["found"] and not list(tmp_path.iterdir())


def test_limits(tmp_path):
    for limits, fix in (((256, 256), "limits.conf"), ((256, 8192), "ulimit -n 8192")):
        checks, _ = doctor(limits=[(resource.RLIMIT_NOFILE, limits)])
        assert checks["open files"]["status"] == "warning" and fix in checks["open files"]["fix"]
    checks, _ = doctor("--nvme_path", tmp_path / "not" / "there", "--nvme")
    assert "not there yet" in checks["nvme"]["found"] and not list(tmp_path.iterdir())


def test_in_a_container(tmp_path):
    """Each fix is the flag to add, and what a desktop is only warned of fails.

    How the image itself does: tests/docker.
    """
    checks, _ = doctor("--nvme_path", tmp_path, env={"ZERO_OFFLOAD_IMAGE": "cpu"})
    assert checks["gpu"]["status"] == "ok"
    checks, _ = doctor("--nvme_path", tmp_path, env={"ZERO_OFFLOAD_IMAGE": "cuda"})
    assert checks["gpu"]["status"] == "failure" and "--gpus all" in checks["gpu"]["fix"]
    own = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1]
    if not int(own, 16) & hardware.CAP_IPC_LOCK:  # root locks what it likes
        limits = [(resource.RLIMIT_MEMLOCK, (65536, 65536))]
        checks, _ = doctor(
            "--nvme_path", tmp_path, env={"ZERO_OFFLOAD_IMAGE": "cpu"}, limits=limits
        )
        assert (
            checks["locked memory"]["status"] == "failure"
            and checks["locked memory"]["fix"] == "docker run --ulimit memlock=-1"
        )


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize(
    "image, fix", [("cpu", "docker run --user 0:0"), ("", "chown 65534:65534")]
)
def test_directories_of_somebody_else(tmp_path, monkeypatch, image, fix):
    (tmp_path / "runs").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "runs" / "cache"))
    monkeypatch.setattr(hardware, "container", lambda: image or None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "getuid", lambda: 65534)
    monkeypatch.setattr(os, "getgid", lambda: 65534)
    for check in (resources.run_disk, resources.cache):
        found = check(Options(gpus=0))
        assert (
            found.status == "failure"
            and "owned by 0:0, mode 755; this is user 65534:65534" in found.found
        )
        assert found.fix.startswith(fix)


@pytest.fixture
def server():
    """A server whose answers the test chooses: .status, .location.

    .asked: [(path, authorization)].
    """

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            one.asked.append((self.path, self.headers.get("Authorization")))
            time.sleep(one.delay)
            self.send_response_only(one.status)
            if one.location:
                self.send_header("Location", one.location)
            self.end_headers()

        def log_message(self, *args):
            pass

    one = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    one.status, one.asked, one.delay, one.location = 200, [], 0, None
    one.address = f"http://127.0.0.1:{one.server_port}"
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()


@pytest.mark.parametrize(
    "status, found, words",
    [
        (200, "ok", "can be read"),
        (401, "failure", "gated"),
        (403, "failure", "gated"),
        (404, "failure", "has no"),
    ],
)
def test_gated_model(server, status, found, words):
    server.status = status
    checks, output = doctor(
        "--model",
        "meta-llama/Meta-Llama-3-8B",
        env={
            "HF_ENDPOINT": server.address,
            "HF_TOKEN": "hf_secret",
            "WANDB_API_KEY": "wandb_secret",
            "WANDB_BASE_URL": server.address,
        },
    )
    assert checks["hub"]["status"] == found and words in checks["hub"]["found"]
    assert (
        "/meta-llama/Meta-Llama-3-8B/resolve/main/config.json",
        "Bearer hf_secret",
    ) in server.asked
    assert "secret" not in output and checks["wandb"]["status"] == "ok"


def test_a_token_goes_to_one_server_only(server):
    other = ThreadingHTTPServer(("127.0.0.1", 0), server.RequestHandlerClass)
    server.status, server.location = 302, f"http://127.0.0.1:{other.server_port}/elsewhere"
    threading.Thread(target=other.serve_forever, daemon=True).start()
    checks, _ = doctor(
        "--model", "a/b", env={"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_secret"}
    )
    other.shutdown()
    assert (
        checks["hub"]["status"] == "ok"
        and [path for path, _ in server.asked].count("/elsewhere") == 0
    )


@pytest.mark.parametrize(
    "model, status, found",
    [("a/b", 503, "warning"), ("llama-3-8b", 200, "failure"), ("a/b c", 200, "failure")],
)
def test_what_the_hub_does_not_know(server, model, status, found):
    server.status = status
    checks, _ = doctor("--model", model, env={"HF_ENDPOINT": server.address})
    assert checks["hub"]["status"] == found


def test_servers_that_do_not_answer(server):
    server.delay = 60
    began = time.perf_counter()
    checks, _ = doctor(env={"HF_ENDPOINT": server.address, "WANDB_BASE_URL": server.address})
    assert (
        time.perf_counter() - began < 20
        and checks["hub"]["status"] == checks["wandb"]["status"] == "warning"
    )


def test_gpus(tmp_path):
    (tmp_path / "pynvml.py").write_text(PYNVML)
    environment = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1"}
    checks, _ = doctor(env=environment)
    assert checks["gpu"]["found"] == "2 x NVIDIA Test 24GB, 24.0 GiB"
    assert (
        checks["gpu processes"]["found"] == "GPU 1: 10.0 GiB"
        and checks["gpu processes"]["status"] == "warning"
    )
    assert (
        checks["pcie"]["status"] == "warning"
        and "x4 of x16" in checks["pcie"]["found"]
        and "8 GB/s" in checks["pcie"]["found"]
    )
    assert checks["gpu links"]["status"] == "warning" and "PCIe" in checks["gpu links"]["found"]
    import torch

    if torch.version.cuda is None:  # the CPU build of torch that the tests have cannot drive them
        assert checks["nvcc"]["status"] == "failure" and "CPU build" in checks["nvcc"]["found"]


def test_driver_too_old(tmp_path, monkeypatch):
    """CUDA 12.2's driver beside a torch for CUDA 13."""
    (tmp_path / "pynvml.py").write_text(PYNVML)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(ops, "torch_cuda", lambda: "13.0")
    options = Options(gpus=2)
    found = gpu.driver(options)
    assert found.status == "failure" and "cu126" in found.fix
    monkeypatch.setenv("ZERO_OFFLOAD_IMAGE", "cuda")
    assert gpu.driver(options).fix == "a newer driver on the host"
    monkeypatch.setattr(ops, "torch_cuda", lambda: "12.8")
    assert gpu.driver(options).status == "ok"
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


def test_before_every_run(tmp_path, monkeypatch, capsys):
    """A limit is a warning in the run's output.

    A driver that is too old ends it with exit code 3, before torch is imported.
    """
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--dataset", tmp_path / "missing.jsonl", "--use_cpu"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )
    assert (
        done.returncode == 2
        and "warning: open files: 256; needed: 4096" in done.stdout
        and "nofile" in done.stdout
    )
    (tmp_path / "pynvml.py").write_text(PYNVML)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ops, "torch_cuda", lambda: "13.0")
    with pytest.raises(RunError, match="not ready: driver") as error:
        cli.quick(True, False)
    assert error.value.code == 3 and "cu126" in str(error.value)
    cli.quick(False, False)
    monkeypatch.setattr(ops, "torch_cuda", lambda: "12.8")
    capsys.readouterr()
    cli.quick(True, False)
    assert "warning: gpu processes: GPU 1: 10.0 GiB" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["/dev/shm/x"], "tmpfs"),
        ([".", "--bytes", "lots"], "is not a size"),
        ([".", "--bytes", "900TB"], "free RAM"),
        ([".", "--seconds", "-5"], "1 to 3600"),
        (["--seconds", "-5", "."], "1 to 3600"),
        ([".", "--out", "/no/such/x.json"], "cannot be written"),
    ],
)
def test_bench_io_refuses(flags, words):
    done = subprocess.run(
        [sys.executable, "launch/bench.py", "io", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (2, 3) and words in done.stderr and "Traceback" not in done.stderr
    assert not list(Path(ROOT).glob(".bench-io*"))
