"""What is asked of the values of a tensor. Importing it does not import DeepSpeed."""

import torch

PIECE = 2**20  # elements, which a core's cache holds


def is_finite(values: torch.Tensor) -> bool:
    """Return whether every element is finite."""
    # A sum keeps every NaN and infinity. On a CPU torch first makes an fp32 copy of what it sums.
    parts = values.flatten().split(PIECE) if values.device.type == "cpu" else [values]
    return all(bool(torch.isfinite(part.sum(dtype=torch.float32))) for part in parts)
