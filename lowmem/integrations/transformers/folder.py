"""Hugging Face folders: checked before they are loaded, and written beside their place and renamed, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from lowmem.errors import describe, refusal, show
from lowmem.integrations.transformers.config import METHOD, LowmemConfig
from lowmem.io.atomic import atomic_folder, check_free, write_errors
from lowmem.io.convert_checkpoint import Row, Source
from lowmem.io.foreign.recognize import read_config
from lowmem.io.shards import INDEX
from lowmem.nn.fourbit import FourBit
from lowmem.nn.half import Half
from lowmem.nn.stored_module import StoredModule

__all__ = ["check", "load_folder", "quantize_folder"]

WEIGHTS = "model.safetensors"
# What is not copied from a folder: weights in any format, and what save_pretrained writes itself.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", INDEX)
WRITTEN = ("config.json", "generation_config.json")


def check(folder: Path) -> tuple[dict[str, Any], int]:
    """Return the config of a folder, and the bytes of its tensors; headers and index of its files are checked.

    Raises:
        FileError: it has no config.json or no safetensors files, or they and their index differ.
        OSError: a file cannot be read.
    """
    file = folder / "config.json"
    if not file.exists():
        raise refusal(folder, "it has no config.json: name a folder that save_pretrained of transformers wrote")
    config = read_config(file)
    if not isinstance(config, dict):
        raise refusal(file, f"it is {show(config)}, and no config of a model; get it again")
    asked = config.get("quantization_config")
    if not isinstance(asked, (dict, type(None))):
        raise refusal(file, f"quantization_config={show(asked)} must be an object; repair it")
    weights = next((folder / name for name in (WEIGHTS + INDEX, WEIGHTS) if (folder / name).exists()), None)
    if weights is None:
        raise refusal(
            folder,
            f"it has no {WEIGHTS} and no {WEIGHTS}{INDEX}: lowmem reads safetensors only, and executed nothing",
        )
    with Source(weights) as source:
        return config, sum(spec.nbytes for spec in source.specs.values())


def load_folder(folder: Path, config: LowmemConfig | None = None) -> nn.Module:
    """Return the model of a folder, in the class that its config names, in evaluation mode. No code of it is run.

    Args:
        folder: as ``save_pretrained`` writes it; dense, or stored by lowmem.
        config: how to store it while it is loaded; None: as it is.

    Raises:
        FileError: as ``check``; or a class that transformers does not have, a model that it cannot load, or one that
            has tensors that the folder lacks; when it is to be stored, one that lacks some of the folder's.
    """
    found, _ = check(folder)
    names = found.get("architectures") or ["AutoModel"]
    if not (isinstance(names, list) and isinstance(names[0], str)):
        raise refusal(folder, f"architectures={show(names)} must be a list of names of classes; repair config.json")
    name = names[0]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and hasattr(kind, "from_pretrained")):
        raise refusal(
            folder, f"architectures names {show(name)}, which transformers {transformers.__version__} has not"
        )
    try:
        with _without_bars():
            model: nn.Module
            model, info = kind.from_pretrained(
                folder, quantization_config=config, dtype="auto", local_files_only=True, output_loading_info=True
            )
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as reason:
        raise refusal(folder, describe(reason), "load") from reason
    _refuse_differing(folder, name, "lacks", info["missing_keys"])
    if config is not None:  # what is left out would be lost
        _refuse_differing(folder, name, "has, and the model has not,", info["unexpected_keys"])
    return model


def _refuse_differing(folder: Path, name: str, what: str, tensors: Iterable[str]) -> None:
    found = sorted(tensors)
    if found:
        as_told = f"a {name} as config.json describes it, as {show(found[0])}"
        raise refusal(folder, f"it {what} {len(found)} tensors of {as_told}", "load")


def quantize_folder(
    source: Path,
    target: Path,
    technique: Half | FourBit,
    *,
    skip: str | Iterable[str] = (),
    shard_bytes: int | None = None,
) -> list[Row]:
    """Write a folder with the weights of another one stored, and its other files as they are; both load alike.

    A tensor at a time is dense in memory. The folder is written beside its place and renamed when it is complete.

    Args:
        source: a dense folder.
        target: where nothing is yet.
        technique: how to store the weights.
        skip: glob patterns of paths of modules to leave dense.
        shard_bytes: the most bytes of tensors per file; None: transformers' own limit.

    Returns:
        A row for each parameter, sorted by name; tied ones have one.

    Raises:
        FileError: as ``load_folder``; or the folder is quantized already.
        FileExistsError: something is at ``target``.
        OSError: a file cannot be read or written.
    """
    check_free(target)
    config, _ = check(source)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        by = "lowmem" if method == METHOD else show(method)
        raise refusal(source, f"it is quantized by {by} already; take the folder that it was made from", "convert")
    model: Any = load_folder(source, LowmemConfig(technique, skip=skip))
    with atomic_folder(target) as partial:
        with write_errors(target):
            for file in sorted(source.iterdir()):
                if file.is_file() and file.name not in WRITTEN and not file.name.endswith(NOT_COPIED):
                    shutil.copyfile(file, partial / file.name)
        with _without_bars():
            model.save_pretrained(partial, **({} if shard_bytes is None else {"max_shard_size": shard_bytes}))
    return sorted(_rows(model), key=lambda row: row.name)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Let transformers draw no progress bars in the block: it would in a pipe, too."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _rows(model: nn.Module) -> Iterator[Row]:
    """Yield a row for each distinct parameter of a model, stored or dense."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        stored = module.forms if isinstance(module, StoredModule) else {}
        for name in stored:
            tensor = module.stored_tensor(name)
            parts = [module._parameters[f"{name}_{part}"] for part in stored[name].parts]
            seen |= {id(part) for part in parts}
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            shape, after = tuple(tensor.shape), sum(part.nbytes for part in parts if part is not None)
            before = tensor.numel() * tensor.dtype.itemsize
            yield Row(f"{path}.{name}".lstrip("."), shape, True, before, after, module.weight_error)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                size = parameter.nbytes
                yield Row(f"{path}.{name}".lstrip("."), tuple(parameter.shape), False, size, size, None)
