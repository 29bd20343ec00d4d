"""Steps of a transformer's block that C runs one after another in one call: RMS norms, products with stored weights,
rotary embeddings, attention, gated activations and sums.

    rotate(x)  x cos + half(x) sin,  half(x) = (-x2, x1) for the halves x1, x2 of x

Su et al., RoFormer, arXiv 2104.09864, section 3.4.2; the other steps are functions of ``Backend``. Each is computed
in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowmem.kernels import cpu_rows
from lowmem.kernels.cpu import Given, Kernel
from lowmem.kernels.memory import TYPES, is_real
from lowmem.quant.backend import Activation

# enum row_function and PRODUCTS of csrc/plan.h, and the structs of csrc/row_calls.h, each behind its function
_ADD, _ROTATE, _PRODUCTS = 8, 9, 100
MOST_TOGETHER = 3  # products of one input that share a region of threads
_NO_ATTENTION = cpu_rows.ATTENTION_CALL.unpack(bytes(cpu_rows.ATTENTION_CALL.size))
_ADD_CALL, _ROTATE_CALL, _PRODUCTS_CALL = "@qqPPP", "@9qPPP", f"@5qP{'qqPP' * MOST_TOGETHER}"

Layer = tuple[Given, int, Tensor | None]
"""A layer: its weight as C takes it, its output features and its bias."""

Address: TypeAlias = int | str
"""Of contiguous rows of numbers of one dtype; or the name of a tensor that ``run`` is given."""


class Steps:
    """Steps that ``run`` computes in C, as often as it is called.

    Args:
        kernel: the backend in C.
        room: the tensor in which results are written one behind another, float32 or bfloat16 as all numbers.
    """

    def __init__(self, kernel: Kernel, room: Tensor) -> None:
        if not (is_real(room) and room.is_contiguous()):
            raise ValueError(
                f"a room on {room.device} with strides {room.stride()} is no contiguous memory of the CPU"
            )
        self.kernel, self.room = kernel, room
        self.type, self.size = TYPES[room.dtype], room.element_size()
        self._taken = 0
        self._layout = "@"
        self._fields: list[Any] = []
        self._places: dict[str, list[int]] = {}  # where the fields have what a name stands for
        self._weights: list[Any] = []
        self._kept: list[Any] = []  # what addresses point to: another thread may assign .data meanwhile

    def take(self, count: int) -> int:
        """Return the address of room for ``count`` numbers."""
        start, self._taken = self._taken, self._taken + count
        if self._taken > self.room.numel():
            raise ValueError(f"room for {count} numbers is taken, and {self.room.numel() - start} are left")
        return self.room.data_ptr() + start * self.size

    def norm(
        self, x: Address, rows: int, factor: Tensor, eps: float, offset: float, rounds_first: bool, out: Address = 0
    ) -> Address:
        """RMS norm of rows, times ``offset + factor``; the factor is contiguous, of one of ``TYPES``."""
        columns, out = len(factor), out or self.take(rows * len(factor))
        self._kept.append(factor.untyped_storage())
        sizes = self.type, TYPES[factor.dtype], rows, columns, eps, offset, rounds_first
        self._add(cpu_rows.NORM_CALL.format, cpu_rows.NORM, rows * columns, *sizes, x, 0, factor.data_ptr(), out)
        return out

    def products(self, x: Address, rows: int, columns: int, layers: Sequence[Layer], *outs: Address) -> Sequence[Any]:
        """Products of one input with up to ``MOST_TOGETHER`` layers; return their addresses."""
        outs = outs or tuple(self.take(rows * features) for _, features, _ in layers)
        sizes = len(layers), len(self._weights) // 3, rows, columns, self.type
        each: list[Any] = []
        for (given, features, bias), out in zip(layers, outs, strict=True):
            self._weights += given
            self._kept.append(None if bias is None else bias.untyped_storage())
            each += features, *((0, 0) if bias is None else (TYPES[bias.dtype], bias.data_ptr())), out
        each += (0,) * (4 * MOST_TOGETHER - len(each))
        self._add(_PRODUCTS_CALL, _PRODUCTS, 0, *sizes, x, *each)
        return outs

    def rotate(
        self, x: Address, shape: Sequence[int], steps: Sequence[int], angles: Sequence[int], *turn: Address
    ) -> None:
        """Rotate the first numbers of heads (sequences, tokens, heads) in place, by cosines and sines (``turn``).

        ``steps`` are numbers from a head and a token to the next. ``angles`` is the shape of both: (1 or sequences,
        tokens, numbers to rotate).
        """
        (sequences, tokens, heads), (head, token), width = shape, steps, angles[2]
        sizes = self.type, sequences, tokens, heads, width, head, token, tokens * token
        between = tokens * width if angles[0] > 1 else 0
        self._add(_ROTATE_CALL, _ROTATE, sequences * tokens * heads * width, *sizes, between, x, *turn)

    def store(self, shape: Sequence[int], states: Sequence[int], into: str) -> None:
        """Write ``states_of`` (batch, heads, rows, width) into those that ``run`` is given: as they are, or coded."""
        batch, heads, rows, width = shape
        count, named = batch * heads * rows * width, (into, *cpu_rows.NO_STATES[1:])
        self._add(cpu_rows.CODING_CALL.format, cpu_rows.ENCODE_STATES, count, *shape, *states, *named)

    def attention(self, name: str, count: int) -> int:
        """Attention of ``count`` numbers; ``run`` is given what ``attention_call`` returns for the address."""
        self._add(cpu_rows.ATTENTION_CALL.format, cpu_rows.ATTENTION, name, *_NO_ATTENTION)
        return self.take(count)

    def gated(self, a: int, b: int, rows: int, columns: int, step: int, activation: Activation) -> int:
        """``act(a) b`` of rows that are ``step`` numbers apart."""
        count, out = rows * columns, self.take(rows * columns)
        given = self.type, self.type, rows, columns, step, columns, *cpu_rows.terms_of(activation), a, b, 0, out, 0
        self._add(cpu_rows.GATED_CALL.format, cpu_rows.GATED, count, *given)
        return out

    def add(self, a: Address, b: Address, count: int, out: Address = 0) -> Address:
        """Sums of ``count`` numbers."""
        out = out or self.take(count)
        self._add(_ADD_CALL, _ADD, count, self.type, count, a, b, out)
        return out

    def _add(self, layout: str, *fields: Any) -> None:
        """Add a step: its function, the numbers that it computes, and its struct."""
        for place, field in enumerate(fields, len(self._fields)):
            if isinstance(field, str):
                self._places.setdefault(field, []).append(place)
        self._layout += "qq" + layout[1:]
        self._fields += fields

    def run(self, **given: Tensor | Sequence[float]) -> bool:
        """Compute all steps, with a contiguous tensor or fields for each name; False, and nothing is computed, if C
        cannot multiply one of the weights."""
        for name, value in given.items():
            numbers = (value.data_ptr(),) if isinstance(value, Tensor) else value
            for place in self._places.get(name, ()):
                self._fields[place : place + len(numbers)] = numbers
        kernel, calls = self.kernel, pack(self._layout, *self._fields)
        threads, weights = torch.get_num_threads(), tuple(self._weights)
        ran: bool = kernel.native.sequence(kernel._isa, threads, weights, calls)
        return ran
