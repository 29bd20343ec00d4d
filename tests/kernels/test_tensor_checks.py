"""What C may read, and what sees C: tensors that are not their memory, and modes that record operations."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lowmem import EightBit, FourBit, Half, LoRA, convert, kernels, measure, quantize, training_memory
from lowmem.kernels import reference
from tests.compiled import assert_exact, assert_same_bytes, both, both_kinds, bound, dequantized
from tests.profiled import profiled_peak

pytestmark = pytest.mark.usefixtures("poisoned")


@bound
@both_kinds
def test_a_default_device_changes_nothing(isa, weight):
    """Fresh tensors are asked for on the CPU, whatever the mode or the default says."""
    w, x = both(weight), torch.randn(3, 40)
    kernels.cpu.c_float_array.cache_clear()
    with kernels.temporary_cpu_backend(isa):
        with torch.device("meta"):
            got = kernels.linear(x, w, torch.float32)
        assert_exact(got, x, dequantized(w, torch.float32))


@bound
@both_kinds
def test_what_records_operations_sees_the_reference(isa, weight):
    w, x = both(weight), torch.randn(3, 40)
    with kernels.temporary_cpu_backend(isa):
        graph = make_fx(lambda x: kernels.linear(x, w, torch.float32))(x)
        assert_exact(graph(x), x, dequantized(w, torch.float32))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert kernels.linear(x, w, torch.float32).shape == (3, 6)


@bound
@both_kinds
def test_values_that_are_not_their_memory_are_resolved(isa, weight):
    """Of memory that holds the opposite, with gaps or without."""
    w, q = both(weight), both("4-bit")
    with_gaps = torch.complex(torch.zeros(3, 40), torch.randn(3, 40)).conj().imag
    dense = torch._neg_view(q.dequantize())
    with kernels.temporary_cpu_backend(isa):
        for negative in (with_gaps, torch._neg_view(torch.randn(3, 40))):
            assert negative.is_neg()
            assert_exact(kernels.linear(negative, w, torch.float32), negative.clone(), dequantized(w, torch.float32))
        assert_same_bytes(quantize(dense, block_size=8), quantize(dense.clone(), block_size=8))
        zero = torch._efficientzerotensor(3, 40)
        assert not kernels.linear(zero, w, torch.float32).any()


@bound
def test_tensors_of_another_kind_are_left_to_plain_torch(isa):
    """A mode that wraps what is made: C could not write into it."""

    class Wrapped(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl  # before 2.5 it wraps what is wrapped already

    class Wraps(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            return made.as_subclass(Wrapped) if isinstance(made, torch.Tensor) and "empty" in str(func) else made

    q, x, grad = quantize(torch.randn(8, 32)), torch.randn(2, 32), torch.randn(2, 8)
    a, b = torch.randn(4, 32), torch.randn(8, 4)
    with kernels.temporary_cpu_backend(isa):
        runs = (
            lambda: kernels.linear(x, q, torch.float32),
            lambda: kernels.linear(x, q, torch.int8),
            lambda: kernels.input_grad(grad, q, torch.float32),
            lambda: kernels.add_low_rank(grad, x, a, b, 0.5),
        )
        for run in runs:
            expected = run()
            with Wraps():
                got = run()
            torch.testing.assert_close(got.as_subclass(torch.Tensor), expected)


def refuse(*_, **__):
    raise AssertionError("plain torch multiplies in place of the kernel")


@bound
@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_measuring_changes_no_kernel(isa, dtype, rows, monkeypatch):
    """The same bits without plain torch's product, and the kernel's scratch is in the peak."""
    for name in ("linear", "input_grad"):
        monkeypatch.setattr(reference, name, refuse)
    for technique in (EightBit(), FourBit(), Half(torch.bfloat16)):
        layer = convert(nn.Linear(256, 512, bias=False), technique)
        trained = convert(nn.Sequential(nn.Linear(256, 512)), technique, LoRA(4)).to(dtype)
        x, grad = torch.randn(rows, 256, dtype=dtype), torch.randn(rows, 512, dtype=dtype)

        def step(layer=layer, x=x, grad=grad):
            tracked = x.detach().requires_grad_()
            out = layer(tracked)
            return out.detach(), *torch.autograd.grad(out, tracked, grad)

        with kernels.temporary_cpu_backend(isa):
            expected, memory = step(), measure.PeakMemory()
            with memory:
                results = step()
            assert all(map(torch.equal, results, expected))
            assert memory.peak <= profiled_peak(step)  # which sees workspaces of torch's products, too
            scratch = measure.forward_bytes(layer, x) - results[0].nbytes
            assert scratch > 0 or (isinstance(technique, Half) and dtype is torch.bfloat16)  # torch's product of it
            training_memory(trained, x)


@bound
@both_kinds
@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE], ids=str)
def test_selective_checkpoints_hide_no_scratch_from_other_modes(isa, weight, policy):
    w, x = both(weight), torch.randn(300, 40)
    with kernels.temporary_cpu_backend(isa):
        products = partial(kernels.linear, x.half(), w, torch.float16), partial(reference.linear, x, w, torch.float32)
        for multiply in products:
            multiply()  # makes what a weight caches

            def selected(multiply=multiply):
                with create_selective_checkpoint_contexts(lambda *_, **__: policy)[0]:
                    return multiply()

            assert measure.peak_bytes(selected) == measure.peak_bytes(multiply)
            assert torch.equal(selected(), multiply())
