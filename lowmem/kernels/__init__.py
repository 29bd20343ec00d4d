"""Products with stored weights, and the choice of the backend that computes them.

A weight is a float16 or bfloat16 tensor (out, in), or a 4-bit ``QuantizedTensor``:

    linear(x, weight, dtype, bias, (A, B, s))  (batch, in) -> (batch, out)  x @ W.T + bias + s (x @ A.T) @ B.T
    input_grad(grad, weight, dtype)   (batch, out) -> (batch, in)   grad @ W
    add_low_rank(base, x, a, b, s)    (batch, out) -> (batch, out)  base + s (x @ A.T) @ B.T

computed in a dtype and returned in it (torch.int8: in that of the input, see ``lowmem.kernels.int8``). The same
backend quantizes and dequantizes rows for ``lowmem.quant``; ``lowmem.quant.backend.Backend`` is what it has to have.
``reference`` is plain torch, on any device, and the definition of what is true; ``cpu`` binds the compiled kernel,
for the best ISA that the processor has, or the one that the environment variable ``LOWMEM_KERNEL`` names: reference,
portable, neon, avx2, avx512, avx512vnni, avx512bf16 or avx512amx.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowmem.kernels import cpu, reference
from lowmem.kernels.int8 import float_dtype
from lowmem.quant.backend import Backend, LowRank, Weight, serve, serving

__all__ = ["LowRank", "Weight", "add_low_rank", "available", "backend", "input_grad", "linear", "using"]

VARIABLE = "LOWMEM_KERNEL"
PROVIDERS = (reference, cpu)
"""Modules with ``backends()``: those that can serve here, the slowest first, and how; or none, and why not."""

_why: str


def available() -> list[str]:
    """Return the names of what can serve this machine, the slowest first."""
    return list(_offered()[0])


def backend() -> str:
    """Say which backend serves this machine, and why."""
    return f"{serving().name}: {_why}"


def linear(
    x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """Return ``x @ W.T + bias``, and what a low-rank product adds: (batch, in) -> (batch, out).

    It comes in ``dtype``, for torch.int8 in that of x.
    """
    return serving().linear(x, weight, dtype, bias, low_rank)


def input_grad(grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return ``grad @ W``: (batch, out) -> (batch, in), in ``dtype`` (torch.int8: in grad's)."""
    return serving().input_grad(grad, weight, float_dtype(dtype, grad.dtype))


def add_low_rank(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), in its dtype, with nothing to differentiate."""
    return serving().add_low_rank(base, x, a, b, scaling)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Let one of ``available()`` serve inside the block: for tests and benchmarks."""
    before = serving(), _why
    _serve(*_choose(name))
    try:
        yield
    finally:
        _serve(*before)


def _serve(chosen: Backend, why: str) -> None:
    global _why
    _why = why
    serve(chosen)


def _offered() -> tuple[dict[str, tuple[Backend, str]], list[str]]:
    """Return what can serve this machine and how, by name, the slowest first; and why a provider has nothing."""
    found: dict[str, tuple[Backend, str]] = {}
    missing = []
    for provider in PROVIDERS:
        backends, how = provider.backends()
        found |= {one.name: (one, how) for one in backends}
        missing += [] if backends else [how]
    return found, missing


def _choose(name: str | None) -> tuple[Backend, str]:
    """Return the backend of a name, or the best one, and why it is this."""
    found, missing = _offered()
    because = f"{VARIABLE} or a test asks for it" if name else "the best that there is here"
    name = name or list(found)[-1]
    if name not in found:
        choices = "; ".join([f"choose from {', '.join(found)}", *missing])
        raise ValueError(f"{VARIABLE}={name!r} cannot serve here: {choices}")
    chosen, how = found[name]
    return chosen, "; ".join([f"{how}, {because}", *missing])


_serve(*_choose(os.environ.get(VARIABLE)))
