"""Row-wise functions in C: norms, activations, cross entropies, 8-bit codes and the rounding of columns.

What C does not take (other dtypes and layouts, wrapped and traced tensors) goes to the definition in plain torch.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lowmem.kernels.codes import code_in_torch, decode_in_torch
from lowmem.kernels.columns import PANEL, round_in_torch
from lowmem.kernels.entropy import entropies_in_torch
from lowmem.kernels.memory import TYPES, floats, is_batch, is_float, is_real, is_traced
from lowmem.kernels.rowwise import gated_grad_in_torch, gated_in_torch, norm_grad_in_torch, norm_in_torch
from lowmem.quant.backend import Activation, Columns
from lowmem.quant.formats import Format

__all__ = ["CpuRows"]

_LEVELS = 16  # of csrc/columns.h
_TERMS = 7  # of struct gated in csrc/row_calls.h


class CpuRows:
    """The row-wise part of the backend in C for one ISA, which ``lowmem.kernels.cpu.Kernel`` completes."""

    native: ModuleType
    _isa: int

    def serves_rows(self, x: Tensor) -> bool:
        """Whether C computes norms and activations of such tensors: float32 and bfloat16."""
        return x.dtype in (torch.float32, torch.bfloat16)

    def norm(self, x: Tensor, factor: Tensor, eps: float, rounds_first: bool) -> Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * factor`` of rows."""
        if not (self._takes(x) and is_float(factor) and _is_dense(x)):
            return norm_in_torch(x, factor, eps, rounds_first)
        return self._norm(x, factor, eps, rounds_first, None)

    def norm_grad(self, grad: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
        """Return the gradient of x for ``norm``."""
        if not (self._takes(x, grad) and is_float(factor) and _is_dense(x)):
            return norm_grad_in_torch(grad, x, factor, eps)
        grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
        return self._norm(x, factor, eps, False, grad)

    def _norm(self, x: Tensor, factor: Tensor, eps: float, rounds_first: bool, grad: Tensor | None) -> Tensor:
        out, columns = torch.empty_like(x), x.shape[-1]
        of_x = TYPES[x.dtype], x.numel() // columns, columns
        addresses = x.data_ptr(), factor.data_ptr(), _address(grad), out.data_ptr()
        self.native.norm(self._isa, torch.get_num_threads(), *of_x, eps, rounds_first, *addresses)
        return out

    def gated(self, a: Tensor, b: Tensor | None, activation: Activation, dtype: torch.dtype) -> Tensor:
        """Return ``act(a) b`` in ``dtype``, contiguous."""
        step = _step(a, b)
        if step is None or not _widens(a.dtype, dtype) or not self._takes(a, b):
            return gated_in_torch(a, b, activation, dtype)
        out = torch.empty(a.shape, dtype=dtype, device=a.device)
        self._gated(a, b, None, activation, step, (out, None), a.shape[-1])
        return out

    def gated_grad(
        self, grad: Tensor, a: Tensor, b: Tensor | None, activation: Activation, into: tuple[Tensor, Tensor | None]
    ) -> None:
        """Write the gradients of a and b for ``gated``."""
        step, out_step = _step(a, b), _step(*into)
        if (
            step is None
            or out_step is None
            or not (is_real(grad) and _widens(a.dtype, grad.dtype) and self._takes(a, b))
        ):
            return gated_grad_in_torch(grad, a, b, activation, into)
        self._gated(a, b, grad, activation, step, into, out_step)
        return None

    def _gated(
        self,
        a: Tensor,
        b: Tensor | None,
        grad: Tensor | None,
        activation: Activation,
        step: int,
        into: tuple[Tensor, Tensor | None],
        out_step: int,
    ) -> None:
        columns, terms = a.shape[-1], (*activation.terms, *[0.0] * _TERMS)[:_TERMS]
        types, sizes = (TYPES[a.dtype], TYPES[into[0].dtype]), (a.numel() // columns, columns, step, out_step)
        addresses = map(_address, (a, b, grad, *into))
        self.native.gated(self._isa, torch.get_num_threads(), *types, *sizes, terms, *addresses)

    def entropies(self, logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
        """Return the cross entropies of rows; ``logits`` become their gradient."""
        if not (_is_memory(logits) and is_real(targets)):
            return entropies_in_torch(logits, targets, smoothing, gradient)
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        targets = targets.contiguous()
        addresses = logits.data_ptr(), targets.data_ptr(), losses.data_ptr()
        of_logits = TYPES[logits.dtype], gradient, *logits.shape
        self.native.entropy(self._isa, torch.get_num_threads(), *of_logits, smoothing, *addresses)
        return losses

    def encode_8bit(self, numbers: Tensor, into: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return 8-bit codes, scales, and how many numbers and codes are not zero."""
        if not _is_memory(numbers):
            return code_in_torch(numbers, into)
        counts = torch.zeros(3, dtype=torch.int64, device=numbers.device)  # of scales that are not finite, too
        of_numbers = TYPES[numbers.dtype], len(into[0]), len(numbers)
        addresses = (one.data_ptr() for one in (numbers, *into, counts))
        self.native.encode8(self._isa, torch.get_num_threads(), *of_numbers, *addresses)
        before, after, _ = counts.tolist()
        return *into, (before, after)

    def decode_8bit(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``codes * scales`` in ``dtype``."""
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        if not _is_memory(out):
            return decode_in_torch(codes, scales, dtype)
        addresses = out.data_ptr(), codes.data_ptr(), scales.data_ptr()
        self.native.decode8(self._isa, torch.get_num_threads(), TYPES[dtype], len(codes), *addresses)
        return out

    def round_columns(self, form: Format, columns: Columns, descends: bool) -> None:
        """Round columns of a weight one after the other."""
        values, scales, pivots, matrix, approximate, codes = columns
        fits = len(form.levels) == _LEVELS and len(values) <= PANEL and not is_traced() and values.numel() > 0
        fits = fits and is_real(codes) and codes.is_contiguous() and all(map(is_float, (values, scales, approximate)))
        if not fits:
            return round_in_torch(form, columns, descends)
        levels, boundaries = floats(form.levels), floats(form.boundaries)
        pivots, matrix = pivots.contiguous(), matrix.contiguous()
        self.native.round_columns(
            self._isa,
            torch.get_num_threads(),
            *values.shape,
            descends,
            values.data_ptr(),
            approximate.data_ptr(),
            levels.buffer_info()[0],
            boundaries.buffer_info()[0],
            pivots.data_ptr(),
            matrix.data_ptr(),
            scales.data_ptr(),
            codes.data_ptr(),
        )
        return None

    def _takes(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether all are plain CPU tensors of one shape and dtype, float32 or bfloat16, with numbers in them."""
        if not self.serves_rows(x) or not x.numel() or is_traced():
            return False
        tensors = [x, *(one for one in others if one is not None)]
        if any(map(is_batch, tensors)):
            return False
        return all(is_real(one) and one.dtype is x.dtype and one.shape == x.shape for one in tensors)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _is_memory(x: Tensor) -> bool:
    """Whether C may read x as numbers of one of ``TYPES``, side by side."""
    return x.dtype in TYPES and x.numel() > 0 and is_real(x) and x.is_contiguous() and not is_traced()


def _widens(narrow: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether C writes one dtype where it reads another, which is float32 or bfloat16."""
    return dtype in (narrow, torch.float32)


def _is_dense(x: Tensor) -> bool:
    """Whether rows of numbers side by side fill the memory of x, in any order of the rows."""
    if x.is_contiguous():
        return True
    return x.stride(-1) == 1 and torch.empty_like(x, device="meta").stride() == x.stride()


def _step(x: Tensor, other: Tensor | None) -> int | None:
    """Return the elements from a row to the next, of both if there is another; None where rows are not even."""
    step = _step_of(x)
    return step if other is None or _step_of(other) == step else None


def _step_of(x: Tensor) -> int | None:
    if x.is_contiguous():
        return x.shape[-1]
    shape, strides = x.shape[:-1], x.stride()[:-1]
    if x.stride(-1) != 1:  # as of any vector that is not contiguous
        return None
    even = all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(len(shape) - 1))
    return strides[-1] if even else None
