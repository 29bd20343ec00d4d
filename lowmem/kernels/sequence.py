"""Steps of a transformer's block that C runs one after another in one call: RMS norms, products with stored weights,
rotary embeddings, attention, gated activations and sums.

    rotate(x)  x cos + half(x) sin,  half(x) = (-x2, x1) for the halves x1, x2 of x

Su et al., RoFormer, arXiv 2104.09864, section 3.4.2; the other steps are functions of ``Backend``. Each is computed
in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from lowmem.kernels.cpu import Given, Kernel
from lowmem.kernels.cpu_rows import (
    ATTENTION,
    ATTENTION_CALL,
    CODING_CALL,
    ENCODE_STATES,
    GATED,
    GATED_CALL,
    NORM,
    NORM_CALL,
    attention_call,
    terms_of,
)
from lowmem.kernels.memory import TYPES
from lowmem.quant.backend import Activation

# enum row_function and PRODUCTS of csrc/plan.h, and the structs of csrc/row_calls.h, each behind its function
_ADD, _ROTATE, _PRODUCTS = 8, 9, 100
MOST_TOGETHER = 3
"""Products of one input that share a region of threads."""
_NORM_STEP, _GATED_STEP = f"qq{NORM_CALL.format[1:]}", f"qq{GATED_CALL.format[1:]}"
_ATTENTION_STEP, _CODING_STEP = f"qq{ATTENTION_CALL.format[1:]}", f"qq{CODING_CALL.format[1:]}"
_ADD_STEP, _ROTATE_STEP, _PRODUCTS_STEP = "qqqqPPP", "qq9qPPP", f"qq5qP{'qqPP' * MOST_TOGETHER}"

Layer = tuple[Given, int, Tensor | None]
"""A layer: its weight as C takes it, its output features and its bias."""


class Steps:
    """Steps that ``run`` computes in C. An address stands for contiguous rows of numbers of one dtype.

    Args:
        kernel: the backend in C.
        like: of the dtype of all numbers, float32 or bfloat16.
        numbers: how many numbers all results have together.
        room: a tensor of ``numbers`` numbers in which results are written; None allocates one.

    Attributes:
        fields: of the structs of all steps. A caller may change addresses and sizes, and run the steps again.
    """

    def __init__(self, kernel: Kernel, like: Tensor, numbers: int, room: Tensor | None = None) -> None:
        self.kernel, self.like = kernel, like
        self.type, self.size = TYPES[like.dtype], like.element_size()
        self.room = like.new_empty(numbers) if room is None else room
        self._free = self.room.data_ptr()
        self._end = self._free + numbers * self.size
        self._formats: list[str] = []
        self.fields: list[float] = []
        self._weights: list[Any] = []
        self._kept: list[Any] = []  # what addresses point to: another thread may assign .data meanwhile
        self._ready: tuple[Struct, tuple[Any, ...]] | None = None

    def take(self, count: int) -> int:
        """Return the address of room for ``count`` numbers."""
        at = self._free
        self._free += count * self.size
        if self._free > self._end:
            raise ValueError(f"room for {count} numbers is taken, and {(self._end - at) // self.size} are left")
        return at

    def norm(
        self, x: int, rows: int, factor: Tensor, eps: float, offset: float, rounds_first: bool, out: int = 0
    ) -> int:
        """RMS norm of rows, times ``offset + factor``; the factor is contiguous, of one of ``TYPES``."""
        columns, out = len(factor), out or self.take(rows * len(factor))
        self._formats.append(_NORM_STEP)
        sizes = NORM, rows * columns, self.type, TYPES[factor.dtype], rows, columns
        self._kept.append(factor.untyped_storage())
        self.fields += (*sizes, eps, offset, rounds_first, x, 0, factor.data_ptr(), out)
        return out

    def products(self, x: int, rows: int, columns: int, layers: Sequence[Layer], *outs: int) -> Sequence[int]:
        """Products of one input with up to ``MOST_TOGETHER`` layers."""
        outs = outs or tuple(self.take(rows * features) for _, features, _ in layers)
        self._formats.append(_PRODUCTS_STEP)
        self.fields += (_PRODUCTS, 0, len(layers), len(self._weights) // 3, rows, columns, self.type, x)
        for (given, features, bias), out in zip(layers, outs, strict=True):
            self._weights += given
            of_bias = (0, 0)
            if bias is not None:
                self._kept.append(bias.untyped_storage())
                of_bias = TYPES[bias.dtype], bias.data_ptr()
            self.fields += (features, *of_bias, out)
        self.fields += (0,) * (4 * (MOST_TOGETHER - len(layers)))
        return outs

    def rotate(self, x: int, shape: tuple[int, int, int], head: int, token: int, cos: Tensor, sin: Tensor) -> None:
        """Rotate the first numbers of heads in place.

        Args:
            x: address of the first head.
            shape: sequences, tokens and heads.
            head: numbers from a head to the next.
            token: numbers from a token to the next.
            cos: contiguous (1 or sequences, tokens, numbers to rotate).
            sin: of the same shape.
        """
        sequences, tokens, heads = shape
        width = cos.shape[-1]
        angles = tokens * width if cos.shape[0] > 1 else 0
        self._formats.append(_ROTATE_STEP)
        sizes = _ROTATE, sequences * tokens * heads * width, self.type, sequences, tokens, heads, width
        self.fields += (*sizes, head, token, tokens * token, angles, x, cos.data_ptr(), sin.data_ptr())
        self._kept += cos, sin

    def store(self, shape: tuple[int, int, int, int], states: Sequence[int], into: Sequence[int]) -> None:
        """Write ``states_of`` (batch, heads, rows, width) into others: copied, or as 8-bit codes and scales."""
        batch, heads, rows, width = shape
        self._formats.append(_CODING_STEP)
        self.fields += (ENCODE_STATES, batch * heads * rows * width, *shape, *states, *into)

    def attention(self, sizes: tuple[int, ...], states: Sequence[int], scaling: float, softcap: float | None) -> int:
        """Attention, as ``attention_call`` takes it: (batch, queries, heads, value width)."""
        batch, key_heads, shared, queries, _, _, value_width = sizes
        out = self.take(batch * queries * key_heads * shared * value_width)
        work, fields, scratch = attention_call(sizes, states, scaling, softcap, out)
        self._formats.append(_ATTENTION_STEP)
        self.fields += (ATTENTION, work, *fields)
        self._kept.append(scratch)
        return out

    def gated(self, a: int, b: int, rows: int, columns: int, step: int, activation: Activation) -> int:
        """``act(a) b`` of rows that are ``step`` numbers apart."""
        out = self.take(rows * columns)
        self._formats.append(_GATED_STEP)
        sizes = GATED, rows * columns, self.type, self.type, rows, columns, step, columns
        self.fields += (*sizes, *terms_of(activation), a, b, 0, out, 0)
        return out

    def add(self, a: int, b: int, count: int, out: int = 0) -> int:
        """Sums of ``count`` numbers."""
        out = out or self.take(count)
        self._formats.append(_ADD_STEP)
        self.fields += (_ADD, count, self.type, count, a, b, out)
        return out

    def run(self) -> bool:
        """Compute all steps; False, and nothing is computed, if C cannot multiply one of the weights."""
        kernel, threads = self.kernel, torch.get_num_threads()
        if self._ready is None:
            self._ready = _layout("".join(self._formats)), tuple(self._weights)
        layout, weights = self._ready
        ran: bool = kernel.native.sequence(kernel._isa, threads, self.like, weights, layout.pack(*self.fields))
        return ran


@lru_cache(maxsize=256)
def _layout(formats: str) -> Struct:
    return Struct("@" + formats)
