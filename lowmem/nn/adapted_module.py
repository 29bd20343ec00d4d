"""Modules with adapters on parameters: generated subclasses of the modules' own classes. While an adapter is active,
``module.weight`` is an ``AdaptedWeight``; the adapters are in the child ``adapters``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, NoReturn, cast

from torch import nn

from lowmem.kernels.torch_versions import disable_dynamo
from lowmem.nn import attention  # noqa: F401 - register what adapted weights do
from lowmem.nn.adapter import Adapter
from lowmem.nn.adapter_bank import AdapterBank, unadapted_parameter
from lowmem.nn.fold import remerge
from lowmem.nn.lora_forward import LINEAR, replaced_class_and_lora_forward
from lowmem.nn.module_class import change_class_and_attributes, derived_class, hookless_shallow_copy
from lowmem.nn.module_copy import FLAT_WEIGHTS, stored_module_class
from lowmem.nn.sharded_parameters import imported_dtensor_types
from lowmem.nn.stored_module import StoredModule


class AdaptedModule(nn.Module):
    """Base of all modules with adapters on parameters.

    Attributes:
        adapters: all adapters of the module, and which are active.
        _plain_class: the module's class without adapters.
        _adapted_names: names of the parameters that can have adapters.
    """

    _plain_class: ClassVar[type[nn.Module]]
    _adapted_names: ClassVar[tuple[str, ...]] = ()
    adapters: AdapterBank

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a module without adapters, by the class that the module had before."""
        plain: Any = self._plain_class
        change_class_and_attributes(self, plain)
        plain.__init__(self, *args, **kwargs)

    @classmethod
    def _adapted_class_over(cls, plain_class: type[nn.Module]) -> type[nn.Module]:
        """Return the class with the same adapters over ``plain_class``, another class, whose parameters differ in
        form."""
        return adapted_module_class(plain_class, cls._adapted_names)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which calls this before it compiles a module's code."""
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__} with adapters: take torch.jit.trace, "
            "torch.compile or torch.export, or merge the adapters to a dtype before: "
            "model = lowmem.merge(model, torch.float32)"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        value = getattr(value, "unadapted", value)  # of another module, whose adapters are not shared
        if name in self._adapted_names or name == "bias":
            bank = self.__dict__["_modules"].get("adapters")
            # FSDP2 sets shards, and what it gathers from them: the same values
            sharded = imported_dtensor_types()
            shared = isinstance(value, sharded) or isinstance(self._parameters.get(name), sharded)
            if isinstance(value, sharded):
                self.__dict__["_set_shards"] = frozenset((*self.__dict__.get("_set_shards", ()), name))
            # The merged copy would keep the old values.
            if bank is not None and bank.merged_name is not None and not shared:
                merged = f"adapter {bank.merged_name!r} is merged"
                raise ValueError(f"{name} cannot be set while {merged}: call unmerge_adapter(model) first")
        super().__setattr__(name, value)


def _single_adapter_property(attribute_name: str) -> Any:
    def get_from_single_adapter(layer: LoRALinear) -> Any:
        if len(layer.adapters.names) != 1:
            raise AttributeError(attribute_name)
        return getattr(layer.adapters.adapters_by_parameter(layer.adapters.names[0])["weight"], attribute_name)

    return property(
        get_from_single_adapter, doc=f"The adapter's ``{attribute_name}``, if there is exactly one adapter."
    )


class LoRALinear(AdaptedModule):
    """Base of the classes of ``lora_forward.LINEAR`` with adapters: ``y = W x + b + sum s B A x``.

    ``convert`` and ``add_adapter`` change a layer's class to a subclass of both this and the layer's own class.
    """

    lora_a = _single_adapter_property("lora_a")
    lora_b = _single_adapter_property("lora_b")
    rank = _single_adapter_property("rank")
    scaling = _single_adapter_property("scaling")


# cuDNN would write the weights, which are computed, into one memory.
_RECURRENT: dict[str, Any] = {"_flat_weights": FLAT_WEIGHTS, "flatten_parameters": lambda module: None}


def adapted_module_class(plain_class: Any, parameter_names: tuple[str, ...]) -> type[AdaptedModule]:
    """Return the class of modules of class ``plain_class`` with adapters on the parameters ``parameter_names``."""
    body: dict[str, Any] = {name: _adapted_parameter_property(name) for name in parameter_names}
    body |= {"_plain_class": plain_class, "_adapted_names": parameter_names, "__reduce_ex__": _reduce_adapted_module}
    if issubclass(plain_class, nn.RNNBase):
        body |= _RECURRENT
    replaced, forward = replaced_class_and_lora_forward(plain_class)
    behind = None
    if replaced is plain_class and forward is not None:
        body["forward"] = forward
    elif forward is not None:
        # Behind the user's class, whose forward may call that of super()
        behind = derived_class(replaced, forward=forward)
    base = LoRALinear if plain_class in LINEAR else AdaptedModule
    return cast("type[AdaptedModule]", derived_class(plain_class, base, behind, **body))


@cache
def _adapted_parameter_property(parameter_name: str) -> property:
    def get_adapted_parameter(module: nn.Module) -> Any:
        bank = module.__dict__["_modules"].get("adapters")
        parameter = module._parameters.get(parameter_name)
        if isinstance(parameter, imported_dtensor_types()) and parameter_name in module.__dict__.get(
            "_set_shards", ()
        ):
            # To FSDP2, which sets shards and reads them; it sets the whole weight before a forward
            return parameter
        return (
            unadapted_parameter(module, parameter_name)
            if bank is None
            else bank.adapted_parameter(module, parameter_name)
        )

    # A graph of its own, after a graph break, could not return the weight
    disable_dynamo(get_adapted_parameter)

    def assign_parameter_or_attribute(module: Any, value: Any) -> None:
        if parameter_name in module.__dict__.get("_forms", ()):
            getattr(module._plain_class, parameter_name).__set__(module, value)
        else:
            module.__dict__[parameter_name] = value

    return property(
        get_adapted_parameter,
        assign_parameter_or_attribute,
        doc=f"The parameter ``{parameter_name}``, with the active adapters.",
    )


def _reduce_adapted_module(module: AdaptedModule, protocol: Any) -> Any:
    plain: Any = type(module)._plain_class
    how: Any = plain
    if issubclass(plain, StoredModule):
        generated = plain.dense_class, plain.stored_names, plain.stored_bits
        how = generated if stored_module_class(*generated) is plain else plain
    state: Any = getattr(module, "__getstate__", lambda: module.__dict__)()
    return _empty, (how, type(module)._adapted_names), dict(state)


def _empty(class_or_stored_class_key: Any, parameter_names: tuple[str, ...]) -> nn.Module:
    made = adapted_module_class(
        stored_module_class(*class_or_stored_class_key)
        if isinstance(class_or_stored_class_key, tuple)
        else class_or_stored_class_key,
        parameter_names,
    )
    return made.__new__(made)


def adapted_shallow_copy(
    module: nn.Module, parameter_names: Iterable[str], adapter_name: str, adapters_by_parameter: Mapping[str, Adapter]
) -> AdaptedModule:
    """Return a copy of a module with adapters; it has no hooks, and shares everything else.

    Args:
        module: without adapters.
        parameter_names: of the parameters that can have adapters.
        adapter_name: of the adapters.
        adapters_by_parameter: the adapters, by the parameter that each changes.
    """
    if hasattr(module, "adapters"):
        raise ValueError(
            f"{type(module).__name__} has an attribute `adapters` of its own, which a module with adapters has, too: "
            "rename it, or leave the module out with skip="
        )
    made = adapted_module_class(type(module), tuple(parameter_names))
    copied = cast(AdaptedModule, hookless_shallow_copy(module, made))
    bank = AdapterBank().train(module.training)
    bank.add_and_activate(adapter_name, adapters_by_parameter)
    copied._modules["adapters"] = bank
    attributes = copied.__dict__
    attributes["_load_state_dict_post_hooks"] = type(attributes["_load_state_dict_post_hooks"])(
        attributes["_load_state_dict_post_hooks"]
    )
    copied.register_load_state_dict_post_hook(remerge)  # type: ignore[no-untyped-call]
    return copied


def embedding_table_id_or_none(module: nn.Module) -> int | None:
    """Return the id of an embedding's table, or of the first of its parts; None for other modules."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None
    return next((id(parameter) for name, parameter in module._parameters.items() if name.startswith("weight")), None)


def share_embedding_table(target: nn.Module, source: nn.Module) -> None:
    """Make an embedding, in place, use the table of another embedding."""
    tables = {name: parameter for name, parameter in source._parameters.items() if name.startswith("weight")}
    target.__dict__["_parameters"] = {**target._parameters, **tables}
    if isinstance(target, StoredModule):
        target.__dict__["_kept"] = {}


def share_adapters_of_tied_embeddings(modules: Iterable[nn.Module]) -> None:
    """Let embeddings that share a table also share its adapters, if these have the same name and technique.

    It is not known which of the embeddings is called: T5 calls the encoder's and the decoder's, but not ``shared``.
    """
    known: dict[Any, Adapter] = {}
    for module in modules:
        table = embedding_table_id_or_none(module)
        if table is None or not isinstance(module, AdaptedModule):
            continue
        for name, holder in module.adapters._modules.items():
            parts: dict[str, Any] = holder._modules  # type: ignore[union-attr]
            for parameter, adapter in parts.items():
                parts[parameter] = known.setdefault((table, name, parameter, adapter.technique), adapter)
