"""Conversations → token ids and labels. The loss covers the answer and its end-of-turn token, nothing else."""
from dataclasses import dataclass
from pathlib import Path

from . import DataError

IGNORED = -100  # the label that the loss skips
TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Tokens:
    """One row: input ids and labels (shape [tokens]); the line it came from."""

    input_ids: list
    labels: list
    line: int


@dataclass
class Summary:
    """What tokenising did: rows kept, rows truncated, rows left out because no answer token remained, tokens, trained tokens."""

    rows: int = 0
    truncated: int = 0
    left_out: int = 0
    tokens: int = 0
    trained: int = 0

    def __str__(self):
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained:,} trained"
        if self.truncated:
            text += f", {self.truncated:,} truncated"
        return text + (f", {self.left_out:,} left out (no answer token within max_length)" if self.left_out else "")


def prepare_tokenizer(tokenizer):
    """Give the tokenizer what fine-tuning needs: a chat template and a pad token. Returns what was added, in words."""
    added = []
    if not tokenizer.chat_template:
        tokenizer.chat_template = (TEMPLATES / "alpaca.jinja").read_text()
        added.append("the alpaca chat template, as it has none")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        added.append(f"{tokenizer.pad_token} as the pad token; padding is masked by position, not by token")
    tokenizer.padding_side = "right"
    return added


def tokenize_row(tokenizer, messages, max_length):
    """messages → (input ids, labels, truncated). DataError where the template does not keep the prompt as a prefix."""
    def ids_of(text):
        # The template writes the special tokens itself; adding them again would double the BOS.
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt_text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if not text.startswith(prompt_text):
        raise DataError("the model's chat template writes the prompt differently when an answer follows, so the answer "
                        "cannot be told apart from it")
    prompt, ids = ids_of(prompt_text), ids_of(text)
    if ids[: len(prompt)] != prompt:  # a token crosses the border; a model that answers sees the prompt's own tokens
        ids = prompt + ids_of(text[len(prompt_text):])
    # What the template writes after the end-of-turn token is not the model's to learn.
    ends = [i for i in range(len(prompt), len(ids)) if ids[i] in tokenizer.all_special_ids]
    stop = ends[-1] + 1 if ends else len(ids)
    labels = [IGNORED] * len(prompt) + ids[len(prompt):stop] + [IGNORED] * (len(ids) - stop)
    return ids[:max_length], labels[:max_length], len(ids) > max_length


def tokenize(tokenizer, rows, max_length, source, progress=lambda rows: rows):
    """Rows → (list of Tokens, Summary). DataError where no token would be trained on."""
    result, summary = [], Summary()
    for row in progress(rows):
        try:
            ids, labels, cut = tokenize_row(tokenizer, row.messages, max_length)
        except DataError as error:
            raise DataError(f"{source}:{row.line}: {error}") from None
        summary.truncated += cut
        if all(label == IGNORED for label in labels[1:]):
            summary.left_out += 1
            continue
        result.append(Tokens(ids, labels, row.line))
        summary.tokens += len(ids)
        summary.trained += sum(label != IGNORED for label in labels[1:])
    summary.rows = len(result)
    if not result:
        raise DataError(f"0 trainable tokens in {len(rows)} rows of {source}\n  found:  every label is masked; "
                        f"{summary.truncated} rows were truncated to max_length {max_length}\n  needed: answers within "
                        "max_length tokens; raise --max_length")
    return result, summary
