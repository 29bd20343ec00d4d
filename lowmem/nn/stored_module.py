"""Modules whose parameters are stored: generated subclasses of the modules' own classes.

A parameter ``weight`` that is stored in 4 or 8 bits becomes two frozen parameters, ``weight_packed`` and
``weight_scales`` (the bytes of the scales); in 16 bits it becomes ``weight_rounded``. ``module.weight`` is a property
that returns a ``StoredTensor`` over them. The module stays an instance of its class, with its attributes, methods and
hooks, so code that inspects it still works.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, register_module_parameter_registration_hook
from torch.nn.utils.parametrize import ParametrizationList

from lowmem.errors import show
from lowmem.kernels import Weight
from lowmem.kernels.frozen_operator import StoredParts
from lowmem.kernels.torch_versions import is_exporting, leave_to_eager
from lowmem.nn import stored_functions, stored_weight_norm  # noqa: F401 - register what stored tensors do
from lowmem.nn.gathered_weight import GatheredTensor, check_order
from lowmem.nn.sharded import sharded_types
from lowmem.nn.stored import (
    REMEDY,
    EightBitForm,
    Form,
    FourBitForm,
    HalfForm,
    StoredTensor,
    is_recorded,
    recorded_values,
)
from lowmem.quant.tensor import QuantizedTensor

__all__ = [
    "HOOKS",
    "LAYERS",
    "FourBitStorage",
    "StoredModule",
    "as_part",
    "become",
    "copied_module",
    "dense_bytes",
    "file_names",
    "format_keys",
    "freeze",
    "is_exported",
    "kept_weight",
    "leading_dims",
    "multiplied_in",
    "restored_copy",
    "stored_class",
    "stored_copy",
    "stored_property",
]

_M = TypeVar("_M", bound="StoredModule")

LAYERS: dict[tuple[type[nn.Module], type[Form]], type[StoredModule]] = {}
"""(class of a dense layer, form) -> a class with a faster forward than the class that would be generated."""

is_compiling, is_jit_tracing = torch.compiler.is_compiling, torch._C._is_tracing  # called often: globals are faster


class Described(NamedTuple):
    """How one parameter is stored.

    Attributes:
        form: of the parts.
        rows: leading dimensions, as in the parts: of a transposed parameter those of its transpose.
        tail: dimensions of a row, likewise.
        dtype: of the ``StoredTensor``.
        text: the form as text for ``StoredParts`` in graphs; "" for 16 bits.
    """

    form: Form
    rows: tuple[int, ...]
    tail: tuple[int, ...]
    dtype: torch.dtype
    text: str

    @classmethod
    def of(cls, form: Form, rows: tuple[int, ...], tail: tuple[int, ...], dtype: torch.dtype) -> Described:
        """Describe a parameter."""
        return cls(form, rows, tail, dtype, form.text(math.prod(tail)) if isinstance(form, FourBitForm) else "")


class Kept(NamedTuple):
    """A cached stored tensor; valid while the module has these parameters (``sources``) at this address and dtype."""

    sources: tuple[Tensor, ...]
    address: int
    dtype: torch.dtype
    tensor: StoredTensor
    weight: Weight


_SHARED: WeakValueDictionary[tuple[int, ...], StoredTensor] = WeakValueDictionary()
"""Stored tensors by the ids of their parts, so that modules that share a weight return the same tensor."""


def is_exported() -> bool:
    """Whether torch.export or torch.jit.trace records a graph, which cannot contain tensor subclasses."""
    return is_exporting() if is_compiling() else is_jit_tracing()


def _shared(sources: tuple[Tensor, ...], address: int, dtype: torch.dtype) -> StoredTensor | None:
    """Return the stored tensor that another module has cached for the same parts, address and dtype; or None."""
    tensor = _SHARED.get(tuple(map(id, sources)))
    if tensor is None:
        return None
    own = tensor.__dict__
    same = own["made_of"] == (address, dtype) and all(a is b for a, b in zip(own["sources"], sources, strict=True))
    return tensor if same else None


def freeze(tensor: Tensor) -> nn.Parameter:
    """Return a parameter without gradient: ``tensor`` itself if it is one, so that shared weights stay shared."""
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


class StoredModule(nn.Module):
    """Base of all modules with stored parameters.

    Attributes:
        dense_class: the module's class before its parameters were stored.
        stored_names: names of the parameters for which the class has properties.
        form_class: class of the forms that the class is made for, as in ``LAYERS``.
        weight_error: ``relative_error`` of the stored weights; None if not known.
        chosen_because: why a ``Budget`` chose this form; "" for other techniques and in a loaded model.
    """

    dense_class: ClassVar[type[nn.Module]]
    stored_names: ClassVar[tuple[str, ...]] = ()
    form_class: ClassVar[type[Form]] = HalfForm
    weight_error: float | None = None
    chosen_because: str = ""
    _forms: dict[str, Described]
    _kept: dict[str, Kept]

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(_forms={}, _kept={})

    def store(self, name: str, weight: Weight, tail: tuple[int, ...], dtype: torch.dtype) -> None:
        """Set a parameter to a stored weight.

        If the parameter is stored already, ``transposed``, ``gathered`` and ``compute_dtype`` of its form stay.

        Args:
            name: of the parameter.
            weight: (*lead, columns).
            tail: the shape of a row.
            dtype: of the ``StoredTensor``.
        """
        old = self._forms[name].form if name in self._forms else None
        form, parts = described(weight) if old is None else described(weight, old.transposed, old.compute_dtype)
        if old is not None and old.gathered:
            order = cast(nn.Parameter, self._parameters[f"{name}_order"])
            form, parts = replace(cast(FourBitForm, form), gathered=True), (parts[0], order, parts[1])
        rows = tuple(weight.shape[: weight.dim() - len(tail)] if isinstance(weight, Tensor) else weight.shape[:-1])
        self._forms[name] = Described.of(form, rows, tuple(tail), dtype)
        self._parameters.update(parts_of(name, form, parts))
        self._kept.pop(name, None)

    @classmethod
    def attributes_of(cls, module: nn.Module) -> dict[str, Any]:
        """Return the attributes that an object of this class has beside those of the dense module it is made of."""
        return {}

    def stored_tensor(self, name: str) -> StoredTensor:
        """Return the stored tensor of a parameter; cached while the parts stay the same."""
        own = self.__dict__
        form, _, _, dtype, _ = one = own["_forms"][name]
        found = own["_parameters"]
        sources = tuple([_named(self, found, f"{name}_{part}") for part in form.parts])
        if is_recorded(*sources) or not all(isinstance(source, nn.Parameter) for source in sources):
            _refuse_batched(sources)
            made = _made(one, sources)
            return recorded_values(made) if is_exported() else made  # type: ignore[return-value]
        presented = sources[0].__dict__.get("presented_dtype", dtype)
        if presented is not dtype:  # another module that shares the weight was cast
            dtype = presented
            one = own["_forms"][name] = one._replace(dtype=dtype)
        known: Kept | None = own["_kept"].get(name)
        address = sources[-1].data_ptr()
        if (
            known is None
            or known.address != address
            or known.dtype is not dtype
            or any(a is not b for a, b in zip(known.sources, sources, strict=True))
        ):
            tensor = _shared(sources, address, dtype)
            if tensor is None:
                tensor = _made(one, sources)
                tensor.__dict__.update(sources=sources, made_of=(address, dtype))
                _SHARED[tuple(map(id, sources))] = tensor
            elif tensor.form.compute_dtype is not form.compute_dtype:  # each module has its own compute_dtype
                tensor = _multiplied_in(tensor, form.compute_dtype)
            rows = tuple(tensor.parts[0].shape[:-1])
            own["_forms"][name] = one._replace(rows=rows, tail=tensor.tail)  # ``weight.data =`` may add rows
            known = own["_kept"][name] = Kept(sources, address, dtype, tensor, tensor.stored)
        return known.tensor

    def stored_weight(self, name: str = "weight") -> Weight:
        """Return a stored parameter for products: (*lead, columns), over the module's own parameters."""
        return self.stored_tensor(name).stored

    @property
    def forms(self) -> Mapping[str, Form]:
        """The form of each stored parameter, by its name."""
        return {name: one.form for name, one in self._forms.items()}

    @property
    def dequantized_by(self) -> set[str]:
        """Names of the operators for which a stored parameter (not a vector) was dequantized so far."""
        weights = [one.tensor for one in self._kept.values() if one.tensor.dim() > 1]
        return {name for weight in weights for name in weight.dequantized_by}

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parameters that hold the parts of the stored parameters."""
        return tuple(f"{name}_{part}" for name, one in self._forms.items() for part in one.form.parts)

    @property
    def weight_count(self) -> int:
        """The number of weights of the module without its children, stored and dense."""
        parts = set(self.part_names)
        dense = sum(p.numel() for name, p in self._parameters.items() if p is not None and name not in parts)
        return dense + sum(self.stored_size(name) for name in self._forms)

    @property
    def element_counts(self) -> dict[str, int]:
        """The number of scales in each parameter that holds the bytes of scales."""
        return {
            f"{name}_scales": getattr(self, f"{name}_scales").numel() // one.form.scale_dtype.itemsize
            for name, one in self._forms.items()
            if isinstance(one.form, FourBitForm)
        }

    def stored_size(self, name: str) -> int:
        """Return the number of values of a stored parameter."""
        _, rows, tail, _, _ = self._forms[name]
        return torch.Size((*rows, *tail)).numel()

    def __setattr__(self, name: str, value: Any) -> None:
        forms = self.__dict__.get("_forms", {})
        value = getattr(value, "unadapted", value) if name in forms else value
        if name not in forms:
            if isinstance(value, sharded_types()) and name in self._parameters:
                self._parameters[name] = value  # type: ignore[assignment]  # as FSDP2 does in other modules
            else:
                super().__setattr__(name, value)
        elif isinstance(value, StoredTensor):
            _share(self, name, value)
        elif value is None or isinstance(value, nn.Parameter):
            become(self, restored_copy(self, {name: value}))
        else:  # the error that torch raises for a dense parameter
            raise TypeError(
                f"cannot assign {type(value).__name__} as parameter {name!r}, which is stored in {forms[name].form}: "
                "give a torch.nn.Parameter, or None; leave the module out with skip= if functional_call sets it"
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as torch does.

        Raises:
            RuntimeError: a tensor parallel plan would shard the module's parameters.
        """
        if isinstance(param, sharded_types()):
            raise RuntimeError(
                f"{type(self).__name__}.{name} cannot be cut by a plan of tensor parallelism (ColwiseParallel, "
                f"RowwiseParallel), which knows dense weights alone; this module stores {self._stored_text()}: leave "
                "it out of the plan, or share weights among processes with lowmem.shard(model)"
            )
        super().register_parameter(name, param)

    def _stored_text(self) -> str:
        return ", ".join(f"{name} in {one.form}" for name, one in self._forms.items())

    def requires_grad_(self: _M, requires_grad: bool = True) -> _M:
        """Freeze all parameters.

        Raises:
            RuntimeError: ``requires_grad`` is true, but stored parameters cannot train; the remedy is named.
        """
        if requires_grad:
            raise RuntimeError(
                f"{type(self).__name__} stores {self._stored_text()}, which is frozen: train an adapter "
                "(lowmem.LoRA), call requires_grad_() on other parameters alone, or make the module dense again "
                "first: lowmem.restore(model)"
            )
        return super().requires_grad_(False)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which calls this before it reads a module's code.

        Raises:
            RuntimeError: always; the remedy is named.
        """
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__} that stores {self._stored_text()}: take "
            "torch.jit.trace, torch.compile or torch.export, or make the model dense before, lowmem.restore(model)"
        )

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_forms", {}):
            form = self._forms[name].form
            raise AttributeError(f"{type(self).__name__}.{name} is stored in {form} and cannot be deleted: {REMEDY}")
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move parts between devices without changing their bits; a cast changes only the stored tensors' dtype."""
        for name, one in self._forms.items():
            first = getattr(self, f"{name}_{one.form.parts[0]}")
            before = first.__dict__.get("presented_dtype", one.dtype)
            cast = fn(torch.empty(0, dtype=before)).dtype
            cast = cast if cast.is_floating_point else before
            self._forms[name] = one._replace(dtype=cast)
            if cast is not before:  # seen by all modules that share the weight
                first.presented_dtype = cast
        kept = [getattr(self, name) for name in self.part_names]

        def guarded(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype != tensor.dtype and any(tensor is k for k in kept):
                return tensor.to(changed.device)
            return changed

        applied: nn.Module = super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]
        self._kept.clear()
        return applied

    def __getstate__(self) -> dict[str, Any]:
        own: Any = getattr(super(), "__getstate__", lambda: self.__dict__)()
        state = dict(own if isinstance(own, dict) else self.__dict__)
        for name in self._kept:
            self.stored_tensor(name)  # updates _forms if ``weight.data =`` has changed the number of rows
        for name, one in self._forms.items():
            first = self._parameters.get(f"{name}_{one.form.parts[0]}")
            dtype = one.dtype if first is None else first.__dict__.get("presented_dtype", one.dtype)
            self._forms[name] = one._replace(dtype=dtype)
        state.update(_kept={}, _forms=dict(self._forms))
        for name in ("_flat_weights", "_flat_weight_refs"):  # of recurrent layers: weak references to the parameters
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_forms=state["_forms"], _kept={})  # __setstate__ of the dense class may read parameters
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Reject dense weights and parts of another dtype or shape; accept the part names of older versions."""
        errors = rest[-1]  # error_msgs, which torch raises as one error
        before = len(errors)
        errors += _rename_old(self, state_dict, prefix)
        for name, (form, *_) in self._forms.items():
            if isinstance(state_dict.get(prefix + name), Tensor):
                errors.append(
                    f"{prefix}{name} is dense in the state, and stored in {form} here: load it before convert"
                )
            given_parts = [part for part in form.parts if f"{prefix}{name}_{part}" in state_dict]
            if given_parts and len(given_parts) < len(form.parts):  # new codes would be read with the old scales
                errors.append(f"{prefix}{name}: the state holds {', '.join(given_parts)} of {', '.join(form.parts)}")
            for part in form.parts:
                own, given = getattr(self, f"{name}_{part}"), state_dict.get(f"{prefix}{name}_{part}")
                if not isinstance(given, Tensor):
                    continue
                if given.dtype != own.dtype:
                    errors.append(f"{prefix}{name}_{part} stores {own.dtype}; the state holds {given.dtype}")
                elif given.shape != own.shape:  # torch checks this too late: it would have loaded the other parts
                    shapes = f"{tuple(own.shape)}; the state holds {tuple(given.shape)}"
                    errors.append(f"{prefix}{name}_{part} has shape {shapes}")
                elif part == "order":
                    try:
                        check_order(given, f"{prefix}{name}_{part}")
                    except ValueError as reason:
                        errors.append(str(reason))
        if len(errors) == before:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        """Return the dense class's description, and how the parameters are stored."""
        forms = {str(one.form): name for name, one in self._forms.items()}
        how = next(iter(forms)) if len(forms) == 1 else "; ".join(f"{name}: {form}" for form, name in forms.items())
        return ", ".join(text for text in (super().extra_repr(), f"stored in {how}") if text)


def multiplied_in(module: StoredModule, name: str = "weight") -> torch.dtype | None:
    """Return the ``compute_dtype`` of a stored parameter; of a ``LAYERS`` layer, the layer's own."""
    form = module._forms[name].form
    if isinstance(module, tuple(LAYERS.values())):  # its bias is stored in 16 bits alone, which have none
        return getattr(module, "compute_dtype", form.compute_dtype)
    return form.compute_dtype


def kept_weight(module: StoredModule) -> QuantizedTensor | None:
    """Return a module's cached 4- or 8-bit weight; None if there is none, or it is stale.

    Layers read it at each call, but not under torch.compile or torch.jit.trace, which would record its tensors.
    """
    known = module._kept.get("weight")
    if known is None:
        return None
    (packed, *_, scales), address, _, _, weight = known
    found = module._parameters
    same = packed is found.get("weight_packed") and scales is found.get("weight_scales")
    return weight if same and address == scales.data_ptr() else None  # type: ignore[return-value]


class FourBitStorage(StoredModule):
    """Base of all modules with parameters in 4 or 8 bits.

    The state_dict names the formats, and loading codes of another format is an error.
    """

    form_class: ClassVar[type[Form]] = FourBitForm

    @property
    def formats(self) -> str:
        """The forms of the 4- and 8-bit parameters as text: that of ``weight`` alone, or all with their names."""
        texts = {name: str(one.form) for name, one in self._forms.items() if isinstance(one.form, FourBitForm)}
        return (
            texts["weight"]
            if [*texts] == ["weight"]
            else "; ".join(f"{name}: {text}" for name, text in texts.items())
        )

    @property
    def _version(self) -> Any:  # type: ignore[override]
        """The version that torch writes into a state_dict's metadata: the formats, unless the class has its own."""
        own = self.dense_class._version
        return self.formats if own == nn.Module._version else own

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor of the layer's own parameters, not copied."""
        if not is_compiling() and not is_jit_tracing():
            kept = kept_weight(self)
            if kept is not None:
                return kept
            self._weight_form  # noqa: B018 - raises an AttributeError where there is no such weight
            return self.stored_weight("weight")  # type: ignore[return-value]
        return self._parts()  # type: ignore[return-value]

    def _parts(self) -> StoredParts:
        """Return ``quantized`` in the form that torch.compile and torch.jit.trace can record."""
        found = self._parameters
        packed, scales = _named(self, found, "weight_packed"), _named(self, found, "weight_scales")
        return StoredParts(packed, scales, self._forms["weight"].text)

    @property
    def packed(self) -> nn.Parameter:
        """The codes of the weight."""
        return self.weight_packed  # type: ignore[return-value]

    @property
    def scales(self) -> Tensor:
        """The scales of the weight, a view of ``weight_scales`` in their dtype."""
        return self.quantized.scales

    @property
    def format(self) -> str:
        """The format of the weight, a key of ``FORMATS`` or ``IMPORTED``."""
        return self._weight_form.format

    @property
    def block_size(self) -> int:
        """Weights per scale."""
        return self._weight_form.block_size

    @property
    def scale_encoding(self) -> str:
        """The encoding of the scales, a key of ``ENCODINGS``."""
        return self._weight_form.scale_encoding

    @property
    def _weight_form(self) -> FourBitForm:
        form = self._forms["weight"].form if "weight" in self._forms else None
        if not isinstance(form, FourBitForm):
            raise AttributeError(f"{type(self).__name__} has no weight in 4 bits")
        return form

    def get_extra_state(self) -> Any:
        """Return the formats as text in a uint8 tensor, which safetensors can hold, and the class's own state."""
        text = torch.tensor(list(self.formats.encode()), dtype=torch.uint8, device="cpu")
        return {"formats": text, "own": super().get_extra_state()} if _has_extra_state(self) else text

    def set_extra_state(self, state: Any) -> None:
        """Check the formats, and set the class's own state.

        Raises:
            ValueError: the state has other formats.
        """
        found = _formats_of(state.get("formats") if isinstance(state, dict) else state, self.formats)
        if found != self.formats:
            raise ValueError(f"the layer stores {self.formats}; the state holds {show(found)}")
        if _has_extra_state(self):
            super().set_extra_state(state["own"])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Reject codes of another format; warn if the state names no format, as in states of older versions."""
        key, own = prefix + _EXTRA_STATE_KEY_SUFFIX, self.formats
        missing, errors = rest[-3], rest[-1]
        found = local_metadata.get("version")  # older versions had the format there
        if key in state_dict:
            state = state_dict[key]
            text = state.get("formats") if isinstance(state, dict) and _has_extra_state(self) else state
            found = _formats_of(text, own if found is None else found)
        if isinstance(found, str) and found != own:
            errors.append(f"{prefix.rstrip('.') or 'the layer'} stores {own}; the state holds {found}")
            return
        coded = {prefix + name for name in self.part_names} | {prefix + name for name in file_names(self).values()}
        if not isinstance(found, str) and coded & state_dict.keys():
            bits = 8 if issubclass(self.form_class, EightBitForm) else 4
            warnings.warn(
                f"nothing in the state says how its {bits}-bit codes are stored: they are taken for {own}, and are "
                "noise if they are not; load what this version's state_dict() gives, or a file with lowmem.load",
                UserWarning,
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if key in missing and not _has_extra_state(self):
            missing.remove(key)


def _has_extra_state(module: StoredModule) -> bool:
    return module.dense_class.get_extra_state is not nn.Module.get_extra_state


def _formats_of(state: Any, unread: object) -> object:
    """Return the formats in an extra state; ``unread`` if it is a meta or fake tensor, without values."""
    if isinstance(state, Tensor) and (state.is_meta or isinstance(state, FakeTensor)):
        return unread
    if isinstance(state, Tensor) and state.dtype == torch.uint8 and state.dim() == 1:
        return bytes(state.tolist()).decode(errors="replace")
    return f"something else than a format ({type(state).__name__})"


def format_keys(model: nn.Module) -> set[str]:
    """Return the state_dict keys that hold only formats; files keep formats in their metadata instead."""
    layers = model.named_modules(remove_duplicate=False)
    return {
        f"{path}.{_EXTRA_STATE_KEY_SUFFIX}".lstrip(".")
        for path, module in layers
        if isinstance(module, FourBitStorage) and not _has_extra_state(module)
    }


def file_names(module: StoredModule) -> dict[str, str]:
    """Return the names that a module's parts have in files (``docs/format.md``) and in states of older versions."""
    names = {}
    for name, (form, *_) in module._forms.items():
        for part in form.parts:
            short = name if part == "rounded" else part if name == "weight" else f"{name}_{part}"
            names[f"{name}_{part}"] = short
    return names


def dense_bytes(module: StoredModule) -> dict[str, int]:
    """Return, by part, the bytes of the dense weight that it replaces: all for a parameter's first part, else 0."""
    sizes: dict[str, int] = {}
    for name, (form, _, _, dtype, _) in module._forms.items():
        sizes |= {f"{name}_{part}": 0 for part in form.parts}
        sizes[f"{name}_{form.parts[0]}"] = module.stored_size(name) * dtype.itemsize
    return sizes


def _rename_old(module: StoredModule, state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Rename the parts in a state of an older version; return error messages for those that do not fit."""
    errors = []
    for name, old in file_names(module).items():
        given, own = state_dict.get(prefix + old), getattr(module, name)
        if old == name or not isinstance(given, Tensor) or prefix + name in state_dict or _has(module, old):
            continue
        if name.endswith("_rounded") and given.dtype != own.dtype:
            continue  # a dense weight
        if name.endswith("_scales"):
            own = module.stored_weight("weight").scales  # type: ignore[union-attr]
            if given.dtype != own.dtype:
                errors.append(f"{prefix}{old} stores {own.dtype}; the state holds {given.dtype}")
        state_dict[prefix + name] = as_part(state_dict.pop(prefix + old), name)
    return errors


def _has(module: nn.Module, name: str) -> bool:
    return name in module._parameters or name in module._buffers or name in module._modules


def as_part(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor of an older state or file as the part ``name``: scales are viewed as their bytes."""
    return tensor.view(torch.uint8) if name.endswith("_scales") and tensor.dtype != torch.uint8 else tensor


def described(
    weight: Weight, transposed: bool = False, compute_dtype: torch.dtype | None = None
) -> tuple[Form, tuple[nn.Parameter, ...]]:
    """Return the form of a weight, and its parts as frozen parameters, cached with the weight."""
    if not isinstance(weight, QuantizedTensor):
        return HalfForm(weight.dtype), (freeze(weight),)
    parts = weight.cache.get("parts")
    if parts is None:
        parts = weight.cache["parts"] = tuple(map(freeze, FourBitForm.split(weight)))
    return replace(FourBitForm.of(weight), transposed=transposed, compute_dtype=compute_dtype), parts


def parts_of(name: str, form: Form, parts: tuple[nn.Parameter, ...]) -> dict[str, nn.Parameter]:
    """Return the parts of a parameter by their names."""
    return {f"{name}_{part}": tensor for part, tensor in zip(form.parts, parts, strict=True)}


def _named(module: nn.Module, parameters: Mapping[str, Any], name: str) -> Tensor:
    found = parameters.get(name)
    if found is None:
        found = getattr(module, name)  # moved out of _parameters, by a parametrization or torch.func
    return found  # type: ignore[no-any-return]


def _made(one: Described, sources: tuple[Tensor, ...]) -> StoredTensor:
    """Return a stored tensor over a module's parameters.

    Raises:
        RuntimeError: their shapes do not fit the parameter's shape.
    """
    parts, rows = sources, one.rows
    if isinstance(one.form, HalfForm):
        if tuple(sources[0].shape) != (*rows, *one.tail) and not is_recorded(*sources):
            raise RuntimeError(
                f"rounded.shape={tuple(sources[0].shape)} does not hold a weight of {(*rows, *one.tail)}"
            )
        parts = tuple(part.flatten(len(rows)) if len(one.tail) > 1 else part for part in sources)
    elif any(tuple(part.shape[:-1]) != rows for part in (parts[0], parts[-1])) and not is_recorded(*sources):
        # Of codes or of scales: what lies between them, the order of a gathered weight, has no rows.
        weight = one.form.join(parts, torch.Size(one.tail).numel())
        replace(weight, shape=torch.Size((*rows, weight.shape[-1]))).check_layout()
    kind = GatheredTensor if one.form.gathered else StoredTensor
    tensor = kind(one.form, parts, one.tail, one.dtype, swapped=one.form.transposed)
    tensor._is_param = True  # isinstance(weight, nn.Parameter) holds
    return tensor


def _multiplied_in(tensor: StoredTensor, dtype: torch.dtype | None) -> StoredTensor:
    """Return a stored tensor of the same parts whose products are computed in another dtype."""
    form = replace(cast(FourBitForm, tensor.form), compute_dtype=dtype)
    made = type(tensor)(form, tensor.parts, tensor.tail, tensor.dtype, swapped=tensor.swapped)
    made.__dict__.update({name: tensor.__dict__[name] for name in ("sources", "made_of")})
    made._is_param = True
    return made


def _refuse_batched(sources: tuple[Tensor, ...]) -> None:
    """Refuse weights that are stacked for torch.func.vmap.

    Raises:
        RuntimeError: one is; the remedy is named.
    """
    if not is_compiling() and any(torch._C._functorch.is_batchedtensor(source) for source in sources):
        raise RuntimeError(
            "torch.func.vmap cannot compute with a stack of stored weights: call one model after the other, or make "
            "them dense before stack_module_state: lowmem.restore(model)"
        )


def _share(module: StoredModule, name: str, tensor: StoredTensor) -> None:
    """Set a parameter to a stored tensor of another module; both modules then share its parts.

    Raises:
        RuntimeError: the tensor is a transposed view.
    """
    if tensor.swapped != tensor.form.transposed:
        raise RuntimeError(
            f"{name} = weight.T: a transposed stored weight cannot be shared: give weight.dequantize()"
        )
    parts = tensor.__dict__.get("sources", tensor.parts)
    old = module._forms[name].form
    if type(old) is not type(tensor.form):
        _change_class(module, name, tensor)
    for part in old.parts:
        module._parameters.pop(f"{name}_{part}", None)
    module._forms[name] = Described.of(tensor.form, tuple(tensor.parts[0].shape[:-1]), tensor.tail, tensor.dtype)
    module._parameters.update(parts_of(name, tensor.form, tuple(map(freeze, parts))))
    module._kept.pop(name, None)


def _change_class(module: StoredModule, name: str, tensor: StoredTensor) -> None:
    """Change a module's class to the one for the form of ``tensor``, which becomes the parameter ``name``."""
    shapes = {one: module.stored_tensor(one) for one in module.forms}
    empty = {one: freeze(torch.empty(own.shape, dtype=own.dtype, device="meta")) for one, own in shapes.items()}
    dense = restored_copy(module, empty)
    weights = {one: own.stored for one, own in shapes.items() if one != name} | {name: tensor.stored}
    become(module, stored_copy(dense, weights, compute_dtype=None))


def _refuse_in_dense(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Refuse to register a stored tensor as a parameter of a dense module.

    Raises:
        RuntimeError: ``parameter`` is a stored tensor; the remedy is named.
    """
    if isinstance(parameter, StoredTensor):
        raise RuntimeError(
            f"{type(module).__name__}.{name} cannot hold a weight that is stored in {parameter.form}: convert both "
            f"modules, so that they share it; or {REMEDY}"
        )


register_module_parameter_registration_hook(_refuse_in_dense)


# Classes


def kind_of(kinds: Container[type[Form]]) -> type[Form]:
    """Return the ``form_class`` of a module whose parameters have these forms: 4 bits before 8 before 16."""
    return next((kind for kind in (FourBitForm, EightBitForm) if kind in kinds), HalfForm)


def _stored_class(dense: Any, names: tuple[str, ...], form: Any) -> type[StoredModule]:
    """Return the class of modules of class ``dense`` whose parameters ``names`` are stored."""
    known = LAYERS.get((dense, form))
    if known is not None and "weight" in names and set(names) <= set(known.stored_names):
        return known
    base = FourBitStorage if issubclass(form, FourBitForm) else StoredModule
    body: dict[str, Any] = {name: stored_property(name) for name in names}
    body |= {
        "dense_class": dense,
        "stored_names": names,
        "form_class": form,
        "__module__": dense.__module__,
        "__qualname__": dense.__qualname__,
        "__doc__": dense.__doc__,
        "__reduce_ex__": lambda module, _: (_empty, (dense, names, form), module.__getstate__()),
    }
    if issubclass(dense, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, lambda module, weights: None)
    return type(dense.__name__, (base, dense), body)


stored_class: Callable[[Any, tuple[str, ...], Any], type[StoredModule]] = cache(_stored_class)


def stored_property(name: str) -> property:
    """Return a property for a stored parameter ``name``."""

    def get(module: StoredModule) -> Any:
        if name in module.__dict__["_forms"]:
            return module.stored_tensor(name)
        found = module._parameters.get(name)
        return module.__dict__.get(name) if found is None else found  # a plain tensor that a hook has set

    def put(module: StoredModule, value: Any) -> None:
        module.__dict__[name] = value

    return property(get, put, doc=f"The parameter ``{name}``: a StoredTensor.")


def _flat_weights(module: Any) -> list[Any]:
    return [getattr(module, name) for name in module.__dict__["_flat_weights_names"]]


leave_to_eager(_flat_weights)  # torch.compile runs recurrent layers eagerly, too


def _empty(dense: type[nn.Module], names: tuple[str, ...], form: type[Form]) -> StoredModule:
    made = stored_class(dense, names, form)
    return made.__new__(made)


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


def stored_copy(
    module: nn.Module,
    weights: Mapping[str, Weight],
    *,
    transposed: Container[str] = (),
    computed_in: torch.dtype | None = None,
    **attributes: Any,
) -> StoredModule:
    """Return a copy of a module in which parameters are stored; it has no hooks, and shares everything else.

    Args:
        module: dense.
        weights: for each parameter to store: (*lead, columns), with the leading dimensions of the parameter.
        transposed: names of the parameters that are stored with their last two dimensions transposed.
        computed_in: dtype of products with the stored tensors; None or torch.int8: the dtype of the input.
        **attributes: further attributes of the copy.

    Raises:
        ValueError: the module has attributes that a stored module has, too.
    """
    dtype = None if computed_in is torch.int8 else computed_in
    forms = {name: described(weight, name in transposed, dtype) for name, weight in weights.items()}
    kinds = {type(form) for form, _ in forms.values()}
    plain = getattr(type(module), "_plain_class", type(module))
    made = stored_class(plain, tuple(weights), kind_of(kinds))
    _refuse_collisions(module, made, forms)
    copied = copied_module(module, _with_adapters_of(module, made))
    described_by: dict[str, Described] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        if name not in forms:
            parameters[name] = parameter
            continue
        assert parameter is not None
        form, parts = forms[name]
        lead = leading_dims(module, parameter)
        shape = tuple(parameter.mT.shape if form.transposed else parameter.shape)
        described_by[name] = Described.of(form, shape[:lead], shape[lead:], parameter.dtype)
        if isinstance(form, HalfForm) and parts[0].shape != parameter.shape:
            parts = (freeze(parts[0].view(parameter.shape)),)
        parameters |= parts_of(name, form, parts)
    copied.__dict__.update(
        _parameters=parameters, _forms=described_by, _kept={}, **made.attributes_of(module), **attributes
    )
    if isinstance(module, nn.RNNBase):
        copied.__dict__.pop("_flat_weights", None)
    return copied  # type: ignore[return-value]


def _refuse_collisions(module: nn.Module, made: type[nn.Module], forms: Mapping[str, Any]) -> None:
    """Refuse a module with attributes that the stored module's class, or its parts, would hide.

    Raises:
        ValueError: there are such attributes; they are named.
    """
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    parts = {f"{name}_{part}" for name, (form, _) in forms.items() for part in form.parts}
    base = FourBitStorage if issubclass(made, FourBitStorage) else StoredModule
    added = {name for name in dir(base) if not hasattr(nn.Module, name) and not name.startswith("__")}
    hidden = (own & (added | parts)) | {name for name in added if hasattr(type(module), name)}
    if hidden:
        raise ValueError(
            f"{type(module).__name__} has {', '.join(sorted(hidden))} of its own, which a module with stored "
            "parameters has, too: rename it, or leave the module out with skip="
        )


def leading_dims(module: nn.Module, parameter: Tensor) -> int:
    """Return the number of leading dimensions of a parameter: 1 for convolutions, and else all but the last."""
    dims = parameter.dim()
    if isinstance(module, (nn.modules.conv._ConvNd, ParametrizationList)) and dims > 1:
        return 1
    return max(0, dims - 1)


def restored_copy(module: StoredModule, values: Mapping[str, Tensor | None]) -> nn.Module:
    """Return a copy of a module in which the parameters in ``values`` are dense; of the dense class if all are."""
    left = {name: one for name, one in module._forms.items() if name not in values}
    names = tuple(name for name in module.stored_names if name in left)
    kinds = {type(one.form) for one in left.values()}
    made = module.dense_class
    if names:
        made = stored_class(module.dense_class, names, kind_of(kinds))
    copied = copied_module(module, _with_adapters_of(module, made))
    parameters: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        owner = next(
            (one for one in values if name in [f"{one}_{part}" for part in module._forms[one].form.parts]), None
        )
        if owner is None:
            parameters[name] = parameter
        elif owner not in parameters:
            value = values[owner]
            parameters[owner] = value if value is None or isinstance(value, nn.Parameter) else freeze(value)
    copied.__dict__["_parameters"] = parameters
    for name in ("_forms", "_kept", "weight_error", "chosen_because"):
        copied.__dict__.pop(name, None)
    if names:
        copied.__dict__.update(_forms=left, _kept={})
    if isinstance(copied, nn.RNNBase) and not names:
        copied.__dict__["_flat_weights"] = _flat_weights(copied)
    return copied


def _with_adapters_of(module: nn.Module, made: type[nn.Module]) -> type[nn.Module]:
    """Return the class ``made``; if the module has adapters, its subclass with adapters."""
    over: Callable[[type[nn.Module]], type[nn.Module]] | None = getattr(type(module), "_over", None)
    return made if over is None else over(made)


def copied_module(module: nn.Module, made: type[nn.Module]) -> nn.Module:
    """Return a shallow copy of a module as an object of class ``made``, without its hooks."""
    copied = made.__new__(made)
    copied.__dict__.update(module.__dict__)
    for name in {slot for kind in type(module).__mro__ for slot in getattr(kind, "__slots__", ())}:
        if name != "__dict__" and name != "__weakref__" and hasattr(module, name):
            object.__setattr__(copied, name, getattr(module, name))
    for name in (*HOOKS, "_buffers", "_modules"):
        value = module.__dict__[name]
        copied.__dict__[name] = type(value)() if name in HOOKS else type(value)(value)
    return copied


def become(module: nn.Module, other: nn.Module) -> None:
    """Give a module, in place, the class and attributes of ``other``, a copy of it that has other parameters.

    Its hooks, mode, children and buffers stay.
    """
    own = module.__dict__
    final = {**other.__dict__, **{name: own[name] for name in (*HOOKS, "training", "_modules", "_buffers")}}
    # In between, the attributes of both classes exist, for calls by other threads; those under way may still fail.
    both = {**own, **final, "_parameters": {**own["_parameters"], **final["_parameters"]}}
    object.__setattr__(module, "__dict__", both)
    module.__class__ = other.__class__
    object.__setattr__(module, "__dict__", final)
