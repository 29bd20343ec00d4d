"""Row-wise functions in C: norms, activations, cross entropies, attention, 8-bit codes and the rounding of columns.
What C does not take falls back to ``reference``."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from types import ModuleType

import torch
from torch import Tensor

from lowmem.kernels import reference
from lowmem.kernels.codes_8bit import BLOCK
from lowmem.kernels.column_rounding import PANEL
from lowmem.kernels.tensor_checks import (
    TYPES,
    c_float_array,
    is_batched_or_under_functorch,
    is_c_array,
    is_plain_cpu_tensor,
    is_recording_operations,
)
from lowmem.quant.backend import Activation, ColumnPanel, KeyOrValueStates, SquaredReLU
from lowmem.quant.formats import Format

_LEVELS = 16  # of csrc/columns.h
_TERMS = 7  # of struct gated in csrc/row_calls.h

# enum row_function of csrc/plan.h, and the layouts of the structs in csrc/row_calls.h
NORM, GATED, _ENTROPY, _ENCODE8, _DECODE8, _ROUND_COLUMNS, ATTENTION, ENCODE_STATES = range(8)
COMPARE, COMPARE_CALL = 10, Struct("@iiqqPPP")
NORM_CALL, GATED_CALL = Struct("@iiqqffqPPPP"), Struct("@iiqqqq7fiPPPPP")
_ENTROPY_CALL, _SAVED8_CALL, _ROUNDING_CALL = Struct("@iiqqfPPP"), Struct("@iqqPPPP"), Struct("@qqiPPPPPPPP")
_STATES = "iPP6q"
ATTENTION_CALL, CODING_CALL = Struct(f"@7q2f{_STATES * 4}P"), Struct(f"@4q{_STATES * 2}")
ROW_TYPES = torch.float32, torch.bfloat16
CODES8 = 8  # of csrc/plan.h, in place of a type


class CpuRowwiseMixin:
    """The row-wise part of the backend in C for one ISA, which ``CpuBackend`` completes."""

    native: ModuleType
    _isa: int

    def _call_rowwise(self, function_id: int, element_count: int, packed_struct: bytes) -> None:
        self.native.rowwise(self._isa, function_id, torch.get_num_threads(), element_count, packed_struct)

    def serves_rows(self, x: Tensor) -> bool:
        """Whether C computes norms and activations of such tensors: float32 and bfloat16."""
        return x.dtype in ROW_TYPES

    def norm(self, x: Tensor, factor: Tensor, eps: float, rounds_first: bool) -> Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * factor`` of rows."""
        if not (
            self._are_c_readable_and_alike(x)
            and is_c_array(factor, torch.float32, x.shape[-1:])
            and _has_dense_rows(x)
        ):
            return reference.norm(x, factor, eps, rounds_first)
        return self._call_norm_or_norm_grad(x, factor, eps, rounds_first, None)

    def norm_grad(self, grad: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
        """Return the gradient of x for ``norm``."""
        grad = grad.to(x.dtype)
        if not (
            self._are_c_readable_and_alike(x, grad)
            and is_c_array(factor, torch.float32, x.shape[-1:])
            and _has_dense_rows(x)
        ):
            return reference.norm_grad(grad, x, factor, eps)
        grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
        return self._call_norm_or_norm_grad(x, factor, eps, False, grad)

    def _call_norm_or_norm_grad(
        self, x: Tensor, factor: Tensor, eps: float, rounds_first: bool, grad: Tensor | None
    ) -> Tensor:
        out, width = torch.empty_like(x), x.shape[-1]
        rows, of_grad = x.numel() // width, 0 if grad is None else grad.data_ptr()
        addresses = x.data_ptr(), of_grad, factor.data_ptr(), out.data_ptr()
        call = NORM_CALL.pack(TYPES[x.dtype], 0, rows, width, eps, 0.0, rounds_first, *addresses)
        self.native.rowwise(self._isa, NORM, torch.get_num_threads(), rows * width, call)
        return out

    def gated(self, a: Tensor, b: Tensor | None, activation: Activation, dtype: torch.dtype) -> Tensor:
        """Return ``act(a) b`` in ``dtype``, contiguous."""
        step = _common_row_stride_or_none(a, b)
        if step is None or not _can_write_dtype(a.dtype, dtype) or not self._are_c_readable_and_alike(a, b):
            return reference.gated(a, b, activation, dtype)
        out = torch.empty(a.shape, dtype=dtype, device=a.device)
        self._write_gated_or_gated_grad(a, b, None, activation, step, (out, None), a.shape[-1])
        return out

    def gated_grad(
        self,
        grad: Tensor,
        a: Tensor,
        b: Tensor | None,
        activation: Activation,
        into: tuple[Tensor, Tensor | None],
    ) -> None:
        """Write the gradients of a and b for ``gated``."""
        grad = grad.to(into[0].dtype).contiguous()
        step, out_step = _common_row_stride_or_none(a, b), _common_row_stride_or_none(*into)
        plain = (
            is_plain_cpu_tensor(grad)
            and grad.shape == a.shape
            and _can_write_dtype(a.dtype, grad.dtype)
            and self._are_c_readable_and_alike(a, b)
        )
        plain = (
            plain
            and (b is None) == (into[1] is None)
            and self._are_c_readable_and_alike(*into)
            and into[0].shape == a.shape
        )
        if step is None or out_step is None or not plain:
            reference.gated_grad(grad, a, b, activation, into)
        else:
            self._write_gated_or_gated_grad(a, b, grad, activation, step, into, out_step)

    def _write_gated_or_gated_grad(
        self,
        a: Tensor,
        b: Tensor | None,
        grad: Tensor | None,
        activation: Activation,
        row_stride: int,
        into: tuple[Tensor, Tensor | None],
        out_row_stride: int,
    ) -> None:
        width, fields = a.shape[-1], activation_struct_fields(activation)
        types, sizes = (TYPES[a.dtype], TYPES[into[0].dtype]), (a.numel() // width, width, row_stride, out_row_stride)
        self._call_rowwise(
            GATED, a.numel(), GATED_CALL.pack(*types, *sizes, *fields, *map(_address_or_zero, (a, b, grad, *into)))
        )

    def entropies(self, logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
        """Return the cross entropies of rows; ``logits`` become their gradient."""
        targets = targets.contiguous()
        fits = (
            _is_c_readable_array(logits) and logits.dim() == 2 and is_c_array(targets, torch.int64, logits.shape[:1])
        )
        if not fits or int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]:
            return reference.entropies(logits, targets, smoothing, gradient)
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        addresses = logits.data_ptr(), targets.data_ptr(), losses.data_ptr()
        call = _ENTROPY_CALL.pack(TYPES[logits.dtype], gradient, *logits.shape, smoothing, *addresses)
        self._call_rowwise(_ENTROPY, logits.numel(), call)
        return losses

    def encode_8bit(self, numbers: Tensor, into: tuple[Tensor, Tensor]) -> tuple[int, int]:
        """Write 8-bit codes and scales; return how many numbers and codes are not zero."""
        if not (
            _is_c_readable_array(numbers)
            and numbers.dim() == 1
            and _are_c_codes_and_scales(into, -(-len(numbers) // BLOCK))
        ):
            return reference.encode_8bit(numbers, into)
        counts = torch.zeros(3, dtype=torch.int64, device=numbers.device)  # of scales that are not finite, too
        addresses = (tensor.data_ptr() for tensor in (numbers, *into, counts))
        call = _SAVED8_CALL.pack(TYPES[numbers.dtype], len(into[0]), len(numbers), *addresses)
        self._call_rowwise(_ENCODE8, len(numbers), call)
        before, after, _ = counts.tolist()
        return before, after

    def decode_8bit(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``codes * scales`` in ``dtype``."""
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        if not (_is_c_readable_array(out) and _are_c_codes_and_scales((codes, scales), len(codes))):
            return reference.decode_8bit(codes, scales, dtype)
        addresses = out.data_ptr(), codes.data_ptr(), scales.data_ptr(), 0
        self._call_rowwise(
            _DECODE8, out.numel(), _SAVED8_CALL.pack(TYPES[dtype], len(codes), out.numel(), *addresses)
        )
        return out

    def round_columns(self, form: Format, columns: ColumnPanel, descends: bool) -> None:
        """Round columns of a weight one after the other."""
        values, scales, pivots, matrix, approximate, codes = columns
        pivots, matrix, shape, count = pivots.contiguous(), matrix.contiguous(), values.shape, len(values)
        fits = len(form.levels) == _LEVELS and values.dim() == 2 and count <= PANEL and values.numel() > 0
        fits = fits and is_c_array(codes, torch.uint8, shape) and not is_recording_operations()
        fits = fits and all(is_c_array(tensor, torch.float32, shape) for tensor in (values, scales, approximate))
        fits = (
            fits and is_c_array(pivots, torch.float32, (count,)) and is_c_array(matrix, torch.float32, (count, count))
        )
        if not fits:
            return reference.round_columns(form, columns, descends)
        tables = (c_float_array(numbers).buffer_info()[0] for numbers in (form.levels, form.boundaries))
        read_tensors = pivots, matrix, scales, codes
        written = values.data_ptr(), approximate.data_ptr()
        addresses = *written, *tables, *(tensor.data_ptr() for tensor in read_tensors)
        return self._call_rowwise(
            _ROUND_COLUMNS, values.numel(), _ROUNDING_CALL.pack(*values.shape, descends, *addresses)
        )

    def attention(
        self,
        query: Tensor,
        key: KeyOrValueStates,
        value: KeyOrValueStates,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Return the output of each query: (batch, queries, heads, value width)."""
        batch, heads, queries, width = query.shape
        key_heads, keys, value_width = key.numbers.shape[1], key.numbers.shape[2], value.numbers.shape[-1]
        seen = mask_struct_fields_or_none(mask, (batch, heads, queries, keys))
        struct_fields = [
            states_struct_fields_or_none(query),
            states_struct_fields_or_none(*key),
            states_struct_fields_or_none(*value),
            seen,
        ]
        fits = key.numbers.shape == (batch, key_heads, keys, width) and key_heads > 0 and heads % key_heads == 0
        fits = fits and value.numbers.shape == (batch, key_heads, keys, value_width) and query.dtype in TYPES
        fits = fits and query.numel() * keys * value_width > 0 and not is_recording_operations()
        if not fits or None in struct_fields or is_batched_or_under_functorch(query):
            return reference.attention(query, key, value, mask, scaling, softcap)
        out = torch.empty(batch, queries, heads, value_width, dtype=query.dtype, device="cpu")
        sizes = batch, key_heads, heads // key_heads, queries, keys, width, value_width
        states = [number for states_struct in struct_fields for number in states_struct or ()]
        work, fields = attention_work_and_struct_fields(sizes, states, scaling, softcap, out.data_ptr())
        self._call_rowwise(ATTENTION, work, ATTENTION_CALL.pack(*fields))
        return out

    def encode_states(self, numbers: Tensor, into: KeyOrValueStates) -> None:
        """Write states as 8-bit codes with a scale for each row."""
        struct_fields = states_struct_fields_or_none(numbers), states_struct_fields_or_none(*into)
        fits = into.numbers.shape == numbers.shape and into.numbers.dtype in (torch.int8, numbers.dtype)
        fits = fits and numbers.dtype in TYPES and numbers.numel() > 0
        if not fits or None in struct_fields or is_recording_operations() or is_batched_or_under_functorch(numbers):
            reference.encode_states(numbers, into)
        else:
            call = CODING_CALL.pack(*numbers.shape, *[number for fields in struct_fields for number in fields or ()])
            self._call_rowwise(ENCODE_STATES, numbers.numel(), call)

    def _are_c_readable_and_alike(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether all are plain CPU tensors of one shape and dtype, float32 or bfloat16, with numbers in them."""
        if not self.serves_rows(x) or not x.numel() or is_recording_operations():
            return False
        tensors = [x, *(tensor for tensor in others if tensor is not None)]
        if any(map(is_batched_or_under_functorch, tensors)):
            return False
        return all(
            is_plain_cpu_tensor(tensor) and tensor.dtype is x.dtype and tensor.shape == x.shape for tensor in tensors
        )


def attention_work_and_struct_fields(
    sizes: tuple[int, ...], states_fields: Sequence[int], scaling: float, softcap: float | None, out_address: int
) -> tuple[int, tuple[float, ...]]:
    """Return how many multiplications attention takes, and the fields of struct attention.

    Args:
        sizes: the first seven fields.
        states_fields: ``states_struct_fields_or_none`` queries, keys, values and mask.
        scaling: of the scores.
        softcap: of the scores, or None.
        out_address: the address of the output.
    """
    batch, key_heads, shared, queries, keys, width, value_width = sizes
    work = batch * key_heads * shared * queries * keys * (width + value_width)
    return work, (*sizes, scaling, softcap or 0.0, *states_fields, out_address)


NO_STATES = (0,) * 9


def states_struct_fields_or_none(numbers: Tensor, scales: Tensor | None = None) -> tuple[int, ...] | None:
    """Return the fields of struct states; None where C cannot read a row's numbers side by side."""
    if numbers.dtype is not torch.int8:
        return (
            None
            if scales is not None
            else _typed_states_fields_or_none(TYPES.get(numbers.dtype), numbers, (0, 0, 0, 0))
        )
    if scales is None or scales.dtype is not torch.float32 or scales.shape != (*numbers.shape[:3], 1):
        return None
    return (
        _typed_states_fields_or_none(CODES8, numbers, (scales.data_ptr(), *scales.stride()[:3]))
        if is_plain_cpu_tensor(scales)
        else None
    )


def _typed_states_fields_or_none(
    type_id: int | None, numbers: Tensor, scale_fields: tuple[int, ...]
) -> tuple[int, ...] | None:
    plain = type_id is not None and numbers.dim() == 4 and (numbers.stride(3) == 1 or numbers.shape[3] == 1)
    if not plain or not is_plain_cpu_tensor(numbers):
        return None
    return type_id or 0, numbers.data_ptr(), scale_fields[0], *numbers.stride()[:3], *scale_fields[1:]


def mask_struct_fields_or_none(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the fields of a mask that broadcasts to (batch, heads, queries, keys), or ``NO_STATES`` without one."""
    if mask is None:
        return NO_STATES
    return _typed_states_fields_or_none(
        CODES8 if mask.dtype is torch.bool else TYPES.get(mask.dtype), mask.expand(shape), (0, 0, 0, 0)
    )


def activation_struct_fields(activation: Activation) -> tuple[float, ...]:
    """Return the terms of struct gated, and whether it is a squared ReLU, which has none."""
    if isinstance(activation, SquaredReLU):
        return *[0.0] * _TERMS, True
    return *(*activation.terms, *[0.0] * _TERMS)[:_TERMS], False


def _address_or_zero(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_c_readable_array(tensor: Tensor) -> bool:
    """Whether C may read x as numbers of one of ``TYPES``, side by side."""
    return (
        tensor.dtype in TYPES
        and tensor.numel() > 0
        and is_plain_cpu_tensor(tensor)
        and tensor.is_contiguous()
        and not is_recording_operations()
    )


def _are_c_codes_and_scales(codes_and_scales: tuple[Tensor, Tensor], block_count: int) -> bool:
    """Whether C may read and write 8-bit codes and scales as those of ``block_count`` blocks."""
    return is_c_array(codes_and_scales[0], torch.int8, (block_count, BLOCK)) and is_c_array(
        codes_and_scales[1], torch.float32, (block_count, 1)
    )


def _can_write_dtype(input_dtype: torch.dtype, output_dtype: torch.dtype) -> bool:
    """Whether C writes one dtype where it reads another, which is float32 or bfloat16."""
    return output_dtype in (input_dtype, torch.float32)


def _has_dense_rows(x: Tensor) -> bool:
    """Whether rows of numbers side by side fill the memory of x, in any order of the rows."""
    if x.is_contiguous():
        return True
    return x.stride(-1) == 1 and torch.empty_like(x, device="meta").stride() == x.stride()


def _common_row_stride_or_none(x: Tensor, other: Tensor | None) -> int | None:
    """Return the elements from a row to the next, of both if there is another; None where rows are not even."""
    step = _row_stride_or_none(x)
    return step if other is None or _row_stride_or_none(other) == step else None


def _row_stride_or_none(x: Tensor) -> int | None:
    if x.is_contiguous():
        return x.shape[-1]
    shape, strides = x.shape[:-1], x.stride()[:-1]
    # As of any vector that is not contiguous
    if x.stride(-1) != 1:
        return None
    even = all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(len(shape) - 1))
    return strides[-1] if even else None
