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
from lowmem.errors import describe, message_of
from lowmem.io.atomic import starts_with
from lowmem.io.formats.gguf.container import MAGIC
from lowmem.tools.output import is_pipe_closed, preserve_streams, warnings_as_notes
from lowmem.transforms.plan import Plan
from lowmem.transforms.registry import Technique
from lowmem.variants import VARIANTS, build, techniques_of

Result = TypeVar("Result")


def make_model(name: str, *, seed: int = 0, rank: int | None = None) -> nn.Module:
    """Build the model called ``name``, with weights that depend only on ``seed``; a ValueError says why not."""
    folder = folder_of(name)
    if folder is not None:
        from lowmem.integrations.transformers.folder import load_folder

        with warnings_as_notes():
            return load_folder(folder)
    variant, factory = _parts(name)
    try:
        return build(variant, factory, seed=seed, rank=rank)
    except (ValueError, KeyboardInterrupt):
        raise
    except BaseException as reason:  # a failed allocation, or any error in methods that a user's module overrides
        if isinstance(reason, BrokenPipeError) and is_pipe_closed():
            raise
        raise ValueError(f"model={name!r}, rank={rank} cannot be built: {describe(reason)}") from reason


def placed(name: str, model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model called ``name`` on a device; one that stays on the CPU is not touched."""
    if device.type == "cpu":
        return model
    with user_code(f"model={name!r} cannot be moved to {device}"):
        return model.to(device)


def folder_of(name: str) -> Path | None:
    """Return the folder that a model's name is; None for names of another kind."""
    return Path(name) if name and ":" not in name and name not in VARIANTS and os.path.isdir(name) else None


def base_of(name: str) -> Path | None:
    """Return the folder or the GGUF file that a model's name is; None for names of another kind."""
    folder = folder_of(name)
    return Path(name) if folder is None and os.path.isfile(name) and starts_with(Path(name), MAGIC) else folder


def recipe_of(name: str, rank: int | None = None) -> tuple[Callable[[], nn.Module], tuple[Technique, ...]]:
    """Return the factory of the dense model called ``name``, and the techniques that make it of that."""
    variant, factory = _parts(name)
    return factory, techniques_of(variant, rank)


def _parts(name: str) -> tuple[str, Callable[[], nn.Module]]:
    looks_like_path = os.path.basename(name) != name or os.path.splitext(name)[1] != ""
    if ":" not in name and looks_like_path:
        found = "is a file" if os.path.isfile(name) else "is no folder"
        raise ValueError(f"model={name!r} {found}: name a variant, a folder of transformers, or module:factory")
    target, at, variant = name.partition("@") if ":" in name else ("", "@", name)
    return variant if at else "bignet", model_factory(target) if target else BigNet


def model_factory(target: str) -> Callable[[], nn.Module]:
    """Return the factory called ``module:factory``; it is imported from the working directory, too."""
    factory = _callable(target, "model")

    def checked() -> nn.Module:
        with user_code(f"model={target!r}: calling it failed"):
            model = factory()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={target!r}: it returned a {type(model).__name__}, not a torch.nn.Module")
        return model

    return checked


def batch_of(target: str) -> Any:
    """Return the example batch that the callable ``module:function`` returns."""
    if ":" not in target:
        raise ValueError(f"inputs={target!r} must be module:function, as my_models:batch")
    function = _callable(target, "inputs")
    with user_code(f"inputs={target!r}: calling it failed"):
        batch = function()
    if not isinstance(batch, Tensor | tuple | list | Mapping):
        raise ValueError(
            f"inputs={target!r}: it returned a {type(batch).__name__}; it must return a Tensor, a tuple or list of "
            "the model's arguments, or a mapping of its keyword arguments"
        )
    return batch


def _callable(target: str, option: str) -> Callable[[], Any]:
    what = "a model" if option == "model" else "a batch"
    module_name, _, attribute = target.partition(":")
    with suppress(FileNotFoundError):  # the working directory may have been removed
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # as python -m does, since models are often files in it
    with user_code(f"{option}={target!r}: cannot import {module_name!r}"):
        factory: Any = import_module(module_name)
    for part in attribute.split("."):
        with user_code(f"{option}={target!r}: looking up {attribute!r} failed"):
            factory = getattr(factory, part, None)
        if factory is None:
            raise ValueError(f"{option}={target!r}: {module_name!r} has no {attribute!r}")
    if not callable(factory):
        raise ValueError(f"{option}={target!r}: it is a {type(factory).__name__}, not a callable that returns {what}")
    return factory  # type: ignore[no-any-return]


@contextmanager
def user_code(failure: str, remedy: Callable[[BaseException], str] = lambda reason: "") -> Iterator[None]:
    """Turn any exception of the block, SystemExit too, into a ValueError with the text ``failure`` and a remedy.

    KeyboardInterrupt and a BrokenPipeError from printing pass. The block may close or replace stdout and stderr.
    """
    try:
        with preserve_streams():
            yield
    except BaseException as reason:
        is_printing = isinstance(reason, BrokenPipeError) and is_pipe_closed()
        if isinstance(reason, KeyboardInterrupt) or is_printing:
            raise
        raise ValueError(f"{failure}: {describe(reason)}{remedy(reason)}") from reason


_CHECK = "check the input's shape and dtype"
# What errors say of calls with other inputs than the model takes -> what to do, in commands that make the input.
_REMEDIES = {
    r"'indices'|for index\b|index tensor|used as indices": "it takes ids: --input-dtype int64 --input-shape N",
    r"index out of range": "it takes fewer ids, or a smaller input: --input-shape N",
    r"positional argument": "commands call it with one tensor, its first argument: make a module that passes it on",
}


def _remedy(given: bool, reason: BaseException) -> str:
    """Return what to do about an error of a model with the user's own input, or one that ``make_input`` made."""
    known = {} if given else _REMEDIES
    found = (told for pattern, told in known.items() if re.search(pattern, message_of(reason)))
    return f"; {next(found, _CHECK)}"


def run_model(name: str, run: Callable[[], Result], *, given: bool = False) -> Result:
    """Return ``run()``, a call of the user's model; any failure becomes a ValueError about the input.

    ``given`` tells that the input is the user's own, which no options describe.
    """
    with user_code(f"model={name!r} cannot take this input", partial(_remedy, given)):
        return run()


def tensor_of(name: str, command: str, run: Callable[[], Any], *, given: bool = False) -> Tensor:
    """Return ``run()``, a call of the user's model, which must return a tensor for the command; as ``run_model``."""
    output = run_model(name, run, given=given)
    if not isinstance(output, Tensor):
        found = type(output).__name__
        raise ValueError(f"model={name!r} returns a {found}; {command} takes models that return a tensor")
    return output


def plan_model(name: str, run: Callable[[], Plan], *, given: bool = False) -> Plan:
    """Return ``run()``, which plans the user's model; its own errors pass, any other becomes a ValueError."""
    with user_code(f"model={name!r} cannot be planned", partial(_remedy, given)):
        try:
            return run()
        except ValueError as reason:
            error = reason
    raise error
