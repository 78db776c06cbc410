"""Raw records -> one form of conversation, whatever the format. Imports no torch.

A conversation is a list of {"role", "content"} with the roles system, user, assistant and tool, in
OpenAI's shape (tool_calls and tool_call_id as there). Raw text, which gets no chat template, has
the roles "prompt" (never trained) and "completion".
"""

import re
from dataclasses import dataclass, field
from typing import Any

from data import records
from data.errors import RowError

# The column that tells the format: the first one that a record has.
KEY = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "prompt-completion": "completion",
    "text": "text",
}
# What each format needs, for messages.
FORMATS = {
    **KEY,
    "alpaca": "instruction and output",
    "prompt-completion": "prompt and completion",
}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
# The columns that each format reads.
_CONVERSATION = {"system", "tools", "functions"}
_READ = {
    "messages": {"messages", *_CONVERSATION},
    "sharegpt": {"conversations", *_CONVERSATION},
    "alpaca": {"instruction", "input", "output", "history", *_CONVERSATION},
    "prompt-completion": {"prompt", "completion", "tools", "functions"},
    "text": {"text"},
}
# Role names that a registry entry may give as tags.
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "function_call",
}
_MEDIA = re.compile(
    r"(image|img|picture|video|audio)s?(_?(url|uri|path|file|name|bytes|data|base64)s?)?",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"<\|?(image|video|audio)(_?\w+)?\|?>")
_TEXT_PARTS = ("text", "input_text", "output_text", None)
_LOSS = ("weight", "loss", "train")  # keys of a turn that keep it out of the loss, each 0 or 1
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a turn with the same meaning
# What may come before each role. "call" is an assistant turn with tool calls.
_AFTER = {
    "system": ("the beginning",),
    "user": ("the beginning", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
}

Message = dict
Tags = dict[str, str]  # what dataset_info.json calls the keys and roles of a turn


@dataclass
class Row:
    """One conversation, and the tools that it may call.

    A message has the keys that its turn has; `weight` only where it is 0. unread: keys of the row
    that nothing reads.
    """

    messages: list[Message]
    tools: list[dict] | None = None
    unread: list[str] = field(default_factory=list)


def detect(record: Any) -> str:
    """Return the format of a record. Raise RowError where it has none."""
    if not isinstance(record, dict):
        raise RowError(f"not an object but {_type(record)}; needed: one JSON object a row")
    # A null column decides only where no other one does.
    for columns in ([key for key in record if record[key] is not None], record):
        for name, key in KEY.items():
            if key in columns:
                return name
    if "chosen" in record and "rejected" in record:
        raise RowError("preference data (chosen and rejected); needed: one answer a row")
    if "output" in record:
        raise RowError("no instruction; needed: instruction and output")
    raise RowError(
        f"no known format; the keys are {_keys(record)}; needed: {', or '.join(FORMATS.values())}; "
        "dataset_info.json can name other columns"
    )


def unread_keys(record: dict, read: set[str]) -> list[str]:
    """Return the keys with a value that are not among those read.

    Raise RowError where one of them holds pictures or sound.
    """
    if record.keys() <= read:  # nearly always
        return []
    unread = [key for key in record if key not in read and record[key] not in (None, "", [], {})]
    for key in unread:
        if _MEDIA.fullmatch(key) or (
            re.match("image|img|picture|video|audio|media", key, re.IGNORECASE)
            and _PLACEHOLDER.search(str([record[name] for name in record if name in read]))
        ):
            raise RowError(
                f"it has {key[:40]}; needed: text alone, as this trainer does not read images, "
                "video or sound"
            )
    return unread


def convert(record: Any, format: str, tags: Tags) -> Row:
    """Return the Row of a record of that format. Raise RowError that says what is wrong with it."""
    unread = unread_keys(record, _READ[format])
    tools = record.get("tools")
    if tools is None and record.get("functions"):  # OpenAI's older form
        functions = _list(record["functions"], "functions")
        tools = [{"type": "function", "function": function} for function in functions]
    if format == "alpaca":
        messages = _alpaca(record)
    elif format == "text":
        messages = [_message("completion", record["text"], "text")]
    elif format == "prompt-completion":
        messages = _prompt_completion(record, tags)
    else:
        turns = _list(record[KEY[format]], KEY[format])
        messages = _conversation(turns, _system(record), tags)
    return Row(messages, _tools(tools), unread)


# -- values ----------------------------------------------------------------------------------------
def _keys(record: dict) -> str:
    """Return the first keys of an object for a message that is not too long to read."""
    return ", ".join(str(key)[:40] for key in list(record)[:8]) or "none"


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _text(value: Any, name: str, empty: bool = False) -> str:
    """Return the text of a value. Raise RowError where it is none. empty: null or "" may be."""
    if value is None and empty:
        return ""
    if isinstance(value, list):  # OpenAI's content parts
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else _type(part)
            if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
                raise RowError(
                    f"{name} holds more than text ({str(kind)[:40]}); needed: text alone"
                )
        value = "\n".join(part["text"] for part in value)
    if value is None:
        raise RowError(f"{name} is null; needed: text")
    if not isinstance(value, str):
        raise RowError(f"{name} is not text but {_type(value)}; needed: text")
    if not empty and not value.strip():
        raise RowError(f"{name} is empty; needed: text")
    if "\0" in value:
        raise RowError(f"{name} holds a NUL character; needed: text without it")
    return value


def _message(role: str, content: Any, name: str, empty: bool = False) -> Message:
    return {"role": role, "content": _text(content, name, empty)}


def _system(record: dict) -> list[Message]:
    message = _message("system", record.get("system"), "system", empty=True)
    return [message] if message["content"].strip() else []


def _list(value: Any, name: str) -> list:
    # Parquet files and JSON dumps often carry the list as JSON text.
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = records.loads(value, name)
    if not isinstance(value, list):
        raise RowError(f"{name} is not a list but {_type(value)}; needed: a list of turns")
    if not value:
        raise RowError(f"{name} is empty; needed: at least one turn")
    return value


def _tools(value: Any) -> list[dict] | None:
    if value in (None, "", []):
        return None
    value = records.loads(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools is not a list of objects; needed: JSON schemas of functions")
    return value or None


# -- formats ---------------------------------------------------------------------------------------
def _prompt_completion(record: dict, tags: Tags) -> list[Message]:
    prompt, completion = record.get("prompt"), record["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = _list(prompt, "prompt") + _list(completion, "completion")
        return _conversation(turns, [], tags)
    return [
        _message("prompt", prompt, "prompt", empty=True),
        _message("completion", completion, "completion"),
    ]


def _alpaca(record: dict) -> list[Message]:
    parts = [_text(record.get(name), name, empty=True) for name in ("instruction", "input")]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise RowError("instruction is empty; needed: text in instruction or input")
    if "output" not in record:
        raise RowError(f"no output; needed: instruction and output; the keys are {_keys(record)}")
    history = records.loads(record.get("history") or [], "history")
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    ):
        raise RowError("history is not a list of pairs; needed: [[question, answer], …]")
    messages = _system(record)
    for i, pair in enumerate(history):
        for j, role in enumerate(("user", "assistant")):
            messages.append(_message(role, pair[j], f"history[{i}][{j}]"))
    answer = _message("assistant", record["output"], "output")
    return [*messages, {"role": "user", "content": question}, answer]


def _conversation(turns: list, system: list[Message], tags: Tags) -> list[Message]:
    """Return the messages of the turns, after a system message where there is one."""
    roles = ROLES | {tags[tag]: role for tag, role in _TAGS.items() if tag in tags}
    messages = list(system)
    for number, turn in enumerate(turns, 1):
        message = _turn(turn, f"turn {number}", roles, tags)
        role = message["role"]
        last = messages[-1]["role"] if messages else "the beginning"
        previous = "call" if messages and "tool_calls" in messages[-1] else last
        if previous not in _AFTER[role]:
            needed = "system first if any, then user and assistant in turn"
            if role == "tool":
                needed += "; tool after an assistant's tool_calls"
            raise RowError(f"turn {number}: {role} after {last}; needed: {needed}")
        if role != "system" or message["content"].strip():
            messages.append(message)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowError(
            "no assistant turn: there is nothing to learn from; needed: an answer to the user"
        )
    if all("weight" in answer for answer in answers):
        raise RowError(
            "every assistant turn has weight 0 or loss false: there is nothing to learn from; "
            "needed: one with weight 1"
        )
    last = messages[-1]["role"]
    if last != "assistant":
        raise RowError(
            f"ends with a {last} turn that nothing answers; needed: an assistant turn at the end"
        )
    return messages


def _turn(turn: Any, place: str, roles: dict[str, str], tags: Tags) -> Message:
    """Return the message of one turn. place: "turn 3", for errors."""
    if not isinstance(turn, dict):
        raise RowError(
            f"{place} is not an object but {_type(turn)}; needed: a role and its content"
        )
    role_key = tags.get("role_tag") or ("role" if "role" in turn else "from")
    if role_key not in turn:
        raise RowError(
            f"{place} has no role; its keys are {_keys(turn)}; "
            "needed: role and content, or from and value"
        )
    name = turn[role_key]
    if not isinstance(name, str) or name not in roles:
        raise RowError(
            f"{place}: unknown role {str(name)[:40]!r}; needed: system, user, assistant or tool"
        )
    content_key = "content"
    if role_key == "from" or ("value" in turn and "content" not in turn):
        content_key = "value"
    content_key = tags.get("content_tag") or content_key
    place = f"{place} ({name}): {content_key}"
    role, content = roles[name], turn.get(content_key)
    kept = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in (role_key, content_key, *_LOSS)
    }
    unread_keys(kept, set())  # refuses images
    trained = _is_trained(turn, place)
    if role in ("user", "system", "tool"):
        if kept.pop("tool_calls", None):
            raise RowError(f"{place}: tool calls of a {role} turn; needed: an assistant turn")
        # Nobody trains it, and the user is told so.
        kept |= {key: True for key in ("loss", "train") if turn.get(key)}
        return kept | _message(role, content, place, empty=role != "user")
    for key in (*REASONING, "function_call"):
        kept.pop(key, None)
    if not trained:
        kept["weight"] = 0
    kept |= _reasoning(turn, place)
    if role == "function_call":  # ShareGPT: the call as JSON in the text
        call = {"role": "assistant", "content": "", "tool_calls": _calls(content, place)}
        return kept | call
    return kept | _answer(turn, content, place)


def _is_trained(turn: dict, place: str) -> bool:
    """Return whether a turn is in the loss: OpenAI's weight, or loss or train of other tools."""
    said = {}
    for key in _LOSS:
        value = turn.get(key)
        if value is not None and (not isinstance(value, (bool, int, float)) or value not in (0, 1)):
            raise RowError(
                f"{place}: {key} {str(value)[:40]!r}; needed: "
                + ("0 or 1" if key == "weight" else "true or false")
            )
        if value is not None:
            said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise RowError(f"{place}: {' and '.join(said)} contradict each other; needed: one of them")
    return all(said.values())


def _reasoning(turn: dict, place: str) -> Message:
    """Return the reasoning of an answer, under the first of the names that the turn has."""
    given = {key: turn[key] for key in REASONING if str(turn.get(key) or "").strip()}
    if len({str(value) for value in given.values()}) > 1:
        raise RowError(f"{place}: {' and '.join(given)} differ; needed: one of them")
    return {key: _text(value, f"{place}: {key}") for key, value in [*given.items()][:1]}


def _answer(turn: dict, content: Any, place: str) -> Message:
    calls = turn.get("tool_calls")
    if not calls and turn.get("function_call"):  # OpenAI's older form
        calls = [{"function": turn["function_call"]}]
    message = _message("assistant", content, place, empty=bool(calls))
    if calls:
        message["tool_calls"] = _calls(calls, place)
    return message


def _calls(calls: Any, place: str) -> list[dict]:
    """Return tool calls in OpenAI's shape, their arguments as an object."""
    calls = records.loads(calls, place)
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                f"{place}: a tool call without a function name; needed: name and arguments"
            )
        name, arguments = function["name"], function.get("arguments")
        place_of_arguments = f"{place}: the arguments of {name[:40]}"
        if arguments != "":
            arguments = records.loads(arguments, place_of_arguments)
        if arguments in (None, ""):
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError(f"{place_of_arguments} are {_type(arguments)}; needed: an object")
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": name, "arguments": arguments}
        result.append(kept | {"type": "function", "function": function})
    return result
