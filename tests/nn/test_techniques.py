"""The techniques: what they hold, refuse and choose among, and the layout of what they store."""

import json
import math
import re
from dataclasses import asdict
from functools import partial

import pytest
import torch
from hypothesis import given
from torch import nn

from lowmem import (
    Budget,
    Conv4Bit,
    EightBit,
    FourBit,
    Half,
    LoRA,
    convert,
    quantize,
)
from lowmem.errors import short_repr
from lowmem.nn.techniques import CHOICES, NORMAL_ERRORS, blockwise_technique
from lowmem.quant.quantize_tensor import relative_error
from tests import strategies


def test_the_choices_are_ordered_by_bytes_and_each_loses_less_of_a_normal_matrix():
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    stored = [one.store(weight) for one in CHOICES]
    bits = [one.bits_per_weight for one in stored]
    assert [round(one, 3) for one in bits] == [4.129, 4.254, 4.504, 8.129]
    errors = [relative_error(weight, one) for one in stored]
    assert errors == sorted(errors, reverse=True)
    assert all(abs(found / told - 1) < 0.005 for found, told in zip(errors, NORMAL_ERRORS, strict=True))
    same = quantize(weight, "bof4s", block_size=32, scales="double")
    assert torch.equal(stored[1].packed, same.packed)


def test_a_budget_is_a_value_and_its_inputs_are_no_part_of_it():
    assert Budget(4.4) == Budget(4.4, inputs=[torch.ones(2)]) != Budget(4.5)
    assert len({Budget(4.4), Budget(4.4, inputs=[torch.ones(2)])}) == 1
    assert repr(Budget(4.4, [torch.ones(2)])) == "Budget(bits=4.4, compute_dtype=None)"
    assert {type(one) for one in Budget(5).choices} == {FourBit, EightBit}
    assert all(one.compute_dtype is torch.int8 for one in Budget(5, compute_dtype=torch.int8).choices)


def test_what_is_no_budget_is_refused():
    for wrong in (0, -4.4, math.nan, math.inf, True, "4.4", None):
        with pytest.raises(ValueError, match=r"bits=.* must be a number of bits a weight, as 4\.4"):
            Budget(wrong)
    for wrong in (torch.ones(2), {"x": torch.ones(2)}, "text", 3):
        with pytest.raises(TypeError, match=r"inputs is a .*; pass a list of batches, if only of one: \[batch\]"):
            Budget(4.4, inputs=wrong)


@given(strategies.weights(), strategies.formats, strategies.small_blocks, strategies.encodings)
def test_the_skeleton_has_the_layout_of_what_is_stored(weight, format, block_size, scales):
    technique = blockwise_technique(format, block_size, scales)
    stored, skeleton = technique.store(weight), technique.skeleton(weight)
    assert skeleton.stored_layout == stored.stored_layout
    assert skeleton.packed.is_meta
    assert skeleton.scales.is_meta
    assert skeleton.method == stored.method
    assert not stored.packed.requires_grad
    assert not stored.scales.requires_grad


def test_without_a_format_it_is_bof4s_in_blocks_of_32():
    assert FourBit() == FourBit("bof4s", 32) == FourBit(block_size=32)
    assert len({FourBit(), FourBit("bof4s", 32), FourBit("nf4")}) == 2  # a technique is a value, which a set holds
    assert FourBit(block_size=64, scales="float16") == FourBit("bof4s", 64, "float16")
    assert (FourBit("bof4s").block_size, FourBit("nf4").block_size) == (None, None)  # 64, as these formats have it
    weight = FourBit().store(torch.randn(8, 2048))
    assert (weight.format, weight.block_size, weight.scale_encoding, weight.method) == (
        "bof4s",
        32,
        "double",
        "search",
    )
    assert weight.bits_per_weight == 4 + 8 / 32 + 16 / 2048


def test_the_technique_of_a_format_is_the_one_of_its_bits():
    assert blockwise_technique("int8", 32, "float16") == EightBit(32, "float16")
    assert blockwise_technique("q8_0") == EightBit(format="q8_0") != EightBit()
    assert blockwise_technique("nf4", 32, search=True) == FourBit("nf4", 32, search=True)
    assert isinstance(convert(nn.Conv2d(3, 4, 3), EightBit()), Conv4Bit)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        *(
            (Half, {"dtype": one}, "must be torch.float16 or torch")
            for one in (torch.float32, torch.int8, "float16", None)
        ),
        (FourBit, {"format": "int3"}, "format='int3' is unknown: choose from int4, nf4, fp4"),
        (FourBit, {"format": "int8"}, "format='int8' has codes of 8 bits: EightBit"),
        (FourBit, {"format": ("nf4", "int8")}, "format='int8' has codes of 8 bits"),
        (FourBit, {"format": torch.int8}, r"format=torch.int8 must be the name of a format, as 'nf4'"),
        (FourBit, {"embeddings": "8"}, "embeddings='8' must be '8bit', 'q8_0' or '4bit'"),
        (FourBit, {"embeddings": ["8bit"]}, r"embeddings=\['8bit'\] must be"),
        (FourBit, {"search": "yes"}, "search='yes' must be True or False"),
        (FourBit, {"offsets": 1}, "offsets=1 must be True or False"),
        (EightBit, {"format": "nf4"}, "format='nf4' has codes of 4 bits: FourBit"),
        (EightBit, {"format": "int9"}, "format='int9' is unknown"),
        (EightBit, {"block_size": torch.float8_e4m3fn}, "block_size=torch.float8_e4m3fn must be an integer"),
        (EightBit, {"scales": "float16_offsets"}, "scales='float16_offsets' has offsets"),
        (blockwise_technique, {"format": "int9"}, "format='int9' is unknown"),
        *(
            (kind, options, message)
            for kind in (FourBit, EightBit)
            for options, message in (
                ({"block_size": 0}, "block_size=0 must be"),
                ({"block_size": -16}, "block_size=-16 must be"),
                ({"block_size": 16.0}, "block_size=16.0 must be an integer"),
                ({"scales": "e4m3"}, "scales='e4m3' is unknown: choose from float32, float16, double"),
                ({"scales": ["double"]}, r"scales=\['double'\] is unknown"),
            )
        ),
        *(
            (kind, {"compute_dtype": dtype}, "compute_dtype=.* must be a floating-point")
            for kind in (FourBit, EightBit, partial(Budget, 4.4))
            for dtype in (torch.int16, torch.int32, torch.complex64, torch.float8_e4m3fn, "bfloat16")
        ),
    ],
)
def test_bad_options_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_first_pattern_that_matches_a_path_gives_rank_and_alpha():
    technique = LoRA(4, 8.0, 0.1, True, ranks={"*.q": 32, "b.*": 16, "*": 2}, alphas=[("b.*", None)])
    assert technique.at(["a.q"]) == LoRA(32, 8.0, 0.1, True)
    assert technique.at(["b.q"]) == LoRA(32, None, 0.1, True)
    assert technique.at(["b.k"]) == LoRA(16, None, 0.1, True)
    assert technique.at(["a.k", "b.k"]) == LoRA(16, None, 0.1, True)
    assert technique.at([""]) == LoRA(2, 8.0, 0.1, True)


def test_patterns_are_hashable_and_json_holds_them():
    technique = LoRA(ranks={"*.q": 32}, alphas={"*.q": 64, "*": None}, rank_stabilized=True)
    assert len({technique, LoRA(ranks=[("*.q", 32)], alphas=[["*.q", 64], ["*", None]], rank_stabilized=True)}) == 1
    assert LoRA(**json.loads(json.dumps(asdict(technique)))) == technique


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"rank": rank}, f"rank={rank!r} must be a positive integer") for rank in (0, -1, 2.0, True, "4", None)),
        *(
            (
                {"alpha": alpha},
                re.escape(f"alpha={short_repr(alpha)} must be a positive number, at most float32's largest (3.4"),
            )
            for alpha in (0, -1, float("inf"), float("nan"), "1", True, 1j, [1], 3.5e38, 1e39, 10**400)
        ),
        *(({"ranks": {"*": rank}}, f"rank={rank!r} must be a positive integer") for rank in (0, True, None)),
        *(({"alphas": {"*": alpha}}, f"alpha={alpha!r} must be") for alpha in (0, "1")),
        *(
            ({"ranks": ranks}, re.escape(f"ranks={ranks!r} must map glob patterns of paths to values"))
            for ranks in (7, "ab", ["ab", "abc"], [(1, 2)], {1: 2}, [("*", 1, 2)], None)
        ),
        *(({"init": init}, f"init={init!r} must be 'zero' or 'loftq'") for init in ("qera", None, True)),
        ({"alphas": 1.5}, "alphas=1.5 must map glob patterns of paths to values"),
        *(({"rank_stabilized": value}, f"rank_stabilized={value} must be True or False") for value in (1, None)),
        *(({"dropout": p}, "dropout=.* must be at least 0 and below 1") for p in (-0.1, 1, 1.5, float("nan"), "0")),
    ],
)
def test_bad_options_of_lora_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**options)
