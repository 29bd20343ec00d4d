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
    implements,
    is_recorded,
    refuse_gradient,
)
from lowmem.quant.quantize import quantize, relative_error, round_to

aten = torch.ops.aten


@implements("detach")
def _detach(weight: StoredTensor) -> StoredTensor:
    """Return a view without gradient; parts that require none stay the same parameters."""
    return weight.like([part.detach() if part.requires_grad else part for part in weight.parts])


@implements("alias", "lift_fresh")
def _alias(weight: StoredTensor) -> StoredTensor:
    return weight.like(weight.parts)


@implements("clone")
def _clone(weight: StoredTensor, *, memory_format: Any = None) -> Any:
    if weight.swapped and memory_format is torch.contiguous_format:
        return NotImplemented  # a view of other sizes may follow, which the parts of a transposed weight do not have
    return weight.like([part.clone() for part in weight.parts])


@implements("_to_copy")
def _to_copy(weight: StoredTensor, *, dtype: torch.dtype | None = None, device: Any = None, **named: Any) -> Any:
    """Move the parts to a device; a cast changes only the dtype of the stored tensor, and not the parts."""
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    parts: Sequence[Tensor] = weight.parts
    if device is not None:
        parts = [
            aten._to_copy.default(part, device=device, non_blocking=named.get("non_blocking", False))
            for part in parts
        ]
    return weight.like(parts, dtype=dtype)


def _wrapped_dim(dim: int, count: int) -> int:
    """Return the index of a dimension, from 0 on: -1 of ``count`` dimensions is ``count - 1``."""
    return dim + count if dim < 0 else dim


@implements("t", "transpose.int", "permute")
def _transpose(weight: StoredTensor, *dims: Any) -> Any:
    """Return ``t()``, ``transpose(dim0, dim1)`` or ``permute(dims)`` if it transposes the matrices of the weight."""
    count = weight.dim()
    last = count - 2, count - 1
    if len(dims) == 1 and [_wrapped_dim(dim, count) for dim in dims[0]] != [*range(count - 2), *reversed(last)]:
        return NotImplemented
    if len(dims) == 2 and {_wrapped_dim(dim, count) for dim in dims} != {*last}:
        return NotImplemented
    return weight.like(weight.parts, swapped=not weight.swapped) if len(weight.tail) == 1 < count else NotImplemented


@implements("expand")
def _expand(weight: StoredTensor, size: Sequence[int], **_: Any) -> Any:
    """Repeat rows or whole matrices, as matmul does for an input of three dimensions that is not contiguous: backward
    would keep dense ones."""
    inside = 2 if weight.swapped else len(weight.tail)
    if any(new not in (-1, old) for new, old in zip(size[-inside:], weight.shape[-inside:], strict=True)):
        return NotImplemented
    rows = [*size[:-2], -1] if weight.swapped else size[:-inside]
    return weight.like([part.expand(*rows, -1) for part in weight.parts])


@implements("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(weight: StoredTensor, size: Sequence[int], *_: Any) -> Any:
    """Return a view of the same rows: DeepSeek-V4 multiplies those of a matrix as a stack of matrices."""
    size = list(size)
    if size == list(weight.shape):
        return _alias(weight)
    if -1 in size:
        size[size.index(-1)] = weight.numel() // max(-math.prod(size), 1)
    dims = len(weight.tail)
    if weight.swapped or size[-dims:] != [*weight.tail] or math.prod(size) != weight.numel():
        return NotImplemented
    return weight.like([part.reshape(*size[:-dims], part.shape[-1]) for part in weight.parts])


def _rows(weight: StoredTensor, select: Callable[[Tensor], Any]) -> Any:
    """Return the rows that ``select`` returns of each part: a stored tensor, or a list of them."""
    parts = zip(weight.form.parts, weight.parts, strict=True)
    found = [part if name == "order" else select(part) for name, part in parts]  # the order of columns has no rows
    if isinstance(found[0], Tensor):
        return weight.like(found)
    each = [[one] * len(found[0]) if isinstance(one, Tensor) else one for one in found]
    return [weight.like(parts) for parts in zip(*each, strict=True)]


def _register_rows(name: str, overload: str = "default") -> None:
    """Let an operator take rows of the parts if its ``dim`` counts rows: whole rows, as of an expert, stay stored."""
    operator = getattr(getattr(aten, name), overload)
    arguments = operator._schema.arguments[1:]
    place = [one.name for one in arguments].index("dim")

    def rows(weight: StoredTensor, *given: Any, **named: Any) -> Any:
        args = [*given, *(named.pop(one.name, one.default_value) for one in arguments[len(given) :])]
        args[place] = dim = _wrapped_dim(args[place], weight.dim())
        if named or not 0 <= dim < weight.dim():
            return NotImplemented
        if dim < weight.lead and not (weight.swapped and dim >= weight.dim() - 2):
            return _rows(weight, lambda part: operator(part, *args))
        return _alias(weight) if name == "slice" and _is_whole(weight.shape[dim], *args[1:]) else NotImplemented

    OPERATORS[operator] = rows
    PROGRAM_ROWS.update({getattr(owner, name): rows for owner in (Tensor, torch) if hasattr(owner, name)})


def _is_whole(size: int, start: int | None, end: int | None, step: int) -> bool:
    return not start and (end is None or end >= size) and step == 1


for _names in (
    ("select", "int"),
    ("slice", "Tensor"),
    ("split", "Tensor"),
    ("unbind", "int"),
    ("split_with_sizes",),
    ("index_select",),
):
    _register_rows(*_names)


def _rows_at(weight: StoredTensor, index: Any) -> Any:
    """Return ``weight[index]`` for integers and slices that select whole rows."""
    found: Any = weight
    for dim, one in enumerate(index if isinstance(index, tuple) else (index,)):
        dim -= weight.dim() - found.dim()
        if type(one) is int:
            found = OPERATORS[aten.select.int](found, dim, one)
        elif type(one) is slice:
            found = OPERATORS[aten.slice.Tensor](found, dim, one.start, one.stop, one.step or 1)
        else:
            return NotImplemented
        if found is NotImplemented:
            return found
    return found


def _narrow(weight: StoredTensor, dim: int, start: int, length: int) -> Any:
    start = _wrapped_dim(start, weight.shape[dim])
    return OPERATORS[aten.slice.Tensor](weight, dim, start, start + length)


def _split(weight: StoredTensor, split_size: int | Sequence[int], dim: int = 0) -> Any:
    operator = aten.split.Tensor if isinstance(split_size, int) else aten.split_with_sizes.default
    return OPERATORS[operator](weight, split_size, dim)


def _chunk(weight: StoredTensor, chunks: int, dim: int = 0) -> Any:
    return _split(weight, -(-weight.shape[dim] // chunks), dim)


PROGRAM_ROWS[Tensor.__getitem__] = _rows_at
PROGRAM_ROWS[Tensor.narrow] = PROGRAM_ROWS[torch.narrow] = _narrow
PROGRAM_ROWS[Tensor.split] = PROGRAM_ROWS[torch.split] = _split
PROGRAM_ROWS[Tensor.chunk] = PROGRAM_ROWS[torch.chunk] = _chunk
PROGRAM_ROWS[Tensor.detach] = PROGRAM_ROWS[torch.detach] = PROGRAM_ROWS[Tensor.data.__get__] = _detach  # type: ignore[attr-defined]


@implements("index.Tensor")
def _index(weight: StoredTensor, indices: Sequence[Tensor | None]) -> Any:
    if len(indices) != 1 or indices[0] is None or (weight.swapped and weight.dim() == 2):
        return NotImplemented
    if isinstance(indices[0], StoredTensor):
        return NotImplemented
    if indices[0].dtype in (torch.bool, torch.uint8) and indices[0].dim() > 1:
        return NotImplemented
    return _rows(weight, lambda part: aten.index.Tensor(part, indices))


@implements("copy_")
def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copy a stored tensor into one of the same form and shape; any other write to a stored tensor is an error."""
    if not isinstance(target, StoredTensor):
        return NotImplemented
    described = (target.form, target.tail, target.swapped, target.shape)
    if isinstance(source, StoredTensor) and (source.form, source.tail, source.swapped, source.shape) == described:
        for into, part in zip(target.parts, source.parts, strict=True):
            into.copy_(part)
        return target
    return NotImplemented


@implements("_has_compatible_shallow_copy_type")
def _has_compatible_shallow_copy_type(_: Any, __: Any) -> bool:
    return False


# Functions, above autograd


@implements(Tensor.__getitem__)
def _getitem(weight: Any, index: Any) -> Any:
    """Return a matrix of a stack; it is cached, with its C handle. Other indices are left to the operators."""
    if not isinstance(weight, StoredTensor):
        return NotImplemented
    parts = weight.parts
    if parts[0].dim() < 3 or is_recorded(*parts) or (weight.swapped and parts[0].dim() < 4):
        return NotImplemented
    if type(index) is Tensor and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
        index = int(index)
    if type(index) is not int:
        return NotImplemented
    refuse_gradient(weight)
    at = [part.data_ptr() for part in parts]
    kept: tuple[list[int], dict[int, StoredTensor]] | None = weight.__dict__.get("_matrices")
    if kept is None or kept[0] != at:
        kept = weight.__dict__["_matrices"] = at, {}
    if index not in kept[1]:
        with torch._C.DisableTorchFunctionSubclass():
            kept[1][index] = weight.like([part.detach()[index] for part in parts])
    return kept[1][index]


@implements(Tensor.__setitem__, Tensor.apply_, Tensor.map_, Tensor.map2_, Tensor.fill_diagonal_)
def _write_in_place(weight: Any, *_: Any) -> Any:
    if not isinstance(weight, StoredTensor):
        return NotImplemented
    raise RuntimeError(f"this would write to a weight that is stored in {weight.form}: {REMEDY}")


@implements(Tensor.share_memory_)
def _share_memory(weight: StoredTensor) -> StoredTensor:
    for part in weight.__dict__.get("sources", weight.parts):
        part.share_memory_()
    return weight


@implements(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
def _export(weight: StoredTensor, *_: Any, **__: Any) -> Any:
    raise TypeError(f"a weight that is stored in {weight.form} has no dense memory: call weight.dequantize() first")


@implements(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _requires_grad(weight: Any, requires_grad: bool = True) -> Any:
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


@implements(Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(weight: Any, value: Tensor) -> Any:
    """Replace a weight's values; dense values are first quantized or rounded to its form.

    Warns of the error if they are the weight's own values with a change, as those of a merge are.
    """
    if not isinstance(weight, StoredTensor):
        return NotImplemented
    if weight.swapped or weight.in_program:
        name = "weight.T.data" if weight.swapped else "weight.data"
        raise RuntimeError(f"{name} = ... would write to a weight that is stored in {weight.form}: {REMEDY}")
    made = value if isinstance(value, StoredTensor) else store_again(weight, value)
    if not weight.form.has_parts_of(made.form):
        raise RuntimeError(f"weight.data = ...: this weight is stored in {weight.form}, and the value in {made.form}")
    if made.tail != weight.tail and not (made.dim() == weight.dim() == 1):  # a bias for a larger vocabulary
        raise RuntimeError(
            f"weight.data = ...: this weight has rows of shape {weight.tail}, and the value of {made.tail}"
        )
    if made is not value and made.shape == weight.shape:
        _warn_of_requantizing(weight, value, made)
    sources = weight.__dict__.get("sources", weight.parts)  # a module's parameters; a kernel has more dimensions
    for name, source, part in zip(weight.form.parts, sources, made.parts, strict=True):
        source.data = part.detach().view(part.shape if source.dim() == part.dim() else (*part.shape[:-1], *made.tail))
        weight.__dict__[name] = source if source.dim() == part.dim() else source.flatten(part.dim() - 1)
    weight.tail = made.tail
    if "made_of" in weight.__dict__:
        weight.__dict__["made_of"] = sources[-1].data_ptr(), made.dtype
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(weight, made)  # type: ignore[attr-defined]  # the sizes, dtype and device
    return None


def _warn_of_requantizing(weight: StoredTensor, values: Tensor, made: StoredTensor) -> None:
    if not isinstance(weight.form, CodedForm) or values.is_meta:
        return
    old, new = (one.dequantize() for one in (weight.to(values.device), made))
    changed = (values != old).reshape(len(values), -1).any(1)  # rows that stay keep their bits
    change, error = (relative_error(values[changed], one[changed]) for one in (old, new))
    if error and change < 0.5:  # values of another weight differ by about their own size
        warnings.warn(
            f"weight.data = ... makes a relative change of {change:.1g} to a weight that is stored in {weight.form}, "
            f"which was quantized again: that adds a relative error of {error:.1g}. PEFT's merge of DoRA sets data: "
            "call lowmem.restore(model) before it, and convert what it returns; or merge a LoRA by lowmem.merge, "
            "which reports the error and takes to= and at_most=",
            UserWarning,
            stacklevel=4,  # where the values are set
        )


def store_again(weight: StoredTensor, values: Tensor) -> StoredTensor:
    """Store dense values in the form of a weight; rows that equal the weight's own rows keep their bytes.

    Args:
        weight: has as many trailing dimensions per row as ``values``.
        values: floating point (*lead, *tail).

    Raises:
        TypeError, ValueError: values that ``quantize`` or ``round_to`` rejects.
    """
    lead = values.dim() - len(weight.tail)
    form: Form = weight.form
    rows = values.detach().flatten(lead) if len(weight.tail) > 1 else values.detach()
    if isinstance(form, CodedForm):
        stored = quantize(
            rows, form.format, block_size=form.block_size, scales=form.scale_encoding, search=form.method != "absmax"
        )
        parts = form.split(stored)
    else:
        parts = (round_to(rows, form.dtype, "weight"),)
    # Old rows of a resized vocabulary keep their bytes: quantizing them again may find other scales.
    if weight.lead == 1 and weight.columns == rows.shape[-1]:
        count = min(len(rows), weight.shape[0])
        own = weight.like([part[:count] for part in weight.parts]).dequantize(rows.dtype).view(count, -1)
        same = (own == rows[:count]).all(1)
        for part, old in zip(parts, weight.parts, strict=True):
            part[:count][same] = old[:count][same].view(-1, part.shape[1])
    return StoredTensor(form, parts, values.shape[lead:], values.dtype)
