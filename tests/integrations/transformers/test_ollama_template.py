"""Chat templates for Ollama: Go writes with them what Jinja writes with the templates of transformers."""

import json
import re
from pathlib import Path

import pytest

from lowmem.integrations.transformers.chat_template import ChatTemplate
from lowmem.integrations.transformers.exported_prompts import check_ollama_prompts, compared_prompts
from lowmem.integrations.transformers.ollama_template import (
    FAMILIES,
    derive_ollama_template,
    function_tool,
    tool_call_message,
)
from lowmem.io.formats.gguf.ollama_modelfile import modelfile_text
from tests.integrations.transformers.ollama import ollama_commands_and_prompts
from tests.integrations.transformers.test_chat_template import KWARGS, TALK, family, trl_template

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
MISTRAL_V1 = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}{{ ' [INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    **{name: (name, kind) for name, kind in [("llama3", "Llama 3"), ("llama3_2", "Llama 3"), ("qwen2_5", "ChatML")]},
    **{name: (name, kind) for name, kind in [("qwen3", "ChatML"), ("gemma3", "Gemma"), ("mistral", "Mistral")]},
    **{"phi3": ("phi3", "Phi"), "phi3_5": ("phi3", "Phi"), "gemma": ("gemma3", "Gemma")},
    **{"smollm2": ("qwen2_5", "ChatML"), "phi4": ("phi3", "Phi"), "mistral v1": ("mistral", "Mistral")},
    "qwen3_instruct_2507": ("qwen3", "ChatML"),
}
"""The family of tokenizers of each template, and the name that it has for Ollama."""
TEXTS = {"smollm2": SMOLLM2, "phi4": PHI4, "mistral v1": MISTRAL_V1}

CALLED = [TALK[1], tool_call_message("look_up", "add"), *({"role": "tool", "content": text} for text in ("3", "{4}"))]
MORE = [tool_call_message("add", content="Wait."), {"role": "tool", "content": "5"}, *TALK[2:4]]


def chat_template(name, template_kwargs=None):
    """Return a template, and the beginning of its texts."""
    tokenizer = family(TEMPLATES[name][0])
    if name in TEXTS or name not in ("mistral", TEMPLATES[name][0]):
        tokenizer.chat_template = TEXTS.get(name) or trl_template(name)
    return ChatTemplate(tokenizer, {**KWARGS.get(name, {}), **(template_kwargs or {})}), tokenizer.bos_token


def go_prompts(derived, conversations, bos="", system=None):
    """Return what Go makes of conversations with a template."""
    text = modelfile_text(Path("a.gguf"), None, derived.go_text(bos), system, [])
    given = [{"messages": messages, "tools": tools} for messages, tools in conversations]
    return ollama_commands_and_prompts(text, given)[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_writes_what_jinja_writes(name):
    template, bos = chat_template(name)
    derived = derive_ollama_template(template)
    assert derived.family == TEMPLATES[name][1]
    prompts = [prompt for prompt in compared_prompts(template, None) if not prompt.tools]
    conversations = [(list(prompt.messages), None) for prompt in prompts]
    assert len(conversations) >= 4
    if derived.around_system:
        conversations += [(TALK[:2], None), (TALK[:4], None)]
    wanted = [template.text(messages, add_generation_prompt=True) for messages, _ in conversations]
    assert go_prompts(derived, conversations) == wanted
    assert [derived.render(messages) for messages, _ in conversations] == wanted
    # Where Ollama begins a prompt itself, the template does not
    assert go_prompts(derived, conversations, bos) == [text.removeprefix(bos) for text in wanted]


@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "gemma3", "mistral"])
def test_a_system_message_of_the_modelfile_is_that_of_conversations_without_one(name):
    template, _ = chat_template(name)
    system = 'Be brief, say "why".\n\n  Cite\tsources: <a> & {b}\n'.rstrip()
    conversations = [(TALK[1:2], None), (TALK[1:4], None), (TALK[:4], None)]
    wanted = [
        template.text(
            messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages],
            add_generation_prompt=True,
        )
        for messages, _ in conversations
    ]
    assert go_prompts(derive_ollama_template(template), conversations, system=system) == wanted


def with_same_json(text):
    """Return a text whose definitions of tools and arguments are in one form of JSON: Go has its own."""
    return re.sub(
        r'(?m)^\{"(?:type": ?"function|name": ?")[^<\n]*\}$',
        lambda found: json.dumps(json.loads(found[0]), sort_keys=True),
        text,
    )


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_go_writes_tools_and_their_calls(name):
    template, _ = chat_template(name)
    tools = [function_tool("look_up"), function_tool("add")]
    conversations = [
        (messages, tools)
        for messages in (TALK[:2], TALK[1:2], CALLED, [TALK[0], *CALLED, *MORE], [*CALLED, TALK[3]], TALK[:4])
    ]
    wanted = [template.text(messages, tools, add_generation_prompt=True) for messages, _ in conversations]
    derived = derive_ollama_template(template)
    assert [derived.render(messages, tools) for messages, _ in conversations] == wanted
    made = go_prompts(derived, conversations)
    assert made != wanted
    assert [*map(with_same_json, made)] == [*map(with_same_json, wanted)]
    assert "<tool_call>\n{" in made[-3]


def test_variables_of_the_template_are_those_of_the_training():
    template, _ = chat_template("qwen3", {"enable_thinking": False})
    derived = derive_ollama_template(template)
    (made,) = go_prompts(derived, [(TALK[1:4], None)])
    assert made == template.text(TALK[1:4], add_generation_prompt=True)
    assert made.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["llama3_2", "mistral"])
def test_tools_that_go_cannot_write_are_left_out(name):
    template, _ = chat_template(name)
    assert derive_ollama_template(template).tools is None
    assert ".Tools" not in derive_ollama_template(template).go_text()


@pytest.mark.parametrize("name", ["cohere", "glm4moe", "gptoss", "deepseekv3"])
def test_another_template_is_refused_with_what_it_writes(name):
    tokenizer = family("qwen3")
    tokenizer.chat_template = trl_template(name)
    with pytest.raises(ValueError, match="Jinja.*--for llama.cpp"):
        derive_ollama_template(ChatTemplate(tokenizer))


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def checked_go_text(template):
    derived = derive_ollama_template(template)
    check_ollama_prompts(derived, compared_prompts(template, None), template)
    return derived.go_text()


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (CHATML.replace("%s", "{{ '{{ .System }}' }}"), "between an answer and the next question"),
        (
            "{{ '{{ range .Messages }}' }}" + CHATML.replace("%s", ""),
            r"writes '\{\{ range .Messages \}\}.*Go's templates find an action",
        ),
        (CHATML.replace("%s", "") + "{{ '{' }}", "find an action"),
        (CHATML.replace("%s", "").replace("m.content", "m.content | upper"), "does not write 'lowmemuser1'"),
        (
            CHATML.replace("%s", "").replace("m.content", "m.content | replace('def', 'DEF')"),
            "of two turns as the chat",
        ),
        ("{% if messages|length > 3 %}Much. {% endif %}" + CHATML.replace("%s", ""), "of empty lines as the chat"),
        (None, "no chat template"),
    ],
)
def test_a_hostile_template_is_refused(template, error):
    tokenizer = family("qwen3")
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer)
    with pytest.raises(ValueError, match=error):
        checked_go_text(chat)


def test_each_family_has_a_template_here():
    assert {name for _, name in TEMPLATES.values()} == {*FAMILIES.values()}
