"""Hugging Face folders: checked before they are loaded, and written beside their place and renamed, or not at all."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from lowmem.errors import (
    FileError,
    error_type_and_first_line,
    exception_text,
    file_error,
    model_build_failure_reason,
    short_repr,
)
from lowmem.integrations.transformers.checkpoint_checks import (
    check_folder_fills_model,
    check_not_stored_by_lowmem,
    shapes_by_name_and_total_bytes,
)
from lowmem.integrations.transformers.foreign_checkpoint import from_exact, transformers_config
from lowmem.integrations.transformers.quantization_config import METHOD, LowmemConfig
from lowmem.integrations.transformers.text_tokenizer import check_gguf_installed, gguf_tokenizer
from lowmem.io.convert_checkpoint import TensorConversionRow
from lowmem.io.filesystem import atomic_folder, check_not_exists
from lowmem.io.formats.export_results import ForeignWeightResult
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.io.formats.peft.peft_reader import CONFIG as ADAPTER_CONFIG
from lowmem.io.formats.requantization import Requantization
from lowmem.io.model_folder import (
    CONFIG,
    check_config_files_are_regular,
    check_layer_counts_of_folder,
    copy_non_weight_files,
    read_checked_model_config,
    weights_or_index_path,
)
from lowmem.io.remote_code import NEEDS_CODE, empty_stdin, has_trust_remote_code_in_text
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint, check_each_pattern_matches_a_tensor
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half

# By save_pretrained
WRITTEN = ("config.json", "generation_config.json")

_PART = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # of a checkpoint of many processes
_OTHER = "transformers_weights"  # of a config: the file of the weights


def checked_config_and_tensor_bytes(folder: Path, action: str = "read") -> tuple[dict[str, Any], int]:
    """Return the config of a folder, and the bytes of its tensors; headers and index of its files are checked.

    Raises:
        FileError: it has no config.json or no safetensors files, or they and their index differ; or it has an adapter
            or other weights, which transformers would read instead or as well.
        OSError: a file cannot be read.
    """
    check_config_files_are_regular(folder)
    file = folder / "config.json"
    # Transformers would load the adapter of PEFT with the model beside it
    if (folder / ADAPTER_CONFIG).exists():
        raise file_error(
            folder, f"it has an adapter ({ADAPTER_CONFIG}): merge it into its base, or name the base alone", action
        )
    if not file.exists():
        raise file_error(folder, "it has no config.json: name a folder that save_pretrained of transformers wrote")
    config = read_checked_model_config(file)
    weights = weights_or_index_path(folder)
    others = [name for name in sorted(os.listdir(folder)) if _PART.fullmatch(name)]
    if config.get(_OTHER) not in (None, weights.name):
        others.append(config[_OTHER])
    if others:
        other = short_repr(others[0])
        why = f"it has {weights.name}, and transformers would read {other}: remove what is not the model"
        raise file_error(folder, why, action)
    with SafetensorsCheckpoint(weights) as source:
        check_layer_counts_of_folder(file, config, len(source.specs))
        return config, sum(spec.nbytes for spec in source.specs.values())


def load_folder(
    folder: Path,
    config: LowmemConfig | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    requantizing: Requantization | None = None,
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
        FileError: as ``checked_config_and_tensor_bytes``;
            or transformers does not have the class or cannot load the model; or the folder lacks
            tensors of the model, or has others that would be lost.
    """
    folder_config, _ = checked_config_and_tensor_bytes(folder)
    kind = architecture_class(folder, folder_config)
    name = kind.__name__
    method = (folder_config.get("quantization_config") or {}).get("quant_method")
    is_exact = requantizing is not None or (config is None and method not in (None, METHOD))
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    with quiet_load_with_file_errors(folder):
        model: nn.Module
        if is_exact:
            model, info = from_exact(folder, kind, requantizing=requantizing, **options)
        else:
            options["config"] = transformers_config(folder, _config_class(kind))
            if method is None:
                check_tensors_fit_config(folder, kind)
            if config is not None:
                options["quantization_config"] = config
            if str(device) != "cpu":
                options["device_map"] = {"": device}
            model, info = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    _check_longrope_factor_counts(folder / "config.json", folder_config, model)
    _check_no_tensor_mismatch(folder, name, "lacks", info["missing_keys"])
    # What is left out would be lost
    if config is not None or is_exact:
        _check_no_tensor_mismatch(folder, name, "has, and the model has not,", info["unexpected_keys"], _LEAVE_OUT)
    return model


def architecture_class(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the class of transformers that a folder's config names; a FileError says why there is none."""
    names = config.get("architectures") or ["AutoModel"]
    if not (isinstance(names, list) and isinstance(names[0], str)):
        raise file_error(
            folder, f"architectures={short_repr(names)} must be a list of names of classes; repair config.json"
        )
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and (issubclass(kind, transformers.PreTrainedModel) or _is_auto_class(kind))):
        if "auto_map" in config:
            raise file_error(folder / CONFIG, f"architectures={short_repr(names[0])}: {NEEDS_CODE}")
        why = f"architectures names {short_repr(names[0])}, which transformers {transformers.__version__} has not"
        raise file_error(folder, why)
    return kind


def _is_auto_class(model_class: Any) -> bool:
    return hasattr(model_class, "from_config")


def _config_class(model_class: Any) -> Any:
    return transformers.AutoConfig if _is_auto_class(model_class) else model_class.config_class


def empty_model_on_meta(folder: Path, model_class: Any) -> nn.Module:
    """Return the model of a folder's config on the meta device; a FileError says why transformers cannot make it."""
    with quiet_load_with_file_errors(folder), torch.device("meta"):
        config = transformers_config(folder, _config_class(model_class))
        model: nn.Module = (
            model_class.from_config(config, trust_remote_code=False)
            if _is_auto_class(model_class)
            else model_class(config)
        )
    return model


def check_tensors_fit_config(folder: Path, model_class: Any = transformers.AutoModelForCausalLM) -> None:
    """Compare the tensors of a dense folder with an empty model of its config, before transformers makes a full one.

    Raises:
        FileError: the tensors are of another model, or stored by lowmem.
    """
    model = empty_model_on_meta(folder, model_class)
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with SafetensorsCheckpoint(weights_or_index_path(folder)) as source:
        specs = source.specs
    try:
        check_not_stored_by_lowmem(folder, specs)
        for name, spec in sorted(specs.items()):
            wanted = needed.get(name, spec.shape)
            if wanted != spec.shape:
                why = f"its tensor {short_repr(name)} has the shape {spec.shape}, and by its config.json {wanted}"
                raise ValueError(f"{why}: get both again")
        check_folder_fills_model(model, *shapes_by_name_and_total_bytes(specs), get_model_conversion_mapping(model))
    except ValueError as reason:
        raise file_error(folder, str(reason), "load") from None


def _check_longrope_factor_counts(config_file: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    """Raise a FileError unless a longrope embedding has a factor for each frequency: a long text would fail later."""
    lengths = {
        len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq") and buffer.ndim == 1
    }
    for name, value in _iterate_dotted_config_items(config):
        wrong = isinstance(value, list) and len(value) not in lengths
        if lengths and wrong and name.endswith(("short_factor", "long_factor")):
            why = f"{name}={short_repr(value)} has {len(value)} factors, and the model {max(lengths)} frequencies"
            raise file_error(config_file, f"{why}; get it again", "load")


def load_folder_or_gguf(path: Path, config: LowmemConfig | None = None) -> nn.Module:
    """Return the model of a folder, as ``load_folder`` does with ``config``, or of a GGUF file."""
    return load_gguf(path) if path.is_file() else load_folder(path, config)


def load_gguf(
    file: Path, dtype: torch.dtype = torch.float32, requantizing: Requantization | None = None
) -> nn.Module:
    """Return the causal language model of a GGUF file, its 4-bit codes as they are, in evaluation mode.

    ``dtype`` and ``requantizing`` are those of ``load_folder``.

    Raises:
        FileError: the file is damaged, has weights that cannot be kept exactly, or is of a model that transformers
            does not compute.
        ImportError: gguf is missing, which transformers needs for the config of some architectures.
    """
    with quiet_load_with_file_errors(file, "; lowmem quantize FILE OUT.safetensors needs no config of transformers"):
        model: nn.Module
        model, info = from_exact(file, dtype=dtype, requantizing=requantizing, output_loading_info=True)
    name = type(model).__name__
    _check_no_tensor_mismatch(file, name, "lacks", info["missing_keys"])
    _check_no_tensor_mismatch(file, name, "has, and the model has not,", info["unexpected_keys"])
    return model


def import_foreign_folder(
    source: Path,
    target: Path,
    *,
    requantize: FourBit | EightBit | None = None,
    include: Iterable[str] = (),
    technique: FourBit | EightBit | None = None,
    shard_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: bool = True,
) -> list[ForeignWeightResult]:
    """Write a folder that ``from_pretrained`` loads, with another program's 4-bit codes as they are.

    Args:
        source: a folder whose weights another program quantized; or a GGUF file, whose metadata become the config
            and, if transformers can read it, the tokenizer.
        target, shard_bytes: as for ``quantize_folder``.
        requantize, include, technique: as for ``import_foreign_checkpoint``; names are the file's.
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
    check_not_exists(target)
    asked = Requantization(requantize, list(include), technique)
    with open_foreign_checkpoint(source) as file:
        check_each_pattern_matches_a_tensor(asked.include, file.tensors)
        sources = {name: (tensor.kind, tensor.nbytes) for name, tensor in file.tensors.items()}
        kind = file.kind
    if kind == "gguf" and tokenizer:
        check_gguf_installed(source, ", or write the folder without it: --no-tokenizer (tokenizer=False)")
    if not source.is_dir() and kind != "gguf":
        why = "a file has no config.json: name its folder as IN, or OUT.safetensors"
        raise file_error(source, why, "make a folder of")
    if source.is_dir():
        checked_config_and_tensor_bytes(source)
        model = load_folder(source, dtype=dtype or "auto", requantizing=asked)
        rows = write_model_folder(model, source, target, shard_bytes)
    else:
        model = load_gguf(source, dtype or torch.float32, asked)
        rows = write_model_folder(
            model, None, target, shard_bytes, _gguf_tokenizer_or_warn(source) if tokenizer else None
        )
    foreign_rows = []
    for row in rows:
        path, _, name = row.name.rpartition(".")
        module: Any = model.get_submodule(path)
        stored_form = module.forms[name] if row.converted else module._parameters[name].dtype
        # Transformers merges experts
        before = sources.get(row.name, (kind, row.after_bytes))
        text = str(stored_form).removeprefix("torch.")
        error = asked.largest_error_or_none(row.name)
        foreign_rows.append(
            ForeignWeightResult(row.name, row.shape, before[0], text, before[1], row.after_bytes, error)
        )
    return foreign_rows


def _gguf_tokenizer_or_warn(file: Path) -> Any:
    """Return the tokenizer of a GGUF file; None: it has none that transformers can read."""
    try:
        return gguf_tokenizer(file)
    except MemoryError:
        raise
    except Exception as reason:  # noqa: BLE001  the libraries of tokenizers have no common class of errors
        warnings.warn(
            f"{short_repr(file.name)} has no tokenizer that transformers can read "
            f"({error_type_and_first_line(reason)}): put the model's "
            "own tokenizer files into the folder",
            UserWarning,
            stacklevel=3,
        )
        return None


_LEAVE_OUT = (
    ": let architectures name a class that has them, or leave them out by from_pretrained(IN, "
    "quantization_config=LowmemConfig(...)).save_pretrained(OUT)"
)


def _check_no_tensor_mismatch(
    folder: Path, class_name: str, mismatch: str, tensor_names: Iterable[str], remedy: str = ""
) -> None:
    sorted_names = sorted(tensor_names)
    if sorted_names:
        as_told = f"a {class_name} as config.json describes it, as {short_repr(sorted_names[0])}"
        raise file_error(folder, f"it {mismatch} {len(sorted_names)} tensors of {as_told}{remedy}", "load")


def quantize_folder(
    source: Path,
    target: Path,
    technique: Half | EightBit | FourBit | Budget,
    *,
    skip: str | Iterable[str] = (),
    shard_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> list[TensorConversionRow]:
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
    check_not_exists(target)
    check_folder_is_dense(source)
    model = load_folder(source, LowmemConfig(technique, skip=skip), device=device)
    return write_model_folder(model.to("cpu"), source, target, shard_bytes)


def check_folder_is_dense(folder: Path) -> None:
    """Raise a FileError as ``checked_config_and_tensor_bytes``, and for a folder whose weights are quantized."""
    config, _ = checked_config_and_tensor_bytes(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        by = "lowmem" if method == METHOD else short_repr(method)
        remedy = "take the folder that it was made from"
        if method == METHOD:
            remedy += "; if its weights are dense, load it and save it again, which mends its config.json"
        raise file_error(folder, f"it is quantized by {by} already; {remedy}", "convert")


def write_model_folder(
    model: Any, source: Path | None, target: Path, shard_bytes: int | None, tokenizer: Any = None
) -> list[TensorConversionRow]:
    """Write a model's folder, with the other files of ``source`` and a tokenizer; return a row for each parameter."""
    with atomic_folder(target) as partial:
        if source is not None:
            copy_non_weight_files(source, partial, target, WRITTEN)
        with _disabled_progress_bars():
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            model.save_pretrained(partial, **({} if shard_bytes is None else {"max_shard_size": shard_bytes}))
    return sorted(_iterate_parameter_rows(model), key=lambda row: row.name)


@contextmanager
def quiet_load_with_file_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn an error of transformers, whose libraries have no common class of errors, into one that names the file."""
    try:
        with _disabled_progress_bars(), empty_stdin():
            yield
    except (FileError, OSError, ImportError, MemoryError):
        # These say it
        raise
    except Exception as error:
        config = path / "config.json" if path.is_dir() else path
        if has_trust_remote_code_in_text(error) or _is_missing_custom_code(config, error):
            raise file_error(config, NEEDS_CODE, "load") from error
        why = _unknown_config_value_text_or_none(path, error)
        if why is None:
            why, path = model_build_failure_reason(error), config
        raise file_error(path, why + remedy, "load") from error


def _is_missing_custom_code(config_file: Path, error: Exception) -> bool:
    """Whether transformers lacks a model, and the config names code, which ``transformers_config`` left out."""
    lacks = (
        "Unrecognized configuration class" in exception_text(error)
        and config_file.name == CONFIG
        and config_file.exists()
    )
    return lacks and any(
        name.endswith("auto_map") for name, _ in _iterate_dotted_config_items(read_checked_model_config(config_file))
    )


def _unknown_config_value_text_or_none(path: Path, error: Exception) -> str | None:
    """Say which value of config.json is in none of transformers' tables; None: the error is another."""
    file = path / "config.json"
    if not (isinstance(error, KeyError) and error.args and isinstance(error.args[0], str) and file.exists()):
        return None
    key = next(
        (
            name
            for name, value in _iterate_dotted_config_items(read_checked_model_config(file))
            if value == error.args[0]
        ),
        None,
    )
    version = transformers.__version__
    return key and f"config.json has {key}={short_repr(error.args[0])}, which transformers {version} does not know"


def _iterate_dotted_config_items(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a config, and of those in it, with their names."""
    for name, value in config.items() if isinstance(config, dict) else ():
        yield f"{prefix}{name}", value
        yield from _iterate_dotted_config_items(value, f"{prefix}{name}.")


@contextmanager
def _disabled_progress_bars() -> Iterator[None]:
    """Let transformers draw no progress bars in the block: it would in a pipe, too."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def weights_read_reported(progress: Callable[[int, int], None]) -> Iterator[None]:
    """Call ``progress`` in the block with how many weights of a model transformers has read, and of how many."""

    def report_items(items: Collection[Any]) -> Iterator[Any]:
        for done, item in enumerate(items):
            progress(done, len(items))
            yield item
        progress(len(items), len(items))

    def make_bar(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        sized = bool(arguments) and isinstance(arguments[0], Collection)
        return report_items(arguments[0]) if sized else factory(*arguments, **options)

    bars = transformers.utils.logging
    before = bars.set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        bars.set_tqdm_hook(before)


def _iterate_parameter_rows(model: nn.Module) -> Iterator[TensorConversionRow]:
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
            yield TensorConversionRow(
                full, shape, True, before, after, module.weight_error, str(stored[name]), module.chosen_because
            )
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                size = parameter.nbytes
                yield TensorConversionRow(
                    f"{path}.{name}".lstrip("."), tuple(parameter.shape), False, size, size, None
                )
