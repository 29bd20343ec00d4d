"""Safetensors files of any program, read one tensor at a time: a single file, or the shards of an index."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import refusal, show
from lowmem.io.atomic import open_regular, read_errors, read_into
from lowmem.io.safetensors import TensorSpec, parse, read_header
from lowmem.io.shards import INDEX, read_index

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


class Checkpoint:
    """A safetensors file of any program. Use it in a ``with`` statement. The header is checked; a digest is not.

    Attributes:
        path: of the file.
        specs: the dtype and shape of each tensor, in the order of the file.
        metadata: the header's ``__metadata__``.

    Raises:
        FileError: it is no valid safetensors file.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with ExitStack() as stack:
            self._file = stack.enter_context(open_regular(self.path))
            with read_errors(self.path):
                text = read_header(self.path, self._file)
            self._start = 8 + len(text)
            try:
                self.metadata, tensors = parse(text, os.fstat(self._file.fileno()).st_size - self._start)
            except ValueError as reason:
                raise refusal(self.path, f"it is no valid safetensors file: {reason}; get it again") from None
            self._tensors = dict(sorted(tensors.items(), key=lambda item: item[1].begin))
            self.specs = {name: placed.spec for name, placed in self._tensors.items()}
            stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_tensor(self, name: str) -> Tensor:
        """Read a tensor into newly allocated memory.

        Raises:
            KeyError: the file has no such tensor.
            FileError: the file was truncated after it was opened.
            OSError: the file cannot be read.
        """
        placed = self._tensors[name]
        content = torch.empty(placed.spec.nbytes, dtype=torch.uint8, device="cpu")
        where = self._start + placed.begin
        read_into(self.path, self._file, where, content.numpy().data, f", in tensor {show(name)}")
        return content.view(placed.spec.dtype).view(placed.spec.shape)


class Source:
    """A dense checkpoint: one safetensors file, or the shards of an index. Use it in a ``with`` statement.

    Attributes:
        specs: the dtype and shape of each tensor.
        paths: of all its files.

    Raises:
        FileError: a file is no valid safetensors file, or the index does not match the files.
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Checkpoint] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.paths: set[Path] = set()
        with ExitStack() as stack:
            if path.name.endswith(INDEX):
                names: dict[str, set[str]] = {}  # by file
                for name, file in read_index(path).items():
                    names.setdefault(file, set()).add(name)
                _check_listed(path, names)
                self.paths.add(path.resolve())  # once it has been read: a link to itself is a RuntimeError here
                for file in sorted(names):
                    self._add(stack.enter_context(Checkpoint(path.with_name(file))), names[file])
            else:
                self._add(stack.enter_context(Checkpoint(path)), None)
            self._stack = stack.pop_all()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor into newly allocated memory."""
        return self._files[name].read_tensor(name)

    def _add(self, file: Checkpoint, names: set[str] | None) -> None:
        path = file.path
        if "lowmem" in file.metadata:
            raise refusal(path, "lowmem wrote it already; convert the checkpoint that it was made from")
        if not file.specs:
            raise refusal(path, "it holds no tensors; name a checkpoint that has some")
        for name in file.specs:
            if "" in name.split("."):  # ".weight" would be taken for "weight"
                raise refusal(path, f"its tensor {show(name)} has a name that no model's has; get it again")
        if names is not None and names != set(file.specs):
            wrong = min(names ^ set(file.specs))
            raise refusal(path, f"it and its index differ in tensor {show(wrong)}; get them again from one source")
        self.paths.add(path.resolve())
        self._files |= dict.fromkeys(file.specs, file)
        self.specs |= file.specs


def _check_listed(path: Path, files: Iterable[str]) -> None:
    """Raise if an index lists some of the shards that are named as parts of one model, and not all of them."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in files:
        match = _SHARD.fullmatch(file)
        if match is not None:
            found.setdefault((match[1], match[3]), set()).add(match[2])
    for (name, count), numbers in found.items():
        if len(numbers) != int(count):
            shards = f"{show(name)} of {int(count)} shards"
            raise refusal(path, f"it lists {len(numbers)} files of {shards}; get it again")


def check_patterns(patterns: Iterable[str], names: Collection[str]) -> None:
    """Raise a ValueError unless each glob pattern matches the name of a tensor."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"pattern {pattern!r} matches no tensor; check it, the first is {show(min(names))}")
