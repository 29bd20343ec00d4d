"""Every byte of a step's peak has a name: the sum is what PeakMemory tracks, and each part is what it is by hand."""

import copy
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowmem
from lowmem import BigNet, FourBit, Half, LoRA, convert, measure, prepare_training
from lowmem.training.adamw_8bit import AdamW8bit
from lowmem.training.step_memory import NAMED_OPTIMIZERS, CategorizedPeakMemory, training_memory
from tests.refusing import refused
from tests.training import blocks


class Language(nn.Module):
    """A language model with tied ends, whose layers may be computed again in backward."""

    def __init__(self, recompute=False):
        super().__init__()
        self.embedding = nn.Embedding(300, 64)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.1) for _ in range(3)
        )
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embedding.weight
        self.recompute = recompute

    def forward(self, ids, labels):
        x = self.embedding(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and self.training else layer(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": 3}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(24, 32, 2, batch_first=True), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 10)
    )


IDS = (torch.arange(64).view(4, 16) * 7 % 300, torch.arange(64).view(4, 16) % 300)
QLORA = (FourBit("nf4"), LoRA(4))
CASES = {
    "language": (Language, IDS),
    "language, computed again": (partial(Language, True), IDS),
    "language, QLoRA": (lambda: convert(Language(), *QLORA, where=lambda *_: True), IDS),
    "language, QLoRA, computed again": (lambda: convert(Language(True), *QLORA), IDS),
    "language, fast": (lambda: prepare_training(convert(Language(), *QLORA), "fast"), IDS),
    "language, lean": (lambda: prepare_training(convert(Language(), *QLORA), "lean"), IDS),
    "conv net": (conv_net, (torch.randn(8, 3, 16, 16),)),
    "conv net, LoRA on Half": (lambda: convert(conv_net(), Half(), LoRA(2)), (torch.randn(8, 3, 16, 16),)),
    "LSTM": (Recurrent, (torch.randn(6, 9, 24),)),
    "LSTM, QLoRA": (lambda: convert(Recurrent(), *QLORA), (torch.randn(6, 9, 24),)),
    "BigNet, QLoRA": (partial(lowmem.build, "qlora_nf4"), (torch.randn(16, 1024),)),
    "BigNet, 4-bit": (partial(lowmem.build, "low_precision"), (torch.randn(16, 1024),)),
}


def tracked(model, inputs, optimizer):
    """Return the peak of two plain steps, which do train, beyond model and inputs."""
    model = copy.deepcopy(model).train()
    made = NAMED_OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    memory = measure.PeakMemory()
    with memory:
        for _ in range(2):
            made.zero_grad()
            out = model(*inputs)
            loss = out["loss"] if isinstance(out, dict) else out.sum()
            del out
            loss.backward()
            del loss
            made.step()
    return memory.peak


@pytest.mark.thorough(keep=2)
@pytest.mark.parametrize("name", CASES)
def test_the_parts_sum_to_the_tracked_peak(name):
    make, inputs = CASES[name]
    model = make()
    moments = set()
    for optimizer in ["adamw"] if "BigNet" in name else NAMED_OPTIMIZERS:
        found = training_memory(model, *inputs, optimizer=optimizer)
        moments.add(found.moment)
        assert found.weights + found.adapters == measure.actual_bytes(model)
        assert found.inputs == sum(one.nbytes for one in inputs)
        assert found.step_bytes == tracked(model, inputs, optimizer)
        assert found.total_bytes == found.weights + found.adapters + found.inputs + found.step_bytes
        assert min(found.parts.values()) >= 0
        assert (found.adapters > 0) == any(isinstance(one, lowmem.nn.adapter.Adapter) for one in model.modules())
        if found.moment == "update":
            assert found.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert moments <= {"forward", "backward", "update"}


def test_each_part_by_hand():
    """With SGD and a large batch the peak is in backward; with AdamW and a small one in its step."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 30), nn.Sigmoid()).requires_grad_(True)
    numbers, rows = 10 * 20 + 20 + 20 * 30 + 30, 1000
    found = training_memory(model, torch.ones(rows, 10), optimizer="sgd")
    assert (found.optimizer_name, found.moment, found.optimizer) == ("sgd", "backward", 0)
    assert (found.weights, found.adapters, found.inputs) == (4 * numbers, 0, 4 * rows * 10)
    # ReLU keeps what it returns, Sigmoid too; what Linear returns is no longer there.
    assert found.activations == {"Sigmoid": 4 * rows * 30, "ReLU": 4 * rows * 20, "loss": 4}
    assert found.gradients == 0
    assert found.scratch == 4 * rows * 30 + 4  # gradients of what the second Linear returned, and of the loss
    found = training_memory(model, torch.ones(1, 10))
    assert (found.optimizer_name, found.moment) == ("adamw", "update")
    assert found.gradients == 4 * numbers
    assert found.optimizer == 8 * numbers  # two moments; counts of steps, made of a Python number, are not followed
    assert found.activations == {}


def test_adapters_and_8_bit_states_by_hand():
    model = convert(nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 512)), FourBit("nf4"), LoRA(8))
    found = training_memory(model, torch.ones(1, 1024), optimizer="adamw8bit")
    numbers = [8 * 1024, 512 * 8, 8 * 512, 512 * 8]
    assert found.adapters == found.gradients == 4 * sum(numbers)
    assert found.weights == measure.actual_bytes(model) - found.adapters
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert found.optimizer == sum(one.nbytes for one in measure.tensors_in(list(optimizer.state.values())))


def test_what_is_computed_again_is_smaller_and_has_the_names_of_its_layers():
    plain, again = (
        training_memory(Language(recompute), *(one.repeat(4, 4) for one in IDS), optimizer="sgd")
        for recompute in (False, True)
    )
    assert again.total_bytes < plain.total_bytes
    assert {"TransformerEncoderLayer", "MultiheadAttention"} <= plain.activations.keys()
    assert sum(again.activations.values()) < sum(plain.activations.values())
    assert "TransformerEncoderLayer" in again.activations
    model = prepare_training(convert(Language(), *QLORA), "lean")
    found = training_memory(model, *(one.repeat(4, 4) for one in IDS), optimizer="sgd")
    assert found.activations.keys() <= {type(one).__name__ for one in model.modules()} | {"loss"}
    assert type(model).__name__ == "Language"


@pytest.mark.parametrize(
    "optimizer",
    [
        *NAMED_OPTIMIZERS,
        partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.AdamW, amsgrad=True, weight_decay=0.3),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
    ],
)
def test_the_model_is_as_it_was(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.5), nn.Flatten(), nn.Linear(576, 99))
    model[1].eval()
    model[0].bias.grad = torch.ones(16)
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    call, modes = nn.Module.__call__, [one.training for one in model.modules()]
    x = torch.full((2, 3, 8, 8), 1e30)  # whose gradients overflow
    with torch.inference_mode():
        found = training_memory(model, x, optimizer=optimizer)
    assert found.optimizer_name == (optimizer if isinstance(optimizer, str) else type(optimizer([x])).__name__)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.training for one in model.modules()] == modes
    assert torch.equal(model[0].bias.grad, torch.ones(16))
    assert model[0].weight.grad is None
    assert nn.Module.__call__ is call


def test_it_prints_a_table_and_gives_json():
    found = training_memory(BigNet(), torch.zeros(1, 1024))
    lines = [line.split() for line in str(found).splitlines()]
    assert ["weights", "72.11"] in lines
    assert lines[-1] == ["peak,", "in", "update", f"{found.total_bytes / 2**20:.2f}"]
    shown = json.loads(json.dumps(found.as_json()))
    assert shown["total_bytes"] == found.total_bytes == sum(found.parts.values())
    assert list(shown)[-2:] == ["step_bytes", "total_bytes"]
    assert shown["gradients"] == 75_612_160


def fails(x):
    raise LookupError("not today")


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (3, {}, TypeError, "Module"),
        (nn.Linear(4, 4), {"optimizer": "adam"}, ValueError, r"optimizer='adam' is unknown: choose from sgd, adamw"),
        (nn.Linear(4, 4), {"optimizer": 3}, TypeError, r"optimizer=3 must be a name, or a callable"),
        (nn.Linear(4, 4), {"optimizer": lambda p: 3}, TypeError, r"makes a int, not a torch.optim.Optimizer"),
        (nn.Linear(4, 4), {"optimizer": torch.optim.LBFGS}, ValueError, "LBFGS"),
        (nn.Linear(4, 4).requires_grad_(False), {}, ValueError, r"Linear has no parameter that trains"),
        (nn.Linear(4, 4), {"loss": lambda y: y.detach()}, TypeError, "loss= must return a tensor of one element"),
        (nn.Linear(4, 4), {"loss": fails}, LookupError, "not today"),
        (nn.Linear(5, 4), {}, RuntimeError, "shapes"),
        (Detached(4, 4), {}, ValueError, "Detached returns no tensor with a gradient"),
    ],
)
def test_bad_input_leaves_everything_as_it_was(model, options, error, text):
    call = nn.Module.__call__
    with refused(model.eval() if isinstance(model, nn.Module) else model, error, text):
        training_memory(model, torch.zeros(2, 4), **options)
    assert nn.Module.__call__ is call
    assert not isinstance(model, nn.Module) or all(one.grad is None for one in model.parameters())


def test_what_a_layer_frees_before_it_returns_is_scratch():
    class Wide(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                shift = x.repeat(100, 1).mean()
            return super().forward(x + shift)

    found = training_memory(Wide(4, 4), torch.ones(8, 4), optimizer="sgd")
    assert (found.moment, found.scratch) == ("forward", 100 * 8 * 4 * 4 + 4)  # with the mean
    assert found.activations == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_on_cuda_is_the_allocator_s():
    model, x = convert(BigNet(), FourBit(), LoRA(4)), torch.randn(8, 1024)
    counted = training_memory(model, x, optimizer="sgd").step_bytes
    model, x = model.to("cuda"), x.to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = training_memory(model, x, optimizer="sgd")
    assert found.step_bytes == torch.cuda.max_memory_allocated() - before >= counted


def test_measuring_changes_no_kernel_and_no_function_of_torch(monkeypatch):
    """Gated MLPs are fused unless a hook watches their activation."""
    backend, seen, call = lowmem.kernels.backend_of(torch.empty(0)), [], nn.Module.__call__
    for name in ("linear", "input_grad", "add_low_rank", "gated"):
        method = getattr(backend, name)

        def recorded(x, *rest, name=name, method=method):
            assert nn.Module.__call__ is call
            stored = [one for one in rest if isinstance(one, lowmem.QuantizedTensor)]
            seen.append((name, x.shape, len(rest), [backend.explain(one, x.shape[0], x.dtype) for one in stored]))
            return method(x, *rest)

        monkeypatch.setattr(backend, name, recorded)
    model = prepare_training(convert(blocks.Language(layers=[blocks.Block()]), *QLORA), "fast").train()
    ids = torch.arange(32).view(2, 16)
    seen.clear()
    for _ in range(2):
        measure.losses_of(model, model(ids), None)[0].backward()
    plain, seen[:] = [*seen], []
    training_memory(model, ids)
    assert seen == plain
    assert {"linear", "gated"} <= {name for name, *_ in seen}


def test_another_profiler_is_named_and_stays():
    def profiler(*_):
        pass

    sys.setprofile(profiler)
    try:
        with pytest.raises(RuntimeError, match=r"by sys\.setprofile, which function uses: end that first"):
            training_memory(nn.Linear(4, 4), torch.ones(2, 4))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_layers_that_another_thread_computes_are_named_until_the_measurement_ends():
    """As autograd does on a GPU, where checkpointed layers are computed again in backward."""
    memory, layer, kept, after = CategorizedPeakMemory(), nn.Sequential(nn.Linear(4, 4)), [], []

    def compute():
        with memory:
            kept.append(torch.ones(8))  # the first allocation of the thread
            kept.append(layer(torch.ones(2, 4)))
        ended.wait()
        layer(torch.ones(2, 4))
        after.append(sys.getprofile())

    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with memory.profiled_module_calls():
            computed = pool.submit(compute)
            while len(kept) < 2 and not computed.done():
                time.sleep(0.01)
        ended.set()
        computed.result()
    assert memory.peak_bytes_by_category()["activations"] == {"Linear": 32}
    assert after == [None]
