"""``StoredTensor``, a wrapper subclass that behaves like the dense weight it replaced. Its values lie in its parts:
codes of 4 or 8 bits and the bytes of their scales, or a 16-bit copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowmem.kernels import Weight, ops
from lowmem.kernels.frozen_weight_operator import QuantizedOperands, check_requires_no_grad, quantization_description
from lowmem.kernels.tensor_checks import is_recording_operations
from lowmem.kernels.torch_versions import disable_dynamo, is_exporting_without_dynamo
from lowmem.nn.forms import CodedForm, Form, HalfForm
from lowmem.nn.sharded_parameters import imported_dtensor_types
from lowmem.nn.torch_functions import METADATA, function_write_targets, operator_write_targets, torch_function_name
from lowmem.quant.tensor import QuantizedTensor

REMEDY = (
    "write to a copy, weight.dequantize(), or make the layer dense again first: lowmem.restore(model); if the "
    "model's own code writes, convert it with skip= for this layer"
)

OPERATORS: dict[Any, Callable[..., Any]] = {}
"""Operator overload, below autograd -> its implementation for stored tensors. It returns NotImplemented to have them
dequantized."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Python function of torch, above autograd -> its implementation for stored tensors. It returns NotImplemented to
leave the call to the operators. An operator called directly reaches autograd first, so the tables are two."""

PROGRAM_ROWS: dict[Any, Callable[..., Any]] = {}
"""Python function of torch -> its implementation in a program that torch.export records, which returns stored rows or
NotImplemented. There torch's modes get an operator before its tensors' class does, and cannot handle that class."""

_F = TypeVar("_F", bound=Callable[..., Any])


def implements_for_stored(*torch_functions: Any) -> Callable[[_F], _F]:
    """Register an implementation for operators, as ``"name.overload"`` of aten, and for Python functions of torch.

    An operator that this version of torch does not have is left out.
    """

    def register(implementation: _F) -> _F:
        for call in torch_functions:
            if not isinstance(call, str):
                FUNCTIONS[call] = implementation
                continue
            packet, _, overload = call.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if operator is not None:
                OPERATORS[operator] = implementation
        return implementation

    return register


class StoredTensor(Tensor):
    """A read-only weight of shape ``(*lead, *tail)``; its parts, ``(*lead, n)``, hold prod(tail) values in each row.

    Args:
        form: how the values are stored.
        parts: the stored tensors, in the order of ``form.parts``.
        tail: the dimensions of a row.
        dtype: the tensor's dtype, to which ``dequantize`` rounds.
        swapped: whether the tensor's last two dimensions are those of the parts, transposed.

    Attributes:
        in_program: whether torch.export records what is computed with the tensor.
    """

    form: Form
    tail: tuple[int, ...]
    swapped: bool
    in_program: bool = False
    functions: ClassVar[dict[Any, Callable[..., Any]]] = FUNCTIONS
    operators: ClassVar[dict[Any, Callable[..., Any]]] = OPERATORS

    @staticmethod
    def __new__(
        cls, form: Form, parts: Sequence[Tensor], tail: Sequence[int], dtype: torch.dtype, swapped: bool = False
    ) -> StoredTensor:
        """Make a tensor without memory; its values are those of the parts."""
        shape = [*parts[0].shape[:-1], *tail]
        strides, step = [0] * len(shape), 1
        for number in reversed(range(len(shape))):
            strides[number], step = step, step * shape[number]
        if swapped:
            shape[-2:], strides[-2:] = reversed(shape[-2:]), reversed(strides[-2:])
        options: Any = {"strides": tuple(strides), "dtype": dtype, "device": parts[0].device, "requires_grad": False}
        # Not an inference tensor: the weight is kept, and used outside, too
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), **options)
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), **options)

    def __init__(
        self,
        form: Form,
        parts: Sequence[Tensor],
        tail: Sequence[int],
        dtype: torch.dtype,
        swapped: bool = False,
    ) -> None:
        self.form, self.tail, self.swapped = form, tuple(tail), swapped
        for name, part in zip(form.parts, parts, strict=True):
            setattr(self, name, part)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """None for a tracer, which reads it of what a graph returns. All else that reads it of a weight is torch's
        ``register_parameter``: a dense module would hold a tensor that neither files nor pruning know."""
        if needs_dispatcher(*self.parts):
            return None
        raise RuntimeError(
            f"a dense module cannot hold a weight that is stored in {self.form}: convert both modules, so that they "
            f"share it; or {REMEDY}"
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The stored tensors, in the order of ``form.parts``."""
        attributes = self.__dict__
        return tuple(attributes[name] for name in attributes["form"].parts)

    @property
    def values_per_row(self) -> int:
        """The number of values in a row."""
        return math.prod(self.tail)

    @property
    def leading_dim_count(self) -> int:
        """The number of leading dimensions, which count rows."""
        return int(self.parts[0].dim()) - 1

    @property
    def kernel_weight(self) -> Weight:
        """The weight (*lead, columns) for products, without a copy: a QuantizedTensor or a 16-bit tensor."""
        return self._cached_weight("_stored", lambda: self.form.weight_from_parts(self.parts, self.values_per_row))

    def _cached_weight(self, attribute: str, make_weight: Callable[[], Weight]) -> Weight:
        """Cache what ``make_weight`` returns, with its C handle, while the last part's memory keeps its address."""
        last = self.__dict__[self.__dict__["form"].parts[-1]]
        if torch.compiler.is_compiling() or (type(last) is not nn.Parameter and type(last) is not Tensor):
            check_tensor_not_sharded(last)
            return make_weight()
        known: tuple[int, Weight] | None = self.__dict__.get(attribute)
        if known is None or known[0] != last.data_ptr():
            known = self.__dict__[attribute] = last.data_ptr(), make_weight()
        return known[1]

    @property
    def kernel_matrix(self) -> Weight:
        """The weight as (rows, columns)."""
        stored = self.kernel_weight
        if isinstance(stored, QuantizedTensor):
            return stored if len(stored.shape) == 2 else self._cached_weight("_matrix", stored.as_matrix)
        return stored if stored.dim() == 2 else stored.reshape(-1, stored.shape[-1])

    @property
    def recordable_matrix(self) -> QuantizedOperands | Tensor:
        """The matrix as an argument of operators that are being recorded, with the bytes of its scales."""
        form, parts = self.form, self.parts
        check_tensor_not_sharded(parts[-1])
        if not isinstance(form, CodedForm):
            return self.kernel_matrix  # type: ignore[return-value]
        ends = parts[0], parts[-1]
        packed, scales = (part if part.dim() == 2 else part.reshape(-1, part.shape[-1]) for part in ends)
        return QuantizedOperands(packed, scales, quantization_description(form, self.values_per_row))

    def with_parts(
        self,
        parts: Sequence[Tensor],
        row_shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        swapped: bool | None = None,
    ) -> StoredTensor:
        """Return a tensor of the same form over other parts; None keeps the value of this tensor."""
        made = type(self)(
            self.form,
            parts,
            self.tail if row_shape is None else row_shape,
            self.dtype if dtype is None else dtype,
            self.swapped if swapped is None else swapped,
        )
        # A weight and its views share one set
        made.__dict__["dequantized_by"] = self.dequantized_by
        if self.in_program:
            made.in_program = True
        return made

    @property
    def dequantized_by(self) -> set[str]:
        """Names of the operators, such as ``mul``, for which this weight or a view of it was dequantized."""
        names: set[str] = self.__dict__.setdefault("dequantized_by", set())
        return names

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values as a dense tensor, rounded once to ``dtype``; None takes the dtype of this tensor."""
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating-point dtype")
        parts = self.parts
        if needs_dispatcher(*parts) and isinstance(self.form, CodedForm):
            values = ops.dequantize_by_operator(self.recordable_matrix, dtype)  # type: ignore[arg-type]
        else:
            stored = self.kernel_weight
            values = stored.dequantize(dtype) if isinstance(stored, QuantizedTensor) else stored.detach().to(dtype)
        values = values.view(*parts[0].shape[:-1], *self.tail)
        return values.transpose(-1, -2) if self.swapped else values

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        if self.in_program:  # it is returned: torch.export would keep it as a constant without values
            raise RuntimeError(
                f"a program that torch.export records cannot return a weight that is stored in {self.form}, or rows "
                "of it: return weight.dequantize()"
            )
        return list(self.form.parts), (self.form, self.tail, self.dtype, self.swapped)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> StoredTensor:
        form, tail, dtype, swapped = meta
        return cls(form, [inner[name] for name in form.parts], tail, dtype, swapped)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"StoredTensor({self.form}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensor:
        if id(self) not in memo:
            made = self.with_parts([copy.deepcopy(part, memo) for part in self.parts])
            made.__dict__["dequantized_by"] = set(self.dequantized_by)
            if self.__dict__.get("_is_param"):
                made._is_param = True
            memo[id(self)] = made
        copied: StoredTensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        arguments = self.form, self.parts, self.tail, self.dtype, self.swapped
        return _rebuild, (type(self), *arguments, "_is_param" in self.__dict__)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        implementation = cls.functions.get(function)
        if implementation is not None:
            result = implementation(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if is_exporting_without_dynamo() and function not in METADATA:
            return _call_in_exported_program(function, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            return (
                type(result)(map(_detach_if_view_of_stored, result))
                if type(result) in (list, tuple)
                else _detach_if_view_of_stored(result)
            )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        implementation = cls.operators.get(operator)
        if implementation is not None:
            result = implementation(*args, **kwargs)
            if result is not NotImplemented:
                return result
        # Where composite operators, such as chunk, arrive as they are
        if torch.is_inference_mode_enabled():
            result = operator.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return call_and_record_dequantization(operator, args, kwargs)


disable_dynamo(StoredTensor.__torch_dispatch__.__func__)  # type: ignore[attr-defined]
# a graph of its own, after a graph break, would answer a question about one attribute with another
disable_dynamo(StoredTensor.__torch_function__.__func__)  # type: ignore[attr-defined]


def _call_in_exported_program(function: Any, args: Any, kwargs: Any) -> Any:
    """Call a function in a program that torch.export records: of stored tensors it takes rows, or gets the values."""
    _check_no_write_to_stored(torch_function_name(function), function_write_targets(function, args, kwargs))
    if args and isinstance(args[0], StoredTensor) and (rows := PROGRAM_ROWS.get(function)) is not None:
        stored_rows = rows(*args, **kwargs)
        if stored_rows is not NotImplemented:
            return stored_rows
    values = torch.utils._pytree.tree_map_only(StoredTensor, lambda weight: weight.dequantize(), (args, kwargs))
    return function(*values[0], **values[1])


def _check_no_write_to_stored(function: Any, write_targets: Iterable[Any]) -> None:
    for target in write_targets:
        if isinstance(target, StoredTensor):
            raise RuntimeError(f"{function} would write to a weight that is stored in {target.form}: {REMEDY}")


def _detach_if_view_of_stored(result: Any) -> Any:
    """Return dense values as a tensor of their own: for autograd they are a view of the weight, which would require a
    gradient once a tensor that requires one is added to them in place."""
    return result.detach() if type(result) is Tensor and isinstance(result._base, StoredTensor) else result


def needs_dispatcher(*tensors: Tensor) -> bool:
    """Whether operations on these tensors must go through the dispatcher: they are recorded, or of a subclass."""
    return is_recording_operations() or any(
        type(tensor) is not Tensor and type(tensor) is not nn.Parameter for tensor in tensors
    )


def check_tensor_not_sharded(tensor: Tensor) -> None:
    """Raise a RuntimeError for the weight of which this process has some rows, where values are asked for."""
    if isinstance(tensor, imported_dtensor_types()):
        raise RuntimeError(
            "this process has a part of a stored weight (a DTensor), and its values are asked for: call the sharded "
            "block or model as a module, which gathers it, or take lowmem.gather(model)"
        )


def check_needs_no_weight_gradient(weight: StoredTensor) -> None:
    """Raise ``check_requires_no_grad``'s RuntimeError if an operator would have to compute the weight's gradient."""
    if torch.is_grad_enabled():
        check_requires_no_grad(weight.parts[0])


def _check_no_in_place_change_in_graph(weight: StoredTensor) -> None:
    """Raise if a graph adds a tensor with a gradient to values in place: autograd takes them for a view of it."""
    if is_recording_operations() and weight.requires_grad:
        raise RuntimeError(
            f"in a graph, values of a weight that is stored in {weight.form} would be changed in place by a tensor "
            "that requires a gradient: change weight.dequantize(), or a clone of the values"
        )


def _rebuild(
    kind: type[StoredTensor], form: Form, parts: Sequence[Tensor], tail: tuple[int, ...], *rest: Any
) -> StoredTensor:
    *dtype_and_swapped, is_param = rest
    made = kind(form, parts, tail, *dtype_and_swapped)
    if is_param:
        made._is_param = True
    return made


# For torch.load(weights_only=True).
torch.serialization.add_safe_globals([_rebuild, StoredTensor, CodedForm, HalfForm])


def call_and_record_dequantization(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call an operator with dequantized values of stored tensors, and add its name to their ``dequantized_by``."""
    _check_no_write_to_stored(operator, operator_write_targets(operator, args, kwargs))
    tensors = [
        item
        for value in (*args, *kwargs.values())
        for item in (value if isinstance(value, (list, tuple)) else [value])
    ]
    weights = [item for item in tensors if isinstance(item, StoredTensor)]
    for weight in weights:
        check_needs_no_weight_gradient(weight)
        _check_no_in_place_change_in_graph(weight)
        weight.dequantized_by.add(operator.overloadpacket.__name__)
    known: dict[int, Tensor] = {}
    views = any(item.alias_info is not None and not item.alias_info.is_write for item in operator._schema.returns)
    # Views are no inference tensors, as the weight
    with torch.inference_mode(False) if views else nullcontext():
        return operator(
            *(_dequantize_nested(item, known) for item in args),
            **{k: _dequantize_nested(item, known) for k, item in kwargs.items()},
        )


def _dequantize_nested(value: Any, dequantized_by_id: dict[int, Tensor]) -> Any:
    if isinstance(value, StoredTensor):
        if id(value) not in dequantized_by_id:
            dequantized_by_id[id(value)] = value.dequantize()
        return dequantized_by_id[id(value)]
    if isinstance(value, (list, tuple)):
        return type(value)(_dequantize_nested(item, dequantized_by_id) for item in value)
    return value
