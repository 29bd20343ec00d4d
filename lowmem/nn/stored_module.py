"""The base of modules whose parameters are stored, which are of generated classes (``lowmem.nn.module_copy``).
Parameters hold the parts, such as ``weight_packed``, and ``module.weight`` is a property: a ``StoredTensor``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lowmem.kernels import Weight
from lowmem.kernels.torch_versions import is_exporting, is_exporting_without_dynamo
from lowmem.nn import stored_products, stored_views, stored_weight_norm  # noqa: F401 - register what stored tensors do
from lowmem.nn.forms import CodedForm, Described, Form, HalfForm, form_and_frozen_parts, parts_by_name
from lowmem.nn.gathered_weight import GatheredTensor, check_column_permutation
from lowmem.nn.module_class import change_class_and_attributes
from lowmem.nn.sharded_parameters import imported_dtensor_types
from lowmem.nn.stored_tensor import REMEDY, StoredTensor, needs_dispatcher

_M = TypeVar("_M", bound="StoredModule")

# Called often: globals are faster
is_compiling, is_jit_tracing = torch.compiler.is_compiling, torch._C._is_tracing


class CachedStoredTensor(NamedTuple):
    """A cached stored tensor; valid while the module has these parameters (``sources``) at this address and dtype."""

    sources: tuple[Tensor, ...]
    address: int
    dtype: torch.dtype
    tensor: StoredTensor
    weight: Weight


_SHARED: WeakValueDictionary[tuple[int, ...], StoredTensor] = WeakValueDictionary()
"""Stored tensors by the ids of their parts, so that modules that share a weight return the same tensor."""


def is_exporting_or_jit_tracing() -> bool:
    """Whether torch.export or torch.jit.trace records a graph, which cannot contain tensor subclasses."""
    return is_exporting() if is_compiling() else is_jit_tracing()


def _shared_stored_tensor_or_none(
    sources: tuple[Tensor, ...], address: int, dtype: torch.dtype
) -> StoredTensor | None:
    """Return the stored tensor that another module has cached for the same parts, address and dtype; or None."""
    tensor = _SHARED.get(tuple(map(id, sources)))
    if tensor is None:
        return None
    attributes = tensor.__dict__
    same = attributes["made_of"] == (address, dtype) and all(
        a is b for a, b in zip(attributes["sources"], sources, strict=True)
    )
    return tensor if same else None


class StoredModule(nn.Module):
    """Base of all modules with stored parameters.

    Attributes:
        dense_class: the module's class before its parameters were stored.
        stored_names: names of the parameters for which the class has properties.
        stored_bits: of the stored parameters, the fewest: 4, 8 or 16.
        weight_error: ``relative_error`` of the stored weights; None if not known.
        chosen_because: why a ``Budget`` chose this form; "" for other techniques and in a loaded model.
    """

    dense_class: ClassVar[type[nn.Module]]
    stored_names: ClassVar[tuple[str, ...]] = ()
    stored_bits: ClassVar[int] = 16
    weight_error: float | None = None
    chosen_because: str = ""
    _forms: dict[str, Described]
    _kept: dict[str, CachedStoredTensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a module of ``dense_class``: PEFT makes the matrices for a convolution by calling its class."""
        dense: Any = self.dense_class
        change_class_and_attributes(self, dense)
        dense.__init__(self, *args, **kwargs)

    def set_stored_weight(
        self, parameter_name: str, weight: Weight, row_shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Set a parameter to a stored weight.

        If the parameter is stored already, ``transposed``, ``gathered`` and ``compute_dtype`` of its form stay.

        Args:
            parameter_name: of the parameter.
            weight: (*lead, columns).
            row_shape: the shape of a row.
            dtype: of the ``StoredTensor``.
        """
        old = self._forms[parameter_name].form if parameter_name in self._forms else None
        form, parts = (
            form_and_frozen_parts(weight)
            if old is None
            else form_and_frozen_parts(weight, old.transposed, old.compute_dtype)
        )
        if old is not None and old.gathered:
            order = cast(nn.Parameter, self._parameters[f"{parameter_name}_order"])
            form, parts = replace(cast(CodedForm, form), gathered=True), (parts[0], order, parts[1])
        rows = tuple(
            weight.shape[: weight.dim() - len(row_shape)] if isinstance(weight, Tensor) else weight.shape[:-1]
        )
        self._forms[parameter_name] = Described.from_form(form, rows, tuple(row_shape), dtype)
        self._parameters.update(parts_by_name(parameter_name, form, parts))
        self._kept.pop(parameter_name, None)

    @classmethod
    def extra_attributes_from_dense(cls, dense_module: nn.Module) -> dict[str, Any]:
        """Return the attributes that an object of this class has beside those of the dense module it is made of."""
        return {}

    def stored_tensor(self, parameter_name: str) -> StoredTensor:
        """Return the stored tensor of a parameter; cached while the parts stay the same."""
        attributes = self.__dict__
        form, _, _, dtype, _ = storage = attributes["_forms"][parameter_name]
        parameters = attributes["_parameters"]
        sources = tuple([stored_part_by_name(self, parameters, f"{parameter_name}_{part}") for part in form.parts])
        if needs_dispatcher(*sources) or not all(isinstance(source, nn.Parameter) for source in sources):
            _check_not_vmapped(sources)
            made = _make_stored_tensor(storage, sources)
            if is_exporting_or_jit_tracing():
                # A trace and Dynamo cannot record the tensor's class
                if not is_exporting_without_dynamo():
                    return made.dequantize()  # type: ignore[return-value]
                made.in_program, made._is_param = True, False
            return made
        presented = sources[0].__dict__.get("presented_dtype", dtype)
        # Another module that shares the weight was cast
        if presented is not dtype:
            dtype = presented
            storage = attributes["_forms"][parameter_name] = storage._replace(dtype=dtype)
        known: CachedStoredTensor | None = attributes["_kept"].get(parameter_name)
        address = sources[-1].data_ptr()
        if (
            known is None
            or known.address != address
            or known.dtype is not dtype
            or any(a is not b for a, b in zip(known.sources, sources, strict=True))
        ):
            tensor = _shared_stored_tensor_or_none(sources, address, dtype)
            if tensor is None:
                tensor = _make_stored_tensor(storage, sources)
                tensor.__dict__.update(sources=sources, made_of=(address, dtype))
                _SHARED[tuple(map(id, sources))] = tensor
            elif tensor.form.compute_dtype is not form.compute_dtype:
                # Each module has its own compute_dtype
                tensor = _with_compute_dtype(tensor, form.compute_dtype)
            rows = tuple(tensor.parts[0].shape[:-1])
            attributes["_forms"][parameter_name] = storage._replace(
                rows=rows, tail=tensor.tail
            )  # ``weight.data =`` may add rows
            known = attributes["_kept"][parameter_name] = CachedStoredTensor(
                sources, address, dtype, tensor, tensor.kernel_weight
            )
        return known.tensor

    def stored_weight(self, parameter_name: str = "weight") -> Weight:
        """Return a stored parameter for products: (*lead, columns), over the module's own parameters."""
        return self.stored_tensor(parameter_name).kernel_weight

    @property
    def forms(self) -> Mapping[str, Form]:
        """The form of each stored parameter, by its name."""
        return {name: storage.form for name, storage in self._forms.items()}

    @property
    def dequantized_by(self) -> set[str]:
        """Names of the operators for which a stored parameter (not a vector) was dequantized so far."""
        weights = [cached.tensor for cached in self._kept.values() if cached.tensor.dim() > 1]
        return {name for weight in weights for name in weight.dequantized_by}

    @property
    def part_parameter_names(self) -> tuple[str, ...]:
        """The names of the parameters that hold the parts of the stored parameters."""
        return tuple(f"{name}_{part}" for name, storage in self._forms.items() for part in storage.form.parts)

    @property
    def weight_count(self) -> int:
        """The number of weights of the module without its children, stored and dense."""
        parts = set(self.part_parameter_names)
        dense = sum(p.numel() for name, p in self._parameters.items() if p is not None and name not in parts)
        return dense + sum(self.stored_numel(name) for name in self._forms)

    @property
    def element_counts(self) -> dict[str, int]:
        """The number of scales in each parameter that holds the bytes of scales."""
        return {
            f"{name}_scales": getattr(self, f"{name}_scales").numel() // storage.form.scale_dtype.itemsize
            for name, storage in self._forms.items()
            if isinstance(storage.form, CodedForm)
        }

    def stored_numel(self, parameter_name: str) -> int:
        """Return the number of values of a stored parameter."""
        _, rows, tail, _, _ = self._forms[parameter_name]
        return torch.Size((*rows, *tail)).numel()

    def __setattr__(self, name: str, value: Any) -> None:
        forms = self.__dict__.get("_forms", {})
        value = getattr(value, "unadapted", value) if name in forms else value
        if name not in forms:
            if isinstance(value, imported_dtensor_types()) and name in self._parameters:
                self._parameters[name] = value  # type: ignore[assignment]  # as FSDP2 does in other modules
            else:
                super().__setattr__(name, value)
        else:
            # The property of the generated class
            getattr(type(self), name).__set__(self, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as torch does."""
        if isinstance(param, imported_dtensor_types()):
            raise RuntimeError(
                f"{type(self).__name__}.{name} cannot be cut by a plan of tensor parallelism (ColwiseParallel, "
                "RowwiseParallel), which knows dense weights alone; this module stores "
                f"{self._stored_parameters_text()}: leave "
                "it out of the plan, or share weights among processes with lowmem.shard(model)"
            )
        super().register_parameter(name, param)

    def _stored_parameters_text(self) -> str:
        return ", ".join(f"{name} in {storage.form}" for name, storage in self._forms.items())

    def requires_grad_(self: _M, requires_grad: bool = True) -> _M:
        """Freeze all parameters."""
        if requires_grad:
            raise RuntimeError(
                f"{type(self).__name__} stores {self._stored_parameters_text()}, which is frozen: train an adapter "
                "(lowmem.LoRA), call requires_grad_() on other parameters alone, or make the module dense again "
                "first: lowmem.restore(model)"
            )
        return super().requires_grad_(False)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which calls this before it reads a module's code."""
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__} that stores {self._stored_parameters_text()}: "
            "take "
            "torch.jit.trace, torch.compile or torch.export, or make the model dense before, lowmem.restore(model)"
        )

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_forms", {}):
            form = self._forms[name].form
            raise AttributeError(f"{type(self).__name__}.{name} is stored in {form} and cannot be deleted: {REMEDY}")
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move parts between devices without changing their bits; a cast changes only the stored tensors' dtype."""
        self._cast_presented_dtypes(fn)
        parts = [getattr(self, name) for name in self.part_parameter_names]

        def apply_without_cast_of_parts(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype != tensor.dtype and any(tensor is k for k in parts):
                return tensor.to(changed.device)
            return changed

        applied: nn.Module = super()._apply(apply_without_cast_of_parts, recurse)  # type: ignore[no-untyped-call]
        self._kept.clear()
        return applied

    def _cast_presented_dtypes(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Cast the dtypes that stored tensors have, if ``fn`` casts, in all modules that share the parts."""
        for name, storage in self._forms.items():
            first = getattr(self, f"{name}_{storage.form.parts[0]}")
            before = first.__dict__.get("presented_dtype", storage.dtype)
            cast = fn(torch.empty(0, dtype=before, device="cpu")).dtype
            cast = cast if cast.is_floating_point else before
            self._forms[name] = storage._replace(dtype=cast)
            if cast is not before:
                first.presented_dtype = cast

    def _update_forms_from_parts(self) -> None:
        """Update ``_forms`` after ``weight.data =`` with other rows, or a cast of a module that shares a weight."""
        for name in self._kept:
            # Updates the rows
            self.stored_tensor(name)
        for name, storage in self._forms.items():
            first = self._parameters.get(f"{name}_{storage.form.parts[0]}")
            dtype = storage.dtype if first is None else first.__dict__.get("presented_dtype", storage.dtype)
            self._forms[name] = storage._replace(dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        base_state: Any = getattr(super(), "__getstate__", lambda: self.__dict__)()
        state = dict(base_state if isinstance(base_state, dict) else self.__dict__)
        self._update_forms_from_parts()
        state.update(_kept={}, _forms=dict(self._forms))
        for name in ("_flat_weights", "_flat_weight_refs"):  # of recurrent layers: weak references to the parameters
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # __setstate__ of the dense class may read parameters
        self.__dict__.update(_forms=state["_forms"], _kept={})
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Reject dense weights, and parts of another dtype or shape."""
        errors = self._state_dict_errors(state_dict, prefix)
        # error_msgs, which torch raises as one error
        rest[-1].extend(errors)
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _state_dict_errors(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Return why a state cannot be loaded: a text for each wrong part."""
        errors: list[str] = []
        for name, (form, *_) in self._forms.items():
            if isinstance(state_dict.get(prefix + name), Tensor):
                errors.append(
                    f"{prefix}{name} is dense in the state, and stored in {form} here: load it before convert"
                )
            given_parts = [part for part in form.parts if f"{prefix}{name}_{part}" in state_dict]
            # New codes would be read with the old scales
            if given_parts and len(given_parts) < len(form.parts):
                errors.append(f"{prefix}{name}: the state holds {', '.join(given_parts)} of {', '.join(form.parts)}")
            for part in form.parts:
                module_part, state_part = getattr(self, f"{name}_{part}"), state_dict.get(f"{prefix}{name}_{part}")
                if not isinstance(state_part, Tensor):
                    continue
                if state_part.dtype != module_part.dtype:
                    errors.append(
                        f"{prefix}{name}_{part} stores {module_part.dtype}; the state holds {state_part.dtype}"
                    )
                elif (
                    state_part.shape != module_part.shape
                ):  # torch checks this too late: it would have loaded the other parts
                    shapes = f"{tuple(module_part.shape)}; the state holds {tuple(state_part.shape)}"
                    errors.append(f"{prefix}{name}_{part} has shape {shapes}")
                elif part == "order":
                    try:
                        check_column_permutation(state_part, f"{prefix}{name}_{part}")
                    except ValueError as reason:
                        errors.append(str(reason))
        return errors

    def extra_repr(self) -> str:
        """Return the dense class's description, and how the parameters are stored."""
        forms = {str(storage.form): name for name, storage in self._forms.items()}
        how = next(iter(forms)) if len(forms) == 1 else "; ".join(f"{name}: {form}" for form, name in forms.items())
        return ", ".join(text for text in (super().extra_repr(), f"stored in {how}") if text)


def stored_part_by_name(module: nn.Module, parameters: Mapping[str, Any], part_name: str) -> Tensor:
    """Return a part of a stored parameter by its name; ``parameters`` are those of the module."""
    part = parameters.get(part_name)
    if part is None:
        # Moved out of _parameters, by a parametrization or torch.func
        part = getattr(module, part_name)
    return part  # type: ignore[no-any-return]


def _make_stored_tensor(storage: Described, sources: tuple[Tensor, ...]) -> StoredTensor:
    """Return a stored tensor over a module's parameters."""
    parts, rows = sources, storage.rows
    if isinstance(storage.form, HalfForm):
        if tuple(sources[0].shape) != (*rows, *storage.tail) and not needs_dispatcher(*sources):
            raise RuntimeError(
                f"rounded.shape={tuple(sources[0].shape)} does not hold a weight of {(*rows, *storage.tail)}"
            )
        parts = tuple(part.flatten(len(rows)) if len(storage.tail) > 1 else part for part in sources)
    elif any(tuple(part.shape[:-1]) != rows for part in (parts[0], parts[-1])) and not needs_dispatcher(*sources):
        # Of codes or of scales: what lies between them, the order of a gathered weight, has no rows.
        weight = storage.form.weight_from_parts(parts, torch.Size(storage.tail).numel())
        replace(weight, shape=torch.Size((*rows, weight.shape[-1]))).check_layout()
    kind = GatheredTensor if storage.form.gathered else StoredTensor
    tensor = kind(storage.form, parts, storage.tail, storage.dtype, swapped=storage.form.transposed)
    # isinstance(weight, nn.Parameter) holds
    tensor._is_param = True
    return tensor


def _with_compute_dtype(tensor: StoredTensor, compute_dtype: torch.dtype | None) -> StoredTensor:
    """Return a stored tensor of the same parts whose products are computed in another dtype."""
    form = replace(cast(CodedForm, tensor.form), compute_dtype=compute_dtype)
    made = type(tensor)(form, tensor.parts, tensor.tail, tensor.dtype, swapped=tensor.swapped)
    made.__dict__.update({name: tensor.__dict__[name] for name in ("sources", "made_of")})
    made._is_param = True
    return made


def _check_not_vmapped(sources: tuple[Tensor, ...]) -> None:
    """Refuse weights that are stacked for torch.func.vmap."""
    if not is_compiling() and any(torch._C._functorch.is_batchedtensor(source) for source in sources):
        raise RuntimeError(
            "torch.func.vmap cannot compute with a stack of stored weights: call one model after the other, or make "
            "them dense before stack_module_state: lowmem.restore(model)"
        )


def dense_bytes_by_part(module: StoredModule) -> dict[str, int]:
    """Return, by part, the bytes of the dense weight that it replaces: all for a parameter's first part, else 0."""
    sizes: dict[str, int] = {}
    for name, (form, _, _, dtype, _) in module._forms.items():
        sizes |= {f"{name}_{part}": 0 for part in form.parts}
        sizes[f"{name}_{form.parts[0]}"] = module.stored_numel(name) * dtype.itemsize
    return sizes
