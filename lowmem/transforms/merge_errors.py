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
from lowmem.errors import describe
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_bank import parameter_of
from lowmem.nn.fold import Folded, without_adapters
from lowmem.nn.module_class import HOOKS, copied_module
from lowmem.transforms.calibration.runs import check_batch, computing, evaluation_mode, hooked, run_batch


def output_errors(
    model: nn.Module, folded: Mapping[AdaptedModule, Folded], inputs: Any, to: torch.dtype | None
) -> tuple[dict[nn.Module, tuple[float, float]], tuple[float, float] | None]:
    """Return the relative errors, before and after, of the outputs of each layer that inputs reach, and the model."""
    copies = {layer: done.layer for layer, done in folded.items()}
    copies |= {layer: _widened(layer, one) for layer, one in copies.items() if to and _reads(layer)}
    bases = {layer: without_adapters(layer) for layer in folded}
    dtypes: dict[AdaptedModule, torch.dtype | None] = {layer: None if _reads(layer) else to for layer in folded}
    sums: dict[nn.Module, Tensor] = {}  # squares: of the base's error, of the copy's, and of the exact output

    def see(layer: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(layer, AdaptedModule)
        base, merged, to = bases[layer], copies[layer], dtypes[layer]
        with _unmerged(layer):
            exact = _output(layer, args, kwargs)
        wide = exact.double()
        pair = _output(base, args, kwargs), _output(merged, *_cast((args, kwargs), to))
        found = torch.stack([t.double().sub(wide).square().sum() for t in pair] + [wide.square().sum()])
        sums[layer] = sums.get(layer, 0) + found

    with evaluation_mode(model), hooked(folded, see):
        exact = _floating(_called(model, inputs))
    totals = {layer: found.tolist() for layer, found in sums.items()}
    of_layers = {
        layer: (_relative(base, size), _relative(copy, size)) for layer, (base, copy, size) in totals.items()
    }
    before = _difference(_outputs_with(bases, model, inputs, {}), exact)
    after = _difference(_outputs_with(copies, model, inputs, dtypes), exact)
    return of_layers, None if before is None or after is None else (before, after)


def _called(model: nn.Module, inputs: Any) -> Any:
    """Return a model's outputs; raise a TypeError for inputs that are no batch, a ValueError if the model fails."""
    check_batch(inputs)
    try:
        return run_batch(model, inputs)
    except Exception as reason:  # whatever a model raises for inputs that it does not take
        raise ValueError(
            f"inputs= cannot be given to {type(model).__name__}: {describe(reason)}; pass one batch as the model "
            "takes it, of the shapes, dtypes and device that it expects"
        ) from reason


def _reads(layer: nn.Module) -> bool:
    """Whether a dtype cannot be that of the inputs: attention reads the weight, or the inputs are integers."""
    kinds = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Embedding, nn.EmbeddingBag)
    return isinstance(layer, kinds)


def _widened(layer: AdaptedModule, merged: nn.Module) -> nn.Module:
    """Return a copy of a merged module that presents its rounded values in the dtype that the layer presents."""
    read = parameter_of(layer, layer._adapted_names[0]).dtype
    copied = copied_module(merged, type(merged))
    copied.__dict__["_parameters"] = {
        name: one if one is None else nn.Parameter(one.detach().to(read), requires_grad=False)
        for name, one in merged._parameters.items()
    }
    return copied


def _in_dtype(forward: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """Call ``forward`` in ``dtype``, and cast the result back to the input's dtype."""
    before = [one.dtype for one in measure.tensors_in((args, kwargs)) if one.is_floating_point()]
    args, kwargs = _cast((args, kwargs), dtype)
    return _cast(forward(*args, **kwargs), before[0] if before else None)


def _stand_in(layer: AdaptedModule, other: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of a module that computes in place of a layer: with its hooks and mode, and in ``dtype``."""
    copied = copied_module(other, type(other)) if dtype is None else _widened(layer, other)
    copied.__dict__.update({name: layer.__dict__[name] for name in (*HOOKS, "training")})
    if dtype is not None:
        copied.__dict__["forward"] = partial(_in_dtype, other.forward, dtype)
    return copied


@contextmanager
def _with_stand_ins(model: nn.Module, others: Mapping[AdaptedModule, nn.Module]) -> Iterator[nn.Module]:
    """Let other modules be children in place of layers inside the block, and compute where a layer is called."""
    given: Mapping[Any, nn.Module] = others
    held = [(one._modules, dict(one._modules)) for one in (*model.modules(), *others.values())]
    with ExitStack() as stack:
        for children, own in held:
            stack.callback(children.update, own)
            children.update({name: given[child] for name, child in own.items() if child in given})
        for layer, other in others.items():  # which a model may hold elsewhere, as in a list
            stack.enter_context(computing(layer, other.forward))
        yield given.get(model, model)


def _outputs_with(
    others: Mapping[AdaptedModule, nn.Module],
    model: nn.Module,
    inputs: Any,
    dtypes: Mapping[AdaptedModule, torch.dtype | None],
) -> list[Tensor]:
    """Return the outputs of a model whose adapted layers compute with other modules meanwhile."""
    with evaluation_mode(model) as stack:
        stand_ins = {layer: _stand_in(layer, other, dtypes.get(layer)) for layer, other in others.items()}
        return _floating(run_batch(stack.enter_context(_with_stand_ins(model, stand_ins)), inputs))


def _floating(outputs: Any) -> list[Tensor]:
    return [one.detach().clone() for one in measure.tensors_in(outputs) if one.is_floating_point()]


def _difference(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float | None:
    """Return the relative error of all tensors together; None if they have other shapes, or there are none."""
    if not exact or [one.shape for one in outputs] != [one.shape for one in exact]:
        return None
    wide = [(a.double(), b.double()) for a, b in zip(outputs, exact, strict=True)]
    lost, size = (
        sum(float(one.square().sum()) for one in ones) for ones in ([a - b for a, b in wide], [b for _, b in wide])
    )
    return _relative(lost, size)


def _output(module: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the first tensor of a module's output; its forward is called, which runs no hooks."""
    leaves = tree_leaves(module.forward(*args, **kwargs))
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _cast(values: Any, to: torch.dtype | None) -> Any:
    """Return nested values with all floating-point tensors in a dtype; None: as they are."""
    return values if to is None else tree_map_only(Tensor, lambda t: t.to(to) if t.is_floating_point() else t, values)


@contextmanager
def _unmerged(layer: AdaptedModule) -> Iterator[None]:
    """Let all adapters in use be applied to the base as it is, inside the block."""
    bank = layer.adapters
    before = bank.active, bank.merged_copy
    try:
        bank.active, bank.merged_copy = bank.in_use, None
        yield
    finally:
        bank.active, bank.merged_copy = before


def _relative(lost: float, size: float) -> float:
    return math.sqrt(lost / size) if size else math.inf if lost else 0.0
