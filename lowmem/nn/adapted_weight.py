"""A weight with adapters, ``W + sum s B A``, for whoever computes with it: by two thin products, without making it.

Products, gathers and convolutions compute with W as before and add the low-rank product of their input. Views that
keep matrices whole are such weights again. Everything else gets the values, dense and differentiable in A and B.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lowmem.kernels.torch_versions import ask_classes_in_graphs
from lowmem.nn import adapted_products, adapted_views  # noqa: F401 - register what such weights do
from lowmem.nn.adapter import Layout, Update
from lowmem.nn.low_rank_sum import FUNCTIONS, REFUSAL, LowRankSum, on_values
from lowmem.nn.read_only import read_only

__all__ = ["AdaptedWeight", "adapted_weight"]


def adapted_weight(base: Any, updates: Sequence[Update], layout: Layout, known: Tensor | None = None) -> Any:
    """Return a weight with adapters.

    Args:
        base: the weight without: a Tensor or StoredTensor.
        updates: of the adapters, in the order in which they are added.
        layout: how the weight holds matrices.
        known: the product with the base, where it is known.
    """
    make: Any = _traced if torch.compiler.is_dynamo_compiling() else AdaptedWeight
    return make(base, tuple(updates), layout, known)


class AdaptedWeight(LowRankSum, Tensor):
    """A weight with adapters, as a tensor of its shape, dtype and device."""

    @staticmethod
    def __new__(cls, base: Any, updates: Any, layout: Any, known: Any = None) -> AdaptedWeight:
        """Make a tensor without values of its own."""
        return torch.Tensor._make_wrapper_subclass(
            cls, base.shape, dtype=base.dtype, device=base.device, requires_grad=False
        )

    def __init__(self, base: Any, updates: tuple[Update, ...], layout: Layout, known: Tensor | None = None) -> None:
        self.__dict__.update(base=base, updates=updates, holds=layout, known=known)
        self._is_param = True

    def remade(
        self, base: Any, updates: Sequence[Update], layout: Layout | None = None, known: Tensor | None = None
    ) -> Any:
        """Return a weight of another base and other updates; layout: None for this one's."""
        return AdaptedWeight(base, tuple(updates), self.holds if layout is None else layout, known)

    @classmethod
    def read(cls, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what needs no values."""
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return on_values(operator, args, kwargs or {})

    @property
    def unadapted(self) -> Any:
        """The weight without adapters: who shares an adapted weight with another module shares this."""
        return self.base

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"AdaptedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, adapters={len(self.updates)})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.values().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().detach().__reduce_ex__(protocol)


class _Traced(LowRankSum, nn.Parameter):
    """A weight with adapters in a graph that Dynamo records.

    Dynamo can make a tensor of another class as a copy of a tensor: here of one without values, so that a function
    for which Dynamo does not ask the class gives an error, and no result of other values.
    """

    __new__ = Tensor.__new__  # type: ignore[assignment]  # the only one that Dynamo knows

    @property
    def base(self) -> Any:
        """Say why a tensor of this class that was not made here has none."""
        raise RuntimeError(
            "torch.compile iterates over a weight with adapters without asking it: write weight.unbind() instead"
        )

    def remade(
        self, base: Any, updates: Sequence[Update], layout: Layout | None = None, known: Tensor | None = None
    ) -> Any:
        """Return a weight of another base and other updates; layout: None for this one's."""
        return _traced(base, tuple(updates), self.holds if layout is None else layout, known)

    @classmethod
    def read(cls, function: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what needs no values: of the base, which has the same shape, dtype and device."""
        return function(weight.base, *args, **kwargs)


def _register_methods() -> None:
    """Give graphs the methods of tensors that Python defines, as ``split``: Dynamo asks no class for them."""

    def register(name: str, function: Any) -> None:
        implemented = function in FUNCTIONS

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if implemented:
                return self.__torch_function__(function, (), (self, *args), kwargs)
            result = getattr(self.values(), name)(*args, **kwargs)  # not the function, which may call super()
            return read_only(result, REFUSAL, function, (self, *args))

        setattr(_Traced, name, method)

    for name, function in vars(Tensor).items():
        if isinstance(function, types.FunctionType) and not name.startswith("_"):
            register(name, function)


_register_methods()


def _traced(base: Any, updates: tuple[Update, ...], layout: Layout, known: Tensor | None) -> _Traced:
    ask_classes_in_graphs()
    made: Any = _Traced(torch.empty(base.shape, dtype=base.dtype, device="meta"))
    made.base, made.updates, made.holds, made.known = base, updates, layout, known  # after __init__: Dynamo has none
    return made  # type: ignore[no-any-return]


def _share_base(module: nn.Module, name: str, parameter: Any) -> Any:
    """Register the base of an adapted weight as a parameter in its place: adapters stay with their modules."""
    return parameter.base if isinstance(parameter, AdaptedWeight) else None


register_module_parameter_registration_hook(_share_base)
