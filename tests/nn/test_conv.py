"""A convolution in 16 or 4 bits is the dense one with the restored weight, in every geometry that torch has."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import Conv4Bit, FourBit, Half, HalfConv, convert, kernels, measure
from lowmem.nn.techniques import blockwise_technique
from tests import strategies
from tests.rounding import assert_sum

# torch's own, of padding="same" with an even kernel
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

kinds = pytest.mark.parametrize("technique", [Half(), FourBit(block_size=8)], ids=["half", "4-bit"])
small_techniques = st.one_of(
    st.builds(Half, st.sampled_from([torch.float16, torch.bfloat16])),
    st.builds(blockwise_technique, strategies.formats, strategies.small_blocks, strategies.encodings),
)


def dense_twin(layer: nn.Module, dense: nn.Module) -> nn.Module:
    """Return the dense layer in float64, with the weight and the bias that the converted one stores."""
    twin = copy.deepcopy(dense).double()
    weight = layer.weight if isinstance(layer, HalfConv) else layer.quantized.dequantize()
    with torch.no_grad():
        twin.weight.copy_(weight.view_as(twin.weight))
        if twin.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


def assert_convolved(got: torch.Tensor, twin: nn.Module, x: torch.Tensor, rounded=(), sums=torch.float32) -> None:
    """Hold a convolution to that of ``dense_twin``, whose terms are those of one output channel, and the bias."""
    sizes = copy.deepcopy(twin)
    with torch.no_grad():
        for parameter in sizes.parameters():
            parameter.abs_()
        exact, magnitudes = twin(x.double()), sizes(x.double().abs())
    assert_sum(got, exact, magnitudes, twin.weight[0].numel() + 1, sums, rounded)


@given(strategies.convolutions(), small_techniques, st.sampled_from([(), (0,), (1,), (3,)]), strategies.seeds)
def test_outputs_and_gradients_are_those_of_the_restored_weight(drawn, technique, leading, seed):
    dense, size = drawn
    layer = convert(copy.deepcopy(dense), technique)
    twin = dense_twin(layer, dense)
    x = strategies.make_input((*leading, dense.in_channels, *size[:-1]), size[-1], seed)
    exact = x.detach().double().requires_grad_()
    out, expected = layer(x), twin(exact)
    assert out.dtype == x.dtype
    assert_convolved(out, twin, x.detach())
    with torch.no_grad():
        assert_convolved(layer(x), twin, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    # An input meets each weight of its group's columns at most as often as padding copies it: twice in a dimension.
    sizes = copy.deepcopy(twin)
    with torch.no_grad():
        sizes.weight.abs_()
    largest = exact.detach().abs().requires_grad_()
    (sizes(largest) * weights.abs()).sum().backward()
    terms = 4 * dense.weight.numel() // dense.weight.shape[1]
    assert_sum(x.grad, exact.grad, largest.grad, terms)
    if layer.bias is not None and layer.bias.requires_grad:
        channels = weights.double().transpose(0, -len(size) - 1).flatten(1)  # (out_channels, positions)
        assert_sum(layer.bias.grad, twin.bias.grad, channels.abs().sum(1), channels.shape[1])


@kinds
@pytest.mark.parametrize("groups", [1, 4])
def test_both_orders_and_both_modes_pass_gradcheck(technique, groups):
    layer = convert(nn.Conv1d(4, 4, 3, 2, 1, groups=groups, dtype=torch.float64), technique)
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


# Groups that fit together, one group at a time, and parts of one: 1 MiB is 262,144 restored weights.
LARGE = {
    "one group in parts": (lambda: nn.Conv2d(256, 160, 3, padding=1), (2, 256, 6, 6)),
    "parts of groups": (lambda: nn.Conv2d(512, 320, 3, padding=1, groups=2), (2, 512, 6, 6)),
    "several groups": (lambda: nn.Conv2d(1024, 1024, 3, padding=1, groups=32), (2, 1024, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(512, 1024, 301, padding=150, groups=512), (2, 512, 16)),
}


@pytest.mark.thorough(keep=4)
@kinds
@pytest.mark.parametrize("make", LARGE)
@pytest.mark.parametrize("kernel", sorted({"reference", kernels.available_cpu_backend_names()[-1]}))
def test_large_weights_are_restored_in_chunks_forward_and_backward(technique, make, kernel):
    make, shape = LARGE[make]
    dense = make()
    layer = convert(copy.deepcopy(dense), technique)
    twin = dense_twin(layer, dense)
    x = torch.randn(shape, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    expected = twin(exact)
    weights = torch.randn(expected.shape)
    gradient = torch.autograd.grad(expected, exact, weights.double())[0]
    sizes = copy.deepcopy(twin)
    sizes.weight.data.abs_()
    largest = torch.autograd.grad(sizes(exact), exact, weights.double().abs())[0]
    found = {}
    most = 2.5 * 2**20 if kernel == "reference" and isinstance(layer, Conv4Bit) else 1.5 * 2**20
    with kernels.temporary_cpu_backend(kernel):
        with torch.no_grad():
            assert measure.peak_bytes(lambda: found.update(out=layer(x))) <= weights.nbytes + most

        def backward():
            found["gradient"] = torch.autograd.grad(layer(x), x, weights)[0]

        assert measure.peak_bytes(backward) <= 2 * weights.nbytes + 2 * x.nbytes + most
    assert_convolved(found["out"], twin, x.detach())
    terms = twin.weight[:, 0].numel() // dense.groups  # of an input's gradient: a group's output channels and taps
    assert_sum(found["gradient"], gradient, largest, terms)


@pytest.mark.thorough(keep=4)
@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [8, 520], ids=["whole", "in chunks"])
def test_the_output_has_the_input_s_dtype(technique, dtype, channels):
    dense = nn.Conv2d(channels, channels, 3)
    layer = convert(copy.deepcopy(dense), technique)
    x = torch.randn(2, channels, 5, 5, dtype=dtype, requires_grad=True)
    out = layer(x)
    assert out.dtype == dtype
    # The weight, the bias, the convolution, and its sum with the bias may each be rounded to the input's dtype.
    rounded, sums = ((), torch.float64) if dtype == torch.float64 else ([dtype] * 4, torch.float32)
    assert_convolved(out, dense_twin(layer, dense), x.detach(), rounded, sums)
    assert torch.autograd.grad(out.sum(), x)[0].dtype == dtype


@kinds
def test_attributes_and_weights_that_were_changed_later_count(technique):
    dense = nn.Conv2d(4, 4, 3)
    dense.stride, dense.padding, dense.dilation = (2, 2), 2, (2, 2)
    dense.weight = nn.Parameter(dense.weight[:, :1].detach().clone())  # made to take one channel
    layer = convert(copy.deepcopy(dense), technique)
    x = torch.randn(2, 1, 9, 9)
    assert_convolved(layer(x), dense_twin(layer, dense), x)
