"""What one layer costs: the call, the gradient of its input beside the forward, and products in fewer bits."""

import copy

import pytest
import torch
from torch import nn

import lowmem
from benchmarks.cases import BATCHES, assert_near_dense, inference_input
from lowmem import FourBit, Half, kernels

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3)

every_batch = pytest.mark.parametrize("batch", BATCHES, ids="batch{}".format)
INT4 = FourBit("int4", block_size=16, scales="float16")


@pytest.mark.parametrize("technique", [INT4, Half()], ids=["int4", "half"])
def test_call(benchmark, timed, technique):
    """A layer so small that only the call counts, beside nn.Linear."""
    benchmark.group = "one call"
    torch.manual_seed(0)
    plain = nn.Linear(16, 16).eval()
    layer, x = lowmem.convert(nn.Linear(16, 16).eval(), technique), torch.randn(1, 16)

    with torch.no_grad():
        output = timed(lambda: layer(x), reference=lambda: plain(x))

    assert_near_dense(layer, x, output)


@pytest.mark.parametrize("batch", [1, 4], ids="batch{}".format)
@pytest.mark.parametrize("technique", [FourBit("nf4"), INT4, Half()], ids=["nf4", "int4", "half"])
def test_wide_layer(benchmark, timed, technique, batch):
    """A layer of few rows and many columns, as behind the pixels of an image: its input takes longest to pack."""
    benchmark.group = f"150528 columns, batch {batch}"
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(3 * 224 * 224, 10).eval()
    with torch.no_grad():
        plain.weight.copy_(torch.randn(plain.weight.shape, generator=generator))
    layer = lowmem.convert(copy.deepcopy(plain), technique)
    x = torch.randn(batch, plain.in_features, generator=generator)

    with torch.no_grad():
        output = timed(lambda: layer(x), reference=lambda: plain(x))

    assert_near_dense(layer, x, output)


@every_batch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int4", "half"])
def test_input_gradient(benchmark, timed, kind, dtype, batch):
    """The gradient of the input, beside the forward, of as many layers as BigNet has."""
    benchmark.group = f"input gradient, {dtype}, batch {batch:3}"
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(1024, 1024, generator=generator) for _ in range(18)]
    weights = [w.half() if kind == "half" else lowmem.quantize(w, "int4", block_size=16) for w in dense]
    x = inference_input(batch).to(dtype)

    output = timed(
        lambda: [kernels.input_grad(x, w, dtype) for w in weights],
        reference=lambda: [kernels.linear(x, w, dtype) for w in weights],
    )

    for got, w in zip(output, weights, strict=True):
        stored = w.dequantize() if isinstance(w, lowmem.QuantizedTensor) else w
        found = lowmem.measure.difference(x.double() @ stored.double(), got)
        assert found.relative <= (1e-5 if dtype == torch.float32 else 0.01)


def time_in_bfloat16(timed, variant, batch, compute_dtype):
    """Time BigNet in bfloat16 with products in a dtype (None: bfloat16, too), beside torch's own."""
    compressed, plain = lowmem.build(variant).eval().bfloat16(), lowmem.build("bignet").eval().bfloat16()
    for layer in compressed.modules():
        if isinstance(layer, (lowmem.Linear4Bit, lowmem.Linear8Bit)):
            layer.compute_dtype = compute_dtype
    x = inference_input(batch).bfloat16()

    with torch.no_grad():
        output = timed(lambda: compressed(x), reference=lambda: plain(x))

    assert output.dtype == torch.bfloat16
    assert_near_dense(compressed, x, output, tolerance=0.05)


@every_batch
@pytest.mark.parametrize("variant", ["low_precision", "low_precision_nf4"])
def test_inference_in_bfloat16(benchmark, timed, variant, batch):
    benchmark.group = f"inference in bfloat16, batch {batch:3}"
    time_in_bfloat16(timed, variant, batch, None)


@every_batch
@pytest.mark.parametrize("variant", ["low_precision", "low_precision_nf4"])
def test_inference_in_int8(benchmark, timed, variant, batch):
    benchmark.group = f"inference in 8-bit integers, batch {batch:3}"
    time_in_bfloat16(timed, variant, batch, torch.int8)
