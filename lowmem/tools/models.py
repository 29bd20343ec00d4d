"""What the commands share: models by name, positive numbers, and tables.

A model is named ``VARIANT``, ``module:factory`` (any callable that returns an nn.Module), or
``module:factory@VARIANT`` (the techniques of a variant on that model).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lowmem.bignet import BigNet
from lowmem.variants import VARIANTS, build

__all__ = [
    "MIB",
    "add_input_arguments",
    "known_models",
    "make_input",
    "make_model",
    "positive_float",
    "positive_int",
    "print_table",
    "run_model",
    "seed",
    "shape",
]

MIB = 2**20
Result = TypeVar("Result")


def make_model(name: str, *, seed: int = 0, rank: int | None = None) -> nn.Module:
    """Build the model that ``name`` stands for, from weights that ``seed`` alone decides.

    Raises:
        ValueError: an unknown variant, a module that cannot be imported, an attribute that is missing or
            not callable, or a factory that fails or returns something else than an nn.Module.
    """
    target, _, variant = name.partition("@") if ":" in name else ("", "", name)
    factory = _factory(target) if target else BigNet
    try:
        return build(variant or "bignet", factory, seed=seed, rank=rank)
    except RuntimeError as reason:  # most often an allocation that the system refuses
        raise ValueError(f"model={name!r}, rank={rank} cannot be built: {_short(reason)}") from reason


def _factory(target: str) -> Callable[[], nn.Module]:
    module_name, _, attribute = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does: the user's model is most often a file right here
    try:
        factory = import_module(module_name)
    except (Exception, SystemExit) as reason:
        raise ValueError(f"model={target!r}: cannot import {module_name!r}: {_short(reason)}") from reason
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"model={target!r}: {module_name!r} has no {attribute!r}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ValueError(f"model={target!r}: it is a {type(factory).__name__}, not a callable that returns a model")

    def checked() -> nn.Module:
        try:
            model = factory()
        except (Exception, SystemExit) as reason:
            raise ValueError(f"model={target!r}: calling it failed: {_short(reason)}") from reason
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={target!r}: it returned a {type(model).__name__}, not a torch.nn.Module")
        return model

    return checked


def run_model(name: str, run: Callable[[], Result]) -> Result:
    """Return ``run()``, a call of the user's model, with its failures told as bad input, whatever they are."""
    try:
        return run()
    except Exception as reason:
        raise ValueError(
            f"model={name!r} cannot take this input: {_short(reason)}; check the input's shape and dtype"
        ) from reason


def _short(reason: BaseException) -> str:
    lines = str(reason).strip().splitlines() or [""]
    return f"{type(reason).__name__}: {lines[0]}"


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--batch``, ``--input-shape``, ``--input-dtype`` and ``--seed``."""
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="batch size (default 1)")
    parser.add_argument(
        "--input-shape",
        type=shape,
        default=(1024,),
        metavar="N[,N]...",
        help="shape of one input, without the batch (default 1024, BigNet's)",
    )
    parser.add_argument(
        "--input-dtype",
        choices=["float32", "float64", "float16", "bfloat16", "int64"],
        default="float32",
        help="dtype of the input; int64 gives zeros, which every vocabulary has (default float32)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights and input (default 0)")


def make_input(arguments: argparse.Namespace) -> Tensor:
    """Return a random input (batch, *input_shape) as the arguments ask for."""
    size = (arguments.batch, *arguments.input_shape)
    dtype = getattr(torch, arguments.input_dtype)
    try:
        if not dtype.is_floating_point:
            return torch.zeros(size, dtype=dtype)
        return torch.randn(size, generator=torch.Generator().manual_seed(arguments.seed)).to(dtype)
    except RuntimeError as reason:
        raise ValueError(f"an input of shape {size} cannot be made: {_short(reason)}") from reason


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number")
    return value


def seed(text: str) -> int:
    """Parse a seed that every generator takes."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer from 0 to 2**63 - 1")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    """Parse ``3,224,224``."""
    return tuple(positive_int(part) for part in text.split(","))


def print_table(columns: list[str], rows: list[list[str]], *, markdown: bool = False) -> None:
    """Print a table to stdout: the first column to the left, the others to the right."""
    if markdown:
        rule = [":--"] + ["--:"] * (len(columns) - 1)
        for row in [columns, rule, *rows]:
            print("| " + " | ".join(row) + " |")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column.replace(" ", "\n"), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))  # a name may hold what rich reads as markup
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console.width = 1000
    console.print(table)


def known_models(names: list[str]) -> list[str]:
    """Return the names, or every variant where there are none."""
    return names or list(VARIANTS)
