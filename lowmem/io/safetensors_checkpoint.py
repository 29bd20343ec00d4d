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

from lowmem.errors import file_error, short_repr
from lowmem.io.filesystem import open_regular_file, read_errors_with_path, read_exactly_into
from lowmem.io.safetensors_header import TensorSpec, parse_metadata_and_entries, read_header_json
from lowmem.io.shards import INDEX, read_weight_map

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


class SafetensorsFile:
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
            self._file = stack.enter_context(open_regular_file(self.path))
            with read_errors_with_path(self.path):
                text = read_header_json(self.path, self._file)
            self._start = 8 + len(text)
            try:
                self.metadata, tensors = parse_metadata_and_entries(
                    text, os.fstat(self._file.fileno()).st_size - self._start
                )
            except ValueError as reason:
                raise file_error(self.path, f"it is no valid safetensors file: {reason}; get it again") from None
            self._tensors = dict(sorted(tensors.items(), key=lambda item: item[1].begin))
            self.specs = {name: placed.spec for name, placed in self._tensors.items()}
            stack.pop_all()

    def __enter__(self) -> SafetensorsFile:
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
        read_exactly_into(self.path, self._file, where, content.numpy().data, f", in tensor {short_repr(name)}")
        return content.view(placed.spec.dtype).view(placed.spec.shape)


class SafetensorsCheckpoint:
    """A dense checkpoint: one safetensors file, or the shards of an index. Use it in a ``with`` statement.

    Attributes:
        specs: the dtype and shape of each tensor.
        paths: of all its files.

    Raises:
        FileError: a file is no valid safetensors file, or the index does not match the files.
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._files: dict[str, SafetensorsFile] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.paths: set[Path] = set()
        with ExitStack() as stack:
            if path.name.endswith(INDEX):
                # By file
                names: dict[str, set[str]] = {}
                for name, file in read_weight_map(path).items():
                    names.setdefault(file, set()).add(name)
                _check_all_shards_listed(path, names)
                # Once it has been read: a link to itself is a RuntimeError here
                self.paths.add(path.resolve())
                for file in sorted(names):
                    self._check_and_add_file(stack.enter_context(SafetensorsFile(path.with_name(file))), names[file])
            else:
                self._check_and_add_file(stack.enter_context(SafetensorsFile(path)), None)
            self._stack = stack.pop_all()

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor into newly allocated memory."""
        return self._files[name].read_tensor(name)

    def _check_and_add_file(self, file: SafetensorsFile, indexed_names: set[str] | None) -> None:
        path = file.path
        if "lowmem" in file.metadata:
            raise file_error(path, "lowmem wrote it already; convert the checkpoint that it was made from")
        if not file.specs:
            raise file_error(path, "it holds no tensors; name a checkpoint that has some")
        for name in file.specs:
            # ".weight" would be taken for "weight"
            if "" in name.split("."):
                raise file_error(path, f"its tensor {short_repr(name)} has a name that no model's has; get it again")
        if indexed_names is not None and indexed_names != set(file.specs):
            wrong = min(indexed_names ^ set(file.specs))
            raise file_error(
                path, f"it and its index differ in tensor {short_repr(wrong)}; get them again from one source"
            )
        self.paths.add(path.resolve())
        self._files |= dict.fromkeys(file.specs, file)
        self.specs |= file.specs


def _check_all_shards_listed(index_path: Path, shard_names: Iterable[str]) -> None:
    """Raise if an index lists some of the shards that are named as parts of one model, and not all of them."""
    shard_numbers: dict[tuple[str, str], set[str]] = {}
    for file in shard_names:
        match = _SHARD.fullmatch(file)
        if match is not None:
            shard_numbers.setdefault((match[1], match[3]), set()).add(match[2])
    for (name, count), numbers in shard_numbers.items():
        if len(numbers) != int(count):
            shards = f"{short_repr(name)} of {int(count)} shards"
            raise file_error(index_path, f"it lists {len(numbers)} files of {shards}; get it again")


def check_each_pattern_matches_a_tensor(patterns: Iterable[str], tensor_names: Collection[str]) -> None:
    """Raise a ValueError unless each glob pattern matches the name of a tensor."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in tensor_names):
            raise ValueError(
                f"pattern {pattern!r} matches no tensor; check it, the first is {short_repr(min(tensor_names))}"
            )
