"""One name for layers whose paths differ only in indices: ``layers.0-29.mlp.up_proj`` for thirty layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lowmem.transforms.registry import layer_name

__all__ = ["group_name", "indices", "role_of"]

_INDEX = re.compile(r"[0-9]{1,9}")
_LISTED = 3  # non-consecutive indices are listed up to this many; beyond, only the first and the last are


def role_of(path: str) -> tuple[str | None, ...]:
    """Return the parts of a path with None in place of indices: equal for layers of one role."""
    return tuple(None if _INDEX.fullmatch(part) else part for part in path.split("."))


def group_name(paths: Sequence[str]) -> str:
    """Return one name for paths of one role, which lists their indices."""
    parts = []
    for column in zip(*(path.split(".") for path in paths), strict=True):
        numbers = [int(part) for part in column if _INDEX.fullmatch(part)]
        parts.append(indices(numbers) if len(numbers) == len(column) else column[0])
    return layer_name(".".join(parts))


def indices(found: Iterable[int]) -> str:
    """Format indices: ``0-29``, ``0,2,5``, or ``0...58`` for many that are not consecutive."""
    listed = sorted(set(found))
    first, last = listed[0], listed[-1]
    if len(listed) > 2 and last - first == len(listed) - 1:
        return f"{first}-{last}"
    return ",".join(map(str, listed)) if len(listed) <= _LISTED else f"{first}...{last}"
