"""The binding of the compiled CPU kernel (``csrc/``): float32 products with 4-bit and 16-bit weights.

What C does not take goes to the reference: another device or dtype, a wrapped or traced tensor, and large
batches, for which a chunk of rows is restored and the product left to torch's own matrix multiplication.
The checks that keep C from reading past an end are all here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowmem.blockwise import QuantizedTensor
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

_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def load() -> tuple[ModuleType | None, str]:
    """Return the compiled module and whose threads it uses; or None and the reason why there is none."""
    try:
        from lowmem.kernels import _native
    except ImportError as reason:
        return None, f"the compiled kernel cannot be imported ({reason}); installing from source needs a C compiler"
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    if any(_native.share_threads(str(path)) for path in libraries):
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
        if not self._multiplies(x, weight, dtype, LINEAR_BATCH):
            return reference.linear(x, weight, dtype, bias, **self._restoring(x, weight, dtype))
        if bias is not None and not (bias.dtype == torch.float32 and bias.is_cpu and bias.is_contiguous()):
            bias = bias.to("cpu", torch.float32).contiguous()
        native = self._native
        run = native.linear if isinstance(weight, QuantizedTensor) else native.half_linear
        return self._product(run, x, weight, weight.shape[0], bias)

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in)."""
        if isinstance(weight, QuantizedTensor) and self._multiplies(grad, weight, dtype, INPUT_GRAD_BATCH):
            return self._product(self._native.input_grad, grad, weight, weight.shape[1], None)
        return reference.input_grad(grad, weight, dtype, **self._restoring(grad, weight, dtype))

    def restore(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows of W, restored in float32 and rounded once to ``dtype``."""
        start, stop, _ = rows.indices(weight.shape[0])
        out = torch.empty(stop - start, weight.shape[1], dtype=torch.float32)
        numbers = self._numbers(weight, weight.packed[start:stop], weight.scales[start:stop], stop - start)
        scratch = torch.empty(self._native.scratch(*numbers, 0), dtype=torch.uint8)
        self._native.restore(*numbers, 0, 0, out.data_ptr(), 0, scratch.data_ptr())
        return out.to(dtype)

    def _product(
        self, run: Callable[..., None], x: Tensor, weight: Weight, features: int, bias: Tensor | None
    ) -> Tensor:
        x = x.to(torch.float32).contiguous()
        batch = x.shape[0]
        out = torch.empty(batch, features, dtype=torch.float32)
        if isinstance(weight, QuantizedTensor):
            numbers = self._numbers(weight, weight.packed, weight.scales, weight.shape[0])
        else:
            threads, address = torch.get_num_threads(), weight.data_ptr()
            numbers = (self._level, threads, address, 0, 0, _HALVES[weight.dtype], 4096, *weight.shape)
        scratch = torch.empty(self._native.scratch(*numbers, batch), dtype=torch.uint8)
        added = 0 if bias is None else bias.data_ptr()
        run(*numbers, x.data_ptr(), added, out.data_ptr(), batch, scratch.data_ptr())
        return out

    def _numbers(self, weight: QuantizedTensor, packed: Tensor, scales: Tensor, rows: int) -> tuple[int, ...]:
        return (
            self._level,
            torch.get_num_threads(),
            packed.data_ptr(),
            scales.data_ptr(),
            _levels(weight.format).data_ptr(),
            _ENCODINGS[weight.scale_encoding],
            weight.block_size,
            rows,
            weight.shape[1],
        )

    def _restoring(self, x: Tensor, weight: Weight, dtype: torch.dtype) -> dict[str, Any]:
        """Return how the reference can restore rows faster, and the scratch a weight that it then takes."""
        if not isinstance(weight, QuantizedTensor) or not _readable(x, weight):
            return {}
        cast = 0 if dtype == torch.float32 else dtype.itemsize
        return {"restore": partial(self.restore, weight), "bytes_per_weight": 5 + cast}  # float32, a cast, scales

    @staticmethod
    def _multiplies(x: Tensor, weight: Weight, dtype: torch.dtype, most: int) -> bool:
        """Whether C takes the product: blocks of whole 32-bit words, and a batch that is not too large for it."""
        return (
            dtype == torch.float32
            and 0 < x.shape[0] < most
            and _readable(x, weight)
            and not (isinstance(weight, QuantizedTensor) and weight.block_size % 8)
        )


def _readable(x: Tensor, weight: Weight) -> bool:
    """Whether C may read these tensors: plain, on the CPU, contiguous, and as large as their shapes say."""
    if torch.compiler.is_compiling():
        return False
    if isinstance(weight, QuantizedTensor):
        stored: tuple[Tensor, ...] = (weight.packed, weight.scales)
        if (weight.packed.shape, weight.scales.shape) != weight.stored_shapes:
            return False
    else:
        stored = (weight,)
        if weight.dtype not in _HALVES:
            return False
    if not x.is_cpu or type(x) not in _PLAIN:
        return False
    return all(type(t) in _PLAIN and t.is_cpu and t.is_contiguous() for t in stored)


@cache
def _levels(format: str) -> Tensor:
    return torch.tensor(get_format(format).levels, dtype=torch.float32)
