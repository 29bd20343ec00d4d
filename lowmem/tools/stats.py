"""``lowmem stats``: parameters, stored bytes, peak memory of a forward and a backward; a user's model by layers.

With ``--plan`` or ``--at-most``: the memory that techniques would take, without the weights. With ``--training``:
where the memory of a training step goes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem import measure
from lowmem.tools.models import (
    MIB,
    add_input_arguments,
    folder_of,
    known_models,
    make_input,
    make_model,
    plan_model,
    recipe_of,
    run_model,
    size,
    techniques,
    user_code,
)
from lowmem.tools.output import print_json, print_plan, print_summary, print_table, shown
from lowmem.tools.step import add_step_arguments, check_step, print_steps
from lowmem.training.memory import TRAINERS
from lowmem.transforms.plan import OPTIMIZERS, Plan, plan
from lowmem.transforms.summary import Summary, summary

__all__ = ["Stats", "add_arguments", "run", "stats_of"]

TOKENS = 128  # that a folder's model is measured with


@dataclass(frozen=True)
class Stats:
    """One row. Parameters are counted as stored: two 4-bit codes are one uint8 element."""

    model: str
    trainable_params: int
    frozen_params: int
    total_params: int
    theoretical_bytes: int
    actual_bytes: int
    forward_bytes: int
    backward_bytes: int
    bits_per_weight: float


def stats_of(name: str, model: nn.Module, x: Tensor, **named: Any) -> Stats:
    """Measure a model on the input ``x``, and maybe others by name; ``name`` is for errors."""
    forward = run_model(name, lambda: measure.forward_bytes(model, x, **named))
    backward = run_model(name, lambda: measure.backward_bytes(model, x, **named))
    with user_code(f"model={name!r} cannot be measured"):
        counts = measure.counts(model)
        stored = measure.theoretical_bytes(model)
        weights = measure.weight_count(model)
        return Stats(
            model=name,
            trainable_params=counts.trainable,
            frozen_params=counts.frozen,
            total_params=counts.total,
            theoretical_bytes=stored,
            actual_bytes=measure.actual_bytes(model),
            forward_bytes=forward,
            backward_bytes=backward,
            bits_per_weight=8 * stored / weights if weights else 0.0,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="VARIANT, module:factory, module:factory@VARIANT, or a Hugging Face folder (default: every variant of "
        "BigNet); a folder gets 128 tokens, or as many as it has positions, unless you describe an input",
    )
    add_input_arguments(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--all", action="store_true", help="list every layer of a module:factory instead of groups of similar layers"
    )
    kind.add_argument(
        "--plan",
        type=techniques,
        metavar="TECHNIQUES",
        help="predict the memory with these techniques, without the weights; joined by commas: "
        "FourBit[:format[:block_size[:scales]]], EightBit[:block_size[:scales]], Budget:bits, Half[:dtype], "
        "LoRA[:rank]",
    )
    kind.add_argument(
        "--at-most", type=size, metavar="SIZE", help="propose techniques that fit into this memory, such as 24GiB"
    )
    parser.add_argument(
        "--training",
        choices=["none", *TRAINERS],
        help="break down the memory of a training step with this optimizer; with --plan and --at-most: the optimizer "
        "to plan for (default adamw), or none for inference",
    )
    add_step_arguments(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON with integer bytes")
    output.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    planned = arguments.plan is not None or arguments.at_most is not None
    check_step(arguments, planned)
    x = make_input(arguments)
    if planned:
        return _print_plans(arguments, x)
    if arguments.training not in (None, "none"):
        return print_steps(
            arguments, lambda name, model: x if folder_of(name) is None else _tokens(arguments, x, model)
        )
    rows: list[Stats] = []
    layers: dict[str, Summary] = {}  # of the user's models
    for name in known_models(arguments.models):
        model = make_model(name, seed=arguments.seed)
        folder = folder_of(name) is not None
        given = _tokens(arguments, x, model) if folder else x
        rows.append(stats_of(name, model, given, **(_decoded(model, given) if folder else {})))
        if ":" in name or folder:
            with user_code(f"model={name!r} cannot be listed by layers"):
                layers[name] = summary(model)
    if arguments.json:
        listed = {name: {"layers": [asdict(layer) for layer in found]} for name, found in layers.items()}
        print_json([asdict(row) | listed.get(row.model, {}) for row in rows])
        return 0
    print_table(
        [
            "Model",
            *(f"{name} M" for name in ("Trains", "Frozen", "Total")),
            *(f"{name} MiB" for name in ("Theory", "Actual", "Forward", "Backward")),
            "Bits/ weight",
        ],
        [
            [
                row.model,
                *(f"{n / 1e6:.2f}" for n in (row.trainable_params, row.frozen_params, row.total_params)),
                *(
                    f"{n / MIB:.2f}"
                    for n in (row.theoretical_bytes, row.actual_bytes, row.forward_bytes, row.backward_bytes)
                ),
                f"{row.bits_per_weight:.2f}",
            ]
            for row in rows
        ],
        markdown=arguments.markdown,
    )
    for name, found in layers.items():
        print(f"\n{shown(name)}\n")
        print_summary(found, grouped=not arguments.all, markdown=arguments.markdown)
    return 0


def _tokens(arguments: argparse.Namespace, x: Tensor, model: Any) -> Tensor:
    """Return an input for a folder's language model, unless the arguments describe another than BigNet's.

    It has ``TOKENS`` tokens, or as many as the model has positions.
    """
    if (arguments.input_shape, arguments.input_dtype) != ((1024,), "float32"):
        return x
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(TOKENS, positions) if isinstance(positions, int) and positions > 0 else TOKENS
    return torch.zeros(arguments.batch, length, dtype=torch.int64)


def _decoded(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return what the decoder of a model gets beside the tokens of its encoder: the same ones."""
    both = model.config.is_encoder_decoder and not tokens.is_floating_point()
    return {"decoder_input_ids": tokens} if both else {}


def _print_plans(arguments: argparse.Namespace, x: Tensor) -> int:
    training = None if arguments.training == "none" else arguments.training or "adamw"
    if training is not None and training not in OPTIMIZERS:
        raise ValueError(
            f"--training {training} is measured, not planned: leave out --plan and --at-most, or choose from none, "
            f"{', '.join(OPTIMIZERS)}"
        )
    plans: dict[str, Plan] = {}
    for name in arguments.models or ["bignet"]:
        if folder_of(name) is not None:
            raise ValueError(
                f"model={name!r} is a folder, and --plan needs a module:factory: lowmem fit FOLDER --data TEXT "
                "--dry-run plans folders"
            )
        factory, own = recipe_of(name)
        if own:
            raise ValueError(
                f"model={name!r} has techniques of its own: name the model without them, and the techniques in --plan"
            )
        plans[name] = plan_model(
            name,
            lambda make=factory: plan(  # type: ignore[misc]
                make, *(arguments.plan or ()), batch=x, training=training, at_most=arguments.at_most
            ),
        )
    if arguments.json:
        print_json([{"model": name} | found.as_json() for name, found in plans.items()])
        return 0
    for number, (name, found) in enumerate(plans.items()):
        print("\n" * (number > 0), end="")
        print_plan(name, found, markdown=arguments.markdown)
    return 0
