"""What a format of another program is: how it is recognized, read and written, and what its config may say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from lowmem.errors import show
from lowmem.io.formats.exported import Exported
from lowmem.io.formats.foreign_tensor import ForeignTensor
from lowmem.io.source import Source

__all__ = ["Finder", "Foreign", "Target", "contradiction", "one_of"]

Finder: TypeAlias = Callable[[Source, Mapping[str, Any]], Iterator[tuple[ForeignTensor, set[str]]]]
"""A checkpoint, and what its config.json says of the quantization -> each weight, and the names of its tensors."""


@dataclass(frozen=True)
class Target:
    """How ``lowmem export`` writes a format.

    Args:
        write: ``write(source, out, requantize=..., progress=..., **options)`` writes it and returns the rows. When it
            raises ValueError, FileError or OSError it has written nothing.
        ending: of the file's name; None: the format writes a folder.
        options: names of further arguments of ``write``, of those that ``export`` has.
    """

    write: Callable[..., list[Exported]]
    ending: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Foreign:
    """A format.

    Args:
        name: by which errors and ``--format`` call it.
        find: finds its weights in a safetensors checkpoint, ValueError: some contradict each other; None: it has
            files of its own.
        coded_names: last parts of the names of tensors that mean nothing without the others of a weight.
        method: the ``quant_method`` of its config.
        settings: what other fields of the config may be.
        check: config, kinds of the weights -> nothing, or ValueError: they contradict each other.
        magic: what its own files begin with.
        open: opens one of them, and returns the open file, its tensors, and the names of those that are left out.
        target: how it is written; None: it is read only.
    """

    name: str
    find: Finder | None = None
    coded_names: tuple[str, ...] = ()
    method: str | None = None
    settings: Mapping[str, Callable[[object], bool]] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any], Collection[str]], None] = lambda config, kinds: None
    magic: bytes = b""
    open: Callable[[Path], tuple[BufferedReader, list[ForeignTensor], list[str]]] | None = None
    target: Target | None = None

    def check_config(self, config: Mapping[str, Any], kinds: Collection[str]) -> None:
        """Raise unless a ``quantization_config`` can be that of weights of some kinds. A field may be missing.

        Raises:
            ValueError: it has settings that its tensors do not have.
        """
        for name, allowed in self.settings.items():
            if name in config and not allowed(config[name]):
                raise contradiction(name, config[name], f"lowmem reads no such {self.name}, or its tensors differ")
        self.check(config, kinds)


def contradiction(name: str, value: object, why: str) -> ValueError:
    """Return the error of a config that says something else than its tensors."""
    return ValueError(f"its config.json says {name}={show(value)}, and {why}; get both again from one source")


def one_of(*values: object) -> Callable[[object], bool]:
    """Return whether a value is one of some, of the same type."""
    return lambda value: any(value is known or (value == known and type(value) is type(known)) for known in values)
