"""Stored weights where two rules meet: other dimensions, transposed ones, other formats, other storages."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem import FourBit, Half, convert
from lowmem.kernels.grouped import grouped_product
from lowmem.quant.backend import backend_of
from tests.nn.stored_cases import store
from tests.selection import rows_in_one_case

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


@forms
@rows_in_one_case(
    "view",
    [
        lambda w: w[::2],
        lambda w: w[:, ::5],
        lambda w: w.unbind(1)[4],
        lambda w: w.split(8, 1)[2],
        lambda w: w.split([4, 20], 1)[1],
        lambda w: w.split([1, 2])[1],
        lambda w: w.select(1, 7),
        lambda w: w[:, -3],
    ],
)
def test_views_of_every_dimension_that_counts_rows_have_the_same_values(form, view):
    weight = store(torch.randn(3, 24, 40), form)
    made, expected = view(weight), view(weight.dequantize())
    assert made.shape == expected.shape
    assert torch.equal(made.dequantize(), expected)


@forms
@rows_in_one_case(
    "view",
    [
        lambda w: w.mT.reshape(-1),
        lambda w: w.mT.flatten(),
        lambda w: w.mT.contiguous().view(5, -1),
        lambda w: w.mT.clone(memory_format=torch.contiguous_format).view(w.shape[0], 2, -1),
        lambda w: w.mT.reshape(-1, w.shape[-2]),
        lambda w: w.mT.contiguous().view_as(w),
    ],
)
def test_a_transposed_weight_takes_other_shapes(form, view):
    for shape in ((24, 40), (3, 24, 40)):
        weight = store(torch.randn(shape), form)
        assert torch.equal(view(weight), view(weight.dequantize()))


@forms
@rows_in_one_case(
    "view", [lambda w: w[2], lambda w: w[1:7], lambda w: w.unbind()[3], lambda w: w.split(8)[1], lambda w: w[[3, 1]]]
)
def test_rows_of_a_transposed_weight_are_its_columns(form, view):
    weight = store(torch.randn(24, 40), form)
    made = view(weight.T)
    assert torch.equal(made, view(weight.dequantize().T))


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


@forms
@pytest.mark.parametrize(
    ("equation", "size"), [("bhnd,hnid->bi", (2, 4, 3, 8)), ("bi,hnid->hnbd", (2, 5))], ids=["both", "neither"]
)
def test_an_einsum_loops_over_two_letters_that_count_rows(form, equation, size):
    weight, x = store(torch.randn(4, 3, 5, 8), form), torch.randn(size, dtype=torch.float64)
    expected = torch.einsum(equation, x, weight.dequantize(torch.float64))
    torch.testing.assert_close(torch.einsum(equation, x, weight), expected)


@pytest.mark.parametrize("technique", [FourBit("nf4"), Half(torch.bfloat16)])
def test_a_state_with_one_part_of_another_shape_changes_nothing(technique):
    layer, other = convert(nn.Linear(16, 8), technique), convert(nn.Linear(16, 8), technique)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    last = [name for name in state if name.endswith(("scales", "bias_rounded"))][-1]
    state[last] = torch.cat([state[last], state[last]])
    x = torch.randn(2, 16)
    before = layer(x)
    with pytest.raises(RuntimeError, match="has shape"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)


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
