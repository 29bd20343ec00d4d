"""Mends Triton's interpreter (3.9), which cuts float32 off where it should round to bfloat16.

It is also wrong for ``tl.dot`` and for sums of bfloat16, which it takes for integers. The kernels need neither: they
multiply and add in float32, which ``tests/kernels/test_gpu.py`` holds.
"""

import numpy as np


def round_to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16 of float32 numbers, ties to even, as uint16."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def mend() -> None:
    """Let ``.to(tl.bfloat16)`` of float32 round as GPUs do."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl
    if cast.__name__ == "rounded":
        return

    def rounded(self: InterpreterBuilder, given: TensorHandle, to: tl.dtype) -> TensorHandle:
        if given.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(round_to_bfloat16(given.data), tl.bfloat16)
        return cast(self, given, to)

    InterpreterBuilder.cast_impl = rounded
