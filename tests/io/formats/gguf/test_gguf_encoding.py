"""Blocks of GGUF: written from codes and scales of lowmem, and read back by the reader of GGUF."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import lowmem
from lowmem.io.formats.code_conversion import imported_quantized_tensor
from lowmem.io.formats.gguf.gguf_block_types import BLOCKS, KINDS, SUPERBLOCKS
from lowmem.io.formats.gguf.gguf_encoding import (
    block_row_bytes,
    exact_blocks_of_32_or_none,
    form_mismatch_reason_or_none,
    nearest_gguf_format,
    nearest_gguf_weight,
    superblock_row_bytes_or_none,
)
from lowmem.nn.forms import CodedForm
from lowmem.quant.formats import get_format
from lowmem.quant.packing import pack
from lowmem.quant.tensor import QuantizedTensor
from tests import strategies


def random_weight(format, size, blocks, seed, encoding="float32"):
    """Return a weight of random codes, of scales and offsets that its type holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    columns = 32 * blocks
    bits = get_format(format).bits
    codes = torch.randint(0, 2**bits, (3, columns), generator=generator, dtype=torch.uint8)
    count = -(-columns // size)
    sizes = torch.exp2(torch.randint(-20, 10, (3, count), generator=generator).float())
    d = (torch.randn(3, count, generator=generator) * sizes).half().float()
    if format == "fp4":
        d = torch.exp2(torch.randint(-125, 125, (3, count), generator=generator).float())
    scales = d * (BLOCKS[KINDS[format]].divisor or 6.0)
    if encoding.endswith("_offsets"):
        scales = torch.cat([scales, torch.randn(3, count, generator=generator).half().float()], dim=-1)
    packed = pack(codes, size) if bits == 4 else codes
    return QuantizedTensor(packed, scales, torch.Size((3, columns)), format, size, encoding, "imported")


def read(kind, raw):
    """Return the weight of blocks of a type, uint8 (rows, bytes), as the reader has it."""
    block = BLOCKS[kind]
    raw = raw.view(len(raw), -1, block.nbytes)
    parts = [block.decoded_block_scales(raw), *([] if block.offsets is None else [block.offsets(raw)])]
    packed, scales = block.packed(raw).flatten(1), torch.cat([part.flatten(1) for part in parts], dim=-1)
    columns = packed.shape[1] * 8 // get_format(block.format).bits
    shape, encoding = torch.Size((len(raw), columns)), "float32_offsets" if parts[1:] else "float32"
    return QuantizedTensor(packed, scales, shape, block.format, 32, encoding, "imported")


def as_read(weight):
    return read(KINDS[weight.format], block_row_bytes(weight))


@given(
    format=st.sampled_from([*KINDS]),
    size=st.sampled_from([32, 64, 128, 4096]),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_codes_and_scales_come_back_as_they_were(format, size, blocks, seed):
    encoding = "float32_offsets" if format == "uint4" else "float32"
    weight = random_weight(format, size, blocks, seed, encoding)
    assert form_mismatch_reason_or_none(CodedForm.from_quantized_tensor(weight), weight.shape[-1]) is None
    stored = exact_blocks_of_32_or_none(weight)
    assert torch.equal(stored.dequantize(), weight.dequantize())
    found = as_read(stored)
    assert torch.equal(found.scales, stored.scales)
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert format == "fp4" or torch.equal(found.packed, stored.packed)  # ggml has no -0
    if size == 32:
        assert torch.equal(stored.packed, weight.packed)


def test_blocks_of_zeros_stay_zeros():
    for format in KINDS:
        weight = random_weight(format, 32, 2, 0)
        weight.scales[:, 0] = 0
        assert torch.equal(as_read(exact_blocks_of_32_or_none(weight)).dequantize(), weight.dequantize()), format


def test_what_is_not_exact_is_told():
    for form, words in (
        (CodedForm("nf4", 64, "float16", "absmax"), "levels of nf4"),
        (CodedForm("q4_0", 16, "float16", "absmax"), "block_size=16"),
        (CodedForm("q4_0", 96, "float16", "absmax"), None),
        (CodedForm("q4_0", 32, "float16_offsets", "absmax"), "offsets"),
        (CodedForm("int8", 32, "float16", "absmax"), "levels of int8"),
        (CodedForm("q8_0", 16, "float16", "absmax"), "block_size=16"),
    ):
        reason = form_mismatch_reason_or_none(form, 192)
        assert reason is None if words is None else words in reason
    assert "rows of 48" in form_mismatch_reason_or_none(CodedForm("q4_0", 32, "float16", "absmax"), 48)
    for format, scale in (
        ("q4_0", 8 * 65536.0),
        ("iq4_nl", 1.0 + 2**-20),
        ("fp4", 5.0),
        ("fp4", -6.0),
        ("uint4", 1e-8),
        ("q8_0", 65536.0),
    ):
        weight = random_weight(format, 32, 2, 0)
        assert exact_blocks_of_32_or_none(weight) is not None
        weight.scales[1, 0] = scale
        assert exact_blocks_of_32_or_none(weight) is None, (format, scale)
    largest = random_weight("fp4", 32, 1, 0)
    largest.scales[:] = torch.tensor([6 * 2.0**-126, 6 * 2.0**125, 6 * 2.0**-127])[:, None]
    assert exact_blocks_of_32_or_none(largest) is not None


def test_scales_alone_are_rounded_where_levels_and_blocks_fit():
    """Float16 rounds a normal number by at most a part in 2^11."""
    weight = lowmem.quantize(torch.randn(8, 128), "q4_0", block_size=64, scales="float32")
    assert exact_blocks_of_32_or_none(weight) is None
    assert nearest_gguf_format(weight) == "q4_0"
    found = nearest_gguf_weight(weight, "q4_0")
    assert exact_blocks_of_32_or_none(found) is found or torch.equal(
        exact_blocks_of_32_or_none(found).scales, found.scales
    )
    exact, values = weight.dequantize(), found.dequantize()
    assert ((exact - values).abs() <= exact.abs() * 2**-11).all()


def test_other_weights_are_quantized_again_within_the_bound_of_their_new_format():
    values = torch.randn(16, 256) * torch.exp2(torch.randint(-12, 4, (16, 1)).float())
    for format in ("nf4", "int4", "bof4s", "fp4"):
        weight = lowmem.quantize(values, format)
        assert nearest_gguf_format(weight) == "iq4_nl"
        found = nearest_gguf_weight(weight, "iq4_nl")
        assert exact_blocks_of_32_or_none(found) is not None
        before = weight.dequantize()
        fresh = lowmem.quantize(before / 128, "iq4_nl", block_size=32, scales="float16")
        assert ((before - found.dequantize()).abs() <= 128 * fresh.error_bound()).all()
    with pytest.raises(ValueError, match="rows of 48"):
        nearest_gguf_format(lowmem.quantize(torch.randn(2, 48), "nf4"))
    huge = lowmem.quantize(torch.full((1, 32), 1e30), "q4_0", scales="float32")
    assert nearest_gguf_format(huge) == "iq4_nl"
    with pytest.raises(ValueError, match="float16"):
        nearest_gguf_weight(huge, "iq4_nl")


def test_weights_in_8_bits_become_those_of_q8_0_within_its_bound():
    values = torch.randn(16, 256) * torch.exp2(torch.randint(-12, 4, (16, 1)).float())
    values[3, 32:64] = 0
    weight = lowmem.quantize(values, "int8")
    assert nearest_gguf_format(weight) == "q8_0"
    found = nearest_gguf_weight(weight, "q8_0")
    assert torch.equal(as_read(found).dequantize(), found.dequantize())
    fresh = lowmem.quantize(weight.dequantize(), "q8_0")
    assert ((weight.dequantize() - found.dequantize()).abs() <= fresh.error_bound()).all()
    with pytest.raises(ValueError, match="above 8.31901e\\+06, the most that scales='float16' can hold"):
        nearest_gguf_weight(lowmem.quantize(torch.full((1, 32), 1e30), "int8", scales="float32"), "q8_0")


def test_every_scale_and_code_of_q8_0_has_the_bits_of_ggml_and_comes_back():
    """ggml: d * q in float32, of a float16 and an int8."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    d = bits[bits.view(torch.float16).isfinite()].view(torch.float16)
    q = torch.arange(-128, 128, dtype=torch.int8)
    heads = d.view(-1, 1, 1).expand(-1, 8, 1).contiguous().view(torch.uint8)  # (scales, 8 blocks, 2)
    tails = q.view(torch.uint8).view(1, 8, 32).expand(len(d), -1, -1)
    raw, block = torch.cat([heads, tails], dim=-1), BLOCKS[KINDS["q8_0"]]
    packed, scales = block.packed(raw).flatten(1), block.decoded_block_scales(raw).flatten(1)
    weight = imported_quantized_tensor(packed, scales, (len(d), 256), block.format, 32)
    assert weight.scale_encoding == "float16"
    assert weight.nbytes == raw.numel()
    expected = d.float()[:, None] * q.float()
    for kernel in lowmem.kernels.available_cpu_backend_names():
        with lowmem.kernels.temporary_cpu_backend(kernel):
            assert torch.equal(weight.dequantize().view(torch.int32), expected.view(torch.int32))
    assert torch.equal(block_row_bytes(exact_blocks_of_32_or_none(weight)), raw.flatten(1))
    for broken in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="8 scales that are NaN, infinite"):
            imported_quantized_tensor(packed[:1], torch.full((1, 8), broken), (1, 256), block.format, 32)


OWN = ["q4_0", "iq4_nl", "q8_0"]


def test_the_divisors_of_scales_are_those_of_the_formats():
    for format, kind in KINDS.items():
        assert (BLOCKS[kind].divisor or 1.0) == get_format(format).ggml_divisor


@given(strategies.weights(views=False, max_exponent=12), st.sampled_from(OWN), st.sampled_from([32, 64]))
@example(torch.full((1, 32), 1e-3), "iq4_nl", 32)
@example(torch.full((1, 32), 1e-5), "q4_0", 32)
@example(torch.full((1, 32), 65504.0), "iq4_nl", 32)
def test_own_weights_have_a_type_of_gguf_whatever_their_size(weight, format, size):
    """ggml stores a scale divided by 8 or 128 in float16, where small ones are subnormal."""
    rows = weight.reshape(-1, weight.shape[-1])
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 32))
    assume(format == "q8_0" or float(rows.abs().max()) <= 65504)
    stored = lowmem.quantize(rows, format, block_size=size)
    found = as_read(exact_blocks_of_32_or_none(stored))
    assert torch.equal(found.dequantize(), stored.dequantize())
    assert ((rows.double() - stored.dequantize()).abs() <= stored.error_bound()).all()
    with lowmem.kernels.temporary_cpu_backend("reference"):
        again = lowmem.quantize(rows, format, block_size=size)
    assert torch.equal(again.packed, stored.packed)
    assert torch.equal(again.scales, stored.scales)


@pytest.mark.parametrize("format", OWN[:2])
def test_small_weights_that_are_calibrated_have_a_type_of_gguf(format):
    layer = torch.nn.Linear(64, 32, bias=False)
    layer.weight.data.mul_(1e-3)
    model = lowmem.calibrate(torch.nn.Sequential(layer), [torch.randn(64, 64)], lowmem.FourBit(format))
    assert model[0].quantized.method == "calibrated"
    assert exact_blocks_of_32_or_none(model[0].quantized) is not None


def test_the_error_on_the_page_is_that_of_normal_weights():
    page = (Path(__file__).parents[4] / "docs" / "guides" / "llama-cpp.md").read_text(encoding="utf8")
    stored = lowmem.quantize(torch.randn(256, 1024), "nf4")
    added = (
        nearest_gguf_weight(stored, "iq4_nl").dequantize() - stored.dequantize()
    ).norm() / stored.dequantize().norm()
    assert f"({float(added):.3f} for nf4)" in page


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
    weight = read(SUPERBLOCKS[format], random_blocks(format, rows, blocks, seed).flatten(1))
    found = read(SUPERBLOCKS[format], superblock_row_bytes_or_none(weight))
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
        raw = raw.flatten(1)
        assert torch.equal(superblock_row_bytes_or_none(read(SUPERBLOCKS[format], raw)), raw)


def test_other_scales_are_no_superblocks():
    for format in SUPERBLOCKS:
        weight = read(SUPERBLOCKS[format], random_blocks(format, 2, 2, 0).flatten(1))
        for column in (0, -1):
            changed = weight.scales.clone()
            changed[1, column] *= 1 + 2**-20
            assert superblock_row_bytes_or_none(replace(weight, scales=changed)) is None
    for format, columns, fits in (("iq4_nl", 128, False), ("q4_0", 256, False), ("uint4", 256, True)):
        packed, scales = torch.zeros(2, columns // 2).byte(), torch.ones(2, columns // 32)
        weight = QuantizedTensor(packed, scales, torch.Size((2, columns)), format, 32, "float32", "imported")
        assert (superblock_row_bytes_or_none(weight) is not None) == fits
