"""Writes a safetensors file as any program reads it, one tensor at a time: without lowmem's digest and metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lowmem.errors import show
from lowmem.io.atomic import atomic_file, write_errors
from lowmem.io.container import TensorSpec, bytes_of
from lowmem.io.safetensors import Header, encode, place

__all__ = ["write_plain"]


def write_plain(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file atomically from a stream of tensors, in any order. Its bytes depend on these alone.

    Args:
        path: of the file.
        specs: the dtype and shape of each tensor, by name.
        tensors: each name of ``specs`` once, with its tensor.

    Raises:
        ValueError: a tensor is missing, comes twice or differs from its spec.
        OSError: the file cannot be written.
    """
    header = Header({"format": "pt"}, place(specs))
    start, missing = encode(header), dict(header.tensors)
    with atomic_file(path) as file:
        with write_errors(path):
            file.write(start)
        for name, tensor in tensors:
            placed = missing.pop(name, None)
            if placed is None or placed.spec != TensorSpec.of(tensor):
                raise ValueError(
                    f"tensor {show(name)} is {TensorSpec.of(tensor)}, and the specs say {specs.get(name)}"
                )
            with write_errors(path):
                file.seek(len(start) + placed.begin)
                file.write(bytes_of(tensor))
            del tensor
        if missing:
            raise ValueError(f"{len(missing)} tensors did not come, the first of them {show(next(iter(missing)))}")
