"""GPTQ: chooses 4-bit codes that minimize the error of a layer's output, not that of each weight.

Frantar et al., arXiv 2210.17323, section 3: columns are rounded one by one, and the error of each is compensated by
the columns not yet rounded, according to the inverse Hessian of the layer's inputs. Scales are chosen before, by the
weighted search; columns with the largest Hessian diagonal go first ("act-order").
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

__all__ = ["Hessian", "prepare_hessian", "quantize_gptq"]

_COLUMNS = 128  # the paper's lazy batches: columns rounded before one product corrects all later ones


class Hessian(NamedTuple):
    """The Hessian H of a layer's inputs, prepared for GPTQ.

    Args:
        importance: float32 (in,), above 0: the diagonal of H, the weight of each column's squared error.
        order: int64 (in,): the columns by descending diagonal.
        upper: float32 (in, in), upper triangular: U of ``H^-1 = U^T U``, with H's rows and columns in ``order``.
    """

    importance: Tensor
    order: Tensor
    upper: Tensor


def prepare_hessian(gram: Tensor, damping: float) -> Hessian | None:
    """Order, damp, invert and factor the Hessian of a layer's inputs; None where it is zero or not finite.

    Args:
        gram: float32 (in, in), the mean of ``x^T x`` over the rows x of the inputs.
        damping: above 0, added to the diagonal, as a fraction of its mean.

    Raises:
        ValueError: the damping is too small for a Cholesky decomposition.
    """
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if not (gram.isfinite().all() and mean > 0):
        return None
    order = diagonal.argsort(descending=True, stable=True)
    damped = gram[order][:, order].double()
    damped.diagonal().add_(damping * mean)
    # Cholesky of H with rows and columns reversed gives H = R R^T with R upper triangular; U is the inverse of R.
    root, broken = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(broken):
        raise ValueError(f"damping={damping!r} is too small for inputs as alike as these; 0.01 suits most models")
    one = torch.eye(len(order), dtype=root.dtype, device=root.device)
    upper = torch.linalg.solve_triangular(root.flip(0, 1), one, upper=True).float()
    return Hessian(diagonal.clamp_min(mean * 1e-3), order, upper)  # clamped: every column's error counts a little


def quantize_gptq(weight: Tensor, technique: FourBit, hessian: Hessian) -> QuantizedTensor:
    """Quantize a weight so that the error of the layer's output is small for the inputs of ``hessian``.

    Args:
        weight: floating point (out, in), finite.
        technique: how to store it; of several formats the one with the least weighted error is taken.
        hessian: of the layer's inputs.

    Returns:
        The weight (out, in), with the method "calibrated".

    Raises:
        TypeError, ValueError: weights that ``quantize`` rejects.
    """
    found = quantize(
        weight,
        technique.format,
        block_size=technique.block_size,
        scales=technique.scales,
        search=technique.search,
        importance=hessian.importance,
    )
    form, size, upper = get_format(found.format), found.block_size, hessian.upper
    levels, boundaries = (
        torch.tensor(values, dtype=torch.float32, device=weight.device) for values in (form.levels, form.boundaries)
    )
    scales = found.encoding.decode(found.scales).T.contiguous()  # (blocks, out)
    divisors = scales.masked_fill(scales == 0, torch.inf)  # w / inf = 0: the zero code
    offsets = found.offsets().T.contiguous() if found.has_offsets else None
    rest = weight.detach().T[hessian.order].float()  # (in, out), so that each column is contiguous
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=weight.device)
    blocks, pivots = (hessian.order // size).tolist(), upper.diagonal().tolist()
    for start in range(0, len(blocks), _COLUMNS):
        stop = min(start + _COLUMNS, len(blocks))
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            shifted = rest[i] if offsets is None else rest[i] - offsets[blocks[i]]
            code = torch.bucketize(shifted / divisors[blocks[i]], boundaries)
            errors[i - start] = error = (shifted - levels[code] * scales[blocks[i]]) / pivots[i]
            rest[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
            codes[i] = code
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[hessian.order] = codes
    rows = nn.functional.pad(unordered.T, (0, len(blocks) % 2), value=form.zero_code)
    return replace(found, packed=pack(rows.contiguous(), size), method="calibrated")
