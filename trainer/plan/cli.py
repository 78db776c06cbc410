"""The command launch/plan.py: a table, JSON, a picture, files to train with. Imports no torch."""

import argparse
import json
import re
import sys
from pathlib import Path

import yaml

from trainer.config.ds_config import CONFIGS
from trainer.config.flags import RunArguments
from trainer.errors import BAD_INPUT, DOES_NOT_FIT, DONE, RunError, did_you_mean, report, table
from trainer.plan import estimate, model_shapes
from trainer.plan import machine as boxes

GIB = 2**30
MACHINE = {
    "gpu_memory": "memory of one GPU: 80GB",
    "ram": "of one machine: 1TB",
    "nvme": "free on a local NVMe: 4TB, 0 for none",
    "nvme_read": "12GB/s",
    "nvme_write": "6GB/s",
    "pcie": "RAM to one GPU, each way: 50GB/s",
    "gpu_link": "GPU to GPU: 300GB/s (default: as --pcie)",
    "gpu_tflops": "dense bf16 products of one GPU: 700",
    "ram_rate": "RAM traffic of the CPU's step: 90GB/s",
    "nodes": "machines",
    "network": "between machines, of one of them: 25GB/s",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        word = re.search(r"unrecognized arguments: --(\S+)", message)
        near = did_you_mean(word[1], [a.dest for a in self._actions]) if word else ""
        raise RunError(
            f"command line: {message}{near}", fix="python launch/plan.py --help lists the flags"
        )


def _parser():
    parser = _Parser(
        prog="plan.py",
        description="What fits which configuration and how fast, before anything is loaded.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        help=f"a model directory, a config.json, or one of {', '.join(model_shapes.BUILT_IN)} (default: "
        "smollm2-135m, the embedded model)",
        default="smollm2-135m",
    )
    defaults = RunArguments()
    parser.add_argument("--method", default=defaults.method)
    parser.add_argument("--lora_r", default=str(defaults.lora_r))
    parser.add_argument("--lora_target_modules", default=defaults.lora_target_modules)
    parser.add_argument("--max_length", default=str(defaults.max_length))
    parser.add_argument(
        "--precision", help="bf16, fp16 or fp32 (default: bf16 with GPUs, else fp32)"
    )
    parser.add_argument(
        "--tokens_per_step",
        help="tokens of one update over all GPUs (default: one micro-batch each)",
    )
    parser.add_argument("--dataset_tokens", help="then the hours of one epoch are shown")
    parser.add_argument("--activation_offload", nargs="?", const="true", default="false")
    parser.add_argument("--gpus", help="of one machine (default: those that are here)")
    for name, text in MACHINE.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument(
        "--nvme_path",
        default=defaults.nvme_path,
        help="whose free space counts, where the machine is this one",
    )
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument(
        "--write",
        metavar="DIR",
        type=Path,
        help="write the recommended DeepSpeed JSON and a recipe there",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="memory by tier, as a picture"
    )
    return parser


def _whole(text, name, least=1):
    text = str(text).replace(",", "").replace("_", "")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value != value or not least <= value < 1e18 or value != int(value):
        raise RunError(
            f"--{name} is not a number that can be",
            found=text,
            needed=f"a whole number of at least {least}",
        )
    return int(value)


def _choice(value, name, choices):
    if value not in choices:
        raise RunError(
            f"--{name} is not one of its choices", found=value, needed=" | ".join(choices)
        )
    return value


def job_and_box(options):
    """(plan.Job, plan.Box) of the command line."""
    for name, value in vars(options).items():
        if isinstance(value, str) and not value.strip():
            raise RunError(f"--{name} is empty", fix=f"leave --{name} out, or give a value")
    machine = {name: getattr(options, name) for name in ("gpus", *MACHINE)}
    asked = {name for name in machine if machine[name] is not None}
    here = None
    if "gpu_memory" not in asked and not (machine["gpus"] == "0" and "ram" in asked):
        # Another machine is told by its memory; without that it is this one, with what is given in the place of what is found.
        here = boxes.probe(
            options.nvme_path, None if options.gpus is None else _whole(options.gpus, "gpus", 0)
        )
    box = boxes.given(machine, here) if asked - {"gpus"} or not here else here
    precision = options.precision or ("bf16" if box.gpus else "fp32")
    job = estimate.Job(
        model_shapes.find(options.model),
        _choice(options.method, "method", ("full", "lora")),
        _whole(options.lora_r, "lora_r"),
        options.lora_target_modules,
        _whole(options.max_length, "max_length", 2),
        options.tokens_per_step and _whole(options.tokens_per_step, "tokens_per_step"),
        _choice(precision, "precision", tuple(model_shapes.ITEMSIZE)),
        _choice(options.activation_offload.lower(), "activation_offload", ("true", "false"))
        == "true",
    )
    if precision == "fp16" and not box.gpus:
        raise RunError("--precision fp16 needs a GPU", found="no GPUs", fix="--precision fp32")
    if options.plot and options.plot.suffix not in (".png", ".pdf", ".svg"):
        raise RunError(
            "--plot is not a picture's name", found=options.plot, needed="FILE.png, .pdf or .svg"
        )
    if job.tokens_per_step and job.tokens_per_step < job.max_length * box.ranks:
        raise RunError(
            "--tokens_per_step is less than one row a GPU",
            found=job.tokens_per_step,
            needed=f"at least {job.max_length * box.ranks} ({box.ranks} x --max_length {job.max_length})",
        )
    job.model.adapters(job.lora_r, job.lora_target_modules)
    return job, box


def _size(value):
    return f"{value / GIB:.1f}" if value < 1000 * GIB else f"{value / GIB:,.0f}"


def text(job, box, found, dataset_tokens=None):
    """The plan for people."""
    best, trained = (
        found[0],
        job.model.shapes(job.precision, job.method, job.lora_r, job.lora_target_modules).trainable,
    )
    where = (
        f"{box.gpus} x {box.name}, {box.gpu_memory / 1e9:.0f} GB"
        if box.gpus
        else "no GPU: on the CPU"
    )
    several = f", {box.nodes} machines" if box.nodes > 1 else ""
    lines = [
        f"{job.model.name}: {job.model.parameters:,} parameters, {trained:,} trained ({job.method}), rows of {job.max_length} "
        f"tokens, {job.precision}",
        f"machine: {where}{several}; RAM {box.ram / 1e9:,.0f} GB, NVMe "
        f"{box.nvme / 1e9:,.0f} GB free; {box.flops / 1e12:,.4g} TFLOP/s"
        + (f", {box.pcie / 1e9:.0f} GB/s to a GPU" if box.gpus else "")
        + f", {box.ram_rate / 1e9:.0f} GB/s of RAM",
        *(f"note: {note}" for note in box.notes),
    ]
    if job.tokens_per_step and job.tokens_per_step != (
        tokens := estimate.rows_of(job, box) * box.ranks * job.max_length
    ):
        lines.append(
            f"note: an update is whole rows on every GPU: {tokens:,} tokens in place of {job.tokens_per_step:,}"
        )
    head = [
        "configuration",
        "fits",
        "rows x steps",
        "GPU GiB",
        "RAM GiB",
        "NVMe GB",
        "s an update",
        "compute",
        "transfer",
        "optimizer",
        "I/O",
        "tok/s a GPU",
        *(["hours"] if dataset_tokens else []),
        "",
    ]
    rows = [head]
    for one in found:
        hours = (
            [f"{dataset_tokens / (one['tokens_per_s'] * box.ranks) / 3600:,.1f}"]
            if dataset_tokens
            else []
        )
        rows.append(
            [
                one["name"],
                "yes" if one["fits"] else "no",
                f"{one['micro_batch']} x {one['accumulation']}",
                _size(sum(one["gpu"].values())),
                _size(sum(one["host"].values())),
                f"{sum(one['nvme'].values()) / 1e9:,.0f}",
                f"{one['step_s']:.3g}",
                *(f"{one['time'][k]:.3g}" for k in ("compute", "transfer", "optimizer", "io")),
                f"{one['tokens_per_s']:,.0f}",
                *hours,
                "recommended" if one is best and one["fits"] else estimate.why_not(one, best),
            ]
        )
    lines += [
        "",
        table(rows),
        "",
        "The four times would be taken alone; an update overlaps them. What lies where, GiB:",
    ]
    for one in found:
        lines += [
            f"  {one['name']}: {label}: "
            + ", ".join(f"{k} {_size(v)}" for k, v in one[tier].items())
            for tier, label in (("gpu", "GPU"), ("host", "RAM"), ("nvme", "NVMe"))
            if one[tier]
        ]
    lines.append("")
    if best["written"]:
        lines.append(
            f"NVMe is written {best['written'] / 1e9:,.0f} GB an update: 1 PB of its life in "
            f"{1e15 / best['written']:,.0f} updates"
        )
    if not best["fits"]:
        mend = estimate.remedy(job, box)
        lines.append(
            f"does not fit; the least that would mend it: {mend or 'none of the changes that the plan knows'}"
        )
    else:
        shown = estimate.as_json(job, box, found)["recommended"]
        lines.append(
            "settings: "
            + ", ".join(
                f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in shown.items()
            )
        )
        lines.append("Numbers are predictions; each run prints its own beside them.")
    return "\n".join(lines)


def write(folder, options, job, box, found):
    """The recommended configuration, comments kept, with its numbers in the place of "auto"; and a recipe. Returns the paths."""
    chosen = estimate.as_json(job, box, found)["recommended"]
    content = (CONFIGS / chosen["config"]).read_text()
    numbers = {k: v for k, v in chosen.items() if isinstance(v, int)}
    content = re.sub(
        r'"(\w+)": "auto"',
        lambda m: (
            f'"{m[1]}": {numbers[m[1]]}'
            if m[1] in numbers and m[1] not in ("gradient_accumulation_steps",)
            else m[0]
        ),
        content,
    )
    for block in (k for k, v in chosen.items() if isinstance(v, dict)):
        start = content.index(f'"{block}"')
        end = content.index("}", start)
        inner = content[start:end]
        for key, value in chosen[block].items():
            inner = inner.replace(f'"{key}": "auto"', f'"{key}": {value}')
        content = content[:start] + inner + content[end:]
    recipe = {
        "method": job.method,
        "precision": job.precision,
        "max_length": job.max_length,
        "per_device_train_batch_size": chosen["per_device_train_batch_size"],
        "gradient_accumulation_steps": chosen["gradient_accumulation_steps"],
    }
    if job.method == "lora":
        recipe.update(lora_r=job.lora_r, lora_target_modules=job.lora_target_modules)
    if job.activation_offload:
        recipe["activation_offload"] = True
    path = Path(options.model)
    if path.exists():
        recipe["model_name_or_path"] = str((path if path.is_dir() else path.parent).absolute())
    elif job.model.name != "smollm2-135m":  # which is the embedded model
        recipe["model_name_or_path"] = model_shapes.HUB[job.model.name]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / chosen["config"]
    recipe["deepspeed"] = str(target.absolute())
    target.write_text(content)
    (folder / "recipe.yaml").write_text(
        "# Made by launch/plan.py: train with --config "
        + str(folder / "recipe.yaml")
        + "\n"
        + yaml.safe_dump(recipe, sort_keys=False)
    )
    return target, folder / "recipe.yaml"


def draw(job, box, found, path):
    """Stacked bars: what lies on the GPU, in RAM and on NVMe under each configuration, and the room that there is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tiers = [
        (t, label, room)
        for t, label, room in (
            ("gpu", "one GPU", box.gpu_memory),
            ("host", "RAM of a machine", box.ram),
            ("nvme", "NVMe of a machine", box.nvme),
        )
        if any(f[t] for f in found)
    ]
    modes = sorted(found, key=lambda f: estimate.MODES.index(f["name"]))
    names = list(dict.fromkeys(k for t in ("gpu", "host", "nvme") for f in modes for k in f[t]))
    colours = pyplot.get_cmap("tab20")  # one for one thing
    figure, axes = pyplot.subplots(1, len(tiers), figsize=(5 * len(tiers), 4.5), squeeze=False)
    for axis, (tier, label, room) in zip(axes[0], tiers, strict=True):
        bottom = [0.0] * len(modes)
        axis.set(title=f"{label}: {room / GIB:,.0f} GiB", ylabel="GiB")
        for what in dict.fromkeys(k for f in modes for k in f[tier]):
            heights = [f[tier].get(what, 0) / GIB for f in modes]
            axis.bar(
                range(len(modes)),
                heights,
                0.6,
                bottom,
                label=what,
                color=colours(names.index(what)),
            )
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axis.axhline(room / GIB, color="black", linestyle="--", linewidth=1)
        ticks = [f"{f['name']}\n{'fits' if f['fits'] else 'too large'}" for f in modes]
        axis.set_xticks(range(len(modes)), ticks, rotation=20, fontsize=8)
        axis.set_ylim(0, 1.15 * max(*bottom, min(room / GIB, 3 * max(bottom))))
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    figure.suptitle(f"{job.model.name}, {job.method}, rows of {job.max_length} tokens")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv=None):
    """Exit code of launch/plan.py: 3 where nothing fits."""
    try:
        options = _parser().parse_args(argv)
        job, box = job_and_box(options)
        found = estimate.compare(job, box)
        tokens = options.dataset_tokens and _whole(options.dataset_tokens, "dataset_tokens")
        if options.json:
            shown = estimate.as_json(job, box, found)
            if tokens:
                for mode in shown["modes"]:
                    mode["hours"] = tokens / (mode["tokens_per_s_per_gpu"] * box.ranks) / 3600
            if not found[0]["fits"]:
                shown["remedy"] = estimate.remedy(job, box)
            print(json.dumps(shown, indent=1))
        else:
            print(text(job, box, found, tokens))
        if options.plot:
            draw(job, box, found, options.plot)
        if options.write and found[0]["fits"]:
            print(
                *write(options.write, options, job, box, found),
                sep="\n",
                file=sys.stderr if options.json else sys.stdout,
            )
        return DONE if found[0]["fits"] else DOES_NOT_FIT
    except RunError as error:
        report(error)
        return error.code
    except OSError as error:
        report(RunError("the plan could not be written", found=str(error)))
        return BAD_INPUT
