"""8-bit codes of blocks: the same bits from C at each ISA and from torch."""

import pytest
import torch

from lowmem import kernels
from lowmem.kernels import codes_8bit as definitions
from lowmem.kernels.codes_8bit import BLOCK, empty_codes_and_scales
from lowmem.quant.backend import backend_of
from tests.rounding import default_dtype
from tests.selection import covering

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


def coded(x, backend=definitions):
    into = empty_codes_and_scales(x)
    return *into, backend.encode_8bit(x, into)


@covering(
    2,
    isa=kernels.available_cpu_backend_names(),
    dtype=DTYPES,
    length=[1, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 300_000],
    kind=["normal", "halves", "tiny", "zeros"],
)
def test_codes_scales_and_counts_have_the_bits_of_the_definition(isa, dtype, length, kind):
    x = numbers(length, kind, dtype)
    wanted, scales, counts = coded(x)
    with kernels.temporary_cpu_backend(isa):
        got, found, counted = coded(x, backend_of(x))
        back = backend_of(x).decode_8bit(got, found, dtype)
    assert torch.equal(got, wanted)
    assert torch.equal(found, scales)
    assert counted == counts == (int(x.count_nonzero()), int(wanted.count_nonzero()))
    assert torch.equal(back, definitions.decode_8bit(wanted, scales, dtype))
    assert back.dtype is dtype
    assert not got.view(-1)[length:].any()


@covering(
    2,
    dtype=[*DTYPES, torch.float64],
    length=[0, 1, BLOCK - 1, BLOCK + 1, 300_000],
    kind=["normal", "halves", "tiny", "zeros"],
)
def test_roots_are_within_half_a_step_and_keep_what_is_not_finite(dtype, length, kind):
    """Chunks depend on the device: on the CPU, 300,000 numbers are several."""
    x, special = numbers(length, kind, dtype), torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 2.0], dtype=dtype)
    x[: min(length, 5)] = special[: min(length, 5)]
    definitions.encode_roots(x, into := empty_codes_and_scales(x))
    back = definitions.decode_roots(*into, dtype).view(-1)[:length]
    assert back.dtype is dtype
    finite = x.isfinite()
    assert torch.equal(back[~finite].nan_to_num(3), x[~finite].nan_to_num(3))
    x, back, scale = x[finite].double(), back[finite].double(), into[1].expand(-1, BLOCK).reshape(-1)[:length][finite]
    # Half a step, as derived there; the quotient, its root, 126 times it, the level and its product are rounded
    bound = (x.abs() * scale).sqrt() / 126 + scale.double() / 252**2
    rounded = (6 * 2.0**-24 + torch.finfo(dtype).eps) * x.abs() + torch.finfo(torch.float32).tiny
    assert ((back - x).abs() <= bound * (1 + 2.0**-20) + rounded + torch.finfo(dtype).smallest_normal).all()
    assert (back[x == 0] == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_block_that_is_not_finite_has_the_scale_nan_and_no_other_has(bad):
    x = torch.randn(3 * BLOCK + 8)
    x[BLOCK + 6] = bad
    for name in kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(name):
            codes, scales, _ = coded(x, backend_of(x))
            back = backend_of(x).decode_8bit(codes, scales, x.dtype)
        assert scales.isnan().view(-1).tolist() == [False, True, False, False]
        assert back[1].isnan().all()


def test_numbers_that_c_does_not_take_are_coded_in_torch():
    x = torch.randn(130, dtype=torch.float64)
    codes, scales, _ = coded(x, backend_of(x))
    back = backend_of(x).decode_8bit(codes, scales, torch.float64).view(-1)[:130]
    assert (back - x).abs().max() <= float(scales.max()) * 0.51
    assert coded(torch.empty(0), backend_of(x))[0].shape == (0, BLOCK)
    every_second, x = torch.randn(260)[::2], torch.randn(130)
    negated = torch._neg_view(x)  # whose memory holds the numbers with the other sign
    for given, same in ((every_second, every_second.contiguous()), (negated, -x)):
        (codes, scales, counts), wanted = coded(given, backend_of(x)), coded(same)
        assert torch.equal(codes, wanted[0])
        assert torch.equal(scales, wanted[1])
        assert counts == wanted[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    """Scratch is float32, whatever torch makes by default."""
    for x in (numbers(1000, "normal", torch.float64), numbers(1000, "normal", torch.bfloat16)):
        wanted, scales, counts = coded(x)
        values = definitions.decode_8bit(wanted, scales, x.dtype)
        with default_dtype(dtype):
            for backend in (definitions, backend_of(x)):
                codes, found, counted = coded(x, backend)
                assert torch.equal(codes, wanted)
                assert torch.equal(found, scales)
                assert counted == counts
                assert torch.equal(backend.decode_8bit(wanted, scales, x.dtype), values)
