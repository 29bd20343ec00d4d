"""What counts of a conversation, by templates of several kinds; and tokenizers of another vocabulary."""

import os

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import AutoTokenizer

from lowmem import FileError
from lowmem.integrations.transformers import TextTokenizer
from lowmem.integrations.transformers.tokenizing import load_tokenizer, read_tokenizer
from tests.integrations.transformers.tokens import VOCABULARY, write_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATES = {
    "plain": CHAT,
    "a system message of its own": "{{ '<system>help;' }}" + CHAT,
    "the last answer is written otherwise": CHAT.replace(
        "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}(think){% endif %}{{ m.content }}"
    ),
    "no prompt": CHAT.partition("{% if add")[0],
}
MESSAGES = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_the_assistant_s_messages_count_with_their_ends(tokenizer):
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        pieces = TextTokenizer(tokenizer).chat(MESSAGES)
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        assert "".join(piece for piece, _ in pieces) == text
        last = "(think)four;" if "otherwise" in name else "four;"
        expected = ["two", "four"] if name == "no prompt" else ["two;", last]
        assert [piece.rstrip(";") for piece, counts in pieces if counts] == [one.rstrip(";") for one in expected], (
            name
        )


def test_what_a_template_cannot_take_is_said(tokenizer):
    mine = TextTokenizer(tokenizer)
    with pytest.raises(ValueError, match="has no chat template for messages"):
        mine.chat(MESSAGES)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the messages: TemplateError: roles must alternate"):
        mine.chat(MESSAGES)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="message 2 cannot be found"):
        mine.chat(MESSAGES)


def test_tokens_are_the_tokenizer_s(tokenizer):
    mine = TextTokenizer(tokenizer)
    assert mine.end == tokenizer.eos_token_id
    assert mine.encode("some text", False) == tokenizer("some text", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    for vocabulary in (VOCABULARY, VOCABULARY + 60):
        assert load_tokenizer(tmp_path, vocabulary).end == 1
    for vocabulary in (VOCABULARY - 1, 4 * VOCABULARY):
        with pytest.raises(FileError, match=f"tokenizer has {VOCABULARY} tokens, and its model {vocabulary}"):
            load_tokenizer(tmp_path, vocabulary)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="it has no tokenizer that transformers can load"):
        load_tokenizer(tmp_path / "empty", VOCABULARY)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_in_place_of_a_tokenizer_is_named(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(OSError, match=r"^cannot read '.*tokenizer\.json': it is a directory, a device or a pipe"):
        read_tokenizer(tmp_path, VOCABULARY)


def test_what_the_library_of_tokenizers_refuses_is_an_error_of_the_folder(tmp_path):
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"</s>": 1', '"</s>": 0.5'))
    with pytest.raises(FileError, match="it has no tokenizer that transformers can load: Exception: invalid type"):
        read_tokenizer(tmp_path, VOCABULARY)
