"""Reads folders of PEFT. A config and a model lead to names of tensors, and a file must have these and no others:
PEFT itself leaves out in silence what it does not find."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from lowmem.errors import printable, refusal, refusing, show
from lowmem.io.atomic import read_errors
from lowmem.io.formats.peft.config import MERGE, PeftConfig
from lowmem.io.formats.peft.layers import PREFIX, Layers, dense_parameters
from lowmem.io.model_folder import read_object
from lowmem.io.safetensors import TensorSpec
from lowmem.io.source import Checkpoint
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_bank import parameter_of
from lowmem.nn.adapter_buffers import CHILD, buffers_of
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.techniques import LoRA
from lowmem.quant.quantize import relative_error
from lowmem.transforms.registry import layer_name, module_paths

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt")
_CHECKPOINT = "trainer_state.json"  # in each checkpoint of transformers' Trainer

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
    def trained(self) -> list[Tensor]:
        """Parameters of the base that were trained with the adapter."""
        return [own for own, _ in self.base_values if isinstance(own, nn.Parameter) and own.is_floating_point()]


def read_peft(folder: Path, model: nn.Module) -> AdapterContent:
    """Read a folder that PEFT wrote, for a model of the same architecture.

    Raises:
        FileError: it is no folder of PEFT, is damaged, does not fit the model, or has what lowmem has no form of.
        OSError: a file cannot be read.

    Warns:
        UserWarning: the config names another base than the model comes from.
    """
    config = read_config(folder)
    with Checkpoint(folder / WEIGHTS) as file, refusing(folder, _TASK):
        found = _Reading(model, config, dict(file.specs), file.read_tensor).content()
    _warn_of_other_base(model, config)
    return found


def read_config(folder: Path) -> PeftConfig:
    """Return what the config of a folder says; a FileError if it is no folder of PEFT, or damaged."""
    _check_kind(folder)
    content = read_object(folder / CONFIG)
    with refusing(folder / CONFIG, _TASK):
        return PeftConfig(content)


def adapters_in(folder: Path) -> dict[str, Path]:
    """Return the folders of the adapters that ``PeftModel.save_pretrained`` wrote into a folder, by their names.

    The adapter of the folder itself is "default". Checkpoints of a training run count if there is no other adapter.
    """
    with read_errors(folder):
        found = {"default": folder} if (folder / CONFIG).is_file() else {}
        found |= {one.name: one for one in sorted(folder.iterdir()) if (one / CONFIG).is_file()}
        final = {name: one for name, one in found.items() if one == folder or not (one / _CHECKPOINT).exists()}
    return final or found


def adapters_alone(path: Path) -> dict[str, Path]:
    """Return the adapters of a folder of PEFT that holds no model of its own; none for other folders and files."""
    return adapters_in(path) if path.is_dir() and not (path / "config.json").exists() else {}


def refuse_adapters(folder: Path, action: str) -> None:
    """Raise a FileError for a folder that holds adapters, and no model of its own."""
    if names := adapters_alone(folder):
        which = " --adapter NAME" if len(names) > 1 else ""
        why = f"it has no model, but adapters: {printable(', '.join(names))}"
        raise refusal(folder, f"{why}; lowmem merge BASE {folder} OUT{which} writes a model to {action}", action)


def _check_kind(folder: Path) -> None:
    """Raise a FileError that says what a folder is, unless it is one of PEFT."""
    with read_errors(folder):
        names = {entry.name for entry in folder.iterdir()}
    why = None
    if CONFIG not in names:
        why = f"it has no {CONFIG}: name a folder that save_pretrained of PEFT, or lowmem, wrote"
        if "config.json" in names:
            why = "it is a model's folder, without an adapter: name the adapter's"
        elif inner := adapters_in(folder):
            why = f"its adapters lie in folders: name one, as {show(str(next(iter(inner.values()))))}"
    elif WEIGHTS not in names:
        why = f"it has no {WEIGHTS}; get it again"
        if pickles := sorted(names.intersection(PICKLES)):
            why = (
                f"{pickles[0]} is a pickle, which could run code: lowmem executed nothing; load it in PEFT where you "
                "trust it, and save_pretrained writes safetensors"
            )
    if why is not None:
        raise refusal(folder, why, _TASK)


class _Reading:
    """What a file's tensors are for a model; they are read after all were found to fit."""

    def __init__(self, model: nn.Module, config: PeftConfig, specs: dict[str, TensorSpec], read: _Read) -> None:
        self._model, self._config, self._specs, self._read = model, config, specs, read
        self._paths = module_paths(model)
        self._left = dict.fromkeys(specs)
        for name in specs:
            if not name.startswith(PREFIX):
                raise ValueError(f"tensor {show(name)} does not begin with {PREFIX}, as PEFT's do; get it again")
            if special := _INSIDE.search(name):
                raise ValueError(f"tensor {show(name)} is a {special[1]}, of which lowmem has no form; {MERGE}")

    def content(self) -> AdapterContent:
        """Return the adapter; a ValueError if the file does not fit the model."""
        layers = Layers(self._model, self._modules(), self._parameters())
        if not layers.slots:
            raise ValueError("its config names no layer of the model: it is of another architecture")
        techniques: dict[str, LoRA] = {}
        for slot in layers.slots:
            technique = techniques[slot.place] = self._config.technique(slot.pattern_name)
            for part, shape in slot.shapes(technique.rank).items():
                self._take(slot.keys[part], shape, at=f" at rank {technique.rank}")
        if len(techniques) < len(layers.slots):
            raise ValueError("it adapts a layer twice")
        saved, buffers = self._saved(layers)
        found = saved + self._biases(layers)
        self._skip_bases(layers)
        if self._left:
            raise ValueError(self._left_over(next(iter(self._left))))
        tensors = {
            slot.place: {
                part: slot.from_file(part, self._read(key), techniques[slot.place].rank)
                for part, key in slot.keys.items()
            }
            for slot in layers.slots
        }
        values = self._values(found)
        self._refuse_ties(saved, {id(own): new for own, new in values})
        return AdapterContent(
            techniques, tensors, values, buffers={at: self._read(key) for at, key in buffers.items()}
        )

    def _modules(self) -> list[str]:
        if not self._config.names_modules:
            ends = (".lora_A.weight", ".lora_embedding_A")
            found = {name.removesuffix(end) for name in self._specs for end in ends if name.endswith(end)}
            paths = set(map(_plain_name, found))
            paths -= {name.rpartition(".")[0] for name in self._parameters()}
            return sorted(filter(self._config.takes, paths))
        return [path for paths in self._paths.values() for path in paths if path and self._config.takes(path)]

    def _parameters(self) -> list[str]:
        if not self._config.target_parameters:
            return []
        return [
            name
            for module, paths in self._paths.items()
            for parameter in dense_parameters(module)
            for path in paths
            if path and self._config.takes_parameter(name := f"{path}.{parameter}")
        ]

    def _left_over(self, key: str) -> str:
        """Return what is wrong with a tensor that nothing leads to."""
        path = _plain_name(key).rpartition(".")[0]
        if any(path in paths for paths in self._paths.values()):
            return (
                f"its tensor {show(key)} is one of the base, as that of a resized vocabulary, and its config does "
                f"not name it in modules_to_save or bias; {MERGE}"
            )
        why = "belongs to nothing that its config names: it is of another architecture, or damaged"
        return f"its tensor {show(key)} {why}"

    def _take(self, key: str, shape: tuple[int, ...], is_floating: bool = True, at: str = "") -> None:
        """Note that a tensor belongs to something that takes it in this shape."""
        spec = self._specs.get(key)
        if spec is None:
            raise ValueError(f"it lacks the tensor {printable(key, 120)}, which its config leads to; get it again")
        if spec.shape != shape or spec.dtype.is_floating_point != is_floating:
            raise ValueError(
                f"{printable(key, 120)} is {spec.dtype} {show(spec.shape)} in it; the model takes {show(shape)} "
                f"{'floating point' if is_floating else 'integers'}{at}"
            )
        if key not in self._left:
            raise ValueError(f"tensor {show(key)} is that of two layers")
        del self._left[key]

    def _saved(self, layers: Layers) -> tuple[list[tuple[str, Tensor]], dict[str, str]]:
        """Return the keys of what modules hold that are stored whole, and the tensors that they replace.

        Also return the keys of their buffers, by the names that these have in the model.
        """
        found: list[tuple[str, Tensor]] = []
        own_buffers, buffers = buffers_of(self._model, None), dict[str, str]()
        outer = None  # the start of the paths inside the last of them
        for module, (path, *_) in self._paths.items():
            if not path or not self._config.saves(path) or (outer is not None and path.startswith(outer)):
                continue
            outer = f"{path}."
            for inner, part in module.named_modules(prefix=path):
                if isinstance(part, StoredModule | AdaptedModule):
                    what = "stored by lowmem" if isinstance(part, StoredModule) else "adapted"
                    raise ValueError(
                        f"it holds {layer_name(path)} whole (modules_to_save), and {layer_name(inner)} is {what} "
                        "here: leave it as it was, convert(..., skip=), and load the adapter then"
                    )
            for name, own in module.state_dict(keep_vars=True).items():
                if f".{CHILD}." in f".{name}":
                    continue
                key = f"{layers.key(path)}.{name}"
                if f"{path}.{name}" in own_buffers:
                    buffers[f"{path}.{name}"] = key
                else:
                    found.append((key, own))
                self._take(key, tuple(own.shape), own.is_floating_point())
        return found, buffers

    def _biases(self, layers: Layers) -> list[tuple[str, Tensor]]:
        """Return the keys of biases of the base, and the parameters that they replace."""
        found: list[tuple[str, Tensor]] = []
        places = [
            (path, name, module._parameters.get(name))
            for module, paths in self._paths.items()
            for name in dense_parameters(module)
            if "bias" in name and self._config.biases
            for path in paths
        ]
        for path, name, own in places:
            key = f"{layers.inner_key(path)}.{name}"
            if key not in self._left:
                continue
            if own is None:
                raise ValueError(
                    f"it holds the bias of {layer_name(path)}, which is stored in 16 bits here: leave that layer as "
                    "it was, convert(..., skip=), and load the adapter then"
                )
            self._take(key, tuple(own.shape))
            found.append((key, own))
        return found

    def _values(self, found: list[tuple[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return the values that replace those of the base; tensors that are one here must be equal."""
        values: dict[int, tuple[str, Tensor, Tensor]] = {}
        for key, own in found:
            new = self._read(key)
            other, _, before = values.setdefault(id(own), (key, own, new))
            if not _same(before, new):
                raise ValueError(
                    f"{printable(other, 80)} and {printable(key, 80)} differ in it, and are one tensor in the model: "
                    "untie them first"
                )
        return [(own, new) for _, own, new in values.values()]

    def _refuse_ties(self, saved: list[tuple[str, Tensor]], values: dict[int, Tensor]) -> None:
        """Raise if what is stored whole is another layer's, too: PEFT trains a copy, and leaves that one."""
        kept = {_plain_name(key) for key, _ in saved}
        elsewhere = {
            id(own): name
            for module, paths in self._paths.items()
            for path in paths
            for parameter, own in module._parameters.items()
            if own is not None and (name := f"{path}.{parameter}".lstrip(".")) not in kept
        }
        for key, own in saved:
            if id(own) in elsewhere and not _same(own, values[id(own)].to(own.dtype)):
                raise ValueError(
                    f"it holds {printable(key.removeprefix(PREFIX), 80)} (modules_to_save), which is "
                    f"{printable(elsewhere[id(own)], 80)}, too, in the model, of which PEFT keeps the old values: "
                    "untie them first"
                )

    def _skip_bases(self, layers: Layers) -> None:
        """Leave out copies of adapted weights, which PEFT writes of embeddings, if they are the model's."""
        for slot in layers.slots:
            key = f"{layers.inner_key(self._paths[slot.module][0])}.{slot.parameter}"
            if key not in self._left:
                continue
            del self._left[key]
            own = parameter_of(slot.module, slot.parameter)
            same = self._specs[key].shape == tuple(own.shape)
            if same:
                stored = isinstance(own, StoredTensor)
                dense = own.dequantize() if stored else own.detach()
                error = relative_error(self._read(key).to(dense.dtype), dense)
                same = error <= (_LARGEST_ERROR if stored else 2**-7)  # it may have been rounded to bfloat16
            if not same:
                raise ValueError(
                    f"it was trained on another base: {layer_name(slot.place)} has another weight here; load it onto "
                    "the base that it was trained on, with the same vocabulary"
                )


def _plain_name(key: str) -> str:
    """Return the name in the model of a tensor of the base."""
    return key.removeprefix(PREFIX).replace(".base_layer", "")


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype is other.dtype and bool((one == other).all()))


def _warn_of_other_base(model: nn.Module, config: PeftConfig) -> None:
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not config.base or not isinstance(own, str) or not own:
        return
    names = [re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower() for name in (config.base, own)]
    if names[0] != names[1]:
        warnings.warn(
            f"the adapter says that it was trained on {show(config.base)}, and the model comes from {show(own)}: "
            "nothing but shapes can be checked",
            stacklevel=6,  # the caller of the function that both decorators wrap
        )
