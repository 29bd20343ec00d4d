"""Which row-wise functions C computes, and which plain torch; other files hold what they compute."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lowmem import kernels
from lowmem.kernels import cpu_rows, reference
from lowmem.kernels.rowwise import ACTIVATIONS, factor_grad
from lowmem.quant.backend import backend_for
from tests.compiled import ISAS
from tests.kernels.test_rowwise import check_gated, check_norm, numbers


def test_other_dtypes_and_empty_batches_and_which_arguments_c_takes():
    backend, silu = backend_for(), ACTIVATIONS["SiLU"]
    for dtype in (torch.float64, torch.float16):
        x, factor = numbers((3, 20), 0, dtype), torch.ones(20, dtype=torch.promote_types(dtype, torch.float32))
        assert backend.norm(x, factor, 1e-6, False).dtype is backend.norm_grad(x, x, factor, 1e-6).dtype is dtype
        assert backend.gated(x, x, silu, dtype).dtype is dtype
    for empty in (torch.empty(0, 20), torch.empty(3, 0)):
        assert backend.norm(empty, torch.ones(empty.shape[-1]), 1e-6, False).shape == empty.shape
        assert backend.gated(empty, empty, silu, empty.dtype).shape == empty.shape
    grad, x = numbers((7, 20), 0, torch.float32), numbers((7, 20), 1, torch.float32)
    torch.testing.assert_close(factor_grad(grad, x, 1e-6, rows=3), factor_grad(grad, x, 1e-6))
    for isa in sorted({*ISAS[:1], *ISAS[-1:]}):
        for dtype in (torch.float32, torch.bfloat16):
            with kernels.using(isa), pytest.MonkeyPatch.context() as patch:
                check_what_c_takes(dtype, patch)


# Of a function's number in C: its name, its struct, and the field with the address of a gradient.
FUNCTIONS = {0: ("norm", cpu_rows.NORM_CALL, 8), 1: ("gated", cpu_rows.GATED_CALL, 15)}


def check_what_c_takes(dtype, patch):
    """Plain tensors of one dtype and shape in rows that fill memory, or are evenly spaced; torch does the rest."""
    kernel, called = backend_for(), []
    native = kernel.native

    def rowwise(isa, number, threads, count, call):
        name, struct, at = FUNCTIONS[number]
        called.append(name + "_grad" * bool(struct.unpack(call)[at]))
        native.rowwise(isa, number, threads, count, call)

    patch.setattr(kernel, "native", SimpleNamespace(**{**vars(native), "rowwise": rowwise}))

    def operations(check, *given):
        called.clear()
        check(*given)
        return set(called)

    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    a, b, grad = (numbers((2, 3, 20), seed, dtype) for seed in range(3))
    left, right = torch.cat([a, b], -1).chunk(2, -1)
    uneven = numbers((2, 5, 40), 3, dtype)[:, :3]
    wide, silu = numbers(40, 4, torch.float32), ACTIVATIONS["SiLU"]
    factor = wide[:20]
    for x, g in ((a, grad), (a.transpose(0, 1), grad.view(3, 2, 20)), (a[0, 0], grad[0, 0]), (a, grad.to(other))):
        assert operations(check_norm, x, factor, g, 1e-6) == {"norm", "norm_grad"}
    assert operations(check_norm, a, factor, torch._neg_view(grad), 1e-6) == {"norm"}
    for x, f in (
        (left, factor),
        (uneven[..., :20], factor),
        (numbers((2, 20, 3), 5, dtype).mT, factor),
        (torch._neg_view(a), factor),
        (a, wide[::2]),
        (a, factor.double()),
    ):
        assert operations(check_norm, x, f, grad, 1e-6) == set()
    for one, two, g in (
        (a, b, grad),
        (left, right, grad),
        (a[0, 0], b[0, 0], grad[0, 0]),
        (a.bfloat16(), b.bfloat16(), grad),  # may be wider
    ):
        assert operations(check_gated, one, two, g, silu) == {"gated", "gated_grad"}
    for one, two, g in (
        (left, b, grad),
        (a, right, grad),
        (uneven[..., :20], uneven[..., 20:], grad),
        (a, b.to(other), grad),
        (a, torch._neg_view(b), grad),
        (numbers(40, 5, dtype)[::2], b[0, 0], grad[0, 0]),
        (a.float(), b.float(), grad.bfloat16()),
    ):
        assert operations(check_gated, one, two, g, silu) == set()
    # Gradients go where they are to: evenly spaced, or by torch.
    whole = torch.empty_like(a), torch.empty_like(a)
    kernel.gated_grad(grad, a, b, silu, whole)
    spaced = torch.full((2, 5, 40), torch.nan, dtype=dtype)
    for into, by_c in (
        (spaced.flatten(0, 1)[:6].unflatten(0, (2, 3)).chunk(2, -1), True),
        ((spaced[:, :3, :20], spaced[:, :3, 20:]), False),
        ((spaced[:, :3, :20], torch.empty_like(b)), False),
        ((torch.empty_like(a), spaced[:, :3, 20:]), False),
    ):
        assert operations(kernel.gated_grad, grad, a, b, silu, into) == ({"gated_grad"} if by_c else set())
        torch.testing.assert_close(into, whole)
    # Nothing is hidden from what records operations, or gives numbers for several.
    x, expected = numbers((2, 3, 20), 6, dtype), kernel.norm(b, factor, 1e-6, False)
    called.clear()
    normed = lambda one: kernel.norm(one, factor, 1e-6, False)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(normed)(b), expected)
    torch.testing.assert_close(make_fx(normed)(x)(b), expected)
    torch.testing.assert_close(kernel.gated(a, b[:1], silu, dtype), reference.gated(a, b[:1], silu, dtype))
    assert not called
