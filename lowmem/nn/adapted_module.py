"""Modules with adapters on parameters: generated subclasses of the modules' own classes.

While an adapter is active, ``module.weight`` is an ``AdaptedWeight``. The module stays the same object and an
instance of its class, with its attributes, methods, hooks and children. So this works for modules that are called,
and for those whose parameters other code reads: attention, experts, GPT-2's ``Conv1D``, embeddings, convolutions. The
adapters are in the child ``adapters``. ``LoRALinear`` is a faster equivalent for plain linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn

from lowmem.kernels.torch_versions import leave_to_eager
from lowmem.nn.adapted_weight import adapted_weight
from lowmem.nn.adapter import Adapter
from lowmem.nn.lora import Folded, LoRALinear, refuse_script
from lowmem.nn.low_rank_sum import LowRankSum
from lowmem.nn.stored import StoredTensor
from lowmem.nn.stored_module import (
    LAYERS,
    StoredModule,
    become,
    copied_module,
    freeze,
    restored_copy,
    stored_class,
)
from lowmem.quant.quantize import relative_error, requantize
from lowmem.quant.rounding import round_to
from lowmem.quant.tensor import QuantizedTensor

__all__ = [
    "AdaptedModule",
    "AdapterBank",
    "adapted_copy",
    "adapted_parameters",
    "bank_of",
    "base_of",
    "fold_layer",
    "parameter_of",
    "put_in_place",
    "share_table",
    "share_tied_adapters",
    "table_of",
    "without_adapters",
]


class AdapterBank(nn.Module):
    """The adapters of a module, by name and then by the parameter that they change.

    Attributes:
        active: names of the adapters that are applied; the others cost no time.
        merged: name of the adapter that is merged into ``merged_base``, or None.
        merged_base: a module with merged copies of the parameters that this adapter changes. It is not a child, so
            the state_dict does not contain it.
    """

    active: tuple[str, ...]
    merged: str | None
    merged_base: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.active, self.merged = (), None
        self.__dict__["merged_base"] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return tuple(self._modules)

    @property
    def in_use(self) -> tuple[str, ...]:
        """The adapters that contribute to the output, active or merged, in the order in which they were added."""
        return tuple(name for name in self._modules if name in self.active or name == self.merged)

    def parts(self, name: str) -> dict[str, Adapter]:
        """Return the adapters of a name, by the parameter that each changes; {} for an unknown name."""
        found = self._modules.get(name)
        return {} if found is None else cast("dict[str, Adapter]", dict(found._modules))

    def add_parts(self, name: str, parts: Mapping[str, Adapter]) -> None:
        """Add adapters to a name, which may already have some of other parameters, and activate it."""
        if name not in self._modules:
            self._modules[name] = nn.Module()
        for parameter, adapter in parts.items():
            self._modules[name]._modules[parameter] = adapter.train(self.training)  # type: ignore[union-attr]
        if name not in self.active:
            self.active += (name,)

    def replace_part(self, name: str, parameter: str, adapter: Adapter) -> None:
        """Replace the adapter of a parameter."""
        self._modules[name]._modules[parameter] = adapter  # type: ignore[union-attr]

    def remove(self, name: str) -> None:
        """Remove the adapters of a name."""
        self.active = tuple(other for other in self.active if other != name)
        del self._modules[name]

    def merge(self, name: str, folded: nn.Module) -> None:
        """Use the parameters that the adapter ``name`` changes from ``folded``, instead of the module's own."""
        changed = self.parts(name)
        kept = copied_module(folded, type(folded))
        own = kept.__dict__
        own.update(_modules={}, _buffers={})
        if isinstance(kept, StoredModule):
            own.update(_forms={one: form for one, form in kept._forms.items() if one in changed}, _kept={})
        names = {*changed, *(kept.part_names if isinstance(kept, StoredModule) else ())}
        own["_parameters"] = {one: value for one, value in folded._parameters.items() if one in names}
        self.__dict__["merged_base"], self.merged = kept, name

    def unmerge(self) -> None:
        """Use the module's own parameters again."""
        self.merged = self.__dict__["merged_base"] = None

    def weight(self, module: nn.Module, name: str) -> Any:
        """Return a parameter of a module with its active adapters; without any, the parameter itself."""
        own = self.__dict__
        merged = own["merged_base"]
        done = own["merged"] if merged is not None else None
        base = parameter_of(module, name)
        if done is not None and name in self.parts(done):
            base = parameter_of(merged, name)
        active = [self.parts(one) for one in own["active"] if one != done]
        parts = [one[name] for one in active if name in one]
        if not parts or base is None:
            return base
        return adapted_weight(base, [part.update() for part in parts], parts[0].layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.merged_base is not None:
            self.merged_base._apply(fn)
        applied: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def extra_repr(self) -> str:
        """Describe which adapters are active and merged."""
        return f"active={', '.join(self.active) or None}, merged={self.merged}"


class AdaptedModule(nn.Module):
    """Base of all modules with adapters on parameters.

    Attributes:
        _plain_class: the module's class without adapters.
        _adapted_names: names of the parameters that can have adapters.
    """

    _plain_class: ClassVar[type[nn.Module]]
    _adapted_names: ClassVar[tuple[str, ...]] = ()
    adapters: AdapterBank

    @classmethod
    def _over(cls, plain: type[nn.Module]) -> type[nn.Module]:
        """Return the class with the same adapters over ``plain``, another class, whose parameters differ in form."""
        return adapted_class(plain, cls._adapted_names)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


def parameter_of(module: nn.Module, name: str) -> Any:
    """Return a parameter of a module, dense or stored, without adapters."""
    own = module.__dict__
    if isinstance(module, StoredModule) and name in own["_forms"]:
        return module.stored_tensor(name)
    parameters = own["_parameters"]  # in a scripted module not a dict, and without get()
    found = parameters[name] if name in parameters else None  # noqa: SIM401
    return own.get(name) if found is None else found  # a plain tensor that a hook has set


def _adapted_class(plain: Any, names: tuple[str, ...]) -> type[AdaptedModule]:
    """Return the class of modules of class ``plain`` with adapters on the parameters ``names``."""
    body: dict[str, Any] = {name: _adapted_property(name) for name in names}
    body |= {
        "_plain_class": plain,
        "_adapted_names": names,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": _reduce,
    }
    if plain in LAYERS.values():  # its forward reads the parts; the dense class's forward reads the weight property
        body["__module__"] = plain.dense_class.__module__  # for torch.fx, it is a leaf as torch's own layers are
        convolves = issubclass(plain, nn.modules.conv._ConvNd)
        body["forward"] = _adapted_convolution(plain) if convolves else plain.dense_class.forward
    return type(plain.__name__, (AdaptedModule, plain), body)


adapted_class: Callable[[Any, tuple[str, ...]], type[AdaptedModule]] = cache(_adapted_class)


def _adapted_property(name: str) -> property:
    def get(module: nn.Module) -> Any:
        bank = module.__dict__["_modules"].get("adapters")
        return parameter_of(module, name) if bank is None else bank.weight(module, name)

    leave_to_eager(get)  # a graph of its own, after a graph break, could not return the weight

    def put(module: nn.Module, value: Any) -> None:
        module.__dict__[name] = value

    return property(get, put, doc=f"The parameter ``{name}``, with the active adapters.")


def _adapted_convolution(plain: Any) -> Callable[[Any, Tensor], Tensor]:
    """Return a forward that convolves with the stored kernel, as without adapters, and adds the adapters' output."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if self.adapters.merged_base is not None:
            out: Tensor = plain.dense_class.forward(self, input)
            return out
        out, weight = plain.forward(self, input), self.weight
        return self._conv_forward(input, weight.added_to(out), None) if isinstance(weight, LowRankSum) else out

    return forward


def _reduce(module: AdaptedModule, protocol: Any) -> Any:
    plain: Any = type(module)._plain_class
    how: Any = plain
    if issubclass(plain, StoredModule):
        how = plain.dense_class, plain.stored_names, plain.form_class
    state: Any = getattr(module, "__getstate__", lambda: module.__dict__)()
    return _empty, (how, type(module)._adapted_names), dict(state)


def _empty(how: Any, names: tuple[str, ...]) -> nn.Module:
    made = adapted_class(stored_class(*how) if isinstance(how, tuple) else how, names)
    return made.__new__(made)


def adapted_copy(module: nn.Module, names: Iterable[str], name: str, parts: Mapping[str, Adapter]) -> AdaptedModule:
    """Return a copy of a module with adapters; it has no hooks, and shares everything else.

    Args:
        module: without adapters.
        names: of the parameters that can have adapters.
        name: of the adapters.
        parts: the adapters, by the parameter that each changes.

    Raises:
        ValueError: the module has an attribute ``adapters`` of its own.
    """
    if hasattr(module, "adapters"):
        raise ValueError(
            f"{type(module).__name__} has an attribute `adapters` of its own, which a module with adapters has, too: "
            "rename it, or leave the module out with skip="
        )
    made = adapted_class(type(module), tuple(names))
    copied = cast(AdaptedModule, copied_module(module, made))
    bank = AdapterBank().train(module.training)
    bank.add_parts(name, parts)
    copied._modules["adapters"] = bank
    own = copied.__dict__
    own["_load_state_dict_post_hooks"] = type(own["_load_state_dict_post_hooks"])(own["_load_state_dict_post_hooks"])
    copied.register_load_state_dict_post_hook(_remerge)  # type: ignore[no-untyped-call]
    return copied


def without_adapters(module: AdaptedModule) -> nn.Module:
    """Return a copy of a module without its adapters; it has no hooks, and shares everything else."""
    copied = copied_module(module, type(module)._plain_class)
    copied._modules.pop("adapters")
    hooks = copied.__dict__["_load_state_dict_post_hooks"]
    kept = [(key, hook) for key, hook in hooks.items() if hook is not _remerge]
    copied.__dict__["_load_state_dict_post_hooks"] = type(hooks)(kept)
    return copied


def table_of(module: nn.Module) -> int | None:
    """Return the id of an embedding's table, or of the first of its parts; None for other modules."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None
    return next((id(one) for name, one in module._parameters.items() if name.startswith("weight")), None)


def share_table(module: nn.Module, other: nn.Module) -> None:
    """Make an embedding, in place, use the table of another embedding."""
    tables = {name: one for name, one in other._parameters.items() if name.startswith("weight")}
    module.__dict__["_parameters"] = {**module._parameters, **tables}
    if isinstance(module, StoredModule):
        module.__dict__["_kept"] = {}


def share_tied_adapters(modules: Iterable[nn.Module]) -> None:
    """Let embeddings that share a table also share its adapters, if these have the same name and technique.

    It is not known which of the embeddings is called: T5 calls the encoder's and the decoder's, but not ``shared``.
    """
    known: dict[Any, Adapter] = {}
    for module in modules:
        table = table_of(module)
        if table is None or not isinstance(module, AdaptedModule):
            continue
        for name in module.adapters.names:
            for parameter, adapter in module.adapters.parts(name).items():
                module.adapters.replace_part(
                    name, parameter, known.setdefault((table, name, parameter, adapter.technique), adapter)
                )


def put_in_place(module: nn.Module, other: nn.Module) -> None:
    """Give a module, in place, the class and attributes of ``other``, a copy of it with or without adapters.

    Its hooks, mode and other children stay.
    """
    adapted = isinstance(module, AdaptedModule)
    become(module, other)
    children = module.__dict__["_modules"]
    if isinstance(other, AdaptedModule):
        children["adapters"] = other._modules["adapters"]
    elif adapted:
        children.pop("adapters", None)


def _remerge(module: AdaptedModule, _: object) -> None:
    """After a state_dict was loaded, merge the merged adapter again, from the new values."""
    bank = module.adapters
    if bank.merged is not None:
        name = bank.merged
        bank.unmerge()  # stays unmerged if the loaded values cannot be merged
        bank.merge(name, fold_module(module, [name]).layer)


# Functions for both LoRALinear and AdaptedModule


def bank_of(layer: nn.Module) -> Any:
    """Return the object that holds a layer's adapters: the LoRALinear itself, an AdapterBank, or None."""
    if isinstance(layer, LoRALinear):
        return layer
    return layer.adapters if isinstance(layer, AdaptedModule) else None


def base_of(layer: nn.Module) -> nn.Module:
    """Return the base of a LoRALinear, and any other module itself."""
    return layer.base if isinstance(layer, LoRALinear) else layer


def fold_layer(layer: nn.Module, names: Iterable[str], to: torch.dtype | None = None) -> Folded:
    """Return a copy of a layer's base with adapters merged into its weights. The layer does not change.

    Parameters whose adapters change nothing keep their bytes.

    Args:
        layer: with adapters.
        names: of the adapters to merge.
        to: dtype of a dense copy; None: parameters are stored in the same form as in the base.

    Raises:
        ValueError: an adapted weight is not finite, or exceeds the range of the dtype or scales.
    """
    if isinstance(layer, LoRALinear):
        return layer.folded(names, to)
    assert isinstance(layer, AdaptedModule)
    return fold_module(layer, names, to)


def fold_module(module: AdaptedModule, names: Iterable[str], to: torch.dtype | None = None) -> Folded:
    """Return a copy of a module without adapters, with those of ``names`` merged into its parameters.

    Raises:
        ValueError: as ``fold_layer``.
    """
    names = list(names)
    base = without_adapters(module)
    dense: dict[str, Tensor] = {}
    made: dict[str, Any] = {}
    errors: dict[str, tuple[float, float]] = {}
    for parameter in dict.fromkeys(one for name in names for one in module.adapters.parts(name)):
        own = parameter_of(module, parameter)
        stored: Any = own.stored if isinstance(own, StoredTensor) else own.detach()
        adapted = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.detach()
        added = [part for name in names if (part := module.adapters.parts(name).get(parameter)) is not None]
        added = [part for part in added if not part.changes_nothing()]
        swapped = isinstance(own, StoredTensor) and own.swapped  # stored as the parameter's transpose
        for part in added:
            adapted = adapted + (part.delta().mT if swapped else part.delta()).reshape(adapted.shape)
        if to is not None:
            new: Any = round_to(adapted, to, parameter)
            dense[parameter] = new.mT.contiguous() if swapped else new
        elif isinstance(stored, QuantizedTensor):
            new = made[parameter] = requantize(stored, adapted) if added else stored
        else:
            new = made[parameter] = round_to(adapted, stored.dtype, parameter) if added else stored
        errors[parameter] = relative_error(adapted, stored), relative_error(adapted, new)
    folded = _with_parameters(base, made) if to is None else _in_dtype(base, dense, to)
    return Folded(folded, errors)


def _with_parameters(base: nn.Module, made: Mapping[str, Any]) -> nn.Module:
    """Set parameters of ``base``, a copy of a module, to merged ones of the same form; return it."""
    own = base.__dict__
    own["_parameters"] = dict(own["_parameters"])
    if isinstance(base, StoredModule):
        own.update(_forms=dict(base._forms), _kept={})
    for name, value in made.items():
        if isinstance(base, StoredModule) and name in base._forms:
            form = base._forms[name]
            shaped = value.view(*form.rows, *form.tail) if isinstance(value, Tensor) else value
            base.store(name, shaped, form.tail, form.dtype)
        else:
            before = base._parameters[name]
            assert before is not None
            base._parameters[name] = nn.Parameter(value.view(before.shape), requires_grad=before.requires_grad)
    return base


def _in_dtype(base: nn.Module, dense: Mapping[str, Tensor], to: torch.dtype) -> nn.Module:
    """Return a copy of a module in which all parameters are dense and have the dtype ``to``."""
    values: dict[str, Tensor | None] = {}
    if isinstance(base, StoredModule):
        for name in base.forms:
            shape, value = base.stored_tensor(name).shape, dense.get(name)
            values[name] = freeze((base.stored_tensor(name).dequantize(to) if value is None else value).view(shape))
        base = restored_copy(base, values)
    parameters: dict[str, Any] = {}
    for name, parameter in base._parameters.items():
        value = dense.get(name, parameter)
        if parameter is not None and value is not None and name not in values:
            rounded = round_to(value, to, name).view(parameter.shape)
            parameter = nn.Parameter(rounded, requires_grad=parameter.requires_grad)
        parameters[name] = parameter
    base.__dict__["_parameters"] = parameters
    return base


def adapted_parameters(layer: nn.Module) -> tuple[str, ...]:
    """Return the parameters of an adapted layer that can have adapters."""
    return type(layer)._adapted_names if isinstance(layer, AdaptedModule) else ("weight",)
