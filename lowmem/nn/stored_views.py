"""Copies, views and writes of stored weights: whole rows and transposes stay stored; writes are errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.nn.forms import CodedForm, Form
from lowmem.nn.stored_tensor import (
    OPERATORS,
    PROGRAM_ROWS,
    REMEDY,
    StoredTensor,
    check_needs_no_weight_gradient,
    implements_for_stored,
    needs_dispatcher,
)
from lowmem.quant.quantize_tensor import checked_rounded_copy, quantize, relative_error

aten = torch.ops.aten


@implements_for_stored("detach")
def _stored_detach(weight: StoredTensor) -> StoredTensor:
    """Return a view without gradient; parts that require none stay the same parameters."""
    return weight.with_parts([part.detach() if part.requires_grad else part for part in weight.parts])


@implements_for_stored("alias", "lift_fresh")
def _stored_alias(weight: StoredTensor) -> StoredTensor:
    return weight.with_parts(weight.parts)


@implements_for_stored("clone")
def _stored_clone(weight: StoredTensor, *, memory_format: Any = None) -> Any:
    if weight.swapped and memory_format is torch.contiguous_format:
        # A view of other sizes may follow, which the parts of a transposed weight do not have
        return NotImplemented
    return weight.with_parts([part.clone() for part in weight.parts])


@implements_for_stored("_to_copy")
def _stored_to_copy(
    weight: StoredTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
) -> Any:
    """Move the parts to a device; a cast changes only the dtype of the stored tensor, and not the parts."""
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    parts: Sequence[Tensor] = weight.parts
    if device is not None:
        parts = [
            aten._to_copy.default(part, device=device, non_blocking=kwargs.get("non_blocking", False))
            for part in parts
        ]
    return weight.with_parts(parts, dtype=dtype)


def _nonnegative_dim(dim: int, dim_count: int) -> int:
    """Return the index of a dimension, from 0 on: -1 of ``dim_count`` dimensions is ``count - 1``."""
    return dim + dim_count if dim < 0 else dim


@implements_for_stored("t", "transpose.int", "permute")
def _stored_transpose(weight: StoredTensor, *dims: Any) -> Any:
    """Return ``t()``, ``transpose(dim0, dim1)`` or ``permute(dims)`` if it transposes the matrices of the weight."""
    count = weight.dim()
    last = count - 2, count - 1
    if len(dims) == 1 and [_nonnegative_dim(dim, count) for dim in dims[0]] != [*range(count - 2), *reversed(last)]:
        return NotImplemented
    if len(dims) == 2 and {_nonnegative_dim(dim, count) for dim in dims} != {*last}:
        return NotImplemented
    return (
        weight.with_parts(weight.parts, swapped=not weight.swapped)
        if len(weight.tail) == 1 < count
        else NotImplemented
    )


@implements_for_stored("expand")
def _stored_expand(weight: StoredTensor, size: Sequence[int], **_: Any) -> Any:
    """Repeat rows or whole matrices, as matmul does for an input of three dimensions that is not contiguous: backward
    would keep dense ones."""
    inside = 2 if weight.swapped else len(weight.tail)
    if any(new not in (-1, old) for new, old in zip(size[-inside:], weight.shape[-inside:], strict=True)):
        return NotImplemented
    rows = [*size[:-2], -1] if weight.swapped else size[:-inside]
    return weight.with_parts([part.expand(*rows, -1) for part in weight.parts])


@implements_for_stored("view", "_unsafe_view", "reshape", "_reshape_alias")
def _stored_view(weight: StoredTensor, size: Sequence[int], *_: Any) -> Any:
    """Return a view of the same rows: DeepSeek-V4 multiplies those of a matrix as a stack of matrices."""
    size = list(size)
    if size == list(weight.shape):
        return _stored_alias(weight)
    if -1 in size:
        size[size.index(-1)] = weight.numel() // max(-math.prod(size), 1)
    dims = len(weight.tail)
    if weight.swapped or size[-dims:] != [*weight.tail] or math.prod(size) != weight.numel():
        return NotImplemented
    return weight.with_parts([part.reshape(*size[:-dims], part.shape[-1]) for part in weight.parts])


def _select_stored_rows(weight: StoredTensor, select: Callable[[Tensor], Any]) -> Any:
    """Return the rows that ``select`` returns of each part: a stored tensor, or a list of them."""
    parts = zip(weight.form.parts, weight.parts, strict=True)
    # The order of columns has no rows
    selected = [part if name == "order" else select(part) for name, part in parts]
    if isinstance(selected[0], Tensor):
        return weight.with_parts(selected)
    each = [[part_rows] * len(selected[0]) if isinstance(part_rows, Tensor) else part_rows for part_rows in selected]
    return [weight.with_parts(parts) for parts in zip(*each, strict=True)]


def _register_row_operator(operator_name: str, overload: str = "default") -> None:
    """Let an operator take rows of the parts if its ``dim`` counts rows: whole rows, as of an expert, stay stored."""
    operator = getattr(getattr(aten, operator_name), overload)
    arguments = operator._schema.arguments[1:]
    place = [argument.name for argument in arguments].index("dim")

    def stored_rows_or_alias(weight: StoredTensor, *positional: Any, **keywords: Any) -> Any:
        args = [
            *positional,
            *(keywords.pop(argument.name, argument.default_value) for argument in arguments[len(positional) :]),
        ]
        args[place] = dim = _nonnegative_dim(args[place], weight.dim())
        if keywords or not 0 <= dim < weight.dim():
            return NotImplemented
        if dim < weight.leading_dim_count and not (weight.swapped and dim >= weight.dim() - 2):
            return _select_stored_rows(weight, lambda part: operator(part, *args))
        return (
            _stored_alias(weight)
            if operator_name == "slice" and _is_full_slice(weight.shape[dim], *args[1:])
            else NotImplemented
        )

    OPERATORS[operator] = stored_rows_or_alias
    PROGRAM_ROWS.update(
        {
            getattr(owner, operator_name): stored_rows_or_alias
            for owner in (Tensor, torch)
            if hasattr(owner, operator_name)
        }
    )


def _is_full_slice(size: int, start: int | None, end: int | None, step: int) -> bool:
    return not start and (end is None or end >= size) and step == 1


for _names in (
    ("select", "int"),
    ("slice", "Tensor"),
    ("split", "Tensor"),
    ("unbind", "int"),
    ("split_with_sizes",),
    ("index_select",),
):
    _register_row_operator(*_names)


def _indexed_stored_rows(weight: StoredTensor, index: Any) -> Any:
    """Return ``weight[index]`` for integers and slices that select whole rows."""
    result: Any = weight
    for dim, dim_index in enumerate(index if isinstance(index, tuple) else (index,)):
        dim -= weight.dim() - result.dim()
        if type(dim_index) is int:
            result = OPERATORS[aten.select.int](result, dim, dim_index)
        elif type(dim_index) is slice:
            result = OPERATORS[aten.slice.Tensor](result, dim, dim_index.start, dim_index.stop, dim_index.step or 1)
        else:
            return NotImplemented
        if result is NotImplemented:
            return result
    return result


def _stored_narrow(weight: StoredTensor, dim: int, start: int, length: int) -> Any:
    start = _nonnegative_dim(start, weight.shape[dim])
    return OPERATORS[aten.slice.Tensor](weight, dim, start, start + length)


def _stored_split(weight: StoredTensor, split_size: int | Sequence[int], dim: int = 0) -> Any:
    operator = aten.split.Tensor if isinstance(split_size, int) else aten.split_with_sizes.default
    return OPERATORS[operator](weight, split_size, dim)


def _stored_chunk(weight: StoredTensor, chunks: int, dim: int = 0) -> Any:
    return _stored_split(weight, -(-weight.shape[dim] // chunks), dim)


PROGRAM_ROWS[Tensor.__getitem__] = _indexed_stored_rows
PROGRAM_ROWS[Tensor.narrow] = PROGRAM_ROWS[torch.narrow] = _stored_narrow
PROGRAM_ROWS[Tensor.split] = PROGRAM_ROWS[torch.split] = _stored_split
PROGRAM_ROWS[Tensor.chunk] = PROGRAM_ROWS[torch.chunk] = _stored_chunk
PROGRAM_ROWS[Tensor.detach] = PROGRAM_ROWS[torch.detach] = PROGRAM_ROWS[Tensor.data.__get__] = _stored_detach  # type: ignore[attr-defined]


@implements_for_stored("index.Tensor")
def _stored_index(weight: StoredTensor, indices: Sequence[Tensor | None]) -> Any:
    if len(indices) != 1 or indices[0] is None or (weight.swapped and weight.dim() == 2):
        return NotImplemented
    if isinstance(indices[0], StoredTensor):
        return NotImplemented
    if indices[0].dtype in (torch.bool, torch.uint8) and indices[0].dim() > 1:
        return NotImplemented
    return _select_stored_rows(weight, lambda part: aten.index.Tensor(part, indices))


@implements_for_stored("copy_")
def _copy_between_stored(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copy a stored tensor into one of the same form and shape; any other write to a stored tensor is an error."""
    if not isinstance(target, StoredTensor):
        return NotImplemented
    described = (target.form, target.tail, target.swapped, target.shape)
    if isinstance(source, StoredTensor) and (source.form, source.tail, source.swapped, source.shape) == described:
        for into, part in zip(target.parts, source.parts, strict=True):
            into.copy_(part)
        return target
    return NotImplemented


@implements_for_stored("_has_compatible_shallow_copy_type")
def _has_compatible_shallow_copy_type(_: Any, __: Any) -> bool:
    return False


# Functions, above autograd


@implements_for_stored(Tensor.__getitem__)
def _cached_matrix_of_stored_stack(weight: Any, index: Any) -> Any:
    """Return a matrix of a stack; it is cached, with its C handle. Other indices are left to the operators."""
    if not isinstance(weight, StoredTensor):
        return NotImplemented
    parts = weight.parts
    if parts[0].dim() < 3 or needs_dispatcher(*parts) or (weight.swapped and parts[0].dim() < 4):
        return NotImplemented
    if type(index) is Tensor and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
        index = int(index)
    if type(index) is not int:
        return NotImplemented
    check_needs_no_weight_gradient(weight)
    at = [part.data_ptr() for part in parts]
    cached: tuple[list[int], dict[int, StoredTensor]] | None = weight.__dict__.get("_matrices")
    if cached is None or cached[0] != at:
        cached = weight.__dict__["_matrices"] = at, {}
    if index not in cached[1]:
        with torch._C.DisableTorchFunctionSubclass():
            cached[1][index] = weight.with_parts([part.detach()[index] for part in parts])
    return cached[1][index]


@implements_for_stored(Tensor.__setitem__, Tensor.apply_, Tensor.map_, Tensor.map2_, Tensor.fill_diagonal_)
def _refuse_write_to_stored(weight: Any, *_: Any) -> Any:
    if not isinstance(weight, StoredTensor):
        return NotImplemented
    raise RuntimeError(f"this would write to a weight that is stored in {weight.form}: {REMEDY}")


@implements_for_stored(Tensor.share_memory_)
def _share_memory_of_parts(weight: StoredTensor) -> StoredTensor:
    for part in weight.__dict__.get("sources", weight.parts):
        part.share_memory_()
    return weight


@implements_for_stored(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
def _refuse_access_to_dense_memory(weight: StoredTensor, *_: Any, **__: Any) -> Any:
    raise TypeError(f"a weight that is stored in {weight.form} has no dense memory: call weight.dequantize() first")


@implements_for_stored(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _refuse_grad_of_stored_weight(weight: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        peft = ""
        if weight.swapped != weight.form.transposed:
            peft = (
                "; PEFT's DoRA (use_dora=True) of embeddings and Conv1D, and PiSSA of Conv1D, take it transposed as a"
            )
            peft += " parameter: choose neither, or leave the layer dense by skip="
        elif weight.dim() == 1:
            peft = "; PEFT's bias='lora_only' trains biases: choose bias='none', or store in 8 or 4 bits"
        raise RuntimeError(
            f"a weight that is stored in {weight.form} is frozen: train an adapter (lowmem.LoRA), or make the layer "
            f"dense again first: lowmem.restore(model){peft}"
        )
    return weight


@implements_for_stored(Tensor.data.__set__)  # type: ignore[attr-defined]
def _requantize_and_set_data(weight: Any, new_values: Tensor) -> Any:
    """Replace a weight's values; dense values are first quantized or rounded to its form.

    Warns of the error if they are the weight's own values with a change, as those of a merge are.
    """
    if not isinstance(weight, StoredTensor):
        return NotImplemented
    if weight.swapped or weight.in_program:
        name = "weight.T.data" if weight.swapped else "weight.data"
        raise RuntimeError(f"{name} = ... would write to a weight that is stored in {weight.form}: {REMEDY}")
    made = new_values if isinstance(new_values, StoredTensor) else stored_in_same_form(weight, new_values)
    if not weight.form.has_same_encoding(made.form):
        raise RuntimeError(f"weight.data = ...: this weight is stored in {weight.form}, and the value in {made.form}")
    # A bias for a larger vocabulary
    if made.tail != weight.tail and not (made.dim() == weight.dim() == 1):
        raise RuntimeError(
            f"weight.data = ...: this weight has rows of shape {weight.tail}, and the value of {made.tail}"
        )
    if made is not new_values and made.shape == weight.shape:
        _warn_if_small_change_requantized(weight, new_values, made)
    # A module's parameters; a kernel has more dimensions
    sources = weight.__dict__.get("sources", weight.parts)
    for name, source, part in zip(weight.form.parts, sources, made.parts, strict=True):
        source.data = part.detach().view(part.shape if source.dim() == part.dim() else (*part.shape[:-1], *made.tail))
        weight.__dict__[name] = source if source.dim() == part.dim() else source.flatten(part.dim() - 1)
    weight.tail = made.tail
    if "made_of" in weight.__dict__:
        weight.__dict__["made_of"] = sources[-1].data_ptr(), made.dtype
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(weight, made)  # type: ignore[attr-defined]  # the sizes, dtype and device
    return None


def _warn_if_small_change_requantized(weight: StoredTensor, new_values: Tensor, requantized: StoredTensor) -> None:
    if not isinstance(weight.form, CodedForm) or new_values.is_meta:
        return
    old, new = (dense.dequantize() for dense in (weight.to(new_values.device), requantized))
    # Rows that stay keep their bits
    changed = (new_values != old).reshape(len(new_values), -1).any(1)
    change, error = (relative_error(new_values[changed], dense[changed]) for dense in (old, new))
    # Values of another weight differ by about their own size
    if error and change < 0.5:
        warnings.warn(
            f"weight.data = ... makes a relative change of {change:.1g} to a weight that is stored in {weight.form}, "
            f"which was quantized again: that adds a relative error of {error:.1g}. PEFT's merge of DoRA sets data: "
            "call lowmem.restore(model) before it, and convert what it returns; or merge a LoRA by lowmem.merge, "
            "which reports the error and takes to= and at_most=",
            UserWarning,
            stacklevel=4,  # where the values are set
        )


def stored_in_same_form(weight: StoredTensor, dense_values: Tensor) -> StoredTensor:
    """Store dense values in the form of a weight; rows that equal the weight's own rows keep their bytes.

    Args:
        weight: has as many trailing dimensions per row as ``dense_values``.
        dense_values: floating point (*lead, *tail).

    Raises:
        TypeError, ValueError: values that ``quantize`` or ``checked_rounded_copy`` rejects.
    """
    lead = dense_values.dim() - len(weight.tail)
    form: Form = weight.form
    rows = dense_values.detach().flatten(lead) if len(weight.tail) > 1 else dense_values.detach()
    if isinstance(form, CodedForm):
        stored = quantize(
            rows, form.format, block_size=form.block_size, scales=form.scale_encoding, search=form.method != "absmax"
        )
        parts = form.codes_and_scale_bytes(stored)
    else:
        parts = (checked_rounded_copy(rows, form.dtype, "weight"),)
    # Old rows of a resized vocabulary keep their bytes: quantizing them again may find other scales.
    if weight.leading_dim_count == 1 and weight.values_per_row == rows.shape[-1]:
        count = min(len(rows), weight.shape[0])
        old_values = weight.with_parts([part[:count] for part in weight.parts]).dequantize(rows.dtype).view(count, -1)
        same = (old_values == rows[:count]).all(1)
        for part, old in zip(parts, weight.parts, strict=True):
            part[:count][same] = old[:count][same].view(-1, part.shape[1])
    return StoredTensor(form, parts, dense_values.shape[lead:], dense_values.dtype)
