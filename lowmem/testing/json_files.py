"""Reads the JSON files that reports are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem.errors import refusal
from lowmem.io.safetensors import parse_json, read_at_most

__all__ = ["MOST_BYTES", "read_json"]

MOST_BYTES = 2**28
"""Largest file that is read, in bytes; a benchmark run with every single time has about 10 MiB."""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileError: the file is damaged, or too large.
        OSError: the file cannot be read.
    """
    text = read_at_most(path, MOST_BYTES, "run and no verdict")
    try:
        return parse_json(text)
    except ValueError as reason:
        raise refusal(path, f"{reason}; write it again with the gate or the benchmarks") from None
