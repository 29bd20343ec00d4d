"""LoRA trains two thin matrices beside a frozen base, and folds into any of them."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FourBit, Half, HalfLinear, Linear4Bit, LoRA, LoRALinear, convert, merge, quantize
from tests import strategies

BASES = {"dense": (), "half": (Half(),), "bfloat16": (Half(torch.bfloat16),), "4-bit": (FourBit(block_size=16),)}
every_base = pytest.mark.parametrize("base", sorted(BASES))
ranks = st.integers(1, 9)


def adapted(linear, base, rank=4, alpha=None, seed=0):
    """Return a LoRALinear over the base whose lora_b is no longer zero."""
    layer = convert(linear, *BASES[base], LoRA(rank, alpha))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator))
    return layer


@every_base
@given(strategies.linears(), ranks, strategies.leading_shapes, strategies.seeds)
def test_a_fresh_adapter_changes_nothing_bit_for_bit(base, linear, rank, leading, seed):
    x = strategies.make_input(leading, linear.in_features, seed)
    plain = convert(copy.deepcopy(linear), *BASES[base]) if BASES[base] else copy.deepcopy(linear)
    layer = convert(linear, *BASES[base], LoRA(rank))
    assert torch.equal(layer(x), plain(x))


@every_base
@given(strategies.linears(), ranks, st.floats(0.1, 10), strategies.leading_shapes, strategies.seeds)
def test_output_and_gradients_follow_the_equation(base, linear, rank, alpha, leading, seed):
    layer = adapted(linear, base, rank, alpha, seed).double()
    x = strategies.make_input(leading, layer.in_features, seed, torch.float64)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    twin = x.detach().clone().requires_grad_()
    expected = layer.base(twin) + alpha / rank * (twin @ a.t()) @ b.t()
    out = layer(x)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for got, wanted in ((x.grad, twin.grad), (layer.lora_a.grad, a.grad), (layer.lora_b.grad, b.grad)):
        torch.testing.assert_close(got, wanted)


@every_base
@given(strategies.linears(torch.float64), ranks)
def test_gradcheck_in_float64(base, linear, rank):
    layer = adapted(linear, base, rank).double()
    x = strategies.make_input((2,), layer.in_features, 0, torch.float64)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.lora_a, layer.lora_b))


@every_base
def test_only_the_adapters_train(base):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    model = convert(model, *BASES[base], LoRA(2), where=lambda path, _: path == "0")
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == ["0.lora_a", "0.lora_b"]


@given(strategies.linears(), ranks, strategies.seeds)
def test_merge_into_a_dense_base_equals_the_adapted_model(linear, rank, seed):
    layer = adapted(linear, "dense", rank, seed=seed)
    x = strategies.make_input((3,), layer.in_features, seed)
    expected = layer(x)
    merged = merge(layer)
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.weight.double(), layer.base.weight.double() + layer.delta().double())


@pytest.mark.parametrize("base", ["half", "bfloat16"])
@given(strategies.linears(), ranks, strategies.seeds)
def test_merge_into_a_half_base_rounds_once(base, linear, rank, seed):
    layer = adapted(linear, base, rank, seed=seed)
    merged = merge(layer)
    assert type(merged) is HalfLinear
    assert torch.equal(merged.weight, (layer.base.weight.float() + layer.delta()).to(merged.weight.dtype))
    assert merged.bias is None or torch.equal(merged.bias, layer.base.bias)


@given(strategies.linears(), ranks, strategies.seeds)
def test_merge_into_a_4bit_base_quantizes_again_and_says_the_error(linear, rank, seed):
    layer = adapted(linear, "4-bit", rank, seed=seed)
    target = layer.base.quantized.dequantize() + layer.delta()
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
    layer = convert(linear, *BASES[base], LoRA(2))
    stored = copy.deepcopy(layer.base.state_dict())
    layer.lora_a.data, layer.lora_b.data = layer.lora_a.data.half(), layer.lora_b.data.half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = merge(layer).state_dict()
    assert all(torch.equal(merged[name], stored[name]) for name in stored)


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
    model = torch.nn.Sequential(adapted(torch.nn.Linear(8, 8), base))
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
    convert(model, *BASES[base], LoRA(1))
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


def test_dropout_acts_on_the_update_in_training_only():
    layer = convert(torch.nn.Linear(64, 8), LoRA(4, dropout=0.5))
    torch.nn.init.ones_(layer.lora_b)
    x = torch.randn(5, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_adapters_of_a_float64_layer_are_float64_and_of_a_half_one_float32():
    assert convert(torch.nn.Linear(4, 4, dtype=torch.float64), LoRA(1)).lora_a.dtype == torch.float64
    assert convert(torch.nn.Linear(4, 4, dtype=torch.bfloat16), LoRA(1)).lora_a.dtype == torch.float32


def test_autocast_and_half_inputs_keep_the_base_s_dtype():
    layer = adapted(torch.nn.Linear(16, 8), "4-bit")
    assert layer(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 16)).dtype == torch.bfloat16


def test_repr_names_rank_and_scaling():
    assert "rank=4, scaling=2" in repr(convert(torch.nn.Linear(4, 4), LoRA(4, alpha=8)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"rank": rank}, f"rank={rank!r} must be a positive integer") for rank in (0, -1, 2.0, True, "4", None)),
        *(
            ({"alpha": alpha}, "alpha=.* must be a positive number")
            for alpha in (0, -1, float("inf"), float("nan"), "1")
        ),
        *(({"dropout": p}, "dropout=.* must be at least 0 and below 1") for p in (-0.1, 1, 1.5, float("nan"), "0")),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_layers_whose_parameters_something_replaced_still_work():
    """parametrize and DataParallel take parameters out of the module's own table."""
    torch.manual_seed(0)
    layer = convert(torch.nn.Linear(6, 4), FourBit(block_size=8), LoRA(2)).eval()
    half = convert(torch.nn.Linear(6, 4), Half())
    x = torch.randn(2, 6)
    expected = layer(x), half(x)
    torch.nn.utils.parametrize.register_parametrization(layer, "lora_a", torch.nn.Identity())
    bias = layer.base.bias.detach().clone()
    del layer.base.bias
    layer.base.bias = bias
    weight = half.weight.detach().clone()
    del half.weight
    half.weight = weight
    torch.testing.assert_close(layer(x), expected[0])
    torch.testing.assert_close(half(x), expected[1])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_adapter_of_an_empty_layer_gives_an_empty_or_plain_output(shape):
    with pytest.warns(UserWarning, match="zero-element"):
        layer = convert(torch.nn.Linear(*shape), LoRA(1)).eval()
    with torch.no_grad():
        assert layer(torch.randn(2, shape[0])).shape == (2, shape[1])
