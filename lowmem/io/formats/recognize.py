"""Tells what a file or folder of another program is, and opens it.

To read another format, add its file beside this one, and a line to ``READERS`` or a case to ``open_foreign``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowmem.errors import FileError, refusal, show
from lowmem.io.atomic import open_regular, read_errors
from lowmem.io.formats import awq, bitsandbytes, gptq, mxfp4
from lowmem.io.formats.claims import check_claims
from lowmem.io.formats.compressed_tensors import reading as compressed_tensors
from lowmem.io.formats.foreign_tensor import ForeignTensor
from lowmem.io.formats.gguf.reading import MAGIC, read_gguf
from lowmem.io.model_folder import WEIGHTS
from lowmem.io.safetensors import parse_json, read_at_most
from lowmem.io.shards import INDEX, read_index
from lowmem.io.source import Source

__all__ = [
    "CODED",
    "CONFIG",
    "READERS",
    "ForeignFile",
    "open_foreign",
    "quantization_of",
    "read_config",
    "read_model_config",
]

Reader = Callable[[Source, Mapping[str, Any]], Iterator[tuple[ForeignTensor, set[str]]]]

READERS: dict[str, Reader] = {
    "bitsandbytes": bitsandbytes.find,
    "gpt-oss": mxfp4.find,
    "gptq": gptq.find,
    "awq": awq.find,
    "compressed-tensors": compressed_tensors.find,
}
"""What finds the weights of a format among the tensors of a safetensors checkpoint."""

CODED = (
    *("qweight", "qzeros", "absmax", "quant_map", "SCB"),
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"),
)
"""Last parts of the names of tensors that mean nothing without the others of their format."""

CONFIG = "config.json"
_OWN = "quantize_config.json"
MAX_CONFIG = 2**24  # bytes


class ForeignFile:
    """An open file or folder of another program. Use it in a ``with`` statement.

    Attributes:
        kind: "GGUF", the formats of ``READERS`` that it has, or "safetensors" for dense tensors alone.
        tensors: by the name in the model, in the order of the file.
        left_out: names of the file's tensors that the model computes itself.
        paths: of its files.
    """

    def __init__(
        self, path: Path, stack: ExitStack, kind: str, tensors: dict[str, ForeignTensor], paths: set[Path]
    ) -> None:
        self._stack, self.kind, self.paths = stack, kind, paths
        self.tensors = {name: _guarded(path, tensor) for name, tensor in tensors.items()}
        self.left_out: list[str] = []

    def __enter__(self) -> ForeignFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def open_foreign(path: Path) -> ForeignFile:
    """Open a GGUF file, a safetensors file, the index of a sharded one, or a folder of ``save_pretrained``.

    Raises:
        FileError: it is damaged, or of a kind that lowmem does not read; lowmem wrote it.
        OSError: it cannot be read.
    """
    if not path.is_dir():
        with open_regular(path) as file, read_errors(path):
            is_gguf = file.read(len(MAGIC)) == MAGIC
        if is_gguf:
            return _gguf(path)
        return _safetensors(path, path.with_name(CONFIG))
    return _safetensors(_model_in(path), path / CONFIG)


def _gguf(path: Path) -> ForeignFile:
    file, tensors, left_out = read_gguf(path)
    stack = ExitStack()
    stack.callback(file.close)
    found = ForeignFile(path, stack, "GGUF", {tensor.name: tensor for tensor in tensors}, {path.resolve()})
    found.left_out = left_out
    return found


def _model_in(folder: Path) -> Path:
    """Return the index or the only safetensors file of a folder; of a model's, those that transformers reads."""
    with read_errors(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    for own in (f"{WEIGHTS}{INDEX}", WEIGHTS) if CONFIG in names else ():
        if own in names:  # whatever lies beside it, such as consolidated.safetensors, or variants of other dtypes
            _check_alone(folder, own, names)
            return folder / own
    for endings in ((INDEX,), (".safetensors",)):
        found = [name for name in names if name.endswith(endings)]
        if len(found) == 1:
            _check_alone(folder, found[0], names)
            return folder / found[0]
        if found:
            raise refusal(folder, f"it has {len(found)} files as {show(found[0])}; name the one to read")
    for name in names:
        if name.endswith(".gguf"):
            raise refusal(folder, f"it is a folder of GGUF files; name one, as {show(name)}")
    raise refusal(folder, "it holds no .safetensors file; name a model's folder or file")


def _check_alone(folder: Path, found: str, names: list[str]) -> None:
    """Raise if a folder has an index, and a file of the whole model beside it, which transformers would read."""
    whole = found.removesuffix(INDEX)
    if whole != found and whole in names and whole not in read_index(folder / found).values():
        raise refusal(folder, f"it has {show(found)}, and {show(whole)}, too: remove the one that is not the model")


def _safetensors(path: Path, config: Path) -> ForeignFile:
    with ExitStack() as stack:
        source = stack.enter_context(Source(path))
        settings = _settings(config)
        tensors: dict[str, ForeignTensor] = {}
        claimed: set[str] = set()
        kinds: dict[str, set[str]] = {}
        try:
            for kind, find in READERS.items():
                for tensor, names in find(source, settings):
                    if claimed & names or tensor.name in tensors:
                        raise ValueError(f"{show(min(claimed & names, default=tensor.name))} belongs to two weights")
                    claimed |= names
                    tensors[tensor.name] = tensor
                    kinds.setdefault(kind, set()).add(tensor.kind)
            check_claims(kinds, settings)
        except FileError:
            raise
        except ValueError as reason:
            raise refusal(path, str(reason)) from None
        for name, spec in source.specs.items():
            if name in claimed:
                continue
            half = spec.dtype == torch.uint8 and name.endswith("_scales")  # of MXFP4, without its codes
            if half or name.rpartition(".")[2] in CODED:
                why = f"its tensor {show(name)} belongs to a format that lowmem does not read"
                raise refusal(path, f"{why}: take the folder that it was made from")
            if name in tensors:
                raise refusal(path, f"it has {show(name)} twice, in 4 bits and dense; get it again")
            kind = str(spec.dtype).removeprefix("torch.")
            read = partial(source.read_tensor, name)
            tensors[name] = ForeignTensor(name, spec.shape, kind, spec.nbytes, partial(_same, spec.dtype), read)
        return ForeignFile(path, stack.pop_all(), ", ".join(kinds) or "safetensors", tensors, source.paths)


def _settings(config: Path) -> dict[str, Any]:
    """Return a folder's ``quantization_config``; or what AutoGPTQ wrote in its own file before there was one."""
    found = quantization_of(config) if os.path.lexists(config) else {}
    own = config.with_name(_OWN)
    if found or not os.path.lexists(own):
        return found
    content = read_config(own)
    if not isinstance(content, dict):
        raise refusal(own, f"it is {show(content)}, and must be an object; get it again")
    return content


def _guarded(path: Path, tensor: ForeignTensor) -> ForeignTensor:
    """Return a weight whose errors name the file."""

    def guard(read: Callable[[], Any]) -> Callable[[], Any]:
        def guarded() -> Any:
            try:
                return read()
            except FileError:
                raise
            except ValueError as reason:
                raise refusal(path, f"tensor {show(tensor.name)}: {reason}") from None

        return guarded

    values, order = (None if one is None else guard(one) for one in (tensor.values, tensor.order))
    return replace(tensor, kept=guard(tensor.kept), read=guard(tensor.read), values=values, order=order)


def _same(value: Any) -> Any:
    return value


def read_config(path: Path) -> Any:
    """Return what a model's config.json holds.

    Raises:
        FileError, OSError: the file is too large or damaged, or cannot be read.
    """
    text = read_at_most(path, MAX_CONFIG, "config")
    try:
        return parse_json(text)
    except ValueError as reason:
        raise refusal(path, f"it is damaged: {reason}; get it again") from None


def read_model_config(path: Path) -> dict[str, Any]:
    """Return a model's config.json, whose ``quantization_config``, if it has one, is an object.

    Raises:
        FileError, OSError: as ``read_config``, or it is no config of a model.
    """
    config = read_config(path)
    if not isinstance(config, dict):
        raise refusal(path, f"it is {show(config)}, and no config of a model; get it again")
    _quantization_in(config, path)
    return config


def quantization_of(path: Path) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model's config.json, or nothing.

    Raises:
        FileError, OSError: the file is damaged, or cannot be read.
    """
    content = read_config(path)
    return _quantization_in(content, path) if isinstance(content, dict) else {}


def _quantization_in(config: dict[str, Any], path: Path) -> dict[str, Any]:
    found = config.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise refusal(path, f"quantization_config={show(found)} must be an object; repair it")
    return found or {}
