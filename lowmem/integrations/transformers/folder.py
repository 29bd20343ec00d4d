"""Hugging Face folders: checked before they are loaded, and written beside their place and renamed, or not at all."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from lowmem.errors import FileError, describe, message_of, refusal, show, unbuilt
from lowmem.integrations.transformers.checking import refuse_unfitting, refuse_unread, shapes_and_bytes
from lowmem.integrations.transformers.config import METHOD, LowmemConfig
from lowmem.integrations.transformers.exact import config_at, from_exact
from lowmem.integrations.transformers.tokenizing import check_gguf, tokenizer_of
from lowmem.io.atomic import atomic_folder, check_free
from lowmem.io.convert_checkpoint import Row
from lowmem.io.folder_code import NEEDS_CODE, is_about_code, unasked
from lowmem.io.formats.exported import ForeignRow
from lowmem.io.formats.peft.reading import CONFIG as ADAPTER_CONFIG
from lowmem.io.formats.recognize import open_foreign
from lowmem.io.formats.requantizing import Requantizing
from lowmem.io.model_folder import CONFIG, check_layers, check_regular, copy_others, read_model_config, weights_in
from lowmem.io.source import Source, check_patterns
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half

WRITTEN = ("config.json", "generation_config.json")  # by save_pretrained

_PART = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # of a checkpoint of many processes
_OTHER = "transformers_weights"  # of a config: the file of the weights


def check(folder: Path, action: str = "read") -> tuple[dict[str, Any], int]:
    """Return the config of a folder, and the bytes of its tensors; headers and index of its files are checked.

    Raises:
        FileError: it has no config.json or no safetensors files, or they and their index differ; or it has an adapter
            or other weights, which transformers would read instead or as well.
        OSError: a file cannot be read.
    """
    check_regular(folder)
    file = folder / "config.json"
    if (folder / ADAPTER_CONFIG).exists():  # transformers would load the adapter of PEFT with the model beside it
        raise refusal(
            folder, f"it has an adapter ({ADAPTER_CONFIG}): merge it into its base, or name the base alone", action
        )
    if not file.exists():
        raise refusal(folder, "it has no config.json: name a folder that save_pretrained of transformers wrote")
    config = read_model_config(file)
    weights = weights_in(folder)
    others = [name for name in sorted(os.listdir(folder)) if _PART.fullmatch(name)]
    if config.get(_OTHER) not in (None, weights.name):
        others.append(config[_OTHER])
    if others:
        why = f"it has {weights.name}, and transformers would read {show(others[0])}: remove what is not the model"
        raise refusal(folder, why, action)
    with Source(weights) as source:
        check_layers(file, config, len(source.specs))
        return config, sum(spec.nbytes for spec in source.specs.values())


def load_folder(
    folder: Path,
    config: LowmemConfig | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    requantizing: Requantizing | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return the model of a folder, in the class that its config names, in evaluation mode, running no code of it.

    Args:
        folder: dense, stored by lowmem, or quantized by another program, whose codes are kept.
        config: how to store a dense model while it is loaded; None leaves the model dense.
        dtype: of dense parameters, and of the computation; "auto": as the folder has it.
        requantizing: what is quantized of a folder that is not lowmem's; None: nothing.
        device: where a dense folder's weights go, and are stored; another one than the CPU needs accelerate.

    Raises:
        FileError: as ``check``; or transformers does not have the class or cannot load the model; or the folder lacks
            tensors of the model, or has others that would be lost.
    """
    found, _ = check(folder)
    kind = class_of(folder, found)
    name = kind.__name__
    method = (found.get("quantization_config") or {}).get("quant_method")
    is_exact = requantizing is not None or (config is None and method not in (None, METHOD))
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    with load_errors(folder):
        model: nn.Module
        if is_exact:
            model, info = from_exact(folder, kind, requantizing=requantizing, **options)
        else:
            options["config"] = config_at(folder, _config_class(kind))
            if method is None:
                check_shapes(folder, kind)
            if config is not None:
                options["quantization_config"] = config
            if str(device) != "cpu":
                options["device_map"] = {"": device}
            model, info = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    _refuse_factors(folder / "config.json", found, model)
    _refuse_differing(folder, name, "lacks", info["missing_keys"])
    if config is not None or is_exact:  # what is left out would be lost
        _refuse_differing(folder, name, "has, and the model has not,", info["unexpected_keys"], _LEAVE_OUT)
    return model


def class_of(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the class of transformers that a folder's config names; a FileError says why there is none."""
    names = config.get("architectures") or ["AutoModel"]
    if not (isinstance(names, list) and isinstance(names[0], str)):
        raise refusal(folder, f"architectures={show(names)} must be a list of names of classes; repair config.json")
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and (issubclass(kind, transformers.PreTrainedModel) or _is_auto(kind))):
        if "auto_map" in config:
            raise refusal(folder / CONFIG, f"architectures={show(names[0])}: {NEEDS_CODE}")
        why = f"architectures names {show(names[0])}, which transformers {transformers.__version__} has not"
        raise refusal(folder, why)
    return kind


def _is_auto(kind: Any) -> bool:
    return hasattr(kind, "from_config")


def _config_class(kind: Any) -> Any:
    return transformers.AutoConfig if _is_auto(kind) else kind.config_class


def empty_model(folder: Path, kind: Any) -> nn.Module:
    """Return the model of a folder's config on the meta device; a FileError says why transformers cannot make it."""
    with load_errors(folder), torch.device("meta"):
        config = config_at(folder, _config_class(kind))
        model: nn.Module = kind.from_config(config, trust_remote_code=False) if _is_auto(kind) else kind(config)
    return model


def check_shapes(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> None:
    """Compare the tensors of a dense folder with an empty model of its config, before transformers makes a full one.

    Raises:
        FileError: the tensors are of another model, or stored by lowmem.
    """
    model = empty_model(folder, kind)
    needed = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    with Source(weights_in(folder)) as source:
        specs = source.specs
    try:
        refuse_unread(folder, specs)
        for name, spec in sorted(specs.items()):
            wanted = needed.get(name, spec.shape)
            if wanted != spec.shape:
                why = f"its tensor {show(name)} has the shape {spec.shape}, and by its config.json {wanted}"
                raise ValueError(f"{why}: get both again")
        refuse_unfitting(model, *shapes_and_bytes(specs), get_model_conversion_mapping(model))
    except ValueError as reason:
        raise refusal(folder, str(reason), "load") from None


def _refuse_factors(file: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    """Raise a FileError unless a longrope embedding has a factor for each frequency: a long text would fail later."""
    lengths = {len(one) for name, one in model.named_buffers() if name.endswith("inv_freq") and one.ndim == 1}
    for name, value in _values(config):
        wrong = isinstance(value, list) and len(value) not in lengths
        if lengths and wrong and name.endswith(("short_factor", "long_factor")):
            why = f"{name}={show(value)} has {len(value)} factors, and the model {max(lengths)} frequencies"
            raise refusal(file, f"{why}; get it again", "load")


def load_model(path: Path, config: LowmemConfig | None = None) -> nn.Module:
    """Return the model of a folder, as ``load_folder`` does with ``config``, or of a GGUF file."""
    return load_gguf(path) if path.is_file() else load_folder(path, config)


def load_gguf(file: Path, dtype: torch.dtype = torch.float32, requantizing: Requantizing | None = None) -> nn.Module:
    """Return the causal language model of a GGUF file, its 4-bit codes as they are, in evaluation mode.

    ``dtype`` and ``requantizing`` are those of ``load_folder``.

    Raises:
        FileError: the file is damaged, has weights that cannot be kept exactly, or is of a model that transformers
            does not compute.
        ImportError: gguf is missing, which transformers needs for the config of some architectures.
    """
    with load_errors(file, "; lowmem quantize FILE OUT.safetensors needs no config of transformers"):
        model: nn.Module
        model, info = from_exact(file, dtype=dtype, requantizing=requantizing, output_loading_info=True)
    name = type(model).__name__
    _refuse_differing(file, name, "lacks", info["missing_keys"])
    _refuse_differing(file, name, "has, and the model has not,", info["unexpected_keys"])
    return model


def import_folder(
    source: Path,
    target: Path,
    *,
    requantize: FourBit | EightBit | None = None,
    include: Iterable[str] = (),
    technique: FourBit | EightBit | None = None,
    shard_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: bool = True,
) -> list[ForeignRow]:
    """Write a folder that ``from_pretrained`` loads, with another program's 4-bit codes as they are.

    Args:
        source: a folder whose weights another program quantized; or a GGUF file, whose metadata become the config
            and, if transformers can read it, the tokenizer.
        target, shard_bytes: as for ``quantize_folder``.
        requantize, include, technique: as for ``import_checkpoint``; names are the file's.
        dtype: of dense parameters; None takes the dtypes of the folder, or float32 for a GGUF file.
        tokenizer: whether the tokenizer of a GGUF file is written, too.

    Returns:
        A row for each parameter, sorted by name; tied ones have one.

    Raises:
        ValueError: a pattern that matches no tensor.
        FileError, FileExistsError, OSError: as ``quantize_folder``; or a weight cannot be kept exactly, without
            ``requantize``.
        ImportError: the tokenizer of a GGUF file takes the package gguf, which is missing.
    """
    check_free(target)
    asked = Requantizing(requantize, list(include), technique)
    with open_foreign(source) as file:
        check_patterns(asked.include, file.tensors)
        sources = {name: (tensor.kind, tensor.nbytes) for name, tensor in file.tensors.items()}
        kind = file.kind
    if kind == "gguf" and tokenizer:
        check_gguf(source, ", or write the folder without it: --no-tokenizer (tokenizer=False)")
    if not source.is_dir() and kind != "gguf":
        why = "a file has no config.json: name its folder as IN, or OUT.safetensors"
        raise refusal(source, why, "make a folder of")
    if source.is_dir():
        check(source)
        model = load_folder(source, dtype=dtype or "auto", requantizing=asked)
        rows = write_model(model, source, target, shard_bytes)
    else:
        model = load_gguf(source, dtype or torch.float32, asked)
        rows = write_model(model, None, target, shard_bytes, _tokenizer_in(source) if tokenizer else None)
    found = []
    for row in rows:
        path, _, name = row.name.rpartition(".")
        module: Any = model.get_submodule(path)
        kept = module.forms[name] if row.converted else module._parameters[name].dtype
        before = sources.get(row.name, (kind, row.after_bytes))  # transformers merges experts
        text = str(kept).removeprefix("torch.")
        error = asked.error(row.name)
        found.append(ForeignRow(row.name, row.shape, before[0], text, before[1], row.after_bytes, error))
    return found


def _tokenizer_in(file: Path) -> Any:
    """Return the tokenizer of a GGUF file; None: it has none that transformers can read."""
    try:
        return tokenizer_of(file)
    except MemoryError:
        raise
    except Exception as reason:  # noqa: BLE001  the libraries of tokenizers have no common class of errors
        warnings.warn(
            f"{show(file.name)} has no tokenizer that transformers can read ({describe(reason)}): put the model's "
            "own tokenizer files into the folder",
            UserWarning,
            stacklevel=3,
        )
        return None


_LEAVE_OUT = (
    ": let architectures name a class that has them, or leave them out by from_pretrained(IN, "
    "quantization_config=LowmemConfig(...)).save_pretrained(OUT)"
)


def _refuse_differing(folder: Path, name: str, what: str, tensors: Iterable[str], remedy: str = "") -> None:
    found = sorted(tensors)
    if found:
        as_told = f"a {name} as config.json describes it, as {show(found[0])}"
        raise refusal(folder, f"it {what} {len(found)} tensors of {as_told}{remedy}", "load")


def quantize_folder(
    source: Path,
    target: Path,
    technique: Half | EightBit | FourBit | Budget,
    *,
    skip: str | Iterable[str] = (),
    shard_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Write a folder with the weights of another one stored, and its other files as they are; both load alike.

    One tensor at a time is dense in memory.

    Args:
        source: a dense folder.
        target: where nothing is yet.
        technique, skip: as for ``LowmemConfig``.
        shard_bytes: the most bytes of tensors per file; None: transformers' own limit.
        device: where weights are quantized; another one than the CPU needs accelerate.

    Returns:
        A row for each parameter, sorted by name; tied ones have one.

    Raises:
        FileError: as ``load_folder``; or the folder is quantized already.
        FileExistsError: something is at ``target``.
        OSError: a file cannot be read or written.
    """
    check_free(target)
    check_dense(source)
    model = load_folder(source, LowmemConfig(technique, skip=skip), device=device)
    return write_model(model.to("cpu"), source, target, shard_bytes)


def check_dense(folder: Path) -> None:
    """Raise a FileError as ``check``, and for a folder whose weights are quantized."""
    config, _ = check(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        by = "lowmem" if method == METHOD else show(method)
        remedy = "take the folder that it was made from"
        if method == METHOD:
            remedy += "; if its weights are dense, load it and save it again, which mends its config.json"
        raise refusal(folder, f"it is quantized by {by} already; {remedy}", "convert")


def write_model(
    model: Any, source: Path | None, target: Path, shard_bytes: int | None, tokenizer: Any = None
) -> list[Row]:
    """Write a model's folder, with the other files of ``source`` and a tokenizer; return a row for each parameter."""
    with atomic_folder(target) as partial:
        if source is not None:
            copy_others(source, partial, target, WRITTEN)
        with _without_bars():
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            model.save_pretrained(partial, **({} if shard_bytes is None else {"max_shard_size": shard_bytes}))
    return sorted(_rows_of(model), key=lambda row: row.name)


@contextmanager
def load_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn an error of transformers, whose libraries have no common class of errors, into one that names the file."""
    try:
        with _without_bars(), unasked():
            yield
    except (FileError, OSError, ImportError, MemoryError):  # these say it
        raise
    except Exception as error:
        config = path / "config.json" if path.is_dir() else path
        if is_about_code(error) or _is_left_out(config, error):
            raise refusal(config, NEEDS_CODE, "load") from error
        why = _unknown_value(path, error)
        if why is None:
            why, path = unbuilt(error), config
        raise refusal(path, why + remedy, "load") from error


def _is_left_out(config: Path, error: Exception) -> bool:
    """Whether transformers lacks a model, and the config names code, which ``config_at`` has made it forget."""
    lacks = "Unrecognized configuration class" in message_of(error) and config.name == CONFIG and config.exists()
    return lacks and any(name.endswith("auto_map") for name, _ in _values(read_model_config(config)))


def _unknown_value(path: Path, error: Exception) -> str | None:
    """Say which value of config.json is in none of transformers' tables; None: the error is another."""
    file = path / "config.json"
    if not (isinstance(error, KeyError) and error.args and isinstance(error.args[0], str) and file.exists()):
        return None
    found = next((name for name, value in _values(read_model_config(file)) if value == error.args[0]), None)
    version = transformers.__version__
    return found and f"config.json has {found}={show(error.args[0])}, which transformers {version} does not know"


def _values(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a config, and of those in it, with their names."""
    for name, value in config.items() if isinstance(config, dict) else ():
        yield f"{path}{name}", value
        yield from _values(value, f"{path}{name}.")


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


def _rows_of(model: nn.Module) -> Iterator[Row]:
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
            full = f"{path}.{name}".lstrip(".")
            yield Row(full, shape, True, before, after, module.weight_error, str(stored[name]), module.chosen_because)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                size = parameter.nbytes
                yield Row(f"{path}.{name}".lstrip("."), tuple(parameter.shape), False, size, size, None)
