"""Parameters that several modules share, or that lie in one storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from lowmem.nn.module_class import replace_class_and_parameters
from lowmem.nn.module_copy import dense_shallow_copy
from lowmem.nn.stored_module import StoredModule


def weight_memory_key(weight: Tensor) -> Hashable:
    """Return a key that is equal for tensors that view the same memory with the same shape and strides."""
    return weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape, weight.stride()


def owners_and_paths_by_parameter_id(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return, by the id of each parameter, the modules that have it, each with its first path."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, path))
    return owners


def drop_partial_ties(model: nn.Module, selection: dict[nn.Module, tuple[str, list[str]]]) -> None:
    """Drop modules whose stored parameters are dense elsewhere in the model; repeat until stable.

    ``selection`` has modules, with their paths and the names of the parameters to store.
    """
    owners = owners_and_paths_by_parameter_id(
        model
    )  # lacks modules that another thread has just replaced, which commit rejects
    while True:
        stored = {
            (candidate, id(candidate._parameters[name]))
            for candidate, (_, names) in selection.items()
            for name in names
        }
        partial = {
            candidate
            for candidate, key in stored
            if any((owner, key) not in stored for owner, _ in owners.get(key, ()))
        }
        if not partial:
            return
        for module in partial:
            del selection[module]


def check_and_record_byte_range(
    ranges_by_storage: dict[int, list[tuple[str, Hashable, range]]],
    parameter_path: str,
    memory_key: Hashable,
    parameter: Tensor,
) -> None:
    """Add the bytes of a parameter to those ``ranges_by_storage`` of each storage.

    Raises:
        ValueError: another parameter, not of its ``memory_key``, has some of these bytes; both are named.
    """
    last = sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
    at = parameter.storage_offset() * parameter.element_size()
    byte_range = range(at, at + (last + 1) * parameter.element_size() if parameter.numel() else at)
    recorded_ranges = ranges_by_storage.setdefault(parameter.untyped_storage()._cdata, [])
    for other, same, range_ in recorded_ranges:
        if (
            (memory_key is None or same != memory_key)
            and byte_range.start < range_.stop
            and range_.start < byte_range.stop
        ):
            raise ValueError(
                f"{parameter_path} and {other} are views of one tensor: give each a tensor of its own (.clone()), or "
                f"leave {'one' if memory_key is not None else other} out with skip="
            )
    recorded_ranges.append((parameter_path, memory_key, byte_range))


def restore_shared_biases_to_dense(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Make biases in ``replacements`` dense again that the model has elsewhere, too, where they stay dense."""
    # A bias -> the modules that store it, and what they become
    stored: dict[int, list[tuple[nn.Module, Any]]] = {}
    for module, made in replacements.items():
        # With an adapter now: its bias is as it was
        if isinstance(module, StoredModule):
            continue
        if isinstance(made, StoredModule) and "bias" in made.forms:
            stored.setdefault(id(module._parameters["bias"]), []).append((module, made))
    if not stored:
        return
    held = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for key, biases in stored.items():
        if held[key] > len(biases):
            for module, new in biases:
                error = new.weight_error
                replace_class_and_parameters(new, dense_shallow_copy(new, {"bias": module._parameters["bias"]}))
                new.weight_error = error
