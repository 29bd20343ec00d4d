"""Chat templates as Ollama has them, in Go's ``text/template``, derived from what a Jinja template renders.

A conversation is rendered with contents that nothing else writes. The texts between the contents are the template.
``OllamaTemplate.render`` returns what Go makes of them, and is compared with the Jinja template's text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem.errors import short_repr
from lowmem.integrations.transformers.chat_template import ChatTemplate, Messages, Tools

FAMILIES = {
    "<|im_end|><|im_start|>user": "ChatML",
    "<|eot_id|><|start_header_id|>user<|end_header_id|>": "Llama 3",
    "</s>[INST]": "Mistral",
    "<end_of_turn><start_of_turn>user": "Gemma",
    "<|end|><|user|>": "Phi",
    "<|im_end|><|im_start|>user<|im_sep|>": "Phi",
}
"""Names of templates by what they write between an answer and the next question, without spaces."""

_REMEDY = "export it --for llama.cpp, which reads Jinja, or train with one of these templates (--chat-template FILE)"
_END = "end"
_ARGUMENTS = {"lowmemkey": "lowmemvalue"}


def function_tool(name: str) -> dict[str, Any]:
    """Return the definition of a tool with a text as its argument."""
    parameters = {"type": "object", "properties": {"lowmemkey": {"type": "string"}}, "required": ["lowmemkey"]}
    return {"type": "function", "function": {"name": name, "description": "A tool", "parameters": parameters}}


def tool_call_message(*names: str, content: str = "") -> dict[str, Any]:
    """Return a message of the assistant that calls tools."""
    calls = [{"type": "function", "function": {"name": name, "arguments": _ARGUMENTS}} for name in names]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@dataclass(frozen=True)
class ToolTexts:
    """What a template writes around tools.

    Args:
        around_system: the texts before the system message, and between it and the first definition.
        without_system: the text before the first definition where there is no system message.
        between_definitions, after_definitions: the latter is before the first question.
        call: the texts before a call's name, between name and arguments, and behind them.
        before_next_call: the text between two calls, and between an answer and its first call.
    """

    around_system: tuple[str, str]
    without_system: str
    between_definitions: str
    after_definitions: str
    call: tuple[str, str, str]
    before_next_call: str


@dataclass(frozen=True)
class OllamaTemplate:
    """What a template of turns writes around contents.

    Args:
        family: the name in ``FAMILIES``.
        before_first: the text before the first question where there is no system message.
        around_system: the texts around the system message; None: the template takes none.
        is_system_last: whether the system message is before the last question, and not before the first one.
        between: the text by the roles of the two messages; "end" is the end of the prompt.
        tools: None: the template has no tools in a form that Go writes.
    """

    family: str
    before_first: str
    around_system: tuple[str, str] | None
    is_system_last: bool
    between: Mapping[tuple[str, str], str]
    tools: ToolTexts | None = None

    def render(self, messages: Messages, tools: Tools | None = None) -> str:
        """Return what Ollama makes of messages; Go has another form of the JSON of tools."""
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        turns = [message for message in messages if message["role"] != "system"]
        last_question = max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=0)
        text, role = self._rendered_head(system, tools or ()), ""
        for index, turn in enumerate(turns):
            text += self.between.get((role, turn["role"]), "")
            if self.is_system_last and self.around_system and system and index == last_question:
                text += system + self.around_system[1]
            text += (turn["content"] or "") + self._rendered_calls(turn)
            role = turn["role"]
        return text + self.between.get((role, _END), "")

    def _rendered_head(self, system: str, tools: Tools) -> str:
        if tools and self.tools is not None:
            first, second = self.tools.around_system
            head = first + system + second if system else self.tools.without_system
            return head + self.tools.between_definitions.join(map(_json, tools)) + self.tools.after_definitions
        if system and self.around_system and not self.is_system_last:
            return self.around_system[0] + system + self.around_system[1]
        return self.before_first

    def _rendered_calls(self, turn: Mapping[str, Any]) -> str:
        text, separator = "", ""
        if self.tools is not None:
            start, middle, end = self.tools.call
            separator = self.tools.before_next_call if turn["content"] else ""
            for call in turn.get("tool_calls") or ():
                function = call["function"]
                text += separator + start + function["name"] + middle + _json(function["arguments"]) + end
                separator = self.tools.before_next_call
        return text

    def go_text(self, bos: str = "") -> str:
        """Return the template for Go.

        Args:
            bos: the token with which Ollama begins each prompt by itself; the template's own is left out.

        Raises:
            ValueError: Go would take a text of the template for an action.
        """
        for text in self._texts():
            if "{{" in text or text.endswith("{"):
                raise ValueError(
                    f"the chat template writes {short_repr(text)}, in which Go's templates find an action: export it "
                    "--for llama.cpp"
                )
        contents = {"user": "{{ .Content }}", "assistant": "{{ .Content }}" + self._go_calls()}
        if self.is_system_last and self.around_system:
            system = "{{ $.System }}" + self.around_system[1]
            contents["user"] = _go_if("and $.System (eq $i $question)", system) + contents["user"]
        if self.tools is not None:
            contents["tool"] = "{{ .Content }}"
        turns = "".join(
            _go_if(f'eq .Role "{role}"', self._go_between(role) + content + f'{{{{ $role = "{role}" }}}}')
            for role, content in contents.items()
        )
        question = _go_range("$i, $message := .Messages", _go_if('eq .Role "user"', "{{ $question = $i }}"))
        return "".join(
            [
                '{{ $role := "" }}',
                *(["{{ $question := 0 }}", question] if self.is_system_last else []),
                self._go_head(bos),
                _go_range("$i, $message := .Messages", turns),
                self._go_between(_END),
            ]
        )

    def _texts(self) -> list[str]:
        tools = self.tools
        texts = [self.before_first, *(self.around_system or ()), *self.between.values()]
        if tools is not None:
            texts += [*tools.around_system, tools.without_system, tools.between_definitions, tools.after_definitions]
            texts += [*tools.call[:2], tools.before_next_call]
        return texts

    def _go_between(self, role: str) -> str:
        """Return the text between any role and this one."""
        pairs = [(before, text) for (before, after), text in self.between.items() if after == role]
        return "".join(_go_if(f'eq $role "{before}"', text) for before, text in pairs)

    def _go_head(self, bos: str) -> str:
        first = self.before_first.removeprefix(bos)
        if self.around_system and not self.is_system_last:
            before, after = self.around_system
            first = _go_if(".System", f"{before.removeprefix(bos)}{{{{ .System }}}}{after}", first)
        if self.tools is None:
            return first
        before, after = self.tools.around_system
        system = f"{before.removeprefix(bos)}{{{{ .System }}}}{after}"
        definition = _go_if("$i", self.tools.between_definitions) + "{{ $tool }}"
        defined = _go_range("$i, $tool := .Tools", definition) + self.tools.after_definitions
        head = _go_if(".System", system, self.tools.without_system.removeprefix(bos))
        return _go_if(".Tools", head + defined, first)

    def _go_calls(self) -> str:
        """Return the calls of a message. Ollama finds calls in answers by the first text within ``if .ToolCalls``."""
        if self.tools is None:
            return ""
        start, middle, end = self.tools.call
        separator = f"{{{{ $separator = {json.dumps(self.tools.before_next_call)} }}}}"
        call = f"{start}{{{{ .Function.Name }}}}{middle}{{{{ .Function.Arguments }}}}{end}"
        calls = _go_range(".ToolCalls", "{{ $separator }}" + call + separator)
        return _go_if(".ToolCalls", '{{ $separator := "" }}' + "{{ if .Content }}" + separator + "{{ end }}" + calls)


def derive_ollama_template(template: ChatTemplate) -> OllamaTemplate:
    """Return a chat template for Ollama, by what it renders.

    Raises:
        ValueError: there is no template, or it is none of ``FAMILIES``.
    """
    questions = [_message("user", 1), _message("assistant", 1), _message("user", 2)]
    text = template.text(questions, add_generation_prompt=True)
    first, to_answer, to_question, end = _texts_between(text, [message["content"] for message in questions])
    family = FAMILIES.get("".join(to_question.split()))
    if family is None:
        names = ", ".join(dict.fromkeys(FAMILIES.values()))
        raise ValueError(
            f"the chat template writes {short_repr(to_question)} between an answer and the next question, as none of "
            f"{names} does, and Ollama's templates are not Jinja: {_REMEDY}"
        )
    around_system, is_system_last = _system_texts(template, questions)
    between = {("user", "assistant"): to_answer, ("assistant", "user"): to_question, ("user", _END): end}
    derived = OllamaTemplate(family, first, around_system, is_system_last, between)
    return derived if around_system is None or is_system_last else _with_tools(derived, template)


def _system_texts(template: ChatTemplate, questions: Messages) -> tuple[tuple[str, str] | None, bool]:
    """Return the texts around a system message, and whether it is before the last question."""
    system = _message("system", 1)
    try:
        text = template.text([system, *questions], add_generation_prompt=True)
    except ValueError:
        # Gemma's first templates refuse it
        return None, False
    contents = [message["content"] for message in (system, *questions)]
    if contents[0] not in text:
        return None, False
    if text.index(contents[0]) > text.index(contents[2]):
        return ("", _texts_between(text, [*contents[1:3], contents[0], contents[3]])[3]), True
    before, after, *_ = _texts_between(text, contents)
    return (before, after), False


def _with_tools(derived: OllamaTemplate, template: ChatTemplate) -> OllamaTemplate:
    """Return a template with tools, or as it was where Go cannot write what it makes of them."""
    tools = [function_tool("lowmemfirst"), function_tool("lowmemsecond")]
    names = [tool["function"]["name"] for tool in tools]
    result, other_result, last_result = (_message("tool", number) for number in (1, 2, 3))
    system, question, answer = _message("system", 1), _message("user", 1), _message("assistant", 1)
    called = [system, question, tool_call_message(*names), result, other_result]
    again = [tool_call_message(names[0], content=answer["content"]), last_result, _message("user", 2)]
    definitions, arguments = [*map(_json, tools)], _json(_ARGUMENTS)
    calls = [names[0], arguments, names[1], arguments]
    contents = [system["content"], *definitions, question["content"], *calls]
    contents += [result["content"], other_result["content"]]
    more = [answer["content"], names[0], arguments, last_result["content"], "lowmemuser2"]
    try:
        short = _texts_between(template.text(called, tools, add_generation_prompt=True), contents)
        long = _texts_between(template.text([*called, *again], tools, add_generation_prompt=True), contents + more)
        alone = _texts_between(template.text([question], tools), [*definitions, question["content"]])
    except ValueError:
        return derived
    start = short[4].removeprefix(derived.between["user", "assistant"])
    before_next_call = long[11].removesuffix(start)
    end = short[6].removesuffix(start).removesuffix(before_next_call)
    between = {
        **derived.between,
        ("assistant", "tool"): short[8].removeprefix(end),
        ("tool", "tool"): short[9],
        ("tool", "assistant"): long[10],
        ("tool", "user"): long[14],
        ("tool", _END): short[10],
    }
    texts = ToolTexts((short[0], short[1]), alone[0], short[2], short[3], (start, short[5], end), before_next_call)
    made = replace(derived, between=between, tools=texts)
    text = template.text([*called, *again], tools, add_generation_prompt=True)
    fits = made.render([*called, *again], tools) == text
    return made if fits else derived


def _message(role: str, number: int) -> dict[str, Any]:
    return {"role": role, "content": f"lowmem{role}{number}"}


def _texts_between(text: str, contents: Sequence[str]) -> list[str]:
    """Return the texts before, between and behind contents; a ValueError unless all are there, in this order."""
    texts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found:
            raise ValueError(f"the chat template does not write {short_repr(content)} in its place: {_REMEDY}")
        texts.append(before)
    return [*texts, text]


def _json(value: Any) -> str:
    """Return JSON as templates of transformers write it."""
    return json.dumps(value, ensure_ascii=False)


def _go_if(condition: str, text: str, other: str = "") -> str:
    return f"{{{{ if {condition} }}}}{text}" + (f"{{{{ else }}}}{other}" if other else "") + "{{ end }}"


def _go_range(variables: str, text: str) -> str:
    return f"{{{{ range {variables} }}}}{text}{{{{ end }}}}"
