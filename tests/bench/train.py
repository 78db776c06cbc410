"""Speed and memory of training, ours and the stock engine's in one run. Random weights in the shapes of real models.

`python tests/bench/train.py train CASE …` starts launch/train.py as a user would and the baseline (tests/bench/baseline.py, the plain
DeepSpeed engine) after it, on the same machine; prints a table, and writes OUT/bench.jsonl, a log for each run and, where asked,
a section of docs/benchmarks.md. `plot` draws tokens/s against the micro-batch with the roofline.
"""

import argparse
import datetime
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from tests.tiny import make_tokenizer
from trainer import ROOT
from trainer.errors import BAD_INPUT, DONE, FAILED, RunError, did_you_mean, report, table
from trainer.run import _versions

SETTLED = 7  # updates before the counted ones: compilation, ZeRO's trace, the layers that keep their activations
SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary: Llama's
    "tiny": (256, 1024, 4, 4, 2, 512),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "70b": (8192, 28672, 80, 64, 8, 128256),
}


@dataclass
class Case:
    """One training job: what is measured, at which micro-batch (rows of max_length tokens), on how many GPUs."""

    shape: str
    method: str
    micro_batch: int
    config: str = "ds_z3_offload.json"
    max_length: int = 2048
    gpus: int = 1
    layers: int | None = None
    flags: list = field(default_factory=list)
    stock: int | None = None  # the baseline's best micro-batch, where it is another
    mixed: bool = (
        False  # rows of all lengths, most of them short, instead of rows that fill max_length
    )
    settled: int = (
        SETTLED  # a disk's time outweighs what settles: fewer where an update takes a minute
    )


CASES = {
    "tiny": Case("tiny", "full", 4, max_length=64, flags=["--learning_rate", "1e-3"]),
    "1b-full": Case("1b", "full", 16),
    "3b-full": Case("3b", "full", 16),
    "3b-full-nvme": Case("3b", "full", 16, "ds_z3_nvme_optimizer.json", settled=2),
    "3b-full-gpu": Case("3b", "full", 8, "ds_z3.json"),
    "8b-lora": Case("8b", "lora", 6, stock=16),
    "8b-lora-gpu": Case("8b", "lora", 6, "ds_z3.json"),
    "8b-lora-nvme": Case("8b", "lora", 16, "ds_z3_nvme.json", settled=2),
    "8b-lora-padded": Case("8b", "lora", 32, mixed=True),
    "8b-lora-packed": Case("8b", "lora", 16, mixed=True, flags=["--packing"]),
    "8b-lora-8k": Case("8b", "lora", 4, max_length=8192),
    "8b-lora-64k": Case("8b", "lora", 1, max_length=65536),
    "8b-full": Case("8b", "full", 8, gpus=2),
    "70b-lora": Case("70b", "lora", 4, gpus=2, stock=16),
    "70b-layers-full": Case("70b", "full", 16, layers=4),
    "70b-layers-full-nvme": Case(
        "70b", "full", 16, "ds_z3_nvme_optimizer.json", layers=4, settled=2
    ),
}
DEVICES = {
    "ds_z3.json": ("none", "none"),
    "ds_z3_offload.json": ("cpu", "cpu"),
    "ds_z3_nvme_optimizer.json": ("cpu", "nvme"),
    "ds_z3_nvme.json": ("nvme", "nvme"),
}
BASELINE = {"peer": ["--zero", "peer"], "tuned": ["--zero", "tuned", "--leaf", "--liger"]}


def _inputs(work, case, updates):
    """A model directory without weights, and rows that each fill max_length: (directory, file)."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[case.shape]
    folder = work / f"{case.shape}-{case.layers or layers}"
    rows = work / f"{'mixed' if case.mixed else 'rows'}-{case.max_length}.jsonl"
    text = (ROOT / "data" / "samples" / "train.jsonl").read_text()
    if not folder.exists():
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_hidden_layers=case.layers or layers,
            num_key_value_heads=kv_heads,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            bos_token_id=1,
            eos_token_id=2,
        ).save_pretrained(folder)
        make_tokenizer(folder, text.splitlines()[:2000])
    length = 6 * case.max_length
    text *= -(-2 * length // len(text))
    count, lengths = case.micro_batch * case.gpus * (updates + 1), random.Random(0)
    sizes = [length] * count
    if case.mixed:
        sizes = [min(length, int(lengths.lognormvariate(6.3, 0.9))) for _ in range(9 * count)]
    rows.write_text(
        "".join(
            json.dumps(
                {"instruction": "Go on.", "output": text[i * 977 % (len(text) - length) :][:size]}
            )
            + "\n"
            for i, size in enumerate(sizes)
        )
    )
    return folder, rows


def _run(label, command, log, seconds, gpu):
    """Run with a time limit of its own: (exit code, output)."""
    print(f"{label} …", end=" ", flush=True)
    began = time.monotonic()
    environment = os.environ if gpu else {**os.environ, "DS_ACCELERATOR": "cpu"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**environment, "WANDB_MODE": "disabled"},
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            code = 124
    print(f"exit {code} after {time.monotonic() - began:.0f} s", flush=True)
    text = log.read_text(errors="replace")
    if code:
        print("\n".join(text.splitlines()[-12:]), flush=True)
    return code, text


def ours(name, case, out, work, updates, seconds, gpu, flags=()):
    """launch/train.py with all its telemetry: medians over the updates after the case's first `settled`."""
    label = f"{name}-m{case.micro_batch}"
    folder, rows = _inputs(work, case, updates)
    directory = work / "runs" / f"{label}-{time.time():.0f}"
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        launcher if launcher.exists() else "deepspeed",
        "--num_gpus",
        case.gpus,
        os.environ.get("BENCH_SCRIPT", "launch/train.py"),
        "--deepspeed",
        case.config,
        "--model_name_or_path",
        folder,
        "--random_weights",
        "--dataset",
        rows,
        "--validation_split",
        "0",
        "--max_length",
        case.max_length,
        "--per_device_train_batch_size",
        case.micro_batch,
        "--max_steps",
        updates,
        "--method",
        case.method,
        "--learning_rate",
        "1e-5",
        "--lr_scheduler_type",
        "constant",
        "--export",
        "false",
        "--save_strategy",
        "no",
        "--output_dir",
        directory,
        "--nvme_path",
        work / "swap",
        *case.flags,
        *flags,
    ]
    code, text = _run(label, command, out / f"{label}.log", seconds, gpu)
    path = directory / "metrics.jsonl"
    records = (
        [r for r in map(json.loads, path.read_text().splitlines()) if "loss" in r]
        if path.is_file()
        else []
    )
    steady = records[case.settled :]
    result = {
        "case": name,
        "what": "ours",
        "exit": code,
        "micro_batch": case.micro_batch,
        "max_length": case.max_length,
        "gpus": case.gpus,
        "method": case.method,
        "updates": len(steady),
        "losses": [r["loss"] for r in records],
        "all_step_s": [round(r["step_s"], 3) for r in records],
        "flags": list(flags),
    }
    for key in (
        "tokens_per_s_per_gpu",
        "model_tflops_per_gpu",
        "step_s",
        "data_wait_s",
        "forward_s",
        "backward_s",
        "optimizer_s",
        "gpu_util",
        "gpu_mem_gib",
        "host_rss_gib",
        "pinned_gib",
        "nvme_read_gbps",
        "nvme_write_gbps",
        "h2d_gbps",
        "d2h_gbps",
    ):
        values = [r[key] for r in steady if r.get(key) is not None]
        if values:
            result[key] = round(statistics.median(values), 3)
    parameters = re.search(r"model: .*?, ([0-9,]+) parameters, ([0-9,]+) trained", text)
    peak, kept = (
        re.search(r"peak RAM ([0-9.]+) GiB", text),
        re.search(r"activations: ([0-9]+) of ([0-9]+)", text),
    )
    if parameters:
        result["parameters"], result["trained"] = (
            int(n.replace(",", "")) for n in parameters.groups()
        )
    if peak:
        result["host_peak_gib"] = float(peak[1])
        if parameters and case.gpus == 1:
            result["host_bytes_per_parameter"] = round(
                float(peak[1]) * 2**30 / result["parameters"], 1
            )
    if kept:
        result["kept_layers"] = kept[0].removeprefix("activations: ")
    return result


def baseline(name, case, kind, out, work, updates, seconds):
    """The stock engine with the configuration `kind`; peer: at its documented micro-batch of 1, four accumulated."""
    micro, accumulate = (1, 4) if kind == "peer" else (case.stock or case.micro_batch, 1)
    label = f"{name}-{kind}-m{micro}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        case.gpus,
        "tests/bench/baseline.py",
        "--size",
        case.shape,
        "--method",
        case.method,
        *BASELINE[kind],
        "--micro-batch",
        micro,
        "--accumulate",
        accumulate,
        "--steps",
        updates - case.settled,
        "--seq",
        case.max_length,
        *(["--layers", case.layers] if case.layers else []),
        "--warmup",
        2,
        *(
            word
            for tier, device in zip(("param", "optimizer"), DEVICES[case.config])
            for word in (f"--{tier}-device", device)
        ),
        "--nvme-path",
        work / "swap",
    ]
    code, text = _run(label, command, out / f"{label}.log", seconds, True)
    found = re.search(r"^RES (\{.*\})$", text, re.MULTILINE)
    got = json.loads(found[1]) if found else {}
    return {
        "case": name,
        "what": kind,
        "exit": code,
        "micro_batch": micro,
        "max_length": case.max_length,
        "gpus": case.gpus,
        "method": case.method,
        "updates": updates - case.settled,
        "tokens_per_s_per_gpu": got.get("tokens_per_s_per_gpu"),
        "model_tflops_per_gpu": got.get("model_tflops"),
        "step_s": got.get("step_s"),
        "gpu_allocated_gib": got.get("gpu_peak_gib"),
        "host_peak_gib": got.get("host_peak_gib_this_rank"),
        "parameters": got.get("parameters"),
    }


HEAD = (
    "case",
    "",
    "micro-batch",
    "tok/s",
    "TFLOP/s",
    "s a step",
    "GPU GiB",
    "host GiB",
    "layers kept",
)


def _row(r):
    def shown(key, digits):
        return "-" if r.get(key) is None else f"{r[key]:,.{digits}f}"

    what = r["what"] + (f", exit {r['exit']}" if r["exit"] else "")
    return (
        r["case"],
        what,
        str(r["micro_batch"]),
        shown("tokens_per_s_per_gpu", 0),
        shown("model_tflops_per_gpu", 0),
        shown("step_s", 2),
        shown("gpu_mem_gib", 1)
        if r["what"] == "ours"
        else f"{shown('gpu_allocated_gib', 1)} allocated",
        shown("host_peak_gib", 1),
        (r.get("kept_layers") or "-").split(" decoder")[0],
    )


def append(path, results, machine, command):
    """A section of a document: date, device, versions, command, table."""
    versions = ", ".join(
        f"{k} {v}"
        for k, v in _versions().items()
        if v and k in ("torch", "deepspeed", "transformers")
    )
    lines = [
        f"\n## `{command}`, {datetime.date.today()}",
        "",
        f"{machine.get('device', 'CPU')}"
        + (
            f", {machine['matmul_tflops']} TFLOP/s bf16 8192³, {machine['h2d_gbps']} GB/s to the GPU"
            if "matmul_tflops" in machine
            else ""
        )
        + f"; {versions}. Medians; tok/s and TFLOP/s are per GPU.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(_row(r)) + " |" for r in results),
        "",
    ]
    with open(path, "a") as file:
        file.write("\n".join(lines))


def plot(results, machine, path):
    """tokens/s per GPU against tokens a micro-batch, with the two roofs: the GPU's arithmetic and PCIe. LoRA or full, one shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    mine = sorted(
        (r for r in results if r.get("tokens_per_s_per_gpu")), key=lambda r: r["micro_batch"]
    )
    if not mine:
        raise RunError("nothing to draw", found="no measurement with tokens/s")
    for what in dict.fromkeys(r["what"] for r in mine):
        own = [r for r in mine if r["what"] == what]
        axes.plot(
            [r["micro_batch"] * r["max_length"] for r in own],
            [r["tokens_per_s_per_gpu"] for r in own],
            "o-",
            label=what,
        )
    first = next((r for r in mine if r.get("parameters")), mine[0])
    if "matmul_tflops" in machine and first.get("parameters"):
        count, passes = first["parameters"], 3 if first["method"] == "full" else 2
        tokens = [2 ** (i / 8) for i in range(80, 145)]
        for label, more in (
            ("arithmetic, everything recomputed", 1),
            ("arithmetic, nothing recomputed", 0),
        ):
            axes.axhline(
                machine["matmul_tflops"] * 1e12 / (2 * count * (passes + more)),
                linestyle="--",
                color="grey" if more else "black",
                label=f"{label} ({machine['matmul_tflops']} TFLOP/s)",
            )
        moved = 2 * 2 * count / first["gpus"]
        axes.plot(
            tokens,
            [t / (moved / (machine["h2d_gbps"] * 1e9)) for t in tokens],
            ":",
            color="black",
            label=f"weights over PCIe twice a micro-batch ({machine['h2d_gbps']} GB/s)",
        )
    axes.set(
        xscale="log",
        xlabel="tokens a micro-batch and GPU",
        ylabel="tokens/s per GPU",
        title=f"{first['case']}, {machine.get('device', 'CPU')}",
    )
    sizes = sorted({r["micro_batch"] * r["max_length"] for r in mine})
    axes.set_xlim(sizes[0] / 2, sizes[-1] * 1.5)
    axes.set_ylim(
        0,
        1.1
        * max(
            [r["tokens_per_s_per_gpu"] for r in mine]
            + [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        ),
    )
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _parser():
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train each case, ours and the baseline's")
    train.add_argument(
        "cases",
        nargs="*",
        help=f"of {', '.join(CASES)}; none: 8b-lora and 3b-full with a GPU, else tiny",
    )
    train.add_argument("--micro_batches", type=int, nargs="+", help="in place of the case's own")
    train.add_argument(
        "--baseline",
        nargs="*",
        choices=BASELINE,
        default=list(BASELINE),
        help="the stock engine beside it",
    )
    train.add_argument("--only", choices=("ours", "baseline"), help="one of the two")
    train.add_argument(
        "--updates",
        type=int,
        default=SETTLED + 6,
        help=f"the first {SETTLED} are not counted, of NVMe the first 2",
    )
    train.add_argument("--timeout", type=int, default=600, help="seconds a run")
    train.add_argument("--out", type=Path, default=Path("bench"), help="bench.jsonl and logs")
    train.add_argument("--work", type=Path, help="inputs, runs and swap files (default: OUT/work)")
    train.add_argument("--flags", default="", help="more flags for launch/train.py, in one string")
    train.add_argument(
        "--append", type=Path, help="add a section to this document, docs/benchmarks.md"
    )
    draw = commands.add_parser("plot", help="tokens/s against the micro-batch from a bench.jsonl")
    draw.add_argument("results", type=Path)
    draw.add_argument("--case")
    draw.add_argument("--out", type=Path, default=Path("bench.png"))
    return parser


def main(argv=None):
    """Exit code of tests/bench/train.py: 1 where a run failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    try:
        if options.command == "plot":
            lines = [json.loads(line) for line in options.results.read_text().splitlines()]
            machine = next((r for r in lines if "matmul_tflops" in r), {})
            plot(
                [r for r in lines if "case" in r and options.case in (None, r["case"])],
                machine,
                options.out,
            )
            print(options.out)
            return DONE
        return _train(options, " ".join(["tests/bench/train.py", *argv]))
    except (RunError, OSError, json.JSONDecodeError) as error:
        if not isinstance(error, RunError):
            error = RunError("the bench could not be made", found=str(error))
        report(error)
        return error.code


def _train(options, command):
    from trainer.system.hardware import gpu_count

    gpu = gpu_count() > 0
    names = options.cases or (["8b-lora", "3b-full"] if gpu else ["tiny"])
    for name in names:
        if name not in CASES:
            raise RunError(
                f"no case {name}{did_you_mean(name, CASES)}",
                needed=", ".join(CASES),
                code=BAD_INPUT,
            )
        if CASES[name].gpus > max(gpu_count(), 1) or (not gpu and name != "tiny"):
            raise RunError(
                f"the case {name} needs {CASES[name].gpus} GPU(s)",
                found=gpu_count(),
                fix="python tests/bench/train.py train tiny",
                code=3,
            )
    least = max(CASES[name].settled for name in names)
    if options.updates <= least:
        raise RunError(
            "--updates is too small",
            found=options.updates,
            needed=f"more than {least}, which are not counted",
        )
    out = options.out.absolute()
    work = (options.work or out / "work").absolute()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    # In a process of its own, or its memory on the GPU and of the host would stay taken.
    found = subprocess.run(
        [sys.executable, "launch/bench.py", "box", "--no_links"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    machine, results = json.loads(found.stdout.splitlines()[-1]) if not found.returncode else {}, []
    with open(out / "bench.jsonl", "a") as file:

        def keep(result):
            file.write(json.dumps(result) + "\n")
            file.flush()

        keep(
            {
                **machine,
                "command": command,
                "date": str(datetime.date.today()),
                "versions": _versions(),
            }
        )
        for name in names:
            base = CASES[name]
            for micro in options.micro_batches or [base.micro_batch]:
                case = Case(
                    **{
                        **vars(base),
                        "micro_batch": micro,
                        "stock": None if options.micro_batches else base.stock,
                    }
                )
                if options.only != "baseline":
                    results.append(
                        ours(
                            name,
                            case,
                            out,
                            work,
                            options.updates,
                            options.timeout,
                            gpu,
                            options.flags.split(),
                        )
                    )
                    keep(results[-1])
                for kind in (
                    options.baseline
                    if gpu and base.shape != "tiny" and options.only != "ours"
                    else ()
                ):
                    if kind == "peer" and any(
                        r["case"] == name and r["what"] == "peer" for r in results
                    ):
                        continue  # its micro-batch is always the same
                    results.append(
                        baseline(name, case, kind, out, work, options.updates, options.timeout)
                    )
                    keep(results[-1])
    print("\n" + table([HEAD, *map(_row, results)]) + f"\n\n{out / 'bench.jsonl'}")
    if options.append:
        append(options.append, results, machine, command)
    return FAILED if any(r["exit"] for r in results) else DONE


if __name__ == "__main__":
    sys.exit(main())
