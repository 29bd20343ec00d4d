"""Adapters fold into any base, or leave the model as it was."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import (
    FourBit,
    Half,
    HalfLinear,
    Linear4Bit,
    LoRA,
    add_adapter,
    convert,
    deactivate,
    load,
    merge,
    merge_adapter,
    quantize,
    save,
)
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.fold import unadapted_shallow_copy
from lowmem.quant.quantize_tensor import relative_error
from tests import strategies
from tests.models import out_of_file
from tests.refusing import refused
from tests.rounding import stored_weight
from tests.test_any_model import Tied

every_base = pytest.mark.parametrize("base", sorted(strategies.BASES))
ranks = st.integers(1, 9)


@pytest.mark.parametrize("base", ["half", "bfloat16"])
@given(strategies.linears(), ranks, strategies.seeds)
def test_merge_into_a_half_base_rounds_once(base, linear, rank, seed):
    layer = strategies.make_adapted(linear, base, rank, seed=seed)
    weight, delta = layer.weight_rounded, layer.adapters.default.weight.delta()
    bias = layer._parameters.get("bias_rounded")
    merged = merge(layer)
    assert type(merged) is HalfLinear
    assert torch.equal(merged.weight_rounded, (weight.float() + delta).to(weight.dtype))
    assert merged.bias is None or merged.bias_rounded is bias


@given(strategies.linears(), ranks, strategies.seeds)
def test_merge_into_a_4bit_base_quantizes_again_and_says_the_error(linear, rank, seed):
    layer = strategies.make_adapted(linear, "4-bit", rank, seed=seed)
    target = layer.quantized.dequantize() + layer.adapters.default.weight.delta()
    changed = relative_error(target, layer.quantized)  # by the adapter
    with pytest.warns(UserWarning, match=r"quantized 1 adapted weights to 4 bits again.*relative error of") as caught:
        merged = merge(layer)
    assert type(merged) is Linear4Bit
    assert torch.equal(merged.packed, quantize(target, "nf4", block_size=16).packed)
    error = relative_error(target, merged.quantized)
    assert f"at most {error:.3g} (the model itself)" in str(caught[0].message)
    told = "; in 1 of them that is more than half of what the adapter changed: merge into 16 bits"
    assert str(caught[0].message).endswith(told) is (error > changed / 2)


@every_base
def test_a_fresh_adapter_leaves_the_base_in_its_place_with_every_byte_and_no_warning(base):
    """Also the sign of a zero, which adding a zero would lose."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0] = -0.0
        model[0].bias[0] = -0.0
    convert(model, *strategies.BASES[base], LoRA(2))
    layers = list(model)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged, report = merge(copy.deepcopy(model), report=True)
        assert [(row.before, row.after) for row in report] == [(0.0, 0.0)] * 2
        merge(model)
    assert list(model) == layers
    for one in (model, merged):
        for name, value in one.state_dict().items():
            assert torch.equal(value.flatten().view(torch.uint8), stored[name].flatten().view(torch.uint8))


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_to_a_dtype_makes_dense_layers_rounded_once(base, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8, bias=False))
    model[0] = strategies.make_adapted(model[0], base)
    model[2] = convert(model[2], *strategies.BASES[base], LoRA(2))
    deactivate(model[2])
    weights = [stored_weight(layer).float() for layer in (model[0], model[2])]
    weights[0] = weights[0] + model[0].adapters.default.weight.delta()
    bias, norm = model[0].bias, model[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(model.eval(), dtype)
    assert model[1] is norm
    for layer, weight in zip((model[0], model[2]), weights, strict=True):
        assert type(layer) is torch.nn.Linear
        assert torch.equal(layer.weight, weight.to(dtype))
        assert not layer.weight.requires_grad
        assert not layer.training
    assert torch.equal(model[0].bias, bias.to(dtype))
    assert model[0](torch.ones(2, 24, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dense_layer_keeps_its_dtype_though_the_sum_is_wider(dtype):
    layer = strategies.make_adapted(torch.nn.Linear(8, 8, dtype=dtype), "dense")
    expected = (unadapted_parameter(layer, "weight") + layer.adapters.default.weight.delta()).to(dtype)
    merged = merge(layer)
    assert merged.weight.dtype == merged.bias.dtype == dtype
    assert torch.equal(merged.weight, expected)


def error_of(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@every_base
@pytest.mark.parametrize("to", ["same format", torch.bfloat16])
def test_the_report_says_what_the_adapters_change_and_what_storing_the_sum_loses(base, to):
    """Against float64; a report's figures have 4 digits."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 32) for name in ("a", "b")})
    model["a"] = strategies.make_adapted(model["a"], base)
    model["b"] = add_adapter(strategies.make_adapted(model["b"], base), "more", LoRA(2, 5.0))
    torch.nn.init.normal_(model["b"].adapters.more.weight.lora_b)
    bases = {name: stored_weight(layer) for name, layer in model.items()}
    deltas = {
        name: [layer.adapters.adapters_by_parameter(one)["weight"].delta().double() for one in layer.adapters.names]
        for name, layer in model.items()
    }
    exact = {name: bases[name] + sum(deltas[name]) for name in model}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the report says it
        merged, report = merge(model, to, report=True)
    assert merged is model
    assert [(row.path, row.adapters) for row in report] == [("a", ("default",)), ("b", ("default", "more"))]
    for row in report:
        assert row.before == pytest.approx(error_of(bases[row.path], exact[row.path]), rel=1e-3)
        assert row.after == pytest.approx(
            error_of(stored_weight(model[row.path]), exact[row.path]), rel=1e-3, abs=1e-7
        )
        assert row.output_before is row.output_after is None
    assert report.worst.after == max(row.after for row in report)
    wanted = ["a", "default", f"{report[0].before:.4g}", f"{report[0].after:.4g}"]
    assert str(report).splitlines()[1].split() == wanted


class Branches(torch.nn.Module):
    """Layers that are called twice, called by keyword, read or never used; it returns a mapping."""

    def __init__(self):
        super().__init__()
        self.twice, self.keyword, self.read, self.never = (torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x, scale):
        self.seen = [x, self.twice(x)]
        self.seen.append(self.twice(self.seen[1]))
        y = self.keyword(input=self.seen[2] * scale)
        return {"index": x.argmax(-1), "last": y.tanh() @ self.read.weight.T, "first": x[:, 0]}


def outputs(model, *inputs):
    with torch.no_grad():
        found = model(*inputs)
    return torch.cat([found["last"], found["first"][:, None]], 1).double()


@every_base
@pytest.mark.parametrize("to", ["same format", torch.bfloat16])
def test_with_inputs_the_report_has_the_errors_of_the_layers_and_the_model_s_outputs(base, to):
    torch.manual_seed(0)
    model = convert(Branches(), *strategies.BASES[base], LoRA(2, dropout=0.5)).train()
    for layer in (model.twice, model.keyword, model.read, model.never):
        torch.nn.init.normal_(layer.lora_b)
    plain, without, x = copy.deepcopy(model).eval(), copy.deepcopy(model).eval(), torch.randn(5, 16)
    deactivate(without)
    exact = outputs(plain, x, 2.0)
    given = {"twice": torch.cat(plain.seen[:2]), "keyword": plain.seen[2] * 2}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for inputs in ((x, 2.0), {"x": x, "scale": 2.0}):
        one, report = merge(copy.deepcopy(model), to, inputs=inputs, report=True)
        assert all(module.training for module in one.modules())
        for row in report[:2]:
            layer = getattr(plain, row.path)
            with torch.no_grad():
                wanted, before = layer(given[row.path]).double(), unadapted_shallow_copy(layer)(given[row.path])
                after = getattr(one, row.path)(given[row.path].to(x.dtype if to == "same format" else to))
            assert row.output_before == pytest.approx(error_of(before, wanted), rel=1e-4)
            assert row.output_after == pytest.approx(error_of(after, wanted), rel=1e-4, abs=1e-6)
            assert row.largest == max(row.after, row.output_after)
        assert all(row.output_after is row.output_before is None for row in report[2:])
        assert not any(vars(module)["_forward_pre_hooks"] for module in one.modules())
    if to == "same format":
        assert report.output_after == pytest.approx(error_of(outputs(one.eval(), x, 2.0), exact), rel=1e-4, abs=1e-7)
    else:  # layers compute in bfloat16, the rest as before
        assert 0 < report.output_after < 2**-6
    assert report.output_before == pytest.approx(error_of(outputs(without, x, 2.0), exact), rel=1e-4)
    ends = [f"{report.output_before:.4g}", f"{report.output_after:.4g}"]
    assert report.cells[-1] == ["whole model", "", "", "", *ends]
    assert "whole model" in str(report)
    limit, options = max(row.largest for row in report), {"inputs": inputs, "report": True}
    if report.output_after > limit:
        with pytest.raises(ValueError, match="relative error of .* of the whole model's outputs, above at_most="):
            merge(copy.deepcopy(model), to, at_most=limit, **options)
    merge(copy.deepcopy(model), to, at_most=max(limit, report.output_after), **options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.twice.adapters.active == ("default",)


def test_a_model_whose_outputs_change_their_shapes_has_no_error_of_them():
    class Chosen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x):
            out = self.layer(x)
            return out[out > 0]

    model = convert(Chosen(), LoRA(1))
    with torch.no_grad():
        model.layer.lora_b.copy_(torch.ones(4, 1) * 100)
        model.layer.lora_a.copy_(torch.ones(1, 4))
        unadapted_parameter(model.layer, "weight").fill_(-1)
    _, report = merge(model, inputs=torch.ones(1, 4), report=True)
    assert report.output_before is report.output_after is None
    assert report[0].output_after == 0
    assert len(report.cells) == 1


def test_a_merge_beyond_at_most_is_refused_with_the_worst_layer_and_the_model_stays():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    convert(model, FourBit(), LoRA(4))
    torch.nn.init.normal_(model[1].lora_b, std=1e-3)
    _, report = merge(copy.deepcopy(model), report=True)
    assert [row.after > 0 for row in report] == [False, True]
    x = torch.randn(3, 64)
    for limit, inputs in ((report[1].after * 0.99, None), (0, None), (0, x)):
        says = r"^1: merging gives a relative error of [\d.]+, above at_most=[\d.e-]+; merge"
        with refused(model, ValueError, says):
            merge(model, at_most=limit, inputs=inputs)
    merge(model, torch.float32, at_most=1e-7)
    assert type(model[1]) is torch.nn.Linear


@pytest.mark.parametrize("part", [0.99, 1])
def test_outputs_beyond_at_most_are_refused_too(part):
    """Inputs that the base and the adapter cancel on: what storing loses of the weight is large in the outputs."""
    torch.manual_seed(0)
    layer = convert(torch.nn.Linear(32, 32, bias=False), Half(torch.bfloat16), LoRA(1))
    x = torch.ones(32)  # x.dot(x) and A x are then exact, in whatever order they are added
    with torch.no_grad():
        layer.lora_a.copy_(x[None] / x.dot(x))
        layer.lora_b.copy_(-part * unadapted_shallow_copy(layer)(x)[:, None])  # B A x = -part W x
    _, report = merge(copy.deepcopy(layer), inputs=x[None], report=True)
    limit = 2 * report[0].after
    assert report[0].output_after > limit
    assert (report[0].output_after == float("inf")) == (part == 1)  # the exact output is zero
    merge(copy.deepcopy(layer), at_most=limit)
    for inputs in (x[None], torch.full((1, 32), float("inf"))):  # outputs that are no numbers, too
        with refused(layer, ValueError, "the model itself: merging gives a relative error of"):
            merge(layer, at_most=limit, inputs=inputs)


def test_an_adapter_that_was_merged_reversibly_is_reported_against_its_own_base():
    layer = strategies.make_adapted(torch.nn.Linear(64, 16), "4-bit")
    x = torch.randn(4, 64)
    _, expected = merge(copy.deepcopy(layer), inputs=x, report=True)
    with pytest.warns(UserWarning, match="quantized 1 adapted weights"):
        merge_adapter(layer, "default")
    assert merge(layer, inputs=x, report=True)[1] == expected


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"to": "bfloat16"}, ValueError, "to='bfloat16' must be 'same format', or a floating-point torch.dtype"),
        ({"to": torch.int8}, ValueError, "to=torch.int8 must be"),
        ({"to": None}, ValueError, "to=None must be"),
        *(({"at_most": v}, ValueError, f"at_most={v!r} must be a number") for v in (-1, True, "1", float("nan"))),
        ({"inputs": torch.ones(1, 8)}, ValueError, "inputs= measure errors for report=True or at_most="),
        ({"inputs": 3, "report": True}, TypeError, "a batch is a int; it must be a Tensor"),
        (
            {"inputs": torch.ones(1, 7), "report": True},
            ValueError,
            r"inputs= cannot be given to .*: RuntimeError: .*7",
        ),
        ({"inputs": torch.ones(1, 8).long(), "report": True}, ValueError, "inputs= cannot be given to .* dtypes and"),
        ({"inputs": {"y": torch.ones(1, 8)}, "report": True}, ValueError, "inputs= cannot be given to .*TypeError"),
    ],
)
def test_bad_arguments_are_named_and_the_model_stays(options, kind, message):
    model = torch.nn.Sequential(strategies.make_adapted(torch.nn.Linear(8, 8), "dense")).train()
    with refused(model, kind, message):
        merge(model, **options)


def test_a_bias_that_the_dtype_cannot_hold_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    torch.nn.init.constant_(model[0].bias, 1e6)
    convert(model, FourBit(), LoRA(2))
    with refused(model, ValueError, "0: the adapted bias holds the magnitude 1e"):
        merge(model, torch.float16)


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
    for fold in (merge, lambda model: merge_adapter(model, "default")):
        with refused(model, ValueError, message):
            fold(model)
        assert model[0].adapters.merged_name is None


@pytest.mark.parametrize("base", sorted(strategies.BASES))
@pytest.mark.parametrize("to", ["same format", torch.bfloat16])
def test_merging_that_would_untie_is_refused_and_the_model_stays(base, to, tmp_path):
    x = torch.arange(16)
    for paths in (("tokens", "head"), ("tokens",), ("head",)):
        model = convert(Tied(), *strategies.BASES[base], LoRA(2), where=lambda p, _: True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name and name.startswith(paths):
                    parameter.normal_()
        before = model(x)
        with refused(model, ValueError, "^head shares its weight with tokens, .*keep the adapter apart"):
            merge(model, to)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge_adapter(model, "default")  # whose bases stay tied
        save(model, tmp_path / "model.safetensors")
        assert torch.equal(out_of_file(load(tmp_path / "model.safetensors", Tied))(x), before)


@every_base
def test_merging_fresh_adapters_leaves_a_tie(base, tmp_path):
    x = torch.arange(16)
    model = merge(convert(Tied(), *strategies.BASES[base], LoRA(2), where=lambda *_: True))
    assert model.head.weight is model.tokens.weight
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(out_of_file(load(tmp_path / "model.safetensors", Tied))(x), model(x))
    # One table of two embeddings is merged into one, and another with the same values, or no active adapter, is not.
    for to in ("same format", torch.float16):
        model = torch.nn.ModuleList(torch.nn.Embedding(16, 8) for _ in range(5))
        model[1].weight = model[0].weight
        model[2].load_state_dict(model[0].state_dict())
        convert(model, *strategies.BASES[base], LoRA(2), where=lambda *_: True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.ones_(parameter)
        for layer in model[3:]:
            deactivate(layer)
        expected = [layer(x) for layer in model[3:]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge(model, to)
        for layer, before in zip(model[3:], expected, strict=True):
            torch.testing.assert_close(layer(x).float(), before, rtol=1e-2, atol=1e-2)
        for kept in ("weight", *(name for name, _ in model[0].named_parameters())):
            assert getattr(model[0], kept) is getattr(model[1], kept)
        assert model[2].weight is not model[0].weight
        assert torch.equal(model[2](x), model[0](x))


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.l = torch.nn.Embedding(11, 16), torch.nn.Linear(16, 16)
        self.a = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.e(x)
        return self.l(self.a(x, x, x)[0])


@every_base
def test_outputs_of_attention_and_embeddings_merged_to_a_dtype_are_compared(base):
    for taken in ("e a a.out_proj l", "a e", "e", "a.out_proj", "a"):
        where = lambda p, _, taken=taken: p in taken.split()  # noqa: E731
        model = convert(Attends(), *strategies.BASES[base], LoRA(2), where=where)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_(0, 0.1)
        _, report = merge(model, torch.bfloat16, inputs=torch.randint(0, 11, (2, 5)), report=True)
        assert report.output_after < min(0.05, report.output_before)
