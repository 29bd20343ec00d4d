"""What stays dense, and the warning about its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.nn.stored_module import StoredModule, dense_bytes
from lowmem.nn.techniques import LoRA
from lowmem.transforms.registry import Technique, module_paths, parameters_to_store, skip_reason
from lowmem.transforms.select import select_modules

__all__ = ["warning_of_dense"]

_TOLD_SHARE = 0.1  # of the bytes; convert warns if weights of more stay dense
_FEW = 2**16  # bytes: where no more stay dense, convert warns if matrices alone are more than that share


def warning_of_dense(
    model: nn.Module,
    replacements: Mapping[nn.Module, nn.Module],
    technique: type[Technique],
    where: Callable[[str, nn.Module], bool] | None,
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
