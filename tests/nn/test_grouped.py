"""The product of groups of rows with matrices of their own is that of each group, with its gradients."""

import torch

from lowmem.nn.grouped import grouped_matmul

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second group is empty, and the last row is of none


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


def test_transposed_matrices_and_a_compiled_call_give_the_same(request):
    request.addfinalizer(torch.compiler.reset)
    x, matrices = torch.randn(6, 4), torch.randn(3, 2, 4, requires_grad=True)
    call = lambda x, matrices: grouped_matmul(x, matrices.mT, OFFSETS)  # noqa: E731
    expected = call(x, matrices)
    torch.testing.assert_close(expected, call(x, matrices.mT.contiguous().mT))
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x, matrices), expected)
