"""Whether a GGUF file makes the same tokens of prompts as the tokenizer and chat template of the training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowmem.errors import file_error, short_repr
from lowmem.integrations.transformers.chat_template import ChatTemplate
from lowmem.integrations.transformers.ollama_template import OllamaTemplate, function_tool, tool_call_message
from lowmem.integrations.transformers.text_tokenizer import read_tokenizer
from lowmem.io.filesystem import open_regular_file
from lowmem.io.formats.gguf.gguf_file import read_gguf_header

_TEXTS = (
    "What is 3 and 3?",
    'def f(x):\n    return {"a": [x**2, 10_000]}  # 12345',
    "Ça va? Größe, 東京, привет 👋🏽",
    "a  b\n\n\nc\td, don't",
    "6",
)
_ROLES = ("user", "assistant") * 2


class Prompt(NamedTuple):
    """A prompt that is compared, under a name for errors.

    Args:
        name: says which.
        messages: of a conversation; a text where there is no chat template.
        tools: None: none.
    """

    name: str
    messages: Sequence[Mapping[str, Any]] | str
    tools: Sequence[Mapping[str, Any]] | None = None


def compared_prompts(template: ChatTemplate | None, system: str | None) -> list[Prompt]:
    """Return five conversations that a template takes, or texts where there is none.

    ``system``: the system message of the training, with which all conversations begin.
    """
    if template is None:
        return [Prompt(f"the text {short_repr(text)}", text) for text in _TEXTS]
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": role, "content": text} for role, text in zip(_ROLES, _TEXTS, strict=False)]
    prompts = [
        Prompt("the conversation of one question", [*first, turns[0]]),
        Prompt("the conversation of two turns", [*first, *turns[:3]]),
        Prompt("the conversation of code", [*first, {"role": "user", "content": _TEXTS[1]}]),
        Prompt("the conversation of empty lines", [*first, *turns, {"role": "user", "content": _TEXTS[3]}]),
        Prompt("the conversation with a system message", [{"role": "system", "content": "Be brief."}, turns[2]]),
    ]
    if not _is_rendered(template, prompts[-1]):
        prompts[-1] = Prompt("the conversation of many scripts", [*first, turns[2]])
    tools = [function_tool("look_up")]
    called = [*first, turns[0], tool_call_message("look_up"), {"role": "tool", "content": _TEXTS[4]}]
    try:
        messages = template.messages_with_calls_as_written(called, tools)
    except ValueError:
        return prompts
    with_tools = Prompt("the conversation with tools", messages, tools)
    return [*prompts[:3], prompts[4], with_tools] if _is_rendered(template, with_tools) else prompts


def _is_rendered(template: ChatTemplate, prompt: Prompt) -> bool:
    """Whether a template takes a conversation's messages and tools, and writes all of them."""
    assert not isinstance(prompt.messages, str)
    try:
        text = template.text(prompt.messages, prompt.tools)
    except ValueError:
        return False
    return prompt.messages[0]["content"] in text and not (prompt.tools and text == template.text(prompt.messages))


class ExportedTokenizer:
    """The tokenizer of a GGUF file, with which llama.cpp and Ollama begin each prompt.

    Args:
        file: the GGUF file.
        chat_template: a template in place of the file's.

    Attributes:
        beginning: the text of the token that programs put before each prompt; empty: none.

    Raises:
        FileError, ImportError: as ``read_tokenizer``.
    """

    def __init__(self, file: Path, chat_template: str | None = None) -> None:
        self._file, self._tokenizer = file, read_tokenizer(file)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        with open_regular_file(file) as opened:
            metadata = read_gguf_header(file, opened).metadata
        is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
        adds_first = metadata.get("tokenizer.ggml.add_bos_token", is_sentencepiece)
        adds_last = metadata.get("tokenizer.ggml.add_eos_token", False)
        self.beginning: str = self._tokenizer.bos_token if adds_first else ""
        self._last = [self._tokenizer.eos_token_id] if adds_last else []

    def check_prompts(self, prompts: Sequence[Prompt], tokenizer: Any, template_kwargs: Mapping[str, Any]) -> None:
        """Raise a FileError for the first prompt of which ``tokenizer`` makes other tokens."""
        template, exported_template = (ChatTemplate(each, template_kwargs) for each in (tokenizer, self._tokenizer))
        for prompt in prompts:
            if isinstance(prompt.messages, str):
                text, expected = prompt.messages, tokenizer(prompt.messages)["input_ids"]
            else:
                wanted = template.text(prompt.messages, prompt.tools, add_generation_prompt=True)
                text = exported_template.text(prompt.messages, prompt.tools, add_generation_prompt=True)
                expected = tokenizer(wanted, add_special_tokens=False)["input_ids"]
            found = self._tokens(text)
            if found != expected:
                raise file_error(self._file, f"{self._difference(expected, found)} in {prompt.name}", "export")

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt as llama.cpp makes them: one beginning, also where the text has it."""
        ids = self._tokenizer(text.removeprefix(self.beginning), add_special_tokens=False)["input_ids"]
        first = [self._tokenizer.bos_token_id] if self.beginning else []
        return [*first, *ids, *self._last]

    def _difference(self, expected: Sequence[int], found: Sequence[int]) -> str:
        if self.beginning and found[1:] == expected:
            return (
                f"programs begin prompts with {short_repr(self.beginning)}, and the training did not: set its "
                "tokenizer.ggml.add_bos_token to false,"
            )
        pairs = enumerate(zip(expected, found, strict=False))
        first = next((index for index, (a, b) in pairs if a != b), min(len(expected), len(found)))
        there, here = (list(ids[first : first + 4]) for ids in (expected, found))
        return (
            f"its tokenizer makes {here} of what is {there} for the tokenizer of the training, after {first} tokens: "
            "take the tokenizer of a GGUF file of the model with --like,"
        )


def check_ollama_prompts(derived: OllamaTemplate, prompts: Sequence[Prompt], template: ChatTemplate) -> None:
    """Raise a ValueError for the first conversation of which a template for Ollama makes another text."""
    for prompt in prompts:
        assert not isinstance(prompt.messages, str)
        if prompt.tools and derived.tools is None:
            continue
        wanted = template.text(prompt.messages, prompt.tools, add_generation_prompt=True)
        if derived.render(prompt.messages, prompt.tools) != wanted:
            raise ValueError(
                f"Go's templates do not write {prompt.name} as the chat template does: export it --for llama.cpp"
            )


def leave_out_untrained_beginning(folder: Path, tokenizer: Any, template: ChatTemplate, prompt: Prompt) -> None:
    """Let the tokenizer.json of a folder begin no text with a token that the chat template does not write.

    Conversations train with what the template writes, and programs do as the GGUF file says.
    """
    path, bos = folder / "tokenizer.json", tokenizer.bos_token_id
    assert not isinstance(prompt.messages, str)
    text = template.text(prompt.messages, prompt.tools, add_generation_prompt=True)
    trained_ids, ids = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    if path.is_file() and ids == [bos, *trained_ids] and trained_ids[:1] != [bos]:
        content = json.loads(path.read_text(encoding="utf8")) | {"post_processor": None}
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf8")
