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

from lowmem.errors import printable
from lowmem.io.atomic import check_outside, check_writable, write_atomically
from lowmem.measure import difference, unchanged
from lowmem.tools import info
from lowmem.tools.arguments import add_input_arguments, file_path, make_input, shape
from lowmem.tools.models import make_model, run_model
from lowmem.tools.output import print_saved, progress
from lowmem.transforms.bits import text_of
from lowmem.variants import VARIANTS, meaning
from lowmem.version import install_command

if TYPE_CHECKING:
    from lowmem.report.page import Report

BIGNET = "bignet"
DENSE = "dense"  # the name of a user's model without techniques
ENDINGS = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model", nargs="?", default=BIGNET, metavar="MODEL", help="your own model, as module:factory (default BigNet)"
    )
    parser.add_argument("target", type=file_path, metavar="OUT.html", help="the page to write")
    add_input_arguments(parser)
    parser.add_argument(
        "--batches",
        type=shape,
        default=(1, 8, 32, 128),
        metavar="N[,N]...",
        help="batch sizes to time (default 1,8,32,128)",
    )
    parser.add_argument(
        "--run",
        type=file_path,
        dest="timed_run",
        metavar="FILE",
        help="read the latency of BigNet and of other libraries from a stored run of pytest-benchmark, instead of "
        "timing now",
    )
    parser.add_argument(
        "--verdict",
        type=file_path,
        dest="verdicts",
        action="append",
        default=[],
        metavar="FILE",
        help="show the verdict of a gate from its JSON file; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    check_extra("lowmem report")
    check_target(arguments.target)
    for option, given in (("--run", arguments.timed_run), *(("--verdict", path) for path in arguments.verdicts)):
        check_outside(arguments.target, {option: given})
    _check_model(arguments)
    from lowmem.report.page import render
    from lowmem.testing.verdicts import read_verdict

    verdicts = [read_verdict(path) for path in arguments.verdicts]
    own = arguments.model != BIGNET
    if arguments.timed_run is None:
        timings, timing_machine = None, dict[str, str]()
        timed = (
            "Measured for this page: forwards of the dense model and of a variant in turns, so that what loads the "
            "machine meanwhile slows both."
        )
    else:
        from lowmem.report.timings import read_run

        timings, timing_machine = read_run(arguments.timed_run)
        name = printable(arguments.timed_run.name)
        timed = f"Of the run {name}: the smallest time of each, beside the dense model's in the same run."
    batches = [make_input(argparse.Namespace(**vars(arguments) | {"batch": n})) for n in sorted({*arguments.batches})]
    measured = measure_variants(
        arguments.model,
        make_input(arguments),
        seed=arguments.seed,
        timed=[] if timings is not None else batches,
        grouped=own,
    )
    page = replace(
        measured,
        title=printable(arguments.model) if own else "BigNet in every variant",
        lead=_lead(arguments, measured, own),
        timings=measured.timings if timings is None else timings,
        timed=timed,
        timing_machine=timing_machine,
        verdicts=verdicts,
    )
    write_atomically(arguments.target, render(page).encode())
    print_saved(arguments.target)
    return 0


def check_extra(what: str) -> None:
    """Raise an ImportError with the remedy if packages for the charts of ``what``, a command, are missing."""
    try:
        for module in ("altair", "vl_convert", "jinja2", "scipy"):
            import_module(module)
    except ImportError as reason:
        raise ImportError(
            f"{what} needs packages for its charts that are missing ({reason}): {install_command('report')}"
        ) from reason


def check_target(path: Path) -> None:
    """Raise, before anything is measured, if the page cannot be written, or its name might be another file's."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"out={str(path)!r} must end with .html: name the page to write, after the model if there is one"
        )
    check_writable(path)


def measure_variants(
    name: str, x: Tensor, *, seed: int = 0, timed: Sequence[Tensor] = (), grouped: bool = False
) -> Report:
    """Measure bytes, peaks, a training step, the error of the output, and speed of every variant of a model.

    Args:
        name: ``bignet`` or ``module:factory``.
        x: (batch, ...), the input; a model that writes to it gets a copy.
        seed: of the weights.
        timed: inputs for timing forwards.
        grouped: whether to measure each group of layers, and each choice of bits.
    """
    from lowmem.report import quality
    from lowmem.report.footprint import footprint
    from lowmem.report.groups import Stored, group_layers
    from lowmem.report.page import Report
    from lowmem.report.timings import time_in_turns

    own = name != BIGNET
    dense = make_model(name, seed=seed)
    expected = quality.as_vector(_outputs(name, dense, x))
    footprints, timings = [], []
    losses, stored, meanings = {}, {}, {}
    left_out: dict[str, str] = {}
    with progress("variants", MofNCompleteColumn, total=len(VARIANTS)) as update:
        for variant, techniques in VARIANTS.items():
            label = DENSE if own and variant == BIGNET else variant
            model = dense
            if variant != BIGNET:
                try:
                    model = make_model(f"{name}@{variant}" if own else variant, seed=seed)
                except ValueError as reason:  # LoRA takes no LSTM, say: the other variants are shown
                    left_out[label] = str(reason)
                    if len(left_out) == len(VARIANTS) - 1:
                        raise ValueError(next(iter(left_out.values()))) from reason
                    update(advance=1)
                    continue
                if model is dense:
                    raise ValueError(
                        f"model={name!r}: it returned the same model twice; it must make a new model in each call"
                    )
                losses[label] = difference(expected, quality.as_vector(_outputs(name, model, x))).relative
                if grouped:
                    stored[label] = Stored.of(model)
                for batch in (given.clone() for given in timed):
                    timings.append(run_model(name, lambda m=model, b=batch, n=label: time_in_turns(n, dense, m, b)))  # type: ignore[misc]
            meanings[label] = text_of(techniques), meaning(variant)
            trains = _trains(name, model, x)
            footprints.append(run_model(name, partial(footprint, label, model, x.clone(), trains=trains)))
            update(advance=1)
    found: list[quality.Quality] = []
    if grouped:
        with progress("quality against bits") as update:
            found = quality.qualities(
                lambda: make_model(name, seed=seed),
                lambda model: _outputs(name, model, x),
                lambda: update(advance=1),
            )
    return Report(
        footprints,
        meanings,
        losses,
        timings,
        quality.distortions(),
        machine(),
        groups=group_layers(dense, stored) if grouped else (),
        qualities=found,
        left_out=_left_out(left_out),
    )


def machine() -> dict[str, str]:
    """Return the facts of ``lowmem info`` as text, without the location of the package."""
    found = {name: value for name, value in info.facts().items() if name != "location"}
    return {
        name: ("no", "yes")[value] if isinstance(value, bool) else info.text_of(value)
        for name, value in found.items()
    }


def _check_model(arguments: argparse.Namespace) -> None:
    model = arguments.model
    if model != BIGNET and (":" not in model or "@" in model):
        raise ValueError(f"model={model!r} must be module:factory: the report shows every variant of it")
    if model != BIGNET and arguments.timed_run is not None:
        raise ValueError("--run holds times of BigNet, not of your model: leave it out to time your model")


def _lead(arguments: argparse.Namespace, measured: Report, own: bool) -> str:
    size = " x ".join(map(str, (arguments.batch, *arguments.input_shape)))
    model = "Your model" if own else "The reference model, 18 linear layers of 1024 x 1024,"
    return (
        f"{model} as it is and in {len(measured.footprints) - 1} variants: what each costs, how fast it is, and what "
        f"it loses. Memory and errors are of one {arguments.input_dtype} input of {size}; seed {arguments.seed}."
    )


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    """Return a sentence for each reason why variants could not be made, with their names."""
    return [
        f"Without {', '.join(name for name, why in reasons.items() if why == reason)}: {printable(reason, 500)}."
        for reason in dict.fromkeys(reasons.values())
    ]


def _trains(name: str, model: nn.Module, x: Tensor) -> bool:
    """Whether a parameter trains and the output has a gradient, which that of classes or ids has not."""
    if not any(one.requires_grad for one in model.parameters()):
        return False
    with unchanged(model, training=True), torch.enable_grad():
        outputs = run_model(name, lambda: tree_leaves(model(x.clone())))
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in outputs)


def _outputs(name: str, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the tensors in a model's output, of any structure."""

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(model.eval()(x.clone())) if isinstance(leaf, Tensor)]

    if not (outputs := run_model(name, run)):
        raise ValueError(f"model={name!r} returns no tensor: there is nothing to compare")
    return outputs
