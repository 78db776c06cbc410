"""Loss, perplexity and token accuracy of a model on validation rows."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from data.dataset import IGNORED
from trainer.distributed import all_reduce_sum, is_main_process


def evaluate(
    engine: Any,
    loss_function: Callable[[Any, dict[str, Any]], tuple[torch.Tensor, Any]],
    batches: Iterable[list[int]],
    make_batch: Callable[[list[int]], dict[str, Any]],
    device: torch.device,
    breaks_off: Callable[[], bool],
) -> dict[str, float] | None:
    """Return eval_loss, eval_perplexity and eval_token_accuracy over the answer tokens.

    They are weighted by token, so the same for any batch size and number of ranks.
    loss_function: (model, inputs) -> (summed loss, correct tokens). batches: row numbers of this
    rank, the same number of batches on every rank; an empty one where this rank has no rows left.
    breaks_off: asked after each batch, on all ranks; where it says so, None is returned.
    """
    training = engine.training
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct tokens, tokens
    broken_off = False
    show = is_main_process() and sys.stderr.isatty()
    for batch in tqdm(batches, desc="validation", leave=False, disable=not show):
        inputs = make_batch(batch or [0])
        inputs.pop("tokens")
        if not batch:  # ZeRO-3 gathers on all ranks in step, so this one computes too
            inputs["labels"].fill_(IGNORED)
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        with torch.no_grad():
            loss, correct = loss_function(engine, inputs)
        tokens = inputs["labels"][:, 1:].ne(IGNORED).sum()
        correct = torch.as_tensor(correct, device=device)
        totals += torch.stack([loss.double(), correct.double(), tokens.double()])
        broken_off = breaks_off()
        if broken_off:
            break
    engine.train(training)
    engine.empty_partition_cache()  # what the last forward pass fetched ahead would stay in flight
    if broken_off:
        return None
    loss_sum, correct_tokens, count = all_reduce_sum(totals)
    loss = loss_sum / count
    return {
        "eval_loss": loss.item(),
        "eval_perplexity": loss.exp().item(),
        "eval_token_accuracy": (correct_tokens / count).item(),
    }
