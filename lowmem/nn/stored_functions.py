"""Torch functions that are intercepted for stored weights above autograd: linear, indexing of stacks, writes, einsum.

All others are left to the operators below autograd (``lowmem.nn.stored_operators``).
"""

from __future__ import annotations

import itertools
import string
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels import ops
from lowmem.nn.frozen_linear import autocast, frozen_linear
from lowmem.nn.stored import FUNCTIONS, REMEDY, Form, FourBitForm, StoredTensor, is_recorded, refuse_gradient
from lowmem.nn.stored_operators import compute_dtype
from lowmem.quant.quantize import quantize
from lowmem.quant.rounding import round_to

__all__ = ["einsum", "open_attention", "store_again"]

_F = TypeVar("_F", bound=Callable[..., Any])


def _replaces(*functions: Any) -> Callable[[_F], _F]:
    def register(function: _F) -> _F:
        FUNCTIONS.update(dict.fromkeys(functions, function))
        return function

    return register


@_replaces(functional.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not StoredTensor or isinstance(input, StoredTensor):
        return NotImplemented
    own = weight.__dict__  # reading an attribute of a tensor subclass takes a microsecond
    if own["swapped"] or len(own["tail"]) != 1:
        return NotImplemented
    stored = weight.stored
    if len(stored.shape) != 2:
        return NotImplemented
    x = autocast(input)
    bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return frozen_linear(x, stored, compute_dtype(x, weight), bias)


def open_attention(**replaced: Any) -> Any:
    """Return a copy of torch's ``multi_head_attention_forward`` that can be called inside ``__torch_function__``.

    The original first checks whether an argument is of a tensor subclass, and then calls ``__torch_function__``
    again. The copy skips this check, so that the functions that it calls are intercepted, not the function itself.

    Args:
        **replaced: functions to call in place of those of ``torch.nn.functional``, by their names.
    """
    function = functional.multi_head_attention_forward
    known = {**vars(functional), "has_torch_function": lambda _: False, **replaced}
    return types.FunctionType(function.__code__, known, function.__name__, function.__defaults__)


_OPEN_ATTENTION = open_attention()


@_replaces(functional.multi_head_attention_forward)
def _attention(*args: Any, **kwargs: Any) -> Any:
    return _OPEN_ATTENTION(*args, **kwargs)


@_replaces(Tensor.__getitem__)
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


@_replaces(Tensor.__setitem__)
def _setitem(tensor: Any, index: Any, value: Any) -> Any:
    if not isinstance(tensor, StoredTensor):
        return NotImplemented
    raise RuntimeError(
        f"weight[{index!r:.40}] = ... would write to a weight that is stored in {tensor.form}: {REMEDY}"
    )


@_replaces(Tensor.apply_, Tensor.map_, Tensor.map2_, Tensor.fill_diagonal_)
def _write_in_place(weight: Any, *_: Any) -> Any:
    if not isinstance(weight, StoredTensor):
        return NotImplemented
    raise RuntimeError(f"this would write to a weight that is stored in {weight.form}: {REMEDY}")


@_replaces(Tensor.share_memory_)
def _share_memory(weight: StoredTensor) -> StoredTensor:
    for part in weight.__dict__.get("sources", weight.parts):
        part.share_memory_()
    return weight


@_replaces(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
def _export(weight: StoredTensor, *_: Any, **__: Any) -> Any:
    raise TypeError(f"a weight that is stored in {weight.form} has no dense memory: call weight.dequantize() first")


@_replaces(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _requires_grad(weight: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise RuntimeError(
            f"a weight that is stored in {weight.form} is frozen: train an adapter (lowmem.LoRA), or make the layer "
            "dense again first: lowmem.restore(model)"
        )
    return weight


@_replaces(Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(weight: Any, value: Tensor) -> Any:
    """Replace a weight's values; dense values are first quantized or rounded to its form.

    Raises:
        RuntimeError: the weight is a transposed view, or the value has another form or rows of another shape.
        TypeError, ValueError: values that ``store_again`` rejects.
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
    if isinstance(form, FourBitForm):
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


@_replaces(functional.bilinear)
def _bilinear(input1: Tensor, input2: Tensor, weight: Any, bias: Any = None) -> Any:
    """Return ``x1 W[o] x2 + b[o]`` for each output o, one matrix of the weight at a time."""
    if not (isinstance(weight, StoredTensor) and weight.lead == 2 and len(weight.tail) == 1 and not weight.swapped):
        return NotImplemented
    rows = input1.reshape(-1, input1.shape[-1])  # (batch, in1)
    others = input2.reshape(-1, input2.shape[-1])  # (batch, in2)
    outs = []
    for number in range(weight.shape[0]):
        matrix = cast(StoredTensor, weight[number]).stored
        outs.append((ops.product(rows, matrix, compute_dtype(rows, weight), True).to(others.dtype) * others).sum(1))
    out = torch.stack(outs, 1).view(*input1.shape[:-1], len(outs))
    bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return out if bias is None else out + bias


@_replaces(torch.einsum)
def einsum(equation: str, *operands: Any) -> Any:
    """Contract an input with a stored weight, over the weight's columns or over its leading dimensions.

    Other forms of einsum return NotImplemented. Leading dimensions that do not fit one matrix product (such as
    experts) are looped over.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    text, arrow, out = equation.replace(" ", "").partition("->")
    letters = text.split(",")
    if len(operands) != 2 or len(letters) != 2 or not arrow:
        return NotImplemented
    (weight, of_weight), (x, of_x) = sorted(
        zip(operands, letters, strict=True), key=lambda one: not isinstance(one[0], StoredTensor)
    )
    if not isinstance(weight, StoredTensor) or isinstance(x, StoredTensor) or "." in of_weight:
        return NotImplemented
    if "..." in of_x:
        free = [one for one in string.ascii_letters if one not in equation]
        more = "".join(free[: x.dim() - len(of_x) + 3])
        of_x, out = of_x.replace("...", more), out.replace("...", more)
    if weight.swapped:
        with torch._C.DisableTorchFunctionSubclass():
            weight = weight.transpose(-1, -2)
        of_weight = of_weight[:-2] + of_weight[-1] + of_weight[-2]
    shared = set(of_weight) & set(of_x)
    if (
        shared & set(out)
        or len(set(of_weight)) < weight.dim()
        or len(set(of_x)) < x.dim()
        or set(out) - set(of_x + of_weight)
        or set(of_weight) - set(of_x + out)  # summed over the weight alone
    ):
        return NotImplemented
    counting, inside = of_weight[: weight.lead], of_weight[weight.lead :]
    if shared >= set(inside):
        transposed, looped = False, [one for one in counting if one in shared]
    elif not shared & set(inside):
        transposed, looped = True, [one for one in counting if one not in shared]
    else:
        return NotImplemented
    return _contract(x, of_x, weight, of_weight, out, transposed, looped)


def _contract(
    x: Tensor, of_x: str, weight: StoredTensor, of_weight: str, out: str, transposed: bool, looped: Sequence[str]
) -> Tensor:
    sizes = dict(zip(of_weight, weight.shape, strict=True)) | dict(zip(of_x, x.shape, strict=True))
    counting = [one for one in of_weight[: weight.lead] if one not in looped]
    inside = list(of_weight[weight.lead :])
    summed = counting if transposed else inside
    free = [one for one in of_x if one not in of_weight]
    made = inside if transposed else counting
    order = [of_x.index(one) for one in (*(one for one in looped if one in of_x), *free, *summed)]
    columns = [sizes[one] for one in summed]
    x = x.permute(order)  # (looped, where x has them; free; summed)
    results = []
    for indices in itertools.product(*(range(sizes[one]) for one in looped)):
        part, rows = weight, x
        for letter, index in sorted(zip(looped, indices, strict=True), key=lambda one: -of_weight.index(one[0])):
            with torch._C.DisableTorchFunctionSubclass():
                part = part.select(of_weight.index(letter), index)  # type: ignore[assignment]
        if not transposed:
            for index in indices:
                rows = rows[index]
        matrix = part.like([one.contiguous() for one in part.parts]).matrix
        flat = rows.reshape(-1, int(torch.Size(columns).numel()))
        results.append(ops.product(flat, matrix, compute_dtype(flat, weight), transposed).to(x.dtype))
    shape = [sizes[one] for one in (*free, *made)]
    if transposed:
        result = torch.stack(results).view(*(sizes[one] for one in looped), *shape)
        named = [*looped, *free, *made]
    else:
        result, named = sum(results[1:], results[0]).view(shape), [*free, *made]
    return result.permute([named.index(one) for one in out])
