"""A folder as ``save_pretrained`` of transformers writes it: its weights, and its other files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from lowmem.errors import refusal, show
from lowmem.io.atomic import open_regular, read_errors, sync, write_errors
from lowmem.io.folder_code import kernel_of_hub
from lowmem.io.safetensors import parse_json, read_at_most
from lowmem.io.shards import INDEX, read_index

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_CONFIG = 2**24  # bytes

_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", INDEX)
"""Ends of the names of weights, in any format."""

_FILE = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"([^.]+)\.safetensors\.index(\..+)?\.json")  # of a variant: model.safetensors.index.fp16.json

_READ = (".json", ".txt", ".jinja", ".model")
"""Ends of the names of what transformers reads beside the weights: configs, and a tokenizer's files."""

MAX_FILES = 10_000  # that are copied beside the weights
MAX_BYTES = 2**32
MAX_DEPTH = 16  # folders in each other

MAX_LAYERS = 4096  # 20 seconds
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
"""What configs call the number of their layers."""
_COUNTS = re.compile(r"(?:n|num)_layer|(?:.*_)?(?:layers|depths?|blocks|experts)(?:_per_.*)?")
"""Names of counts; not of sizes that are named after layers, as Gemma 3n's vocab_size_per_layer_input."""


def read_object(
    path: Path, limit: int = MAX_CONFIG, kind: str = "config", parse: Callable[[bytes], Any] = parse_json
) -> dict[str, Any]:
    """Return the object in a JSON file, such as a model's config.json.

    Raises:
        FileError, OSError: the file takes more than ``limit`` bytes, is damaged or no object, or cannot be read.
    """
    text = read_at_most(path, limit, kind)
    try:
        content = parse(text)
    except (ValueError, RecursionError) as reason:
        raise refusal(path, f"it is damaged: {reason}; get it again") from None
    if not isinstance(content, dict):
        raise refusal(path, f"it is {show(content)}, and must be an object; get it again")
    return content


def read_model_config(path: Path) -> dict[str, Any]:
    """Return a model's config.json, whose ``quantization_config``, if it has one, is an object.

    Raises:
        FileError, OSError: as ``read_object``, or ``quantization_config`` is no object, or it names a kernel of the
            Hub.
    """
    config = read_object(path)
    kernel = kernel_of_hub(config)
    if kernel is not None:
        raise refusal(path, f"{kernel} is code of the Hub, and none was run: remove it")
    found = config.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise refusal(path, f"quantization_config={show(found)} must be an object; repair it")
    return config


def quantization_of(path: Path) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model's config.json, or an empty one; see ``read_model_config``."""
    return read_model_config(path).get("quantization_config") or {}


def check_regular(folder: Path) -> None:
    """Raise an OSError that names a config or tokenizer file that is not regular: reading a pipe would never end."""
    with read_errors(folder):
        names = sorted(os.listdir(folder))
    for name in names:
        if name.endswith(_READ):
            open_regular(folder / name).close()


def check_layers(file: Path, config: Any, tensors: int) -> None:
    """Raise a FileError that names a folder's config as ``refuse_layers`` does, before a model is made of it."""
    try:
        refuse_layers(config, tensors)
    except ValueError as reason:
        raise refusal(file, str(reason)) from None


def refuse_layers(config: Any, tensors: int | None = None) -> None:
    """Raise a ValueError if a config, or a config in it, asks for more layers or experts than any model has.

    Empty layers are made one by one. ``tensors`` is the number of tensors in the model's folder, which no model has
    more layers than; None: unknown.
    """
    for name, value in config.items() if isinstance(config, dict) else ():
        if tensors is not None and name in _LAYERS and isinstance(value, int) and value > tensors:
            raise ValueError(f"{name}={show(value)}, and the folder has {tensors} tensors; get it again")
        counts = value if isinstance(value, list) else [value]
        if _COUNTS.fullmatch(str(name)) and any(isinstance(one, int) and one > MAX_LAYERS for one in counts):
            raise ValueError(
                f"config.json says {show(name)[1:-1]}={show(value)}, more than {MAX_LAYERS}: get it again"
            )
        refuse_layers(value, tensors)


def weights_in(folder: Path, action: str = "read") -> Path:
    """Return the only file of a folder's weights, or the index of several; errors say that ``action`` is impossible.

    Raises:
        FileError: it has neither; or both, of which transformers reads the file, and other programs the index.
        OSError: the index cannot be read.
    """
    whole, index = folder / WEIGHTS, folder / f"{WEIGHTS}{INDEX}"
    if os.path.lexists(index):
        check_alone(index, action)
        return index
    if os.path.lexists(whole):
        return whole
    others = sorted(folder.glob("*.safetensors"))
    remedy = ": lowmem reads safetensors only, and executed nothing; name a folder of such a model"
    if len(others) == 1:
        remedy = f"; name its file {show(others[0].name)}, or rename it to the first"
    raise refusal(folder, f"it has no {whole.name} and no {index.name}{remedy}", action)


def check_alone(index: Path, action: str = "read") -> None:
    """Raise a FileError if a file of the whole model, which transformers would read, is beside an index."""
    whole = index.with_name(index.name.removesuffix(INDEX))
    if whole != index and os.path.lexists(whole) and whole.name not in read_index(index).values():
        why = f"it has {index.name}, and {whole.name}, too: remove the one that is not the model"
        raise refusal(index.parent, why, action)


def replace_files(written: Path, target: Path) -> None:
    """Move the files of ``written`` into ``target`` on the same file system, and remove its weights of the same name.

    After an interruption the target has the old weights or the new weights, or reading it is an error: a new index is
    moved after its shards, and an old index is removed before its shards.

    Raises:
        OSError: a file cannot be moved or removed.
    """
    names = sorted(os.listdir(written), key=lambda name: (_INDEX.fullmatch(name) is not None, name))
    models = {_model_of(name) for name in names} - {None}
    for path in (*(written / name for name in names), written):
        sync(path)
    with write_errors(target):
        for name in os.listdir(target):
            if _model_of(name) in models and (name not in names or _INDEX.fullmatch(name)):
                os.unlink(target / name)
        for name in names:
            os.replace(written / name, target / name)
    sync(target)


def _model_of(name: str) -> str | None:
    """Return the name of a file of weights or an index without number and ending; None for other files."""
    file, index = _FILE.fullmatch(name), _INDEX.fullmatch(name)
    return file[1] if file else f"{index[1]}{index[2] or ''}" if index else None


def copy_others(folder: Path, target: Path, out: Path, leave: Collection[str]) -> None:
    """Copy a folder's files that are no weights, such as those of its tokenizer, with those of its inner folders.

    Hidden folders are left out, and folders with weights, which are other models, such as checkpoints of a training.
    Links are followed only to files of the folder, or of the same repository in the hub's cache: other files might be
    private.

    Args:
        folder: to copy from.
        target: an existing folder.
        out: the path of the target in errors.
        leave: names of files that are not copied from the outermost folder.

    Raises:
        FileError: a link to a file elsewhere; or more files, bytes or nested folders than any model has.
        OSError: a file cannot be read or written.
    """
    root = folder.resolve()
    owned = root.parents[1] if root.parent.name == "snapshots" else root  # models--a--b/{snapshots/12ab,blobs}
    apart = {target.resolve(), out.resolve()}
    files = nbytes = 0
    for file, inside in _others(folder, Path(), apart, frozenset(leave)):
        if not file.resolve().is_relative_to(owned):
            why = f"{show(inside.as_posix())} is a link to a file outside of it: copy the file itself into it"
            raise refusal(folder, why, "copy")
        files, nbytes = files + 1, nbytes + file.stat().st_size
        for count, most, what in ((files, MAX_FILES, "files"), (nbytes, MAX_BYTES, "bytes")):
            if count > most:
                why = f"it has more than {most} {what} that are no weights, with {show(inside.as_posix())}"
                raise refusal(folder, f"{why}; move what is not the model's elsewhere", "copy")
        with open_regular(file) as source, write_errors(out):
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            with open(target / inside, "xb") as copy:
                shutil.copyfileobj(source, copy)


def _others(
    folder: Path, inside: Path, apart: Collection[Path], leave: Collection[str]
) -> Iterator[tuple[Path, Path]]:
    """Yield the files of a folder that are no weights, and their paths from the outermost one."""
    if len(inside.parts) > MAX_DEPTH:
        why = f"it has more than {MAX_DEPTH} folders deep in each other, at {show(inside.as_posix())}"
        raise refusal(folder, f"{why}; move what is not the model's elsewhere", "copy")
    with read_errors(folder):
        found = sorted(folder.iterdir())
    if inside.parts and any(file.name.endswith(_FORMATS) for file in found):
        return
    for file in found:
        own = inside / file.name
        if file.is_dir():
            if not file.name.startswith(".") and not file.is_symlink() and file.resolve() not in apart:
                yield from _others(file, own, apart, ())
        elif file.is_file() and file.name not in leave and not file.name.endswith(_FORMATS):
            yield file, own
