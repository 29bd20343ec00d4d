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

from lowmem.io.filesystem import atomic_folder, write_atomically
from lowmem.io.formats.peft.peft_config import dotted_path_suffixes
from lowmem.io.formats.peft.peft_layout import PREFIX, PeftTargetLayers, dense_parameter_names
from lowmem.io.formats.peft.peft_reader import CONFIG, WEIGHTS
from lowmem.io.hub_names import hub_name_and_commit_or_none
from lowmem.io.lowmem_file import write_plain_safetensors_atomically
from lowmem.io.safetensors_header import TensorSpec
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter, is_transformers_conv1d
from lowmem.nn.adapter_buffers import CHILD
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.transforms.module_registry import all_paths_by_module, layer_display_name, layer_or_parameter_path


def write_peft_folder(
    folder: Path,
    model: nn.Module,
    adapters_by_path: Mapping[str, Adapter],
    base_name: str | None = None,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write an adapter, by place, as PEFT does; a ValueError names a layer that PEFT has no form of.

    ``base_name`` is that of the base in the config; None: its name on the Hub, if it has one. ``buffers`` are those
    that training changed: PEFT has them in ``modules_to_save``.

    Warns:
        UserWarning: the dropout is not written, since PEFT has one value for all layers, and none for parameters.
    """
    writing = _PeftFolderBuilder(model, adapters_by_path, buffers)
    tensors = writing.tensors_by_file_name()
    hub_name, commit = _hub_name_and_commit(model)
    base_name = base_name or hub_name
    config = writing.build_adapter_config_or_warn() | {"base_model_name_or_path": base_name}
    config["revision"] = commit if base_name == hub_name else None
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_folder(folder) as partial:
        specs = {key: TensorSpec.from_tensor(tensor) for key, tensor in tensors.items()}
        write_plain_safetensors_atomically(partial / WEIGHTS, specs, tensors.items())
        write_atomically(partial / CONFIG, text.encode())


class _PeftFolderBuilder:
    def __init__(
        self, model: nn.Module, adapters_by_path: Mapping[str, Adapter], buffers: Mapping[str, Tensor]
    ) -> None:
        self._model, self._adapters, self._buffers = model, adapters_by_path, buffers
        self._paths = all_paths_by_module(model)
        self._all_paths = [path for paths in self._paths.values() for path in paths]
        places = {
            layer_or_parameter_path(paths[0], name): (paths[0], name)
            for module, paths in self._paths.items()
            for name in dense_parameter_names(module)
        }
        targets = [places[place] for place in adapters_by_path]
        self._modules = [path for path, name in targets if name == "weight"]
        self._parameters = [f"{path}.{name}".lstrip(".") for path, name in targets if name != "weight"]
        self._layers = PeftTargetLayers(model, self._modules, self._parameters)
        missing = set(adapters_by_path) - {slot.place for slot in self._layers.slots}
        assert not missing, missing
        self._saved, self._biases = self._checked_trained_paths_and_biases()

    def _checked_trained_paths_and_biases(self) -> tuple[list[str], list[tuple[str, Tensor]]]:
        """Return the paths of modules that train, and the keys of biases that do."""
        with_buffers = {name.rpartition(".")[0]: name.rpartition(".")[2] for name in self._buffers}
        # Also those whose weights train
        whole = {*with_buffers}
        for module, paths in self._paths.items():
            trains = [name for name, entry in module._parameters.items() if entry is not None and entry.requires_grad]
            whole |= {paths[0]} if any("bias" not in name for name in trains) else set()
        saved: list[str] = []
        biases: list[tuple[str, Tensor]] = []
        for module, paths in self._paths.items():
            path = paths[0]
            trained = {
                name: entry for name, entry in module._parameters.items() if entry is not None and entry.requires_grad
            }
            if not trained and path not in with_buffers:
                continue
            if path not in with_buffers and all("bias" in name for name in trained) and path:
                biases += [
                    (f"{self._layers.innermost_tensor_name_prefix(path)}.{name}", entry)
                    for name, entry in trained.items()
                ]
                continue
            why = self._unsavable_reason_or_none(module, whole)
            if why is not None:
                name = next(iter(trained), None)
                if name is None:
                    raise ValueError(
                        f"{layer_display_name(path)}: training changed its {with_buffers[path]}, and {why}: save the "
                        "adapter "
                        "in lowmem's format, or train with this module in evaluation mode"
                    )
                raise ValueError(
                    f"{layer_display_name(path)}: its {name} trains, and {why}: freeze it, "
                    f"{name}.requires_grad_(False), or "
                    "save the whole model"
                )
            if not any(path.startswith(f"{outer}.") for outer in saved):
                saved.append(path)
        return saved, [
            (key, entry) for key, entry in biases if not any(key.startswith(f"{PREFIX}{s}.") for s in saved)
        ]

    def _unsavable_reason_or_none(self, module: nn.Module, saved_paths: set[str]) -> str | None:
        """Return why PEFT cannot save a module as it is, or None; ``saved_paths`` are those of all that it saves."""
        path, *other_paths = self._paths[module]
        if not path:
            return "PEFT cannot save parameters of the model itself"
        if any(isinstance(inner, AdaptedModule) for inner in module.modules()):
            return "PEFT cannot train a weight beside its adapter"
        if other_paths:
            return f"it is {layer_display_name(other_paths[0])}, too, and PEFT would save one alone"
        if any(isinstance(inner, StoredModule) for inner in module.modules()):
            return "PEFT cannot save a module that stores a weight"
        alike = next((entry for entry in self._all_paths if entry not in saved_paths and entry.endswith(path)), None)
        return alike and f"PEFT would take {layer_display_name(alike)} for it, whose path ends alike"

    def tensors_by_file_name(self) -> dict[str, Tensor]:
        """Return all tensors by their names in the file."""
        tensors: dict[str, Tensor] = {}
        for slot in self._layers.slots:
            adapter = self._adapters[slot.place]
            tensors |= {
                slot.keys[part]: slot.to_file_shape(part, getattr(adapter, part)) for part in ("lora_a", "lora_b")
            }
        by_path = {paths[0]: module for module, paths in self._paths.items()}
        for path in self._saved:
            for name, value in by_path[path].state_dict().items():
                if f".{CHILD}." not in f".{name}":
                    tensors[f"{self._layers.tensor_name_prefix(path)}.{name}"] = self._buffers.get(
                        f"{path}.{name}", value
                    )
        return tensors | {key: bias.detach() for key, bias in self._biases}

    def build_adapter_config_or_warn(self) -> dict[str, Any]:
        """Return what ``adapter_config.json`` holds."""
        techniques = {slot.pattern_name: self._adapters[slot.place].technique for slot in self._layers.slots}
        stabilized = all(item.rank_stabilized for item in techniques.values())
        alphas = {name: _equivalent_alpha(item, stabilized) for name, item in techniques.items()}
        ranks = {name: item.rank for name, item in techniques.items()}
        rank, alpha = (Counter(by_name.values()).most_common(1)[0][0] for by_name in (ranks, alphas))
        outside = any(".base_layer." not in key for key, _ in self._biases)
        biases = "none" if not self._biases else "all" if outside else "lora_only"
        transposed = any(is_transformers_conv1d(slot.module) for slot in self._layers.slots)
        if transposed and self._parameters:
            raise ValueError(
                f"{layer_display_name(self._parameters[0])}: PEFT adapts no parameters beside Conv1D layers: save "
                "them as "
                "two adapters"
            )
        return {
            "peft_type": "LORA",
            "task_type": _causal_lm_task_or_none(self._model),
            # Of the base, as in PEFT
            "revision": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self._common_dropout_or_warn(techniques),
            "use_rslora": stabilized,
            "rank_pattern": {f"^{re.escape(name)}": item for name, item in ranks.items() if item != rank},
            "alpha_pattern": {f"^{re.escape(name)}": item for name, item in alphas.items() if item != alpha},
            "target_modules": self._target_modules_or_pattern(),
            **({"target_parameters": self._checked_target_parameters()} if self._parameters else {}),
            "modules_to_save": self._saved or None,
            "bias": biases,
            "fan_in_fan_out": transposed,
            "init_lora_weights": True,
        }

    def _target_modules_or_pattern(self) -> list[str] | str:
        """Return names of modules; full paths for names that other modules have, too.

        A regular expression, where PEFT would take a full path for the end of another one.
        """
        wanted = set(self._modules)
        others = [path for path in self._all_paths if path not in wanted]
        shared = {path.rpartition(".")[2] for path in others}
        targets = {path if (name := path.rpartition(".")[2]) in shared else name for path in wanted}
        if any(end in targets for path in others for end in dotted_path_suffixes(path)):
            return "|".join(re.escape(path) for path in sorted(wanted))
        return sorted(targets)

    def _checked_target_parameters(self) -> list[str]:
        wanted = set(self._parameters)
        for module, paths in self._paths.items():
            for name in dense_parameter_names(module):
                full = f"{paths[0]}.{name}".lstrip(".")
                if full not in wanted and any(end in wanted for end in dotted_path_suffixes(full)):
                    raise ValueError(
                        f"{layer_display_name(full)} ends as a parameter that the adapter changes, and PEFT would "
                        "adapt it, "
                        "too; rename one of the modules"
                    )
        return sorted(wanted)

    def _common_dropout_or_warn(self, techniques: Mapping[str, LoRA]) -> float:
        dropout_counts = Counter(item.dropout for item in techniques.values())
        dropout = dropout_counts.most_common(1)[0][0]
        if len(dropout_counts) == 1 and not (dropout and self._parameters):
            return dropout
        written = 0.0 if self._parameters else dropout
        why = "none where parameters are adapted" if self._parameters else "one for all layers"
        warnings.warn(
            f"PEFT has {why}: lora_dropout={written:g} is written, not "
            f"{', '.join(f'{item:g}' for item in dropout_counts)}",
            stacklevel=6,  # the caller of the function that with_model_lock wraps
        )
        return written


def _equivalent_alpha(technique: LoRA, rank_stabilized: bool) -> float:
    """Return the alpha that gives the scaling where all, or not all, layers are rank-stabilized."""
    alpha = technique.rank if technique.alpha is None else technique.alpha
    return alpha if technique.rank_stabilized == rank_stabilized else alpha * math.sqrt(technique.rank)


def _causal_lm_task_or_none(model: nn.Module) -> str | None:
    """Return the task by which PEFT knows that a model generates; others would change what it saves."""
    generates = type(model).__name__.endswith("ForCausalLM") and hasattr(model, "prepare_inputs_for_generation")
    return "CAUSAL_LM" if generates else None


def _hub_name_and_commit(model: nn.Module) -> tuple[str | None, str | None]:
    """Return the name of the base on the Hub, and its commit; a path of this machine means nothing elsewhere."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if isinstance(name, str) and (cached := hub_name_and_commit_or_none(name)) is not None:
        return cached
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or os.path.exists(name):
        return None, None
    return (None, None) if name.startswith(".") else (name, None)
