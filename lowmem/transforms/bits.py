"""How many bits a weight of a converted model takes, and at least: over all that ``convert`` can store it as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lowmem.errors import printable, show
from lowmem.measure import weight_count
from lowmem.nn.adapter import Adapter
from lowmem.nn.techniques import FourBit, Half
from lowmem.quant.packing import MAX_BLOCK_SIZE
from lowmem.quant.scales import ENCODINGS
from lowmem.transforms.registry import Technique

__all__ = ["SMALLEST", "bits_per_weight", "check_at_most", "refuse_more_bits", "text_of"]

Replacements: TypeAlias = Mapping[nn.Module, nn.Module]

# The largest blocks have the fewest scales; which encoding of these is the smallest depends on the length of rows.
# Formats differ in levels alone. Rows of one or two weights are smaller in 16 bits than with a scale of their own.
SMALLEST: tuple[Half | FourBit, ...] = (
    *(FourBit("nf4", MAX_BLOCK_SIZE, scales, embeddings="4bit") for scales in ENCODINGS),
    Half(torch.bfloat16),
)


def check_at_most(at_most: float) -> None:
    """Raise unless ``at_most`` is a number of bits.

    Raises:
        ValueError: it is not.
    """
    if isinstance(at_most, bool) or not isinstance(at_most, int | float) or not at_most > 0:
        raise ValueError(f"at_most={show(at_most)} must be a number of bits above 0")


def bits_per_weight(model: nn.Module, replacements: Replacements) -> float:
    """Return the bits of all parameters without adapters, by the weights of the model, if modules were replaced."""
    return 8 * sum(_parameter_bytes(model, replacements).values()) / max(1, weight_count(model))


def refuse_more_bits(
    model: nn.Module, replacements: Replacements, at_most: float, rebuilt: Callable[[Technique], Replacements]
) -> None:
    """Raise if a converted model would take more than ``at_most`` bits a weight.

    Args:
        model: before it is converted.
        replacements: what its modules become.
        at_most: bits.
        rebuilt: returns what modules would become with another technique, without values.

    Raises:
        ValueError: it would; the least that is possible is named, and the largest weights that stay dense.
    """
    bits = bits_per_weight(model, replacements)
    if bits <= at_most:
        return
    possible = {}
    for technique in SMALLEST:
        try:
            possible[technique] = bits_per_weight(model, rebuilt(technique))
        except (TypeError, ValueError):  # the model has nothing that this technique stores
            continue
    least = min(possible, key=possible.__getitem__, default=None)
    if least is None or possible[least] >= bits:
        told = "which is the least that is possible"
    else:
        told = f"and the least that is possible is {possible[least]:.3f}, with {text_of([least])}"
    sizes = _parameter_bytes(model, replacements)
    dense = {path: one for path, one in model.named_parameters() if id(one) in sizes}
    names = sorted(dense, key=lambda path: -sizes[id(dense[path])])[:3]
    largest = ", ".join(f"{printable(path, 80)} ({sizes[id(dense[path])] / 2**20:.2f} MiB)" for path in names)
    more = any(not is_lazy(one) and one.dim() > 1 for one in dense.values())
    raise ValueError(
        f"at_most={at_most} bits a weight are out of reach: these techniques give {bits:.3f}, {told}. What stays "
        f"dense: {largest or 'nothing'}; {'parameters= stores more of it' if more else 'allow more bits'}"
    )


def _parameter_bytes(model: nn.Module, replacements: Replacements) -> dict[int, int]:
    """Return the bytes of the distinct parameters of a model whose modules were replaced, by their ids."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, Adapter):
            continue
        new = replacements.get(module, module)
        for parameter in new._parameters.values():
            if parameter is not None and not is_lazy(parameter):
                found[id(parameter)] = parameter.numel() * parameter.element_size()
    return found


def text_of(techniques: tuple[Technique, ...] | list[Technique]) -> str:
    """Return techniques as the code that makes them, without defaults; "dense" for none."""
    parts = []
    for technique in techniques:
        values = {field.name: getattr(technique, field.name) for field in fields(technique)}
        given = [f"{f.name}={values[f.name]!r}" for f in fields(technique) if f.repr and values[f.name] != f.default]
        parts.append(f"{type(technique).__name__}({', '.join(given)})")
    return ", ".join(parts) or "dense"
