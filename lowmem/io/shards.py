"""The weights of a model in one file, or in shards and the index that lists them, ``model.safetensors.index.json``.
lowmem's index holds the digest of each file, so that a shard of another run is detected."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import checked_path, file_error, short_repr
from lowmem.io.filesystem import check_writable, write_atomically
from lowmem.io.lowmem_file import (
    FORMAT_VERSION,
    LowmemFileContent,
    verify_and_map_file,
    write_stream_returning_digest,
)
from lowmem.io.metadata_records import form_to_record_dict, parameter_record_key
from lowmem.io.safetensors_header import TensorSpec, check_size_and_read_file, parse_strict_json
from lowmem.nn.forms import CodedForm
from lowmem.quant.backend import Weight
from lowmem.quant.tensor import QuantizedTensor

INDEX = ".index.json"
# Largest index that is read, in bytes
MAX_INDEX = 2**26


def shard_path(model_path: Path, number: int, count: int) -> Path:
    """Return the path of shard ``number``, from 1 to ``count``."""
    return model_path.with_name(f"{model_path.stem}-{number:05d}-of-{count:05d}{model_path.suffix}")


def index_path(model_path: Path) -> Path:
    """Return the path of the index of a sharded file."""
    return model_path.with_name(model_path.name + INDEX)


def check_writable_model_path(target: Path) -> None:
    """Raise unless a model can be written to a file, or to shards with an index beside it.

    Raises:
        ValueError: it has the name of an index.
        OSError: it cannot be written.
    """
    if target.name.endswith(INDEX):
        raise ValueError(f"target={str(target)!r} is what an index is called; name a .safetensors file")
    check_writable(target)


def transposed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the transpose, of a stack of matrices."""
    return (*shape[:-2], *reversed(shape[-2:]))


@dataclass(frozen=True)
class LazyWeight:
    """A weight, whose values are read when they are asked for.

    Args:
        name: as the dense model's state has it, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: of the weight. In 4 bits a folder's last dimension is even: an odd one is not told from the next.
        form: how the weight is stored: in 4 or 8 bits, or dense in a dtype.
        nbytes: what the weight takes in the source.
        read: returns the weight, in newly allocated memory or as a view of the mapped file; with its last two
            dimensions swapped if ``transposed``.
        order: returns, for each column that ``read`` returns, its column of the weight, int32; None if none moved.
    """

    name: str
    shape: tuple[int, ...]
    form: CodedForm | torch.dtype
    nbytes: int
    read: Callable[[], Weight]
    order: Callable[[], Tensor] | None = None

    @property
    def is_transposed(self) -> bool:
        """Whether the last two dimensions of what ``read`` returns are swapped."""
        return isinstance(self.form, CodedForm) and self.form.transposed

    @property
    def form_name(self) -> str:
        """How it is stored, as text."""
        return str(self.form).removeprefix("torch.")

    def weight_in_model_layout(self, weight: Weight | None = None, dtype: torch.dtype | None = None) -> Weight:
        """Return the weight in its own shape and order of columns.

        Args:
            weight: what ``read`` returned; None: it is read.
            dtype: of the values; None: float32 where ``read`` has other columns, else as it is stored.
        """
        weight = self.read() if weight is None else weight
        if not self.is_transposed and self.order is None and dtype is None:
            return weight
        dtype = dtype or torch.float32
        values = weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(-1, self.order().long(), values)
        return values.transpose(-1, -2).contiguous() if self.is_transposed else values

    def file_tensor_specs(self) -> dict[str, TensorSpec]:
        """Return the dtype and shape of each of its tensors in a file of lowmem's, by name."""
        form, shape = self.form, transposed_shape(self.shape) if self.is_transposed else self.shape
        if isinstance(form, torch.dtype):
            return {self.name: TensorSpec(form, shape)}
        empty = QuantizedTensor.empty(
            torch.Size(shape), form.format, form.block_size, form.scale_encoding, form.method, device="meta"
        )
        order = torch.empty(shape[-1:], dtype=torch.int32, device="meta")
        return {
            name: TensorSpec.from_tensor(tensor) for name, tensor in self._file_tensors_by_name(empty, order).items()
        }

    def read_file_tensors(self) -> dict[str, Tensor]:
        """Return its tensors in a file of lowmem's, by name."""
        return self._file_tensors_by_name(self.read(), None if self.order is None else self.order())

    def _file_tensors_by_name(self, weight: Weight, column_order: Tensor | None) -> dict[str, Tensor]:
        if isinstance(weight, Tensor):
            return {self.name: weight}
        assert isinstance(self.form, CodedForm)
        packed, scales = CodedForm.codes_and_scale_bytes(weight)
        parts: dict[str, Any] = {"packed": packed, "scales": scales, "order": column_order}
        return {f"{self.name}_{part}": parts[part] for part in self.form.parts}


def write_model_or_shards_and_index(
    target: Path,
    weights: Mapping[str, LazyWeight],
    shard_bytes: int | None,
    source_paths: Collection[Path],
    on_weight_written: Callable[[LazyWeight, int], None],
) -> None:
    """Write a model of lowmem's to a file, or to shards and then their index. One weight at a time is in memory.

    Args:
        target: the file; shards are named after it.
        weights: by name.
        shard_bytes: the most bytes of tensors per file; None: one file.
        source_paths: files that are not overwritten.
        on_weight_written: called with each weight that was written, and the bytes that it takes.

    Raises:
        ValueError: a weight larger than ``shard_bytes``, or a target that is a source. Nothing was written.
        OSError: a file cannot be written.
    """

    def iterate_file_tensors_and_notify(weight_names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in weight_names:
            parts = weights[name].read_file_tensors()
            nbytes = sum(part.nbytes for part in parts.values())
            while parts:
                yield parts.popitem()
            on_weight_written(weights[name], nbytes)

    plan = {name: weight.file_tensor_specs() for name, weight in weights.items()}
    shards = sorted_weight_names_per_shard(plan, shard_bytes)
    outputs = [target]
    if shard_bytes is not None:
        outputs = [shard_path(target, number, len(shards)) for number in range(1, len(shards) + 1)]
    for path in (*outputs, index_path(target)):
        if path.resolve() in source_paths:
            raise ValueError(f"{str(path)!r} belongs to the source, which would be lost; choose another target")
    index: dict[str, tuple[str, dict[str, int]]] = {}
    for path, names in zip(outputs, shards, strict=True):
        specs = {out: spec for name in names for out, spec in plan[name].items()}
        forms = {parameter_record_key(name): weights[name].form for name in names}
        layers = {place: form_to_record_dict(form) for place, form in forms.items() if isinstance(form, CodedForm)}
        digest = write_stream_returning_digest(
            path, specs, {"kind": "model", "layers": layers}, iterate_file_tensors_and_notify(names)
        )
        index[path.name] = digest, {out: spec.nbytes for out, spec in specs.items()}
    if shard_bytes is not None:
        write_atomically(index_path(target), encode_shard_index(index))


def sorted_weight_names_per_shard(
    specs_by_weight: Mapping[str, Mapping[str, TensorSpec]], shard_bytes: int | None
) -> list[list[str]]:
    """Return the names of each file's tensors, sorted, of which ``specs_by_weight`` has the specs of what replaces
    them.

    Raises:
        ValueError: a tensor that is larger than ``shard_bytes``.
    """
    if shard_bytes is None:
        return [sorted(specs_by_weight)]
    shards: list[list[str]] = [[]]
    remaining_bytes = shard_bytes
    for name in sorted(specs_by_weight):
        size = sum(spec.nbytes for spec in specs_by_weight[name].values())
        if size > shard_bytes:
            raise ValueError(
                f"shard size {shard_bytes} is less than the {size} bytes of {short_repr(name)}; raise it"
            )
        if size > remaining_bytes and shards[-1]:
            shards.append([])
            remaining_bytes = shard_bytes
        shards[-1].append(name)
        remaining_bytes -= size
    return shards


def read_weight_map(path: Path) -> dict[str, str]:
    """Return the file name of each tensor of a sharded checkpoint of any program.

    Raises:
        FileError: it is no index, or names a file outside its own directory.
        OSError: the index cannot be read.
    """
    return parse_weight_map(path, check_size_and_read_file(path, MAX_INDEX, "index"))


def verify_and_map_lowmem_model(path: str | os.PathLike[str]) -> LowmemFileContent:
    """Read a model that lowmem wrote: one file, or all shards of an index.

    Raises:
        FileError: a file is damaged, missing, of another run or version, or no model.
        OSError: a file cannot be read.
    """
    path = checked_path("path", path)
    if not path.name.endswith(INDEX):
        return _lowmem_content_checked_as_model(path, verify_and_map_file(path))
    text = check_size_and_read_file(path, MAX_INDEX, "index")
    files = sorted(set(parse_weight_map(path, text).values()))
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    shards: dict[str, tuple[str, Mapping[str, int]]] = {}
    for name in files:
        file = path.with_name(name)
        part = _lowmem_content_checked_as_model(file, verify_and_map_file(file))
        if "adapters" in part.metadata:
            raise file_error(file, "it is a whole model, with adapters, and no part of one; load it alone")
        for twice in (tensors.keys() & part.tensors.keys(), layers.keys() & part.metadata["layers"].keys()):
            if twice:
                why = f"it does not describe the files that it names: two of them have {short_repr(min(twice))}"
                raise file_error(path, f"{why}; get it and them again from one source")
        shards[name] = part.sha256, {key: tensor.nbytes for key, tensor in part.tensors.items()}
        tensors |= part.tensors
        layers |= part.metadata["layers"]
    if text != encode_shard_index(shards):
        raise file_error(path, "it does not describe the files that it names; get it and them again from one source")
    return LowmemFileContent(tensors, {"kind": "model", "layers": layers}, "")


def parse_weight_map(path: Path, text: bytes) -> dict[str, str]:
    """Parse the text of an index: the file name of each tensor."""
    try:
        content = parse_strict_json(text)
    except ValueError as reason:
        raise file_error(
            path, f"it is no index of a sharded checkpoint, or is damaged: {reason}; get it again"
        ) from None
    entries = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise file_error(
            path, f"it is no index of a sharded checkpoint: weight_map={short_repr(entries)}; get it again"
        )
    for name, file in entries.items():
        # Names of up to 255 bytes are the limit of common file systems.
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & {*"/\\\0"} or len(file.encode()) > 255:
            raise file_error(
                path,
                f"it puts tensor {short_repr(name)} in {short_repr(file)}, which is no file beside it; repair it",
            )
    if not entries:
        raise file_error(path, "it names no tensors; get it again")
    return entries


def _lowmem_content_checked_as_model(path: Path, file: LowmemFileContent) -> LowmemFileContent:
    metadata = file.metadata
    kind = metadata.get("kind")
    if kind != "model" or not isinstance(metadata.get("layers"), dict):
        remedy = "; load it with load_adapter(model, path)" if kind == "adapter" else "; name a file that save wrote"
        raise file_error(
            path, f"it holds {'an adapter' if kind == 'adapter' else 'something else'}, no model{remedy}"
        )
    for name in metadata:
        if name not in ("kind", "layers", "adapters"):
            raise file_error(path, f"its metadata has {short_repr(name)}, which is unknown; upgrade lowmem")
    return file


def encode_shard_index(digest_and_sizes_by_file: Mapping[str, tuple[str, Mapping[str, int]]]) -> bytes:
    """Return the text of an index of ``digest_and_sizes_by_file``: file name -> (digest, bytes of each tensor by
    name)."""
    sizes = [size for _, tensors in digest_and_sizes_by_file.values() for size in tensors.values()]
    content = {
        "metadata": {
            "lowmem": {
                "version": FORMAT_VERSION,
                "sha256": {name: digest for name, (digest, _) in digest_and_sizes_by_file.items()},
            },
            "total_size": sum(sizes),
        },
        "weight_map": {tensor: name for name, (_, tensors) in digest_and_sizes_by_file.items() for tensor in tensors},
    }
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
