"""Read-only views of stored and adapted weights, which have no dense memory, so that no write is silently lost.

``weight.view(-1)`` of a stored weight dequantizes it into new memory, so a write to the result would not change the
weight. The result is therefore a ``ReadOnlyView``, for which a write is an error that names the remedy. Results that
are not views, such as ``weight * 2``, are plain tensors, and so are those of computing with a read-only view.

In graphs of torch.compile these writes are errors, too. Dynamo does not call ``__torch_function__`` of stored
weights, but records their operators below autograd: there the view is a ``RecordedView``, which becomes a
``ReadOnlyView`` when the graph returns it. torch.export records the values of a stored weight, and its views are
``ExportedView``. Not detected are writes through the storage or DLPack, and those that torch.export(strict=True) or
torch.jit.trace record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowmem.kernels.memory import is_traced
from lowmem.kernels.torch_versions import EqualsTensor, constant_in_graphs, exports_without_dynamo, leave_to_eager

_WRITES = (
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__imatmul__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
)  # fmt: skip

_LOOKUPS = "embedding", "embedding_bag"  # which write to the table if ``max_norm`` is given

_OF_ITSELF = frozenset((
    "requires_grad_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "detach_", "rename_",
    "share_memory_", "retain_grad", "backward", "register_hook", "register_post_accumulate_grad_hook",
))  # fmt: skip
"""Methods that change attributes of the tensor object, but no values: they are called on the view itself."""


_F = TypeVar("_F", bound=Callable[..., Any])


def registers_in(table: dict[Any, Callable[..., Any]], *functions: Any) -> Callable[[_F], _F]:
    """Return a decorator that registers an implementation for functions of torch in a table."""

    def register(function: _F) -> _F:
        table.update(dict.fromkeys(functions, function))
        return function

    return register


@constant_in_graphs
def writes_in_place(function: Any) -> bool:
    """Whether a torch function changes its first argument in place, judged by its name."""
    name = name_of(function)
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITES


@constant_in_graphs
def changes_itself_alone(function: Any) -> bool:
    """Whether a function reads or changes attributes of its first argument, but not its values."""
    return name_of(function) in _OF_ITSELF or function in _ATTRIBUTES


@constant_in_graphs
def name_of(function: Any) -> str:
    """Return the name of a torch function or operator, without that of its overload."""
    return str(getattr(function, "__name__", "")).partition(".")[0]


def written_by(function: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that a torch function writes to."""
    targets = [kwargs.get("out")]
    if writes_in_place(function) or kwargs.get("inplace") is True:
        targets.append(args[0] if args else next(iter(kwargs.values()), None))
    if name_of(function) in _LOOKUPS and (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None:
        targets.append(args[1] if len(args) > 1 else kwargs.get("weight"))  # its rows are rescaled
    return [one for target in targets for one in (target if isinstance(target, (list, tuple)) else [target])]


METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "ndim", "itemsize",
            "nbytes", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested",
        )
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.element_size, Tensor.__len__, Tensor.get_device, Tensor.is_contiguous),
}  # fmt: skip
"""Functions that do not read a tensor's values."""

_ATTRIBUTES = METADATA | {
    *(getattr(Tensor, name).__get__ for name in ("output_nr", "_version", "_backward_hooks", "_base")),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad", "_backward_hooks")),
    *(Tensor.data_ptr, Tensor._is_view),
}
_BASE: Any = getattr(Tensor, "_base").__get__  # noqa: B009  mypy takes it for a tensor


def _views() -> set[Any]:
    names = (
        "as_strided", "diagonal", "expand", "expand_as", "broadcast_to", "flatten", "movedim", "moveaxis", "narrow",
        "permute", "ravel", "reshape", "reshape_as", "select", "squeeze", "swapaxes", "swapdims", "t", "transpose",
        "adjoint", "unflatten", "unfold", "unsqueeze", "view", "view_as", "split", "split_with_sizes", "chunk",
        "tensor_split", "hsplit", "vsplit", "dsplit", "unbind", "detach", "contiguous", "alias", "__iter__",
        "atleast_1d", "atleast_2d", "atleast_3d",
    )  # fmt: skip
    found = {getattr(place, name) for place in (Tensor, torch) for name in names if hasattr(place, name)}
    found.add(Tensor.__getitem__)
    return found | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "data")}


VIEWS = frozenset(_views())
"""Functions that return views of dense, contiguous tensors. ``__getitem__`` does if no index is a list or tensor."""


def _is_view(function: Any, args: Any) -> bool:
    if function is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not any(isinstance(one, (list, bool, Tensor)) for one in index)
    return _makes_views(function)


@constant_in_graphs
def _makes_views(function: Any) -> bool:
    return function in VIEWS


def read_only(result: Any, refusal: str, function: Any, args: Any, source: Tensor | None = None) -> Any:
    """Return the result of a function; tensors in it that are views become read-only.

    Args:
        result: of the function: a tensor, a list or tuple, or anything else.
        refusal: end of the error message for writes: describes the weight, and the remedy.
        function: the function that was called.
        args: its arguments.
        source: the dense values that it was called with, if known: tensors that share their memory are views.
    """
    if source is None or torch.compiler.is_compiling():
        if not _is_view(function, args):
            return result
        source = None
    if isinstance(result, list):
        return [_marked(one, refusal, source) for one in result]
    if type(result) is tuple:
        return tuple([_marked(one, refusal, source) for one in result])
    return _marked(result, refusal, source)


def _marked(one: Any, refusal: str, source: Tensor | None) -> Any:
    if exports_without_dynamo():
        return exported_view(one, refusal) if isinstance(one, Tensor) else one
    if type(one) is not Tensor or (source is not None and not torch._C._is_alias_of(one, source)):  # type: ignore[attr-defined]
        return one
    if not torch.compiler.is_compiling() and not one.requires_grad:  # else Dynamo would trace from the view's base
        return _leaf(one, refusal)
    under: Any = one
    if torch.compiler.is_compiling():  # Dynamo does not ask the class of a view about torch.relu_ and its like
        under = (
            one.unsqueeze(0).unbind()[0] if one.requires_grad else Unasked(one, refusal)
        )  # autograd guards unbound
    made: Any = under.as_subclass(ReadOnlyView)
    made.refusal, made.recorded = refusal, one
    return made


def _leaf(one: Tensor, refusal: str) -> ReadOnlyView:
    """Return a read-only tensor with the memory of ``one`` that is no view for autograd: it has no base."""
    made = Tensor._make_subclass(ReadOnlyView, one)
    with torch._C.DisableTorchFunctionSubclass():  # Dynamo reads the base of a view, which may be a ReadOnlyView
        made.refusal, made.recorded = refusal, one.as_subclass(Tensor).detach()
    return made


class ReadOnlyView(Tensor):
    """A view of a weight without dense memory: a copy of the values, for which writes are errors. Its views are
    read-only, too.

    Attributes:
        refusal: end of the error message for writes.
        recorded: the values as a plain tensor, for Dynamo; deleted when attributes of the view change.
    """

    refusal: str
    recorded: Tensor

    def plain(self) -> Tensor:
        """Return the values as a plain tensor, without a copy."""
        if torch.compiler.is_compiling():  # Dynamo cannot trace as_subclass
            return self.recorded
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if changes_itself_alone(function):
            with torch._C.DisableTorchFunctionSubclass():
                result = function(*args, **kwargs)
            if not torch.compiler.is_compiling() and writes_in_place(function):  # the shape or requires_grad changed
                args[0].__dict__.pop("recorded", None)
            return _leaf(result, args[0].refusal) if function == _BASE and result is not None else result
        for one in written_by(function, args, kwargs):
            if isinstance(one, ReadOnlyView):
                raise RuntimeError(f"{name_of(function)} would write to a view of {one.refusal}")
        views: list[tuple[str, Tensor]] = []

        def plain(one: Any) -> Any:
            if not isinstance(one, ReadOnlyView):
                return one
            views.append((one.refusal, one.plain()))
            return views[-1][1]

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs))
        result = function(*args, **kwargs)
        if not isinstance(result, (Tensor, list, tuple)):
            flags: Any = getattr(result, "flags", None)  # of a NumPy array, which shares the memory
            if hasattr(flags, "writeable"):
                flags.writeable = False
            return result
        return read_only(result, views[0][0], function, args, views[0][1]) if views else result


class RecordedValues(Tensor):
    """A tensor without memory that stands for values that a graph records.

    Args:
        recorded: the values, with the same shape, strides, dtype and device.
        refusal: end of the error message for writes.
    """

    recorded: Tensor
    refusal: str

    @staticmethod
    def __new__(cls, recorded: Tensor, refusal: str) -> Any:
        """Make a tensor without memory."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            recorded.shape,
            strides=recorded.stride(),
            storage_offset=recorded.storage_offset(),
            dtype=recorded.dtype,
            device=recorded.device,
            requires_grad=False,
        )

    def __init__(self, recorded: Tensor, refusal: str) -> None:
        self.recorded, self.refusal = recorded, refusal


class ExportedView(RecordedValues, ReadOnlyView):
    """A weight, or a view of one, in a program that torch.export records: functions get ``recorded``."""

    def plain(self) -> Tensor:
        """Return the values: the fake tensor that is recorded."""
        return self.recorded

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map_only(ExportedView, ExportedView.plain, (args, kwargs or {}))
        return operator(*args, **kwargs)


def exported_view(recorded: Tensor, refusal: str) -> Tensor:
    """Return an ``ExportedView`` that the exported program may return: it stands for the same graph node."""
    from torch.fx.experimental import proxy_tensor  # torch.export has imported it already

    made, mode = ExportedView(recorded, refusal), proxy_tensor.get_proxy_mode()
    if mode is not None and proxy_tensor.has_proxy_slot(recorded, mode.tracer):  # tensor.data has no slot
        proxy_tensor.set_proxy_slot(made, mode.tracer, proxy_tensor.get_proxy_slot(recorded, mode.tracer))
    return made


def makes_view(operator: Any) -> bool:
    """Whether an operator returns a view of an argument, without writing to it."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in operator._schema.returns)


def written_to(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments that an operator writes to."""
    for number, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[number] if number < len(args) else kwargs.get(argument.name)
        yield from given if isinstance(given, (list, tuple)) else [given]


def recorded_view(result: Any, refusal: str) -> Any:
    """Wrap the results of an operator that returns views, while a graph is recorded, in ``RecordedView``."""
    if isinstance(result, (list, tuple)):
        return type(result)(recorded_view(one, refusal) for one in result)
    return RecordedView(result, refusal)


class RecordedView(RecordedValues):
    """A read-only view of a stored weight in a graph that is being recorded: it checks operators, not functions."""

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["recorded"], self.refusal

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], refusal: str, size: Any, stride: Any) -> Tensor:
        dense = inner["recorded"]
        if type(dense) is Tensor and not is_traced():  # a result of the compiled graph
            return _marked(dense, refusal, None)  # type: ignore[no-any-return]
        return cls(dense, refusal)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"RecordedView(shape={tuple(self.shape)}, dtype={self.dtype}, of {self.refusal})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for one in written_to(operator, args, kwargs):
            if isinstance(one, RecordedView):
                raise RuntimeError(f"{operator} would write to a view of {one.refusal}")
        views: list[RecordedView] = []

        def plain(one: Any) -> Any:
            if not isinstance(one, RecordedView):
                return one
            views.append(one)
            return one.recorded

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs))
        result = operator(*args, **kwargs)
        return recorded_view(result, views[0].refusal) if makes_view(operator) else result


class Unasked(RecordedView, metaclass=EqualsTensor):
    """The tensor under a subclass in a graph: it refuses operators for which Dynamo does not ask the subclass."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operator.overloadpacket.__name__
        (own, *_) = (one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Unasked))
        if name == "alias" and not is_traced():  # by as_subclass, of a result of the graph
            return _leaf(own.recorded, own.refusal)
        if any(True for _ in written_to(operator, args, kwargs or {})):
            raise RuntimeError(f"{name} would write to {own.refusal}")
        name = "unbind" if name == "select" else name  # Dynamo selects the elements of an iteration
        raise RuntimeError(f"torch.compile reads a weight without asking its class: write weight.{name}() instead")


leave_to_eager(Unasked.__torch_dispatch__.__func__)  # type: ignore[attr-defined]
