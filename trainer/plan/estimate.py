"""What a job needs on each tier of memory with each configuration, and which one is best.

Each formula has its source beside it; docs/planning.md has them as a table. Sizes are bytes.
Constants were measured (docs/benchmarks.md, docs/planning.md) where it says so; the others follow
from the code that they name. A rank is one GPU, or one CPU process where there is no GPU. Does not
import torch.
"""

import functools
import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from trainer.config.ds_config import CONFIGS, RING_PIECE, STAGED_PIECES, SWAPPED, DeepSpeedConfig
from trainer.plan.layers import total
from trainer.plan.timing import step_seconds
from trainer.plan.workload import Workload
from trainer.system.hardware import CONTEXT

GIB = 2**30
MODES = ("ds_z3", "ds_z3_offload", "ds_z3_infinity", "ds_z3_nvme_optimizer", "ds_z3_nvme")
# The layers that the host is before the GPU where it does not wait (engine/patches.py): their
# weights are in memory by then.
LAYERS_AHEAD = 2
LAYERS_GATHERED = 2 + LAYERS_AHEAD  # the one at work and the next, each once
# The share of a GPU that stays free: for gaps in the allocator's blocks, and for what libraries
# allocate by themselves. The run keeps to it too (modeling/kept_layers.py).
SPARE_GPU = 0.05
SPARE_RAM = 0.03
CONTEXT_MORE = 1.0 * GIB  # NCCL's buffers, with more than one rank
BASE_RAM = 2.5 * GIB  # of a GPU rank's process with all libraries
BASE_RAM_CPU = 0.42 * GIB
CUDA_BUILD = 0.15 * GIB  # more, where torch is built for CUDA: torch 2.13
# On a CPU: of all layers' activations, kept or made again, what glibc's heap has beside them
# (mallinfo2: as much free as used). Sizes change from one batch to the next, and the adapters'
# small results lie in between. From the runs of docs/planning.md.
HEAP = {"full": 0.3, "lora": 1.0}
START = "while it starts: what is trained"
WHOLE_LOGITS = 5
CPU_LOGITS = 2**28  # bytes of fp32 logits at a time (modeling/loss.py)

Bytes = dict[str, float]  # by what they are for


@dataclass
class Prediction(Workload):
    """What a workload needs, and how long it takes.

    tiers: bytes of one GPU, and of one machine's RAM and NVMe. totals: their sums. short: bytes
    that are missing; it fits where none are. name: of the configuration. written: bytes that one
    machine writes to NVMe in an optimizer step. time: seconds of an optimizer step that compute,
    transfer, optimizer and io would take alone. step_s: of all of them together. tokens_per_s: of
    one rank. step_tokens: of all ranks. Both with rows of max_length. hours: of one epoch, 0 where
    its tokens are not known.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = rank_bytes(self)
        kept = self.kept_layers = _kept_layers(self, sum(rank.values()))
        if kept:
            rank["kept activations"] = kept * (self.kept_bytes - self.input_bytes)
        weights = self.kept_weights = _kept_weights(self, kept, sum(rank.values()))
        if weights:  # where all stay, those at work and those fetched ahead are among them
            more = min(weights, max(0, self.model.layers - LAYERS_GATHERED))
            rank["kept weights"] = more * self.shapes.layer * self.itemsize
        machine, host = self.machine, ram_bytes(self, kept)
        if not self.on_gpu:  # what would be on a GPU is in RAM
            rank["heap"] = HEAP[self.job.method] * self.model.layers * self.mean_bytes
            host = {what: size * machine.ranks_here for what, size in rank.items()} | host
            rank = {}
        self.tiers = {"gpu": rank, "host": host, "nvme": nvme_bytes(self)}
        self.totals = {tier: sum(sizes.values()) for tier, sizes in self.tiers.items()}
        self.time, self.step_s = step_seconds(self, kept, weights)
        missing = {
            "GPU": self.totals["gpu"] - machine.gpu_memory * (1 - SPARE_GPU),
            "RAM": self.totals["host"] - machine.ram * (1 - SPARE_RAM),
            "NVMe": self.totals["nvme"] - machine.nvme,
        }
        if machine.memlock is not None:
            missing["locked memory"] = self.locked - machine.memlock
        self.short = {what: size for what, size in missing.items() if size > 0}
        self.fits, self.name = not self.short, Path(self.config.where).stem
        self.written = self.written_bytes * self.shapes.trainable * self.machine_share
        tokens = self.micro_batch * self.accumulation * self.job.max_length
        self.tokens_per_s = tokens / self.step_s
        self.step_tokens = tokens * self.ranks
        self.hours = (self.job.dataset_tokens or 0) / self.step_tokens * self.step_s / 3600

    @property
    def score(self) -> tuple[bool, float]:
        """Whether it fits, and how fast it is or how little is missing. Larger is better.

        A difference in speed of 2 % counts as none.
        """
        if self.short:
            return False, -sum(self.short.values())
        return True, round(math.log(self.tokens_per_s) * 50)


def _counted(sizes: dict[str, float]) -> Bytes:
    """Return those that are not 0; False counts as 0."""
    return {what: size for what, size in sizes.items() if size}


def rank_bytes(work: Workload) -> Bytes:
    """Return what one rank has on its GPU, or in RAM without one, beside kept activations."""
    job, model, shapes, zero = work.job, work.model, work.shapes, work.zero
    ranks, on_gpu, itemsize = work.ranks, work.on_gpu, work.itemsize
    adapters = 0 if job.full else shapes.trainable
    layer = shapes.layer * itemsize
    persistent = 0
    if zero["stage3_param_persistence_threshold"] > shapes.largest_trainable:
        persistent = adapters * itemsize
    places = work.places
    bucket = min(zero["reduce_bucket_size"], shapes.largest_trainable) * itemsize
    if work.fused_step and ranks == 1 and on_gpu and places.gradients_in_hbm == work.trainable:
        bucket = 0  # a gradient is added to its place at once (engine/fused_step.py)
    at_work = work.layer_bytes + 3 * work.tokens * model.at_work * itemsize
    inputs = 2 if job.activation_offload and on_gpu else model.layers
    gathered = persistent + min(
        zero["stage3_max_live_parameters"] * itemsize, 3 * layer + model.embedding * itemsize
    )
    if on_gpu and work.params_on != "nvme":
        gathered += LAYERS_AHEAD * layer
    return _counted(
        {
            "context": on_gpu and CONTEXT + CONTEXT_MORE * (ranks > 1),
            "parameters": itemsize
            * (
                (model.parameters + adapters) / ranks
                if work.params_on == "none"
                else places.weights_in_hbm
            ),
            "optimizer": work.state_bytes * places.states_in_hbm,
            "gradients": work.grad_itemsize * places.gradients_in_hbm,
            "gathered layers": work.gathers and gathered,
            "gradients of a layer": bucket + (2 * layer if job.full else persistent),
            "inputs of layers": inputs * work.input_bytes,
            # The loss is taken before any layer is computed again.
            "a layer at work, or the logits": max(at_work, loss_bytes(work)),
        }
    )


def ram_bytes(work: Workload, kept: int) -> Bytes:
    """Return what one machine has in RAM, beside what its CPU ranks have in place of a GPU.

    kept: layers that keep their activations.
    """
    job, on_gpu, share, places = work.job, work.on_gpu, work.machine_share, work.places
    ranks_here, itemsize, trainable = work.machine.ranks_here, work.itemsize, work.trainable
    # The stock step has the gradients once more, in fp32.
    stock = work.optimizer_on == "cpu" and not work.fused_step
    parameters = work.model.parameters + (0 if job.full else work.shapes.trainable)
    in_ram = work.params_on == "cpu" and parameters * share - places.weights_in_hbm * ranks_here
    gradients = (trainable - places.gradients_in_hbm) * (work.grad_itemsize + 4 * stock)
    states = work.state_bytes * places.states_in_ram
    staged = on_gpu and max(places[:2]) > places.states_in_hbm
    # What goes to the GPUs is loaded into RAM first, but where all weights are there, and twice
    # their size is free (build.py).
    to_gpu = on_gpu and itemsize * places.weights_in_hbm
    if job.full and places.weights_in_hbm == trainable:
        room = work.machine.gpu_memory * (1 - SPARE_GPU) - CONTEXT
        to_gpu *= 2 * to_gpu > room
    inputs = work.model.layers - kept if job.activation_offload and on_gpu else 0
    return _counted(
        {
            "processes": (BASE_RAM if on_gpu else _base_ram_cpu()) * ranks_here,
            "parameters": in_ram * itemsize,
            "pinned rounding": pinned_rounding(work) * ranks_here,
            "optimizer": states * ranks_here,
            "gradients": gradients * ranks_here,
            "NVMe buffers": (work.locked + work.ring) * ranks_here,
            "staging": staged and staging_bytes(work) * ranks_here,
            START: max(0, to_gpu - gradients - states) * ranks_here,
            "inputs of layers": inputs * work.input_bytes * ranks_here,
        }
    )


def staging_bytes(work: Workload) -> float:
    """Return one rank's buffers of weights and gradients between GPU and CPU (staging.py)."""
    return STAGED_PIECES * RING_PIECE * (work.itemsize + work.grad_itemsize)


@functools.cache
def _base_ram_cpu() -> float:
    try:
        build = metadata.version("torch")
    except metadata.PackageNotFoundError:
        build = "+cpu"
    return BASE_RAM_CPU + (0 if "+cpu" in build else CUDA_BUILD)


def nvme_bytes(work: Workload) -> Bytes:
    """Return what one machine has on NVMe."""
    model, share, ranks_here = work.model, work.machine_share, work.machine.ranks_here

    def swapped(tensors: list[int]) -> int:
        sizes = (elements * work.itemsize for elements in tensors)
        return sum(size for size in sizes if size / work.ranks >= SWAPPED)

    # A tied head is written once before it is tied, and its file stays.
    outside = model.rest.tensors + [model.embedding] * model.tied
    parameters = total(model.kinds, lambda kind: swapped(kind.tensors)) + swapped(outside)
    sub_group_bytes = 4 * min(work.zero["sub_group_size"], work.trainable)
    optimizer = sub_group_bytes >= SWAPPED and work.state_bytes * work.on_nvme * ranks_here
    return _counted(
        {
            "parameters": work.params_on == "nvme" and parameters * share,
            "optimizer": optimizer,
        }
    )


def _kept_layers(work: Workload, used: float) -> int:
    """Return the layers that keep their activations. used: bytes of the GPU without those."""
    layers, kept = work.model.layers, work.job.kept_layers
    if not work.job.gradient_checkpointing:
        return layers
    if kept is None and work.on_gpu:
        room = work.machine.gpu_memory * (1 - SPARE_GPU) - used
        kept = max(0, room // max(work.kept_bytes - work.input_bytes, 1))
    return min(layers, int(kept or 0))


def _kept_weights(work: Workload, kept: int, used: float) -> int:
    """Return the layers whose weights stay for the backward pass.

    Activations of all layers come first (engine/kept_weights.py). kept: layers that keep theirs.
    used: bytes of the GPU without those weights.
    """
    wanted, layers = work.job.kept_weights, work.model.layers
    if not (work.gathers and work.on_gpu) or work.params_on == "nvme":
        return 0
    if wanted is None:
        room = work.machine.gpu_memory * (1 - SPARE_GPU) - used
        all_kept = work.job.gradient_checkpointing and kept == layers
        wanted = int(max(0, room) // (work.shapes.layer * work.itemsize)) if all_kept else 0
        wanted += LAYERS_GATHERED * (wanted >= layers - LAYERS_GATHERED > 0)
    return min(layers, wanted)


def pinned_rounding(work: Workload) -> float:
    """Return the bytes of one rank that are lost where torch rounds pinned memory up.

    torch's allocator takes the next power of two for each block (CachingHostAllocator). Frozen
    parameters are pinned one by one. Trained ones and gradients are locked as they are
    (engine/pinned.py).
    """
    exact = work.machine.exact_pinning or work.job.full
    if exact or not work.on_gpu or work.params_on != "cpu":
        return 0

    def lost(size: float) -> float:
        return 2 ** math.ceil(math.log2(size)) - size

    return total(
        [*work.model.kinds, work.model.rest],
        lambda layer: sum(lost(-(-size // work.ranks) * work.itemsize) for size in layer.tensors),
    )


def loss_bytes(work: Workload) -> float:
    """Return the bytes of the chunked loss, or of the one from whole logits.

    GPU: a chunk's logits in the model's type and in fp32. CPU: CPU_LOGITS, three times. Both: the
    gradient of the head's input, and of the head in fp32 where it is trained. Whole logits are of
    all tokens, in the model's type: two that the change of the head's output keeps, and the
    gradient of each row, of all rows, and of those with a label.
    """
    model, tokens = work.model, work.tokens * work.job.labelled
    if model.whole_logits:
        return work.tokens * model.vocabulary * WHOLE_LOGITS * work.itemsize
    if work.on_gpu:
        chunk = model.loss_chunk(tokens, work.job.full * work.machine.gpu_memory)
        logits = chunk * model.vocabulary * (4 + work.itemsize)
    else:
        logits = min(tokens, CPU_LOGITS / 4 / model.vocabulary) * model.vocabulary * 12
    head = model.embedding * 4 if work.job.full else 0
    return logits + 2 * tokens * model.hidden * work.itemsize + head


@functools.cache
def config_of(mode: str) -> DeepSpeedConfig:
    """Return the configuration of a mode, with its "auto" values."""
    return DeepSpeedConfig.load(CONFIGS / f"{mode}.json")
