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
    def merged(self) -> str | None:
        """The name of the merged adapter, or None."""
        return None if self.merged_copy is None else self.merged_copy[0]

    @property
    def in_use(self) -> tuple[str, ...]:
        """The adapters that contribute to the output, active or merged, in the order in which they were added."""
        return tuple(name for name in self._modules if name in self.active or name == self.merged)

    def parts(self, name: str) -> dict[str, Adapter]:
        """Return the adapters of a name, by the parameter that each changes; {} for an unknown name."""
        found = self._modules.get(name)
        return {} if found is None else cast("dict[str, Adapter]", dict(found._modules))

    def stored(self) -> list[nn.Parameter]:
        """Return the parameters of all adapters, and of the merged copy."""
        return [*self.parameters(), *(() if self.merged_copy is None else self.merged_copy[1].parameters())]

    def add(self, name: str, parts: Mapping[str, Adapter]) -> None:
        """Add adapters to a name, which may already have some of other parameters, and activate it."""
        if name not in self._modules:
            self._modules[name] = nn.Module().train(self.training)
        for parameter, adapter in parts.items():
            self._modules[name]._modules[parameter] = adapter.train(self.training)  # type: ignore[union-attr]
        if name not in self.active:
            self.active += (name,)

    def remove(self, name: str) -> None:
        """Remove the adapters of a name."""
        self.active = tuple(other for other in self.active if other != name)
        del self._modules[name]

    def merge(self, name: str, folded: nn.Module) -> None:
        """Use the parameters that the adapter ``name`` changes from ``folded``, instead of the module's own."""
        folded.__dict__.update(_modules={}, _buffers={})  # the module's own, which ``_apply`` casts only once
        self.merged_copy = name, folded

    def unmerge(self) -> None:
        """Use the module's own parameters again."""
        self.merged_copy = None

    def weight(self, module: nn.Module, name: str) -> Any:
        """Return a parameter of a module with its active adapters; without any, the parameter itself."""
        active, merged = self.active, self.merged_copy  # read only once: another thread may change them
        base, done = parameter_of(module, name), None
        if merged is not None:
            done = merged[0]
            base = parameter_of(merged[1], name) if name in self.parts(done) else base
        active_parts = [self.parts(one) for one in active if one != done]
        parts = [one[name] for one in active_parts if name in one]
        if not parts or base is None:
            return base
        return adapted_weight(base, [part.update() for part in parts])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.merged_copy is not None:
            self.merged_copy[1]._apply(fn)
        applied: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def extra_repr(self) -> str:
        """Describe which adapters are active and merged."""
        return f"active={', '.join(self.active) or None}, merged={self.merged}"


def parameter_of(module: nn.Module, name: str) -> Any:
    """Return a parameter of a module, dense or stored, without adapters."""
    own = module.__dict__
    if isinstance(module, StoredModule) and name in own["_forms"]:
        return module.stored_tensor(name)
    parameters = own["_parameters"]  # in a scripted module not a dict, and without get()
    found = parameters[name] if name in parameters else None  # noqa: SIM401
    return own.get(name) if found is None else found  # a plain tensor that a hook has set
