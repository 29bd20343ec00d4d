"""compressed-tensors: what is written comes back with the same codes and scales; what is not exact is refused."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowmem import quantize
from lowmem.errors import FileError
from lowmem.io.formats.code_conversion import largest_block_size_dividing_rows, unpacked_codes
from lowmem.io.formats.compressed_tensors import pack_exactly, packed_and_requantized
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.quant.packing import pack as pack_codes
from lowmem.quant.scale_encodings import ENCODINGS
from lowmem.quant.scale_search import CANDIDATES
from lowmem.quant.tensor import QuantizedTensor
from tests import strategies
from tests.io.formats.test_open_foreign import values_of
from tests.io.formats.written import as_read, opened, same_bits, sizes, words
from tests.rounding import default_dtype

SAMPLES = Path(__file__).parent / "samples"
INT4, MXFP4 = (load_file(SAMPLES / f"compressed-tensors-{kind}.safetensors") for kind in ("int4", "mxfp4"))
SHAPE, SCALE, PACKED, ZEROS, G_IDX = (
    f"layer.weight_{part}" for part in ("shape", "scale", "packed", "zero_point", "g_idx")
)


@contextmanager
def layer(folder, parts, config=None):
    """Write a folder, and open its only weight."""
    with opened(folder, parts, config and {"quant_method": "compressed-tensors", **config}) as file:
        (tensor,) = file.tensors.values()
        assert tensor.name == "layer.weight"
        yield tensor


def refused(folder, message, parts, config=None):
    with pytest.raises(FileError, match=message), layer(folder, parts, config):
        pass


def scheme(**weights):
    return {"config_groups": {"group_0": {"weights": weights}}}


def test_rows_of_any_length_and_a_scale_for_each_row(tmp_path):
    """compressed-tensors pads a row to whole words."""
    for columns, groups in ((44, 1), (64, 1), (64, 4)):
        codes, scales = torch.randint(0, 16, (3, columns)), torch.randn(3, groups)
        padded = torch.nn.functional.pad(codes, (0, -columns % 8))
        with layer(tmp_path, {PACKED: words(padded), SCALE: scales, SHAPE: torch.tensor([3, columns])}) as tensor:
            expected = (codes - 8).float() * scales.repeat_interleave(columns // groups, 1)
            assert torch.equal(tensor.read().dequantize(), expected)


def test_what_is_not_exact_is_refused(tmp_path):
    uneven = torch.tensor([0] * 31 + [1] * 33).int().flip(0)
    one_scale = {PACKED: torch.zeros(4, 2, dtype=torch.int32), SHAPE: torch.tensor([4, 8]), SCALE: torch.ones(1)}
    for message, changed in (
        ("8 bits", {**INT4, PACKED: INT4[PACKED].repeat(1, 2)}),
        ("do not have 32 columns", {**INT4, G_IDX: uneven}),
        ("do not have 32 columns each", {**INT4, G_IDX: uneven.flip(0)}),
        ("8-bit floats", {**MXFP4, SCALE: MXFP4[SCALE].float().to(torch.float8_e4m3fn)}),
        ("no blocks", {**INT4, SCALE: torch.ones(16, 16)}),
        ("it has one scale for the tensor", one_scale),
    ):
        with layer(tmp_path, changed) as tensor:
            assert message in tensor.refusal


def test_zero_points_are_offsets_and_exact_for_scales_of_16_bits(tmp_path):
    zeros = torch.randint(0, 16, (16, 2))
    packed = words(zeros.T.contiguous()).T.contiguous()
    codes = INT4[PACKED].view(torch.uint8)
    codes = torch.stack([codes & 15, codes >> 4], -1).view(16, 64)
    less = codes.int() - zeros.repeat_interleave(32, 1)
    for scales in (INT4[SCALE].half(), INT4[SCALE].bfloat16(), INT4[SCALE]):
        expected = less.float() * scales.float().repeat_interleave(32, 1)
        with layer(tmp_path, {**INT4, SCALE: scales, ZEROS: packed}) as tensor:
            if scales.dtype == torch.float32:
                assert "more bits than float32" in tensor.refusal
                assert torch.equal(tensor.values(), expected)
            else:
                assert tensor.read().format == "uint4"
                assert torch.equal(tensor.read().dequantize(), expected)
    stacked = {name: part[None].repeat(3, *[1] * part.dim()) for name, part in INT4.items()}  # experts
    stacked |= {SHAPE: torch.tensor([3, 16, 64]), SCALE: stacked[SCALE].half(), ZEROS: packed[None].repeat(3, 1, 1)}
    expected = less.float() * INT4[SCALE].half().float().repeat_interleave(32, 1)
    with layer(tmp_path, stacked) as tensor:
        assert torch.equal(tensor.read().dequantize(), expected.expand(3, -1, -1))
    refused(tmp_path, "do not fit", {**INT4, ZEROS: packed[:1].contiguous()})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_8_bits_are_refused_by_name_and_have_values(tmp_path, groups, zeros, form):
    codes = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    scales, points = torch.rand(16, groups), torch.randint(-128, 128, (16, groups), dtype=torch.int8)
    expected = codes.int() - (points.int() if zeros else 0 * points.int()).repeat_interleave(64 // groups, 1)
    expected = expected.float() * scales.repeat_interleave(64 // groups, 1)

    def four(numbers):  # in a word
        return (numbers.int() + 128).to(torch.uint8).clone(memory_format=torch.contiguous_format).view(torch.int32)

    if form == "int-quantized":
        parts = {"layer.weight": codes, ZEROS: points}
    else:
        parts = {PACKED: four(codes), SHAPE: torch.tensor([16, 64]), ZEROS: four(points.T).T.contiguous()}
    if not zeros:
        del parts[ZEROS]
    parts[SCALE] = scales
    refused(tmp_path, "says num_bits=4, and its tensors have 8", parts, {"format": form, **scheme(num_bits=4)})
    with layer(tmp_path, parts, {"format": form, **scheme(num_bits=8)}) as tensor:
        assert (tensor.kind, tensor.shape) == ("compressed-tensors int8", (16, 64))
        assert "it has 8 bits a weight, and 4 are kept" in tensor.refusal
        assert torch.equal(tensor.values(), expected)


def test_a_scale_for_the_whole_tensor_of_8_bits(tmp_path):
    weight = torch.randint(-128, 128, (4, 8), dtype=torch.int8)
    for shape in ((1,), (1, 1)):
        with layer(tmp_path, {"layer.weight": weight, SCALE: torch.full(shape, 0.5)}) as tensor:
            assert torch.equal(tensor.values(), weight / 2)
    for scale in (torch.ones(3, 1), torch.ones(4, 3), torch.ones(4, 1).int(), torch.ones(()), torch.ones(4, 0)):
        refused(tmp_path, "do not fit", {"layer.weight": weight, SCALE: scale})


def test_parts_that_do_not_fit_are_refused(tmp_path):
    for changed in (
        {**INT4, SHAPE: torch.tensor([16, 2**40])},
        {**INT4, SHAPE: torch.tensor([15, 64])},
        {**INT4, SHAPE: torch.tensor([64])},
        {**INT4, SCALE: torch.ones(15, 2)},
        {**INT4, SCALE: torch.ones(16, 3)},
        {**INT4, SCALE: torch.ones(16)},
        {**INT4, PACKED: INT4[PACKED].float()},
        {**MXFP4, SCALE: MXFP4[SCALE][:, :1].contiguous()},
        {PACKED: INT4[PACKED]},
    ):
        refused(tmp_path, "do not fit|lacks|says its shape", changed)


def test_groups_in_the_order_of_activations_are_read_side_by_side(tmp_path):
    groups = (torch.randperm(64) // 32).int()
    with layer(tmp_path, INT4) as tensor:
        codes = tensor.read().dequantize() / INT4[SCALE].float().repeat_interleave(32, -1)
    with layer(tmp_path, {**INT4, G_IDX: groups}) as tensor:
        torch.testing.assert_close(values_of(tensor), codes * INT4[SCALE].float()[:, groups.long()])


def test_8_bit_floats_are_refused_by_name(tmp_path):
    weight, scale = torch.ones(16, 64).to(torch.float8_e4m3fn), torch.ones(16, 1)
    channel = {"format": "float-quantized", **scheme(num_bits=8, type="float", strategy="channel")}
    with layer(tmp_path, {"layer.weight": weight, SCALE: scale}, channel) as tensor:
        assert (tensor.kind, tensor.shape, tensor.values) == ("FP8", (16, 64), None)
        with pytest.raises(FileError, match="'layer.weight' in FP8 cannot be kept exactly: it has 8 bits a weight"):
            tensor.read()
    message = "says format='float-quantized', and its tensors are in compressed-tensors"
    refused(tmp_path, message, INT4, {"format": "float-quantized"})
    message = "'layer.weight_scale_inv' belongs to a format that lowmem does not read"
    refused(tmp_path, message, {"layer.weight": weight, f"{SCALE}_inv": scale})


def test_a_scheme_that_8_bit_integers_and_mxfp4_do_not_have_is_refused(tmp_path):
    plain = {"layer.weight": torch.ones(16, 64, dtype=torch.int8)}
    whole, rows = {**plain, SCALE: torch.ones(1)}, {**plain, SCALE: torch.ones(16, 1)}
    for parts, fields, wrong in (
        (rows, {"num_bits": 8, "strategy": "channel"}, None),
        (rows, {"num_bits": 8, "strategy": "channel", "group_size": 32}, "group_size=32"),
        (rows, {"num_bits": 8, "strategy": "tensor"}, "strategy='tensor'"),
        (whole, {"num_bits": 8, "strategy": "tensor"}, None),
        (whole, {"num_bits": 8, "strategy": "channel"}, "strategy='channel'"),
        (MXFP4, {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, None),
        (MXFP4, {"num_bits": 4, "type": "int"}, "type='int'"),
        (MXFP4, {"num_bits": 4, "type": "float", "group_size": 16}, "group_size=16"),
    ):
        if wrong is not None:
            refused(tmp_path, f"config.json says {wrong}, and ", parts, scheme(**fields))
        else:
            with layer(tmp_path, parts, scheme(**fields)):
                pass


def mxfp4(rows: int, columns: int, block: int, seed: int) -> QuantizedTensor:
    """Return random codes, with scales that are 6 times powers of two, or 0."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(0, 253, (rows, -(-columns // block)), generator=generator)
    scales = (6 * torch.exp2(exponents.double() - 127)).float()
    scales *= torch.randint(0, 4, scales.shape, generator=generator) > 0
    return QuantizedTensor(pack_codes(codes, block), scales, codes.shape, "fp4", block, "float32", "imported")


@given(
    sizes(8),
    strategies.few_rows,
    st.sampled_from(sorted(ENCODINGS)),
    st.sampled_from([kind for kind in strategies.KINDS if kind != "subnormal"]),
    strategies.seeds,
)
def test_integers_keep_codes_scales_and_values(tmp_path_factory, size, rows, scales, kind, seed):
    columns, block = size
    weight = strategies.make_weight(kind, (rows, columns), 0, seed)
    stored = quantize(weight, "q4_0", block_size=block, scales=scales)
    packed = pack_exactly(stored, torch.float32)
    found = as_read(packed, tmp_path_factory.mktemp("packed") / "a.safetensors")
    assert torch.equal(unpacked_codes(found), unpacked_codes(stored))
    assert torch.equal(found.dequantize(), stored.dequantize())
    if block == found.block_size:
        assert torch.equal(found.packed, stored.packed)
        assert torch.equal(found.encoding.decode(found.scales), stored.encoding.decode(stored.scales))


@given(sizes(32), strategies.few_rows, strategies.seeds)
def test_mxfp4_keeps_codes_scales_and_values_with_the_signs_of_zeros(tmp_path_factory, size, rows, seed):
    columns, block = size
    stored = mxfp4(rows, columns, block, seed)
    found = as_read(pack_exactly(stored, torch.bfloat16), tmp_path_factory.mktemp("packed") / "a.safetensors")
    assert (found.format, found.block_size) == ("fp4", 32)
    assert same_bits(found.dequantize(), stored.dequantize())
    kept = stored.scales.repeat_interleave(block, -1)[:, :columns] != 0
    assert torch.equal(unpacked_codes(found)[kept], unpacked_codes(stored)[kept])


@given(sizes(8), strategies.few_rows, st.sampled_from([torch.float16, torch.bfloat16]), strategies.seeds)
def test_zero_points_keep_codes_scales_and_values(tmp_path_factory, size, rows, dtype, seed):
    columns, block = size
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    count = -(-columns // block)
    scales = (torch.randn(rows, count, generator=generator) + 2).to(dtype).float()
    scales *= torch.randint(0, 4, scales.shape, generator=generator) > 0
    zeros = torch.randint(0, 16, scales.shape, generator=generator).float()
    parts = torch.cat([16 * scales, -zeros * scales], dim=-1)
    stored = QuantizedTensor(
        pack_codes(codes, block), parts, codes.shape, "uint4", block, "float32_offsets", "imported"
    )
    for own in (dtype, torch.float32):
        packed = pack_exactly(stored, own)
        assert packed.scheme == ("pack-quantized", largest_block_size_dividing_rows(stored), False)
        path = tmp_path_factory.mktemp("packed") / "a.safetensors"
        if own == torch.float32:  # in which the product with a zero point is exact for such scales
            packed = replace(packed, parts={**packed.parts, "weight_scale": packed.parts["weight_scale"].to(dtype)})
        found = as_read(packed, path)
        assert torch.equal(unpacked_codes(found), codes)
        assert torch.equal(found.dequantize(), stored.dequantize())


@pytest.mark.parametrize("kind", ["int4", "asymmetric", "mxfp4"])
def test_what_compressed_tensors_wrote_is_written_with_the_same_bytes(kind):
    written = load_file(SAMPLES / f"compressed-tensors-{kind}.safetensors")
    with open_foreign_checkpoint(SAMPLES / f"compressed-tensors-{kind}.safetensors") as file:
        weight = file.tensors["layer.weight"].read()
    dtype = {"int4": torch.float32, "asymmetric": torch.float16, "mxfp4": torch.bfloat16}[kind]
    packed = pack_exactly(weight, dtype)
    assert written.keys() == {f"layer.{name}" for name in packed.parts}
    for name, part in packed.parts.items():
        assert torch.equal(part, written[f"layer.{name}"]), name
        assert part.dtype == written[f"layer.{name}"].dtype


def test_what_it_cannot_hold_says_why():
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    for stored, dtype, why in (
        (quantize(weight, "nf4"), torch.float32, "levels are those of nf4"),
        (quantize(weight, "q4_0", scales="float32_offsets"), torch.float32, "have offsets"),
        (quantize(weight, "uint4", scales="float16_offsets"), torch.float16, "a whole zero point"),
        (quantize(weight, "q4_0"), torch.bfloat16, "of its 12 scales are no numbers of bfloat16"),
        (quantize(weight * 1e-7, "q4_0", scales="float32"), torch.float16, "are no numbers of float16"),
        (quantize(weight * 1e-38, "q4_0", scales="float32"), torch.float32, "are no numbers of float32"),
        (quantize(weight, "fp4"), torch.bfloat16, "of its 12 scales are not 6 times a power of two"),
        (quantize(-weight, "fp4", block_size=16), torch.bfloat16, "have no blocks of 32"),
        (mxfp4(4, 96, 32, 0), torch.float16, "the model computes in float16"),
        (of_scales("fp4", 6 * 2.0**-127, 6 * 2.0**-128, 0), torch.bfloat16, "^1 of its 3 scales are not 6 times"),
        (of_scales("uint4", *[16 * (1 + 2**-23)] * 2, -15 * (1 + 2**-23), 0), torch.float32, "^2 of its 2 offsets"),
        (of_scales("uint4", *[16] * 4, 0, -15, -16, 1), torch.float32, "^2 of its 4 offsets are no scale times"),
        (of_scales("uint4", 0, 0, 0, 1), torch.float32, "^1 of its 2 offsets are no scale times a whole zero point"),
    ):
        with pytest.raises(ValueError, match=why):
            pack_exactly(stored, dtype)
    stored = QuantizedTensor.empty(torch.Size((1, 160)), "q4_0", 32, "float32", "imported", device="cpu")
    stored.scales[:] = 8 * torch.tensor([1.0, 1 + 2**-9, 1 + 3 * 2**-9, 2.0, 0.5])  # exact, rounded down, and up
    with pytest.raises(ValueError, match="^2 of its 5 scales are no numbers of bfloat16"):
        pack_exactly(stored, torch.bfloat16)
    # Blocks of zeros have an exponent, and a zero point, of 1 and of no shift.
    assert pack_exactly(of_scales("fp4", 6, 0), torch.bfloat16).parts["weight_scale"].tolist() == [[127, 127]]
    shifts = pack_exactly(of_scales("uint4", 16, 0, -3, 0), torch.float32).parts["weight_zero_point"]
    assert shifts.bitwise_and(15).tolist() == [[3, 8]]


def of_scales(name: str, *parts: float) -> QuantizedTensor:
    """Return a row in blocks of 32; the second half of the parts of "uint4" are offsets."""
    columns, encoding = (16, "float32_offsets") if name == "uint4" else (32, "float32")
    shape = torch.Size((1, columns * len(parts)))
    stored = QuantizedTensor.empty(shape, name, 32, encoding, "imported", device="cpu")
    stored.packed.zero_()
    stored.scales[:] = torch.tensor(parts)
    return stored


@given(
    strategies.few_rows,
    st.integers(1, 70),
    st.sampled_from(["nf4", "fp4", "q4_0"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(strategies.KINDS),
    strategies.seeds,
)
def test_quantizing_again_takes_any_shape_and_says_what_the_values_become(
    tmp_path_factory, rows, columns, name, dtype, kind, seed
):
    weight = strategies.make_weight(kind, (rows, columns), 0, seed)
    stored = quantize(weight, name, block_size=32)
    values = stored.dequantize()
    packed, after = packed_and_requantized(values, dtype, stored)
    assert (packed.kind == "MXFP4") == (name == "fp4" and dtype == torch.bfloat16 and columns % 32 == 0)
    shaped = QuantizedTensor.empty(stored.shape, name, 32, stored.scale_encoding, stored.method, device="meta")
    empty, _ = packed_and_requantized(values.to("meta"), dtype, shaped)
    assert {name: (part.shape, part.dtype) for name, part in packed.parts.items()} == {
        name: (part.shape, part.dtype) for name, part in empty.parts.items()
    }
    assert (packed.kind, packed.scheme) == (empty.kind, empty.scheme)
    found = after if isinstance(after, torch.Tensor) else after.dequantize()
    if packed.parts["weight_packed"].dtype == torch.uint8 or (packed.scheme[1] % 2 == 0 and packed.scheme[1] >= 8):
        read = as_read(packed, tmp_path_factory.mktemp("packed") / "a.safetensors")
        assert torch.equal(read.dequantize(), found)
    # A searched scale clips the largest weight, to 7/8 of min(CANDIDATES) at the worst (MXFP4: to 6/8), and rounding
    # it to 16 bits moves it by 2 ** -8 of that. The smallest numbers of float16 are 2 ** -24 apart.
    clipped = max(1 - 7 / 8 * min(CANDIDATES), 1 / 4)
    assert (found - values).abs().max() <= values.abs().amax() * (clipped + 2**-8) + 8 * 2**-24


def test_mxfp4_takes_the_better_of_two_exponents_and_integers_are_as_near_as_q4_0():
    """The standard floors the exponent, which clips a quarter of the blocks; the next one may be nearer."""
    weight = torch.randn(60, 128, generator=torch.Generator().manual_seed(1))
    wide = weight * 2.0 ** torch.arange(-30, 30)[:, None]
    wide[0, :64] = torch.tensor([2.0**127, 1.5 * 2.0**127] * 32)  # the largest exponents of float32
    wide[1, :32] = 1.25 * 2.0**-126  # the least of the format: twice as much is no nearer
    wide[2, :32] = 0
    stored = quantize(wide, "fp4", scales="float32")
    values = stored.dequantize()
    packed, after = packed_and_requantized(values, torch.bfloat16, stored)
    with default_dtype(torch.bfloat16):  # of tensors without one: these have their own
        assert torch.equal(packed_and_requantized(values, torch.bfloat16, stored)[1].packed, after.packed)
    assert packed.kind == "MXFP4"
    blocks = values.double().view(60, -1, 32)
    lost = (after.dequantize().double().view(60, -1, 32) - blocks).square().sum(-1)
    largest = blocks.abs().amax(-1, keepdim=True)
    floor = (torch.frexp(largest).exponent - 3).clamp(-127, 124).double()
    grid, sums = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64), []
    for exponent in (floor, floor + 1):
        scaled = (blocks / torch.exp2(exponent)).abs()
        nearest = (scaled[..., None] - grid).abs().amin(-1) * torch.exp2(exponent)
        sums.append(nearest.square().sum(-1))
    torch.testing.assert_close(lost, torch.minimum(*sums), rtol=1e-6, atol=0)
    took = packed.parts["weight_scale"].double() - 127 - floor[..., 0]
    assert torch.equal(took[lost > 0], (sums[1] < sums[0]).double()[lost > 0])
    assert 0 < took.mean() < 1
    narrow = quantize(weight[:32, :48], "fp4", block_size=16)
    assert packed_and_requantized(narrow.dequantize(), torch.bfloat16, narrow)[0].kind == "int4, group_size=16"
    stored = quantize(weight, "nf4")
    values = stored.dequantize()
    _, after = packed_and_requantized(values, torch.float32, stored)
    own = quantize(values, "q4_0", block_size=32, scales="float32").dequantize()
    torch.testing.assert_close((after - values).norm(dim=-1), (own - values).norm(dim=-1))
    zeros = quantize(torch.zeros(1, 64), "nf4")
    packed, after = packed_and_requantized(zeros.dequantize(), torch.float32, zeros)
    assert packed.parts["weight_packed"].view(torch.uint8).eq(0x88).all()
    assert not after.any()
