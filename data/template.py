"""Chat templates: the text of a conversation, and which characters of it the assistant wrote."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import RowError, RunError, one_line
from data.formats import Row

TEMPLATES = Path(__file__).parent / "templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A tokenizer without a template that has this token was made for that format.
_SIGNS = (("<|start_header_id|>", "llama3"), ("<|im_start|>", "chatml"), ("[INST]", "mistral"))
# Tokens that models keep for padding or for nothing: never an answer's.
_FILLERS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|padding|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
    "<unk>",
)
_FIX = "fix: --template NAME"

Spans = list[tuple[int, int]]  # [(begin, end), …]


class Rendered(NamedTuple):
    """The text of a row and the character ranges that are learned: the assistant spans.

    raw: the row is raw text, without a template.
    """

    text: str
    spans: Spans
    raw: bool = False


def prepare_tokenizer(tokenizer: Any, template: str | None = None) -> list[str]:
    """Give the tokenizer what fine-tuning needs: a chat template, and a pad token of its own.

    template: a name of ours, a file, or None for the model's own. The pad token is one that no
    answer holds. Returns what the tokenizer was given, for the user. Raises RunError.
    """
    given = []
    if template is not None and template != "auto":
        tokenizer.chat_template = _read_template(template)
        given.append(f"the chat template {template}")
    elif not tokenizer.chat_template:
        vocabulary = tokenizer.get_vocab()
        name = next((name for sign, name in _SIGNS if sign in vocabulary), "alpaca")
        tokenizer.chat_template = _read_template(name)
        given.append(f"the {name} chat template, as it has none")
    if isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template
        tokenizer.chat_template = templates.get("default") or next(iter(templates.values()))
    pad = tokenizer.pad_token
    if pad is None or pad == tokenizer.eos_token or pad in tokenizer.chat_template:
        pad = _unused_token(tokenizer) or pad or tokenizer.unk_token or tokenizer.eos_token
    if pad != tokenizer.pad_token:
        tokenizer.pad_token = pad
        given.append(f"{pad} as the pad token")
    tokenizer.padding_side = "right"
    return given


def _read_template(template: str) -> str:
    path = TEMPLATES / f"{template}.jinja" if template in NAMES else Path(template)
    if not os.path.isfile(path):
        raise RunError(
            f"no chat template {template[:200]}", needed=f"{', '.join(NAMES)}, a file, or auto"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"the chat template {path} is not readable as text", found=error, needed="Jinja, UTF-8"
        ) from None


def _unused_token(tokenizer: Any) -> str | None:
    """Return a token of the vocabulary that no conversation holds, or None."""
    vocabulary, bos = tokenizer.get_vocab(), tokenizer.bos_token
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    for token in (*_FILLERS, tokenizer.unk_token, *sorted(special - {bos}), bos):
        used = token == tokenizer.eos_token or str(token) in tokenizer.chat_template
        if token in vocabulary and not used:
            return token
    return None


class Template:
    """The tokenizer's chat template.

    A template with `{% generation %}` marks says itself what the assistant writes. Without them an
    answer is the text between the prompt that asks for it and the rest of the conversation; a row
    whose template writes earlier turns differently is then rejected.
    """

    def __init__(self, tokenizer: Any, last_turn_only: bool) -> None:
        self.text = tokenizer.chat_template
        self.marked = bool(_GENERATION.search(self.text))
        self.last_turn_only = last_turn_only
        self.variables = tokenizer.special_tokens_map

    def render(self, row: Row) -> Rendered:
        """Return the text and the assistant spans of a row. Raise RowError where it has none."""
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        learned = turns[-1:] if self.last_turn_only else turns
        learned = [turn for turn in learned if row.messages[turn].get("weight") != 0]
        text, marks = self._jinja(row, None, return_assistant_tokens_mask=self.marked)
        if not self.marked:
            spans = [self._between_prompts(row, turn, text) for turn in learned]
        elif learned == turns:
            spans = marks[0]
        elif len(marks[0]) == len(turns):
            spans = [span for span, turn in zip(marks[0], turns) if turn in learned]
        else:
            raise RowError(
                f"the chat template marks {len(marks[0])} spans in {len(turns)} answers, so it is "
                f"not known which belong together; {_FIX}, without weights and --last_turn_only"
            )
        spans = [(begin, end) for begin, end in spans if begin < end]
        if not spans:
            raise RowError(
                f"the chat template leaves no trained token in it; {_FIX}, or an answer whose "
                "weight is not 0"
            )
        return Rendered(text, spans)

    def _jinja(self, row: Row, end: int | None, **options: Any) -> tuple[str, list[Spans]]:
        """Return the text of a row's messages before number `end`, and [the marked spans]."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotations are wrong
        options |= self.variables
        try:
            (text,), marks = render(
                [row.messages[:end]], chat_template=self.text, tools=row.tools, **options
            )
        except Exception as error:  # templates raise what they like
            raise RowError(
                f"the chat template rejects it: {type(error).__name__}: {one_line(error, 160)}"
            ) from None
        return text, marks

    def _between_prompts(self, row: Row, turn: int, text: str) -> tuple[int, int]:
        """Return the range of an answer in the row's text: from its prompt to what follows it."""
        prompt, _ = self._jinja(row, turn, add_generation_prompt=True)
        end = text if turn + 1 == len(row.messages) else self._jinja(row, turn + 1)[0]
        if not text.startswith(end):
            end = end.rstrip()  # what a template adds at the very end only
        if not text.startswith(prompt) or not text.startswith(end):
            raise RowError(
                f"the model's chat template writes turn {turn + 1} differently when the "
                "conversation goes on, so its answer cannot be found in the text; "
                "fix: --last_turn_only true, or --template NAME"
            )
        return len(prompt), len(end)
