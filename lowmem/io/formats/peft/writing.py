"""Writes folders of PEFT. Where ends of paths are ambiguous, layers are named by full paths, since PEFT would load a
part of the file in silence."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lowmem.io.atomic import atomic_folder, write_atomically
from lowmem.io.container import write_plain
from lowmem.io.formats.peft.config import ends_of
from lowmem.io.formats.peft.layers import PREFIX, Layers, dense_parameters
from lowmem.io.formats.peft.reading import CONFIG, WEIGHTS
from lowmem.io.safetensors import TensorSpec
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter, is_conv1d
from lowmem.nn.adapter_buffers import CHILD
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.transforms.registry import layer_name, module_paths, place_name


def write_peft(
    folder: Path,
    model: nn.Module,
    layers: Mapping[str, Adapter],
    base_name: str | None = None,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write an adapter, by place, as PEFT does; a ValueError names a layer that PEFT has no form of.

    ``base_name`` is that of the base in the config; None: its name on the Hub, if it has one. ``buffers`` are those
    that training changed: PEFT has them in ``modules_to_save``.

    Warns:
        UserWarning: the dropout is not written, since PEFT has one value for all layers, and none for parameters.
    """
    writing = _Writing(model, layers, buffers)
    tensors = writing.tensors()
    config = writing.config() | {"base_model_name_or_path": base_name or _public_name(model)}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_folder(folder) as partial:
        specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
        write_plain(partial / WEIGHTS, specs, tensors.items())
        write_atomically(partial / CONFIG, text.encode())


class _Writing:
    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter], buffers: Mapping[str, Tensor]) -> None:
        self._model, self._adapters, self._buffers = model, adapters, buffers
        self._paths = module_paths(model)
        self._all_paths = [path for paths in self._paths.values() for path in paths]
        places = {
            place_name(paths[0], name): (paths[0], name)
            for module, paths in self._paths.items()
            for name in dense_parameters(module)
        }
        targets = [places[place] for place in adapters]
        self._modules = [path for path, name in targets if name == "weight"]
        self._parameters = [f"{path}.{name}".lstrip(".") for path, name in targets if name != "weight"]
        self._layers = Layers(model, self._modules, self._parameters)
        missing = set(adapters) - {slot.place for slot in self._layers.slots}
        assert not missing, missing
        self._saved, self._biases = self._trained()

    def _trained(self) -> tuple[list[str], list[tuple[str, Tensor]]]:
        """Return the paths of modules that train, and the keys of biases that do."""
        with_buffers = {name.rpartition(".")[0]: name.rpartition(".")[2] for name in self._buffers}
        whole = {*with_buffers}  # also those whose weights train
        for module, paths in self._paths.items():
            trains = [name for name, one in module._parameters.items() if one is not None and one.requires_grad]
            whole |= {paths[0]} if any("bias" not in name for name in trains) else set()
        saved: list[str] = []
        biases: list[tuple[str, Tensor]] = []
        for module, paths in self._paths.items():
            path = paths[0]
            trained = {name: one for name, one in module._parameters.items() if one is not None and one.requires_grad}
            if not trained and path not in with_buffers:
                continue
            if path not in with_buffers and all("bias" in name for name in trained) and path:
                biases += [(f"{self._layers.inner_key(path)}.{name}", one) for name, one in trained.items()]
                continue
            why = None
            if not path:
                why = "PEFT cannot save parameters of the model itself"
            elif any(isinstance(inner, AdaptedModule) for inner in module.modules()):
                why = "PEFT cannot train a weight beside its adapter"
            elif len(paths) > 1:
                why = f"it is {layer_name(paths[1])}, too, and PEFT would save one alone"
            elif any(isinstance(inner, StoredModule) for inner in module.modules()):
                why = "PEFT cannot save a module that stores a weight"
            elif other := next((one for one in self._all_paths if one not in whole and one.endswith(path)), None):
                why = f"PEFT would take {layer_name(other)} for it, whose path ends alike"
            if why is not None:
                name = next(iter(trained), None)
                if name is None:
                    raise ValueError(
                        f"{layer_name(path)}: training changed its {with_buffers[path]}, and {why}: save the adapter "
                        "in lowmem's format, or train with this module in evaluation mode"
                    )
                raise ValueError(
                    f"{layer_name(path)}: its {name} trains, and {why}: freeze it, {name}.requires_grad_(False), or "
                    "save the whole model"
                )
            if not any(path.startswith(f"{outer}.") for outer in saved):
                saved.append(path)
        return saved, [(key, one) for key, one in biases if not any(key.startswith(f"{PREFIX}{s}.") for s in saved)]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names in the file."""
        found: dict[str, Tensor] = {}
        for slot in self._layers.slots:
            adapter = self._adapters[slot.place]
            found |= {slot.keys[part]: slot.to_file(part, getattr(adapter, part)) for part in ("lora_a", "lora_b")}
        by_path = {paths[0]: module for module, paths in self._paths.items()}
        for path in self._saved:
            for name, value in by_path[path].state_dict().items():
                if f".{CHILD}." not in f".{name}":
                    found[f"{self._layers.key(path)}.{name}"] = self._buffers.get(f"{path}.{name}", value)
        return found | {key: one.detach() for key, one in self._biases}

    def config(self) -> dict[str, Any]:
        """Return what ``adapter_config.json`` holds."""
        techniques = {slot.pattern_name: self._adapters[slot.place].technique for slot in self._layers.slots}
        stabilized = all(one.rank_stabilized for one in techniques.values())
        alphas = {name: _alpha(one, stabilized) for name, one in techniques.items()}
        ranks = {name: one.rank for name, one in techniques.items()}
        rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
        outside = any(".base_layer." not in key for key, _ in self._biases)
        biases = "none" if not self._biases else "all" if outside else "lora_only"
        transposed = any(is_conv1d(slot.module) for slot in self._layers.slots)
        if transposed and self._parameters:
            raise ValueError(
                f"{layer_name(self._parameters[0])}: PEFT adapts no parameters beside Conv1D layers: save them as "
                "two adapters"
            )
        return {
            "peft_type": "LORA",
            "task_type": _task_of(self._model),
            "revision": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self._dropout(techniques),
            "use_rslora": stabilized,
            "rank_pattern": {f"^{re.escape(name)}": one for name, one in ranks.items() if one != rank},
            "alpha_pattern": {f"^{re.escape(name)}": one for name, one in alphas.items() if one != alpha},
            "target_modules": self._target_modules(),
            **({"target_parameters": self._target_parameters()} if self._parameters else {}),
            "modules_to_save": self._saved or None,
            "bias": biases,
            "fan_in_fan_out": transposed,
            "init_lora_weights": True,
        }

    def _target_modules(self) -> list[str] | str:
        """Return names of modules; full paths for names that other modules have, too.

        A regular expression, where PEFT would take a full path for the end of another one.
        """
        wanted = set(self._modules)
        others = [path for path in self._all_paths if path not in wanted]
        shared = {path.rpartition(".")[2] for path in others}
        targets = {path if (name := path.rpartition(".")[2]) in shared else name for path in wanted}
        if any(end in targets for path in others for end in ends_of(path)):
            return "|".join(re.escape(path) for path in sorted(wanted))
        return sorted(targets)

    def _target_parameters(self) -> list[str]:
        wanted = set(self._parameters)
        for module, paths in self._paths.items():
            for name in dense_parameters(module):
                full = f"{paths[0]}.{name}".lstrip(".")
                if full not in wanted and any(end in wanted for end in ends_of(full)):
                    raise ValueError(
                        f"{layer_name(full)} ends as a parameter that the adapter changes, and PEFT would adapt it, "
                        "too; rename one of the modules"
                    )
        return sorted(wanted)

    def _dropout(self, techniques: Mapping[str, LoRA]) -> float:
        found = Counter(one.dropout for one in techniques.values())
        dropout = found.most_common(1)[0][0]
        if len(found) == 1 and not (dropout and self._parameters):
            return dropout
        written = 0.0 if self._parameters else dropout
        why = "none where parameters are adapted" if self._parameters else "one for all layers"
        warnings.warn(
            f"PEFT has {why}: lora_dropout={written:g} is written, not {', '.join(f'{one:g}' for one in found)}",
            stacklevel=6,  # the caller of the function that one_at_a_time wraps
        )
        return written


def _alpha(technique: LoRA, stabilized: bool) -> float:
    """Return the alpha that gives the scaling where all, or not all, layers are rank-stabilized."""
    alpha = technique.rank if technique.alpha is None else technique.alpha
    return alpha if technique.rank_stabilized == stabilized else alpha * math.sqrt(technique.rank)


def _task_of(model: nn.Module) -> str | None:
    """Return the task by which PEFT knows that a model generates; others would change what it saves."""
    generates = type(model).__name__.endswith("ForCausalLM") and hasattr(model, "prepare_inputs_for_generation")
    return "CAUSAL_LM" if generates else None


def _public_name(model: nn.Module) -> str | None:
    """Return the name of the base in a hub; a path of this machine means nothing elsewhere."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or os.path.exists(name):
        return None
    return None if name.startswith(".") else name
