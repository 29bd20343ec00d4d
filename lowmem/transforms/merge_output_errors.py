"""The errors of a model's outputs, and of each adapted layer's, that merging adapters leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lowmem import measure
from lowmem.errors import error_type_and_first_line
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.fold import MergedCopyAndErrors, unadapted_shallow_copy
from lowmem.nn.module_class import HOOKS, hookless_shallow_copy
from lowmem.transforms.calibration.model_runs import (
    check_batch_type,
    evaluation_without_gradients,
    registered_forward_pre_hooks,
    replaced_forward,
    run_batch,
)


def layer_output_errors_and_model_error(
    model: nn.Module,
    merge_results: Mapping[AdaptedModule, MergedCopyAndErrors],
    inputs: Any,
    merge_dtype: torch.dtype | None,
) -> tuple[dict[nn.Module, tuple[float, float]], tuple[float, float] | None]:
    """Return the relative errors, before and after, of the outputs of each layer that inputs reach, and the model."""
    copies = {layer: done.layer for layer, done in merge_results.items()}
    copies |= {
        layer: _merged_copy_in_layer_dtype(layer, merged_copy)
        for layer, merged_copy in copies.items()
        if merge_dtype and _is_attention_or_embedding(layer)
    }
    bases = {layer: unadapted_shallow_copy(layer) for layer in merge_results}
    dtypes: dict[AdaptedModule, torch.dtype | None] = {
        layer: None if _is_attention_or_embedding(layer) else merge_dtype for layer in merge_results
    }
    # Squares: of the base's error, of the copy's, and of the exact output
    sums: dict[nn.Module, Tensor] = {}

    def accumulate_squared_errors(layer: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(layer, AdaptedModule)
        base, merged, to = bases[layer], copies[layer], dtypes[layer]
        with _unmerged_adapters(layer):
            exact = _first_output_without_hooks(layer, args, kwargs)
        wide = exact.double()
        pair = (
            _first_output_without_hooks(base, args, kwargs),
            _first_output_without_hooks(merged, *_cast_floating_tensors((args, kwargs), to)),
        )
        squares = torch.stack([t.double().sub(wide).square().sum() for t in pair] + [wide.square().sum()])
        sums[layer] = sums.get(layer, 0) + squares

    with evaluation_without_gradients(model), registered_forward_pre_hooks(merge_results, accumulate_squared_errors):
        exact = _floating_tensor_copies(_run_inputs_or_raise(model, inputs))
    totals = {layer: squares.tolist() for layer, squares in sums.items()}
    of_layers = {
        layer: (_relative_rms_error(base, size), _relative_rms_error(copy, size))
        for layer, (base, copy, size) in totals.items()
    }
    before = _relative_output_error_or_none(_outputs_with_substitutes(bases, model, inputs, {}), exact)
    after = _relative_output_error_or_none(_outputs_with_substitutes(copies, model, inputs, dtypes), exact)
    return of_layers, None if before is None or after is None else (before, after)


def _run_inputs_or_raise(model: nn.Module, inputs: Any) -> Any:
    """Return a model's outputs; raise a TypeError for inputs that are no batch, a ValueError if the model fails."""
    check_batch_type(inputs)
    try:
        return run_batch(model, inputs)
    except Exception as reason:
        # Whatever a model raises for inputs that it does not take
        raise ValueError(
            f"inputs= cannot be given to {type(model).__name__}: {error_type_and_first_line(reason)}; pass one batch "
            "as the model "
            "takes it, of the shapes, dtypes and device that it expects"
        ) from reason


def _is_attention_or_embedding(layer: nn.Module) -> bool:
    """Whether a dtype cannot be that of the inputs: attention reads the weight, or the inputs are integers."""
    kinds = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Embedding, nn.EmbeddingBag)
    return isinstance(layer, kinds)


def _merged_copy_in_layer_dtype(layer: AdaptedModule, merged: nn.Module) -> nn.Module:
    """Return a copy of a merged module that presents its rounded values in the dtype that the layer presents."""
    read = unadapted_parameter(layer, layer._adapted_names[0]).dtype
    copied = hookless_shallow_copy(merged, type(merged))
    copied.__dict__["_parameters"] = {
        name: parameter if parameter is None else nn.Parameter(parameter.detach().to(read), requires_grad=False)
        for name, parameter in merged._parameters.items()
    }
    return copied


def _call_in_dtype_and_cast_back(forward: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """Call ``forward`` in ``dtype``, and cast the result back to the input's dtype."""
    before = [tensor.dtype for tensor in measure.tensors_in((args, kwargs)) if tensor.is_floating_point()]
    args, kwargs = _cast_floating_tensors((args, kwargs), dtype)
    return _cast_floating_tensors(forward(*args, **kwargs), before[0] if before else None)


def _substitute_copy_with_hooks(layer: AdaptedModule, substitute: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of a module that computes in place of a layer: with its hooks and mode, and in ``dtype``."""
    copied = (
        hookless_shallow_copy(substitute, type(substitute))
        if dtype is None
        else _merged_copy_in_layer_dtype(layer, substitute)
    )
    copied.__dict__.update({name: layer.__dict__[name] for name in (*HOOKS, "training")})
    if dtype is not None:
        copied.__dict__["forward"] = partial(_call_in_dtype_and_cast_back, substitute.forward, dtype)
    return copied


@contextmanager
def _substituted_layers(model: nn.Module, substitutes: Mapping[AdaptedModule, nn.Module]) -> Iterator[nn.Module]:
    """Let other modules be children in place of layers inside the block, and compute where a layer is called."""
    substitutes_by_module: Mapping[Any, nn.Module] = substitutes
    saved_children = [
        (module._modules, dict(module._modules)) for module in (*model.modules(), *substitutes.values())
    ]
    with ExitStack() as stack:
        for children, original_children in saved_children:
            stack.callback(children.update, original_children)
            children.update(
                {
                    name: substitutes_by_module[child]
                    for name, child in original_children.items()
                    if child in substitutes_by_module
                }
            )
        for layer, other in substitutes.items():  # which a model may hold elsewhere, as in a list
            stack.enter_context(replaced_forward(layer, other.forward))
        yield substitutes_by_module.get(model, model)


def _outputs_with_substitutes(
    substitutes: Mapping[AdaptedModule, nn.Module],
    model: nn.Module,
    inputs: Any,
    dtypes: Mapping[AdaptedModule, torch.dtype | None],
) -> list[Tensor]:
    """Return the outputs of a model whose adapted layers compute with other modules meanwhile."""
    with evaluation_without_gradients(model) as stack:
        stand_ins = {
            layer: _substitute_copy_with_hooks(layer, other, dtypes.get(layer))
            for layer, other in substitutes.items()
        }
        return _floating_tensor_copies(run_batch(stack.enter_context(_substituted_layers(model, stand_ins)), inputs))


def _floating_tensor_copies(outputs: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in measure.tensors_in(outputs) if tensor.is_floating_point()]


def _relative_output_error_or_none(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float | None:
    """Return the relative error of all tensors together; None if they have other shapes, or there are none."""
    if not exact or [tensor.shape for tensor in outputs] != [tensor.shape for tensor in exact]:
        return None
    wide = [(a.double(), b.double()) for a, b in zip(outputs, exact, strict=True)]
    lost, size = (
        sum(float(tensor.square().sum()) for tensor in tensors)
        for tensors in ([a - b for a, b in wide], [b for _, b in wide])
    )
    return _relative_rms_error(lost, size)


def _first_output_without_hooks(module: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the first tensor of a module's output; its forward is called, which runs no hooks."""
    leaves = tree_leaves(module.forward(*args, **kwargs))
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _cast_floating_tensors(values: Any, dtype: torch.dtype | None) -> Any:
    """Return nested values with all floating-point tensors in a dtype; None: as they are."""
    return (
        values
        if dtype is None
        else tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)
    )


@contextmanager
def _unmerged_adapters(layer: AdaptedModule) -> Iterator[None]:
    """Let all adapters in use be applied to the base as it is, inside the block."""
    bank = layer.adapters
    before = bank.active, bank.merged_copy
    try:
        bank.active, bank.merged_copy = bank.active_or_merged_names, None
        yield
    finally:
        bank.active, bank.merged_copy = before


def _relative_rms_error(squared_error: float, squared_norm: float) -> float:
    return math.sqrt(squared_error / squared_norm) if squared_norm else math.inf if squared_error else 0.0
