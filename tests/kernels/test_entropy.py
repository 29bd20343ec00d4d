"""Losses and gradients of rows, in C at each ISA and in torch, against float64."""

import math

import torch
from torch.nn import functional

from lowmem import kernels
from lowmem.kernels.entropy import entropies
from tests.rounding import default_dtype
from tests.selection import in_one_case, rows_in_one_case


def exact(logits, targets, smoothing):
    wide = logits.detach().clone().double().requires_grad_()
    losses = functional.cross_entropy(wide, targets, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def assert_entropies(found, got, logits, targets, smoothing):
    """Hold losses and gradients of rows to those in float64.

    A sum of n exponentials, of 6 roundings each, is off by a factor (n + 8) u; the logarithm adds that and u.
    """
    columns = logits.shape[1]
    losses, gradient = exact(logits, targets, smoothing)
    unit = 2.0**-24 if found.dtype is torch.float32 else 2.0**-52  # twice float64's: the exact ones are off, too
    relative = (columns + 16) * unit + 90 * unit  # 90: an exponent of up to 87 is rounded before it is raised
    below = logits.double().amax(1, keepdim=True) - logits.double()
    most = max(below.flatten().tolist(), default=0) + math.log(columns)
    assert ((found.double() - losses).abs() <= relative * (2 + most)).all()
    rounding = torch.finfo(logits.dtype).eps / 2 * gradient.abs() + torch.finfo(logits.dtype).smallest_normal
    assert ((got.double() - gradient).abs() <= relative + rounding).all()


@in_one_case(
    2,
    isa=kernels.available(),
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    columns=[1, 7, 16, 50, 1000],
    smoothing=[0.0, 0.1],
    spread=[0.0, 1.0, 30.0],
)
def test_losses_and_gradients_of_rows(isa, dtype, columns, smoothing, spread):
    torch.manual_seed(0)
    logits = (torch.randn(19, columns) * spread + 5).to(dtype)
    targets = torch.randint(columns, (19,))
    with kernels.using(isa):
        got = logits.clone()
        found = entropies(got, targets, smoothing, True)
        untouched = logits.clone()
        assert torch.equal(entropies(untouched, targets, smoothing, False), found)
    assert torch.equal(untouched, logits)
    assert found.dtype is torch.float32
    assert_entropies(found, got, logits, targets, smoothing)


def test_numbers_that_are_not_finite_and_far_apart():
    infinite, nan = math.inf, math.nan
    rows = torch.zeros(5, 40)
    rows[0, 3:] = -infinite  # a vocabulary that is padded
    rows[1, 5] = nan
    rows[2, :] = -infinite
    rows[3, 4] = infinite
    rows[4] = torch.linspace(-300, 300, 40)
    targets = torch.tensor([1, 1, 1, 1, 38])
    wanted = functional.cross_entropy(rows, targets, reduction="none")
    for name in kernels.available():
        with kernels.using(name):
            got = rows.clone()
            losses = entropies(got, targets, 0.0, True)
        torch.testing.assert_close(losses, wanted, equal_nan=True)
        assert not got[0, 3:].any()
        torch.testing.assert_close(got[0, :3], torch.tensor([1 / 3, -2 / 3, 1 / 3]))
        assert got[1:4].isnan().any(1).all()
        assert got[4].isfinite().all()


def test_what_c_does_not_take_is_computed_in_torch():
    torch.manual_seed(0)
    targets = torch.randint(12, (6,))
    for logits in (
        torch.randn(6, 12).double(),
        torch.randn(12, 6).t(),
        torch.randn(0, 12),
        torch.randn(6, 24)[:, ::2],
    ):
        few = targets[: len(logits)]
        got = logits.clone(memory_format=torch.preserve_format)
        losses = entropies(got, few, 0.2, True)
        assert losses.dtype is logits.dtype
        assert_entropies(losses, got, logits, few, 0.2)


@rows_in_one_case("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    """C writes a float32 number for each row, whatever torch makes by default."""
    logits, targets = torch.randn(3000, 7), torch.arange(3000) % 7
    expected = entropies(logits.clone(), targets, 0.1, True)
    with default_dtype(dtype):
        assert torch.equal(entropies(logits, targets, 0.1, True), expected)
