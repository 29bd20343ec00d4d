"""``from_exact``: models of other programs' folders and GGUF files, with the codes of their weights as they are.

transformers builds the model without values, and gets a state dict in place of files. Its modules become those that
store the file's weights, and the file's tensors get the names of their parts. Each is read when transformers asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowmem.errors import file_error, printable_line
from lowmem.integrations.transformers.checkpoint_checks import TensorToParameterMapping, check_folder_fills_model
from lowmem.integrations.transformers.gguf_config import check_config_matches_gguf, gguf_config_dict_or_none
from lowmem.integrations.transformers.prequantized_loading import stored_part_dtypes_by_name, ties_of_parts
from lowmem.integrations.transformers.quantization_config import METHOD
from lowmem.integrations.transformers.quantizer import LowmemQuantizer
from lowmem.io.formats.foreign_format import LazyForeignTensor, StorageForm
from lowmem.io.formats.open_foreign import ForeignCheckpoint, open_foreign_checkpoint
from lowmem.io.formats.requantization import Requantization, refused_tensors_message, warn_if_model_grows
from lowmem.io.meta_loading import replace_layers_and_add_adapters
from lowmem.io.metadata_records import form_to_record_dict, parameter_record_key
from lowmem.io.model_folder import (
    CONFIG,
    check_layer_counts_of_folder,
    read_checked_model_config,
    read_json_object,
    read_quantization_config,
)
from lowmem.io.remote_code import NEEDS_CODE, has_trust_remote_code_in_text, remove_auto_map_entries
from lowmem.io.safetensors_header import CODES
from lowmem.nn.adapter import is_transformers_conv1d
from lowmem.nn.forms import CodedForm
from lowmem.nn.quantized_module import state_dict_keys_of_formats
from lowmem.quant.tensor import QuantizedTensor


def from_exact(
    source: str | Path,
    auto_class: Any = AutoModelForCausalLM,
    *,
    config: Any = None,
    dtype: torch.dtype | str | None = "auto",
    requantizing: Requantization | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Return the model of a folder or file that another program quantized, with its 4-bit codes as they are.

    The weights equal, bit for bit, what that program computes of them in float32.

    Args:
        source: a folder with weights of bitsandbytes, GPTQ, AWQ, compressed-tensors or MXFP4, or a GGUF file.
        auto_class: the class of transformers to load; a model's own or one of the Auto classes.
        config: of the model; None: that of the folder, or of a GGUF file's metadata.
        dtype: of what is dense, and of what the rest computes in; "auto": that of the config, or of the first dense
            weight, or float32.
        requantizing: which weights are quantized again; None quantizes no weight again.
        trust_remote_code: whether to run code that the folder brings, of its config and its model.
        **options: for ``from_pretrained``, such as ``device_map``.

    Raises:
        FileError: files that lowmem does not read, without 4-bit weights, or with some that cannot be kept exactly;
            a folder that needs code of its own, without ``trust_remote_code``; a GGUF file whose fields contradict
            the model's config.
        ValueError: a weight of another shape than the model's, or a ``device_map`` with a disk.

    Warns:
        GrowthWarning: the model takes more bytes than the source's weights, which names the option that avoids that.
    """
    path = Path(source)
    if (path / "config.json").is_file() and read_quantization_config(path / "config.json").get(
        "quant_method"
    ) == METHOD:
        raise file_error(path, "lowmem has stored its weights: from_pretrained loads it", "load")
    with _exclusive_cpu_reads():
        opened = open_foreign_checkpoint(path)
    with opened as file:
        model_config = _checked_foreign_config(path, file, trust_remote_code) if config is None else deepcopy(config)
        for item in (model_config, model_config.get_text_config(decoder=True)):
            vars(item).pop("quantization_config", None)  # of the other program
        if dtype in (None, "auto"):
            storage_kinds = (tensor.storage_form() for tensor in file.tensors.values() if tensor.refusal is None)
            floats = (item for item in storage_kinds if isinstance(item, torch.dtype) and item.is_floating_point)
            dtype = model_config.dtype or (torch.float32 if file.kind == "gguf" else next(floats, torch.float32))
        if path.is_dir() and (path / "generation_config.json").is_file():
            generation = GenerationConfig.from_dict(read_json_object(path / "generation_config.json"))
            options.setdefault("generation_config", generation)
        asked, kind = _ForeignQuantizationConfig(path, file, requantizing or Requantization()), auto_class
        # An Auto class needs a folder to find the class of a model
        if hasattr(kind, "from_config"):
            with torch.device("meta"):
                empty = kind.from_config(model_config, trust_remote_code=trust_remote_code)
            model_config, kind = empty.config, type(empty)
        loaded = kind.from_pretrained(
            None,
            config=model_config,
            state_dict=asked.state,
            quantization_config=asked,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **options,
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(source)
    size = sum(parameter.nbytes for parameter in model.parameters())
    warn_if_model_grows(path, asked.weights, size, model.dtype)
    return loaded


def transformers_config(path: Path, config_class: Any = AutoConfig, trust_remote_code: bool = False) -> Any:
    """Return the config in transformers of the model of a folder or GGUF file.

    Args:
        path: the folder or file.
        config_class: the class of the config, or ``AutoConfig``.
        trust_remote_code: whether to run code of the folder; the config names none otherwise.

    Raises:
        FileError: the config needs code of the folder.
        Exception: of transformers, for a config that it does not take.
    """
    options: dict[str, Any] = {}
    folder = path
    if path.is_file():
        made = gguf_config_dict_or_none(path)
        if made is not None:
            return AutoConfig.for_model(**made)
        folder, options = path.parent, {"gguf_file": path.name}
    try:
        config = config_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except ValueError as error:
        if has_trust_remote_code_in_text(error):
            raise file_error(path / CONFIG, NEEDS_CODE, "load") from error
        raise
    if not trust_remote_code:
        remove_auto_map_entries(config)
    return config


def _checked_foreign_config(path: Path, foreign_file: ForeignCheckpoint, trust_remote_code: bool) -> Any:
    """Return the config of a model that another program quantized."""
    if foreign_file.kind != "gguf":
        path = path if path.is_dir() else path.parent
        check_layer_counts_of_folder(
            path / "config.json", read_checked_model_config(path / "config.json"), len(foreign_file.tensors)
        )
    return transformers_config(path, trust_remote_code=trust_remote_code)


_METHOD = f"{METHOD}; exact"


class _ForeignQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``from_exact`` tells the quantizer, which fills ``state``, and ``weights`` with how each tensor of the
    file is kept. It is no part of the loaded model's config."""

    def __init__(self, source: Path, foreign_file: ForeignCheckpoint, requantizing: Requantization) -> None:
        self.quant_method = _METHOD
        self.source, self.file, self.requantizing = source, foreign_file, requantizing
        self.state: dict[str, _LazyFileTensor] = {}
        self.weights: list[tuple[LazyForeignTensor, StorageForm]] = []

    def __deepcopy__(self, memo: Any) -> _ForeignQuantizationConfig:
        # Transformers copies configs, and open files cannot be copied
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return what transformers may show or compare."""
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _ForeignQuantizer(LowmemQuantizer):
    """Keeps the codes of another program's weights while transformers loads a model."""

    quantization_config: Any

    def __init__(self, quantization_config: _ForeignQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})
        self._exact: Any = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise a ValueError where weights would be offloaded to disk."""
        self.check_no_disk_offload(device_map)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        self.tie_parameters(model, tied)
        with _exclusive_cpu_reads():
            exact = self._exact = _ForeignStateDict(self.quantization_config, model)
        replace_layers_and_add_adapters(model, {"layers": exact.layers}, {})
        exact.add_extra_state_entries(model)
        self.replace_ties_while_loading(model, ties_of_parts(model, tied))
        self.part_dtypes = stored_part_dtypes_by_name(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the model's conversions, and those that merge parts of weights as they merge weights."""
        exact, self._exact = self._exact, None
        if exact is None:
            return weight_conversions
        conversions: list[Any] = exact.with_part_conversions(weight_conversions)
        check_folder_fills_model(model, dict.fromkeys(exact.state), exact.nbytes, conversions)
        return conversions


class _ForeignStateDict:
    """The weights of another program's file or folder, for a dense model on the meta device, with its ties.

    Attributes:
        layers: records of how weights are stored, by the model's paths, as the metadata of lowmem's files has them.
        state: as in ``_ForeignQuantizationConfig``: by name, an object that reads the tensor at ``[...]``.
        nbytes: what the file's tensors take.
    """

    def __init__(self, config: _ForeignQuantizationConfig, model: Any) -> None:
        self._source, self._requantizing = config.source, config.requantizing
        self.layers: dict[str, dict[str, Any]] = {}
        self.state, self._weights = config.state, config.weights
        self.nbytes = sum(tensor.nbytes for tensor in config.file.tensors.values())
        self._merging: list[WeightConverter] = []
        self._assign_foreign_tensors(config.file, model)

    def add_extra_state_entries(self, model: nn.Module) -> None:
        """Add the formats that modules of the converted model hold to the state."""
        for name in state_dict_keys_of_formats(model):
            module: Any = model.get_submodule(name.rpartition(".")[0])
            self.state[name] = _LazyFileTensor(torch.uint8, module.get_extra_state)

    def with_part_conversions(self, model_conversions: list[Any]) -> list[Any]:
        """Return the model's conversions of a folder, and those that merge parts of weights as they merge weights."""
        return model_conversions + [
            _converter_with_suffix(converter, part) for converter in self._merging for part in ("_packed", "_scales")
        ]

    def _assign_foreign_tensors(self, foreign_file: ForeignCheckpoint, model: Any) -> None:
        if foreign_file.kind == "gguf":
            check_config_matches_gguf(self._source, model.config)
        names = TensorToParameterMapping(model, get_model_conversion_mapping(model))
        forms: dict[str, tuple[CodedForm, str]] = {}
        refused: list[LazyForeignTensor] = []
        coded = False
        for foreign_tensor in foreign_file.tensors.values():
            tensor = self._requantizing.lazily_requantized_or_same_tensor(foreign_tensor)
            name, converter = names.parameter_name_and_converter(tensor.name)
            if tensor.refusal is not None:
                coded = True
                if name in names.parameters:
                    refused.append(tensor)
                continue
            stored_form = tensor.storage_form()
            self._weights.append((tensor, stored_form))
            if not isinstance(stored_form, CodedForm):
                if converter is None and name in names.parameters:
                    self._check_shape(tensor, tuple(names.parameters[name].shape))
                self.state[tensor.name] = _LazyFileTensor(stored_form, tensor.read)
                continue
            coded = True
            if name not in names.parameters:
                self.state[tensor.name] = _LazyFileTensor(
                    torch.uint8, tensor.read
                )  # which transformers reports, and leaves
                continue
            parameter, module = names.parameters[name], model.get_submodule(name.rpartition(".")[0])
            # Other programs pack a Conv1D as a linear layer, and leave a dense one as it is.
            swapped = is_transformers_conv1d(module) and (
                foreign_tensor.refusal is not None or isinstance(foreign_tensor.storage_form(), CodedForm)
            )
            form = replace(stored_form, transposed=tensor.transposed or swapped)
            self._requantizing.names[tensor.name] = name
            if converter is not None:
                self._add_merge_conversion_or_raise(tensor, name, converter, form, parameter)
            else:
                self._check_shape(tensor, tuple(parameter.shape), form.transposed)
            before, first = forms.setdefault(name, (form, tensor.name))
            if before != form:
                raise ValueError(
                    f"{printable_line(first, 80)} is stored in {before}, and {printable_line(tensor.name, 80)} in "
                    f"{form}, "
                    f"which are one weight in {type(model).__name__}: {_DENSE}"
                )
            self.layers[parameter_record_key(name)] = form_to_record_dict(form)
            of_parts = _ReadOnceWeightParts(tensor)
            prefix = name if converter is None else tensor.name
            self.state |= {f"{prefix}_{part}": of_parts.lazy_part(part) for part in form.parts}
        if refused:
            raise file_error(self._source, refused_tensors_message(refused), "load")
        # A dense GGUF file is read, too
        if not self.layers and (coded or foreign_file.kind != "gguf"):
            raise file_error(
                self._source,
                "it has no 4-bit weights of the model, whose codes could be kept: load it by from_pretrained, and "
                "to quantize it give quantization_config=LowmemConfig(FourBit('nf4'))",
                "load",
            )

    def _check_shape(self, tensor: LazyForeignTensor, shape: tuple[int, ...], transposed: bool = False) -> None:
        """Raise a ValueError unless a weight of the file, or its transpose, has the shape of the model's."""
        if tensor.shape != ((*shape[:-2], shape[-1], shape[-2]) if transposed else shape):
            raise ValueError(
                f"{printable_line(tensor.name, 80)} is {tensor.shape} in {self._source}, and the model's is {shape}: "
                "its "
                f"config is of another model: {_CONFIG}"
            )

    def _add_merge_conversion_or_raise(
        self, tensor: LazyForeignTensor, name: str, converter: WeightConverter, form: CodedForm, parameter: Tensor
    ) -> None:
        """Note a conversion that stacks or joins rows, whose codes and scales merge alike; raise for another one."""
        last = parameter.dim() - 1
        merges = all(
            op.dim == 0 if type(op) is MergeModulelist else type(op) is Concatenate and op.dim not in (-1, last)
            for op in converter.operations
        )
        if not merges or len(converter.target_patterns) != 1 or form.transposed or form.gathered:
            steps = ", ".join(type(op).__name__ for op in converter.operations)
            raise ValueError(
                f"{printable_line(tensor.name, 80)} becomes {name} in transformers by {steps}, which codes of "
                f"{form} do not survive: {_DENSE}"
            )
        if tensor.shape[-1] != parameter.shape[-1]:
            raise ValueError(
                f"{printable_line(tensor.name, 80)} is {tensor.shape}, and {name}, of which it becomes a part, "
                f"{tuple(parameter.shape)}: its config is of another model: {_CONFIG}"
            )
        if not any(other is converter for other in self._merging):
            self._merging.append(converter)


_DENSE = "take the dense folder that it was made from, and quantize that: LowmemConfig(FourBit('nf4'))"
_CONFIG = "get both from one source, or give config="


@contextmanager
def _exclusive_cpu_reads() -> Iterator[None]:
    """Read one tensor at a time, to the CPU: transformers asks on the meta device, and from several threads."""
    with _READING, torch.device("cpu"):
        yield


_READING = threading.RLock()


def _converter_with_suffix(converter: WeightConverter, suffix: str) -> WeightConverter:
    """Return a conversion that merges parts of weights as another one merges the weights."""
    sources, targets = (
        [pattern + suffix for pattern in patterns]
        for patterns in (converter._original_source_patterns, converter._original_target_patterns)
    )
    return converter.copy(sources, targets, operations=list(converter.operations))


@dataclass(frozen=True)
class _LazyFileTensor:
    """A tensor as transformers takes them from files: ``[...]`` reads it."""

    dtype: torch.dtype
    read: Callable[[], Any]

    def __getitem__(self, _: object) -> Tensor:
        with _exclusive_cpu_reads():
            tensor: Tensor = self.read()
        return tensor

    def get_dtype(self) -> str:
        """Return the dtype by the name that safetensors gives it."""
        return CODES[self.dtype]

    def is_floating_point(self) -> bool:
        """Whether the values are floating-point numbers."""
        return self.dtype.is_floating_point


class _ReadOnceWeightParts:
    """A weight whose first part reads it; each part is returned once."""

    def __init__(self, tensor: LazyForeignTensor) -> None:
        self._tensor = tensor
        self._parts: dict[str, Tensor] = {}

    def lazy_part(self, part_name: str) -> _LazyFileTensor:
        """Return one part."""
        return _LazyFileTensor(
            torch.int32 if part_name == "order" else torch.uint8, lambda: self._read_and_pop_part(part_name)
        )

    def _read_and_pop_part(self, part_name: str) -> Tensor:
        if part_name == "order":
            assert self._tensor.order is not None
            return self._tensor.order()
        if part_name not in self._parts:
            weight = self._tensor.read()
            assert isinstance(weight, QuantizedTensor)
            self._parts |= dict(zip(("packed", "scales"), CodedForm.codes_and_scale_bytes(weight), strict=True))
        return self._parts.pop(part_name)
