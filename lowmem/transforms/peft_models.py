"""Raises errors for what PEFT cannot do with stored modules, or would leave out in silence: it finds parameters by
``named_parameters``, where a stored one has the names of its codes and scales. A hook of torch tells of modules that
become parts of PEFT's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.model_checks import is_peft_module

# An embedding that prompt learning finds there may be stored
_FOUND_BY_NAME = "embeddings.word_embeddings"


def check_no_stored_peft_targets(model: nn.Module, peft_configs: Mapping[str, Any]) -> None:
    """Raise a ValueError if a config of PEFT names a stored parameter, which PEFT leaves out.

    It names them by ``target_parameters``, and biases by ``bias="all"``.
    """
    if any(getattr(config, "bias", None) == "all" for config in peft_configs.values()):
        _check_no_stored_biases(model)
    targets = sorted(
        {name for config in peft_configs.values() for name in getattr(config, "target_parameters", None) or ()}
    )
    for path, module in model.named_modules() if targets else ():
        for name in module.forms if isinstance(module, StoredModule) else ():
            place = path.replace(".base_layer", "")
            full = f"{place}.{name}"
            if any(f".{full}".endswith(f".{target}") for target in targets):
                raise ValueError(
                    f"target_parameters={targets} of PEFT names {full}, which is stored: PEFT adapts dense "
                    "parameters alone, and leaves it out. Load the model again, and lowmem.add_adapter(model, name, "
                    f"LoRA(), where=...) adapts it as it is; or leave it dense, {_skip_argument_text(place)}"
                )


def _skip_argument_text(path: str) -> str:
    """Return the argument of ``convert`` that leaves a layer dense, and those of the same name in other blocks."""
    name = path.rpartition(".")[2]
    return f"skip='{path if name.isdigit() else f'*{name}'}'"


def _check_peft_child_now_or_later(parent: nn.Module, name: str, child: Any) -> None:
    """Check a module that becomes a part of one of PEFT's."""
    if name not in ("model", "base_model", "original_module") or child is None or not is_peft_module(parent):
        return
    if name == "model":  # of what injects adapters, whose config is not known yet
        if any(isinstance(module, StoredModule) for module in child.modules()):
            child.register_forward_pre_hook(_PeftAdapterCheckHook())
        return
    if name == "original_module":  # of modules_to_save and trainable_token_indices
        _check_fully_trained_module_is_dense(parent, child)
    elif not is_peft_module(child):  # of prompt learning; other methods have a module of PEFT between
        if hasattr(child, "get_input_embeddings"):
            _check_prompt_embedding_is_dense(child)
    elif hasattr(child, "peft_config"):
        check_no_stored_peft_targets(child.model, child.peft_config)


class _PeftAdapterCheckHook:
    """Checks adapters that PEFT injects, or adds later, at the next forward: torch does not report them."""

    def __init__(self) -> None:
        self._checked = 0

    def __call__(self, model: nn.Module, arguments: Any) -> None:
        """Raise if one of them names a stored parameter."""
        configs = getattr(model, "peft_config", {})
        if len(configs) != self._checked:
            check_no_stored_peft_targets(model, configs)
            self._checked = len(configs)


def _check_no_stored_biases(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, StoredModule) and "bias" in module.forms:
            place = path.replace(".base_layer", "")
            raise ValueError(
                f"bias='all' of PEFT names {place}.bias, which is stored in {module.forms['bias']}, and PEFT leaves "
                f"it out: load or convert the model again and leave the layer dense, {_skip_argument_text(place)}, "
                "or store it in "
                "8 or 4 bits, which keep biases dense; or choose bias='none'"
            )


def _check_fully_trained_module_is_dense(peft_wrapper: nn.Module, module: nn.Module) -> None:
    for inside in module.modules():
        if isinstance(inside, StoredModule):
            raise ValueError(
                f"{type(peft_wrapper).__name__} of PEFT trains a {type(inside).__name__} whole, which stores "
                f"{', '.join(inside.forms)} and is frozen: load or convert the model again and leave the module "
                "dense by skip=, as skip='*lm_head' leaves a head, or train an adapter of it"
            )


def _check_prompt_embedding_is_dense(model: Any) -> None:
    embedding = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    if isinstance(embedding, StoredModule) and path != _FOUND_BY_NAME:
        raise ValueError(
            f"PEFT looks for a dense embedding to learn prompts, and {path} is stored: load or convert the model "
            f"again and leave it dense, {_skip_argument_text(path)}"
        )


@cache
def register_global_peft_check_hook() -> None:
    """Check all modules that become parts of PEFT's from now on, if PEFT is installed.

    ``commit_replacements_and_freeze_if_adapted`` calls it with the first stored module. The hook is one for all
    modules, because ``get_peft_model`` calls nothing of the model that it is given: without the hook it leaves out
    ``target_parameters`` in silence.
    """
    if "peft" in sys.modules or find_spec("peft") is not None:
        register_module_module_registration_hook(_check_peft_child_now_or_later)
