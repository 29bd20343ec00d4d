"""One backend serves products and rows alike, and what it keeps of a tensor is no part of the tensor."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import lowmem
from lowmem import kernels
from lowmem.kernels import reference
from lowmem.quant.backend import active_backend, set_backend
from tests.selection import rows_in_one_case

METHODS = ("linear", "input_grad", "add_low_rank", "dequantize", "quantize_rows")


class Recording:
    """Plain torch that notes what it is asked for."""

    name = "recording"

    def __init__(self):
        self.asked = []

    def __getattr__(self, method):
        def run(*given):
            self.asked.append(method)
            return getattr(reference, method)(*given)

        return run


@pytest.fixture
def recording():
    before, backend = active_backend(), Recording()
    set_backend(backend)
    yield backend
    set_backend(before)


def test_all_that_touches_stored_weights_asks_the_one_that_serves(recording):
    weight = lowmem.quantize(torch.randn(4, 32))
    weight.dequantize()
    x, grad = torch.randn(2, 32), torch.randn(2, 4)
    kernels.linear(x, weight, torch.float32)
    kernels.input_grad(grad, weight, torch.float32)
    kernels.add_low_rank(grad, x, torch.randn(2, 32), torch.randn(4, 2), 0.5)
    assert set(recording.asked) == set(METHODS)


@rows_in_one_case("name", kernels.available())
def test_each_backend_has_the_whole_protocol(name):
    with kernels.using(name):
        assert active_backend().name == name
        assert all(callable(getattr(active_backend(), method)) for method in METHODS)


@rows_in_one_case("again", [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), replace])
def test_what_a_backend_keeps_stays_behind_when_a_tensor_is_copied(again):
    weight = lowmem.quantize(torch.randn(4, 32))
    weight.cache["a handle"] = lambda: "which neither copies nor pickles"
    made = again(weight)
    assert made.cache == {}
    assert weight.cache.keys() == {"a handle"}
    assert torch.equal(made.dequantize(), weight.dequantize())


def test_a_tensor_pickled_before_there_was_a_cache_is_read():
    weight = lowmem.quantize(torch.randn(4, 32))
    state = weight.__getstate__()
    assert "cache" not in state
    made = object.__new__(lowmem.QuantizedTensor)
    made.__setstate__(state)
    assert torch.equal(made.dequantize(), weight.dequantize())
