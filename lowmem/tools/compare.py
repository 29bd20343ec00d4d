"""``lowmem compare``: compares the outputs of models with those of a base, on one input or a text."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from rich.progress import TimeRemainingColumn
from torch import Tensor

from lowmem import measure
from lowmem.errors import one_line
from lowmem.io.atomic import read_text
from lowmem.tools.arguments import (
    add_device_argument,
    add_input_arguments,
    add_output_arguments,
    device_of,
    file_path,
    make_input,
    number,
)
from lowmem.tools.models import folder_of, make_model, placed, tensor_of
from lowmem.tools.output import finite, print_json, print_table, progress, shown, warnings_as_notes
from lowmem.variants import VARIANTS

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
    add_device_argument(parser, "where the models run")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    device = device_of(arguments.device)
    if arguments.text is not None:
        return _compare_text(arguments, device)
    if arguments.layers:
        raise ValueError("--layers needs a text: add --text FILE")
    base, *others = arguments.models or VARIANTS
    if not others:
        raise ValueError(f"models={base!r} is only a base: name at least one other model to compare with it")
    x = make_input(arguments).to(device)
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
                "max_difference": finite(found.max),
                "mean_difference": finite(found.mean),
                "relative_error": finite(found.relative),
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
    return _judge(
        arguments.tolerance,
        ((d.max, f"{other} differs from {base} by {d.max:.4g}") for other, d in differences.items()),
    )


def _judge(tolerance: float | None, differences: Iterable[tuple[float, str]]) -> int:
    """Return the exit code; print the text of each difference that is above the tolerance, or not finite."""
    most = math.inf if tolerance is None else tolerance
    failed = 0
    for difference, text in differences:
        if not (math.isfinite(difference) and difference <= most):
            why = f"above --tolerance {most:g}" if math.isfinite(difference) else "which is not finite"
            print(one_line(f"lowmem compare: {text}, {why}"), file=sys.stderr)
            failed = 1
    return failed


def _compare_text(arguments: argparse.Namespace, device: torch.device) -> int:
    """Compare language models, or encoders, in folders on a text."""
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
    text, _ = read_text(arguments.text)
    from lowmem.integrations.transformers.comparing import compare_text

    with warnings_as_notes(), progress("layers", TimeRemainingColumn, visible=arguments.layers) as update:
        scores: list[Any] = compare_text(
            [folder for _, folder in folders if folder is not None],
            text,
            layers=arguments.layers,
            device=device,
            progress=lambda done, runs: update(completed=done, total=runs),
        )
    if arguments.json:
        print_json([_json_of(one) for one in scores])
    else:
        _print_scores(scores, arguments.markdown)
    embeds, found = hasattr(scores[0], "cosine"), []
    for one in scores[1:]:
        lost = 1 - one.cosine if embeds else one.divergence
        how = f"by 1 - cosine = {lost:.4g}" if embeds else f"by {lost:.4g} nats a token"
        found.append((lost, f"{one.model} diverges from {scores[0].model} {how}"))
    return _judge(arguments.tolerance, found)


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
    """Return a score as JSON has it."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, tuple):
        return [_json_of(one) for one in value]
    return {name: _json_of(one) for name, one in vars(value).items()} if is_dataclass(value) else value


def _output(name: str, x: Tensor, seed: int) -> Tensor:
    model = placed(name, make_model(name, seed=seed), x.device)
    with torch.no_grad():
        return tensor_of(name, "compare", lambda: model.eval()(x.clone()))
