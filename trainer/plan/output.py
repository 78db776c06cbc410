"""A plan as text, JSON and a picture. `predictions`: the best first. Does not import torch."""

import errno
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.files import new_file
from trainer.console import table
from trainer.errors import BAD_INPUT, DOES_NOT_FIT, FAILED, RunError
from trainer.plan.estimate import GIB, MODES, Prediction, config_of
from trainer.plan.remedy import remedy, why_not

BAR = 24  # characters of all that is trained
# Of the parts of a GPU's memory: those beside what is placed and kept there; the context is taken.
GPU_WORK = (
    "gathered layers",
    "gradients of a layer",
    "inputs of layers",
    "a layer at work, or the logits",
)
TIERS = {"gpu": "GPU", "host": "RAM", "nvme": "NVMe"}  # of one GPU, one machine, one machine


def _batch(prediction: Prediction) -> dict[str, int]:
    return {
        "per_device_train_batch_size": prediction.micro_batch,
        "gradient_accumulation_steps": prediction.accumulation,
    }


def recommended(best: Prediction) -> dict[str, Any]:
    """Return the settings that the plan recommends, of the run and of the DeepSpeed JSON."""
    settings = {
        "config": f"{best.name}.json",
        **_batch(best),
        "max_length": best.job.max_length,
        "kept_layers": best.kept_layers,
        "kept_weights": best.kept_weights,
    }
    for key, value in config_of(best.name).zero.items():
        if value == "auto":
            settings[key] = best.config.zero[key]
    for tier in ("param", "optimizer"):
        block = best.config.offload(tier)
        if buffers := {key: block[key] for key in ("buffer_count", "buffer_size") if key in block}:
            settings[f"offload_{tier}"] = buffers
    return settings


def as_json(predictions: list[Prediction]) -> dict[str, Any]:
    """Return the plan for programs."""
    best = predictions[0]
    job, model = best.job, best.model
    content = {
        "model": {
            "name": model.name,
            "parameters": model.parameters,
            "trained": job.shapes.trainable,
        },
        "box": asdict(best.machine),
        "recommended": recommended(best) if best.fits else None,
        "modes": [_mode(prediction) for prediction in _by_mode(predictions)],
    }
    if best.short:
        content["remedy"] = remedy(job, best.machine)
    return content


def gpu_work(prediction: Prediction) -> float:
    """Return the bytes of a GPU that training takes beside what is placed and kept there."""
    sizes = prediction.tiers["gpu"]
    return sum(size for what, size in sizes.items() if what in GPU_WORK)


def places_table(prediction: Prediction) -> str:
    """Return what goes where, of one rank, as a table with bars."""
    places, trained = prediction.places, prediction.trainable
    states, in_ram = places.states_in_hbm, places.states_in_ram
    kinds = {
        "weights": (prediction.itemsize, places.weights_in_hbm, trained - places.weights_in_hbm),
        "gradients": (
            prediction.grad_itemsize,
            places.gradients_in_hbm,
            trained - places.gradients_in_hbm,
        ),
        "states": (prediction.state_bytes, states, in_ram, prediction.on_nvme),
    }
    rows = [["", *TIERS.values(), "GiB of a rank", ""]]
    for kind, (size, *elements) in kinds.items():
        shares = [*elements, 0.0][:3]
        cells = [_gib(share * size) if share else "-" for share in shares]
        widths = [round(BAR * share / trained) for share in shares]
        bar = "".join(mark * width for mark, width in zip("█▒░", widths, strict=True))
        rows.append([kind, *cells, _gib(trained * size), bar])
    slow = ""
    if (io := prediction.time["io"]) > prediction.step_s / 3:
        machine = prediction.machine
        slow = (
            f"note: the disk, {machine.nvme_read / 1e9:.1f} GB/s read and "
            f"{machine.nvme_write / 1e9:.1f} written, takes {io:.3g} s of a step's "
            f"{prediction.step_s:.3g}\n"
        )
    return f"\nwhat is trained, by tier (█ GPU, ▒ RAM, ░ NVMe)\n{table(rows)}\n{slow}"


def _by_mode(predictions: list[Prediction]) -> list[Prediction]:
    return sorted(predictions, key=lambda prediction: MODES.index(prediction.name))


def _mode(prediction: Prediction) -> dict[str, Any]:
    return {
        "name": prediction.name,
        "fits": prediction.fits,
        **{f"{tier}_bytes": round(size) for tier, size in prediction.totals.items()},
        "step_s": prediction.step_s,
        "tokens_per_s_per_gpu": prediction.tokens_per_s,
        "shortfall_bytes": round(sum(prediction.short.values())),
        "short": {tier: round(size) for tier, size in prediction.short.items()},
        **_batch(prediction),
        "tokens_per_step": prediction.step_tokens,
        "nvme_written_bytes_per_step": round(prediction.written),
        "kept_layers": prediction.kept_layers,
        "kept_weights": prediction.kept_weights,
        **prediction.tiers,
        "time_s": prediction.time,
        "hours": prediction.hours or None,
    }


def as_text(predictions: list[Prediction]) -> str:
    """Return the plan for people."""
    best = predictions[0]
    lines = [
        *_inputs(best),
        "",
        as_table(comparison(predictions)),
        "",
        "The four times would be taken alone; a step overlaps them. What lies where, GiB:",
        *(
            f"  {prediction.name}: {TIERS[tier]}: "
            + ", ".join(f"{what} {_gib(size)}" for what, size in sizes.items())
            for prediction in predictions
            for tier, sizes in prediction.tiers.items()
            if sizes
        ),
        "",
    ]
    if best.written:
        lines.append(
            f"NVMe is written {best.written / 1e9:,.0f} GB a step: 1 PB of its life in "
            f"{1e15 / best.written:,.0f} steps"
        )
    if best.fits:
        settings = (
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
            for key, value in recommended(best).items()
        )
        lines += [
            "settings: " + ", ".join(settings),
            "Numbers are predictions; each run prints its own beside them.",
        ]
    else:
        changes = remedy(best.job, best.machine) or "none of those that the plan knows"
        lines.append(f"does not fit; the smallest change that would make it fit: {changes}")
    return "\n".join(lines)


def _inputs(best: Prediction) -> Iterator[str]:
    """Yield what the plan is made for, and what was assumed."""
    job, model, machine = best.job, best.model, best.machine
    yield (
        f"{model.name}: {model.parameters:,} parameters, {job.shapes.trainable:,} trained "
        f"({job.method}), rows of {job.max_length} tokens, {job.precision}"
    )
    gpus, pcie = "no GPU: on the CPU", ""
    if machine.gpus:
        gpus = f"{machine.gpus} x {machine.name}, {machine.gpu_memory / 1e9:.0f} GB"
        pcie = f", {machine.pcie / 1e9:.0f} GB/s to a GPU"
    nodes = f", {machine.nodes} machines" if machine.nodes > 1 else ""
    yield (
        f"machine: {gpus}{nodes}; RAM {machine.ram / 1e9:,.0f} GB, "
        f"NVMe {machine.nvme / 1e9:,.0f} GB free; {machine.flops / 1e12:,.4g} TFLOP/s{pcie}, "
        f"{machine.ram_rate / 1e9:.0f} GB/s of RAM"
    )
    yield from (f"note: {note}" for note in machine.notes)
    if job.tokens_per_step not in (None, best.step_tokens):
        yield (
            f"note: a step is whole rows on every GPU: {best.step_tokens:,} tokens in place of "
            f"{job.tokens_per_step:,}"
        )


def comparison(predictions: list[Prediction]) -> list[dict[str, str]]:
    """Return the rows of the table of configurations: {column: cell}."""
    rows = []
    for prediction in predictions:
        used = prediction.totals
        row = {
            "configuration": prediction.name,
            "fits": "yes" if prediction.fits else "no",
            "rows x steps": f"{prediction.micro_batch} x {prediction.accumulation}",
            "GPU GiB": _gib(used["gpu"]),
            "RAM GiB": _gib(used["host"]),
            "NVMe GB": f"{used['nvme'] / 1e9:,.0f}",
            "s a step": f"{prediction.step_s:.3g}",
            **{part: f"{seconds:.3g}" for part, seconds in prediction.time.items()},
            "tok/s a GPU": f"{prediction.tokens_per_s:,.0f}",
        }
        if prediction.hours:
            row["hours"] = f"{prediction.hours:,.1f}"
        rows.append({**row, "": why_not(prediction, predictions[0])})
    return rows


def as_table(rows: list[dict[str, str]]) -> str:
    """Return the rows as lines, with their columns' names above."""
    return table([list(rows[0]), *(list(row.values()) for row in rows)])


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size < 1000 * GIB else f"{size / GIB:,.0f}"


def draw(predictions: list[Prediction], path: str) -> None:
    """Write a picture: stacked bars of each tier's memory by configuration, and its room.

    Raises RunError without matplotlib, or where the file cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError(
            "--plot needs matplotlib",
            found="it is not installed",
            fix="pip install matplotlib",
            code=DOES_NOT_FIT,
        ) from None
    predictions = _by_mode(predictions)
    best = predictions[0]
    machine = best.machine
    rooms = [
        ("gpu", "one GPU", machine.gpu_memory),
        ("host", "RAM of a machine", machine.ram),
        ("nvme", "NVMe of a machine", machine.nvme),
    ]
    used = [room for room in rooms if any(p.tiers[room[0]] for p in predictions)]
    figure = Figure(figsize=(5 * len(used), 4.5))
    colors = {}  # one for one thing, on all tiers
    ticks = [f"{p.name}\n{'fits' if p.fits else 'too large'}" for p in predictions]
    axes = figure.subplots(1, len(used), squeeze=False)[0]
    for axis, (tier, label, room) in zip(axes, used):
        axis.set(title=f"{label}: {room / GIB:,.0f} GiB", ylabel="GiB")
        memory = [prediction.tiers[tier] for prediction in predictions]
        tops = [0.0] * len(ticks)
        for what in dict.fromkeys(what for sizes in memory for what in sizes):
            heights = [sizes.get(what, 0) / GIB for sizes in memory]
            color = colors.setdefault(what, colormaps["tab20"](len(colors)))
            axis.bar(ticks, heights, 0.6, tops, label=what, color=color)
            tops = [top + height for top, height in zip(tops, heights)]
        axis.axhline(room / GIB, color="black", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(ticks)), ticks, rotation=25, ha="right", fontsize=8)
        axis.set_ylim(0, 1.15 * max(*tops, min(room / GIB, 3 * max(tops))))
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    figure.suptitle(f"{best.model.name}, {best.job.method}, rows of {best.job.max_length} tokens")
    try:
        Path(path).parent.stat()  # one that is missing is a slip of the pen
        with new_file(Path(path)) as partial:
            figure.savefig(partial, dpi=110, bbox_inches="tight")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        code = FAILED if full else BAD_INPUT
        raise RunError("the plan could not be written", found=error, code=code) from None
