"""`--deepspeed auto`: train with what the plan chooses for this model on this machine. Imports no torch."""

import json
import os
from dataclasses import replace
from pathlib import Path

from trainer.errors import DOES_NOT_FIT, RunError, say, table
from trainer.plan import calibrate, estimate, machine, model_shapes
from trainer.system import hardware, swap_dir

AUTO = "auto"
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def model_of(name):
    """The shapes of a model by directory, hub name, or None for the embedded default."""
    if name is None:
        return model_shapes.built_in("smollm2-135m")
    if Path(name).is_dir():
        return model_shapes.find(name)
    try:
        from huggingface_hub import hf_hub_download

        return model_shapes.from_dict(
            json.loads(Path(hf_hub_download(name, "config.json")).read_text()),
            name,
            f"{name}/config.json",
        )
    except RunError:
        raise
    except Exception as error:  # a dozen kinds, by network, right and name
        raise RunError(
            f"--deepspeed auto needs the shapes of {name}",
            found=" ".join(str(error).split())[:200],
            needed="its config.json: network, and for a gated model HF_TOKEN; or a local directory",
            fix="--deepspeed ds_z3_offload.json",
        ) from None


def machine_of(settings, gpu):
    """This machine as a plan.Box, by what does not change from one rank or moment to the next."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    found = machine.probe(settings.nvme_path, here if gpu else 0, measure=False)
    found.nodes = max(1, int(os.environ.get("WORLD_SIZE") or here) // here)
    try:
        swap_dir.check_directory(settings.nvme_path)
    except RunError:
        found.nvme = 0
    return found


def choose(settings):
    """Write the configuration, and the micro-batch and accumulation that make as many rows an update as was asked, into the settings.
    RunError with exit code 3 where nothing fits. Returns what is left to be done once the rest of the input was checked: a function
    that tries the micro-batch out, or None."""
    gpu = hardware.uses_gpu(settings)
    precision, _ = hardware.choose_precision(
        settings, estimate.read_config(estimate.CONFIGS / "ds_z3.json"), gpu, "--deepspeed auto"
    )
    job = estimate.job_of(settings, model_of(settings.model_name_or_path), precision, gpu)
    here, rows = machine_of(settings, gpu), None
    if any(settings.given(key) for key in _BATCH):
        rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    found, tried = [], {}
    for mode in estimate.MODES:
        sizes = (
            [rows // n for n in range(1, rows + 1) if rows % n == 0]
            if rows
            else estimate.MICRO_BATCHES
        )
        ways = [
            estimate.evaluate(
                replace(job, tokens_per_step=(rows or micro) * job.max_length * here.ranks),
                here,
                mode,
                micro,
            )
            for micro in sizes
        ]
        tried[mode] = ways
        limit = hardware.memlock_limit()
        for way in ways:
            if limit is not None and way["locked"] > limit:
                way["fits"], way["short"]["locked memory"] = False, way["locked"] - limit
        found.append(
            max(
                ways,
                key=lambda w: (
                    w["fits"],
                    w["tokens_per_s"] if w["fits"] else -sum(w["short"].values()),
                ),
            )
        )
    found = estimate.ordered(found)
    best = found[0]
    if not best["fits"]:
        raise RunError(
            "no configuration fits this machine",
            found="; ".join(f"{f['name']}: {estimate.why_not(f, best)}" for f in found),
            needed=estimate.remedy(job, here) or "another machine",
            fix="python launch/plan.py --help",
            code=DOES_NOT_FIT,
        )
    rows = [("configuration", "rows x steps", "s an update", "tok/s", "")] + [
        (
            f["name"],
            f"{f['micro_batch']} x {f['accumulation']}",
            f"{f['step_s']:.3g}",
            f"{f['tokens_per_s']:,.0f}",
            "chosen" if f is best else estimate.why_not(f, best),
        )
        for f in found
    ]
    say(f"--deepspeed auto\n{table(rows)}\n")
    if settings.calibrate and here.nodes > 1:
        raise RunError(
            "--calibrate true is for one machine",
            found=f"{here.nodes} machines",
            fix="leave --calibrate out",
        )

    def take(way):
        values = {
            "deepspeed": f"{best['name']}.json",
            _BATCH[0]: way["micro_batch"],
            _BATCH[1]: way["accumulation"],
        }
        settings.values.update(values)
        settings.sources.update(dict.fromkeys(values, "plan"))

    take(best)
    if not (settings.calibrate if settings.calibrate is not None else gpu and here.nodes == 1):
        return None
    ways = sorted(tried[best["name"]], key=lambda way: way["micro_batch"])
    return lambda: take(calibrate.fastest(settings, job, best["name"], ways, best, here))
