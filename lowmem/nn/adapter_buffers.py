"""Buffers that training changes beside an adapter, such as the running statistics of BatchNorm: each adapter has its
own, and the base keeps those that it had. A module's own buffers are those that it computes with; its child
``adapter_buffers`` holds the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_bank import AdapterBank

T = TypeVar("T")

CHILD = "adapter_buffers"
"""The name of the child that holds the buffers with which a module does not compute."""

# Containers would call the child, or return it to loops; a scripted module takes no child.
_WITHOUT_CHILD = (nn.Sequential, nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)


class AdapterBuffers(nn.Module):
    """The buffers of a module with which it does not compute now.

    Attributes:
        current: the adapter whose buffers the module uses now; None: it uses those of the base.
        base: holds the base's buffers, unless they are the module's own.
        adapters: holds those of the other adapters, by name.
    """

    current: str | None
    base: nn.Module
    adapters: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.current = None
        self.base, self.adapters = nn.Module(), nn.Module()

    def held(self) -> dict[str | None, dict[str, Tensor]]:
        """Return the buffers by adapter, and under None those of the base; without those of ``current``."""
        holders: dict[str | None, nn.Module] = {None: self.base, **self.adapters._modules}  # type: ignore[dict-item]
        return {name: dict(one.named_buffers()) for name, one in holders.items() if name != self.current}

    def hold(self, current: str | None, held: dict[str | None, dict[str, Tensor]]) -> None:
        """Replace all buffers by those of ``held``; ``current`` says whose are the module's own."""
        self.current = current
        self.base, self.adapters = nn.Module(), nn.Module()
        for name, buffers in held.items():
            holder = self.base if name is None else nn.Module()
            holder._buffers.update(buffers)
            if name is not None:
                self.adapters._modules[name] = holder


def _bank_of(module: nn.Module) -> AdapterBuffers | None:
    bank = getattr(module, CHILD, None)
    return bank if isinstance(bank, AdapterBuffers) else None


def _drop_bank(module: nn.Module) -> None:
    if _bank_of(module) is not None:
        delattr(module, CHILD)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module, without its children, that its state_dict holds; none while it is lazy."""
    found = _saved_buffers(module)
    return {} if any(map(is_lazy, found.values())) else found


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    left = module._non_persistent_buffers_set
    return {name: one for name, one in module._buffers.items() if one is not None and name not in left}


def buffered_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules, by path, whose buffers each adapter has a copy of."""
    modules: dict[str, nn.Module] = {}
    banks = [path for path, one in model.named_modules() if isinstance(one, AdapterBank | AdapterBuffers)]
    for path, module in model.named_modules():
        inside = any(path == bank or path.startswith(f"{bank}.") for bank in banks)
        if not inside and not isinstance(module, _WITHOUT_CHILD) and _saved_buffers(module):
            modules[path] = module
    return modules


def follow_adapters(model: nn.Module) -> None:
    """Let modules compute with the buffers of the adapter in use that was added last, or without one the base's.

    An adapter that is new begins with copies of what the modules compute with. Those of deleted adapters are dropped.
    """
    banks = [module.adapters for module in model.modules() if isinstance(module, AdaptedModule)]
    names = list(dict.fromkeys(name for bank in banks for name in bank.names))
    in_use = {name for bank in banks for name in bank.in_use}
    current = next((name for name in reversed(names) if name in in_use), None)
    copies: dict[int, Tensor] = {}  # of a buffer that modules share one
    for module in buffered_modules(model).values():
        bank = _bank_of(module)
        if bank is None:
            bank = AdapterBuffers()
            if any(map(is_lazy, _saved_buffers(module).values())):
                module.register_forward_pre_hook(_copy_lazy_buffers)  # called after the one that gives it a shape
        own = persistent_buffers(module)
        held = {**bank.held(), bank.current: own}
        for name in (None, *names):
            if not held.get(name):  # new, or the module was lazy
                held[name] = {key: copies.setdefault(id(one), one.detach().clone()) for key, one in own.items()}
        held = {name: one for name, one in held.items() if name is None or name in names}
        module._buffers.update(held.pop(current))
        bank.hold(current, held)
        bank.train(module.training)
        if names:
            module._modules[CHILD] = bank
        else:
            _drop_bank(module)


def _copy_lazy_buffers(module: nn.Module, arguments: object) -> None:
    """Let the base and all adapters begin with copies of the buffers that a module has once it is not lazy."""
    bank, own = _bank_of(module), persistent_buffers(module)
    if bank is not None:
        copies = {
            name: buffers or {key: one.detach().clone() for key, one in own.items()}
            for name, buffers in bank.held().items()
        }
        bank.hold(bank.current, copies)
    for number, hook in list(module._forward_pre_hooks.items()):
        if hook is _copy_lazy_buffers:
            del module._forward_pre_hooks[number]


def keep_buffers(model: nn.Module) -> None:
    """Make the buffers that modules compute with those of the base, without adapters."""
    for module in buffered_modules(model).values():
        _drop_bank(module)


def buffers_in_use(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that modules compute with, by name."""
    return {
        f"{path}.{key}".lstrip("."): one
        for path, module in buffered_modules(model).items()
        for key, one in persistent_buffers(module).items()
    }


def buffers_of(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """Return the buffers of an adapter, or for None those of the base, by their names in the base."""
    found: dict[str, Tensor] = {}
    for path, module in buffered_modules(model).items():
        bank, buffers = _bank_of(module), persistent_buffers(module)
        if bank is not None and bank.current != name:
            buffers = bank.held()[name]
        found |= {f"{path}.{key}".lstrip("."): one for key, one in buffers.items()}
    return found


def changed_buffers(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the buffers of an adapter that differ from those of the base, by their names in the base."""
    base = buffers_of(model, None)
    return {key: one for key, one in buffers_of(model, name).items() if not one.equal(base[key])}


def without_copies(model: nn.Module, state: Mapping[str, T]) -> dict[str, T]:
    """Return a state of a model to write; without the buffers of adapters if all are the base's."""
    names = {
        name for module in model.modules() if isinstance(module, AdaptedModule) for name in module.adapters.names
    }
    differ = any(changed_buffers(model, name) for name in names)
    return {name: one for name, one in state.items() if differ or f".{CHILD}." not in f".{name}"}
