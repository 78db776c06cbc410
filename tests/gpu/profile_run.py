"""launch/train.py under torch's profiler for two updates: where a step's time goes, as JSON.

    PROFILE_OUT=profile.json PROFILE_AT=6 python tests/gpu/profile_run.py --deepspeed ds_z3_offload.json …
"""
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
UPDATES = 2
KINDS = (("copy to the GPU", r"HtoD"), ("copy to the host", r"DtoH"), ("copy on the GPU", r"DtoD|Memset"),
         ("attention", r"flash|fmha|cudnn_generated|sdpa|varlen"), ("matmul", r"gemm|nvjet|xmma|cutlass|gemv|splitK"),
         ("collectives", r"nccl"), ("kernels of Liger", r"^_(swiglu|rms|triton_rope|layer)|liger|element_mul"), ("other", r""))


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
        spans.setdefault(kind, []).append((event.start_ns(), event.start_ns() + event.duration_ns()))
        names[name] = names.get(name, 0) + event.duration_ns() / 1e9
    copies = ("copy to the GPU", "copy to the host")
    busy = union([s for kind, own in spans.items() if kind not in copies for s in own])
    host = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)[:25]
    return {"step_s": seconds / UPDATES, "computing_s": busy / UPDATES, "idle_s": (seconds - busy) / UPDATES,
            "kinds_s": {k: union(s) / UPDATES for k, s in spans.items()}, "launches": {k: len(s) / UPDATES for k, s in spans.items()},
            "kernels_s": {n[:120]: s / UPDATES for n, s in sorted(names.items(), key=lambda p: -p[1])[:40]},
            "host_self_s": {e.key[:80]: [e.self_cpu_time_total / 1e6 / UPDATES, e.count / UPDATES] for e in host}}


def install():
    import torch

    from trainer import loop

    plain, at = loop.OffloadTrainer._update_ended, int(os.environ.get("PROFILE_AT", 6))
    state = {"updates": 0}

    def ended(self):
        plain(self)
        state["updates"] += 1
        if state["updates"] == at:
            torch.cuda.synchronize()
            state["profiler"] = torch.profiler.profile(acc_events=True)
            state["profiler"].start()
            state["began"] = time.perf_counter()
        elif state["updates"] == at + UPDATES:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - state["began"]
            state["profiler"].stop()
            Path(os.environ["PROFILE_OUT"]).write_text(json.dumps(summary(state["profiler"], seconds), indent=1))

    loop.OffloadTrainer._update_ended = ended


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from trainer import run

    plain_start = run._start_processes

    def start(*args):
        ranks = plain_start(*args)
        install()
        return ranks

    run._start_processes = start
    run.leave(run.main())
