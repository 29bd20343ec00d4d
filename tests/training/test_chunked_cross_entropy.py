"""The loss over a vocabulary in chunks equals torch's cross entropy of all logits, and never holds them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowmem import FourBit, Half, StoredTensor, convert, kernels, linear_cross_entropy
from lowmem.measure import PeakMemory
from lowmem.training.chunked_cross_entropy import default_loss_matmul_dtype
from tests.gpu_steps import gpu_backend_on_cpu, record
from tests.selection import covering

WIDTH, VOCABULARY = 24, 50
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def inputs(dtype, *, rows=13, ignored=4, seed=0):
    """Return hidden states (1, rows, width), a weight (vocabulary, width), a bias and labels, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((1, rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    labels = torch.randint(0, VOCABULARY, (1, rows), generator=generator)
    labels[0, torch.randperm(rows, generator=generator)[:ignored]] = -100
    return hidden, weight, bias, labels


def exact(hidden, weight, bias, labels, smoothing, reduction):
    """Return loss and gradients of hidden, weight and bias, by torch from all logits, in float64."""
    wide = [None if one is None else one.detach().double().requires_grad_() for one in (hidden, weight, bias)]
    logits = functional.linear(*wide).reshape(-1, VOCABULARY)
    loss = functional.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss, [one for one in wide if one is not None])


def tolerances(hidden, weight, bias, dtype, used):
    """Return bounds of the errors of loss, and of the gradients of hidden, weight and bias, summed over rows.

    A logit is a sum of ``WIDTH`` products and the bias, rounded once to the dtype: its error d is at most
    ``(WIDTH + 2) eps sum |x w|``. The log of the sum of exponentials moves by d at most, so a loss by 2 d, and a
    probability by a factor exp(2 d). Probabilities are computed in float32 or wider and rounded once, and every sum
    of n terms has an error of n eps of the sum of the magnitudes, of which a row's |p - target| sum to 2 at most.
    """
    eps, wide = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    x, w = hidden.detach().double().abs().reshape(-1, WIDTH), weight.detach().double().abs()
    products = x @ w.t() + (0 if bias is None else bias.detach().double().abs())
    logit = float(products.max()) * (WIDTH + 2) * eps
    loss = 2 * logit + 16 * VOCABULARY * wide * (1 + float(products.max()))
    change = 2 * (torch.tensor(2 * logit).double().expm1() + VOCABULARY * eps)  # of a row's sum of |p - target|
    return used * loss, used * change * w.max(), used * change * x.max(), used * change


@covering(
    2,
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    bias=[False, True],
    chunk=[1, 4, 256],
    smoothing=[0.0, 0.1],
    reduction=["mean", "sum"],
    ignored=[0, 4, 12],
    trains=["hidden", "all"],
)
def test_it_equals_torch_on_all_logits(dtype, bias, chunk, smoothing, reduction, ignored, trains):
    hidden, weight, offset, labels = inputs(dtype, ignored=ignored)
    offset = offset if bias else None
    hidden.requires_grad_()
    if trains == "all":
        for one in (weight, offset):
            None if one is None else one.requires_grad_()
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=offset, chunk=chunk, label_smoothing=smoothing, reduction=reduction
    )
    (loss * 3).backward()
    wanted, gradients = exact(hidden, weight, offset, labels, smoothing, reduction)
    used = 1 if reduction == "mean" else 13 - ignored
    bounds = tolerances(hidden, weight, offset, dtype, used)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(loss.double() - wanted) <= bounds[0]
    for one, gradient, bound in zip((hidden, weight, offset), gradients, bounds[1:], strict=False):
        if one is not None and one.requires_grad:
            assert one.grad.dtype == dtype
            assert one.grad.shape == one.shape
            assert float((one.grad.double() - 3 * gradient).abs().max()) <= 3 * bound


@pytest.mark.parametrize("technique", [FourBit(), FourBit("int4"), Half(torch.bfloat16)], ids=str)
def test_the_weight_may_be_stored(technique):
    layer = convert(nn.Linear(WIDTH, VOCABULARY), technique)
    hidden, _, _, labels = inputs(torch.float32)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, layer.weight, labels, bias=layer.bias, chunk=4)
    loss.backward()
    dense = layer.weight.dequantize(torch.float32)
    bias = layer.bias.dequantize() if isinstance(layer.bias, StoredTensor) else layer.bias.detach()
    wanted, gradients = exact(hidden, dense, bias, labels, 0.0, "mean")
    dtype = torch.bfloat16 if isinstance(technique, Half) else torch.float32
    bounds = tolerances(hidden, dense, bias, dtype, 1)
    assert abs(loss.double() - wanted) <= bounds[0]
    assert float((hidden.grad - gradients[0]).abs().max()) <= bounds[1]


def test_ignored_rows_are_not_computed():
    hidden, weight, _, labels = inputs(torch.float32)
    labels.clamp_(max=VOCABULARY - 2)
    skipped = labels[0] == -100
    with torch.no_grad():
        hidden[0, skipped] = torch.nan
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
    assert not hidden.grad[0, skipped].any()
    other = torch.where(labels == -100, VOCABULARY - 1, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, other, ignore_index=VOCABULARY - 1), loss)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_label_at_all_gives_what_torch_gives(reduction):
    hidden, weight, _, labels = inputs(torch.float32)
    hidden.requires_grad_()
    labels.fill_(-100)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    wanted = functional.cross_entropy(hidden[0] @ weight.t(), labels[0], reduction=reduction)
    assert torch.equal(loss.nan_to_num(7), wanted.nan_to_num(7))
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))  # a NaN would end the training


@pytest.mark.parametrize("stored", [False, True])
def test_the_peak_is_one_chunk_of_logits(stored):
    rows, width, vocabulary, chunk = 512, 32, 4096, 64
    layer = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    weight = convert(layer, FourBit()).weight if stored else layer.weight
    hidden = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    saved = []
    with PeakMemory() as peak, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    gradient, logits = rows * width * 2, chunk * vocabulary * 2
    widened = 0 if kernels.fast_matmul_dtype(torch.bfloat16, hidden) is torch.bfloat16 else 4 * 512 * (width + chunk)
    # Logits, the float32 numbers of 16 rows with their exponentials, the saved gradient, and columns of rows.
    assert peak.peak <= logits + 2 * 16 * vocabulary * 4 + gradient + 64 * rows + 6 * chunk * width * 4 + (
        2**20 if stored else widened  # what the kernel dequantizes at a time, or torch multiplies in float32
    )
    assert sum(t.numel() * t.element_size() for t in saved) <= gradient + 64
    loss.backward()


def test_under_autocast_it_computes_in_its_dtype():
    hidden, weight, _, labels = inputs(torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    rounded = [one.detach().bfloat16() for one in (hidden, weight)]
    wanted, gradients = exact(*rounded, None, labels, 0.0, "mean")
    bounds = tolerances(*rounded, None, torch.bfloat16, 1)
    assert hidden.grad.dtype == torch.float32
    assert loss.dtype == torch.float32
    assert abs(loss - wanted) <= bounds[0]
    assert float((hidden.grad - gradients[0]).abs().max()) <= bounds[1]
    full = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, labels, dtype=torch.bfloat16), loss)
    assert full != loss


def test_without_gradients_nothing_is_kept_and_a_second_derivative_is_refused():
    hidden, weight, _, labels = inputs(torch.float32)
    plain = linear_cross_entropy(hidden, weight, labels)
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden.requires_grad_(), weight, labels), plain)
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(lambda x: linear_cross_entropy(x, weight, labels), hidden.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((1, 13), 50)}, "labels hold 50, .* vocabulary of 50"),
        ({"labels": torch.full((1, 13), -1)}, "labels hold -1, "),
        ({"labels": torch.zeros(1, 12, dtype=torch.long)}, r"labels.shape=\(1, 12\)"),
        ({"labels": torch.zeros(1, 13)}, "labels.dtype=torch.float32"),
        ({"weight": torch.zeros(50, 23)}, "23.* 24"),
        ({"weight": torch.zeros(50)}, r"weight.shape=\(50,\)"),
        ({"hidden": torch.zeros(1, 13, 24, dtype=torch.long)}, "hidden.dtype=torch.int64"),
        ({"weight": torch.zeros(50, 24, dtype=torch.complex64)}, "weight.dtype=torch.complex64"),
        ({"weight": torch.zeros(50, 24).to_sparse()}, "weight, torch.sparse_coo on cpu, must be dense"),
        ({"weight": torch.zeros(50, 24, device="meta")}, "weight, torch.strided on meta, must be"),
        ({"bias": torch.zeros(3)}, r"bias.shape=\(3,\)"),
        ({"hidden": None}, "hidden=NoneType must be a tensor"),
        ({"hidden": torch.tensor(1.0)}, r"a width of 24, and hidden.shape=\(\) ends in None"),
        ({"weight": None}, "weight=NoneType must be a tensor"),
        ({"labels": 3}, "labels=int must be a tensor of torch.int64"),
        ({"labels": torch.zeros(1, 13, dtype=torch.long, device="meta")}, "labels, on meta, must be where hidden is"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 2.5}, "chunk=2.5"),
        ({"chunk": True}, "chunk=True"),
        ({"reduction": "none"}, "reduction='none'"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"label_smoothing": -0.5}, "label_smoothing=-0.5"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    hidden, weight, _, labels = inputs(torch.float32)
    given = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises((ValueError, TypeError), match=message):
        linear_cross_entropy(**given)


def test_it_multiplies_in_bfloat16_if_a_factor_is_or_autocast_says_so():
    half, wide, narrow = torch.float16, torch.float32, torch.bfloat16
    found = {
        (x, w): default_loss_matmul_dtype(torch.ones(1, dtype=x), torch.ones(1, dtype=w))
        for x in DTYPES
        for w in DTYPES
    }
    narrowed = {(narrow, narrow), (wide, narrow), (narrow, wide)}
    for (x, w), dtype in found.items():
        assert dtype is (narrow if (x, w) in narrowed else torch.promote_types(x, w)), (x, w)
    stored = convert(nn.Linear(WIDTH, VOCABULARY), FourBit()).weight
    assert default_loss_matmul_dtype(torch.ones(1), stored) is wide
    for cast in (narrow, half):
        with torch.autocast("cpu", cast):
            assert (
                default_loss_matmul_dtype(torch.ones(1), stored)
                is default_loss_matmul_dtype(torch.ones(1), torch.ones(1))
                is cast
            )


def test_the_mean_does_not_round_its_divisor():
    """In 16 bits 1 / rows is off by up to 2^-9, of all gradients in one direction."""
    rows = 777
    for dtype in (torch.bfloat16, torch.float16):
        hidden = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
        labels = torch.arange(rows) % VOCABULARY
        sums = linear_cross_entropy(hidden, weight, labels, reduction="sum")
        total = torch.autograd.grad(sums, hidden)[0].double()
        mean = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)[0].double()
        assert ((mean - total / rows).abs() <= torch.finfo(dtype).eps / 2 * mean.abs() + 2.0**-25).all()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_a_weight_of_another_dtype_is_converted_in_parts(trains):
    """No copy of it exists: the peak is that of a weight in bfloat16, and a part."""
    rows, width, vocabulary = 40, 64, 3 * 4096 + 5
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(2)) / 8
    hidden, offset = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[3] = vocabulary - 1
    for bias in (None, offset):
        given, found = weight.clone().requires_grad_(trains), []
        with PeakMemory() as peak:
            linear_cross_entropy(hidden, given, labels, bias=bias, chunk=8, dtype=torch.bfloat16).backward()
        if not trains:
            assert peak.peak < vocabulary * width * 2
        found = [hidden.grad, given.grad]
        exact = hidden.detach().double().requires_grad_(), weight.double().requires_grad_()
        logits = exact[0] @ exact[1].t() + (0 if bias is None else bias.double())
        functional.cross_entropy(logits, labels).backward()
        for got, one in zip(found, exact, strict=True):
            if got is not None:  # logits and their gradient are rounded to bfloat16, of numbers below 16
                assert (got.double() - one.grad).norm() <= 0.03 * one.grad.norm()
        hidden.grad = None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [slice(0, 0), slice(3, 9), slice(None)], ids=["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_no_label_is_read_and_values_and_gradients_are_those_of_torch(dtype, ignored, reduction):
    """Its backend serves the CPU: rows without a label are computed, and count for nothing, also if they are NaN."""
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (20,))
    labels[ignored] = -100
    results = []
    for of_torch in (True, False):
        torch.manual_seed(1)
        hidden, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((20, 6), (11, 6), (11,)))
        options = {"label_smoothing": 0.1, "reduction": reduction}
        if of_torch:
            logits = functional.linear(hidden.double(), weight.double(), bias.double())
            loss = functional.cross_entropy(logits, labels, **options)
            loss.backward()
        else:
            losses = []

            def run(hidden=hidden, weight=weight, bias=bias, options=options, losses=losses):
                losses.append(linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=8, **options))
                losses[0].backward()

            assert not record(run).waits
            (loss,) = losses
        results.append([loss.detach().double(), *(one.grad.double() for one in (hidden, weight, bias))])
    for expected, found in zip(*results, strict=True):
        bound = 2e-5 if dtype is torch.float32 else 3e-2
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound, equal_nan=True)


def test_on_a_gpu_a_row_without_a_label_that_is_nan_changes_nothing():
    hidden = torch.randn(9, 6)
    hidden[4] = torch.nan
    hidden.requires_grad_()
    labels, weight = torch.arange(9), torch.randn(11, 6, requires_grad=True)
    labels[4] = -100
    with gpu_backend_on_cpu():
        loss = linear_cross_entropy(hidden, weight, labels)
        loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert not hidden.grad[4].any()
