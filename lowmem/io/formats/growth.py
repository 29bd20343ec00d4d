"""The sentence for a model that takes more bytes than the tensors of another program that it is read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lowmem.errors import printable
from lowmem.io.formats.foreign import ForeignTensor, Kept
from lowmem.io.formats.requantizing import Requantizing
from lowmem.nn.techniques import EightBit, FourBit


class GrowthWarning(UserWarning):
    """A model takes more bytes than the file or folder that it is read from."""


def growth(
    path: Path, weights: Sequence[tuple[ForeignTensor, Kept]], after: int, dtype: torch.dtype | None = None
) -> str | None:
    """Return a sentence on a model that is larger than the tensors that it is read from, with the option that avoids
    the growth; None if the model is not larger.

    Args:
        path: of the file or folder.
        weights: its tensors, each with how it is kept unless a dtype or an option changes that.
        after: bytes of the model.
        dtype: of dense weights in the model; None keeps the dtype of each weight.
    """
    before = sum(tensor.nbytes for tensor, _ in weights)
    if after <= before:
        return None
    kinds = dict.fromkeys(
        tensor.kind for tensor, kept in weights if kept_bytes(tensor, with_dtype(kept, dtype)) > tensor.nbytes
    )
    sizes = {
        option: sum(kept_bytes(tensor, change(tensor, kept)) for tensor, kept in weights)
        for option, change in _options(weights).items()
    }
    said = f"{printable(path.name)}: {before / 2**20:.2f} MiB of tensors become a model of {after / 2**20:.2f} MiB"
    if kinds:
        said += f", since weights in {', '.join(kinds)} take more bits there"
    fitting = [option for option, size in sizes.items() if size <= before]
    best = fitting[0] if fitting else min(sizes, key=sizes.__getitem__)
    how = f"`lowmem quantize IN OUT{best}` makes {sizes[best] / 2**20:.2f} MiB of them"
    if fitting:
        return f"{said}: {how}"
    return f"{said}: no option avoids that" + (f"; {how}, the least" if sizes[best] < after else "")


def kept_bytes(tensor: ForeignTensor, kept: Kept) -> int:
    """Return the bytes that a tensor takes as it is kept."""
    return sum(spec.nbytes for spec in replace(tensor, form=lambda: kept).stored().specs().values())


def with_dtype(kept: Kept, dtype: torch.dtype | None) -> Kept:
    """Return ``dtype`` for a dense tensor of floating-point numbers, if it is given; else how a tensor is kept."""
    return dtype if dtype is not None and isinstance(kept, torch.dtype) and kept.is_floating_point else kept


def _options(weights: Sequence[tuple[ForeignTensor, Kept]]) -> dict[str, Callable[[ForeignTensor, Kept], Kept]]:
    """Return the options of ``lowmem quantize`` that make a model smaller, those that lose least first, each with how
    it keeps a tensor."""
    half = torch.float16 if any(kept == torch.float16 for _, kept in weights) else torch.bfloat16
    return {
        f" --dtype {str(half).removeprefix('torch.')}": lambda _, kept: with_dtype(kept, half),
        " --include '*' --format int8": partial(_included, EightBit()),
        " --include '*'": partial(_included, FourBit()),
    }


def _included(technique: FourBit | EightBit, tensor: ForeignTensor, kept: Kept) -> Kept:
    return Requantizing(include=["*"], technique=technique).of(replace(tensor, form=lambda: kept)).kept()
