"""``lowmem compare``: compares the outputs of models with those of a base, on one input.

Outputs that are not finite fail the comparison, whatever the tolerance.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor

from lowmem import measure
from lowmem.errors import one_line
from lowmem.tools.models import (
    add_input_arguments,
    known_models,
    make_input,
    make_model,
    number,
    run_model,
)
from lowmem.tools.output import print_json, print_table, shown

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a base and at least one other: VARIANT, module:factory, or module:factory@VARIANT "
        "(default: bignet and every other variant)",
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--tolerance",
        type=number,
        metavar="T",
        help="exit with 1 when any largest difference is above T; 0 asks for equal outputs",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    base, *others = known_models(arguments.models)
    if not others:
        raise ValueError(f"models={base!r} is a base alone: name at least one other model to compare with it")
    x = make_input(arguments)
    expected = _output(base, x, arguments.seed)
    differences = {}
    for other in others:
        output = _output(other, x, arguments.seed)
        if output.shape != expected.shape:
            raise ValueError(
                f"model={other!r} returns shape {tuple(output.shape)}, {base!r} {tuple(expected.shape)}: "
                "only outputs of one shape can be compared"
            )
        differences[other] = measure.difference(expected, output)
    if arguments.json:
        rows = [
            {
                "base": base,
                "other": other,
                "max_difference": _finite(found.max),
                "mean_difference": _finite(found.mean),
                "relative_error": _finite(found.relative),
            }
            for other, found in differences.items()
        ]
        print_json(rows)
    elif arguments.markdown:
        print_table(
            [f"Compared with {base}", "Max difference", "Mean difference", "Relative error"],
            [[other, f"{d.max:.4f}", f"{d.mean:.4f}", f"{d.relative:.2g}"] for other, d in differences.items()],
            markdown=True,
        )
    else:
        for other, found in differences.items():
            print(f"Comparing {shown(base)} and {shown(other)}")
            print(f" - Max difference: {found.max:.4f}")
            print(f" - Mean difference: {found.mean:.4f}")
            print(f" - Relative error: {found.relative:.3g}\n")
    most = math.inf if arguments.tolerance is None else arguments.tolerance
    failed = 0
    for other, found in differences.items():
        if math.isfinite(found.max) and found.max <= most:
            continue
        why = f"above --tolerance {most:g}" if math.isfinite(found.max) else "which is not finite"
        print(one_line(f"lowmem compare: {other} differs from {base} by {found.max:.4g}, {why}"), file=sys.stderr)
        failed = 1
    return failed


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _output(name: str, x: Tensor, seed: int) -> Tensor:
    model = make_model(name, seed=seed)
    with torch.no_grad():
        output = run_model(name, lambda: model.eval()(x))
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model={name!r} returns a {type(output).__name__}; compare takes models that return a tensor"
        )
    return output
