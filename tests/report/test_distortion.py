"""What each format loses of normal weights lies above the least that theory allows."""

import pytest
import torch

import lowmem
from lowmem import FORMATS
from lowmem.quant.quantize import relative_error
from lowmem.quant.scales import ENCODINGS
from lowmem.report.distortion import BLOCKS, distortions, least_error


def test_the_limit_is_half_for_each_bit():
    assert least_error(0) == 1
    assert least_error(1) == 0.5
    assert least_error(4) == pytest.approx(0.0625)


def test_all_formats_scales_and_blocks_are_there_and_none_beats_the_limit():
    points = distortions((16, 1024))
    assert {(p.format, p.scales, p.block_size) for p in points} == {
        (format, scales, block) for format in FORMATS for scales in ENCODINGS for block in BLOCKS
    }
    assert len(points) == len(FORMATS) * len(ENCODINGS) * len(BLOCKS)
    for point in points:
        assert point.bits_per_weight > 4
        assert least_error(point.bits_per_weight) < point.error < 0.2
    assert points == distortions((16, 1024))  # the same in every run


@pytest.mark.parametrize(("format", "scales", "bits"), [("fp4", "float16", 4.25), ("fp4", "float32", 4.5)])
def test_a_point_is_what_quantize_stores_and_loses(format, scales, bits):
    weight = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    stored = lowmem.quantize(weight, format, block_size=64, scales=scales)
    (point,) = [p for p in distortions((16, 1024)) if (p.format, p.scales, p.block_size) == (format, scales, 64)]
    assert point.bits_per_weight == stored.bits_per_weight == bits
    assert point.error == relative_error(weight, stored)
