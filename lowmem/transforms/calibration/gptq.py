"""Chooses 4-bit codes and scales that minimize the error of a layer's output, not that of each weight.

GPTQ, Frantar et al., arXiv 2210.17323, section 3: columns are rounded one by one, and the error of each is
compensated by the columns not yet rounded, according to the inverse Hessian of the layer's inputs. Scales are chosen
before, by the weighted search; columns with the largest Hessian diagonal go first ("act-order"). Coordinate descent
then moves single codes where that lowers the error, as QuantEase (arXiv 2309.01885) does; each block's scale is
fitted again to the codes that were found, and the codes once more to the scales. A row keeps of all this what loses
least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowmem.kernels.columns import PANEL
from lowmem.nn.techniques import FourBit
from lowmem.quant.backend import Columns, backend_of
from lowmem.quant.formats import get_format
from lowmem.quant.packing import pack
from lowmem.quant.quantize import quantize
from lowmem.quant.scales import ScaleEncoding
from lowmem.quant.tensor import QuantizedTensor

_ROUNDS = 1  # how often scales and then codes are fitted again: a second time lowers the error by 1 to 2%


class Hessian(NamedTuple):
    """The Hessian H of a layer's inputs, prepared for GPTQ.

    Args:
        importance: float32 (in,), above 0: the diagonal of H, the weight of each column's squared error.
        order: int64 (in,): the columns by descending diagonal.
        upper: float32 (in, in), upper triangular: U of ``H^-1 = U^T U``, with H's rows and columns in ``order``.
        matrix: float32 (in, in): H itself, damped, in the same order.
    """

    importance: Tensor
    order: Tensor
    upper: Tensor
    matrix: Tensor


def prepare_hessian(gram: Tensor, damping: float) -> Hessian | None:
    """Order, damp, invert and factor the Hessian of a layer's inputs; None where it is zero or not finite.

    Args:
        gram: float32 (in, in), the mean of ``x^T x`` over the rows x of the inputs, or their covariance.
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
    matrix = damped.float()
    one = torch.eye(len(order), dtype=root.dtype, device=root.device)
    upper = torch.linalg.solve_triangular(root.flip(0, 1), one, upper=True).float()
    importance = diagonal.clamp_min(mean * 1e-3)  # every column's error counts a little
    return Hessian(importance, order, upper, matrix)


def quantize_gptq(weight: Tensor, technique: FourBit, hessian: Hessian) -> QuantizedTensor:
    """Quantize a weight so that the error of the layer's output is small for the inputs of ``hessian``.

    Args:
        weight: floating point (out, in), finite.
        technique: how to store it; of several formats the one with the least weighted error is taken. Without its
            search, scales stay the largest magnitudes, and codes alone are chosen.
        hessian: of the layer's inputs.

    Returns:
        The weight (out, in), with the method "calibrated".

    Raises:
        TypeError, ValueError: weights that ``quantize`` rejects.
    """
    found = quantize_weighted(weight, technique, hessian.importance)
    fit = _Fit(weight, found, hessian)
    fit.round_columns()
    fit.improve_codes()
    best = fit.state()
    for _ in range(_ROUNDS if found.method == "search" else 0):
        fit.improve_scales()
        fit.improve_codes()
        best = best.better_of(fit.state())
    codes = torch.empty_like(best.codes)
    codes[hessian.order] = best.codes
    form, columns = get_format(found.format), weight.shape[1]
    rows = nn.functional.pad(codes.T, (0, columns % 2), value=form.zero_code)
    return replace(
        found,
        packed=pack(rows.contiguous(), found.block_size),
        scales=best.stored.contiguous(),
        method="calibrated",
    )


def quantize_weighted(weight: Tensor, technique: FourBit, importance: Tensor) -> QuantizedTensor:
    """Quantize a weight as a technique says, with a factor of each column's squared error: ``importance`` (in,)."""
    return quantize(
        weight,
        technique.format,
        block_size=technique.block_size,
        scales=technique.scales,
        search=technique.search,
        importance=importance,
    )


class _State(NamedTuple):
    """Codes uint8 (in, out), stored scales (out, ...), and the error of each row of the weight: float32 (out,)."""

    codes: Tensor
    stored: Tensor
    lost: Tensor

    def better_of(self, other: _State) -> _State:
        """Return of each row what loses less."""
        better = other.lost < self.lost
        return _State(
            torch.where(better, other.codes, self.codes),
            torch.where(better[:, None], other.stored, self.stored),
            torch.where(better, other.lost, self.lost),
        )


class _Fit:
    """Codes and scales of one weight while they are chosen: matrices (in, out), columns in the Hessian's order."""

    def __init__(self, weight: Tensor, found: QuantizedTensor, hessian: Hessian) -> None:
        self.form = get_format(found.format)
        self.size, self.encoding, self.hessian = found.block_size, found.encoding, hessian
        self.levels = torch.tensor(self.form.levels, dtype=torch.float32, device=weight.device)
        self.weight = weight.detach().T[hessian.order].float()  # (in, out)
        self.blocks = hessian.order // self.size
        self.offsets = found.offsets().T.contiguous() if found.has_offsets else None  # (blocks, out)
        self.codes = torch.empty(self.weight.shape, dtype=torch.uint8, device=weight.device)
        self.approximate = torch.empty_like(self.weight)
        self._store(found.scales.detach())

    def _store(self, stored: Tensor) -> None:
        self.stored = stored
        self.scales = self.encoding.decode(stored).T.contiguous()  # (blocks, out)

    def _panels(self) -> Iterator[slice]:
        """Yield columns that are rounded before one product corrects all others: the paper's lazy batches."""
        columns = len(self.weight)
        for start in range(0, columns, PANEL):
            yield slice(start, min(start + PANEL, columns))

    def _round(self, panel: slice, values: Tensor, pivots: Tensor, matrix: Tensor, descends: bool) -> Tensor:
        """Set the codes of columns and what they stand for; return the changes, which are written over the values."""
        blocks, approximate = self.blocks[panel], self.approximate[panel]
        offsets = None if self.offsets is None else self.offsets[blocks]
        if offsets is not None:
            approximate -= offsets
            if not descends:
                values -= offsets
        columns = Columns(values, self.scales[blocks], pivots, matrix, approximate, self.codes[panel])
        backend_of(values).round_columns(self.form, columns, descends)
        if offsets is not None:
            approximate += offsets
        return values

    def round_columns(self) -> None:
        """Round the columns one by one; those to come make up for the error of each."""
        rest, upper = self.weight.clone(), self.hessian.upper
        pivots = upper.diagonal()
        for panel in self._panels():
            errors = self._round(panel, rest[panel], pivots[panel], upper[panel, panel].T, descends=False)
            rest[panel.stop :].addmm_(upper[panel, panel.stop :].T, errors, alpha=-1)
        self._compare()

    def _compare(self) -> None:
        """Compute the gradient of the error anew, which otherwise follows each change."""
        self.gradient = self.hessian.matrix @ (self.weight - self.approximate)

    def improve_codes(self) -> None:
        """Move each code to the best one for all others as they are, column by column."""
        matrix = self.hessian.matrix
        pivots = matrix.diagonal()
        for panel in self._panels():
            slopes = self.gradient[panel].clone()
            moved = self._round(panel, slopes, pivots[panel], matrix[panel, panel], descends=True)
            self.gradient.addmm_(matrix[:, panel], moved, alpha=-1)

    def improve_scales(self) -> None:
        """Fit each block's scale to its codes, block by block, and store the nearest that can be stored."""
        matrix = self.hessian.matrix
        scales = self.scales.clone()
        for block in range(len(scales)):
            own = (self.blocks == block).nonzero().flatten()  # the block's columns
            levels = self.levels[self.codes[own].int()]  # (columns, out)
            curve = (levels * (matrix[own][:, own] @ levels)).sum(0)
            step = (levels * self.gradient[own]).sum(0) / curve
            fitted = scales[block] + step
            usable = fitted.isfinite() & (fitted.abs() <= self.encoding.largest) & (curve > 0)
            if not self.form.signed:
                usable &= fitted > 0
            step = torch.where(usable, step, 0.0)
            scales[block] += step
            self.gradient.addmm_(matrix[:, own], levels * step, alpha=-1)
        self._store(_nearest_stored(self.stored, scales.T.contiguous(), self.encoding))
        for panel in self._panels():
            blocks = self.blocks[panel]
            self.approximate[panel] = self.levels[self.codes[panel].int()].mul_(self.scales[blocks])
            if self.offsets is not None:
                self.approximate[panel] += self.offsets[blocks]
        self._compare()

    def state(self) -> _State:
        """Return what was found."""
        lost = ((self.weight - self.approximate) * self.gradient).sum(0)
        return _State(self.codes.clone(), self.stored, lost)


def _nearest_stored(before: Tensor, scales: Tensor, encoding: ScaleEncoding) -> Tensor:
    """Store float32 scales (rows, blocks), with the offsets of ``before``, as the nearest that can be stored."""
    offsets = encoding.decode_offsets(before) if encoding.offsets else None

    def encode(values: Tensor) -> Tensor:
        stored = encoding.encode(values)
        return stored if offsets is None else encoding.with_offsets(stored, offsets)

    low = encode(scales)
    below, step = encoding.decode(low), encoding.shortfall(low)
    # A row's largest scale stays: others are stored as parts of it.
    raised = (scales.abs() - below.abs()) * 2 > step
    raised &= below.abs() + step <= below.abs().amax(-1, keepdim=True)
    return encode(torch.where(raised, below + scales.sign() * step * 1.01, below))
