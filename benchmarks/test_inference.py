"""The forward of every variant of BigNet, beside the float32 one at the same batch."""

import pytest
import torch

from benchmarks.cases import BATCHES, assert_near_dense, built_variant, inference_input
from lowmem import VARIANTS

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3)


@pytest.mark.parametrize("batch", BATCHES, ids="batch{}".format)
@pytest.mark.parametrize("variant", list(VARIANTS), ids=str)
def test_inference(benchmark, memory_gate, timed, variant, batch):
    benchmark.group = f"inference, batch {batch:3}"
    x = inference_input(batch)
    compressed, float32 = built_variant(variant), built_variant("bignet")
    memory_gate(compressed, x)

    with torch.no_grad():
        output = timed(lambda: compressed(x), reference=lambda: float32(x))

    assert output.dtype == torch.float32
    assert_near_dense(compressed, x, output)
