"""Models by name (``VARIANT``, ``module:factory``, ``module:factory@VARIANT``, or a folder of Hugging Face
transformers), and calls of users' code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowmem.bignet import BigNet
from lowmem.errors import error_type_and_first_line, exception_text, short_repr
from lowmem.io.filesystem import has_magic_bytes
from lowmem.io.formats.gguf.gguf_file import MAGIC
from lowmem.io.hub_names import MODEL_KINDS
from lowmem.tools.output import (
    is_stdout_or_stderr_pipe_closed,
    preserved_stdout_and_stderr,
    warnings_printed_as_notes,
)
from lowmem.transforms.memory_plan import Plan
from lowmem.transforms.module_registry import Technique
from lowmem.variants import VARIANTS, build, variant_techniques

Result = TypeVar("Result")


def build_or_load_named_model(model_name: str, *, seed: int = 0, rank: int | None = None) -> nn.Module:
    """Build the model called ``model_name``, with weights that depend only on ``seed``; a ValueError says why not."""
    folder = model_folder_or_none(model_name)
    if folder is not None:
        from lowmem.integrations.transformers.pretrained_folder import load_folder

        with warnings_printed_as_notes():
            return load_folder(folder)
    variant, factory = _variant_and_factory(model_name)
    try:
        return build(variant, factory, seed=seed, rank=rank)
    except (ValueError, KeyboardInterrupt):
        raise
    except BaseException as reason:
        # A failed allocation, or any error in methods that a user's module overrides
        if isinstance(reason, BrokenPipeError) and is_stdout_or_stderr_pipe_closed():
            raise
        raise ValueError(
            f"model={model_name!r}, rank={rank} cannot be built: {error_type_and_first_line(reason)}"
        ) from reason


def move_to_device(model_name: str, model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model called ``model_name`` on a device; one that stays on the CPU is not touched."""
    if device.type == "cpu":
        return model
    with exceptions_as_value_error(f"model={model_name!r} cannot be moved to {device}"):
        return model.to(device)


def model_folder_or_none(model_name: str) -> Path | None:
    """Return the folder that a model's name is; None for names of another kind."""
    return (
        Path(model_name)
        if model_name and ":" not in model_name and model_name not in VARIANTS and os.path.isdir(model_name)
        else None
    )


def folder_or_gguf_or_none(model_name: str) -> Path | None:
    """Return the folder or the GGUF file that a model's name is; None for names of another kind."""
    folder = model_folder_or_none(model_name)
    return (
        Path(model_name)
        if folder is None and os.path.isfile(model_name) and has_magic_bytes(Path(model_name), MAGIC)
        else folder
    )


def factory_and_techniques(
    model_name: str, rank: int | None = None
) -> tuple[Callable[[], nn.Module], tuple[Technique, ...]]:
    """Return the factory of the dense model called ``model_name``, and the techniques that make it of that."""
    variant, factory = _variant_and_factory(model_name)
    return factory, variant_techniques(variant, rank)


_MODEL_NAMES = f"a variant that `lowmem stats` lists, {MODEL_KINDS}, or module:factory"


def _variant_and_factory(model_name: str) -> tuple[str, Callable[[], nn.Module]]:
    looks_like_path = os.path.basename(model_name) != model_name or os.path.splitext(model_name)[1] != ""
    if ":" not in model_name and looks_like_path:
        problem = "is a file" if os.path.isfile(model_name) else "is no folder"
        raise ValueError(f"model={model_name!r} {problem}: name {_MODEL_NAMES}")
    if model_name and not {":", "@"} & {*model_name} and model_name not in VARIANTS:
        raise ValueError(f"model={short_repr(model_name)} is no variant, and no folder here: name {_MODEL_NAMES}")
    target, at, variant = model_name.partition("@") if ":" in model_name else ("", "@", model_name)
    return variant if at else "bignet", import_model_factory(target) if target else BigNet


def import_model_factory(import_path: str) -> Callable[[], nn.Module]:
    """Return the factory called ``module:factory``; it is imported from the working directory, too."""
    factory = _import_callable_from_path_or_cwd(import_path, "model")

    def make_checked_model() -> nn.Module:
        with exceptions_as_value_error(f"model={import_path!r}: calling it failed"):
            model = factory()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={import_path!r}: it returned a {type(model).__name__}, not a torch.nn.Module")
        return model

    return make_checked_model


def import_and_call_batch_function(import_path: str) -> Any:
    """Return the example batch that the callable ``module:function`` returns."""
    if ":" not in import_path:
        raise ValueError(f"inputs={import_path!r} must be module:function, as my_models:batch")
    function = _import_callable_from_path_or_cwd(import_path, "inputs")
    with exceptions_as_value_error(f"inputs={import_path!r}: calling it failed"):
        batch = function()
    if not isinstance(batch, Tensor | tuple | list | Mapping):
        raise ValueError(
            f"inputs={import_path!r}: it returned a {type(batch).__name__}; it must return a Tensor, a tuple or list "
            "of "
            "the model's arguments, or a mapping of its keyword arguments"
        )
    return batch


def _import_callable_from_path_or_cwd(import_path: str, option: str) -> Callable[[], Any]:
    what = "a model" if option == "model" else "a batch"
    module_name, _, attribute = import_path.partition(":")
    # The working directory may have been removed
    with suppress(FileNotFoundError):
        if os.getcwd() not in sys.path:
            # As python -m does, since models are often files in it
            sys.path.insert(0, os.getcwd())
    with exceptions_as_value_error(f"{option}={import_path!r}: cannot import {module_name!r}"):
        factory: Any = import_module(module_name)
    for part in attribute.split("."):
        with exceptions_as_value_error(f"{option}={import_path!r}: looking up {attribute!r} failed"):
            factory = getattr(factory, part, None)
        if factory is None:
            raise ValueError(f"{option}={import_path!r}: {module_name!r} has no {attribute!r}")
    if not callable(factory):
        raise ValueError(
            f"{option}={import_path!r}: it is a {type(factory).__name__}, not a callable that returns {what}"
        )
    return factory  # type: ignore[no-any-return]


@contextmanager
def exceptions_as_value_error(
    message: str, remedy: Callable[[BaseException], str] = lambda reason: ""
) -> Iterator[None]:
    """Turn any exception of the block, SystemExit too, into a ValueError with the text ``message`` and a remedy.

    KeyboardInterrupt and a BrokenPipeError from printing pass. The block may close or replace stdout and stderr.
    """
    try:
        with preserved_stdout_and_stderr():
            yield
    except BaseException as reason:
        is_printing = isinstance(reason, BrokenPipeError) and is_stdout_or_stderr_pipe_closed()
        if isinstance(reason, KeyboardInterrupt) or is_printing:
            raise
        raise ValueError(f"{message}: {error_type_and_first_line(reason)}{remedy(reason)}") from reason


_CHECK = "check the input's shape and dtype"
# What errors say of calls with other inputs than the model takes -> what to do, in commands that make the input.
_REMEDIES = {
    r"'indices'|for index\b|index tensor|used as indices": "it takes ids: --input-dtype int64 --input-shape N",
    r"index out of range": "it takes fewer ids, or a smaller input: --input-shape N",
    r"positional argument": "commands call it with one tensor, its first argument: make a module that passes it on",
}


def _input_error_remedy(is_user_input: bool, error: BaseException) -> str:
    """Return what to do about an error of a model with the user's input, or that of ``make_random_or_zero_input``."""
    known = {} if is_user_input else _REMEDIES
    matching_remedies = (remedy for pattern, remedy in known.items() if re.search(pattern, exception_text(error)))
    return f"; {next(matching_remedies, _CHECK)}"


def call_or_raise_input_error(model_name: str, call: Callable[[], Result], *, is_user_input: bool = False) -> Result:
    """Return ``call()``, a call of the user's model; any failure becomes a ValueError about the input.

    ``is_user_input`` tells that the input is the user's own, which no options describe.
    """
    with exceptions_as_value_error(
        f"model={model_name!r} cannot take this input", partial(_input_error_remedy, is_user_input)
    ):
        return call()


def call_and_check_tensor(
    model_name: str, command: str, call: Callable[[], Any], *, is_user_input: bool = False
) -> Tensor:
    """Return ``call()``, which must return a tensor for the command; raise as ``call_or_raise_input_error``."""
    output = call_or_raise_input_error(model_name, call, is_user_input=is_user_input)
    if not isinstance(output, Tensor):
        type_name = type(output).__name__
        raise ValueError(f"model={model_name!r} returns a {type_name}; {command} takes models that return a tensor")
    return output


def plan_or_raise_value_error(model_name: str, make_plan: Callable[[], Plan], *, is_user_input: bool = False) -> Plan:
    """Return ``make_plan()``, which plans the user's model; its own errors pass, any other becomes a ValueError."""
    with exceptions_as_value_error(
        f"model={model_name!r} cannot be planned", partial(_input_error_remedy, is_user_input)
    ):
        try:
            return make_plan()
        except ValueError as reason:
            error = reason
    raise error
