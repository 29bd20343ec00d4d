"""lowmem's files: safetensors files with a SHA-256 of the whole file (``docs/format.md``), whose bytes depend only on
the names and values of tensors and on metadata. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase, BufferedRandom
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lowmem.errors import FileError, checked_path, file_error, short_repr
from lowmem.io.filesystem import (
    atomic_file,
    check_writable,
    open_regular_file,
    read_errors_with_path,
    write_errors_with_path,
)
from lowmem.io.safetensors_header import (
    TensorEntry,
    TensorSpec,
    encode_header_with_length,
    parse_metadata_and_entries,
    parse_strict_json,
    read_header_json,
    specs_and_offsets_in_file_order,
)

FORMAT_VERSION = 2
"""Of the layout of every kind of file, raised with each change. A version that a release wrote keeps its reader."""

MAGIC = b'{"__metadata__":{"sha256":"'
DIGEST = slice(8 + len(MAGIC), 8 + len(MAGIC) + 64)
BLOCK = 2**20


@dataclass(frozen=True)
class LowmemFileContent:
    """The content of a file that lowmem wrote.

    Args:
        tensors: views of the memory-mapped file: pages are read on first use, and changes stay in this process.
        metadata: as passed to ``write``.
        sha256: the file's digest.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    sha256: str


def write_tensors_returning_digest(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> str:
    """Write a file of ``tensors`` atomically; see ``write``.

    Example::

        write_tensors_returning_digest("model.safetensors", model.state_dict(), {"format": "nf4"})
    """
    specs = {name: checked_tensor_spec(name, tensor) for name, tensor in tensors.items()}
    return write_stream_returning_digest(path, specs, metadata, tensors.items())


def write_stream_returning_digest(
    path: str | os.PathLike[str],
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
) -> str:
    """Write a file atomically from a stream of tensors, in any order; return its digest.

    Each tensor is released before the next one is requested. Tensors may be views of the file at ``path``, which is
    replaced, not changed.

    Args:
        path: of the file; a symbolic link is followed.
        specs: the dtype and shape of each tensor, by name.
        metadata: JSON-serializable; the key ``"version"`` is reserved.
        tensors: each name of ``specs`` once, with its tensor, on any device, with any strides.

    Raises:
        ValueError: a tensor is missing, comes twice or differs from its spec, or something cannot be stored.
        OSError: the file cannot be written.
    """
    path = checked_path("path", path)
    check_writable(path)
    metadata = _encode_metadata_with_zero_digest(metadata)
    with atomic_file(path) as file:
        _write_header_and_tensors(path, file, specs, metadata, tensors)
        with write_errors_with_path(path):
            digest = _sha256_with_zeroed_digest(file)
            file.seek(DIGEST.start)
            file.write(digest)
    return digest.decode()


def write_plain_safetensors_atomically(
    path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file as any program reads it, as ``write`` does, but without lowmem's digest and metadata."""
    with atomic_file(path) as file:
        _write_header_and_tensors(path, file, specs, {"format": "pt"}, tensors)


def _write_header_and_tensors(
    path: Path,
    file: BufferedRandom,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    start, missing = encode_header_with_length(metadata, specs), specs_and_offsets_in_file_order(specs)
    with write_errors_with_path(path):
        file.write(start)
    for name, tensor in tensors:
        placed = missing.pop(name, None)
        if placed is None:
            why = "came twice" if name in specs else "is not in the specs"
            raise ValueError(f"tensor {short_repr(name)} {why}")
        if (spec := checked_tensor_spec(name, tensor)) != placed.spec:
            raise ValueError(f"tensor {short_repr(name)} is {spec}, and the specs say {placed.spec}")
        content = tensor_bytes_view(tensor)
        with write_errors_with_path(path):
            file.seek(len(start) + placed.begin)
            file.write(content)
        # Before the next one is made
        del tensor, content
    if missing:
        raise ValueError(f"{len(missing)} tensors did not come, the first of them {short_repr(next(iter(missing)))}")


def verify_and_map_file(path: str | os.PathLike[str]) -> LowmemFileContent:
    """Verify a file that lowmem wrote, and map it into memory.

    Verifying reads the whole file once. Don't change a file in place while its tensors are in use: they would change,
    and reading a part that was cut off ends the process (SIGBUS). ``write`` is safe: it replaces the file.

    Raises:
        FileError: the file is damaged, of another format version, or written by another program.
        OSError: the file cannot be read.
    """
    path = checked_path("path", path)
    with open_regular_file(path) as file, read_errors_with_path(path):
        text = read_header_json(path, file)
        start = 8 + len(text)
        size = os.fstat(file.fileno()).st_size
        if not text.startswith(MAGIC):
            raise _not_written_by_lowmem_error(path, text, size - start)
        digest = _sha256_with_zeroed_digest(file)
        if digest != text[DIGEST.start - 8 : DIGEST.stop - 8]:
            raise file_error(path, "it is damaged: its content does not match its digest; get it again")
        metadata = _parse_metadata_of_this_version(path, text)
        try:
            _, tensors = parse_metadata_and_entries(text, size - start)
            expected = encode_header_with_length(
                _encode_metadata_with_zero_digest(metadata), {name: placed.spec for name, placed in tensors.items()}
            )
        except ValueError as reason:
            raise file_error(path, f"its header is not valid: {reason}; get it again from who wrote it") from None
        if text[: DIGEST.start - 8] + b"0" * 64 + text[DIGEST.stop - 8 :] != expected[8:]:
            raise file_error(path, "it is not laid out as lowmem does it; write it again with lowmem")
        try:
            content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except ValueError:
            raise file_error(path, "it was cut while it was read; get it again") from None
    return LowmemFileContent(
        {name: _mapped_tensor(content, start, placed) for name, placed in tensors.items()}, metadata, digest.decode()
    )


def _encode_metadata_with_zero_digest(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the ``__metadata__`` of a file of lowmem's, with zeros for the digest."""
    if "version" in metadata:
        raise ValueError("metadata has a 'version', which the container sets; choose another name")
    content = {**metadata, "version": FORMAT_VERSION}
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        same = parse_strict_json(text) == content
    except (TypeError, ValueError, RecursionError) as reason:
        raise ValueError(f"metadata={short_repr(metadata)} cannot be stored as JSON: {reason}") from reason
    if not same:
        raise ValueError(
            f"metadata={short_repr(metadata)} changes in JSON; use lists for tuples, and text for all names"
        )
    return {"sha256": "0" * 64, "lowmem": text}


def checked_tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    """Return the dtype and shape of a tensor to write; raise a ValueError unless a file can hold the tensor."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"tensor {short_repr(name)} is no dense tensor with values; convert it or leave it out")
    try:
        return TensorSpec.from_tensor(tensor)
    except ValueError as reason:
        raise ValueError(f"tensor {short_repr(name)}: {reason}") from None


def tensor_bytes_view(tensor: Tensor) -> memoryview:
    """Return a tensor's values as bytes, without a copy if it is contiguous on the CPU."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # Not view, which fails on odd strides of empty tensors
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def _mapped_tensor(mapped_file: mmap.mmap, data_start: int, entry: TensorEntry) -> Tensor:
    spec = entry.spec
    # Frombuffer rejects empty tensors
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
    values = torch.frombuffer(mapped_file, dtype=torch.uint8, count=spec.nbytes, offset=data_start + entry.begin)
    return values.view(spec.dtype).view(spec.shape)


def _not_written_by_lowmem_error(path: Path, header_json: bytes, data_size: int) -> FileError:
    try:
        metadata, _ = parse_metadata_and_entries(header_json, data_size)
    except ValueError as reason:
        return file_error(path, f"it is damaged or no safetensors file: {reason}; get it again")
    if "lowmem" in metadata:
        return file_error(path, "it is damaged, or written by another program: its digest is misplaced; get it again")
    return file_error(path, "it is a safetensors file that lowmem did not write; convert it with lowmem quantize")


def _parse_metadata_of_this_version(path: Path, header_json: bytes) -> dict[str, Any]:
    """Return lowmem's metadata. It is parsed before the tensors, whose encoding depends on the format version."""
    try:
        metadata: dict[str, Any] = parse_strict_json(parse_strict_json(header_json)["__metadata__"]["lowmem"])
        version = metadata.pop("version")
    except (ValueError, TypeError, LookupError, AttributeError):
        # Invalid JSON, or other types
        raise file_error(path, "its metadata is not lowmem's; get it again from who wrote it") from None
    if type(version) is not int or version < 1:
        raise file_error(path, f"its format version is {short_repr(version)}; get it again from who wrote it")
    if version != FORMAT_VERSION:
        older = version < FORMAT_VERSION
        remedy = "get it again, or make it again with this lowmem" if older else "upgrade lowmem"
        numbers = f"(format version {version}; this one reads {FORMAT_VERSION})"
        raise file_error(path, f"it was written by {'an older' if older else 'a newer'} lowmem {numbers}; {remedy}")
    return metadata


def _sha256_with_zeroed_digest(file: BufferedIOBase) -> bytes:
    """Return the digest of a file, read in blocks: a mapped file would count as resident memory of the process."""
    sha256 = hashlib.sha256()
    file.seek(0)
    sha256.update(file.read(DIGEST.start) + b"0" * 64)
    file.seek(DIGEST.stop)
    block = memoryview(bytearray(BLOCK))
    while count := file.readinto(block):
        sha256.update(block[:count])
    return sha256.hexdigest().encode()
