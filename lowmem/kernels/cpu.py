"""The binding of the compiled CPU kernel (``csrc/``).

What C does not take falls back to ``reference``: other devices and dtypes, wrapped and traced tensors.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from lowmem.kernels import int8, reference
from lowmem.kernels.cpu_rows import CpuRows
from lowmem.kernels.memory import TYPES, floats, is_float, is_real, is_traced, is_vector, unseen
from lowmem.kernels.threads import usable_cpus
from lowmem.quant.backend import Backend, LowRank, Weight
from lowmem.quant.formats import get_format
from lowmem.quant.search import CANDIDATES, block_sums, spread
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Kernel", "backends", "load"]

# (name, signed) of a scale encoding -> enum encoding of csrc/kernel.h
_ENCODINGS = {("float32", True): 0, ("float16", True): 1, ("double", False): 2, ("double", True): 3}

Given: TypeAlias = tuple[object, Tensor, Tensor | None]
"""A weight as C takes it: (handle, codes, scales) in 4 bits, (None, weight, None) in 16 bits."""

_NO_LOW_RANK = (None, None, None)

_AS_FLOATS, _IN_INT8 = "prepared", "prepared_int8"  # keys of ``QuantizedTensor.cache``: a C handle for each use
_BASE, _BASE_IN_INT8 = "prepared_base", "prepared_base_int8"  # of a weight that has offsets, without these

OFFSETS_SCRATCH = 2**23
"""Bytes that a product with offsets takes at most beside its result, unless one row of the input takes more."""
_OFFSETS_CHUNK = 2**20  # bytes of offsets that are decoded at a time
_ROUNDED_BYTES = 2**19  # scratch limit for rounding inputs to 8 bits

# Rows, or columns, of a weight that are dequantized at a time where torch multiplies: up to half more, so that the
# chunks of one weight have about one size.
_TORCH_CHUNK = 512

_TILE = 32  # columns in bfloat16 of a tile of AMX

_OPERATIONS = {"linear": 0, "linear_inputs8": 1, "input_grad": 2}  # enum operation of csrc/plan.h

Asked: TypeAlias = tuple[str, str, int, int, "str | None"]
"""A kernel that the plan asks: ISA, name, least and most rows of an input, and why it refuses, or None."""


SOURCES = Path(__file__).with_name("csrc")  # missing in wheels


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str]:
    """Return the compiled module and how it computes; or None and why it cannot be imported."""
    try:
        import lowmem.kernels._native as _native
    except ImportError as reason:
        if is_forgotten(sys.platform):
            warnings.warn(
                "lowmem runs from its source tree, which has no compiled kernel: plain torch serves, up to 30 times "
                "slower; compile it with: pip install -e .",
                stacklevel=2,
            )
        return None, without_kernel(reason, sys.platform)
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    _native.use_torch(Tensor, Parameter, table, torch._C._to_dlpack)
    package = Path(torch.__file__).parent
    bundled = [*(package / "lib").glob("lib*omp*"), *(package.parent / "torch.libs").glob("lib*omp*")]
    libraries = [*sorted(map(str, bundled)), "libgomp.so.1", "libomp.so", "libiomp5.so"]
    _native.limit_threads(usable_cpus(), True)
    if any(_native.share_threads(path) for path in libraries):
        return _native, "compiled C on torch's threads"
    return _native, "compiled C on one thread, since torch's OpenMP library was not found"


@lru_cache(maxsize=1)
def backends() -> tuple[list[Backend], str]:
    """Return a kernel for each ISA of this processor, the slowest first, and how they compute; or none, and why."""
    native, why = load()
    return [Kernel(native, name) for name, runs in native.isas() if runs] if native else [], why


def is_forgotten(platform: str, csrc: Path = SOURCES) -> bool:
    """Whether this is a source tree whose kernel could be compiled: C sources and a compiler are there."""
    if platform == "win32" or sysconfig.get_config_var("Py_GIL_DISABLED") or not csrc.is_dir():
        return False  # setup.py skips the kernel there, or this is no source tree
    return shutil.which(compiler()[0]) is not None


def compiler() -> list[str]:
    """Return the command of the C compiler that an installation from source runs."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def without_kernel(reason: object, platform: str) -> str:
    """Return why there is no compiled kernel, with the remedy on ``platform`` (as ``sys.platform`` names it)."""
    remedy = "lowmem has none on Windows" if platform == "win32" else "installing from source needs a C compiler"
    return f"the compiled kernel cannot be imported ({reason}); {remedy}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """The C handle of a 4-bit weight; valid while codes and scales keep their address and layout, which C checks."""

    kernel: Kernel
    handle: object


class Kernel(CpuRows):
    """The backend in C for one ISA.

    Args:
        native: the module that ``load`` returns.
        name: of the ISA, one of those of ``native.isas()``.
    """

    def __init__(self, native: ModuleType, name: str) -> None:
        self.native, self.name = native, name
        self._isa = [isa for isa, _ in native.isas()].index(name)
        # Bound once: faster than nested attribute lookups, and typed.
        self._linear: Callable[..., Tensor | Literal[False] | None] = native.linear  # False: the plan says torch
        self._native_linear_inputs8: Callable[..., Tensor | None] = native.linear_inputs8
        self._input_grad: Callable[..., Tensor | Literal[False] | None] = native.input_grad
        self._native_dequantize: Callable[..., Tensor | None] = native.dequantize
        self._update: Callable[..., Tensor | None] = native.update
        self._order = lru_cache(maxsize=64)(native.order)  # the column order, shared by layers of one shape

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """Return ``x @ W.T + bias + s (x @ A.T) @ B.T``: (batch, in) -> (batch, out)."""
        if is_traced():
            return reference.linear(x, weight, dtype, bias, low_rank)
        given = self._given(weight)
        if x.dtype is dtype and given is not None:
            handle, packed, scales = given
            a, b, scaling = _NO_LOW_RANK if low_rank is None else low_rank
            threads = torch.get_num_threads()
            out = self._linear(self._isa, handle, packed, scales, x, bias, threads, a, b, scaling)
            if out is not None and out is not False:
                return out
        out = self._linear_of_others(x, weight, dtype, bias)
        return out if low_rank is None else self.add_low_rank(out, x, *low_rank)

    def _linear_of_others(self, x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """Convert arguments to a form that C takes, or fall back to plain torch."""
        if isinstance(weight, QuantizedTensor) and weight.has_offsets:
            return self._linear_with_offsets(x, weight, dtype, bias)
        if dtype is torch.int8:
            return self._linear_inputs8(x, weight, bias)
        if dtype not in TYPES or not (is_real(x) and x.is_floating_point() and x.dim() == 2):
            return reference.linear(x, weight, dtype, bias)
        x, threads = x.to(dtype).contiguous(), torch.get_num_threads()
        added = bias if bias is not None and is_vector(bias, weight.shape[0]) else None
        for given in self._handles(weight):
            out = self._linear(self._isa, *given, x, added, threads, *_NO_LOW_RANK)
            if out is False:
                out = self._linear_by_torch(x, given, weight.shape, added)
            if out is not None:
                return out if bias is None or added is bias else out.add_(bias)
        return reference.linear(x, weight, dtype, bias)

    def _linear_with_offsets(
        self, x: Tensor, weight: QuantizedTensor, dtype: torch.dtype, bias: Tensor | None
    ) -> Tensor:
        """Multiply by the weight without offsets, and add offsets @ (sums of x over blocks).

        In float32, since the two may be larger than their sum; a few inputs at a time, so that what is beside the
        result stays below ``OFFSETS_SCRATCH``.
        """
        if not ((dtype in TYPES or dtype is torch.int8) and is_real(x) and x.is_floating_point() and x.dim() == 2):
            return reference.linear(x, weight, dtype, bias)
        in_int8, blocks = dtype is torch.int8, -(-weight.shape[1] // weight.block_size)

        def of_few(few: Tensor) -> Tensor | None:
            wide = few.float() if in_int8 else few.to(dtype).float()
            product = self._base_product(wide.contiguous(), weight, in_int8)
            if product is None:
                return None
            sums = block_sums(wide, weight.block_size)
            for chunk, offsets in _offsets_of(weight):
                product[:, chunk].addmm_(sums, offsets.t())
            product = product if bias is None else product.add_(bias)
            return product.to(x.dtype if in_int8 else dtype)

        nbytes = 6 * sum(weight.shape) + in_int8 * int8.BYTES_PER_NUMBER * weight.shape[1] + 8 * blocks
        out = _few_at_a_time(x, nbytes, of_few)
        return reference.linear(x, weight, dtype, bias) if out is None else out

    def _base_product(self, x: Tensor, weight: QuantizedTensor, in_int8: bool) -> Tensor | None:
        """Multiply float32 inputs by a weight without its offsets; None: C cannot read it."""
        threads = torch.get_num_threads()
        for given in self._handles(weight, _BASE_IN_INT8 if in_int8 else _BASE):
            product: Tensor | Literal[False] | None = None
            if in_int8:
                product = self._native_linear_inputs8(self._isa, *given, x, None, threads)
                x = x if product is not None else int8.round_inputs(x, weight.block_size).contiguous()
            if product is None:
                product = self._linear(self._isa, *given, x, None, threads, *_NO_LOW_RANK)
            if product is False:
                product = self._linear_by_torch(x, given, weight.shape, None)
            if product is not None:
                return product
        return None

    def _input_grad_with_offsets(self, grad: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor | None:
        """Multiply by the weight without offsets in float32, and add grad @ offsets to each column of a block."""
        size, (rows, columns) = weight.block_size, weight.shape

        def of_few(few: Tensor) -> Tensor | None:
            wide = few.to(dtype).float().contiguous()
            for given in self._handles(weight, _BASE):
                product = self._input_grad(self._isa, *given, wide, torch.get_num_threads())
                if product is False:
                    product = self._input_grad_by_torch(wide, given, weight.shape, size)
                if product is not None:
                    added = wide.new_zeros(wide.shape[0], -(-columns // size))
                    for chunk, offsets in _offsets_of(weight):
                        added.addmm_(wide[:, chunk], offsets)
                    return product.add_(spread(added, size, columns)).to(dtype)
            return None

        return _few_at_a_time(grad, 4 * (rows + 3 * columns), of_few)

    @property
    def fast_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16, so that torch is fast at it."""
        return self.name in ("avx512bf16", "avx512amx")

    def add_product(self, out: Tensor, x: Tensor, weight: Weight, transposed: bool) -> Tensor:
        """Add ``x @ W.T`` to ``out``, or ``x @ W`` if transposed, in place; torch multiplies."""
        if x.dtype in (torch.float32, torch.bfloat16) and is_real(x) and not is_traced():
            for given in self._handles(weight):
                if given[0] is None and given[1].dtype is not x.dtype:
                    break
                if given[0] is not None and self._dequantize(given, 0, 0, x.new_empty(1, weight.shape[1])) is None:
                    continue  # a stale handle
                if not transposed:
                    return self._linear_by_torch(x, given, weight.shape, None, out)
                size = weight.block_size if isinstance(weight, QuantizedTensor) else 1
                return self._input_grad_by_torch(x, given, weight.shape, size, out)
        return reference.add_product(out, x, weight, transposed)

    @unseen
    def _linear_by_torch(
        self, x: Tensor, given: Given, shape: torch.Size, bias: Tensor | None, onto: Tensor | None = None
    ) -> Tensor:
        """Dequantize rows of a weight, a chunk at a time, and multiply each by torch: (batch, in) -> (batch, out).

        The product is added to ``onto``, in place, if that is given.
        """
        if x.dtype is torch.float16:  # the weight would be rounded to it
            return self._linear_by_torch(x.float(), given, shape, bias).to(x.dtype)
        x = rows_apart(x)
        handle, packed, _ = given
        bias = bias if bias is None else bias.to(x.dtype)
        if handle is None:
            return functional.linear(x, packed, bias) if onto is None else onto.addmm_(x, packed.t())
        rows, columns = shape
        out = x.new_empty(x.shape[0], rows) if onto is None else onto
        chunks = _chunks(rows)
        scratch = x.new_empty(chunks[0].stop * columns)
        for chunk in chunks:
            part = scratch[: (chunk.stop - chunk.start) * columns].view(-1, columns)
            self._dequantize(given, chunk.start, 0, part)
            if onto is not None:
                out[:, chunk].addmm_(x, part.t())
            elif bias is None:
                torch.mm(x, part.t(), out=out[:, chunk])
            else:
                torch.addmm(bias[chunk], x, part.t(), out=out[:, chunk])
        return out

    def _input_grad_by_torch(
        self, grad: Tensor, given: Given, shape: torch.Size, block_size: int, onto: Tensor | None = None
    ) -> Tensor:
        """Dequantize columns of a weight, a chunk at a time, and multiply each: (batch, out) -> (batch, in).

        Chunks of columns need no sums over them, which would have to be kept in float32. The product is added to
        ``onto``, in place, if that is given.
        """
        if grad.dtype is torch.float16:  # the weight would be rounded to it
            return self._input_grad_by_torch(grad.float(), given, shape, block_size).to(grad.dtype)
        grad = rows_apart(grad)
        handle, packed, _ = given
        if handle is None:
            return grad @ packed if onto is None else onto.addmm_(grad, packed)
        rows, columns = shape
        out = grad.new_empty(grad.shape[0], columns) if onto is None else onto
        chunks = _chunks(columns, block_size)
        scratch = grad.new_empty(rows * chunks[0].stop)
        for chunk in chunks:
            part = scratch[: rows * (chunk.stop - chunk.start)].view(rows, -1)
            self._dequantize(given, 0, chunk.start, part)
            if onto is None:
                torch.mm(grad, part, out=out[:, chunk])
            else:
                out[:, chunk].addmm_(grad, part)
        return out

    def _dequantize(self, given: Given, row: int, column: int, out: Tensor) -> Tensor | None:
        """Fill ``out`` with what a weight holds from a row and the column of a block on; None: C does not take it."""
        return self._native_dequantize(self._isa, *given, row, column, out, torch.get_num_threads())

    def _linear_inputs8(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """Multiply 8-bit integers; or, in float32, inputs rounded to them; or fall back to plain torch."""
        given, threads = self._given(weight, _IN_INT8), torch.get_num_threads()
        if given is not None:
            out = self._native_linear_inputs8(self._isa, *given, x, bias, threads)
            if out is not None:
                return out
        if isinstance(weight, QuantizedTensor) and x.dtype in TYPES and x.dim() == 2 and is_real(x):
            x = x.contiguous()
            bias = bias if bias is None or is_vector(bias, weight.shape[0]) else bias.float().contiguous()
            for given in self._handles(weight, _IN_INT8):
                out = self._native_linear_inputs8(self._isa, *given, x, bias, threads)
                if out is None:
                    out = self._few_in_int8(given, x, weight, bias)
                if out is not None:
                    return out
        return reference.linear(x, weight, torch.int8, bias)

    def _few_in_int8(self, given: Given, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor | None:
        """Process the batch in chunks, in float32; round a chunk that C rejects in torch."""
        out = x.new_empty(x.shape[0], weight.shape[0])
        of_one = int8.BYTES_PER_NUMBER * x.shape[1] + 4 * weight.shape[0]
        threads, step = torch.get_num_threads(), max(1, _ROUNDED_BYTES // max(1, of_one))
        for few, into in zip(x.split(step), out.split(step), strict=True):
            wide = few.float()
            product: Tensor | Literal[False] | None
            product = self._native_linear_inputs8(self._isa, *given, wide, bias, threads)
            if product is None:
                rounded = int8.round_inputs(wide, weight.block_size).contiguous()
                product = self._linear(self._isa, *given, rounded, bias, threads, *_NO_LOW_RANK)
            if product is False:
                product = self._linear_by_torch(rounded, given, weight.shape, bias)
            if product is None:
                return None
            into.copy_(product)
        return out

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in)."""
        if is_traced():
            return reference.input_grad(grad, weight, dtype)
        given = self._given(weight)
        if grad.dtype is dtype and given is not None:
            out = self._input_grad(self._isa, *given, grad, torch.get_num_threads())
            if out is not None and out is not False:
                return out
        if dtype in TYPES and is_real(grad) and isinstance(weight, QuantizedTensor) and weight.has_offsets:
            out = self._input_grad_with_offsets(grad, weight, dtype)
            return reference.input_grad(grad, weight, dtype) if out is None else out
        if dtype in TYPES and is_real(grad):
            ready, threads = grad.to(dtype).contiguous(), torch.get_num_threads()
            for given in self._handles(weight):
                out = self._input_grad(self._isa, *given, ready, threads)
                if out is False:
                    size = weight.block_size if isinstance(weight, QuantizedTensor) else 1
                    return self._input_grad_by_torch(ready, given, weight.shape, size)
                if out is not None:
                    return out
        return reference.input_grad(grad, weight, dtype)

    def add_low_rank(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), of (batch, in), (rank, in), (out, rank)."""
        if not is_traced():
            out = self._update(self._isa, base, x, a, b, scaling, torch.get_num_threads())
            if out is not None:
                return out
        return reference.add_low_rank(base, x, a, b, scaling)

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of a 4-bit matrix (out, in), dequantized in float32 and rounded once to ``dtype``."""
        if dtype in TYPES and not is_traced():
            start, stop, _ = rows.indices(weight.shape[0])
            out = weight.packed.new_empty(max(0, stop - start), weight.shape[-1], dtype=dtype)
            for given in self._handles(weight):
                if self._dequantize(given, start, 0, out) is not None:
                    return out
        return reference.dequantize(weight, rows, dtype)

    def quantize_rows(self, rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> None:
        """Quantize float32 (rows, n) into the rows ``chunk`` of the matrix ``into``."""
        if into.has_offsets or get_format(into.format).bits == 8:
            return reference.quantize_rows(rows, into, chunk, importance)
        form, size, packed, stored = get_format(into.format), into.block_size, into.packed[chunk], into.scales[chunk]
        encoding = _ENCODINGS[into.encoding.name, into.encoding.signed]
        fits = is_float(rows) and all(is_real(t) and t.is_contiguous() for t in (packed, stored))
        if importance is not None:
            fits = fits and is_float(importance) and importance.shape == rows.shape[1:]
        if not fits or is_traced() or not rows.numel():
            return reference.quantize_rows(rows, into, chunk, importance)
        levels, boundaries = floats(form.levels), floats(form.boundaries)
        candidates = floats(CANDIDATES if into.method == "search" else ())
        threads, (count, columns) = torch.get_num_threads(), rows.shape
        scratch = rows.new_empty(threads * (-(-columns // size) + size + 64))
        held = self.native.quantize(
            self._isa,
            rows.data_ptr(),
            packed.data_ptr(),
            stored.data_ptr(),
            levels.buffer_info()[0],
            encoding,
            size,
            count,
            columns,
            boundaries.buffer_info()[0],
            *candidates.buffer_info(),
            0 if importance is None else importance.data_ptr(),
            _bits(into.encoding.largest),
            form.zero_code,
            form.signed,
            scratch.data_ptr(),
            threads,
        )
        if not held:
            reference.quantize_rows(rows, into, chunk, importance)  # raises the error
        return None

    def _given(self, weight: Weight, use: str = _AS_FLOATS) -> Given | None:
        """Return a weight as C takes it, making its handle if there is none; None where C cannot read it."""
        if not isinstance(weight, QuantizedTensor):  # faster than isinstance(weight, Tensor)
            return None, weight, None
        kept: Prepared | None = weight.cache.get(use)
        if kept is None or kept.kernel is not self:
            kept = self._prepare(weight, use)
        return None if kept is None else (kept.handle, weight.packed, weight.scales)

    def _handles(self, weight: Weight, use: str = _AS_FLOATS) -> Iterator[Given]:
        """Yield a weight as C takes it: with its cached handle, then, in case that is stale, with a new one.

        The new handle is of a snapshot, to which no other thread can assign data: C always takes it.
        """
        given = self._given(weight, use)
        if given is not None:
            yield given
        if isinstance(weight, QuantizedTensor):
            now = replace(weight, packed=weight.packed.data, scales=weight.scales.data)
            kept = self._prepare(now, use)
            if kept is not None:
                weight.cache[use] = kept
                yield kept.handle, now.packed, now.scales

    def explain(self, weight: Weight, rows: int, dtype: torch.dtype) -> str:
        """Return which kernel computes each product of an input of ``rows`` rows, and why those before it do not."""
        if isinstance(weight, QuantizedTensor) and weight.has_offsets:
            without, in_int8 = replace(weight, scale_encoding="float32"), dtype is torch.int8
            how = "8-bit integers" if in_int8 else "float32"
            added = f"offsets: added in plain torch, to products in {how} without them:"
            return "\n".join([added, self.explain(without, rows, torch.int8 if in_int8 else torch.float32)])
        if dtype is not torch.int8:
            return "\n".join(
                [*self._explained(weight, rows, dtype, "linear"), *self._explained(weight, rows, dtype, "input_grad")]
            )
        if self.plan(weight, rows, dtype, "linear_inputs8"):
            return "\n".join(self._explained(weight, rows, dtype, "linear_inputs8"))
        rounded = f"linear_inputs8: no kernel of {self.name} takes this; torch rounds the input to 8 bits, and then"
        return "\n".join([rounded, *self._explained(weight, rows, torch.float32, "linear")])

    def _explained(self, weight: Weight, rows: int, dtype: torch.dtype, operation: str) -> list[str]:
        *refused, (isa, name, least, most, _) = self.plan(weight, rows, dtype, operation)
        lines = [f"{operation}: {name} of {isa}, which takes {_range(least, most)}"]
        for other, kernel, least, most, why in refused:
            takes = _range(least, most) if why == "rows" else f"other {why}s"
            if why != "operation":
                lines.append(f"  not {kernel} of {other}, which takes {takes}")
        return lines

    def plan(self, weight: Weight, rows: int, dtype: torch.dtype, operation: str) -> list[Asked]:
        """Return the kernels that are asked to compute a product, the last of which does; none: plain torch serves.

        Args:
            weight: (out, in).
            rows: of the input.
            dtype: to compute in.
            operation: linear, linear_inputs8 or input_grad.

        Returns:
            For each its ISA and name, the least and the most rows that it takes, and why it refuses, or None.
        """
        if isinstance(weight, QuantizedTensor):
            size, stored = weight.block_size, get_format(weight.format).bits
        else:
            size, stored = 0, TYPES[weight.dtype]
        given = TYPES[torch.float32 if dtype is torch.int8 else dtype]
        asked: list[Asked] = self.native.plan(self._isa, size, stored, rows, given, _OPERATIONS[operation])
        return asked

    def _prepare(self, weight: QuantizedTensor, use: str) -> Prepared | None:
        """Make and cache the C handle of a weight for one use, or return None where C cannot read the weight."""
        packed, scales = weight.packed, weight.scales
        if (packed.shape, packed.dtype, scales.shape, scales.dtype) != weight.stored_layout or len(weight.shape) != 2:
            return None
        rows, columns = weight.shape
        if not columns or weight.has_offsets != (use in (_BASE, _BASE_IN_INT8)):
            return None
        form = get_format(weight.format)
        points, levels = 0, form.levels
        if use in (_IN_INT8, _BASE_IN_INT8):
            if form.bits == 8:
                return None
            points, levels = int8.rounded_levels(levels)
        handle = self.native.prepare(
            self._order(self._isa, columns, weight.block_size),
            self._isa,
            packed,
            scales,
            floats(levels).buffer_info()[0] if form.bits == 4 else 0,  # C knows those of 8 bits
            _ENCODINGS[weight.encoding.name.removesuffix("_offsets"), weight.encoding.signed],
            weight.block_size,
            rows,
            columns,
            points,
            weight.has_offsets,
        )
        if handle is None:
            return None
        kept = weight.cache[use] = Prepared(self, handle)  # returned, since another thread may replace the cached one
        return kept


def _range(least: int, most: int) -> str:
    if most < 2**62:
        return f"{least} to {most} rows"
    return f"{least} rows and more" if least > 1 else "any number of rows"


def rows_apart(x: Tensor) -> Tensor:
    """Return an input for torch's products, with zeros behind its rows where one of them begins with NaN or infinity.

    On processors with AMX torch (oneDNN) reads bfloat16 rows in whole tiles. It multiplies what it reads of the next
    row by zeros, which makes NaN of what is not finite, in a row that is.
    """
    missing = -x.shape[1] % _TILE
    if x.dtype is not torch.bfloat16 or not missing or bool(x[1:, :_TILE].isfinite().all()):
        return x
    return functional.pad(x, (0, missing))[:, : x.shape[1]]


def _few_at_a_time(x: Tensor, nbytes: int, function: Callable[[Tensor], Tensor | None]) -> Tensor | None:
    """Return what a function makes of an input, of so many rows at a time that their scratch fits into the limit.

    Args:
        x: (batch, n).
        nbytes: the scratch for a row.
        function: may return None, for any rows.
    """
    step = max(1, (OFFSETS_SCRATCH - 4 * _OFFSETS_CHUNK) // nbytes)  # the rest: offsets, and what torch multiplies
    if len(x) <= step:
        return function(x)
    out: Tensor | None = None
    for start in range(0, len(x), step):
        made = function(x[start : start + step])
        if made is None:
            return None
        if out is None:
            out = made.new_empty(len(x), made.shape[1])
        out[start : start + step] = made
    return out


def _offsets_of(weight: QuantizedTensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of a matrix and their offsets, in float32: (rows, blocks)."""
    rows, columns = weight.shape
    step = max(1, _OFFSETS_CHUNK // (4 * -(-columns // weight.block_size)))
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        yield chunk, weight.encoding.decode_offsets(weight.scales[chunk])


def _chunks(count: int, step: int = 1) -> list[slice]:
    """Return slices of ``count`` rows or columns: about ``_TORCH_CHUNK`` each, of about one size, in whole steps."""
    size = -(-count // max(1, round(count / _TORCH_CHUNK)))
    size = min(count, -(-size // step) * step)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _bits(value: float) -> int:
    return int.from_bytes(array("f", [value]).tobytes(), "little")
