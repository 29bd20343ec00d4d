"""Levels and scales as Triton's kernels decode them, in its interpreter: every code, and every stored scale."""

from dataclasses import replace

import pytest
import torch

from lowmem import quantize
from lowmem.kernels import reference
from tests.kernels.triton.legs import launches, serving

launch = launches(interpreted=True)


def assert_decoded(q):
    """Hold dequantized rows to plain torch, bit for bit, and a product to the row's float64 sum."""
    expected = reference.dequantize(q, slice(None), torch.float32)
    x = torch.ones(1, q.shape[1])
    with serving() as backend:
        assert torch.equal(backend.dequantize(q, slice(None), torch.float32), expected)
        got = backend.linear(x, q, torch.float32)[0].double()
    exact, magnitudes = expected.double().sum(1), expected.double().abs().sum(1)
    assert ((got - exact).abs() <= 1e-5 * magnitudes + 1e-37).all()


@pytest.mark.parametrize("block_size", [8, 10, 32])
@pytest.mark.parametrize("form", ["nf4", "bof4s"])
def test_every_byte_of_double_scales_of_both_signs(form, block_size):
    """Under row scales of every kind; a row's float16 lies at an even or an odd address."""
    for blocks in (256, 255):
        q = quantize(torch.randn(5, blocks * block_size), form, block_size=block_size, scales="double", search=False)
        every = torch.arange(blocks).to(torch.uint8).expand(5, -1)
        row_scales = torch.tensor([[0.0], [2.0**-24], [0.37], [1.0], [65504.0]]).half().view(torch.uint8)
        assert_decoded(replace(q, scales=torch.cat([every, row_scales], 1)))


def test_every_float16_scale_and_float32_scales_of_every_exponent():
    q = quantize(torch.randn(16, 8 * 4096), "int4", block_size=8, search=False)
    halves = torch.arange(2**16).int().to(torch.int16).view(torch.float16).view(16, 4096)
    assert_decoded(replace(q, scales=halves.nan_to_num(0, 0, 0)))
    exponents = torch.exp2(torch.arange(-149, 120).float()).repeat(16)[:4096].expand(16, -1).contiguous()
    assert_decoded(replace(q, scales=exponents, scale_encoding="float32"))


@pytest.mark.parametrize("form", ["nf4", "int8", "q8_0"])
def test_every_code_has_its_level(form):
    """Of 8 bits code 0, too, which only other programs write; and 16 levels in no order at all."""
    q = quantize(torch.randn(4, 512), form, block_size=16, scales="float32")
    q.packed[:] = torch.arange(q.packed.numel()).view(q.packed.shape) % 256
    assert_decoded(q)
    if form == "nf4":
        out, levels = torch.empty(4, 512), tuple(torch.randn(16).tolist())
        launch.dequantize_launch(q, out, levels)()
        assert torch.equal(out, q.restore(slice(None), levels))
