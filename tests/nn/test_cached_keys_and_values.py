"""Keys and values that are kept in place: what a query sees, the room for them, and changes of sequences."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowmem
from lowmem import CachedStates
from lowmem.kernels.cpu_rowwise import NO_STATES, attention_work_and_struct_fields, states_struct_fields_or_none
from lowmem.kernels.native_program import NativeProgram
from lowmem.nn.cached_keys_and_values import EightBitStates, cache_capacity_rows
from lowmem.quant.backend import KeyOrValueStates, backend_for
from tests.compiled import needs_kernel

counts = st.lists(st.one_of(st.just(1), st.integers(1, 90)), min_size=1, max_size=60)


def new(count, seed=0, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, count, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got, expected, bits, dtype):
    if bits is None:
        assert torch.equal(got, expected)
    else:
        most = expected.float().abs().amax(-1, keepdim=True)
        half = 0.5 * most / 127 + (torch.finfo(dtype).eps * most if dtype != torch.float32 else 1e-6 * most)
        assert ((got.float() - expected.float()).abs() <= half).all()


@given(
    counts=counts,
    bits=st.sampled_from([None, 8]),
    window=st.sampled_from([None, 1, 9, 40, 200]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_query_sees_the_tokens_so_far_and_the_room_depends_on_their_number_alone(counts, bits, window, dtype):
    cached, whole = CachedStates(bits, window), new(0, dtype=dtype)
    for seed, count in enumerate(counts):
        states = new(count, seed, dtype=dtype)
        visible = whole if window is None else whole[:, :, max(whole.shape[2] - window + 1, 0) :]
        expected = torch.cat([visible, states], 2)
        got = cached.append(states)
        assert got.shape == expected.shape
        assert got.dtype is dtype
        exact = seed == 0 or window == 1  # no earlier token is seen
        assert (got is states) if exact else (isinstance(got, EightBitStates) == (bits == 8))
        assert_near(got + 0, expected, None if exact else bits, dtype)
        whole = torch.cat([whole, states], 2)
        assert cached.length == whole.shape[2]
        row = 12 if bits == 8 else 6 * dtype.itemsize  # 6 codes, 2 bytes that align, the scale
        assert cached.nbytes == 2 * 3 * cache_capacity_rows(cached.length, window) * row


@needs_kernel
@given(
    counts=counts,
    bits=st.sampled_from([None, 8]),
    window=st.sampled_from([None, 2, 9, 40]),  # of 1, no row is kept
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_c_writes_and_reads_at_the_places_what_append_writes_and_returns(counts, bits, window, dtype):
    kernel = backend_for()
    cached, twin = CachedStates(bits, window), CachedStates(bits, window)
    assert cached.places((2, 3, 1, 6), new(1, dtype=dtype)) is None  # the first states are returned as they are
    for seed, count in enumerate([5, *counts]):
        states = new(count, seed, dtype=dtype)
        expected = twin.append(states)
        if seed == 0:
            cached.append(states)
            continue
        into, seen, rows = cached.places(states.shape, states)
        assert rows == expected.shape[2]
        steps = NativeProgram(kernel, states.new_empty(states.numel()))
        steps.append_state_encoding(states.shape, states_struct_fields_or_none(states), "new")
        out = steps.append_attention("attention", states.numel())
        sizes, fields = (
            (2, 3, 1, count, rows, 6, 6),
            [*states_struct_fields_or_none(states), *seen, *seen, *NO_STATES],
        )
        work, call = attention_work_and_struct_fields(sizes, fields, 0.4, None, out)
        assert steps.try_run(new=into, attention=(work, *call))
        cached.grow(count)
        read = expected.codes_and_scales if isinstance(expected, EightBitStates) else KeyOrValueStates(expected)
        mixed = kernel.attention(states, read, read, None, 0.4, None)
        assert torch.equal(steps.scratch.view(mixed.shape), mixed)
        assert (cached.length, cached.count, cached.nbytes) == (twin.length, twin.count, twin.nbytes)
        assert torch.equal(cached.states + 0, twin.states + 0)
    for shape, like in (((2, 3, 1, 5), states), ((1, 3, 1, 6), states), ((2, 3, 1, 6), states.half())):
        assert (cached.places(shape, like) is None) == (bits is None or like is states)


@given(tokens=st.integers(1, 10**6), window=st.one_of(st.none(), st.integers(1, 10**5)))
def test_room_is_an_eighth_or_32_rows_more_at_most_and_grows_by_as_much(tokens, window):
    rows = cache_capacity_rows(tokens, window)
    if window is None or tokens <= window:
        assert tokens <= rows <= tokens + max(31, tokens // 8)
        assert cache_capacity_rows(rows, window) == rows
        if window is None:
            assert cache_capacity_rows(rows + 1) >= rows + max(
                32, rows // 16
            )  # else each token would be copied often
    else:
        assert window < rows <= window + max(64, window // 4)
        assert rows == cache_capacity_rows(tokens + 1, window) or tokens == cache_capacity_rows(window)


def test_a_token_is_added_without_a_copy_of_the_others():
    cached = CachedStates()
    cached.append(new(8))
    before = cached.append(new(1)).data_ptr()
    assert {cached.append(new(1)).data_ptr() for _ in range(23)} == {before}  # until the room is full


@pytest.mark.parametrize("bits", [None, 8])
def test_sequences_are_selected_and_tokens_removed(bits):
    cached = CachedStates(bits)
    states = new(20, batch=3)
    cached.append(states)
    cached.crop(4)
    cached.select(torch.tensor([2, 0, 0, 1]))
    added = new(2, 1, batch=4)
    got = copy.deepcopy(cached).append(added) + 0
    assert_near(got, torch.cat([states[[2, 0, 0, 1], :, :16], added], 2), bits, torch.float32)
    assert cached.length == 16
    cached.crop(16)
    assert cached.append(added) is added
    cached.clear()
    assert (cached.length, cached.nbytes, cached.rows) == (0, 0, None)
    cached.select(torch.tensor([0]))
    assert cached.append(states) is states


@pytest.mark.parametrize("bits", [None, 8])
def test_whole_rows_of_states_are_kept_as_they_are_and_others_are_written_anew(bits):
    cached, states = CachedStates(bits), new(20)
    assert cached.states is None
    cached.append(states)
    before = cached.states + 0
    cached.states = cached.states[:, :, :-4].index_select(0, torch.tensor([1, 0, 1]))[torch.tensor([2, 1]), ...]
    assert torch.equal(cached.states + 0, before[[1, 0], :, :16])
    assert (type(cached.states) is EightBitStates) == (bits == 8)
    for one in (None, bits):
        again = CachedStates(one)
        again.states = cached.states
        assert torch.equal(again.states + 0, cached.states + 0)
    other = new(5, 1)
    cached.states = other
    assert_near(cached.states + 0, other, bits, torch.float32)
    for dims in ((Ellipsis, slice(2)), (0,), (slice(None), slice(None), torch.tensor([0]))):
        part = cached.states[dims]
        assert type(part) is torch.Tensor
        assert torch.equal(part, (cached.states + 0)[dims])


@pytest.mark.parametrize("bits", [None, 8])
def test_some_of_the_kept_tokens_stay_in_the_room(bits):
    cached = CachedStates(bits)
    cached.append(new(20))
    before, nbytes = cached.states + 0, cached.nbytes
    cached.states = cached.states[:, :, 3:-4]
    assert cached.nbytes == nbytes
    assert torch.equal(cached.states + 0, before[:, :, 3:16])
    cached.states = cached.states[:1]  # of one sequence
    cached.append(new(1, batch=1))
    assert torch.equal(cached.states[:, :, :-1] + 0, before[:1, :, 3:16])


def test_older_tokens_stay_until_they_are_forgotten():
    cached = CachedStates(window=5)
    states = new(70)
    for one in states.split(7, 2):
        got = cached.append(one, forget=False)
        assert torch.equal(got[:, :, -one.shape[2] :], one)
        assert got.shape[2] <= 4 + 7
    assert cached.rows.shape[2] == 70
    cached.append(new(1))
    assert (cached.rows.shape[2], cached.nbytes) == (4, 2 * 3 * 64 * 6 * 4)


@pytest.mark.parametrize("bits", [None, 8])
def test_rows_that_were_read_are_not_written_to(bits):
    """After tokens are removed, or sequences select each other."""
    cached = CachedStates(bits)
    cached.append(new(8))
    for change in (lambda: cached.crop(3), lambda: cached.select(torch.tensor([1, 0])), lambda: cached.crop(2)):
        read = cached.states
        before = read + 0
        change()
        cached.append(new(4, 1))
        assert torch.equal(read + 0, before)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_users_states_are_not_written_to(bits):
    given = CachedStates(bits)
    given.append(new(8))
    states = given.states
    before = states + 0
    cached = CachedStates(bits)
    cached.states = states
    cached.crop(3)
    cached.append(new(2, 1))
    cached.states = states
    cached.select(torch.tensor([1, 0]))
    assert torch.equal(states + 0, before)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 2, 0], [1, 2, 0]])
def test_as_many_sequences_are_selected_in_place(bits, order):
    cached = CachedStates(bits)
    cached.append(new(8, batch=3))
    cached.append(new(1, 1, batch=3))
    before, place = copy.deepcopy(cached).states + 0, cached._buffer.data_ptr()
    cached.select(torch.tensor(order))
    cached.append(new(1, 2, batch=3))
    assert cached._buffer.data_ptr() == place
    assert torch.equal(cached.states[:, :, :-1] + 0, before[order])


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_states_of_two_dtypes_are_kept_in_the_wider_one(first):
    second = torch.bfloat16 if first is torch.float32 else torch.float32
    cached, states = CachedStates(), (new(3, dtype=first), new(2, 1, dtype=second))
    got = [cached.append(item) for item in states][-1]
    assert torch.equal(got, torch.cat(states, 2))
    assert cached.append(new(1, 2, dtype=second)).dtype is torch.float32


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_concatenated_states_where_they_are_kept(window):
    """Memory that a graph reads is not written to: backward would raise an error."""

    def squares(keeps):
        cached, whole, leaves, total = CachedStates(window=window), new(0), [], torch.zeros(())
        cached._keeps_gradients = True
        for seed, is_enabled in enumerate((False, True, True, False, True)):
            leaf = new(2, seed).requires_grad_()
            leaves.append(leaf)
            with torch.set_grad_enabled(is_enabled):
                seen = whole if window is None else whole[:, :, max(whole.shape[2] - window + 1, 0) :]
                whole = torch.cat([whole, leaf], 2)
                got = cached.append(leaf) if keeps else torch.cat([seen, leaf], 2)
                total = total + got.square().sum()
        total.backward()
        return [leaf.grad for leaf in leaves]

    for got, expected in zip(squares(True), squares(False), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)


def test_no_gradients_are_kept():
    cached, states = CachedStates(), new(3).requires_grad_()
    assert cached.append(states) is states
    assert not cached.append(states).requires_grad


def test_states_in_8_bits_say_what_they_are():
    cached = CachedStates(bits=8)
    cached.append(new(3))
    states = cached.append(new(1))
    assert repr(states).split() == repr(states + 0).replace("tensor", "EightBitStates", 1).split()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="bits=4 must be 8"):
        CachedStates(bits=4)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        lowmem.CachedStates(window=0)
    cached = CachedStates(window=4)
    cached.append(new(3))
    with pytest.raises(ValueError, match="tokens=2 cannot be removed of 3 with window=4"):
        cached.crop(2)
    cached = CachedStates()
    with pytest.raises(ValueError, match="tokens=1 cannot be removed of 0"):
        cached.crop(1)


@pytest.mark.parametrize("bits", [None, 8])
def test_other_sequences_heads_or_widths_are_refused_and_change_nothing(bits):
    cached = CachedStates(bits)
    cached.append(new(3))
    for batch, heads, width in ((1, 3, 6), (3, 3, 6), (2, 2, 6), (2, 4, 6), (2, 3, 2), (2, 3, 5), (2, 3, 7)):
        with pytest.raises(ValueError, match=r"do not continue \(2, 3\) sequences and heads"):
            cached.append(torch.ones(batch, heads, 3, width))
    assert cached.length == cached.rows.shape[2] == 3


@pytest.mark.parametrize("bits", [None, 8])
def test_rows_of_inference_mode_are_continued_outside_of_it(bits):
    x, cache, other = torch.randn(2, 2, 5, 8), CachedStates(bits), CachedStates(bits)
    with torch.inference_mode():
        cache.append(x[:, :, :3])
    other.append(x[:, :, :3])
    for at in (3, 4):
        given = x[:, :, at : at + 1]
        assert torch.equal(cache.append(given) + 0, other.append(given) + 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [3e-7, 3e-6, 2e-5, 1.0, 6e4, "largest"])
def test_rows_of_any_size_are_rounded_once_and_stay_finite(dtype, size):
    """The scale is a float32: in float16 it would be a few of its smallest steps, or zero."""
    most = torch.finfo(dtype).max if size == "largest" else size
    rows = (new(5, 1).double().clamp(-2, 2) / 2 * most).to(dtype)
    rows[:, :, 2] = -most
    cached = CachedStates(8)
    cached.append(rows)
    seen = cached.append(rows)[:, :, :5]
    off = (seen + 0).double() - rows.double()
    step = rows.double().abs().amax(-1, keepdim=True) / 127
    rounding = (rows.double().abs() + step) * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal * 1e-3
    assert (off.abs() <= 0.5001 * step + rounding).all()
    assert (seen + 0).isfinite().all()
    if 9.0 * most > torch.finfo(torch.float32).max:
        return  # torch adds values before it divides
    query = torch.zeros(2, 3, 9, 6, dtype=dtype)
    many = lowmem.scaled_dot_product_attention(query, seen, seen)
    few = lowmem.scaled_dot_product_attention(query[:, :, :8], seen, seen)
    assert many.isfinite().all()
    assert few.isfinite().all()
    expected = rows.double().mean(2, keepdim=True)
    bound = rows.double().abs().amax((2, 3), keepdim=True) * (0.5001 / 127 + 4 * torch.finfo(dtype).eps)
    for got in (few, many):
        assert ((got.double() - expected).abs() <= bound + torch.finfo(dtype).smallest_normal * 1e-3).all()


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_states_that_are_no_floating_point_numbers_are_refused(bits, dtype):
    cached = CachedStates(bits)
    for filled in (False, True):
        with pytest.raises(TypeError, match=f"states of {dtype} .*floating point.*to\\(torch.float32\\)"):
            cached.append(new(3).to(dtype))
        assert cached.count == 3 * filled
        assert (cached.rows is not None) == filled
        cached.append(new(3)) if not filled else None


def test_float64_beyond_float32_is_clamped_and_what_is_not_finite_stays_so():
    states = CachedStates(bits=8)
    first = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    states.append(first)
    rows = torch.tensor([[1e300, -1e300, 1.0, 0.0], [1e300, torch.inf, 1.0, 0.0]], dtype=torch.float64)
    got = states.append(rows[None, None])[0, 0, 1:].double()
    most = torch.finfo(torch.float32).max
    torch.testing.assert_close(
        got[0], torch.tensor([most, -most, 0.0, 0.0], dtype=torch.float64), rtol=1e-6, atol=0.0
    )
    assert got[1].isnan().all()
