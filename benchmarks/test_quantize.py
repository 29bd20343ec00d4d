"""Quantizing and restoring a matrix in every format, beside a float32 copy of it."""

import pytest
import torch

import lowmem
from benchmarks.cases import weight_to_quantize
from lowmem import FORMATS
from lowmem.measure import peak_bytes

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3)

every_format = pytest.mark.parametrize("form", list(FORMATS), ids=str)


@pytest.fixture(scope="module")
def weight():
    return weight_to_quantize()


@pytest.fixture(scope="module")
def copy(weight):
    out = torch.empty_like(weight)
    return lambda: out.copy_(weight)


@every_format
def test_quantize(benchmark, memory_gate, timed, weight, copy, form):
    benchmark.group = "quantize"
    memory_gate.counted(lambda: figures(lowmem.quantize(weight, form), lambda: lowmem.quantize(weight, form)))

    quantized = timed(lambda: lowmem.quantize(weight, form), reference=copy)

    assert ((weight - quantized.dequantize()).abs() <= quantized.error_bound()).all()


@every_format
def test_dequantize(benchmark, memory_gate, timed, weight, copy, form):
    benchmark.group = "dequantize"
    quantized = lowmem.quantize(weight, form)
    memory_gate.counted(lambda: figures(quantized, quantized.dequantize))

    restored = timed(quantized.dequantize, reference=copy)

    assert ((weight - restored).abs() <= quantized.error_bound()).all()


def figures(quantized, run):
    """Return the bytes of what is stored, and the peak of the call."""
    stored = sum(tensor.untyped_storage().nbytes() for tensor in (quantized.packed, quantized.scales))
    assert stored == quantized.nbytes
    return {"stored_bytes": stored, "peak_bytes": peak_bytes(run)}
