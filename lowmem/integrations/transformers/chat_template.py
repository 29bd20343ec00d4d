"""Conversations in a tokenizer's chat template: their text, and the parts of it that the model learns to write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from itertools import product
from typing import Any

from lowmem.errors import error_type_and_first_line, short_repr

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

_NAME, _KEY, _VALUE = "lowmem_name", "lowmem_key", "lowmem_value"
"""Function, argument and value of the calls that show what a template writes of a call."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""The roles of OpenAI's API: most templates name few, and write any other one as it is given."""


class ChatTemplate:
    """The chat template of a tokenizer of transformers.

    Args:
        tokenizer: as ``AutoTokenizer.from_pretrained`` returns it.
        template_kwargs: variables of the template, as ``enable_thinking``.

    Raises:
        ValueError: a variable is an argument of ``apply_chat_template``.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._template_kwargs = tokenizer, dict(template_kwargs or {})
        for name in self._template_kwargs:
            if name in signature(tokenizer.apply_chat_template).parameters:
                raise ValueError(f"template_kwargs has {short_repr(name)}, which no template reads: leave it out")

    def text(self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = False) -> str:
        """Return what the template makes of messages; ``add_generation_prompt``: with the start of an answer.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template for messages: name one with --chat-template FILE, or give prompt "
                "and completion, or text"
            )
        try:
            made: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template_kwargs,
            )
        except Exception as reason:
            # Templates are programs, which raise anything
            raise ValueError(
                f"the tokenizer's chat template refuses the messages: {error_type_and_first_line(reason)}"
            ) from reason
        return made

    def pieces(self, messages: Messages, tools: Tools | None = None) -> list[tuple[str, bool]]:
        """Return the pieces of a conversation's text in their order, and whether the assistant writes them.

        A message of the assistant begins where the template's prompt for it ends, and its last token ends its turn.

        Raises:
            ValueError: the template refuses the messages, leaves tools or their calls out, or writes a message of
                the assistant in another form, or a role is unknown.
        """
        self._check_roles(messages)
        messages = self.messages_with_calls_as_written(messages, tools)
        text = self.text(messages, tools)
        if tools and text == self.text(messages):
            raise ValueError(
                "the tokenizer's chat template leaves the definitions of tools out: name one that writes them with "
                "--chat-template FILE, or remove tools"
            )
        pieces: list[tuple[str, bool]] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start, stop = self._answer_span(text, messages, tools, index)
                if not (done <= start < stop and _is_answer_in_span(message, text[start:stop])):
                    raise ValueError(
                        f"message {index + 1} cannot be found in what the tokenizer's chat template makes of the "
                        "messages: give prompt and completion"
                    )
                pieces += [(text[done:start], False), (text[start:stop], True)]
                done = stop
        return [(piece, learned) for piece, learned in [*pieces, (text[done:], False)] if piece]

    def _check_roles(self, messages: Messages) -> None:
        template = str(getattr(self._tokenizer, "chat_template", None))
        for role in {message["role"]: None for message in messages}:
            # A misspelled "assistant" would be a part of the prompt, of which nothing is learned
            if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
                raise ValueError(
                    f"role={short_repr(role)} must be one of {', '.join(ROLES)}, or one that the chat template names"
                )

    def messages_with_calls_as_written(self, messages: Messages, tools: Tools | None) -> Messages:
        """Return messages with calls of tools in the first form that the template writes whole.

        Templates want arguments as an object or as JSON text, and some an id of nine characters. Some write something
        else, or no call, of what they do not want.
        """
        if not any(message.get("tool_calls") for message in messages):
            return [{**message, "content": message.get("content") or ""} for message in messages]
        refusals: list[ValueError] = []
        for form in (forms := [*product((False, True), repeat=2)]):
            try:
                if _has_calls(self.text(_in_form(_with_known_calls(messages), *form), tools)):
                    return _in_form(messages, *form)
            except ValueError as error:
                refusals.append(error)
        if len(refusals) == len(forms):
            raise refusals[0]
        remedy = "name one that does with --chat-template FILE"
        raise ValueError(f"the tokenizer's chat template does not write tool_calls: {remedy}")

    def _answer_span(self, text: str, messages: Messages, tools: Tools | None, index: int) -> tuple[int, int]:
        """Return where message ``index`` begins and ends in the text of all."""
        prompt = self.text(messages[:index], tools, add_generation_prompt=True) if index else ""
        has_prompt, is_last = bool(index) and text.startswith(prompt), index == len(messages) - 1
        whole = text if is_last else self.text(messages[: index + 1], tools)
        if has_prompt and text.startswith(whole):
            return len(prompt), len(whole)
        # A template may write an answer otherwise when another message follows. What differs with another answer is
        # the answer; its start and end are what the text of all shares with the text in which it is the last message
        others = _with_other_answer(messages, index)
        other_text = self.text(others, tools)
        other_whole = other_text if is_last else self.text(others[: index + 1], tools)
        start, stop = _common_start_length(text, other_text), len(text) - _common_end_length(text, other_text)
        if has_prompt:
            start = len(prompt)
        elif index and whole.startswith(prompt):
            lead = whole[len(prompt) : _common_start_length(whole, other_whole)]
            shared = lead[len(lead) - _common_end_length(lead, text[:start]) :]
            start -= len(shared if shared == lead else shared.lstrip())
        elif messages[index].get("tool_calls"):
            # What a template writes before the name of a function is the answer's, too
            content = f"A{messages[index]['content']}"
            changed = [*messages[:index], {**messages[index], "content": content}, *messages[index + 1 :]]
            start = min(start, _common_start_length(text, self.text(changed, tools)))
        ending = whole[len(whole) - _common_end_length(whole, other_whole) :]
        return start, stop + self._common_units_length(ending, text[stop:])

    def _common_units_length(self, first: str, second: str) -> int:
        """Return how many characters two texts share from their start, without a part of a special token."""
        tokens = sorted((re.escape(token) for token in self._tokenizer.get_added_vocab()), key=len, reverse=True)
        units = re.compile("|".join([*tokens, "."]), re.DOTALL)
        length = 0
        for left, right in zip(units.finditer(first), units.finditer(second), strict=False):
            if left[0] != right[0]:
                break
            length = left.end()
        return length


def _is_answer_in_span(message: Mapping[str, Any], span: str) -> bool:
    """Whether a span holds what a message says, without reasoning, which templates leave out of earlier answers."""
    return message["content"].rpartition("</think>")[2].strip() in span if message.get("content") else True


def _in_form(messages: Messages, has_ids: bool, has_text_arguments: bool) -> Messages:
    """Return messages whose calls have ids of nine characters or as given, and arguments as JSON text or objects."""
    ids: Iterator[str] = iter([])
    made: list[dict[str, Any]] = []
    for message in messages:
        message = {**message, "content": message.get("content") or ""}
        if message.get("tool_calls"):
            new_ids = [f"call{len(made) % 1000:03}{number % 100:02}" for number in range(len(message["tool_calls"]))]
            message["tool_calls"] = [
                {**call, **({"id": new_id} if has_ids else {}), "function": _with_arguments(call, has_text_arguments)}
                for call, new_id in zip(message["tool_calls"], new_ids, strict=True)
            ]
            ids = iter(new_ids if has_ids else [])
        elif message["role"] == "tool" and (identifier := next(ids, None)) is not None:
            message["tool_call_id"] = identifier
        made.append(message)
    return made


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False) if as_text else arguments}


def _with_known_calls(messages: Messages) -> Messages:
    """Return messages that call a function of which no other text speaks."""
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    return [
        {**message, "tool_calls": [{**call, "function": function} for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _has_calls(text: str) -> bool:
    """Whether a text has the call of ``_with_known_calls``, with its arguments neither in quotes nor as Python's."""
    is_whole = _NAME in text and _KEY in text and _VALUE in text
    return is_whole and f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text


def _with_other_answer(messages: Messages, index: int) -> Messages:
    """Return messages of which one says something else, from its first to its last character."""
    message = dict(messages[index])
    content = (message["content"] or "").strip()
    if content:
        first, last = (next(letter for letter in "ABC" if letter not in end) for end in (content[:1], content[-1:]))
        message["content"] = f"{first} {last}"
    (changed,) = _with_known_calls([message])
    return [*messages[:index], changed, *messages[index + 1 :]]


def _common_start_length(first: str, second: str) -> int:
    differing = (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(first), len(second)))


def _common_end_length(first: str, second: str) -> int:
    return _common_start_length(first[::-1], second[::-1])
