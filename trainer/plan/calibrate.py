"""The micro-batch of `--deepspeed auto`, tried out: short runs around the planned one, each in processes of its own, so that one that
runs out of memory costs an exit code and nothing else. Imports no torch."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from trainer import ROOT
from trainer.errors import DOES_NOT_FIT, RunError, say
from trainer.plan import machine
from trainer.system.hardware import die_with_parent

UPDATES, SETTLED = (
    12,
    8,
)  # updates of a trial, and those of them that are not counted: recompute.py decides in the fourth
MOST = 4  # trials, where one of them fits
SECONDS = 900  # that one may take
ACCUMULATION = 2  # micro-batches of an update at most: more tell nothing new
FAILED_FOR = 6 * 3600  # seconds for which a calibration that failed is not tried again
SAME = (
    "model_name_or_path",
    "model_revision",
    "trust_remote_code",
    "attn_implementation",
    "max_length",
    "packing",
    "method",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "fused_loss",
    "fused_linear",
    "kept_layers",
    "activation_offload",
    "bind_cores",
    "fused_step",
    "overlap_step",
    "leaf_modules",
    "fetch_ahead",
    "nvme_path",
    "gradient_checkpointing",
    "use_liger_kernel",
    "use_cpu",
    "torch_compile",
    "tf32",
    "optim",
)  # flags that a trial takes over
MEMORY = (
    "out of memory",
    "can't allocate memory",
    "process(es) for want of memory",
)  # what is said where there was too little
BEGUN = time.time()


def fastest(settings, job, mode, ways, planned, here):
    """The one of `ways` (dicts with micro_batch and accumulation, ascending) that trains fastest, from the planned one on upwards, or
    downwards where that is no gain. job, here: the plan.Job and plan.Box. Every rank of this machine calls it; the first tries,
    and the answer is kept
    for the next run."""
    about = [
        {name: settings.values[name] for name in SAME},
        asdict(job),
        mode,
        [(w["micro_batch"], w["accumulation"]) for w in ways],
        planned["micro_batch"],
        here.ranks,
        os.uname().nodename,
        here.name,
        here.gpu_memory,
        here.ram,
        sys.version,
        [
            _version(p)
            for p in ("torch", "deepspeed", "transformers", "liger-kernel", "zero-offload-trainer")
        ],
        [os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")],
    ]
    key = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]
    path = machine.measured_path().parent / "calibrated" / f"{key}.json"
    if int(os.environ.get("LOCAL_RANK") or 0) == 0 and _answer(path) is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}")
            new.touch()  # before minutes go into what cannot be written down
            new.write_text(
                json.dumps(_try(settings, job, mode, ways, ways.index(planned), here.ranks))
            )
            new.replace(path)
        except OSError as error:
            raise RunError(
                "the calibration cannot be kept",
                found=f"{path.parent}: {error.strerror}",
                fix="--calibrate false, or ZERO_OFFLOAD_CACHE=DIR",
            ) from None
    answer = _wait_for(path)
    if answer["index"] is None:
        raise RunError(
            "no micro-batch that was tried runs",
            found=f"{mode}, down to {ways[0]['micro_batch']} row(s)",
            needed="a smaller model or shorter rows",
            fix="--activation_offload true, or --max_length",
            code=DOES_NOT_FIT,
        )
    way = ways[answer["index"]]
    if answer["rate"]:
        say(
            f"calibrated: {way['micro_batch']} rows, {answer['rate']:,.0f} tok/s a rank (kept in {path})"
        )
    return way


def search(count, start, measure):
    """(index, rate) of the fastest of `count` sizes in ascending order; None where none runs. measure(i): its rate, or None where it
    does not fit."""
    rates = {start: measure(start)}
    i = start
    while rates[i] is not None and i + 1 < count and len(rates) < MOST:
        i += 1
        rates[i] = measure(i)
        if rates[i] is None or rates[i] <= rates[i - 1]:
            break
    i = start
    while i > 0 and (
        rates[i] is None or (len(rates) < MOST and rates[i] >= max(r or 0 for r in rates.values()))
    ):
        i -= 1
        rates[i] = measure(i)
    fitting = {i: rate for i, rate in rates.items() if rate is not None}
    return max(fitting.items(), key=lambda pair: pair[1]) if fitting else None


def _try(settings, job, mode, ways, start, ranks):
    say(
        f"calibration: short runs of {UPDATES} updates with random weights (--calibrate false leaves them out)"
    )
    with tempfile.TemporaryDirectory() as folder:
        fitted = []

        def measure(i):
            try:
                rate = _trial(settings, job, mode, ways[i], ranks, Path(folder))
            except (
                RunError
            ) as error:  # with the first a real run would fail too: let it say so itself
                if not fitted:
                    raise
                say(f"  {error}")
                return None
            fitted.extend([rate] * (rate is not None))
            return rate

        try:
            found = search(len(ways), start, measure)
        except RunError as error:
            say(f"calibration: {error}\n  the planned micro-batch is taken")
            found = start, 0
    return {"index": found and found[0], "rate": found and found[1], "time": time.time()}


def _trial(settings, job, mode, way, ranks, folder):
    """Tokens/s a rank, or None where the memory does not suffice."""
    micro, accumulation = way["micro_batch"], min(way["accumulation"], ACCUMULATION)
    label = f"{micro} x {accumulation} rows"
    rows, run, log = folder / "rows.jsonl", folder / f"run-{micro}", folder / f"{micro}.log"
    text = (ROOT / "data" / "samples" / "train.jsonl").read_text()
    text *= -(-8 * settings.max_length // len(text))
    with open(rows, "w") as file:  # each fills its row: the most that can come
        for i in range(micro * accumulation * ranks * (UPDATES + 1)):
            start = i * 977 % max(1, len(text) - 8 * settings.max_length + 1)
            file.write(
                json.dumps(
                    {
                        "instruction": "Go on.",
                        "output": text[start : start + 8 * settings.max_length],
                    }
                )
                + "\n"
            )
    flags = {name: settings.values[name] for name in SAME if settings.given(name)}
    if settings.model_name_or_path is not None:
        flags["random_weights"] = True  # as fast and as large as the real ones, and sooner there
        if Path(settings.model_name_or_path).exists():
            flags["model_name_or_path"] = Path(settings.model_name_or_path).absolute()
    flags.update(
        deepspeed=f"{mode}.json",
        dataset=rows,
        validation_split=0,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=UPDATES,
        eval_strategy="no",
        eval_on_start=False,
        export=False,
        save_strategy="no",
        report_to="none",
        output_dir=run,
        max_length=settings.max_length,
        precision=job.precision,
        nvme_path=Path(settings.nvme_path).absolute(),
    )
    command = [
        sys.executable,
        "launch/supervise.py",
        "--num_gpus",
        str(ranks),
        "--max_restarts",
        "0",
        *(str(word) for name, value in flags.items() for word in (f"--{name}", value)),
    ]
    drop = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CROSS_RANK",
        "CROSS_SIZE",
        "ZERO_OFFLOAD_SUPERVISED",
    )
    environment = {
        **{k: v for k, v in os.environ.items() if k not in drop},
        "WANDB_MODE": "disabled",
    }
    say(f"  {label} …")
    try:
        with open(log, "w") as file:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=SECONDS,
                preexec_fn=die_with_parent,
            ).returncode
    except subprocess.TimeoutExpired:
        code = f"none after {SECONDS} s"
    output, path = log.read_text(errors="replace"), run / "metrics.jsonl"
    records = (
        [r for r in map(json.loads, path.read_text().splitlines()) if "loss" in r]
        if path.is_file()
        else []
    )
    if code == 0 and len(records) > SETTLED:
        rate = statistics.median(r["tokens_per_s_per_gpu"] for r in records[SETTLED:])
        say(f"  {label}: {rate:,.0f} tok/s")
        return rate
    if any(word in output for word in MEMORY):
        say(f"  {label}: does not fit")
        return None
    raise RunError(
        f"the run with {label} failed",
        found="; ".join(output.strip().splitlines()[-3:])[:400] or f"exit code {code}",
    )


def _version(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _answer(path):
    """What is kept there; None where nothing is, where a calibration failed long ago, or where nothing ran at an earlier time, when
    another process may have held the memory."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    since = BEGUN - 60 if found["index"] is None else time.time() - FAILED_FOR
    return found if found["rate"] or found["time"] > since else None


def _wait_for(path):
    """The first rank's answer."""
    parent, until = os.getppid(), time.monotonic() + 8 * SECONDS
    while (found := _answer(path)) is None:
        if os.getppid() != parent or time.monotonic() > until:
            raise RunError(
                "the first rank has no answer from its calibration",
                found=f"nothing at {path}",
                fix="--calibrate false",
            )
        time.sleep(0.2)
    return found
