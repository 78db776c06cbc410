"""Chat templates: the text of a conversation, and which characters of it the assistant wrote."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from data.errors import RowError, RunError, did_you_mean, one_line
from data.formats import REASONING, Message, Row
from data.template_reads import Reads, reads

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
# Variables of a template that are not the user's to set.
_ROW_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message")
_TAGS_AT_END = re.compile(r"(\s|<[^<>]*>)+$")
# Two texts without a common first or last character: what they change is what the answer writes.
_PROBES = ("Xylem quartz", "Abacus jumble")

Spans = list[tuple[int, int]]  # [(begin, end), …]


class Rendered(NamedTuple):
    """The text of a row and the character ranges that are learned: the assistant spans.

    raw: the row is raw text, without a template. notes: what the template leaves out of it.
    """

    text: str
    spans: Spans
    raw: bool = False
    notes: tuple[str, ...] = ()


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
    answer is the text between the prompt that asks for it and the rest of the conversation. Where
    a template writes earlier turns differently (without their reasoning, say), the conversation is
    rendered with other words in the answer's place: what changes is the answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        last_turn_only: bool,
        special: Iterable[str] = (),
        variables: dict[str, Any] | None = None,
    ) -> None:
        """special: the control tokens. variables: what --chat_template_kwargs sets.

        Raise RunError where the template is none, or does not read one of the variables.
        """
        self.text = tokenizer.chat_template
        self.marked = bool(_GENERATION.search(self.text))
        self.last_turn_only = last_turn_only
        self.special = tuple(special)
        try:
            self.reads: Reads = reads(self.text)
        except jinja2.TemplateError as error:
            raise RunError(
                "the chat template is not readable as Jinja",
                found=one_line(error),
                needed="the model's own, or --template NAME",
            ) from None
        own = tokenizer.special_tokens_map
        for name in variables or {}:
            _check_variable(name, self.reads.variables - {*own, *_ROW_VARIABLES})
        self.variables = (variables or {}) | own

    def render(self, row: Row) -> Rendered:
        """Return the text and the assistant spans of a row. Raise RowError where it has none."""
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        learned = turns[-1:] if self.last_turn_only else turns
        learned = [turn for turn in learned if row.messages[turn].get("weight") != 0]
        text, marks = self._jinja(row, None, return_assistant_tokens_mask=self.marked)
        if not self.marked:
            spans = [self._span(row, turn, text) for turn in learned]
        elif learned == turns:
            spans = marks[0]
        elif len(marks[0]) == len(turns):
            spans = [span for span, turn in zip(marks[0], turns) if turn in learned]
        else:
            raise RowError(
                f"the chat template marks {len(marks[0])} spans in {len(turns)} answers, so it is "
                f"not known which belong together; {_FIX}, without weights and --last_turn_only"
            )
        if len(spans) == len(learned):
            for turn, (begin, end) in zip(learned, spans):
                said = row.messages[turn]["content"].rpartition("</think>")[2].strip()
                if text.find(said, begin, end) < 0:  # written differently, or not at all
                    self._written(row, turn, text)
        notes = self._left_out(row, learned, text, spans)
        spans = [(begin, end) for begin, end in spans if begin < end]
        if not spans:
            raise RowError(
                f"the chat template leaves no trained token in it; {_FIX}, or an answer whose "
                "weight is not 0"
            )
        if any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:])):
            raise self._unclear(learned[-1])
        return Rendered(text, spans, notes=tuple(notes))

    def _left_out(self, row: Row, learned: list[int], text: str, spans: Spans) -> set[str]:
        """Return notes on the reasoning that learned answers have and their spans have not."""
        notes = set()
        if len(spans) != len(learned):  # marks that do not belong to one answer each
            spans = [(0, len(text))] * len(learned)
        for turn, (begin, end) in zip(learned, spans):
            message = row.messages[turn]
            if len(message) == 2 and "</think>" not in message["content"]:
                continue
            inside = message["content"].rpartition("</think>")[0].rpartition("<think>")[2].strip()
            given = [message[key] for key in REASONING if self.reads.key(key) and key in message]
            if all(text.find(part.strip(), begin, end) >= 0 for part in (inside, *given)):
                continue
            if turn + 1 == len(row.messages):
                fix = "--template FILE takes one that keeps it"
                notes.add(f"the chat template leaves the last answer's reasoning out; {fix}")
            else:
                fix = "a row for each answer, with --last_turn_only true, trains it"
                notes.add(f"the chat template leaves the reasoning of earlier turns out; {fix}")
        return notes

    def _jinja(self, row: Row, end: int | None, **options: Any) -> tuple[str, list[Spans]]:
        """Return the text of a row's messages before number `end`, and [the marked spans]."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotations are wrong
        options |= self.variables
        messages = row.messages[:end]
        if any("tool_calls" in message for message in messages):
            messages = [_as_call(message, *self._form_of_calls) for message in messages]
        try:
            (text,), marks = render([messages], chat_template=self.text, tools=row.tools, **options)
        except Exception as error:  # templates raise what they like
            raise RowError(
                f"the chat template rejects it: {type(error).__name__}: {one_line(error, 160)}"
            ) from None
        return text, marks

    @functools.cached_property
    def _form_of_calls(self) -> tuple[str | None, bool]:
        """What the template takes where an answer is a call: (its content, arguments as text).

        OpenAI has null and JSON text. Many templates want an empty text or an object, and fail on
        the others or write them as Python does.
        """
        from transformers.utils import chat_template_utils

        function = {"name": "f", "arguments": {"x": "y"}}
        call = {"id": "a12345678", "type": "function", "function": function}
        ask, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": ""}
        result = {"role": "tool", "name": "f", "tool_call_id": "a12345678", "content": "b"}
        render: Any = chat_template_utils.render_jinja_template
        for form in ((None, False), (None, True), ("", False), ("", True)):
            messages = [ask, _as_call(said | {"tool_calls": [call]}, *form), result]
            try:
                (text,), _ = render([messages], chat_template=self.text, **self.variables)
            except Exception:  # as above
                continue
            if "{'x'" not in text and ("None" not in text or "None" in self.text):
                return form
        return "", False

    # -- the place of an answer --------------------------------------------------------------------
    def _unclear(self, turn: int) -> RowError:
        return RowError(
            f"the model's chat template writes turn {turn + 1} differently when the "
            "conversation goes on, so its answer cannot be found in the text; "
            "fix: --last_turn_only true, or --template NAME"
        )

    def _span(self, row: Row, turn: int, text: str) -> tuple[int, int]:
        """Return the range of an answer in the row's text: from its prompt to what follows it."""
        prompt, _ = self._jinja(row, turn, add_generation_prompt=True)
        closed = text if turn + 1 == len(row.messages) else self._jinja(row, turn + 1)[0]
        end = closed
        if not text.startswith(end):
            end = end.rstrip()  # what a template adds at the very end only
        known = text.startswith(prompt), text.startswith(end)
        if all(known):
            return len(prompt), len(end)
        written = self._written(row, turn, text)
        return (
            len(prompt) if known[0] else self._begin(row, turn, prompt, text[: written[0]]),
            len(end) if known[1] else self._end(row, turn, closed, text[written[1] :], written[1]),
        )

    def _written(self, row: Row, turn: int, text: str) -> tuple[int, int]:
        """Return the range of the text that an answer's words make: without its header and end.

        Raise RowError where the template does not write them, or they change other turns too.
        """
        one, other = (self._jinja(self._with(row, turn, probe), None)[0] for probe in _PROBES)
        before = commonprefix([one, other])
        after = commonprefix([one[::-1], other[::-1]])[::-1]
        if one == other:
            raise RowError(
                f"the chat template leaves the answer of turn {turn + 1} out of the text; "
                f"{_FIX}, or --last_turn_only true where it is not the last one"
            )
        end = len(text) - len(after)
        if end < len(before) or not (text.startswith(before) and text.endswith(after)):
            raise self._unclear(turn)
        return len(before), end

    def _with(self, row: Row, turn: int, word: str) -> Row:
        """Return the row with this word in place of every text of an answer."""
        message = dict(row.messages[turn])
        # Templates cut texts at tags such as </think>, so these stay.
        for key in ("content", *REASONING):
            if key in message:
                message[key] = "".join(
                    part if not part.strip() or self._is_tag(part) else word
                    for part in re.split(r"(<[^<>\s]+>)", message[key])
                )
        if "tool_calls" in message:
            # Arguments and none: what they have in common, every call's have.
            arguments = {word: word} if word == _PROBES[0] else {}
            message["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": arguments}}
                for call in message["tool_calls"]
            ]
        return dataclasses.replace(
            row, messages=[*row.messages[:turn], message, *row.messages[turn + 1 :]]
        )

    def _is_tag(self, part: str) -> bool:
        return part.startswith("<") and part in self.text

    def _begin(self, row: Row, turn: int, prompt: str, before: str) -> int:
        """Return where an answer begins whose prompt is not the text's beginning.

        before: the text before the answer's own words. It ends with the header that asks for an
        answer, or with a part of that: a header may open a <think> that the text leaves out. What
        the template writes between a whole header and the words is the model's to write.
        """
        closed = self._jinja(row, turn)[0]
        header = prompt[len(commonprefix([prompt, closed])) :]
        if not header:
            blanks = closed[len(closed.rstrip()) :]
            begin = len(before.rstrip())
            return begin + len(blanks) if before.startswith(blanks, begin) else begin
        # What names the speaker: it stands in every header, unlike a tag at its end.
        opening = self._first_special(header)
        core = max(_TAGS_AT_END.sub("", header), opening, key=len)
        place = before.rfind(opening or core)
        if not core or place < 0 or not before.startswith(core, place):
            raise self._unclear(turn)
        return place + len(commonprefix([header, before[place:]]))

    def _end(self, row: Row, turn: int, closed: str, rest: str, begin: int) -> int:
        """Return where an answer ends that is closed in another way when it is the last one.

        closed: the text of the conversation up to it; rest: what follows its words in the row's
        text, from character `begin` on. An answer in the middle may have another end-of-turn token,
        which stands before the next header.
        """
        short = dataclasses.replace(row, messages=row.messages[: turn + 1])
        tail = closed[self._written(short, turn, closed)[1] :]
        if rest.startswith(tail):
            return begin + len(tail)
        last = self._first_special(tail)
        place = tail.find(last)
        ours = self._special_at(rest, place)
        following = rest[place + len(ours) :].lstrip()
        same = rest.startswith(tail[:place])
        if same and last and ours and self._special_at(following, 0):
            return begin + place + len(ours)
        raise self._unclear(turn)

    def _first_special(self, text: str) -> str:
        """Return the control token that comes first in the text, or ""."""
        found = [token for token in self.special if token in text]
        return min(found, key=text.index, default="")

    def _special_at(self, text: str, place: int) -> str:
        """Return the control token that stands at this place of the text, or ""."""
        found = [token for token in self.special if text.startswith(token, place)]
        return max(found, key=len, default="")


def _as_call(message: Message, content: str | None, as_text: bool) -> Message:
    """Return a message with its calls, if any, in the form that Template._form_of_calls gives."""
    if "tool_calls" not in message:
        return message
    calls = message["tool_calls"]
    if as_text:
        calls = [
            call
            | {
                "function": function
                | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
            }
            for call in calls
            for function in [call["function"]]
        ]
    return message | {"tool_calls": calls, "content": message["content"] or content}


def _check_variable(name: str, known: Iterable[str]) -> None:
    """Raise RunError for a variable that the template does not read, or that is not the user's."""
    if name not in known:
        raise RunError(
            f"chat_template_kwargs: the chat template does not read {str(name)[:80]}"
            f"{did_you_mean(str(name), known)}",
            needed=f"some of {', '.join(sorted(known))}"
            if known
            else "nothing: this template has no variables to set",
        )
