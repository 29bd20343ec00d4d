"""Layers of the shapes of language models, nf4 with bfloat16 inputs, beside nn.Linear in bfloat16 in the same run.

    pytest benchmarks/test_layer_shapes.py                   a subset
    pytest benchmarks/test_layer_shapes.py -m every_shape    the others

Extra info has ``reference_seconds``: what nn.Linear takes. After ``pip install .[peers]`` bitsandbytes runs, too.
"""

import copy

import pytest
import torch
from torch import nn

import lowmem
from benchmarks.accuracy import assert_layers_exact
from benchmarks.test_peers import bitsandbytes_nf4

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=3)

SHAPES = (  # (out, in): SmolLM2-135M's, and those of models of 1 and 7 billion weights
    (576, 576),
    (192, 576),
    (1536, 576),
    (576, 1536),
    (2048, 2048),
    (8192, 2048),
    (4096, 4096),
    (4096, 11008),
)
ROWS = (1, 4, 16, 64, 256, 1024, 4096)  # of the input
SUBSET = {(shape, rows) for shape in ((1536, 576), (2048, 2048)) for rows in (1, 16, 256)}

CELLS = [
    pytest.param(
        shape,
        rows,
        id=f"{shape[0]}x{shape[1]}-rows{rows}",
        marks=() if (shape, rows) in SUBSET else pytest.mark.every_shape,
    )
    for shape in SHAPES
    for rows in ROWS
]
cells = pytest.mark.parametrize(("shape", "rows"), CELLS)


def layers(shape: tuple[int, int], rows: int) -> tuple[nn.Linear, torch.Tensor]:
    """Return a layer in bfloat16, and an input (rows, in)."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    return dense.bfloat16().eval(), torch.randn(rows, shape[1], generator=generator).bfloat16()


@cells
def test_layer_shape(benchmark, timed, shape, rows):
    benchmark.group = f"nf4 {shape[0]} x {shape[1]}, rows {rows:4}"
    dense, x = layers(shape, rows)
    layer = lowmem.convert(nn.Sequential(dense), lowmem.FourBit("nf4"))

    with torch.no_grad():
        timed(lambda: layer(x), reference=lambda: dense(x))

    assert_layers_exact(layer, x)


@pytest.mark.filterwarnings("ignore")
@cells
def test_layer_shape_in_bitsandbytes(benchmark, timed, shape, rows):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[peers]")
    benchmark.group = f"nf4 {shape[0]} x {shape[1]}, rows {rows:4}"
    dense, x = layers(shape, rows)
    layer = bitsandbytes_nf4(nn.Sequential(copy.deepcopy(dense)), torch.bfloat16).eval()

    with torch.no_grad():
        output = timed(lambda: layer(x), reference=lambda: dense(x))
        expected = dense(x)

    assert lowmem.measure.difference(expected.float(), output.float()).relative < 0.15
