"""Rows -> token ids, and which of them the assistant wrote. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from data import storage
from data.errors import RunError
from data.formats import REASONING, Message, Row
from data.template import Rendered, Spans, Template

# Keys of a message that need not be in the template.
_OURS = {"role", "content", "tool_calls", "weight"}

# Token ids of a row, and the ranges of them that are learned.
Encoded = tuple[list[int], Spans]


class Encoder:
    """A tokenizer and its template. Adds no special token that the template does not write."""

    def __init__(
        self,
        tokenizer: Any,
        last_turn_only: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> None:
        """variables: those of the chat template that --chat_template_kwargs sets."""
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RunError(
                f"{type(tokenizer).__name__} is a tokenizer in plain Python, "
                "without character offsets",
                needed="a tokenizer.json beside the model's weights",
            )
        serialized = backend.to_str()
        # A copy: a truncation set in the file must not cut rows unseen.
        self.backend = Tokenizer.from_str(serialized)
        self.backend.no_truncation()
        self.backend.no_padding()
        # Not only the tokens with a name (eos, pad, …): models have end-of-turn tokens without one.
        self.special = {
            i: token.content
            for i, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        } | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
        self.template = Template(tokenizer, last_turn_only, self.special.values(), variables)
        named = (tokenizer.eos_token, tokenizer.bos_token)
        self.controls = tuple(
            token
            for token in self.special.values()
            if token in self.template.text or token in named
        )
        self.writes_calls = "tool_calls" in self.template.text
        # The parts of a text do not have the text's tokens where a tokenizer puts a blank before
        # each text (SentencePiece).
        pairs = [("Hi there:\n", "Yes"), ("ok", " so"), ("a\n\n", "1 b"), ("x.", "\ny")]
        self.can_encode_parts = all(
            self._ids(a) + self._ids(b) == self._ids(a + b) for a, b in pairs
        )
        # Raw text gets what the tokenizer itself would add to it, and an end.
        first = tokenizer("")["input_ids"][:1]
        self.bos = first if first == [tokenizer.bos_token_id] else []
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.fingerprint = storage.digest(
            serialized,
            self.template.text,
            sorted(self.template.variables.items()),
            last_turn_only,
        )

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def control_in(self, row: Row) -> str | None:
        """Return a control token in the row's own text, which is read as the real one, or None."""
        texts = (m[key] for m in row.messages for key in ("content", *REASONING) if key in m)
        text = "\0".join(filter(lambda value: isinstance(value, str), texts))
        return next((token for token in self.controls if token in text), None)

    def render(self, row: Row) -> Rendered:
        """Return the text of a row: the part before the tokenizer. Raise RowError.

        The keys of turns that the template does not read are added to row.unread.
        """
        contents = [message["content"] for message in row.messages]
        if row.messages[0]["role"] in ("prompt", "completion"):
            text = "".join(contents)
            return Rendered(text, [(len(text) - len(contents[-1]), len(text))], raw=True)
        if row.tools and "tools" not in self.template.reads.variables:
            row.unread.append("tools")
        for message in row.messages:
            if len(message) > 2:
                self._hand_over(message, row.unread)
        return self.template.render(row)

    def _hand_over(self, message: Message, unread: list[str]) -> None:
        """Give a message the names that the template reads, and find those that it does not."""
        reads = self.template.reads
        for key in message.keys() - _OURS:
            reasoning = key in REASONING and message["role"] == "assistant"
            names = [name for name in REASONING if reads.key(name)] if reasoning else []
            message |= dict.fromkeys(names, message[key])
            if not names and not reads.key(key) and message[key] not in ("", [], {}):
                unread.append(f"{key} of {message['role']} turns")
        if "tool_calls" in message and not self.writes_calls and not message["content"].strip():
            message["weight"] = 0  # such a template leaves an empty answer of a call

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded]:
        """Return the ids and the assistant's token ranges of rendered rows.

        A row is encoded in parts, with cuts at the borders of its spans, where that gives the
        text's own tokens: a model that answers has seen the prompt's tokens, and control tokens
        stand at the answer's end. Other rows take character offsets, which cost more. The
        tokenizer works without the interpreter's lock, so this may run in a thread.
        """
        parts = [_parts(row) if self._has_borders(row) else [row.text] for row in rows]
        by_parts = all(len(texts) > 1 for texts in parts)
        encode = self.backend.encode_batch_fast if by_parts else self.backend.encode_batch
        pieces = iter(encode([text for texts in parts for text in texts], add_special_tokens=False))
        encoded = []
        for row, texts in zip(rows, parts):
            encodings = [next(pieces) for _ in texts]
            if len(encodings) > 1:
                made = _joined([encoding.ids for encoding in encodings])
            else:
                made = self._from_offsets(row, encodings[0])
            encoded.append(self._framed(*made) if row.raw else self._trimmed(*made))
        return encoded

    def _has_borders(self, row: Rendered) -> bool:
        """Return whether every span ends at a control token or at the end of the text."""
        text = row.text
        return self.can_encode_parts and all(
            end == len(text)
            or text.endswith(self.controls, 0, end)
            or text.startswith(self.controls, end)
            for _, end in row.spans
        )

    def _from_offsets(self, row: Rendered, encoding: Any) -> Encoded:
        offsets, spans = encoding.offsets, []
        for begin, end in row.spans:
            tokens = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin]
            if tokens and offsets[tokens[0]][0] < begin:
                # A model that answers sees the prompt's own tokens.
                return _joined([self._ids(part) for part in _parts(row)])
            if tokens:
                spans.append((tokens[0], tokens[-1] + 1))
        return encoding.ids, spans

    def _trimmed(self, ids: list[int], spans: Spans) -> Encoded:
        """Cut what the template writes after the end-of-turn token: not the model's to learn.

        Spans that the template marks do not hold it.
        """
        if self.template.marked:
            return ids, spans
        trimmed = []
        for first, end in spans:
            last = end - 1
            while last > first and ids[last] not in self.special:
                if self.backend.decode([ids[last]], skip_special_tokens=False).strip():
                    break
                last -= 1
            trimmed.append((first, last + 1 if ids[last] in self.special else end))
        return ids, trimmed

    def _framed(self, ids: list[int], spans: Spans) -> Encoded:
        """Add bos and eos to raw text. The only span is the completion, and the eos is its end."""
        ids = [*self.bos, *ids, *self.eos]
        return ids, [(begin + len(self.bos), len(ids)) for begin, _ in spans]


def _parts(row: Rendered) -> list[str]:
    """Return the text cut at the spans' borders: prompt, answer, prompt, answer, …, rest."""
    cuts = [0, *(cut for span in row.spans for cut in span), len(row.text)]
    return [row.text[begin:end] for begin, end in zip(cuts, cuts[1:])]


def _joined(parts: list[list[int]]) -> Encoded:
    """Return the ids of all parts, and the ranges of the answers among them: every second one."""
    ids, spans = [], []
    for number, part in enumerate(parts):
        if number % 2 and part:
            spans.append((len(ids), len(ids) + len(part)))
        ids += part
    return ids, spans
