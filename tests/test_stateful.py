"""Random sequences of what users do to a model keep what always holds."""

import copy
import io
import re
import warnings
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import nn

from lowmem import FourBit, Half, HalfLinear, LoRA, LoRALinear, convert, merge
from lowmem.nn.linear import QuantizedLinear
from tests import strategies
from tests.rounding import OF_4_BITS, assert_product, gamma, stored_weight, unit

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")  # of bases under adapters

TECHNIQUES = {
    "half": Half(),
    "bfloat16": Half(torch.bfloat16),
    "nf4": FourBit("nf4", 16),
    "int4": FourBit("int4", block_size=8, scales="float32"),
    "lora": LoRA(2),
}
FEATURES = 24
PATHS = st.sampled_from(["*", "first", "shared", "last.*"])


class Net(nn.Module):
    """Layers of odd sizes, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, 17)
        self.shared = nn.Linear(17, 17, bias=False)
        self.norm = nn.LayerNorm(17)
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(17, 5))

    def forward(self, x):
        return self.last(self.norm(self.shared(self.shared(self.first(x)))))


def stored_bits(model):
    """Return every stored tensor of the converted layers, as bytes."""
    bits = {}
    for path, module in model.named_modules():
        if isinstance(module, (HalfLinear, QuantizedLinear)):
            for name in module.part_parameter_names:
                bits[f"{path}.{name}"] = getattr(module, name).detach().contiguous().view(torch.uint8).clone()
    return bits


def adapted_weight(layer):
    """Return a layer's weight with its active adapters in float64, and the sum of the magnitudes of its terms."""
    weight = stored_weight(layer)
    magnitudes = weight.abs()
    for name in layer.adapters.active:
        adapter = layer.adapters.adapters_by_parameter(name)["weight"]
        a, b = adapter.lora_a.detach().double(), adapter.lora_b.detach().double()
        weight = weight + adapter.scaling * b @ a
        magnitudes = magnitudes + adapter.scaling * b.abs() @ a.abs()
    return weight, magnitudes


def assert_holds(layer, exact, magnitudes, terms):
    """Hold a layer's weight to an exact one: a sum in float32, rounded once as the layer stores it."""
    added = gamma(terms) * magnitudes
    if isinstance(layer, QuantizedLinear):
        rounding = layer.quantized.error_bound().double()
    else:
        stored = getattr(layer, "weight_rounded", layer.weight).dtype
        kind = torch.finfo(stored)
        rounding = unit(stored) * (exact.abs() + added) + kind.smallest_normal * kind.eps  # subnormals
    assert ((stored_weight(layer) - exact).abs() <= added + rounding).all()


class Lifecycle(RuleBasedStateMachine):
    """Convert, train, merge, save, copy and cast, in any order."""

    @initialize(seed=strategies.seeds)
    def start(self, seed):
        torch.manual_seed(seed)
        self.model = Net()
        self.x = torch.randn(3, FEATURES)
        self.bits = {}

    def layers(self, kind):
        return [m for m in self.model.modules() if isinstance(m, kind)]

    def dtype(self):
        return self.model.norm.weight.dtype

    def output(self, model=None):
        with torch.no_grad():
            return (model or self.model)(self.x.to(self.dtype()))

    @rule(name=st.sampled_from(sorted(TECHNIQUES)), paths=PATHS)
    def convert_some(self, name, paths):
        before, modules = self.output(), list(self.model.modules())
        technique = TECHNIQUES[name]
        refusal = ""
        try:
            convert(self.model, technique, where=lambda path, _: fnmatchcase(path, paths))
        except ValueError as reason:
            refusal = str(reason)
        if refusal:
            assert re.search("nothing to convert|already", refusal)
            assert list(self.model.modules()) == modules
        if refusal or name == "lora":  # a fresh adapter changes nothing
            assert torch.equal(self.output(), before)
        for layer in self.layers(LoRALinear):  # one that has learned something is worth merging
            for name in layer.adapters.names:
                nn.init.normal_(layer.adapters.adapters_by_parameter(name)["weight"].lora_b)
        self.bits = stored_bits(self.model)

    @precondition(lambda self: not self.layers(LoRALinear))
    @rule(paths=PATHS)
    def adapt_some(self, paths):
        """More often than as one of five techniques: else no adapter is there to be merged."""
        self.convert_some("lora", paths)

    @precondition(lambda self: not self.layers(LoRALinear))
    @rule(name=st.sampled_from(sorted(TECHNIQUES.keys() - {"lora"})))
    def store_and_adapt_all(self, name):
        """All layers, of which some are stored already, so that every base is adapted often enough."""
        self.convert_some(name, "*")
        self.convert_some("lora", "*")

    @rule()
    def train_a_step(self):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.dtype() != torch.float32 or not parameters:
            return
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        loss = self.model(self.x).square().mean()
        if loss.requires_grad:
            loss.backward()
            assert all(p.grad is None for p in self.model.parameters() if not p.requires_grad)
            optimizer.step()
            optimizer.zero_grad()

    @precondition(lambda self: self.layers(LoRALinear))
    @rule()
    def merge_adapters(self):
        quantized = any(isinstance(m, QuantizedLinear) for m in self.layers(LoRALinear))
        paths = {path: module for path, module in self.model.named_modules() if isinstance(module, LoRALinear)}
        expected = {path: adapted_weight(layer) for path, layer in paths.items()}
        kinds = {path: layer._plain_class for path, layer in paths.items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merge(self.model)
        assert bool(caught) == quantized
        assert not self.layers(LoRALinear)
        for path, merged in paths.items():
            assert self.model.get_submodule(path) is merged
            assert type(merged) is kinds[path]
            rank = TECHNIQUES["lora"].rank
            assert_holds(merged, *expected[path], rank + 3)  # a term each and the weight; alpha / rank, the product
            if self.dtype() in (torch.float32, torch.float64):
                x = self.x[:, : merged.in_features].to(self.dtype())
                assert_product(merged(x), x, stored_weight(merged), merged.bias, self.dtype(), more=OF_4_BITS)
        self.bits = stored_bits(self.model)

    @precondition(lambda self: not self.layers(LoRALinear))
    @rule()
    def merging_without_adapters_is_refused(self):
        modules = list(self.model.modules())
        with pytest.raises(ValueError, match="no adapter to merge"):
            merge(self.model)
        assert list(self.model.modules()) == modules

    @rule()
    def state_dict_round_trip(self):
        other = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert torch.equal(self.output(other), self.output())
        self.model = other

    @rule()
    def deepcopy(self):
        other = copy.deepcopy(self.model)
        assert torch.equal(self.output(other), self.output())
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in self.model.parameters()}
        self.model = other

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    def cast(self, dtype):
        self.model.to(dtype)

    @rule()
    def half(self):
        self.model.half()

    @rule(training=st.booleans())
    def mode(self, training):
        self.model.train(training)

    @invariant()
    def stored_bits_never_change_by_themselves(self):
        now = stored_bits(self.model)
        assert now.keys() == self.bits.keys()
        assert all(torch.equal(now[name], self.bits[name]) for name in now)

    @invariant()
    def outputs_are_finite_and_of_the_model_s_dtype(self):
        out = self.output()
        assert out.shape == (3, 5)
        assert out.dtype == self.dtype()
        assert out.isfinite().all()

    @invariant()
    def what_trains_is_what_the_techniques_say(self):
        for module in self.model.modules():
            if isinstance(module, HalfLinear):
                assert not any(p.requires_grad for p in module.parameters(recurse=False))
            if isinstance(module, QuantizedLinear):
                assert not module.quantized.packed.requires_grad
                assert not module.quantized.scales.requires_grad
                assert (module.quantized.packed.dtype, module.quantized.packed.is_contiguous()) == (torch.uint8, True)
        if self.layers(LoRALinear):
            trains = {name.rpartition(".")[2] for name, p in self.model.named_parameters() if p.requires_grad}
            assert trains == {"lora_a", "lora_b"}


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(stateful_step_count=15)


@pytest.mark.parametrize("base", ["dense", *sorted(TECHNIQUES.keys() - {"lora"})])
def test_a_merged_weight_is_the_sum_as_its_layer_stores_it(base):
    torch.manual_seed(0)
    linear = nn.Linear(FEATURES, 17)
    layer = convert(linear, *([] if base == "dense" else [TECHNIQUES[base]]), LoRA(2))
    nn.init.normal_(layer.lora_b)
    exact, magnitudes = adapted_weight(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 4 bits: what that loses
        assert_holds(merge(layer), exact, magnitudes, 2 + 3)
