"""Parameters that several modules share, or that lie in one storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from lowmem.nn.module_class import become
from lowmem.nn.module_copy import restored_copy
from lowmem.nn.stored_module import StoredModule


def weight_key(weight: Tensor) -> Hashable:
    """Return a key that is equal for tensors that view the same memory with the same shape and strides."""
    return weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape, weight.stride()


def parameter_owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return, by the id of each parameter, the modules that have it, each with its first path."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, path))
    return found


def drop_partial_ties(model: nn.Module, found: dict[nn.Module, tuple[str, list[str]]]) -> None:
    """Drop modules whose stored parameters are dense elsewhere in the model; repeat until stable.

    ``found`` has modules, with their paths and the names of the parameters to store.
    """
    owners = parameter_owners(model)  # lacks modules that another thread has just replaced, which commit rejects
    while True:
        stored = {(one, id(one._parameters[name])) for one, (_, names) in found.items() for name in names}
        partial = {one for one, key in stored if any((owner, key) not in stored for owner, _ in owners.get(key, ()))}
        if not partial:
            return
        for module in partial:
            del found[module]


def refuse_overlap(
    seen: dict[int, list[tuple[str, Hashable, range]]], place: str, key: Hashable, parameter: Tensor
) -> None:
    """Add the bytes of a parameter to those ``seen`` of each storage.

    Raises:
        ValueError: another parameter, not of its ``key``, has some of these bytes; both are named.
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
