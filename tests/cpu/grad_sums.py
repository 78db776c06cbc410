"""Gradients of many micro-batches through ZeRO-3 in bf16: how far their sum is from the exact one.

    PYTHONPATH=. python tests/cpu/grad_sums.py FOLDER CONFIG:GRAD_ACCUM_DTYPE:STEP …

CONFIG: a name in deepspeed_configs/. STEP: "ours" or "stock", the optimizer step. Rank 0 prints for
each, as JSON, the relative errors of the buffer of gradients, and of what AdamW took from it,
against the sum in double precision of the micro-batches' own gradients. FOLDER: for swap files.
On a GPU where there is one, unless DS_ACCELERATOR is cpu.
"""

import json
import os
import sys
from pathlib import Path

import torch

from trainer.config.ds_config import DeepSpeedConfig, ZeroShapes
from trainer.process_group import join
from trainer.system.swap_dir import SwapSpace

MICRO_BATCHES = 32
SHAPES = [(500, 300), (7,), (300, 500)]  # of the parameters; on several ranks the second is padded
ELEMENTS = ZeroShapes(10**5, 1, 150_000, 300_007, 150_000, 2)


class Model(torch.nn.Module):
    """Its loss is linear in the parameters, so a gradient is the micro-batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.zeros(shape) for shape in SHAPES)

    def forward(self, batch):
        return sum((w * x).sum() for w, x in zip(self.weights, batch, strict=True))


def errors(config, dtype, ours, folder, rank, ranks):
    """Return {"summed": …, "stepped": …} of one configuration, on this rank's parts."""
    import deepspeed

    from trainer.engine import fused_step
    from trainer.engine.optimizer_state import OptimizerState

    config.set_precision("bf16")
    config.set_grad_accum_dtype(dtype)
    values = config.resolved(ELEMENTS, ranks, folder).values
    values["zero_optimization"].update(sub_group_size=200_000, reduce_bucket_size=200_000)
    values.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=MICRO_BATCHES,
        train_batch_size=MICRO_BATCHES * ranks,
        gradient_clipping=0.0,
        optimizer={"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999]}},
    )
    # DeepSpeed's own fused Adam would be compiled for this.
    values["optimizer"]["params"]["torch_adam"] = config.device("optimizer") == "none"
    with deepspeed.zero.Init(config_dict_or_path=values):
        model = Model()
    with fused_step.wanted(fused_step.Wanted(overlap=False) if ours else None):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=values
        )
    zero = engine.optimizer
    generator = torch.Generator().manual_seed(0)
    exact = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    summed = []
    for _ in range(MICRO_BATCHES):
        batches = [
            [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
            for _ in range(ranks)
        ]
        for batch in batches:
            for total, x in zip(exact, batch, strict=True):
                total += x.double() / MICRO_BATCHES / ranks
        engine.backward(engine([x.to(engine.device) for x in batches[rank]]))
        if engine.is_gradient_accumulation_boundary():
            buffers = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            summed = [buffers[w.ds_id].cpu().double() for w in model.weights]
        engine.step()
    state = OptimizerState(engine)
    moments = {
        part.name: b"".join(bytes(chunk) for chunk in state.read(i, "exp_avg", part))
        for i, group in enumerate(state.sub_groups)
        for part in group
    }
    stepped = [
        torch.frombuffer(bytearray(moments[name] or bytes(4)), dtype=torch.float32).double() / 0.1
        for name, _ in model.named_parameters()
    ]
    parts = [whole.flatten()[rank * len(part) :][: len(part)] for part, whole in zip(summed, exact)]
    return {"summed": relative(summed, parts), "stepped": relative(stepped, parts)}


def relative(found, exact) -> float:
    """Return the relative error. What a tensor has more than the exact one is ZeRO's padding."""
    difference = torch.cat([f[: len(e)] - e for f, e in zip(found, exact, strict=True)])
    return float(difference.norm() / torch.cat(exact).norm())


def main() -> None:
    folder, *cases = sys.argv[1:]
    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    ranks = join(DeepSpeedConfig.load("ds_z3_offload"), gpu, fetch_ahead=False)
    from trainer.engine.aio import watch_swap_files

    if any("nvme" in case for case in cases):
        watch_swap_files(SwapSpace(Path(folder)), libaio=False)
    for case in cases:
        name, dtype, step = case.split(":")
        config, rank = DeepSpeedConfig.load(name), torch.distributed.get_rank()
        found = errors(config, dtype, step == "ours", folder, rank, ranks.world)
        if rank == 0:
            print(json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
