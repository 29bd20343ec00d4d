"""Names of GGUF, and the rows that llama.cpp reorders."""

import pytest
import torch

from lowmem.io.formats.gguf.gguf_tensor_names import FAMILIES, tensor_name_map_from_metadata


def test_rows_are_put_back_where_the_converter_of_llama_cpp_took_them_from():
    """Its code: w.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)."""
    metadata = {"general.architecture": "llama", "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    names = tensor_name_map_from_metadata(metadata)
    for part, heads in (("attn_q", 4), ("attn_k", 2)):
        weight = torch.randn(24, 5)
        moved = weight.reshape(heads, 2, 24 // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        order = names.file_rows_in_model_order_or_none(f"blk.7.{part}.weight", 24)
        assert torch.equal(moved[order], weight)
    assert names.file_rows_in_model_order_or_none("blk.7.attn_v.weight", 24) is None
    del metadata["llama.attention.head_count_kv"]  # as many as those of q
    assert tensor_name_map_from_metadata(metadata).heads == {"attn_q": 4, "attn_k": 4}


def test_only_families_that_are_converted_so_reorder_rows():
    assert {name for name, family in FAMILIES.items() if family.has_reordered_rows} == {"llama", "smollm3"}
    assert (
        tensor_name_map_from_metadata({"general.architecture": "qwen2"}).file_rows_in_model_order_or_none(
            "blk.0.attn_q.weight", 8
        )
        is None
    )


def test_a_name_of_the_model_becomes_that_of_the_file_and_the_other_way():
    for architecture, family in FAMILIES.items():
        names = tensor_name_map_from_metadata(
            {"general.architecture": architecture, f"{architecture}.attention.head_count": 2}
        )
        for part in (*(f"blk.12.{part}" for part in family.parts), "token_embd", "output_norm", "output"):
            for kind in ("weight", "bias"):
                assert names.gguf_name(names.transformers_name_or_none(f"{part}.{kind}")) == f"{part}.{kind}"
        for name in ("model.layers.0.weight", "model.layers.x.mlp.up_proj.weight", "lm_head.scale", "weight", ""):
            with pytest.raises(ValueError, match="no known place"):
                names.gguf_name(name)


def test_names_that_are_none_of_the_family_are_refused():
    names = tensor_name_map_from_metadata({"general.architecture": "qwen2"})
    assert names.transformers_name_or_none("blk.31.attn_q.bias") == "model.layers.31.self_attn.q_proj.bias"
    assert names.transformers_name_or_none("blk.0.rope_freqs.weight") is None
    for name in ("blk.0.attn_q_norm.weight", "blk.x.attn_q.weight", "blk.0.attn_q", "attn_q.weight", "a" * 999):
        with pytest.raises(ValueError, match="no known place"):
            names.transformers_name_or_none(name)
    for changes, message in (
        ({"general.architecture": "bert"}, "general.architecture='bert' has names .* it knows llama, smollm3, qwen2"),
        ({"general.architecture": None}, "general.architecture=None has names that lowmem does not know"),
        ({"general.architecture": ["qwen2"]}, r"general.architecture=\['qwen2'\] has names that lowmem does not"),
        ({"general.type": "adapter"}, "general.type='adapter' is no model"),
        ({"split.count": 2}, "it is one of 2 parts"),
        ({"general.architecture": "llama"}, "llama.attention.head_count=None must be a number"),
        ({"general.architecture": "llama", "llama.attention.head_count": 0}, "head_count=0 must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            tensor_name_map_from_metadata({"general.architecture": "qwen2", **changes})
    for told in ({"general.type": "model"}, {"split.count": 0}, {"split.count": 1}):
        assert tensor_name_map_from_metadata({"general.architecture": "qwen2", **told}).architecture == "qwen2"
