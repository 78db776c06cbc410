"""A run is held against its plan: what was predicted for it, and at its end what was measured. plan.json in the run directory."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

from trainer.checkpoint.checkpoints import gathered
from trainer.errors import RunError, is_main_process, say, table
from trainer.plan import estimate, machine, model_shapes

LIMIT = 0.15  # relative error from which a warning is printed
SETTLED = 6  # updates that are not counted: compilation, ZeRO's trace, the layers that keep their activations
GIB = 2**30


class Held:
    """The prediction of one run. config: the resolved DeepSpeed configuration; ranks: (all, on this machine); lengths: tokens of each
    training row; labelled: share of tokens that are trained."""

    def __init__(
        self, directory, settings, config, model_config, precision, gpu, ranks, lengths, labelled
    ):
        self.path, self.found = Path(directory) / "plan.json", None
        chosen = gathered(
            [
                settings.deepspeed,
                settings.per_device_train_batch_size,
                settings.gradient_accumulation_steps,
            ]
        )
        if any(c != chosen[0] for c in chosen):
            raise RunError(
                "--deepspeed auto chose differently on the machines of this run",
                found="; ".join(map(str, chosen)),
                needed="machines that are alike",
                fix="--deepspeed NAME.json and --per_device_train_batch_size N",
            )
        if not is_main_process():
            return
        micro, longest, mean = (
            settings.per_device_train_batch_size,
            int(lengths.max()),
            float(lengths.mean()),
        )
        if settings.packing:
            longest = mean = settings.max_length
        elif (
            settings.train_sampling_strategy != "group_by_length"
        ):  # a row is as long as the longest beside it
            some = lengths[: len(lengths) // micro * micro] if len(lengths) >= micro else lengths
            mean = float(some.reshape(-1, min(micro, len(some))).max(1).mean())
        try:
            model = model_shapes.from_dict(model_config.to_dict(), "model")
            spec = machine.probe(settings.nvme_path, ranks[1] if gpu else 0)
            spec.nodes = ranks[0] // ranks[1]
            if not gpu:  # ranks that share one CPU
                spec.flops /= ranks[1]
            job = replace(
                estimate.job_of(settings, model, precision, gpu),
                longest=longest,
                mean=mean,
                labelled=labelled,
            )
            self.found = estimate.prediction(
                job, spec, config, micro, settings.gradient_accumulation_steps
            )
        except RunError as error:
            say(f"plan: none, {str(error).splitlines()[0]}")
            return
        totals = {tier: sum(self.found[tier].values()) for tier in ("gpu", "host", "nvme")}
        say(
            "plan: "
            + (f"GPU {totals['gpu'] / GIB:.1f} GiB, " if gpu else "")
            + f"RAM {totals['host'] / GIB:.1f} GiB, "
            + (f"NVMe {totals['nvme'] / 1e9:.1f} GB, " if totals["nvme"] else "")
            + f"{self.found['step_s']:.3g} s an update"
        )
        self.predicted = {
            "gpu_bytes": totals["gpu"],
            "host_bytes": totals["host"],
            "nvme_bytes": totals["nvme"],
            "step_s": self.found["step_s"],
        }
        self._write({})

    def _write(self, measured):
        error = {k: measured[k] / v - 1 for k, v in self.predicted.items() if v and measured.get(k)}
        content = {
            "predicted": self.predicted,
            "measured": measured,
            "error": {k: round(v, 4) for k, v in error.items()},
            "gpu": self.found["gpu"],
            "host": self.found["host"],
            "nvme": self.found["nvme"],
            "time_s": self.found["time"],
            "kept_layers": self.found["kept_layers"],
        }
        try:
            self.path.write_text(json.dumps(content, indent=1))
        except OSError as problem:  # a full disk: the run can go on without it
            print(f"warning: {self.path}: {problem.strerror}", flush=True)
        return error

    def compare(self, records, host_bytes, nvme_bytes):
        """At the end. records: of metrics.jsonl; host_bytes: the peaks of all ranks here; nvme_bytes: of the swap files here."""
        if self.found is None:
            return
        steps = [r["step_s"] for r in records if r.get("step_s")]
        gpu = [r["gpu_mem_gib"] for r in records if r.get("gpu_mem_gib")]
        measured = {"host_bytes": host_bytes}
        if len(steps) > SETTLED:
            measured["step_s"] = statistics.median(steps[SETTLED:])
        if gpu and self.predicted["gpu_bytes"]:
            measured["gpu_bytes"] = max(gpu) * GIB
        if nvme_bytes:
            measured["nvme_bytes"] = nvme_bytes
        error = self._write(measured)
        names = {
            "gpu_bytes": ("GPU peak, GiB", GIB),
            "host_bytes": ("RAM peak, GiB", GIB),
            "nvme_bytes": ("NVMe, GB", 1e9),
            "step_s": ("an update, s", 1),
        }
        rows = [("", "planned", "measured", "off by")] + [
            (
                names[k][0],
                f"{self.predicted[k] / names[k][1]:.3g}",
                f"{measured[k] / names[k][1]:.3g}",
                f"{error[k]:+.0%}",
            )
            for k in names
            if k in error
        ]
        print(f"\n{table(rows)}")
        for key in error:
            if abs(error[key]) > LIMIT:
                print(
                    f"warning: {names[key][0].split(',')[0]} is {error[key]:+.0%} off the plan ({self.path})"
                )
