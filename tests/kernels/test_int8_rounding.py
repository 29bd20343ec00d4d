"""Products in 8-bit integers: how numbers are rounded, and that every kernel multiplies just those."""

import math
from functools import lru_cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FORMATS, EightBit, FourBit, LoRA, convert, kernels, measure, quantize
from lowmem.kernels import int8_rounding
from lowmem.nn.fold import unadapted_shallow_copy
from lowmem.quant.backend import backend_for
from lowmem.quant.formats import get_format
from tests import strategies
from tests.compiled import EDGES, ISAS, compiled_int8, exact_product, given_stored
from tests.rounding import OF_4_BITS, assert_product
from tests.selection import covering

batches = st.sampled_from([*EDGES, 50, 62, 64, 96, 100])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
kernel = pytest.mark.usefixtures("poisoned", "only_c")


def with_rounded_levels(weight):
    """What the weight stands for; the levels of 8 bits are multiples of a step already."""
    form = get_format(weight.format)
    levels = None if form.bits == 8 else int8_rounding.step_count_and_rounded_levels(form.levels)[1]
    return weight.restore(slice(None), levels)


def int8_product(x, weight, bias=None):
    """What the definition says, in float64, and how far off one may be: by the bound of a sum, and a rounding."""
    exact, allowed = exact_product(
        int8_rounding.round_inputs_to_int8_grid(x, weight.block_size), with_rounded_levels(weight), bias
    )
    if x.dtype != torch.float32:
        form = torch.finfo(x.dtype)
        allowed = allowed + 0.51 * form.eps * exact.abs() + form.smallest_normal * form.eps
    return exact, allowed


def assert_within(got, x, exact, allowed):
    assert got.dtype == x.dtype
    assert ((got.double() - exact).abs() <= allowed).all()


def assert_int8(got, x, weight, bias=None):
    assert_within(got, x, *int8_product(x, weight, bias))


# What is rounded.


@given(st.integers(1, 4), st.integers(1, 600), strategies.block_sizes, st.integers(-90, 90), strategies.seeds)
def test_an_input_is_off_by_half_a_unit_of_its_columns_at_most(batch, columns, size, exponent, seed):
    x = strategies.make_weight("mixed", (batch, columns), 0, seed) * 2.0**exponent
    got, width = int8_rounding.round_inputs_to_int8_grid(x, size), 128 if 128 % size == 0 else size
    # Of up to 127 units, that are rounded 4 times: the unit's inverse, the product with it, the unit, the result.
    allowed = 0.5 + 127 * 4 * 2.0**-24
    assert got.dtype == torch.float32
    for part, rounded in zip(x.split(width, 1), got.split(width, 1), strict=True):
        unit = part.abs().amax(1, keepdim=True).clamp_min(2.0**-100) / 127
        assert ((rounded.double() - part).abs() <= unit.double() * allowed).all()
        steps = rounded / unit
        assert ((steps - steps.round()).abs() <= 1e-4).all()
        assert (steps.abs() <= 127.0001).all()


def test_zeros_stay_zeros_and_what_is_not_finite_spoils_its_columns_alone():
    x = torch.zeros(4, 256)
    x[:, 128:] = torch.randn(4, 128)
    x[1, 5], x[2, 6], x[3, 7] = math.nan, math.inf, -math.inf
    got = int8_rounding.round_inputs_to_int8_grid(x, 64)
    assert (got[0, :128] == 0).all()
    assert got[1:, :128].isnan().all()
    assert got[:, 128:].isfinite().all()


@pytest.mark.parametrize("name", list(FORMATS))
def test_levels_are_off_by_half_a_step_of_8_bits_at_most(name):
    levels = FORMATS[name].levels
    points, rounded = int8_rounding.step_count_and_rounded_levels(levels)
    largest = max(map(abs, levels))
    assert points <= 127
    assert max(abs(a - b) for a, b in zip(levels, rounded, strict=True)) <= largest / 254 * 1.0001
    for level in rounded:
        steps = level / largest * points
        assert abs(steps - round(steps)) < 1e-9


def test_levels_that_lie_on_a_grid_stay_as_they_are():
    for name, points in (("int4", 15), ("fp4", 12)):
        assert int8_rounding.step_count_and_rounded_levels(FORMATS[name].levels)[0] == points
        assert int8_rounding.step_count_and_rounded_levels(FORMATS[name].levels)[1] == pytest.approx(
            FORMATS[name].levels, abs=1e-12
        )


# What is multiplied: against the definition.


@kernel
@compiled_int8
@given(*given_stored, batches, dtypes, st.booleans(), strategies.seeds)
def test_products_are_those_of_rounded_inputs(isa, weight, form, size, scales, batch, dtype, with_bias, seed):
    q = quantize(weight, form, block_size=size, scales=scales)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, q.shape[1], generator=generator).to(dtype)
    bias = torch.randn(q.shape[0], generator=generator) if with_bias else None
    with kernels.temporary_cpu_backend(isa):
        assert_int8(kernels.linear(x, q, torch.int8, bias), x, q, bias)


@lru_cache(maxsize=1)  # ISAs come one after the other
def around_whole_tiles(size, shape):
    """Up to 16 rows and 128 columns make a tile, 8192 columns are packed at a time."""
    rows, columns = shape
    generator, cases = torch.Generator().manual_seed(rows), []
    for form in ("int4", "bof4s", "int8"):
        q = quantize(strategies.make_weight("normal", shape, 0, 1), form, block_size=size)
        for batch in (*EDGES, 300):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(batch, columns, generator=generator).to(dtype)
                cases.append((q, x, *int8_product(x, q)))
    return cases


@pytest.mark.thorough(keep=1)
@kernel
@compiled_int8
@covering(
    1,
    size=[8, 16, 24, 32, 64, 72, 128, 256, 4096],
    shape=[(1, 1), (16, 128), (37, 127), (9, 9000), (130, 1300), (33, 129)],
)
def test_around_whole_tiles_and_parts(isa, size, shape):
    for q, x, exact, allowed in around_whole_tiles(size, shape):
        with kernels.temporary_cpu_backend(isa):
            assert_within(kernels.linear(x, q, torch.int8), x, exact, allowed)


@kernel
@compiled_int8
@covering(form=["int4", "nf4", "iq4_nl", "int8", "q8_0"], size=[16, 32, 64, 128], batch=[1, 3, 8, 9, 40])
def test_the_largest_codes_times_the_largest_inputs_are_exact(isa, form, size, batch):
    """Sums of two or four products in 16 bits are as large as they can be, of either sign: none saturates."""
    signs = torch.ones(6, 384)
    signs[1], signs[2, ::2], signs[3, 1::2], signs[4, 64:] = -1, -1, -1, -1
    q = quantize(signs, form, block_size=size, scales="float32")
    if form == "q8_0":  # -128, which no quantizer writes and a file may hold
        q.packed[5] = 0
    x = signs[:5].repeat(8, 1)[:batch] * 2.0**-7
    expected = x.double() @ with_rounded_levels(q).double().t()
    with kernels.temporary_cpu_backend(isa):
        got = kernels.linear(x, q, torch.int8)
    assert ((got.double() - expected).abs() <= 8 * 2.0**-24 * expected.abs().amax()).all()


@pytest.mark.skipif(len(ISAS) < 2, reason="the kernel of one ISA is compiled here")
@covering(form=["q4_0", "bof4s", "int8"], size=[16, 64], dtype=[torch.float32, torch.bfloat16])
def test_isas_that_fuse_multiplication_and_addition_give_the_same_bits(form, size, dtype):
    """Block sums are exact, and a tile's rows lie in the lanes: floats are added in one order, whatever the lanes."""
    q = quantize(strategies.make_weight("normal", (45, 330), 0, 0), form, block_size=size)
    for batch in (9, 16, 40):
        x, made = torch.randn(batch, 330).to(dtype), []
        for isa in ISAS[1:]:
            with kernels.temporary_cpu_backend(isa):
                made.append(kernels.linear(x, q, torch.int8))
        assert all(torch.equal(made[0], other) for other in made[1:])


@kernel
@compiled_int8
@covering(batch=[1, 6, 40])
def test_inputs_of_every_size_and_what_is_not_finite(isa, batch):
    q = quantize(strategies.make_weight("normal", (45, 330), 0, 0), "nf4")
    for exponent in (-140, -126, -101, -100, -99, -61, -60, -59, 99, 100, 101, 120):
        x = torch.randn(batch, 330) * 2.0**exponent
        x[0, :128] = 0
        with kernels.temporary_cpu_backend(isa):
            assert_int8(kernels.linear(x, q, torch.int8), x, q)
    for bad, column in product((math.nan, math.inf, -math.inf), (0, 129, 200, 329)):
        x = torch.randn(batch, 330)
        x[-1, column] = bad
        with kernels.temporary_cpu_backend(isa):
            got = kernels.linear(x, q, torch.int8)
        assert got[:-1].isfinite().all()
        assert got[-1].isnan().all()


@kernel
@compiled_int8
@covering(batch=[1, 8, 9, 40])
def test_weights_of_every_size(isa, batch):
    """The sum of a block is as large as 2^22 before its scale and its input's unit are applied."""
    for exponent, form in product((-110, 95, 110, 120), ("int4", "nf4", "int8")):
        weight = strategies.make_weight("normal", (45, 330), 0, 0) * 2.0**exponent
        q = quantize(weight, form, scales="float32", block_size=64)
        x = torch.randn(batch, 330, generator=torch.Generator().manual_seed(batch)) * 2.0 ** -(exponent // 2)
        with kernels.temporary_cpu_backend(isa):
            assert_int8(kernels.linear(x, q, torch.int8), x, q)


@pytest.mark.thorough
@compiled_int8
@covering(1, shape=[(2048, 1024, 1), (2048, 1024, 512), (64, 8192, 600), (8, 1, 9000)], size=[64, 4096])
def test_scratch_of_products_in_int8_stays_within_what_their_chunks_take(isa, shape, size):
    """A mebibyte; where torch rounds inputs, 2 MiB of them and of their products, half a MiB to round them, and the
    weight's chunk if torch multiplies."""
    rows, columns, batch = shape
    q = quantize(strategies.make_weight("normal", (rows, columns), 0, 0), block_size=size)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch, columns).to(dtype)
        with kernels.temporary_cpu_backend(isa):
            peak = measure.peak_bytes(lambda x=x: kernels.linear(x, q, torch.int8))
            in_integers = backend_for().tried_kernels(q, batch, dtype, "linear_inputs8")
        scratch = 2**20 if in_integers else 5 * 2**19 + max(2**20, 768 * 4 * columns)
        assert peak <= scratch + batch * rows * dtype.itemsize


@compiled_int8
def test_views_other_dtypes_and_biases_are_handled(isa):
    q, bias = quantize(torch.randn(24, 128)), torch.randn(48)[::2]
    x = torch.randn(5, 256)[:, ::2]
    with kernels.temporary_cpu_backend(isa):
        assert_int8(kernels.linear(x, q, torch.int8, bias), x, q, bias)
        assert_int8(kernels.linear(x[:0], q, torch.int8), x[:0], q)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.reference, "linear", None)  # another dtype of a bias is no reason for plain torch
            assert_int8(kernels.linear(x, q, torch.int8, bias.double()), x, q, bias)
        wide = kernels.linear(x.double(), q, torch.int8)
    assert wide.dtype == torch.float64
    assert_within(wide.float(), x, *int8_product(x, q))


@pytest.mark.parametrize("name", sorted({"reference", kernels.available_cpu_backend_names()[-1]}))
def test_weights_without_codes_and_wrong_shapes_are_refused(name):
    with kernels.temporary_cpu_backend(name):
        with pytest.raises(TypeError, match=r"is for weights of 4 bits, not for torch.float16"):
            kernels.linear(torch.randn(2, 8), torch.randn(4, 8).half(), torch.int8)
        with pytest.raises(RuntimeError, match=r"input.shape=\(2, 9\) must end in in_features=8"):
            kernels.linear(torch.randn(2, 9), quantize(torch.randn(4, 8)), torch.int8)


# In a model.


def plain():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))


def model(**options):
    return convert(plain(), FourBit(**options))


@compiled_int8
@covering(format=["int4", "nf4"])
def test_a_model_stays_close_and_its_gradient_is_the_float_one(isa, format):
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))
    rounded = model(format=format, compute_dtype=torch.int8)
    with kernels.temporary_cpu_backend(isa):
        exact = model(format=format, compute_dtype=kernels.differentiable_dtype(torch.int8, x))
        with torch.no_grad():
            assert measure.difference(exact(x), rounded(x)).relative < 0.02
        for one in (rounded[0], exact[0]):
            given = x.clone().requires_grad_()
            one(given).sum().backward()
            one.found = given.grad
    torch.testing.assert_close(rounded[0].found, exact[0].found)


def test_forward_mode_is_that_of_floats_and_vmap_rounds_every_example():
    layer, exact = model(compute_dtype=torch.int8)[0], model()[0]
    x, tangent = torch.randn(2, 256), torch.randn(2, 256)
    got = torch.func.jvp(layer, (x,), (tangent,))[1]
    assert_product(got, tangent, exact.quantized.dequantize(), more=OF_4_BITS)
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], layer(x))


@pytest.mark.parametrize(
    ("dtype", "given", "slow", "fast"),
    [
        (torch.int8, torch.float32, torch.float32, torch.bfloat16),
        (torch.int8, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.int8, torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_what_is_recorded_is_computed_in_floats(dtype, given, slow, fast, monkeypatch):
    for wanted, is_fast in ((slow, False), (fast, True)):
        monkeypatch.setattr(type(backend_for()), "fast_bfloat16", is_fast)
        x = torch.randn(2, 256, dtype=given)
        assert kernels.differentiable_dtype(dtype, x) is wanted
        layer, floats = (model(compute_dtype=one)[0] for one in (dtype, wanted))
        assert torch.equal(layer(x.requires_grad_()), floats(x))
        with torch.no_grad():
            assert torch.equal(layer(x), floats(x)) == (dtype is not torch.int8)


def test_an_adapter_trains_on_it():
    layer = convert(torch.nn.Linear(64, 32), FourBit(compute_dtype=torch.int8), LoRA(4))
    x = torch.randn(3, 64)
    with torch.no_grad():
        layer.adapters.default.weight.lora_b.normal_()
        torch.testing.assert_close(layer(x), layer.adapters.default.weight(unadapted_shallow_copy(layer)(x), x))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.adapters.parameters())


def test_weights_in_8_bits_are_multiplied_as_they_are_with_rounded_inputs():
    layer, x = convert(torch.nn.Linear(300, 33), EightBit(compute_dtype=torch.int8)), torch.randn(5, 300)
    rounded, weight = int8_rounding.round_inputs_to_int8_grid(x, 64), layer.quantized.restore(slice(None))
    for name in kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(name):
            assert_product(layer(x), rounded, weight, layer.bias, more=4)
