"""The cross entropy of an output layer, in chunks of rows: forward computes the loss and the gradients of one chunk
in one pass, and frees its logits (Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from lowmem import kernels
from lowmem.errors import short_repr
from lowmem.nn.call_context import is_cast_by_autocast
from lowmem.nn.recomputed_inputs import has_dtype_independent_pack_hook
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.backend import backend_of, chunk_length
from lowmem.resident import trim_heap_before_allocation


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int = 256,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``cross_entropy(hidden @ weight.T + bias, labels)``, with a peak of ``chunk`` rows of logits.

    Forward computes the gradients of hidden, weight and bias, as far as they require one, and keeps them for
    backward; each is as large as its tensor.

    Args:
        hidden: floating point (..., width).
        weight: (vocabulary, width): dense, or a stored weight of a converted layer (frozen).
        labels: int64 (...), from 0 to vocabulary - 1, or ``ignore_index``: rows that are not computed.
        bias: (vocabulary,), or None.
        ignore_index: the label of rows without a loss.
        chunk: rows whose logits exist at once, at least 1. On a GPU they may be more, up to a 64th of its memory.
        label_smoothing: how much of each target is spread over the vocabulary, in [0, 1].
        reduction: "mean" over the labels that count (NaN if none does), or "sum".
        dtype: of the products; sums, softmax and loss are in float32 or wider. None takes autocast's dtype if it is
            enabled; hidden's if the weight is stored as codes; else bfloat16 if one of hidden and weight is bfloat16
            and the other bfloat16 or float32; else ``torch.promote_types`` of the two.

    Returns:
        The loss, a scalar in float32, or float64 if ``dtype`` is. It is differentiable once: a backward with
        ``create_graph=True`` is a RuntimeError.

    Raises:
        TypeError: hidden, weight, bias or dtype is not floating point, or labels are not int64.
        ValueError: shapes or devices that do not fit, a sparse or nested tensor, a label outside the vocabulary (on
            a GPU, torch's device-side assertion), or an option out of its range.
    """
    _check_loss_options(chunk, label_smoothing, reduction, dtype)
    _check_loss_tensors(hidden, weight, labels, bias)
    dtype = dtype or default_loss_matmul_dtype(hidden, weight)
    if isinstance(bias, StoredTensor):
        bias = bias.dequantize()
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    counted, targets, ignored = _rows_to_compute(targets, ignore_index, weight.shape[0])
    function_args = rows, weight, bias, counted, targets, ignored, chunk, label_smoothing, dtype
    loss: Tensor = _ChunkedCrossEntropyFunction.apply(*function_args)  # type: ignore[no-untyped-call, unused-ignore]
    if reduction == "sum":
        return loss
    # As torch, return NaN if no label counts. A division by zero would make the gradients NaN, too; torch's are zero.
    if ignored is not None:
        count = (~ignored).sum()
        return loss / count.clamp_min(1) + torch.zeros_like(loss).masked_fill(count == 0, math.nan)
    return loss / len(counted) if len(counted) else loss + math.nan


def _rows_to_compute(
    targets: Tensor, ignore_index: int, vocabulary_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the numbers of the rows to compute and their labels; and where they are ignored, or None for nowhere.

    On a GPU the host would wait to learn which rows have a label: all are computed, and some count for nothing.
    """
    if backend_of(targets).is_asynchronous:
        ignored = targets == ignore_index
        every = torch.arange(len(targets), dtype=torch.int64, device=targets.device)
        return every, targets.masked_fill(ignored, 0), ignored
    counted = (targets != ignore_index).nonzero().squeeze(1)
    targets = targets[counted]
    _check_labels_in_vocabulary(targets, vocabulary_size)
    return counted, targets, None


class _ChunkedCrossEntropyFunction(torch.autograd.Function):
    """The sum of the rows' losses. Forward computes the gradients, for an incoming gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_indices: Tensor,
        targets: Tensor,
        ignored: Tensor | None,
        chunk: int,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        sums = torch.promote_types(dtype, torch.float32)
        wanted = ctx.needs_input_grad
        chunk = chunk_length(rows, chunk, dtype.itemsize * len(weight))
        factor, offset = _OutputWeightMatmul(weight, dtype), None if bias is None else bias.detach().to(dtype)
        row_grad = torch.zeros_like(rows) if wanted[0] else None
        weight_grad = rows.new_zeros(weight.shape, dtype=sums) if wanted[1] else None
        bias_grad = rows.new_zeros(weight.shape[:1], dtype=sums) if wanted[2] else None
        loss = rows.new_zeros((), dtype=sums)
        # In "lean" mode the step's memory peaks here
        if has_dtype_independent_pack_hook():
            trim_heap_before_allocation(min(chunk, len(row_indices)) * len(weight) * dtype.itemsize)
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, len(row_indices), chunk):
                at, target = row_indices[start : start + chunk], targets[start : start + chunk]
                x = (rows[start : start + chunk] if len(row_indices) == len(rows) else rows[at]).to(dtype)
                if ignored is not None:
                    # Zero times NaN would be NaN in the weight's gradient
                    x = x.masked_fill(ignored[start : start + chunk, None], 0)
                logits = factor.logits(x, offset)  # (chunk, vocabulary)
                losses = backend_of(logits).entropies(logits, target, label_smoothing, any(wanted[:3]))
                if ignored is not None:
                    losses.masked_fill_(ignored[start : start + chunk], 0)
                    logits.masked_fill_(ignored[start : start + chunk, None], 0)
                loss += losses.sum()
                if row_grad is not None:
                    row_grad[at] = factor.input_grad(logits).to(rows.dtype)
                if weight_grad is not None:
                    factor.accumulate_weight_grad(weight_grad, logits, x)
                if bias_grad is not None:
                    bias_grad += logits.sum(0, dtype=sums)
                # Before the next chunk's are made
                del logits, x
        ctx.save_for_backward(
            row_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # A graph of the scaling alone would give a second derivative of zero
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy is differentiable once: for create_graph=True take "
                "torch.nn.functional.cross_entropy of the logits, after lowmem.release_training(model)"
            )
        # ``gradient`` is a 0-dimensional tensor: it neither changes the gradients' dtype nor is rounded to it first.
        # Rounding 1 / rows to bfloat16 would be off by up to 0.4%, and in float16 it could underflow.
        scaled = [None if tensor is None else tensor * gradient for tensor in ctx.saved_tensors]
        return *scaled, None, None, None, None, None, None


_CONVERTED = 2**12
"""Rows of a dense weight that are converted to the product's dtype at a time; as fast as to convert all at once."""
_WIDENED = 2**9
"""The same where torch multiplies in float32, with a float32 copy of their logits."""


class _OutputWeightMatmul:
    """Multiplies with an output layer's weight, dense or stored, in one dtype; a dense one in float32 where torch is
    slow at that (``fast_matmul_dtype``)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.dtype, self.of_torch = dtype, kernels.fast_matmul_dtype(dtype, weight)
        self.step = _CONVERTED if self.of_torch is dtype else _WIDENED
        self.stored: kernels.Weight | None = None
        if isinstance(weight, StoredTensor) and not weight.form.gathered:
            self.stored = weight.kernel_weight
            return
        dense = weight.detach()
        self.step = chunk_length(dense, self.step, 4 * dense.shape[1])
        self.in_parts = self.of_torch is not dtype or (dense.dtype is not dtype and len(dense) > self.step)
        self.dense = dense if self.in_parts else dense.to(dtype)

    def _iterate_slices_and_weight_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the vocabulary, each with its rows of the weight, converted to the dtype."""
        for start in range(0, len(self.dense), self.step):
            rows = slice(start, min(start + self.step, len(self.dense)))
            yield rows, self.dense[rows].to(self.of_torch)

    def logits(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias``: (rows, width) -> (rows, vocabulary)."""
        if self.stored is not None:
            return kernels.linear(x, self.stored, self.dtype, bias)
        if not self.in_parts:
            return torch.nn.functional.linear(x, self.dense, bias)
        out, x = x.new_empty(len(x), len(self.dense)), x.to(self.of_torch)
        for rows, part in self._iterate_slices_and_weight_rows():
            if self.of_torch is not self.dtype:
                out[:, rows] = torch.nn.functional.linear(x, part, None if bias is None else bias[rows].to(x.dtype))
            elif bias is None:
                torch.mm(x, part.t(), out=out[:, rows])
            else:
                torch.addmm(bias[rows], x, part.t(), out=out[:, rows])
        return out

    def input_grad(self, logits_grad: Tensor) -> Tensor:
        """Return ``gradient @ W``: (rows, vocabulary) -> (rows, width); parts are summed in float32 or wider."""
        if self.stored is not None:
            return kernels.input_grad(logits_grad, self.stored, self.dtype)
        if not self.in_parts:
            return logits_grad @ self.dense
        wide = torch.promote_types(self.dtype, torch.float32)
        out = logits_grad.new_zeros(len(logits_grad), self.dense.shape[1], dtype=wide)
        for rows, part in self._iterate_slices_and_weight_rows():
            out += logits_grad[:, rows].to(self.of_torch) @ part
        return out

    def accumulate_weight_grad(self, out: Tensor, logits_grad: Tensor, x: Tensor) -> None:
        """Add ``gradient.T @ x`` (vocabulary, width) to ``out``."""
        if self.of_torch is self.dtype:
            out += logits_grad.t() @ x
            return
        x = x.to(self.of_torch)
        for start in range(0, len(out), self.step):
            rows = slice(start, start + self.step)
            out[rows].addmm_(logits_grad[:, rows].t().to(self.of_torch), x)


def default_loss_matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which ``linear_cross_entropy`` multiplies by default."""
    if is_cast_by_autocast(hidden):
        return torch.get_autocast_dtype(hidden.device.type)
    stored = weight.kernel_weight if isinstance(weight, StoredTensor) else weight
    if not isinstance(stored, Tensor):
        return hidden.dtype
    wide = torch.promote_types(hidden.dtype, stored.dtype)
    narrow = torch.bfloat16 in (hidden.dtype, stored.dtype) and torch.float16 not in (hidden.dtype, stored.dtype)
    return torch.bfloat16 if narrow and wide is torch.float32 else wide


def _check_loss_options(chunk: int, label_smoothing: float, reduction: str, dtype: torch.dtype | None) -> None:
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk={short_repr(chunk)} must be a number of rows, at least 1")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing!r} must lie in [0, 1]")
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f'reduction={short_repr(reduction)} must be "mean" or "sum"; for a loss of each row use '
            "torch.nn.functional.cross_entropy on the logits"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype} must be floating point")


def _check_loss_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            description = (
                f"{name}.dtype={tensor.dtype}" if isinstance(tensor, Tensor) else f"{name}={type(tensor).__name__}"
            )
            raise TypeError(f"{description} must be a tensor of floating point")
        if tensor.layout is not torch.strided or tensor.device != hidden.device:
            raise ValueError(
                f"{name}, {tensor.layout} on {tensor.device}, must be dense, and where hidden is, on {hidden.device}"
            )
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels={type(labels).__name__} must be a tensor of torch.int64, the numbers of classes")
    if labels.dtype is not torch.int64:
        raise TypeError(f"labels.dtype={labels.dtype} must be torch.int64, the numbers of classes")
    if labels.device != hidden.device:
        raise ValueError(f"labels, on {labels.device}, must be where hidden is, on {hidden.device}")
    if weight.dim() != 2:
        raise ValueError(f"weight.shape={tuple(weight.shape)} must be (vocabulary, width)")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight.shape={tuple(weight.shape)} takes a width of {weight.shape[1]}, and "
            f"hidden.shape={tuple(hidden.shape)} ends in {hidden.shape[-1] if hidden.dim() else None}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels.shape={tuple(labels.shape)} must be that of hidden without its last dimension, "
            f"{tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias.shape={tuple(bias.shape)} must be {tuple(weight.shape[:1])}")


def _check_labels_in_vocabulary(targets: Tensor, vocabulary_size: int) -> None:
    if not len(targets):
        return
    least, largest = cast(tuple[Tensor, Tensor], torch.aminmax(targets))
    for value in (int(least), int(largest)):
        if not 0 <= value < vocabulary_size:
            raise ValueError(
                f"labels hold {value}, which is outside the vocabulary of {vocabulary_size}; rows without a loss "
                "take "
                "ignore_index"
            )
