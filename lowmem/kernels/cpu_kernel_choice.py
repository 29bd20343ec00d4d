"""Which kernel in C computes a product, as ``csrc/plan.h`` says, and why those before it do not."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import TypeAlias

import torch

from lowmem.kernels.tensor_checks import TYPES
from lowmem.quant.backend import Weight
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import QuantizedTensor

# Enum operation of csrc/plan.h
_OPERATIONS = {"linear": 0, "linear_inputs8": 1, "input_grad": 2}

# Time of a product in 8-bit integers as a share of that in floats, by ISA, whether the input is bfloat16, and bits
# of the weight, for inputs of 1 to 15, 16 to 63, and 64 rows and more. Measured in turns, the best of many calls,
# with weights of 1024 x 1024 and 2048 x 2048 (bof4s, int8), on one core of a Zen 4.
_INT8_TIME_SHARES = {
    ("avx2", False, 4): (0.7, 0.8, 0.85),
    ("avx2", True, 4): (1.1, 0.95, 0.9),
    ("avx2", False, 8): (0.8, 0.7, 0.8),
    ("avx2", True, 8): (1.0, 0.65, 0.6),
    ("avxvnni", False, 4): (0.5, 0.5, 0.55),
    ("avxvnni", True, 4): (0.8, 0.6, 0.55),
    ("avxvnni", False, 8): (0.8, 0.45, 0.45),
    ("avxvnni", True, 8): (0.95, 0.4, 0.4),
    ("avx512", False, 4): (0.85, 0.8, 0.75),
    ("avx512", True, 4): (0.85, 0.8, 0.75),
    ("avx512", False, 8): (0.95, 0.6, 0.7),
    ("avx512", True, 8): (0.95, 0.6, 0.7),
    ("avx512vnni", False, 4): (0.6, 0.45, 0.4),
    ("avx512vnni", True, 4): (0.6, 0.45, 0.4),
    ("avx512vnni", False, 8): (0.8, 0.3, 0.3),
    ("avx512vnni", True, 8): (0.8, 0.3, 0.3),
    ("avx512bf16", False, 4): (0.6, 0.45, 0.4),
    ("avx512bf16", True, 4): (0.95, 0.75, 0.7),
    ("avx512bf16", False, 8): (0.8, 0.3, 0.3),
    ("avx512bf16", True, 8): (0.8, 0.3, 0.6),
    ("avx512amx", False, 4): (0.6, 0.45, 0.4),  # float32 products are those of avx512vnni
    ("avx512amx", False, 8): (0.8, 0.3, 0.3),
}
# Smaller gains are not recommended: inputs lose precision
_LARGEST_RECOMMENDED_SHARE = 0.9

TriedKernel: TypeAlias = tuple[str, str, int, int, "str | None"]
"""A kernel that the plan asks: ISA, name, least and most rows of an input, and why it refuses, or None."""


class KernelExplanationMixin:
    """The part of the backend in C for one ISA that says what it runs; ``CpuBackend`` completes it."""

    native: ModuleType
    name: str
    _isa: int

    def explain(self, weight: Weight, rows: int, dtype: torch.dtype) -> str:
        """Return which kernel computes each product of an input of ``rows`` rows, and why those before it do not."""
        if isinstance(weight, QuantizedTensor) and weight.has_offsets:
            without, in_int8 = replace(weight, scale_encoding="float32"), dtype is torch.int8
            how = "8-bit integers" if in_int8 else "float32"
            lines = [f"offsets: added in plain torch, to products in {how} without them:"]
            operation = "linear_inputs8" if in_int8 else "linear"
            tried = self.tried_kernels(without, rows, dtype, operation)
            if tried and tried[-1][1].startswith(("few", "int16")):
                lines = [self._kernel_explanation(without, rows, dtype, operation), *lines]
                if in_int8:
                    return lines[0]
                return "\n".join([*lines, self._kernel_explanation(without, rows, torch.float32, "input_grad")])
            return "\n".join([*lines, self.explain(without, rows, torch.int8 if in_int8 else torch.float32)])
        if dtype is not torch.int8:
            lines = [
                self._kernel_explanation(weight, rows, dtype, operation) for operation in ("linear", "input_grad")
            ]
            lines += self._int8_recommendation_lines(weight, rows, dtype)
        elif self.tried_kernels(weight, rows, dtype, "linear_inputs8"):
            lines = [self._kernel_explanation(weight, rows, dtype, "linear_inputs8")]
        else:
            rounded = (
                f"linear_inputs8: no kernel of {self.name} takes this; torch rounds the input to 8 bits, and then"
            )
            lines = [rounded, self._kernel_explanation(weight, rows, torch.float32, "linear")]
        return "\n".join(lines)

    def _int8_recommendation_lines(self, weight: Weight, rows: int, dtype: torch.dtype) -> list[str]:
        """Return the line that recommends torch.int8, where that was measured to be faster."""
        if not isinstance(weight, QuantizedTensor):
            return []
        key = self.name, dtype is torch.bfloat16, get_format(weight.format).bits
        share = _INT8_TIME_SHARES.get(key, (1.0, 1.0, 1.0))[(rows >= 16) + (rows >= 64)]
        if share > _LARGEST_RECOMMENDED_SHARE:
            return []
        asked = self.tried_kernels(weight, rows, dtype, "linear_inputs8")
        how = f"takes about {share:g} of the time, and rounds inputs to 8 bits"
        return [f"without gradients, compute_dtype=torch.int8: {name} of {isa} {how}" for isa, name, *_ in asked[-1:]]

    def _kernel_explanation(self, weight: Weight, rows: int, dtype: torch.dtype, operation: str) -> str:
        *refused, (isa, name, least, most, _) = self.tried_kernels(weight, rows, dtype, operation)
        lines = [f"{operation}: {name} of {isa}, which takes {_row_range_text(least, most)}"]
        for other, kernel, least, most, why in refused:
            takes = _row_range_text(least, most) if why == "rows" else f"other {why}s"
            if why != "operation":
                lines.append(f"  not {kernel} of {other}, which takes {takes}")
        return "\n".join(lines)

    def tried_kernels(self, weight: Weight, rows: int, dtype: torch.dtype, operation: str) -> list[TriedKernel]:
        """Return the kernels that are asked to compute a product, the last of which does; none: plain torch serves.

        ``operation`` is linear, linear_inputs8 or input_grad, computed in ``dtype`` for an input of ``rows`` rows.
        """
        if isinstance(weight, QuantizedTensor):
            size, stored = weight.block_size, get_format(weight.format).bits
        else:
            size, stored = 0, TYPES[weight.dtype]
        input_type = TYPES[torch.float32 if dtype is torch.int8 else dtype]
        asked: list[TriedKernel] = self.native.plan(self._isa, size, stored, rows, input_type, _OPERATIONS[operation])
        return asked


def _row_range_text(min_rows: int, max_rows: int) -> str:
    if max_rows < 2**62:
        return f"{min_rows} to {max_rows} rows"
    return f"{min_rows} rows and more" if min_rows > 1 else "any number of rows"
