"""The backend of a tensor's device serves products and rows alike, and what it keeps of a tensor is no part of it."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowmem
from lowmem import kernels
from lowmem.kernels import frozen_weight_operator, reference, rms_norm_and_gating
from lowmem.quant import backend
from lowmem.quant.backend import Backend, ColumnPanel, KeyOrValueStates, backend_for, backend_of

METHODS = {name for name in vars(Backend) if not name.startswith("_")} - {"name", "fast_bfloat16", "is_asynchronous"}


class Recording:
    """Plain torch that notes what it is asked for."""

    name, fast_bfloat16, is_asynchronous = "recording", False, False

    def __init__(self):
        self.asked = set()

    def __getattr__(self, method):
        def run(*given):
            self.asked.add(method)
            return getattr(reference, method)(*given)

        return run


@pytest.fixture
def recording(monkeypatch):
    """A backend for the CPU, and for the device type ``meta``, for which torch's dispatcher has our fake kernels."""
    monkeypatch.setattr(frozen_weight_operator, "_served", [*frozen_weight_operator._served, "meta"])
    made = Recording()
    for device_type in ("cpu", "meta"):
        monkeypatch.setitem(backend._backends, device_type, made)  # which undoes what ``register`` does
        kernels.register_backend(device_type, made)
    return made


def test_all_that_is_computed_for_a_device_is_asked_of_its_backend(recording):
    weight, form = lowmem.quantize(torch.randn(4, 32), "nf4"), lowmem.FORMATS["nf4"]
    weight.dequantize()
    x, grad, factor, silu = (
        torch.randn(2, 32),
        torch.randn(2, 4),
        torch.ones(32),
        rms_norm_and_gating.ACTIVATIONS["SiLU"],
    )
    kernels.linear(x, weight, torch.float32)
    kernels.input_grad(grad, weight, torch.float32)
    kernels.add_low_rank(grad, x, torch.randn(2, 32), torch.randn(4, 2), 0.5)
    kernels.add_product(grad, x, weight, False)
    kernels.explain(weight, 1)
    own = backend_of(x)
    own.serves_rows(x)
    own.norm_grad(x, own.norm(x, factor, 1e-6, False), factor, 1e-6)
    own.gated_grad(x, x, x, silu, (torch.empty_like(x), own.gated(x, x, silu, x.dtype)))
    own.entropies(x, torch.zeros(2, dtype=torch.int64), 0.0, True)
    codes = torch.empty(2, 32, dtype=torch.int8), torch.empty(2, 1)
    own.encode_8bit(torch.randn(64), codes)
    own.decode_8bit(*codes, torch.float32)
    own.round_columns(
        form, ColumnPanel(x, torch.ones(2, 32), torch.ones(2), torch.eye(2), torch.zeros(2, 32), x.byte()), False
    )
    states = torch.randn(1, 1, 2, 8)
    coded = KeyOrValueStates(torch.empty(1, 1, 2, 8, dtype=torch.int8), torch.empty(1, 1, 2, 1))
    own.encode_states(states, coded)
    own.attention(states, coded, coded, None, 1.0, None)
    own.squares(x, x)
    assert recording.asked == METHODS
    assert kernels.fast_bfloat16(x) is False


def test_a_layer_on_a_device_is_computed_by_the_device_s_backend(recording):
    layer = lowmem.convert(nn.Linear(32, 8), lowmem.FourBit(block_size=16)).to("meta")
    recording.asked.clear()
    x = torch.randn(2, 32, device="meta", requires_grad=True)
    layer(x.detach())
    assert recording.asked == {"linear"}
    layer(x).sum().backward()
    assert recording.asked == {"linear", "input_grad"}
    assert backend_of(torch.empty(0, device="meta")) is recording


def test_torch_s_dispatcher_calls_the_kernel_that_is_registered_for_a_device():
    """A device type has a kernel of each operator once it is registered; every other type shares one."""
    name = "lowmem::product_4bit"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(name, "CPU")
    assert has(name, "CompositeExplicitAutograd")
    kernels.register_backend("privateuseone", reference)
    try:
        for operator in ("product_4bit", "product_16bit", "grouped_product_4bit", "dequantize_rows", "convolve"):
            assert has(f"lowmem::{operator}", "PrivateUse1")
        assert backend_for("privateuseone") is reference
    finally:
        del backend._backends["privateuseone"]


@pytest.mark.parametrize("name", kernels.available_cpu_backend_names())
def test_each_backend_has_the_whole_protocol(name):
    with kernels.temporary_cpu_backend(name):
        assert backend_for().name == name
        assert isinstance(backend_for().fast_bfloat16, bool)
        assert all(callable(getattr(backend_for(), method)) for method in METHODS)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), replace])
def test_what_a_backend_keeps_stays_behind_when_a_tensor_is_copied(again):
    weight = lowmem.quantize(torch.randn(4, 32))
    weight.cache["a handle"] = lambda: "which neither copies nor pickles"
    made = again(weight)
    assert made.cache == {}
    assert weight.cache.keys() == {"a handle"}
    assert torch.equal(made.dequantize(), weight.dequantize())
