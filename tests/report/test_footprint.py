"""A model's bytes by kind add up to what it stores, and the peaks are those of a forward and of a first step."""

import pytest
import torch
from torch import nn

import lowmem
from lowmem import VARIANTS, measure
from lowmem.report.footprint import KINDS, measure_footprint, stored_bytes_by_kind


def small():
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_kinds_add_up_to_all_that_is_stored(variant):
    model = lowmem.build(variant, small)
    kinds = stored_bytes_by_kind(model)
    assert sum(kinds.values()) == measure.theoretical_bytes(model)
    assert list(kinds) == list(KINDS)


def test_each_byte_is_of_the_kind_that_arithmetic_gives():
    model = lowmem.convert(small(), lowmem.FourBit("nf4", block_size=32, scales="float16"), lowmem.LoRA(rank=4))
    kinds = {kind: size for kind, size in stored_bytes_by_kind(model).items() if size}
    weights = 64 * 32 + 32 * 16
    assert kinds == {
        "4-bit codes": weights // 2,
        "scales": 2 * weights // 32,
        "biases, norms": 4 * (32 + 32 + 32),
        "LoRA adapters": 4 * 4 * (64 + 32 + 32 + 16),
    }


def test_dense_tensors_are_told_by_their_dtype():
    model = nn.ModuleList(
        [nn.Linear(8, 8, bias=False, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    )
    model.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool))
    kinds = {kind: size for kind, size in stored_bytes_by_kind(model).items() if size}
    assert kinds == {"float32 weights": 256, "16-bit weights": 128, "other": 512 + 64}


def test_tied_weights_count_once():
    model = nn.ModuleDict({"tokens": nn.Embedding(100, 8), "head": nn.Linear(8, 100, bias=False)})
    model["head"].weight = model["tokens"].weight
    assert stored_bytes_by_kind(model)["float32 weights"] == 3200


def test_a_footprint_has_all_of_it_and_a_step_holds_gradients_and_both_moments():
    layer, x, weight = nn.Linear(256, 256, bias=False), torch.ones(1, 256), 4 * 256 * 256
    before = layer.weight.detach().clone()
    found = measure_footprint("dense", layer, x)
    assert found.name == "dense"
    assert found.kinds["float32 weights"] == found.stored_bytes == found.step.weights == weight
    assert found.forward_bytes == measure.forward_bytes(layer, x) < weight
    assert (found.step.gradients, found.step.optimizer) == (weight, 2 * weight)
    assert torch.equal(layer.weight, before)
    assert measure_footprint("frozen", layer, x, trains=False).step is None
