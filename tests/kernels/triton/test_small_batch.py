"""The fused product of a few inputs, in Triton's interpreter: within its roundings of the float64 product."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import quantize
from lowmem.kernels import gpu, reference
from tests import strategies
from tests.kernels.test_kernels import run_python
from tests.kernels.triton.legs import launches, serving
from tests.rounding import OF_4_BITS, assert_product, unit

launch = launches(interpreted=True)
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def multiply(x, q, dtype, bias=None, **options):
    """Return the product by the GPU's backend, and fail if plain torch computes any of it."""
    with serving() as backend, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "linear", None)
        return backend.linear(x, q, dtype, bias, **options)


@given(
    strategies.weights(2, 2, max_exponent=0, rows=strategies.tiled_rows, columns=strategies.long_columns),
    strategies.formats,
    strategies.short_blocks,
    strategies.encodings,
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(DTYPES),
    strategies.seeds,
)
def test_products_lose_no_more_than_their_roundings(weight, form, size, scales, batch, with_bias, dtype, seed):
    q = quantize(weight, form, block_size=size, scales=scales)
    rows, columns = weight.shape
    x = (strategies.make_input((batch,), columns, seed).detach() / 64).to(dtype)  # float16 holds the products
    bias = strategies.make_input((), rows, seed).detach() if with_bias else None
    got = multiply(x, q, dtype, bias)
    assert got.dtype is dtype
    assert_product(got, x, q.dequantize(), bias, rounded=(dtype,), more=OF_4_BITS)
    grad = (strategies.make_input((batch,), rows, seed).detach() / 64).to(dtype)
    exact = q.dequantize(dtype)  # what is multiplied
    with serving() as backend:
        assert_product(backend.input_grad(grad, q, dtype), grad, exact.t(), rounded=(dtype,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_products_of_normal_numbers_are_within_4_roundings(batch, dtype):
    """Beside the bound of any sum, a tighter one that sums of normal numbers keep: their errors cancel."""
    generator = torch.Generator().manual_seed(batch)
    for form, scales, columns in (("bof4s", "double", 1024), ("nf4", "float16", 515), ("int8", "double", 640)):
        q = quantize(torch.randn(40, columns, generator=generator), form, block_size=32, scales=scales, search=False)
        x, dense = torch.randn(batch, columns, generator=generator).to(dtype), q.dequantize().double()
        exact, magnitudes = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
        assert ((multiply(x, q, dtype).double() - exact).abs() <= 4 * unit(dtype) * magnitudes).all()


@pytest.mark.parametrize("form", ["bof4s", "int8"])
def test_every_column_is_multiplied_with_its_weight(form):
    """An input of one 1 reads one column of the weight: blocks of all lengths, and rows longer than a tile."""
    for columns, size in ((1, 8), (7, 8), (19, 10), (33, 16), (1100, 64), (130, 4096)):
        q = quantize(strategies.make_weight("normal", (5, columns), 0, 1), form, block_size=size, scales="float32")
        dense = q.dequantize()
        for start in range(0, columns, 8 * max(1, columns // 40)):
            chosen = range(start, min(start + 8, columns))
            x = torch.zeros(len(chosen), columns)
            x[range(len(chosen)), chosen] = 1
            assert torch.equal(multiply(x, q, torch.float32), dense[:, list(chosen)].t())


def test_inputs_apart_in_other_dtypes_and_a_bias_of_another():
    q = quantize(strategies.make_weight("normal", (6, 40), 0, 1), "nf4", block_size=16)
    wide = torch.randn(3, 80, dtype=torch.float64)
    for x in (wide[:, ::2], wide[:, 3:43], wide.t()[::2].t(), wide[:, :40].t().contiguous().t()):
        for bias in (torch.randn(6).double(), torch.randn(12)[::2].half(), None):
            got, x32 = multiply(x, q, torch.float32, bias), x.float()
            assert_product(got, x32, q.dequantize(), bias, more=OF_4_BITS)


def test_inputs_of_more_dimensions_are_rows():
    q, x = quantize(torch.randn(6, 40), "nf4", block_size=16), torch.randn(2, 3, 40)
    assert torch.equal(multiply(x, q, torch.float32).flatten(0, 1), multiply(x.flatten(0, 1), q, torch.float32))


def test_an_adapter_s_update_is_added():
    q, x = quantize(torch.randn(6, 40), "nf4", block_size=16), torch.randn(3, 40)
    a, b = torch.randn(2, 40), torch.randn(6, 2)
    update = 0.5 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(
        multiply(x, q, torch.float32, low_rank=(a, b, 0.5)), multiply(x, q, torch.float32) + update
    )


def test_an_input_that_is_not_finite_changes_its_own_output_alone():
    q, x = quantize(torch.randn(6, 40), "nf4", block_size=16), torch.randn(5, 40)
    expected = multiply(x, q, torch.float32)
    x[1, 3], x[3, 39] = nan, inf
    got = multiply(x, q, torch.float32)
    assert torch.equal(got[[0, 2, 4]], expected[[0, 2, 4]])
    assert not got[[1, 3]].isfinite().any()


def test_torch_multiplies_more_inputs_offsets_and_gradients_with_dequantized_rows():
    generator = torch.Generator().manual_seed(0)
    for form, scales in (("nf4", "double"), ("uint4", "float16_offsets"), ("int8", "double")):
        q = quantize(torch.randn(70, 50, generator=generator), form, block_size=16, scales=scales)
        dense = q.dequantize()
        for dtype in (torch.float32, torch.bfloat16):
            exact = dense.to(dtype)  # what is multiplied
            for batch in (1, 9) if q.has_offsets else (9, 40):
                x, grad = (torch.randn(batch, n, generator=generator).to(dtype) for n in (50, 70))
                with serving() as backend:
                    assert_product(backend.linear(x, q, dtype), x, exact, rounded=(dtype,))
                    assert_product(backend.input_grad(grad, q, dtype), grad, exact.t(), rounded=(dtype,))
                    out = torch.zeros(batch, 70, dtype=dtype)
                    assert_product(backend.add_product(out, x, q, False), x, exact, rounded=(dtype,))
                    out = torch.zeros(batch, 50, dtype=dtype)
                    assert_product(backend.add_product(out, grad, q, True), grad, exact.t(), rounded=(dtype,))


def test_8_bit_inputs_and_what_has_no_numbers_are_left_to_plain_torch():
    q = quantize(torch.randn(6, 40), "nf4", block_size=16)
    backend = gpu.GpuBackend()
    x = torch.randn(3, 40)
    torch.testing.assert_close(
        backend.linear(x, q, torch.int8), reference.linear(x, q, torch.int8), rtol=1e-5, atol=1e-5
    )
    assert backend.linear(x[:0], q, torch.float32).shape == (0, 6)
    for wrong, says in ((torch.randn(3, 41), "must end in in_features=40"), (x.int(), "must be a floating-point")):
        with pytest.raises(RuntimeError, match=says):
            backend.linear(wrong, q, torch.float32)
    with pytest.raises(RuntimeError, match="do not hold a weight of shape"):
        backend.linear(x, replace(q, scales=q.scales[:, 1:]), torch.float32)


PAGE_EDGE = """
from dataclasses import replace

import torch

from lowmem import quantize
from lowmem.kernels.triton import launch
from lowmem.quant.formats import get_format
from tests.guard_pages import at_the_edge

for form, scales in (("nf4", "double"), ("bof4s", "float32"), ("int8", "double"), ("uint4", "float16_offsets")):
    for size in (8, 10, 64):
        odd = [(1 + 2 * (columns % 3), columns) for columns in (*range(1, 2 * size, 2), 2 * size + 1, 1025)]
        for rows, columns in (*odd, (9, 64), (129, 7)):
            weight = torch.randn(rows, columns)
            q = quantize(weight, form, block_size=size, scales=scales, search=False)
            q = replace(q, packed=at_the_edge(q.packed), scales=at_the_edge(q.scales))
            for dtype in (torch.float32, torch.bfloat16):
                launch.dequantize_launch(q, at_the_edge(torch.empty(rows, columns, dtype=dtype)))()
            if not q.has_offsets:
                for batch in (1, 3):
                    x, bias = (at_the_edge(torch.randn(*shape).half()) for shape in ((batch, columns), (rows,)))
                    out = at_the_edge(torch.empty(batch, rows, dtype=torch.half))
                    launch.small_batch_product_launch(x, q, bias, out)()
            found, used = q.encoding.decode(q.scales), torch.empty(rows, -(-columns // size), dtype=torch.uint8)
            given = at_the_edge(weight), at_the_edge(found), get_format(form), size
            launch.quantize_launch(*given, at_the_edge(q.packed), at_the_edge(used))()
print("fine", flush=True)
q, out = quantize(torch.randn(64, 16)), torch.empty(1, 64)
launch.small_batch_product_launch(at_the_edge(torch.randn(1, 8)), q, None, out)()
"""


@pytest.mark.skipif("sys.platform != 'linux'", reason="mprotect is called as Linux has it")
def test_nothing_past_the_end_is_read_or_written():
    """The last launch of the script reads beyond an end, so that what would be seen is seen."""
    with pytest.raises(AssertionError, match="^fine"):
        run_python(PAGE_EDGE)
