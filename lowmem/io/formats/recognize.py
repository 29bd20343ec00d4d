"""Tells what a file or folder of another program is, and opens it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowmem.errors import refusal, refusing, show
from lowmem.io.atomic import read_errors, starts_with
from lowmem.io.formats.foreign import ForeignTensor, contradiction
from lowmem.io.formats.programs import FOREIGN
from lowmem.io.model_folder import CONFIG, WEIGHTS, check_alone, quantization_of, read_object, weights_in
from lowmem.io.shards import INDEX
from lowmem.io.source import Source

_OWN = "quantize_config.json"  # of AutoGPTQ


class ForeignFile:
    """An open file or folder of another program. Use it in a ``with`` statement.

    Attributes:
        kind: the formats that it has, or "safetensors" for dense tensors alone.
        tensors: by the name in the model, in the order of the file.
        left_out: names of the file's tensors that the model computes itself.
        paths: of its files.
    """

    def __init__(
        self,
        path: Path,
        stack: ExitStack,
        kind: str,
        tensors: dict[str, ForeignTensor],
        paths: set[Path],
        left_out: Sequence[str] = (),
    ) -> None:
        self._stack, self.kind, self.paths, self.left_out = stack, kind, paths, left_out
        self.tensors: dict[str, ForeignTensor] = {}
        for name, tensor in tensors.items():
            guard = refusing(path, about=f"tensor {show(tensor.name)}: ")
            found = {part: getattr(tensor, part) for part in ("read", "form", "values", "order")}
            guarded: dict[str, Any] = {part: guard(read) for part, read in found.items() if read is not None}
            self.tensors[name] = replace(tensor, **guarded)

    def __enter__(self) -> ForeignFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def open_foreign(path: Path) -> ForeignFile:
    """Open a GGUF file, a safetensors file, the index of a sharded one, or a folder of ``save_pretrained``.

    Raises:
        FileError: it is damaged, or of a kind that lowmem does not read; lowmem wrote it.
    """
    if not path.is_dir():
        for format in FOREIGN.values():
            if format.open is not None and starts_with(path, format.magic):
                file, tensors, left_out = format.open(path)
                stack = ExitStack()
                stack.callback(file.close)
                by_name = {tensor.name: tensor for tensor in tensors}
                return ForeignFile(path, stack, format.name, by_name, {path.resolve()}, left_out)
        return _safetensors(path, path.with_name(CONFIG))
    return _safetensors(_model_in(path), path / CONFIG)


def _model_in(folder: Path) -> Path:
    """Return the index or the only safetensors file of a folder; of a model's, those that transformers reads."""
    with read_errors(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    if CONFIG in names and not {f"{WEIGHTS}{INDEX}", WEIGHTS}.isdisjoint(names):
        return weights_in(folder)  # whatever is beside it, as consolidated.safetensors, or variants of other dtypes
    for endings in ((INDEX,), (".safetensors",)):
        found = [name for name in names if name.endswith(endings)]
        if len(found) == 1:
            check_alone(folder / found[0])
            return folder / found[0]
        if found:
            raise refusal(folder, f"it has {len(found)} files as {show(found[0])}; name the one to read")
    for name in names:
        if name.endswith(".gguf"):
            raise refusal(folder, f"it is a folder of GGUF files; name one, as {show(name)}")
    raise refusal(folder, "it holds no .safetensors file; name a model's folder or file")


def _safetensors(path: Path, config: Path) -> ForeignFile:
    with ExitStack() as stack:
        source = stack.enter_context(Source(path))
        settings = _settings(config)
        tensors: dict[str, ForeignTensor] = {}
        claimed: set[str] = set()
        kinds: dict[str, set[str]] = {}
        with refusing(path):
            for format in FOREIGN.values():
                for tensor, names in () if format.find is None else format.find(source, settings):
                    if claimed & names or tensor.name in tensors:
                        raise ValueError(f"{show(min(claimed & names, default=tensor.name))} belongs to two weights")
                    claimed |= names
                    tensors[tensor.name] = tensor
                    kinds.setdefault(format.name, set()).add(tensor.kind)
            method, known = settings.get("quant_method"), {format.method for format in FOREIGN.values()} - {None}
            for name, weights in kinds.items():
                if isinstance(method, str) and method in known - {FOREIGN[name].method}:
                    raise contradiction("quant_method", method, f"its tensors are those of {name}")
                FOREIGN[name].check_config(settings, weights)
        for name, spec in source.specs.items():
            if name in claimed:
                continue
            half = spec.dtype == torch.uint8 and name.endswith("_scales")  # of MXFP4, without its codes
            if half or is_coded(name):
                why = f"its tensor {show(name)} belongs to a format that lowmem does not read"
                raise refusal(path, f"{why}: take the folder that it was made from")
            if name in tensors:
                raise refusal(path, f"it has {show(name)} twice, in 4 bits and dense; get it again")
            kind = str(spec.dtype).removeprefix("torch.")
            read = partial(source.read_tensor, name)
            tensors[name] = ForeignTensor(name, spec.shape, kind, spec.nbytes, read, partial(getattr, spec, "dtype"))
        return ForeignFile(path, stack.pop_all(), ", ".join(kinds) or "safetensors", tensors, source.paths)


def is_coded(name: str) -> bool:
    """Whether a tensor of this name is a part of a weight of another program, and means nothing alone."""
    return any(name.rpartition(".")[2] in format.coded_names for format in FOREIGN.values())


def _settings(config: Path) -> dict[str, Any]:
    """Return a folder's ``quantization_config``; or what AutoGPTQ wrote in its own file before there was one."""
    found = quantization_of(config) if os.path.lexists(config) else {}
    own = config.with_name(_OWN)
    return found if found or not os.path.lexists(own) else read_object(own)
