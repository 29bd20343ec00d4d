"""8-bit codes of blocks: the same bits from C at each ISA and from torch."""

import torch

from lowmem import kernels
from lowmem.kernels.codes import BLOCK, code, code_in_torch, decode, decode_in_torch
from tests.rounding import default_dtype
from tests.selection import in_one_case, rows_in_one_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(length, kind, dtype):
    torch.manual_seed(length)
    x = torch.randn(length) * torch.logspace(-3, 3, length)
    if kind == "halves":  # between two codes, for scales of 1
        x = (torch.randint(-127, 127, (length,)) + 0.5).clamp(-127, 127)
        x[::BLOCK] = 127
    elif kind == "tiny":
        x = x * torch.finfo(torch.float32).tiny
    elif kind == "zeros":
        x[: length // 2] = 0
    return x.to(dtype)


@in_one_case(
    2,
    isa=kernels.available(),
    dtype=DTYPES,
    length=[1, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 70_000],
    kind=["normal", "halves", "tiny", "zeros"],
)
def test_codes_scales_and_counts_have_the_bits_of_the_definition(isa, dtype, length, kind):
    x = numbers(length, kind, dtype)
    wanted, scales, counts = code_in_torch(x)
    with kernels.using(isa):
        got, found, counted = code(x)
        back = decode(got, found, dtype)
    assert torch.equal(got, wanted)
    assert torch.equal(found, scales)
    assert counted == counts == (int(x.count_nonzero()), int(wanted.count_nonzero()))
    assert torch.equal(back, decode_in_torch(wanted, scales, dtype))
    assert back.dtype is dtype
    assert not got.view(-1)[length:].any()


@rows_in_one_case("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_block_that_is_not_finite_has_the_scale_nan_and_no_other_has(bad):
    x = torch.randn(3 * BLOCK + 8)
    x[BLOCK + 6] = bad
    for name in kernels.available():
        with kernels.using(name):
            codes, scales, _ = code(x)
            back = decode(codes, scales, x.dtype)
        assert scales.isnan().view(-1).tolist() == [False, True, False, False]
        assert back[1].isnan().all()


def test_what_c_does_not_take_is_computed_in_torch():
    x = torch.randn(130, dtype=torch.float64)
    codes, scales, _ = code(x)
    assert (decode(codes, scales, torch.float64).view(-1)[:130] - x).abs().max() <= float(scales.max()) * 0.51
    every_second = torch.randn(260)[::2]
    assert torch.equal(code(every_second)[0], code(every_second.contiguous())[0])
    assert code(torch.empty(0))[0].shape == (0, BLOCK)
    x = torch.randn(130)
    negated = torch._neg_view(x)  # whose memory holds the numbers with the other sign
    for got, wanted in zip(code(negated), code(-x), strict=True):
        assert torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted


@rows_in_one_case("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    """Scratch is float32, whatever torch makes by default."""
    for x in (numbers(1000, "normal", torch.float64), numbers(1000, "normal", torch.bfloat16)):
        wanted, scales, counts = code_in_torch(x)
        values = decode_in_torch(wanted, scales, x.dtype)
        with default_dtype(dtype):
            for found in (code_in_torch(x), code(x)):
                assert torch.equal(found[0], wanted)
                assert torch.equal(found[1], scales)
                assert found[2] == counts
            assert torch.equal(decode_in_torch(wanted, scales, x.dtype), values)
            assert torch.equal(decode(wanted, scales, x.dtype), values)
