"""The tokenizer of a GGUF file, given what transformers makes of its tokens; llama.cpp itself: tests/formats."""

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowmem.integrations.transformers.gguf_tokenizer import tokenizer_of
from lowmem.io.formats.gguf.container import Placed, encode_field, write_file

PIECES = ["<unk>", "\u2581", "a", "\u2581a", "b", "<e>"]
BYTES = ["Ġ", "a", "1", "2", "12", "Ġ1", "ab", "b", "ĠĠ", "<e>"]
MERGES = {"llama": [("\u2581", "a")], "gpt2": [("1", "2"), ("Ġ", "1"), ("Ġ", "Ġ")]}


def tokens_of(tmp_path, monkeypatch, fields, text):
    """Return the tokens of a text, of a file whose fields are ``fields``."""
    kind = fields["model"]
    tokens = PIECES if kind == "llama" else BYTES
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, MERGES.get(kind, []), unk_token="<unk>" if kind == "llama" else None))
    given = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **named: given)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
    encoded = {f"tokenizer.ggml.{key}": encode_field(f"tokenizer.ggml.{key}", value) for key, value in fields.items()}
    write_file(path, encoded, [Placed("a", (1,), 0)], [("a", torch.zeros(4, dtype=torch.uint8))])
    found = tokenizer_of(path)
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
