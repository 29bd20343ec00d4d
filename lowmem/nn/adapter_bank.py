"""The adapters of one module: which there are, which are active, and which is merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from lowmem.nn.adapted_weight import adapted_weight
from lowmem.nn.adapter import Adapter
from lowmem.nn.stored_module import StoredModule


class AdapterBank(nn.Module):
    """The adapters of a module, by name and then by the parameter that they change.

    Attributes:
        active: names of the adapters that are applied; the others cost no time.
        merged_copy: the name of the merged adapter, and a copy of the module with it merged into the parameters that
            it changes; or None. It is one attribute, so that other threads never read the name of one and the copy of
            another. The copy is not a child, so the state_dict does not contain it.
    """

    active: tuple[str, ...]
    merged_copy: tuple[str, nn.Module] | None

    def __init__(self) -> None:
        super().__init__()
        self.active, self.merged_copy = (), None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return tuple(self._modules)

    @property
    def merged_name(self) -> str | None:
        """The name of the merged adapter, or None."""
        return None if self.merged_copy is None else self.merged_copy[0]

    @property
    def active_or_merged_names(self) -> tuple[str, ...]:
        """The adapters that contribute to the output, active or merged, in the order in which they were added."""
        return tuple(name for name in self._modules if name in self.active or name == self.merged_name)

    def adapters_by_parameter(self, adapter_name: str) -> dict[str, Adapter]:
        """Return the adapters of a name, by the parameter that each changes; {} for an unknown name."""
        holder = self._modules.get(adapter_name)
        return {} if holder is None else cast("dict[str, Adapter]", dict(holder._modules))

    def parameters_with_merged_copy(self) -> list[nn.Parameter]:
        """Return the parameters of all adapters, and of the merged copy."""
        return [*self.parameters(), *(() if self.merged_copy is None else self.merged_copy[1].parameters())]

    def add_and_activate(self, adapter_name: str, adapters_by_parameter: Mapping[str, Adapter]) -> None:
        """Add adapters to a name, which may already have some of other parameters, and activate it."""
        if adapter_name not in self._modules:
            self._modules[adapter_name] = nn.Module().train(self.training)
        for parameter, adapter in adapters_by_parameter.items():
            self._modules[adapter_name]._modules[parameter] = adapter.train(self.training)  # type: ignore[union-attr]
        if adapter_name not in self.active:
            self.active += (adapter_name,)

    def remove(self, adapter_name: str) -> None:
        """Remove the adapters of a name."""
        self.active = tuple(other for other in self.active if other != adapter_name)
        del self._modules[adapter_name]

    def adopt_merged_copy(self, adapter_name: str, merged_module: nn.Module) -> None:
        """Use the parameters that the adapter ``adapter_name`` changes from ``merged_module``, instead of the
        module's own."""
        # The module's own, which ``_apply`` casts only once
        merged_module.__dict__.update(_modules={}, _buffers={})
        self.merged_copy = adapter_name, merged_module

    def drop_merged_copy(self) -> None:
        """Use the module's own parameters again."""
        self.merged_copy = None

    def adapted_parameter(self, module: nn.Module, parameter_name: str) -> Any:
        """Return a parameter of a module with its active adapters; without any, the parameter itself."""
        # Read only once: another thread may change them
        active, merged = self.active, self.merged_copy
        base, merged_name = unadapted_parameter(module, parameter_name), None
        if merged is not None:
            merged_name = merged[0]
            base = (
                unadapted_parameter(merged[1], parameter_name)
                if parameter_name in self.adapters_by_parameter(merged_name)
                else base
            )
        active_parts = [self.adapters_by_parameter(adapters) for adapters in active if adapters != merged_name]
        parts = [adapters[parameter_name] for adapters in active_parts if parameter_name in adapters]
        if not parts or base is None:
            return base
        return adapted_weight(base, [part.low_rank_update() for part in parts])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.merged_copy is not None:
            self.merged_copy[1]._apply(fn)
        applied: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def extra_repr(self) -> str:
        """Describe which adapters are active and merged."""
        return f"active={', '.join(self.active) or None}, merged={self.merged_name}"


def unadapted_parameter(module: nn.Module, parameter_name: str) -> Any:
    """Return a parameter of a module, dense or stored, without adapters."""
    attributes = module.__dict__
    if isinstance(module, StoredModule) and parameter_name in attributes["_forms"]:
        return module.stored_tensor(parameter_name)
    # In a scripted module not a dict, and without get()
    parameters = attributes["_parameters"]
    parameter = parameters[parameter_name] if parameter_name in parameters else None  # noqa: SIM401
    # A plain tensor that a hook has set
    return attributes.get(parameter_name) if parameter is None else parameter
