"""A tensor subclass for a weight with adapters, ``W + sum s B A``: torch functions compute as two products."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lowmem.nn.adapter import Layout, Update
from lowmem.nn.low_rank_sum import ADAPTED_FUNCTIONS, LowRankSum, on_values


def adapted_weight(base: Any, updates: Sequence[Update], layout: Layout) -> Any:
    """Return a weight with adapters.

    Args:
        base: the weight without adapters: a Tensor or StoredTensor.
        updates: of the adapters, in the order in which they are added.
        layout: how the parameter holds the matrices that adapters change.
    """
    make: Any = _traced if torch.compiler.is_dynamo_compiling() else AdaptedWeight
    return make(base, tuple(updates), layout, None)


_VIEWS: dict[Any, Any] = {
    torch.ops.aten.detach.default: Tensor.detach,
    torch.ops.aten.t.default: Tensor.t,
    torch.ops.aten.transpose.int: Tensor.transpose,
    torch.ops.aten.permute.default: Tensor.permute,
}
"""The operators of ``weight.data``, ``T`` and ``mT``, which Dynamo's guards read without ``__torch_function__``."""


class AdaptedWeight(LowRankSum, Tensor):
    """A weight with adapters, as a tensor of its shape, dtype and device."""

    @staticmethod
    def __new__(cls, base: Any, updates: Any, layout: Any, known: Any = None) -> AdaptedWeight:
        """Make a tensor without memory."""
        return torch.Tensor._make_wrapper_subclass(
            cls, base.shape, dtype=base.dtype, device=base.device, requires_grad=False
        )

    def __init__(self, base: Any, updates: tuple[Update, ...], layout: Layout, known: Tensor | None = None) -> None:
        self.__dict__.update(base=base, updates=updates, holds=layout, known=known)
        self._is_param = True

    def remade(
        self, base: Any, updates: Sequence[Update], layout: Layout | None = None, known: Tensor | None = None
    ) -> Any:
        """Return a weight with another base and other updates; layout None: this weight's."""
        return AdaptedWeight(base, tuple(updates), self.holds if layout is None else layout, known)

    @classmethod
    def read(cls, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function that needs no values, such as ``size``."""
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        own = _VIEWS.get(operator)
        result = NotImplemented if own is None else ADAPTED_FUNCTIONS[own](*args)
        return on_values(operator, args, kwargs or {}) if result is NotImplemented else result

    @property
    def unadapted(self) -> Any:
        """The weight without adapters: it is set when an adapted weight is assigned to another module."""
        return self.base

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"AdaptedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, adapters={len(self.updates)})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.values().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().detach().__reduce_ex__(protocol)


class _Traced(LowRankSum, nn.Parameter):
    """A weight with adapters in a graph that Dynamo records, which constructs subclasses only of another tensor."""

    __new__ = Tensor.__new__  # type: ignore[assignment]  # the only one that Dynamo can trace

    def remade(
        self, base: Any, updates: Sequence[Update], layout: Layout | None = None, known: Tensor | None = None
    ) -> Any:
        """Return a weight with another base and other updates; layout None: this weight's."""
        return _traced(base, tuple(updates), self.holds if layout is None else layout, known)

    @classmethod
    def read(cls, function: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function that needs no values with the base, which has the same shape, dtype and device."""
        return function(weight.base, *args, **kwargs)


def _register_methods() -> None:
    """Override the tensor methods that are written in Python, such as ``split``: Dynamo inlines them otherwise."""

    def register(name: str, function: Any) -> None:
        implemented = function in ADAPTED_FUNCTIONS

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if implemented:
                return self.__torch_function__(function, (), (self, *args), kwargs)
            return getattr(self.values(), name)(*args, **kwargs)  # by name: the function itself may call super()

        setattr(_Traced, name, method)

    for name, function in vars(Tensor).items():
        if isinstance(function, types.FunctionType) and not name.startswith("_"):
            register(name, function)


_register_methods()


def _traced(base: Any, updates: tuple[Update, ...], layout: Layout, known: Tensor | None) -> _Traced:
    made: Any = _Traced(torch.empty(base.shape, dtype=torch.bits16, device="meta"))
    made.base, made.updates, made.holds, made.known = base, updates, layout, known  # Dynamo cannot trace an __init__
    return made  # type: ignore[no-any-return]


def _share_base(module: nn.Module, name: str, parameter: Any) -> Any:
    """When an adapted weight is registered as a parameter, register its base: adapters stay with their modules."""
    return parameter.base if isinstance(parameter, AdaptedWeight) else None


register_module_parameter_registration_hook(_share_base)
