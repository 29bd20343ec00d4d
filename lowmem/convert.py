"""One walk over any model: find the layers, build their replacements, then swap them all at once.

Nothing of the model changes until every replacement exists, so an error leaves it as it was.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeAlias

from torch import nn

from lowmem.conv import Conv4Bit, HalfConv
from lowmem.embedding import Embedding4Bit, HalfEmbedding
from lowmem.fourbit import FourBit, Linear4Bit
from lowmem.half import Half, HalfLinear
from lowmem.lora import LoRA, LoRALinear

__all__ = ["REGISTRY", "Technique", "convert", "merge"]

Technique: TypeAlias = Half | FourBit | LoRA
Converted: TypeAlias = HalfLinear | Linear4Bit | LoRALinear | HalfEmbedding | Embedding4Bit | HalfConv | Conv4Bit

# What replaces a layer of exactly this type, by its `from_layer`. A new layer type is one line here.
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

_MADE_BY: dict[type[nn.Module], type[Technique]] = {made: technique for (technique, _), made in REGISTRY.items()}


def convert(
    model: nn.Module,
    *techniques: Technique,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
) -> nn.Module:
    """Apply techniques, left to right, to every layer that the first one takes.

    A later technique passes over the layers that it does not take.

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
    _check_arguments(model, techniques)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip={skip!r} must be glob patterns of paths")
    places = _places(model)
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for paths in places.values() for path in paths):
            raise ValueError(f"skip={pattern!r} matches no module of {type(model).__name__}; check the pattern")

    replacements: dict[nn.Module, nn.Module] = {}
    unused: dict[Technique, str | None] = {}
    for module, paths in places.items():
        if any(fnmatchcase(path, pattern) for path in paths for pattern in skip):
            continue
        if where is not None and not all(where(path, module) for path in paths):
            continue
        made_by = _MADE_BY.get(type(module))
        if made_by is not None and made_by in {type(t) for t in techniques}:
            raise ValueError(
                f"{_name(paths[0])} is a {type(module).__name__}: it has {made_by.__name__} already; "
                "convert a model once, or leave the layer out with skip="
            )
        made = REGISTRY.get((type(techniques[0]), type(module)))
        if made is not None and _is_plain(module) and _refusal(made, module) is None:
            replacements[module] = _build(module, techniques, paths[0], unused)
    if not replacements:
        raise ValueError(_nothing_found(techniques[0], places))
    for why in unused.values():
        if why is not None:
            raise ValueError(why)

    model = _swap(model, replacements)
    if any(isinstance(t, LoRA) for t in techniques):
        _train_adapters_only(model)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Fold every LoRA adapter into its base: ``W + (alpha / rank) B A``.

    A half-precision base is rounded once more. A 4-bit base is quantized once more, and a warning
    says what error that adds. What the adapters froze stays frozen.

    Returns:
        The model, changed in place; or the base, when the root itself was a LoRALinear.

    Raises:
        TypeError: the model is not a module.
        ValueError: no LoRALinear is left (merged already?), or an adapted weight cannot be stored.
            The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    replacements: dict[nn.Module, nn.Module] = {}
    errors: dict[str, float] = {}
    for module, paths in _places(model).items():
        if isinstance(module, LoRALinear):
            try:
                replacements[module], error = module.merged()
            except ValueError as reason:
                found = str(reason).partition(";")[0]
                raise ValueError(
                    f"{_name(paths[0])}: the adapted {found}; scale the adapter down, or convert the base otherwise"
                ) from reason
            if isinstance(module.base, Linear4Bit):
                errors[_name(paths[0])] = error
    if not replacements:
        raise ValueError(
            f"{type(model).__name__} has no LoRALinear to merge: it was never adapted, or is merged already"
        )
    if errors:
        worst = max(errors, key=errors.__getitem__)
        warnings.warn(
            f"merge quantized {len(errors)} adapted weights to 4 bits again: that adds a relative error of "
            f"{sum(errors.values()) / len(errors):.3g} on average, at most {errors[worst]:.3g} ({worst})",
            stacklevel=2,
        )
    return _swap(model, replacements)


def _check_arguments(model: nn.Module, techniques: tuple[Technique, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    if not techniques:
        raise ValueError("no technique was given: pass Half(), FourBit() or LoRA()")
    known = {technique for technique, _ in REGISTRY}
    for technique in techniques:
        if type(technique) not in known:
            raise TypeError(f"technique={technique!r} must be an instance of Half, FourBit or LoRA")
    for kind, count in Counter(type(t) for t in techniques).items():
        if count > 1:
            raise ValueError(f"{kind.__name__} was given {count} times: a layer takes a technique once")


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all its paths, in the order of the walk, which does not enter converted layers."""
    places: dict[nn.Module, list[str]] = {}
    inside = None  # the prefix of the paths inside the last converted layer
    for path, module in model.named_modules(remove_duplicate=False):
        if inside is None or not path.startswith(inside):
            places.setdefault(module, []).append(path)
            inside = (path and f"{path}.") if type(module) in _MADE_BY else None
    return places


def _is_plain(module: nn.Module) -> bool:
    """Whether weight and bias are the module's own parameters, not recomputed by pruning or weight norm."""
    if type(module) not in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d):
        return True
    own = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return own == ({"weight"} if getattr(module, "bias", None) is None else {"weight", "bias"})


def _refusal(made: type[Converted], module: nn.Module) -> str | None:
    """Return why what would replace a layer does not take this one, or None where it does."""
    refuses: Callable[[nn.Module], str | None] | None = getattr(made, "refuses", None)
    return None if refuses is None else refuses(module)


def _build(
    module: nn.Module, techniques: tuple[Technique, ...], path: str, unused: dict[Technique, str | None]
) -> nn.Module:
    """Apply the techniques that take the layer; ``unused`` gathers why others do not, None once one takes any."""
    layer = module
    for technique in techniques:
        made = REGISTRY.get((type(technique), type(layer)))
        if made is None:
            unused.setdefault(
                technique,
                f"{_name(path)}: {type(technique).__name__} cannot follow the techniques before it, which made "
                f"a {type(layer).__name__}; it takes {_takes(technique)}",
            )
            continue
        unused[technique] = None
        try:
            layer = made.from_layer(layer, technique)  # type: ignore[arg-type]
        except (TypeError, ValueError) as reason:
            raise type(reason)(f"{_name(path)}: {reason}") from reason
    return layer.train(module.training)


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put every replacement where its layer stands. This step does not fail, so a model is never half changed."""
    places = _places(model)
    for old, new in replacements.items():
        new._is_full_backward_hook = old._is_full_backward_hook
        for name in _HOOKS:
            hooks = vars(old)[name]
            vars(old)[name] = type(hooks)()  # a wrapped base must not run them a second time
            vars(new)[name] = hooks  # the same dictionary, so that the handles still remove them
        for path in places[old]:
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


def _train_adapters_only(model: nn.Module) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_a.requires_grad_(True)
            module.lora_b.requires_grad_(True)


def _nothing_found(technique: Technique, places: dict[nn.Module, list[str]]) -> str:
    found = Counter(type(module).__name__ for module in places if not list(module.children()))
    listed = ", ".join(f"{name} x{count}" for name, count in sorted(found.items()))
    return (
        f"nothing to convert: {type(technique).__name__} looks for {_takes(technique)} (the exact type, with a "
        f"weight of its own), not left out by where= or skip=; found {listed or 'no layers'}"
    )


def _takes(technique: Technique) -> str:
    return ", ".join(layer.__name__ for known, layer in REGISTRY if known is type(technique))


def _name(path: str) -> str:
    return path or "the model itself"
