"""A weight norm of a stored direction is computed in chunks: one dense weight at a time, the result."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lowmem import FourBit, Half, convert, measure, restore
from lowmem.quant import tensor

LAYERS = {
    "linear": (lambda: nn.Linear(300, 700), (3, 300)),
    "conv": (lambda: nn.Conv1d(64, 700, 5), (2, 64, 9)),
    "transposed": (lambda: nn.ConvTranspose1d(700, 64, 5), (2, 700, 9)),
}


@pytest.mark.parametrize("technique", [FourBit("nf4", 16), Half(torch.bfloat16)])
@pytest.mark.parametrize("dim", [0, -1, 1, None])
def test_values_and_gradients_are_those_of_the_dense_parametrization(technique, dim, monkeypatch):
    monkeypatch.setattr(tensor, "SCRATCH_BYTES", 2**16)  # many chunks of each weight
    for make, size in LAYERS.values():
        dims = make().weight.dim()
        layer = convert(weight_norm(make(), dim=None if dim is None else dim % dims), technique)
        magnitude = layer.parametrizations.weight.original0
        magnitude.data.mul_(torch.rand_like(magnitude) + 0.5)  # that of no direction is its norm
        magnitude.requires_grad_(True)
        dense = restore(copy.deepcopy(layer)).double()
        dense.parametrizations.weight.original0.requires_grad_(True)
        x = torch.randn(size)
        got, expected = layer(x), dense(x.double())
        # float32 sums of as many squares as there are rows or columns, and products of 1500 terms
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        got.square().sum().backward()
        expected.square().sum().backward()
        of_scale, wanted = (m.parametrizations.weight.original0.grad for m in (layer, dense))
        assert (of_scale.double() - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("technique", [FourBit("nf4"), Half(torch.bfloat16)])
@pytest.mark.parametrize("dim", [0, 1])
def test_no_more_than_the_result_and_a_chunk_is_dense(technique, dim):
    layer = convert(weight_norm(nn.Linear(1024, 2048), dim=dim), technique)
    x, dense = torch.randn(2, 1024, requires_grad=True), 4 * 1024 * 2048
    layer(x).sum().backward()
    assert measure.forward_bytes(layer, x) <= dense + 3 * 2**20
    assert measure.backward_bytes(layer, x) <= 2 * dense + 3 * 2**20  # and the gradient of the weight
