"""``save_pretrained`` of a converted model: its state, and how its weights are stored, in config.json. A folder has a
tensor under each name of the dense model, so that transformers without lowmem fills in no random numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from lowmem.integrations.transformers.config import METHOD, LowmemConfig
from lowmem.io.atomic import atomic_folder, scratch_folder, write_errors
from lowmem.io.checkpoint import how_stored
from lowmem.io.formats.peft.reading import CONFIG as ADAPTER_CONFIG
from lowmem.io.metadata import adapters_record
from lowmem.io.model_folder import replace_files
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_bank import AdapterBank
from lowmem.nn.adapter_buffers import without_copies
from lowmem.nn.coded_module import format_keys
from lowmem.nn.module_class import change_class, derived_class
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.registry import module_paths, place_name


def config_of(model: nn.Module) -> LowmemConfig | None:
    """Return how a model is stored, and which adapters it has; None where nothing is stored or adapted.

    An adapter that is merged counts as active, as ``lowmem.save`` has it.
    """
    layers: dict[str, dict[str, Any]] = {}
    adapters: dict[str, Any] = {}
    for module, paths in module_paths(model).items():
        if isinstance(module, StoredModule):
            for name, record in how_stored(module).items():
                named = layers.setdefault(json.dumps(record, sort_keys=True), {**record, "names": []})
                named["names"].append(paths[0] if name == "weight" else f"{paths[0]}.{name}".lstrip("."))
        if isinstance(module, AdaptedModule):
            adapters |= {place_name(paths[0], name): record for name, record in adapters_record(module).items()}
    if not layers and not adapters:
        return None
    old = [getattr(getattr(model, name, None), "quantization_config", None) for name in ("config", "hf_quantizer")]
    asked = next((one for one in old if isinstance(one, LowmemConfig)), None)
    return LowmemConfig(
        None if asked is None else asked.technique,
        skip=() if asked is None else asked.skip,
        train_dense=asked is not None and asked.train_dense,
        layers=layers.values(),
        adapters=adapters,
    )


class SavedModel:
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
        """Write a folder as transformers does, which is complete or not there, and says how weights are stored."""
        # these need the folder itself: its name and files are sent, or several processes write a part each
        shared = push_to_hub or kwargs.get("distributed_checkpoint") or not is_main_process
        with _described(self) as ours:
            if ours and not kwargs.get("distributed_checkpoint"):
                kwargs["save_original_format"] = False  # names that weights had in the folder that they come from
                state_dict = without_copies(self, self.state_dict() if state_dict is None else state_dict)
                state_dict = _renamed(self, state_dict)
            if not ours or shared:
                super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)  # type: ignore[misc]
            else:
                with _whole(Path(save_directory)) as partial:
                    super().save_pretrained(partial, True, state_dict, False, *args, **kwargs)  # type: ignore[misc]
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            # Last: with the config of an older adapter, transformers loads that adapter's base until here.
            with write_errors(Path(save_directory)):
                Path(save_directory, ADAPTER_CONFIG).unlink(missing_ok=True)

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state by its own names or by those of a folder, which ``Trainer`` reads as it is."""
        own, found = self.state_dict(), dict(state_dict)
        for name, other in folder_names(self).items():
            if name not in found and name in own and other in found and found[other].dtype == own[name].dtype:
                found[name] = found.pop(other)
        return super().load_state_dict(found, strict, assign)  # type: ignore[misc]

    def named_modules(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules, behind the model itself first one whose dense parameter has the model's dtype, if any.

        sentence-transformers reads ``next(model.parameters()).dtype``, which of a stored parameter is the dtype of
        codes. The order of children stays.
        """
        found: list[tuple[str, nn.Module]] = [*super().named_modules(*args, **kwargs)]  # type: ignore[misc]
        dtypes = [next((p.dtype for p in one._parameters.values() if p is not None), None) for _, one in found]
        dtype = _presented_dtype(one for _, one in found)
        if dtype is not None and next(filter(None, dtypes), None) is not dtype:
            # Adapters stay where they are: a path of theirs tells that a module is a part of one.
            banks = tuple(f"{name}." for name, one in found if isinstance(one, AdapterBank))
            places = (at for at, (name, _) in enumerate(found) if dtypes[at] is dtype and not name.startswith(banks))
            if (first := next(places, None)) is not None:
                found.insert(1, found.pop(first))
        yield from found

    @property
    def dtype(self: Any) -> torch.dtype:
        """The dtype as which the first floating-point parameter presents itself."""
        return _presented_dtype(self.modules()) or super().dtype  # type: ignore[misc]

    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of distinct parameters, of stored ones that of the weights and not of their parts."""
        total, seen = 0, set()
        for module in self.modules():
            stored = module.forms if isinstance(module, StoredModule) else {}
            parts = module.part_names if isinstance(module, StoredModule) else ()
            left_out = ("weight",) if exclude_embeddings and isinstance(module, nn.Embedding) else ()
            counted: list[tuple[str, Any, int]] = [
                (name, module._parameters[f"{name}_{form.parts[0]}"], module.stored_tensor(name).numel())
                for name, form in stored.items()
            ]
            own = module._parameters.items()
            counted += [(name, one, one.numel()) for name, one in own if one is not None and name not in parts]
            for name, one, numbers in counted:
                if id(one) not in seen and name not in left_out and (one.requires_grad or not only_trainable):
                    total += numbers
                seen.add(id(one))
        return total

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind: Any = type(self)
        make, arguments, *rest = cast(Any, super().__reduce_ex__(protocol))
        return _made, (make, tuple(kind.own_class if one is kind else one for one in arguments)), *rest


def saved_class(kind: Any) -> Any:
    """Return the subclass of a model's class whose ``save_pretrained`` knows lowmem, under the same name.

    transformers compares names of classes, so the model stays what it was; ``type(model) is kind`` does not hold.
    """
    return kind if issubclass(kind, SavedModel) else derived_class(kind, SavedModel, own_class=kind)


def _made(make: Any, arguments: tuple[Any, ...]) -> Any:
    """Return an empty model of a generated class, for pickle and deepcopy."""
    model = make(*arguments)
    change_class(model, saved_class(type(model)))
    return model


def folder_names(model: nn.Module) -> dict[str, str]:
    """Return the names of tensors in a folder, by those in the model's state, where they differ."""
    names: dict[str, str] = {}
    formats = format_keys(model)
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        if not isinstance(module, StoredModule):
            continue
        if f"{dot}_extra_state" in formats:
            names[f"{dot}_extra_state"] = dot + next(iter(module.forms))
        else:
            names |= {dot + part: dot + part.removesuffix("_rounded") for part in module.part_names}
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()  # by transformers, which computes dense ones
    return {name: other for name, other in names.items() if other not in (name, *left_out)}


def _renamed(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state by the names of a folder; offloaded tensors keep theirs, by which transformers reads them."""
    names = folder_names(model)
    return {name if value.device.type == "meta" else names.get(name, name): value for name, value in state.items()}


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Yield where to write a folder: beside ``target``, renamed after the block; or in it, and moved file by file."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()  # of which each may make it
    with write_errors(target):
        (target if several else target.parent).mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        with atomic_folder(target) as partial:
            yield partial
        return
    with scratch_folder(target) as partial:
        yield partial
        replace_files(partial, target)


def _presented_dtype(modules: Iterable[nn.Module]) -> torch.dtype | None:
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
def _described(model: Any) -> Iterator[bool]:
    """Describe a converted model in its config for the block; yield whether it is one. transformers would ignore a
    given state of a model with a quantizer: the model has none in the block."""
    config, found = model.config, config_of(model)
    before = getattr(config, "quantization_config", None)  # a dict in a config that was read without its model
    ours = isinstance(before, LowmemConfig) or (isinstance(before, dict) and before.get("quant_method") == METHOD)
    if found is None and not ours:
        yield False
        return
    quantizer = model.__dict__.pop("hf_quantizer", None)
    if found is not None:
        config.quantization_config = found
    else:
        del config.quantization_config  # dense, by ``restore`` of all of its parts
    try:
        yield True
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
