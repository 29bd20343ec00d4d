"""How far a rounded sum or product may lie from the exact one, whatever the order in which a processor adds.

Higham, "Accuracy and Stability of Numerical Algorithms" (2nd edition, 2002), section 3.1: a sum of n terms, or a dot
product of n factors, taken in any order with or without fused operations in a precision of unit roundoff u, is within
gamma_n * sum |terms| of the exact one, with gamma_n = n u / (1 - n u). One more rounding adds u times what it rounds.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.quantized_module import QuantizedModule

# Roundings of a term beside those of a sum: of a dequantized weight, which is a level times a scale; of the scaling
# of a block's sum, where a kernel multiplies levels first; and of the addition of that to the sums of other blocks.
OF_4_BITS = 3


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let tensors of Python's numbers, and those without a dtype, have this one inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def stored_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return what a linear layer multiplies with, without adapters, in float64."""
    weight = (
        layer.quantized.dequantize() if isinstance(layer, QuantizedModule) else unadapted_parameter(layer, "weight")
    )
    return weight.detach().double()


def gamma(terms: int, dtype: torch.dtype = torch.float32) -> float:
    return terms * unit(dtype) / (1 - terms * unit(dtype))


def assert_sum(got, exact, magnitudes, terms, sums=torch.float32, rounded=()):
    """Hold a sum of so many terms, added in one dtype, to the exact one in float64.

    Args:
        magnitudes: the exact sum of the terms' magnitudes, of ``exact``'s shape.
        rounded: the dtypes that round the sum, or a part of it, one after the other, after it was added.
    """
    tiny = sum(torch.finfo(dtype).smallest_normal for dtype in (sums, *rounded))  # a subnormal may count as 0
    relative = gamma(terms, sums)
    for dtype in rounded:
        relative += unit(dtype) * (1 + relative)
    excess = (got.detach().double() - exact.detach()).abs() - (relative * magnitudes.detach() + tiny)
    assert (excess <= 0).all(), f"beyond the bound of {terms} terms in {sums} by {float(excess.max()):.3g}"


def assert_product(got, x, weight, bias=None, sums=torch.float32, rounded=(), more=0):
    """Hold ``got`` to ``x @ weight.T + bias`` of these very factors: (..., in), (out, in) -> (..., out).

    Args:
        more: roundings of each term beside those of the sum; ``OF_4_BITS`` where the weight is of 4 bits.
    """
    x, weight = x.detach().double(), weight.detach().double()
    bias = torch.zeros((), dtype=torch.float64) if bias is None else bias.detach().double()
    exact, magnitudes = x @ weight.t() + bias, x.abs() @ weight.abs().t() + bias.abs()
    assert_sum(got, exact, magnitudes, x.shape[-1] + 1 + more, sums, rounded)
