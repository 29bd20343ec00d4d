"""``lowmem compare``: compares the outputs of models with those of a base, on one input or a text.

Outputs that are not finite fail the comparison, whatever the tolerance.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import TimeRemainingColumn
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
from lowmem.tools.output import print_json, print_table, progress, shown, uncut_column

__all__ = ["add_arguments", "run"]

LISTED = 20
"""Layers that a table lists; JSON has all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a base and at least one other model: VARIANT, module:factory, module:factory@VARIANT, or with --text "
        "Hugging Face folders (default: bignet and every other variant)",
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--tolerance",
        type=number,
        metavar="T",
        help="exit with 1 if a largest difference (with --text a divergence, or 1 - cosine) is above T",
    )
    parser.add_argument(
        "--text",
        type=file_path,
        metavar="FILE",
        help="compare folders with the first one on this text: perplexity, divergence and agreement of language "
        "models, the cosine of encoders' embeddings, and speed",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="with --text: list the layers that lose most; runs the first model once per stored layer",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.text is not None:
        return _compare_text(arguments)
    if arguments.layers:
        raise ValueError("--layers needs a text: add --text FILE")
    base, *others = known_models(arguments.models)
    if not others:
        raise ValueError(f"models={base!r} is only a base: name at least one other model to compare with it")
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
    """Compare language models, or encoders, in folders on a text.

    Raises:
        ValueError: a model that is no folder, fewer than two, a text that is too short, or options of made inputs.
        FileError: the text is no UTF-8, or a folder cannot be compared.
        ImportError: transformers is missing, or too old.
    """
    if (arguments.batch, arguments.input_shape, arguments.input_dtype) != (1, (1024,), "float32"):
        raise ValueError(
            "--batch, --input-shape and --input-dtype describe a random input: with --text leave them out"
        )
    folders = [(name, folder_of(name)) for name in arguments.models]
    for name, folder in folders:
        if folder is None:
            raise ValueError(f"model={name!r} is no folder: --text compares folders of Hugging Face transformers")
    if len(folders) < 2:
        raise ValueError(f"models={arguments.models!r}: name a base and at least one other folder to compare with it")
    text = _text(arguments.text)
    from lowmem.integrations.transformers.comparing import compare_text

    with progress(TimeRemainingColumn(table_column=uncut_column())) as bar:
        task = bar.add_task("layers", visible=arguments.layers)
        scores: list[Any] = compare_text(
            [folder for _, folder in folders if folder is not None],
            text,
            layers=arguments.layers,
            progress=lambda done, runs: bar.update(task, completed=done, total=runs),
        )
    if arguments.json:
        print_json([_json_of(one) for one in scores])
    else:
        _print_scores(scores, arguments.markdown)
    most = math.inf if arguments.tolerance is None else arguments.tolerance
    failed = 0
    for one in scores[1:]:
        embeds = hasattr(one, "cosine")
        lost = 1 - one.cosine if embeds else one.divergence
        if math.isfinite(lost) and lost <= most:
            continue
        how = f"by 1 - cosine = {lost:.4g}" if embeds else f"by {lost:.4g} nats a token"
        why = f"above --tolerance {most:g}" if math.isfinite(lost) else "which is not finite"
        print(one_line(f"lowmem compare: {one.model} diverges from {scores[0].model} {how}, {why}"), file=sys.stderr)
        failed = 1
    return failed


def _print_scores(scores: Sequence[Any], markdown: bool) -> None:
    """Print the table of the models, and of the layers that lose most, if they were asked for."""
    if hasattr(scores[0], "cosine"):
        columns = ["Model", "Cosine to the first", "Lowest", "Tokens a second"]
        rows = [
            [one.model, _with_interval(one.cosine, one.cosine_interval, 5), f"{one.lowest:.4f}"] for one in scores
        ]
    else:
        columns = ["Model", "Perplexity", "Over the first's", "KL to the first", "Same top token", "Tokens a second"]
        rows = [
            [
                one.model,
                f"{one.perplexity:.4f}",
                _with_interval(one.ratio, one.ratio_interval, 4),
                _with_interval(one.divergence, one.divergence_interval, 5),
                _with_interval(one.agreement, one.agreement_interval, 4),
            ]
            for one in scores
        ]
    rows = [[*row, f"{one.tokens_per_second:.1f}"] for row, one in zip(rows, scores, strict=True)]
    print_table(columns, rows, markdown=markdown)
    for one in scores:
        if one.layers:
            title = f"Layer of {one.model} alone"
            loses = "1 - cosine" if hasattr(one, "cosine") else "KL"
            cells = [[layer.path, f"{layer.loss:.3g}"] for layer in one.layers[:LISTED]]
            print_table([title, loses], cells, markdown=markdown)


def _with_interval(value: float, ends: tuple[float, float] | None, digits: int) -> str:
    """Return a number, and its 95% interval where there is one."""
    text = f"{value:.{digits}f}"
    return text if ends is None else f"{text} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _json_of(value: Any) -> Any:
    """Return a score as JSON has it, which knows no number that is not finite."""
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, tuple):
        return [_json_of(one) for one in value]
    return {name: _json_of(one) for name, one in vars(value).items()} if is_dataclass(value) else value


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
        output = run_model(name, lambda: model.eval()(x.clone()))
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model={name!r} returns a {type(output).__name__}; compare takes models that return a tensor"
        )
    return output
