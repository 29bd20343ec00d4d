"""Bits per weight of a converted model, the least that is possible, and the warning about what stays dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import printable, show
from lowmem.measure import nbytes, weight_count
from lowmem.nn.adapter import Adapter
from lowmem.nn.stored_module import StoredModule, dense_bytes
from lowmem.nn.techniques import FourBit, Half, LoRA
from lowmem.quant.packing import MAX_BLOCK_SIZE
from lowmem.quant.scales import ENCODINGS
from lowmem.transforms.registry import Technique, Where, module_paths, parameters_to_store, skip_reason
from lowmem.transforms.select import select_modules

_TOLD_SHARE = 0.1  # of the bytes; convert warns if weights of more stay dense
_FEW = 2**16  # bytes: where no more stay dense, convert warns if matrices alone are more than that share

Replacements: TypeAlias = Mapping[nn.Module, nn.Module]

# The largest blocks have the fewest scales; which encoding of these is the smallest depends on the length of rows.
# Formats differ in levels alone. Rows of one or two weights are smaller in 16 bits than with a scale of their own.
SMALLEST: tuple[Half | FourBit, ...] = (
    *(FourBit("nf4", MAX_BLOCK_SIZE, scales, embeddings="4bit") for scales in ENCODINGS),
    Half(torch.bfloat16),
)


def check_at_most(at_most: float) -> None:
    """Raise a ValueError unless ``at_most`` is a number of bits."""
    if isinstance(at_most, bool) or not isinstance(at_most, int | float) or not at_most > 0:
        raise ValueError(f"at_most={show(at_most)} must be a number of bits above 0")


def bits_per_weight(model: nn.Module, replacements: Replacements) -> float:
    """Return the bits of all parameters without adapters, by the weights of the model, if modules were replaced."""
    return 8 * nbytes(_parameters(model, replacements)) / max(1, weight_count(model))


def refuse_more_bits(
    model: nn.Module, replacements: Replacements, at_most: float, rebuilt: Callable[[Technique], Replacements]
) -> None:
    """Raise a ValueError if a model would take more than ``at_most`` bits a weight after ``replacements``.

    The error names the largest weights that stay dense, and the least that is possible: ``rebuilt`` returns what
    modules would become with another technique, without values.
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
    kept = _parameters(model, replacements)
    dense = {path: one for path, one in model.named_parameters() if one in kept}
    names = sorted(dense, key=lambda path: -dense[path].nbytes)[:3]
    largest = ", ".join(f"{printable(path, 80)} ({dense[path].nbytes / 2**20:.2f} MiB)" for path in names)
    more = any(one.dim() > 1 for one in dense.values())
    raise ValueError(
        f"at_most={at_most} bits a weight are out of reach: these techniques give {bits:.3f}, {told}. What stays "
        f"dense: {largest or 'nothing'}; {'parameters= stores more of it' if more else 'allow more bits'}"
    )


def _parameters(model: nn.Module, replacements: Replacements) -> set[Tensor]:
    """Return the distinct parameters, adapters left out, of a model whose modules were replaced."""
    modules = [replacements.get(one, one) for one in model.modules() if not isinstance(one, Adapter)]
    found = {one for module in modules for one in module._parameters.values() if one is not None}
    return {one for one in found if not is_lazy(one)}


def text_of(techniques: tuple[Technique, ...] | list[Technique]) -> str:
    """Return techniques as the code that makes them, without defaults; "dense" for none."""
    parts = []
    for technique in techniques:
        values = [(f, getattr(technique, f.name)) for f in fields(technique) if technique != FourBit()]
        given = [f"{f.name}={value!r}" for f, value in values if f.repr and value != f.default]
        parts.append(f"{type(technique).__name__}({', '.join(given)})")
    return ", ".join(parts) or "dense"


def warning_of_dense(
    model: nn.Module,
    replacements: Replacements,
    technique: type[Technique],
    where: Where,
    skip: str | Iterable[str],
) -> str | None:
    """Return the warning if more than a tenth of the bytes stay dense unasked; None otherwise, and for ``LoRA``.

    Counted are the bytes of the dense model, of parameters and floating-point buffers, also of what was stored
    before; those of modules that ``where`` and ``skip`` leave out do not stay dense unasked. A few bytes are told of
    where matrices are a tenth.
    """
    if technique is LoRA:
        return None
    seen: set[int] = set()
    total, matrices, left = 0, 0, Counter[str]()
    chosen = select_modules(model, where, skip)
    for module in module_paths(model):
        after = replacements.get(module, module)
        stored = {*after.forms, *after.part_names} if isinstance(after, StoredModule) else set()
        sizes = dense_bytes(module) if isinstance(module, StoredModule) else {}
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or is_lazy(tensor) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if name in module._buffers and not tensor.is_floating_point():  # masks, and numbers of steps
                continue
            size = sizes.get(name, tensor.numel() * tensor.element_size())
            total += size
            if name in stored or module not in chosen:
                continue
            matrices += size if tensor.dim() > 1 and name in module._parameters else 0
            left[f"{type(module).__name__}.{name}: {_why_dense(module, name, tensor, technique)}"] += size
    dense = left.total()
    if (dense if dense > _FEW else matrices) <= _TOLD_SHARE * total:
        return None
    told = "; ".join(f"{size / total:.0%} {reason}" for reason, size in left.most_common(3))
    return (
        f"{dense / total:.0%} of the bytes of {type(model).__name__} are weights that stay dense: {told}. skip= says "
        "which are meant to; lowmem.summary(model) lists all"
    )


def _why_dense(module: nn.Module, name: str, tensor: Tensor, technique: type[Technique]) -> str:
    """Return why a parameter or buffer stays dense, and what to do about it."""
    if name in module._buffers:
        return "a buffer: only parameters are stored, but model.to(torch.bfloat16) casts it"
    if tensor.dim() < 2:
        return "a vector: only matrices have rows to store, but model.to(torch.bfloat16) casts it"
    if isinstance(module, StoredModule):
        return "its module stores others already: call lowmem.restore first, and convert with parameters="
    reason = skip_reason(technique, module)
    if reason is None and name in parameters_to_store(module):
        return "it shares a weight with a module that stays dense: store both (parameters=), or untie them"
    return reason or "no entry of the registry names it: parameters= does"
