"""RMS norms and gated activations, forward and backward: the definitions in plain torch, and the calls of C.

    norm(x)      x / sqrt(mean(x^2) + eps) * factor                  of rows
    gated(a, b)  act(a) b,  act(a) = a sigmoid(z(a)),  z odd

Everything is computed in float32 (float64 where an argument is) and rounded once. C (``csrc/rowwise.h``) serves
float32 and bfloat16 on the CPU; plain torch everything else.

Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467; Shazeer, GLU Variants Improve Transformer,
arXiv 2002.05202; Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415, whose tanh is a sigmoid here,
(1 + tanh(z / 2)) / 2 = sigmoid(z). By the error function it is x Phi(x), Phi the normal distribution, for which C
takes the sigmoid of a polynomial.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem.kernels.memory import TYPES, is_batch, is_float, is_real, is_traced
from lowmem.quant.backend import active_backend

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "factor_grad",
    "gated",
    "gated_grad",
    "gated_grads",
    "gated_in_torch",
    "norm",
    "norm_grad",
]


class Activation(NamedTuple):
    """act(x) = x sigmoid(z(x)).

    Attributes:
        terms: z(x) = terms[0] x + terms[1] x^3 + terms[2] x^5 ..., at most seven.
        of_erf: whether that stands for the normal distribution, which plain torch computes.
    """

    terms: tuple[float, ...]
    of_erf: bool = False


ACTIVATIONS = {
    "SiLU": Activation((1.0,)),
    "GELU (tanh)": Activation((math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi))),
    "GELU (sigmoid)": Activation((1.702,)),
    # log(Phi(x) / Phi(-x)), fitted for the least error of act(x) / (1 + |x|), 1.5e-8; its slope is off by 3.1e-7.
    "GELU": Activation(
        (1.59577054, 0.0726641097, -6.33138327e-5, -1.1130911e-4, 8.04703879e-6, -2.73385375e-7, 3.75137872e-9), True
    ),
}

_OPERATIONS = {"norm": 0, "norm_grad": 1, "gated": 2, "gated_grad": 3}  # of struct rowwise in csrc/kernel.h


def norm(x: Tensor, factor: Tensor, eps: float, rounds_first: bool = False) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * factor``: (..., n), in the dtype and layout of x.

    Args:
        x: floating point (..., n).
        factor: float32 (n,); float64 for a float64 x.
        eps: added to the mean.
        rounds_first: whether the quotient is rounded to x's dtype before it is multiplied.
    """
    if _takes(x) and is_float(factor) and _is_dense(x):
        out = torch.empty_like(x)
        _call("norm", (x, factor, None), (out,), x.shape[-1], (eps, float(rounds_first)))
        return out
    quotient = _normalized(x, eps)
    if rounds_first:
        quotient = quotient.to(x.dtype).to(quotient.dtype)
    return quotient.mul_(factor).to(x.dtype)


def norm_grad(grad: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """Return the gradient of x, in its dtype: ``r g f - x r^3 / n sum(g f x)``, ``r = 1 / sqrt(mean(x^2) + eps)``."""
    grad = grad.to(x.dtype)
    if _takes(x, grad) and is_float(factor) and _is_dense(x):
        out = torch.empty_like(x)
        grad = grad if grad.stride() == out.stride() else torch.empty_like(x).copy_(grad)
        _call("norm_grad", (x, factor, grad), (out,), x.shape[-1], (eps, 0.0))
        return out
    wide = _wide(x)
    inverse = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    scaled = grad.to(wide.dtype) * factor
    dot = (scaled * wide).mean(-1, keepdim=True) * inverse * inverse
    return scaled.sub_(wide * dot).mul_(inverse).to(x.dtype)


def factor_grad(grad: Tensor, x: Tensor, eps: float, rows: int = 256) -> Tensor:
    """Return the gradient of the factor, (n,): the sum over rows of ``grad x / sqrt(mean(x^2) + eps)``."""
    columns = x.shape[-1]
    total = _wide(x).new_zeros(columns)
    for g, part in zip(grad.reshape(-1, columns).split(rows), x.reshape(-1, columns).split(rows), strict=True):
        total = total + (_normalized(part, eps) * g).sum(0)  # which may stand for several
    return total


def gated(a: Tensor, b: Tensor | None, activation: Activation, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``act(a) b``: (..., n), contiguous, in ``dtype``, or in that of a and b.

    Args:
        a: floating point (..., n).
        b: of the same shape and dtype; None: ``act(a)``.
        activation: act.
        dtype: of the result.
    """
    dtype = dtype or a.dtype
    step = _step(a)
    if (
        _takes(a, a if b is None else b)
        and step is not None
        and _widens(a.dtype, dtype)
        and _step_of(b, step) == step
    ):
        out = torch.empty(a.shape, dtype=dtype)
        _call("gated", (a, b, None), (out,), step, activation.terms)
        return out
    return gated_in_torch(a, b, activation, dtype)


def gated_in_torch(a: Tensor, b: Tensor | None, activation: Activation, dtype: torch.dtype) -> Tensor:
    """Compute ``gated``, by definition: differentiable, and of any class of tensors."""
    wide = _wide(a)
    out = wide * _factor(wide, activation)[0]
    return (out if b is None else out * b).to(dtype)


def gated_grad(
    grad: Tensor, a: Tensor, b: Tensor | None, activation: Activation, into: tuple[Tensor, Tensor | None]
) -> None:
    """Write the gradients of a and b.

    Args:
        grad: floating point (..., n).
        a: and b: as for ``gated``.
        activation: act.
        into: two tensors (..., n) of one dtype, for the gradients of a and of b; None for that of no b.
    """
    step, out_step, (of_a, of_b) = _step(a), _step(into[0]), into
    grad = grad.to(of_a.dtype).contiguous()
    even = step is not None and _step_of(b, step) == step
    even = even and out_step is not None and _step_of(of_b, out_step) == out_step
    if even and _takes(a, a if b is None else b) and is_real(grad) and _widens(a.dtype, grad.dtype):
        _call("gated_grad", (a, b, grad), into, step, activation.terms, out_step)
        return
    act, slope = _act_and_slope(_wide(a), activation)
    of_a.copy_(grad * slope if b is None else grad * slope * b)
    if of_b is not None:
        of_b.copy_(grad * act)


def gated_grads(grad: Tensor, a: Tensor, b: Tensor | None, activation: Activation) -> tuple[Tensor, Tensor | None]:
    """Return what ``gated_grad`` writes, in float32 or wider, for a gradient that stands for several."""
    act, slope = _act_and_slope(_wide(a), activation)
    return (grad * slope, None) if b is None else (grad * slope * b, grad * act)


def _act_and_slope(wide: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return an activation and its derivative."""
    factor, its_slope = _factor(wide, activation)
    slope = factor + wide.clamp(-88, 88) * its_slope
    return wide * factor, slope


def _normalized(x: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)


def _factor(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return ``act(x) / x`` and its derivative; beyond 88, where it is 0 or 1, those of 88."""
    x = x.clamp(-88, 88)
    if activation.of_erf:
        return torch.erfc(-math.sqrt(0.5) * x) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    z = slope = torch.zeros_like(x)
    for power, term in reversed([*enumerate(activation.terms)]):  # Horner
        z, slope = z * x * x + term, slope * x * x + (2 * power + 1) * term
    sigmoid = torch.sigmoid(z * x)
    return sigmoid, sigmoid * (1 - sigmoid) * slope


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _takes(*tensors: Tensor) -> bool:
    """Whether C serves: plain CPU tensors of one dtype, float32 or bfloat16, with numbers in them."""
    dtype, shape = tensors[0].dtype, tensors[0].shape
    if dtype not in (torch.float32, torch.bfloat16) or not hasattr(active_backend(), "rowwise"):
        return False
    if not tensors[0].numel() or is_traced() or any(map(is_batch, tensors)):
        return False
    return all(is_real(one) and one.dtype is dtype and one.shape == shape for one in tensors)


def _widens(narrow: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether C writes one dtype where it reads another, which is float32 or bfloat16."""
    return dtype in (narrow, torch.float32)


def _is_dense(x: Tensor) -> bool:
    """Whether rows of numbers side by side fill the memory of x, in any order of the rows."""
    if x.is_contiguous():
        return True
    return x.stride(-1) == 1 and torch.empty_like(x, device="meta").stride() == x.stride()


def _step(x: Tensor) -> int | None:
    """Return the elements from a row to the next, where rows are evenly spaced; None where they are not."""
    if x.is_contiguous():
        return x.shape[-1]
    shape, strides = x.shape[:-1], x.stride()[:-1]
    if x.stride(-1) != 1:  # as of any vector that is not contiguous
        return None
    even = all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(len(shape) - 1))
    return strides[-1] if even else None


def _step_of(x: Tensor | None, step: int | None) -> int | None:
    """Return the step of a tensor that may be missing: then any will do."""
    return step if x is None else _step(x)


def _call(operation: str, given: Any, outs: Any, step: Any, numbers: Any, out_step: int | None = None) -> None:
    backend: Any = active_backend()
    types = TYPES[given[0].dtype], TYPES[outs[0].dtype]
    backend.rowwise(_OPERATIONS[operation], *types, given, outs, numbers, step, out_step or outs[0].shape[-1])
