"""RMS norms, gated activations and cross entropies of rows: the definitions of these methods of ``Backend``.

    norm(x)      x / sqrt(mean(x^2) + eps) * factor
    gated(a, b)  act(a) b,  act(a) = a sigmoid(z(a)), z odd, or relu(a)^2
    entropies    -(1 - e) log p[target] - e mean(log p),  with the gradient  p - (1 - e) onehot - e / vocabulary

for p the softmax of a row of logits and e the label smoothing. Everything is computed in float32 (float64 where an
argument is) and rounded once.

Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467; Shazeer, GLU Variants Improve Transformer,
arXiv 2002.05202; So et al., Primer, arXiv 2109.08668, for squared ReLU; Hendrycks and Gimpel, Gaussian Error Linear
Units, arXiv 1606.08415, whose tanh is a sigmoid here, (1 + tanh(z / 2)) / 2 = sigmoid(z). By the error function it is
x Phi(x), Phi the normal distribution, for which C takes the sigmoid of a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowmem.quant.backend import Activation, SigmoidPolynomial, SquaredReLU, chunk_length

ACTIVATIONS: dict[str, Activation] = {
    "SiLU": SigmoidPolynomial((1.0,)),
    "GELU (tanh)": SigmoidPolynomial((math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi))),
    "GELU (sigmoid)": SigmoidPolynomial((1.702,)),
    # log(Phi(x) / Phi(-x)), fitted for the least error of act(x) / (1 + |x|), 1.5e-8; its slope is off by 3.1e-7.
    "GELU": SigmoidPolynomial(
        (1.59577054, 0.0726641097, -6.33138327e-5, -1.1130911e-4, 8.04703879e-6, -2.73385375e-7, 3.75137872e-9), True
    ),
    "squared ReLU": SquaredReLU(),
}

# Rows whose probabilities a processor computes at a time: few enough to stay in its cache
_ROWS = 16


def norm(x: Tensor, factor: Tensor, eps: float, rounds_first: bool) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * factor``: (..., n), in the dtype and layout of x.

    Args:
        x: floating point (..., n).
        factor: float32 (n,); float64 for a float64 x.
        eps: added to the mean.
        rounds_first: whether the quotient is rounded to x's dtype before it is multiplied.
    """
    quotient = _rms_normalized(x, eps)
    if rounds_first:
        quotient = quotient.to(x.dtype).to(quotient.dtype)
    return quotient.mul_(factor).to(x.dtype)


def norm_grad(grad: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """Return the gradient of x, in its dtype: ``r g f - x r^3 / n sum(g f x)``, ``r = 1 / sqrt(mean(x^2) + eps)``.

    ``grad`` is rounded to x's dtype first.
    """
    wide = _as_float32_or_wider(x)
    inverse = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    scaled = grad.to(x.dtype).to(wide.dtype) * factor
    dot = (scaled * wide).mean(-1, keepdim=True) * inverse * inverse
    return scaled.sub_(wide * dot).mul_(inverse).to(x.dtype)


def norm_factor_grad(grad: Tensor, x: Tensor, eps: float, chunk_rows: int = 256) -> Tensor:
    """Return the gradient of the factor, (n,): the sum over rows of ``grad x / sqrt(mean(x^2) + eps)``."""
    columns = x.shape[-1]
    total = _as_float32_or_wider(x).new_zeros(columns)
    for g, part in zip(
        grad.reshape(-1, columns).split(chunk_rows), x.reshape(-1, columns).split(chunk_rows), strict=True
    ):
        # Not in place: vmap may batch it
        total = total + (_rms_normalized(part, eps) * g).sum(0)
    return total


def gated(a: Tensor, b: Tensor | None, activation: Activation, dtype: torch.dtype) -> Tensor:
    """Return ``act(a) b``: (..., n), contiguous, in ``dtype``; differentiable, and of any class of tensors.

    Args:
        a: floating point (..., n).
        b: of the same shape and dtype; None: ``act(a)``.
        activation: act.
        dtype: of the result.
    """
    wide = _as_float32_or_wider(a)
    out = _activation_and_slope(wide, activation)[0]
    return (out if b is None else out * b).to(dtype)


def gated_grad(
    grad: Tensor, a: Tensor, b: Tensor | None, activation: Activation, into: tuple[Tensor, Tensor | None]
) -> None:
    """Write the gradients of a and b.

    Args:
        grad: floating point (..., n); rounded to the dtype of ``into`` first.
        a: and b: as for ``gated``.
        activation: act.
        into: two tensors (..., n) of one dtype, for the gradients of a and of b; None for that of no b.
    """
    of_a, of_b = into
    grads = gated_input_grads(grad.to(of_a.dtype), a, b, activation)
    of_a.copy_(grads[0])
    if of_b is not None and grads[1] is not None:
        of_b.copy_(grads[1])


def gated_input_grads(
    grad: Tensor, a: Tensor, b: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of a and b in float32 or wider; ``grad`` may be a batch of gradients (vmap)."""
    wide = _as_float32_or_wider(a)
    act, slope = _activation_and_slope(wide, activation)
    return (grad * slope(), None) if b is None else (grad * slope() * b, grad * act)


def entropies(logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
    """Return the losses of rows, (rows,), in float32 or wider; the logits are lost.

    Args:
        logits: floating point (rows, vocabulary), contiguous; replaced by the gradient of each row's loss.
        targets: int64 (rows,), each from 0 to vocabulary - 1; only the CPU checks that.
        smoothing: how much of each target is spread over the vocabulary, in [0, 1].
        gradient: whether to compute the gradient.
    """
    losses = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    spread = smoothing / logits.shape[1]
    # A probability is float32, and so is its temporary copy
    rows = chunk_length(logits, _ROWS, 8 * logits.shape[1])
    parts = zip(logits.split(rows), targets.unsqueeze(1).split(rows), losses.split(rows), strict=True)
    for part, target, loss in parts:
        logs = torch.log_softmax(part, 1, dtype=losses.dtype)  # (rows, vocabulary)
        torch.mul(logs.gather(1, target).squeeze(1), smoothing - 1, out=loss)
        if smoothing:
            loss -= spread * logs.sum(1)
        if gradient:
            errors = logs.exp_()
            errors.scatter_add_(1, target, errors.new_full(target.shape, smoothing - 1))
            part.copy_(errors.sub_(spread) if smoothing else errors)
    return losses


def _rms_normalized(x: Tensor, eps: float) -> Tensor:
    wide = _as_float32_or_wider(x)
    return wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)


def _activation_and_slope(x: Tensor, activation: Activation) -> tuple[Tensor, Callable[[], Tensor]]:
    """Return ``act(x)`` and a function that returns its derivative."""
    if isinstance(activation, SquaredReLU):
        positive = x.relu()
        return positive.square(), lambda: 2 * positive
    factor, its_slope = _sigmoid_factor_and_slope(x, activation)
    return x * factor, lambda: factor + x.clamp(-88, 88) * its_slope


def _sigmoid_factor_and_slope(x: Tensor, activation: SigmoidPolynomial) -> tuple[Tensor, Tensor]:
    """Return ``act(x) / x`` and its derivative; beyond 88, where it is 0 or 1, those of 88."""
    x = x.clamp(-88, 88)
    if activation.uses_erf:
        return torch.erfc(-math.sqrt(0.5) * x) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    z = slope = torch.zeros_like(x)
    # Horner
    for power, term in reversed([*enumerate(activation.terms)]):
        z, slope = z * x * x + term, slope * x * x + (2 * power + 1) * term
    sigmoid = torch.sigmoid(z * x)
    return sigmoid, sigmoid * (1 - sigmoid) * slope


def _as_float32_or_wider(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()
