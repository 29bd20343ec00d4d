"""Shared by the commands: building models by name, calling users' code, and parsing arguments.

A model is named ``VARIANT``, ``module:factory`` (any callable that returns an nn.Module),
``module:factory@VARIANT`` (the techniques of a variant on that model), or by a folder of Hugging Face transformers.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowmem.bignet import BigNet
from lowmem.errors import describe, printable
from lowmem.nn.adapter import LoRA
from lowmem.nn.budget import Budget
from lowmem.nn.eightbit import EightBit
from lowmem.nn.fourbit import FourBit
from lowmem.nn.half import Half
from lowmem.tools.output import is_pipe_closed, preserve_streams
from lowmem.transforms.plan import Plan, bytes_of
from lowmem.transforms.registry import Technique
from lowmem.variants import VARIANTS, build, techniques_of

__all__ = [
    "MIB",
    "add_input_arguments",
    "batch_of",
    "check_links",
    "file_path",
    "folder_of",
    "known_models",
    "make_input",
    "make_model",
    "model_factory",
    "number",
    "plan_model",
    "positive_float",
    "positive_int",
    "recipe_of",
    "run_model",
    "same_file",
    "seed",
    "shape",
    "size",
    "techniques",
    "user_code",
]

MIB = 2**20
Result = TypeVar("Result")


def make_model(name: str, *, seed: int = 0, rank: int | None = None) -> nn.Module:
    """Build the model called ``name``, with weights that depend only on ``seed``.

    Raises:
        ValueError: an unknown variant, a module that cannot be imported, an attribute that is missing or not
            callable, or a factory that fails or returns no nn.Module; or a folder that cannot be loaded.
        ImportError: a folder, without transformers.
    """
    folder = folder_of(name)
    if folder is not None:
        from lowmem.integrations.transformers.folder import load_folder

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


def folder_of(name: str) -> Path | None:
    """Return the folder that a model's name is; None for names of another kind."""
    return Path(name) if name and ":" not in name and name not in VARIANTS and os.path.isdir(name) else None


def recipe_of(name: str, rank: int | None = None) -> tuple[Callable[[], nn.Module], tuple[Technique, ...]]:
    """Return the factory of the dense model called ``name``, and the techniques that make it of that.

    Raises:
        ValueError: as ``make_model``, but for what the factory raises when it is called.
    """
    variant, factory = _parts(name)
    return factory, techniques_of(variant, rank)


def _parts(name: str) -> tuple[str, Callable[[], nn.Module]]:
    looks_like_path = os.path.basename(name) != name or os.path.splitext(name)[1] != ""
    if ":" not in name and looks_like_path:
        found = "is a file, which lowmem info reads" if os.path.isfile(name) else "is no folder"
        raise ValueError(f"model={name!r} {found}: name a variant, a folder of transformers, or module:factory")
    target, at, variant = name.partition("@") if ":" in name else ("", "@", name)
    return variant if at else "bignet", model_factory(target) if target else BigNet


def model_factory(target: str) -> Callable[[], nn.Module]:
    """Return the factory called ``module:factory``; it is imported from the working directory, too.

    Raises:
        ValueError: a module that cannot be imported, or an attribute that is missing or not callable. The factory
            raises one if it fails, or returns no nn.Module.
    """
    factory = _callable(target, "model")

    def checked() -> nn.Module:
        with user_code(f"model={target!r}: calling it failed"):
            model = factory()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={target!r}: it returned a {type(model).__name__}, not a torch.nn.Module")
        return model

    return checked


def batch_of(target: str) -> Any:
    """Return the example batch that the callable ``module:function`` returns.

    Raises:
        ValueError: as ``model_factory``; or it fails, or returns nothing that a model can be called with.
    """
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
def user_code(failure: str, remedy: str = "") -> Iterator[None]:
    """Turn any exception of the block, SystemExit too, into a ValueError with the text ``failure``.

    Exceptions are KeyboardInterrupt, and a BrokenPipeError from printing. The block may close or replace stdout and
    stderr.
    """
    try:
        with preserve_streams():
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as reason:
        if isinstance(reason, BrokenPipeError) and is_pipe_closed():
            raise
        raise ValueError(f"{failure}: {describe(reason)}{remedy}") from reason


def run_model(name: str, run: Callable[[], Result]) -> Result:
    """Return ``run()``, a call of the user's model; any failure becomes a ValueError about the input."""
    with user_code(f"model={name!r} cannot take this input", "; check the input's shape and dtype"):
        return run()


def plan_model(name: str, run: Callable[[], Plan]) -> Plan:
    """Return ``run()``, which plans the user's model; its own errors pass, any other becomes a ValueError."""
    with user_code(f"model={name!r} cannot be planned", "; check the input's shape and dtype"):
        try:
            return run()
        except ValueError as reason:
            error = reason
    raise error


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--batch``, ``--input-shape``, ``--input-dtype`` and ``--seed``."""
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="batch size (default 1)")
    parser.add_argument(
        "--input-shape",
        type=shape,
        default=(1024,),
        metavar="N[,N]...",
        help="shape of one input, without the batch dimension (default 1024, for BigNet)",
    )
    parser.add_argument(
        "--input-dtype",
        choices=["float32", "float64", "float16", "bfloat16", "int64"],
        default="float32",
        help="dtype of the input; int64 gives zeros, which are valid tokens (default float32)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of weights and input (default 0)")


def make_input(arguments: argparse.Namespace) -> Tensor:
    """Return an input (batch, *input_shape) for the arguments: normal values, or zeros for int64."""
    size = (arguments.batch, *arguments.input_shape)
    dtype = getattr(torch, arguments.input_dtype)
    try:
        if not dtype.is_floating_point:
            return torch.zeros(size, dtype=dtype)
        return torch.randn(size, generator=torch.Generator().manual_seed(arguments.seed)).to(dtype)
    except RuntimeError as reason:
        raise ValueError(f"an input of shape {size} cannot be made: {describe(reason)}; make it smaller") from reason


def positive_int(text: str) -> int:
    """Parse an integer from 1 to 2**63 - 1."""
    return _integer(text, 1, f"{_shown(text)} must be a positive integer below 2**63")


def seed(text: str) -> int:
    """Parse an integer from 0 to 2**63 - 1."""
    return _integer(text, 0, f"{_shown(text)} must be an integer from 0 to 2**63 - 1")


def _integer(text: str, least: int, refusal: str) -> int:
    digits = text.lstrip("0") or text[:1]
    if not text.isascii() or not text.isdigit() or len(digits) > 19 or not least <= int(digits) < 2**63:
        raise argparse.ArgumentTypeError(refusal)
    return int(digits)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return _number(text, lambda value: value > 0, "must be a positive number")


def number(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _number(text, lambda value: value >= 0, "must be a number of at least 0")


def _number(text: str, accepted: Callable[[float], bool], refusal: str) -> float:
    try:
        value = float(text if text.isascii() and not set(text) & set("_ \t\n\r\v\f") else "nan")
    except ValueError:
        value = float("nan")
    if not accepted(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{_shown(text)} {refusal}")
    return value


def shape(text: str) -> tuple[int, ...]:
    """Parse ``3,224,224``."""
    return tuple(positive_int(part) for part in text.split(","))


def size(text: str) -> int:
    """Parse a number of bytes with its unit, as 500MiB."""
    try:
        return bytes_of(text)
    except ValueError as reason:
        raise argparse.ArgumentTypeError(str(reason)) from reason


def techniques(text: str) -> tuple[Technique, ...]:
    """Parse ``FourBit:nf4:64:double,LoRA:16``: techniques, each with the first of its arguments."""
    try:
        return tuple(map(_technique, text.split(",")))
    except (ValueError, argparse.ArgumentTypeError) as reason:
        raise argparse.ArgumentTypeError(f"{_shown(text)}: {reason}") from reason


_ARGUMENTS: dict[type[Technique], tuple[Callable[[str], Any], ...]] = {
    Half: (lambda text: getattr(torch, text, text),),
    EightBit: (positive_int, str),
    FourBit: (str, positive_int, str),
    Budget: (positive_float,),
    LoRA: (positive_int,),
}


def _technique(text: str) -> Technique:
    name, *given = text.split(":")
    kind = next((kind for kind in _ARGUMENTS if kind.__name__ == name), None)
    if kind is None:
        raise ValueError(f"{_shown(name)} is no technique: choose from {', '.join(t.__name__ for t in _ARGUMENTS)}")
    parsers = _ARGUMENTS[kind]
    if len(given) > len(parsers):
        names = ":".join(field.name for field in fields(kind)[: len(parsers)])
        raise ValueError(f"{_shown(text)} has more than {name}:{names}")
    return kind(*(parse(value) for parse, value in zip(parsers, given, strict=False)))


def file_path(text: str) -> Path:
    """Parse a path that is not empty, which would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("'' must be the name of a file")
    return Path(text)


def check_links(path: Path) -> None:
    """Raise an OSError that names ``path`` if its symbolic links form a cycle."""
    try:
        path.stat()
    except OSError as reason:
        if reason.errno == errno.ELOOP:
            raise OSError(f"cannot open {str(path)!r}: {reason.strerror}; name a file") from reason


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file that exists, also through a link."""
    return one.exists() and other.exists() and one.samefile(other)


def _shown(text: str) -> str:
    return printable(repr(text), 80)


def known_models(names: list[str]) -> list[str]:
    """Return ``names``, or all variants if it is empty."""
    return names or list(VARIANTS)
