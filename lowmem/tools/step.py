"""``lowmem stats --training``: where the memory of a training step goes, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowmem.io.atomic import check_writable, write_atomically
from lowmem.nn.techniques import LoRA
from lowmem.tools.models import (
    MIB,
    check_links,
    file_path,
    folder_of,
    known_models,
    make_model,
    positive_int,
    recipe_of,
    run_model,
    user_code,
)
from lowmem.tools.output import print_json, print_table, shown
from lowmem.tools.report import check_extra
from lowmem.training.memory import TrainingMemory, training_memory
from lowmem.training.prepare import prepare_training
from lowmem.transforms.adapters import adapter_names
from lowmem.transforms.convert import convert

__all__ = ["add_step_arguments", "check_step", "print_steps"]

_ENDINGS = (".svg", ".png", ".html", ".htm")


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that go with ``--training``."""
    parser.add_argument(
        "--memory", choices=["fast", "lean"], help="with --training: call prepare_training with this mode"
    )
    parser.add_argument(
        "--rank",
        type=positive_int,
        metavar="N",
        help="with --training: add LoRA of this rank, or change the rank of a variant's LoRA",
    )
    parser.add_argument(
        "--plot",
        type=file_path,
        metavar="FILE",
        help="with --training: draw stacked bars to a .svg, .png or .html (pip install 'lowmem[report]')",
    )


def check_step(arguments: argparse.Namespace, planned: bool) -> None:
    """Raise, before anything is measured, if the arguments contradict each other or the picture cannot be written.

    Raises:
        ValueError: options of a measured step without one, or a picture of an unknown kind.
        OSError: the picture cannot be written.
        ImportError: the packages that draw it are missing.
    """
    measured = not planned and arguments.training not in (None, "none")
    for option in ("memory", "rank", "plot"):
        if getattr(arguments, option) is not None and not measured:
            raise ValueError(
                f"--{option} applies to a measured training step: add its optimizer, such as --training adamw, and "
                "leave out --plan and --at-most"
            )
    if measured and arguments.all:
        raise ValueError("--all lists the layers of a model: leave it out, or --training")
    if arguments.plot is not None:
        _check_plot(arguments.plot)


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(
            f"--plot {str(path)!r} must end with {', '.join(_ENDINGS[:-1])}: the ending selects the format"
        )
    check_extra("lowmem stats --plot")
    check_links(path)
    check_writable(path)


def print_steps(arguments: argparse.Namespace, input_of: Callable[[str, nn.Module], Tensor]) -> int:
    """Measure a training step of each model, and print and draw where its memory goes.

    Args:
        arguments: of the command.
        input_of: returns the input of a model, by its name and itself.

    Raises:
        ValueError: a model cannot be built, prepared or run, or nothing in it trains.
    """
    found = {name: _measured(arguments, name, input_of) for name in known_models(arguments.models)}
    if arguments.plot is not None:
        _draw(arguments, found)
    if arguments.json:
        print_json([{"model": name, "memory": arguments.memory} | one.as_json() for name, one in found.items()])
        return 0
    parts = dict.fromkeys(part for one in found.values() for part in one.parts)
    order = sorted(parts, key=lambda part: (part == "scratch", part.startswith("activations")))
    rows = [[part, *(f"{one.parts.get(part, 0) / MIB:.2f}" for one in found.values())] for part in order]
    rows.append(["peak", *(f"{one.total_bytes / MIB:.2f}" for one in found.values())])
    rows.append(["peak in", *(one.moment for one in found.values())])
    print_table(["MiB", *found], rows, markdown=arguments.markdown)
    return 0


def _measured(
    arguments: argparse.Namespace, name: str, input_of: Callable[[str, nn.Module], Tensor]
) -> TrainingMemory:
    own = folder_of(name) is None and any(isinstance(one, LoRA) for one in recipe_of(name)[1])  # adapters
    model = make_model(name, seed=arguments.seed, rank=arguments.rank if own else None)
    x = input_of(name, model)
    with user_code(f"model={name!r} cannot be trained"):
        if arguments.rank is not None and not own and not adapter_names(model):
            model = convert(model, LoRA(arguments.rank))
        trains = any(one.requires_grad for one in model.parameters())
        if trains and arguments.memory is not None:
            prepare_training(model, arguments.memory)
    if not trains:
        raise ValueError(f"model={name!r} has no parameter that trains; --rank N adds adapters that do")
    labels: dict[str, Any] = {"labels": x} if folder_of(name) is not None and _takes_labels(model, x) else {}
    return run_model(name, lambda: training_memory(model, x, optimizer=arguments.training, **labels))


def _takes_labels(model: nn.Module, x: Tensor) -> bool:
    """Whether a folder's model is a language model, whose labels are its tokens."""
    return not x.is_floating_point() and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _draw(arguments: argparse.Namespace, found: Mapping[str, TrainingMemory]) -> None:
    from lowmem.report.page import picture

    title = f"A training step with {arguments.training}" + f", {arguments.memory}" * (arguments.memory is not None)
    names = {shown(name): one for name, one in found.items()}
    write_atomically(arguments.plot, picture(title, names, arguments.plot.suffix.lower()))
