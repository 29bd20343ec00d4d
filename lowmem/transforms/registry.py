"""Which layer types each technique converts, where these are in a model, and why a layer is skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lowmem.errors import printable
from lowmem.nn.conv import Conv4Bit, HalfConv
from lowmem.nn.embedding import Embedding4Bit, HalfEmbedding
from lowmem.nn.fourbit import FourBit, Linear4Bit
from lowmem.nn.half import Half, HalfLinear
from lowmem.nn.lora import LoRA, LoRALinear

__all__ = [
    "MADE_BY",
    "REGISTRY",
    "Converted",
    "Technique",
    "layer_name",
    "module_paths",
    "no_match_message",
    "parameter_owners",
    "read_by_attention",
    "refuse_peft",
    "select_modules",
    "skip_reason",
    "skip_reason_in",
    "supported_types",
]

Technique: TypeAlias = Half | FourBit | LoRA
Converted: TypeAlias = HalfLinear | Linear4Bit | LoRALinear | HalfEmbedding | Embedding4Bit | HalfConv | Conv4Bit

# (technique, exact type of a layer) -> the class whose `from_layer` converts it. A new layer type is one line here.
REGISTRY: MappingProxyType[tuple[type[Technique], type[nn.Module]], type[Converted]] = MappingProxyType(
    {
        (Half, nn.Linear): HalfLinear,
        (FourBit, nn.Linear): Linear4Bit,
        (Half, nn.Embedding): HalfEmbedding,
        (FourBit, nn.Embedding): Embedding4Bit,
        (Half, nn.Conv1d): HalfConv,
        (FourBit, nn.Conv1d): Conv4Bit,
        (Half, nn.Conv2d): HalfConv,
        (FourBit, nn.Conv2d): Conv4Bit,
        (LoRA, nn.Linear): LoRALinear,
        (LoRA, HalfLinear): LoRALinear,
        (LoRA, Linear4Bit): LoRALinear,
    }
)

MADE_BY: Mapping[type[nn.Module], type[Technique]] = {made: technique for (technique, _), made in REGISTRY.items()}


def module_paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all of its paths, in the order of ``named_modules``; converted layers are not entered.

    Raises:
        TypeError: the model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    found: dict[nn.Module, list[str]] = {}
    inside = None  # the prefix of the paths inside the last converted layer
    for path, module in model.named_modules(remove_duplicate=False):
        if inside is None or not path.startswith(inside):
            found.setdefault(module, []).append(path)
            inside = (path and f"{path}.") if type(module) in MADE_BY else None
    return found


def select_modules(
    model: nn.Module, where: Callable[[str, nn.Module], bool] | None, skip: str | Iterable[str]
) -> dict[nn.Module, str]:
    """Return the modules that ``where`` and ``skip`` select, each with its first path.

    Left out are also the projections that nn.MultiheadAttention reads itself.

    Raises:
        TypeError: the model is not a module, or a pattern is not a string.
        ValueError: a pattern matches nothing.
    """
    found = module_paths(model)
    inside = read_by_attention(model)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip={skip!r} must be glob patterns of paths")
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for paths in found.values() for path in paths):
            raise ValueError(f"skip={pattern!r} matches no module of {type(model).__name__}; check the pattern")
    return {
        module: paths[0]
        for module, paths in found.items()
        if module not in inside
        and not any(fnmatchcase(path, pattern) for path in paths for pattern in skip)
        and (where is None or all(where(path, module) for path in paths))
    }


def read_by_attention(model: nn.Module) -> set[nn.Module]:
    """Return the projections whose weights nn.MultiheadAttention reads without calling them."""
    return {
        getattr(module, "out_proj", module) for module in model.modules() if isinstance(module, nn.MultiheadAttention)
    }


def refuse_peft(model: nn.Module, layers: Collection[nn.Module], *, freezes: bool) -> None:
    """Raise if adapters of PEFT would be frozen: those around layers to convert, or all of them.

    Args:
        model: any module.
        layers: the layers to convert; without any, a model that holds PEFT's is refused, since PEFT is why.
        freezes: whether the rest of the model will be frozen.

    Raises:
        ValueError: there are such layers; the first is named.
    """
    for path, module in model.named_modules():
        if any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__):
            inside = next((inner for inner, layer in module.named_modules(prefix=path) if layer in layers), None)
            if inside is not None or freezes or not layers:
                where = f"the model holds {layer_name(path)}," if path else "the model is"
                where = where if inside is None else f"{layer_name(inside)} is inside {layer_name(path)},"
                raise ValueError(
                    f"{where} a {type(module).__name__} of PEFT, whose adapters would be "
                    "frozen: convert the base before get_peft_model, or call merge_and_unload() first"
                )


def parameter_owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return, by the id of each parameter, the modules that have it, each with its first path."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, path))
    return found


def skip_reason(technique: type[Technique], module: nn.Module) -> str | None:
    """Return why a technique does not convert a module; None where it does."""
    made = REGISTRY.get((technique, type(module)))
    if is_parametrized(module):  # before the type: parametrizing a module changes its class to a subclass
        return "its weight or bias is computed by a parametrization"
    if made is None:
        base = next((kind for known, kind in REGISTRY if known is technique and isinstance(module, kind)), None)
        if base is not None:
            return f"a subclass of {base.__name__} may compute something else"
        return f"{technique.__name__} has no form of it"
    if type(module) in MADE_BY:
        return None
    own = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    extra = own - {"weight", "bias"}
    if extra or "weight" not in own or (getattr(module, "bias", None) is not None and "bias" not in own):
        return f"its weight or bias is computed from, or comes with, {', '.join(sorted(extra)) or 'something else'}"
    refuses: Callable[[nn.Module], str | None] | None = getattr(made, "refuses", None)
    return None if refuses is None else refuses(module)


def skip_reason_in(model: nn.Module) -> Callable[[type[Technique], nn.Module], str | None]:
    """Return ``skip_reason`` for modules of ``model``, which also skips projections that attention reads itself."""
    inside = read_by_attention(model)
    why = "attention reads its weight without calling it"
    return lambda technique, module: skip_reason(technique, module) or (why if module in inside else None)


def no_match_message(technique: type[Technique], model: nn.Module) -> str:
    """Return the error text for a model without layers to convert: what was looked for, and what was found."""
    found = Counter(type(module).__name__ for module in module_paths(model) if not list(module.children()))
    listed = ", ".join(f"{name} x{count}" for name, count in sorted(found.items()))
    return (
        f"nothing to convert: {technique.__name__} looks for {supported_types(technique)} (the exact type, with a "
        f"weight of its own), not left out by where= or skip=; found {listed or 'no layers'}"
    )


def supported_types(technique: type[Technique]) -> str:
    """Return the names of the layer types that a technique converts."""
    return ", ".join(layer.__name__ for known, layer in REGISTRY if known is technique)


def layer_name(path: str) -> str:
    """Return the name of the module at ``path`` for errors."""
    return printable(path) or "the model itself"
