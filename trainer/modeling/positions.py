"""Which positions a model's tokens have, and whether there is one for every token of a row."""

from typing import Any

from torch import nn

from trainer.errors import RunError

# Rows of a table beside those of the positions: OPT keeps the first two for padding.
_BESIDE = 8


def first(model: Any) -> int:
    """Return the position of a sample's first token.

    Tables of positions with a row for padding, as RoBERTa's, begin after that.
    """
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def check(model: Any, longest: int) -> str | None:
    """Return a line where rows are longer than the model was made for, or None.

    model: the causal model or the PEFT model around it, which may be on the meta device. longest:
    the tokens of the longest sample. Raise RunError where a table of positions ends before.
    """
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    rows = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(rows, int) or rows < 1 or longest <= (limit := rows - first(model)):
        return None
    if table := _table(model, rows):
        raise RunError(
            f"rows are longer than the positions of {type(model).__name__}",
            found=f"{longest:,} tokens",
            needed=f"at most {limit:,}: {table} is a table of so many",
            fix=f"--max_length {limit}",
        )
    return (
        f"positions: rows of {longest:,} tokens are longer than the {limit:,} that config.json has "
        "as max_position_embeddings"
    )


def _table(model: Any, limit: int) -> str | None:
    """Return the name of an embedding or buffer with a row for each position, or None."""
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        other = isinstance(module, nn.Embedding) and module is not words
        if other and limit <= module.num_embeddings <= limit + _BESIDE:
            return name
    for name, buffer in model.named_buffers():
        # Sines by position, or a causal mask.
        if buffer.dim() > 1 and limit in (buffer.shape[0], buffer.shape[-2]):
            return name
    return None
