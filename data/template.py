"""Chat templates: the text of a conversation, and which characters of it are trained."""

import os
import re
from pathlib import Path

from data import DataError, RowError

TEMPLATES = Path(__file__).parent / "templates"
NAMES = sorted(p.stem for p in TEMPLATES.glob("*.jinja"))
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


def prepare_tokenizer(tokenizer, template=None):
    """Give the tokenizer what fine-tuning needs: a chat template (`template`: a name of ours, a file, or None for the model's own)
    and a pad token that is never trained. Returns what was given, in words."""
    given = []
    if template in (None, "auto"):
        if not tokenizer.chat_template:
            vocabulary = tokenizer.get_vocab()
            name = next((name for sign, name in _SIGNS if sign in vocabulary), "alpaca")
            tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
            given.append(f"the {name} chat template, as it has none")
    else:
        path = TEMPLATES / f"{template}.jinja" if template in NAMES else Path(template)
        if not os.path.isfile(path):
            raise DataError(
                f"no chat template {str(template)[:200]}\n  needed: {', '.join(NAMES)}, a file, or auto"
            )
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the chat template {path} is not readable as text\n  found:  {error}\n  needed: Jinja, UTF-8"
            ) from None
        given.append(f"the chat template {template}")
    if isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template
        tokenizer.chat_template = templates.get("default") or next(iter(templates.values()))
    pad = tokenizer.pad_token
    if pad is None or pad == tokenizer.eos_token or pad in tokenizer.chat_template:
        vocabulary = tokenizer.get_vocab()
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        fillers = [
            *_FILLERS,
            tokenizer.unk_token,
            *sorted(set(special) - {tokenizer.bos_token}),
            tokenizer.bos_token,
        ]
        pad = next(
            (
                t
                for t in fillers
                if t in vocabulary and t != tokenizer.eos_token and t not in tokenizer.chat_template
            ),
            pad or tokenizer.unk_token or tokenizer.eos_token,
        )
    if pad != tokenizer.pad_token:
        tokenizer.pad_token = pad
        given.append(f"{pad} as the pad token")
    tokenizer.padding_side = "right"
    return given


class Template:
    """The tokenizer's chat template. `render(rows)` gives text and trained spans of each row, as character ranges.

    A template with `{% generation %}` marks says itself what the assistant writes. Without them, an answer is what stands between the
    prompt that asks for it and the prompt's continuation; a row whose template rewrites earlier turns is refused.
    """

    def __init__(self, tokenizer, last_turn_only=False):
        self.text = tokenizer.chat_template
        self.marked = bool(_GENERATION.search(self.text))
        self.last_turn_only = last_turn_only
        self.variables = dict(tokenizer.special_tokens_map)

    def render(self, rows):
        """[(text, [(begin, end), …]) or RowError] of the rows; the ranges are what the loss covers."""
        try:
            return self._render(rows)
        except Exception:  # one row that the template refuses spoils the batch: find it
            return [self._one(row) for row in rows]

    def _one(self, row):
        try:
            return self._render([row])[0]
        except RowError as error:
            return error
        except Exception as error:  # templates raise what they like
            return RowError(
                f"the chat template refuses it: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            )

    def _jinja(self, conversations, tools, **options):
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template(
            conversations=conversations,
            tools=tools,
            chat_template=self.text,
            **options,
            **self.variables,
        )

    def _texts(self, rows, conversations, **options):
        """Render all at once where no row has tools, as nearly always."""
        if not any(row.tools for row in rows):
            return self._jinja(conversations, None, **options)
        both = [self._jinja([c], row.tools, **options) for row, c in zip(rows, conversations)]
        return [text for texts, _ in both for text in texts], [
            spans for _, all_spans in both for spans in all_spans
        ]

    def _render(self, rows):
        conversations = [row.messages for row in rows]
        texts, marks = self._texts(rows, conversations, return_assistant_tokens_mask=self.marked)
        spans = marks if self.marked else self._between_prompts(rows, conversations, texts)
        result = []
        for row, text, ranges in zip(rows, texts, spans):
            if self.marked and (self.last_turn_only or any("weight" in m for m in row.messages)):
                ranges = self._chosen(ranges, [m for m in row.messages if m["role"] == "assistant"])
            ranges = [r for r in ranges if r[0] < r[1]]
            result.append(
                (text, ranges)
                if ranges
                else RowError(
                    "the chat template leaves no trained token in it; mend: "
                    "--template NAME, or an answer whose weight is not 0"
                )
            )
        return result

    def _chosen(self, ranges, turns):
        """Of the marked ranges, one for each answer, those that the loss covers."""
        if len(ranges) != len(turns):
            raise RowError(
                f"the chat template marks {len(ranges)} spans in {len(turns)} answers: they cannot be told apart; mend: "
                "--template NAME, without weights and --last_turn_only"
            )
        pairs = list(zip(ranges, turns))
        return [
            r
            for r, turn in (pairs[-1:] if self.last_turn_only else pairs)
            if turn.get("weight") != 0
        ]

    def _between_prompts(self, rows, conversations, texts):
        """The answers' ranges, where the template does not mark them."""
        # (row, turn): prompts to render
        cuts = [
            (i, t)
            for i, messages in enumerate(conversations)
            for t, m in enumerate(messages)
            if m["role"] == "assistant"
            and m.get("weight") != 0
            and (t == len(messages) - 1 or not self.last_turn_only)
        ]
        prompts, _ = self._texts(
            [rows[i] for i, _ in cuts],
            [conversations[i][:t] for i, t in cuts],
            add_generation_prompt=True,
        )
        inner = [(i, t) for i, t in cuts if t < len(conversations[i]) - 1]
        ends, _ = (
            self._texts([rows[i] for i, _ in inner], [conversations[i][: t + 1] for i, t in inner])
            if inner
            else ([], None)
        )
        ends = dict(zip(inner, ends))
        spans = [[] for _ in rows]
        for (i, t), prompt in zip(cuts, prompts):
            text = texts[i]
            stop = end = ends.get((i, t), text)
            if end is not text and not text.startswith(end):
                stop = end.rstrip()  # what a template adds at the very end only is not in the middle of the conversation
            if not text.startswith(prompt) or not text.startswith(stop):
                raise RowError(
                    f"the model's chat template writes turn {t + 1} differently when the conversation goes on, so what "
                    "was answered cannot be told apart; mend: --last_turn_only true, or --template NAME"
                )
            spans[i].append((len(prompt), len(stop)))
        return spans
