"""Attention of a few queries and keys and values in 8 bits: plain torch and the compiled kernel against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels
from lowmem.kernels.cached_attention import decoded_states
from lowmem.quant.backend import KeyOrValueStates, backend_of
from tests.compiled import compiled, on_threads
from tests.rounding import gamma, unit

everywhere = pytest.mark.parametrize("isa", ["reference", *compiled.args[1]])
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EXP = 40  # roundings of an exponential, of tanh, and of what is multiplied with it in float32


def numbers(shape, seed, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def in_8_bits(states):
    codes = KeyOrValueStates(torch.empty(states.shape, dtype=torch.int8), torch.empty(*states.shape[:3], 1))
    backend_of(states).encode_states(states, codes)
    return codes


def spaced(states):
    """The same states between others, as in a cache with room: rows and heads are not side by side."""
    room = torch.full((states.shape[0], states.shape[1] + 1, states.shape[2] + 3, states.shape[3]), torch.nan)
    room = room.to(states.dtype) if states.is_floating_point() else torch.full(room.shape, 99, dtype=states.dtype)
    part = room[:, 1:, : states.shape[2]]
    part.copy_(states)
    return part


def check(query, key, value, mask, scaling, softcap):
    """Scores are off by gamma(width + 4) of their terms' sizes; weights of values, relatively, by twice as much."""
    got = backend_of(query).attention(query, key, value, mask, scaling, softcap)
    q, k, v = query.double(), decoded_states(key, torch.float64), decoded_states(value, torch.float64)
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores, sizes = q @ k.mT * scaling, q.abs() @ k.abs().mT * abs(scaling)
    off = gamma(q.shape[-1] + 4) * sizes
    if softcap is not None:
        scores, off = softcap * torch.tanh(scores / softcap), off + gamma(EXP) * softcap
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        off = off + unit(torch.float32) * 2 * (scores.abs() + mask.double().abs())
        scores = scores + mask.double()
    hidden = scores.amax(-1, keepdim=True) == -torch.inf
    weights = torch.softmax(scores, -1).masked_fill(hidden, 0.0)
    off = torch.expm1(2 * off.amax(-1, keepdim=True)) + gamma(EXP + 2 * scores.shape[-1])
    bound = (2 * off + unit(query.dtype) * (query.dtype is not torch.float32) * 1.01) * (weights @ v.abs())
    exact = (weights @ v).transpose(1, 2)
    assert got.dtype is query.dtype
    assert got.shape == exact.shape
    assert got.is_contiguous()
    excess = (got.double() - exact).abs() - bound.transpose(1, 2) - 1e-30 - 6e-8 * (query.dtype is torch.float16)
    assert (excess <= 0).all(), f"beyond the bound by {float(excess.max()):.3g}"


@everywhere
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    shared=st.integers(1, 4),
    queries=st.integers(1, 6),
    keys=st.one_of(st.integers(1, 9), st.integers(28, 70)),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from([*FLOATS, torch.int8])),
    mask=st.sampled_from([None, "rows", "shared", "added"]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    seed=st.integers(0, 2**16),
    threads=st.sampled_from([1, 3]),
)
def test_outputs_are_exact_within_rounding(
    isa, batch, heads, shared, queries, keys, widths, dtypes, mask, softcap, seed, threads
):
    dtype, stored = dtypes
    query = numbers((batch, queries, heads * shared, widths[0]), seed, dtype).transpose(1, 2)
    states = [numbers((batch, heads, keys, width), seed + i, scale=2.0) for i, width in enumerate(widths)]
    if mask == "rows":
        mask = numbers((batch, 1, queries, keys), seed + 2) > -0.5
    elif mask == "shared":
        mask = numbers((queries, keys), seed + 2) > 0
    elif mask == "added":
        mask = numbers((batch, heads * shared, queries, keys), seed + 2, dtype).clamp_max(1)
    with kernels.temporary_cpu_backend(isa), on_threads(threads):
        if stored is torch.int8:
            key, value = (KeyOrValueStates(*map(spaced, in_8_bits(one))) for one in states)
        else:
            key, value = (KeyOrValueStates(spaced(one.to(stored))) for one in states)
        check(query, key, value, mask, widths[0] ** -0.5, softcap)


@everywhere
def test_long_contexts_are_computed_by_several_threads(isa):
    query = numbers((2, 8, 2, 64), 0)
    key, value = (numbers((2, 2, 1100, 64), seed) for seed in (1, 2))
    with kernels.temporary_cpu_backend(isa), on_threads(3):
        check(query, KeyOrValueStates(key), KeyOrValueStates(value), None, 0.125, None)
        alone = backend_of(query).attention(query, KeyOrValueStates(key), KeyOrValueStates(value), None, 0.125, None)
    with kernels.temporary_cpu_backend(isa), on_threads(1):
        together = backend_of(query).attention(
            query, KeyOrValueStates(key), KeyOrValueStates(value), None, 0.125, None
        )
    assert torch.equal(alone, together)


@everywhere
def test_a_query_that_may_see_no_key_gets_zeros(isa):
    query, key = numbers((1, 2, 2, 8), 0), KeyOrValueStates(numbers((1, 2, 5, 8), 1))
    mask = torch.tensor([[True, False, True, False, False], [False] * 5])
    with kernels.temporary_cpu_backend(isa):
        got = backend_of(query).attention(query, key, key, mask, 1.0, None)
    assert (got[:, 1] == 0).all()
    assert (got[:, 0] != 0).any()


@everywhere
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(isa, bad):
    query, states = torch.ones(1, 1, 1, 8), numbers((1, 1, 40, 8), 1)
    broken = states.clone()
    broken[0, 0, 3, 2] = bad
    with kernels.temporary_cpu_backend(isa):
        for key, value in ((broken, states), (states, broken), (in_8_bits(broken), in_8_bits(states))):
            key, value = (one if isinstance(one, KeyOrValueStates) else KeyOrValueStates(one) for one in (key, value))
            assert not backend_of(query).attention(query, key, value, None, 1.0, None).isfinite().all()


@everywhere
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 70)),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(FLOATS),
    exponent=st.sampled_from([-140, -20, 0, 14]),
)
def test_states_in_8_bits_are_the_same_bytes_on_every_backend(isa, shape, seed, dtype, exponent):
    most = torch.finfo(dtype).max
    states = (numbers(shape, seed) * 2.0**exponent).clamp(-most, most).to(dtype).transpose(1, 2)
    with kernels.temporary_cpu_backend("reference"):
        expected = in_8_bits(states)
    with kernels.temporary_cpu_backend(isa):
        got = in_8_bits(states)
    assert torch.equal(got.numbers, expected.numbers)
    assert torch.equal(got.scales, expected.scales)
    off = (decoded_states(got, torch.float64) - states.double()).abs()
    assert (off <= got.scales.double() * (0.5 + 1e-4) + 2.0**-126).all()
