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

from lowmem.errors import printable, refusal
from lowmem.integrations.transformers.checking import Names, refuse_unfitting
from lowmem.integrations.transformers.config import METHOD
from lowmem.integrations.transformers.gguf_config import check_config, config_of
from lowmem.integrations.transformers.quantizer import LowmemQuantizer
from lowmem.io.folder_code import NEEDS_CODE, forget_code, is_about_code
from lowmem.io.formats.foreign import ForeignTensor, Kept
from lowmem.io.formats.recognize import ForeignFile, open_foreign
from lowmem.io.formats.requantizing import Requantizing, warn_of_growth, why_refused
from lowmem.io.metadata import form_record, layer_of
from lowmem.io.model_folder import CONFIG, check_layers, quantization_of, read_model_config, read_object
from lowmem.io.safetensors import CODES
from lowmem.io.skeleton import convert_skeleton
from lowmem.nn.adapter import is_conv1d
from lowmem.nn.coded_module import format_keys
from lowmem.nn.forms import CodedForm
from lowmem.quant.tensor import QuantizedTensor


def from_exact(
    source: str | Path,
    auto_class: Any = AutoModelForCausalLM,
    *,
    config: Any = None,
    dtype: torch.dtype | str | None = "auto",
    requantizing: Requantizing | None = None,
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
    if (path / "config.json").is_file() and quantization_of(path / "config.json").get("quant_method") == METHOD:
        raise refusal(path, "lowmem has stored its weights: from_pretrained loads it", "load")
    with _plainly():
        opened = open_foreign(path)
    with opened as file:
        own = _config_of(path, file, trust_remote_code) if config is None else deepcopy(config)
        for one in (own, own.get_text_config(decoder=True)):
            vars(one).pop("quantization_config", None)  # of the other program
        if dtype in (None, "auto"):
            kept = (tensor.kept() for tensor in file.tensors.values() if tensor.refusal is None)
            floats = (one for one in kept if isinstance(one, torch.dtype) and one.is_floating_point)
            dtype = own.dtype or (torch.float32 if file.kind == "gguf" else next(floats, torch.float32))
        if path.is_dir() and (path / "generation_config.json").is_file():
            generation = GenerationConfig.from_dict(read_object(path / "generation_config.json"))
            options.setdefault("generation_config", generation)
        asked, kind = _ExactConfig(path, file, requantizing or Requantizing()), auto_class
        if hasattr(kind, "from_config"):  # an Auto class needs a folder to find the class of a model
            with torch.device("meta"):
                empty = kind.from_config(own, trust_remote_code=trust_remote_code)
            own, kind = empty.config, type(empty)
        found = kind.from_pretrained(
            None,
            config=own,
            state_dict=asked.state,
            quantization_config=asked,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **options,
        )
        model = found[0] if isinstance(found, tuple) else found
        model.name_or_path = model.config.name_or_path = str(source)
    size = sum(parameter.nbytes for parameter in model.parameters())
    warn_of_growth(path, asked.weights, size, model.dtype)
    return found


def config_at(path: Path, described: Any = AutoConfig, trust_remote_code: bool = False) -> Any:
    """Return the config in transformers of the model of a folder or GGUF file.

    Args:
        path: the folder or file.
        described: the class of the config, or ``AutoConfig``.
        trust_remote_code: whether to run code of the folder; the config names none otherwise.

    Raises:
        FileError: the config needs code of the folder.
        Exception: of transformers, for a config that it does not take.
    """
    options: dict[str, Any] = {}
    folder = path
    if path.is_file():
        made = config_of(path)
        if made is not None:
            return AutoConfig.for_model(**made)
        folder, options = path.parent, {"gguf_file": path.name}
    try:
        config = described.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except ValueError as error:
        if is_about_code(error):
            raise refusal(path / CONFIG, NEEDS_CODE, "load") from error
        raise
    if not trust_remote_code:
        forget_code(config)
    return config


def _config_of(path: Path, file: ForeignFile, trust_remote_code: bool) -> Any:
    """Return the config of a model that another program quantized."""
    if file.kind != "gguf":
        path = path if path.is_dir() else path.parent
        check_layers(path / "config.json", read_model_config(path / "config.json"), len(file.tensors))
    return config_at(path, trust_remote_code=trust_remote_code)


_METHOD = f"{METHOD}; exact"


class _ExactConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``from_exact`` tells the quantizer, which fills ``state``, and ``weights`` with how each tensor of the
    file is kept. It is no part of the loaded model's config."""

    def __init__(self, source: Path, file: ForeignFile, requantizing: Requantizing) -> None:
        self.quant_method = _METHOD
        self.source, self.file, self.requantizing = source, file, requantizing
        self.state: dict[str, _Lazy] = {}
        self.weights: list[tuple[ForeignTensor, Kept]] = []

    def __deepcopy__(self, memo: Any) -> _ExactConfig:
        return self  # transformers copies configs, and open files cannot be copied

    def to_dict(self) -> dict[str, Any]:
        """Return what transformers may show or compare."""
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _ExactQuantizer(LowmemQuantizer):
    """Keeps the codes of another program's weights while transformers loads a model."""

    quantization_config: Any

    def __init__(self, quantization_config: _ExactConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})
        self._exact: Any = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise a ValueError where weights would be offloaded to disk."""
        self.refuse_disk(device_map)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        tied = self.tie(model)
        with _plainly():
            exact = self._exact = _Exact(self.quantization_config, model)
        convert_skeleton(model, {"layers": exact.layers}, {})
        exact.add_formats(model)
        self.expect_parts(model, tied)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the model's conversions, and those that merge parts of weights as they merge weights."""
        exact, self._exact = self._exact, None
        if exact is None:
            return weight_conversions
        found: list[Any] = exact.conversions(weight_conversions)
        refuse_unfitting(model, dict.fromkeys(exact.state), exact.nbytes, found)
        return found


class _Exact:
    """The weights of another program's file or folder, for a dense model on the meta device, with its ties.

    Attributes:
        layers: records of how weights are stored, by the model's paths, as the metadata of lowmem's files has them.
        state: as in ``_ExactConfig``: by name, an object that reads the tensor when it is indexed with ``[...]``.
        nbytes: what the file's tensors take.
    """

    def __init__(self, asked: _ExactConfig, model: Any) -> None:
        self._source, self._requantizing = asked.source, asked.requantizing
        self.layers: dict[str, dict[str, Any]] = {}
        self.state, self._weights = asked.state, asked.weights
        self.nbytes = sum(tensor.nbytes for tensor in asked.file.tensors.values())
        self._merging: list[WeightConverter] = []
        self._place(asked.file, model)

    def add_formats(self, model: nn.Module) -> None:
        """Add the formats that modules of the converted model hold to the state."""
        for name in format_keys(model):
            module: Any = model.get_submodule(name.rpartition(".")[0])
            self.state[name] = _Lazy(torch.uint8, module.get_extra_state)

    def conversions(self, own: list[Any]) -> list[Any]:
        """Return the model's conversions of a folder, and those that merge parts of weights as they merge weights."""
        return own + [_with_suffix(one, part) for one in self._merging for part in ("_packed", "_scales")]

    def _place(self, file: ForeignFile, model: Any) -> None:
        if file.kind == "gguf":
            check_config(self._source, model.config)
        names = Names(model, get_model_conversion_mapping(model))
        forms: dict[str, tuple[CodedForm, str]] = {}
        refused: list[ForeignTensor] = []
        coded = False
        for found in file.tensors.values():
            tensor = self._requantizing.of(found)
            name, converter = names.of(tensor.name)
            if tensor.refusal is not None:
                coded = True
                if name in names.parameters:
                    refused.append(tensor)
                continue
            kept = tensor.kept()
            self._weights.append((tensor, kept))
            if not isinstance(kept, CodedForm):
                if converter is None and name in names.parameters:
                    self._check_shape(tensor, tuple(names.parameters[name].shape))
                self.state[tensor.name] = _Lazy(kept, tensor.read)
                continue
            coded = True
            if name not in names.parameters:
                self.state[tensor.name] = _Lazy(torch.uint8, tensor.read)  # which transformers reports, and leaves
                continue
            parameter, module = names.parameters[name], model.get_submodule(name.rpartition(".")[0])
            # Other programs pack a Conv1D as a linear layer, and leave a dense one as it is.
            swapped = is_conv1d(module) and (found.refusal is not None or isinstance(found.kept(), CodedForm))
            form = replace(kept, transposed=tensor.transposed or swapped)
            self._requantizing.names[tensor.name] = name
            if converter is not None:
                self._merge(tensor, name, converter, form, parameter)
            else:
                self._check_shape(tensor, tuple(parameter.shape), form.transposed)
            before, first = forms.setdefault(name, (form, tensor.name))
            if before != form:
                raise ValueError(
                    f"{printable(first, 80)} is stored in {before}, and {printable(tensor.name, 80)} in {form}, "
                    f"which are one weight in {type(model).__name__}: {_DENSE}"
                )
            self.layers[layer_of(name)] = form_record(form)
            of_parts = _Weight(tensor)
            prefix = name if converter is None else tensor.name
            self.state |= {f"{prefix}_{part}": of_parts.lazy(part) for part in form.parts}
        if refused:
            raise refusal(self._source, why_refused(refused), "load")
        if not self.layers and (coded or file.kind != "gguf"):  # a dense GGUF file is read, too
            raise refusal(
                self._source,
                "it has no 4-bit weights of the model, whose codes could be kept: load it by from_pretrained, and "
                "to quantize it give quantization_config=LowmemConfig(FourBit('nf4'))",
                "load",
            )

    def _check_shape(self, tensor: ForeignTensor, shape: tuple[int, ...], transposed: bool = False) -> None:
        """Raise a ValueError unless a weight of the file, or its transpose, has the shape of the model's."""
        if tensor.shape != ((*shape[:-2], shape[-1], shape[-2]) if transposed else shape):
            raise ValueError(
                f"{printable(tensor.name, 80)} is {tensor.shape} in {self._source}, and the model's is {shape}: its "
                f"config is of another model: {_CONFIG}"
            )

    def _merge(
        self, tensor: ForeignTensor, name: str, converter: WeightConverter, form: CodedForm, parameter: Tensor
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
                f"{printable(tensor.name, 80)} becomes {name} in transformers by {steps}, which codes of "
                f"{form} do not survive: {_DENSE}"
            )
        if tensor.shape[-1] != parameter.shape[-1]:
            raise ValueError(
                f"{printable(tensor.name, 80)} is {tensor.shape}, and {name}, of which it becomes a part, "
                f"{tuple(parameter.shape)}: its config is of another model: {_CONFIG}"
            )
        if not any(one is converter for one in self._merging):
            self._merging.append(converter)


_DENSE = "take the dense folder that it was made from, and quantize that: LowmemConfig(FourBit('nf4'))"
_CONFIG = "get both from one source, or give config="


@contextmanager
def _plainly() -> Iterator[None]:
    """Read one tensor at a time, to the CPU: transformers asks on the meta device, and from several threads."""
    with _READING, torch.device("cpu"):
        yield


_READING = threading.RLock()


def _with_suffix(converter: WeightConverter, suffix: str) -> WeightConverter:
    """Return a conversion that merges parts of weights as another one merges the weights."""
    sources, targets = (
        [pattern + suffix for pattern in patterns]
        for patterns in (converter._original_source_patterns, converter._original_target_patterns)
    )
    return converter.copy(sources, targets, operations=list(converter.operations))


@dataclass(frozen=True)
class _Lazy:
    """A tensor as transformers takes them from files: ``[...]`` reads it."""

    dtype: torch.dtype
    read: Callable[[], Any]

    def __getitem__(self, _: object) -> Tensor:
        with _plainly():
            found: Tensor = self.read()
        return found

    def get_dtype(self) -> str:
        """Return the dtype by the name that safetensors gives it."""
        return CODES[self.dtype]

    def is_floating_point(self) -> bool:
        """Whether the values are floating-point numbers."""
        return self.dtype.is_floating_point


class _Weight:
    """A weight whose first part reads it; each part is returned once."""

    def __init__(self, tensor: ForeignTensor) -> None:
        self._tensor = tensor
        self._parts: dict[str, Tensor] = {}

    def lazy(self, part: str) -> _Lazy:
        """Return one part."""
        return _Lazy(torch.int32 if part == "order" else torch.uint8, lambda: self._take(part))

    def _take(self, part: str) -> Tensor:
        if part == "order":
            assert self._tensor.order is not None
            return self._tensor.order()
        if part not in self._parts:
            weight = self._tensor.read()
            assert isinstance(weight, QuantizedTensor)
            self._parts |= dict(zip(("packed", "scales"), CodedForm.split(weight), strict=True))
        return self._parts.pop(part)
