"""Modules whose class ``prepare_training`` or ``prepare_inference`` has replaced by a generated subclass."""

from __future__ import annotations

from typing import Any, ClassVar, TypeGuard

import torch
from torch import nn

from lowmem.nn.module_class import change_class_and_attributes, derived_class, hookless_shallow_copy
from lowmem.transforms.model_summary import display_name_with_index_ranges, path_parts_with_none_for_indices


class PreparedModule(nn.Module):
    """Base of the generated classes.

    Attributes:
        plain_class: the module's class before; each generated class sets its own.
        prepared_attributes: names of the instance attributes that belong to the generated class.
        report_note: what was done to the module, for ``training_report``.
        released_by: the function that restores the class.
    """

    plain_class: type[nn.Module]
    prepared_attributes: ClassVar[tuple[str, ...]] = ()
    report_note: Any
    released_by: ClassVar[str] = "release_training"

    def non_cpu_device_or_none(self, model: nn.Module) -> torch.device | None:
        """Return the device of this module of the model if plain torch serves it there; None on the CPU."""
        parameter = next(self.parameters(), None)
        if parameter is None:
            parameter = next(model.parameters(), None)
        return None if parameter is None or parameter.is_cpu else parameter.device


class PreparedModuleReport(dict[str, str]):
    """What was done to each module, by path; printed with one line for all paths that differ by indices alone."""

    def __str__(self) -> str:
        groups: dict[object, list[str]] = {}
        for path, text in self.items():
            groups.setdefault((path_parts_with_none_for_indices(path), text), []).append(path)
        lines = [f"{display_name_with_index_ranges(paths)}: {self[paths[0]]}" for paths in groups.values()]
        return "\n".join(lines) or "no module is prepared"


def prepend_prepared_class(module: nn.Module, base: type[PreparedModule], **attributes: Any) -> None:
    """Put ``base`` before a module's class, in place; ``attributes`` are its ``prepared_attributes``."""
    prepared = derived_class(type(module), base, plain_class=type(module))
    change_class_and_attributes(module, prepared, {**vars(module), **attributes})


def check_prepared_class_unchanged(module: nn.Module) -> None:
    """Raise a RuntimeError if the class of a prepared module was changed since, as by a parametrization or FSDP."""
    if isinstance(module, PreparedModule) and "plain_class" not in vars(type(module)):
        raise RuntimeError(
            f"{type(module).__name__} was made of the prepared module since, as a parametrization does: undo that "
            "first"
        )


def is_prepared(module: nn.Module, released_by: str) -> TypeGuard[PreparedModule]:
    """Whether a module is prepared, by the counterpart of the function of that name."""
    return isinstance(module, PreparedModule) and module.released_by == released_by


def release_prepared_modules(model: nn.Module, released_by: str) -> None:
    """Release the modules of a model that the function of that name releases: all of them, or none with an error."""
    prepared = [module for module in model.modules() if is_prepared(module, released_by)]
    for module in prepared:
        check_prepared_class_unchanged(module)
    for module in prepared:
        while isinstance(module, PreparedModule):
            left = {name: value for name, value in vars(module).items() if name not in module.prepared_attributes}
            change_class_and_attributes(module, module.plain_class, left)


def unprepared_shallow_copy(module: PreparedModule) -> nn.Module:
    """Return a copy of a module as it was before it was prepared, with its hooks; it shares everything else."""
    plain = hookless_shallow_copy(module, module.plain_class)
    plain.__dict__.update(vars(module))
    for name in module.prepared_attributes:
        plain.__dict__.pop(name)
    return plain


def trainable_parameters_or_raise(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient; none is a ValueError."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"{type(model).__name__} has no parameter that trains: convert(model, LoRA()) adds adapters, and "
            "requires_grad_(True) lets parameters train"
        )
    return trained
