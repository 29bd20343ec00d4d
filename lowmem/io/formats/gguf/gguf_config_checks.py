"""Checks of the values that a config, or the metadata of a GGUF file, has of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.errors import short_repr

_REPAIR = "; repair config.json"


def checked_positive_integer(
    config: Mapping[str, Any], name: str, default: int | None = None, remedy: str = _REPAIR
) -> int:
    """Return a positive integer of 31 bits; a ValueError for anything else. A default is taken for None, too."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{name}={short_repr(value)} must be a positive integer{remedy}")
    return value


def checked_positive_number(
    config: Mapping[str, Any], name: str, default: float | None = None, remedy: str = _REPAIR
) -> float:
    """Return a positive number below 2**64; a ValueError for anything else. A default is taken for None, too."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**64:
        raise ValueError(f"{name}={short_repr(value)} must be a positive number{remedy}")
    return float(value)


def checked_object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object of a config, an empty one for None; a ValueError for anything else."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name}={short_repr(value)} must be an object{_REPAIR}")
    return value
