"""``scaled_dot_product_attention`` returns torch's own results within rounding, from C and from torch."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import lowmem
from lowmem import CachedStates, kernels, scaled_dot_product_attention
from lowmem.nn import dot_product_attention as module
from lowmem.nn.cached_keys_and_values import EightBitStates
from lowmem.nn.dot_product_attention import MOST, float32_attention_mode_if_faster
from tests.compiled import compiled, needs_kernel

everywhere = pytest.mark.parametrize("isa", ["reference", *compiled.args[1]])
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-10}


def tensors(batch, heads, shared, queries, keys, widths=(16, 16), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads * shared, queries, widths[0]), (heads, keys, widths[0]), (heads, keys, widths[1])]
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def exact(query, key, value, *given, softcap=None, **named):
    """Torch's own in float64; with a softcap from the equation."""
    query, key, value = (one.double() for one in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    given = [one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in given]
    if softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, *given, **named)
    key, value = (one.repeat_interleave(shared, 1) for one in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * query.shape[-1] ** -0.5 / softcap)
    mask = given[0] if given else None
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value


@pytest.fixture
def by_torch(monkeypatch):
    """Note the calls of torch's own."""
    calls = []
    own = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        module.functional,
        "scaled_dot_product_attention",
        lambda *given, **named: calls.append(1) or own(*given, **named),
    )
    return calls


@everywhere
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 10), st.integers(1, 40)),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(list(NEAR)),
    mask=st.sampled_from([None, "bool", "added", "causal"]),
    scale=st.sampled_from([None, 0.2]),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_outputs_are_those_of_torch(isa, sizes, widths, dtype, mask, scale, softcap, seed):
    query, key, value = tensors(*sizes, widths, dtype, seed)
    given, named = [], {"enable_gqa": sizes[2] > 1}
    if mask == "bool":
        given = [torch.rand(sizes[0], 1, sizes[3], sizes[4]) > 0.5]
        given[0][..., 0] = True
    elif mask == "added":
        given = [torch.randn(sizes[3], sizes[4]).to(dtype)]
    elif mask == "causal":
        named |= {"is_causal": True}
    if scale is not None and softcap is None:
        named |= {"scale": scale}
    with kernels.temporary_cpu_backend(isa):
        got = scaled_dot_product_attention(query, key, value, *given, softcap=softcap, **named)
    if softcap is not None and mask == "causal":
        given = [torch.ones(sizes[3], sizes[4], dtype=torch.bool).tril()]
    expected = exact(query, key, value, *given, softcap=softcap, **named)
    assert (got.dtype, got.shape) == (dtype, expected.shape)
    near = NEAR[dtype] * 4
    torch.testing.assert_close(got.double(), expected, rtol=near, atol=near)


@everywhere
@pytest.mark.parametrize("queries", [1, MOST, MOST + 1])
def test_states_in_8_bits_are_read_as_they_are(isa, queries, by_torch):
    query, key, value = tensors(2, 2, 3, queries, 50)
    keys, values = CachedStates(bits=8), CachedStates(bits=8)
    with kernels.temporary_cpu_backend(isa):
        for part in (slice(0, 30), slice(30, 50)):
            k, v = keys.append(key[:, :, part]), values.append(value[:, :, part])
        assert isinstance(k, EightBitStates)
        mask = torch.ones(queries, 50, dtype=torch.bool).tril(50 - queries)
        got = scaled_dot_product_attention(query, k, v, mask, enable_gqa=True)
    assert bool(by_torch) == (queries > MOST)
    expected = exact(query, k + 0, v + 0, mask, enable_gqa=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize(
    ("sizes", "dtype", "torchs"),
    [
        ((1, 2, 2, 1, 20), torch.bfloat16, False),
        ((1, 2, 1, 8, 20), torch.float16, False),
        ((1, 2, 2, 9, 20), torch.bfloat16, True),
        ((1, 2, 2, 4, 20), torch.float32, False),
        ((1, 2, 2, 5, 20), torch.float32, True),
    ],
)
def test_the_kernel_computes_what_it_is_faster_at(sizes, dtype, torchs, by_torch):
    scaled_dot_product_attention(*tensors(*sizes, dtype=dtype), enable_gqa=True)
    assert bool(by_torch) == torchs


def test_without_a_compiled_kernel_torchs_own_computes_full_precision(by_torch):
    with kernels.temporary_cpu_backend("reference"):
        scaled_dot_product_attention(*tensors(1, 2, 2, 1, 20, dtype=torch.bfloat16), enable_gqa=True)
    assert by_torch


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch 2.15's own, of vmap
def test_what_records_casts_drops_or_compiles_is_left_to_torch(by_torch):
    query, key, value = tensors(1, 2, 2, 1, 20, dtype=torch.bfloat16)
    query.requires_grad_()
    got = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    (grad,) = torch.autograd.grad(got.sum(), query)
    assert grad.abs().sum() > 0
    with torch.no_grad():
        scaled_dot_product_attention(query, key, value, dropout_p=0.5, enable_gqa=True)
        with torch.autocast("cpu", torch.bfloat16):
            scaled_dot_product_attention(query, key, value, enable_gqa=True)
        torch.func.vmap(scaled_dot_product_attention)(query[None], key[None, :, :1], value[None, :, :1])
    assert len(by_torch) == 4


def test_other_shapes_are_torch_s(by_torch):
    query = torch.randn(3, 1, 8, dtype=torch.bfloat16)
    got = scaled_dot_product_attention(query, query, query)
    assert torch.equal(got, query)
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(*tensors(1, 2, 1, 1, 3, dtype=torch.bfloat16), torch.ones(1, 5) > 0)
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(*tensors(1, 2, 2, 1, 3, dtype=torch.bfloat16))  # heads are shared unasked
    assert len(by_torch) == 3


def test_capped_scores_have_gradients():
    query, key, value = (one.double().requires_grad_() for one in tensors(1, 2, 2, 3, 5, (4, 4)))

    def capped(query, key, value):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, softcap=2.0)

    assert torch.autograd.gradcheck(capped, (query, key, value))


def test_capped_scores_without_dropout_and_of_four_dimensions():
    given = tensors(1, 2, 1, 1, 3)
    with pytest.raises(ValueError, match=r"softcap=2.0 takes .* not \(1, 2, 1, 16\), .* with dropout_p=0.1"):
        scaled_dot_product_attention(*given, dropout_p=0.1, softcap=2.0)
    with pytest.raises(ValueError, match="leave softcap out"):
        scaled_dot_product_attention(*(one[0] for one in given), softcap=2.0)
    assert lowmem.scaled_dot_product_attention is scaled_dot_product_attention


def test_a_query_that_sees_no_key_gets_zeros():
    query, key, value = tensors(1, 2, 1, 1, 3, dtype=torch.bfloat16)
    mask = torch.zeros(1, 3, dtype=torch.bool)
    for compute in (scaled_dot_product_attention, functional.scaled_dot_product_attention):
        assert (compute(query, key, value, mask) == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_what_is_no_floating_point_number_is_left_to_torch(dtype, queries, by_torch):
    """It refuses integers, which shares of values are not."""
    states = torch.ones(1, 2, queries, 4).to(dtype)
    with suppress(RuntimeError):
        scaled_dot_product_attention(states, states, states)
    assert len(by_torch) == 1
    with pytest.raises(ValueError, match=r"softcap=2.0 takes floating point numbers"):
        scaled_dot_product_attention(states, states, states, softcap=2.0)


@pytest.mark.parametrize("autocasts", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "added"])
@pytest.mark.parametrize(
    ("dtype", "is_slow"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_gradients_are_computed_in_float32_where_16_bits_are_slow(dtype, is_slow, mask, autocasts, monkeypatch):
    monkeypatch.setattr(type(kernels.backend_of(torch.zeros(1))), "fast_bfloat16", not is_slow)
    dtypes, own = [], functional.scaled_dot_product_attention

    def noted(*given, **named):
        dtypes.append((given[0].dtype, torch.is_autocast_enabled("cpu")))
        return own(*given, **named)

    monkeypatch.setattr(module.functional, "scaled_dot_product_attention", noted)
    given = tensors(1, 2, 2, 20, 20, dtype=dtype)
    given = [one.float().requires_grad_() if autocasts else one.requires_grad_() for one in given]
    masked = None if mask is None else torch.ones(20, 20, dtype=torch.bool).tril()
    if mask == "added":
        masked = torch.zeros(20, 20, dtype=given[0].dtype).masked_fill(~masked, -torch.inf)
    with torch.autocast("cpu", dtype, enabled=autocasts):
        got = scaled_dot_product_attention(*given, masked, enable_gqa=True)
    assert got.dtype is dtype
    assert dtypes == [(torch.float32, False) if is_slow else (given[0].dtype, autocasts)]
    gradients = torch.autograd.grad(got.sum(), given)
    doubles = [one.detach().double().requires_grad_() for one in given]
    wanted = exact(*doubles, None if masked is None else masked, enable_gqa=True)
    torch.testing.assert_close(got.double(), wanted, rtol=2**-6, atol=2**-6)
    for one, other in zip(gradients, torch.autograd.grad(wanted.sum(), doubles), strict=True):
        assert (one.double() - other).norm() <= 0.02 * other.norm()
    with torch.no_grad():
        scaled_dot_product_attention(*given, masked, enable_gqa=True)
    assert dtypes[-1] == (given[0].dtype, False)


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float16, 1), (torch.float32, 0)])
def test_a_training_step_replaces_slow_attention(dtype, calls, monkeypatch):
    found, own = [], scaled_dot_product_attention
    noted = lambda *given, **named: found.append(1) or own(*given, **named)  # noqa: E731
    monkeypatch.setattr(module, "scaled_dot_product_attention", noted)
    query, key, value = (one.requires_grad_() for one in tensors(1, 2, 1, 20, 20, dtype=dtype))
    layer = nn.Linear(16, 16, dtype=dtype)

    def attend(x):
        return functional.scaled_dot_product_attention(x, key, value, is_causal=True)

    with float32_attention_mode_if_faster(layer):
        attend(layer(query)).sum().backward()
    assert len(found) == calls
    assert all(one.grad is not None and one.grad.dtype is dtype for one in (query, key, value))
    attend(query)
    assert len(found) == calls
