"""Bits per weight of a converted model, the least that is possible, and the warning about what stays dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import printable_line, short_repr
from lowmem.measure import nbytes, weight_count
from lowmem.nn.adapter import Adapter
from lowmem.nn.stored_module import StoredModule, dense_bytes_by_part
from lowmem.nn.techniques import FourBit, Half, LoRA
from lowmem.quant.packing import MAX_BLOCK_SIZE
from lowmem.quant.scale_encodings import ENCODINGS
from lowmem.transforms.module_registry import (
    ModuleFilter,
    Technique,
    all_paths_by_module,
    conversion_skip_reason,
    storable_parameter_names,
)
from lowmem.transforms.module_selection import first_path_by_selected_module

_TOLD_SHARE = 0.1  # of the bytes; convert warns if weights of more stay dense
# Bytes: where no more stay dense, convert warns if matrices alone are more than that share
_FEW = 2**16

Replacements: TypeAlias = Mapping[nn.Module, nn.Module]

# The largest blocks have the fewest scales; which encoding of these is the smallest depends on the length of rows.
# Formats differ in levels alone. Rows of one or two weights are smaller in 16 bits than with a scale of their own.
SMALLEST: tuple[Half | FourBit, ...] = (
    *(FourBit("nf4", MAX_BLOCK_SIZE, scales, embeddings="4bit") for scales in ENCODINGS),
    Half(torch.bfloat16),
)


def check_bit_limit(max_bits_per_weight: float) -> None:
    """Raise a ValueError unless ``max_bits_per_weight`` is a number of bits."""
    if (
        isinstance(max_bits_per_weight, bool)
        or not isinstance(max_bits_per_weight, int | float)
        or not max_bits_per_weight > 0
    ):
        raise ValueError(f"at_most={short_repr(max_bits_per_weight)} must be a number of bits above 0")


def bits_per_weight_without_adapters(model: nn.Module, replacements: Replacements) -> float:
    """Return the bits of all parameters without adapters, by the weights of the model, if modules were replaced."""
    return 8 * nbytes(_parameters_without_adapters(model, replacements)) / max(1, weight_count(model))


def check_bits_per_weight(
    model: nn.Module,
    replacements: Replacements,
    max_bits_per_weight: float,
    make_replacements: Callable[[Technique], Replacements],
) -> None:
    """Raise a ValueError if a model would take more than ``max_bits_per_weight`` bits a weight after
    ``replacements``.

    The error names the largest weights that stay dense, and the least that is possible: ``make_replacements``
    returns what modules would become with another technique, without values.
    """
    bits = bits_per_weight_without_adapters(model, replacements)
    if bits <= max_bits_per_weight:
        return
    possible = {}
    for technique in SMALLEST:
        try:
            possible[technique] = bits_per_weight_without_adapters(model, make_replacements(technique))
        except (TypeError, ValueError):
            # The model has nothing that this technique stores
            continue
    least = min(possible, key=possible.__getitem__, default=None)
    if least is None or possible[least] >= bits:
        least_text = "which is the least that is possible"
    else:
        least_text = f"and the least that is possible is {possible[least]:.3f}, with {techniques_as_code([least])}"
    remaining_parameters = _parameters_without_adapters(model, replacements)
    dense = {path: parameter for path, parameter in model.named_parameters() if parameter in remaining_parameters}
    names = sorted(dense, key=lambda path: -dense[path].nbytes)[:3]
    largest = ", ".join(f"{printable_line(path, 80)} ({dense[path].nbytes / 2**20:.2f} MiB)" for path in names)
    more = any(parameter.dim() > 1 for parameter in dense.values())
    raise ValueError(
        f"at_most={max_bits_per_weight} bits a weight are out of reach: these techniques give {bits:.3f}, "
        f"{least_text}. What stays "
        f"dense: {largest or 'nothing'}; {'parameters= stores more of it' if more else 'allow more bits'}"
    )


def _parameters_without_adapters(model: nn.Module, replacements: Replacements) -> set[Tensor]:
    """Return the distinct parameters, adapters left out, of a model whose modules were replaced."""
    modules = [
        replacements.get(candidate, candidate) for candidate in model.modules() if not isinstance(candidate, Adapter)
    ]
    distinct = {candidate for module in modules for candidate in module._parameters.values() if candidate is not None}
    return {candidate for candidate in distinct if not is_lazy(candidate)}


def techniques_as_code(techniques: tuple[Technique, ...] | list[Technique]) -> str:
    """Return techniques as the code that makes them, without defaults; "dense" for none."""
    parts = []
    for technique in techniques:
        values = [(f, getattr(technique, f.name)) for f in fields(technique) if technique != FourBit()]
        arguments = [f"{f.name}={value!r}" for f, value in values if f.repr and value != f.default]
        parts.append(f"{type(technique).__name__}({', '.join(arguments)})")
    return ", ".join(parts) or "dense"


def dense_weights_warning_or_none(
    model: nn.Module,
    replacements: Replacements,
    technique_type: type[Technique],
    where: ModuleFilter,
    skip: str | Iterable[str],
) -> str | None:
    """Return the warning if more than a tenth of the bytes stay dense unasked; None otherwise, and for ``LoRA``.

    Counted are the bytes of the dense model, of parameters and floating-point buffers, also of what was stored
    before; those of modules that ``where`` and ``skip`` leave out do not stay dense unasked. A few bytes are told of
    where matrices are a tenth.
    """
    if technique_type is LoRA:
        return None
    seen: set[int] = set()
    total, matrices, left = 0, 0, Counter[str]()
    chosen = first_path_by_selected_module(model, where, skip)
    for module in all_paths_by_module(model):
        after = replacements.get(module, module)
        stored = {*after.forms, *after.part_parameter_names} if isinstance(after, StoredModule) else set()
        sizes = dense_bytes_by_part(module) if isinstance(module, StoredModule) else {}
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or is_lazy(tensor) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            # Masks, and numbers of steps
            if name in module._buffers and not tensor.is_floating_point():
                continue
            size = sizes.get(name, tensor.numel() * tensor.element_size())
            total += size
            if name in stored or module not in chosen:
                continue
            matrices += size if tensor.dim() > 1 and name in module._parameters else 0
            left[
                f"{type(module).__name__}.{name}: "
                f"{_dense_tensor_reason_and_remedy(module, name, tensor, technique_type)}"
            ] += size
    dense = left.total()
    if (dense if dense > _FEW else matrices) <= _TOLD_SHARE * total:
        return None
    reasons_text = "; ".join(f"{size / total:.0%} {reason}" for reason, size in left.most_common(3))
    return (
        f"{dense / total:.0%} of the bytes of {type(model).__name__} are weights that stay dense: {reasons_text}. "
        "skip= says "
        "which are meant to; lowmem.summary(model) lists all"
    )


def _dense_tensor_reason_and_remedy(
    module: nn.Module, name: str, tensor: Tensor, technique_type: type[Technique]
) -> str:
    """Return why a parameter or buffer stays dense, and what to do about it."""
    if name in module._buffers:
        return "a buffer: only parameters are stored, but model.to(torch.bfloat16) casts it"
    if tensor.dim() < 2:
        return "a vector: only matrices have rows to store, but model.to(torch.bfloat16) casts it"
    if isinstance(module, StoredModule):
        return "its module stores others already: call lowmem.restore first, and convert with parameters="
    reason = conversion_skip_reason(technique_type, module)
    if reason is None and name in storable_parameter_names(module):
        return "it shares a weight with a module that stays dense: store both (parameters=), or untie them"
    return reason or "no entry of the registry names it: parameters= does"
