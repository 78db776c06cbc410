"""What the tests share: a tiny random Llama that really trains, its tokenizer, and runs of it.

A run is started with the command that a user types. Further down: runs in which faults happen.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from tiny import flags as flags_of
from tiny import swap_flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_MODE", "disabled")
# nohup and a shell's & leave these ignored, also in what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Threads of one run that wait for each other would hold the cores that another one needs.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
# Tests neither read nor fill the user's cache.
os.environ["ZERO_OFFLOAD_CACHE"] = tempfile.mkdtemp(prefix="zero-offload-test-")
atexit.register(shutil.rmtree, os.environ["ZERO_OFFLOAD_CACHE"], ignore_errors=True)


def make_tokenizer(folder):
    """A byte-level BPE of 512 entries, trained on the bundled samples, with a ChatML template."""
    from tests.tiny import make_tokenizer as train_tokenizer

    return train_tokenizer(
        folder, (ROOT / "data" / "samples" / "validation.jsonl").read_text().splitlines()
    )


def make_model(folder, **changes):
    """Save a tiny random Llama: its MLP matrices are 1 MiB in fp32, so they really go to NVMe."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of the tiny model."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_model(folder)
    make_tokenizer(folder)
    return folder


OPTIMIZATIONS = (
    "fused_loss fused_linear fused_step overlap_step leaf_modules resident_weights fetch_ahead"
).split()


def only(*names):
    """The flag that turns all optimizations off but these."""
    off = ",".join(name for name in OPTIMIZATIONS if name not in names)
    return ["--disable_optimizations", f"none,{off}" if off else "none"]


def write_rows(path, rows):
    """Write objects as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """(train file, validation file): 60 instruction rows of different lengths, and 11 more."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [
        json.loads(line)
        for line in (ROOT / "data" / "samples" / "train.jsonl").read_text().splitlines()[:71]
    ]
    return write_rows(folder / "train.jsonl", lines[:60]), write_rows(
        folder / "validation.jsonl", lines[60:]
    )


def samples(tokenizer, path, max_length=96, **options):
    """Return (Samples, Summary) of one file, all rows in file order.

    options: last_turn_only is the encoder's; the others go to `cut`.
    """
    import numpy as np

    from data import dataset, source, tokenize

    encoder = tokenize.Encoder(tokenizer, options.pop("last_turn_only", False))
    (one,) = source.resolve([str(path)])
    file = tokenize.tokenized(one, encoder)
    return dataset.cut([file], np.ones(len(file), bool), max_length, **options)


class Run:
    """What one training command left behind."""

    def __init__(self, code, output, directory):
        self.code, self.output, self.directory = code, output, directory

    @property
    def records(self):
        return [
            json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()
        ]

    @property
    def steps(self):
        return [r for r in self.records if "loss" in r]

    @property
    def losses(self):
        return [r["loss"] for r in self.steps]

    @property
    def evaluations(self):
        return [r for r in self.records if "eval_loss" in r]

    def manifest(self, step):
        return json.loads((self.directory / f"checkpoint-{step}" / "manifest.json").read_text())

    def parts(self, step):
        """{file: hash} of a checkpoint's weights and moments."""
        return {
            n: f["xxh3_128"]
            for n, f in self.manifest(step)["files"].items()
            if n.endswith(".safetensors")
        }


def train(
    directory,
    *flags,
    ranks=1,
    launcher=None,
    env=None,
    timeout=600,
    script="launch/train.py",
    **popen,
):
    """Run `deepspeed launch/train.py …` in the repository root. `directory`: the run's.

    launcher: whether DeepSpeed's starts it. One rank does without, as that imports torch twice.
    """
    binary = [sys.executable]
    if ranks > 1 if launcher is None else launcher:
        # On a machine without a virtual environment it is elsewhere on the PATH.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        port = 29600 + os.getpid() % 300
        deepspeed = shutil.which("deepspeed", path=path)
        binary = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(port)]
    command = [*binary, script, "--output_dir", str(directory), *map(str, flags)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", **(env or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        **popen,
    )
    return Run(done.returncode, done.stdout, Path(directory))


def command(*flags, env=None, timeout=600, **options):
    """Run launch/train.py without a launcher. Return the finished process."""
    return subprocess.run(
        [sys.executable, "launch/train.py", *map(str, flags)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        env={**os.environ, "DS_ACCELERATOR": "cpu", **(env or {})},
        **options,
    )


def inputs(model, rows_file, folder):
    """The flags for a model, its rows and the swap directory."""
    train_rows, validation_rows = rows_file
    own = flags_of(
        model_name_or_path=model,
        dataset=train_rows,
        validation_split=validation_rows,
        nvme_path=folder / "swap",
    )
    return [*own, *swap_flags(folder)]


@pytest.fixture
def trains(tiny_model, rows_file, tmp_path):
    """trains(name, *flags) → Run of the tiny model in fp32 that must have succeeded."""

    def go(name, *flags, code=0, **options):
        run = train(
            tmp_path / name,
            *inputs(tiny_model, rows_file, tmp_path),
            *"--precision fp32 --max_length 96 --learning_rate 1e-3".split(),
            *flags,
            **options,
        )
        assert run.code == code, run.output[-6000:]
        return run

    return go


# -- faults ------------------------------------------------------------------------------------
FLAGS = (
    "--precision fp32 --max_length 96 --learning_rate 1e-3 "
    "--per_device_train_batch_size 2 --eval_strategy no --eval_on_start false "
    "--export false"
).split()


class Running:
    """A run in the background."""

    def __init__(self, directory, process, log):
        self.directory, self.process, self.log = directory, process, log

    @property
    def output(self):
        return self.log.read_text()

    @property
    def records(self):
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [r for r in map(json.loads, lines) if "loss" in r]

    @property
    def losses(self):
        return [r["loss"] for r in self.records]

    def ranks(self):
        """The rank processes, by rank."""
        found = [
            p
            for p in psutil.Process(self.process.pid).children(recursive=True)
            if "--output_dir" in p.cmdline()
        ]
        return sorted(
            (p for p in found if "RANK" in p.environ()), key=lambda p: int(p.environ()["RANK"])
        )

    def has_ranks(self, count):
        """Wait until there are so many ranks. Return their processes."""
        return self.until(lambda r: len(r.ranks()) == count, 60, f"{count} ranks").ranks()

    def until(self, true, seconds=120, what="it"):
        """Wait until true(self); the run must not end before."""
        end = time.monotonic() + seconds
        while not true(self):
            assert time.monotonic() < end, (
                f"{what} did not come in {seconds} s\n{self.output[-4000:]}"
            )
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode} before\n{self.output[-4000:]}"
            )
            time.sleep(0.02)
        return self

    def until_step(self, step, seconds=120):
        return self.until(lambda r: len(r.records) >= step, seconds, f"step {step}")

    def until_saved(self, step, seconds=120):
        return self.until(
            lambda r: (r.directory / f"checkpoint-{step}").exists(), seconds, f"checkpoint-{step}"
        )

    def signal(self, number):
        self.process.send_signal(number)
        return self

    def ends(self, code, seconds=120):
        """Wait for the end; the exit code is `code`."""
        assert self.process.wait(seconds) == code, self.output[-6000:]
        return self


@pytest.fixture(scope="session")
def calm(tiny_model, rows_file, tmp_path_factory):
    """calm(*flags, ranks=1) → Run of the tiny model that nothing happens to."""

    def go(*flags, ranks=1):
        folder = tmp_path_factory.mktemp("calm")
        own = [*inputs(tiny_model, rows_file, folder), *FLAGS, *flags]
        # Ours imports no torch.
        script = "launch/supervise.py" if ranks > 1 else "launch/train.py"
        own += ["--num_gpus", ranks] if ranks > 1 else []
        run = train(folder / "run", *own, script=script)
        assert run.code == 0, run.output[-3000:]
        return run

    return go


@pytest.fixture
def starts(tiny_model, rows_file, tmp_path):
    """starts(name, *flags, ranks=1, supervised=True, env={}) → Running."""
    started = []

    def go(
        name, *flags, ranks=1, supervised=True, env=None, script=None, directory=None, named=True
    ):
        directory = Path(directory or tmp_path / name)
        entry = ["launch/supervise.py", "--num_gpus", ranks] if supervised else ["launch/train.py"]
        if script:
            entry = [*entry, "--script", script] if supervised else [script]
        entry += ["--output_dir", directory] if named else []
        own = [*inputs(tiny_model, rows_file, tmp_path), *FLAGS, *flags]
        command = [sys.executable, *entry, *own]
        log = tmp_path / f"{name}-{len(started)}.log"
        with open(log, "w") as out:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "DS_ACCELERATOR": "cpu", **(env or {})},
            )
        started.append(process)
        return Running(directory, process, log)

    yield go
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture
def disk(tmp_path):
    """disk(megabytes, *options of mkfs) → the directory of a small ext4 that is mounted.

    Needs root and loop devices.
    """
    mounted = []
    if os.getuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4")

    def make(megabytes, *options):
        image, place = tmp_path / f"disk{len(mounted)}.img", tmp_path / f"disk{len(mounted)}"
        with open(image, "wb") as file:
            file.truncate(megabytes * 2**20)
        place.mkdir()
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", *options, str(image)], check=True)
        done = subprocess.run(
            ["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no loop mount here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)])


@pytest.fixture
def row(request):
    """row(fault, what happens, seconds to recover or None) adds a line to the faults' table.

    A test calls it at its end, so a line stands for a passed test.
    """

    def add(fault, happens, seconds=None):
        recovery = f"{seconds:.0f} s" if seconds is not None else "-"
        # A property of the test, as it may run in a process of xdist's.
        request.node.user_properties.append(
            ("fault", (fault, happens, request.node.name, recovery))
        )

    return add


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.stats.get("passed", ())
    found = [tuple(row) for test in passed for name, row in test.user_properties if name == "fault"]
    if found:
        lines = [("fault", "what happens", "test", "recovery"), *sorted(found)]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        terminalreporter.write_line("")
        for line in lines:
            terminalreporter.write_line(
                " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip()
            )


def pytest_collection_modifyitems(items):
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.fault)


def pytest_configure(config):
    config.addinivalue_line("markers", "fault: what is under tests/faults")
    config.addinivalue_line("markers", "quick: faults that `make test` injects too")
    config.addinivalue_line("markers", "long: what `make test` leaves to test-long or test-faults")
