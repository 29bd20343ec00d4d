"""Norms, gated activations and cross entropies of rows: plain torch and the compiled kernel against float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lowmem import kernels
from lowmem.kernels.rms_norm_and_gating import ACTIVATIONS, norm_factor_grad
from lowmem.quant.backend import SquaredReLU, backend_for, backend_of
from tests import strategies
from tests.compiled import ISAS, compiled, on_threads
from tests.rounding import default_dtype, gamma, unit
from tests.selection import covering

everywhere = pytest.mark.parametrize("isa", ["reference", *compiled.args[1]])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
EXP = 40  # roundings of a sigmoid and what is multiplied with it in float32; torch's own are no more


def near(got, exact, magnitudes, roundings, dtype, more=0.0):
    """Hold numbers to exact ones: so many roundings in float32, and one to the dtype; more is off before these."""
    bound = (
        gamma(roundings) + unit(dtype) * (dtype is not torch.float32) * 1.01
    ) * magnitudes + 1e-28  # e^-88 saturates
    bound = bound + 1.01 * more
    excess = (got.double() - exact).abs() - bound
    assert got.dtype is dtype
    assert (excess <= 0).all(), f"beyond the bound by {float(excess.max()):.3g}"


def numbers(shape, seed, dtype, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check_norm(x, factor, grad, eps):
    """The norm and its gradients: a mean of n squares is off by gamma(n + 1), its root by half of that."""
    n, wide, f = x.shape[-1], x.double().requires_grad_(), factor.double().requires_grad_()
    inverse = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    exact = wide * inverse * f
    near(backend_of(x).norm(x, factor, eps, False), exact.detach(), exact.detach().abs(), n + 6, x.dtype)
    of_x, of_factor = torch.autograd.grad(exact, [wide, f], grad.double())
    scaled, inverse = (grad.double() * factor).abs(), inverse.detach()
    dot = (scaled * x.double().abs()).mean(-1, keepdim=True)
    sizes = scaled * inverse + x.double().abs() * dot * inverse**3
    got = backend_of(x).norm_grad(grad, x, factor, eps)
    near(got, of_x, sizes, 3 * n + 16, x.dtype)
    rows = x.numel() // n
    terms = (grad.double() * x.double() * inverse).abs().reshape(-1, n).sum(0)
    near(norm_factor_grad(grad, x, eps), of_factor, terms, rows + n + 8, torch.float32)
    early = backend_of(x).norm(x, factor, eps, True)
    rounded = ((x.double() * inverse).to(x.dtype).double() * factor).to(x.dtype)
    assert ((early.double() - rounded.double()).abs() <= 2.1 * unit(x.dtype) * early.double().abs() * (n + 2)).all()
    if x.dtype is torch.bfloat16:  # nearly always the same numbers
        assert (early != rounded).sum() <= 1 + 0.02 * early.numel()


def check_gated(a, b, grad, activation):
    check = check_gated_by_a_square if isinstance(activation, SquaredReLU) else check_gated_by_a_sigmoid
    check(a, b, grad, activation)


def check_gated_by_a_square(a, b, grad, activation):
    """A square and a product are rounded once each; of the gradients, a product more."""
    dtype, wide = grad.dtype, [one.double().requires_grad_() for one in (a, b)]
    exact = wide[0].relu().square() * wide[1]
    near(backend_of(a).gated(a, b, activation, dtype), exact.detach(), exact.detach().abs(), 2, dtype)
    into = torch.empty(a.shape, dtype=dtype), torch.empty(a.shape, dtype=dtype)
    backend_of(a).gated_grad(grad, a, b, activation, into)
    for got, one in zip(into, torch.autograd.grad(exact, wide, grad.double()), strict=True):
        near(got, one, one.abs(), 3, dtype)


def check_gated_by_a_sigmoid(a, b, grad, activation):
    dtype, wide = grad.dtype, [one.double().requires_grad_() for one in (a, b)]
    x, powers = wide[0], [wide[0].detach().abs().clamp_max(200) ** (2 * i + 1) for i in range(len(activation.terms))]
    z = sum(term * x ** (2 * i + 1) for i, term in enumerate(activation.terms))
    sigmoid = torch.special.ndtr(x) if activation.uses_erf else torch.sigmoid(z)
    exact = x * sigmoid * wide[1]
    # An argument of the exponential that is off by gamma(4) of its parts moves it by as much as they are large.
    parts = sum(abs(term) * power for term, power in zip(activation.terms, powers, strict=True))
    grows = 1 + parts.clamp_max(200)
    # What the polynomial of an error function is off by: test_the_polynomial_is_near_the_normal_distribution.
    off = (1 + x.detach().abs()) * POLYNOMIAL if activation.uses_erf else torch.zeros(1)
    more, of_slope = off * b.double().abs(), SLOPE * activation.uses_erf * (grad.double() * b.double()).abs()
    near(backend_of(a).gated(a, b, activation, dtype), exact.detach(), exact.detach().abs() * grows, EXP, dtype, more)
    of_a, of_b = torch.autograd.grad(exact, wide, grad.double())
    sigmoid, act = sigmoid.detach(), (x * sigmoid).detach()
    grown = sum((2 * i + 1) * abs(term) * powers[i] for i, term in enumerate(activation.terms))
    slope = grown.clamp_max(1e6) * sigmoid * (1 - sigmoid if activation.uses_erf else 1) + sigmoid
    into = torch.empty(a.shape, dtype=dtype), torch.empty(a.shape, dtype=dtype)
    backend_of(a).gated_grad(grad, a, b, activation, into)
    near(into[0], of_a, (grad.double() * b.double()).abs() * slope * grows, 2 * EXP, dtype, of_slope)
    near(into[1], of_b, (grad.double() * act).abs() * grows, EXP, dtype, off * grad.double().abs())


POLYNOMIAL, SLOPE = 1.5e-8, 3.2e-7  # of GELU by the error function: over (1 + |x|), and of its slope


def test_the_polynomial_is_near_the_normal_distribution():
    """In float64, everywhere: it grows from 0 on, and beyond 8 its sigmoid is 0 or 1 to the last bit of float32."""
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.linspace(12.1, 88, 1001)]).double().requires_grad_()
    z = sum(term * x ** (2 * i + 1) for i, term in enumerate(ACTIVATIONS["GELU"].terms))
    got, exact = x * torch.sigmoid(z), x * torch.special.ndtr(x)
    assert ((got - exact).abs() <= POLYNOMIAL * (1 + x.abs())).all()
    slopes = [torch.autograd.grad(one.sum(), x)[0] for one in (got, exact)]
    assert (slopes[0] - slopes[1]).abs().max() <= SLOPE
    assert (z[x > 0].diff() > 0).all()
    assert torch.sigmoid(-z[x > 8]).max() < 2**-25


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 576, 1536]))


@everywhere
@given(st.integers(1, 5), SIZES, DTYPES, st.sampled_from([1e-3, 1.0, 30.0]), strategies.seeds)
def test_norms_and_activations_equal_float64(isa, rows, columns, dtype, scale, seed):
    with kernels.temporary_cpu_backend(isa), on_threads(1 + seed % 3):
        check_rows(rows, columns, dtype, scale, seed)


def check_rows(rows, columns, dtype, scale, seed):
    backend = backend_for()
    a, b, grad = (numbers((2, rows, columns), seed + i, dtype, scale) for i in range(3))
    factor = numbers(columns, seed + 3, torch.float32)
    for x, g in ((a, grad), (a.transpose(0, 1), grad.transpose(0, 1).contiguous()), (a.mT, grad.mT)):
        check_norm(x, factor[:1].expand(x.shape[-1]).contiguous() if x.shape[-1] != columns else factor, g, 1e-6)
    both = torch.cat([a, b], -1)
    for activation in ACTIVATIONS.values():
        for pair in ((a, b), both.chunk(2, -1), (a.mT, b.mT)):
            g = grad if pair[0].shape == grad.shape else grad.mT
            check_gated(*pair, g, activation)
        if dtype is torch.bfloat16:  # with gradients in float32
            check_gated(a, b, grad.float(), activation)
        one, alone, same = torch.ones_like(a), torch.empty_like(a), (torch.empty_like(a), torch.empty_like(a))
        backend.gated_grad(grad, a, None, activation, (alone, None))
        backend.gated_grad(grad, a, one, activation, same)
        assert torch.equal(alone, same[0])
        assert torch.equal(backend.gated(a, None, activation, dtype), backend.gated(a, one, activation, dtype))
    halves = torch.full_like(both, torch.nan)
    backend.gated_grad(grad, a, b, activation, halves.chunk(2, -1))
    whole = torch.empty_like(a), torch.empty_like(a)
    backend.gated_grad(grad, a, b, activation, whole)
    assert torch.equal(halves, torch.cat(whole, -1))


@pytest.mark.parametrize("name", ["reference", *ISAS])
def test_extreme_numbers_saturate_and_a_nan_stays_where_it_is(name):
    x = torch.tensor([[0.0, -0.0, 90.0, -90.0, 1e18, -1e18, 1e-40, 3e38, -3e20, torch.nan] * 5])
    with kernels.temporary_cpu_backend(name):
        backend = backend_for()
        for activation in ACTIVATIONS.values():
            into = torch.empty_like(x), torch.empty_like(x)
            out = backend.gated(x, torch.ones_like(x), activation, x.dtype)
            backend.gated_grad(torch.ones_like(x), x, torch.ones_like(x), activation, into)
            for one in (out, *into):
                assert torch.equal(one.isnan(), x.isnan())
            positive, squares = x >= 80, isinstance(activation, SquaredReLU)
            assert torch.equal(out[positive], x[positive].square() if squares else x[positive])
            assert torch.equal(into[0][positive], 2 * x[positive] if squares else torch.ones_like(x[positive]))
            if squares:  # exactly, at the smallest and the largest numbers, too
                assert not out[x <= 0].any()
                assert not into[0][x <= 0].any()
            assert (out[(x <= -80) & (x > -1e3)].abs() <= 1e-30).all()
            assert (into[0][x <= -80].abs() <= 1e-20).all()
        zeros = backend.norm(torch.zeros(2, 40), torch.ones(40), 1e-6, False)
        assert torch.equal(zeros, torch.zeros(2, 40))
        broken = torch.ones(2, 40)
        broken[1, 3] = torch.nan
        normed = backend.norm(broken, torch.ones(40), 1e-6, False)
        assert torch.equal(normed.isnan().any(1), torch.tensor([False, True]))


def exact_entropies(logits, targets, smoothing):
    wide = logits.detach().clone().double().requires_grad_()
    losses = functional.cross_entropy(wide, targets, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def assert_entropies(found, got, logits, targets, smoothing):
    """Hold losses and gradients of rows to those in float64.

    A sum of n exponentials, of 6 roundings each, is off by a factor (n + 8) u; the logarithm adds that and u.
    """
    columns = logits.shape[1]
    losses, gradient = exact_entropies(logits, targets, smoothing)
    roundoff = 2.0**-24 if found.dtype is torch.float32 else 2.0**-52  # twice float64's: the exact ones are off, too
    relative = (columns + 16) * roundoff + 90 * roundoff  # 90: an exponent of up to 87 is rounded before it is raised
    below = logits.double().amax(1, keepdim=True) - logits.double()
    most = max(below.flatten().tolist(), default=0) + math.log(columns)
    assert ((found.double() - losses).abs() <= relative * (2 + most)).all()
    rounding = torch.finfo(logits.dtype).eps / 2 * gradient.abs() + torch.finfo(logits.dtype).smallest_normal
    assert ((got.double() - gradient).abs() <= relative + rounding).all()


@covering(
    2,
    isa=kernels.available_cpu_backend_names(),
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    columns=[1, 7, 16, 50, 1000],
    smoothing=[0.0, 0.1],
    spread=[0.0, 1.0, 30.0],
)
def test_entropies_and_their_gradients_are_near_those_in_float64(isa, dtype, columns, smoothing, spread):
    torch.manual_seed(0)
    logits = (torch.randn(19, columns) * spread + 5).to(dtype)
    targets = torch.randint(columns, (19,))
    with kernels.temporary_cpu_backend(isa):
        got = logits.clone()
        found = backend_of(logits).entropies(got, targets, smoothing, True)
        untouched = logits.clone()
        assert torch.equal(backend_of(logits).entropies(untouched, targets, smoothing, False), found)
    assert torch.equal(untouched, logits)
    assert found.dtype is torch.float32
    assert_entropies(found, got, logits, targets, smoothing)


def test_entropies_of_logits_that_are_not_finite_or_far_apart():
    infinite, nan = math.inf, math.nan
    rows = torch.zeros(5, 40)
    rows[0, 3:] = -infinite  # a vocabulary that is padded
    rows[1, 5] = nan
    rows[2, :] = -infinite
    rows[3, 4] = infinite
    rows[4] = torch.linspace(-300, 300, 40)
    targets = torch.tensor([1, 1, 1, 1, 38])
    wanted = functional.cross_entropy(rows, targets, reduction="none")
    for name in kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(name):
            got = rows.clone()
            losses = backend_for().entropies(got, targets, 0.0, True)
        torch.testing.assert_close(losses, wanted, equal_nan=True)
        assert not got[0, 3:].any()
        torch.testing.assert_close(got[0, :3], torch.tensor([1 / 3, -2 / 3, 1 / 3]))
        assert got[1:4].isnan().any(1).all()
        assert got[4].isfinite().all()


def test_entropies_that_c_does_not_take_are_computed_in_torch():
    torch.manual_seed(0)
    targets = torch.randint(12, (6,))
    of_others = torch.randn(6, 12).double(), torch.randn(12, 6).t(), torch.randn(0, 12), torch.randn(6, 24)[:, ::2]
    for logits in of_others:
        few = targets[: len(logits)]
        got = logits.clone(memory_format=torch.preserve_format)
        losses = backend_of(logits).entropies(got, few, 0.2, True)
        assert losses.dtype is logits.dtype
        assert_entropies(losses, got, logits, few, 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_entropy(dtype):
    """C writes a float32 number for each row, whatever torch makes by default."""
    logits, targets = torch.randn(3000, 7), torch.arange(3000) % 7
    expected = backend_of(logits).entropies(logits.clone(), targets, 0.1, True)
    with default_dtype(dtype):
        assert torch.equal(backend_of(logits).entropies(logits, targets, 0.1, True), expected)
