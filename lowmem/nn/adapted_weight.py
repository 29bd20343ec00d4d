"""What ``module.weight`` of a module with adapters returns: ``W + sum s B A`` as an ``AdaptedWeight``, with which
products multiply by W and by the two low-rank matrices. Other functions get the dense sum, differentiable in A and B.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels.grouped_matmul import grouped_matmul
from lowmem.kernels.torch_versions import disable_dynamo, mark_constant_in_graphs
from lowmem.nn.adapter import LowRankUpdate, add_low_rank_product
from lowmem.nn.adapter_autograd import fused_lora_product_or_none, fusible_lora_matrices_or_none
from lowmem.nn.call_context import autocast_disabled_if_slow
from lowmem.nn.stored_products import einsum_recomputing_dense_weights
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.torch_functions import METADATA, function_write_targets, registration_decorator, torch_function_name

REFUSAL = (
    "a weight with adapters, which is computed: write to the layer's own parameter, or merge the adapters first, "
    "lowmem.merge(model)"
)
"""End of the error message for writes to an adapted weight."""

ADAPTED_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Torch function, or name of a custom operator -> its implementation; NotImplemented: use the dense sum."""

_PYTHON = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)

implements_adapted = partial(registration_decorator, ADAPTED_FUNCTIONS)


class AdaptedWeight(Tensor):
    """``base + sum s left right``, as a tensor of the base's shape, dtype and device.

    Attributes:
        base: the weight without adapters, a Tensor or StoredTensor.
        updates: of the adapters, in the order in which they are added.
        recorded: the dense sum in a graph that Dynamo records; None in all other cases.
    """

    base: Any
    updates: Sequence[LowRankUpdate]
    recorded: Tensor | None = None

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """Torch reads it before it registers a tensor as a parameter; other modules cannot hold this one."""
        raise RuntimeError(
            "a weight with adapters cannot be a parameter of a module without: give the module adapters, too, and "
            "both share the weight without them; or give weight.unadapted"
        )

    @property
    def unadapted(self) -> Any:
        """The weight without adapters: it is set when an adapted weight is assigned to another module."""
        return self.base

    @property
    def is_matrix_or_stack(self) -> bool:
        """Whether it is a matrix or a stack of some, and not the kernel of a convolution or one row."""
        dims = len(self.base.shape)
        return dims > 1 and all(update.left.dim() == dims for update in self.updates)

    def dense_values(self) -> Tensor:
        """Return the dense sum, differentiable in the adapters."""
        return _dense_base_plus_updates(self.base, self.updates) if self.recorded is None else self.recorded

    @property
    def has_row_dimension(self) -> bool:
        """Whether it is more than one row of a matrix."""
        return all(update.left.dim() > 1 for update in self.updates)

    def indexed_along_first_dim(self, index: Any) -> Any:
        """Return ``weight[index]``, for an index of the first dimension."""
        return adapted_weight(self.base[index], [update.indexed_along_first_dim(index) for update in self.updates])

    def with_transposed_matrices(self) -> Any:
        """Return the weight with its matrices transposed."""
        updates = [update.with_matrices(update.right.mT, update.left.mT) for update in self.updates]
        return adapted_weight(self.base.transpose(-1, -2), updates)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling() and (method := _python_method_name_or_empty(function)):
            return partial(_call_adapted_or_dense_method, args[0], method)
        implementation = ADAPTED_FUNCTIONS.get(function)
        if implementation is None and not isinstance(function, _PYTHON):
            implementation = ADAPTED_FUNCTIONS.get(str(function).removesuffix(".default"))
        if (
            implementation is not None
            and (args or implementation is adapted_linear_or_not_implemented)
            and "out" not in kwargs
        ):
            result = implementation(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for tensor in function_write_targets(function, args, kwargs):
            if isinstance(tensor, AdaptedWeight):
                raise RuntimeError(f"{torch_function_name(function)} would write to {REFUSAL}")
        if function in METADATA:
            return function(args[0].base, *args[1:], **kwargs)
        return _call_with_dense_weights(function, args, kwargs)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense_values().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense_values().detach().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"AdaptedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, adapters={len(self.updates)})"


# a graph of its own, after a graph break, could lose a write to what this returns
disable_dynamo(AdaptedWeight.__torch_function__.__func__)  # type: ignore[attr-defined]


class _LazyAdaptedWeight(AdaptedWeight):
    """An adapted weight outside of graphs, whose sum is computed when something reads it."""

    @staticmethod
    def __new__(cls, base: Any, updates: Sequence[LowRankUpdate]) -> Any:
        """Make a tensor without memory."""
        made = Tensor._make_wrapper_subclass(cls, base.shape, dtype=base.dtype, device=base.device)
        made.base, made.updates, made._is_param = base, updates, True
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        view = _VIEWS.get(operator)
        result = NotImplemented if view is None else view(*args)
        return _call_with_dense_weights(operator, args, kwargs or {}) if result is NotImplemented else result


def adapted_weight(base: Any, updates: Sequence[LowRankUpdate]) -> Any:
    """Return ``base + sum s left right`` as an ``AdaptedWeight``.

    Dynamo constructs no tensors without memory, and asks no class about some functions, as ``torch._foreach_add_``.
    So in a graph the class is that of an empty tensor of a dtype with which these fail, where they would write to a
    copy. It has the dense sum, which the compiler drops if only products read the weight.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _LazyAdaptedWeight(base, updates)
    made: Any = torch.empty(base.shape, dtype=torch.bits16, device="meta").as_subclass(AdaptedWeight)
    made.base, made.updates, made.recorded = base, updates, _dense_base_plus_updates(base, updates)
    return made


def _dense_base_plus_updates(base: Any, updates: Sequence[LowRankUpdate]) -> Tensor:
    total: Tensor = base.dequantize() if isinstance(base, StoredTensor) else base
    for update in updates:
        with autocast_disabled_if_slow(update.left):
            change = (update.left * update.scaling) @ update.right
        total = total + change.view(total.shape).to(total.dtype)  # of a kernel, right has all columns
    return total


def _call_with_dense_weights(function: Any, args: Any, kwargs: Any) -> Any:
    known: list[tuple[AdaptedWeight, Tensor]] = []

    def dense_if_adapted(argument: Any) -> Any:
        if not isinstance(argument, AdaptedWeight):
            return argument
        for weight, values in known:
            if weight is argument:
                return values
        known.append((argument, argument.dense_values()))
        return known[-1][1]

    args, kwargs = torch.utils._pytree.tree_map(dense_if_adapted, (args, kwargs))
    return function(*args, **kwargs)


def _call_adapted_or_dense_method(weight: AdaptedWeight, method_name: str, *args: Any, **kwargs: Any) -> Any:
    implementation = ADAPTED_FUNCTIONS.get(getattr(Tensor, method_name))
    result = NotImplemented if implementation is None else implementation(weight, *args, **kwargs)
    return getattr(weight.dense_values(), method_name)(*args, **kwargs) if result is NotImplemented else result


@mark_constant_in_graphs
def _python_method_name_or_empty(function: Any) -> str:
    """Return the name of a tensor method that is written in Python, such as ``split``, of which ``function`` is the
    ``__get__``: Dynamo takes it for an attribute. Return "" for other functions."""
    method = getattr(function, "__self__", None)
    return (
        method.__name__
        if isinstance(method, types.FunctionType) and torch_function_name(function) == "__get__"
        else ""
    )


def _is_adapted_matrix_or_stack(weight: Any) -> bool:
    return isinstance(weight, AdaptedWeight) and weight.is_matrix_or_stack


@implements_adapted(functional.linear)
def adapted_linear_or_not_implemented(input: Any, weight: Any, bias: Any = None) -> Any:
    """Return the product with W, plus the low-rank one: (..., in) -> (..., out)."""
    if not _is_adapted_matrix_or_stack(weight) or isinstance(input, AdaptedWeight):
        return NotImplemented
    if (fused := _single_adapter_product_or_none("linear", input, weight, bias)) is not None:
        return fused
    out = functional.linear(input, weight.base, bias)
    for update in weight.updates:
        out = add_low_rank_product(
            out, update.cast_and_apply_dropout(input), update.right, update.left, update.scaling
        )
    return out


def _single_adapter_product_or_none(layout_kind: str, x: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
    """Return the product with a weight and its only adapter as one node, or None (``fused_lora_product_or_none``)."""
    adapter = weight.updates[0].adapter if len(weight.updates) == 1 else None
    if adapter is None or adapter.layout.kind != layout_kind or len(weight.base.shape) != 2:
        return None
    matrices = fusible_lora_matrices_or_none(adapter, x)
    return (
        None
        if matrices is None
        else fused_lora_product_or_none(x, weight.base, adapter, matrices, bias, layout_kind == "transposed")
    )


_MATMULS = torch.matmul, Tensor.matmul
_MMS = torch.mm, Tensor.mm  # of two dimensions only


def _adapted_matmul(
    function: Callable[[Any, Any], Tensor], left_matrix: Any = None, right_matrix: Any = None, **kwargs: Any
) -> Any:
    """Return ``function(a, b)``, a product one of whose factors is an adapted weight."""
    if kwargs or isinstance(left_matrix, AdaptedWeight) == isinstance(right_matrix, AdaptedWeight):
        return NotImplemented
    if _is_adapted_matrix_or_stack(left_matrix):
        out = function(left_matrix.base, right_matrix)
        for update in left_matrix.updates:
            with autocast_disabled_if_slow(right_matrix):
                narrow = torch.matmul(update.right, update.cast_and_apply_dropout(right_matrix)) * update.scaling
                out = out + torch.matmul(update.left, narrow).to(out.dtype)
        return out
    if not _is_adapted_matrix_or_stack(right_matrix):
        return NotImplemented
    takes = function in _MATMULS or (function in _MMS and left_matrix.dim() == 2)
    fused = _single_adapter_product_or_none("transposed", left_matrix, right_matrix) if takes else None
    return _base_plus_low_rank_products(function, torch.matmul, left_matrix, right_matrix) if fused is None else fused


def _adapted_addmm(
    function: Callable[..., Tensor], bias: Any, left_matrix: Any = None, right_matrix: Any = None, **kwargs: Any
) -> Any:
    """Return ``bias`` plus a product: ``function`` is ``addmm`` or ``baddbmm``."""
    if kwargs or not _is_adapted_matrix_or_stack(right_matrix) or isinstance(left_matrix, AdaptedWeight):
        return NotImplemented
    fused = (
        _single_adapter_product_or_none("transposed", left_matrix, right_matrix, bias)
        if left_matrix.dim() == 2
        else None
    )
    return (
        _base_plus_low_rank_products(partial(function, bias), torch.matmul, left_matrix, right_matrix)
        if fused is None
        else fused
    )


def _base_plus_low_rank_products(
    base_product: Callable[..., Tensor], low_rank_product: Callable[[Tensor, Tensor], Tensor], x: Any, weight: Any
) -> Any:
    """Return ``function(x, W)``, plus ``x left right`` by the product ``low_rank_product``."""
    out = base_product(x, weight.base)
    for update in weight.updates:
        with autocast_disabled_if_slow(x):
            narrow = low_rank_product(update.cast_and_apply_dropout(x), update.left) * update.scaling
            out = out + low_rank_product(narrow, update.right).to(out.dtype)
    return out


def _adapted_grouped_mm(
    function: Callable[..., Tensor], x: Any, weight: Any = None, offs: Any = None, **options: Any
) -> Any:
    if (
        not _is_adapted_matrix_or_stack(weight)
        or isinstance(x, AdaptedWeight)
        or x.dim() != 2
        or len(weight.base.shape) != 3
    ):
        return NotImplemented
    if offs is None:
        return NotImplemented
    thin = partial(_grouped_matmul_offsets_first, offs)
    return _base_plus_low_rank_products(lambda x, base: function(x, base, offs=offs, **options), thin, x, weight)


def _grouped_matmul_offsets_first(offsets: Tensor, x: Tensor, matrices: Tensor) -> Tensor:
    return grouped_matmul(x, matrices, offsets)


def _adapted_transformers_grouped_mm(input: Any, weight: Any, offs: Any) -> Any:
    """Implement transformers' fallback for torch versions without grouped_mm, without dequantizing the weight."""
    return _adapted_grouped_mm(
        lambda x, base, offs: torch.ops.transformers.grouped_mm_fallback(x, base, offs), input, weight, offs
    )


def _register_adapted_products() -> None:
    for place in (torch, Tensor):
        for name in ("matmul", "mm", "bmm"):
            ADAPTED_FUNCTIONS[getattr(place, name)] = partial(_adapted_matmul, getattr(place, name))
        for name in ("addmm", "baddbmm"):
            ADAPTED_FUNCTIONS[getattr(place, name)] = partial(_adapted_addmm, getattr(place, name))
    ADAPTED_FUNCTIONS[Tensor.__matmul__] = partial(_adapted_matmul, torch.matmul)
    ADAPTED_FUNCTIONS[Tensor.__rmatmul__] = lambda b, a: _adapted_matmul(torch.matmul, a, b)
    for place, name in ((functional, "grouped_mm"), (torch, "_grouped_mm")):
        if hasattr(place, name):
            ADAPTED_FUNCTIONS[getattr(place, name)] = partial(_adapted_grouped_mm, getattr(place, name))
    ADAPTED_FUNCTIONS["transformers.grouped_mm_fallback"] = _adapted_transformers_grouped_mm


_register_adapted_products()


@implements_adapted(torch.einsum)
def _adapted_einsum(*arguments: Any) -> Any:
    """Contract with the dense sums, which backward makes again."""
    return einsum_recomputing_dense_weights(arguments, AdaptedWeight, AdaptedWeight.dense_values)


@implements_adapted(Tensor.T.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
def _adapted_t(weight: Any) -> Any:
    return (
        weight.with_transposed_matrices()
        if _is_adapted_matrix_or_stack(weight) and len(weight.base.shape) == 2
        else NotImplemented
    )


@implements_adapted(Tensor.mT.__get__)  # type: ignore[attr-defined]
def _adapted_mt(weight: Any) -> Any:
    return weight.with_transposed_matrices() if _is_adapted_matrix_or_stack(weight) else NotImplemented


@implements_adapted(Tensor.transpose, torch.transpose)
def _adapted_transpose(weight: Any, dim0: int, dim1: int) -> Any:
    if not _is_adapted_matrix_or_stack(weight):
        return NotImplemented
    dims = len(weight.base.shape)
    return weight.with_transposed_matrices() if {dim0 % dims, dim1 % dims} == {dims - 1, dims - 2} else NotImplemented


@implements_adapted(Tensor.__getitem__)
def _adapted_getitem(weight: Any, index: Any) -> Any:
    if isinstance(index, tuple) and all(
        isinstance(rest_index, slice) and rest_index == slice(None) for rest_index in index[1:]
    ):
        index = index[0] if index else ...
    first = isinstance(index, (slice, int, list)) or (isinstance(index, Tensor) and index.dim() < 2)
    if not first or isinstance(index, bool) or not isinstance(weight, AdaptedWeight) or not weight.has_row_dimension:
        return NotImplemented
    return weight.indexed_along_first_dim(index)


def _select_adapted_rows(
    function: Callable[..., Any], dim_position: int, weight: Any, *args: Any, **kwargs: Any
) -> Any:
    """Return rows as adapted weights, for a function whose argument number ``dim_position`` is the dimension."""
    dim = args[dim_position] if dim_position < len(args) else kwargs.get("dim", 0)
    if dim != 0 or not weight.has_row_dimension:
        return NotImplemented
    base = function(weight.base, *args, **kwargs)
    updates = [
        update.updates_of_selected_rows(lambda matrix: function(matrix, *args, **kwargs)) for update in weight.updates
    ]
    if isinstance(base, Tensor):
        return adapted_weight(base, [update for (update,) in updates])
    return tuple([adapted_weight(part, of_part) for part, *of_part in zip(base, *updates, strict=True)])


for _name, _place in (("select", 0), ("narrow", 0), ("index_select", 0), ("unbind", 0), ("split", 1), ("chunk", 1)):
    for _function in (getattr(torch, _name), getattr(Tensor, _name)):
        ADAPTED_FUNCTIONS[_function] = partial(_select_adapted_rows, _function, _place)
ADAPTED_FUNCTIONS[Tensor.__iter__] = partial(_select_adapted_rows, torch.unbind, 0)


@implements_adapted(Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
def _adapted_detach(weight: Any) -> Any:
    updates = [update.with_matrices(update.left.detach(), update.right.detach()) for update in weight.updates]
    return adapted_weight(weight.base.detach(), updates)


@implements_adapted(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _refuse_grad_of_adapted_weight(weight: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise RuntimeError("a weight with adapters is computed and cannot train: the adapters do")
    return weight


_VIEWS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.detach.default: _adapted_detach,
    torch.ops.aten.t.default: _adapted_t,
    torch.ops.aten.transpose.int: _adapted_transpose,
    torch.ops.aten.permute.default: lambda weight, dims: (
        _adapted_t(weight) if list(dims) == [1, 0] else NotImplemented
    ),
}
"""The operators of ``weight.data``, ``T`` and ``mT``, which guards of Dynamo call without ``__torch_function__``."""
