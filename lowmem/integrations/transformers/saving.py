"""What ``save_pretrained`` writes of a converted model: its state, and how it is stored, in config.json."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowmem.integrations.transformers.config import EXACT, METHOD, LowmemConfig
from lowmem.io.atomic import atomic_folder, scratch_folder, write_errors
from lowmem.io.checkpoint import how_stored
from lowmem.io.metadata import adapters_record
from lowmem.io.model_folder import replace_files
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.placement import place_name
from lowmem.transforms.registry import module_paths

__all__ = ["config_of", "install", "presented_dtype"]

_ABSENT = object()


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
        None if asked is None or asked.technique == EXACT else asked.technique,
        skip=() if asked is None else asked.skip,
        train_dense=asked is not None and asked.train_dense,
        layers=layers.values(),
        adapters=adapters,
    )


def install() -> None:
    """Let ``save_pretrained``, ``dtype`` and ``num_parameters`` of transformers' models know what lowmem stores."""
    original, dtype = PreTrainedModel.save_pretrained, PreTrainedModel.dtype
    signature = inspect.signature(original)

    @wraps(original)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        # these need the folder itself: its name and files are sent, or several processes write a part each
        shared = given.get("push_to_hub") or given.get("distributed_checkpoint")
        with _described(given["self"]) as ours:
            if not ours or shared or not given.get("is_main_process", True):
                return original(*args, **kwargs)
            with _whole(Path(given["save_directory"])) as given["save_directory"]:
                return original(*call.args, **call.kwargs)

    @wraps(PreTrainedModel.num_parameters)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        return _count(self, only_trainable, exclude_embeddings)

    PreTrainedModel.save_pretrained, PreTrainedModel.num_parameters = save_pretrained, num_parameters
    PreTrainedModel.dtype = property(lambda self: presented_dtype(self) or dtype.fget(self), doc=dtype.__doc__)


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Yield where to write a folder: beside ``target``, renamed after the block; or in it, and moved file by file.

    Raises:
        OSError: the folder cannot be written.
    """
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


def presented_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype as which a model's first floating-point parameter presents itself, stored or dense."""
    for module in model.modules():
        if isinstance(module, StoredModule):
            for name in module.forms:
                return module._forms[name].dtype
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return None


def _count(model: nn.Module, only_trainable: bool, exclude_embeddings: bool) -> int:
    """Return the numbers of the distinct parameters, of stored ones those of the weights and not of their parts."""
    total, seen = 0, set()
    for module in model.modules():
        stored = module.forms if isinstance(module, StoredModule) else {}
        parts = module.part_names if isinstance(module, StoredModule) else ()
        left_out = ("weight",) if exclude_embeddings and isinstance(module, nn.Embedding) else ()
        counted: list[tuple[str, Any, int]] = [
            (name, module._parameters[f"{name}_{form.parts[0]}"], module.stored_tensor(name).numel())  # type: ignore[operator]
            for name, form in stored.items()
        ]
        own = module._parameters.items()
        counted += [(name, one, one.numel()) for name, one in own if one is not None and name not in parts]
        for name, parameter, numbers in counted:
            if id(parameter) not in seen and name not in left_out and (parameter.requires_grad or not only_trainable):
                total += numbers
            seen.add(id(parameter))
    return total


@contextmanager
def _described(model: Any) -> Iterator[bool]:
    """Describe a converted model in its config for the block, and let its names be written as they are.

    Yields whether lowmem has converted it.

    transformers would give weights back the names that they had in the folder they come from, of which stored ones
    have none.
    """
    config, found = model.config, config_of(model)
    before = getattr(config, "quantization_config", None)  # a dict in a config that was read without its model
    ours = isinstance(before, LowmemConfig) or (isinstance(before, dict) and before.get("quant_method") == METHOD)
    quantizer = getattr(model, "hf_quantizer", None)
    adopted = quantizer is not None and isinstance(quantizer.quantization_config, LowmemConfig)
    if found is None and not ours and not adopted:
        yield False
        return
    replaced: dict[str, Any] = {"hf_quantizer": None}
    if found is not None or ours:
        replaced["_weight_conversions"] = []
    own = {name: model.__dict__.get(name, _ABSENT) for name in replaced}
    model.__dict__.update(replaced)
    if found is not None:
        config.quantization_config = found
    elif ours:
        del config.quantization_config  # dense, by ``restore`` or as a new model of this config
    try:
        yield found is not None or ours
    finally:
        for name, value in own.items():
            if value is _ABSENT:
                del model.__dict__[name]
            else:
                model.__dict__[name] = value
