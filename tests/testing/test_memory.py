"""A model's memory figures are exact, name the category of every byte, and depend on the model alone."""

import gc
import random
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from lowmem import FourBit, Half, LoRA, backend, convert, kernels, measure
from lowmem.testing.memory import THREADS, memory_figures, stored_figures
from lowmem.testing.user_model import ModelError

X = torch.ones(2, 64)
KEPT = 2**20


def figures_of(model, *inputs, **named):
    return memory_figures(model, *(inputs or (X,)), **named)[1]


def test_stored_bytes_by_hand():
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 8, bias=False).half())
    assert stored_figures(model) == {
        "float32_bytes": 4 * (64 * 32 + 32 + 2 * 32),
        "float16_bytes": 2 * 32 * 8,
        "buffers_bytes": 4 * 2 * 32 + 8,
        "stored_bytes": 4 * (64 * 32 + 32 + 4 * 32) + 8 + 2 * 32 * 8,
        "trainable_bytes": 4 * (64 * 32 + 32 + 2 * 32) + 2 * 32 * 8,
    }


def test_codes_scales_and_adapters_are_categories_of_their_own():
    model = convert(nn.Sequential(nn.Linear(64, 32)), FourBit("nf4", scales="float16", block_size=64), LoRA(rank=4))
    adapters = 4 * 4 * (64 + 32)
    assert stored_figures(model) == {
        "adapters_bytes": adapters,
        "codes_bytes": 64 * 32 // 2,
        "float32_bytes": 4 * 32,  # the bias
        "scales_bytes": 2 * 32,
        "stored_bytes": adapters + 64 * 32 // 2 + 4 * 32 + 2 * 32,
        "trainable_bytes": adapters,
    }
    plain = nn.Module()
    plain.weight_packed, plain.weight_scales = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    assert stored_figures(plain) == {"float32_bytes": 20, "stored_bytes": 20, "trainable_bytes": 20}


@pytest.mark.parametrize("techniques", [(), (Half(),), (FourBit(),), (FourBit(), LoRA(4))])
def test_the_categories_add_up_to_the_actual_bytes(techniques):
    model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    model = convert(model, *techniques) if techniques else model
    figures = stored_figures(model)
    total = figures.pop("stored_bytes")
    figures.pop("trainable_bytes")
    assert total == sum(figures.values()) == measure.actual_bytes(model)


class Plain:
    """As a cache of keys and values is: no dataclass, and not of the standard library."""

    def __init__(self, kept):
        self.kept = kept


@dataclass
class Cache:
    keys: list = field(default_factory=list)


def test_a_megabyte_in_a_plain_attribute_is_counted():
    plain = figures_of(nn.Sequential(nn.Linear(64, 4)))
    for keep in (
        lambda: torch.zeros(KEPT, dtype=torch.uint8),
        lambda: np.zeros(KEPT, dtype=np.uint8),
        lambda: np.zeros((2, KEPT // 2), dtype=np.uint8)[0][:1],  # a view keeps all of it
        lambda: bytearray(KEPT),
        lambda: bytes(KEPT),
        lambda: [{"a": (torch.zeros(KEPT // 4),)}],
        lambda: OrderedDict(a=Cache([torch.zeros(KEPT // 4)])),
        lambda: [nn.Linear(KEPT // 4, 1, bias=False)],  # a module that nothing registers
        lambda: TwoTensor(torch.zeros(KEPT // 8), torch.zeros(KEPT // 8)),
        lambda: torch.zeros(KEPT // 4)[:1],
        lambda: deque([bytes(KEPT)]),
        lambda: Plain(torch.zeros(KEPT // 4)),
        lambda: SimpleNamespace(keys=torch.zeros(KEPT // 4)),
        lambda: Namespace(keys=[bytes(KEPT)]),
        lambda: UserDict(keys=torch.zeros(KEPT // 4)),
        lambda: UserList([torch.zeros(KEPT // 4)]),
        lambda: partial(torch.add, torch.zeros(KEPT // 8), other=torch.zeros(KEPT // 8)),
    ):
        model, before = nn.Sequential(nn.Linear(64, 4)), dict(plain)
        model[0].kept = keep()
        after = figures_of(model)
        assert after.pop("attributes_bytes") == KEPT
        assert after.pop("stored_bytes") == before.pop("stored_bytes") + KEPT
        assert after == before


@pytest.mark.skipif(
    not hasattr(torch.ao.quantization, "quantize_dynamic") or torch.backends.quantized.engine == "none",
    reason="this torch packs no weights",
)
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_torch_packs_are_counted():
    model = nn.Sequential(nn.Linear(64, 1024), nn.Linear(1024, 64))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    figures = figures_of(model)
    # A byte a weight, and float32 biases.
    assert figures["attributes_bytes"] == figures["stored_bytes"] == 2 * 64 * 1024 + 4 * (1024 + 64)


def test_what_is_registered_is_not_counted_again_as_an_attribute():
    model = nn.Sequential(nn.Linear(64, 4))
    before = stored_figures(model)
    model.also = [model[0].weight, model[0].weight.detach().numpy(), model[0], {"me": model}]
    model.shared = np.zeros(10, dtype=np.float32)
    model.register_buffer("view", torch.from_numpy(model.shared))
    after = stored_figures(model)
    assert after.pop("buffers_bytes") == 40
    assert after.pop("stored_bytes") == before.pop("stored_bytes") + 40
    assert after == before


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("graph", "indices"),
    [
        (
            lambda ends, each, ones: torch.sparse_coo_tensor(torch.stack([each, each]), ones, check_invariants=False),
            200,
        ),
        (lambda ends, each, ones: torch.sparse_csr_tensor(ends, each, ones), 201),
        (lambda ends, each, ones: torch.sparse_csc_tensor(ends, each, ones), 201),
    ],
)
def test_sparse_buffers_count_their_values_and_indices(graph, indices):
    model = nn.Module()
    model.register_buffer("graph", graph(torch.arange(101), torch.arange(100), torch.ones(100)))
    assert stored_figures(model)["buffers_bytes"] == 4 * 100 + 8 * indices


def test_figures_depend_on_the_model_alone():
    class Draws(nn.Module):
        """Allocates by chance, in cycles, and something else in the first call."""

        first: ClassVar = []

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            size = int(torch.randint(1, 1000, ())) + random.randrange(1000) + np.random.randint(1000)
            cycle = [torch.zeros(size)]
            cycle.append(cycle)
            if not self.first:
                self.first.append(torch.zeros(5000))
            return self.linear(x) + cycle[0].sum()

    found = []
    for seed, threads in ((1, 1), (2, 3), (3, 2)):
        before = torch.get_num_threads()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        torch.set_num_threads(threads)
        try:
            found.append(figures_of(Draws()))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert gc.isenabled()


def test_measuring_leaves_the_generators_the_kernel_and_the_collector_as_they_were():
    model = convert(nn.Sequential(nn.Linear(64, 64)), FourBit())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), backend()
    gc.disable()
    try:
        figures_of(model)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist(), backend()) == states[1:]


def test_the_key_is_the_kernel_that_is_the_same_everywhere_unless_one_is_named(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    model = convert(nn.Sequential(nn.Linear(64, 64)), FourBit())
    key, _ = memory_figures(model, X)
    assert key.backend == ("portable" if "portable" in kernels.available_cpu_backend_names() else "reference")
    assert key.torch == ".".join(torch.__version__.split(".")[:2])
    assert key.threads == THREADS
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    with kernels.temporary_cpu_backend("reference"):
        assert memory_figures(model, X)[0].backend == "reference"


def test_a_step_that_fails_names_the_step():
    class Breaks(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach().requires_grad_() if not self.training else "nothing"

    with pytest.raises(
        ModelError, match="the training step of Breaks fails on the example input: TypeError: Breaks ret"
    ):
        figures_of(Breaks(64, 4))


def test_peaks_are_those_of_measure_with_a_loss_of_ones_own_and_named_inputs():
    class Two(nn.Linear):
        def forward(self, x, *, more):
            self.last = torch.zeros(KEPT // 4)  # counted, since the forward keeps it
            return {"y": super().forward(x) + more}

    model, scale = Two(64, 4), lambda out: out["y"].exp().sum()
    for loss in (None, scale):
        figures = figures_of(model, X, more=1.0, loss=loss)
        assert figures["forward_bytes"] == measure.forward_bytes(model, X, more=1.0)
        assert figures["step_bytes"] == measure.backward_bytes(model, X, more=1.0, loss=loss)
        assert figures["attributes_bytes"] == KEPT
