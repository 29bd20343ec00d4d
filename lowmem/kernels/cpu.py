"""The backend in C (``csrc/``) for one ISA: products with stored weights, and the quantizing of rows. What C does not
take falls back to ``reference``: other devices and dtypes, wrapped and traced tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from struct import unpack
from types import ModuleType
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels import int8_rounding, reference
from lowmem.kernels.cpu_kernel_choice import KernelExplanationMixin
from lowmem.kernels.cpu_rowwise import COMPARE, COMPARE_CALL, CpuRowwiseMixin
from lowmem.kernels.native_loader import load_native_module_and_reason
from lowmem.kernels.tensor_checks import (
    TYPES,
    c_float_array,
    hide_from_selective_checkpoints,
    is_c_readable_float32,
    is_c_vector,
    is_plain_cpu_tensor,
    is_recording_operations,
)
from lowmem.quant.backend import Backend, LowRank, Weight, fast_matmul_dtype
from lowmem.quant.formats import get_format
from lowmem.quant.scale_search import CANDIDATES, block_sums, expand_block_scales
from lowmem.quant.tensor import QuantizedTensor, Squares

# (name, signed) of a scale encoding -> enum encoding of csrc/kernel.h
_ENCODINGS = {("float32", True): 0, ("float16", True): 1, ("double", False): 2, ("double", True): 3}

NativeWeight: TypeAlias = tuple[object, Tensor, Tensor | None]
"""A weight as C takes it: (handle, codes, scales) in 4 bits, (None, weight, None) in 16 bits."""

_Product: TypeAlias = Tensor | Literal[False] | None
"""What C returns: None where it does not take the arguments, False where the plan leaves the product to torch."""

_NO_LOW_RANK = (None, None, None)

# Keys of ``QuantizedTensor.cache``: a C handle for each use
_AS_FLOATS, _IN_INT8 = "prepared", "prepared_int8"
_BASE, _BASE_IN_INT8 = "prepared_base", "prepared_base_int8"  # of a weight that has offsets, without these

OFFSETS_SCRATCH = 2**23
"""Bytes that a product with offsets takes at most beside its result, unless one row of the input takes more."""
# Bytes of offsets that are decoded at a time
_OFFSETS_CHUNK = 2**20
_OFFSETS_ROWS = (
    255  # most rows of an input at a time: float32 products of more may be torch's, with scratch of its own
)
# Limit for inputs that are rounded to 8 bits, and their products: each dequantizes the weight
_ROUNDED_BYTES = 2**21
# Scratch limit for rounding them
_ROUNDING_BYTES = 2**19

# Rows, or columns, of a weight that are dequantized at a time where torch multiplies: up to half more, so that the
# chunks of one weight have about one size.
_TORCH_CHUNK = 512
# Numbers of a row of the input that are widened at a time where torch multiplies in float32
_WIDENED_CHUNK = 2048

# Columns in bfloat16 of a tile of AMX
_TILE = 32


@lru_cache(maxsize=1)
def cpu_backends_and_description() -> tuple[list[Backend], str]:
    """Return a kernel for each ISA of this processor, the slowest first, and how they compute; or none, and why."""
    native, why = load_native_module_and_reason()
    return [CpuBackend(native, name) for name, runs in native.isas() if runs] if native else [], why


@dataclass(frozen=True, slots=True)
class NativeWeightHandle:
    """The C handle of a 4-bit weight; valid while codes and scales keep their address and layout, which C checks."""

    backend: CpuBackend
    handle: object


class CpuBackend(CpuRowwiseMixin, KernelExplanationMixin):
    """The backend in C for one ISA.

    Args:
        native: the module that ``load`` returns.
        name: of the ISA, one of those of ``native.isas()``.
    """

    is_asynchronous = False

    def __init__(self, native: ModuleType, name: str) -> None:
        self.native, self.name = native, name
        self._isa = [isa for isa, _ in native.isas()].index(name)
        # Bound once: faster than nested attribute lookups, and typed.
        self._linear: Callable[..., _Product] = native.linear
        self._native_linear_inputs8: Callable[..., Tensor | None] = native.linear_inputs8
        self._input_grad: Callable[..., _Product] = native.input_grad
        self._native_dequantize: Callable[..., Tensor | None] = native.dequantize
        self._update: Callable[..., Tensor | None] = native.update
        # The column order, shared by layers of one shape
        self._order = lru_cache(maxsize=64)(native.order)

    @property
    def fast_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16, so that torch is fast at it."""
        return self.name in ("avx512bf16", "avx512amx")

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """Return ``x @ W.T + bias + s (x @ A.T) @ B.T``: (..., in) -> (..., out)."""
        if is_recording_operations():
            return reference.linear(x, weight, dtype, bias, low_rank)
        in_int8 = dtype is torch.int8 and low_rank is None
        native_weight = self._cached_native_weight_or_none(weight, _IN_INT8 if in_int8 else _AS_FLOATS)
        if native_weight is not None and (in_int8 or x.dtype is dtype):
            handle, packed, scales = native_weight
            threads = torch.get_num_threads()
            out: _Product
            if in_int8:
                out = self._native_linear_inputs8(self._isa, handle, packed, scales, x, bias, threads)
            else:
                a, b, scaling = _NO_LOW_RANK if low_rank is None else low_rank
                out = self._linear(self._isa, handle, packed, scales, x, bias, threads, a, b, scaling)
            if out is not None and out is not False:
                return out
        if x.dim() != 2:
            return reference.call_on_flattened_batch(self.linear, x, weight, dtype, bias, low_rank)
        out = self._linear_with_converted_arguments(x, weight, dtype, bias)
        return out if low_rank is None else self.add_low_rank(out, x, *low_rank)

    def _linear_with_converted_arguments(
        self, x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None
    ) -> Tensor:
        """Convert arguments to a form that C takes, or fall back to plain torch."""
        with_offsets = weight if isinstance(weight, QuantizedTensor) and weight.has_offsets else None
        if dtype is torch.int8 and with_offsets is None:
            return self._linear_with_int8_inputs(x, weight, bias)
        takes = (
            (dtype in TYPES or dtype is torch.int8)
            and is_plain_cpu_tensor(x)
            and x.is_floating_point()
            and x.dim() == 2
        )
        if takes and dtype in TYPES and not (x.dtype is dtype and x.is_contiguous()):
            return self.linear(x.to(dtype).contiguous(), weight, dtype, bias)
        if takes and with_offsets is not None:
            out = self._product_with_offsets_or_none(x, with_offsets, dtype, False, bias)
            return reference.linear(x, weight, dtype, bias) if out is None else out
        if takes:
            added = bias if bias is not None and is_c_vector(bias, weight.shape[0]) else None
            for native_weight in self._cached_then_new_native_weights(weight):
                out = self._native_product_or_none(x, native_weight, weight, bias=added)
                if out is not None:
                    return out if bias is None or added is bias else out.add_(bias)
        return reference.linear(x, weight, dtype, bias)

    def _native_product_or_none(
        self,
        x: Tensor,
        native_weight: NativeWeight,
        weight: Weight,
        transposed: bool = False,
        bias: Tensor | None = None,
        rounds_inputs_to_int8: bool = False,
    ) -> Tensor | None:
        """Multiply in C, or by torch where the plan says so; None: C cannot read the weight. With
        ``rounds_inputs_to_int8`` in float32, of x rounded to 8 bits by C or else by torch."""
        threads = torch.get_num_threads()
        if rounds_inputs_to_int8:
            x = x.float()
            rounded = self._native_linear_inputs8(self._isa, *native_weight, x, bias, threads)
            if rounded is not None:
                return rounded
            assert isinstance(weight, QuantizedTensor)
            rounding = partial(int8_rounding.round_inputs_to_int8_grid, weight_block_size=weight.block_size)
            wide = _apply_to_batch_chunks_or_none(
                x, int8_rounding.BYTES_PER_NUMBER * x.shape[1], _ROUNDING_BYTES, torch.float32, rounding
            )
            assert wide is not None
            x = wide.contiguous()
        if transposed:
            out = self._input_grad(self._isa, *native_weight, x, threads)
        else:
            out = self._linear(self._isa, *native_weight, x, bias, threads, *_NO_LOW_RANK)
        return self._torch_product_in_chunks(x, native_weight, weight, transposed, bias) if out is False else out

    def _linear_with_int8_inputs(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """Multiply 8-bit integers; or, in float32, inputs rounded to them; or fall back to plain torch."""
        if isinstance(weight, QuantizedTensor) and x.dtype in TYPES and x.dim() == 2 and is_plain_cpu_tensor(x):
            x, threads = x.contiguous(), torch.get_num_threads()
            bias = bias if bias is None or is_c_vector(bias, weight.shape[0]) else bias.float().contiguous()
            nbytes = 4 * sum(weight.shape)
            for native_weight in self._cached_then_new_native_weights(weight, _IN_INT8):
                out = self._native_linear_inputs8(self._isa, *native_weight, x, bias, threads)
                if out is None:
                    multiply = partial(
                        self._native_product_or_none,
                        native_weight=native_weight,
                        weight=weight,
                        bias=bias,
                        rounds_inputs_to_int8=True,
                    )
                    out = _apply_to_batch_chunks_or_none(x, nbytes, _ROUNDED_BYTES, x.dtype, multiply)
                if out is not None:
                    return out
        return reference.linear(x, weight, torch.int8, bias)

    def _product_with_offsets_or_none(
        self, x: Tensor, weight: QuantizedTensor, dtype: torch.dtype, transposed: bool, bias: Tensor | None = None
    ) -> Tensor | None:
        """Multiply by the weight without offsets, and add the product with the offsets, in chunks of the batch; in
        float32, since the two may be larger than their sum."""
        in_int8, size, (rows, columns) = dtype is torch.int8, weight.block_size, weight.shape
        blocks = -(-columns // size)
        nbytes = 4 * (rows + 3 * columns) if transposed else 6 * (rows + columns) + 8 * blocks
        nbytes += in_int8 * int8_rounding.BYTES_PER_NUMBER * columns
        limit = OFFSETS_SCRATCH - 4 * _OFFSETS_CHUNK
        nbytes = max(nbytes, limit // _OFFSETS_ROWS)

        def multiply_batch_chunk_or_none(x_chunk: Tensor) -> Tensor | None:
            wide = (x_chunk if in_int8 else x_chunk.to(dtype)).float().contiguous()
            for native_weight in self._cached_then_new_native_weights(weight, _BASE_IN_INT8 if in_int8 else _BASE):
                product = self._native_product_or_none(
                    wide, native_weight, weight, transposed, rounds_inputs_to_int8=in_int8
                )
                if product is None:
                    continue
                if transposed:
                    added = wide.new_zeros(wide.shape[0], blocks)
                    for chunk, offsets in _row_slices_and_decoded_offsets(weight):
                        added.addmm_(wide[:, chunk], offsets)
                    return product.add_(expand_block_scales(added, size, columns))
                sums = block_sums(wide, size)
                for chunk, offsets in _row_slices_and_decoded_offsets(weight):
                    product[:, chunk].addmm_(sums, offsets.t())
                return product if bias is None else product.add_(bias)
            return None

        return _apply_to_batch_chunks_or_none(
            x, nbytes, limit, x.dtype if in_int8 else dtype, multiply_batch_chunk_or_none
        )

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in)."""
        if is_recording_operations():
            return reference.input_grad(grad, weight, dtype)
        native_weight = self._cached_native_weight_or_none(weight)
        if grad.dtype is dtype and native_weight is not None:
            out = self._input_grad(self._isa, *native_weight, grad, torch.get_num_threads())
            if out is not None and out is not False:
                return out
        if dtype in TYPES and is_plain_cpu_tensor(grad):
            if isinstance(weight, QuantizedTensor) and weight.has_offsets:
                made = self._product_with_offsets_or_none(grad, weight, dtype, True)
                return reference.input_grad(grad, weight, dtype) if made is None else made
            ready = grad.to(dtype).contiguous()
            for native_weight in self._cached_then_new_native_weights(weight):
                made = self._native_product_or_none(ready, native_weight, weight, transposed=True)
                if made is not None:
                    return made
        return reference.input_grad(grad, weight, dtype)

    def add_product(self, out: Tensor, x: Tensor, weight: Weight, transposed: bool) -> Tensor:
        """Add ``x @ W.T`` to ``out``, or ``x @ W`` if transposed, in place; torch multiplies."""
        if x.dtype in TYPES and is_plain_cpu_tensor(x) and not is_recording_operations():
            for native_weight in self._cached_then_new_native_weights(weight):
                if native_weight[0] is None and native_weight[1].dtype is not x.dtype:
                    break
                if (
                    native_weight[0] is not None
                    and self._try_dequantize_into(native_weight, 0, 0, x.new_empty(1, weight.shape[1])) is None
                ):
                    # A stale handle
                    continue
                return self._torch_product_in_chunks(x, native_weight, weight, transposed, add_to=out)
        return reference.add_product(out, x, weight, transposed)

    def _torch_product_in_float32(
        self,
        x: Tensor,
        native_weight: NativeWeight,
        weight: Weight,
        transposed: bool,
        bias: Tensor | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Multiply as ``_torch_product_in_chunks`` in float32, and round each sum once. Parts of the input and of the
        weight are widened; a 4-bit weight is not rounded."""
        rows, columns = weight.shape
        size = weight.block_size if isinstance(weight, QuantizedTensor) else 1
        outs, terms = (columns, rows) if transposed else (rows, columns)
        out = x.new_empty(x.shape[0], outs) if add_to is None else add_to
        chunks = _near_equal_slices(outs, size if transposed else 1)
        parts = _near_equal_slices(terms, 1 if transposed else size, _WIDENED_CHUNK)
        scratch = x.new_empty(chunks[0].stop * parts[0].stop, dtype=torch.float32)
        for chunk in chunks:
            if add_to is not None:
                sums = add_to[:, chunk].float()
            else:
                sums = x.new_zeros(x.shape[0], chunk.stop - chunk.start, dtype=torch.float32)
                sums = sums if bias is None else sums.add_(bias[chunk])
            for part in parts:
                factor = self._write_dequantized_factor(native_weight, chunk, part, transposed, scratch)
                sums.addmm_(x[:, part].float(), factor)
            out[:, chunk] = sums
        return out

    @hide_from_selective_checkpoints
    def _torch_product_in_chunks(
        self,
        x: Tensor,
        native_weight: NativeWeight,
        weight: Weight,
        transposed: bool,
        bias: Tensor | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Dequantize a chunk of a weight at a time, and multiply it by torch; add the product to ``add_to``, if
        given. Chunks are of columns if transposed: sums over chunks of rows would have to be kept in float32."""
        if fast_matmul_dtype(x.dtype, x) is not x.dtype:
            return self._torch_product_in_float32(x, native_weight, weight, transposed, bias, add_to)
        x = pad_memory_against_nan_leak(x)
        bias = bias if bias is None else bias.to(x.dtype)
        if not isinstance(weight, QuantizedTensor):
            dense = native_weight[1]
            if add_to is not None:
                return add_to.addmm_(x, dense if transposed else dense.t())
            return x @ dense if transposed else functional.linear(x, dense, bias)
        rows, columns = weight.shape
        out = x.new_empty(x.shape[0], columns if transposed else rows) if add_to is None else add_to
        chunks = _near_equal_slices(columns, weight.block_size) if transposed else _near_equal_slices(rows)
        scratch = x.new_empty(chunks[0].stop * (rows if transposed else columns))
        for chunk in chunks:
            factor = self._write_dequantized_factor(
                native_weight, chunk, slice(0, rows if transposed else columns), transposed, scratch
            )
            if add_to is not None:
                out[:, chunk].addmm_(x, factor)
            elif bias is None:
                torch.mm(x, factor, out=out[:, chunk])
            else:
                torch.addmm(bias[chunk], x, factor, out=out[:, chunk])
        return out

    def _write_dequantized_factor(
        self, native_weight: NativeWeight, out_slice: slice, in_slice: slice, transposed: bool, scratch: Tensor
    ) -> Tensor:
        """Write a part of a weight to ``scratch``, in its dtype, and return it as the right factor of a product.

        Args:
            native_weight: the weight.
            out_slice: numbers of a row of the output: rows of the weight, or columns if ``transposed``.
            in_slice: numbers of a row of the input: columns of the weight, or rows if ``transposed``.
            transposed: whether the product is ``x @ W``, and not ``x @ W.T``.
            scratch: a vector, at least as large as the part.
        """
        rows, columns = (in_slice, out_slice) if transposed else (out_slice, in_slice)
        shape = rows.stop - rows.start, columns.stop - columns.start
        part = scratch[: shape[0] * shape[1]].view(shape)
        # 16 bits
        if native_weight[0] is None:
            part.copy_(native_weight[1][rows, columns])
        else:
            self._try_dequantize_into(native_weight, rows.start, columns.start, part)
        return part if transposed else part.t()

    def _try_dequantize_into(
        self, native_weight: NativeWeight, first_row: int, first_column: int, out: Tensor
    ) -> Tensor | None:
        """Fill ``out`` with what a weight holds from a row and the column of a block on; None: C does not take it."""
        return self._native_dequantize(
            self._isa, *native_weight, first_row, first_column, out, torch.get_num_threads()
        )

    def add_low_rank(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), of (batch, in), (rank, in), (out, rank)."""
        if not is_recording_operations():
            out = self._update(self._isa, base, x, a, b, scaling, torch.get_num_threads())
            if out is not None:
                return out
        return reference.add_low_rank(base, x, a, b, scaling)

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of a 4-bit matrix (out, in), dequantized in float32 and rounded once to ``dtype``."""
        if dtype in TYPES and not is_recording_operations():
            start, stop, _ = rows.indices(weight.shape[0])
            out = weight.packed.new_empty(max(0, stop - start), weight.shape[-1], dtype=dtype)
            for native_weight in self._cached_then_new_native_weights(weight):
                if self._try_dequantize_into(native_weight, start, 0, out) is not None:
                    return out
        return reference.dequantize(weight, rows, dtype)

    def quantizing_bytes(self, rows: Tensor, into: QuantizedTensor) -> float:
        """Return the scratch of ``quantize_rows`` in bytes per weight: a row's squares, and numbers in float32."""
        if not _can_quantize_in_c(into) or is_recording_operations():
            return reference.quantizing_bytes(rows, into)
        copies = 2 * (into.encoding.divisor != 1) or not _is_c_readable_matrix(rows)
        return 16 / rows.shape[1] + 4 * copies

    def quantize_rows(self, rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> Squares:
        """Quantize rows (rows, n) into the rows ``chunk`` of the matrix ``into``."""
        if not _can_quantize_in_c(into):
            return reference.quantize_rows(rows, into, chunk, importance)
        form, size, packed, stored = get_format(into.format), into.block_size, into.packed[chunk], into.scales[chunk]
        encoding, divisor = _ENCODINGS[into.encoding.name, into.encoding.signed], into.encoding.divisor
        weights = rows
        # C knows no divisor: weights and scales are divided, which is exact
        rows = rows.float() / divisor if divisor != 1 else rows
        rows = rows if _is_c_readable_matrix(rows) else rows.float().contiguous()
        fits = _is_c_readable_matrix(rows) and all(
            is_plain_cpu_tensor(t) and t.is_contiguous() for t in (packed, stored)
        )
        fits = fits and rows.shape == (len(packed), into.shape[-1])
        if importance is not None:
            fits = fits and is_c_readable_float32(importance) and importance.shape == rows.shape[1:]
        if not fits or is_recording_operations() or not rows.numel():
            return reference.quantize_rows(weights, into, chunk, importance)
        levels, boundaries = c_float_array(form.levels), c_float_array(form.boundaries)
        candidates = c_float_array(CANDIDATES if into.method == "search" else ())
        count, columns = rows.shape
        threads = min(torch.get_num_threads(), count)
        squares = torch.empty(count, 2, dtype=torch.float64, device="cpu")
        held = self.native.quantize(
            self._isa,
            rows.data_ptr(),
            TYPES[rows.dtype],
            packed.data_ptr(),
            stored.data_ptr(),
            0 if form.width.is_centered else levels.buffer_info()[0],
            encoding,
            size,
            count,
            columns,
            boundaries.buffer_info()[0],
            *candidates.buffer_info(),
            0 if importance is None else importance.data_ptr(),
            *unpack("@2I", c_float_array((into.encoding.largest / divisor, form.top)).tobytes()),  # the bits of each
            form.divisor,
            form.zero_code,
            form.signed,
            squares.data_ptr(),
            threads,
        )
        if not held:
            # Raises the error
            return reference.quantize_rows(weights, into, chunk, importance)
        if divisor != 1:
            stored.mul_(divisor)
            squares.mul_(divisor**2)
        return _square_sums_over_rows(squares)

    def squares(self, x: Tensor, other: Tensor) -> Squares:
        """Return the sums of ``(x - other)^2`` and ``x^2`` of two matrices."""
        fits = _is_c_readable_matrix(x) and _is_c_readable_matrix(other) and x.shape == other.shape
        if not fits or not x.numel() or is_recording_operations():
            return reference.squares(x, other)
        squares = torch.empty(len(x), 2, dtype=torch.float64, device="cpu")
        addresses = x.data_ptr(), other.data_ptr(), squares.data_ptr()
        self._call_rowwise(
            COMPARE, x.numel(), COMPARE_CALL.pack(TYPES[x.dtype], TYPES[other.dtype], *x.shape, *addresses)
        )
        return _square_sums_over_rows(squares)

    def native_weight_or_none(self, weight: Weight, in_int8: bool) -> NativeWeight | None:
        """Return a weight as C takes it in products with floats or with 8-bit integers; None where it takes none."""
        return self._cached_native_weight_or_none(weight, _IN_INT8 if in_int8 else _AS_FLOATS)

    def _cached_native_weight_or_none(self, weight: Weight, cache_key: str = _AS_FLOATS) -> NativeWeight | None:
        """Return a weight as C takes it, making its handle if there is none; None where C cannot read it."""
        if not isinstance(weight, QuantizedTensor):  # faster than isinstance(weight, Tensor)
            return None, weight, None
        cached_handle: NativeWeightHandle | None = weight.cache.get(cache_key)
        if cached_handle is None or cached_handle.backend is not self:
            cached_handle = self._make_and_cache_handle_or_none(weight, cache_key)
        return None if cached_handle is None else (cached_handle.handle, weight.packed, weight.scales)

    def _cached_then_new_native_weights(self, weight: Weight, cache_key: str = _AS_FLOATS) -> Iterator[NativeWeight]:
        """Yield a weight as C takes it: with its cached handle, then, in case that is stale, with a new one. The new
        handle is of a snapshot, to which no other thread can assign data."""
        native_weight = self._cached_native_weight_or_none(weight, cache_key)
        if native_weight is not None:
            yield native_weight
        if isinstance(weight, QuantizedTensor):
            now = replace(weight, packed=weight.packed.data, scales=weight.scales.data)
            new_handle = self._make_and_cache_handle_or_none(now, cache_key)
            if new_handle is not None:
                weight.cache[cache_key] = new_handle
                yield new_handle.handle, now.packed, now.scales

    def _make_and_cache_handle_or_none(self, weight: QuantizedTensor, cache_key: str) -> NativeWeightHandle | None:
        """Make and cache the C handle of a weight for one use, or return None where C cannot read the weight."""
        packed, scales = weight.packed, weight.scales
        if (packed.shape, packed.dtype, scales.shape, scales.dtype) != weight.stored_layout or len(weight.shape) != 2:
            return None
        rows, columns = weight.shape
        without_offsets = cache_key in (_BASE, _BASE_IN_INT8)
        if not columns or (without_offsets and not weight.has_offsets):
            return None
        form = get_format(weight.format)
        points, levels = form.divisor if form.width.is_centered else 0, form.levels
        if cache_key in (_IN_INT8, _BASE_IN_INT8) and not form.width.is_centered:
            points, levels = int8_rounding.step_count_and_rounded_levels(levels)
        handle = self.native.prepare(
            self._order(self._isa, columns, weight.block_size),
            self._isa,
            packed,
            scales,
            0 if form.width.is_centered else c_float_array(levels).buffer_info()[0],  # C computes centered ones
            _ENCODINGS[weight.encoding.name.removesuffix("_offsets"), weight.encoding.signed],
            weight.block_size,
            rows,
            columns,
            points,
            weight.has_offsets * (1 if without_offsets else 2),
        )
        if handle is None:
            return None
        new_handle = weight.cache[cache_key] = NativeWeightHandle(
            self, handle
        )  # returned, since another thread may replace the cached one
        return new_handle


def _can_quantize_in_c(target: QuantizedTensor) -> bool:
    """Whether C quantizes into a matrix: it searches for no scales of centered codes."""
    return not target.has_offsets and (not get_format(target.format).width.is_centered or target.method == "absmax")


def _is_c_readable_matrix(matrix: Tensor) -> bool:
    """Whether C may read the numbers of a matrix where they lie."""
    return matrix.dtype in TYPES and matrix.is_contiguous() and is_plain_cpu_tensor(matrix)


def _square_sums_over_rows(row_squares: Tensor) -> Squares:
    """Return the sums over the rows of (rows, 2), exactly rounded: the same for any number of threads."""
    lost, size = row_squares.t().tolist()
    return Squares(math.fsum(lost), math.fsum(size))


def pad_memory_against_nan_leak(x: Tensor) -> Tensor:
    """Return an input for torch's products, with zeros behind its rows where one of them begins with NaN or infinity.

    On processors with AMX torch (oneDNN) reads bfloat16 rows in whole tiles. It multiplies what it reads of the next
    row by zeros, which makes NaN of what is not finite, in a row that is.
    """
    missing = -x.shape[1] % _TILE
    if x.dtype is not torch.bfloat16 or not missing or bool(x[1:, :_TILE].isfinite().all()):
        return x
    return functional.pad(x, (0, missing))[:, : x.shape[1]]


def _apply_to_batch_chunks_or_none(
    x: Tensor,
    scratch_bytes_per_row: int,
    scratch_limit: int,
    out_dtype: torch.dtype,
    function: Callable[[Tensor], Tensor | None],
) -> Tensor | None:
    """Apply a function to chunks of the batch whose scratch, ``scratch_bytes_per_row`` a row, stays below
    ``scratch_limit``; the result is in ``out_dtype``, or None where the function returns None."""
    step, out = max(1, scratch_limit // max(1, scratch_bytes_per_row)), None
    if len(x) <= step:
        made = function(x)
        return None if made is None else made.to(out_dtype)
    for start in range(0, len(x), step):
        made = function(x[start : start + step])
        if made is None:
            return None
        if out is None:
            out = made.new_empty(len(x), made.shape[1], dtype=out_dtype)
        out[start : start + step] = made
    return out


def _row_slices_and_decoded_offsets(weight: QuantizedTensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of a matrix and their offsets, in float32: (rows, blocks)."""
    rows, columns = weight.shape
    step = max(1, _OFFSETS_CHUNK // (4 * -(-columns // weight.block_size)))
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        yield chunk, weight.encoding.decode_offsets(weight.scales[chunk])


def _near_equal_slices(length: int, multiple_of: int = 1, target_size: int = _TORCH_CHUNK) -> list[slice]:
    """Return slices of ``length`` rows or columns: of one size or so, at most half more than ``target_size``, in
    steps."""
    size = -(-length // max(1, round(length / target_size)))
    size = min(length, -(-size // multiple_of) * multiple_of)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
