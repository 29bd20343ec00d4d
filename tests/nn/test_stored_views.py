"""Nothing writes to a stored weight by halves: a write is refused with its remedy, or stores anew."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from lowmem import EightBit, FourBit, Half, convert, restore
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.stored_views import stored_in_same_form
from lowmem.quant.quantize_tensor import relative_error
from tests.nn.stored_cases import store

forms = pytest.mark.parametrize("form", ["nf4", "bfloat16"])


@forms
def test_memory_that_it_has_not_is_refused_and_its_parts_are_shared(form):
    weight = store(torch.randn(24, 40), form)
    for export in (weight.numpy, weight.tolist, lambda: torch.from_dlpack(weight)):
        with pytest.raises(TypeError, match=r"has no dense memory: call weight.dequantize\(\) first"):
            export()
    assert weight.share_memory_() is weight
    assert all(part.is_shared() for part in weight.parts)


@forms
def test_it_never_trains(form):
    weight = store(torch.randn(24, 40), form)
    for train in (lambda: weight.requires_grad_(), lambda: setattr(weight, "requires_grad", True)):
        with pytest.raises(RuntimeError, match="frozen: train an adapter"):
            train()
    assert weight.requires_grad_(False) is weight
    weight.requires_grad = False
    assert not weight.requires_grad


@pytest.mark.parametrize("technique", [FourBit("nf4"), FourBit("int4", search=True), Half(torch.float16)])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(40, 24), lambda: nn.Conv2d(4, 6, 3), lambda: nn.Embedding(24, 40)]
)
def test_data_is_stored_in_the_form_of_the_weight(technique, make):
    layer, other = convert(make(), technique), make()
    weight, first = layer.weight, next(layer.parameters())
    weight.data = other.weight.detach().clone()
    expected = convert(other, technique).weight
    assert torch.equal(layer.weight, expected)
    assert torch.equal(weight, expected)
    assert next(layer.parameters()) is first
    weight.data = expected
    assert torch.equal(layer.weight.dequantize(), expected.dequantize())


@pytest.mark.parametrize("technique", [FourBit(), Half()])
def test_data_of_more_rows_changes_the_shape_for_all_that_share_the_weight(technique):
    """As a model's vocabulary grows."""
    tokens, head = nn.Embedding(10, 32), nn.Linear(32, 10, bias=False)
    head.weight = tokens.weight
    model = convert(nn.ModuleList([tokens, head]), technique)
    more = torch.randn(12, 32)
    model[0].weight.data = more
    assert model[0].weight.shape == model[1].weight.shape == (12, 32)
    assert model[0].weight is model[1].weight
    assert model[1](torch.randn(3, 32)).shape == (3, 12)
    assert torch.equal(model[0](torch.arange(12)), model[1].weight.dequantize())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin[0].weight.dequantize(), model[0].weight.dequantize())


def test_data_of_a_longer_bias_changes_its_length():
    """As a decoder's, which a larger vocabulary pads."""
    layer = convert(nn.Linear(8, 6), Half(torch.bfloat16))
    before = layer.bias.dequantize()
    layer.bias.data = nn.functional.pad(layer.bias.data, (0, 2))
    layer.weight.data = torch.cat([layer.weight.dequantize(), torch.ones(2, 8)])
    assert layer.bias.shape == layer.bias.dequantize().shape == (8,)
    assert torch.equal(layer.bias.dequantize(), nn.functional.pad(before, (0, 2)))
    x = torch.randn(3, 8)
    for one in (layer, copy.deepcopy(layer), restore(copy.deepcopy(layer))):
        torch.testing.assert_close(one(x), x @ layer.weight.dequantize().t() + layer.bias.dequantize())


@pytest.mark.parametrize("technique", [FourBit(), FourBit("nf4", 64), EightBit()], ids=str)
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 32), lambda: nn.Conv2d(8, 8, 3), lambda: nn.Embedding(32, 64)]
)
def test_data_that_changes_a_weight_a_little_warns_of_what_quantizing_adds(technique, make):
    """As PEFT's merges of DoRA do; new values of another weight, more rows and rows that stay are set in silence."""
    layer = convert(make(), technique, where=lambda path, module: True)
    old = layer.weight.dequantize()
    layer.weight.data = old.clone()
    assert torch.equal(layer.weight.dequantize(), old)
    values = old + torch.randn_like(old) * old.std() / 20
    with pytest.warns(UserWarning, match=r"quantized again.*lowmem.restore\(model\).*lowmem.merge") as warned:
        layer.weight.data = values
    numbers = [
        float(one) for one in re.findall(r"relative (?:change|error) of ([0-9.e-]+[0-9])", str(warned[0].message))
    ]
    expected = relative_error(values, old), relative_error(values, layer.weight.dequantize())
    assert numbers == [pytest.approx(one, rel=0.5) for one in expected]
    assert warned[0].filename == __file__
    layer.weight.data = torch.randn_like(values)


def test_data_that_cannot_be_stored_changes_nothing():
    layer = convert(nn.Linear(40, 24), FourBit())
    before = layer.weight.dequantize()
    with pytest.raises(ValueError, match="NaN"):
        layer.weight.data = torch.full((24, 40), float("nan"))
    with pytest.raises(RuntimeError, match="this weight is stored in bof4s.*and the value in fp4"):
        layer.weight.data = store(torch.randn(24, 40), "fp4")
    with pytest.raises(RuntimeError, match=r"rows of shape \(40,\), and the value of \(41,\)"):
        layer.weight.data = torch.randn(24, 41)
    with pytest.raises(RuntimeError, match="would write to a weight that is stored in bof4s"):
        layer.weight.T.data = torch.randn(40, 24)
    assert torch.equal(layer.weight.dequantize(), before)


@forms
def test_storing_again_what_is_stored_changes_no_bit(form):
    """Of a stack, too, whose matrices are the same tensors until it is stored anew."""
    weight = store(torch.randn(24, 40), form)
    again = stored_in_same_form(weight, weight.dequantize())
    assert torch.equal(again.dequantize(), weight.dequantize())
    stack = store(torch.randn(3, 24, 40), form)
    for values in (stack.dequantize(), torch.randn(3, 24, 40)):
        stack.data = values
        matrices = [stack[number] for number in range(3)]
        assert stack[1] is matrices[1] is stack[torch.tensor(1)] is stack[torch.tensor(1, dtype=torch.int32)]
        assert [type(one) for one in matrices] == [StoredTensor] * 3
        expected = stored_in_same_form(stack, values).dequantize()
        assert torch.equal(torch.stack([one.dequantize() for one in matrices]), expected)
        assert torch.equal(stack[torch.tensor([1])].dequantize(), expected[1:2])
        assert torch.equal(stack[-1].dequantize(), expected[2])


@forms
def test_an_einsum_that_sums_a_letter_of_the_weight_alone_is_that_of_the_values(form):
    weight, stack = store(torch.randn(24, 40), form), store(torch.randn(3, 24, 40), form)
    for equation, w, x in (
        ("bi,oi->b", weight, (5, 40)),
        ("bo,oi->b", weight, (5, 24)),
        ("bi,eoi->bo", stack, (5, 40)),
    ):
        x = torch.randn(x)
        torch.testing.assert_close(torch.einsum(equation, x, w), torch.einsum(equation, x, w.dequantize()))


def test_codes_are_copied_between_weights_of_one_form_alone():
    one, other, fp4 = (store(torch.randn(24, 40), form) for form in ("nf4", "nf4", "fp4"))
    with torch.no_grad():
        one.copy_(other)
        assert torch.equal(one, other)
        with pytest.raises(RuntimeError, match=r"stored in nf4.*lowmem.restore\(model\)"):
            one.copy_(fp4)
    assert torch.equal(one, other)
