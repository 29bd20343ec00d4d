"""One walk over any model: find the layers, build their replacements, then swap them all at once.

Nothing of the model changes until every replacement exists, so an error leaves it as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeAlias

from torch import nn

from lowmem.fourbit import FourBit, Linear4Bit
from lowmem.half import Half, HalfLinear
from lowmem.lora import Adapter, LoRA, LoRALinear

__all__ = [
    "REGISTRY",
    "Technique",
    "chosen",
    "convert",
    "freeze_all_but_adapters",
    "layer_name",
    "nothing_found",
    "places",
    "swap",
    "takes",
]

Technique: TypeAlias = Half | FourBit | LoRA
Converted: TypeAlias = HalfLinear | Linear4Bit | LoRALinear

# What replaces a layer of exactly this type, by its `from_layer`. A new layer type is one line here.
REGISTRY: MappingProxyType[tuple[type[Technique], type[nn.Module]], type[Converted]] = MappingProxyType(
    {
        (Half, nn.Linear): HalfLinear,
        (FourBit, nn.Linear): Linear4Bit,
        (LoRA, nn.Linear): LoRALinear,
        (LoRA, HalfLinear): LoRALinear,
        (LoRA, Linear4Bit): LoRALinear,
    }
)

_MADE_BY: dict[type[nn.Module], type[Technique]] = {made: technique for (technique, _), made in REGISTRY.items()}


def convert(
    model: nn.Module,
    *techniques: Technique,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
) -> nn.Module:
    """Apply techniques, left to right, to every layer that the first one takes.

    A layer is taken when its type is exactly one in ``REGISTRY`` (a subclass is left alone) and its
    weight is its own parameter (not recomputed by a parametrization or pruning hook). A module that
    stands in several places is replaced by one module in all of them. Forward and backward hooks move
    to the replacement. After ``LoRA``, only the adapters of the model train.

    Args:
        model: any module; the root itself can be the layer.
        techniques: ``Half``, ``FourBit``, ``LoRA``.
        where: called with (path, module); a layer is taken only where it returns True, for all its paths.
        skip: glob patterns of paths that are left alone.

    Returns:
        The model, changed in place; or the new layer, when the root itself was the layer.

    Raises:
        TypeError: the model is not a module, or a technique is not one.
        ValueError: no technique, techniques that do not compose, nothing to convert, a pattern of
            ``skip`` that matches nothing, a layer that has the technique already, or a weight that
            cannot be stored (its path is named). The model is left as it was.
    """
    _check_arguments(techniques)
    replacements: dict[nn.Module, nn.Module] = {}
    for module, path in chosen(model, where, skip):
        made_by = _MADE_BY.get(type(module))
        if made_by is not None and made_by in {type(t) for t in techniques}:
            remedy = "add another with add_adapter" if made_by is LoRA else "convert a model once"
            raise ValueError(
                f"{layer_name(path)} is a {type(module).__name__}: it has {made_by.__name__} already; "
                f"{remedy}, or leave the layer out with skip="
            )
        if takes(type(techniques[0]), module):
            replacements[module] = _build(module, techniques, path)
    if not replacements:
        raise ValueError(nothing_found(type(techniques[0]), model))

    model = swap(model, replacements)
    if any(isinstance(t, LoRA) for t in techniques):
        freeze_all_but_adapters(model)
    return model


def chosen(
    model: nn.Module, where: Callable[[str, nn.Module], bool] | None, skip: str | Iterable[str]
) -> list[tuple[nn.Module, str]]:
    """Return every module that ``where`` and ``skip`` do not leave out, with its first path.

    Raises:
        TypeError: the model is not a module, or a pattern not a string.
        ValueError: a pattern matches nothing.
    """
    found = places(model)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip={skip!r} must be glob patterns of paths")
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for paths in found.values() for path in paths):
            raise ValueError(f"skip={pattern!r} matches no module of {type(model).__name__}; check the pattern")
    return [
        (module, paths[0])
        for module, paths in found.items()
        if not any(fnmatchcase(path, pattern) for path in paths for pattern in skip)
        and (where is None or all(where(path, module) for path in paths))
    ]


def _check_arguments(techniques: tuple[Technique, ...]) -> None:
    if not techniques:
        raise ValueError("no technique was given: pass Half(), FourBit() or LoRA()")
    known = {technique for technique, _ in REGISTRY}
    for technique in techniques:
        if type(technique) not in known:
            raise TypeError(f"technique={technique!r} must be an instance of Half, FourBit or LoRA")
    for kind, count in Counter(type(t) for t in techniques).items():
        if count > 1:
            raise ValueError(f"{kind.__name__} was given {count} times: a layer takes a technique once")


def places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all its paths, in the order of the walk, which does not enter converted layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    found: dict[nn.Module, list[str]] = {}
    inside = None  # the prefix of the paths inside the last converted layer
    for path, module in model.named_modules(remove_duplicate=False):
        if inside is None or not path.startswith(inside):
            found.setdefault(module, []).append(path)
            inside = (path and f"{path}.") if type(module) in _MADE_BY else None
    return found


def takes(technique: type[Technique], module: nn.Module) -> bool:
    """Whether a technique takes a module: by its exact type, with parameters that nothing recomputes."""
    if (technique, type(module)) not in REGISTRY:
        return False
    if type(module) is not nn.Linear:
        return True
    own = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return own == ({"weight"} if module.bias is None else {"weight", "bias"})


def _build(module: nn.Module, techniques: tuple[Technique, ...], path: str) -> nn.Module:
    layer = module
    for technique in techniques:
        made = REGISTRY.get((type(technique), type(layer)))
        if made is None:
            raise ValueError(
                f"{layer_name(path)}: {type(technique).__name__} cannot follow the techniques before it, which made "
                f"a {type(layer).__name__}; it takes {_takes(type(technique))}"
            )
        try:
            layer = made.from_layer(layer, technique)  # type: ignore[arg-type]
        except (TypeError, ValueError) as reason:
            raise type(reason)(f"{layer_name(path)}: {reason}") from reason
    return layer.train(module.training)


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put every replacement where its layer stands. This step does not fail, so a model is never half changed."""
    found = places(model)
    for old, new in replacements.items():
        if old._is_full_backward_hook is not None:
            new._is_full_backward_hook = old._is_full_backward_hook
        for name in _HOOKS:
            hooks = vars(old)[name]
            if hooks:
                vars(old)[name] = type(hooks)()  # a wrapped base must not run them a second time
                hooks.update(vars(new)[name])  # those that a base got while it was wrapped
                vars(new)[name] = hooks  # the same dictionary, so that the handles still remove them
        for path in found[old]:
            parent_path, _, child = path.rpartition(".")
            if not path:
                return new
            parent = model.get_submodule(parent_path)
            setattr(parent, child, new)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # Its fused inference path would read the dense weight of the layers it holds.
                parent.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(m in replacements.values() for m in module.modules()):
            module.use_nested_tensor = False
    return model


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Freeze every parameter that is not an adapter's; those stay as they are, and train when they are new."""
    adapters = {p for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)


def nothing_found(technique: type[Technique], model: nn.Module) -> str:
    """Say what a technique looks for, and what the model has."""
    found = Counter(type(module).__name__ for module in places(model) if not list(module.children()))
    listed = ", ".join(f"{name} x{count}" for name, count in sorted(found.items()))
    return (
        f"nothing to convert: {technique.__name__} looks for {_takes(technique)} (the exact type, with a "
        f"weight of its own), not left out by where= or skip=; found {listed or 'no layers'}"
    )


def _takes(technique: type[Technique]) -> str:
    return ", ".join(layer.__name__ for known, layer in REGISTRY if known is technique)


def layer_name(path: str) -> str:
    """Return how an error names the module at a path."""
    return path or "the model itself"
