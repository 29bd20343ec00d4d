"""Converts any model: selects modules, stores copies of all their weights, then puts these in.

The model does not change before everything is made, so an error leaves it as it was.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import show
from lowmem.nn.adapted_module import AdaptedModule, adapted_copy, put_in_place, share_tied_adapters
from lowmem.nn.adapter import Adapter
from lowmem.nn.forms import freeze
from lowmem.nn.module_copy import LAYERS, become, leading_dims, restored_copy, stored_copy
from lowmem.nn.sharded import sharded_types
from lowmem.nn.stored_module import StoredModule, dense_bytes
from lowmem.nn.techniques import CHOICES, Blockwise, Budget, EightBit, FourBit, Half, LoRA
from lowmem.quant.quantize import relative_error
from lowmem.quant.tensor import QuantizedTensor
from lowmem.resident import returns_free_pages
from lowmem.transforms.bits import Empty, check_at_most, refuse_more_bits, text_of
from lowmem.transforms.budget import Chosen, Importance, choose, losses_of, together, unit_of
from lowmem.transforms.calibration.sensitivity import importance_of
from lowmem.transforms.libraries import tell_integrations
from lowmem.transforms.placement import (
    kept_in_float32,
    place_name,
    takes_adapter,
    techniques_by_layer,
    unnamed_places,
    warning_of_ties,
    warning_of_unnamed,
)
from lowmem.transforms.refusals import refuse_layers, refuse_model, refuse_prepared
from lowmem.transforms.registry import (
    Step,
    Technique,
    layer_name,
    made_by,
    module_paths,
    no_match_message,
    parameter_owners,
    parameters_to_adapt,
    parameters_to_store,
    refuse_peft,
    select_modules,
    skip_reason,
    supported_types,
)

__all__ = [
    "Store",
    "commit",
    "convert",
    "divided",
    "drop_partial_ties",
    "floating_dtype",
    "freeze_all_but_adapters",
    "keep_shared_biases",
    "layers_to_convert",
    "left_dense",
    "one_at_a_time",
    "rebuild",
    "rebuild_all",
    "replace_modules",
    "restore",
    "store_parameters",
    "weight_key",
]


_P = ParamSpec("_P")
_R = TypeVar("_R")
_TOLD_SHARE = 0.1  # of the bytes; convert warns if weights of more stay dense
_FEW = 2**16  # bytes: where no more stay dense, convert warns if matrices alone are more than that share
_LOCK = threading.RLock()  # held while modules are replaced, and while all of them are read


def _renew_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):  # in the child, a thread that held the lock does not exist
    os.register_at_fork(after_in_child=_renew_lock)


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate functions that replace or list a model's modules: one thread at a time runs any of them."""

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _LOCK:
            return function(*args, **kwargs)

    return alone


@returns_free_pages
def convert(
    model: nn.Module,
    *techniques: Technique,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
    parameters: Callable[[str, Tensor], bool] | None = None,
    at_most: float | None = None,
) -> nn.Module:
    """Apply techniques, left to right, to every module that the first one supports.

    ``Half`` and ``FourBit`` store the weights of linear and convolutional layers, embeddings, attention,
    recurrent layers and experts (``lowmem.transforms.registry.ENTRIES``). A module stays the same object, an
    instance of its own class, with its hooks; its ``weight`` is a read-only tensor, whose values are dequantized
    where something else than a product reads them. Norms stay dense, and biases but for those of nn.Linear,
    nn.Conv1d and nn.Conv2d in ``Half``. Modules that share a weight (tied embeddings) share the stored one, or
    are skipped together. Embeddings and output layers are kept in 8 bits by ``FourBit(embeddings="8bit")``.

    ``LoRA`` takes linear layers, transformers' Conv1D, experts (a pair of matrices for each) and the projections of
    nn.MultiheadAttention. These stay the same objects, too, get a child ``adapters``, and their parameters become an
    ``AdaptedWeight``; linear layers become a ``LoRALinear``. It leaves out embeddings and convolutions, the output
    layer of a language model (what ``get_output_embeddings()`` returns), layers that share its weight, linear layers
    whose weight is tied to an embedding (their adapters would be as large as the vocabulary), and linear layers that
    choose experts, unless ``where`` is given: then it takes all that ``where`` selects. ``skip`` leaves layers out
    and keeps this choice. After it only adapters train. ``summary`` lists how each module was treated, and why. A
    call of the model by another thread meanwhile may fail.

    Args:
        model: any module; the root itself can be the layer.
        techniques: ``Half``, ``EightBit``, ``FourBit`` or ``Budget``, and ``LoRA``.
        where: called with (path, module); a module is taken only where it returns True, for all its paths.
        skip: glob patterns of paths to leave as they are.
        parameters: called with (path, parameter) for floating-point parameters of two and more dimensions that no
            entry of the registry knows; those for which it returns True are stored, too.
        at_most: bits per weight of the whole model, biases and norms included; more is an error, which says what the
            least is that a technique gives with the same ``where``, ``skip`` and ``parameters``.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: the model is not a module, or a technique is of another type.
        RuntimeError: inference mode is active, or was when a parameter was made: autograd could not use the weights.
            Or the model is prepared for training.
        ValueError: no technique, techniques that do not compose, nothing to convert, a pattern of ``skip`` or of
            ``LoRA`` or a ``parameters`` that matches nothing, a layer that has the technique already or is inside a
            PEFT layer, a weight that cannot be stored or adapted (its path is named), more than ``at_most`` bits, a
            ``Budget`` that is out of reach (what is possible is named), or a model that is wrapped for several
            processes. The model is left as it was.

    Warns:
        UserWarning: more than a tenth of the model's bytes stayed dense, and neither ``where`` nor ``skip`` left
            them out; the three largest reasons are named with their remedies. Biases, norms and floating-point
            buffers count; where all that is dense is 64 KiB or less, it warns if matrices alone are a tenth. Or a
            ``where`` that only leaves something out, as ``path != "lm_head"`` does, gave adapters to layers that
            ``LoRA`` leaves out without it, beside others: these layers are named, and their share of the adapter's
            numbers.
    """
    _check_arguments(techniques)
    where = _asked_once(where) if callable(where) else where

    def without_values(*others: Technique) -> dict[nn.Module, nn.Module]:
        store = Store()
        return rebuild_all(model, others, where, skip, parameters, lambda technique: store.by(Empty(technique)))

    if at_most is not None:
        check_at_most(at_most)
        storing = tuple(t for t in techniques if not isinstance(t, LoRA))
        if all(isinstance(getattr(t, "format", ""), str) for t in storing) and not isinstance(techniques[0], Budget):
            # else sizes depend on values
            sized = without_values(*storing) if storing else {}
            refuse_more_bits(model, sized, at_most, without_values)  # before the weights are quantized
    replacements = rebuild_all(model, techniques, where, skip, parameters, Store().by)
    if at_most is not None:
        refuse_more_bits(model, replacements, at_most, without_values)
    paths = module_paths(model)
    adapted = [layer for layer, new in replacements.items() if isinstance(new, AdaptedModule)]
    refuse_layers("convert", {layer: paths[layer][0] for layer in adapted})
    first = type(techniques[0])
    told = [] if first is LoRA else [left_dense(model, replacements, first, where, skip)]
    adapts = any(isinstance(t, LoRA) for t in techniques)
    unnamed = unnamed_places(model, adapted, where)
    told.append(warning_of_ties(model, adapted))
    commit(model, replacements)
    if adapts:
        freeze_all_but_adapters(model)
        told.append(warning_of_unnamed(model, "default", unnamed))
    for text in filter(None, told):
        warnings.warn(text, UserWarning, stacklevel=3)  # the caller of the wrapped function
    return model


def _asked_once(where: Callable[[str, nn.Module], bool]) -> Callable[[str, nn.Module], bool]:
    """Return a predicate that calls ``where`` once for each path: it may be slow, or ask a person."""
    known: dict[tuple[str, nn.Module], bool] = {}

    def asked(path: str, module: nn.Module) -> bool:
        if (path, module) not in known:
            known[path, module] = where(path, module)
        return known[path, module]

    return asked


def rebuild_all(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    where: Callable[[str, nn.Module], bool] | None,
    skip: str | Iterable[str],
    parameters: Callable[[str, Tensor], bool] | None,
    store_by: Callable[[Any], Callable[[Tensor, str], Any]],
    losses: Callable[[str, Tensor], Sequence[float] | None] | None = None,
) -> dict[nn.Module, nn.Module]:
    """Return what each module becomes that ``convert`` takes; the model does not change.

    Args:
        model: any module.
        techniques: as ``convert`` takes them.
        where, skip, parameters: as in ``convert``.
        store_by: returns, for a technique, the function that stores a weight: ``Store.by``.
        losses: returns what each choice of a ``Budget`` loses of a weight, by its name; None of one that is not
            known. None: they are measured.

    Raises:
        TypeError, ValueError: as ``convert``.
    """
    found = _found(model, techniques, where, skip, parameters)
    chosen = techniques_by_layer(model, techniques, found, where)
    first, got = techniques[0], dict[nn.Module, Chosen]()
    if isinstance(first, Budget):
        got = divided(model, first, found, losses)
        chosen = {module: (got[module].technique, *steps[1:]) for module, steps in chosen.items()}
    unused: dict[type[Technique], str | None] = {}
    replacements = {
        module: rebuild(module, chosen[module], path, unused, store_by, names)
        for module, (path, names) in found.items()
        if chosen[module]
    }
    for module, one in got.items():
        cast(StoredModule, replacements[module]).chosen_because = one.why
    for why in unused.values():
        if why is not None:
            raise ValueError(why)
    keep_shared_biases(model, replacements)
    return replacements


def divided(
    model: nn.Module,
    budget: Budget,
    found: Mapping[nn.Module, tuple[str, list[str]]],
    losses: Callable[[str, Tensor], Sequence[float] | None] | None = None,
) -> dict[nn.Module, Chosen]:
    """Return what each module gets of a budget; weights of unknown losses, which stay dense, have no part in it.

    Args:
        model: any module.
        budget: to divide.
        found: modules, with their paths and the names of the parameters to store.
        losses: as in ``rebuild_all``.

    Raises:
        TypeError, ValueError: a weight that cannot be stored, inputs that the model does not take, or a budget out
            of reach.
    """
    stored: dict[nn.Module, dict[Hashable, tuple[str, nn.Parameter, Tensor]]] = {}
    for module, (path, names) in found.items():
        own = stored[module] = {}
        for name, tensor in _as_stored(module, path, names).items():
            parameter = cast(nn.Parameter, module._parameters[name])
            own[weight_key(parameter)] = place_name(path, name), parameter, tensor
    groups = together(stored)
    weights: list[dict[Hashable, tuple[str, nn.Parameter, Tensor]]] = []
    for group in groups:
        weights.append({})
        for module in group:
            for key, one in stored[module].items():
                weights[-1].setdefault(key, one)  # a shared weight has the name of the first
    important: Mapping[str, Importance] = {}
    if budget.inputs is not None and losses is None:
        sized = {name: (one, tensor.shape[-1]) for own in weights for name, one, tensor in own.values()}
        important = importance_of(model, budget.inputs, sized)
        unseen = [layer_name(name) for name in sized if name not in important]
        if unseen:
            weights_text = f"{len(unseen)} weight{'s' * (len(unseen) > 1)} ({', '.join(unseen[:3])})"
            warnings.warn(
                f"no batch of inputs= reached {weights_text}: these get the least bits", UserWarning, stacklevel=5
            )

    def measured(name: str, tensor: Tensor) -> Sequence[float] | None:
        if losses is not None:
            return losses(name, tensor)
        if budget.inputs is not None and name not in important:
            return (0.0,) * len(CHOICES)
        try:
            return losses_of(tensor, important.get(name))
        except (TypeError, ValueError) as reason:
            raise type(reason)(f"{layer_name(name)}: {reason}") from reason

    units = [unit_of({name: tensor for name, _, tensor in own.values()}, measured) for own in weights]
    known = [unit for unit in units if unit is not None]
    chosen = dict(zip(known, choose(known, budget), strict=True))
    unknown = Chosen(budget.choices[0], "")
    of_modules = {
        module: unknown if unit is None else chosen[unit]
        for group, unit in zip(groups, units, strict=True)
        for module in group
    }
    for module, _ in kept_in_float32(model, budget.compute_dtype):
        if module in of_modules:
            got = of_modules[module]
            of_modules[module] = replace(got, technique=replace(got.technique, compute_dtype=None))
    return of_modules


def _as_stored(module: nn.Module, path: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Return parameters of a module in the shapes in which a block-wise technique stores them.

    Raises:
        TypeError, ValueError: as ``store_parameters``.
    """
    found: dict[str, Tensor] = {}

    def note(tensor: Tensor, name: str) -> Any:
        found[name] = tensor
        return CHOICES[0].skeleton(tensor, name)

    store_parameters(module, CHOICES[0], path, names, note)
    return found


def keep_shared_biases(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Make biases in ``replacements`` dense again that the model has elsewhere, too, where they stay dense."""
    stored: dict[int, list[tuple[nn.Module, Any]]] = {}  # a bias -> the modules that store it, and what they become
    for module, made in replacements.items():
        if isinstance(module, StoredModule):  # with an adapter now: its bias is as it was
            continue
        if isinstance(made, StoredModule) and "bias" in made.forms:
            stored.setdefault(id(module._parameters["bias"]), []).append((module, made))
    if not stored:
        return
    held = Counter(id(one) for module in model.modules() for one in module._parameters.values() if one is not None)
    for key, biases in stored.items():
        if held[key] > len(biases):
            for module, new in biases:
                error = new.weight_error
                become(new, restored_copy(new, {"bias": module._parameters["bias"]}))
                new.weight_error = error


def layers_to_convert(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    where: Callable[[str, nn.Module], bool] | None,
    skip: str | Iterable[str],
) -> dict[nn.Module, str]:
    """Return the modules that the first technique converts, each with its first path.

    Raises:
        TypeError: the model is not a module, or a pattern is not a string.
        RuntimeError: inference mode is active.
        ValueError: nothing to convert, a pattern that matches nothing, a layer that has one of the techniques
            already, or is inside a PEFT layer.
    """
    return {module: path for module, (path, _) in _found(model, techniques, where, skip, None).items()}


def _found(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    where: Callable[[str, nn.Module], bool] | None,
    skip: str | Iterable[str],
    parameters: Callable[[str, Tensor], bool] | None,
) -> dict[nn.Module, tuple[str, list[str]]]:
    """Return the modules that the first technique converts, each with its first path and what is stored of it."""
    first = type(techniques[0])
    refuse_model("convert", model)
    for path, module in model.named_modules():
        refuse_prepared("convert", module, path)
    if parameters is not None and not callable(parameters):
        raise TypeError(f"parameters={show(parameters)} must be callable with a path and what is there, or None")
    if first is LoRA and parameters is not None:
        raise ValueError(
            "parameters= names what FourBit, EightBit or Half store besides; LoRA alone stores nothing: leave it out"
        )
    found: dict[nn.Module, tuple[str, list[str]]] = {}
    selected = select_modules(model, where, skip)
    for module, path in selected.items():
        made = made_by(module)
        if made is not None and made in {type(t) for t in techniques}:
            remedy = "add another with add_adapter" if made is LoRA else "convert a model once"
            raise ValueError(
                f"{layer_name(path)} is a {type(module).__name__}: it has {made.__name__} already; "
                f"{remedy}, or leave the layer out with skip="
            )
        names = parameters_to_store(module) if skip_reason(first, module, where is not None) is None else []
        if parameters is not None and made is None:
            names += [name for name in _more_parameters(module, path, parameters) if name not in names]
        if names:
            found[module] = path, names
    if first is LoRA:  # LoRA keeps the weight, and with it all ties
        found = {m: (path, []) for m, path in selected.items() if takes_adapter(m, where is not None)}
        refuse_layers("convert", {module: path for module, (path, _) in found.items()}, empty=True)
    else:
        if parameters is not None and not any(set(n) - set(parameters_to_store(m)) for m, (_, n) in found.items()):
            raise ValueError(
                "parameters= chose no further parameter of two or more dimensions: check what it returns"
            )
        _drop_partial_ties(model, found)
        _check_parameters(model, found)
    refuse_peft(model, found, freezes=any(isinstance(t, LoRA) for t in techniques))
    if not found:
        raise ValueError(no_match_message(first, model, select_modules(model, where, skip), where is not None))
    return found


def _more_parameters(module: nn.Module, path: str, parameters: Callable[[str, Tensor], bool]) -> list[str]:
    return [
        name
        for name, one in module._parameters.items()
        if one is not None
        and not isinstance(module, torch.jit.ScriptModule)
        and not is_lazy(one)
        and one.is_floating_point()
        and one.dim() >= 2
        and one.numel()
        and parameters(f"{path}.{name}".lstrip("."), one)
    ]


def drop_partial_ties(model: nn.Module, candidates: dict[nn.Module, str]) -> None:
    """Drop candidates that share a weight with a module that is no candidate, until none does."""
    found = {module: (path, parameters_to_store(module)) for module, path in candidates.items()}
    _drop_partial_ties(model, found)
    for module in [module for module in candidates if module not in found]:
        del candidates[module]


def _drop_partial_ties(model: nn.Module, found: dict[nn.Module, tuple[str, list[str]]]) -> None:
    owners = parameter_owners(model)  # lacks modules that another thread has just replaced, which commit rejects

    def stays_dense(module: nn.Module, parameter: Any) -> bool:
        stored = [module._parameters[name] for name in found[module][1]] if module in found else []
        return not any(parameter is one for one in stored)

    while True:
        partial = [
            module
            for module, (_, names) in found.items()
            if any(
                stays_dense(owner, module._parameters[name])
                for name in names
                for owner, _ in owners.get(id(module._parameters[name]), ())
            )
        ]
        if not partial:
            return
        for module in partial:
            del found[module]


def _check_parameters(model: nn.Module, found: dict[nn.Module, tuple[str, list[str]]]) -> None:
    """Raise for parameters that cannot be stored on their own: shards, and views of others, stored or not."""
    seen: dict[int, list[tuple[str, Hashable, range]]] = {}
    known: set[int] = set()
    for module, (path, names) in found.items():
        for name in names:
            parameter: Any = module._parameters[name]
            place = layer_name(path) if name == "weight" else layer_name(f"{path}.{name}".lstrip("."))
            if is_lazy(parameter):
                raise ValueError(
                    f"{place} is lazy and has no shape yet: call the model once before convert, or use skip="
                )
            if isinstance(parameter, sharded_types()):
                raise ValueError(f"{place} is sharded (a DTensor): convert the model before fully_shard")
            if parameter.layout is not torch.strided:
                raise ValueError(f"{place} has layout={parameter.layout}: make it dense (to_dense()), or use skip=")
            known.add(id(parameter))
            _refuse_overlap(seen, place, weight_key(parameter), parameter)
    for path, parameter in model.named_parameters():  # what stays dense
        plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided
        shares = plain and id(parameter) not in known and parameter.untyped_storage()._cdata in seen
        if shares:  # a view would be cut off, and keep the memory
            _refuse_overlap(seen, layer_name(path.removesuffix(".weight")), None, parameter)


def _refuse_overlap(
    seen: dict[int, list[tuple[str, Hashable, range]]], place: str, key: Hashable, parameter: Tensor
) -> None:
    """Add the bytes of a parameter to those ``seen`` of each storage; raise if another one, not of its key, has some.

    Raises:
        ValueError: both are named.
    """
    last = sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
    at = parameter.storage_offset() * parameter.element_size()
    own = range(at, at + (last + 1) * parameter.element_size() if parameter.numel() else at)
    others = seen.setdefault(parameter.untyped_storage()._cdata, [])
    for other, same, range_ in others:
        if (key is None or same != key) and own.start < range_.stop and range_.start < own.stop:
            raise ValueError(
                f"{place} and {other} are views of one tensor: give each a tensor of its own (.clone()), or "
                f"leave {'one' if key is not None else other} out with skip="
            )
    others.append((place, key, own))


def left_dense(
    model: nn.Module,
    replacements: Mapping[nn.Module, nn.Module],
    technique: type[Technique],
    where: Callable[[str, nn.Module], bool] | None,
    skip: str | Iterable[str],
) -> str | None:
    """Return what to warn of: more than a tenth of the bytes stay dense, and nobody asked for that.

    Counted are the bytes of the dense model, of parameters and floating-point buffers, also of what was stored
    before; those of modules that ``where`` and ``skip`` leave out do not stay dense unasked. A few bytes are told of
    where matrices are a tenth.
    """
    seen: set[int] = set()
    total, matrices, left = 0, 0, Counter[str]()
    chosen = select_modules(model, where, skip)
    for module in module_paths(model):
        after = replacements.get(module, module)
        stored = {*after.forms, *after.part_names} if isinstance(after, StoredModule) else set()
        sizes = dense_bytes(module) if isinstance(module, StoredModule) else {}
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or is_lazy(tensor) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if name in module._buffers and not tensor.is_floating_point():  # masks, and numbers of steps
                continue
            size = sizes.get(name, tensor.numel() * tensor.element_size())
            total += size
            if name in stored or module not in chosen:
                continue
            matrices += size if tensor.dim() > 1 and name in module._parameters else 0
            left[f"{type(module).__name__}.{name}: {_why_dense(module, name, tensor, technique)}"] += size
    dense = left.total()
    if (dense if dense > _FEW else matrices) <= _TOLD_SHARE * total:
        return None
    told = "; ".join(f"{size / total:.0%} {reason}" for reason, size in left.most_common(3))
    return (
        f"{dense / total:.0%} of the bytes of {type(model).__name__} are weights that stay dense: {told}. skip= says "
        "which are meant to; lowmem.summary(model) lists all"
    )


def _why_dense(module: nn.Module, name: str, tensor: Tensor, technique: type[Technique]) -> str:
    """Return why a parameter or buffer stays dense, and what to do about it."""
    if name in module._buffers:
        return "a buffer: only parameters are stored, but model.to(torch.bfloat16) casts it"
    if tensor.dim() < 2:
        return "a vector: only matrices have rows to store, but model.to(torch.bfloat16) casts it"
    if isinstance(module, StoredModule):
        return "its module stores others already: call lowmem.restore first, and convert with parameters="
    reason = skip_reason(technique, module)
    if reason is None and name in parameters_to_store(module):
        return "it shares a weight with a module that stays dense: store both (parameters=), or untie them"
    return reason or "no entry of the registry names it: parameters= does"


def weight_key(weight: Tensor) -> Hashable:
    """Return a key that is equal for tensors that view the same memory with the same shape and strides."""
    return weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape, weight.stride()


class Store:
    """Stores each weight once per technique, so that layers with a shared weight share the stored one."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Tensor, Any]] = {}

    def by(self, technique: Any) -> Callable[[Tensor, str], Any]:
        """Return ``technique.store`` with a cache."""
        how = replace(technique, compute_dtype=None) if isinstance(technique, FourBit | EightBit) else technique

        def store(tensor: Tensor, name: str) -> Any:
            key = how, weight_key(tensor)
            if key not in self._known:
                self._known[key] = tensor, technique.store(tensor, name)  # keeps tensor alive: key has its address
            return self._known[key][1]

        return store


def _check_arguments(techniques: tuple[Technique, ...]) -> None:
    if not techniques:
        raise ValueError("no technique was given: pass Half(), EightBit(), FourBit(), Budget() or LoRA()")
    for technique in techniques:
        if type(technique) not in (Half, EightBit, FourBit, Budget, LoRA):
            raise TypeError(f"technique={technique!r} must be an instance of Half, EightBit, FourBit, Budget or LoRA")
    for kind, count in Counter(type(t) for t in techniques).items():
        if count > 1:
            raise ValueError(f"{kind.__name__} was given {count} times: a layer takes a technique once")
    kinds = [type(technique) for technique in techniques]
    if Budget in kinds and kinds not in ([Budget], [Budget, LoRA]):
        raise ValueError(f"Budget stores the weights: name it alone, or before LoRA, not {text_of(techniques)}")


def rebuild(
    module: nn.Module,
    techniques: tuple[Step, ...],
    path: str,
    unused: dict[type[Technique], str | None],
    store_by: Callable[[Any], Callable[[Tensor, str], Any]],
    names: Iterable[str] | None = None,
) -> nn.Module:
    """Return what a module becomes by all techniques that support it; ``commit`` puts it in the module's place.

    Args:
        module: dense, or with stored parameters if the techniques are adapters.
        techniques: applied left to right.
        path: of the module, for errors.
        unused: for each kind of technique, why it has converted no module so far; None once it has. It is updated.
        store_by: returns, for a technique, the function that stores the weight: ``Store.by``.
        names: the parameters to store; None: ``parameters_to_store(module)``.

    Raises:
        TypeError, ValueError: a weight that cannot be stored.
    """
    layer: Any = module
    for technique in techniques:
        adapts = isinstance(technique, dict)
        kind: Any = LoRA if adapts else type(technique)
        if (kind is LoRA and not adapts) or (not adapts and layer is not module):
            why = skip_reason(LoRA, layer) if kind is LoRA else None
            unused.setdefault(
                kind,
                f"{layer_name(path)}: {kind.__name__} cannot follow the techniques before it, which made "
                f"a {type(layer).__name__}; it takes {supported_types(kind)}{f'. {why}' if why else ''}",
            )
            continue
        unused[kind] = None
        if isinstance(technique, dict):
            layer = add_first_adapter(layer, technique, path, {} if layer is module else module._parameters)
        elif not isinstance(technique, LoRA):
            assert not isinstance(technique, Budget)  # each layer has got its own
            stored = parameters_to_store(module) if names is None else names
            layer = store_parameters(module, technique, path, stored, store_by(technique))
    built: nn.Module = layer.train(module.training)
    return built


def add_first_adapter(
    layer: Any, techniques: Mapping[str, LoRA], path: str, dense: Mapping[str, Any], name: str = "default"
) -> nn.Module:
    """Return a copy of a layer with an adapter.

    Args:
        layer: without adapters.
        techniques: of the adapter, by the parameters that it changes.
        path: of the layer, for errors.
        dense: the parameters that 4-bit ones were quantized from, for ``init="loftq"``.
        name: of the adapter.

    Raises:
        ValueError: ``init="loftq"`` without a 4-bit base or its dense weight, or a layer that has ``adapters``.
    """
    try:
        parts = {one: Adapter(layer, own, dense.get(one), one) for one, own in techniques.items()}
        return adapted_copy(layer, parameters_to_adapt(layer), name, parts)
    except ValueError as reason:
        raise ValueError(f"{layer_name(path)}: {reason}") from reason


def store_parameters(
    module: nn.Module,
    technique: Half | EightBit | FourBit,
    path: str,
    names: Iterable[str],
    store: Callable[[Tensor, str], Any],
    transposed: Container[str] = (),
) -> StoredModule:
    """Return a copy of a dense module in which parameters are stored by ``store``; the module does not change.

    Those in ``transposed`` are given to ``store`` with their last two dimensions swapped, and stored so.

    Raises:
        TypeError, ValueError: a weight that cannot be stored; its path is named.
    """
    place = [path]
    errors: list[tuple[float, float]] = []  # the squared error of each weight, and its squared size

    def named_store(tensor: Tensor, name: str) -> Any:
        place[:] = [path if name in ("weight", "bias") else f"{path}.{name}".lstrip(".")]
        stored = store(tensor, name)
        if name != "bias" and not tensor.is_meta and not _without_values(stored):
            size = float(tensor.detach().double().pow(2).sum()) if len(wanted) > 1 else 1.0
            errors.append((relative_error(tensor, stored) ** 2 * size, size))
        return stored

    wanted = list(names)
    known: Any = LAYERS.get((type(module), technique.bits))
    try:
        if known is not None and transposed:
            raise ValueError(f"a {type(module).__name__} cannot hold a weight that is stored transposed")
        if known is not None and wanted == ["weight"]:
            made = known.from_layer(module, technique, named_store)
        else:
            weights = {}
            for name in wanted:
                parameter = module._parameters[name]
                assert parameter is not None
                lead = leading_dims(module, parameter)
                if name in transposed:
                    if parameter.dim() != lead + 1 or parameter.dim() < 2:
                        raise ValueError(f"{name} of shape {tuple(parameter.shape)} cannot be stored transposed")
                    weights[name] = named_store(parameter.mT, name)
                    continue
                inside = isinstance(technique, Blockwise) and parameter.dim() > lead + 1
                weights[name] = named_store(parameter.flatten(lead) if inside else parameter, name)
            dtype = technique.compute_dtype if isinstance(technique, Blockwise) else None
            made = stored_copy(module, weights, transposed=transposed, computed_in=dtype)
    except (TypeError, ValueError) as reason:
        raise type(reason)(f"{layer_name(place[0])}: {reason}") from reason
    if errors:
        total = sum(size for _, size in errors)
        made.weight_error = (sum(error for error, _ in errors) / total) ** 0.5 if total else 0.0
    return made  # type: ignore[no-any-return]


def _without_values(stored: Tensor | QuantizedTensor) -> bool:
    return (stored.packed if isinstance(stored, QuantizedTensor) else stored).is_meta


@one_at_a_time
def commit(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Turn modules, in place, into what ``rebuild`` has made of them.

    Raises:
        RuntimeError: another thread has removed or converted one of the modules. The model is left as it is.
    """
    made = {old: new for old, new in replacements.items() if new is not old}
    there = module_paths(model)
    for old, new in made.items():
        if old not in there:
            raise RuntimeError(
                f"a {type(old).__name__} to convert left {type(model).__name__} meanwhile: change a model from one "
                "thread, or one after the other"
            )
        if type(old) not in _classes_before(new):
            raise RuntimeError(f"another thread has converted a {type(old).__name__} of {type(model).__name__}")
    share_tied_adapters(made.values())
    replace_modules(model, made)
    tell_integrations(model)


def _classes_before(made: nn.Module) -> list[type[nn.Module]]:
    """Return the classes of which a module can become what was made."""
    plain: Any = made._plain_class if isinstance(made, AdaptedModule) else type(made)
    before = [plain.dense_class] if issubclass(plain, StoredModule) else []
    return [*before, plain] if isinstance(made, AdaptedModule) else before


@returns_free_pages
@one_at_a_time
def floating_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a floating-point dtype that is given as itself or by its name.

    Raises:
        TypeError: it is another value.
    """
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise TypeError(f"dtype={dtype!r} must be a floating-point dtype of torch or its name, as 'bfloat16' is")
    return named


def restore(
    model: nn.Module,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Make stored parameters dense again: modules get their own class back, and values as ``dequantize`` gives them.

    Dense parameters do not require gradients; shared ones stay shared. Adapters are kept: their bases become dense.
    A call of the model by another thread meanwhile may fail.

    Args:
        model: any module; the root itself can be the layer.
        where: called with (path, module); a module is taken only where it returns True, for all its paths.
        skip: glob patterns of paths to leave as they are.
        dtype: of what is restored, and of all other floating-point parameters and saved buffers of the modules that
            ``where`` and ``skip`` select, such as norms; not of adapters. A name, as "bfloat16", is taken, too. None:
            restored weights have the dtype as which they present themselves, which casts of the model follow, and the
            rest stays as it is.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: the model is not a module, or ``dtype`` is not floating point.
        RuntimeError: inference mode is active, or was when a parameter was made. Or the model is prepared for
            training.
        ValueError: nothing is stored in the modules that are selected, a module that is left shares what they store
            (or, with ``dtype``, any parameter), ``dtype`` cannot hold a value, ``skip`` matches nothing, a module is
            sharded or has no values, or the model is wrapped for several processes. The model is left as it was.
    """
    dtype = None if dtype is None else floating_dtype(dtype)
    refuse_model("restore", model)
    for path, one in model.named_modules():
        refuse_prepared("restore", one, path)
    found: dict[StoredModule, str] = {}
    selected = select_modules(model, where, skip)
    for module, path in selected.items():
        if isinstance(module, StoredModule):
            found[module] = path
    if not found:
        raise ValueError(f"no module of {type(model).__name__} that where= and skip= leave has stored parameters")
    refuse_layers("restore", found)
    _refuse_partial_ties(model, found)
    cast_to = {} if dtype is None else _cast_dense(model, selected, dtype)
    dense: dict[int, nn.Parameter] = {}
    copies: dict[nn.Module, nn.Module] = {}
    for module in found:
        values: dict[str, Tensor | None] = {}
        for name in module.forms:
            tensor = module.stored_tensor(name)
            if id(tensor) not in dense:
                dense[id(tensor)] = freeze(tensor.dequantize(dtype).contiguous().clone())
            values[name] = dense[id(tensor)]
        copies[module] = restored_copy(module, values)
    for old, copied in copies.items():
        become(old, copied)
    for module, tensors in cast_to.items():
        for name, tensor in tensors.items():
            (module._parameters if name in module._parameters else module._buffers)[name] = tensor
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    tell_integrations(model)
    return model


def _refuse_partial_ties(model: nn.Module, found: Mapping[StoredModule, str]) -> None:
    """Refuse to make dense what a module that is left shares, which would untie them.

    Raises:
        ValueError: there is such a module; both are named.
    """
    parts = {id(getattr(module, part)): path for module, path in found.items() for part in module.part_names}
    for layer, paths in module_paths(model).items():
        if layer in found:
            continue
        path = next((parts[id(one)] for one in layer._parameters.values() if id(one) in parts), None)
        if path is not None:
            raise ValueError(
                f"{layer_name(path)}: what it stores is shared with {layer_name(paths[0])}, which where= and skip= "
                "leave: restore both, or neither"
            )


def _cast_dense(
    model: nn.Module, selected: Mapping[nn.Module, str], dtype: torch.dtype
) -> dict[nn.Module, dict[str, Any]]:
    """Return the dense parameters and saved buffers of modules in another dtype; shared ones stay shared.

    Raises:
        ValueError: a module that keeps its dtype shares one, or the dtype cannot hold it; both are named.
    """
    taken = dict(selected)
    for module, path in list(taken.items()):
        if isinstance(module, nn.MultiheadAttention):  # which reads these parameters itself
            taken.setdefault(module.out_proj, f"{path}.out_proj".lstrip("."))
    others: dict[int, str] = {}
    for layer, paths in module_paths(model).items():
        if layer not in taken:
            others.update((id(one), paths[0]) for one in _own_tensors(layer).values())
    made: dict[int, Tensor] = {}
    cast_to: dict[nn.Module, dict[str, Any]] = {}
    for module, path in taken.items():
        for name, one in _own_tensors(module).items():
            if not one.is_floating_point() or one.dtype == dtype:
                continue
            if id(one) in others:
                raise ValueError(
                    f"{layer_name(path)}: its {name} is shared with {layer_name(others[id(one)])}, which stays "
                    f"{one.dtype}: call restore(model) without dtype=, then model.to({dtype})"
                )
            if id(one) not in made:
                rounded = one.detach().to(dtype)
                beyond = torch.empty(0) if one.is_meta else one.detach()[rounded.isinf() & ~one.isinf()]
                if beyond.numel():
                    raise ValueError(
                        f"{layer_name(path)}: {name} holds the magnitude {float(beyond.abs().max()):.6g}, above "
                        f"{torch.finfo(dtype).max:.6g}, the most that {dtype} can hold; take dtype=torch.bfloat16"
                    )
                is_parameter = isinstance(one, nn.Parameter)
                made[id(one)] = nn.Parameter(rounded, requires_grad=one.requires_grad) if is_parameter else rounded
            cast_to.setdefault(module, {})[name] = made[id(one)]
    return cast_to


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own dense parameters and saved buffers, by name."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}  # compiled for the dtypes that it has
    parts = module.part_names if isinstance(module, StoredModule) else ()
    own = {**module._parameters, **module._buffers}
    left_out = {*parts, *module._non_persistent_buffers_set}
    return {name: one for name, one in own.items() if not (one is None or name in left_out or is_lazy(one))}


@one_at_a_time
def replace_modules(model: nn.Module, copies: Mapping[Any, nn.Module]) -> None:
    """Turn modules of a model, in place, into copies of them with or without adapters or stored parameters."""
    for module, copied in copies.items():
        put_in_place(module, copied)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor:
            encoder.use_nested_tensor = not any(isinstance(one, AdaptedModule) for one in encoder.modules())


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Freeze every parameter that does not belong to an adapter; adapters keep their ``requires_grad``."""
    adapters = {p for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad = False  # lazy ones, too, on which no method can be called
