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

from lowmem.errors import file_error, short_repr, value_errors_as_file_errors
from lowmem.io.filesystem import has_magic_bytes, read_errors_with_path
from lowmem.io.formats.foreign_format import LazyForeignTensor, config_contradiction_error
from lowmem.io.formats.format_registry import FOREIGN_FORMATS
from lowmem.io.model_folder import (
    CONFIG,
    WEIGHTS,
    check_no_whole_model_beside,
    read_json_object,
    read_quantization_config,
    weights_or_index_path,
)
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.io.shards import INDEX

_OWN = "quantize_config.json"  # of AutoGPTQ


class ForeignCheckpoint:
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
        tensors: dict[str, LazyForeignTensor],
        paths: set[Path],
        left_out: Sequence[str] = (),
    ) -> None:
        self._stack, self.kind, self.paths, self.left_out = stack, kind, paths, left_out
        self.tensors: dict[str, LazyForeignTensor] = {}
        for name, tensor in tensors.items():
            guard = value_errors_as_file_errors(path, message_prefix=f"tensor {short_repr(tensor.name)}: ")
            readers = {part: getattr(tensor, part) for part in ("read", "form", "values", "order")}
            guarded: dict[str, Any] = {part: guard(read) for part, read in readers.items() if read is not None}
            self.tensors[name] = replace(tensor, **guarded)

    def __enter__(self) -> ForeignCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def open_foreign_checkpoint(path: Path) -> ForeignCheckpoint:
    """Open a GGUF file, a safetensors file, the index of a sharded one, or a folder of ``save_pretrained``.

    Raises:
        FileError: it is damaged, or of a kind that lowmem does not read; lowmem wrote it.
    """
    if not path.is_dir():
        for format in FOREIGN_FORMATS.values():
            if format.open is not None and has_magic_bytes(path, format.magic):
                file, tensors, left_out = format.open(path)
                stack = ExitStack()
                stack.callback(file.close)
                by_name = {tensor.name: tensor for tensor in tensors}
                return ForeignCheckpoint(path, stack, format.name, by_name, {path.resolve()}, left_out)
        return _open_foreign_safetensors(path, path.with_name(CONFIG))
    return _open_foreign_safetensors(_safetensors_or_index_path(path), path / CONFIG)


def _safetensors_or_index_path(folder: Path) -> Path:
    """Return the index or the only safetensors file of a folder; of a model's, those that transformers reads."""
    with read_errors_with_path(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    if CONFIG in names and not {f"{WEIGHTS}{INDEX}", WEIGHTS}.isdisjoint(names):
        return weights_or_index_path(
            folder
        )  # whatever is beside it, as consolidated.safetensors, or variants of other dtypes
    for endings in ((INDEX,), (".safetensors",)):
        candidates = [name for name in names if name.endswith(endings)]
        if len(candidates) == 1:
            check_no_whole_model_beside(folder / candidates[0])
            return folder / candidates[0]
        if candidates:
            raise file_error(
                folder, f"it has {len(candidates)} files as {short_repr(candidates[0])}; name the one to read"
            )
    for name in names:
        if name.endswith(".gguf"):
            raise file_error(folder, f"it is a folder of GGUF files; name one, as {short_repr(name)}")
    raise file_error(folder, "it holds no .safetensors file; name a model's folder or file")


def _open_foreign_safetensors(path: Path, config_path: Path) -> ForeignCheckpoint:
    with ExitStack() as stack:
        checkpoint = stack.enter_context(SafetensorsCheckpoint(path))
        settings = _read_hf_or_autogptq_config(config_path)
        tensors: dict[str, LazyForeignTensor] = {}
        claimed: set[str] = set()
        kinds: dict[str, set[str]] = {}
        with value_errors_as_file_errors(path):
            for format in FOREIGN_FORMATS.values():
                for tensor, names in (
                    ()
                    if format.iterate_weights_and_tensor_names is None
                    else format.iterate_weights_and_tensor_names(checkpoint, settings)
                ):
                    if claimed & names or tensor.name in tensors:
                        raise ValueError(
                            f"{short_repr(min(claimed & names, default=tensor.name))} belongs to two weights"
                        )
                    claimed |= names
                    tensors[tensor.name] = tensor
                    kinds.setdefault(format.name, set()).add(tensor.kind)
            method, known = (
                settings.get("quant_method"),
                {format.method for format in FOREIGN_FORMATS.values()} - {None},
            )
            for name, weights in kinds.items():
                if isinstance(method, str) and method in known - {FOREIGN_FORMATS[name].method}:
                    raise config_contradiction_error("quant_method", method, f"its tensors are those of {name}")
                FOREIGN_FORMATS[name].check_config_settings(settings, weights)
        for name, spec in checkpoint.specs.items():
            if name in claimed:
                continue
            half = spec.dtype == torch.uint8 and name.endswith("_scales")  # of MXFP4, without its codes
            if half or is_foreign_quantized_part(name):
                why = f"its tensor {short_repr(name)} belongs to a format that lowmem does not read"
                raise file_error(path, f"{why}: take the folder that it was made from")
            if name in tensors:
                raise file_error(path, f"it has {short_repr(name)} twice, in 4 bits and dense; get it again")
            kind = str(spec.dtype).removeprefix("torch.")
            read = partial(checkpoint.read_tensor, name)
            tensors[name] = LazyForeignTensor(
                name, spec.shape, kind, spec.nbytes, read, partial(getattr, spec, "dtype")
            )
        return ForeignCheckpoint(path, stack.pop_all(), ", ".join(kinds) or "safetensors", tensors, checkpoint.paths)


def is_foreign_quantized_part(tensor_name: str) -> bool:
    """Whether a tensor of this name is a part of a weight of another program, and means nothing alone."""
    return any(tensor_name.rpartition(".")[2] in format.coded_names for format in FOREIGN_FORMATS.values())


def _read_hf_or_autogptq_config(config_path: Path) -> dict[str, Any]:
    """Return a folder's ``quantization_config``; or what AutoGPTQ wrote in its own file before there was one."""
    quantization_config = read_quantization_config(config_path) if os.path.lexists(config_path) else {}
    autogptq_path = config_path.with_name(_OWN)
    return (
        quantization_config
        if quantization_config or not os.path.lexists(autogptq_path)
        else read_json_object(autogptq_path)
    )
