"""What a job needs on every tier and how long it takes, for each configuration: formulas, each beside its source. Imports no torch.

Sizes are bytes, rates bytes or operations a second. Constants were measured (docs/benchmarks.md, docs/planning.md), where it says
so with what; the others follow from the code that they name. A rank is one GPU, or one CPU process where there is none.
"""

import functools
import math
from dataclasses import asdict, dataclass, field, replace

from trainer.config.ds_config import CONFIGS, locked_bytes, read_config, resolve_auto
from trainer.plan.model_shapes import ITEMSIZE, Model

GIB = 2**30
MODES = ("ds_z3", "ds_z3_offload", "ds_z3_nvme_optimizer", "ds_z3_nvme")
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
NETWORK = 25e9  # bytes a second between machines, of one of them, where nobody says: 200 Gbit/s
SPARE = 0.05  # of the GPU that stays free (recompute.py)
CONTEXT = 0.9 * GIB  # NVML's memory of a process before it has a tensor: CUDA, cuBLAS, Triton
CONTEXT_MORE = 1.0 * GIB  # NCCL's buffers, with more than one rank
EFFICIENCY = (
    0.69  # of the rate of a bf16 8192³ product that a pass reaches: 8B LoRA and 3.6B full, H100
)
EFFICIENCY_CPU = (
    0.7  # of the rate of a large fp32 product by numpy: 135M and tiny Llamas, two cores
)
FP32 = (
    1 / 15
)  # of the bf16 rate: fp32 products without TF32, 67 of 990 TFLOP/s (NVIDIA's H100 data sheet)
HOOKS = 0.37e-3  # seconds of Python that ZeRO-3's hooks take a module and pass on a CPU; on a GPU they go on beside it. As above.
MODULES = {
    "full": 13,
    "lora": 41,
}  # of a Llama's layer: 7 maps, attention, MLP, activation, norms, itself; with PEFT a map is five
SWAPPED = (
    2**20
)  # bytes of a rank's part from which DeepSpeed puts a tensor on NVMe (swap_tensor/utils.py, MIN_AIO_BYTES)
BASE_RAM = 2.5 * GIB  # of a GPU rank's process with all libraries
BASE_RAM_CPU = 0.75 * GIB  # and the pieces that its heap keeps
# On a CPU, of all layers' activations, kept or made again: what glibc's heap holds beside them (mallinfo2: as much free as used),
# as sizes change from one batch to the next and the adapters' small results lie in between. From the runs of docs/planning.md.
HEAP = {"full": 0.3, "lora": 0.65}
STEP_BYTES = {
    2: 28,
    4: 32,
}  # by itemsize: of RAM traffic a parameter in the CPU's step (engine/adam.c)
HBM = 2.5e12  # bytes a second of a GPU's memory that plain kernels reach, H100
SWAP_BYTES = 12  # read, and written, a parameter and step, with the optimizer on NVMe: weight and two moments in fp32
SWAP_BYTES_STOCK = 16  # and the gradient, which --fused_step leaves in RAM


@dataclass
class Box:
    """gpus: of one machine, 0 for none. gpu_memory, pcie, link: of one GPU; pcie each way from RAM, link between GPUs. ram, nvme: of
    one machine. flops: of one GPU, or of the machine's CPU, operations a second. ram_rate: reads and writes together.
    exact_pinning: pinned RAM is not rounded up (hardware.set_allocators). network: between machines, of one.
    notes: what was assumed."""

    gpus: int
    gpu_memory: float
    ram: float
    nvme: float
    nvme_read: float
    nvme_write: float
    pcie: float
    link: float
    flops: float
    ram_rate: float
    nodes: int = 1
    name: str = ""
    exact_pinning: bool = True
    network: float = NETWORK
    notes: list = field(default_factory=list)

    @property
    def ranks_here(self):
        """Of one machine."""
        return max(self.gpus, 1)

    @property
    def ranks(self):
        """Of all machines."""
        return self.ranks_here * self.nodes


@dataclass
class Job:
    """The model and how it is trained; the flags of the same names. tokens_per_step: of one update over all ranks, or None."""

    model: Model
    method: str = "full"
    lora_r: int = 16
    lora_target_modules: str = "all-linear"
    max_length: int = 2048
    tokens_per_step: int | None = None
    precision: str = "bf16"
    activation_offload: bool = False
    overlap_step: bool | None = None  # None: on a GPU
    gradient_checkpointing: bool = True
    fused_step: bool = True
    kept_layers: int | None = None  # None: as many as fit a GPU
    longest: int | None = (
        None  # tokens of the longest row that comes, if that is less than max_length
    )
    mean: float | None = None  # tokens of a row in the mean, as it lies in its batch, with padding
    labelled: float = 1.0  # share of the tokens over which the loss is taken


def job_of(settings, model, precision, gpu):
    """The Job of a run's settings."""
    kept = str(settings.kept_layers)
    return Job(
        model,
        settings.method,
        settings.lora_r,
        settings.lora_target_modules,
        settings.max_length,
        None,
        precision,
        settings.activation_offload,
        settings.overlap_step,
        settings.gradient_checkpointing,
        settings.fused_step,
        int(kept) if kept.isdigit() else None if gpu else 0,
    )


def prediction(job, box, config, micro_batch, accumulation=1):
    """What this DeepSpeed configuration, its "auto" resolved or not, does with this micro-batch (rows a rank): a dict of

    gpu, host, nvme: {what: bytes}, of one GPU, one machine, one machine; time: {"compute", "transfer", "optimizer", "io"}: seconds
    of an update by what they would take alone; step_s: of them together; kept_layers; locked: bytes a rank."""
    model, ranks, size = job.model, box.ranks, ITEMSIZE[job.precision]
    shapes = model.shapes(job.precision, job.method, job.lora_r, job.lora_target_modules)
    config = resolve_auto(config, shapes, ranks, "swap", job.fused_step)
    zero = config["zero_optimization"]
    where = {
        t: (zero.get(f"offload_{t}") or {}).get("device", "none") for t in ("param", "optimizer")
    }
    adapters = shapes.trainable if job.method == "lora" else 0
    everything, own = model.parameters + adapters, shapes.trainable / ranks
    layer, head = shapes.layer * size, model.embedding * size
    tokens = micro_batch * min(job.longest or job.max_length, job.max_length)
    gpu, host, nvme = {}, {}, {}
    device = gpu if box.gpus else host  # on a CPU what would be on the GPU is in RAM

    full = job.method == "full"

    # -- the GPU -------------------------------------------------------------------------------------------------------
    if box.gpus:
        gpu["context"] = CONTEXT + (CONTEXT_MORE if ranks > 1 else 0)
    if where["param"] == "none":
        device["parameters"] = everything * size / ranks
    if where["optimizer"] == "none":
        device["optimizer"] = 12 * own
        device["gradients"] = own * size
    persistent = (
        adapters if zero["stage3_param_persistence_threshold"] > shapes.largest_trainable else 0
    ) * size
    gathered = 0
    # Where one GPU holds all, or one CPU process has them in RAM, nothing is copied.
    if ranks > 1 or where["param"] == "nvme" or (where["param"] == "cpu" and box.gpus):
        gathered = persistent + min(zero["stage3_max_live_parameters"] * size, 3 * layer + head)
    device["gathered layers"] = gathered
    bucket = zero["reduce_bucket_size"] * size
    device["gradients of a layer"] = min(bucket, shapes.largest_trainable * size) + (
        2 * layer if full else persistent
    )
    one, inputs = activations(model, tokens, size, bool(box.gpus), full)
    held = 2 * inputs if job.activation_offload and box.gpus else model.layers * inputs
    loss = loss_bytes(model, tokens * job.labelled, size, full, bool(box.gpus))
    # The loss is taken before any layer is computed again.
    device["inputs of layers"] = held
    device["a layer at work, or the logits"] = max(
        one + 3 * tokens * model.intermediate * size, loss
    )
    kept = min(job.kept_layers or 0, model.layers) if job.gradient_checkpointing else model.layers
    if box.gpus and job.kept_layers is None and job.gradient_checkpointing:
        room = box.gpu_memory * (1 - SPARE) - sum(gpu.values())
        kept = min(model.layers, max(0, int(room // max(one - inputs, 1))))
    device["kept activations"] = kept * (one - inputs)
    if not box.gpus:
        host["heap"] = HEAP[job.method] * model.layers * one

    # -- RAM -----------------------------------------------------------------------------------------------------------
    here = box.ranks_here / ranks  # of the model that lies on this machine
    host = {
        key: value * box.ranks_here for key, value in host.items()
    }  # on a CPU: what each rank would have on its GPU
    host["processes"] = (BASE_RAM if box.gpus else BASE_RAM_CPU) * box.ranks_here
    if where["param"] == "cpu":
        host["parameters"] = everything * size * here
    rounded = box.gpus and not box.exact_pinning and where["param"] == "cpu"
    if rounded and not full:
        host["pinned rounding"] = pinned_rounding(model, ranks, size) * box.ranks_here
    elif rounded:  # one buffer of parameters, and one of gradients
        flat = own * size
        host["pinned rounding"] = (
            (2 ** math.ceil(math.log2(flat)) - flat)
            * (1 + (where["optimizer"] == "cpu"))
            * box.ranks_here
        )
    if where["optimizer"] == "cpu":
        host["optimizer"] = 12 * shapes.trainable * here
    if where["optimizer"] != "none":
        host["gradients"] = (
            shapes.trainable
            * (size + (4 if where["optimizer"] == "cpu" and not job.fused_step else 0))
            * here
        )
    buffers = locked_bytes(config, shapes, ranks)
    locked = sum(buffers)
    host["NVMe buffers"] = locked * box.ranks_here
    if buffers[1]:  # a sub-group's, before they first go into its buffers
        host["first moments"] = (
            2 * buffers[1] / int(zero["offload_optimizer"].get("buffer_count", 4)) * box.ranks_here
        )
    if (
        box.gpus and where["optimizer"] == "none"
    ):  # DeepSpeed moves them into one buffer by way of RAM
        host["while it starts: what is trained"] = shapes.trainable * size * here
    if job.activation_offload and box.gpus:
        host["inputs of layers"] = (model.layers - kept) * inputs * box.ranks_here
    host = {k: v for k, v in host.items() if v}

    # -- NVMe ----------------------------------------------------------------------------------------------------------
    if where["param"] == "nvme":
        # A tied head is written once before it is tied, and its file stays.
        parts = [a * b for a, b in model.matrices.values()] * model.layers + [model.embedding] * 2
        nvme["parameters"] = sum(n * size for n in parts if n * size / ranks >= SWAPPED) * here
    if where["optimizer"] == "nvme" and min(zero["sub_group_size"], own) * 4 >= SWAPPED:
        nvme["optimizer"] = swap_bytes(job) * shapes.trainable * here
    time = seconds(
        job, box, where, shapes, micro_batch * (job.mean or job.max_length), kept, accumulation
    )
    return {
        "gpu": {k: v for k, v in gpu.items() if v},
        "host": host,
        "nvme": nvme,
        "kept_layers": kept,
        "locked": locked,
        "written": written_bytes(job, where) * shapes.trainable * here,
        **time,
    }


def activations(model, tokens, size, liger=True, full=True):
    """(what one decoder layer keeps for its backward pass, its input alone), bytes. Counted from the model and Liger's kernels: input
    and output of both norms, q, k and v after the rotary embedding, the attention's output, gate, up and their product. Measured:
    2.75 GiB for 32,768 tokens of Llama-3.2-3B in bf16, exactly this. Without Liger's kernels autograd keeps the activation of gate
    too, and the quotients of both norms where their weights are trained."""
    numbers = 4 * model.hidden + 2 * model.query + 2 * model.key_value + 3 * model.intermediate
    if not liger:
        numbers += model.intermediate + 2 * model.hidden * full
    return numbers * tokens * size, model.hidden * tokens * size


def pinned_rounding(model, ranks, size):
    """Of one rank, with frozen parameters, whose parts are pinned one by one: torch's allocator takes the next power of two for each
    (CachingHostAllocator). The trained ones lie in one buffer of their own."""
    parts = [a * b for a, b in model.matrices.values()] * model.layers + [model.embedding] * (
        1 if model.tied else 2
    )
    parts = [-(-n // ranks) * size for n in parts]
    return sum(2 ** math.ceil(math.log2(n)) - n for n in parts)


def swap_bytes(job):
    """On NVMe, and read there in an update, a trained parameter."""
    return SWAP_BYTES if job.fused_step else SWAP_BYTES_STOCK


def written_bytes(job, where):
    """To NVMe a trained parameter and update; the parameters too, where they lie there (stage3.py, _partitioned_params_swap_out)."""
    return (swap_bytes(job) + ITEMSIZE[job.precision] * (where["param"] == "nvme")) * (
        where["optimizer"] == "nvme"
    )


def loss_bytes(model, tokens, size, full, gpu):
    """Of the chunked loss. GPU: Liger's chunks of T x H / V rows (liger_kernel, fused_linear_cross_entropy.py), logits in the model's
    type and in fp32. CPU: 256 MiB of fp32 logits, three of them at a time (loss.py). Both: the gradient of the head's input, and of
    the head in fp32 where it is trained."""
    rows = (
        tokens / max(1, 2 ** round(math.log2(max(1, model.vocabulary / model.hidden))))
        if gpu
        else min(tokens, 2**28 / 4 / model.vocabulary)
    )
    logits = rows * model.vocabulary * ((4 + size) if gpu else 12)
    return logits + 2 * tokens * model.hidden * size + (model.embedding * 4 if full else 0)


def seconds(job, box, where, shapes, tokens, kept, accumulation):
    """The times of prediction(). A pass over the layers takes what computing or what moving them takes, whichever is longer, and the
    first of an update not less than the CPU's step beside it; embedding and head, which nothing prefetches, and the loss are added.
    Backward: the gradient of the input, and of the weights in a full fine-tune, in attention five products where the forward pass has
    two (FlashAttention, algorithm 4 of arXiv 2205.14135), and once more forward for the layers that keep nothing. The loss makes its
    gradients in the forward pass."""
    model, size, full = job.model, shapes.itemsize, job.method == "full"
    rate = box.flops * (EFFICIENCY * (FP32 if size == 4 else 1) if box.gpus else EFFICIENCY_CPU)
    maps = sum(a * b for a, b in model.matrices.values())
    attention = model.layers * tokens * 2 * (job.mean or job.max_length) * model.query / rate
    forward = model.layers * tokens * 2 * maps / rate + attention
    # An adapter reads its matrix's input once more, and reads and writes its output; backward twice that.
    wide = [
        (model.matrices[n][1] + 2 * model.matrices[n][0]) * size
        for n in model.adapters(job.lora_r, job.lora_target_modules)
    ]
    beside = 0 if full else model.layers * tokens * sum(wide) / (HBM if box.gpus else box.ram_rate)
    loss = tokens * 2 * model.embedding * (3 if full else 2) / rate
    again = forward * (1 - kept / model.layers)
    backward = (forward - attention) * (2 if full else 1) + 2.5 * attention + 2 * beside + again
    forward += beside
    if not box.gpus:
        hooks = model.layers * MODULES[job.method] * HOOKS
        forward, backward = forward + hooks, backward + hooks * (1 + job.gradient_checkpointing)
    moved = moves = 0.0
    if box.gpus and where["param"] != "none":
        moved = model.layers * shapes.layer * size / box.ranks / box.pcie
        moves = (1 if model.tied else 2) * model.embedding * size / box.ranks / box.pcie
    if box.ranks > 1 and box.gpus:
        moved = max(moved, model.layers * shapes.layer * size / box.link)
        moves += 2 * model.embedding * size / box.link
    if box.nodes > 1:  # what lies on the other machines comes in once
        moved = max(moved, model.layers * shapes.layer * size * (1 - 1 / box.nodes) / box.network)
        moves += 2 * model.embedding * size * (1 - 1 / box.nodes) / box.network
    read = 0.0
    if where["param"] == "nvme":
        read = model.parameters * size * box.ranks_here / box.ranks / box.nvme_read
    back = max(
        moved,
        shapes.trainable * size / box.ranks / box.pcie
        if full and box.gpus and where["optimizer"] != "none"
        else 0,
    )
    own, io = shapes.trainable / box.ranks, 0.0
    on_gpu = box.gpus and where["optimizer"] == "none"
    step = own * STEP_BYTES[size] / (HBM if on_gpu else box.ram_rate / box.ranks_here)
    if where["optimizer"] == "nvme":
        # At once, but of one disk: 57.7 GB each way took 47 s on one that alone reads 1.91 and writes 2.96 GB/s.
        io = (
            own
            * box.ranks_here
            * (swap_bytes(job) / box.nvme_read + written_bytes(job, where) / box.nvme_write)
        )
    ahead = max(forward, moved, read)
    micro = ahead + loss + moves + max(backward, back, read) + moves / 2
    asked = box.gpus > 0 if job.overlap_step is None else job.overlap_step
    overlaps = where["optimizer"] == where["param"] == "cpu" and job.fused_step and asked
    behind = max(step - ahead, 0) if overlaps else step
    return {
        "time": {
            "compute": accumulation * (forward + backward + loss),
            "transfer": accumulation * (moved + back + 1.5 * moves),
            "optimizer": step,
            "io": io + 2 * accumulation * read,
        },
        "step_s": accumulation * micro + max(behind, io),
    }


@functools.cache
def _config(mode):
    return read_config(CONFIGS / f"{mode}.json")


def evaluate(job, box, mode, micro_batch=None):
    """The prediction of `mode` with its best micro-batch, or with the one that is given, as {"name", "fits", "short": {tier: bytes},
    "micro_batch", "accumulation", "tokens_per_s", …}; where nothing fits, that of one row."""
    best, rows = None, rows_of(job, box)
    for micro in (
        (micro_batch,)
        if micro_batch
        else [n for n in range(1, 129) if rows % n == 0]
        if rows
        else MICRO_BATCHES
    ):
        accumulation = max(1, rows // micro) if rows else 1
        found = prediction(job, box, _config(mode), micro, accumulation)
        found.update(
            name=mode,
            micro_batch=micro,
            accumulation=accumulation,
            tokens_per_s=micro * job.max_length * accumulation / found["step_s"],
        )
        limits = {
            "GPU": box.gpu_memory * (1 - SPARE) if box.gpus else 0,
            "RAM": box.ram * 0.97,
            "NVMe": box.nvme,
        }
        used = {"GPU": found["gpu"], "RAM": found["host"], "NVMe": found["nvme"]}
        found["short"] = {
            t: sum(used[t].values()) - limits[t]
            for t in limits
            if sum(used[t].values()) > limits[t]
        }
        found["fits"] = not found["short"]
        if best is None or (
            found["fits"]
            and (not best["fits"] or found["tokens_per_s"] > 1.01 * best["tokens_per_s"])
        ):
            best = found
    return best


def rows_of(job, box):
    """Rows of an update a rank for the tokens that are asked for, the nearest whole number; None where none are."""
    return job.tokens_per_step and max(1, round(job.tokens_per_step / (job.max_length * box.ranks)))


def compare(job, box):
    """evaluate() of every mode, the recommended one first: of those that fit, the fastest; the simpler where they are alike."""
    found = [evaluate(job, box, mode) for mode in MODES]
    return ordered(found)


def _rank(found):
    """Larger is better: whether it fits, and its speed, where a difference of 2 % counts as none."""
    return (
        (True, round(math.log(found["tokens_per_s"]) * 50))
        if found["fits"]
        else (False, -sum(found["short"].values()))
    )


def ordered(found):
    """Predictions of all modes, the best first."""
    return sorted(found, key=_rank, reverse=True)


def remedy(job, box):
    """The least that would make it fit, up to three ways, the cheapest first, in words; None where nothing does. A size is the
    smallest that fits, to 2 %."""

    def fits(job, box):
        return any(evaluate(job, box, mode)["fits"] for mode in MODES)

    def least(low, most, change):
        if not fits(job, change(most)):
            return None
        while most > 1.02 * low:
            middle = (low + most) / 2
            low, most = (low, middle) if fits(job, change(middle)) else (middle, most)
        return most

    def disk(box, size):
        return replace(
            box, nvme=size, nvme_read=box.nvme_read or 3e9, nvme_write=box.nvme_write or 2e9
        )

    ways = []
    if fits(replace(job, activation_offload=True), box):
        ways.append("--activation_offload true")
    lengths = [n for n in (job.max_length >> i for i in range(1, 12)) if n >= 256]
    short = next(
        (
            (n, more)
            for n in lengths
            for more in (False, True)
            if fits(
                replace(
                    job,
                    max_length=n,
                    tokens_per_step=None,
                    activation_offload=more or job.activation_offload,
                ),
                box,
            )
        ),
        None,
    )
    if size := least(
        max(box.nvme, 1e9),
        max(30 * job.model.parameters, 2 * box.nvme),
        lambda size: disk(box, size),
    ):
        ways.append(f"{_round(size)} GB free on a local NVMe (--nvme)")
    else:  # both, where one of them is not enough
        large = disk(box, max(30 * job.model.parameters, box.nvme))
        if size := least(box.ram, 64 * max(box.ram, 64e9), lambda size: replace(large, ram=size)):
            with_ram = replace(box, ram=_round(size) * 1e9)
            if not fits(job, with_ram):
                room = least(max(box.nvme, 1e9), large.nvme, lambda size: disk(with_ram, size))
                ways.append(
                    f"{_round(size)} GB of RAM and {_round(room or large.nvme)} GB free on a local NVMe"
                )
    if size := least(box.ram, 64 * max(box.ram, 64e9), lambda size: replace(box, ram=size)):
        ways.append(f"{_round(size)} GB of RAM")
    if short:
        ways.append(
            f"--max_length {short[0]}"
            + " --activation_offload true" * (short[1] and not job.activation_offload)
        )
    if job.method == "full" and fits(replace(job, method="lora"), box):
        ways.append("--method lora")
    if box.gpus and (
        size := least(box.gpu_memory, 192e9, lambda size: replace(box, gpu_memory=size))
    ):
        ways.append(f"GPUs of {_round(size, 8)} GB")
    for count in (2, 4, 8, 16, 32) if box.gpus and not ways else ():
        if fits(replace(job, tokens_per_step=None), replace(box, nodes=count)):
            ways.append(f"{count} such machines")
            break
    return "; or ".join(ways[:3]) or None


def _round(size, to=5):
    return math.ceil(size / 1e9 / to) * to


def why_not(other, best):
    """Why a mode was not recommended, in words."""
    if other["short"]:
        return "; ".join(
            f"{amount / 1e9:,.1f} GB of {tier} short" for tier, amount in other["short"].items()
        )
    if not best["fits"]:
        return ""
    if _rank(other) == _rank(best):
        return f"as fast; {best['name']} is simpler"
    slower = best["tokens_per_s"] / other["tokens_per_s"]
    tokens = [f["micro_batch"] * f["accumulation"] for f in (other, best)]
    more = {k: other["time"][k] / tokens[0] - best["time"][k] / tokens[1] for k in other["time"]}
    most = max(more, key=more.get)
    words = f"{slower:.1f} times slower" if slower >= 1.1 else f"{slower - 1:.0%} slower"
    return words + (f", by its {most}" if more[most] > 0 else "")


def as_json(job, box, found):
    """The plan as issue-stable JSON."""
    best = found[0]
    shapes = job.model.shapes(job.precision, job.method, job.lora_r, job.lora_target_modules)
    zero = resolve_auto(_config(best["name"]), shapes, box.ranks, "swap", job.fused_step)[
        "zero_optimization"
    ]
    keys = (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "sub_group_size",
    )
    buffers = {
        t: {k: zero[t][k] for k in ("buffer_count", "buffer_size") if k in (zero.get(t) or {})}
        for t in ("offload_param", "offload_optimizer")
    }
    recommended = (
        {
            "config": f"{best['name']}.json",
            "per_device_train_batch_size": best["micro_batch"],
            "gradient_accumulation_steps": best["accumulation"],
            "max_length": job.max_length,
            "kept_layers": best["kept_layers"],
            **{k: zero[k] for k in keys if k in zero},
            **{k: v for k, v in buffers.items() if v},
        }
        if best["fits"]
        else None
    )
    modes = [
        {
            "name": f["name"],
            "fits": f["fits"],
            "gpu_bytes": round(sum(f["gpu"].values())),
            "host_bytes": round(sum(f["host"].values())),
            "nvme_bytes": round(sum(f["nvme"].values())),
            "step_s": f["step_s"],
            "tokens_per_s_per_gpu": f["tokens_per_s"],
            "shortfall_bytes": round(sum(f["short"].values())),
            "short": {k: round(v) for k, v in f["short"].items()},
            "per_device_train_batch_size": f["micro_batch"],
            "gradient_accumulation_steps": f["accumulation"],
            "tokens_per_step": f["micro_batch"] * f["accumulation"] * box.ranks * job.max_length,
            "nvme_written_bytes_per_step": round(f["written"]),
            "kept_layers": f["kept_layers"],
            "gpu": f["gpu"],
            "host": f["host"],
            "nvme": f["nvme"],
            "time_s": f["time"],
        }
        for f in sorted(found, key=lambda f: MODES.index(f["name"]))
    ]
    return {
        "model": {
            "name": job.model.name,
            "parameters": job.model.parameters,
            "trained": shapes.trainable,
        },
        "box": asdict(box),
        "recommended": recommended,
        "modes": modes,
    }
