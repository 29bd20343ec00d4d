"""Modules with adapters on parameters: generated subclasses of the modules' own classes. While an adapter is active,
``module.weight`` is an ``AdaptedWeight``; the adapters are in the child ``adapters``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, NoReturn, cast

from torch import nn

from lowmem.kernels.torch_versions import leave_to_eager
from lowmem.nn import attention  # noqa: F401 - register what adapted weights do
from lowmem.nn.adapted_forward import LINEAR, forward_with_adapters
from lowmem.nn.adapter import Adapter
from lowmem.nn.adapter_bank import AdapterBank, parameter_of
from lowmem.nn.fold import remerge
from lowmem.nn.module_class import change_class, copied_module, derived_class
from lowmem.nn.module_copy import FLAT_WEIGHTS, stored_class
from lowmem.nn.sharded import sharded_types
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
        change_class(self, plain)
        plain.__init__(self, *args, **kwargs)

    @classmethod
    def _over(cls, plain: type[nn.Module]) -> type[nn.Module]:
        """Return the class with the same adapters over ``plain``, another class, whose parameters differ in form."""
        return adapted_class(plain, cls._adapted_names)

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
            sharded = sharded_types()  # FSDP2 sets shards, and what it gathers from them: the same values
            shared = isinstance(value, sharded) or isinstance(self._parameters.get(name), sharded)
            if isinstance(value, sharded):
                self.__dict__["_set_shards"] = frozenset((*self.__dict__.get("_set_shards", ()), name))
            if bank is not None and bank.merged is not None and not shared:  # its copy would keep the old values
                raise ValueError(
                    f"{name} cannot be set while adapter {bank.merged!r} is merged: call unmerge_adapter(model) first"
                )
        super().__setattr__(name, value)


def _of_single_adapter(name: str) -> Any:
    def get(layer: LoRALinear) -> Any:
        if len(layer.adapters.names) != 1:
            raise AttributeError(name)
        return getattr(layer.adapters.parts(layer.adapters.names[0])["weight"], name)

    return property(get, doc=f"The adapter's ``{name}``, if there is exactly one adapter.")


class LoRALinear(AdaptedModule):
    """Base of the classes of ``adapted_forward.LINEAR`` with adapters: ``y = W x + b + sum s B A x``.

    ``convert`` and ``add_adapter`` change a layer's class to a subclass of both this and the layer's own class.
    """

    lora_a = _of_single_adapter("lora_a")
    lora_b = _of_single_adapter("lora_b")
    rank = _of_single_adapter("rank")
    scaling = _of_single_adapter("scaling")


# cuDNN would write the weights, which are computed, into one memory.
_RECURRENT: dict[str, Any] = {"_flat_weights": FLAT_WEIGHTS, "flatten_parameters": lambda module: None}


def adapted_class(plain: Any, names: tuple[str, ...]) -> type[AdaptedModule]:
    """Return the class of modules of class ``plain`` with adapters on the parameters ``names``."""
    body: dict[str, Any] = {name: _adapted_property(name) for name in names}
    body |= {"_plain_class": plain, "_adapted_names": names, "__reduce_ex__": _reduce}
    if issubclass(plain, nn.RNNBase):
        body |= _RECURRENT
    replaced, forward = forward_with_adapters(plain)
    behind = None
    if replaced is plain and forward is not None:
        body["forward"] = forward
    elif forward is not None:  # behind the user's class, whose forward may call that of super()
        behind = derived_class(replaced, forward=forward)
    base = LoRALinear if plain in LINEAR else AdaptedModule
    return cast("type[AdaptedModule]", derived_class(plain, base, behind, **body))


@cache
def _adapted_property(name: str) -> property:
    def get(module: nn.Module) -> Any:
        bank = module.__dict__["_modules"].get("adapters")
        own = module._parameters.get(name)
        if isinstance(own, sharded_types()) and name in module.__dict__.get("_set_shards", ()):
            return own  # to FSDP2, which sets shards and reads them; it sets the whole weight before a forward
        return parameter_of(module, name) if bank is None else bank.weight(module, name)

    leave_to_eager(get)  # a graph of its own, after a graph break, could not return the weight

    def put(module: Any, value: Any) -> None:
        if name in module.__dict__.get("_forms", ()):
            getattr(module._plain_class, name).__set__(module, value)
        else:
            module.__dict__[name] = value

    return property(get, put, doc=f"The parameter ``{name}``, with the active adapters.")


def _reduce(module: AdaptedModule, protocol: Any) -> Any:
    plain: Any = type(module)._plain_class
    how: Any = plain
    if issubclass(plain, StoredModule):
        generated = plain.dense_class, plain.stored_names, plain.stored_bits
        how = generated if stored_class(*generated) is plain else plain
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
    """
    if hasattr(module, "adapters"):
        raise ValueError(
            f"{type(module).__name__} has an attribute `adapters` of its own, which a module with adapters has, too: "
            "rename it, or leave the module out with skip="
        )
    made = adapted_class(type(module), tuple(names))
    copied = cast(AdaptedModule, copied_module(module, made))
    bank = AdapterBank().train(module.training)
    bank.add(name, parts)
    copied._modules["adapters"] = bank
    own = copied.__dict__
    own["_load_state_dict_post_hooks"] = type(own["_load_state_dict_post_hooks"])(own["_load_state_dict_post_hooks"])
    copied.register_load_state_dict_post_hook(remerge)  # type: ignore[no-untyped-call]
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
        for name, holder in module.adapters._modules.items():
            parts: dict[str, Any] = holder._modules  # type: ignore[union-attr]
            for parameter, adapter in parts.items():
                parts[parameter] = known.setdefault((table, name, parameter, adapter.technique), adapter)
