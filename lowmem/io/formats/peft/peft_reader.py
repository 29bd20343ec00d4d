"""Reads folders of PEFT. A config and a model lead to names of tensors, and a file must have these and no others:
PEFT itself leaves out in silence what it does not find."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from lowmem.errors import file_error, printable_line, short_repr, value_errors_as_file_errors
from lowmem.io.filesystem import read_errors_with_path
from lowmem.io.formats.peft.peft_config import MERGE, PeftConfig
from lowmem.io.formats.peft.peft_layout import PREFIX, PeftTargetLayers, dense_parameter_names
from lowmem.io.hub_names import displayed_model_name
from lowmem.io.model_folder import read_json_object
from lowmem.io.safetensors_checkpoint import SafetensorsFile
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.training_record import KEPT_BASE
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.adapter_buffers import CHILD, buffers_of_adapter_or_base
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.techniques import LoRA
from lowmem.quant.quantize_tensor import relative_error
from lowmem.transforms.module_registry import all_paths_by_module, layer_display_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt")
# In each checkpoint of transformers' Trainer
_CHECKPOINT = "trainer_state.json"

_TASK = "load the adapter"
_Read = Callable[[str], Tensor]

_LARGEST_ERROR = 0.4  # of what 4 bits keep of a weight, relative; that of other weights is about 1.4
_INSIDE = re.compile(r"(?:^|\.)(lora_magnitude_vector|trainable_tokens_\w+|lora_[AB]\.bias)")


@dataclass(frozen=True)
class AdapterContent:
    """The adapter of a file or folder, for a model that it fits.

    Attributes:
        techniques: by place.
        tensors: A and B by place, in the shapes that lowmem has.
        base_values: what replaces values of the base: the tensors of the model, and the values.
        name: of the adapter.
        buffers: those of the adapter, by their names in the model.
    """

    techniques: dict[str, LoRA]
    tensors: dict[str, dict[str, Tensor]]
    base_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    name: str = "default"
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def trained_base_parameters(self) -> list[Tensor]:
        """Parameters of the base that were trained with the adapter."""
        return [
            base_tensor
            for base_tensor, _ in self.base_values
            if isinstance(base_tensor, nn.Parameter) and base_tensor.is_floating_point()
        ]


def read_peft_content(folder: Path, model: nn.Module) -> AdapterContent:
    """Read a folder that PEFT wrote, for a model of the same architecture.

    Raises:
        FileError: it is no folder of PEFT, is damaged, does not fit the model, or has what lowmem has no form of.
        OSError: a file cannot be read.

    Warns:
        UserWarning: the config names another base than the model comes from.
    """
    config = read_peft_config(folder)
    with SafetensorsFile(folder / WEIGHTS) as file, value_errors_as_file_errors(folder, _TASK):
        content = _PeftAdapterReader(
            model, config, dict(file.specs), file.read_tensor
        ).match_to_model_and_read_content()
    _warn_if_base_name_differs(folder, model, config)
    return content


def read_peft_config(folder: Path) -> PeftConfig:
    """Return what the config of a folder says; a FileError if it is no folder of PEFT, or damaged."""
    _check_is_safetensors_peft_folder(folder)
    content = read_json_object(folder / CONFIG)
    with value_errors_as_file_errors(folder / CONFIG, _TASK):
        return PeftConfig(content)


def adapter_folders_by_name(folder: Path) -> dict[str, Path]:
    """Return the folders of the adapters that ``PeftModel.save_pretrained`` wrote into a folder, by their names.

    The adapter of the folder itself is "default". Checkpoints of a training run count if there is no other adapter.
    """
    with read_errors_with_path(folder):
        folders = {"default": folder} if (folder / CONFIG).is_file() else {}
        folders |= {
            inner_folder.name: inner_folder
            for inner_folder in sorted(folder.iterdir())
            if (inner_folder / CONFIG).is_file()
        }
        final = {
            name: inner_folder
            for name, inner_folder in folders.items()
            if inner_folder == folder or not (inner_folder / _CHECKPOINT).exists()
        }
    return final or folders


def adapter_folders_without_model(path: Path) -> dict[str, Path]:
    """Return the adapters of a folder of PEFT that holds no model of its own; none for other folders and files."""
    return adapter_folders_by_name(path) if path.is_dir() and not (path / "config.json").exists() else {}


def check_not_adapters_only(folder: Path, action: str) -> None:
    """Raise a FileError for a folder that holds adapters, and no model of its own."""
    if names := adapter_folders_without_model(folder):
        which = " --adapter NAME" if len(names) > 1 else ""
        why = f"it has no model, but adapters: {printable_line(', '.join(names))}"
        command = f"lowmem merge BASE {folder} OUT{which} --to bfloat16"
        raise file_error(folder, f"{why}; {command} writes a model to {action}", action)


def _check_is_safetensors_peft_folder(folder: Path) -> None:
    """Raise a FileError that says what a folder is, unless it is one of PEFT."""
    with read_errors_with_path(folder):
        names = {entry.name for entry in folder.iterdir()}
    why = None
    if CONFIG not in names:
        why = f"it has no {CONFIG}: name a folder that save_pretrained of PEFT, or lowmem, wrote"
        if "config.json" in names:
            why = "it is a model's folder, without an adapter: name the adapter's"
        elif inner := adapter_folders_by_name(folder):
            why = f"its adapters lie in folders: name one, as {short_repr(str(next(iter(inner.values()))))}"
    elif WEIGHTS not in names:
        why = f"it has no {WEIGHTS}; get it again"
        if pickles := sorted(names.intersection(PICKLES)):
            why = (
                f"{pickles[0]} is a pickle, which could run code: lowmem executed nothing; load it in PEFT where you "
                "trust it, and save_pretrained writes safetensors"
            )
    if why is not None:
        raise file_error(folder, why, _TASK)


class _PeftAdapterReader:
    """What a file's tensors are for a model; they are read after all were found to fit."""

    def __init__(
        self, model: nn.Module, config: PeftConfig, specs: dict[str, TensorSpec], read_tensor: _Read
    ) -> None:
        self._model, self._config, self._specs, self._read_tensor = model, config, specs, read_tensor
        self._paths = all_paths_by_module(model)
        self._unclaimed = dict.fromkeys(specs)
        for name in specs:
            if not name.startswith(PREFIX):
                raise ValueError(
                    f"tensor {short_repr(name)} does not begin with {PREFIX}, as PEFT's do; get it again"
                )
            if special := _INSIDE.search(name):
                raise ValueError(f"tensor {short_repr(name)} is a {special[1]}, of which lowmem has no form; {MERGE}")

    def match_to_model_and_read_content(self) -> AdapterContent:
        """Return the adapter; a ValueError if the file does not fit the model."""
        layers = PeftTargetLayers(self._model, self._target_module_paths(), self._target_parameter_names())
        if not layers.slots:
            raise ValueError("its config names no layer of the model: it is of another architecture")
        techniques: dict[str, LoRA] = {}
        for slot in layers.slots:
            technique = techniques[slot.place] = self._config.lora_technique(slot.pattern_name)
            for part, shape in slot.peft_file_shapes_by_matrix(technique.rank).items():
                self._check_and_claim_tensor(slot.keys[part], shape, error_suffix=f" at rank {technique.rank}")
        if len(techniques) < len(layers.slots):
            raise ValueError("it adapts a layer twice")
        saved, buffers = self._claim_saved_tensors_and_buffers(layers)
        keys_and_tensors = saved + self._claim_bias_keys_and_parameters(layers)
        self._check_and_claim_base_weight_copies(layers)
        if self._unclaimed:
            raise ValueError(self._unclaimed_tensor_message(next(iter(self._unclaimed))))
        tensors = {
            slot.place: {
                part: slot.from_file_shape(part, self._read_tensor(key), techniques[slot.place].rank)
                for part, key in slot.keys.items()
            }
            for slot in layers.slots
        }
        values = self._read_checked_base_value_pairs(keys_and_tensors)
        self._check_no_saved_tensor_is_tied(saved, {id(base_tensor): new for base_tensor, new in values})
        return AdapterContent(
            techniques, tensors, values, buffers={at: self._read_tensor(key) for at, key in buffers.items()}
        )

    def _target_module_paths(self) -> list[str]:
        if not self._config.names_modules:
            ends = (".lora_A.weight", ".lora_embedding_A")
            module_keys = {name.removesuffix(end) for name in self._specs for end in ends if name.endswith(end)}
            paths = set(map(_base_tensor_name, module_keys))
            paths -= {name.rpartition(".")[0] for name in self._target_parameter_names()}
            return sorted(filter(self._config.is_target_module, paths))
        return [
            path for paths in self._paths.values() for path in paths if path and self._config.is_target_module(path)
        ]

    def _target_parameter_names(self) -> list[str]:
        if not self._config.target_parameters:
            return []
        return [
            name
            for module, paths in self._paths.items()
            for parameter in dense_parameter_names(module)
            for path in paths
            if path and self._config.is_target_parameter(name := f"{path}.{parameter}")
        ]

    def _unclaimed_tensor_message(self, tensor_name: str) -> str:
        """Return what is wrong with a tensor that nothing leads to."""
        path = _base_tensor_name(tensor_name).rpartition(".")[0]
        if any(path in paths for paths in self._paths.values()):
            return (
                f"its tensor {short_repr(tensor_name)} is one of the base, as that of a resized vocabulary, and its "
                "config does "
                f"not name it in modules_to_save or bias; {MERGE}"
            )
        why = "belongs to nothing that its config names: it is of another architecture, or damaged"
        return f"its tensor {short_repr(tensor_name)} {why}"

    def _check_and_claim_tensor(
        self, tensor_name: str, shape: tuple[int, ...], is_floating: bool = True, error_suffix: str = ""
    ) -> None:
        """Note that a tensor belongs to something that takes it in this shape."""
        spec = self._specs.get(tensor_name)
        if spec is None:
            raise ValueError(
                f"it lacks the tensor {printable_line(tensor_name, 120)}, which its config leads to; get it again"
            )
        if spec.shape != shape or spec.dtype.is_floating_point != is_floating:
            raise ValueError(
                f"{printable_line(tensor_name, 120)} is {spec.dtype} {short_repr(spec.shape)} in it; the model takes "
                f"{short_repr(shape)} "
                f"{'floating point' if is_floating else 'integers'}{error_suffix}"
            )
        if tensor_name not in self._unclaimed:
            raise ValueError(f"tensor {short_repr(tensor_name)} is that of two layers")
        del self._unclaimed[tensor_name]

    def _claim_saved_tensors_and_buffers(
        self, layers: PeftTargetLayers
    ) -> tuple[list[tuple[str, Tensor]], dict[str, str]]:
        """Return the keys of what modules hold that are stored whole, and the tensors that they replace.

        Also return the keys of their buffers, by the names that these have in the model.
        """
        keys_and_tensors: list[tuple[str, Tensor]] = []
        own_buffers, buffers = buffers_of_adapter_or_base(self._model, None), dict[str, str]()
        # The start of the paths inside the last of them
        outer = None
        for module, (path, *_) in self._paths.items():
            if (
                not path
                or not self._config.is_in_modules_to_save(path)
                or (outer is not None and path.startswith(outer))
            ):
                continue
            outer = f"{path}."
            for inner, part in module.named_modules(prefix=path):
                if isinstance(part, StoredModule | AdaptedModule):
                    what = "stored by lowmem" if isinstance(part, StoredModule) else "adapted"
                    raise ValueError(
                        f"it holds {layer_display_name(path)} whole (modules_to_save), and "
                        f"{layer_display_name(inner)} is {what} "
                        "here: leave it as it was, convert(..., skip=), and load the adapter then"
                    )
            for name, base_tensor in module.state_dict(keep_vars=True).items():
                if f".{CHILD}." in f".{name}":
                    continue
                key = f"{layers.tensor_name_prefix(path)}.{name}"
                if f"{path}.{name}" in own_buffers:
                    buffers[f"{path}.{name}"] = key
                else:
                    keys_and_tensors.append((key, base_tensor))
                self._check_and_claim_tensor(key, tuple(base_tensor.shape), base_tensor.is_floating_point())
        return keys_and_tensors, buffers

    def _claim_bias_keys_and_parameters(self, layers: PeftTargetLayers) -> list[tuple[str, Tensor]]:
        """Return the keys of biases of the base, and the parameters that they replace."""
        keys_and_tensors: list[tuple[str, Tensor]] = []
        places = [
            (path, name, module._parameters.get(name))
            for module, paths in self._paths.items()
            for name in dense_parameter_names(module)
            if "bias" in name and self._config.biases
            for path in paths
        ]
        for path, name, parameter in places:
            key = f"{layers.innermost_tensor_name_prefix(path)}.{name}"
            if key not in self._unclaimed:
                continue
            if parameter is None:
                raise ValueError(
                    f"it holds the bias of {layer_display_name(path)}, which is stored in 16 bits here: leave that "
                    "layer as "
                    "it was, convert(..., skip=), and load the adapter then"
                )
            self._check_and_claim_tensor(key, tuple(parameter.shape))
            keys_and_tensors.append((key, parameter))
        return keys_and_tensors

    def _read_checked_base_value_pairs(
        self, keys_and_tensors: list[tuple[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the values that replace those of the base; tensors that are one here must be equal."""
        values: dict[int, tuple[str, Tensor, Tensor]] = {}
        for key, base_tensor in keys_and_tensors:
            new = self._read_tensor(key)
            other, _, before = values.setdefault(id(base_tensor), (key, base_tensor, new))
            if not _is_equal_tensor(before, new):
                raise ValueError(
                    f"{printable_line(other, 80)} and {printable_line(key, 80)} differ in it, and are one tensor in "
                    "the model: "
                    "untie them first"
                )
        return [(base_tensor, new) for _, base_tensor, new in values.values()]

    def _check_no_saved_tensor_is_tied(
        self, keys_and_tensors: list[tuple[str, Tensor]], new_values_by_id: dict[int, Tensor]
    ) -> None:
        """Raise if what is stored whole is another layer's, too: PEFT trains a copy, and leaves that one."""
        saved_names = {_base_tensor_name(key) for key, _ in keys_and_tensors}
        elsewhere = {
            id(base_tensor): name
            for module, paths in self._paths.items()
            for path in paths
            for parameter, base_tensor in module._parameters.items()
            if base_tensor is not None and (name := f"{path}.{parameter}".lstrip(".")) not in saved_names
        }
        for key, base_tensor in keys_and_tensors:
            if id(base_tensor) in elsewhere and not _is_equal_tensor(
                base_tensor, new_values_by_id[id(base_tensor)].to(base_tensor.dtype)
            ):
                raise ValueError(
                    f"it holds {printable_line(key.removeprefix(PREFIX), 80)} (modules_to_save), which is "
                    f"{printable_line(elsewhere[id(base_tensor)], 80)}, too, in the model, of which PEFT keeps the "
                    "old values: "
                    "untie them first"
                )

    def _check_and_claim_base_weight_copies(self, layers: PeftTargetLayers) -> None:
        """Leave out copies of adapted weights, which PEFT writes of embeddings, if they are the model's."""
        for slot in layers.slots:
            key = f"{layers.innermost_tensor_name_prefix(self._paths[slot.module][0])}.{slot.parameter}"
            if key not in self._unclaimed:
                continue
            del self._unclaimed[key]
            base_weight = unadapted_parameter(slot.module, slot.parameter)
            same = self._specs[key].shape == tuple(base_weight.shape)
            if same:
                stored = isinstance(base_weight, StoredTensor)
                dense = base_weight.dequantize() if stored else base_weight.detach()
                error = relative_error(self._read_tensor(key).to(dense.dtype), dense)
                same = error <= (_LARGEST_ERROR if stored else 2**-7)  # it may have been rounded to bfloat16
            if not same:
                raise ValueError(
                    f"it was trained on another base: {layer_display_name(slot.place)} has another weight here; load "
                    "it onto "
                    "the base that it was trained on, with the same vocabulary"
                )


def _base_tensor_name(peft_tensor_name: str) -> str:
    """Return the name in the model of a tensor of the base."""
    return peft_tensor_name.removeprefix(PREFIX).replace(".base_layer", "")


def _is_equal_tensor(tensor: Tensor, other: Tensor) -> bool:
    return tensor is other or (tensor.dtype is other.dtype and bool((tensor == other).all()))


def _warn_if_base_name_differs(folder: Path, model: nn.Module, config: PeftConfig) -> None:
    model_base = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not config.base or not isinstance(model_base, str) or not model_base:
        return
    if Path(model_base) == folder / KEPT_BASE:
        return
    bases = config.base, displayed_model_name(model_base)
    names = [re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower() for name in bases]
    if names[0] != names[1]:
        warnings.warn(
            f"the adapter says that it was trained on {short_repr(config.base)}, and the model comes from "
            f"{short_repr(model_base)}: "
            "nothing but shapes can be checked",
            stacklevel=6,  # the caller of the function that both decorators wrap
        )
