"""Packing loses nothing, in either direction, for every byte, shape and block size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import pack, unpack
from lowmem.quant.packing import CODE_WIDTHS
from tests import strategies


@pytest.mark.parametrize("block_size", [8, 10, 16, 64, 512, 4096])
def test_every_byte_and_every_pair_of_codes_survives(block_size):
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack(unpack(every, block_size), block_size), every)
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).flatten()
    assert torch.equal(unpack(pack(codes, block_size), block_size), codes)


@given(strategies.leading_shapes, st.integers(0, 300), strategies.block_sizes, strategies.seeds)
def test_round_trips_for_every_shape_and_block_size(leading, pairs, block_size, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (*leading, 2 * pairs), generator=generator, dtype=torch.uint8)
    packed = pack(codes, block_size)
    assert packed.shape == (*leading, pairs)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, block_size), codes)
    other = torch.randint(0, 256, (*leading, pairs), generator=generator, dtype=torch.uint8)
    assert torch.equal(pack(unpack(other, block_size), block_size), other)


@given(
    st.sampled_from([*CODE_WIDTHS]),
    strategies.leading_shapes,
    st.integers(1, 300),
    strategies.block_sizes,
    strategies.seeds,
)
def test_codes_of_each_width_survive_as_bytes_and_in_floats(bits, leading, columns, block_size, seed):
    width = CODE_WIDTHS[bits]
    assert width.bits == bits
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*leading, columns), generator=generator, dtype=torch.uint8)
    packed = width.pack_rows(codes, block_size, 0)
    assert packed.shape == (*leading, width.row_bytes(columns))
    assert 8 * width.row_bytes(columns) < bits * columns + 8
    assert torch.equal(width.unpack_rows(packed, block_size, columns), codes)
    assert torch.equal(width.unpack_float_rows(packed.float(), block_size, columns), codes.float())
    other = width.pack_rows(codes, 8, 0)
    assert torch.equal(other, packed) or width.is_packed_by_block


def test_the_padding_code_fills_the_last_byte():
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert CODE_WIDTHS[4].pack_rows(codes, 8, 7).tolist() == [[1 | 3 << 4, 2 | 7 << 4]]
    assert CODE_WIDTHS[8].pack_rows(codes, 8, 7).tolist() == [[1, 2, 3]]


@given(st.integers(1, 40), strategies.small_blocks)
def test_strided_codes_pack_like_contiguous_ones(pairs, block_size):
    codes = torch.arange(4 * pairs, dtype=torch.uint8) % 16
    view = codes.view(2, -1).t().contiguous().t()
    assert torch.equal(pack(view, block_size), pack(view.contiguous(), block_size))


@pytest.mark.parametrize("block_size", [0, -8, 6, 9, 4098, 8.0, True, "16", None])
@pytest.mark.parametrize("function", [pack, unpack])
def test_a_bad_block_size_is_named(function, block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size!r} must be"):
        function(torch.zeros(8, dtype=torch.uint8), block_size)


def test_low_nibbles_hold_the_first_half_of_a_block_also_of_a_short_last_one():
    codes = torch.arange(12, dtype=torch.uint8)
    assert pack(codes, 8).tolist() == [low | low + 4 << 4 for low in range(4)] + [8 | 10 << 4, 9 | 11 << 4]
    assert torch.equal(pack(codes[:6], 4096), pack(codes[:6], 8))  # one short block


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (torch.zeros(8), TypeError, "must be a uint8 tensor, found torch.float32"),
        (torch.zeros(8, dtype=torch.int64), TypeError, "must be a uint8 tensor, found torch.int64"),
        ([1, 2], TypeError, "must be a uint8 tensor, found list"),
        (torch.tensor(3, dtype=torch.uint8), ValueError, "no last dimension"),
        (torch.zeros(2, 7, dtype=torch.uint8), ValueError, "must be even"),
        (torch.tensor([1, 16], dtype=torch.uint8), ValueError, "codes hold 16"),
    ],
)
def test_what_cannot_be_packed_is_named(given, error, says):
    with pytest.raises(error, match=says):
        pack(given, 8)
    if error is TypeError:
        with pytest.raises(error, match=says):
            unpack(given, 8)
