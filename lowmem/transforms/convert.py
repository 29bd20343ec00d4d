"""One walk over any model: find the layers, build their replacements, then swap them all at once.

Nothing of the model changes until every replacement exists, so an error leaves it as it was.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from lowmem.nn.fourbit import FourBitStorage
from lowmem.nn.frozen_linear import FrozenStorage
from lowmem.nn.lora import Adapter, LoRA
from lowmem.quant.quantize import relative_error
from lowmem.transforms.registry import (
    MADE_BY,
    REGISTRY,
    Technique,
    chosen,
    holders,
    layer_name,
    nothing_found,
    places,
    refuse_peft,
    taken_types,
    why_left,
)

__all__ = [
    "Store",
    "convert",
    "freeze_all_but_adapters",
    "keep_ties",
    "layers_to_convert",
    "one_at_a_time",
    "rebuild",
    "stored_weight",
    "swap",
    "weight_key",
]


_P = ParamSpec("_P")
_R = TypeVar("_R")
_CHANGING = threading.RLock()  # held by whoever changes which modules a model has, or reads them all


def _forget_lock() -> None:
    global _CHANGING
    _CHANGING = threading.RLock()


if hasattr(os, "register_at_fork"):  # the thread that held it is not there in the child
    os.register_at_fork(after_in_child=_forget_lock)


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let no two threads be inside such functions at once: each finds a model that none is changing."""

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _CHANGING:
            return function(*args, **kwargs)

    return alone


def convert(
    model: nn.Module,
    *techniques: Technique,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
) -> nn.Module:
    """Apply techniques, left to right, to every layer that the first one takes.

    A layer is taken when its type is exactly one in ``REGISTRY`` (a subclass is left alone) and its
    weight is its own parameter (not recomputed by a parametrization or pruning hook), which no
    nn.MultiheadAttention reads past it. A later technique passes over the layers that it does not take. A
    module that stands in several places is replaced by one module in all of them; modules that share a weight
    (tied embeddings) share what is stored of it, or are left alone together. Forward and backward hooks move to
    the replacement. After ``LoRA``, only the adapters of the model train. ``summary`` lists what
    became of every layer.

    Args:
        model: any module; the root itself can be the layer.
        techniques: ``Half``, ``FourBit``, ``LoRA``.
        where: called with (path, module); a layer is taken only where it returns True, for all its paths.
        skip: glob patterns of paths that are left alone.

    Returns:
        The model, changed in place; or the new layer, when the root itself was the layer.

    Raises:
        TypeError: the model is not a module, or a technique is not one.
        ValueError: no technique, techniques that do not compose, nothing to convert, a pattern of
            ``skip`` that matches nothing, a layer that has the technique already or is inside one of PEFT, or
            a weight that cannot be stored (its path is named). The model is left as it was.
    """
    _check_arguments(techniques)
    candidates = layers_to_convert(model, techniques, where, skip)
    store = Store()
    unused: dict[Technique, str | None] = {}
    replacements = {
        module: rebuild(module, techniques, path, unused, store.by) for module, path in candidates.items()
    }
    for why in unused.values():
        if why is not None:
            raise ValueError(why)
    model = swap(model, replacements)
    if any(isinstance(t, LoRA) for t in techniques):
        freeze_all_but_adapters(model)
    return model


def layers_to_convert(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    where: Callable[[str, nn.Module], bool] | None,
    skip: str | Iterable[str],
) -> dict[nn.Module, str]:
    """Return the layers that the first technique takes, each with its first path.

    Raises:
        TypeError: the model is not a module, or a pattern not a string.
        ValueError: nothing to convert, a pattern that matches nothing, a layer that has a technique already, or
            one of PEFT.
    """
    candidates: dict[nn.Module, str] = {}
    for module, path in chosen(model, where, skip).items():
        made_by = MADE_BY.get(type(module))
        if made_by is not None and made_by in {type(t) for t in techniques}:
            remedy = "add another with add_adapter" if made_by is LoRA else "convert a model once"
            raise ValueError(
                f"{layer_name(path)} is a {type(module).__name__}: it has {made_by.__name__} already; "
                f"{remedy}, or leave the layer out with skip="
            )
        if why_left(type(techniques[0]), module) is None:
            candidates[module] = path
    if type(techniques[0]) is not LoRA:  # whose base keeps its weight
        keep_ties(model, candidates)
    if not candidates:
        raise ValueError(nothing_found(type(techniques[0]), model))
    refuse_peft(model, candidates, freezes=any(isinstance(t, LoRA) for t in techniques))
    return candidates


def keep_ties(model: nn.Module, candidates: dict[nn.Module, str]) -> None:
    """Drop candidates that share a weight with a module that stays as it is; repeat until stable."""
    held = holders(model)  # without what another thread has just replaced, which swap refuses
    while True:
        torn = [m for m in candidates if any(other not in candidates for other, _ in held.get(id(m.weight), ()))]
        if not torn:
            return
        for module in torn:
            del candidates[module]


def stored_weight(layer: nn.Module) -> Any:
    """Return what a converted layer stores of its weight: a QuantizedTensor, or a 16-bit tensor."""
    return layer.quantized if isinstance(layer, FourBitStorage) else layer.weight


def weight_key(weight: Tensor) -> Hashable:
    """Return what is equal for two weights that are the same values in the same memory."""
    return weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape, weight.stride()


class Store:
    """Stores each weight once, so that layers that share a weight share what is stored of it."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Tensor, Any]] = {}

    def by(self, technique: Any) -> Callable[[Tensor, str], Any]:
        """Return what stores a weight, named for errors, by a technique."""

        def store(tensor: Tensor, name: str) -> Any:
            key = technique, weight_key(tensor)
            if key not in self._known:
                self._known[key] = tensor, technique.store(tensor, name)  # the tensor, so that its address stays its
            return self._known[key][1]

        return store


def _check_arguments(techniques: tuple[Technique, ...]) -> None:
    if not techniques:
        raise ValueError("no technique was given: pass Half(), FourBit() or LoRA()")
    known = {technique for technique, _ in REGISTRY}
    for technique in techniques:
        if type(technique) not in known:
            raise TypeError(f"technique={technique!r} must be an instance of Half, FourBit or LoRA")
    for kind, count in Counter(type(t) for t in techniques).items():
        if count > 1:
            raise ValueError(f"{kind.__name__} was given {count} times: a layer takes a technique once")


def rebuild(
    module: nn.Module,
    techniques: tuple[Technique, ...],
    path: str,
    unused: dict[Technique, str | None],
    store_by: Callable[[Any], Callable[[Tensor, str], Any]],
) -> nn.Module:
    """Apply the techniques that take the layer, and store its weight by ``store_by(technique)``.

    ``unused`` gathers why others do not take it, None once one takes any.
    """
    layer: Any = module
    for technique in techniques:
        made: Any = REGISTRY.get((type(technique), type(layer)))
        if made is None:
            unused.setdefault(
                technique,
                f"{layer_name(path)}: {type(technique).__name__} cannot follow the techniques before it, which made "
                f"a {type(layer).__name__}; it takes {taken_types(type(technique))}",
            )
            continue
        unused[technique] = None
        try:
            if isinstance(technique, LoRA):
                layer = made.from_layer(layer, technique)
            else:
                layer = made.from_layer(layer, technique, store_by(technique))
        except (TypeError, ValueError) as reason:
            raise type(reason)(f"{layer_name(path)}: {reason}") from reason
        if isinstance(layer, FrozenStorage):
            weight: Any = module.weight
            layer.weight_error = relative_error(weight, stored_weight(layer))
    built: nn.Module = layer.train(module.training)
    return built


@one_at_a_time
def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put every replacement where its layer stands: all of them or, where another thread took one's layer, none.

    Raises:
        RuntimeError: a layer is not in the model any more. The model is left as it is.
    """
    found = places(model)
    gone = [type(old).__name__ for old in replacements if old not in found]
    if gone:
        raise RuntimeError(
            f"{len(gone)} of the layers to replace (a {gone[0]}) left {type(model).__name__} meanwhile: change a "
            "model from one thread, or one after the other"
        )
    for old, new in replacements.items():
        if old._is_full_backward_hook is not None:
            new._is_full_backward_hook = old._is_full_backward_hook
        for name in _HOOKS:
            hooks = vars(old)[name]
            if hooks:
                vars(old)[name] = type(hooks)()  # a wrapped base must not run them a second time
                hooks.update(vars(new)[name])  # those that a base got while it was wrapped
                vars(new)[name] = hooks  # the same dictionary, so that the handles still remove them
        for path in found[old]:
            parent_path, _, child = path.rpartition(".")
            if not path:
                return new
            parent = model.get_submodule(parent_path)
            setattr(parent, child, new)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # Its fused inference path would read the dense weight of the layers it holds.
                parent.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(m in replacements.values() for m in module.modules()):
            module.use_nested_tensor = False
    return model


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Freeze every parameter that is not an adapter's; those stay as they are, and train when they are new."""
    adapters = {p for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)
