"""The tokenizer's fields, from tokenizer.json. That llama.cpp then cuts texts alike is held in tests/formats."""

import json

import pytest

from lowmem.errors import FileError
from lowmem.io.formats.gguf.gguf_tokenizer_fields import PRE_TOKENIZERS, tokenizer_and_chat_template_fields

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = [
    {"id": 0, "content": "<s>", "special": True},
    {"id": 1, "content": "</s>", "special": True},
    {"id": 6, "content": "<think>", "special": False},
]
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}


def bytes_bpe(**changes):
    model = {"type": "BPE", "vocab": {"a": 2, "b": 3, "ab": 4, "aba": 5}, "merges": [["a", "b"], ["ab", "a"]]}
    return {"model": model, "pre_tokenizer": BYTE_LEVEL, "added_tokens": ADDED, **changes}


def pieces(**changes):
    vocab = {"<unk>": 2, "<0x41>": 3, "\u2581": 4, "a": 5, "b": 7, "ba": 8, "aba": 9, "\u2581a": 10}
    merges = ["b a", "\u2581 a", "a ba"]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    return {"model": model, "pre_tokenizer": step, "added_tokens": ADDED, "post_processor": TEMPLATE, **changes}


def fields_of(folder, tokenizer, settings=None, config=None, rows=12):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer_and_chat_template_fields(folder, config or {}, rows)


NAMED = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 10**30}


def test_a_bpe_of_bytes_becomes_fields(tmp_path):
    found = fields_of(tmp_path, bytes_bpe(), {**NAMED, "chat_template": "{{ x }}"}, rows=8)
    assert found == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab", "aba", "<think>", "[PAD7]"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 4, 5],
        "tokenizer.ggml.merges": ["a b", "ab a"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ x }}",
    }


def test_the_name_of_what_cuts_a_text_is_found_by_its_expressions(tmp_path):
    for (*cuts, whole), name in PRE_TOKENIZERS.items():
        steps = []
        for cut in cuts:
            split = {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
            steps.append({"type": "Digits", "individual_digits": True} if cut == "digits" else split)
        steps.append({**BYTE_LEVEL, "use_regex": False})
        tokenizer = bytes_bpe(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        tokenizer["model"]["ignore_merges"] = whole
        assert fields_of(tmp_path, tokenizer)["tokenizer.ggml.pre"] == name


def test_scores_of_pieces_follow_the_order_of_merges(tmp_path):
    found = fields_of(tmp_path, pieces(), {**NAMED, "unk_token": "<unk>"})
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.token_type"] == [3, 3, 2, 6, 1, 1, 4, 1, 1, 1, 1, 5]
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores["ba"] > scores["\u2581a"] > scores["aba"] > scores["a"] == scores["<think>"]
    assert found["tokenizer.ggml.unknown_token_id"] == 2
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.ggml.add_space_prefix"] is True
    prepend, replace = {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "content": "\u2581"}
    for normalizers, prefix in (([prepend, replace], True), ([replace], False)):
        normalizer = {"type": "Sequence", "normalizers": normalizers}
        found = fields_of(tmp_path, pieces(normalizer=normalizer, pre_tokenizer=None))
        assert found["tokenizer.ggml.add_space_prefix"] is prefix


def test_ends_come_from_the_config_where_the_tokenizer_names_none(tmp_path):
    found = fields_of(tmp_path, bytes_bpe(), None, {"eos_token_id": [4, 5], "bos_token_id": None, "pad_token_id": 99})
    assert found["tokenizer.ggml.eos_token_id"] == 4
    assert not {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id"} & found.keys()
    twice = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}] * 2}
    with pytest.raises(FileError, match="its post_processor adds"):  # and no token that has no name
        fields_of(tmp_path, bytes_bpe(post_processor=twice))
    (tmp_path / "chat_template.jinja").write_text("{{ y }}")
    assert fields_of(tmp_path, bytes_bpe())["tokenizer.chat_template"] == "{{ y }}"
    templates = [3, {"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    found = fields_of(tmp_path, bytes_bpe(), {"chat_template": templates})
    assert found["tokenizer.chat_template"] == "b"


def test_a_folder_without_a_tokenizer_has_no_fields_and_with_an_old_one_is_refused(tmp_path):
    assert tokenizer_and_chat_template_fields(tmp_path, {}, 8) == {}
    (tmp_path / "tokenizer.model").write_text("x")
    with pytest.raises(FileError, match=r"tokenizer\.model.*save_pretrained"):
        tokenizer_and_chat_template_fields(tmp_path, {}, 8)


def test_what_llama_cpp_does_not_have_is_refused_with_the_remedy(tmp_path):
    two = {"type": "TemplateProcessing", "single": [*TEMPLATE["single"][:1] * 2, *TEMPLATE["single"][1:]]}

    def merging(*merges):
        return bytes_bpe(model={**bytes_bpe()["model"], "merges": merges})

    def split(**changes):
        step = {"type": "Split", "pattern": {"Regex": whole}, "behavior": "Isolated", "invert": False, **changes}
        steps = [step, {**BYTE_LEVEL, "use_regex": False}]
        tokenizer = bytes_bpe(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        tokenizer["model"]["ignore_merges"] = True
        return tokenizer

    whole = next(cut for cut, *_, ignores in PRE_TOKENIZERS if ignores)
    assert fields_of(tmp_path, split())
    for tokenizer, words in (
        (bytes_bpe(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}), "add_prefix_space"),
        (bytes_bpe(pre_tokenizer={"type": "Whitespace"}), "maps no bytes"),
        (bytes_bpe(pre_tokenizer=None), "no tokenizer that lowmem knows"),
        (bytes_bpe(normalizer={"type": "Lowercase"}), "Lowercase"),
        (bytes_bpe(model={"type": "WordPiece", "vocab": {"a": 2}}), "WordPiece"),
        (bytes_bpe(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "Unigram"),
        (bytes_bpe(post_processor=two), "adds"),
        (bytes_bpe(post_processor={"type": "BertProcessing"}), "BertProcessing"),
        (bytes_bpe(normalizer={"type": "NFC"}), "NFC"),  # of qwen2 alone
        (split(behavior="Removed"), "does not know what llama.cpp calls its pre_tokenizer .*Removed"),
        (split(invert=True), "does not know what llama.cpp calls its pre_tokenizer .*invert"),
        (
            split(type="Digits", individual_digits=False),
            "does not know what llama.cpp calls its pre_tokenizer .*indivi",
        ),
        (merging(["a b", "c"]), "spaces"),
        *((merging(one), "its merges are no pairs of texts") for one in (["a", "b", "ab"], ["ab"], ["a", 3], "ab")),
        (bytes_bpe(added_tokens=[{"id": 50, "content": "x"}]), "token 50"),
        (bytes_bpe(added_tokens=[{"id": 7, "content": "a"}]), "one text"),
        (bytes_bpe(added_tokens=[{"id": "7", "content": "a"}]), "lowmem knows"),
        (pieces(pre_tokenizer={**pieces()["pre_tokenizer"], "split": True}), "splits words"),
        (pieces(normalizer={"type": "NFKC"}), "NFKC"),
        ({}, "model"),
        ([], "must be an object"),
    ):
        with pytest.raises(FileError, match=words) as error:
            fields_of(tmp_path, tokenizer, NAMED)
        assert "--like" in str(error.value) or tokenizer == []
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(FileError, match="damaged"):
        tokenizer_and_chat_template_fields(tmp_path, {}, 8)
