"""The binding of the compiled CPU kernel (``csrc/``).

What C does not take goes to plain torch: another device or dtype, a wrapped or traced tensor.
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
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem.kernels import int8, reference
from lowmem.kernels.memory import TYPES, is_float, is_real, is_traced, is_vector
from lowmem.quant.backend import Backend, LowRank, Weight
from lowmem.quant.formats import get_format
from lowmem.quant.search import CANDIDATES
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Kernel", "backends", "load"]

# enum encoding of csrc/kernel.h, of a name that holds signs or not
_ENCODINGS = {("float32", True): 0, ("float16", True): 1, ("double", False): 2, ("double", True): 3}

Given: TypeAlias = tuple[object, Tensor, Tensor | None]
"""A weight as C is handed it: its handle, codes and scales; or None, 16-bit floats and None."""

_NO_LOW_RANK = (None, None, None)

_AS_FLOATS, _IN_INT8 = "prepared", "prepared_int8"  # uses of a weight, and where it keeps what C knows of it for them

_ROUNDED_BYTES = 2**19  # of what rounding inputs to 8 bits takes


SOURCES = Path(__file__).with_name("csrc")  # which no wheel has


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str]:
    """Return the compiled module and how it computes; or None and the reason why there is none."""
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
    if any(_native.share_threads(path) for path in libraries):
        return _native, "compiled C on torch's threads"
    return _native, "compiled C on one thread, since torch's OpenMP library was not found"


@lru_cache(maxsize=1)
def backends() -> tuple[list[Backend], str]:
    """Return a kernel for each ISA that this processor has, the slowest first, and how they compute; or why none."""
    native, why = load()
    return [Kernel(native, name) for name in native.levels()] if native else [], why


def is_forgotten(platform: str, csrc: Path = SOURCES) -> bool:
    """Whether this is a source tree whose kernel could have been compiled: its sources and a compiler are there."""
    if platform == "win32" or sysconfig.get_config_var("Py_GIL_DISABLED") or not csrc.is_dir():
        return False  # setup.py compiles none, or this is no source tree
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    return shutil.which(command[0]) is not None


def without_kernel(reason: object, platform: str) -> str:
    """Say why there is no compiled kernel, and what would change that on a platform of ``sys.platform``'s names."""
    remedy = "lowmem has none on Windows" if platform == "win32" else "installing from source needs a C compiler"
    return f"the compiled kernel cannot be imported ({reason}); {remedy}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """The C handle of a 4-bit weight; valid while what is stored keeps its address and layout, which C checks."""

    kernel: Kernel
    handle: object


class Kernel:
    """The backend in C for one ISA.

    Args:
        native: the module that ``load`` returns.
        name: of the ISA, one of ``native.levels()``.
    """

    def __init__(self, native: ModuleType, name: str) -> None:
        self.native, self.name = native, name
        self._level = native.levels().index(name)
        # Faster than attributes of attributes, and with types.
        self._linear: Callable[..., Tensor | None] = native.linear
        self._linear8: Callable[..., Tensor | None] = native.linear_int8
        self._input_grad: Callable[..., Tensor | None] = native.input_grad
        self._update: Callable[..., Tensor | None] = native.update
        self._order = lru_cache(maxsize=64)(native.order)  # a table of the columns, shared by layers of one shape

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """Return ``x @ W.T + bias``, and what a low-rank product adds: (batch, in) -> (batch, out)."""
        if is_traced():
            return reference.linear(x, weight, dtype, bias, low_rank)
        given = self._given(weight)
        if x.dtype is dtype and given is not None:
            handle, packed, scales = given
            a, b, scaling = _NO_LOW_RANK if low_rank is None else low_rank
            threads = torch.get_num_threads()
            out = self._linear(self._level, handle, packed, scales, x, bias, threads, a, b, scaling)
            if out is not None:
                return out
        out = self._linear_of_others(x, weight, dtype, bias)
        return out if low_rank is None else self.add_low_rank(out, x, *low_rank)

    def _linear_of_others(self, x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """Put in a form that C takes what it does not take as it is, or leave it to plain torch."""
        if dtype is torch.int8:
            return self._linear_int8(x, weight, bias)
        if dtype not in TYPES or not (is_real(x) and x.is_floating_point() and x.dim() == 2):
            return reference.linear(x, weight, dtype, bias)
        x, threads = x.to(dtype).contiguous(), torch.get_num_threads()
        added = bias if bias is not None and is_vector(bias, weight.shape[0]) else None
        for given in self._ways(weight):
            out = self._linear(self._level, *given, x, added, threads, *_NO_LOW_RANK)
            if out is not None:
                return out if bias is None or added is bias else out.add_(bias)
        return reference.linear(x, weight, dtype, bias)

    def _linear_int8(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """Take products in 8-bit integers, or in float32 of what is rounded to them, or leave them to plain torch."""
        given, threads = self._given(weight, _IN_INT8), torch.get_num_threads()
        if given is not None:
            out = self._linear8(self._level, *given, x, bias, threads)
            if out is not None:
                return out
        if isinstance(weight, QuantizedTensor) and x.dtype in TYPES and x.dim() == 2 and is_real(x):
            x = x.contiguous()
            bias = bias if bias is None or is_vector(bias, weight.shape[0]) else bias.float().contiguous()
            for given in self._ways(weight, _IN_INT8):
                out = self._linear8(self._level, *given, x, bias, threads)
                if out is None:
                    out = self._few_in_int8(given, x, weight, bias)
                if out is not None:
                    return out
        return reference.linear(x, weight, torch.int8, bias)

    def _few_in_int8(self, given: Given, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor | None:
        """Do it with a few inputs at a time, in float32, and those of which C refuses one rounded by torch."""
        out = x.new_empty(x.shape[0], weight.shape[0])
        of_one = int8.BYTES_PER_NUMBER * x.shape[1] + 4 * weight.shape[0]
        threads, step = torch.get_num_threads(), max(1, _ROUNDED_BYTES // max(1, of_one))
        for few, into in zip(x.split(step), out.split(step), strict=True):
            wide = few.float()
            product = self._linear8(self._level, *given, wide, bias, threads)
            if product is None:
                rounded = int8.round_inputs(wide, weight.block_size).contiguous()
                product = self._linear(self._level, *given, rounded, bias, threads, *_NO_LOW_RANK)
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
            out = self._input_grad(self._level, *given, grad, torch.get_num_threads())
            if out is not None:
                return out
        if dtype in TYPES and is_real(grad):
            ready, threads = grad.to(dtype).contiguous(), torch.get_num_threads()
            for given in self._ways(weight):
                out = self._input_grad(self._level, *given, ready, threads)
                if out is not None:
                    return out
        return reference.input_grad(grad, weight, dtype)

    def add_low_rank(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), of (batch, in), (rank, in), (out, rank)."""
        if not is_traced():
            out = self._update(self._level, base, x, a, b, scaling, torch.get_num_threads())
            if out is not None:
                return out
        return reference.add_low_rank(base, x, a, b, scaling)

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows of W, restored in float32 and rounded once to ``dtype``."""
        if dtype in TYPES and not is_traced():
            start, stop, _ = rows.indices(weight.shape[0])
            out = weight.packed.new_empty(max(0, stop - start), weight.shape[-1], dtype=dtype)
            for given in self._ways(weight):
                if self.native.restore(self._level, *given, start, out, torch.get_num_threads()) is not None:
                    return out
        return reference.dequantize(weight, rows, dtype)

    def quantize_rows(self, rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> None:
        """Quantize float32 (rows, n) into a chunk of a matrix."""
        form, size, packed, stored = get_format(into.format), into.block_size, into.packed[chunk], into.scales[chunk]
        encoding = _ENCODINGS[into.encoding.name, into.encoding.signed]
        fits = is_float(rows) and all(is_real(t) and t.is_contiguous() for t in (packed, stored))
        if importance is not None:
            fits = fits and is_float(importance) and importance.shape == rows.shape[1:]
        if not fits or is_traced() or not rows.numel():
            return reference.quantize_rows(rows, into, chunk, importance)
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
            reference.quantize_rows(rows, into, chunk, importance)  # raises, and says why
        return None

    def _given(self, weight: Weight, use: str = _AS_FLOATS) -> Given | None:
        """Return a weight as C is handed it, which it may be told of now; or None where C cannot read it."""
        if not isinstance(weight, QuantizedTensor):  # faster than to ask for a tensor
            return None, weight, None
        kept: Prepared | None = weight.cache.get(use)
        if kept is None or kept.kernel is not self:
            kept = self._prepare(weight, use)
        return None if kept is None else (kept.handle, weight.packed, weight.scales)

    def _ways(self, weight: Weight, use: str = _AS_FLOATS) -> Iterator[Given]:
        """Yield a weight as C is handed it: by its handle; and where that is not valid any more, by a new one.

        The new one is of a snapshot, which no other thread can assign to: C always takes it.
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

    def _prepare(self, weight: QuantizedTensor, use: str) -> Prepared | None:
        """Let C know a weight for one of its uses, or return None where it cannot read it."""
        packed, scales = weight.packed, weight.scales
        if (packed.shape, packed.dtype, scales.shape, scales.dtype) != weight.stored_layout or len(weight.shape) != 2:
            return None
        rows, columns = weight.shape
        if not columns:
            return None
        points, form = 0, get_format(weight.format).levels
        if use == _IN_INT8:
            points, form = int8.on_a_grid(form)
        levels = _floats(form)
        handle = self.native.prepare(
            self._order(self._level, columns, weight.block_size),
            self._level,
            packed,
            scales,
            levels.buffer_info()[0],
            _ENCODINGS[weight.encoding.name, weight.encoding.signed],
            weight.block_size,
            rows,
            columns,
            points,
        )
        if handle is None:
            return None
        kept = weight.cache[use] = Prepared(self, handle)  # where a kernel in another thread may put its own
        return kept


@lru_cache(maxsize=64)
def _floats(values: tuple[float, ...]) -> array[float]:
    return array("f", values)  # not a tensor, which a mode that is active now could replace


def _bits(value: float) -> int:
    return int.from_bytes(array("f", [value]).tobytes(), "little")
