"""How long an optimizer step takes. Rates are bytes or operations a second, times are seconds.

Constants were measured where it says so. Does not import torch.
"""

import math

from trainer.plan.layers import total
from trainer.plan.workload import Workload

# Of the rate of a large product, what a pass over the layers reaches. GPU: bf16 8192³. EFFICIENCY
# and TENSOR were fitted together to 41 runs on H100 and H200 (docs/planning.md): 1.5B to 70B,
# full and LoRA, 1 to 16 rows. CPU: fp32 by numpy; 135M and tiny Llamas, two cores.
EFFICIENCY = 0.77
EFFICIENCY_CPU = 0.7
# Seconds of the host for each trained tensor in an optimizer step on a GPU. DeepSpeed goes through
# all gradients in Python: it hooks, gathers, norms and clears them one by one, and the GPU waits.
TENSOR = 0.34e-3
# Seconds of the host for a decoder layer in a micro-batch on a GPU, forward, again and backward: a
# micro-batch takes no less. Qwen2.5-14B, one row, all weights on the GPU (docs/infinity.md), whose
# layers had ZeRO-3's hooks then; the share of the hooks was measured on a CPU.
HOST_LAYER = 11e-3
HOST_LAYER_RESIDENT = 5.5e-3
# Of the bf16 rate: fp32 products without TF32, 67 of 990 TFLOP/s (NVIDIA's H100 data sheet).
FP32 = 1 / 15
# Seconds of Python that ZeRO-3's hooks take for a module and pass on a CPU (135M and tiny Llamas).
# A GPU computes longer, and its layers are fetched as wholes.
HOOKS = 0.37e-3
ADAPTER_MODULES = 4  # that PEFT adds to a map
# RAM traffic of a parameter in the CPU's step (engine/adam.c), beside its gradient: weight and two
# moments, read and written. Where the fp32 weight is a whole one its 16-bit copy is written too.
STEP_BYTES = 24
# GPU memory traffic of a parameter in DeepSpeed's own step (stage3.py): norm of the gradient 10,
# its flat copy 4 and fp32 copy 6, clipping 8, Adam 28, the new weight 6. Ours has STEP_BYTES there
# too (engine/gpu_adam.py).
GPU_STEP_BYTES = 62
# GPU memory traffic of an element of the head's fp32 gradient, to which Liger's loss adds each
# chunk. Fitted to the full fine-tunes among those runs: 3.6B with 4 to 16 rows has 24 or 32 chunks.
HEAD_BYTES = 16
HBM = 2.5e12  # of a GPU's memory, by plain kernels, H100


def step_seconds(work: Workload, kept: int, weights: int) -> tuple[dict[str, float], float]:
    """Return the times of an optimizer step's parts if each were alone, and the step's own time.

    kept, weights: layers that keep their activations, and their weights for the backward pass.

    A pass over the layers takes as long as computing or as moving them, whichever is longer, and
    the first one of a step not less than the CPU's optimizer step beside it. Embedding and head,
    which nothing prefetches, the loss, and on a GPU the host's time for each tensor are added.
    """
    machine, accumulation, itemsize = work.machine, work.accumulation, work.itemsize
    forward, backward, loss = _compute(work, kept)
    layers, embeddings = _fetch(work)
    gradients = read = host = 0.0
    if work.job.full and work.on_gpu:
        to_host = work.trainable - work.places.gradients_in_hbm
        gradients = to_host * work.grad_itemsize / machine.pcie
    if work.params_on == "nvme":
        read = work.model.parameters * itemsize * work.machine_share / machine.nvme_read
    if work.on_gpu:
        kinds = work.model.kinds
        trained = work.job.adapters or [kind.tensors for kind in kinds]
        host = TENSOR * sum(kind.count * len(sizes) for kind, sizes in zip(kinds, trained))
    back = max(layers * (1 - weights / work.model.layers), gradients)
    first_pass = max(forward, layers, read)
    micro_batch = first_pass + loss + 1.5 * embeddings + max(backward, back, read)
    if work.on_gpu:
        resident = work.fused_step and work.job.resident_weights and not work.gathers
        launches = HOST_LAYER_RESIDENT if resident else HOST_LAYER
        micro_batch = max(micro_batch, launches * work.model.layers)
    on_gpu, on_cpu, io = _optimizer(work)
    beside = max(on_cpu, io)
    if work.fused_step and work.job.overlap_step and work.params_on != "nvme":
        beside = max(beside - first_pass, 0)
    times = {
        "compute": accumulation * (forward + backward + loss),
        "transfer": accumulation * (layers + back + 1.5 * embeddings),
        "optimizer": on_gpu + on_cpu + host,
        "io": io + 2 * accumulation * read,
    }
    return times, accumulation * micro_batch + on_gpu + beside + host


def _compute(work: Workload, kept: int) -> tuple[float, float, float]:
    """Return the arithmetic of a micro-batch: forward, backward, loss.

    Backward: the gradient of the input, and of the weights in a full fine-tune. Attention has five
    products there and two in the forward pass (FlashAttention, algorithm 4 of arXiv 2205.14135).
    Layers that keep nothing go forward once more, but for their last matrix (modeling/linear.py).
    The loss makes its gradients in the forward pass.
    """
    job, model, machine, itemsize = work.job, work.model, work.machine, work.itemsize
    kinds = model.kinds
    adapted = [(kind, m) for kind, maps in zip(kinds, job.adapted) for m in maps]
    row = job.mean or job.max_length
    tokens = work.micro_batch * row
    rate, bandwidth = machine.flops * EFFICIENCY_CPU, machine.ram_rate
    if work.on_gpu:
        rate, bandwidth = machine.flops * EFFICIENCY * (FP32 if itemsize == 4 else 1), HBM
    # Seconds of one parameter, and of one byte.
    product, traffic = (tokens * n for n in (2 / rate, 1 / bandwidth))
    attention = product * total(kinds, lambda kind: min(row, 2 * (kind.window or row)) * kind.query)
    matrices = product * total(kinds, lambda kind: kind.active)
    # An adapter reads its matrix's input once more, and reads and writes its output; backward
    # twice that.
    widths = [kind.count * m.used * (m.into + 2 * m.out) for kind, m in adapted]
    adapters = traffic * itemsize * sum(widths)
    loss = tokens * 2 * model.embedding * (3 if job.full else 2) / rate
    if job.full and work.on_gpu:
        chunks = math.ceil(tokens / model.loss_chunk(tokens, machine.gpu_memory))
        loss += chunks * model.embedding * HEAD_BYTES / HBM
    forward = matrices + attention + adapters
    last = product * total(kinds, lambda kind: kind.last)
    again = (forward - last) * (1 - kept / model.layers)
    backward = matrices * (2 if job.full else 1) + 2.5 * attention + 2 * adapters + again
    if not work.on_gpu:
        modules = total(kinds, lambda kind: kind.modules)
        modules += ADAPTER_MODULES * sum(kind.count * m.copies for kind, m in adapted)
        hooks = modules * HOOKS
        forward += hooks
        backward += hooks * (1 + job.gradient_checkpointing)
    return forward, backward, loss


def _fetch(work: Workload) -> tuple[float, float]:
    """Return the time to bring weights to the GPUs: the layers of a pass; embedding and head."""
    machine, itemsize = work.machine, work.itemsize
    adapters = 0 if work.job.full else work.shapes.trainable
    layer_bytes = (total(work.model.kinds, lambda kind: kind.size) + adapters) * itemsize
    embedding_bytes = work.model.embedding * itemsize
    layers = embeddings = 0.0
    if work.on_gpu and work.params_on != "none":
        # Of what is on the GPU the embedding is the first, and a head of its own the last.
        pcie, there = work.ranks * machine.pcie, work.ranks * work.places.weights_in_hbm * itemsize
        first = min(there, embedding_bytes)
        in_layers = min(there - first, layer_bytes)
        layers = (layer_bytes - in_layers) / pcie
        outside = (2 - work.model.tied) * embedding_bytes
        embeddings = (outside - min(outside, there - in_layers)) / pcie
    for rate, share in (  # the share of the weights that comes at this rate
        (machine.link, work.ranks > 1 and work.on_gpu),
        (machine.network, 1 - 1 / machine.nodes),  # what is on the other machines comes in once
    ):
        layers = max(layers, layer_bytes * share / rate)
        embeddings += 2 * embedding_bytes * share / rate
    return layers, embeddings


def _optimizer(work: Workload) -> tuple[float, float, float]:
    """Return the times of the optimizer: the GPU's part, the CPU's, and reads and writes on NVMe.

    Weights and gradients on the GPU whose states are elsewhere go to the CPU's step and back.
    """
    machine, places, io = work.machine, work.places, 0.0
    traffic = STEP_BYTES + work.grad_itemsize + (work.itemsize if work.state_bytes == 12 else 0)
    on_cpu = (work.trainable - places.states_in_hbm) * traffic
    on_cpu *= machine.ranks_here / machine.ram_rate
    on_gpu = places.states_in_hbm * (traffic if work.fused_step else GPU_STEP_BYTES) / HBM
    if not work.on_gpu:
        on_gpu, on_cpu = 0.0, work.trainable * traffic * machine.ranks_here / machine.ram_rate
    else:
        weights = (places.weights_in_hbm - places.states_in_hbm) * 2 * work.itemsize
        gradients = (places.gradients_in_hbm - places.states_in_hbm) * work.grad_itemsize
        on_cpu = max(on_cpu, (weights + gradients) / machine.pcie)
    if work.on_nvme:
        # Read and written at once, but by one disk: 57.7 GB each way took 47 s on one that alone
        # reads 1.91 and writes 2.96 GB/s.
        read = work.state_bytes * work.on_nvme / machine.nvme_read
        write = work.written_bytes * work.trainable / machine.nvme_write
        io = machine.ranks_here * (read + write)
    return on_gpu, on_cpu, io
