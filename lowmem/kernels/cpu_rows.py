"""Row-wise functions in C: norms, activations, cross entropies, attention, 8-bit codes and the rounding of columns.
What C does not take falls back to ``reference``."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from types import ModuleType

import torch
from torch import Tensor

from lowmem.kernels import reference
from lowmem.kernels.codes import BLOCK
from lowmem.kernels.columns import PANEL
from lowmem.kernels.memory import TYPES, floats, is_array, is_batch, is_real, is_traced
from lowmem.quant.backend import Activation, Columns, HeadStates
from lowmem.quant.formats import Format

_LEVELS = 16  # of csrc/columns.h
_TERMS = 7  # of struct gated in csrc/row_calls.h

# enum row_function of csrc/plan.h, and the layouts of the structs in csrc/row_calls.h
NORM, GATED, _ENTROPY, _ENCODE8, _DECODE8, _ROUND_COLUMNS, ATTENTION, ENCODE_STATES = range(8)
COMPARE, COMPARE_CALL = 10, Struct("@iiqqPPP")
NORM_CALL, GATED_CALL = Struct("@iiqqffqPPPP"), Struct("@iiqqqq7fPPPPP")
_ENTROPY_CALL, _SAVED8_CALL, _ROUNDING_CALL = Struct("@iiqqfPPP"), Struct("@iqqPPPP"), Struct("@qqiPPPPPPPP")
_STATES = "iPP6q"
ATTENTION_CALL, CODING_CALL = Struct(f"@7q2f{_STATES * 4}P"), Struct(f"@4q{_STATES * 2}")
ROW_TYPES = torch.float32, torch.bfloat16
CODES8 = 8  # of csrc/plan.h, in place of a type


class CpuRows:
    """The row-wise part of the backend in C for one ISA, which ``lowmem.kernels.cpu.Kernel`` completes."""

    native: ModuleType
    _isa: int

    def _run(self, function: int, numbers: int, call: bytes) -> None:
        self.native.rowwise(self._isa, function, torch.get_num_threads(), numbers, call)

    def serves_rows(self, x: Tensor) -> bool:
        """Whether C computes norms and activations of such tensors: float32 and bfloat16."""
        return x.dtype in ROW_TYPES

    def norm(self, x: Tensor, factor: Tensor, eps: float, rounds_first: bool) -> Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * factor`` of rows."""
        if not (self._takes(x) and is_array(factor, torch.float32, x.shape[-1:]) and _is_dense(x)):
            return reference.norm(x, factor, eps, rounds_first)
        return self._norm(x, factor, eps, rounds_first, None)

    def norm_grad(self, grad: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
        """Return the gradient of x for ``norm``."""
        grad = grad.to(x.dtype)
        if not (self._takes(x, grad) and is_array(factor, torch.float32, x.shape[-1:]) and _is_dense(x)):
            return reference.norm_grad(grad, x, factor, eps)
        grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
        return self._norm(x, factor, eps, False, grad)

    def _norm(self, x: Tensor, factor: Tensor, eps: float, rounds_first: bool, grad: Tensor | None) -> Tensor:
        out, width = torch.empty_like(x), x.shape[-1]
        rows, of_grad = x.numel() // width, 0 if grad is None else grad.data_ptr()
        addresses = x.data_ptr(), of_grad, factor.data_ptr(), out.data_ptr()
        call = NORM_CALL.pack(TYPES[x.dtype], 0, rows, width, eps, 0.0, rounds_first, *addresses)
        self.native.rowwise(self._isa, NORM, torch.get_num_threads(), rows * width, call)
        return out

    def gated(self, a: Tensor, b: Tensor | None, activation: Activation, dtype: torch.dtype) -> Tensor:
        """Return ``act(a) b`` in ``dtype``, contiguous."""
        step = _step(a, b)
        if step is None or not _widens(a.dtype, dtype) or not self._takes(a, b):
            return reference.gated(a, b, activation, dtype)
        out = torch.empty(a.shape, dtype=dtype, device=a.device)
        self._gated(a, b, None, activation, step, (out, None), a.shape[-1])
        return out

    def gated_grad(
        self, grad: Tensor, a: Tensor, b: Tensor | None, activation: Activation, into: tuple[Tensor, Tensor | None]
    ) -> None:
        """Write the gradients of a and b for ``gated``."""
        grad = grad.to(into[0].dtype).contiguous()
        step, out_step = _step(a, b), _step(*into)
        plain = is_real(grad) and grad.shape == a.shape and _widens(a.dtype, grad.dtype) and self._takes(a, b)
        plain = plain and (b is None) == (into[1] is None) and self._takes(*into) and into[0].shape == a.shape
        if step is None or out_step is None or not plain:
            reference.gated_grad(grad, a, b, activation, into)
        else:
            self._gated(a, b, grad, activation, step, into, out_step)

    def _gated(
        self,
        a: Tensor,
        b: Tensor | None,
        grad: Tensor | None,
        activation: Activation,
        step: int,
        into: tuple[Tensor, Tensor | None],
        out_step: int,
    ) -> None:
        width, terms = a.shape[-1], terms_of(activation)
        types, sizes = (TYPES[a.dtype], TYPES[into[0].dtype]), (a.numel() // width, width, step, out_step)
        self._run(GATED, a.numel(), GATED_CALL.pack(*types, *sizes, *terms, *map(_address, (a, b, grad, *into))))

    def entropies(self, logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
        """Return the cross entropies of rows; ``logits`` become their gradient."""
        targets = targets.contiguous()
        fits = _is_memory(logits) and logits.dim() == 2 and is_array(targets, torch.int64, logits.shape[:1])
        if not fits or int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]:
            return reference.entropies(logits, targets, smoothing, gradient)
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        addresses = logits.data_ptr(), targets.data_ptr(), losses.data_ptr()
        call = _ENTROPY_CALL.pack(TYPES[logits.dtype], gradient, *logits.shape, smoothing, *addresses)
        self._run(_ENTROPY, logits.numel(), call)
        return losses

    def encode_8bit(self, numbers: Tensor, into: tuple[Tensor, Tensor]) -> tuple[int, int]:
        """Write 8-bit codes and scales; return how many numbers and codes are not zero."""
        if not (_is_memory(numbers) and numbers.dim() == 1 and _are_codes(into, -(-len(numbers) // BLOCK))):
            return reference.encode_8bit(numbers, into)
        counts = torch.zeros(3, dtype=torch.int64, device=numbers.device)  # of scales that are not finite, too
        addresses = (one.data_ptr() for one in (numbers, *into, counts))
        call = _SAVED8_CALL.pack(TYPES[numbers.dtype], len(into[0]), len(numbers), *addresses)
        self._run(_ENCODE8, len(numbers), call)
        before, after, _ = counts.tolist()
        return before, after

    def decode_8bit(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``codes * scales`` in ``dtype``."""
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        if not (_is_memory(out) and _are_codes((codes, scales), len(codes))):
            return reference.decode_8bit(codes, scales, dtype)
        addresses = out.data_ptr(), codes.data_ptr(), scales.data_ptr(), 0
        self._run(_DECODE8, out.numel(), _SAVED8_CALL.pack(TYPES[dtype], len(codes), out.numel(), *addresses))
        return out

    def round_columns(self, form: Format, columns: Columns, descends: bool) -> None:
        """Round columns of a weight one after the other."""
        values, scales, pivots, matrix, approximate, found = columns
        pivots, matrix, shape, count = pivots.contiguous(), matrix.contiguous(), values.shape, len(values)
        fits = len(form.levels) == _LEVELS and values.dim() == 2 and count <= PANEL and values.numel() > 0
        fits = fits and is_array(found, torch.uint8, shape) and not is_traced()
        fits = fits and all(is_array(one, torch.float32, shape) for one in (values, scales, approximate))
        fits = fits and is_array(pivots, torch.float32, (count,)) and is_array(matrix, torch.float32, (count, count))
        if not fits:
            return reference.round_columns(form, columns, descends)
        tables = (floats(numbers).buffer_info()[0] for numbers in (form.levels, form.boundaries))
        given = pivots, matrix, scales, found
        written = values.data_ptr(), approximate.data_ptr()
        addresses = *written, *tables, *(one.data_ptr() for one in given)
        return self._run(_ROUND_COLUMNS, values.numel(), _ROUNDING_CALL.pack(*values.shape, descends, *addresses))

    def attention(
        self,
        query: Tensor,
        key: HeadStates,
        value: HeadStates,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Return the output of each query: (batch, queries, heads, value width)."""
        batch, heads, queries, width = query.shape
        key_heads, keys, value_width = key.numbers.shape[1], key.numbers.shape[2], value.numbers.shape[-1]
        seen = mask_states(mask, (batch, heads, queries, keys))
        given = [states_of(query), states_of(*key), states_of(*value), seen]
        fits = key.numbers.shape == (batch, key_heads, keys, width) and key_heads > 0 and heads % key_heads == 0
        fits = fits and value.numbers.shape == (batch, key_heads, keys, value_width) and query.dtype in TYPES
        fits = fits and query.numel() * keys * value_width > 0 and not is_traced()
        if not fits or None in given or is_batch(query):
            return reference.attention(query, key, value, mask, scaling, softcap)
        out = torch.empty(batch, queries, heads, value_width, dtype=query.dtype, device="cpu")
        sizes = batch, key_heads, heads // key_heads, queries, keys, width, value_width
        states = [number for one in given for number in one or ()]
        work, fields = attention_call(sizes, states, scaling, softcap, out.data_ptr())
        self._run(ATTENTION, work, ATTENTION_CALL.pack(*fields))
        return out

    def encode_states(self, numbers: Tensor, into: HeadStates) -> None:
        """Write states as 8-bit codes with a scale for each row."""
        given = states_of(numbers), states_of(*into)
        fits = into.numbers.shape == numbers.shape and into.numbers.dtype in (torch.int8, numbers.dtype)
        fits = fits and numbers.dtype in TYPES and numbers.numel() > 0
        if not fits or None in given or is_traced() or is_batch(numbers):
            reference.encode_states(numbers, into)
        else:
            call = CODING_CALL.pack(*numbers.shape, *[number for one in given for number in one or ()])
            self._run(ENCODE_STATES, numbers.numel(), call)

    def _takes(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether all are plain CPU tensors of one shape and dtype, float32 or bfloat16, with numbers in them."""
        if not self.serves_rows(x) or not x.numel() or is_traced():
            return False
        tensors = [x, *(one for one in others if one is not None)]
        if any(map(is_batch, tensors)):
            return False
        return all(is_real(one) and one.dtype is x.dtype and one.shape == x.shape for one in tensors)


def attention_call(
    sizes: tuple[int, ...], states: Sequence[int], scaling: float, softcap: float | None, out: int
) -> tuple[int, tuple[float, ...]]:
    """Return how many multiplications attention takes, and the fields of struct attention.

    Args:
        sizes: the first seven fields.
        states: ``states_of`` queries, keys, values and mask.
        scaling: of the scores.
        softcap: of the scores, or None.
        out: the address of the output.
    """
    batch, key_heads, shared, queries, keys, width, value_width = sizes
    work = batch * key_heads * shared * queries * keys * (width + value_width)
    return work, (*sizes, scaling, softcap or 0.0, *states, out)


NO_STATES = (0,) * 9


def states_of(numbers: Tensor, scales: Tensor | None = None) -> tuple[int, ...] | None:
    """Return the fields of struct states; None where C cannot read a row's numbers side by side."""
    if numbers.dtype is not torch.int8:
        return None if scales is not None else _states(TYPES.get(numbers.dtype), numbers, (0, 0, 0, 0))
    if scales is None or scales.dtype is not torch.float32 or scales.shape != (*numbers.shape[:3], 1):
        return None
    return _states(CODES8, numbers, (scales.data_ptr(), *scales.stride()[:3])) if is_real(scales) else None


def _states(kind: int | None, numbers: Tensor, scales: tuple[int, ...]) -> tuple[int, ...] | None:
    plain = kind is not None and numbers.dim() == 4 and (numbers.stride(3) == 1 or numbers.shape[3] == 1)
    if not plain or not is_real(numbers):
        return None
    return kind or 0, numbers.data_ptr(), scales[0], *numbers.stride()[:3], *scales[1:]


def mask_states(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return ``states_of`` a mask that broadcasts to (batch, heads, queries, keys), or ``NO_STATES`` without one."""
    if mask is None:
        return NO_STATES
    return _states(CODES8 if mask.dtype is torch.bool else TYPES.get(mask.dtype), mask.expand(shape), (0, 0, 0, 0))


def terms_of(activation: Activation) -> tuple[float, ...]:
    """Return the terms of struct gated."""
    return (*activation.terms, *[0.0] * _TERMS)[:_TERMS]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _is_memory(x: Tensor) -> bool:
    """Whether C may read x as numbers of one of ``TYPES``, side by side."""
    return x.dtype in TYPES and x.numel() > 0 and is_real(x) and x.is_contiguous() and not is_traced()


def _are_codes(codes: tuple[Tensor, Tensor], blocks: int) -> bool:
    """Whether C may read and write 8-bit codes and scales as those of ``blocks`` blocks."""
    return is_array(codes[0], torch.int8, (blocks, BLOCK)) and is_array(codes[1], torch.float32, (blocks, 1))


def _widens(narrow: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether C writes one dtype where it reads another, which is float32 or bfloat16."""
    return dtype in (narrow, torch.float32)


def _is_dense(x: Tensor) -> bool:
    """Whether rows of numbers side by side fill the memory of x, in any order of the rows."""
    if x.is_contiguous():
        return True
    return x.stride(-1) == 1 and torch.empty_like(x, device="meta").stride() == x.stride()


def _step(x: Tensor, other: Tensor | None) -> int | None:
    """Return the elements from a row to the next, of both if there is another; None where rows are not even."""
    step = _step_of(x)
    return step if other is None or _step_of(other) == step else None


def _step_of(x: Tensor) -> int | None:
    if x.is_contiguous():
        return x.shape[-1]
    shape, strides = x.shape[:-1], x.stride()[:-1]
    if x.stride(-1) != 1:  # as of any vector that is not contiguous
        return None
    even = all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(len(shape) - 1))
    return strides[-1] if even else None
