"""Arguments that several commands have: their declarations, and parsers of their values."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import error_type_and_first_line, printable_line
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, LoRA
from lowmem.transforms.memory_plan import parse_byte_count
from lowmem.transforms.module_registry import Technique

DEVICES = ("cpu", "cuda")
DEFAULT_RANK = 16  # of adapters of language models, unless another is given
THREADS_EPILOG = "OMP_NUM_THREADS=N in the environment sets the number of threads."
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def long_options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser, as ``--epochs``."""
    return set(re.findall(r"--[a-z][a-z0-9-]+", parser.format_help()))


def nearest_option_or_none(word: str, options: Iterable[str]) -> str | None:
    """Return the option that a misspelled one was meant to be, by its letters."""
    return next(iter(difflib.get_close_matches(word, sorted(options), 1)), None)


def add_random_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--batch``, ``--input-shape``, ``--input-dtype`` and ``--seed``."""
    parser.add_argument("--batch", type=parse_positive_int, default=1, metavar="N", help="batch size (default 1)")
    parser.add_argument(
        "--input-shape",
        type=parse_shape,
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
    parser.add_argument(
        "--seed", type=parse_nonnegative_int, default=0, metavar="N", help="seed of weights and input (default 0)"
    )


def add_json_and_markdown_arguments(parser: argparse.ArgumentParser, json_help: str = "print JSON") -> None:
    """Add ``--json``, with its help, and ``--markdown``, which exclude each other."""
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help=json_help)
    output.add_argument("--markdown", action="store_true", help="print a Markdown table")


def add_verbose_argument(parser: argparse.ArgumentParser, listed_items: str) -> None:
    """Add ``--verbose``, which prints a table of ``listed_items`` above the summary."""
    parser.add_argument("--verbose", action="store_true", help=f"list all {listed_items}, not only the summary")


def add_device_argument(parser: argparse.ArgumentParser, description: str) -> None:
    """Add ``--device``, with what it is for its help."""
    parser.add_argument("--device", choices=DEVICES, default="cpu", help=f"{description} (default cpu)")


def add_for_llama_cpp_argument(container: argparse._ActionsContainer) -> None:
    """Add ``--for``, which chooses how a model is stored."""
    container.add_argument(
        "--for",
        choices=["llama.cpp"],
        help="store the model in what GGUF holds exactly: layers in iq4_nl, embeddings and output layer in q8_0; a "
        "model that lowmem export does not write is refused",
    )


def option_string(attribute: str) -> str:
    """Return the option that sets an attribute of the parsed arguments."""
    return f"--{attribute.replace('_', '-')}"


def make_random_or_zero_input(arguments: argparse.Namespace) -> Tensor:
    """Return an input (batch, *input_shape) for the arguments: normal values, or zeros for int64."""
    size = (arguments.batch, *arguments.input_shape)
    dtype = getattr(torch, arguments.input_dtype)
    try:
        if not dtype.is_floating_point:
            return torch.zeros(size, dtype=dtype, device="cpu")
        generator = torch.Generator("cpu").manual_seed(arguments.seed)
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    except RuntimeError as reason:
        raise ValueError(
            f"an input of shape {size} cannot be made: {error_type_and_first_line(reason)}; make it smaller"
        ) from reason


def parse_positive_int(text: str) -> int:
    """Parse an integer from 1 to 2**63 - 1."""
    return _parse_integer(text, 1, f"{_truncated_printable_repr(text)} must be a positive integer below 2**63")


def parse_nonnegative_int(text: str) -> int:
    """Parse an integer from 0 to 2**63 - 1."""
    return _parse_integer(text, 0, f"{_truncated_printable_repr(text)} must be an integer from 0 to 2**63 - 1")


def _parse_integer(text: str, minimum: int, error_message: str) -> int:
    digits = text.lstrip("0") or text[:1]
    if not text.isascii() or not text.isdigit() or len(digits) > 19 or not minimum <= int(digits) < 2**63:
        raise argparse.ArgumentTypeError(error_message)
    return int(digits)


def parse_positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return _parse_finite_float(text, lambda value: value > 0, "must be a positive number")


def parse_nonnegative_float(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _parse_finite_float(text, lambda value: value >= 0, "must be a number of at least 0")


def _parse_finite_float(text: str, is_valid: Callable[[float], bool], requirement: str) -> float:
    try:
        value = float(text if text.isascii() and not set(text) & set("_ \t\n\r\v\f") else "nan")
    except ValueError:
        value = float("nan")
    if not is_valid(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{_truncated_printable_repr(text)} {requirement}")
    return value


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse ``3,224,224``."""
    return tuple(parse_positive_int(part) for part in text.split(","))


def parse_byte_size(text: str) -> int:
    """Parse a number of bytes with its unit, as 500MiB."""
    try:
        return parse_byte_count(text)
    except ValueError as reason:
        raise argparse.ArgumentTypeError(str(reason)) from reason


def parse_techniques(text: str) -> tuple[Technique, ...]:
    """Parse ``FourBit:nf4:64:double,LoRA:16``: techniques, each with the first of its arguments."""
    try:
        return tuple(map(_parse_technique, text.split(",")))
    except (ValueError, argparse.ArgumentTypeError) as reason:
        raise argparse.ArgumentTypeError(f"{_truncated_printable_repr(text)}: {reason}") from reason


_TECHNIQUE_PARSERS: dict[type[Technique], tuple[Callable[[str], Any], ...]] = {
    Half: (lambda text: getattr(torch, text, text),),
    EightBit: (parse_positive_int, str),
    FourBit: (str, parse_positive_int, str),
    Budget: (parse_positive_float,),
    LoRA: (parse_positive_int,),
}


def _parse_technique(text: str) -> Technique:
    name, *values = text.split(":")
    kind = next((kind for kind in _TECHNIQUE_PARSERS if kind.__name__ == name), None)
    if kind is None:
        raise ValueError(
            f"{_truncated_printable_repr(name)} is no technique: choose from "
            f"{', '.join(t.__name__ for t in _TECHNIQUE_PARSERS)}"
        )
    parsers = _TECHNIQUE_PARSERS[kind]
    if len(values) > len(parsers):
        names = ":".join(field.name for field in fields(kind)[: len(parsers)])
        raise ValueError(f"{_truncated_printable_repr(text)} has more than {name}:{names}")
    return kind(*(parse(value) for parse, value in zip(parsers, values, strict=False)))


def parse_nonempty_path(text: str) -> Path:
    """Parse a path that is not empty, which would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("'' must be the name of a file")
    return Path(text)


def _truncated_printable_repr(text: str) -> str:
    return printable_line(repr(text), 80)


def select_local_rank_device(name: str) -> torch.device:
    """Return the device of a name; of ``cuda`` the GPU that torchrun means for this process, or the first one."""
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "finds no GPU that it can use" if built else "is built without CUDA"
        raise ValueError(
            f"--device={name}: torch {torch.__version__} {why}: leave --device out to use the CPU, or run "
            "python -c 'import torch; torch.cuda.init()', which says what is missing"
        )
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"--device={name}: process {number} of this machine has no GPU of its own, of {count}: start as many "
            f"processes as there are GPUs, with torchrun --nproc-per-node {count}"
        )
    torch.cuda.set_device(number)
    return torch.device(name, number)
