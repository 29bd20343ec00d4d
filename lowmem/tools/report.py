"""``lowmem report``: writes a page on the memory, speed and error of every variant of a model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import MofNCompleteColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowmem.errors import printable_line
from lowmem.io.filesystem import check_outside_inputs, check_writable, write_atomically
from lowmem.measure import difference, unchanged
from lowmem.tools import info
from lowmem.tools.arguments import (
    add_random_input_arguments,
    make_random_or_zero_input,
    parse_nonempty_path,
    parse_shape,
)
from lowmem.tools.named_models import build_or_load_named_model, call_or_raise_input_error
from lowmem.tools.output import print_saved_path_to_stderr, progress_display
from lowmem.transforms.bits_per_weight import techniques_as_code
from lowmem.variants import VARIANTS, variant_description
from lowmem.version import install_command

if TYPE_CHECKING:
    from lowmem.report.page import ReportPageData

BIGNET = "bignet"
# The name of a user's model without techniques
DENSE = "dense"
ENDINGS = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model", nargs="?", default=BIGNET, metavar="MODEL", help="your own model, as module:factory (default BigNet)"
    )
    parser.add_argument("target", type=parse_nonempty_path, metavar="OUT.html", help="the page to write")
    add_random_input_arguments(parser)
    parser.add_argument(
        "--batches",
        type=parse_shape,
        default=(1, 8, 32, 128),
        metavar="N[,N]...",
        help="batch sizes to time (default 1,8,32,128)",
    )
    parser.add_argument(
        "--run",
        type=parse_nonempty_path,
        dest="timed_run",
        metavar="FILE",
        help="read the latency of BigNet and of other libraries from a stored run of pytest-benchmark, instead of "
        "timing now",
    )
    parser.add_argument(
        "--verdict",
        type=parse_nonempty_path,
        dest="verdicts",
        action="append",
        default=[],
        metavar="FILE",
        help="show the verdict of a gate from its JSON file; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    check_chart_packages_installed("lowmem report")
    check_writable_html_path(arguments.target)
    for option, input_path in (("--run", arguments.timed_run), *(("--verdict", path) for path in arguments.verdicts)):
        check_outside_inputs(arguments.target, {option: input_path})
    _check_reportable_model(arguments)
    from lowmem.report.page import render_report_html
    from lowmem.testing.gate_verdicts import read_verdict

    verdicts = [read_verdict(path) for path in arguments.verdicts]
    is_user_model = arguments.model != BIGNET
    if arguments.timed_run is None:
        timings, timing_machine = None, dict[str, str]()
        timed = (
            "Measured for this page: forwards of the dense model and of a variant in turns, so that what loads the "
            "machine meanwhile slows both."
        )
    else:
        from lowmem.report.relative_speeds import read_relative_speeds_and_machine

        timings, timing_machine = read_relative_speeds_and_machine(arguments.timed_run)
        name = printable_line(arguments.timed_run.name)
        timed = f"Of the run {name}: the smallest time of each, beside the dense model's in the same run."
    batches = [
        make_random_or_zero_input(argparse.Namespace(**vars(arguments) | {"batch": n}))
        for n in sorted({*arguments.batches})
    ]
    measured = measure_variants(
        arguments.model,
        make_random_or_zero_input(arguments),
        seed=arguments.seed,
        timed_inputs=[] if timings is not None else batches,
        by_layer_group=is_user_model,
    )
    page = replace(
        measured,
        title=printable_line(arguments.model) if is_user_model else "BigNet in every variant",
        lead=_report_lead_text(arguments, measured, is_user_model),
        timings=measured.timings if timings is None else timings,
        timed=timed,
        timing_machine=timing_machine,
        verdicts=verdicts,
    )
    write_atomically(arguments.target, render_report_html(page).encode())
    print_saved_path_to_stderr(arguments.target)
    return 0


def check_chart_packages_installed(command: str) -> None:
    """Raise an ImportError with the remedy if packages for the charts of ``command``, a command, are missing."""
    try:
        for module in ("altair", "vl_convert", "jinja2", "scipy"):
            import_module(module)
    except ImportError as reason:
        raise ImportError(
            f"{command} needs packages for its charts that are missing ({reason}): {install_command('report')}"
        ) from reason


def check_writable_html_path(path: Path) -> None:
    """Raise, before anything is measured, if the page cannot be written, or its name might be another file's."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"out={str(path)!r} must end with .html: name the page to write, after the model if there is one"
        )
    check_writable(path)


def measure_variants(
    model_name: str, x: Tensor, *, seed: int = 0, timed_inputs: Sequence[Tensor] = (), by_layer_group: bool = False
) -> ReportPageData:
    """Measure bytes, peaks, a training step, the error of the output, and speed of every variant of a model.

    Args:
        model_name: ``bignet`` or ``module:factory``.
        x: (batch, ...), the input; a model that writes to it gets a copy.
        seed: of the weights.
        timed_inputs: inputs for timing forwards.
        by_layer_group: whether to measure each group of layers, and each choice of bits.
    """
    from lowmem.report import quantization_errors
    from lowmem.report.footprint import measure_footprint
    from lowmem.report.layer_groups import VariantBytesAndErrors, group_layers
    from lowmem.report.page import ReportPageData
    from lowmem.report.relative_speeds import measure_relative_speed

    is_user_model = model_name != BIGNET
    dense = build_or_load_named_model(model_name, seed=seed)
    expected = quantization_errors.flat_float64_vector(_set_eval_and_list_output_tensors(model_name, dense, x))
    footprints, timings = [], []
    losses, stored, meanings = {}, {}, {}
    left_out: dict[str, str] = {}
    with progress_display("variants", MofNCompleteColumn, total=len(VARIANTS)) as update:
        for variant, techniques in VARIANTS.items():
            label = DENSE if is_user_model and variant == BIGNET else variant
            model = dense
            if variant != BIGNET:
                try:
                    model = build_or_load_named_model(
                        f"{model_name}@{variant}" if is_user_model else variant, seed=seed
                    )
                except ValueError as reason:
                    # LoRA takes no LSTM, say: the other variants are shown
                    left_out[label] = str(reason)
                    if len(left_out) == len(VARIANTS) - 1:
                        raise ValueError(next(iter(left_out.values()))) from reason
                    update(advance=1)
                    continue
                if model is dense:
                    raise ValueError(
                        f"model={model_name!r}: it returned the same model twice; it must make a new model in each "
                        "call"
                    )
                losses[label] = difference(
                    expected,
                    quantization_errors.flat_float64_vector(_set_eval_and_list_output_tensors(model_name, model, x)),
                ).relative
                if by_layer_group:
                    stored[label] = VariantBytesAndErrors.from_model(model)
                for batch in (timed_input.clone() for timed_input in timed_inputs):
                    timings.append(
                        call_or_raise_input_error(
                            model_name,
                            partial(measure_relative_speed, label, dense, model, batch),
                        )
                    )
            meanings[label] = techniques_as_code(techniques), variant_description(variant)
            trains = _has_training_step(model_name, model, x)
            footprints.append(
                call_or_raise_input_error(
                    model_name, partial(measure_footprint, label, model, x.clone(), trains=trains)
                )
            )
            update(advance=1)
    qualities: list[quantization_errors.BitsAndOutputError] = []
    if by_layer_group:
        with progress_display("quality against bits") as update:
            qualities = quantization_errors.measure_bits_and_output_errors(
                lambda: build_or_load_named_model(model_name, seed=seed),
                lambda model: _set_eval_and_list_output_tensors(model_name, model, x),
                lambda: update(advance=1),
            )
    return ReportPageData(
        footprints,
        meanings,
        losses,
        timings,
        quantization_errors.measure_format_gaussian_errors(),
        machine_facts_as_text(),
        groups=group_layers(dense, stored) if by_layer_group else (),
        qualities=qualities,
        left_out=_omitted_variant_sentences(left_out),
    )


def machine_facts_as_text() -> dict[str, str]:
    """Return the facts of ``lowmem info`` as text, without the location of the package."""
    environment = {name: value for name, value in info.environment_info().items() if name != "location"}
    return {
        name: ("no", "yes")[value] if isinstance(value, bool) else info.info_value_text(value)
        for name, value in environment.items()
    }


def _check_reportable_model(arguments: argparse.Namespace) -> None:
    model = arguments.model
    if model != BIGNET and (":" not in model or "@" in model):
        raise ValueError(f"model={model!r} must be module:factory: the report shows every variant of it")
    if model != BIGNET and arguments.timed_run is not None:
        raise ValueError("--run holds times of BigNet, not of your model: leave it out to time your model")


def _report_lead_text(arguments: argparse.Namespace, report: ReportPageData, is_user_model: bool) -> str:
    size = " x ".join(map(str, (arguments.batch, *arguments.input_shape)))
    model = "Your model" if is_user_model else "The reference model, 18 linear layers of 1024 x 1024,"
    return (
        f"{model} as it is and in {len(report.footprints) - 1} variants: what each costs, how fast it is, and what "
        f"it loses. Memory and errors are of one {arguments.input_dtype} input of {size}; seed {arguments.seed}."
    )


def _omitted_variant_sentences(reasons_by_variant: Mapping[str, str]) -> list[str]:
    """Return a sentence for each reason why variants could not be made, with their names."""
    return [
        f"Without {', '.join(name for name, why in reasons_by_variant.items() if why == reason)}: "
        f"{printable_line(reason, 500)}."
        for reason in dict.fromkeys(reasons_by_variant.values())
    ]


def _has_training_step(model_name: str, model: nn.Module, x: Tensor) -> bool:
    """Whether a parameter trains and the output has a gradient, which that of classes or ids has not."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return False
    with unchanged(model, training=True), torch.enable_grad():
        outputs = call_or_raise_input_error(model_name, lambda: tree_leaves(model(x.clone())))
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in outputs)


def _set_eval_and_list_output_tensors(model_name: str, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the tensors in a model's output, of any structure."""

    def output_tensors() -> list[Tensor]:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(model.eval()(x.clone())) if isinstance(leaf, Tensor)]

    if not (outputs := call_or_raise_input_error(model_name, output_tensors)):
        raise ValueError(f"model={model_name!r} returns no tensor: there is nothing to compare")
    return outputs
