"""Which transformers the integration works with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from lowmem.version import install_command

OLDEST = (5, 24)
"""The oldest version of transformers whose loading calls a quantizer as this one needs it."""

_INSTALL = install_command("transformers")


def check_transformers_version() -> None:
    """Raise an ImportError unless transformers is installed, and new enough."""
    oldest = ".".join(map(str, OLDEST))
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        raise ImportError(
            f"lowmem.integrations.transformers needs transformers {oldest} or newer, which is not installed: "
            f"{_INSTALL}"
        ) from None
    numbers = tuple(map(int, re.findall(r"\d+", installed)[:2]))
    if numbers < OLDEST:
        raise ImportError(
            f"lowmem.integrations.transformers needs transformers {oldest} or newer; {installed} is installed: "
            f"{_INSTALL}"
        )
