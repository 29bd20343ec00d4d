"""What counts of a conversation; tokenizers of another vocabulary; those of GGUF files, given their tokens."""

import os

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowmem import FileError
from lowmem.integrations.transformers import TextTokenizer
from lowmem.integrations.transformers.text_tokenizer import gguf_tokenizer, padded_batches, read_tokenizer
from lowmem.io.formats.gguf.gguf_file import GGUFTensorInfo, encode_metadata_field, write_new_gguf_file
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

PIECES = ["<unk>", "\u2581", "a", "\u2581a", "b", "<e>"]
BYTES = ["Ġ", "a", "1", "2", "12", "Ġ1", "ab", "b", "ĠĠ", "<e>"]
MERGES = {"llama": [("\u2581", "a")], "gpt2": [("1", "2"), ("Ġ", "1"), ("Ġ", "Ġ")]}


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
        # Without a prompt for it, the model has to write how its message begins
        expected = ["<assistant>two;", "<assistant>four;"] if name == "no prompt" else ["two;", last]
        assert [piece for piece, counts in pieces if counts] == expected, name


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


def test_padding_a_batch_leaves_a_tokenizer_without_a_token_for_it_as_it_was(tokenizer):
    tokenizer.pad_token = None
    (batch,) = padded_batches(tokenizer, ["one two", "one"], max_tokens=8, batch_size=2)
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id
    assert batch["attention_mask"][0, -1] == 0
    assert tokenizer.pad_token is None


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    for vocabulary in (VOCABULARY, VOCABULARY + 60):
        assert read_tokenizer(tmp_path, vocabulary).eos_token_id == 1
    for vocabulary in (VOCABULARY - 1, 4 * VOCABULARY):
        with pytest.raises(FileError, match=f"tokenizer has {VOCABULARY} tokens, and its model {vocabulary}"):
            read_tokenizer(tmp_path, vocabulary)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="it has no tokenizer that transformers can load"):
        read_tokenizer(tmp_path / "empty", VOCABULARY)


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


def tokens_of(tmp_path, monkeypatch, fields, text):
    """Return the tokens of a text, of a file whose fields are ``fields``."""
    kind = fields["model"]
    tokens = PIECES if kind == "llama" else BYTES
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, MERGES.get(kind, []), unk_token="<unk>" if kind == "llama" else None))
    given = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **named: given)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
    encoded = {
        f"tokenizer.ggml.{key}": encode_metadata_field(f"tokenizer.ggml.{key}", value)
        for key, value in fields.items()
    }
    write_new_gguf_file(path, encoded, [GGUFTensorInfo("a", (1,), 0)], [("a", torch.zeros(4, dtype=torch.uint8))])
    found = gguf_tokenizer(path)
    assert found.eos_token == "<e>"
    return [tokens[number] for number in found(text)["input_ids"]], found


def test_spaces_before_words_are_those_that_the_file_says(tmp_path, monkeypatch):
    for told, text, wanted in (
        ({}, "a b", ["\u2581a", "\u2581", "b"]),
        ({"add_space_prefix": True}, " a", ["\u2581", "\u2581a"]),
        ({"add_space_prefix": False}, "a b", ["a", "\u2581", "b"]),
    ):
        tokens, found = tokens_of(tmp_path, monkeypatch, {"model": "llama", **told}, text)
        assert tokens == wanted
        assert found.decode(found(text)["input_ids"]) == text


def test_texts_are_cut_by_the_expression_that_the_file_names(tmp_path, monkeypatch):
    for name, text, wanted in (
        ("gpt-2", "  12", ["Ġ", "Ġ", "12"]),
        ("smollm", "  12", ["ĠĠ", "1", "2"]),
        ("qwen2", "12", ["1", "2"]),
        ("deepseek-r1-qwen", "12", ["1", "2"]),
        ("dbrx", "12", ["12"]),
        ("gpt-2", "ab", ["a", "b"]),
        ("llama-bpe", "ab", ["ab"]),  # a word that is a token, which no merges make
        ("llama3", "ab", ["ab"]),
    ):
        tokens, _ = tokens_of(tmp_path, monkeypatch, {"model": "gpt2", "pre": name}, text)
        assert tokens == wanted, name


def test_an_expression_that_is_not_known_is_told_and_other_kinds_are_left(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="pre='new' of '0.gguf' names an expression that lowmem does not know"):
        tokens, _ = tokens_of(tmp_path, monkeypatch, {"model": "gpt2", "pre": "new"}, "12")
    assert tokens == ["12"]
    tokens, _ = tokens_of(tmp_path, monkeypatch, {"model": "t5"}, "a")
    assert tokens == ["a"]
