"""Real architectures, tiny and with random weights: each converts, and is then what it was, but smaller.

``tox -e zoo`` runs these.
"""

import copy
import io
import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e zoo")
pytest.importorskip("torchvision", reason="torchvision is not installed: tox -e zoo")

from transformers import PreTrainedModel

import lowmem
from lowmem import FourBit, Half, LoRA, LoRALinear
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import assert_same
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.stored import dequantized, numbers

# How far float32 may take outputs and gradients from those of the reference, by their norms. Rounding takes outputs
# 2e-6 from those of the same models in float64, converted or not, and gradients 7e-6. Who rounds an activation to
# bfloat16 by mistake is 2e-3 away; another code or scale than the stored one is further.
CLOSE = 1e-4
# What a second rounding of an adapted weight adds, by its norm: a normal weight in nf4 0.09, bfloat16 less than 2^-8.
ROUNDED_AGAIN = {FourBit: 0.15, Half: 2**-8}
ADAPTER = LoRA(2, alpha=4)


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def architecture(request):
    return request.param


@pytest.fixture
def with_adapters(architecture, technique):
    """Return a converted model with new adapters, which do not change yet what it computes."""
    needs(architecture, "linear")
    return lowmem.convert(architecture.make(), technique, ADAPTER)


@pytest.fixture
def adapted(with_adapters):
    """Return a converted model whose adapters change what it computes."""
    with torch.no_grad():
        for adapter in lowmem.adapter_layers(with_adapters, "default").values():
            adapter.lora_b.normal_(0, 0.1)
    return with_adapters


def needs(architecture, ability):
    """Skip what the dense model cannot do either."""
    if ability in architecture.lacks:
        pytest.skip(f"the dense model lacks it: {ability}")


def reference(architecture, converted):
    """Return the dense model with the values that the converted one stores, in parameters of their own.

    Tied weights are so no longer: an adapter may have been merged into one of them.
    """
    dense = architecture.make()
    for path, values in dequantized(converted).items():
        parameter = dense.get_parameter(path)
        owner, _, name = path.rpartition(".")
        own = nn.Parameter(values.view_as(parameter).clone(), parameter.requires_grad)
        setattr(dense.get_submodule(owner), name, own)
    return dense


def tensors(outputs):
    """Return the tensors of what a model returns, in order; caches are none of them."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def cast(inputs, dtype):
    floating = lambda value: isinstance(value, torch.Tensor) and value.is_floating_point()  # noqa: E731
    return tree_map(lambda value: value.to(dtype) if floating(value) else value, inputs)


@torch.no_grad()
def call(architecture, model, dtype=torch.float32):
    return tensors(model(**cast(architecture.inputs(), dtype)))


@torch.no_grad()
def generate(architecture, model):
    """Return the tokens of a greedy continuation, with those that it continues: (batch, length)."""
    inputs = {name: value for name, value in architecture.inputs().items() if not name.startswith("decoder_")}
    return model.generate(**inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4)


def gradients(architecture, model):
    """Return the gradients of the mean squares of all outputs, by the names of the parameters that got one."""
    outputs = tensors(model(**architecture.inputs()))
    model.zero_grad()
    sum(output.square().mean() for output in outputs if output.requires_grad).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_close(got, expected, bound=CLOSE):
    assert [value.shape for value in got] == [value.shape for value in expected]
    for a, b in zip(got, expected, strict=True):
        if a.is_floating_point():
            excess = float((a - b).norm()) / max(float(b.norm()), math.ulp(0))
            assert excess <= bound, f"off by {excess:.2g} of the norm"
        else:
            assert torch.equal(a, b)


def assert_finite(got):
    assert got
    assert all(torch.isfinite(value).all() for value in got)


def test_an_architecture_is_small_and_the_same_each_time(architecture):
    first, second = architecture.make(), architecture.make()
    assert sum(parameter.numel() for parameter in first.parameters()) < 400_000
    assert not any(module.training for module in first.modules())
    outputs = call(architecture, first)
    assert_finite(outputs)
    assert_equal(call(architecture, second), outputs)
    if architecture.generates:
        assert torch.equal(generate(architecture, first), generate(architecture, second))


def checkpointed(model):
    """Return a dense model that checkpoints activations, with frozen embeddings."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    model.activation_checkpointing_enable()
    return model


@pytest.mark.parametrize("architecture", [pytest.param(a, id=a.name) for a in ARCHITECTURES.values() if a.lacks])
def test_what_an_architecture_lacks_its_dense_model_lacks(architecture):
    abilities = {
        "pickle": lambda: pickle.dumps(architecture.make()),
        "linear": lambda: next(m for m in architecture.make().modules() if isinstance(m, nn.Linear)),
        "bfloat16": lambda: call(architecture, architecture.make().to(torch.bfloat16), torch.bfloat16),
        "checkpointing": lambda: gradients(architecture, checkpointed(architecture.make().train())),
    }
    for ability in architecture.lacks:
        with pytest.raises((RuntimeError, StopIteration)):
            abilities[ability]()


def test_outputs_are_those_of_the_dequantized_weights(architecture, converted):
    assert_close(call(architecture, converted), call(architecture, reference(architecture, converted)))


@pytest.mark.parametrize("architecture", [pytest.param(a, id=a.name) for a in ARCHITECTURES.values() if a.generates])
def test_the_same_tokens_are_generated(architecture, converted):
    assert torch.equal(generate(architecture, converted), generate(architecture, reference(architecture, converted)))


def test_copies_pickles_states_and_files_compute_the_same(architecture, technique, converted, tmp_path):
    other = architecture.make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    other = lowmem.convert(other, technique)
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    lowmem.save(converted, tmp_path / "model.safetensors")
    twins = [other, lowmem.load(tmp_path / "model.safetensors", architecture.make), copy.deepcopy(converted)]
    if "pickle" not in architecture.lacks:
        twins.append(pickle.loads(pickle.dumps(converted)))
    expected = call(architecture, converted)
    for twin in twins:
        assert_equal(call(architecture, twin), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # much of these tiny models stays dense, which is said elsewhere
def test_it_is_stored_while_it_loads_from_a_folder(architecture, technique, tmp_path):
    model = architecture.make()
    if not isinstance(model, PreTrainedModel):
        pytest.skip(f"{type(model).__name__} is no PreTrainedModel, and has no folder")
    model.save_pretrained(tmp_path / "dense")
    read = type(model).from_pretrained(tmp_path / "dense", quantization_config=LowmemConfig(technique))
    converted = lowmem.convert(type(model).from_pretrained(tmp_path / "dense"), technique)
    assert_same(read, converted)
    for number, one in enumerate((read, converted)):
        one.save_pretrained(tmp_path / f"{number}")
        assert_same(type(model).from_pretrained(tmp_path / f"{number}"), one)


def test_it_runs_under_autocast_and_in_bfloat16(architecture, converted):
    dense = architecture.make()
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [(call(architecture, converted), call(architecture, dense))]
    if "bfloat16" not in architecture.lacks:
        low = (model.to(torch.bfloat16) for model in (converted, dense))
        pairs.append([call(architecture, model, torch.bfloat16) for model in low])
    for got, expected in pairs:
        assert_finite(got)
        assert [value.dtype for value in got] == [value.dtype for value in expected]


def test_adapters_get_the_gradients_of_their_weights(architecture, technique, with_adapters):
    """For W + s B A with B = 0, the gradient of B is s G A^T, where G is that of W; and no adapter is left out."""
    dense = reference(architecture, lowmem.convert(architecture.make(), technique))
    gradients(architecture, with_adapters)
    gradients(architecture, dense)
    pairs = []
    for path, adapter in lowmem.adapter_layers(with_adapters, "default").items():
        of_weight = dense.get_parameter(adapted_parameter(dense, path)).grad
        if of_weight is not None:  # the outputs depend on it
            assert adapter.lora_b.grad is not None, f"{path}: the adapter has no effect"
            matrices = adapter.layout.to_matrices(of_weight)  # (*stack, out, in)
            expected = adapter.scaling * matrices @ adapter.lora_a.detach().mT  # (*stack, out, rank)
            pairs.append((adapter.lora_b.grad, expected))
    assert pairs
    # Where a gradient all but cancels out (attention over equal values), rounding is that of its large terms.
    largest = max(float(expected.norm()) for _, expected in pairs)
    for got, expected in pairs:
        assert float((got - expected).norm()) <= CLOSE * max(float(expected.norm()), largest / 100)


def adapted_parameter(dense, place):
    """Return the name of the parameter that an adapter changes: that of its place, or ``weight`` there."""
    return place if place in dict(dense.named_parameters(remove_duplicate=False)) else f"{place}.weight"


def test_nearly_all_numbers_are_stored(architecture):
    """Biases, norms, position tables, routers and state matrices stay dense: 8% of so small a model at most."""
    stored, kept = numbers(architecture.make(), lowmem.convert(architecture.make(), FourBit("nf4")))
    assert stored >= 0.92 * (stored + kept.total()), kept.most_common(5)


def test_a_saved_adapter_loads_onto_another_base(architecture, technique, adapted, tmp_path):
    lowmem.save_adapter(adapted, tmp_path / "adapter.safetensors")
    other = lowmem.load_adapter(lowmem.convert(architecture.make(), technique), tmp_path / "adapter.safetensors")
    assert_equal(call(architecture, other), call(architecture, adapted))


def test_merging_rounds_the_adapted_weights(architecture, technique, adapted):
    before = dequantized(lowmem.convert(architecture.make(), technique))
    deltas = {path: adapter.delta() for path, adapter in lowmem.adapter_layers(adapted, "default").items()}
    quantizes = isinstance(technique, FourBit)
    with pytest.warns(UserWarning, match="merge quantized") if quantizes else nullcontext():
        merged = lowmem.merge(adapted)
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    after = dequantized(merged)
    for path, delta in deltas.items():
        weight = path if path in after else f"{path}.weight"
        assert_close([after[weight]], [before[weight] + delta], ROUNDED_AGAIN[type(technique)])
    assert_close(call(architecture, merged), call(architecture, reference(architecture, merged)))


def test_checkpointed_activations_give_the_same_gradients(architecture, with_adapters):
    needs(architecture, "checkpointing")
    model = with_adapters.train()
    if not getattr(model, "supports_gradient_checkpointing", False):
        pytest.skip("the dense model lacks it: checkpointing of activations")

    def step():
        torch.manual_seed(0)  # dropout
        np.random.seed(0)  # masked parts of speech
        return gradients(architecture, model)

    kept = {name: value.clone() for name, value in step().items()}
    model.activation_checkpointing_enable()
    got = step()
    assert got
    assert got.keys() == kept.keys()
    assert_close(list(got.values()), list(kept.values()))
