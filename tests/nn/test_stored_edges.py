"""Stored weights where two rules meet: other dimensions, transposed ones, other formats, other storages."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem import FourBit, Half, convert, kernels
from lowmem.kernels.grouped import grouped_product
from lowmem.quant.backend import backend_of
from tests.nn.stored_cases import store

forms = pytest.mark.parametrize("form", ["bof4s", "bfloat16"])


@forms
def test_copies_keep_what_is_transposed_and_that_it_is_a_parameter(form):
    weight = store(torch.randn(24, 40), form)
    for twin in (copy.deepcopy(weight.T), pickle.loads(pickle.dumps(weight.T)), weight.T.clone()):
        assert twin.shape == (40, 24)
        assert torch.equal(twin.dequantize(), weight.dequantize().T)
    own = convert(nn.Linear(40, 24), FourBit() if form == "bof4s" else Half(torch.bfloat16)).weight
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert isinstance(twin, nn.Parameter)


@pytest.mark.parametrize("kernel", ["reference", kernels.available()[-1]])
def test_a_float16_input_is_multiplied_with_a_bfloat16_weight_that_float16_does_not_hold(kernel):
    weight = store(torch.full((3, 8), 2.0**20), "bfloat16")
    x, expected = torch.full((2, 8), 2.0**-10, dtype=torch.float16), torch.full((2, 3), 2.0**13, dtype=torch.float16)
    with kernels.using(kernel):
        assert torch.equal(F.linear(x, weight), expected)
        assert torch.equal(torch.mm(x, weight.half().t()), expected)


@forms
@pytest.mark.parametrize("transposed", [False, True])
def test_the_bias_of_a_convolution_trains(form, transposed):
    weight, x = store(torch.randn(8, 8, 3), form, 1), torch.randn(2, 8, 9)
    bias = torch.zeros(8, requires_grad=True)
    out = (F.conv_transpose1d if transposed else F.conv1d)(x, weight, bias)
    out.square().sum().backward()
    torch.testing.assert_close(bias.grad, 2 * out.detach().sum((0, 2)), rtol=1e-4, atol=1e-3)


def test_codes_are_copied_between_weights_of_one_form_alone():
    one, other = store(torch.randn(24, 40), "nf4"), store(torch.randn(24, 40), "nf4")
    with torch.no_grad():
        one.copy_(other)
    assert torch.equal(one, other)
    fp4 = store(torch.randn(24, 40), "fp4")
    before = one.dequantize()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"stored in nf4.*lowmem.restore\(model\)"):
        one.copy_(fp4)
    assert torch.equal(one.dequantize(), before)


def test_the_same_codes_in_two_formats_are_two_weights():
    weight = store(torch.randn(24, 40), "nf4", scales="float32")
    twin = type(weight)(
        store(torch.randn(24, 40), "fp4", scales="float32").form, weight.parts, weight.tail, weight.dtype
    )
    assert not torch.equal(weight, twin)


def test_the_matrices_of_a_stack_are_kept_and_follow_its_storage():
    weight, x = store(torch.randn(3, 6, 8), "nf4", scales="double").matrix, torch.randn(5, 8)
    arguments = torch.float32, False, 3, torch.tensor([2, 3, 5])
    before = grouped_product.compute(backend_of(x), x, weight, *arguments)
    assert torch.equal(grouped_product.compute(backend_of(x), x, weight, *arguments), before)
    other = store(torch.randn(3, 6, 8), "nf4", scales="double").matrix
    expected = grouped_product.compute(backend_of(x), x, other, *arguments)
    weight.packed.data, weight.scales.data = other.packed.clone(), other.scales.clone()
    assert torch.equal(grouped_product.compute(backend_of(x), x, weight, *arguments), expected)


@forms
def test_a_graph_takes_a_transposed_weight(form, request):
    request.addfinalizer(torch.compiler.reset)
    weight, x = store(torch.randn(24, 24), form), torch.randn(3, 24)
    compiled = torch.compile(lambda x, w: x @ w, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight.T), x @ weight.T, rtol=1e-4, atol=1e-5)
