"""Views of weights that have no dense memory: read-only tensors, so that what is written to one is never lost.

``weight.view(-1)`` of a stored weight has to dequantize it: the result has memory of its own, and a write to it would
not reach the weight. It is marked instead, and refuses writes with their remedy. Results that are no views, as
``weight * 2``, are plain tensors, and so are the results of computing with a marked one.

Graphs of torch.compile refuse these writes, too. Dynamo asks no class of torch functions for a stored weight, whose
operations it sees below autograd: there such a view is a ``RecordedView``, which is the other class again once the
graph has run. torch.export records a stored weight's values, of which it asks the class of an ``ExportedView``. Not
seen are writes through the storage or DLPack, and those that torch.export(strict=True) or torch.jit.trace record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.kernels.memory import is_traced
from lowmem.kernels.torch_versions import constant_in_graphs, exports_without_dynamo

__all__ = [
    "METADATA",
    "VIEWS",
    "ExportedView",
    "ReadOnlyView",
    "RecordedView",
    "changes_itself_alone",
    "exported_view",
    "makes_view",
    "name_of",
    "read_only",
    "recorded_view",
    "writes_in_place",
    "written_to",
]

_WRITES = (
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__imatmul__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
)  # fmt: skip

_OF_ITSELF = frozenset((
    "requires_grad_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "detach_", "rename_",
    "share_memory_", "retain_grad", "backward", "register_hook", "register_post_accumulate_grad_hook",
))  # fmt: skip
"""Methods that concern the tensor itself, and no value of it: they need no copy, and change no weight."""


@constant_in_graphs
def writes_in_place(function: Any) -> bool:
    """Whether a function of torch changes its first argument, by its name."""
    name = name_of(function)
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITES


@constant_in_graphs
def changes_itself_alone(function: Any) -> bool:
    """Whether a function concerns its first argument as a tensor, and not its values."""
    return name_of(function) in _OF_ITSELF or function in _ATTRIBUTES


@constant_in_graphs
def name_of(function: Any) -> str:
    """Return the name of a function or operator of torch, without an overload's."""
    return str(getattr(function, "__name__", "")).partition(".")[0]


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
"""Functions that need no values of a tensor."""

_ATTRIBUTES = METADATA | {
    *(getattr(Tensor, name).__get__ for name in ("output_nr", "_version", "_backward_hooks")),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad", "_backward_hooks")),
    Tensor.data_ptr,
}


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
"""Functions whose results are views of a dense, contiguous tensor; an index is one if it has no list or tensor."""


def _is_view(function: Any, args: Any) -> bool:
    if function is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not any(isinstance(one, (list, bool, Tensor)) for one in index)
    return _makes_views(function)


@constant_in_graphs
def _makes_views(function: Any) -> bool:
    return function in VIEWS


def read_only(result: Any, refusal: str, function: Any, args: Any, source: Tensor | None = None) -> Any:
    """Return the result of a function, of which views are marked.

    Args:
        result: a tensor, or several.
        refusal: what a write to one raises: the weight, and the remedy.
        function: that was called.
        args: its arguments.
        source: the values that it was called with, where these are known: whatever shares their memory is a view.
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
    if not torch.compiler.is_compiling() and not one.requires_grad:
        one = one.detach()  # else autograd knows it as a view of the weight, and Dynamo would begin with that
    made: Any = one.as_subclass(ReadOnlyView)
    made.refusal, made.recorded = refusal, one
    return made


class ReadOnlyView(Tensor):
    """A view of a weight that has no dense memory: the values, which refuse writes. Its views are such tensors again.

    Attributes:
        refusal: what a write raises.
        recorded: the plain tensor, of which Dynamo records operations; gone when the view itself has been changed.
    """

    refusal: str
    recorded: Tensor

    def plain(self) -> Tensor:
        """Return the values as a plain tensor, not copied."""
        if torch.compiler.is_compiling():  # Dynamo cannot make it
            return self.recorded
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if changes_itself_alone(function):
            with torch._C.DisableTorchFunctionSubclass():
                result = function(*args, **kwargs)
            if not torch.compiler.is_compiling() and writes_in_place(function):  # its shape, or whether it trains
                args[0].__dict__.pop("recorded", None)
            return result
        _refuse_writes(function, args, kwargs)
        views: list[tuple[str, Tensor]] = []

        def plain(one: Any) -> Any:
            if not isinstance(one, ReadOnlyView):
                return one
            views.append((one.refusal, one.plain()))
            return views[-1][1]

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs))
        result = function(*args, **kwargs)
        if not isinstance(result, (Tensor, list, tuple)):
            flags: Any = getattr(result, "flags", None)  # of an array of numpy, which shares the memory
            if hasattr(flags, "writeable"):
                flags.writeable = False
            return result
        return read_only(result, views[0][0], function, args, views[0][1]) if views else result


class ExportedView(ReadOnlyView):
    """A view of a weight in a program that torch.export records, or the weight: functions see what is recorded.

    Args:
        recorded: the values: a fake tensor.
        refusal: what a write raises.
    """

    @staticmethod
    def __new__(cls, recorded: Tensor, refusal: str) -> ExportedView:
        """Make a tensor without values of its own."""
        return _without_values(cls, recorded)  # type: ignore[no-any-return]

    def __init__(self, recorded: Tensor, refusal: str) -> None:
        self.recorded, self.refusal = recorded, refusal

    def plain(self) -> Tensor:
        """Return the values as the tensor that is recorded."""
        return self.recorded

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map_only(ExportedView, ExportedView.plain, (args, kwargs or {}))
        return operator(*args, **kwargs)


def exported_view(recorded: Tensor, refusal: str) -> Tensor:
    """Return a view that is ``recorded`` where a program that is being exported returns it."""
    from torch.fx.experimental import proxy_tensor  # which torch.export has imported

    made, mode = ExportedView(recorded, refusal), proxy_tensor.get_proxy_mode()
    if mode is not None and proxy_tensor.has_proxy_slot(recorded, mode.tracer):  # ``.data`` of a tensor has none
        proxy_tensor.set_proxy_slot(made, mode.tracer, proxy_tensor.get_proxy_slot(recorded, mode.tracer))
    return made


def _refuse_writes(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Raise if a function would write to a read-only view.

    Raises:
        RuntimeError: it would; the remedy is named.
    """
    targets = [kwargs.get("out")]
    if writes_in_place(function) or kwargs.get("inplace") is True:
        targets.append(args[0] if args else next(iter(kwargs.values()), None))
    for target in targets:
        for one in target if isinstance(target, (list, tuple)) else [target]:
            if isinstance(one, ReadOnlyView):
                raise RuntimeError(f"{name_of(function)} would write to a view of {one.refusal}")


def makes_view(operator: Any) -> bool:
    """Whether an operator's results share the memory of an argument, which it does not write to."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in operator._schema.returns)


def written_to(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what an operator is given to write to."""
    for number, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[number] if number < len(args) else kwargs.get(argument.name)
        yield from given if isinstance(given, (list, tuple)) else [given]


def _without_values(kind: Any, like: Tensor) -> Any:
    """Return a tensor of a class with the shape, strides, dtype and device of another, and no memory."""
    return torch.Tensor._make_wrapper_subclass(
        kind,
        like.shape,
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        device=like.device,
        requires_grad=False,
    )


def recorded_view(result: Any, refusal: str) -> Any:
    """Return what an operator that makes views returned while a graph is being recorded: its tensors are marked."""
    if isinstance(result, (list, tuple)):
        return type(result)(recorded_view(one, refusal) for one in result)
    return RecordedView(result, refusal)


class RecordedView(Tensor):
    """A ``ReadOnlyView`` of a stored weight in a graph that is being recorded, where operators are asked.

    Args:
        dense: the values: a plain tensor, that is being recorded.
        refusal: what a write raises.
    """

    dense: Tensor
    refusal: str

    @staticmethod
    def __new__(cls, dense: Tensor, refusal: str) -> RecordedView:
        """Make a tensor without values of its own."""
        return _without_values(cls, dense)  # type: ignore[no-any-return]

    def __init__(self, dense: Tensor, refusal: str) -> None:
        self.dense, self.refusal = dense, refusal

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["dense"], self.refusal

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], refusal: str, size: Any, stride: Any) -> Tensor:
        dense = inner["dense"]
        if type(dense) is Tensor and not is_traced():  # what a graph returns
            return _marked(dense, refusal, None)  # type: ignore[no-any-return]
        return RecordedView(dense, refusal)

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
            return one.dense

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs))
        result = operator(*args, **kwargs)
        return recorded_view(result, views[0].refusal) if makes_view(operator) else result
