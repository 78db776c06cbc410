"""launch/train.py under torch's profiler for two steps: where a step's time goes, as JSON.

PROFILE_OUT=p.json PROFILE_AT=6 python tests/gpu/profile_run.py --deepspeed ds_z3_offload.json …
python tests/gpu/profile_run.py --plot LABEL=profile.json LABEL=profile.json … OUT.png
"""

import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 2
KINDS = (
    ("copy to the GPU", r"HtoD"),
    ("copy to the host", r"DtoH"),
    ("copy on the GPU", r"DtoD|Memset"),
    ("attention", r"flash|fmha|cudnn_generated|sdpa|varlen"),
    ("matmul", r"gemm|nvjet|xmma|cutlass|gemv|splitK"),
    ("collectives", r"nccl"),
    ("kernels of Liger", r"^_(swiglu|rms|triton_rope|layer)|liger|element_mul"),
    ("other", r""),
)


def union(spans):
    """Seconds that are covered by at least one (begin, end) in nanoseconds."""
    total = end = 0
    for begin, finish in sorted(spans):
        total += max(0, finish - max(begin, end))
        end = max(end, finish)
    return total / 1e9


def summary(profiler, seconds):
    from torch.autograd import DeviceType

    spans, names = {}, {}
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != DeviceType.CUDA or event.duration_ns() <= 0:
            continue
        name = event.name()
        if name.startswith(("ProfilerStep", "##")) or "Context" in name:
            continue
        kind = next(k for k, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
        spans.setdefault(kind, []).append(
            (event.start_ns(), event.start_ns() + event.duration_ns())
        )
        names[name] = names.get(name, 0) + event.duration_ns() / 1e9
    copies = ("copy to the GPU", "copy to the host")
    busy = union([s for kind, own in spans.items() if kind not in copies for s in own])
    host = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)[:25]
    return {
        "step_s": seconds / STEPS,
        "computing_s": busy / STEPS,
        "idle_s": (seconds - busy) / STEPS,
        "kinds_s": {k: union(s) / STEPS for k, s in spans.items()},
        "launches": {k: len(s) / STEPS for k, s in spans.items()},
        "kernels_s": {
            n[:120]: s / STEPS for n, s in sorted(names.items(), key=lambda p: -p[1])[:40]
        },
        "host_self_s": {
            e.key[:80]: [e.self_cpu_time_total / 1e6 / STEPS, e.count / STEPS] for e in host
        },
    }


def install():
    import torch

    from trainer import trainer

    plain, at = trainer.OffloadTrainer._step_ended, int(os.environ.get("PROFILE_AT", 6))
    state = {"steps": 0}

    def ended(self):
        plain(self)
        state["steps"] += 1
        if state["steps"] == at:
            torch.cuda.synchronize()
            state["profiler"] = torch.profiler.profile(acc_events=True)
            state["profiler"].start()
            state["began"] = time.perf_counter()
        elif state["steps"] == at + STEPS:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - state["began"]
            state["profiler"].stop()
            Path(os.environ["PROFILE_OUT"]).write_text(
                json.dumps(summary(state["profiler"], seconds), indent=1)
            )

    trainer.OffloadTrainer._step_ended = ended


def plot(arguments):
    """A bar a profile: what the GPU computes and when it waits.

    Below it are the copies, which go on at the same time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    *given, target = arguments
    profiles = [
        (label, json.loads(Path(path).read_text()))
        for label, path in (g.split("=", 1) for g in given)
    ]
    kinds = ("matmul", "attention", "kernels of Liger", "other")
    colours = dict(zip((*kinds, "idle"), ("#3b6fb6", "#e08e2b", "#5aa469", "#9a7fb8", "#e4e4e4")))
    figure, axes = pyplot.subplots(figsize=(9, 1.1 + 1.1 * len(profiles)))
    longest = max(p["step_s"] for _, p in profiles)
    for y, (_, p) in enumerate(profiles):
        parts = {k: p["kinds_s"].get(k, 0) for k in kinds}
        # Kernels of two streams run at the same time now and then.
        shrink = min(1, p["computing_s"] / sum(parts.values()))
        left = 0
        for name, seconds in {
            **{k: s * shrink for k, s in parts.items()},
            "idle": p["idle_s"],
        }.items():
            axes.barh(y, seconds, 0.5, left, color=colours[name], label=name if y == 0 else None)
            if seconds > 0.04 * longest:
                axes.text(
                    left + seconds / 2, y, f"{seconds:.2f}", ha="center", va="center", fontsize=8
                )
            left += seconds
        for place, name, colour in (
            (0.34, "copy to the GPU", "#b03a3a"),
            (0.44, "copy to the host", "#444444"),
        ):
            axes.barh(
                y + place,
                p["kinds_s"].get(name, 0),
                0.08,
                color=colour,
                label=name if y == 0 else None,
            )
    axes.set_yticks(range(len(profiles)), [label for label, _ in profiles])
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step")
    axes.legend(
        fontsize=8,
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.3 / (0.4 + 0.4 * len(profiles))),
    )
    figure.savefig(target, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plot"]:
        plot(sys.argv[2:])
        sys.exit()
    sys.path[0] = str(ROOT)
    from trainer import run

    plain_start = run.join

    def start(*args):
        ranks = plain_start(*args)
        install()
        return ranks

    run.join = start
    run.leave(run.main())
