"""Blocks of GGUF: written from codes and scales of lowmem, and read back by the reader of GGUF."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowmem
from lowmem.io.formats.gguf.blocks import BLOCKS, EIGHT_BIT, KINDS, SUPERBLOCKS
from lowmem.io.formats.gguf.encoding import (
    eight_bit_rows,
    in_blocks,
    inexact,
    nearest,
    nearest_format,
    rows_of,
    superblock_rows,
)
from lowmem.nn.forms import CodedForm
from lowmem.quant.packing import pack
from lowmem.quant.tensor import QuantizedTensor
from tests import strategies


def random_weight(format, size, blocks, seed, encoding="float32"):
    """Return a weight of random codes, of scales and offsets that its type holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    columns = 32 * blocks
    codes = torch.randint(0, 16, (3, columns), generator=generator, dtype=torch.uint8)
    count = -(-columns // size)
    sizes = torch.exp2(torch.randint(-20, 10, (3, count), generator=generator).float())
    d = (torch.randn(3, count, generator=generator) * sizes).half().float()
    if format == "fp4":
        d = torch.exp2(torch.randint(-125, 125, (3, count), generator=generator).float())
    scales = d * (BLOCKS[KINDS[format]].divisor or 6.0)
    if encoding.endswith("_offsets"):
        scales = torch.cat([scales, torch.randn(3, count, generator=generator).half().float()], dim=-1)
    return QuantizedTensor(pack(codes, size), scales, torch.Size((3, columns)), format, size, encoding, "imported")


def as_read(weight):
    """Return codes, scales and offsets of the weight's blocks, as the reader has them."""
    block = BLOCKS[KINDS[weight.format]]
    raw = rows_of(weight).view(weight.shape[0], -1, block.nbytes)
    offsets = None if block.offsets is None else block.offsets(raw).flatten(1)
    return block.packed(raw).flatten(1), block.scales(raw).flatten(1), offsets


@given(
    format=st.sampled_from([*KINDS]),
    size=st.sampled_from([32, 64, 128, 4096]),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_codes_and_scales_come_back_as_they_were(format, size, blocks, seed):
    encoding = "float32_offsets" if format == "uint4" else "float32"
    weight = random_weight(format, size, blocks, seed, encoding)
    assert inexact(CodedForm.of(weight), weight.shape[-1]) is None
    stored = in_blocks(weight)
    assert torch.equal(stored.dequantize(), weight.dequantize())
    packed, scales, offsets = as_read(stored)
    own = stored.encoding.decode(stored.scales)
    assert torch.equal(scales, own)
    if format == "uint4":
        assert torch.equal(offsets, stored.offsets())
    if format == "fp4":  # ggml has no -0
        found = QuantizedTensor(packed, scales, weight.shape, format, 32, "float32", "imported")
        assert torch.equal(found.dequantize(), weight.dequantize())
    else:
        assert torch.equal(packed, stored.packed)
    if size == 32:
        assert torch.equal(stored.packed, weight.packed)


def test_blocks_of_zeros_stay_zeros():
    for format in KINDS:
        weight = random_weight(format, 32, 2, 0)
        weight.scales[:, 0] = 0
        packed, scales, offsets = as_read(in_blocks(weight))
        encoding = "float32" if offsets is None else "float32_offsets"
        parts = scales if offsets is None else torch.cat([scales, offsets], dim=-1)
        found = QuantizedTensor(packed, parts, weight.shape, format, 32, encoding, "imported")
        assert torch.equal(found.dequantize(), weight.dequantize()), format


def test_what_is_not_exact_is_told():
    for form, words in (
        (CodedForm("nf4", 64, "float16", "absmax"), "levels of nf4"),
        (CodedForm("q4_0", 16, "float16", "absmax"), "block_size=16"),
        (CodedForm("q4_0", 96, "float16", "absmax"), None),
        (CodedForm("q4_0", 32, "float16_offsets", "absmax"), "offsets"),
    ):
        reason = inexact(form, 192)
        assert reason is None if words is None else words in reason
    assert "rows of 48" in inexact(CodedForm("q4_0", 32, "float16", "absmax"), 48)
    for format, scale in (
        ("q4_0", 8 * 65536.0),
        ("iq4_nl", 1.0 + 2**-20),
        ("fp4", 5.0),
        ("fp4", -6.0),
        ("uint4", 1e-8),
    ):
        weight = random_weight(format, 32, 2, 0)
        assert in_blocks(weight) is not None
        weight.scales[1, 0] = scale
        assert in_blocks(weight) is None, (format, scale)
    largest = random_weight("fp4", 32, 1, 0)
    largest.scales[:] = torch.tensor([6 * 2.0**-126, 6 * 2.0**125, 6 * 2.0**-127])[:, None]
    assert in_blocks(largest) is not None


def test_scales_alone_are_rounded_where_levels_and_blocks_fit():
    """Float16 rounds a normal number by at most a part in 2^11."""
    weight = lowmem.quantize(torch.randn(8, 128), "q4_0", block_size=64, scales="float32")
    assert in_blocks(weight) is None
    assert nearest_format(weight) == "q4_0"
    found = nearest(weight, "q4_0")
    assert in_blocks(found) is found or torch.equal(in_blocks(found).scales, found.scales)
    exact, values = weight.dequantize(), found.dequantize()
    assert ((exact - values).abs() <= exact.abs() * 2**-11).all()


def test_other_weights_are_quantized_again_within_the_bound_of_their_new_format():
    values = torch.randn(16, 256) * torch.exp2(torch.randint(-12, 4, (16, 1)).float())
    for format in ("nf4", "int4", "bof4s", "fp4"):
        weight = lowmem.quantize(values, format)
        assert nearest_format(weight) == "iq4_nl"
        found = nearest(weight, "iq4_nl")
        assert in_blocks(found) is not None
        before = weight.dequantize()
        fresh = lowmem.quantize(before / 128, "iq4_nl", block_size=32, scales="float16")
        assert ((before - found.dequantize()).abs() <= 128 * fresh.error_bound()).all()
    with pytest.raises(ValueError, match="rows of 48"):
        nearest_format(lowmem.quantize(torch.randn(2, 48), "nf4"))
    huge = lowmem.quantize(torch.full((1, 32), 1e30), "q4_0", scales="float32")
    assert nearest_format(huge) == "iq4_nl"
    with pytest.raises(ValueError, match="float16"):
        nearest(huge, "iq4_nl")


def test_weights_in_8_bits_become_those_of_q8_0_within_half_a_step():
    """Float16 rounds a scale by at most a part in 2^11, or 2^-25, and the largest code is cut by what it lacks."""
    values = torch.randn(16, 256) * torch.exp2(torch.randint(-12, 4, (16, 1)).float())
    values[3, 32:64] = 0
    weight = lowmem.quantize(values, "int8")
    found, raw = eight_bit_rows(weight)
    blocks = raw.view(16, -1, BLOCKS[EIGHT_BIT].nbytes)
    assert torch.equal(BLOCKS[EIGHT_BIT].dense(blocks).flatten(1), found)
    scales = blocks[..., :2].clone().view(torch.float16).float()
    error = (found - weight.dequantize()).view(16, -1, 32).abs()
    assert (error <= (scales / 2 + 127 * (scales * 2**-11).clamp_min(2**-25)) * (1 + 2**-20)).all()
    assert error.max() > 0.3 * scales.max()
    with pytest.raises(ValueError, match="beyond the scales of Q8_0"):
        eight_bit_rows(lowmem.quantize(torch.full((1, 32), 1e30), "int8", scales="float32"))


def test_the_errors_on_the_page_are_those_of_normal_weights():
    page = (Path(__file__).parents[4] / "docs" / "guides" / "llama-cpp.md").read_text(encoding="utf8")
    shown = dict(re.findall(r'^\| `"(\w+)"` \|.* ([\d.]+) \|$', page, re.MULTILINE))
    weight = torch.randn(256, 1024)
    for format, error in shown.items():
        assert lowmem.quantize(weight, format).dequantize().sub(weight).norm() / weight.norm() == pytest.approx(
            float(error), abs=1e-3
        )
    assert len(shown) == 3
    stored = lowmem.quantize(weight, "nf4")
    added = (nearest(stored, "iq4_nl").dequantize() - stored.dequantize()).norm() / stored.dequantize().norm()
    assert f"({float(added):.3f} for nf4)" in page


ENCODINGS = {"uint4": "float32_offsets", "iq4_nl": "float32"}


def read(format, raw):
    """Return the weight of raw blocks, uint8 (rows, blocks, bytes)."""
    block = BLOCKS[SUPERBLOCKS[format]]
    scales = block.scales(raw).flatten(1)
    parts = scales if block.offsets is None else torch.cat([scales, block.offsets(raw).flatten(1)], dim=-1)
    packed = block.packed(raw).flatten(1)
    shape = torch.Size((len(raw), 2 * packed.shape[1]))
    return QuantizedTensor(packed, parts, shape, format, 32, ENCODINGS[format], "imported")


def random_blocks(format, rows, blocks, seed, least=-30):
    """Return random bytes, whose float16 numbers are finite, of either sign, some zero or subnormal."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(
        0, 256, (rows, blocks, BLOCKS[SUPERBLOCKS[format]].nbytes), generator=generator, dtype=torch.uint8
    )
    for at in (0, 2) if format == "uint4" else (0,):
        sizes = torch.exp2(torch.randint(least, 8, (rows, blocks, 1), generator=generator).float())
        d = (torch.randn(rows, blocks, 1, generator=generator) * sizes).half()
        raw[..., at : at + 2] = d.view(torch.uint8)
    return raw


@given(st.sampled_from([*SUPERBLOCKS]), strategies.few_rows, st.integers(1, 3), st.integers(0, 2**31))
def test_superblocks_keep_codes_scales_and_offsets(format, rows, blocks, seed):
    weight = read(format, random_blocks(format, rows, blocks, seed))
    written = superblock_rows(weight)
    found = read(format, written.view(rows, blocks, -1))
    assert torch.equal(found.packed, weight.packed)
    assert torch.equal(found.scales, weight.scales)


def test_the_largest_factor_gives_the_bytes_of_llama_cpp():
    """Its quantizers give the largest scale of a superblock the factor 63, or -32."""
    for format in SUPERBLOCKS:
        raw = random_blocks(format, 4, 2, 0, least=-4)
        if format == "uint4":
            raw[..., 4], raw[..., 8] = raw[..., 4] | 63, raw[..., 8] | 63
        else:
            raw[..., 4], raw[..., 2] = raw[..., 4] & 0xF0, raw[..., 2] & 0xFC  # 0 - 32
        assert torch.equal(superblock_rows(read(format, raw)), raw.flatten(1))


def test_other_scales_are_no_superblocks():
    for format in SUPERBLOCKS:
        weight = read(format, random_blocks(format, 2, 2, 0))
        for column in (0, -1):
            changed = weight.scales.clone()
            changed[1, column] *= 1 + 2**-20
            assert superblock_rows(replace(weight, scales=changed)) is None
    for format, columns, fits in (("iq4_nl", 128, False), ("q4_0", 256, False), ("uint4", 256, True)):
        packed, scales = torch.zeros(2, columns // 2).byte(), torch.ones(2, columns // 32)
        weight = QuantizedTensor(packed, scales, torch.Size((2, columns)), format, 32, "float32", "imported")
        assert (superblock_rows(weight) is not None) == fits
