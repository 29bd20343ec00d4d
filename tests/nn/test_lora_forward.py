"""LoRA trains two thin matrices beside a frozen base."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lowmem
from lowmem import FourBit, Half, LoRA, convert
from lowmem.nn.adapter import Adapter
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.fold import unadapted_shallow_copy
from lowmem.quant.backend import backend_for
from tests import strategies

every_base = pytest.mark.parametrize("base", sorted(strategies.BASES))
ranks = st.integers(1, 9)


@every_base
@given(strategies.linears(), ranks, st.floats(0.1, 10), st.booleans(), strategies.leading_shapes, strategies.seeds)
def test_output_and_gradients_follow_the_equation(base, linear, rank, alpha, stabilized, leading, seed):
    rank = min(rank, *linear.weight.shape)
    technique = LoRA(rank, alpha, rank_stabilized=stabilized)
    layer = strategies.make_adapted(linear, base, seed=seed, technique=technique).double()
    x = strategies.make_input(leading, layer.in_features, seed, torch.float64)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    twin = x.detach().clone().requires_grad_()
    scaling = alpha / (rank**0.5 if stabilized else rank)
    assert f"rank={rank}, scaling={scaling:g}" in repr(layer)
    expected = unadapted_shallow_copy(layer)(twin) + scaling * (twin @ a.t()) @ b.t()
    out = layer(x)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for got, wanted in ((x.grad, twin.grad), (layer.lora_a.grad, a.grad), (layer.lora_b.grad, b.grad)):
        torch.testing.assert_close(got, wanted)
    assert not any(p.grad is not None for name, p in layer.named_parameters() if "lora" not in name)


def one_adapter(base=None, **options):
    """A layer whose adapter is not zero, over a 4-bit base unless another is given."""
    torch.manual_seed(0)
    layer = convert(nn.Linear(24, 16), *([FourBit("int4")] if base is None else base), LoRA(4, **options)).eval()
    nn.init.normal_(layer.lora_b)
    return layer


@pytest.fixture
def updates(monkeypatch):
    """Whether each product of a base was taken with its update in one call."""
    seen = []
    linear = backend_for().linear

    def watched(x, weight, dtype, bias=None, update=None):
        seen.append(update is not None)
        return linear(x, weight, dtype, bias, update)

    monkeypatch.setattr(backend_for(), "linear", watched)
    return seen


def expected_of(layer, x):
    return layer.adapters.default.weight(unadapted_shallow_copy(layer)(x), x)


@pytest.mark.parametrize("base", [[FourBit("int4")], [FourBit("nf4")], [Half()], [Half(torch.bfloat16)]], ids=repr)
@torch.no_grad()
def test_a_base_and_its_only_adapter_take_one_call(base, updates):
    layer = one_adapter(base)
    for batch in (1, 3, 12, 40):
        x = torch.randn(batch, 24)
        expected = expected_of(layer, x)
        updates.clear()
        got = layer(x)
        assert updates == [True]
        assert torch.equal(got, expected)


@torch.no_grad()
def test_hooks_that_a_layer_had_before_see_its_output_with_the_adapter(updates):
    layer, seen = nn.Linear(24, 16), []
    handle = layer.register_forward_hook(lambda *given: seen.append(given[-1]))
    convert(layer, FourBit("int4"), LoRA(4)).eval()
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 24)
    out = layer(x)
    assert seen == [out]
    assert not torch.equal(out, unadapted_shallow_copy(layer)(x))
    assert updates[0] is True  # in one call
    handle.remove()
    layer(x)
    assert len(seen) == 1
    layer.forward = lambda given: torch.ones(len(given), 16)
    assert torch.equal(layer(x), torch.ones(2, 16))
    del layer.forward
    assert torch.equal(layer(x), out)


@torch.no_grad()
def test_an_adapter_s_own_forward_is_called(updates):
    layer, x = one_adapter(), torch.randn(2, 24)
    expected, adapter = layer(x), layer.adapters.default.weight
    before = adapter.forward
    adapter.forward = lambda out, given: before(out, given) + 1
    updates.clear()
    assert torch.equal(layer(x), expected + 1)
    assert updates == [False]
    del adapter.forward
    assert torch.equal(layer(x), expected)

    class Doubled(Adapter):
        def forward(self, out, given):
            return super().forward(out, given) * 2

    adapter.__class__ = Doubled
    assert torch.equal(layer(x), expected * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train(),
        lambda layer: layer.adapters.default.weight.double(),
        lambda layer: setattr(layer, "compute_dtype", torch.bfloat16),
        lambda layer: layer.adapters.default.weight.register_parameter(
            "lora_a", nn.Parameter(torch.randn(24, 4).t())
        ),
    ],
    ids=["dropout", "dtype", "compute_dtype", "strides"],
)
@torch.no_grad()
def test_what_one_call_cannot_take_is_taken_in_two(change):
    layer = one_adapter(dropout=0.5)
    change(layer)
    x = torch.randn(2, 24)
    torch.manual_seed(1)
    expected = expected_of(layer, x)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_one_call_takes_the_tokens_of_several_sequences(updates):
    layer, x = one_adapter(), torch.randn(2, 3, 24)
    expected = layer(x.view(6, 24)).view(2, 3, -1)
    updates.clear()
    assert torch.equal(layer(x), expected)
    assert updates == [True]
    assert layer(x[:0]).shape == (0, 3, expected.shape[2])


@torch.no_grad()
def test_an_input_that_one_call_cannot_take_is_taken_in_two(updates):
    layer = one_adapter()
    for x in (torch.randn(24), torch.randn(2, 24).bfloat16(), torch.randn(2, 24).double()):
        assert torch.equal(layer(x), expected_of(layer, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(torch.ones(2, 24)), expected_of(layer, torch.ones(2, 24)))
    assert True not in updates
    for bad in (torch.randn(2, 23), torch.ones(2, 24).int()):
        with pytest.raises(RuntimeError):
            layer(bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_update_of_an_output_in_half_precision_is_that_of_the_equation(dtype):
    layer = convert(torch.nn.Linear(16, 8), Half(dtype), LoRA(2, alpha=6))
    layer.lora_b.data.normal_()
    x = torch.randn(5, 16).to(dtype)
    update = x.double() @ layer.adapters.default.weight.delta().double().t()
    expected = x.double() @ unadapted_parameter(layer, "weight").double().t() + layer.bias.double() + update
    # The base, the update and their sum are rounded to the dtype: each is off by half an eps of what is below 16.
    assert ((layer(x).double() - expected).abs() <= 3 * 16 * torch.finfo(dtype).eps).all()
    assert (update.abs() > 1).any()


def test_the_largest_alpha_gives_finite_updates():
    layer = convert(torch.nn.Linear(4, 4), LoRA(1, alpha=torch.finfo(torch.float32).max))
    assert layer(torch.randn(2, 4)).isfinite().all()


def test_layers_whose_parameters_something_replaced_still_work():
    """parametrize and DataParallel take parameters out of the module's own table."""
    torch.manual_seed(0)
    layer = convert(torch.nn.Linear(6, 4), FourBit(block_size=8), LoRA(2)).eval()
    half = convert(torch.nn.Linear(6, 4), Half())
    x = torch.randn(2, 6)
    expected = layer(x), half(x)
    torch.nn.utils.parametrize.register_parametrization(layer.adapters.default.weight, "lora_a", torch.nn.Identity())
    bias = layer.bias.detach().clone()
    del layer.bias
    layer.bias = bias
    weight = half.weight_rounded.detach().clone()
    del half.weight_rounded
    half.weight_rounded = weight
    torch.testing.assert_close(layer(x), expected[0])
    torch.testing.assert_close(half(x), expected[1])


def test_weight_and_bias_can_be_set_unless_an_adapter_is_merged():
    layer = convert(nn.Linear(8, 6), LoRA(2))
    weight, bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
    layer.weight, layer.bias = weight, bias
    assert unadapted_parameter(layer, "weight") is weight
    assert layer.bias is bias
    layer.weight = layer.weight  # an AdaptedWeight: its base is set, and no adapter is taken into it
    assert unadapted_parameter(layer, "weight") is weight
    lowmem.merge_adapter(layer, "default")
    for name, value in (("weight", weight), ("bias", bias)):
        with pytest.raises(ValueError, match=f"{name} cannot be set while adapter 'default' is merged.*unmerge"):
            setattr(layer, name, value)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_functional_calls_take_other_values_for_the_base_and_the_adapter(base):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.Embedding(8, 16)), torch.randn(3, 16)
    model = convert(model, *([] if base == "dense" else [FourBit("nf4", 16)]), LoRA(2), where=lambda *_: True)
    layer = model[0]
    nn.init.normal_(layer.lora_b)
    own = {name: one.detach() for name, one in layer.named_parameters()}
    call = lambda values: torch.func.functional_call(layer, values, (x,))  # noqa: E731
    torch.testing.assert_close(call(own), layer(x))
    layer(x).sum().backward()
    of_a = torch.func.grad(lambda a: call({**own, "adapters.default.weight.lora_a": a}).sum())(
        own["adapters.default.weight.lora_a"]
    )
    torch.testing.assert_close(of_a, layer.lora_a.grad)
    weight = torch.randn(8, 16)
    if base == "dense":
        exact = nn.functional.linear(x, weight + layer.lora_b @ layer.lora_a, layer.bias)
        torch.testing.assert_close(call({"weight": weight}), exact)
    else:
        with pytest.raises(TypeError, match=r"stored in nf4.*leave the module out with skip= if functional_call"):
            call({"weight": weight})
    torch.testing.assert_close(call(own), layer(x))  # nothing of the others is left
    with torch.no_grad():
        for adapter in lowmem.adapter_layers(model, "default").values():
            nn.init.normal_(adapter.lora_a)
    tokens, table, embedding = torch.tensor([1, 7]), torch.randn(8, 16), model[1]
    if base == "dense":
        given = torch.func.functional_call(embedding, {"weight": table}, (tokens,))
        change = (embedding.weight - embedding._parameters["weight"]).detach()
        torch.testing.assert_close(given, (table + change)[tokens], rtol=1e-4, atol=1e-5)
