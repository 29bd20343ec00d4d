"""What is known about torch's functions: which read no values, and what the others write to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lowmem.kernels.torch_versions import mark_constant_in_graphs

_WRITES = (
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__imatmul__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
)  # fmt: skip

_LOOKUPS = "embedding", "embedding_bag"  # which write to the table if ``max_norm`` is given

_F = TypeVar("_F", bound=Callable[..., Any])


def registration_decorator(table: dict[Any, Callable[..., Any]], *functions: Any) -> Callable[[_F], _F]:
    """Return a decorator that registers an implementation for functions of torch in a table."""

    def register(implementation: _F) -> _F:
        table.update(dict.fromkeys(functions, implementation))
        return implementation

    return register


@mark_constant_in_graphs
def is_in_place_function(function: Any) -> bool:
    """Whether a torch function changes its first argument in place, judged by its name."""
    name = torch_function_name(function)
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITES


@mark_constant_in_graphs
def torch_function_name(function: Any) -> str:
    """Return the name of a torch function or operator, without that of its overload."""
    return str(getattr(function, "__name__", "")).partition(".")[0]


def function_write_targets(function: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that a torch function writes to."""
    targets = [kwargs.get("out")]
    if is_in_place_function(function) or kwargs.get("inplace") is True:
        targets.append(args[0] if args else next(iter(kwargs.values()), None))
    if (
        torch_function_name(function) in _LOOKUPS
        and (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None
    ):
        targets.append(args[1] if len(args) > 1 else kwargs.get("weight"))  # its rows are rescaled
    return [tensor for target in targets for tensor in (target if isinstance(target, (list, tuple)) else [target])]


def operator_write_targets(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments that an operator writes to."""
    for number, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        yield from value if isinstance(value, (list, tuple)) else [value]


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
