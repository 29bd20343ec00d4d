"""Which technique each layer gets: embeddings and output layers 8 bits, others what is named."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowmem
from lowmem import Budget, EightBit, FourBit, LoRA, convert, measure, summary
from lowmem.nn.embedding import Embedding8Bit
from lowmem.nn.linear import Linear8Bit
from lowmem.nn.techniques import embedding_and_output_technique
from lowmem.transforms.technique_assignment import techniques_by_layer
from tests.transforms.test_adapter_placement import HEADS, Causal


class Kept(Causal):
    """As models of transformers, it names what float16 may not round, and what bfloat16 may not."""

    _keep_in_fp32_modules, _keep_in_fp32_modules_strict = {"body.q", "none"}, ["l*_head"]


def test_only_layers_that_an_adapter_can_follow_have_one_placed():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4))
    technique = LoRA(2, ranks={"1": 3})
    chosen = techniques_by_layer(model, (FourBit(), technique), model, None)
    assert chosen == {
        model[0]: (embedding_and_output_technique(FourBit()), technique),
        model[1]: (FourBit(), {"weight": LoRA(3)}),
    }


@pytest.mark.parametrize(("embeddings", "format"), [("8bit", "int8"), ("q8_0", "q8_0")])
@pytest.mark.parametrize("kind", [kind for kind, _ in HEADS])
def test_four_bit_keeps_embeddings_and_output_layers_in_8_bits(kind, embeddings, format, tmp_path):
    model, narrow = (convert(kind(), FourBit("nf4", embeddings=how)) for how in (embeddings, "4bit"))
    wider = [path for path, module in model.named_modules() if isinstance(module, Embedding8Bit | Linear8Bit)]
    heads = next(heads for own, heads in HEADS if own is kind)
    tokens = [path for path, module in model.named_modules() if path.endswith("tokens")]
    assert sorted(wider) == sorted([*tokens, *heads])
    assert {row.stored.split(",")[0] for row in summary(model) if row.path in wider} == {format}
    assert not any("8 bits" in (row.reason or "") for row in summary(narrow))
    assert not any(isinstance(module, Embedding8Bit | Linear8Bit) for module in narrow.modules())
    assert measure.theoretical_bytes(narrow) < measure.theoretical_bytes(model)
    rows = {row.path: row.reason for row in summary(model)}
    assert all(rows[path].startswith("8 bits, since it") for path in wider)
    ties = [(a, b) for a, b in (("body.tokens", "head"), ("lm_head", "draft")) if {a, b} <= set(wider)]
    for one, other in ties:
        assert model.get_submodule(one).weight is model.get_submodule(other).weight
    lowmem.save(model, tmp_path / "model.safetensors")
    assert [*summary(lowmem.load(tmp_path / "model.safetensors", kind))] == [
        replace(row, weight_error=None) for row in summary(model)
    ]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float16, {"body.q", "lm_head"}), (torch.bfloat16, {"lm_head"}), (torch.int8, set()), (None, set())],
)
@pytest.mark.parametrize("technique", [FourBit("nf4", embeddings="4bit"), Budget(6.0), EightBit()])
def test_what_a_model_keeps_in_float32_is_not_computed_in_16_bits(dtype, kept, technique):
    """A layer that shares the weight is computed as asked, and still shares it."""
    model = convert(nn.Sequential(Kept()), replace(technique, compute_dtype=dtype))[0]
    for path in ("body.q", "body.v", "lm_head", "draft"):
        assert model.get_submodule(path).compute_dtype is (None if path in kept else dtype), path
    assert model.draft.weight_packed is model.lm_head.weight_packed


def test_an_8_bit_output_layer_takes_an_adapter_where_it_is_named():
    model = convert(Causal(), FourBit("nf4", compute_dtype=torch.int8), LoRA(2), where=lambda *_: True)
    assert isinstance(model.lm_head, Linear8Bit)
    assert isinstance(model.draft, Linear8Bit)
    assert model.lm_head.compute_dtype is None  # products of 8 times 8 bits have no kernel
    assert model.body.q.compute_dtype is torch.int8
    lowmem.merge(model)
    assert type(model.lm_head) is Linear8Bit
