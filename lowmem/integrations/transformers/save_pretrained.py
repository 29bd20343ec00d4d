"""``save_pretrained`` of a converted model: its state, and how its weights are stored, in config.json. A folder has a
tensor under each name of the dense model, so that transformers without lowmem fills in no random numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from lowmem.integrations.transformers.quantization_config import METHOD, LowmemConfig
from lowmem.io.checkpoint import checked_form_records_without_bias
from lowmem.io.filesystem import atomic_folder, scratch_folder, write_errors_with_path
from lowmem.io.formats.peft.peft_reader import CONFIG as ADAPTER_CONFIG
from lowmem.io.metadata_records import adapter_record_dicts_by_parameter
from lowmem.io.model_folder import move_files_replacing_weights
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_bank import AdapterBank
from lowmem.nn.adapter_buffers import without_adapter_buffers_if_equal
from lowmem.nn.module_class import change_class_and_attributes, derived_class
from lowmem.nn.quantized_module import state_dict_keys_of_formats
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.module_registry import all_paths_by_module, layer_or_parameter_path


def lowmem_config_or_none(model: nn.Module) -> LowmemConfig | None:
    """Return how a model is stored, and which adapters it has; None where nothing is stored or adapted.

    An adapter that is merged counts as active, as ``lowmem.save`` has it.
    """
    layers: dict[str, dict[str, Any]] = {}
    adapters: dict[str, Any] = {}
    for module, paths in all_paths_by_module(model).items():
        if isinstance(module, StoredModule):
            for name, record in checked_form_records_without_bias(module).items():
                named = layers.setdefault(json.dumps(record, sort_keys=True), {**record, "names": []})
                named["names"].append(paths[0] if name == "weight" else f"{paths[0]}.{name}".lstrip("."))
        if isinstance(module, AdaptedModule):
            adapters |= {
                layer_or_parameter_path(paths[0], name): record
                for name, record in adapter_record_dicts_by_parameter(module).items()
            }
    if not layers and not adapters:
        return None
    old = [getattr(getattr(model, name, None), "quantization_config", None) for name in ("config", "hf_quantizer")]
    asked = next((candidate for candidate in old if isinstance(candidate, LowmemConfig)), None)
    return LowmemConfig(
        None if asked is None else asked.technique,
        skip=() if asked is None else asked.skip,
        train_dense=asked is not None and asked.train_dense,
        layers=layers.values(),
        adapters=adapters,
    )


class StoredPreTrainedModelMixin:
    """Base of the generated classes of transformers' models whose weights lowmem stores or adapts.

    Attributes:
        own_class: the model's class before.
    """

    own_class: ClassVar[Any]

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write a folder as transformers does, which is complete or not there, and says how weights are stored.

        The config of an older adapter in the folder is removed.
        """
        # these need the folder itself: its name and files are sent, or several processes write a part each
        shared = push_to_hub or kwargs.get("distributed_checkpoint") or not is_main_process
        with _storage_described_in_config(self) as ours:
            if ours and not kwargs.get("distributed_checkpoint"):
                # Names that weights had in the folder that they come from
                kwargs["save_original_format"] = False
                state_dict = without_adapter_buffers_if_equal(
                    self, self.state_dict() if state_dict is None else state_dict
                )
                state_dict = _state_by_folder_names(self, state_dict)
            if not ours or shared:
                super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)  # type: ignore[misc]
            else:
                with _atomic_or_scratch_folder(Path(save_directory)) as partial:
                    super().save_pretrained(partial, True, state_dict, False, *args, **kwargs)  # type: ignore[misc]
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            # Last: with the config of an older adapter, transformers loads that adapter's base until here.
            with write_errors_with_path(Path(save_directory)):
                Path(save_directory, ADAPTER_CONFIG).unlink(missing_ok=True)

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state by its own names or by those of a folder, which ``Trainer`` reads as it is."""
        model_state, renamed_state = self.state_dict(), dict(state_dict)
        for name, other in folder_names_by_state_key(self).items():
            if (
                name not in renamed_state
                and name in model_state
                and other in renamed_state
                and renamed_state[other].dtype == model_state[name].dtype
            ):
                renamed_state[name] = renamed_state.pop(other)
        return super().load_state_dict(renamed_state, strict, assign)  # type: ignore[misc]

    def named_modules(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules, behind the model itself first one whose dense parameter has the model's dtype, if any.

        sentence-transformers reads ``next(model.parameters()).dtype``, which of a stored parameter is the dtype of
        codes. The order of children stays.
        """
        named: list[tuple[str, nn.Module]] = [*super().named_modules(*args, **kwargs)]  # type: ignore[misc]
        dtypes = [next((p.dtype for p in module._parameters.values() if p is not None), None) for _, module in named]
        dtype = _first_floating_dtype_or_none(module for _, module in named)
        if dtype is not None and next(filter(None, dtypes), None) is not dtype:
            # Adapters stay where they are: a path of theirs tells that a module is a part of one.
            banks = tuple(f"{name}." for name, module in named if isinstance(module, AdapterBank))
            places = (at for at, (name, _) in enumerate(named) if dtypes[at] is dtype and not name.startswith(banks))
            if (first := next(places, None)) is not None:
                named.insert(1, named.pop(first))
        yield from named

    @property
    def device(self: Any) -> torch.device:
        """The device of the first parameter, which ``generate`` asks for at each token."""
        # named_modules would walk over the whole model
        first = _first_parameter_or_none(self)
        return super().device if first is None else first.device  # type: ignore[misc]

    @property
    def dtype(self: Any) -> torch.dtype:
        """The dtype as which the first floating-point parameter presents itself."""
        return _first_floating_dtype_or_none(self.modules()) or super().dtype  # type: ignore[misc]

    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of distinct parameters, of stored ones that of the weights and not of their parts."""
        total, seen = 0, set()
        for module in self.modules():
            stored = module.forms if isinstance(module, StoredModule) else {}
            parts = module.part_parameter_names if isinstance(module, StoredModule) else ()
            left_out = ("weight",) if exclude_embeddings and isinstance(module, nn.Embedding) else ()
            counted: list[tuple[str, Any, int]] = [
                (name, module._parameters[f"{name}_{form.parts[0]}"], module.stored_tensor(name).numel())
                for name, form in stored.items()
            ]
            parameters = module._parameters.items()
            counted += [
                (name, parameter, parameter.numel())
                for name, parameter in parameters
                if parameter is not None and name not in parts
            ]
            for name, parameter, numbers in counted:
                if (
                    id(parameter) not in seen
                    and name not in left_out
                    and (parameter.requires_grad or not only_trainable)
                ):
                    total += numbers
                seen.add(id(parameter))
        return total

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind: Any = type(self)
        make, arguments, *rest = cast(Any, super().__reduce_ex__(protocol))
        return (
            _rebuild_stored_model,
            (make, tuple(kind.own_class if argument is kind else argument for argument in arguments)),
            *rest,
        )


def stored_model_subclass(model_class: Any) -> Any:
    """Return the subclass of a model's class whose ``save_pretrained`` knows lowmem, under the same name.

    transformers compares names of classes, so the model stays what it was; ``type(model) is kind`` does not hold.
    """
    return (
        model_class
        if issubclass(model_class, StoredPreTrainedModelMixin)
        else derived_class(model_class, StoredPreTrainedModelMixin, own_class=model_class)
    )


def _rebuild_stored_model(constructor: Any, arguments: tuple[Any, ...]) -> Any:
    """Return an empty model of a generated class, for pickle and deepcopy."""
    model = constructor(*arguments)
    change_class_and_attributes(model, stored_model_subclass(type(model)))
    return model


def folder_names_by_state_key(model: nn.Module) -> dict[str, str]:
    """Return the names of tensors in a folder, by those in the model's state, where they differ."""
    names: dict[str, str] = {}
    formats = state_dict_keys_of_formats(model)
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        if not isinstance(module, StoredModule):
            continue
        if f"{dot}_extra_state" in formats:
            names[f"{dot}_extra_state"] = dot + next(iter(module.forms))
        else:
            names |= {dot + part: dot + part.removesuffix("_rounded") for part in module.part_parameter_names}
    # By transformers, which computes dense ones
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {name: other for name, other in names.items() if other not in (name, *left_out)}


def _state_by_folder_names(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state by the names of a folder; offloaded tensors keep theirs, by which transformers reads them."""
    names = folder_names_by_state_key(model)
    return {name if value.device.type == "meta" else names.get(name, name): value for name, value in state.items()}


@contextmanager
def _atomic_or_scratch_folder(target: Path) -> Iterator[Path]:
    """Yield where to write a folder: beside ``target``, renamed after the block; or in it, and moved file by file."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()  # of which each may make it
    with write_errors_with_path(target):
        (target if several else target.parent).mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        with atomic_folder(target) as partial:
            yield partial
        return
    with scratch_folder(target) as partial:
        yield partial
        move_files_replacing_weights(partial, target)


def _first_parameter_or_none(module: nn.Module) -> nn.Parameter | None:
    """Return the first parameter of a module or of its children, in their order."""
    inner = (_first_parameter_or_none(child) for child in module.children())
    own = module.parameters(recurse=False)
    return next(chain(own, (parameter for parameter in inner if parameter is not None)), None)


def _first_floating_dtype_or_none(modules: Iterable[nn.Module]) -> torch.dtype | None:
    """Return the dtype as which the first floating-point parameter of modules presents itself, stored or dense."""
    for module in modules:
        if isinstance(module, StoredModule):
            for name in module.forms:
                return module._forms[name].dtype
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return None


@contextmanager
def _storage_described_in_config(model: Any) -> Iterator[bool]:
    """Describe a converted model in its config for the block; yield whether it is one. transformers would ignore a
    given state of a model with a quantizer: the model has none in the block."""
    config, storage_config = model.config, lowmem_config_or_none(model)
    # A dict in a config that was read without its model
    before = getattr(config, "quantization_config", None)
    ours = isinstance(before, LowmemConfig) or (isinstance(before, dict) and before.get("quant_method") == METHOD)
    if storage_config is None and not ours:
        yield False
        return
    quantizer = model.__dict__.pop("hf_quantizer", None)
    if storage_config is not None:
        config.quantization_config = storage_config
    else:
        # Dense, by ``restore`` of all of its parts
        del config.quantization_config
    try:
        yield True
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
