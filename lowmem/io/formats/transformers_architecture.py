"""What the model of a folder is: its modules, made by transformers without values, and which of them stay dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.errors import file_error, model_build_failure_reason, short_repr
from lowmem.io.model_folder import CONFIG
from lowmem.io.remote_code import NEEDS_CODE, has_trust_remote_code_in_text, remove_auto_map_entries
from lowmem.transforms.layer_roles import float32_name_patterns
from lowmem.version import install_command


@dataclass(frozen=True)
class Architecture:
    """The modules of a model.

    Args:
        dtype: of the model.
        linear: by path, each linear layer, and how its weight lies: "linear" (out, in); "conv1d", transposed, in
            transformers' own class; or "subclass" of nn.Linear, which other programs leave dense or have their own.
        dense: those of them that other programs leave dense: the output layer, tied ones, and those that the model
            keeps in float32.
        shapes: of the parameters, by name.
        dtypes: in which they are loaded.
        tied: names of parameters that another one has the values of.
        refusal: layers -> why transformers could not load the model without parameters ``weight`` in them, or None.
    """

    dtype: torch.dtype
    linear: Mapping[str, str]
    dense: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    tied: frozenset[str]
    refusal: Callable[[Iterable[str]], str | None] = lambda layers: None


def architecture_from_config(folder: Path, config: Mapping[str, Any]) -> Architecture:
    """Return what the model of a folder is, by its config alone; no code of the folder is run.

    Raises:
        FileError: transformers cannot make the model.
        ImportError: transformers is missing.
    """
    try:
        import transformers
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION, HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError as reason:
        raise ImportError(
            f"what the model's layers are takes transformers: {install_command('transformers')} ({reason})"
        ) from None
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        have = f"transformers {transformers.__version__} has not"
        raise file_error(
            folder, f"architectures names {short_repr(name)}, which {have}; repair config.json", "export"
        )
    try:
        model_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        remove_auto_map_entries(model_config)
        dtype = model_config.dtype if isinstance(model_config.dtype, torch.dtype) else torch.float32
        with torch.device("meta"):
            model: Any = kind._from_config(model_config, dtype=dtype)  # type: ignore[attr-defined]
    except Exception as reason:  # of transformers' dependencies, too, which have no common class
        why = NEEDS_CODE if has_trust_remote_code_in_text(reason) else model_build_failure_reason(reason)
        raise file_error(folder / CONFIG, why, "export") from reason
    for path, module in model.named_modules():
        if type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION:
            what = f"the {type(module).__name__} at {short_repr(path)}"
            raise file_error(folder, f"{what} becomes other modules when transformers loads it quantized", "export")
    linear = {
        path: "linear" if type(module) is nn.Linear else "conv1d" if isinstance(module, Conv1D) else "subclass"
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    dense = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    wide = float32_name_patterns(model, dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return Architecture(
        dtype,
        linear,
        frozenset(path for path in linear if not should_convert_module(path, dense)),
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        {
            name: parameter.dtype if should_convert_module(name.rpartition(".")[0], wide) else torch.float32
            for name, parameter in parameters.items()
        },
        frozenset(model.all_tied_weights_keys),
        lambda layers: _delete_weights_and_get_load_error_or_none(model, layers),
    )


def _delete_weights_and_get_load_error_or_none(model: Any, layer_paths: Iterable[str]) -> str | None:
    """Return why a model without the weights of some layers could not be loaded (as where a module initializes what
    is missing from its children's weights); the model is spent."""
    for path in layer_paths:
        del model.get_submodule(path)._parameters["weight"]
    try:
        with torch.no_grad():
            model.initialize_weights()
    except AttributeError as reason:
        return f"transformers cannot load a {type(model).__name__} whose weights are packed ({reason})"
    return None
