"""An input that is computed again in backward is not kept, whatever saves it."""

import weakref

import pytest
import torch
from torch import nn

from lowmem.nn.recomputed_inputs import recompute_function_or_none, recomputed_instead_of_saved


def call(layer, source, context=True):
    hidden = source * 2
    with recomputed_instead_of_saved(hidden, lambda dtype: source.detach() * 2):
        return layer(hidden)


def test_gradients_and_views():
    source, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    layer = lambda x: (x.view(8, 3) @ weight.t()).sin() + (x[1:3, 2] * x[1:3, 2]).sum()  # noqa: E731
    expected = torch.autograd.grad(layer(source * 2).sum(), [source, weight])
    found = torch.autograd.grad(call(layer, source).sum(), [source, weight])
    for got, one in zip(found, expected, strict=True):
        assert torch.equal(got, one)


def test_nothing_is_kept_and_all_else_is_as_outside():
    source, layer = torch.randn(4, 6, requires_grad=True), nn.Linear(6, 6)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: packed.append(one.shape) or one, lambda one: one):
        out = call(lambda x: layer(x).exp(), source)
    assert packed == [torch.Size([6, 6]), torch.Size([4, 6])]  # the weight and exp's result, outside: nothing else
    out.sum().backward()
    assert torch.allclose(layer.weight.grad, out.detach().t() @ (source.detach() * 2))


def test_the_input_is_freed():
    source, seen = torch.randn(4, 6, requires_grad=True), []
    out = call(lambda x: seen.append(weakref.ref(x)) or (x * x).sum(), source)
    assert seen[0]() is None
    out.backward()
    assert torch.allclose(source.grad, 8 * source.detach())


def test_writes_are_seen():
    source, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6)
    call(lambda x: x @ weight, source).sum().backward()
    out = call(lambda x: x @ weight, source)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    hidden = torch.randn(3, requires_grad=True) * 1
    with recomputed_instead_of_saved(hidden, lambda dtype: hidden):
        assert recompute_function_or_none(hidden)(None) is hidden
        assert recompute_function_or_none(hidden.clone()) is None
        hidden.mul_(2)
        assert recompute_function_or_none(hidden) is None
    assert recompute_function_or_none(hidden) is None
