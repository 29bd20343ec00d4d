"""BigNet in bfloat16, with products in bfloat16 or in 8-bit integers, beside torch's own."""

import pytest
import torch

import lowmem
from benchmarks.cases import BATCHES, assert_near_dense, inference_input

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3)

every_batch = pytest.mark.parametrize("batch", BATCHES, ids="batch{}".format)


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
