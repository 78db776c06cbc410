"""launch/train.py with an optimizer step on a time line: what runs beside what.

TIMELINE=t.json TIMELINE_AT=3 python tests/bench/timeline.py --deepspeed ds_z3_infinity.json …
python tests/bench/timeline.py --plot t.json OUT.png [TITLE]
"""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# From the top: (lane, colour).
LANES = (
    ("forward pass", "#3b6fb6"),
    ("backward pass", "#6f9bd1"),
    ("GPU: kernels", "#3b6fb6"),
    ("GPU: optimizer step", "#e08e2b"),
    ("copies to the GPU", "#b03a3a"),
    ("copies to the host", "#444444"),
    ("CPU: optimizer step", "#e08e2b"),
    ("NVMe read", "#5aa469"),
    ("NVMe written", "#9a7fb8"),
)
MICRO_BATCHES = 4  # of the next step, or all where it has fewer
FINEST = 1 / 3000  # of the picture: spans that are nearer to each other are one


class Recorder:
    """Collects spans, (begin, end) in seconds since the epoch, by lane."""

    def __init__(self):
        self.spans, self.on, self.profiler = defaultdict(list), False, None

    def timed(self, lane, function):
        """Return the function, each call of which is a span of the lane."""

        def call(*args, **kwargs):
            began = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                if self.on:
                    self.spans[lane].append((began, time.time()))

        return call

    def start(self):
        import torch

        self.on, self.began = True, time.time()
        if torch.cuda.is_available():
            self.profiler = torch.profiler.profile(acc_events=True)
            self.profiler.start()

    def stop(self, path):
        import torch

        if self.profiler:
            torch.cuda.synchronize()
        ended, self.on = time.time(), False
        if self.profiler:
            self.profiler.stop()
            self._add_kernels()
        finest = (ended - self.began) * FINEST
        lanes = {
            lane: [(round(a - self.began, 4), round(b - self.began, 4)) for a, b in merged]
            for lane, _ in LANES
            if (merged := merge(self.spans[lane], finest))
        }
        Path(path).write_text(json.dumps({"seconds": ended - self.began, "lanes": lanes}))

    def _add_kernels(self):
        from torch.autograd import DeviceType

        for event in self.profiler.profiler.kineto_results.events():
            name = event.name()
            if event.device_type() != DeviceType.CUDA or event.duration_ns() <= 0:
                continue
            if name.startswith(("ProfilerStep", "##")) or "Context" in name:
                continue
            lane = "GPU: kernels"
            if "HtoD" in name or "DtoH" in name:
                lane = "copies to the GPU" if "HtoD" in name else "copies to the host"
            elif name == "step":  # engine/gpu_adam.py
                lane = "GPU: optimizer step"
            begin = event.start_ns() / 1e9
            self.spans[lane].append((begin, begin + event.duration_ns() / 1e9))


def merge(spans, finest):
    """Return the spans in order, those as one that touch or nearly do."""
    merged = []
    for begin, end in sorted(spans):
        if merged and begin - merged[-1][1] < finest:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def install(path, at):
    """Record from the last micro-batch of optimizer step `at` on, for MICRO_BATCHES of the next."""
    import torch

    from trainer import trainer
    from trainer.engine import cpu_adam, state_ring
    from trainer.trainer import OffloadTrainer

    recorder, steps = Recorder(), {"made": 0, "micro": 0}
    cpu_adam.run = recorder.timed("CPU: optimizer step", cpu_adam.run)
    ring = state_ring.StateRing
    ring._read_block = recorder.timed("NVMe read", ring._read_block)
    ring._write_block = recorder.timed("NVMe written", ring._write_block)
    plain_ended, plain_step = OffloadTrainer._step_ended, OffloadTrainer.training_step
    accelerator = trainer.OffloadTrainer

    def ended(self):
        plain_ended(self)
        steps["made"] += 1
        steps["micro"] = 0
        if steps["made"] == at + 1 and recorder.on:
            recorder.stop(path)

    def training_step(self, *args, **kwargs):
        steps["micro"] += 1
        last = steps["micro"] == self.args.gradient_accumulation_steps
        if steps["made"] == at - 1 and last:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            recorder.start()
        loss = plain_step(self, *args, **kwargs)
        if recorder.on and steps["made"] == at and steps["micro"] == MICRO_BATCHES and not last:
            recorder.stop(path)
        return loss

    accelerator._step_ended, accelerator.training_step = ended, training_step
    if not torch.cuda.is_available():
        from trainer.monitor.telemetry import PhaseClock

        plain_start, plain_stop = PhaseClock.start, PhaseClock.stop
        began = {}

        def start(self, phase):
            began[phase] = time.time()
            return plain_start(self, phase)

        def stop(self, phase):
            if recorder.on and phase in ("forward", "backward") and phase in began:
                recorder.spans[f"{phase} pass"].append((began.pop(phase), time.time()))
            return plain_stop(self, phase)

        PhaseClock.start, PhaseClock.stop = start, stop


def plot(source, target, title=""):
    """Draw the lanes over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = json.loads(Path(source).read_text())
    lanes = [(lane, colour) for lane, colour in LANES if lane in made["lanes"]]
    figure, axes = pyplot.subplots(figsize=(11, 0.9 + 0.42 * len(lanes)))
    for y, (lane, colour) in enumerate(lanes):
        spans = made["lanes"][lane]
        axes.broken_barh([(a, b - a) for a, b in spans], (y - 0.36, 0.72), color=colour)
    busy = {lane: sum(b - a for a, b in made["lanes"][lane]) for lane, _ in lanes}
    labels = [f"{lane}  ({busy[lane]:.2f} s)" for lane, _ in lanes]
    axes.set_yticks(range(len(lanes)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, made["seconds"])
    axes.set_xlabel("seconds")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=10)
    figure.savefig(target, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plot"]:
        plot(*sys.argv[2:])
        sys.exit()
    sys.path[0] = str(ROOT)
    from trainer import run

    plain_join = run.join

    def join(*args):
        ranks = plain_join(*args)
        if os.environ["RANK"] == "0":
            install(os.environ["TIMELINE"], int(os.environ.get("TIMELINE_AT", 3)))
        return ranks

    run.join = join
    run.leave(run.main())
