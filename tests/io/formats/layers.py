"""Reads packed layers back, and draws sizes that have such."""

from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lowmem.io.formats.quantized_folder import Packed
from lowmem.io.formats.recognize import open_foreign
from lowmem.quant.tensor import QuantizedTensor


def as_read(packed: Packed, path: Path) -> QuantizedTensor:
    """Return what lowmem's reader makes of a packed layer."""
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in packed.parts.items()}, path)
    with open_foreign(path) as file:
        assert list(file.tensors) == ["layer.weight"]
        weight = file.tensors["layer.weight"].read()
    assert isinstance(weight, QuantizedTensor)
    return weight


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@st.composite
def sizes(draw, multiple: int, most: int = 6):
    """Draw the columns and the block size of a weight whose blocks are whole multiples of ``multiple``, or rows."""
    columns = multiple * draw(st.integers(1, most))
    block = multiple * draw(st.integers(1, 2 * most))
    return columns, block
