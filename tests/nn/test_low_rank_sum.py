"""A function of torch gets an implementation for the sum, or its values, however its arguments are given."""

import torch
from torch.nn import functional as F

from lowmem.nn.low_rank_sum import is_adapted
from lowmem.nn.read_only import METADATA
from tests.nn.adapted_cases import make, total
from tests.nn.stored_cases import INDICES, Case, store
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
        *(slice(3, 9), [3, 1], torch.tensor([3, 1]), ROWS, (..., slice(4, 9)), (slice(3, 9), slice(4, 9))),
        *([3, 1], slice(4, 9)),
    ),
    (3, 48, 32): (
        *(1, -1, torch.tensor(1), slice(1, None), [2, 0], torch.tensor([2, 0]), THREE, (1, slice(3, 9)), (1, ...)),
        *((slice(None), slice(3, 9)), (..., slice(4, 9)), ([2, 0], slice(None), slice(4, 9)), (THREE, slice(3, 9))),
    ),
}
"""Indices that select matrices of a weight, by its shape."""
OF_VALUES = {
    (48, 32): (3, (slice(None), 3), (slice(3, 9), [1, 2]), None, (3, slice(4, 9)), ROWS[:, None].expand(48, 32)),
    (3, 48, 32): ((slice(None), [3, 1]), (1, 3), ([2, 0], [1, 2]), THREE[:, None].expand(3, 48), (..., 3)),
    (8, 4, 3, 3): (slice(2), (..., slice(2))),
}
"""Indices that do not."""


@rows_in_one_case("form", ["dense", "nf4", "bfloat16"])
def test_arguments_may_be_given_by_name_and_indices_that_select_matrices_keep_the_sum(form):
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
