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

    def inactive_buffers_by_adapter(self) -> dict[str | None, dict[str, Tensor]]:
        """Return the buffers by adapter, and under None those of the base; without those of ``current``."""
        holders: dict[str | None, nn.Module] = {None: self.base, **self.adapters._modules}  # type: ignore[dict-item]
        return {name: dict(holder.named_buffers()) for name, holder in holders.items() if name != self.current}

    def set_current_and_inactive_buffers(
        self, current_adapter: str | None, buffers_by_adapter: dict[str | None, dict[str, Tensor]]
    ) -> None:
        """Replace all buffers by those of ``buffers_by_adapter``; ``current_adapter`` says whose are the module's
        own."""
        self.current = current_adapter
        self.base, self.adapters = nn.Module(), nn.Module()
        for name, buffers in buffers_by_adapter.items():
            holder = self.base if name is None else nn.Module()
            holder._buffers.update(buffers)
            if name is not None:
                self.adapters._modules[name] = holder


def _inactive_buffers_child_or_none(module: nn.Module) -> AdapterBuffers | None:
    bank = getattr(module, CHILD, None)
    return bank if isinstance(bank, AdapterBuffers) else None


def _delete_inactive_buffers_child(module: nn.Module) -> None:
    if _inactive_buffers_child_or_none(module) is not None:
        delattr(module, CHILD)


def initialized_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module, without its children, that its state_dict holds; none while it is lazy."""
    buffers = _persistent_buffers(module)
    return {} if any(map(is_lazy, buffers.values())) else buffers


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    non_persistent = module._non_persistent_buffers_set
    return {
        name: buffer for name, buffer in module._buffers.items() if buffer is not None and name not in non_persistent
    }


def modules_with_persistent_buffers_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules, by path, whose buffers each adapter has a copy of."""
    modules: dict[str, nn.Module] = {}
    banks = [path for path, child in model.named_modules() if isinstance(child, AdapterBank | AdapterBuffers)]
    for path, module in model.named_modules():
        inside = any(path == bank or path.startswith(f"{bank}.") for bank in banks)
        if not inside and not isinstance(module, _WITHOUT_CHILD) and _persistent_buffers(module):
            modules[path] = module
    return modules


def sync_buffers_with_adapters(model: nn.Module) -> None:
    """Let modules compute with the buffers of the adapter in use that was added last, or without one the base's.

    An adapter that is new begins with copies of what the modules compute with. Those of deleted adapters are dropped.
    """
    banks = [module.adapters for module in model.modules() if isinstance(module, AdaptedModule)]
    names = list(dict.fromkeys(name for bank in banks for name in bank.names))
    in_use = {name for bank in banks for name in bank.active_or_merged_names}
    current = next((name for name in reversed(names) if name in in_use), None)
    copies: dict[int, Tensor] = {}  # of a buffer that modules share one
    for module in modules_with_persistent_buffers_by_path(model).values():
        bank = _inactive_buffers_child_or_none(module)
        if bank is None:
            bank = AdapterBuffers()
            if any(map(is_lazy, _persistent_buffers(module).values())):
                module.register_forward_pre_hook(
                    _copy_initialized_buffers_once
                )  # called after the one that gives it a shape
        current_buffers = initialized_persistent_buffers(module)
        buffers_by_adapter = {**bank.inactive_buffers_by_adapter(), bank.current: current_buffers}
        for name in (None, *names):
            # New, or the module was lazy
            if not buffers_by_adapter.get(name):
                buffers_by_adapter[name] = {
                    key: copies.setdefault(id(value), value.detach().clone())
                    for key, value in current_buffers.items()
                }
        buffers_by_adapter = {
            name: value for name, value in buffers_by_adapter.items() if name is None or name in names
        }
        module._buffers.update(buffers_by_adapter.pop(current))
        bank.set_current_and_inactive_buffers(current, buffers_by_adapter)
        bank.train(module.training)
        if names:
            module._modules[CHILD] = bank
        else:
            _delete_inactive_buffers_child(module)


def _copy_initialized_buffers_once(module: nn.Module, arguments: object) -> None:
    """Let the base and all adapters begin with copies of the buffers that a module has once it is not lazy."""
    bank, current_buffers = _inactive_buffers_child_or_none(module), initialized_persistent_buffers(module)
    if bank is not None:
        copies = {
            name: buffers or {key: buffer.detach().clone() for key, buffer in current_buffers.items()}
            for name, buffers in bank.inactive_buffers_by_adapter().items()
        }
        bank.set_current_and_inactive_buffers(bank.current, copies)
    for number, hook in list(module._forward_pre_hooks.items()):
        if hook is _copy_initialized_buffers_once:
            del module._forward_pre_hooks[number]


def discard_inactive_buffers(model: nn.Module) -> None:
    """Make the buffers that modules compute with those of the base, without adapters."""
    for module in modules_with_persistent_buffers_by_path(model).values():
        _delete_inactive_buffers_child(module)


def current_buffers_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that modules compute with, by name."""
    return {
        f"{path}.{key}".lstrip("."): buffer
        for path, module in modules_with_persistent_buffers_by_path(model).items()
        for key, buffer in initialized_persistent_buffers(module).items()
    }


def buffers_of_adapter_or_base(model: nn.Module, adapter_name: str | None) -> dict[str, Tensor]:
    """Return the buffers of an adapter, or for None those of the base, by their names in the base."""
    named_buffers: dict[str, Tensor] = {}
    for path, module in modules_with_persistent_buffers_by_path(model).items():
        bank, buffers = _inactive_buffers_child_or_none(module), initialized_persistent_buffers(module)
        if bank is not None and bank.current != adapter_name:
            buffers = bank.inactive_buffers_by_adapter()[adapter_name]
        named_buffers |= {f"{path}.{key}".lstrip("."): buffer for key, buffer in buffers.items()}
    return named_buffers


def buffers_changed_by_adapter(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the buffers of an adapter that differ from those of the base, by their names in the base."""
    base = buffers_of_adapter_or_base(model, None)
    return {
        key: buffer
        for key, buffer in buffers_of_adapter_or_base(model, adapter_name).items()
        if not buffer.equal(base[key])
    }


def without_adapter_buffers_if_equal(model: nn.Module, state_dict: Mapping[str, T]) -> dict[str, T]:
    """Return a state of a model to write; without the buffers of adapters if all are the base's."""
    names = {
        name for module in model.modules() if isinstance(module, AdaptedModule) for name in module.adapters.names
    }
    differ = any(buffers_changed_by_adapter(model, name) for name in names)
    return {name: value for name, value in state_dict.items() if differ or f".{CHILD}." not in f".{name}"}
