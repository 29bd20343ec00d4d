"""The class of a module: subclasses of modules' classes, made at run time, and modules that change their class."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

# Attributes with the hooks of a module, which stay when its parameters are stored or made dense again.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def _make_subclass_named_like(
    module_class: Any, base: Any = None, later_base: Any = None, /, **attributes: Any
) -> Any:
    """Return a subclass of a module's class with these attributes and under its name, which is made once.

    Methods of ``base`` come before those of the module's class, and those of ``later_base`` after them.
    """
    names = {name: getattr(module_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    bases = tuple(kind for kind in (base, module_class, later_base) if kind is not None)
    return type(module_class.__name__, bases, names | attributes)


derived_class: Callable[..., Any] = cache(_make_subclass_named_like)


def change_class_and_attributes(
    module: Any, replacement_class: Any, attributes: dict[str, Any] | None = None
) -> None:
    """Make a module, in place, an instance of another class with these attributes; None keeps the module's own.

    An error leaves the module as it was.
    """
    # Stays the same dictionary, which others may hold
    current = module.__dict__
    final = dict(current)
    attributes = dict(current if attributes is None else attributes)
    # In between, the attributes of both classes exist, for calls by other threads; those under way may still fail.
    parameters = {**current.get("_parameters", {}), **attributes.get("_parameters", {})}
    current.update(attributes, _parameters=parameters)
    try:
        # A __setattr__ of the class may do something else
        object.__setattr__(module, "__class__", replacement_class)
        final = attributes
    finally:
        current.update(final)
        for name in current.keys() - final.keys():
            del current[name]


def replace_class_and_parameters(module: nn.Module, converted_copy: nn.Module) -> None:
    """Give a module, in place, the class and attributes of ``converted_copy``, a copy with other parameters or
    adapters.

    Its hooks, mode, buffers and children stay, except ``adapters``.
    """
    preserved = {name: module.__dict__[name] for name in (*HOOKS, "training", "_modules", "_buffers")}
    children, adapters = preserved["_modules"], converted_copy._modules.get("adapters")
    if adapters is not None:
        children["adapters"] = adapters
    change_class_and_attributes(module, type(converted_copy), {**converted_copy.__dict__, **preserved})
    if adapters is None:
        children.pop("adapters", None)


def hookless_shallow_copy(module: nn.Module, replacement_class: type[nn.Module]) -> nn.Module:
    """Return a shallow copy of a module as an instance of another class, without its hooks."""
    copied = replacement_class.__new__(replacement_class)
    copied.__dict__.update(module.__dict__)
    for name in {slot for kind in type(module).__mro__ for slot in getattr(kind, "__slots__", ())}:
        if name != "__dict__" and name != "__weakref__" and hasattr(module, name):
            object.__setattr__(copied, name, getattr(module, name))
    for name in (*HOOKS, "_buffers", "_modules"):
        value = module.__dict__[name]
        copied.__dict__[name] = type(value)() if name in HOOKS else type(value)(value)
    return copied
