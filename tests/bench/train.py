"""Speed and memory of training, ours and the stock engine's in one run.

`python tests/bench/train.py train CASE …` starts launch/train.py as a user would. After it, on the
same machine, it starts the baseline (tests/bench/baseline.py, the plain DeepSpeed engine). Both
train random weights in the shapes of real models. It prints a table, and writes OUT/bench.jsonl, a
log for each run and, with --append, a section of docs/benchmarks.md. `plot` draws tokens/s against
the micro-batch with the roofline.
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
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from tests.tiny import flags, make_tokenizer
from trainer import ROOT
from trainer.console import report, table
from trainer.errors import BAD_INPUT, DOES_NOT_FIT, DONE, FAILED, RunError, did_you_mean
from trainer.plan.model_shapes import PASSES, built_in_config
from trainer.plan.report import SETTLED_STEPS
from trainer.run_dir import versions

# Steps before the counted ones: one more than in a run's report, as all published figures have.
UNCOUNTED = SETTLED_STEPS + 1
SHAPES = {
    "tiny": {
        **built_in_config("llama-3-8b"),
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "1b": built_in_config("llama-3.2-1b"),
    "3b": built_in_config("llama-3.2-3b"),
    "8b": built_in_config("llama-3-8b"),
    "14b": built_in_config("qwen2.5-14b"),
    "70b": built_in_config("llama-3-70b"),
    "30b-a3b": built_in_config("qwen3-30b-a3b"),
}


@dataclass
class Case:
    """What is measured: a model's shape, its training, and the number of GPUs.

    The micro-batch is in rows of max_length tokens.
    """

    shape: str
    method: str
    micro_batch: int
    config: str = "ds_z3_offload.json"
    max_length: int = 2048
    gpus: int = 1
    layers: int | None = None
    flags: list = field(default_factory=list)
    # The baseline's best micro-batch, where it is another.
    stock: int | None = None
    # Rows of all lengths, most of them short, instead of rows that fill max_length.
    mixed: bool = False
    # The first steps, which are not counted. Fewer with NVMe, where a step takes a minute: the
    # disk's time outweighs what changes in the first steps.
    uncounted: int = UNCOUNTED


ACCUMULATION = "--gradient_accumulation_steps"
CASES = {
    "tiny": Case("tiny", "full", 4, max_length=64, flags=["--learning_rate", "1e-3"]),
    "1b-full": Case("1b", "full", 16),
    "3b-full": Case("3b", "full", 16),
    "3b-full-nvme": Case("3b", "full", 16, "ds_z3_nvme_optimizer.json", uncounted=2),
    "3b-full-gpu": Case("3b", "full", 8, "ds_z3.json"),
    "8b-lora": Case("8b", "lora", 6, stock=16),
    "8b-lora-gpu": Case("8b", "lora", 6, "ds_z3.json"),
    "8b-lora-nvme": Case("8b", "lora", 16, "ds_z3_nvme.json", uncounted=2),
    "8b-lora-padded": Case("8b", "lora", 32, mixed=True),
    "8b-lora-packed": Case("8b", "lora", 16, mixed=True, flags=["--packing"]),
    "8b-lora-8k": Case("8b", "lora", 4, max_length=8192),
    "8b-lora-64k": Case("8b", "lora", 1, max_length=65536),
    "8b-full": Case("8b", "full", 8, gpus=2),
    # 64k, 524k and 131k tokens a step.
    "8b-full-one": Case("8b", "full", 8, flags=[ACCUMULATION, "4"], uncounted=2),
    "14b-infinity": Case(
        "14b",
        "full",
        4,
        "ds_z3_infinity.json",
        flags=[ACCUMULATION, "64", "--grad_accum_dtype", "bf16"],
        uncounted=1,
    ),
    "70b-infinity": Case(
        "70b", "full", 2, "ds_z3_infinity.json", gpus=4, flags=[ACCUMULATION, "8"], uncounted=1
    ),
    "70b-quarter-infinity": Case(
        "70b", "full", 2, "ds_z3_infinity.json", layers=20, flags=[ACCUMULATION, "8"], uncounted=1
    ),
    "30b-a3b-lora": Case("30b-a3b", "lora", 4, layers=12),
    "30b-a3b-experts": Case(
        "30b-a3b", "lora", 4, layers=12, flags=["--lora_target_modules", "attention,experts"]
    ),
    "30b-a3b-full": Case("30b-a3b", "full", 4, layers=4),
    "70b-lora": Case("70b", "lora", 4, gpus=2, stock=16),
    "70b-layers-full": Case("70b", "full", 16, layers=4),
    "70b-layers-full-nvme": Case(
        "70b", "full", 16, "ds_z3_nvme_optimizer.json", layers=4, uncounted=2
    ),
}
DEVICES = {
    "ds_z3.json": ("none", "none"),
    "ds_z3_offload.json": ("cpu", "cpu"),
    "ds_z3_nvme_optimizer.json": ("cpu", "nvme"),
    "ds_z3_nvme.json": ("nvme", "nvme"),
}
BASELINE = {"peer": ["--zero", "peer"], "tuned": ["--zero", "tuned", "--leaf", "--liger"]}


def _inputs(work, case, steps):
    """Write a model directory without weights, and rows for so many steps: (directory, file)."""
    layers = case.layers or SHAPES[case.shape]["num_hidden_layers"]
    folder = work / f"{case.shape}-{layers}"
    rows = work / f"{'mixed' if case.mixed else 'rows'}-{case.max_length}.jsonl"
    text = (ROOT / "data" / "samples" / "train.jsonl").read_text()
    if not folder.exists():
        _configuration(case.shape, layers).save_pretrained(folder)
        make_tokenizer(folder, text.splitlines()[:2000])
    length = 6 * case.max_length
    text *= -(-2 * length // len(text))
    count, lengths = case.micro_batch * case.gpus * (steps + 1), random.Random(0)
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


def _configuration(name, layers):
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    shape = SHAPES[name]
    return AutoConfig.for_model(
        **{
            **shape,
            "num_hidden_layers": layers,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[shape["model_type"]]],
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )


def _run(label, command, log, seconds, gpu):
    """Run a command with a time limit. Return (exit code, output)."""
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


# Of metrics.jsonl: the medians of these are in the result.
MEASURES = (
    "tokens_per_s_per_gpu model_tflops_per_gpu step_s data_wait_s forward_s backward_s optimizer_s "
    "gpu_util gpu_mem_gib host_rss_gib pinned_gib nvme_read_gbps nvme_write_gbps h2d_gbps d2h_gbps"
).split()
TRAINING = (
    "--random_weights --validation_split 0 --learning_rate 1e-5 --lr_scheduler_type constant "
    "--export false --save_strategy no"
).split()


def ours(name, case, out, work, steps, seconds, gpu, extra=()):
    """Run launch/train.py with all its telemetry. Return medians over the counted steps.

    seconds: the time limit. extra: more flags.
    """
    label = f"{name}-m{case.micro_batch}"
    folder, rows = _inputs(work, case, steps)
    directory = work / "runs" / f"{label}-{time.time():.0f}"
    launcher = Path(sys.executable).with_name("deepspeed")
    own = flags(
        deepspeed=case.config,
        method=case.method,
        max_length=case.max_length,
        per_device_train_batch_size=case.micro_batch,
        max_steps=steps,
        model_name_or_path=folder,
        dataset=rows,
        output_dir=directory,
        nvme_path=work / "swap",
    )
    script = os.environ.get("BENCH_SCRIPT", "launch/train.py")
    start = [launcher if launcher.exists() else "deepspeed", "--num_gpus", case.gpus, script]
    command = [*start, *TRAINING, *own, *case.flags, *extra]
    code, text = _run(label, command, out / f"{label}.log", seconds, gpu)
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [r for r in map(json.loads, lines) if "loss" in r]
    steady = records[case.uncounted :]
    result = {
        "case": name,
        "what": "ours",
        "exit": code,
        "micro_batch": case.micro_batch,
        "max_length": case.max_length,
        "gpus": case.gpus,
        "method": case.method,
        "steps": len(steady),
        "losses": [r["loss"] for r in records],
        "all_step_s": [round(r["step_s"], 3) for r in records],
        "flags": list(extra),
    }
    for key in MEASURES:
        values = [r[key] for r in steady if r.get(key) is not None]
        if values:
            result[key] = round(statistics.median(values), 3)
    return {**result, **_read_log(text, case.gpus)}


def _read_log(text, gpus):
    """The sizes that a run prints: parameters, peak of the host's memory, layers kept."""
    result = {}
    parameters = re.search(r"model: .*?, ([0-9,]+) parameters, ([0-9,]+) trained", text)
    peak = re.search(r"peak RAM ([0-9.]+) GiB", text)
    kept = re.search(r"activations: ([0-9]+) of ([0-9]+)", text)
    if parameters:
        result["parameters"], result["trained"] = (
            int(n.replace(",", "")) for n in parameters.groups()
        )
    if peak:
        result["host_peak_gib"] = float(peak[1])
        if parameters and gpus == 1:
            result["host_bytes_per_parameter"] = round(
                float(peak[1]) * 2**30 / result["parameters"], 1
            )
    if kept:
        result["kept_layers"] = kept[0].removeprefix("activations: ")
    return result


def baseline(name, case, kind, out, work, steps, seconds):
    """Run the stock engine with the configuration `kind`.

    peer: with its documented micro-batch of 1, four accumulated. seconds: the time limit.
    """
    micro, accumulate = (1, 4) if kind == "peer" else (case.stock or case.micro_batch, 1)
    label = f"{name}-{kind}-m{micro}"
    parameters, optimizer = DEVICES[case.config]
    options = {
        "size": case.shape,
        "method": case.method,
        "micro-batch": micro,
        "accumulate": accumulate,
        "steps": steps - case.uncounted,
        "seq": case.max_length,
        "warmup": 2,
        "param-device": parameters,
        "optimizer-device": optimizer,
        "nvme-path": work / "swap",
    }
    if case.layers:
        options["layers"] = case.layers
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    script = [*launcher, case.gpus, "tests/bench/baseline.py"]
    command = [*script, *flags(**options), *BASELINE[kind]]
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
        "steps": steps - case.uncounted,
        "tokens_per_s_per_gpu": got.get("tokens_per_s_per_gpu"),
        "model_tflops_per_gpu": got.get("model_tflops"),
        "step_s": got.get("step_s"),
        "gpu_allocated_gib": got.get("gpu_peak_gib"),
        "host_peak_gib": got.get("host_peak_gib_this_rank"),
        "parameters": got.get("parameters"),
    }


HEAD = ["case", "", "micro-batch", "tok/s", "TFLOP/s", "s a step"]
HEAD += ["GPU GiB", "host GiB", "layers kept"]


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
    packages = ("torch", "deepspeed", "transformers")
    known = ", ".join(f"{k} {v}" for k, v in versions().items() if v and k in packages)
    device = machine.get("device", "CPU")
    if "matmul_tflops" in machine:
        device += f", {machine['matmul_tflops']} TFLOP/s bf16 8192³"
        device += f", {machine['h2d_gbps']} GB/s to the GPU"
    lines = [
        f"\n## `{command}`, {datetime.date.today()}",
        "",
        f"{device}; {known}. Medians; tok/s and TFLOP/s are per GPU.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(_row(r)) + " |" for r in results),
        "",
    ]
    with open(path, "a") as file:
        file.write("\n".join(lines))


def plot(results, machine, path):
    """Draw tokens/s per GPU against the tokens of a micro-batch, for one shape and method.

    The two roofs are the GPU's arithmetic and PCIe.
    """
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
        count, passes = first["parameters"], PASSES[first["method"]]
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
        "--steps",
        "--updates",
        type=int,
        default=UNCOUNTED + 6,
        help=f"the first {UNCOUNTED} are not counted, with NVMe the first 2",
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


def _check(options, names, gpus):
    """Raise RunError where a case cannot be measured here."""
    for name in names:
        if name not in CASES:
            raise RunError(
                f"no case {name}{did_you_mean(name, CASES)}",
                needed=", ".join(CASES),
                code=BAD_INPUT,
            )
        if CASES[name].gpus > max(gpus, 1) or (not gpus and name != "tiny"):
            raise RunError(
                f"the case {name} needs {CASES[name].gpus} GPU(s)",
                found=gpus,
                fix="python tests/bench/train.py train tiny",
                code=DOES_NOT_FIT,
            )
    least = max(CASES[name].uncounted for name in names)
    if options.steps <= least:
        raise RunError(
            "--steps is too small",
            found=options.steps,
            needed=f"more than {least}, which are not counted",
        )


def _measure_machine():
    """The speed of the GPU and of its link. {} where there is none."""
    # In a process of its own, or its memory on the GPU and of the host would stay taken.
    probe = subprocess.run(
        [sys.executable, "launch/bench.py", "machine", "--no_links"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return {} if probe.returncode else json.loads(probe.stdout.splitlines()[-1])


def _measure(options, names, gpu, out, work):
    """Yield the results of all cases: ours, then the baseline's."""
    run, limit = (out, work, options.steps), options.timeout
    for name in names:
        base, peer_is_measured = CASES[name], False
        with_baseline = gpu and base.shape != "tiny" and options.only != "ours"
        for micro in options.micro_batches or [base.micro_batch]:
            case = replace(
                base, micro_batch=micro, stock=None if options.micro_batches else base.stock
            )
            if options.only != "baseline":
                yield ours(name, case, *run, limit, gpu, options.flags.split())
            for kind in options.baseline if with_baseline else ():
                if kind == "peer" and peer_is_measured:
                    continue  # its micro-batch is always the same
                peer_is_measured |= kind == "peer"
                yield baseline(name, case, kind, *run, limit)


def _train(options, command):
    from trainer.system.hardware import gpu_count

    gpus = gpu_count()
    names = options.cases or (["8b-lora", "3b-full"] if gpus else ["tiny"])
    _check(options, names, gpus)
    out = options.out.absolute()
    work = (options.work or out / "work").absolute()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    machine, results = _measure_machine(), []
    date = str(datetime.date.today())
    with open(out / "bench.jsonl", "a") as file:

        def keep(record):
            file.write(json.dumps(record) + "\n")
            file.flush()

        keep({**machine, "command": command, "date": date, "versions": versions()})
        for result in _measure(options, names, gpus > 0, out, work):
            results.append(result)
            keep(result)
    print("\n" + table([HEAD, *map(_row, results)]) + f"\n\n{out / 'bench.jsonl'}")
    if options.append:
        append(options.append, results, machine, command)
    return FAILED if any(r["exit"] for r in results) else DONE


if __name__ == "__main__":
    sys.exit(main())
