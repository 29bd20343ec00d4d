"""Code that a folder brings: transformers asks on standard input whether to run it, and lowmem says no."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowmem.errors import exception_text, short_repr

_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
"""Settings of configs that may name a kernel of the Hub, as owner/name."""


def remove_auto_map_entries(config: Any) -> None:
    """Remove what names code from a config of transformers and those in it: models in a model are made without asking
    the caller whether to trust it."""
    left = [config]
    while left:
        value = left.pop()
        if isinstance(value, list | tuple):
            left += value
            continue
        content = value if isinstance(value, dict) else vars(value) if hasattr(value, "sub_configs") else {}
        content.pop("auto_map", None)
        left += content.values()


def hub_kernel_setting_text_or_none(config: Any) -> str | None:
    """Return the setting of a config's JSON that names a kernel of the Hub, which transformers would download."""
    left = [config]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        for name, inner in value.items() if isinstance(value, dict) else ():
            named = inner.values() if isinstance(inner, dict) else (inner,)
            if name in _IMPLEMENTATIONS and any(isinstance(item, str) and "/" in item for item in named):
                return f"{name}={short_repr(inner)}"
            left.append(inner)
    return None


@contextmanager
def empty_stdin() -> Iterator[None]:
    """Let nothing be read from standard input in the block, so that no question is answered with yes."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


NEEDS_CODE = (
    "it needs code of its own (auto_map), and none was run: take a model that transformers has, or if you trust it, "
    "load it in Python: from_pretrained(..., trust_remote_code=True)"
)


def has_trust_remote_code_in_text(error: BaseException) -> bool:
    """Whether an error of transformers says that it did not run code."""
    return "trust_remote_code" in exception_text(error)
