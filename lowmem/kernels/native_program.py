"""Steps of a transformer's block that C runs one after another in one call: RMS norms, products with stored weights,
rotary embeddings, attention, gated activations and sums.

    rotate(x)  x cos + half(x) sin,  half(x) = (-x2, x1) for the halves x1, x2 of x

Su et al., RoFormer, arXiv 2104.09864, section 3.4.2; the other steps are functions of ``Backend``. Each is computed
in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import pack
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lowmem.kernels import cpu_rowwise
from lowmem.kernels.cpu import CpuBackend, NativeWeight
from lowmem.kernels.tensor_checks import TYPES, is_plain_cpu_tensor
from lowmem.quant.backend import Activation, LowRank

# enum row_function and PRODUCTS of csrc/plan.h, and the structs of csrc/row_calls.h, each behind its function
_ADD, _ROTATE, _DENSE_PRODUCT, _PRODUCTS = 8, 9, 11, 100
# Products of one input that share a region of threads
MOST_TOGETHER = 3
_NO_ATTENTION = cpu_rowwise.ATTENTION_CALL.unpack(bytes(cpu_rowwise.ATTENTION_CALL.size))
_ADD_CALL, _ROTATE_CALL, _DENSE_PRODUCT_CALL = "@qqPPP", "@9qPPP", "@5qfPPPP"
_PRODUCTS_CALL = f"@5qP{'qqqPP' * MOST_TOGETHER}"
_FLOAT32, _FLOAT32_BYTES = TYPES[torch.float32], 4


class NativeLayer(NamedTuple):
    """A layer.

    Attributes:
        weight: as C takes it; of products in 8-bit integers with levels that are rounded for them.
        out_features: the rows of the weight.
        bias: (out_features,), or None.
        in_int8: whether inputs are rounded to 8 bits.
        updates: of its active adapters, which are added one after another; matrices in contiguous float32.
    """

    weight: NativeWeight
    out_features: int
    bias: Tensor | None
    in_int8: bool = False
    updates: tuple[LowRank, ...] = ()


def update_scratch_per_row(updates: Iterable[LowRank], itemsize: int) -> int:
    """Return how many numbers of ``itemsize`` bytes updates take of a program's scratch for a row, at most."""
    return sum((len(a) + 1) * _FLOAT32_BYTES // itemsize for a, _, _ in updates)


AddressOrName: TypeAlias = int | str
"""Of contiguous rows of numbers of one dtype; or the name of a tensor that ``run`` is given."""


class NativeProgram:
    """Steps that ``run`` computes in C, as often as it is called.

    Args:
        backend: the backend in C.
        scratch: the tensor in which results are written one behind another, float32 or bfloat16 as all numbers.
    """

    def __init__(self, backend: CpuBackend, scratch: Tensor) -> None:
        if not (is_plain_cpu_tensor(scratch) and scratch.is_contiguous()):
            raise ValueError(
                f"a room on {scratch.device} with strides {scratch.stride()} is no contiguous memory of the CPU"
            )
        self.backend, self.scratch = backend, scratch
        self.type_id, self.itemsize = TYPES[scratch.dtype], scratch.element_size()
        self._used_numbers = 0
        self._layout = "@"
        self._fields: list[Any] = []
        # Where the fields have what a name stands for
        self._named_field_positions: dict[str, list[int]] = {}
        self._weights: list[Any] = []
        self._referenced_storages: list[
            Any
        ] = []  # what addresses point to: another thread may assign .data meanwhile

    def reserve_scratch_address(self, element_count: int) -> int:
        """Return the address of room for ``element_count`` numbers."""
        start, self._used_numbers = self._used_numbers, self._used_numbers + element_count
        if self._used_numbers > self.scratch.numel():
            raise ValueError(
                f"room for {element_count} numbers is taken, and {self.scratch.numel() - start} are left"
            )
        return self.scratch.data_ptr() + start * self.itemsize

    def append_norm(
        self,
        x: AddressOrName,
        rows: int,
        factor: Tensor,
        eps: float,
        offset: float,
        rounds_first: bool,
        out: AddressOrName = 0,
    ) -> AddressOrName:
        """RMS norm of rows, times ``offset + factor``; the factor is contiguous, of one of ``TYPES``."""
        columns, out = len(factor), out or self.reserve_scratch_address(rows * len(factor))
        self._referenced_storages.append(factor.untyped_storage())
        sizes = self.type_id, TYPES[factor.dtype], rows, columns, eps, offset, rounds_first
        self._append_step(
            cpu_rowwise.NORM_CALL.format, cpu_rowwise.NORM, rows * columns, *sizes, x, 0, factor.data_ptr(), out
        )
        return out

    def append_products(
        self, x: AddressOrName, rows: int, columns: int, layers: Sequence[NativeLayer], *outs: AddressOrName
    ) -> Sequence[Any]:
        """Products of one input with up to ``MOST_TOGETHER`` layers; return their addresses."""
        outs = outs or tuple(self.reserve_scratch_address(rows * layer.out_features) for layer in layers)
        sizes = len(layers), len(self._weights) // 3, rows, columns, self.type_id
        each: list[Any] = []
        for layer, out in zip(layers, outs, strict=True):
            self._weights += layer.weight
            bias = layer.bias
            self._referenced_storages.append(None if bias is None else bias.untyped_storage())
            type_and_address = (0, 0) if bias is None else (TYPES[bias.dtype], bias.data_ptr())
            each += layer.out_features, layer.in_int8, *type_and_address, out
        each += (0,) * (5 * MOST_TOGETHER - len(each))
        self._append_step(_PRODUCTS_CALL, _PRODUCTS, 0, *sizes, x, *each)
        for layer, out in zip(layers, outs, strict=True):
            for update in layer.updates:
                self._append_update(x, rows, update, out)
        return outs

    def _append_update(self, x: AddressOrName, rows: int, update: LowRank, out: AddressOrName) -> None:
        """Add an adapter's product to ``out``, by way of float32 numbers."""
        a, b, scaling = update
        narrow = self.reserve_scratch_address(rows * update_scratch_per_row((update,), self.itemsize))
        narrow += -narrow % _FLOAT32_BYTES
        self._referenced_storages += a.untyped_storage(), b.untyped_storage()
        first = self.type_id, _FLOAT32, rows, *a.shape, scaling, x, a.data_ptr(), 0, narrow
        second = _FLOAT32, self.type_id, rows, *b.shape, 1.0, narrow, b.data_ptr(), out, out
        for matrix, fields in ((a, first), (b, second)):
            self._append_step(_DENSE_PRODUCT_CALL, _DENSE_PRODUCT, rows * matrix.numel(), *fields)

    def append_rotary_embedding(
        self,
        x: AddressOrName,
        shape: Sequence[int],
        strides: Sequence[int],
        cos_sin_shape: Sequence[int],
        *cos_and_sin: AddressOrName,
    ) -> None:
        """Rotate the first numbers of heads (sequences, tokens, heads) in place, by cosines and sines
        (``cos_and_sin``).

        ``strides`` are numbers from a head and a token to the next. ``cos_sin_shape`` is the shape of both: (1 or
        sequences, tokens, numbers to rotate).
        """
        (sequences, tokens, heads), (head, token), width = shape, strides, cos_sin_shape[2]
        sizes = self.type_id, sequences, tokens, heads, width, head, token, tokens * token
        between = tokens * width if cos_sin_shape[0] > 1 else 0
        self._append_step(_ROTATE_CALL, _ROTATE, sequences * tokens * heads * width, *sizes, between, x, *cos_and_sin)

    def append_state_encoding(self, shape: Sequence[int], states_fields: Sequence[int], target_name: str) -> None:
        """Write states (batch, heads, rows, width) into those that ``run`` is given: as they are, or coded."""
        batch, heads, rows, width = shape
        count, named = batch * heads * rows * width, (target_name, *cpu_rowwise.NO_STATES[1:])
        self._append_step(
            cpu_rowwise.CODING_CALL.format, cpu_rowwise.ENCODE_STATES, count, *shape, *states_fields, *named
        )

    def append_attention(self, fields_name: str, out_elements: int) -> int:
        """Attention of ``out_elements`` numbers; ``run`` gets ``attention_work_and_struct_fields`` for the
        address."""
        self._append_step(cpu_rowwise.ATTENTION_CALL.format, cpu_rowwise.ATTENTION, fields_name, *_NO_ATTENTION)
        return self.reserve_scratch_address(out_elements)

    def append_gated(self, a: int, b: int, rows: int, columns: int, row_stride: int, activation: Activation) -> int:
        """``act(a) b`` of rows that are ``row_stride`` numbers apart."""
        count, out = rows * columns, self.reserve_scratch_address(rows * columns)
        struct_fields = (
            self.type_id,
            self.type_id,
            rows,
            columns,
            row_stride,
            columns,
            *cpu_rowwise.activation_struct_fields(activation),
            a,
            b,
            0,
            out,
            0,
        )
        self._append_step(cpu_rowwise.GATED_CALL.format, cpu_rowwise.GATED, count, *struct_fields)
        return out

    def append_sum(
        self, a: AddressOrName, b: AddressOrName, element_count: int, out: AddressOrName = 0
    ) -> AddressOrName:
        """Sums of ``element_count`` numbers."""
        out = out or self.reserve_scratch_address(element_count)
        self._append_step(_ADD_CALL, _ADD, element_count, self.type_id, element_count, a, b, out)
        return out

    def _append_step(self, struct_layout: str, *fields: Any) -> None:
        """Add a step: its function, the numbers that it computes, and its struct."""
        for place, field in enumerate(fields, len(self._fields)):
            if isinstance(field, str):
                self._named_field_positions.setdefault(field, []).append(place)
        self._layout += "qq" + struct_layout[1:]
        self._fields += fields

    def try_run(self, **named_values: Tensor | Sequence[float]) -> bool:
        """Compute all steps, with a contiguous tensor or fields for each name.

        False, and no result counts: C cannot multiply one of the weights, or 8-bit integers cannot represent the
        input of a product, since a number is too large, too small or not finite.
        """
        for name, value in named_values.items():
            numbers = (value.data_ptr(),) if isinstance(value, Tensor) else value
            for place in self._named_field_positions.get(name, ()):
                self._fields[place : place + len(numbers)] = numbers
        backend, calls = self.backend, pack(self._layout, *self._fields)
        threads, weights = torch.get_num_threads(), tuple(self._weights)
        ran: bool = backend.native.sequence(backend._isa, threads, weights, calls)
        return ran
