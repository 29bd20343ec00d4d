"""One contract for the products with frozen weights, and the choice of who serves it.

The contract is two functions of an input, a weight and the dtype to compute in, and the update of an adapter:

    linear(x, weight, dtype, bias, (A, B, s))  (batch, in) -> (batch, out)  x @ W.T + bias + s (x @ A.T) @ B.T
    input_grad(grad, weight, dtype)  (batch, out) -> (batch, in)     grad @ W
    add_update(base, x, a, b, s)     (batch, out) -> (batch, out)    base + s (x @ A.T) @ B.T

computed in a dtype and returned in it (torch.int8: in that of the input, see ``lowmem.kernels.int8``),
where a weight is a float16 or bfloat16 tensor (out, in) or a 4-bit ``QuantizedTensor``. Neither may
hold a whole restored weight. ``reference`` is the definition of what is true: plain torch, any device.
``cpu`` binds the compiled kernel, whose level is the best that the processor has, or the one that the
environment variable ``LOWMEM_KERNEL`` names: reference, portable, neon, avx2, avx512, avx512vnni,
avx512bf16 or avx512amx. What serves here also quantizes and dequantizes rows for ``lowmem.quant.tensor``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lowmem.kernels import cpu, reference
from lowmem.kernels.int8 import float_dtype
from lowmem.kernels.reference import Update, Weight
from lowmem.quant import tensor as blockwise

__all__ = ["Update", "Weight", "add_update", "available", "backend", "input_grad", "linear", "using"]

VARIABLE = "LOWMEM_KERNEL"


class _Contract(Protocol):
    def linear(
        self, x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None, update: Update | None
    ) -> Tensor: ...
    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor: ...
    def add_update(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor: ...


class _Reference:
    linear = staticmethod(reference.linear)
    input_grad = staticmethod(reference.input_grad)
    add_update = staticmethod(reference.add_update)


_serves: _Contract = _Reference()
_name = _why = "reference"


def available() -> list[str]:
    """Return the names of what can serve this machine, the slowest first."""
    native, _ = cpu.load()
    return ["reference", *(native.levels() if native else [])]


def backend() -> str:
    """Say which kernel serves this machine, and why."""
    return f"{_name}: {_why}"


def linear(
    x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None = None, update: Update | None = None
) -> Tensor:
    """Return ``x @ W.T + bias``, and an update: (batch, in) -> (batch, out), in ``dtype`` (torch.int8: in x's)."""
    return _serves.linear(x, weight, dtype, bias, update)


def input_grad(grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return ``grad @ W``: (batch, out) -> (batch, in), in ``dtype`` (torch.int8: in grad's)."""
    return _serves.input_grad(grad, weight, float_dtype(dtype, grad.dtype))


def add_update(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), in its dtype, with nothing to differentiate."""
    return _serves.add_update(base, x, a, b, scaling)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Let one of ``available()`` serve inside the block: for tests and benchmarks."""
    before = _serves, _name, _why
    _serve(*_choose(name))
    try:
        yield
    finally:
        _serve(*before)


def _serve(kernel: _Contract, name: str, why: str) -> None:
    global _serves, _name, _why
    _serves, _name, _why = kernel, name, why
    blockwise.serve(kernel if isinstance(kernel, cpu.Kernel) else blockwise.PLAIN)


def _choose(name: str | None) -> tuple[_Contract, str, str]:
    native, reason = cpu.load()
    chosen = name or available()[-1]
    because = f"{VARIABLE} or a test asks for it" if name else "the best that this processor has"
    if chosen not in available():
        raise ValueError(f"{VARIABLE}={chosen!r} cannot serve here: choose from {', '.join(available())}; {reason}")
    if chosen == "reference" or native is None:
        return _Reference(), "reference", f"plain torch restores rows in chunks; {because if name else reason}"
    return cpu.Kernel(native, chosen), chosen, f"compiled C, {because}, {reason}"


_serve(*_choose(os.environ.get(VARIABLE)))
