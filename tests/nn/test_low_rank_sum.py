"""A function of torch gets an implementation for the sum, or its values, however its arguments are given."""

import copy
import pickle

import torch
from torch import nn
from torch.nn import functional as F

from lowmem import FourBit, convert
from lowmem.nn.adapted_weight import AdaptedWeight, adapted_weight
from lowmem.nn.adapter import Layout, Update
from lowmem.nn.linear import gathered_copy
from lowmem.nn.low_rank_sum import LowRankSum, is_adapted
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.torch_functions import METADATA
from tests.nn.adapted_cases import FORMS, RANK, SCALING, make, total
from tests.nn.stored_cases import CASES, INDICES, Case, store
from tests.rounding import OF_4_BITS, assert_sum
from tests.selection import rows_in_one_case

X, STACK, KERNEL = torch.randn(5, 48), torch.randn(3, 5, 48), torch.randn(2, 4, 6, 6)
BY_NAME = {
    "linear": (lambda w: F.linear(input=X, weight=w.t(), bias=torch.ones(32)), (48, 32)),
    "linear, in any order": (lambda w: F.linear(weight=w.mT, input=X), (48, 32)),
    "matmul": (lambda w: torch.matmul(input=X, other=w), (48, 32)),
    "a method": (lambda w: X.matmul(other=w) + X.mm(mat2=w), (48, 32)),
    "of linalg": (lambda w: torch.linalg.matmul(input=X, other=w), (48, 32)),
    "the weight first": (lambda w: torch.matmul(input=w.T, other=X.T), (48, 32)),
    "mm": (lambda w: torch.mm(input=X, mat2=w), (48, 32)),
    "mv": (lambda w: torch.mv(input=w.T, vec=X[0]), (48, 32)),
    "addmm": (lambda w: torch.addmm(input=torch.ones(32), mat1=X, mat2=w, beta=2, alpha=3), (48, 32)),
    "addmm, half by name": (lambda w: torch.addmm(torch.ones(32), X, mat2=w), (48, 32)),
    "bmm": (lambda w: torch.bmm(input=STACK, mat2=w), (3, 48, 32)),
    "baddbmm": (lambda w: torch.baddbmm(input=torch.ones(3, 5, 32), batch1=STACK, batch2=w), (3, 48, 32)),
    "embedding": (lambda w: F.embedding(input=INDICES, weight=w), (48, 32)),
    "embedding bag": (lambda w: F.embedding_bag(input=INDICES, weight=w, mode="sum"), (48, 32)),
    "conv2d": (lambda w: F.conv2d(input=KERNEL, weight=w, stride=2, padding=1), (8, 4, 3, 3)),
    "out": (lambda w: torch.mm(X, w, out=torch.empty(5, 32)), (48, 32)),
    "transpose": (lambda w: X @ torch.transpose(input=w, dim0=1, dim1=0).T, (48, 32)),
    "narrow": (lambda w: X[:, :9] @ torch.narrow(input=w, dim=0, start=2, length=9), (48, 32)),
    "split": (
        lambda w: X[:, :8] @ torch.split(tensor=w, split_size_or_sections=8)[1] + w.split(split_size=8)[0][0],
        (48, 32),
    ),
    "chunk": (lambda w: X[:, :16] @ torch.chunk(input=w, chunks=3)[2], (48, 32)),
    "unbind": (lambda w: X @ torch.unbind(input=w)[1], (3, 48, 32)),
    "select": (lambda w: X @ torch.select(input=w, dim=0, index=1), (3, 48, 32)),
    "index_select": (lambda w: X[:, :2] @ torch.index_select(input=w, dim=0, index=INDICES[0, :2]), (48, 32)),
    "permute": (lambda w: X @ torch.permute(input=w, dims=(1, 0)).T, (48, 32)),
    "a sum": (lambda w: torch.add(input=X[:, :1].T, other=w[:5].T, alpha=2), (48, 32)),
}


ROWS, THREE = torch.arange(48) % 3 > 0, torch.tensor([True, False, True])
OF_MATRICES = {
    (48, 32): (
        *(
            3,
            -1,
            (3, ...),
            slice(3, 9),
            [3, 1],
            torch.tensor([3, 1]),
            ROWS,
            (..., slice(4, 9)),
            (slice(3, 9), slice(4, 9)),
        ),
        *([3, 1], slice(4, 9)),
    ),
    (3, 48, 32): (
        *(
            (1, 3),
            1,
            -1,
            torch.tensor(1),
            slice(1, None),
            [2, 0],
            torch.tensor([2, 0]),
            THREE,
            (1, slice(3, 9)),
            (1, ...),
        ),
        *((slice(None), slice(3, 9)), (..., slice(4, 9)), ([2, 0], slice(None), slice(4, 9)), (THREE, slice(3, 9))),
    ),
    (8, 4, 3, 3): (2, slice(2)),
}
"""Indices that select matrices or whole rows of a weight, by its shape."""
OF_VALUES = {
    (48, 32): ((slice(None), 3), (slice(3, 9), [1, 2]), None, (3, slice(4, 9)), ROWS[:, None].expand(48, 32)),
    (3, 48, 32): ((slice(None), [3, 1]), (slice(None), 3), ([2, 0], [1, 2]), THREE[:, None].expand(3, 48), (..., 3)),
    (8, 4, 3, 3): ((..., slice(2)), (2, 1), [2, 1]),
}
"""Indices that do not."""


@rows_in_one_case("form", FORMS)
def test_arguments_may_be_given_by_name_and_indices_of_matrices_and_rows_keep_the_sum(form):
    torch.manual_seed(0)
    for name, (function, shape) in BY_NAME.items():
        case = Case(function, shape, (1,), 0, 1 if len(shape) == 4 else None)
        kind = "conv" if len(shape) == 4 else "embedding" if "embedding" in name else "linear"
        weight, dense, pairs, layout = make(kind, case, form)
        with torch.no_grad():
            exact = function(total(dense, pairs, layout).float())
            torch.testing.assert_close(function(weight), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
            if form != "dense":
                stored = store(dense, form, case.lead)
                dense = stored.dequantize()
                exact = function(dense)
                torch.testing.assert_close(function(stored), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    for group in (OF_MATRICES, OF_VALUES):
        for shape, indices in group.items():
            case = Case(F.linear, shape, (1,), 0, 1 if len(shape) == 4 else None)
            weight, dense, pairs, layout = make("conv" if len(shape) == 4 else "linear", case, form)
            exact = total(dense, pairs, layout).float().detach()
            for index in indices:
                found = weight[index]
                assert is_adapted(found) == (group is OF_MATRICES), (shape, index)
                values = found.values() if is_adapted(found) else found
                torch.testing.assert_close(values, exact[index], rtol=1e-4, atol=1e-4)


def test_what_needs_no_values_makes_none():
    weight, *_ = make("linear", Case(F.linear, (48, 32), (5, 32), 32), "nf4")
    known = weight.base.dequantized_by.copy()
    for function in METADATA:
        function(weight)
    assert weight.base.dequantized_by == known


VIEWS = {
    "rows": lambda w: w[3:9],
    "one row": lambda w: w[5],
    "an element": lambda w: w[5, 2],
    "columns": lambda w: w[:, 4:9],
    "an ellipsis": lambda w: w[..., 4:9],
    "a new axis": lambda w: w[None],
    "chosen rows": lambda w: w[torch.tensor([4, 0, 4])],
    "transposed": lambda w: w.t(),
    "axes swapped": lambda w: w.swapaxes(0, 1),
    "permuted": lambda w: w.permute(1, 0),
    "as it is, permuted": lambda w: w.permute(0, 1),
    "selected": lambda w: w.select(0, 3),
    "narrowed": lambda w: w.narrow(0, 3, 4),
    "rows of an index": lambda w: w.index_select(0, torch.tensor([1, 1, 7])),
    "columns of an index": lambda w: w.index_select(1, torch.tensor([1, 1, 7])),
    "unbound": lambda w: torch.stack(w.unbind()),
    "split": lambda w: torch.cat([part * 2 for part in w.split(20)]),
    "chunks": lambda w: torch.cat([part + 1 for part in w.chunk(3, 1)], 1),
    "a sum with itself": lambda w: w + w,
    "a double": lambda w: w.double() * 1,
    "integers": lambda w: w.to(torch.int32),
    "norm": lambda w: w.norm(),
    "a product with itself": lambda w: w.t() @ w,
    "a contraction of three": lambda w: torch.einsum("ij,ik,jk->k", w, torch.ones(48, 3), torch.ones(32, 3)),
    "a trace": lambda w: torch.einsum("ii->i", w[:9, :9]),
    "a large bag": lambda w: F.embedding_bag(torch.tensor([[1, 2], [3, 3]]), w, mode="max"),
    "a lookup in a row": lambda w: F.conv1d(torch.ones(1, 32, 5), w.unsqueeze(-1)),
    "a copy": lambda w: copy.deepcopy(w) * 1,
    "a pickle": lambda w: pickle.loads(pickle.dumps(w)) * 1,
    "every other column of some rows": lambda w: w[2:5, ::2],
    "joined": lambda w: torch.cat([w, w]),
    "flat": lambda w: w.reshape(-1),
    "a linear layer": lambda w: F.linear(torch.ones(2, 32), w),
    "a product": lambda w: torch.ones(2, 32) @ w.T,
    "an einsum": lambda w: torch.einsum("...i,oi->...o", torch.ones(2, 3, 32), w),
    "an embedding": lambda w: F.embedding(torch.tensor([1, 5]), w),
}


def values_of(weight):
    dense = weight.values() if isinstance(weight, LowRankSum) else weight
    return (dense.dequantize() if isinstance(dense, StoredTensor) else dense).detach()


@rows_in_one_case("form", [*FORMS, "stored", "gathered"])
def test_views_and_everything_else_are_those_of_the_values(form):
    torch.manual_seed(0)
    case = Case(lambda x, w: x, (48, 32), (5, 32), 32)
    if form == "gathered":
        weight = gathered_copy(convert(nn.Linear(32, 48), FourBit("nf4", 8)), torch.randperm(32).int()).weight
    else:
        weight = store(torch.randn(48, 32), "nf4") if form == "stored" else make("linear", case, form)[0]
    exact = values_of(weight)
    for name, view in VIEWS.items():
        found, wanted = values_of(view(weight)), view(exact)
        assert found.shape == wanted.shape, name
        assert found.dtype == wanted.dtype, name
        # The sums of rank 2 are taken in another order: a few units in the last place of numbers up to 10.
        if found.dtype.is_floating_point:
            assert float((found - wanted).abs().max()) <= 64 * 2.0**-23 * float(wanted.abs().max()), name
    if form not in FORMS:
        return
    stack = Case(lambda x, w: x, (3, 48, 32), (5, 32), 32)
    weights, *_ = make("stack", stack, form)
    for number, matrix in enumerate(weights):
        assert isinstance(matrix, LowRankSum)
        assert float((matrix.values() - weights.values()[number]).detach().abs().max()) <= 64 * 2.0**-23 * 10
    kernels, *_ = make("conv2d", Case(lambda x, w: x, (8, 4, 3, 3), (2, 4, 6, 6), 36, 1), form)
    for view in (
        lambda w: w[:, 2],
        lambda w: w.mT,
        lambda w: w[2][1] + w[1:3].unbind()[1][0] + w[:4].mT[1, 0],
        lambda w: F.linear(torch.ones(2, 3), w[0, 0]),
    ):
        assert not isinstance(view(kernels), LowRankSum)
        assert float((view(kernels) - view(kernels.values())).detach().abs().max()) <= 64 * 2.0**-23 * 10


@rows_in_one_case("form", FORMS)
def test_casts_to_it_einsums_of_both_its_sides_and_masks_are_those_of_the_sum(form):
    weight, dense, pairs, layout = make("linear", CASES["linear"], form)
    whole, most = (total(of(dense), [(of(a), of(b)) for a, b in pairs], layout) for of in (torch.clone, torch.abs))
    x = torch.randn(5, 48, 32)
    for cast in (x.double().to(weight), x.double().type_as(weight)):
        assert (type(cast), cast.dtype) == (torch.Tensor, torch.float32)
    assert torch.equal(weight.to(weight).values(), weight.values())
    terms = RANK + 2 + OF_4_BITS  # of a weight: the sum over the rank, its scaling, the base
    for sums, added in (("boi,oi->b", 48 * 32), ("boi,oi->boi", 1)):
        exact, sizes = torch.einsum(sums, x.double(), whole), torch.einsum(sums, x.double().abs(), most)
        assert_sum(torch.einsum(sums, x, weight), exact, sizes, added + terms)
    stack = adapted_weight(
        torch.randn(2, 3, 4, 5),
        [Update(torch.randn(2, 3, 4, RANK), torch.randn(2, 3, RANK, 5), SCALING, nn.Identity())],
        Layout((2, 3, 4, 5), "linear"),
    )
    mask = torch.tensor([[True, False, True], [False, True, True]])
    torch.testing.assert_close(torch.as_tensor(stack[mask] * 1), stack.values()[mask])


def test_dimensions_may_be_named_as_torch_names_them():
    weight, *_ = make("linear", CASES["linear"], "nf4")
    for swapped in (
        weight.transpose(dim0=0, dim1=1),
        weight.permute(dims=(1, 0)),
        torch.permute(weight, dims=(1, 0)),
    ):
        assert isinstance(swapped, AdaptedWeight)
        assert torch.equal(swapped.values(), weight.values().T)
