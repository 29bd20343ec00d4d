"""A model calibrated on samples of its inputs, layer by layer, in order, or left as it was."""

import copy
import gc
import types
import weakref
from collections import UserDict

import pytest
import torch
from torch import nn

from lowmem import Conv4Bit, Embedding4Bit, FourBit, Half, Linear4Bit, LoRA, calibrate, convert, quantize
from lowmem.transforms import gptq
from tests.rounding import assert_sum
from tests.selection import rows_in_one_case


class Net(nn.Module):
    """Attention-like: three layers get one input; then a normalization, dropout and two more, one of them twice."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(16, 4)
        self.last = nn.Linear(32, 5)
        self.twice = nn.Linear(32, 32)
        self.q, self.k, self.v = (nn.Linear(48, 32) for _ in range(3))
        self.norm, self.drop = nn.LayerNorm(32), nn.Dropout(0.5)

    def forward(self, x, *, scale=1.0):
        x = self.norm(torch.tanh(self.q(x) * self.k(x)) + self.v(x)) * scale
        return self.last(self.drop(self.twice(torch.relu(self.twice(x)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(48, 48, generator=generator) * torch.linspace(0.05, 1, 48) ** 2
    return [torch.randn(4, 25, 48, generator=generator) @ mix.T for _ in range(3)]


NO_BATCH = pytest.mark.filterwarnings("ignore:layers were quantized by their weights alone")
SKIP = {"skip": "unused"}


def test_the_model_computes_more_nearly_what_it_did(net, samples):
    dense, searched = copy.deepcopy(net).eval(), convert(copy.deepcopy(net), FourBit(search=True), **SKIP).eval()
    assert calibrate(net, samples, **SKIP) is net
    net.eval()

    @torch.no_grad()
    def error(model):
        return float(sum((model(x) - dense(x)).norm() for x in samples))

    assert error(net) < 0.75 * error(searched)
    for layer in (net.q, net.k, net.v, net.twice, net.last):
        assert type(layer) is Linear4Bit
        assert layer.quantized.method == "calibrated"
        assert 0 < layer.weight_error < 0.3
    assert type(net.unused) is nn.Linear


def test_a_repeat_gives_the_same_bytes(net, samples):
    one, two = (calibrate(copy.deepcopy(net), samples, **SKIP).state_dict() for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_each_layer_sees_what_the_layers_before_it_give_in_4_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    x = torch.randn(60, 24)
    dense = copy.deepcopy(model)
    calibrate(model, [x])
    hidden = torch.relu(model[0](x)).detach()
    inputs = gptq.prepare_hessian(hidden.T @ hidden / 60, 0.01)
    expected = gptq.quantize_gptq(dense[2].weight, FourBit(search=True), inputs)
    assert torch.equal(model[2].packed, expected.packed)


def test_a_layer_that_is_called_twice_counts_both(net, samples, monkeypatch):
    seen = []
    told = gptq.prepare_hessian
    monkeypatch.setitem(calibrate.__globals__, "prepare_hessian", lambda m, d: seen.append(m.clone()) or told(m, d))
    inputs = []
    net.twice.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 32)))
    calibrate(net, samples, where=lambda path, _: path == "twice")
    rows = torch.cat(inputs[:6])  # of the run that finds the order: nothing was quantized yet
    assert len(seen) == 1
    exact, magnitudes = rows.double().T @ rows.double(), rows.double().abs().T @ rows.double().abs()
    assert_sum(seen[0], exact / len(rows), magnitudes / len(rows), len(rows) + 2)  # the mean divides, or scales twice


def test_layers_that_get_the_same_input_share_a_run(net, samples):
    runs = []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    calibrate(net, samples, **SKIP)
    assert len(runs) == len(samples) * (1 + 3)  # for the order; q with k and v, twice, last


def test_an_input_changed_in_place_is_another():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            x = x.clone()
            a = self.a(x)
            return a + self.b(x.mul_(torch.arange(16.0)))

    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(40, 16)
    weight = model.b.weight.detach().clone()
    calibrate(model, [x])
    x = x * torch.arange(16.0)
    expected = gptq.quantize_gptq(weight, FourBit(search=True), gptq.prepare_hessian(x.T @ x / 40, 0.01))
    assert torch.equal(model.b.packed, expected.packed)


def test_one_layers_second_moments_are_alive_at_a_time(net, samples, monkeypatch):
    alive = []
    told = gptq.prepare_hessian

    def watch(moments, damping):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        said = told(moments, damping)
        alive.extend(weakref.ref(tensor) for tensor in (moments, *said))
        return said

    monkeypatch.setitem(calibrate.__globals__, "prepare_hessian", watch)
    calibrate(net, samples, **SKIP)
    assert len(alive) == 3 * 4


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x],
        lambda x: {"x": x, "scale": 1.0},
        lambda x: UserDict(x=x),
    ],
)
def test_a_batch_is_a_tensor_arguments_or_keywords(net, samples, wrap):
    expected = calibrate(copy.deepcopy(net), samples, **SKIP).state_dict()
    made = calibrate(net, [wrap(x) for x in samples], **SKIP).state_dict()
    assert all(torch.equal(made[key], expected[key]) for key in expected)


def test_a_loader_gives_batches(net, samples):
    loader = torch.utils.data.DataLoader(torch.cat(samples), batch_size=4)
    expected = calibrate(copy.deepcopy(net), samples, **SKIP).state_dict()
    made = calibrate(net, loader, **SKIP).state_dict()
    assert all(torch.equal(made[key], expected[key]) for key in expected)


def test_modes_come_back_and_so_does_the_fused_path(net, samples):
    net.train()
    net.norm.eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    calibrate(net, samples, **SKIP)
    assert net.training and net.q.training and net.drop.training and not net.norm.training  # noqa: PT018
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fused


@rows_in_one_case("fails", [False, True])
@rows_in_one_case("enabled", [False, True])
def test_the_fused_path_is_off_meanwhile_and_what_it_was_afterwards_also_after_an_error(enabled, fails):
    seen = []

    class Sees(nn.Identity):
        def forward(self, x):
            seen.append(torch.backends.mha.get_fastpath_enabled())
            if fails:
                raise LookupError("the model's own")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(16, 16), Sees())
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        if fails:
            with pytest.raises(LookupError, match="the model's own"):
                calibrate(model, [torch.randn(4, 16)], FourBit(block_size=8))
        else:
            calibrate(model, [torch.randn(4, 16)], FourBit(block_size=8))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert seen
    assert not any(seen)


@pytest.mark.filterwarnings("ignore:layers were quantized by their weights alone")
def test_layers_that_were_compiled_are_calibrated_the_same(net, samples, monkeypatch):
    plain = calibrate(copy.deepcopy(net), samples, FourBit(block_size=8))
    calls = []
    monkeypatch.setattr(torch, "compile", lambda call, *_, **__: lambda *args: (calls.append(args), call(*args))[1])
    for layer in (net.q, net.twice, net.last):
        layer.compile()
    compiled = calibrate(net, samples, FourBit(block_size=8))
    assert calls
    for name in ("q", "k", "v", "twice", "last"):
        one, other = getattr(compiled, name).quantized, getattr(plain, name).quantized
        assert torch.equal(one.packed, other.packed)
        assert one.method == other.method == "calibrated"


def test_the_layers_of_a_fused_encoder_are_reached():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    calibrate(model, [torch.randn(3, 7, 16)])
    assert model.layers[1].linear2.quantized.method == "calibrated"


def test_what_no_batch_reached_is_named_and_quantized_by_its_weight(net, samples):
    expected = quantize(net.unused.weight, "nf4", search=True)
    with pytest.warns(UserWarning, match=r"\(unused: no batch reached it\)"):
        calibrate(net, samples)
    assert net.unused.quantized.method == "search"
    assert torch.equal(net.unused.packed, expected.packed)


@rows_in_one_case("value", [torch.nan, torch.inf, 0.0])
def test_inputs_that_say_nothing_are_named(value):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="0: its inputs are all zero, or hold NaN"):
        calibrate(model, [torch.full((4, 8), value)])
    assert model[0].quantized.method == "search"


def test_the_root_itself_can_be_the_layer():
    assert calibrate(nn.Linear(16, 4), [torch.randn(9, 16)]).quantized.method == "calibrated"


def test_without_the_search_scales_are_the_largest_magnitudes():
    layer = nn.Linear(16, 4)
    expected = quantize(layer.weight, "nf4")
    assert torch.equal(calibrate(layer, [torch.randn(9, 16)], FourBit(search=False)).scales, expected.scales)


@NO_BATCH
def test_other_layers_and_tied_ones_are_quantized_by_their_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.conv = nn.Embedding(30, 16), nn.Conv1d(16, 16, 1)
            self.mid, self.head = nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, i):
            return self.head(self.mid(self.conv(self.tokens(i).mT).mT))

    model = calibrate(Tied(), [torch.randint(0, 30, (2, 12))])
    assert type(model.tokens) is Embedding4Bit
    assert isinstance(model.conv, Conv4Bit)
    assert model.head.packed is model.tokens.packed
    assert [model.head.quantized.method, model.mid.quantized.method] == ["search", "calibrated"]


def test_hooks_move_and_adapters_can_follow(net, samples):
    seen = []
    net.q.register_forward_hook(lambda *_: seen.append(1))
    convert(calibrate(net, samples, **SKIP), LoRA(2), skip=["unused"])
    seen.clear()
    net(samples[0])
    assert seen == [1]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (iter([torch.ones(1, 48)]), TypeError, r"list_iterator, which can be read only once; .* list\(batches\)"),
        ((x for x in [torch.ones(1, 48)]), TypeError, "generator, which can be read only once"),
        ([], ValueError, "batches is empty"),
        (torch.ones(2, 48), TypeError, "batches is a Tensor; pass a list"),
        ({"x": torch.ones(2, 48)}, TypeError, "batches is a dict; pass a list"),
        (3, TypeError, "batches is a int; pass a list"),
        (["text"], TypeError, "a batch is a str; it must be"),
        ([torch.ones(1, 48), 3], TypeError, "a batch is a int; it must be"),
        ([torch.ones(1, 47)], RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_batches_that_are_none_are_refused_and_the_model_stays(net, batches, error, message):
    assert_stays(net, error, message, lambda: calibrate(net, batches, **SKIP))


@pytest.mark.parametrize(
    ("technique", "options", "error", "message"),
    [
        (Half(), {}, TypeError, "technique=.* must be a FourBit"),
        (FourBit, {}, TypeError, "technique=.* must be a FourBit"),
        (FourBit(), {"damping": 0}, ValueError, "damping=0 must be a number above 0"),
        (FourBit(), {"damping": float("nan")}, ValueError, "damping=nan must be"),
        (FourBit(), {"damping": True}, ValueError, "damping=True must be"),
        (FourBit(), {"skip": "nowhere"}, ValueError, "skip='nowhere' matches no module"),
        (FourBit(), {"where": lambda *_: False}, ValueError, "nothing to convert"),
    ],
)
def test_arguments_that_are_none_are_refused_and_the_model_stays(net, samples, technique, options, error, message):
    assert_stays(net, error, message, lambda: calibrate(net, samples, technique, **options))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("run", [2, 4, 11])
def test_an_error_in_any_run_leaves_the_model_as_it_was(net, samples, error, run):
    runs = []

    def fail(*_):
        runs.append(1)
        if len(runs) == run:
            raise error("now")

    handle = net.register_forward_pre_hook(fail)
    assert_stays(net, error, "now", lambda: calibrate(net, samples, **SKIP))
    handle.remove()


def test_a_weight_that_cannot_be_stored_is_named_and_the_model_stays(net, samples):
    with torch.no_grad():
        net.last.weight[0, 0] = torch.nan
    assert_stays(net, ValueError, "^last: weight holds 1 values", lambda: calibrate(net, samples, **SKIP))


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(net, samples):
    assert_stays(net, UserWarning, "no batch reached it", lambda: calibrate(net, samples))


def test_a_model_that_was_converted_is_refused(net, samples):
    convert(net, FourBit())
    with pytest.raises(ValueError, match="has FourBit already"):
        calibrate(net, samples)


def assert_stays(net, error, message, run):
    net.train()
    net.q.forward = types.MethodType(nn.Linear.forward, net.q)  # a user's own
    before = {path: (module, module.training, dict(vars(module))) for path, module in net.named_modules()}
    hooks = [len(module._forward_pre_hooks) for module in net.modules()]
    with pytest.raises(error, match=message):
        run()
    for path, module in net.named_modules():
        known, training, attributes = before[path]
        assert module is known
        assert module.training == training
        assert vars(module).keys() == attributes.keys()
        assert vars(module).get("forward") is attributes.get("forward")
    assert hooks == [len(module._forward_pre_hooks) for module in net.modules()]
    assert torch.is_grad_enabled()


def test_layers_that_are_called_by_keyword_are_calibrated():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x):
            return self.layer(input=x)

    model = calibrate(Keyword(), [torch.randn(9, 16)], FourBit())
    assert model.layer.quantized.method == "calibrated"
