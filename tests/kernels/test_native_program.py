"""Steps in one call of C give what the functions of the backend give, bit for bit; sums and rotations are exact."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from lowmem import kernels, quantize
from lowmem.kernels.cpu_rowwise import NO_STATES, attention_work_and_struct_fields, states_struct_fields_or_none
from lowmem.kernels.native_program import (
    MOST_TOGETHER,
    NativeLayer,
    NativeProgram,
    update_scratch_per_row,
)
from lowmem.kernels.rms_norm_and_gating import ACTIVATIONS
from lowmem.quant.backend import KeyOrValueStates, backend_for
from lowmem.quant.tensor import QuantizedTensor
from tests.compiled import compiled, needs_kernel, on_threads
from tests.rounding import unit

pytestmark = needs_kernel
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 1000)


def numbers(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(count, kinds, rows, columns, seed):
    """Weights of several kinds, which have one input."""
    made = []
    for number in range(count):
        dense, kind = numbers((rows + 3 * number, columns), seed + number), kinds[number]
        if kind == "sixteen":
            made.append(nn.Parameter(dense.bfloat16(), requires_grad=False))
        else:
            form, size, scales = kind
            made.append(quantize(dense, form, block_size=size, scales=scales))
    return made


KINDS = [
    "sixteen",
    ("nf4", 64, "double"),
    ("int4", 32, "float16"),
    ("int4", 32, "float16_offsets"),
    ("int8", 64, "float32"),
    ("int4", 64, "double"),
    ("q8_0", 32, "float16"),
]


@compiled
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=MOST_TOGETHER),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 200),
    dtypes,
    st.booleans(),
    st.booleans(),
    seeds,
)
@example(  # orders differ
    kinds=KINDS[1:3], batch=2, rows=9, columns=200, dtype=torch.float32, biased=False, in_int8=False, seed=0
)
@example(kinds=KINDS[1:3], batch=2, rows=9, columns=200, dtype=torch.float32, biased=False, in_int8=True, seed=0)
@example(  # steps differ
    kinds=KINDS[1:6:4], batch=40, rows=30, columns=300, dtype=torch.float32, biased=False, in_int8=True, seed=0
)
@example(kinds=KINDS[4:7:2], batch=2, rows=30, columns=300, dtype=torch.float32, biased=False, in_int8=True, seed=0)
@example(
    kinds=KINDS[1:2] * 3, batch=40, rows=30, columns=300, dtype=torch.bfloat16, biased=True, in_int8=True, seed=0
)
@example(kinds=KINDS[4:5] * 2, batch=40, rows=30, columns=300, dtype=torch.float32, biased=True, in_int8=True, seed=0)
@example(  # packed in pieces of the batch, and the columns in parts
    kinds=KINDS[1:2] * 2, batch=300, rows=20, columns=8400, dtype=torch.float32, biased=True, in_int8=True, seed=0
)
@example(
    kinds=KINDS[1:2] * 2, batch=300, rows=20, columns=8400, dtype=torch.bfloat16, biased=False, in_int8=True, seed=0
)
@example(
    kinds=KINDS[1:2] * 3, batch=40, rows=30, columns=900, dtype=torch.float32, biased=True, in_int8=False, seed=0
)
def test_products_of_one_input(isa, kinds, batch, rows, columns, dtype, biased, in_int8, seed):
    with kernels.temporary_cpu_backend(isa), on_threads(2):
        kernel = backend_for()
        weights = weights_of(len(kinds), kinds, rows, columns, seed)
        x = numbers((batch, columns), seed, dtype)
        biases = [numbers(weight.shape[0], seed).to(dtype) if biased else None for weight in weights]
        steps = NativeProgram(kernel, x.new_empty(sum(batch * weight.shape[0] for weight in weights)))
        layers, dtypes = [], []
        for weight, bias in zip(weights, biases, strict=True):
            integers = in_int8 and isinstance(weight, QuantizedTensor)
            native_weight = kernel.native_weight_or_none(weight, integers)
            layers.append(NativeLayer(native_weight, weight.shape[0], bias, integers))
            dtypes.append(torch.int8 if integers else dtype)
        steps.append_products("x", batch, columns, layers)
        if not steps.try_run(x=x):  # torch multiplies one of them, or adds its offsets
            with_offsets = any(isinstance(weight, QuantizedTensor) and weight.has_offsets for weight in weights)
            assert batch > (8 if set(dtypes) == {torch.int8} else 4)
            assert with_offsets or set(dtypes) != {torch.int8}
            return
        found = steps.scratch.split([batch * weight.shape[0] for weight in weights])
        for got, weight, bias, computed in zip(found, weights, biases, dtypes, strict=True):
            expected = kernels.linear(x, weight, computed, bias)
            assert torch.equal(got.view(batch, -1), expected)


@compiled
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 200),
    st.lists(st.integers(1, 20), min_size=1, max_size=2),
    dtypes,
    st.booleans(),
    seeds,
)
@example(batch=300, rows=70, columns=190, ranks=[16, 8], dtype=torch.bfloat16, in_int8=False, seed=0)
@example(batch=300, rows=70, columns=190, ranks=[16], dtype=torch.float32, in_int8=True, seed=0)
@example(batch=1, rows=1030, columns=2050, ranks=[64], dtype=torch.bfloat16, in_int8=False, seed=0)  # on two threads
def test_products_with_the_updates_of_adapters(isa, batch, rows, columns, ranks, dtype, in_int8, seed):
    """Each update is a float32 sum, which is rounded once."""
    with kernels.temporary_cpu_backend(isa), on_threads(2):
        kernel, x = backend_for(), numbers((batch, columns), seed, dtype)
        weights = weights_of(2, KINDS[1:2] * 2, rows, columns, seed)
        updates = [
            (numbers((rank, columns), seed + rank), numbers((rows + 3, rank), seed + 1), 0.5) for rank in ranks
        ]
        scratch = batch * (2 * rows + 3 + update_scratch_per_row(updates, dtype.itemsize))
        steps = NativeProgram(kernel, x.new_full((scratch,), float("nan")))
        layers = [
            NativeLayer(kernel.native_weight_or_none(weight, in_int8), weight.shape[0], None, in_int8, tuple(added))
            for weight, added in zip(weights, ([], updates), strict=True)
        ]
        first, second = steps.append_products("x", batch, columns, layers)
        assert steps.try_run(x=x)
        plain, got = (
            steps.scratch.as_strided((batch, count), (count, 1), (at - steps.scratch.data_ptr()) // x.itemsize)
            for at, count in ((first, rows), (second, rows + 3))
        )
        base, other = (kernels.linear(x, weight, torch.int8 if in_int8 else dtype) for weight in weights[::-1])
        assert torch.equal(plain, other)
        expected, size = base.double(), base.double().abs()
        for a, b, scaling in updates:
            expected = expected + scaling * (x.double() @ a.double().T) @ b.double().T
            size = size + scaling * (x.double().abs() @ a.double().abs().T) @ b.double().abs().T
        terms = sum(columns + rank + 4 for rank in ranks)
        bound = (terms * unit(torch.float32) + 1.01 * len(ranks) * unit(dtype)) * size
        assert ((got.double() - expected).abs() <= bound).all()


@compiled
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 2.0**101, 2.0**-70])
def test_products_in_integers_refuse_what_8_bits_cannot_represent(isa, count, batch, number):
    """A sequence is then nobody's result, and no error; the next one, of other numbers, runs."""
    with kernels.temporary_cpu_backend(isa), on_threads(2):
        kernel, x = backend_for(), numbers((batch, 256), 0)
        x[-1, 128:] = number
        weights = weights_of(count, KINDS[1:2] * count, 40, 256, 0)
        steps = NativeProgram(kernel, x.new_empty(count * batch * 50))
        layers = [
            NativeLayer(kernel.native_weight_or_none(item, True), item.shape[0], None, True) for item in weights
        ]
        steps.append_products("x", batch, 256, layers)
        assert not steps.try_run(x=x)
        assert steps.try_run(x=x.nan_to_num(1, 1).clamp(-1, 1).add_(1))


def test_products_in_integers_want_levels_that_are_rounded_for_them():
    """Else C would multiply steps that it does not have."""
    weight, x = quantize(numbers((32, 64), 0)), numbers((2, 64), 0)
    steps = NativeProgram(backend_for(), x.new_empty(64))
    layer = NativeLayer(backend_for().native_weight_or_none(weight, False), 32, None, True)
    steps.append_products("x", 2, 64, [layer])
    assert not steps.try_run(x=x)


@compiled
def test_products_of_what_products_have_given(isa):
    with kernels.temporary_cpu_backend(isa):
        kernel, x = backend_for(), numbers((2, 64), 0)
        weights = [quantize(numbers(shape, seed), "nf4") for seed, shape in enumerate([(32, 64), (32, 64), (8, 32)])]
        layers = [NativeLayer(kernel.native_weight_or_none(item, False), item.shape[0], None) for item in weights]
        steps = NativeProgram(kernel, x.new_empty(2 * (3 * 32 + 8)))
        both = steps.append_products("x", 2, 64, layers[:2])
        steps.append_products(steps.append_sum(*both, 2 * 32), 2, 32, layers[2:])
        assert steps.try_run(x=x)
        first, second = (kernels.linear(x, weight, x.dtype) for weight in weights[:2])
        assert torch.equal(steps.scratch[-16:].view(2, 8), kernels.linear(first + second, weights[2], x.dtype))


@compiled
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), dtypes, st.sampled_from([*ACTIVATIONS]), seeds)
def test_functions_of_rows_and_what_they_hand_on(isa, batch, tokens, columns, dtype, name, seed):
    """A norm whose result is gated, added up, and normed again."""
    with kernels.temporary_cpu_backend(isa):
        kernel, activation = backend_for(), ACTIVATIONS[name]
        x, other = (numbers((batch * tokens, columns), seed + i, dtype) for i in range(2))
        factor = numbers(columns, seed + 2, dtype)
        steps, rows = NativeProgram(kernel, x.new_empty(3 * x.numel())), batch * tokens
        normed = steps.append_norm(x.data_ptr(), rows, factor, 1e-5, 1.0, False)
        gated = steps.append_gated(normed, other.data_ptr(), rows, columns, columns, activation)
        steps.append_sum(gated, x.data_ptr(), x.numel())
        assert steps.try_run()
        first, second, third = steps.scratch.view(3, rows, columns)
        assert torch.equal(first, kernel.norm(x, factor.float() + 1.0, 1e-5, False))
        assert torch.equal(second, kernel.gated(first, other, activation, dtype))
        assert torch.equal(third, (second.float() + x.float()).to(dtype))


@compiled
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(0, 5),
    dtypes,
    st.booleans(),
    seeds,
)
def test_rotation(isa, batch, tokens, heads, half, rest, dtype, shared, seed):
    """Of the first numbers of each head; three roundings in float32, and one to the dtype."""
    width = 2 * half + rest
    with kernels.temporary_cpu_backend(isa):
        x = numbers((batch, tokens, heads, width), seed, dtype)
        angles = numbers((1 if shared else batch, tokens, 2 * half), seed + 1)
        cos, sin = (one.to(dtype).contiguous() for one in (angles.cos(), angles.sin()))
        got, steps = x.clone(), NativeProgram(backend_for(), x.new_empty(0))
        steps.append_rotary_embedding("x", (batch, tokens, heads), (width, heads * width), cos.shape, "cos", "sin")
        assert steps.try_run(x=got, cos=cos, sin=sin)
    front, c, s = x[..., : 2 * half].double(), cos.double().unsqueeze(2), sin.double().unsqueeze(2)
    turned = torch.cat([-front[..., half:], front[..., :half]], -1)
    exact = front * c + turned * s
    sizes = (front * c).abs() + (turned * s).abs()
    off = (3 * unit(torch.float32) + unit(dtype) * (dtype is not torch.float32) * 1.01) * sizes + 1e-40
    assert ((got[..., : 2 * half].double() - exact).abs() <= off).all()
    assert torch.equal(got[..., 2 * half :], x[..., 2 * half :])


@compiled
@given(
    st.integers(1, 3), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 40), st.booleans(), dtypes, seeds
)
def test_states_are_stored_and_attended_to(isa, batch, heads, tokens, keys, coded, dtype, seed):
    """As ``encode_states``, or copied; then as ``attention`` of all rows."""
    width, before = 12, keys
    with kernels.temporary_cpu_backend(isa):
        kernel = backend_for()
        query = numbers((batch, 2 * heads, tokens, width), seed, dtype)
        new = [numbers((batch, heads, tokens, width), seed + i, dtype) for i in (1, 2)]
        old = [numbers((batch, heads, before, width), seed + i, dtype) for i in (3, 4)]
        kept, into, expected, steps = [], {}, [], NativeProgram(kernel, query.new_empty(query.numel()))
        for name, added, first in zip(("keys", "values"), new, old, strict=True):
            whole = torch.cat([first, added], 2)
            states, wanted = (empty_states(whole, coded) for _ in range(2))
            rows = [one if one is None else one[:, :, before:] for one in states]
            if coded:
                kernel.encode_states(first, KeyOrValueStates(*(one[:, :, :before] for one in states)))
                kernel.encode_states(whole, wanted)
            else:
                states.numbers[:, :, :before] = first
                wanted.numbers.copy_(whole)
            steps.append_state_encoding(added.shape, states_struct_fields_or_none(added), name)
            into[name] = states_struct_fields_or_none(*rows)
            kept.append(states)
            expected.append(wanted)
        fields = [number for one in kept for number in states_struct_fields_or_none(*one)]
        sizes = batch, heads, 2, tokens, before + tokens, width, width
        out = steps.append_attention("attention", query.numel())
        states = [*states_struct_fields_or_none(query), *fields, *NO_STATES]
        work, call = attention_work_and_struct_fields(sizes, states, 0.3, None, out)
        assert steps.try_run(attention=(work, *call), **into)
        for one, other in zip(kept, expected, strict=True):
            assert torch.equal(one.numbers, other.numbers)
        exact = kernel.attention(query, *expected, None, 0.3, None)
        assert torch.equal(steps.scratch.view(exact.shape), exact)


def empty_states(like, coded):
    if not coded:
        return KeyOrValueStates(torch.empty_like(like))
    return KeyOrValueStates(torch.empty(like.shape, dtype=torch.int8), torch.empty(*like.shape[:3], 1))


def test_nothing_runs_where_a_weight_is_not_what_it_was():
    kernel = backend_for()
    weight, x = quantize(numbers((8, 64), 0), "nf4"), numbers((2, 64), 1)
    handle, packed, scales = kernel._cached_native_weight_or_none(weight)
    for columns, rows, codes in ((32, 8, packed), (64, 7, packed), (64, 8, packed.clone()), (64, 8, packed)):
        steps = NativeProgram(kernel, torch.full((100,), 5.0))
        steps.append_sum("x", "x", 20)
        steps.append_products("x", 2, columns, [NativeLayer((handle, codes, scales), rows, None)])
        fits = (columns, rows) == (64, 8) and codes is packed
        assert steps.try_run(x=x) == fits
        assert bool((steps.scratch == 5.0).all()) != fits


def test_room_that_is_too_small_and_calls_that_are_no_calls_are_errors():
    kernel, x = backend_for(), numbers((2, 64), 1)
    steps = NativeProgram(kernel, x.new_empty(10))
    with pytest.raises(ValueError, match="room for 11 numbers is taken, and 10 are left"):
        steps.reserve_scratch_address(11)
    for calls, text in (
        (b"12", "2 bytes are left"),
        (bytes(16), "no call of function 0"),
        (b"\xff" * 16, "function -1"),
    ):
        with pytest.raises(ValueError, match=text):
            kernel.native.sequence(kernel._isa, 1, (), calls)
    with pytest.raises(ValueError, match="17 weights"):
        kernel.native.sequence(kernel._isa, 1, (None,) * 51, b"")


def test_results_are_written_into_real_memory_with_space_for_them():
    kernel = backend_for()
    for room in (torch.empty(0), torch.empty(23)):
        steps = NativeProgram(kernel, room)
        with pytest.raises(ValueError, match="room for 24 numbers is taken"):
            steps.append_norm(0, 3, torch.ones(8), 1e-6, 0.0, False)
    for room in (torch.empty(64, device="meta"), torch.empty(64)[::2], torch._neg_view(torch.empty(64))):
        with pytest.raises(ValueError, match="is no contiguous memory of the CPU"):
            NativeProgram(kernel, room)
