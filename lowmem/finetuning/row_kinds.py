"""Recognizes rows of examples by their keys, and converts them into plain texts, completions, conversations and
preferences."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowmem.errors import short_repr


@dataclass(frozen=True)
class PlainText:
    """A text of which all tokens are learned."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion without a template, of which the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Args:
        messages: with ``role``, ``content`` (a text or None) and maybe ``tool_calls``, whose arguments are objects.
        tools: definitions of tools, each ``{"type": "function", "function": ...}``.
        prompt_messages: the number of messages at the start whose answers are not learned.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    prompt_messages: int = 0


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first one is preferred."""

    chosen: Completion | Conversation
    rejected: Completion | Conversation


@dataclass(frozen=True)
class RowOptions:
    """How rows are read.

    Args:
        columns: the name of the column that stands for each key, as ``{"prompt": "question"}``.
        system: the system message of conversations that have none.
        prompts_as_chat: whether a prompt and its completion, as texts, are a user's and an assistant's message.
        reserved: special tokens of the template, which such texts must not hold.
        preferences: whether rows are preferences, as for ``fit --method dpo``.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    prompts_as_chat: bool = False
    reserved: frozenset[str] = frozenset()
    preferences: bool = False


def convert_row(record: Any, options: RowOptions) -> tuple[str, PlainText | Completion | Conversation | Preference]:
    """Return the kind of a row, and what is learned of it.

    Raises:
        ValueError: it is of no kind, of several, or has a mistake.
    """
    if isinstance(record, str) and options.preferences:
        raise ValueError(f"it is a text, and {_DPO_ROWS}: leave --method out to train texts")
    if isinstance(record, str):
        return "text", PlainText(record)
    if not isinstance(record, dict):
        raise ValueError(f"{short_repr(record)} is no JSON object")
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError(f"it has half of a surrogate pair, which is no text: {short_repr(record)}") from None
    if options.columns and {*options.columns.values()} <= record.keys():
        others = {key: record[key] for key in _OPTIONAL if key in record}
        record = others | {key: record[column] for key, column in options.columns.items()}
    # Columns of tables that hold rows of several kinds are null in those of another one
    filled = {key for key, value in record.items() if value is not None}
    names = [name for name in KINDS if (name == PREFERENCES) == options.preferences]
    keys_by_kind = {name: {*KINDS[name][0]} for name in names}
    kinds = [name for name, keys in keys_by_kind.items() if keys <= filled]
    kinds = kinds or [name for name, keys in keys_by_kind.items() if keys <= record.keys()]
    if len(kinds) != 1:
        raise ValueError(_unrecognized_row_message(record, kinds, options))
    converted = KINDS[kinds[0]][1](record, options)
    if isinstance(converted, Preference):
        answers = converted.chosen, converted.rejected
        return kinds[0], Preference(*(_checked_with_system_message(answer, options.system) for answer in answers))
    return kinds[0], _checked_with_system_message(converted, options.system)


def _checked_with_system_message(converted: Any, system: str | None) -> Any:
    """Return what is learned of a row, with the system message of a conversation that has none."""
    if not isinstance(converted, Conversation):
        return converted
    _check_conversation(converted)
    if system is None or converted.messages[0]["role"] == "system":
        return converted
    moved = converted.prompt_messages and converted.prompt_messages + 1
    return Conversation([{"role": "system", "content": system}, *converted.messages], converted.tools, moved)


def _unrecognized_row_message(record: Mapping[str, Any], kinds: list[str], options: RowOptions) -> str:
    keys = ", ".join(map(short_repr, record)) or "of nothing"
    if options.columns and not kinds:
        missing = ", ".join(short_repr(name) for name in options.columns.values() if name not in record)
        return f"it has keys {keys}, and --columns names {missing or 'keys of no kind'}: name columns that are there"
    if kinds:
        remedies = " or ".join(_columns_option({key: key for key in KINDS[kind][0]}) for kind in kinds)
        return f"it has more than one kind of text, {' and '.join(kinds)}: {remedies} takes one of them"
    suggested = _suggested_columns(record, options.preferences)
    remedy = f"; or name its columns with {_columns_option(suggested)}" if suggested else ""
    if options.preferences:
        remedy = remedy or ", or leave --method out to train texts and answers"
        return f"it has keys {keys}, and {_DPO_ROWS}: give it these{remedy}"
    if _suggested_columns(record, True):
        return f"it has keys {keys}: preferences are trained with --method dpo"
    return f"it has keys {keys}; give it text, or prompt and completion, or messages{remedy}"


def _columns_option(columns: Mapping[str, str]) -> str:
    return f"--columns {' '.join(f'{key}={column}' for key, column in columns.items())}"


_USUAL_NAMES = (
    {
        "prompt": "prompt question query instruction input user request problem q",
        "completion": "completion answer response output assistant reply solution target a",
    },
    {"messages": "conversation dialogue dialog chat turns"},
    {"text": "content body document"},
    {
        "prompt": "prompt question query instruction input user request problem q",
        "chosen": "chosen preferred accepted better winner",
        "rejected": "rejected dispreferred refused worse loser",
    },
)
"""Names that columns have elsewhere, by the keys that they stand for."""


def _suggested_columns(record: Mapping[str, Any], preferences: bool) -> dict[str, str]:
    """Return columns of a row by the keys that they seem to stand for; none, unless they make a kind."""
    by_name = {str(key).lower(): str(key) for key in record}
    for names in (names for names in _USUAL_NAMES if ("chosen" in names) == preferences):
        found = {key: [by_name[name] for name in known.split() if name in by_name] for key, known in names.items()}
        if all(found.values()):
            return {key: columns[0] for key, columns in found.items()}
    return {}


def _required_text(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not (isinstance(value, str) and value):
        raise ValueError(f"{key}={short_repr(value)} must be a text that is not empty")
    return value


def _parsed(record: Mapping[str, Any], key: str, wanted: str = "a list") -> Any:
    """Return a value that may be JSON text, as in cells of tables; an empty one is None."""
    value = record.get(key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise ValueError(f"{key}={short_repr(value)} must be {wanted}, or its JSON text") from None


def _convert_text(record: Mapping[str, Any], options: RowOptions) -> PlainText:
    return PlainText(_required_text(record, "text"))


def _convert_messages(record: Mapping[str, Any], options: RowOptions) -> Conversation:
    return Conversation(_checked_messages("messages", _parsed(record, "messages")), _tools(record))


def _convert_preference(record: Mapping[str, Any], options: RowOptions) -> Preference:
    preference = Preference(*(_convert_completion(record, options, key) for key in ("chosen", "rejected")))
    if preference.chosen == preference.rejected:
        raise ValueError(f"chosen and rejected are one answer, {short_repr(record['chosen'])}: correct one of them")
    return preference


def _convert_completion(
    record: Mapping[str, Any], options: RowOptions, answer_key: str = "completion"
) -> Completion | Conversation:
    parts = {key: _messages_in_text_or_value(record[key]) for key in ("prompt", answer_key)}
    if not any(isinstance(part, list) for part in parts.values()):
        texts = [_required_text(record, key) for key in parts]
        if not options.prompts_as_chat:
            return Completion(*texts)
        for key, text in zip(parts, texts, strict=True):
            held = next((token for token in sorted(options.reserved) if token in text), None)
            if held is not None:
                raise ValueError(
                    f"{key} holds {short_repr(held)}, which the chat template writes itself: take it out, or train "
                    "texts as they are with --chat-template none"
                )
    prompt, completion = (
        _checked_messages(key, part) if isinstance(part, list) else _text_message(record, key, role)
        for (key, part), role in zip(parts.items(), ("user", "assistant"), strict=True)
    )
    # Some data sets repeat the prompt before each answer
    answer = completion[len(prompt) :] if completion[: len(prompt)] == prompt else completion
    return Conversation([*prompt, *answer], _tools(record), len(prompt))


def _messages_in_text_or_value(value: Any) -> Any:
    """Return messages that a cell of a table holds as JSON; any other value as it is."""
    try:
        parsed = json.loads(value) if isinstance(value, str) and value.startswith("[{") else None
    except (ValueError, RecursionError):
        return value
    is_messages = parsed and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in parsed)
    return parsed if is_messages else value


def _text_message(record: Mapping[str, Any], key: str, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": _required_text(record, key)}]


def _convert_alpaca(record: Mapping[str, Any], options: RowOptions) -> Conversation:
    system, more = (record.get(key) or "" for key in ("system", "input"))
    for key, value in (("system", system), ("input", more)):
        if not isinstance(value, str):
            raise ValueError(f"{key}={short_repr(value)} must be a text")
    history = _parsed(record, "history") or []
    if not (isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)):
        raise ValueError(f"history={short_repr(history)} must be a list of pairs, an instruction and its output")
    turns = [*history, [_required_text(record, "instruction") + (f"\n{more}" if more else ""), record["output"]]]
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        for role, key, text in zip(("user", "assistant"), ("instruction", "output"), turn, strict=True):
            messages.append({"role": role, "content": _required_text({key: text}, key)})
    return Conversation(messages)


_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool"), "tool"),
}
"""The role of a message by the name in ``from``."""


def _convert_sharegpt(record: Mapping[str, Any], options: RowOptions) -> Conversation:
    turns = _parsed(record, "conversations")
    if not (isinstance(turns, list) and turns):
        raise ValueError(f"conversations={short_repr(turns)} must be a list of from and value")
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return Conversation(_checked_messages("conversations", turns), _tools(record))
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"system={short_repr(system)} must be a text")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise ValueError(f"{short_repr(turn)} is no message: it needs from and value, both texts")
        role = _SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise ValueError(f"from={short_repr(turn['from'])} must be one of {', '.join(_SHAREGPT_ROLES)}")
        if turn["from"] == "function_call":
            calls = _parsed(turn, "value", "a call")
            messages.append(
                {"role": role, "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
            )
        else:
            messages.append({"role": role, "content": turn["value"]})
    return Conversation(_checked_messages("conversations", messages), _tools(record))


def _checked_messages(key: str, messages: Any) -> list[dict[str, Any]]:
    if not (isinstance(messages, list) and messages):
        raise ValueError(f"{key}={short_repr(messages)} must be a list of messages")
    checked = []
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        has_text = isinstance(content, str) or (content is None and bool(calls))
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and has_text):
            raise ValueError(f"{short_repr(message)} is no message: it needs role and content, both texts")
        message = {**message, "content": content}
        message.pop("tool_calls", None)
        if calls:
            if not (isinstance(calls, list) and message["role"] == "assistant"):
                raise ValueError(f"tool_calls={short_repr(calls)} must be a list, of a message of the assistant")
            message["tool_calls"] = [_checked_tool_call(call) for call in calls]
        checked.append(message)
    return checked


def _checked_tool_call(call: Any) -> dict[str, Any]:
    """Return a call as OpenAI's API has it, with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
        raise ValueError(f"{short_repr(call)} is no call of a tool: it needs function with name and arguments")
    arguments = _parsed(function, "arguments", "a JSON object")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments={short_repr(arguments)} must be a JSON object, or its JSON text")
    ids = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the definitions of tools of a row, as OpenAI's API has them."""
    tools = _parsed(record, "tools")
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools={short_repr(tools)} must be a list of definitions of functions")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in wrapped:
        if not (isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str)):
            raise ValueError(f"{short_repr(tool)} is no definition of a tool: it needs function with a name")
    return wrapped


def _check_conversation(conversation: Conversation) -> None:
    learned = conversation.messages[conversation.prompt_messages :]
    if not any(message["role"] == "assistant" for message in learned):
        raise ValueError('it has no message whose role is "assistant", and so nothing to learn')


PREFERENCES = "preferences"
PROMPTS = "prompt and completion"
_DPO_ROWS = "--method dpo takes prompt, chosen and rejected"

KINDS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], RowOptions], Any]]] = {
    "text": (("text",), _convert_text),
    "messages": (("messages",), _convert_messages),
    PROMPTS: (("prompt", "completion"), _convert_completion),
    "Alpaca": (("instruction", "output"), _convert_alpaca),
    "ShareGPT": (("conversations",), _convert_sharegpt),
    PREFERENCES: (("prompt", "chosen", "rejected"), _convert_preference),
}
"""The kinds of rows: the keys by which each is recognized, and what converts it."""

_OPTIONAL = ("tools", "system", "input", "history")

COLUMNS = (*dict.fromkeys(key for keys, _ in KINDS.values() for key in keys), *_OPTIONAL)
"""The keys that --columns may name."""
