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
from lowmem.errors import truncated_error_line
from lowmem.io.filesystem import read_text_and_sha256
from lowmem.tools.arguments import (
    add_device_argument,
    add_json_and_markdown_arguments,
    add_random_input_arguments,
    make_random_or_zero_input,
    parse_nonempty_path,
    parse_nonnegative_float,
    select_local_rank_device,
)
from lowmem.tools.hub_arguments import add_revision_argument, check_revision_applicable, fetch_named_model
from lowmem.tools.named_models import (
    build_or_load_named_model,
    call_and_check_tensor,
    model_folder_or_none,
    move_to_device,
)
from lowmem.tools.output import (
    escaped_and_truncated,
    finite_or_none,
    print_json,
    print_table,
    progress_display,
    warnings_printed_as_notes,
)
from lowmem.variants import VARIANTS

MAX_LISTED_LAYERS = 20
"""Layers that a table lists; JSON has all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a base and at least one other model: VARIANT, module:factory, module:factory@VARIANT, or with --text "
        "Hugging Face folders or names on the Hub (default: bignet and every other variant)",
    )
    add_revision_argument(parser)
    add_random_input_arguments(parser)
    parser.add_argument(
        "--tolerance",
        type=parse_nonnegative_float,
        metavar="T",
        help="exit with 1 if a largest difference (with --text a divergence, or 1 - cosine) is above T",
    )
    parser.add_argument(
        "--text",
        type=parse_nonempty_path,
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
    add_json_and_markdown_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    device = select_local_rank_device(arguments.device)
    if arguments.text is not None:
        return _run_text_comparison(arguments, device)
    if arguments.revision is not None:
        raise ValueError("--revision applies to names on the Hub, and only --text takes these: add --text FILE")
    if arguments.layers:
        raise ValueError("--layers needs a text: add --text FILE")
    base, *others = arguments.models or VARIANTS
    if not others:
        raise ValueError(f"models={base!r} is only a base: name at least one other model to compare with it")
    x = make_random_or_zero_input(arguments).to(device)
    expected = _build_model_and_run(base, x, arguments.seed)
    differences = {}
    for other in others:
        output = _build_model_and_run(other, x, arguments.seed)
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
                "max_difference": finite_or_none(difference.max),
                "mean_difference": finite_or_none(difference.mean),
                "relative_error": finite_or_none(difference.relative),
            }
            for other, difference in differences.items()
        ]
        print_json(rows)
    elif arguments.markdown:
        print_table(
            [f"Compared with {base}", "Max difference", "Mean difference", "Relative error"],
            [[other, f"{d.max:.4f}", f"{d.mean:.4f}", f"{d.relative:.2g}"] for other, d in differences.items()],
            markdown=True,
        )
    else:
        for other, difference in differences.items():
            print(f"Comparing {escaped_and_truncated(base)} and {escaped_and_truncated(other)}")
            print(f" - Max difference: {difference.max:.4f}")
            print(f" - Mean difference: {difference.mean:.4f}")
            print(f" - Relative error: {difference.relative:.3g}\n")
    return _print_failures_and_get_exit_code(
        arguments.tolerance,
        ((d.max, f"{other} differs from {base} by {d.max:.4g}") for other, d in differences.items()),
    )


def _print_failures_and_get_exit_code(
    tolerance: float | None, differences_and_texts: Iterable[tuple[float, str]]
) -> int:
    """Return the exit code; print the text of each difference that is above the tolerance, or not finite."""
    limit = math.inf if tolerance is None else tolerance
    failed = 0
    for difference, text in differences_and_texts:
        if not (math.isfinite(difference) and difference <= limit):
            why = f"above --tolerance {limit:g}" if math.isfinite(difference) else "which is not finite"
            print(truncated_error_line(f"lowmem compare: {text}, {why}"), file=sys.stderr)
            failed = 1
    return failed


def _run_text_comparison(arguments: argparse.Namespace, device: torch.device) -> int:
    """Compare language models, or encoders, in folders on a text."""
    if (arguments.batch, arguments.input_shape, arguments.input_dtype) != (1, (1024,), "float32"):
        raise ValueError(
            "--batch, --input-shape and --input-dtype describe a random input: with --text leave them out"
        )
    check_revision_applicable(arguments.revision, arguments.models)
    folders = [(name, model_folder_or_none(fetch_named_model(name, arguments.revision))) for name in arguments.models]
    for name, folder in folders:
        if folder is None:
            raise ValueError(
                f"model={name!r} is no folder: --text compares folders of transformers, or names on the Hub"
            )
    if len(folders) < 2:
        raise ValueError(f"models={arguments.models!r}: name a base and at least one other folder to compare with it")
    text, _ = read_text_and_sha256(arguments.text)
    from lowmem.integrations.transformers.text_comparison import compare_folders_on_text

    with (
        warnings_printed_as_notes(),
        progress_display("layers", TimeRemainingColumn, visible=arguments.layers) as update,
    ):
        scores: list[Any] = compare_folders_on_text(
            [folder for _, folder in folders if folder is not None],
            text,
            layers=arguments.layers,
            device=device,
            progress=lambda done, runs: update(completed=done, total=runs),
        )
    if arguments.json:
        print_json([_to_json_compatible(score) for score in scores])
    else:
        _print_score_tables(scores, arguments.markdown)
    embeds, losses_and_texts = hasattr(scores[0], "cosine"), []
    for score in scores[1:]:
        lost = 1 - score.cosine if embeds else score.divergence
        how = f"by 1 - cosine = {lost:.4g}" if embeds else f"by {lost:.4g} nats a token"
        losses_and_texts.append((lost, f"{score.model} diverges from {scores[0].model} {how}"))
    return _print_failures_and_get_exit_code(arguments.tolerance, losses_and_texts)


def _print_score_tables(scores: Sequence[Any], markdown: bool) -> None:
    """Print the table of the models, and of the layers that lose most, if they were asked for."""
    if hasattr(scores[0], "cosine"):
        columns = ["Model", "Cosine to the first", "Lowest", "Tokens a second"]
        rows = [
            [score.model, _text_with_interval(score.cosine, score.cosine_interval, 5), f"{score.lowest:.4f}"]
            for score in scores
        ]
    else:
        columns = ["Model", "Perplexity", "Over the first's", "KL to the first", "Same top token", "Tokens a second"]
        rows = [
            [
                score.model,
                f"{score.perplexity:.4f}",
                _text_with_interval(score.ratio, score.ratio_interval, 4),
                _text_with_interval(score.divergence, score.divergence_interval, 5),
                _text_with_interval(score.agreement, score.agreement_interval, 4),
            ]
            for score in scores
        ]
    rows = [[*row, f"{score.tokens_per_second:.1f}"] for row, score in zip(rows, scores, strict=True)]
    print_table(columns, rows, markdown=markdown)
    for score in scores:
        if score.layers:
            title = f"Layer of {score.model} alone"
            loses = "1 - cosine" if hasattr(score, "cosine") else "KL"
            cells = [[layer.path, f"{layer.loss:.3g}"] for layer in score.layers[:MAX_LISTED_LAYERS]]
            print_table([title, loses], cells, markdown=markdown)


def _text_with_interval(value: float, interval: tuple[float, float] | None, digits: int) -> str:
    """Return a number, and its 95% interval where there is one."""
    text = f"{value:.{digits}f}"
    return text if interval is None else f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _to_json_compatible(value: Any) -> Any:
    """Return a score as JSON has it."""
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, tuple):
        return [_to_json_compatible(item) for item in value]
    return {name: _to_json_compatible(item) for name, item in vars(value).items()} if is_dataclass(value) else value


def _build_model_and_run(model_name: str, x: Tensor, seed: int) -> Tensor:
    model = move_to_device(model_name, build_or_load_named_model(model_name, seed=seed), x.device)
    with torch.no_grad():
        return call_and_check_tensor(model_name, "compare", lambda: model.eval()(x.clone()))
