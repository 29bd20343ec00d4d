"""A weight whose columns lie in another order answers as the dense weight does; only products gather."""

import pytest
import torch
from torch.nn import functional

import lowmem
from lowmem.nn.gathered_weight import GatheredTensor, check_order
from lowmem.nn.linear import gathered_copy
from lowmem.quant.quantize import quantize
from tests.rounding import OF_4_BITS, gamma

ORDER = torch.randperm(32, generator=torch.Generator().manual_seed(5)).to(torch.int32)


def layer(bias: bool = True) -> tuple[lowmem.Linear4Bit, torch.Tensor]:
    """Return a layer whose columns are gathered, and its dense weight."""
    torch.manual_seed(2)
    dense = torch.nn.Linear(32, 8, bias=bias)
    stored = quantize(dense.weight.detach()[:, ORDER], "nf4", block_size=8)
    made = gathered_copy(lowmem.Linear4Bit(stored, dense.bias), ORDER.clone())
    return made, stored.dequantize()[:, ORDER.argsort()]


def test_whoever_reads_it_finds_the_columns_in_their_own_order():
    made, dense = layer()
    weight, x = made.weight, torch.randn(2, 3, 32)
    # Sums of 32 products, each added in an order of its own.
    allowed = 2 * gamma(32 + OF_4_BITS) * float(x.abs().sum(-1).max() * dense.abs().max())
    assert type(weight) is GatheredTensor
    for read in (
        lambda w: w.dequantize() if isinstance(w, GatheredTensor) else w,
        lambda w: w * 2,
        lambda w: w[3],
        lambda w: w[2:5, ::2],
        lambda w: w.detach().clone().to(torch.float64),
        lambda w: torch.cat([w, w]),
        lambda w: torch.einsum("...i,oi->...o", x, w),
        lambda w: x @ w.T,
        lambda w: functional.linear(x, w),
        lambda w: functional.embedding(torch.tensor([1, 5]), w),
        lambda w: w.reshape(-1),
    ):
        found = read(weight)
        found = found.dequantize() if isinstance(found, GatheredTensor) else found
        torch.testing.assert_close(found, read(dense), rtol=0, atol=allowed)


def test_a_product_keeps_nothing_dequantized_and_has_the_gradient_of_the_dense_one():
    made, dense = layer()
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):
        sizes: list[int] = []
        functional.linear(x, made.weight).square().sum().backward()
    assert max(sizes) <= max(4 * 32, made.packed.numel())
    wanted = x.detach().requires_grad_()
    (wanted @ dense.T).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad)


def test_writes_are_refused():
    weight = layer()[0].weight
    for write in (
        lambda: weight.mul_(2),
        lambda: weight.__setitem__(0, 1.0),
        lambda: weight.requires_grad_(),
        lambda: weight.zero_(),
    ):
        with pytest.raises(RuntimeError, match="stored in nf4, block_size=8, scales=double, gathered"):
            write()


def test_an_order_names_each_column_once():
    check_order(ORDER, "order")
    check_order(ORDER.to("meta"), "order")
    for wrong in (torch.zeros(4, dtype=torch.int32), torch.tensor([0, 1, 4], dtype=torch.int32)):
        with pytest.raises(ValueError, match="each of . columns once"):
            check_order(wrong, "order")
