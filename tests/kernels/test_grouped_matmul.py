"""The product of groups of rows with matrices of their own is that of each group, with its gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import quantize
from lowmem.kernels import grouped_matmul as grouped_matmul_file
from lowmem.kernels.frozen_weight_operator import codes_scales_and_description
from lowmem.kernels.grouped_matmul import GroupedRowBlocks, grouped_matmul, grouped_product
from lowmem.quant.backend import backend_of
from tests.kernels.test_ops import make_weight, trace
from tests.operators import assert_operator

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second group is empty, and the last row is of none


@pytest.fixture(params=["offsets on the CPU", "offsets on a device"])
def where(request, monkeypatch):
    monkeypatch.setattr(
        grouped_matmul_file, "_can_read_without_sync", lambda offsets: request.param == "offsets on the CPU"
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 4))
def test_blocks_hold_each_row_of_a_group_once(sizes, more):
    offsets, rows = torch.tensor(sizes).cumsum(0).int(), sum(sizes) + more
    group, numbers = GroupedRowBlocks.from_group_ends(offsets, rows)
    assert len(group) <= 2 * len(sizes)
    found = {int(row): int(one) for one, of_block in zip(group, numbers, strict=True) for row in of_block}
    found.pop(rows, None)
    assert found == {row: one for one, end in enumerate(offsets) for row in range(int(end) - sizes[one], int(end))}
    assert sum(int((of_block < rows).sum()) for of_block in numbers) == sum(sizes)


@pytest.mark.usefixtures("where")
def test_outputs_and_gradients_are_those_of_each_group():
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([x[:2] @ matrices[0], x[2:5] @ matrices[2], x.new_zeros(1, 3)])
    torch.testing.assert_close(grouped_matmul(x, matrices, OFFSETS), expected)
    assert torch.autograd.gradcheck(grouped_matmul, (x, matrices, OFFSETS))
    grouped_matmul(x, matrices, OFFSETS).sum().backward()  # whose gradient is expanded
    assert not matrices.grad[1].any()
    assert not x.grad[5].any()
    only = x.detach().requires_grad_()
    grouped_matmul(only, matrices.detach(), OFFSETS).sum().backward()
    torch.testing.assert_close(only.grad, x.grad)


@pytest.mark.usefixtures("where")
def test_transposed_matrices_and_a_compiled_call_give_the_same(request):
    request.addfinalizer(torch.compiler.reset)
    x, matrices = torch.randn(6, 4), torch.randn(3, 2, 4, requires_grad=True)
    call = lambda x, matrices: grouped_matmul(x, matrices.mT, OFFSETS)  # noqa: E731
    expected = call(x, matrices)
    torch.testing.assert_close(expected, call(x, matrices.mT.contiguous().mT))
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x, matrices), expected)


@pytest.mark.parametrize("kind", ["half", "4-bit"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("where")
def test_grouped_products_are_one_for_each_group_of_rows_however_they_are_called(kind, transposed):
    """Eager, by their operators, in a graph, and for several examples, of which each row meets its own matrix."""
    weight, offsets = make_weight(kind), torch.tensor([2, 2, 3])  # of three matrices (2, 40)
    dense = weight.dequantize(torch.float64) if kind == "4-bit" else weight.double()

    def of_x(x):
        return grouped_product(x, weight, torch.float64, transposed, 3, offsets)

    x = torch.randn(4, 2 if transposed else 40, dtype=torch.float64, requires_grad=True)
    one, _, other = (part if transposed else part.t() for part in dense.split(2))
    expected = torch.cat([x[:2] @ one, x[2:3] @ other, torch.zeros(1, one.shape[1])])  # the last row is of no group
    torch.testing.assert_close(of_x(x), expected)
    rest = torch.float64, transposed, 3, offsets
    if kind == "half":
        assert_operator(torch.ops.lowmem.grouped_product_16bit.default, (x, weight, *rest))
    else:
        assert_operator(
            torch.ops.lowmem.grouped_product_4bit.default, (x, *codes_scales_and_description(weight), *rest)
        )
    graph = trace(of_x, x.detach(), check=False)
    assert f"lowmem::grouped_product_{'16bit' if kind == 'half' else '4bit'}" in str(graph.graph)
    torch.testing.assert_close(graph(x.detach()), expected.detach())
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(of_x)(several), torch.stack([expected, 2 * expected]))


def test_the_matrices_of_a_stack_are_kept_and_follow_its_storage():
    weight, other = (quantize(torch.randn(18, 8), "nf4", block_size=16) for _ in range(2))
    x, offsets = torch.randn(5, 8), torch.tensor([2, 3, 5])
    multiply = lambda w: grouped_product.compute(backend_of(x), x, w, torch.float32, False, 3, offsets)  # noqa: E731
    assert torch.equal(multiply(weight), multiply(weight))
    weight.packed.data, weight.scales.data = other.packed.clone(), other.scales.clone()
    assert torch.equal(multiply(weight), multiply(other))
