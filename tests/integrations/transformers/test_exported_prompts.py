"""Which prompts of an exported file are compared with those of the training."""

import json
import shutil

import pytest

pytest.importorskip("gguf", reason="gguf is not installed: tox -e transformers")

import lowmem
from lowmem.errors import FileError
from lowmem.integrations.transformers.chat_template import ChatTemplate
from lowmem.integrations.transformers.exported_prompts import (
    ExportedTokenizer,
    Prompt,
    compared_prompts,
    leave_out_untrained_beginning,
)
from lowmem.integrations.transformers.text_tokenizer import read_tokenizer
from tests.integrations.transformers.folders import write
from tests.integrations.transformers.test_chat_template import FAMILIES, KWARGS, family, trl_template
from tests.integrations.transformers.tokens import write_tokenizer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"


@pytest.mark.parametrize("name", FAMILIES)
def test_five_conversations_are_compared_with_tools_where_the_template_has_them(name):
    template = ChatTemplate(family(name), KWARGS.get(name))
    prompts = compared_prompts(template, None)
    assert len({prompt.name for prompt in prompts}) == 5
    assert sum(message["role"] == "system" for prompt in prompts for message in prompt.messages) == 1
    assert [bool(prompt.tools) for prompt in prompts] == [False] * 4 + [name not in ("llama3", "gemma3", "phi3")]
    texts = {template.text(prompt.messages, prompt.tools, add_generation_prompt=True) for prompt in prompts}
    assert len(texts) == 5
    asked = compared_prompts(template, "Be kind.")
    assert sum(prompt.messages[0] == {"role": "system", "content": "Be kind."} for prompt in asked) == 4


def test_a_template_without_system_messages_is_asked_about_something_else():
    tokenizer = family("gemma3")
    tokenizer.chat_template = trl_template("gemma")
    prompts = compared_prompts(ChatTemplate(tokenizer), None)
    assert len({prompt.name for prompt in prompts}) == 5
    assert not any(message["role"] == "system" for prompt in prompts for message in prompt.messages)


def test_texts_are_compared_where_there_is_no_template():
    prompts = compared_prompts(None, None)
    assert len(prompts) == 5
    assert all(isinstance(prompt.messages, str) for prompt in prompts)


@pytest.fixture
def file(tmp_path):
    """A GGUF file, with its folder beside it."""
    write_tokenizer(write(tmp_path / "llama"))
    lowmem.export(tmp_path / "llama", tmp_path / "a.gguf")
    return tmp_path / "a.gguf"


def test_other_tokens_are_an_error_that_names_the_prompt(file, tmp_path):
    tokenizer, exported = read_tokenizer(tmp_path / "llama"), ExportedTokenizer(file, CHAT)
    tokenizer.chat_template = CHAT
    assert exported.beginning == ""
    exported.check_prompts(compared_prompts(ChatTemplate(tokenizer), None), tokenizer, {})
    exported.check_prompts(compared_prompts(None, None), tokenizer, {})
    tokenizer.chat_template = CHAT.replace(";", "!")
    prompt = Prompt("the conversation of one question", [{"role": "user", "content": "a"}])
    with pytest.raises(FileError, match=r"makes \[28\] of what is \[2\].*after 7 tokens.* of one question"):
        exported.check_prompts([prompt], tokenizer, {})
    tokenizer.add_tokens(["Ça"])
    with pytest.raises(FileError, match="in the text 'Ça va"):
        exported.check_prompts(compared_prompts(None, None), tokenizer, {})


def test_a_beginning_is_left_out_where_the_template_does_not_write_it(tmp_path):
    write_tokenizer(write(tmp_path / "llama"))
    path = tmp_path / "llama" / "tokenizer.json"
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    for template, begins in ((CHAT, False), ("{{ bos_token }}" + CHAT, True)):
        folder = tmp_path / f"begins {begins}"
        shutil.copytree(tmp_path / "llama", folder)
        tokenizer = read_tokenizer(folder)
        tokenizer.chat_template = template
        prompts = compared_prompts(ChatTemplate(tokenizer), None)
        leave_out_untrained_beginning(folder, tokenizer, ChatTemplate(tokenizer), prompts[0])
        lowmem.export(folder, tmp_path / f"{begins}.gguf")
        exported = ExportedTokenizer(tmp_path / f"{begins}.gguf", template)
        assert exported.beginning == ("<s>" if begins else "")
        exported.check_prompts(prompts, tokenizer, {})
    lowmem.export(tmp_path / "llama", tmp_path / "twice.gguf")
    tokenizer.chat_template = CHAT
    with pytest.raises(FileError, match="programs begin prompts with '<s>', and the training did not"):
        ExportedTokenizer(tmp_path / "twice.gguf", CHAT).check_prompts(prompts, tokenizer, {})
