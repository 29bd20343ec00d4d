"""The version, and how lowmem is installed: in a file of its own, which the build reads without importing torch."""

__version__ = "0.1.0"

ADDRESS = ""
"""Where the project is, as ``https://github.com/OWNER/lowmem``; empty until it is known. What is built says it."""

IS_PUBLISHED = False
"""Whether a package index has lowmem; ``python .ci/release.py publish`` sets this, and changes the guides with it."""


def reinstall_command() -> str:
    """Return the command that compiles an installed lowmem again: pip's cache may hold a wheel without the kernel."""
    return f"pip install --force-reinstall --no-deps --no-cache-dir {'lowmem' if IS_PUBLISHED else '.'}"


def install_command(extra: str) -> str:
    """Return the command that installs lowmem with an extra; before the first release it is run in a checkout."""
    return f"pip install '{'lowmem' if IS_PUBLISHED else '.'}[{extra}]'"
