"""A dense or quantized checkpoint of another program: one safetensors file, or the shards of an index."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from lowmem.errors import refusal, show
from lowmem.io.container import Checkpoint, TensorSpec, open_checkpoint
from lowmem.io.shards import INDEX, read_index

__all__ = ["Source"]

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


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
        self._stack = ExitStack()
        self._files: dict[str, Checkpoint] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.paths: set[Path] = set()
        try:
            if not path.name.endswith(INDEX):
                self._add(path, None)
                return
            names: dict[str, set[str]] = {}  # by file
            for name, file in read_index(path).items():
                names.setdefault(file, set()).add(name)
            _check_listed(path, names)
            self.paths.add(path.resolve())  # once it has been read: a link to itself is a RuntimeError here
            for file in sorted(names):
                self._add(path.with_name(file), names[file])
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor into newly allocated memory."""
        return self._files[name].read_tensor(name)

    def _add(self, path: Path, names: set[str] | None) -> None:
        file = self._stack.enter_context(open_checkpoint(path))
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
