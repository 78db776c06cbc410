"""Raw records → one canonical conversation. Imports no torch.

A conversation is a list of {"role", "content"} with roles system, user, assistant and tool, in OpenAI's shape (tool_calls and
tool_call_id as there). Raw text, which gets no chat template, has the one role "prompt" (never trained) and "completion".
"""

from dataclasses import dataclass

from data import RowError, records

FORMATS = {
    "alpaca": "instruction and output",
    "sharegpt": "conversations",
    "messages": "messages",
    "prompt-completion": "prompt and completion",
    "text": "text",
}
KEY = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "prompt-completion": "completion",
    "text": "text",
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
_TAGS = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function": "function_call",
}
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")
# What may come before each role; "" is the beginning.
_AFTER = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
}


@dataclass
class Row:
    """One conversation, the tools that it may call, and where it stood."""

    messages: list
    line: int
    tools: list | None = None


def detect(record):
    """The record's format; RowError where it has none."""
    if not isinstance(record, dict):
        raise RowError(f"not an object but {type(record).__name__}; needed: one JSON object a row")
    for present in (
        lambda key: record.get(key) is not None,
        record.__contains__,
    ):  # a null column decides nothing by itself
        for name, key in KEY.items():
            if present(key):
                return name
    if "chosen" in record and "rejected" in record:
        raise RowError("preference data (chosen and rejected); needed: one answer a row")
    if "output" in record:
        raise RowError("no instruction; needed: instruction and output")
    found = _keys(record)
    raise RowError(
        f"no known format; the keys are {found}; needed: "
        + ", or ".join(FORMATS.values())
        + "; dataset_info.json can name other columns"
    )


def _keys(record):
    """The first keys of an object, in words, none too long to read."""
    return ", ".join(str(key)[:40] for key in list(record)[:8]) or "none"


def convert(record, format, line, tags=None):
    """The Row of a record of `format`. RowError says what is wrong with it."""
    tools = record.get("tools")
    if tools is None and record.get("functions"):  # OpenAI's older form
        tools = [
            {"type": "function", "function": f} for f in _list(record["functions"], "functions")
        ]
    tools = _tools(tools)
    if format == "alpaca":
        messages = _alpaca(record)
    elif format == "text":
        messages = [{"role": "completion", "content": _text(record["text"], "text")}]
    elif format == "prompt-completion":
        if isinstance(record.get("prompt"), list) or isinstance(record["completion"], list):
            messages = _conversation(
                [
                    *_list(record.get("prompt"), "prompt"),
                    *_list(record["completion"], "completion"),
                ],
                None,
                tags,
            )
        else:
            messages = [
                {"role": "prompt", "content": _text(record.get("prompt"), "prompt", empty=True)},
                {"role": "completion", "content": _text(record["completion"], "completion")},
            ]
    else:
        key = KEY[format]
        messages = _conversation(_list(record[key], key), record.get("system"), tags)
    return Row(messages, line, tools)


def _text(value, name, empty=False):
    if value is None and not empty:
        raise RowError(f"{name} is null; needed: text")
    if isinstance(value, list) and all(
        isinstance(p, dict) and isinstance(p.get("text"), str) for p in value
    ):
        value = "\n".join(part["text"] for part in value)  # OpenAI's content parts
    if value is not None and not isinstance(value, str):
        if isinstance(value, list):
            raise RowError(f"{name} holds more than text; needed: text alone")
        raise RowError(f"{name} is not text but {type(value).__name__}; needed: text")
    if not empty and not value.strip():
        raise RowError(f"{name} is empty; needed: text")
    if value and "\0" in value:
        raise RowError(f"{name} holds a NUL character; needed: text without it")
    return value or ""


def _list(value, name):
    if isinstance(value, str) and value.lstrip().startswith(
        "["
    ):  # Parquet files and JSON dumps often carry the list as JSON text
        value = records.loads(value, name)
    if not isinstance(value, list):
        raise RowError(
            f"{name} is not a list but {'null' if value is None else type(value).__name__}; needed: a list of turns"
        )
    if not value:
        raise RowError(f"{name} is empty; needed: at least one turn")
    return value


def _tools(value):
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        value = records.loads(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools is not a list of objects; needed: JSON schemas of functions")
    return value or None


def _alpaca(record):
    question = "\n\n".join(
        part
        for part in (
            _text(record["instruction"], "instruction", empty=True),
            _text(record.get("input"), "input", empty=True),
        )
        if part.strip()
    )
    if not question:
        raise RowError("instruction is empty; needed: text in instruction or input")
    if "output" not in record:
        raise RowError(f"no output; needed: instruction and output; the keys are {_keys(record)}")
    answer = _text(record["output"], "output")
    system = _text(record.get("system"), "system", empty=True)
    messages = [{"role": "system", "content": system}] if system.strip() else []
    history = record.get("history") or []
    if isinstance(history, str):
        history = records.loads(history, "history")
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    ):
        raise RowError("history is not a list of pairs; needed: [[question, answer], …]")
    for i, (asked, answered) in enumerate(history):
        messages += [
            {"role": "user", "content": _text(asked, f"history[{i}][0]")},
            {"role": "assistant", "content": _text(answered, f"history[{i}][1]")},
        ]
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _conversation(turns, system, tags):
    tags = tags or {}
    messages, before = [], ""
    system = _text(system, "system", empty=True)
    if system.strip():
        messages.append({"role": "system", "content": system})
        before = "system"
    roles = {
        **ROLES,
        **{tags[f"{tag}_tag"]: role for tag, role in _TAGS.items() if f"{tag}_tag" in tags},
    }
    for i, turn in enumerate(turns):
        place = f"turn {i + 1}"
        if not isinstance(turn, dict):
            raise RowError(
                f"{place} is not an object but {type(turn).__name__}; needed: a role and its content"
            )
        role_key = tags.get("role_tag") or ("role" if "role" in turn else "from")
        content_key = tags.get("content_tag") or (
            "value"
            if "value" in turn and "content" not in turn or role_key == "from"
            else "content"
        )
        if role_key not in turn:
            raise RowError(
                f"{place} has no role; its keys are {_keys(turn)}; needed: role and content, or from and value"
            )
        role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise RowError(
                f"{place}: unknown role {str(turn[role_key])[:40]!r}; needed: system, user, assistant or tool"
            )
        message = _message(
            role, turn, turn.get(content_key), f"{place} ({turn[role_key]}): {content_key}"
        )
        role = message["role"]
        if before not in _AFTER[role] and not (role == "system" and not messages):
            last = messages[-1]["role"] if messages else "the beginning"
            raise RowError(
                f"{place}: {role} after {last}; needed: system first if any, then user and assistant in turn"
                + ("; tool after an assistant's tool_calls" if role == "tool" else "")
            )
        before = "call" if message.get("tool_calls") else role
        if role != "system" or message["content"].strip():
            messages.append(message)
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise RowError(
            "no assistant turn: there is nothing to learn from; needed: an answer to the user"
        )
    if all("weight" in m for m in answers):
        raise RowError(
            "every assistant turn has weight 0: there is nothing to learn from; needed: one with weight 1"
        )
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"ends with a {messages[-1]['role']} turn that nothing answers; needed: an assistant turn at the end"
        )
    return messages


def _message(role, turn, content, place):
    if role == "function_call":  # ShareGPT: the call as JSON in the text
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, place)}
    calls = turn.get("tool_calls") if role == "assistant" else None
    if role == "assistant" and not calls and turn.get("function_call"):  # OpenAI's older form
        calls = [{"function": turn["function_call"]}]
    message = {
        "role": role,
        "content": _text(content, place, empty=bool(calls) or role in ("tool", "system")),
    }
    message.update(
        {key: turn[key] for key in _KEPT if turn.get(key) is not None and key != "tool_calls"}
    )
    if calls:
        message["tool_calls"] = _calls(calls, place)
    if (
        role == "assistant" and turn.get("weight") is not None
    ):  # OpenAI: 0 keeps a turn out of the loss
        if turn["weight"] not in (0, 1):
            raise RowError(f"{place}: weight {turn['weight']!r}; needed: 0 or 1")
        if not turn["weight"]:
            message["weight"] = 0
    return message


def _calls(calls, place):
    result = []
    if isinstance(calls, str):
        calls = records.loads(calls, place)
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                f"{place}: a tool call without a function name; needed: name and arguments"
            )
        arguments, named = (
            function.get("arguments"),
            f"{place}: the arguments of {function['name'][:40]}",
        )
        if isinstance(arguments, str):
            arguments = records.loads(arguments or "{}", named)
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise RowError(f"{named} are {type(arguments).__name__}; needed: an object")
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append(
            {
                **kept,
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return result
