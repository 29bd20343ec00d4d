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
from torch import Tensor

from lowmem.kernels.column_rounding import PANEL
from lowmem.nn.techniques import FourBit
from lowmem.quant.backend import ColumnPanel, backend_of
from lowmem.quant.formats import get_format
from lowmem.quant.quantize_tensor import quantize
from lowmem.quant.scale_encodings import ScaleEncoding
from lowmem.quant.tensor import QuantizedTensor

# How often scales and then codes are fitted again: a second time lowers the error by 1 to 2%
_ROUNDS = 1


class PreparedHessian(NamedTuple):
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


def prepare_hessian_or_none(gram: Tensor, damping: float) -> PreparedHessian | None:
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
    identity = torch.eye(len(order), dtype=root.dtype, device=root.device)
    upper = torch.linalg.solve_triangular(root.flip(0, 1), identity, upper=True).float()
    # Every column's error counts a little
    importance = diagonal.clamp_min(mean * 1e-3)
    return PreparedHessian(importance, order, upper, matrix)


def quantize_gptq(weight: Tensor, technique: FourBit, hessian: PreparedHessian) -> QuantizedTensor:
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
    initial = quantize_with_column_importance(weight, technique, hessian.importance)
    fit = _GptqOptimizer(weight, initial, hessian)
    fit.round_columns_with_compensation()
    fit.improve_codes_by_coordinate_descent()
    best = fit.current_codes_scales_and_errors()
    for _ in range(_ROUNDS if initial.method == "search" else 0):
        fit.refit_scales_to_codes()
        fit.improve_codes_by_coordinate_descent()
        best = best.best_of_each_row(fit.current_codes_scales_and_errors())
    codes = torch.empty_like(best.codes)
    codes[hessian.order] = best.codes
    form = get_format(initial.format)
    return replace(
        initial,
        packed=form.width.pack_rows(codes.T.contiguous(), initial.block_size, form.zero_code),
        scales=best.stored.contiguous(),
        method="calibrated",
    )


def quantize_with_column_importance(weight: Tensor, technique: FourBit, importance: Tensor) -> QuantizedTensor:
    """Quantize a weight as a technique says, with a factor of each column's squared error: ``importance`` (in,)."""
    return quantize(
        weight,
        technique.format,
        block_size=technique.block_size,
        scales=technique.scales,
        search=technique.search,
        importance=importance,
    )


class _CodesScalesAndErrors(NamedTuple):
    """Codes uint8 (in, out), stored scales (out, ...), and the error of each row of the weight: float32 (out,)."""

    codes: Tensor
    stored: Tensor
    lost: Tensor

    def best_of_each_row(self, other: _CodesScalesAndErrors) -> _CodesScalesAndErrors:
        """Return of each row what loses less."""
        better = other.lost < self.lost
        return _CodesScalesAndErrors(
            torch.where(better, other.codes, self.codes),
            torch.where(better[:, None], other.stored, self.stored),
            torch.where(better, other.lost, self.lost),
        )


class _GptqOptimizer:
    """Codes and scales of one weight while they are chosen: matrices (in, out), columns in the Hessian's order."""

    def __init__(self, weight: Tensor, initial: QuantizedTensor, hessian: PreparedHessian) -> None:
        self.form = get_format(initial.format)
        self.size, self.encoding, self.hessian = initial.block_size, initial.encoding, hessian
        self.levels = torch.tensor(self.form.levels, dtype=torch.float32, device=weight.device)
        self.weight = weight.detach().T[hessian.order].float()  # (in, out)
        self.blocks = hessian.order // self.size
        self.offsets = initial.offsets().T.contiguous() if initial.has_offsets else None  # (blocks, out)
        self.codes = torch.empty(self.weight.shape, dtype=torch.uint8, device=weight.device)
        self.approximate = torch.empty_like(self.weight)
        self._set_scales(initial.scales.detach())

    def _set_scales(self, encoded_scales: Tensor) -> None:
        self.stored = encoded_scales
        self.scales = self.encoding.decode(encoded_scales).T.contiguous()  # (blocks, out)

    def _iterate_column_panel_slices(self) -> Iterator[slice]:
        """Yield columns that are rounded before one product corrects all others: the paper's lazy batches."""
        columns = len(self.weight)
        for start in range(0, columns, PANEL):
            yield slice(start, min(start + PANEL, columns))

    def _round_panel_in_place(
        self, panel: slice, values: Tensor, pivots: Tensor, matrix: Tensor, coordinate_descent: bool
    ) -> Tensor:
        """Set the codes of columns and what they stand for; return the changes, which are written over the values."""
        blocks, approximate = self.blocks[panel], self.approximate[panel]
        offsets = None if self.offsets is None else self.offsets[blocks]
        if offsets is not None:
            approximate -= offsets
            if not coordinate_descent:
                values -= offsets
        columns = ColumnPanel(values, self.scales[blocks], pivots, matrix, approximate, self.codes[panel])
        backend_of(values).round_columns(self.form, columns, coordinate_descent)
        if offsets is not None:
            approximate += offsets
        return values

    def round_columns_with_compensation(self) -> None:
        """Round the columns one by one; those to come make up for the error of each."""
        rest, upper = self.weight.clone(), self.hessian.upper
        pivots = upper.diagonal()
        for panel in self._iterate_column_panel_slices():
            errors = self._round_panel_in_place(
                panel, rest[panel], pivots[panel], upper[panel, panel].T, coordinate_descent=False
            )
            rest[panel.stop :].addmm_(upper[panel, panel.stop :].T, errors, alpha=-1)
        self._recompute_error_gradient()

    def _recompute_error_gradient(self) -> None:
        """Compute the gradient of the error anew, which otherwise follows each change."""
        self.gradient = self.hessian.matrix @ (self.weight - self.approximate)

    def improve_codes_by_coordinate_descent(self) -> None:
        """Move each code to the best one for all others as they are, column by column."""
        matrix = self.hessian.matrix
        pivots = matrix.diagonal()
        for panel in self._iterate_column_panel_slices():
            slopes = self.gradient[panel].clone()
            moved = self._round_panel_in_place(
                panel, slopes, pivots[panel], matrix[panel, panel], coordinate_descent=True
            )
            self.gradient.addmm_(matrix[:, panel], moved, alpha=-1)

    def refit_scales_to_codes(self) -> None:
        """Fit each block's scale to its codes, block by block, and store the nearest that can be stored."""
        matrix = self.hessian.matrix
        scales = self.scales.clone()
        for block in range(len(scales)):
            # The block's columns
            block_columns = (self.blocks == block).nonzero().flatten()
            levels = self.levels[self.codes[block_columns].int()]  # (columns, out)
            curve = (levels * (matrix[block_columns][:, block_columns] @ levels)).sum(0)
            step = (levels * self.gradient[block_columns]).sum(0) / curve
            fitted = scales[block] + step
            usable = fitted.isfinite() & (fitted.abs() <= self.encoding.largest) & (curve > 0)
            if not self.form.signed:
                usable &= fitted > 0
            step = torch.where(usable, step, 0.0)
            scales[block] += step
            self.gradient.addmm_(matrix[:, block_columns], levels * step, alpha=-1)
        self._set_scales(_nearest_encoded_scales(self.stored, scales.T.contiguous(), self.encoding))
        for panel in self._iterate_column_panel_slices():
            blocks = self.blocks[panel]
            self.approximate[panel] = self.levels[self.codes[panel].int()].mul_(self.scales[blocks])
            if self.offsets is not None:
                self.approximate[panel] += self.offsets[blocks]
        self._recompute_error_gradient()

    def current_codes_scales_and_errors(self) -> _CodesScalesAndErrors:
        """Return what was found."""
        lost = ((self.weight - self.approximate) * self.gradient).sum(0)
        return _CodesScalesAndErrors(self.codes.clone(), self.stored, lost)


def _nearest_encoded_scales(previous_encoded: Tensor, scales: Tensor, encoding: ScaleEncoding) -> Tensor:
    """Store float32 scales (rows, blocks), with the offsets of ``previous_encoded``, as the nearest that can be
    stored."""
    offsets = encoding.decode_offsets(previous_encoded) if encoding.offsets else None

    def encode_with_offsets(values: Tensor) -> Tensor:
        stored = encoding.encode(values)
        return stored if offsets is None else encoding.concatenate_scales_and_offsets(stored, offsets)

    low = encode_with_offsets(scales)
    below, step = encoding.decode(low), encoding.encoding_loss_bound(low)
    # A row's largest scale stays: others are stored as parts of it.
    raised = (scales.abs() - below.abs()) * 2 > step
    raised &= below.abs() + step <= below.abs().amax(-1, keepdim=True)
    return encode_with_offsets(torch.where(raised, below + scales.sign() * step * 1.01, below))
