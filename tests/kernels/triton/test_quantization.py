"""Rows that Triton's kernels dequantize and quantize, in its interpreter: the bits of plain torch."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FORMATS, QuantizedTensor, kernels, quantize
from lowmem.kernels import reference
from lowmem.quant.formats import EIGHT_BIT
from tests import strategies
from tests.compiled import assert_same_bytes
from tests.kernels.triton.interpreter import round_to_bfloat16
from tests.kernels.triton.legs import launches, serving

launch = launches(interpreted=True)
pytestmark = pytest.mark.usefixtures("poisoned")

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LOW = (torch.bfloat16, torch.float16)


def quantized_by_torch(weight: torch.Tensor, *arguments, **options) -> QuantizedTensor:
    with kernels.temporary_cpu_backend("reference"):
        return quantize(weight, *arguments, **options)


def check(q: QuantizedTensor, *dtypes: torch.dtype) -> None:
    """Hold dequantized rows to the bits of plain torch, signs of zeros included."""
    expected = {dtype: reference.dequantize(q, slice(None), dtype) for dtype in dtypes or (torch.float32, *LOW)}
    with serving() as backend:
        for dtype, values in expected.items():
            got = backend.dequantize(q, slice(None), dtype)
            assert got.dtype is dtype
            torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got.signbit() | got.isnan(), values.signbit() | values.isnan())


@given(
    strategies.weights(min_dims=1, max_dims=3, max_columns=300),
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
    st.booleans(),
    strategies.importance_kinds,
    dtypes,
    strategies.seeds,
)
def test_quantizing_gives_the_bytes_of_plain_torch_and_dequantizing_its_bits(
    weight, form, size, scales, search, kind, dtype, seed
):
    importance = strategies.make_importance(kind, weight.shape[-1], seed)
    options = {"block_size": size, "scales": scales, "search": search, "importance": importance}
    expected = quantized_by_torch(weight, form, **options)
    with serving():
        assert_same_bytes(quantize(weight, form, **options), expected)
    check(expected.as_matrix(), torch.float32, dtype)


@pytest.mark.parametrize("form", [*FORMATS, *EIGHT_BIT])
def test_ties_and_their_neighbours_get_the_codes_of_plain_torch(form):
    """Every boundary times a scale that is or is no power of two, and the next float32 to each side."""
    edges = torch.tensor(FORMATS[form].boundaries if form in FORMATS else EIGHT_BIT[form].boundaries)
    edges = edges[edges.isfinite()]
    rows = []
    for top in (1.0, 3.0, 0.7, 1 / 3, 5e-3, 123.4, 2.0**-100):
        ties = edges * top
        near = [torch.nextafter(ties, torch.full_like(ties, toward)) for toward in (-inf, inf)]
        end = top * EIGHT_BIT[form].top if form in EIGHT_BIT else top
        rows.append(torch.cat([ties, *near, torch.tensor([end, -0.0, 0.0])]))
    weight = torch.stack(rows)
    for scales in ("float32", "double"):
        expected = quantized_by_torch(weight, form, block_size=4096, scales=scales, search=False)
        with serving():
            assert_same_bytes(quantize(weight, form, block_size=4096, scales=scales, search=False), expected)


@pytest.mark.parametrize("form", ["nf4", "bof4s", "int8"])
@pytest.mark.parametrize("block_size", [8, 10, 16])
def test_rows_that_end_anywhere_in_a_block(form, block_size):
    """All lengths of the last block, of rows shorter and longer than a tile; its codes have a split of their own."""
    for columns in (*range(1, 2 * block_size + 2), 2 * 512 + 5, 4 * 512 - 3):
        weight = strategies.make_weight("normal", (3, columns), 0, columns)
        expected = quantized_by_torch(weight, form, block_size=block_size, scales="float16", search=False)
        with serving():
            got = quantize(weight, form, block_size=block_size, scales="float16", search=False)
            assert_same_bytes(got, expected)
        check(expected, torch.float32)


@pytest.mark.parametrize("kind", ["zeros", "zero blocks", "subnormal", "float16 subnormal", "mixed"])
def test_zero_rows_and_the_ends_of_float32(kind):
    """Blocks without a scale, weights whose scales are subnormal, and the largest float32 beside them."""
    for form, scales in (("nf4", "float32"), ("bof4s", "float32"), ("fp4", "float16"), ("bof4s", "double")):
        weight = strategies.make_weight(kind, (4, 100), 0, 3)
        if scales == "float32":
            weight[1, ::7] = torch.finfo(torch.float32).max
        weight[2:] = 0
        weight[3, [13, 18]] = 1  # alone in its block, with a high code and a low one
        expected = quantized_by_torch(weight, form, block_size=16, scales=scales)
        with serving():
            assert_same_bytes(quantize(weight, form, block_size=16, scales=scales), expected)
        check(expected)


def test_weights_that_no_scale_can_hold_are_refused_as_by_plain_torch():
    for value, says in ((nan, "1 values that are NaN"), (1e6, "above 65504")):
        weight = torch.ones(2, 16)
        weight[1, 3] = value
        with serving(), pytest.raises(ValueError, match=says):
            quantize(weight, "int4")


@pytest.mark.parametrize("dtype", LOW)
def test_dequantized_values_are_rounded_as_torch_rounds(dtype):
    """Magnitudes around every rounding: subnormal, halfway between two, beyond the largest, infinite and NaN."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(torch.rand(8, 300, generator=generator) * 260 - 149)
    halfway = torch.randint(0x3F80, 0x4080, (8, 300), generator=generator) << 16
    scales[:, 150:] = (halfway[:, 150:] | 0x8000 | torch.arange(150) % 3 - 1).int().view(torch.float32)
    scales[0, :4] = torch.tensor([inf, nan, 65519.9, 65520.0])
    q = quantized_by_torch(torch.randn(8, 2400, generator=generator), "fp4", block_size=8, scales="float32")
    check(replace(q, scales=scales), dtype)


def test_the_shim_of_the_interpreter_rounds_to_bfloat16_as_torch_does():
    bits = torch.arange(2**16)[:, None] << 16 | torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    numbers = bits.where(bits < 2**31, bits - 2**32).int().view(torch.float32)
    found = torch.from_numpy(round_to_bfloat16(numbers.numpy())).view(torch.bfloat16)
    torch.testing.assert_close(found, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scales", ["float32_offsets", "float16_offsets"])
def test_offsets_are_added_in_float32_before_the_value_is_rounded(scales):
    weight = strategies.make_weight("normal", (5, 77), 0, 1) + 3
    q = quantized_by_torch(weight, "uint4", block_size=16, scales=scales)
    check(q)
    with serving():
        assert_same_bytes(quantize(weight, "uint4", block_size=16, scales=scales), q)


def test_slices_views_and_other_levels():
    """Some rows, codes and scales that lie apart, and levels in place of the format's."""
    q = quantized_by_torch(strategies.make_weight("normal", (9, 70), 0, 2), "nf4", block_size=16, scales="double")
    wide = [torch.full((t.shape[0], 2 * t.shape[1]), 255, dtype=t.dtype) for t in (q.packed, q.scales)]
    for into, stored in zip(wide, (q.packed, q.scales), strict=True):
        into[:, ::2] = stored
    apart = replace(q, packed=wide[0][:, ::2], scales=wide[1][:, ::2])
    inside = replace(q, packed=torch.cat([q.packed, q.packed], 1)[:, :35], scales=q.scales.repeat(1, 2)[:, :7])
    for weight in (q, apart, inside):
        for rows in (slice(None), slice(2, 7), slice(8, None), slice(4, 4)):
            expected = reference.dequantize(q, rows, torch.float32)
            with serving() as backend:
                assert torch.equal(backend.dequantize(weight, rows, torch.float32), expected)
    levels = tuple(float(code**2) for code in range(16))
    out = torch.empty(9, 70)
    launch.dequantize_launch(q, out, levels)()
    assert torch.equal(out, q.restore(slice(None), levels))


@pytest.mark.parametrize(
    ("form", "scales"),
    [
        *(("nf4", scales) for scales in ("double", "float32", "float16")),
        *(("bof4s", "double"), ("int8", "double"), ("uint4", "float16_offsets"), ("int8", "float32")),
    ],
)
@pytest.mark.parametrize("size", [10, 64])
def test_columns_from_a_block_on_are_those_of_the_whole_matrix(form, scales, size):
    """To the end of the row, whose last block is short, and two blocks."""
    for columns in (77, 700):
        q = quantized_by_torch(
            strategies.make_weight("normal", (5, columns), 0, 2), form, block_size=size, scales=scales
        )
        for dtype in (torch.float32, torch.bfloat16):
            expected, blocks = reference.dequantize(q, slice(None), dtype), -(-columns // size)
            for start in {blocks // 2 * size, (blocks - 1) * size}:
                for stop in (columns, min(columns, start + 2 * size)):
                    out = torch.full((5, stop - start), 7.0, dtype=dtype)
                    launch.dequantize_launch(q, out, None, start)()
                    assert torch.equal(out, expected[:, start:stop])


def test_addresses_beyond_2_to_the_31():
    """Rows that lie 2^30 numbers apart, in memory that is never touched."""
    step, columns = 2**30 + 64, 64
    q = quantized_by_torch(
        strategies.make_weight("normal", (3, columns), 0, 2), "nf4", block_size=16, scales="float16"
    )

    def far(tensor: torch.Tensor) -> torch.Tensor:
        spread = torch.empty(2 * step + columns, dtype=tensor.dtype).as_strided(tensor.shape, (step, 1))
        return spread.copy_(tensor)

    torch.use_deterministic_algorithms(False)  # which would fill the memory
    out = far(torch.zeros(3, columns, dtype=torch.float16))
    job = launch.dequantize_launch(replace(q, packed=far(q.packed), scales=far(q.scales)), out)
    job.arguments["out_stride"] = step
    job()
    x, product = torch.eye(columns)[:3], torch.empty(3, 3)
    launch.small_batch_product_launch(far(x), replace(q, packed=far(q.packed), scales=far(q.scales)), None, product)()
    packed, used = far(torch.zeros_like(q.packed)), torch.empty(q.scales.shape, dtype=torch.uint8)
    launch.quantize_launch(q.dequantize(), q.scales.float(), FORMATS["nf4"], 16, packed, used)()
    torch.use_deterministic_algorithms(True)
    assert torch.equal(out, q.dequantize(torch.float16))
    assert torch.equal(product, q.dequantize()[:, :3].t())
    assert torch.equal(packed, q.packed)
