"""What few bits lose: of a model's output with each choice of bits, and of normal weights in each format."""

import itertools

import pytest
import torch
from torch import nn

from lowmem import FORMATS, BigNet, EightBit, FourBit, convert
from lowmem.quant.quantize_tensor import quantize, relative_error
from lowmem.quant.scale_encodings import ENCODINGS
from lowmem.report.quantization_errors import (
    BLOCKS,
    SERIES,
    gaussian_error_lower_bound,
    measure_bits_and_output_errors,
    measure_format_gaussian_errors,
    stored_bits_per_weight,
)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 64)).eval()


def run(model):
    with torch.no_grad():
        return [model(torch.ones(2, 256)), torch.tensor([1 + 1j])]


def test_every_choice_is_measured_and_smaller_blocks_and_more_bits_take_more():
    told = []
    found = measure_bits_and_output_errors(make, run, lambda: told.append(1))
    by_series = {series: [one for one in found if one.series == series] for series in SERIES}
    assert [len(one) for one in by_series.values()] == [len(BLOCKS), len(BLOCKS), 1, 5]
    assert len(told) == len(found)
    for own in by_series.values():
        assert all(one.bits <= other.bits for one, other in itertools.pairwise(own))
    (eight,) = by_series["8 bits"]
    model = convert(make(), EightBit())
    expected, output = (torch.cat([one.flatten() for one in (run(m)[0], torch.ones(2))]) for m in (make(), model))
    assert eight.error == pytest.approx(float((output - expected).norm() / expected.norm()), rel=1e-4)
    assert eight.cosine == pytest.approx(float(nn.functional.cosine_similarity(output, expected, dim=0)))
    budgets = by_series["a budget"]
    assert all(one.bits <= float(one.name[7:-1]) + 1e-3 for one in budgets)
    fewest = next(one.bits for one in by_series["bof4s"] if one.name == "bof4s, blocks of 64")
    between = [fewest + share * (eight.bits - fewest) for share in (0.02, 0.05, 0.1, 0.25, 0.5)]
    assert [one.name for one in budgets] == [f"Budget({bits:.3f})" for bits in between]
    assert budgets[-1].error < by_series["bof4s"][-1].error


def test_a_uniform_choice_is_that_of_embeddings_too():
    """And the budgets lie between the fewest bits of one and 8."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(512, 256), nn.Linear(256, 64))

    found = {
        one.name: one for one in measure_bits_and_output_errors(model, lambda made: [made(torch.arange(4)).detach()])
    }
    bits = [found[f"bof4s, blocks of {size}"].bits for size in BLOCKS]
    assert bits == sorted(bits)
    assert 4 < bits[0] < bits[-1] < 4.6
    assert min(float(name[7:-1]) for name in found if name.startswith("Budget")) < 4.3


def test_bits_are_those_of_codes_and_scales_and_ties_count_once():
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    model[1].weight = model[0].weight
    assert stored_bits_per_weight(convert(model, FourBit("bof4s", 16, "float16"))) == 5
    assert stored_bits_per_weight(nn.Linear(2, 2)) == 0
    assert 8 < stored_bits_per_weight(convert(BigNet(), EightBit())) < 8.2


def test_all_formats_scales_and_blocks_are_there_and_none_beats_the_limit():
    assert [gaussian_error_lower_bound(bits) for bits in (0, 1, 4)] == [1, 0.5, 0.0625]
    points = measure_format_gaussian_errors((16, 1024))
    wanted = {(format, scales, block) for format in FORMATS for scales in ENCODINGS for block in BLOCKS}
    assert {(p.format, p.scales, p.block_size) for p in points} == wanted
    assert len(points) == len(wanted)
    for point in points:
        assert point.bits_per_weight > 4
        assert gaussian_error_lower_bound(point.bits_per_weight) < point.error < 0.2
    assert points == measure_format_gaussian_errors((16, 1024))  # the same in every run
    weight = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    for scales, bits in (("float16", 4.25), ("float32", 4.5)):
        stored = quantize(weight, "fp4", block_size=64, scales=scales)
        (point,) = (p for p in points if (p.format, p.scales, p.block_size) == ("fp4", scales, 64))
        assert point.bits_per_weight == stored.bits_per_weight == bits
        assert point.error == relative_error(weight, stored)
