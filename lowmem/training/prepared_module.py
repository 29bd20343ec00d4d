"""Modules that ``prepare_training`` has given a class of their own: a generated subclass of the one before."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import nn

__all__ = ["PreparedModule", "check_prepared", "release_module"]


class PreparedModule(nn.Module):
    """Base of the generated classes, each of which has a ``plain_class`` of its own.

    Attributes:
        plain_class: the module's class before.
        prepared_attributes: names of those that the module has got with its class.
        training_note: what was done to the module, for reports.
    """

    plain_class: type[nn.Module]
    prepared_attributes: ClassVar[tuple[str, ...]] = ()
    training_note: Any
    prepared_for_training = True


def check_prepared(module: nn.Module) -> None:
    """Raise unless ``release_module`` can give a module its class back.

    Raises:
        RuntimeError: the class of a prepared module was changed since, as a parametrization or FSDP does.
    """
    if isinstance(module, PreparedModule) and "plain_class" not in vars(type(module)):
        raise RuntimeError(
            f"{type(module).__name__} was made of the prepared module since, as a parametrization does: undo that "
            "first"
        )


def release_module(module: nn.Module) -> None:
    """Give a module the class that it had before it was prepared; one that is not prepared stays as it is.

    Raises:
        RuntimeError: as ``check_prepared``.
    """
    check_prepared(module)
    while isinstance(module, PreparedModule):
        for name in module.prepared_attributes:
            module.__dict__.pop(name, None)
        module.__class__ = cast(Any, module.plain_class)
