"""``lowmem compare``: compares the outputs of models with those of a base, on one input or a text.

Outputs that are not finite fail the comparison, whatever the tolerance.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lowmem import measure
from lowmem.errors import one_line, refusal
from lowmem.io.atomic import open_regular, read_errors
from lowmem.tools.models import (
    add_input_arguments,
    file_path,
    folder_of,
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
        help="a base and at least one other: VARIANT, module:factory, module:factory@VARIANT, or with --text folders "
        "(default: bignet and every other variant)",
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--tolerance",
        type=number,
        metavar="T",
        help="exit with 1 when any largest difference is above T; 0 asks for equal outputs",
    )
    parser.add_argument(
        "--text",
        type=file_path,
        metavar="FILE",
        help="of folders of language models: perplexity, divergence from the first, and speed on this text; "
        "--tolerance is then the most divergence",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.text is not None:
        return _compare_text(arguments)
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


def _compare_text(arguments: argparse.Namespace) -> int:
    """Compare language models in folders on a text.

    Raises:
        ValueError: a model that is no folder, fewer than two, or a text that is too short.
        FileError: the text is no UTF-8, or a folder cannot be compared.
        ImportError: transformers is missing, or too old.
    """
    folders = [(name, folder_of(name)) for name in arguments.models]
    for name, folder in folders:
        if folder is None:
            raise ValueError(f"model={name!r} is no folder: --text compares folders of Hugging Face transformers")
    if len(folders) < 2:
        raise ValueError(f"models={arguments.models!r}: name a base and at least one other folder to compare with it")
    text = _text(arguments.text)
    from lowmem.integrations.transformers.language import compare_text

    scores = compare_text([folder for _, folder in folders if folder is not None], text)
    if arguments.json:
        print_json(
            [{name: _finite(v) if isinstance(v, float) else v for name, v in asdict(one).items()} for one in scores]
        )
    else:
        print_table(
            ["Model", "Perplexity", "KL to the first", "Tokens a second"],
            [
                [one.model, f"{one.perplexity:.4f}", f"{one.divergence:.5f}", f"{one.tokens_per_second:.1f}"]
                for one in scores
            ],
            markdown=arguments.markdown,
        )
    most = math.inf if arguments.tolerance is None else arguments.tolerance
    failed = 0
    for one in scores[1:]:
        if math.isfinite(one.divergence) and one.divergence <= most:
            continue
        why = f"above --tolerance {most:g}" if math.isfinite(one.divergence) else "which is not finite"
        told = (
            f"lowmem compare: {one.model} diverges from {scores[0].model} by {one.divergence:.4g} nats a token, {why}"
        )
        print(one_line(told), file=sys.stderr)
        failed = 1
    return failed


def _text(path: Path) -> str:
    with open_regular(path) as file, read_errors(path):
        content = file.read()
    try:
        return content.decode()
    except UnicodeDecodeError as reason:
        raise refusal(path, f"it is no UTF-8 text, from byte {reason.start}; name a text file") from None


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
