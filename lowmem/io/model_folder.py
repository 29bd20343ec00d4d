"""A folder as ``save_pretrained`` of transformers writes it: its weights, and its other files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from lowmem.errors import file_error, short_repr
from lowmem.io.filesystem import (
    open_regular_file,
    read_errors_with_path,
    try_fsync_file_or_folder,
    write_errors_with_path,
)
from lowmem.io.remote_code import hub_kernel_setting_text_or_none
from lowmem.io.safetensors_header import check_size_and_read_file, parse_strict_json
from lowmem.io.shards import INDEX, read_weight_map

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Bytes
MAX_CONFIG = 2**24

WEIGHT_FILE_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data"),
    INDEX,
)
"""Ends of the names of weights, in any format."""

_FILE = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"([^.]+)\.safetensors\.index(\..+)?\.json")  # of a variant: model.safetensors.index.fp16.json

_READ = (".json", ".txt", ".jinja", ".model")
"""Ends of the names of what transformers reads beside the weights: configs, and a tokenizer's files."""

MAX_FILES = 10_000  # that are copied beside the weights
MAX_BYTES = 2**32
# Folders in each other
MAX_DEPTH = 16

# 20 seconds
MAX_LAYERS = 4096
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
"""What configs call the number of their layers."""
_COUNTS = re.compile(r"(?:n|num)_layer|(?:.*_)?(?:layers|depths?|blocks|experts)(?:_per_.*)?")
"""Names of counts; not of sizes that are named after layers, as Gemma 3n's vocab_size_per_layer_input."""


def read_json_object(
    path: Path, max_bytes: int = MAX_CONFIG, kind: str = "config", parse: Callable[[bytes], Any] = parse_strict_json
) -> dict[str, Any]:
    """Return the object in a JSON file, such as a model's config.json.

    Raises:
        FileError, OSError: the file takes more than ``max_bytes`` bytes, is damaged or no object, or cannot be read.
    """
    text = check_size_and_read_file(path, max_bytes, kind)
    try:
        content = parse(text)
    except (ValueError, RecursionError) as reason:
        raise file_error(path, f"it is damaged: {reason}; get it again") from None
    if not isinstance(content, dict):
        raise file_error(path, f"it is {short_repr(content)}, and must be an object; get it again")
    return content


def read_checked_model_config(path: Path) -> dict[str, Any]:
    """Return a model's config.json, whose ``quantization_config``, if it has one, is an object.

    Raises:
        FileError, OSError: as ``read_json_object``, ``quantization_config`` is no object, or it names a kernel of the
            Hub.
    """
    config = read_json_object(path)
    kernel = hub_kernel_setting_text_or_none(config)
    if kernel is not None:
        raise file_error(path, f"{kernel} is code of the Hub, and none was run: remove it")
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise file_error(path, f"quantization_config={short_repr(quantization)} must be an object; repair it")
    return config


def read_quantization_config(path: Path) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model's checked config.json, or an empty one."""
    return read_checked_model_config(path).get("quantization_config") or {}


def is_config_or_tokenizer_file(name: str) -> bool:
    """Whether transformers may read a file of this name beside the weights: a config, or a tokenizer's file."""
    return name.endswith(_READ) and not name.endswith(INDEX)


def check_config_files_are_regular(folder: Path) -> None:
    """Raise an OSError that names a config or tokenizer file that is not regular: reading a pipe would never end."""
    with read_errors_with_path(folder):
        names = sorted(os.listdir(folder))
    for name in names:
        if name.endswith(_READ):
            open_regular_file(folder / name).close()


def check_layer_counts_of_folder(config_path: Path, config: Any, tensor_count: int) -> None:
    """Raise the error of ``check_layer_and_expert_counts`` as a FileError, before a model is made of a folder."""
    try:
        check_layer_and_expert_counts(config, tensor_count)
    except ValueError as reason:
        raise file_error(config_path, str(reason)) from None


def check_layer_and_expert_counts(config: Any, tensor_count: int | None = None) -> None:
    """Raise a ValueError if a config, or a config in it, asks for more layers or experts than any model has.

    Empty layers are made one by one. ``tensor_count`` is the number of tensors in the model's folder, which no model
    has more layers than; None: unknown.
    """
    for name, value in config.items() if isinstance(config, dict) else ():
        if tensor_count is not None and name in _LAYERS and isinstance(value, int) and value > tensor_count:
            raise ValueError(f"{name}={short_repr(value)}, and the folder has {tensor_count} tensors; get it again")
        counts = value if isinstance(value, list) else [value]
        if _COUNTS.fullmatch(str(name)) and any(isinstance(count, int) and count > MAX_LAYERS for count in counts):
            raise ValueError(
                f"config.json says {short_repr(name)[1:-1]}={short_repr(value)}, more than {MAX_LAYERS}: get it again"
            )
        check_layer_and_expert_counts(value, tensor_count)


def weights_or_index_path(folder: Path, action: str = "read") -> Path:
    """Return the only file of a folder's weights, or the index of several; errors say that ``action`` is impossible.

    Raises:
        FileError: it has neither; or both, of which transformers reads the file, and other programs the index.
        OSError: the index cannot be read.
    """
    whole, index = folder / WEIGHTS, folder / f"{WEIGHTS}{INDEX}"
    if os.path.lexists(index):
        check_no_whole_model_beside(index, action)
        return index
    if os.path.lexists(whole):
        return whole
    others = sorted(folder.glob("*.safetensors"))
    remedy = ": lowmem reads safetensors only, and executed nothing; name a folder of such a model"
    if len(others) == 1:
        remedy = f"; name its file {short_repr(others[0].name)}, or rename it to the first"
    raise file_error(folder, f"it has no {whole.name} and no {index.name}{remedy}", action)


def check_no_whole_model_beside(index_path: Path, action: str = "read") -> None:
    """Raise a FileError if a file of the whole model, which transformers would read, is beside an index."""
    whole = index_path.with_name(index_path.name.removesuffix(INDEX))
    if whole != index_path and os.path.lexists(whole) and whole.name not in read_weight_map(index_path).values():
        why = f"it has {index_path.name}, and {whole.name}, too: remove the one that is not the model"
        raise file_error(index_path.parent, why, action)


def move_files_replacing_weights(source_folder: Path, target_folder: Path) -> None:
    """Move the files of ``source_folder`` into ``target_folder`` on the same file system, and remove its weights of
    the same name.

    After an interruption the target has the old weights or the new weights, or reading it is an error: a new index is
    moved after its shards, and an old index is removed before its shards.

    Raises:
        OSError: a file cannot be moved or removed.
    """
    names = sorted(os.listdir(source_folder), key=lambda name: (_INDEX.fullmatch(name) is not None, name))
    models = {_weights_base_name_or_none(name) for name in names} - {None}
    for path in (*(source_folder / name for name in names), source_folder):
        try_fsync_file_or_folder(path)
    with write_errors_with_path(target_folder):
        for name in os.listdir(target_folder):
            if _weights_base_name_or_none(name) in models and (name not in names or _INDEX.fullmatch(name)):
                os.unlink(target_folder / name)
        for name in names:
            os.replace(source_folder / name, target_folder / name)
    try_fsync_file_or_folder(target_folder)


def _weights_base_name_or_none(file_name: str) -> str | None:
    """Return the name of a file of weights or an index without number and ending; None for other files."""
    file, index = _FILE.fullmatch(file_name), _INDEX.fullmatch(file_name)
    return file[1] if file else f"{index[1]}{index[2] or ''}" if index else None


def copy_non_weight_files(folder: Path, target: Path, error_path: Path, excluded_names: Collection[str]) -> None:
    """Copy a folder's files that are no weights, such as those of its tokenizer, with those of its inner folders.

    Hidden folders are left out, and folders with weights, which are other models, such as checkpoints of a training.
    Links are followed only to files of the folder, or of the same repository in the hub's cache: other files might be
    private.

    Args:
        folder: to copy from.
        target: an existing folder.
        error_path: the path of the target in errors.
        excluded_names: names of files that are not copied from the outermost folder.

    Raises:
        FileError: a link to a file elsewhere; or more files, bytes or nested folders than any model has.
        OSError: a file cannot be read or written.
    """
    root = folder.resolve()
    # Models--a--b/{snapshots/12ab,blobs}
    owned = root.parents[1] if root.parent.name == "snapshots" else root
    apart = {target.resolve(), error_path.resolve()}
    files = nbytes = 0
    for file, inside in _iterate_non_weight_files(folder, Path(), apart, frozenset(excluded_names)):
        if not file.resolve().is_relative_to(owned):
            why = f"{short_repr(inside.as_posix())} is a link to a file outside of it: copy the file itself into it"
            raise file_error(folder, why, "copy")
        files, nbytes = files + 1, nbytes + file.stat().st_size
        for count, most, what in ((files, MAX_FILES, "files"), (nbytes, MAX_BYTES, "bytes")):
            if count > most:
                why = f"it has more than {most} {what} that are no weights, with {short_repr(inside.as_posix())}"
                raise file_error(folder, f"{why}; move what is not the model's elsewhere", "copy")
        with open_regular_file(file) as source, write_errors_with_path(error_path):
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            with open(target / inside, "xb") as copy:
                shutil.copyfileobj(source, copy)


def _iterate_non_weight_files(
    folder: Path, relative_path: Path, excluded_folders: Collection[Path], excluded_names: Collection[str]
) -> Iterator[tuple[Path, Path]]:
    """Yield the files of a folder that are no weights, and their paths from the outermost one."""
    if len(relative_path.parts) > MAX_DEPTH:
        why = f"it has more than {MAX_DEPTH} folders deep in each other, at {short_repr(relative_path.as_posix())}"
        raise file_error(folder, f"{why}; move what is not the model's elsewhere", "copy")
    with read_errors_with_path(folder):
        entries = sorted(folder.iterdir())
    if relative_path.parts and any(file.name.endswith(WEIGHT_FILE_ENDINGS) for file in entries):
        return
    for file in entries:
        inner_path = relative_path / file.name
        if file.is_dir():
            if not file.name.startswith(".") and not file.is_symlink() and file.resolve() not in excluded_folders:
                yield from _iterate_non_weight_files(file, inner_path, excluded_folders, ())
        elif file.is_file() and file.name not in excluded_names and not file.name.endswith(WEIGHT_FILE_ENDINGS):
            yield file, inner_path
