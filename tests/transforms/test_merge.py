"""Adapters fold into any base, or leave the model as it was."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import (
    FourBit,
    HalfLinear,
    Linear4Bit,
    LoRA,
    LoRALinear,
    convert,
    load_adapter,
    merge,
    quantize,
    save_adapter,
)
from tests import strategies
from tests.rounding import assert_sum
from tests.selection import covering

every_base = pytest.mark.parametrize("base", sorted(strategies.BASES))
ranks = st.integers(1, 9)


@given(strategies.linears(), ranks, strategies.seeds)
def test_merge_into_a_dense_base_equals_the_adapted_model(linear, rank, seed):
    layer = strategies.make_adapted(linear, "dense", rank, seed=seed)
    x = strategies.make_input((3,), layer.in_features, seed)
    expected = layer(x)
    merged = merge(layer)
    assert type(merged) is torch.nn.Linear
    adapter = layer.adapters["default"]
    exact = layer.base.weight.double() + adapter.scaling * adapter.lora_b.double() @ adapter.lora_a.double()
    magnitudes = layer.base.weight.double().abs()
    magnitudes += abs(adapter.scaling) * adapter.lora_b.double().abs() @ adapter.lora_a.double().abs()
    assert_sum(merged.weight, exact, magnitudes, rank + 2)  # the sum over the rank, its scaling, the base added
    bias = 0 if layer.base.bias is None else layer.base.bias.double()
    terms = layer.in_features + rank + 4  # those sums, one after the other, and the bias
    for got in (expected, merged(x)):
        assert_sum(got, x.double() @ exact.t() + bias, x.double().abs() @ magnitudes.t() + abs(bias), terms)


@pytest.mark.parametrize("base", ["half", "bfloat16"])
@given(strategies.linears(), ranks, strategies.seeds)
def test_merge_into_a_half_base_rounds_once(base, linear, rank, seed):
    layer = strategies.make_adapted(linear, base, rank, seed=seed)
    merged = merge(layer)
    assert type(merged) is HalfLinear
    assert torch.equal(
        merged.weight, (layer.base.weight.float() + layer.adapters["default"].delta()).to(merged.weight.dtype)
    )
    assert merged.bias is None or torch.equal(merged.bias, layer.base.bias)


@given(strategies.linears(), ranks, strategies.seeds)
def test_merge_into_a_4bit_base_quantizes_again_and_says_the_error(linear, rank, seed):
    layer = strategies.make_adapted(linear, "4-bit", rank, seed=seed)
    target = layer.base.quantized.dequantize() + layer.adapters["default"].delta()
    with pytest.warns(UserWarning, match=r"quantized 1 adapted weights to 4 bits again.*relative error of") as caught:
        merged = merge(layer)
    assert type(merged) is Linear4Bit
    assert torch.equal(merged.packed, quantize(target, "nf4", block_size=16).packed)
    error = (merged.quantized.dequantize() - target).pow(2).mean().sqrt() / target.pow(2).mean().sqrt()
    assert f"at most {float(error):.3g} (the model itself)" in str(caught[0].message)


@pytest.mark.parametrize("base", ["dense", "bfloat16", "4-bit"])
def test_a_fresh_adapter_folds_to_nothing_whatever_the_model_was_cast_to(base):
    linear = torch.nn.Linear(8, 8)
    torch.nn.init.normal_(linear.weight, std=1e-9)
    layer = convert(linear, *strategies.BASES[base], LoRA(2))
    stored = copy.deepcopy(layer.base.state_dict())
    adapter = layer.adapters["default"]
    adapter.lora_a.data, adapter.lora_b.data = adapter.lora_a.data.half(), adapter.lora_b.data.half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = merge(layer).state_dict()
    assert all(torch.equal(merged[name], stored[name]) for name in stored)


@covering(format=["nf4", "bof4s", "fp4", "int4"], scales=["float16", "float32", "double"], search=[False, True])
def test_merging_a_fresh_adapter_into_4_bits_changes_no_byte_and_refuses_no_other(format, scales, search, tmp_path):
    """Also in rows with an outlier, whose other blocks lie far below one step of ``double`` scales."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[:4, 5] = 1e4
    convert(model, FourBit(format, 16, scales, search=search), LoRA(2))
    save_adapter(model, tmp_path / "other.safetensors")
    stored = copy.deepcopy([model[0].base.state_dict(), model[1].base.state_dict()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(model)
    for layer, before in zip(model, stored, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    load_adapter(model, tmp_path / "other.safetensors")


def test_merge_leaves_the_rest_of_the_model_and_the_modes_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).eval()
    norm = model[1]
    convert(model, LoRA(2))
    merge(model)
    assert model[1] is norm
    assert not model[0].training
    assert not model[0].weight.requires_grad
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


@every_base
def test_merging_twice_is_refused(base):
    model = torch.nn.Sequential(strategies.make_adapted(torch.nn.Linear(8, 8), base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no LoRALinear to merge.*merged already"):
        merge(model)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("base", "value", "message"),
    [
        ("half", 1e5, "1: the adapted weight holds the magnitude .*scale the adapter down"),
        ("half", float("nan"), "1: the adapted weight holds 4 values that are NaN"),
        ("dense", float("nan"), "1: the adapted weight holds 4 values that are NaN"),
        ("4-bit", float("inf"), "1: the adapted weight holds 4 values that are NaN"),
    ],
)
def test_an_adapter_that_cannot_be_folded_leaves_the_model_as_it_was(base, value, message):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    convert(model, *strategies.BASES[base], LoRA(1))
    with torch.no_grad():
        model[1].lora_a.fill_(1)
        model[1].lora_b[0] = value
    layers = list(model)
    with pytest.raises(ValueError, match=message):
        merge(model)
    assert list(model) == layers


def test_merge_takes_modules_only():
    with pytest.raises(TypeError, match="must be a torch.nn.Module, found dict"):
        merge({})
