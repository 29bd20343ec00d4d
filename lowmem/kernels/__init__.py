"""Products with stored weights, computed by the backend of a tensor's device; and the selection of the CPU's: the
best ISA of the compiled kernel, or what the environment variable ``LOWMEM_KERNEL`` names.

It may import ``quant``. Begin with ``reference.py``, the definition of each product in plain torch, then ``cpu.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lowmem.kernels import cpu, gpu, reference
from lowmem.kernels.frozen_weight_operator import register_operators_for_device
from lowmem.kernels.tensor_checks import TYPES
from lowmem.quant.backend import (
    Backend,
    LowRank,
    Weight,
    backend_for,
    backend_of,
    fast_matmul_dtype,
    product_result_dtype,
    set_backend,
)
from lowmem.quant.tensor import ANY, QuantizedTensor

__all__ = [
    "LowRank",
    "Weight",
    "add_low_rank",
    "add_product",
    "available_cpu_backend_names",
    "backend",
    "differentiable_dtype",
    "explain",
    "fast_bfloat16",
    "fast_matmul_dtype",
    "input_grad",
    "linear",
    "register_backend",
    "temporary_cpu_backend",
]

# Reference, portable, neon, avx2, avxvnni, avx512, avx512vnni, avx512bf16 or avx512amx
VARIABLE = "LOWMEM_KERNEL"
PROVIDERS = (reference, cpu)
"""Modules with a function ``cpu_backends_and_description()``. It returns the CPU's backends that can run here, the
slowest first, and how they compute; or none, and the reason."""

_reason: str


def register_backend(device_type: str, backend: Backend) -> None:
    """Let a backend serve a device type, as ``torch.device.type`` names it: plain calls and torch's dispatcher."""
    set_backend(device_type, backend)
    register_operators_for_device(device_type)


def available_cpu_backend_names() -> list[str]:
    """Return the names of the CPU's backends that can run on this machine, the slowest first."""
    return list(_cpu_backends_and_missing_reasons()[0])


def backend() -> str:
    """Return the name of the CPU's backend, and why it was selected, as one line of text."""
    return f"{backend_for('cpu').name}: {_reason}"


def linear(
    x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """Return ``x @ W.T + bias + s (x @ A.T) @ B.T``: (..., in) -> (..., out), in ``dtype`` (int8: x's)."""
    return backend_of(x).linear(x, weight, dtype, bias, low_rank)


def input_grad(grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return ``grad @ W``: (batch, out) -> (batch, in), in ``dtype`` (torch.int8: in grad's)."""
    return backend_of(grad).input_grad(grad, weight, product_result_dtype(dtype, grad.dtype))


def add_low_rank(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), in the dtype of ``base``; not differentiable."""
    return backend_of(base).add_low_rank(base, x, a, b, scaling)


def add_product(out: Tensor, x: Tensor, weight: Weight, transposed: bool) -> Tensor:
    """Add ``x @ W.T`` to ``out``, or ``x @ W`` if transposed, in place; sums are rounded once."""
    return backend_of(out).add_product(out, x, weight, transposed)


def fast_bfloat16(x: Tensor) -> bool:
    """Whether the device of x multiplies bfloat16 faster than float32, so that ``add_product`` in it pays off."""
    return backend_of(x).fast_bfloat16


def differentiable_dtype(compute_dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """Return the dtype of a product with x whose gradient is recorded: in place of torch.int8, bfloat16 for float32
    inputs of a device that is fast at it, and else that of x."""
    if compute_dtype is not torch.int8:
        return compute_dtype
    return torch.bfloat16 if x.dtype is torch.float32 and fast_bfloat16(x) else x.dtype


def explain(weight: Weight | nn.Module, rows: int, dtype: torch.dtype | None = None) -> str:
    """Print and return what the backend of a weight's device runs, and why: a line for each product.

    A line names the kernel, the ISA whose table has it, and the kernels that were asked before and why they refuse.

    Args:
        weight: a QuantizedTensor (out, in), a float16 or bfloat16 tensor, a StoredTensor, or a layer that has one.
        rows: of the input, (rows, in).
        dtype: of the input, or torch.int8 for products in 8-bit integers; None: the layer's, or float32.

    Raises:
        TypeError: something that stores no weight of 4 or 16 bits, or torch.int8 with a weight of 16.
        ValueError: ``rows`` below 1, or another dtype.
    """
    form = getattr(getattr(weight, "weight", weight), "form", None)  # of a stored tensor, or a module's
    layer_dtype = getattr(
        weight, "compute_dtype", getattr(form, "compute_dtype", None)
    )  # a layer's may have been set
    dtype = dtype or layer_dtype or torch.float32
    stored: object = weight
    if isinstance(weight, nn.Module):
        stored_weight = getattr(weight, "stored_weight", None)
        stored = stored_weight() if callable(stored_weight) else getattr(weight, "weight", None)
    stored = getattr(stored, "kernel_weight", stored)  # of a stored tensor
    if not isinstance(stored, QuantizedTensor):
        if not isinstance(stored, Tensor) or stored.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"{type(weight).__name__} stores no weight in 4 or 16 bits")
        if dtype is torch.int8:
            raise TypeError(f"dtype={dtype} is for weights of 4 bits, not for {stored.dtype}: give a float dtype")
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")
    if dtype not in (*TYPES, torch.int8):
        raise ValueError(f"dtype={dtype} must be torch.float32, torch.bfloat16, torch.float16 or torch.int8")
    device = stored.packed if isinstance(stored, QuantizedTensor) else stored
    text = backend_of(device).explain(stored, rows, dtype)
    print(text)
    return text


@contextmanager
def temporary_cpu_backend(backend_name: str) -> Iterator[None]:
    """Let one of ``available_cpu_backend_names()`` serve the CPU inside the block: for tests and benchmarks."""
    before = backend_for("cpu"), _reason
    _register_cpu_backend(*_select_cpu_backend_and_reason(backend_name))
    try:
        yield
    finally:
        _register_cpu_backend(*before)


def _register_cpu_backend(selected: Backend, reason: str) -> None:
    global _reason
    _reason = reason
    register_backend("cpu", selected)


def _cpu_backends_and_missing_reasons() -> tuple[dict[str, tuple[Backend, str]], list[str]]:
    """Return each backend and how it computes, by name, the slowest first; and why providers have none."""
    backends_by_name: dict[str, tuple[Backend, str]] = {}
    missing = []
    for provider in PROVIDERS:
        backends, how = provider.cpu_backends_and_description()
        backends_by_name |= {cpu_backend.name: (cpu_backend, how) for cpu_backend in backends}
        missing += [] if backends else [how]
    return backends_by_name, missing


def _select_cpu_backend_and_reason(backend_name: str | None) -> tuple[Backend, str]:
    """Return the backend called ``backend_name``, or the best one for None, and the reason for ``backend()``."""
    backends_by_name, missing = _cpu_backends_and_missing_reasons()
    because = f"{VARIABLE} or a test asks for it" if backend_name else "the best that there is here"
    backend_name = backend_name or list(backends_by_name)[-1]
    if backend_name not in backends_by_name:
        choices = "; ".join([f"choose from {', '.join(backends_by_name)}", *missing])
        raise ValueError(f"{VARIABLE}={backend_name!r} cannot serve here: {choices}")
    selected, how = backends_by_name[backend_name]
    return selected, "; ".join([f"{how}, {because}", *missing])


register_backend(ANY, cast(Backend, reference))
# Torch's name for AMD's GPUs, too
register_backend("cuda", cast(Backend, gpu.GpuBackend()))
_register_cpu_backend(*_select_cpu_backend_and_reason(os.environ.get(VARIABLE)))
