"""One contract for the products with frozen weights, and the choice of who serves it.

The contract is two functions of an input, a weight and the dtype to compute in:

    linear(x, weight, dtype)         (batch, in)  -> (batch, out)    x @ W.T
    input_grad(grad, weight, dtype)  (batch, out) -> (batch, in)     grad @ W

where a weight is a float16 or bfloat16 tensor (out, in) or a 4-bit ``QuantizedTensor``. Neither may
hold a whole restored weight. ``reference`` is the definition of what is true: plain torch, any device.
"""

from lowmem.kernels.reference import Weight, input_grad, linear

__all__ = ["Weight", "backend", "input_grad", "linear"]


def backend() -> str:
    """Say which kernel serves this machine, and why."""
    return "reference: plain torch restores rows in chunks; this version has no compiled kernel"
