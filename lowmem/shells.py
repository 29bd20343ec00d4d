"""Build a model without its weights, as a file says that its layers are stored, and give it the file's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from lowmem.convert import freeze_all_but_adapters, swap, weight_key
from lowmem.lora import Adapter, LoRA, LoRALinear
from lowmem.records import lora_of, technique_of
from lowmem.registry import REGISTRY, layer_name, places, why_left

__all__ = ["assign", "build"]


def build(factory: Callable[[], nn.Module], metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make a model whose parameters are on the meta device, with shells of the layers that were converted.

    The caller's random state is left as it is.

    Args:
        factory: makes the dense model.
        metadata: of the file.
        tensors: of the file, for the dtypes of its adapters.

    Raises:
        TypeError: what the factory made is no module.
        ValueError: the factory needs the values of its parameters or returned a model that was there before, or
            the file holds other layers than the model has.
    """
    made: set[nn.Module] = set()
    with torch.random.fork_rng(devices=[]), _parameters_on_meta(made):
        try:
            model = factory()
        except (RuntimeError, ValueError) as reason:  # NotImplementedError is a RuntimeError
            if "meta" not in str(reason):
                raise
            raise ValueError(
                f"the factory needs the values of its parameters, which come from the file ({reason}): leave moves "
                "between devices, convert, and weights that are computed out of it"
            ) from reason
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory returned a {type(model).__name__}, not a torch.nn.Module")
    if not any(module in made for module in model.modules()) and any(True for _ in model.parameters()):
        raise ValueError("the factory returned a model that was there before, and must make one")
    try:
        return _shells(model, metadata, tensors)
    except TypeError as reason:
        raise ValueError(f"its record of the layers is not lowmem's ({reason})") from reason


@contextmanager
def _parameters_on_meta(made: set[nn.Module]) -> Iterator[None]:
    """Put every parameter on the meta device as a module takes it; what two modules take stays one parameter.

    The modules that took any are gathered in ``made``.
    """
    known: Any = WeakTensorKeyDictionary()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        made.add(module)
        if parameter is None or parameter.is_meta or is_lazy(parameter):
            return None
        if parameter not in known:
            known[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        found: nn.Parameter = known[parameter]
        return found

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _shells(model: nn.Module, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Replace the layers that were converted by shells of what they were converted to."""
    records: dict[str, Any] = metadata["layers"]
    sharing: dict[Any, list[nn.Module]] = {}
    for holder in model.modules():
        weight = holder._parameters.get("weight")
        if weight is not None and not is_lazy(weight):
            sharing.setdefault(weight_key(weight), []).append(holder)
    by_path = {path: module for module, paths in places(model).items() for path in paths}
    recorded: dict[nn.Module, Any] = {}
    for path, record in records.items():
        module = by_path.get(path)
        if module is None:
            raise ValueError(f"it has a layer {layer_name(path)!r} that the model has not: is this its factory?")
        recorded[module] = record
        weight = module._parameters.get("weight")
        for tied in [] if weight is None or is_lazy(weight) else sharing[weight_key(weight)]:
            recorded.setdefault(tied, record)  # without a record of its own, it shares what is stored
    left = []
    stored: dict[Any, Any] = {}
    shells: dict[nn.Module, Any] = {}
    for module, record in recorded.items():
        technique, method = technique_of(record)
        why = why_left(type(technique), module)
        if why is not None:
            path = next(path for path, other in by_path.items() if other is module)
            left.append(
                f"{layer_name(path)} is stored by {record['technique']}, and the model has a "
                f"{type(module).__name__} there: {why}"
            )
            continue

        def store(tensor: Tensor, name: str, technique: Any = technique, method: str | None = method) -> Any:
            key = weight_key(tensor)
            if key not in stored:
                shell = technique.shell(tensor, name)
                stored[key] = shell if method is None else replace(shell, method=method)
            return stored[key]

        made: Any = REGISTRY[type(technique), type(module)]
        shells[module] = made.from_layer(module, technique, store)
    if left:
        raise ValueError(f"{'; '.join(left)}; leave them out when the file is made (skip= or --exclude)")
    model = swap(model, {old: new.train(old.training) for old, new in shells.items()})
    adapted: dict[nn.Module, nn.Module] = {}
    by_path = {path: module for module, paths in places(model).items() for path in paths}
    for path, parts in metadata.get("adapters", {}).items():
        base = by_path.get(path)
        why = f"the model has no layer {layer_name(path)!r}" if base is None else why_left(LoRA, base)
        if base is None or why is not None:
            raise ValueError(f"it has adapters for {layer_name(path)}: {why}; is this its factory?")
        layer = _adapted(base, parts)
        for name, adapter in layer.adapters.items():  # which may have been cast since
            given = tensors.get(f"{path}.adapters.{name}.lora_a".lstrip("."))
            if given is not None and given.is_floating_point():
                adapter.to(given.dtype)
        adapted[base] = layer.train(base.training)
    model = swap(model, adapted)
    if adapted:
        freeze_all_but_adapters(model)
    return model


def _adapted(base: Any, parts: list[dict[str, Any]]) -> LoRALinear:
    layer = LoRALinear(base, lora_of(parts[0]), parts[0]["name"])
    for part in parts[1:]:
        layer.add(part["name"], Adapter(base, lora_of(part)))
    layer.active = tuple(part["name"] for part in parts if part["active"])
    return layer


def assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's tensors in the place of the model's, once all of them are known to fit.

    Raises:
        ValueError: names, shapes or dtypes differ, or something of the model would be left without values.
    """
    names: dict[int, list[str]] = {}
    own: dict[int, Tensor] = {}
    extra_states: list[str] = []
    for name, value in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX:
            extra_states.append(name)
        elif not isinstance(value, Tensor) or is_lazy(value):
            raise ValueError(f"the model's state {name!r} is a {type(value).__name__}, no tensor with a shape")
        else:
            names.setdefault(id(value), []).append(name)
            own[id(value)] = value
    known = {name for group in names.values() for name in group} | set(extra_states)
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}  # saved once, no part of the state now
    missing = [group[0] for group in names.values() if not any(name in tensors for name in group)]
    missing += [name for name in extra_states if name not in tensors]
    surplus = [name for name in tensors if name not in known]
    if missing or surplus:
        raise ValueError(
            f"it holds another model than the factory makes: {_listed('it lacks', missing)}"
            f"{', and ' if missing and surplus else ''}{_listed('the model lacks', surplus)}"
        )
    found: dict[int, Tensor] = {}
    for key, group in names.items():
        first, *others = [name for name in group if name in tensors]
        given, mine = tensors[first], own[key]
        if given.shape != mine.shape or given.dtype != mine.dtype:
            raise ValueError(
                f"{first} is {given.dtype} {tuple(given.shape)} in it, and {mine.dtype} {tuple(mine.shape)} in the "
                "model that the factory makes: let the factory make the model that was saved"
            )
        for other in others:
            if not torch.equal(tensors[other], given):
                raise ValueError(f"{first} and {other} differ in it, and are one tensor in the model")
        found[key] = nn.Parameter(given, mine.requires_grad) if isinstance(mine, nn.Parameter) else given
    empty = [
        name
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if value.is_meta and id(value) not in found
    ]
    if empty:
        raise ValueError(
            f"{_listed('no values are known for', empty)}: what is computed from parameters when the model is made "
            "must be a persistent buffer"
        )
    for module in model.modules():
        for tensors_of in (module._parameters, module._buffers):
            for name, value in tensors_of.items():
                if value is not None and id(value) in found:
                    tensors_of[name] = found[id(value)]  # type: ignore[assignment]
    for name in extra_states:
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(tensors[name])


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}" if names else ""
