"""Stores the weights of a model that transformers is loading, each as soon as it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.nn.forms import CodedForm, HalfForm, as_frozen_parameter
from lowmem.nn.module_class import replace_class_and_parameters
from lowmem.nn.module_copy import stored_shallow_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, blockwise_technique
from lowmem.quant.quantize_tensor import recorded_or_measured_squares
from lowmem.quant.tensor import Squares
from lowmem.transforms.bit_budget import loss_per_choice
from lowmem.transforms.bits_per_weight import dense_weights_warning_or_none
from lowmem.transforms.convert import build_replacements
from lowmem.transforms.converted_copies import copy_with_stored_parameters
from lowmem.transforms.module_registry import layer_display_name, layer_or_parameter_path
from lowmem.transforms.module_selection import record_user_exclusions
from lowmem.transforms.technique_assignment import techniques_by_layer


@dataclass
class _TiedParameterPlaces:
    """A parameter: all of its names, and its places, the modules that store it, each with its name in the module."""

    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    weight: Any = None  # the stored form, once the parameter was read


class OnLoadWeightStorer:
    """Stores weights one at a time: what ``convert`` would store of the model, if it were loaded, with its errors.

    The model is dense, on the meta device, with its ties. A budget needs the ``losses`` of
    ``OnLoadBudgetLossMeasurer``: what each choice loses of a weight, by its name.
    ``warning`` is what ``convert`` would warn of, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        technique: Half | EightBit | FourBit | Budget,
        skip: Iterable[str],
        losses: Mapping[str, tuple[float, ...]] | None = None,
    ) -> None:
        known = None if losses is None else lambda name, _: losses.get(name)
        made: dict[Any, Any] = build_replacements(model, (technique,), None, skip, None, _meta_store_function, known)
        self.warning = dense_weights_warning_or_none(model, made, type(technique), None, skip)
        record_user_exclusions(model, None, skip, type(technique))
        self._skeletons: dict[nn.Module, StoredModule] = made
        self._techniques: dict[nn.Module, Any] = {
            module: assigned for module, (assigned,) in techniques_by_layer(model, (technique,), made, None).items()
        }
        self._paths: dict[nn.Module, str] = {}
        self._weights: dict[nn.Module, dict[str, Any]] = {module: {} for module in made}
        self._squares: dict[nn.Module, list[Squares]] = {module: [] for module in made}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._shared: dict[str, _TiedParameterPlaces] = {}
        self._missing: set[str] | None = None
        self._error: Exception | None = None
        self._computed = _ignored_key_predicate(model)
        by_id: dict[int, _TiedParameterPlaces] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for name, parameter in module._parameters.items():
                full = f"{path}.{name}".lstrip(".")
                self._shared[full] = shared = by_id.setdefault(id(parameter), _TiedParameterPlaces())
                shared.names.append(full)
                if module in made and name in made[module].forms:
                    self._paths.setdefault(module, path)
                    self._places[full] = module, name
                    if (module, name) not in shared.places:
                        shared.places.append((module, name))

    def should_process(self, parameter_name: str) -> bool:
        """Whether the parameter called ``parameter_name``, or one that is tied to it, is to be stored."""
        return parameter_name in self._shared and bool(self._shared[parameter_name].places)

    def are_both_stored_or_dense(self, target: str, source: str) -> bool:
        """Whether two tied parameters are both stored or both dense."""
        return (target in self._places) == (source in self._places)

    def process_parameter_and_check_if_taken(self, name: str, value: Tensor, missing_names: set[str] | None) -> bool:
        """Store a parameter that was read, and remove its name from ``missing_names``, those that were not read yet.

        Returns:
            Whether transformers must not set the parameter, as it does in another shape, or where one stays dense.
        """
        self._missing = missing_names
        shared = self._shared[name]
        module, parameter_name = self._places.get(name, shared.places[0])
        if value.shape != self._dense_shape(module, parameter_name):
            del self._shared[name]
            return False
        try:
            stored = None if self._error else self._parameter_as_stored(module, parameter_name, value)
        except (TypeError, ValueError) as reason:
            self._record_error_for_finish(module, reason)
        if self._error is not None:
            if missing_names is not None:
                missing_names.difference_update(shared.names)
            return True
        if shared.weight is None:
            shared.weight = stored
            for place in shared.places:
                self._record_and_convert_when_complete(*place, stored, value)
        elif name in self._places and not _are_stored_weights_equal(
            shared.weight, stored
        ):  # two values for what the config ties
            self._record_and_convert_when_complete(module, parameter_name, stored, value)
        if name not in self._places:
            stays = {name}
        else:
            stays = {other for other in shared.names if other != name and self.are_both_stored_or_dense(other, name)}
        if missing_names is not None:
            # Transformers ties those that stay
            missing_names.difference_update(set(shared.names) - stays)
        return name in self._places

    def _record_error_for_finish(self, module: nn.Module, reason: Exception) -> None:
        """Note why a weight cannot be stored, for ``finish``: transformers would bury the error in a report."""
        self._error = type(reason)(f"{layer_display_name(self._paths[module])}: {reason}; or leave it out with skip=")

    def finish_or_raise(self) -> None:
        """Store tied weights that were read under another name; weights that were not read stay dense.

        Raises:
            TypeError, ValueError: a weight could not be stored; its path is named.
        """
        if self._error is not None:
            raise self._error
        missing = self._missing or set()
        for name, (module, parameter_name) in self._places.items():
            parameter = module._parameters.get(parameter_name)
            if (
                isinstance(module, StoredModule)
                or parameter is None
                or parameter.is_meta
                or not self.should_process(name)
            ):
                continue
            if name not in missing or self._weights[module] or self._computed(name):
                self.process_parameter_and_check_if_taken(name, parameter.detach(), None)

    def _dense_shape(self, module: nn.Module, name: str) -> torch.Size:
        parameter = module._parameters.get(name)
        shape = self._skeletons[module].stored_tensor(name).shape
        return shape if parameter is None else parameter.shape

    def _parameter_as_stored(self, module: nn.Module, name: str, value: Tensor) -> Any:
        """Return a parameter as it is stored."""
        technique = self._assigned_technique(module)
        if isinstance(self._skeletons[module].forms[name], HalfForm):
            return technique.store(value, name)
        return technique.store(value.reshape(self._skeletons[module].stored_weight(name).shape), name)

    def _assigned_technique(self, module: nn.Module) -> Half | EightBit | FourBit:
        """Return how a module is stored: for a ``Budget``, what the budget assigned to the module."""
        technique: Half | EightBit | FourBit | Budget = self._techniques[module]
        if not isinstance(technique, Budget):
            return technique
        form: Any = next(iter(self._skeletons[module].forms.values()))
        return blockwise_technique(form.format, form.block_size, form.scale_encoding, technique.compute_dtype)

    def _record_and_convert_when_complete(self, module: nn.Module, name: str, stored: Any, value: Tensor) -> None:
        """Note how a parameter is stored; its module is converted when all of its parameters are."""
        skeleton, weights = self._skeletons[module], self._weights[module]
        if isinstance(module, StoredModule):
            described = module._forms[name]
            module.set_stored_weight(name, stored, described.tail, described.dtype)
            return
        weights[name] = stored
        names = [
            form_name for form_name in skeleton.forms if form_name != "bias"
        ]  # which ``Half`` stores with the weight
        if name != "bias":
            self._squares[module].append(recorded_or_measured_squares(value, stored))
        if len(weights) < len(skeleton.forms):
            return
        technique = self._assigned_technique(module)
        # As many as the skeleton stores: a bias that is shared stays dense
        if isinstance(technique, Half):
            made = stored_shallow_copy(module, {form_name: weights[form_name] for form_name in skeleton.forms})
        else:
            made = copy_with_stored_parameters(
                module, technique, self._paths[module], names, _stored_weight_lookup_function(weights)
            )
        made.weight_error = Squares.total(self._squares[module]).relative_error
        made.chosen_because = skeleton.chosen_because
        replace_class_and_parameters(module, made)
        for part in made.part_parameter_names:
            made._parameters[part]._is_hf_initialized = True  # type: ignore[union-attr]
        weights.clear()


class OnLoadBudgetLossMeasurer(OnLoadWeightStorer):
    """Measures what each choice of a budget loses of the weights that are read, by name; nothing is stored."""

    def __init__(self, model: nn.Module, budget: Budget, skip: Iterable[str]) -> None:
        super().__init__(model, budget.choices[0], skip)
        self.losses: dict[str, tuple[float, ...]] = {}

    def should_process(self, parameter_name: str) -> bool:
        """Whether the model has a parameter of this name."""
        return parameter_name in self._shared

    def process_parameter_and_check_if_taken(self, name: str, value: Tensor, missing_names: set[str] | None) -> bool:
        """Measure a parameter that was read, if it is to be stored."""
        shared = self._shared[name]
        if shared.places and self._error is None:
            module, parameter_name = self._places.get(name, shared.places[0])
            if value.shape == self._dense_shape(module, parameter_name):
                try:
                    lost = loss_per_choice(value.reshape(self._skeletons[module].stored_weight(parameter_name).shape))
                except (TypeError, ValueError) as reason:
                    self._record_error_for_finish(module, reason)
                else:
                    self.losses |= {
                        layer_or_parameter_path(self._paths[owner], part): lost for owner, part in shared.places
                    }
        return True

    def finish_or_raise(self) -> None:
        """Raise what went wrong with a weight."""
        if self._error is not None:
            raise self._error


def _meta_store_function(technique: Any) -> Callable[[Tensor, str], Any]:
    """Return the function that stores a weight without values; shapes are the same for each of several formats."""
    if isinstance(technique, FourBit) and not isinstance(technique.format, str):
        technique = replace(technique, format=technique.format[0])
    return technique.skeleton  # type: ignore[no-any-return]


def _ignored_key_predicate(model: Any) -> Callable[[str], bool]:
    """Return a function: whether the model computes a parameter, which is then in no folder, and not new either."""
    patterns = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _stored_weight_lookup_function(weights: dict[str, Any]) -> Callable[[Tensor, str], Any]:
    """Return a function in place of ``technique.store``: it returns weights that are stored already, in any shape."""

    def stored_weight_in_shape(tensor: Tensor, name: str) -> Any:
        weight = weights[name]
        return weight if weight.shape == tensor.shape else as_frozen_parameter(weight.view(tensor.shape))

    return stored_weight_in_shape


def _are_stored_weights_equal(a: Any, b: Any) -> bool:
    """Whether two weights are stored in the same form and bytes."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if CodedForm.from_quantized_tensor(a) != CodedForm.from_quantized_tensor(b):
        return False
    return all(
        torch.equal(*parts)
        for parts in zip(CodedForm.codes_and_scale_bytes(a), CodedForm.codes_and_scale_bytes(b), strict=True)
    )
