"""What is asked of the values of a tensor. Importing it does not import DeepSpeed."""

import torch


def is_finite(values: torch.Tensor) -> bool:
    """Return whether every element is finite."""
    # A sum keeps every NaN and infinity, and needs no tensor of its own.
    return bool(torch.isfinite(values.sum(dtype=torch.float32)))
