"""The measured bytes are exact: against arithmetic, and torch's profiler."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lowmem import FourBit, Half, LoRA, build, convert, measure
from tests.profiled import profiled_peak


def test_counts_and_bytes_of_shared_and_buffered_modules():
    linear = nn.Linear(4, 6, bias=False)
    model = nn.Sequential(linear, nn.BatchNorm1d(6), nn.Linear(6, 4), linear).double()
    model[2].requires_grad_(False)
    counts = measure.counts(model)
    assert (counts.trainable, counts.frozen, counts.total) == (24 + 12, 28, 64)
    assert measure.theoretical_bytes(model) == 8 * (64 + 12) + 8  # running statistics, and an int64 counter
    assert measure.actual_bytes(model) == measure.theoretical_bytes(model)


def test_actual_bytes_count_a_whole_storage_once():
    base = torch.zeros(100)
    model = nn.Module()
    model.one, model.two = nn.Parameter(base[:10]), nn.Parameter(base[10:20])
    assert measure.theoretical_bytes(model) == 80
    assert measure.actual_bytes(model) == 400


@pytest.mark.parametrize("techniques", [(), (Half(),), (FourBit(),), (FourBit(), LoRA(4)), (LoRA(4),)])
def test_weight_count_is_the_float_model_s_in_which_a_shared_weight_counts_once(techniques):
    plain = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 7, bias=False))
    tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(4, 8))
    tied[1].weight = tied[2].weight = tied[0].weight
    for model, weights in ((plain, 40 * 30 + 30 + 60 + 210), (tied, 32 + 8 + 8)):
        stored = convert(model, *techniques, where=lambda *_: True) if techniques else model
        assert measure.weight_count(stored) == weights


def test_peak_memory_follows_what_is_allocated_and_freed():
    memory = measure.PeakMemory()
    with memory:
        one = torch.zeros(1000)
        assert memory.current == memory.peak == 4000
        view = one[:10].view(5, 2)
        view += 1
        assert memory.current == 4000
        two = one * 2
        assert memory.current == 8000
        del one
        assert memory.current == 8000  # the view holds the storage
        del view
        assert memory.current == 4000
        del two
        assert memory.current == 0
        assert memory.peak == 8000


def test_peak_memory_follows_what_a_tensor_subclass_allocates():
    weight, x = convert(nn.Linear(64, 64), FourBit()).weight, torch.ones(64, 64)
    weight + x  # caches
    assert measure.peak_bytes(lambda: x + x) == 4 * 64 * 64
    assert (
        2 * 4 * 64 * 64 <= measure.peak_bytes(lambda: weight + x) < 3 * 4 * 64 * 64
    )  # the dense weight, and the sum
    assert measure.peak_bytes(weight.detach) == 0


def test_peak_memory_follows_a_resize_and_does_not_count_what_existed_before():
    before, memory = torch.zeros(1000), measure.PeakMemory()
    with memory:
        grows = torch.empty(0)
        torch.add(torch.ones(8), 1, out=grows)
        assert memory.current == 32
        grows.resize_(32)
        assert memory.current == memory.peak == 128
        view = before[:500]
        before.add_(1)
        other = view + 1
        assert memory.peak == 128 + other.nbytes == 2128
    del other, view  # freed after the measurement: still followed


def test_bytes_of_a_forward_and_of_a_step_by_hand():
    hidden = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50))
    assert measure.forward_bytes(hidden, torch.randn(10, 100)) == 4 * 10 * (200 + 200)
    model, gradients = nn.Linear(1000, 1000), 4 * 1_001_000
    x = torch.randn(1, 1000)
    assert gradients <= measure.backward_bytes(model, x) <= gradients + 3 * 4000
    model.requires_grad_(False)  # where nothing trains, a step is a forward
    assert measure.backward_bytes(model, x) == measure.forward_bytes(model, x)


@pytest.mark.parametrize("function", [measure.forward_bytes, measure.backward_bytes])
def test_measuring_leaves_the_model_and_the_generator_as_they_were(function):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    model[1].eval()
    model[0].weight.grad = torch.ones(6, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    function(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones(6, 4))
    assert model[0].bias.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(RuntimeError):
        function(model, torch.randn(2, 5, generator=torch.Generator()))
    assert [module.training for module in model.modules()] == modes


def test_buffers_that_a_forward_replaces_or_that_are_views_are_given_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("view", torch.ones(1).expand(4))
            self.register_buffer("none", None)

        def forward(self, x):
            self.calls = self.calls + 1
            return self.linear(x) * self.view

    model, x = Counts(), torch.randn(2, 4, requires_grad=True)
    calls, view = model.calls, model.view
    measure.backward_bytes(model, x)
    assert model.calls is calls
    assert model.view is view
    assert float(calls) == 0
    assert x.grad is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_a_scripted_submodule_is_measured_as_its_source_and_gets_its_buffers_back():
    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))

    plain, model, x = make(), nn.Sequential(nn.Linear(4, 4), torch.jit.script(make())), torch.randn(8, 4)
    model.register_buffer("none", None)
    plain = nn.Sequential(nn.Linear(4, 4), plain)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    for function in (measure.theoretical_bytes, measure.actual_bytes, measure.counts, measure.weight_count):
        assert function(model) == function(plain)
    for function in (measure.forward_bytes, measure.backward_bytes):
        assert function(model, x) == function(plain, x)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is one and torch.equal(one, values) for name, (one, values) in before.items())


def test_an_attribute_of_the_user_s_that_is_no_number_is_not_taken_for_one():
    class Own(nn.Linear):
        def weight_count(self):
            return "many"

    assert measure.weight_count(Own(4, 4)) == 20


@pytest.mark.parametrize("name", ["bignet", "lora", "qlora_nf4"])
def test_torch_s_profiler_sees_the_same_peaks(name):
    """The profiler sees the allocator, workspaces included: never less, and little more."""
    model, x = build(name), torch.randn(8, 1024)

    def forward():
        with torch.no_grad():
            return model.eval()(x)

    def backward():
        model.train().zero_grad(set_to_none=True)
        model(x).sum().backward()

    for run, tracked_bytes in ((forward, measure.forward_bytes), (backward, measure.backward_bytes)):
        run()
        model.zero_grad(set_to_none=True)
        tracked = tracked_bytes(model, x)
        assert tracked == tracked_bytes(model, x)  # the same in every run
        assert tracked <= profiled_peak(run) <= tracked * 1.1 + 8192


def test_difference_by_hand():
    result = measure.difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    assert (result.max, result.mean, result.relative) == (1.0, 0.5, 0.2)
    zero = measure.difference(torch.zeros(2), torch.tensor([0.0, 2.0]))
    assert (zero.max, zero.relative) == (2.0, 2.0)
    assert measure.difference(torch.zeros(0, 3), torch.zeros(0, 3)).max == 0
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\) cannot be compared"):
        measure.difference(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_differences_of_complex_outputs_count_both_parts(dtype):
    base = torch.tensor([3 + 4j, 0], dtype=dtype)
    found = measure.difference(base, base + torch.tensor([0, 3 - 4j], dtype=dtype))
    assert (found.max, found.mean, found.relative) == (5, 2.5, 1)
    assert measure.difference(base, base.conj()).max == 8
    assert measure.difference(base.real.clone(), base).max == measure.difference(base, base.real.clone()).max == 4
    assert measure.difference(torch.zeros(1, dtype=dtype), torch.tensor([2j], dtype=dtype)).relative == 2
    assert math.isnan(measure.difference(base, base * complex(1, math.nan)).max)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_figures_are_the_allocator_s():
    x = torch.randn(1024, 1024, device="cuda")
    assert measure.peak_bytes(lambda: x + 1, x.device) == x.nbytes


@dataclass
class Output:
    """What a Hugging Face model returns, reduced to its form."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    cache: object = field(init=False)  # which nothing sets


class Nested(nn.Module):
    """A linear layer whose input and output are nested as users nest them."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(100, 50), form

    def forward(self, batch, *, scale=1.0):
        return self.form(self.layer(batch["x"][0]) * scale)


FORMS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None, 3),
    "list in dict": lambda y: {"last": [y], "step": 3},
    "dataclass": Output,
    "dataclass in tuple": lambda y: ("text", Output(y)),
}


@pytest.mark.parametrize("form", FORMS.values())
def test_inputs_and_outputs_may_be_nested_in_any_form(form):
    model, x = Nested(form), torch.randn(8, 100)
    batch = {"x": (x, "not a tensor")}
    layer, scale = measure.backward_bytes(Nested(FORMS["tensor"]), batch), 4 * 8 * 50
    assert measure.forward_bytes(model, batch) == 2 * scale  # of the layer, and of the product with a number
    assert measure.backward_bytes(model, batch, scale=2.0) == layer
    assert layer >= 4 * (100 * 50 + 50)  # its gradients
    assert list(measure.tensors_in(batch)) == [x]
    assert measure.backward_bytes(Nested(torch.fft.fft), batch) >= layer  # a complex output has a gradient, too


def test_a_loss_of_the_models_own_is_what_is_differentiated():
    wide, x = nn.Linear(100, 50), torch.randn(8, 100)

    class Head(nn.Linear):
        def forward(self, input):
            return Output(super().forward(input), wide(input).sum())

    head = Head(100, 50)
    wide.requires_grad_(True)
    measure.backward_bytes(head, x)
    own = measure.backward_bytes(head, x, loss=lambda out: out.logits.sum())
    assert own >= 4 * (100 * 50 + 50)
    assert wide.weight.grad is not None  # the output's loss served where none is given
    wide.weight.grad = None
    measure.backward_bytes(head, x, loss=lambda out: out.logits.sum())
    assert wide.weight.grad is None


@pytest.mark.parametrize("loss", [lambda out: 3.0, lambda out: out, lambda out: out.sum().detach()])
def test_a_loss_that_is_no_scalar_with_a_gradient_is_refused(loss):
    with pytest.raises(TypeError, match="loss= must return a tensor of one element that has a gradient"):
        measure.backward_bytes(nn.Linear(4, 4), torch.randn(2, 4), loss=loss)
    with pytest.raises(TypeError, match="Nested returns no tensor"):
        measure.backward_bytes(Nested(lambda _: "nothing"), {"x": [torch.randn(1, 100)]})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_needs_no_gradient_mode_of_the_caller(mode):
    model, x = nn.Linear(100, 50), torch.randn(2, 100)
    expected = measure.backward_bytes(model, x)
    with mode():
        assert measure.backward_bytes(model, x) == expected
