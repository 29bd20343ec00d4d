"""Which row-wise functions C computes, and which plain torch; other files hold what they compute."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lowmem import kernels, quantize
from lowmem.kernels import cpu_rowwise, reference
from lowmem.kernels.rms_norm_and_gating import ACTIVATIONS, norm_factor_grad
from lowmem.quant.backend import ColumnPanel, KeyOrValueStates, backend_for
from lowmem.quant.formats import get_format
from tests.compiled import ISAS, needs_kernel
from tests.kernels.test_rms_norm_and_gating import check_gated, check_norm, numbers


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
    torch.testing.assert_close(norm_factor_grad(grad, x, 1e-6, chunk_rows=3), norm_factor_grad(grad, x, 1e-6))
    for isa in sorted({*ISAS[:1], *ISAS[-1:]}):
        for dtype in (torch.float32, torch.bfloat16):
            with kernels.temporary_cpu_backend(isa), pytest.MonkeyPatch.context() as patch:
                check_what_c_takes(dtype, patch)


# Of a function's number in C: its name, its struct, and the field with the address of a gradient.
FUNCTIONS = {0: ("norm", cpu_rowwise.NORM_CALL, 8), 1: ("gated", cpu_rowwise.GATED_CALL, 16)}


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
        for activation in (silu, ACTIVATIONS["squared ReLU"]):
            assert operations(check_gated, one, two, g, activation) == {"gated", "gated_grad"}
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


def tensors_of(arguments):
    flat = [one for part in arguments for one in (part if isinstance(part, tuple) else (part,))]
    return [one for one in flat if isinstance(one, torch.Tensor)]


class ByTorchError(Exception):
    """A call that C did not compute."""


def given(dtype, *shape):
    return torch.ones(shape, dtype=dtype)


F32, F16, I8, U8, I64 = torch.float32, torch.float16, torch.int8, torch.uint8, torch.int64


def others(dtype, *shape):
    """What C must not take for numbers of a dtype and shape: others, and what has no memory."""
    yield given(torch.float64 if dtype is F32 else torch.int32, *shape)
    for change in (-1, 1):
        yield given(dtype, shape[0] + change, *shape[1:])
    if len(shape) > 1:
        yield given(dtype, *shape[:-1], shape[-1] + 1)
    yield given(dtype, *shape).to("meta")


def wrong_calls():
    """Yield calls of which one argument alone is wrong, as (name, arguments)."""

    def each(name, make, right, *leave, spaced=True):
        """Replace one tensor after the other; ``leave``: which."""
        for at, (dtype, *shape) in enumerate(right):
            if at in leave:
                continue
            wrong = [*others(dtype, *shape)]
            if spaced:
                wrong.append(given(dtype, *shape[:-1], 2 * shape[-1])[..., ::2])
            for one in wrong:
                made = [given(*form) for form in right]
                made[at] = one
                yield name, make(*made)

    form, silu = get_format("nf4"), ACTIVATIONS["SiLU"]
    yield from each("norm", lambda x, f: (x, f, 1e-6, False), [(F32, 4, 20), (F32, 20)], 0)
    yield from each("norm_grad", lambda x, f: (x, x, f, 1e-6), [(F32, 4, 20), (F32, 20)], 0)
    five = [(F32, 4, 20)] * 5
    into = lambda g, a, b, c, d: (g, a, b, silu, (c, d))  # noqa: E731
    yield from each("gated_grad", into, five, 0, 1, 2, spaced=False)
    yield "gated_grad", into(given(F32, 3, 20), *[given(*one) for one in five[1:]])
    yield "gated_grad", (*into(*[given(*one) for one in five])[:4], (given(F32, 4, 20), None))
    yield from each("entropies", lambda x, t: (x, t, 0.1, True), [(F32, 6, 12), (I64, 6)], 0, spaced=False)
    for target in (-1, 12):
        yield "entropies", (given(F32, 6, 12), torch.tensor([0, 1, 2, 3, 4, target]), 0.1, True)
    saved = [(F32, 50), (I8, 2, 32), (F32, 2, 1)]
    yield from each("encode_8bit", lambda x, c, s: (x, (c, s)), saved, 0)
    yield from each("decode_8bit", lambda c, s: (c, s, F32), saved[1:])
    columns = [(F32, 8, 40), (F32, 8, 40), (F32, 8), (F32, 8, 8), (F32, 8, 40), (U8, 8, 40)]
    rounding = lambda *tensors: (form, ColumnPanel(*tensors), False)  # noqa: E731
    yield from each("round_columns", rounding, columns, 2, 3)
    for at in (2, 3):
        for one in others(*columns[at]):
            made = [given(*form) for form in columns]
            made[at] = one
            yield "round_columns", rounding(*made)
    heads = [(F32, 2, 4, 3, 16), (I8, 2, 2, 40, 16), (F32, 2, 2, 40, 1), (I8, 2, 2, 40, 8), (F32, 2, 2, 40, 1)]
    attended = lambda q, k, a, v, b: (q, KeyOrValueStates(k, a), KeyOrValueStates(v, b), None, 1.0, None)  # noqa: E731
    yield from each("attention", attended, heads, 0, 3, spaced=False)
    right = [given(*one) for one in heads]
    for at, shape in (
        (0, (2, 3, 3, 16)),
        (0, (1, 4, 3, 16)),
        (3, (2, 1, 40, 8)),
        (3, (2, 2, 39, 8)),
        (3, (1, 2, 40, 8)),
    ):
        yield "attention", attended(*right[:at], given(heads[at][0], *shape), *right[at + 1 :])
    yield "attention", attended(right[0], right[1], None, right[3], right[4])
    yield "attention", attended(right[0], right[1].float(), *right[2:])
    yield "attention", (*attended(*right)[:3], given(I8, 3, 40), 1.0, None)
    coded = [(F32, 2, 2, 5, 16), (I8, 2, 2, 5, 16), (F32, 2, 2, 5, 1)]
    yield from each("encode_states", lambda x, c, s: (x, KeyOrValueStates(c, s)), coded, 0, spaced=False)
    yield "encode_states", (given(*coded[0]), KeyOrValueStates(given(*coded[1])))
    yield "encode_states", (given(*coded[0]), KeyOrValueStates(given(torch.bfloat16, 2, 2, 5, 16)))
    for rows in ((3, 64), (1, 64), (2, 96)):
        q = quantize(given(F32, 2, 64), "nf4", block_size=32)
        yield "quantize_rows", (given(F32, *rows), q, slice(0, 2), None)


@needs_kernel
def test_memory_of_another_dtype_or_size_is_never_given_to_c(monkeypatch):
    """C would read or write beyond it: torch computes, or says what is wrong."""

    def refuse(*given, **options):
        raise ByTorchError

    kernel, calls, missed = backend_for(), [*wrong_calls()], []
    native = SimpleNamespace(rowwise=lambda *given: None, quantize=lambda *given: True)
    monkeypatch.setattr(kernel, "native", native)
    for name, _ in calls:
        monkeypatch.setattr(reference, name, refuse)
    for name, arguments in calls:
        try:
            getattr(kernel, name)(*arguments)
        except ByTorchError:
            continue
        missed.append((name, [(one.dtype, *one.shape) for one in tensors_of(arguments)]))
    assert not missed
