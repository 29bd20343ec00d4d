"""Products with an adapted weight are those with W + s B A, by two thin products, and keep nothing dense."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem.nn.low_rank_sum import LowRankSum
from lowmem.nn.stored_tensor import StoredTensor
from tests.nn.adapted_cases import FORMS, PRODUCTS, make, total
from tests.nn.stored_cases import WHOLE, Case
from tests.selection import rows_in_one_case


@pytest.fixture
def values(monkeypatch):
    """How often the values of an adapted weight were made."""
    made, before = [], LowRankSum.values
    monkeypatch.setattr(LowRankSum, "values", lambda self: made.append(self) or before(self))
    return made


@rows_in_one_case("form", FORMS)
@rows_in_one_case("name", [*PRODUCTS, *WHOLE])
def test_outputs_and_gradients_are_those_of_the_sum_and_products_never_make_it(name, form, values):
    torch.manual_seed(0)
    values.clear()
    case = {**PRODUCTS, **WHOLE}[name]
    weight, dense, pairs, layout = make(name, case, form, count=2)
    x = case.make_input()
    x = x.requires_grad_(x.is_floating_point())
    out = case.function(x, weight)
    wide = x.detach().double() if x.is_floating_point() else x
    wide.requires_grad_(x.is_floating_point())
    exact = case.function(wide, total(dense, pairs, layout))
    scale = exact.detach().abs().max()
    assert out.dtype == torch.float32
    assert (out.double() - exact).abs().max() <= 1e-5 * scale  # 1e-7 a term, of at most some hundred
    given = torch.randn_like(exact)
    leaves = [x, *(one for pair in pairs for one in pair)][0 if x.requires_grad else 1 :]
    twins = [wide, *leaves[1:]] if x.requires_grad else leaves
    wanted = torch.autograd.grad(exact, twins, given)
    for got, one in zip(torch.autograd.grad(out, leaves, given.float()), wanted, strict=True):
        torch.testing.assert_close(got, one.to(got.dtype), rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    if name in PRODUCTS:
        assert not values


def test_what_is_kept_for_backward_is_thin_beside_a_large_weight():
    """16 MiB of weight; the product of each kind keeps less than 1 MiB that is not the weight itself."""
    stack, matrix, kernel = (4, 1024, 1024), (2048, 2048), (512, 512, 4, 4)
    offsets = torch.tensor([1, 1, 3, 4], dtype=torch.int32)
    cases = {
        "linear": (F.linear, matrix, (4, 2048)),
        "x @ W": (lambda x, w: x @ w, matrix, (4, 2048)),
        "bmm": (torch.bmm, stack, (4, 4, 1024)),
        "grouped_mm": (lambda x, w: F.grouped_mm(x, w, offs=offsets), stack, (4, 1024)),
        "experts": (lambda x, w: F.linear(x, w[2]), stack, (4, 1024)),
        "conv": (F.conv2d, kernel, (1, 512, 5, 5)),
        "conv, transposed": (F.conv_transpose2d, kernel, (1, 512, 3, 3)),
        "embedding": (lambda x, w: F.embedding(torch.tensor([[1, 7]]), w), matrix, (1,)),
    }
    for name, (function, shape, size) in cases.items():
        if name == "grouped_mm" and not hasattr(F, "grouped_mm"):
            continue
        for form in ("nf4", "dense"):
            weight, *_ = make(name, Case(function, shape, size, 1, 1 if "conv" in name else None), form)
            own = {part.untyped_storage().data_ptr() for part in getattr(weight.base, "parts", (weight.base,))}
            thin = {part.untyped_storage().data_ptr() for one in weight.updates for part in (one.left, one.right)}
            kept = {}

            def keep(one, kept=kept):
                if not isinstance(one, StoredTensor):
                    kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
                return one

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
                function(torch.randn(size, requires_grad=True), weight)
            assert sum(size for at, size in kept.items() if at not in own | thin) < 2**20, (name, form)


def test_dropout_acts_on_the_inputs_of_products_only():
    torch.manual_seed(0)
    dropout = nn.Dropout(0.5)
    for name in ("linear", "x @ W", "bmm", "conv1d", "experts"):
        weight, *_ = make(name, PRODUCTS[name], "dense", dropout=dropout)
        function, x = PRODUCTS[name].function, PRODUCTS[name].make_input()
        assert not torch.equal(function(x, weight), function(x, weight)), name
        assert torch.equal(weight.values(), weight.values())
        dropout.eval()
        assert torch.equal(function(x, weight), function(x, weight)), name
        dropout.train()


@rows_in_one_case("form", FORMS)
def test_it_computes_in_lower_precision_and_under_autocast(form):
    torch.manual_seed(0)
    for name in ("linear", "x @ W", "addmm", "bmm", "experts", "conv1d", "conv2d, transposed"):
        case = PRODUCTS[name]
        weight, dense, pairs, layout = make(name, case, form)
        x = case.make_input()
        exact = case.function(x.double(), total(dense, pairs, layout))
        with torch.autocast("cpu", torch.bfloat16):
            out = case.function(x, weight)
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).norm() <= 0.05 * exact.norm(), name
