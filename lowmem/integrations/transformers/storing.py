"""Stores the weights of a model that transformers is loading, each as soon as it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.nn.forms import CodedForm, HalfForm, freeze
from lowmem.nn.module_class import become
from lowmem.nn.module_copy import stored_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, blockwise
from lowmem.quant.quantize import squares_lost
from lowmem.quant.tensor import Squares
from lowmem.transforms.assign import techniques_by_layer
from lowmem.transforms.bits import warning_of_dense
from lowmem.transforms.budget import losses_of
from lowmem.transforms.convert import rebuild_all
from lowmem.transforms.registry import layer_name, place_name
from lowmem.transforms.select import note_left
from lowmem.transforms.store import store_parameters


@dataclass
class _Shared:
    """A parameter: all of its names, and its places, the modules that store it, each with its name in the module."""

    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    weight: Any = None  # the stored form, once the parameter was read


class Storing:
    """Stores weights one at a time: what ``convert`` would store of the model, if it were loaded, with its errors.

    The model is dense, on the meta device, with its ties. A budget needs the ``losses`` that ``Measuring`` has found:
    what each choice loses of a weight, by its name. ``warning`` is what ``convert`` would warn of, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        technique: Half | EightBit | FourBit | Budget,
        skip: Iterable[str],
        losses: Mapping[str, tuple[float, ...]] | None = None,
    ) -> None:
        known = None if losses is None else lambda name, _: losses.get(name)
        made: dict[Any, Any] = rebuild_all(model, (technique,), None, skip, None, _shapes_of, known)
        self.warning = warning_of_dense(model, made, type(technique), None, skip)
        note_left(model, None, skip, type(technique))
        self._skeletons: dict[nn.Module, StoredModule] = made
        self._techniques: dict[nn.Module, Any] = {
            module: own for module, (own,) in techniques_by_layer(model, (technique,), made, None).items()
        }
        self._paths: dict[nn.Module, str] = {}
        self._weights: dict[nn.Module, dict[str, Any]] = {module: {} for module in made}
        self._squares: dict[nn.Module, list[Squares]] = {module: [] for module in made}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._shared: dict[str, _Shared] = {}
        self._missing: set[str] | None = None
        self._error: Exception | None = None
        self._computed = _computed(model)
        by_id: dict[int, _Shared] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for name, parameter in module._parameters.items():
                full = f"{path}.{name}".lstrip(".")
                self._shared[full] = shared = by_id.setdefault(id(parameter), _Shared())
                shared.names.append(full)
                if module in made and name in made[module].forms:
                    self._paths.setdefault(module, path)
                    self._places[full] = module, name
                    if (module, name) not in shared.places:
                        shared.places.append((module, name))

    def wants(self, name: str) -> bool:
        """Whether the parameter called ``name``, or one that is tied to it, is to be stored."""
        return name in self._shared and bool(self._shared[name].places)

    def stays_tied(self, target: str, source: str) -> bool:
        """Whether two tied parameters are both stored or both dense."""
        return (target in self._places) == (source in self._places)

    def take(self, name: str, value: Tensor, missing: set[str] | None) -> bool:
        """Store a parameter that was read, and remove its name from ``missing``, those that were not read yet.

        Returns:
            Whether transformers must not set the parameter, as it does in another shape, or where one stays dense.
        """
        self._missing = missing
        shared = self._shared[name]
        module, own = self._places.get(name, shared.places[0])
        if value.shape != self._shape(module, own):
            del self._shared[name]
            return False
        try:
            stored = None if self._error else self._stored(module, own, value)
        except (TypeError, ValueError) as reason:
            self._note_error(module, reason)
        if self._error is not None:
            if missing is not None:
                missing.difference_update(shared.names)
            return True
        if shared.weight is None:
            shared.weight = stored
            for place in shared.places:
                self._put(*place, stored, value)
        elif name in self._places and not _same(shared.weight, stored):  # two values for what the config ties
            self._put(module, own, stored, value)
        if name not in self._places:
            stays = {name}
        else:
            stays = {other for other in shared.names if other != name and self.stays_tied(other, name)}
        if missing is not None:
            missing.difference_update(set(shared.names) - stays)  # transformers ties those that stay
        return name in self._places

    def _note_error(self, module: nn.Module, reason: Exception) -> None:
        """Note why a weight cannot be stored, for ``finish``: transformers would bury the error in a report."""
        self._error = type(reason)(f"{layer_name(self._paths[module])}: {reason}; or leave it out with skip=")

    def finish(self) -> None:
        """Store tied weights that were read under another name; weights that were not read stay dense.

        Raises:
            TypeError, ValueError: a weight could not be stored; its path is named.
        """
        if self._error is not None:
            raise self._error
        missing = self._missing or set()
        for name, (module, own) in self._places.items():
            parameter = module._parameters.get(own)
            if isinstance(module, StoredModule) or parameter is None or parameter.is_meta or not self.wants(name):
                continue
            if name not in missing or self._weights[module] or self._computed(name):
                self.take(name, parameter.detach(), None)

    def _shape(self, module: nn.Module, name: str) -> torch.Size:
        parameter = module._parameters.get(name)
        shape = self._skeletons[module].stored_tensor(name).shape
        return shape if parameter is None else parameter.shape

    def _stored(self, module: nn.Module, name: str, value: Tensor) -> Any:
        """Return a parameter as it is stored."""
        technique = self._technique_of(module)
        if isinstance(self._skeletons[module].forms[name], HalfForm):
            return technique.store(value, name)
        return technique.store(value.reshape(self._skeletons[module].stored_weight(name).shape), name)

    def _technique_of(self, module: nn.Module) -> Half | EightBit | FourBit:
        """Return how a module is stored: for a ``Budget``, what the budget assigned to the module."""
        technique: Half | EightBit | FourBit | Budget = self._techniques[module]
        if not isinstance(technique, Budget):
            return technique
        form: Any = next(iter(self._skeletons[module].forms.values()))
        return blockwise(form.format, form.block_size, form.scale_encoding, technique.compute_dtype)

    def _put(self, module: nn.Module, name: str, stored: Any, value: Tensor) -> None:
        """Note how a parameter is stored; its module is converted when all of its parameters are."""
        skeleton, weights = self._skeletons[module], self._weights[module]
        if isinstance(module, StoredModule):
            described = module._forms[name]
            module.store(name, stored, described.tail, described.dtype)
            return
        weights[name] = stored
        names = [own for own in skeleton.forms if own != "bias"]  # which ``Half`` stores with the weight
        if name != "bias":
            self._squares[module].append(squares_lost(value, stored))
        if len(weights) < len(skeleton.forms):
            return
        technique = self._technique_of(module)
        if isinstance(technique, Half):  # as many as the skeleton stores: a bias that is shared stays dense
            made = stored_copy(module, {own: weights[own] for own in skeleton.forms})
        else:
            made = store_parameters(module, technique, self._paths[module], names, _given(weights))
        made.weight_error = Squares.total(self._squares[module]).error
        made.chosen_because = skeleton.chosen_because
        become(module, made)
        for part in made.part_names:
            made._parameters[part]._is_hf_initialized = True  # type: ignore[union-attr]
        weights.clear()


class Measuring(Storing):
    """Measures what each choice of a budget loses of the weights that are read, by name; nothing is stored."""

    def __init__(self, model: nn.Module, budget: Budget, skip: Iterable[str]) -> None:
        super().__init__(model, budget.choices[0], skip)
        self.losses: dict[str, tuple[float, ...]] = {}

    def wants(self, name: str) -> bool:
        """Whether the model has a parameter of this name."""
        return name in self._shared

    def take(self, name: str, value: Tensor, missing: set[str] | None) -> bool:
        """Measure a parameter that was read, if it is to be stored."""
        shared = self._shared[name]
        if shared.places and self._error is None:
            module, own = self._places.get(name, shared.places[0])
            if value.shape == self._shape(module, own):
                try:
                    lost = losses_of(value.reshape(self._skeletons[module].stored_weight(own).shape))
                except (TypeError, ValueError) as reason:
                    self._note_error(module, reason)
                else:
                    self.losses |= {place_name(self._paths[one], part): lost for one, part in shared.places}
        return True

    def finish(self) -> None:
        """Raise what went wrong with a weight."""
        if self._error is not None:
            raise self._error


def _shapes_of(technique: Any) -> Callable[[Tensor, str], Any]:
    """Return the function that stores a weight without values; shapes are the same for each of several formats."""
    if isinstance(technique, FourBit) and not isinstance(technique.format, str):
        technique = replace(technique, format=technique.format[0])
    return technique.skeleton  # type: ignore[no-any-return]


def _computed(model: Any) -> Callable[[str], bool]:
    """Return a function: whether the model computes a parameter, which is then in no folder, and not new either."""
    patterns = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _given(weights: dict[str, Any]) -> Callable[[Tensor, str], Any]:
    """Return a function in place of ``technique.store``: it returns weights that are stored already, in any shape."""

    def store(tensor: Tensor, name: str) -> Any:
        weight = weights[name]
        return weight if weight.shape == tensor.shape else freeze(weight.view(tensor.shape))

    return store


def _same(a: Any, b: Any) -> bool:
    """Whether two weights are stored in the same form and bytes."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if CodedForm.of(a) != CodedForm.of(b):
        return False
    return all(torch.equal(*parts) for parts in zip(CodedForm.split(a), CodedForm.split(b), strict=True))
