"""The binding of the compiled CPU kernel (``csrc/``).

What C does not take goes to plain torch: another device or dtype, a wrapped or traced tensor.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lowmem import blockwise
from lowmem.blockwise import QuantizedTensor
from lowmem.formats import get_format
from lowmem.kernels import reference
from lowmem.kernels.memory import HALVES, TYPES, Prepared, bias_arguments, is_float, is_real, is_traced, takes
from lowmem.kernels.reference import Weight
from lowmem.search import CANDIDATES

__all__ = ["Kernel", "load"]

# enum encoding of csrc/kernel.h, of a name that holds signs or not
_ENCODINGS = {("float32", True): 0, ("float16", True): 1, ("double", False): 2, ("double", True): 3}

_UPDATE_BATCH = 12  # beyond, torch's own products are faster
_WIDE_BYTES = 2**18  # of a float32 output for rows that C adds up in parts


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str]:
    """Return the compiled module and whose threads it uses; or None and the reason why there is none."""
    try:
        from lowmem.kernels import _native
    except ImportError as reason:
        return None, f"the compiled kernel cannot be imported ({reason}); installing from source needs a C compiler"
    package = Path(torch.__file__).parent
    bundled = [*(package / "lib").glob("lib*omp*"), *(package.parent / "torch.libs").glob("lib*omp*")]
    libraries = [*sorted(map(str, bundled)), "libgomp.so.1", "libomp.so", "libiomp5.so"]
    if any(_native.share_threads(path) for path in libraries):
        return _native, "on torch's threads"
    return _native, "on one thread, since torch's OpenMP library was not found"


class Kernel:
    """The contract of ``lowmem.kernels`` at one level of the compiled kernel.

    Args:
        native: the module that ``load`` returns.
        level: one of ``native.levels()``.
    """

    def __init__(self, native: ModuleType, level: str) -> None:
        self.native = native
        self._level = native.levels().index(level)
        self._order = lru_cache(maxsize=64)(native.order)  # a table of the columns, shared by layers of one shape
        self._known_half = lru_cache(maxsize=256)(self._new_half)  # true of any weight that lies there

    def linear(self, x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``: (batch, in) -> (batch, out)."""
        rows, columns = weight.shape
        prepared = self._prepare(weight)
        kind = TYPES.get(dtype)
        batch = takes(x, columns)
        if prepared is None or kind is None or not batch or rows == 0:
            return reference.linear(x, weight, dtype, bias)
        if x.dtype is not dtype:
            if not x.is_floating_point():
                return reference.linear(x, weight, dtype, bias)  # raises
            x = x.to(dtype)
        if not x.is_contiguous():
            x = x.contiguous()
        added = (0, 0) if bias is None else bias_arguments(bias, rows)
        out = x.new_empty(batch, rows)
        if columns > self.native.WIDE and kind:
            self._multiply_wide(prepared, x, out, kind, added or (0, 0))
        else:
            self._multiply(prepared, x, out, batch, kind, kind, added or (0, 0))
        return out if added is not None or bias is None else out.add_(bias)

    def _multiply(
        self,
        prepared: Prepared,
        x: Tensor,
        out: Tensor,
        batch: int,
        kind: int,
        out_kind: int,
        added: tuple[int, int],
    ) -> None:
        threads = torch.get_num_threads()
        scratch = x.new_empty(prepared.scratch(batch, threads, False, kind) // x.itemsize)
        self.native.linear(
            prepared.handle, x.data_ptr(), *added, out.data_ptr(), scratch.data_ptr(), batch, threads, kind, out_kind
        )

    def _multiply_wide(self, prepared: Prepared, x: Tensor, out: Tensor, kind: int, added: tuple[int, int]) -> None:
        """Sum in float32, a few inputs at a time, and round once: a row beyond WIDE is added up in parts."""
        step = max(1, _WIDE_BYTES // (4 * out.shape[1]))
        for part, rounded in zip(x.split(step), out.split(step), strict=True):
            sums = torch.empty_like(rounded, dtype=torch.float32)
            self._multiply(prepared, part, sums, len(part), kind, 0, added)
            rounded.copy_(sums)

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in)."""
        rows, columns = weight.shape
        prepared = self._prepare(weight)
        kind = TYPES.get(dtype)
        batch = takes(grad, rows)
        if prepared is None or kind is None or not batch or columns == 0:
            return reference.input_grad(grad, weight, dtype)
        grad = grad.to(dtype).contiguous()
        threads = torch.get_num_threads()
        out = grad.new_empty(batch, columns)
        scratch = grad.new_empty(prepared.scratch(batch, threads, True, kind) // grad.itemsize)
        self.native.input_grad(
            prepared.handle, grad.data_ptr(), 0, 0, out.data_ptr(), scratch.data_ptr(), batch, threads, kind, kind
        )
        return out

    def add_update(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), of (batch, in), (rank, in), (out, rank)."""
        batch, rows, (rank, columns) = base.shape[0], base.shape[1], a.shape
        if (
            not 0 < batch <= _UPDATE_BATCH
            or 0 in (rows, columns)
            or x.shape != (batch, columns)
            or b.shape != (rows, rank)
            or not (is_float(base) and is_float(x) and is_float(a) and is_float(b))
            or is_traced()
        ):
            return reference.add_update(base, x, a, b, scaling)
        narrow, out = x.new_empty(batch, rank), x.new_empty(batch, rows)
        self.native.update(
            self._level,
            x.data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            base.data_ptr(),
            narrow.data_ptr(),
            out.data_ptr(),
            batch,
            rank,
            rows,
            columns,
            torch.get_num_threads(),
            scaling,
        )
        return out

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows of W, restored in float32 and rounded once to ``dtype``."""
        prepared = self._prepare(weight)
        if prepared is None or dtype not in TYPES:
            return blockwise.PLAIN.dequantize(weight, rows, dtype)
        start, stop, _ = rows.indices(weight.packed.shape[0])
        out = weight.packed.new_empty(max(0, stop - start), weight.shape[-1], dtype=dtype)
        if out.numel():
            threads = torch.get_num_threads()
            self.native.restore(prepared.handle, start, out.shape[0], out.data_ptr(), threads, TYPES[dtype])
        return out

    def quantize_rows(self, rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> None:
        """Quantize float32 (rows, n) into a chunk of a matrix."""
        form, size, packed, stored = get_format(into.format), into.block_size, into.packed[chunk], into.scales[chunk]
        encoding = _ENCODINGS[into.encoding.name, into.encoding.signed]
        fits = is_float(rows) and all(is_real(t) and t.is_contiguous() for t in (packed, stored))
        if importance is not None:
            fits = fits and is_float(importance) and importance.shape == rows.shape[1:]
        if not fits or is_traced() or not rows.numel():
            return blockwise.PLAIN.quantize_rows(rows, into, chunk, importance)
        levels, boundaries = _floats(form.levels), _floats(form.boundaries)
        candidates = _floats(CANDIDATES if into.method == "search" else ())
        threads, (count, columns) = torch.get_num_threads(), rows.shape
        scratch = rows.new_empty(threads * (-(-columns // size) + size + 64))
        held = self.native.quantize(
            self._level,
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
            blockwise.PLAIN.quantize_rows(rows, into, chunk, importance)  # raises, and says why
        return None

    def _prepare(self, weight: Weight) -> Prepared | None:
        """Return a weight as C knows it, or None where C cannot read it."""
        if torch.compiler.is_compiling() or is_traced():
            return None
        if not isinstance(weight, QuantizedTensor):
            return self._prepare_half(weight)
        kept: Prepared | None = weight.__dict__.get("prepared")
        packed, scales = weight.packed, weight.scales
        if (
            kept is not None
            and kept.kernel is self
            and packed.data_ptr() == kept.packed
            and scales.data_ptr() == kept.scales
            and packed.shape == kept.packed_shape
            and scales.shape == kept.scales_shape
            and packed.is_contiguous()
            and scales.is_contiguous()
        ):
            return kept
        encoding = _ENCODINGS[weight.encoding.name, weight.encoding.signed]
        if not (
            (packed.shape, packed.dtype, scales.shape, scales.dtype) == weight.stored_layout
            and len(weight.shape) == 2
            and weight.shape[1] > 0
            and is_real(packed)
            and is_real(scales)
            and packed.is_contiguous()
            and scales.is_contiguous()
        ):
            return None
        rows, columns = weight.shape
        levels = _floats(get_format(weight.format).levels)
        handle = self.native.prepare(
            self._order(self._level, columns, weight.block_size),
            self._level,
            packed.data_ptr(),
            scales.data_ptr(),
            levels.buffer_info()[0],
            encoding,
            weight.block_size,
            rows,
            columns,
        )
        kept = Prepared(self, handle, levels, packed, scales)
        weight.__dict__["prepared"] = kept
        return kept

    def _prepare_half(self, weight: Tensor) -> Prepared | None:
        if not (
            weight.dtype in HALVES
            and weight.dim() == 2
            and weight.shape[1] > 0
            and is_real(weight)
            and weight.is_contiguous()
        ):
            return None
        return self._known_half(weight.data_ptr(), TYPES[weight.dtype], *weight.shape)

    def _new_half(self, address: int, kind: int, rows: int, columns: int) -> Prepared:
        handle = self.native.prepare(None, self._level, address, 0, 0, kind, 0, rows, columns)
        return Prepared(self, handle)


@lru_cache(maxsize=64)
def _floats(values: tuple[float, ...]) -> array[float]:
    return array("f", values)  # not a tensor, which a mode that is active now could replace


def _bits(value: float) -> int:
    return int.from_bytes(array("f", [value]).tobytes(), "little")
