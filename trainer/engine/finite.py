"""Whether the weights that ZeRO-3 holds are finite."""

from typing import Any

import deepspeed
import torch.distributed as dist

from trainer.distributed import all_gather_object
from trainer.engine import fused_step
from trainer.engine.values import is_finite


def first_nonfinite(engine: Any) -> str | None:
    """Return the name of the first trained parameter that is not finite on some rank, or None.

    engine: DeepSpeed's. All ranks call it. Parameters on NVMe are read and gathered one by one.
    """
    fused_step.finish(engine.optimizer)
    rank, found = dist.get_rank(), None
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        if getattr(param, "nvme_swapper", None) is not None:
            with deepspeed.zero.GatheredParameters([param]):
                finite = is_finite(param.data)
        else:
            shard = param.ds_tensor
            # The last ranks' shards end in padding that nobody has set.
            numel = max(0, min(shard.numel(), param.ds_numel - rank * shard.numel()))
            finite = is_finite(shard.data.view(-1)[:numel])
        if not finite:
            found = found or name
    return next(filter(None, all_gather_object(found)), None)
