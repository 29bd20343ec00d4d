"""Copies, views and writes of stored weights: views of whole rows stay stored; writes are errors."""

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
    REMEDY,
    StoredTensor,
    dequantized_call,
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
def _clone(weight: StoredTensor, *, memory_format: Any = None) -> StoredTensor:
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


@implements("t")
def _t(weight: StoredTensor) -> Any:
    return _transpose(weight, 0, 1) if weight.dim() == 2 else NotImplemented


@implements("transpose.int")
def _transpose(weight: StoredTensor, first: int, second: int) -> Any:
    dims = weight.dim()
    first, second = first % dims, second % dims
    if first == second:
        return _alias(weight)
    if {first, second} == {dims - 1, dims - 2} and len(weight.tail) == 1:
        return weight.like(weight.parts, swapped=not weight.swapped)
    return NotImplemented


@implements("permute")
def _permute(weight: StoredTensor, dims: Sequence[int]) -> Any:
    count = weight.dim()
    order = [dim % count for dim in dims]
    if order == list(range(count)):
        return _alias(weight)
    if order == [*range(count - 2), count - 1, count - 2]:
        return _transpose(weight, -1, -2)
    return NotImplemented


def _leading(weight: StoredTensor, dim: int) -> int | None:
    """Return a leading dimension as a number from 0; None if it is inside rows, or one of two transposed ones."""
    dim = dim % weight.dim()
    return dim if dim < weight.lead and not (weight.swapped and dim >= weight.dim() - 2) else None


def _of_rows(weight: StoredTensor, dim: int, function: Any, *before: Any) -> Any:
    """Apply a function to all parts if ``dim`` is a leading dimension; else NotImplemented."""
    leading = _leading(weight, dim)
    return NotImplemented if leading is None else weight.like([function(part, *before) for part in weight.parts])


@implements("select.int")
def _select(weight: StoredTensor, dim: int, index: int) -> Any:
    return _of_rows(weight, dim, lambda part: part.select(dim % weight.dim(), index))


@implements("slice.Tensor")
def _slice(weight: StoredTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    size = weight.shape[dim]
    if (start is None or start == 0) and (end is None or end >= size) and step == 1:
        return _alias(weight)
    return _of_rows(weight, dim, lambda part: aten.slice.Tensor(part, dim % weight.dim(), start, end, step))


def _split_rows(weight: StoredTensor, dim: int, function: Callable[[Tensor, int], Sequence[Tensor]]) -> Any:
    leading = _leading(weight, dim)
    if leading is None:
        return NotImplemented
    every = (function(part, leading) for part in weight.parts)
    return [weight.like(parts) for parts in zip(*every, strict=True)]


@implements("split.Tensor", "split_with_sizes")
def _split(weight: StoredTensor, sizes: int | Sequence[int], dim: int = 0) -> Any:
    return _split_rows(weight, dim, lambda part, leading: part.split(sizes, leading))


@implements("unbind.int")
def _unbind(weight: StoredTensor, dim: int = 0) -> Any:
    return _split_rows(weight, dim, lambda part, leading: part.unbind(leading))


@implements("index_select")
def _index_select(weight: StoredTensor, dim: int, index: Tensor) -> Any:
    return _of_rows(weight, dim, lambda part: part.index_select(dim % weight.dim(), index))


@implements("index.Tensor")
def _index(weight: StoredTensor, indices: Sequence[Tensor | None]) -> Any:
    if len(indices) != 1 or indices[0] is None or _leading(weight, 0) is None or isinstance(indices[0], StoredTensor):
        return NotImplemented
    if indices[0].dtype in (torch.bool, torch.uint8) and indices[0].dim() > 1:
        return NotImplemented
    return weight.like([aten.index.Tensor(part, indices) for part in weight.parts])


@implements("expand")
def _expand(weight: StoredTensor, size: Sequence[int], **_: Any) -> Any:
    added, inside = len(size) - weight.dim(), 2 if weight.swapped else len(weight.tail)
    wanted = [weight.shape[number - added] if one == -1 else one for number, one in enumerate(size)]
    if wanted[len(wanted) - inside :] != list(weight.shape[weight.dim() - inside :]):
        return NotImplemented
    rows = [*wanted[:-2], wanted[-1]] if weight.swapped else wanted[: len(wanted) - inside]
    return weight.like([part.expand(*rows, part.shape[-1]) for part in weight.parts])


@implements("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(weight: StoredTensor, size: Sequence[int], *_: Any) -> Any:
    wanted = list(size)
    if -1 in wanted:
        rest = math.prod(one for one in wanted if one != -1)
        wanted[wanted.index(-1)] = weight.numel() // rest if rest else 0
    if not weight.swapped:
        return _with_shape(weight, wanted)
    # torch views clones as if they were contiguous, but the clone of a transposed weight is transposed: dequantize.
    same = wanted == list(weight.shape)
    return _alias(weight) if same else dequantized_call(aten.reshape.default, (weight, wanted), {})


def _with_shape(weight: StoredTensor, shape: Sequence[int]) -> Any:
    """Return a view of another shape if either the leading dimensions or those of a row are unchanged."""
    shape, parts, lead = list(shape), weight.parts, list(weight.parts[0].shape[:-1])
    if shape[: len(lead)] == lead and len(shape) > len(lead) and math.prod(shape[len(lead) :]) == weight.columns:
        return weight.like(parts, tail=shape[len(lead) :])
    kept = len(weight.tail)
    rows, tail = shape[: len(shape) - kept], shape[len(shape) - kept :]
    if tail == list(weight.tail) and math.prod(rows) == math.prod(lead):
        return weight.like([part.reshape(*rows, part.shape[-1]) for part in parts])
    return NotImplemented


@implements("squeeze.dim")
def _squeeze(weight: StoredTensor, dim: int) -> Any:
    shape = list(weight.shape)
    if shape[dim] != 1:
        return _alias(weight)
    del shape[dim % len(shape)]
    return NotImplemented if weight.swapped else _with_shape(weight, shape)


@implements("unsqueeze")
def _unsqueeze(weight: StoredTensor, dim: int) -> Any:
    shape = list(weight.shape)
    dim = dim % (len(shape) + 1)
    if weight.swapped:
        return weight.like([part.unsqueeze(dim) for part in weight.parts]) if dim < len(shape) - 1 else NotImplemented
    shape.insert(dim, 1)
    return _with_shape(weight, shape)


@implements("as_strided")
def _as_strided(weight: StoredTensor, size: Sequence[int], stride: Sequence[int], offset: Any = None) -> Any:
    same = (tuple(size), tuple(stride)) == (tuple(weight.shape), tuple(weight.stride())) and not offset
    return _alias(weight) if same else NotImplemented


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


def _makes_like(name: str) -> None:
    """Register an operator whose result depends only on the weight's shape, dtype and device; it is dense."""
    of = getattr(aten, name).default

    def dense_like(weight: StoredTensor, *rest: Any, **named: Any) -> Any:
        shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        named["device"] = named.get("device") or weight.device
        named.pop("memory_format", None)
        return of(shape, *rest, **named)

    OPERATORS[of] = dense_like


for _name in ("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like"):
    _makes_like(_name)


@implements("equal")
def _equal(a: Any, b: Any) -> Any:
    if not (isinstance(a, StoredTensor) and isinstance(b, StoredTensor)) or a.form != b.form:
        return NotImplemented
    if (a.shape, a.tail, a.swapped) != (b.shape, b.tail, b.swapped):
        return NotImplemented
    return all(map(torch.equal, a.parts, b.parts))


@implements("is_same_size")
def _is_same_size(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape


@implements("is_pinned")
def _is_pinned(weight: StoredTensor, device: Any = None) -> bool:
    return all(part.is_pinned() for part in weight.parts)


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
    if weight.swapped:
        raise RuntimeError(f"weight.T.data = ... would write to a weight that is stored in {weight.form}: {REMEDY}")
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
