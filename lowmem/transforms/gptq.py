"""Choose 4-bit codes by what a layer computes from its inputs, not by each weight alone.

GPTQ, arXiv 2210.17323: column by column, what rounding a column loses of the layer's output is made up for by the
columns that are not rounded yet, as far as the inputs' second moments say that they move together. Scales are found
before, by the weighted search; the columns that count most go first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowmem.nn.fourbit import FourBit
from lowmem.quant.formats import get_format
from lowmem.quant.packing import pack
from lowmem.quant.quantize import quantize
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Inputs", "quantize_against", "what_inputs_say"]

_COLUMNS = 128  # rounded before the columns behind them are corrected, by one product


class Inputs(NamedTuple):
    """What a layer's inputs say.

    Args:
        importance: float32 (in,), above 0: what an error in each column counts.
        order: int64 (in,): the columns, those that count most first.
        upper: float32 (in, in), upper triangular: U of ``H^-1 = U^T U``, where H has the columns in order.
    """

    importance: Tensor
    order: Tensor
    upper: Tensor


def what_inputs_say(moments: Tensor, damping: float) -> Inputs | None:
    """Return what the second moments of a layer's inputs say; None where that is nothing: zero, or not finite.

    Args:
        moments: float32 (in, in), the mean of ``x^T x`` over the inputs' rows.
        damping: above 0, added to the diagonal, as a part of its mean.

    Raises:
        ValueError: damping that is too small.
    """
    diagonal = moments.diagonal()
    mean = float(diagonal.mean())
    if not (moments.isfinite().all() and mean > 0):
        return None
    order = diagonal.argsort(descending=True, stable=True)
    damped = moments[order][:, order].double()
    damped.diagonal().add_(damping * mean)
    # H = R R^T with R upper triangular is Cholesky's decomposition seen from the last column; U is R's inverse.
    root, broken = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(broken):
        raise ValueError(f"damping={damping!r} is too small for inputs as alike as these; 0.01 suits most models")
    one = torch.eye(len(order), dtype=root.dtype, device=root.device)
    upper = torch.linalg.solve_triangular(root.flip(0, 1), one, upper=True).float()
    return Inputs(diagonal.clamp_min(mean * 1e-3), order, upper)  # so that none counts nothing


def quantize_against(weight: Tensor, technique: FourBit, inputs: Inputs) -> QuantizedTensor:
    """Quantize a weight by a technique, so that the layer computes nearly the same from inputs like these.

    Args:
        weight: floating point (out, in), finite.
        technique: how to store it; of several formats the one with the least weighted error is taken.
        inputs: what the layer's inputs say.

    Returns:
        The weight (out, in), whose ``method`` is "calibrated".

    Raises:
        TypeError, ValueError: weights that ``quantize`` refuses.
    """
    found = quantize(
        weight,
        technique.format,
        block_size=technique.block_size,
        scales=technique.scales,
        search=technique.search,
        importance=inputs.importance,
    )
    form, size, upper = get_format(found.format), found.block_size, inputs.upper
    levels, boundaries = (
        torch.tensor(values, dtype=torch.float32, device=weight.device) for values in (form.levels, form.boundaries)
    )
    scales = found.encoding.decode(found.scales).T.contiguous()  # (blocks, out)
    divisors = scales.masked_fill(scales == 0, torch.inf)  # a zero scale: the zero code
    rest = weight.detach().T[inputs.order].float()  # (in, out): each column's weights are together
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=weight.device)
    blocks, pivots = (inputs.order // size).tolist(), upper.diagonal().tolist()
    for start in range(0, len(blocks), _COLUMNS):
        stop = min(start + _COLUMNS, len(blocks))
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            code = torch.bucketize(rest[i] / divisors[blocks[i]], boundaries)
            errors[i - start] = error = (rest[i] - levels[code] * scales[blocks[i]]) / pivots[i]
            rest[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
            codes[i] = code
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[inputs.order] = codes
    rows = nn.functional.pad(in_place.T, (0, len(blocks) % 2), value=form.zero_code)
    return replace(found, packed=pack(rows.contiguous(), size), method="calibrated")
