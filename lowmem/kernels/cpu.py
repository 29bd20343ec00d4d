"""The binding of the compiled CPU kernel (``csrc/``): float32 products with 4-bit and 16-bit weights.

What C does not take goes to the reference: another device or dtype, a wrapped or traced tensor, and large
batches, for which a chunk of rows is restored and the product left to torch's own matrix multiplication.
The checks that keep C from reading past an end are all here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowmem.blockwise import SCRATCH_BYTES, QuantizedTensor
from lowmem.formats import get_format
from lowmem.kernels import reference
from lowmem.kernels.reference import Weight

__all__ = ["Kernel", "load"]

# enum encoding of csrc/kernel.h
_ENCODINGS = {"float32": 0, "float16": 1, "double": 2}
_HALVES = {torch.float16: 3, torch.bfloat16: 4}

# The batches from which on torch's own product is faster.
LINEAR_BATCH = 192
INPUT_GRAD_BATCH = 6

_GRAIN = 2**16  # multiplications that are worth a thread

_PLAIN = (Tensor, torch.nn.Parameter)
_KEYS = torch._C._TorchDispatchModeKey
_RECORDERS = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)


@cache
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
        self._native = native
        self._level = native.levels().index(level)

    def linear(self, x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``: (batch, in) -> (batch, out)."""
        if not self._multiplies(x, weight, dtype, LINEAR_BATCH, 1):
            return reference.linear(x, weight, dtype, bias, **self._restoring(weight, dtype))
        run = self._native.linear if isinstance(weight, QuantizedTensor) else self._native.half_linear
        plain = bias is None or (bias.dtype == torch.float32 and bias.is_contiguous() and _real(bias))
        if bias is None or (plain and bias.shape == weight.shape[:1]):
            return self._product(run, x, weight, weight.shape[0], bias)
        return self._product(run, x, weight, weight.shape[0], None).add_(bias)

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in)."""
        if isinstance(weight, QuantizedTensor) and self._multiplies(grad, weight, dtype, INPUT_GRAD_BATCH, 0):
            return self._product(self._native.input_grad, grad, weight, weight.shape[1], None)
        return reference.input_grad(grad, weight, dtype, **self._restoring(weight, dtype))

    def restore(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows of W, restored in float32 and rounded once to ``dtype``."""
        start, stop, _ = rows.indices(weight.shape[0])
        out = torch.empty(stop - start, weight.shape[1], dtype=torch.float32, device="cpu")
        threads = _threads(out.numel())
        numbers = self._numbers(weight, threads, weight.packed[start:stop], weight.scales[start:stop], stop - start)
        scratch = torch.empty(self._native.scratch(*numbers, 0), dtype=torch.uint8, device="cpu")
        if out.numel():
            self._native.restore(*numbers, 0, 0, out.data_ptr(), 0, scratch.data_ptr())
        return out.to(dtype)

    def _product(
        self, run: Callable[..., None], x: Tensor, weight: Weight, features: int, bias: Tensor | None
    ) -> Tensor:
        x = x.to(torch.float32).contiguous()
        rows, columns = weight.shape
        batch = x.shape[0]
        out = torch.empty(batch, features, dtype=torch.float32, device="cpu")
        piece = min(batch, max(1, SCRATCH_BYTES // (8 * columns)))  # inputs whose sorted copy takes half the scratch
        threads = _threads(rows * columns * piece)
        if isinstance(weight, QuantizedTensor):
            numbers = self._numbers(weight, threads, weight.packed, weight.scales, rows)
        else:
            numbers = (self._level, threads, weight.data_ptr(), 0, 0, _HALVES[weight.dtype], 4096, rows, columns)
        scratch = torch.empty(self._native.scratch(*numbers, piece), dtype=torch.uint8, device="cpu").data_ptr
        added = 0 if bias is None else bias.data_ptr()
        for start in range(0, batch, piece):
            part, to = x[start : start + piece], out[start : start + piece]
            run(*numbers, part.data_ptr(), added, to.data_ptr(), part.shape[0], scratch())
        return out

    def _numbers(
        self, weight: QuantizedTensor, threads: int, packed: Tensor, scales: Tensor, rows: int
    ) -> tuple[int, ...]:
        return (
            self._level,
            threads,
            packed.data_ptr(),
            scales.data_ptr(),
            _levels(weight.format).buffer_info()[0],
            _ENCODINGS[weight.scale_encoding],
            weight.block_size,
            rows,
            weight.shape[1],
        )

    def _restoring(self, weight: Weight, dtype: torch.dtype) -> dict[str, Any]:
        """Return how the reference can restore rows faster, and the scratch a weight that it then takes."""
        if not isinstance(weight, QuantizedTensor) or not _readable(weight):
            return {}
        cast = 0 if dtype == torch.float32 else dtype.itemsize
        return {"restore": partial(self.restore, weight), "bytes_per_weight": 5 + cast}  # float32, a cast, scales

    @staticmethod
    def _multiplies(x: Tensor, weight: Weight, dtype: torch.dtype, most: int, contracted: int) -> bool:
        """Whether C takes the product: blocks of whole 32-bit words, and a batch that is not too large for it."""
        return (
            dtype == torch.float32
            and x.dim() == 2
            and 0 < x.shape[0] < most
            and _readable(weight)
            and x.shape[1] == weight.shape[contracted] > 0
            and weight.shape.numel() > 0
            and _real(x)
            and not (isinstance(weight, QuantizedTensor) and weight.block_size % 8)
        )


def _readable(weight: Weight) -> bool:
    """Whether C may read a weight: a matrix that is stored as its shape and encoding say, contiguously."""
    if torch.compiler.is_compiling() or _is_traced():
        return False
    if not isinstance(weight, QuantizedTensor):
        return weight.dim() == 2 and weight.dtype in _HALVES and _real(weight) and weight.is_contiguous()
    packed, scales = weight.packed, weight.scales
    return (
        len(weight.shape) == 2
        and (packed.shape, packed.dtype, scales.shape, scales.dtype) == weight.stored_layout
        and _real(packed)
        and _real(scales)
        and packed.is_contiguous()
        and scales.is_contiguous()
    )


def _real(tensor: Tensor) -> bool:
    """Whether a tensor's memory on the CPU is its value: no wrapper, no lazy negation, no zero without memory."""
    return type(tensor) in _PLAIN and tensor.is_cpu and not tensor.is_neg() and not tensor._is_zerotensor()


def _is_traced() -> bool:
    """Whether something records operations, or runs them on tensors without values: it would not see C."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None for key in _RECORDERS
    )


def _threads(work: int) -> int:
    """Return how many of torch's threads a number of multiplications is worth."""
    return min(torch.get_num_threads(), 1 + work // _GRAIN)


@cache
def _levels(format: str) -> array[float]:
    return array("f", get_format(format).levels)  # not a tensor, which a mode that is active now could replace
