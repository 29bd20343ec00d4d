"""``--compute int8`` of commands: linear layers round their inputs to 8 bits and multiply integers."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import nn

from lowmem.nn.linear import QuantizedLinear

COMPUTE = {"int8": torch.int8}
_COST = (
    "rounds inputs of linear layers to 8 bits, which changes their outputs by 0.65% to 0.9%, and by 8% beside an "
    "input a hundred times as large; the KL divergence of SmolLM2 in 4 bits rises from .178 to .192"
)


def add_compute_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--compute``."""
    parser.add_argument(
        "--compute",
        choices=list(COMPUTE),
        help="how linear layers multiply: int8 rounds their inputs to 8 bits, which is faster for prompts and "
        "batches on most processors (default: in the input's dtype)",
    )


def print_compute_cost(command: str, compute: str) -> None:
    """Print on stderr what ``--compute`` costs."""
    print(f"lowmem {command}: --compute {compute} {_COST}", file=sys.stderr)


def set_compute_dtype(model: nn.Module, compute: str) -> None:
    """Let the linear layers of a model that store 4 or 8 bits compute as ``--compute`` says; not its output layer,
    whose inputs ``FourBit`` does not round, either.

    Raises:
        ValueError: there is no such layer.
    """
    find_output: Any = getattr(model, "get_output_embeddings", None)
    output = None if find_output is None else find_output()
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear) and layer is not output]
    if not layers:
        raise ValueError(
            f"--compute {compute} applies to linear layers in 4 or 8 bits, and the model has none: quantize it "
            "before, `lowmem quantize IN OUT`, or leave it out"
        )
    for layer in layers:
        layer.compute_dtype = COMPUTE[compute]
