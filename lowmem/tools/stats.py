"""``lowmem stats``: parameters, stored bytes and peak memory of models; a user's model by layers; with ``--plan`` or
``--at-most`` what techniques would take; with ``--training`` the parts of a step."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem import measure
from lowmem.io.atomic import check_writable, write_atomically
from lowmem.nn.techniques import FourBit, LoRA
from lowmem.tools.arguments import (
    RANK,
    add_device_argument,
    add_input_arguments,
    add_output_arguments,
    device_of,
    file_path,
    make_input,
    positive_int,
    size,
    techniques,
)
from lowmem.tools.models import base_of, folder_of, make_model, placed, plan_model, recipe_of, run_model, user_code
from lowmem.tools.output import mib, print_json, print_plan, print_summary, print_table, shown
from lowmem.tools.report import check_extra
from lowmem.training.memory import TRAINERS, TrainingMemory, training_memory
from lowmem.training.prepare import prepare_training
from lowmem.transforms.adapters import adapter_names
from lowmem.transforms.convert import convert
from lowmem.transforms.plan import OPTIMIZERS, Plan, plan
from lowmem.transforms.registry import Technique
from lowmem.transforms.summary import Summary, summary
from lowmem.variants import VARIANTS
from lowmem.version import install_command

_ENDINGS = (".svg", ".png", ".html", ".htm")
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
        "BigNet); a folder gets 128 tokens, or as many as it has positions, or --input-shape N",
    )
    add_input_arguments(parser)
    parser.set_defaults(input_shape=None, input_dtype=None)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--all", action="store_true", help="list every layer of a module:factory instead of groups of similar layers"
    )
    kind.add_argument(
        "--plan",
        nargs="?",
        const=(),
        type=techniques,
        metavar="TECHNIQUES",
        help="predict the memory with these techniques, without the weights; joined by commas: "
        "FourBit[:format[:block_size[:scales]]], EightBit[:block_size[:scales]], Budget:bits, Half[:dtype], "
        f"LoRA[:rank] (default FourBit,LoRA:{RANK}; FourBit with --training none); also of a GGUF file; weights that "
        "are stored stay as they are",
    )
    kind.add_argument(
        "--at-most", type=size, metavar="SIZE", help="propose techniques that fit into this memory, such as 24GiB"
    )
    parser.add_argument(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="with --plan and --at-most: also plan the keys and values of so many tokens of each of --batch "
        "sequences, which a language model keeps while it generates",
    )
    parser.add_argument("--cache-bits", type=int, choices=[8], metavar="8", help="with --tokens: keep them in 8 bits")
    parser.add_argument(
        "--training",
        choices=["none", *TRAINERS],
        help="break down the memory of a training step with this optimizer; with --plan and --at-most: the optimizer "
        "to plan for (default adamw), or none for inference",
    )
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
        help=f"with --training: draw stacked bars to a .svg, .png or .html ({install_command('report')})",
    )
    add_device_argument(parser, "where models are measured; peaks on cuda are those of torch's allocator")
    add_output_arguments(parser, "print JSON with integer bytes")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    planned = arguments.plan is not None or arguments.at_most is not None
    measures_step = not planned and arguments.training not in (None, "none")
    _check_step(arguments, measures_step)
    if planned:
        return _print_plans(arguments)
    device = device_of(arguments.device)
    if arguments.tokens is not None:
        raise ValueError(f"--tokens {arguments.tokens} plans a cache: add --plan or --at-most, or leave it out")
    if measures_step:
        return _print_steps(arguments, device)
    rows: list[Stats] = []
    layers: dict[str, Summary] = {}  # of the user's models
    for name in arguments.models or VARIANTS:
        model = placed(name, make_model(name, seed=arguments.seed), device)
        config = _config_of(name, model)
        x = _input(arguments, config).to(device)
        rows.append(stats_of(name, model, x, **_decoded(config, x)))
        if ":" in name or config is not None:
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
                *map(mib, (row.theoretical_bytes, row.actual_bytes, row.forward_bytes, row.backward_bytes)),
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


def _config_of(name: str, model: Any) -> Any:
    """Return the config of a folder's model; None for models of another kind."""
    return None if folder_of(name) is None else model.config


def _input(arguments: argparse.Namespace, config: Any = None) -> Tensor:
    """Return the input that the arguments describe: by default BigNet's, or tokens for a folder's config."""
    tokens = config is not None and arguments.input_dtype is None and len(arguments.input_shape or (1,)) == 1
    length = TOKENS
    if tokens:
        from lowmem.integrations.transformers.config_facts import window_of

        length = window_of(config, TOKENS)
    described = copy(arguments)
    described.input_shape = arguments.input_shape or (length if tokens else 1024,)
    described.input_dtype = arguments.input_dtype or ("int64" if tokens else "float32")
    return make_input(described)


def _decoded(config: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the decoder's input of an encoder-decoder model: the tokens of the encoder."""
    both = config is not None and config.is_encoder_decoder and not x.is_floating_point()
    return {"decoder_input_ids": x} if both else {}


def _labels(config: Any, kind: str, x: Tensor) -> dict[str, Tensor]:
    """Return the labels of a folder's language model, whose class is called ``kind``: its input."""
    is_language_model = config is not None and kind.endswith(("ForCausalLM", "LMHeadModel"))
    return {"labels": x} if is_language_model and not x.is_floating_point() else {}


def _print_plans(arguments: argparse.Namespace) -> int:
    training = None if arguments.training == "none" else arguments.training or "adamw"
    if training is not None and training not in OPTIMIZERS:
        raise ValueError(
            f"--training {training} is measured, not planned: leave out --plan and --at-most, or choose from none, "
            f"{', '.join(OPTIMIZERS)}"
        )
    plans: dict[str, tuple[Plan, Tensor]] = {}
    for name in arguments.models or ["bignet"]:
        base = base_of(name)
        plans[name] = _plan(arguments, name, training) if base is None else _plan_base(arguments, base, training)
    if arguments.json:
        rows = [(name, list(x.shape), found.as_json()) for name, (found, x) in plans.items()]
        print_json([{"model": name, "input_shape": shape} | found for name, shape, found in rows])
        return 0
    for number, (name, (found, x)) in enumerate(plans.items()):
        print("\n" * (number > 0), end="")
        print_plan(name, found, markdown=arguments.markdown)
        if base_of(name) is not None:
            what = " x ".join(map(str, x.shape)) + (" numbers" if x.is_floating_point() else " tokens")
            print(f"\nof an input of {what}: --batch and --input-shape change them")
    return 0


def _asked(arguments: argparse.Namespace, training: str | None, stored: bool) -> tuple[Technique, ...]:
    """Return the techniques to plan: those of ``--plan``, or its default, of which a stored base takes adapters."""
    if arguments.plan or arguments.plan is None:
        return arguments.plan or ()
    return (*([] if stored else [FourBit()]), *([LoRA(RANK)] if training else []))


def _options(arguments: argparse.Namespace, training: str | None) -> dict[str, Any]:
    """Return the options of ``plan`` that are the same for every model."""
    cached = {} if arguments.tokens is None else {"tokens": arguments.tokens, "sequences": arguments.batch}
    return {"training": training, "at_most": arguments.at_most, "cache_bits": arguments.cache_bits} | cached


def _plan(arguments: argparse.Namespace, name: str, training: str | None) -> tuple[Plan, Tensor]:
    """Return the plan of a model and its input."""
    make, own = recipe_of(name)
    if own:
        raise ValueError(
            f"model={name!r} has techniques of its own: name the model without them, and the techniques in --plan"
        )
    x, given = _input(arguments), _asked(arguments, training, False)
    return plan_model(name, lambda: plan(make, *given, batch=x, **_options(arguments, training))), x


def _plan_base(arguments: argparse.Namespace, base: Path, training: str | None) -> tuple[Plan, Tensor]:
    """Return the plan of the model of a folder or GGUF file, and its input; of weights, only headers are read."""
    from lowmem.integrations.transformers.config_facts import class_at, factory_of, held_back, stored_by
    from lowmem.integrations.transformers.exact import config_at
    from lowmem.tools.fit_plan import stored_as, with_stored

    with held_back():
        stored = stored_by(base, "plan") is not None
        given = _asked(arguments, training, stored)
        if stored and (arguments.at_most or not all(isinstance(one, LoRA) for one in given)):
            raise ValueError(
                f"model={str(base)!r} is stored already: leave out --at-most, and name LoRA alone in --plan"
            )
        technique, dense, nbytes = stored_as(base) if stored else (None, (), 0)
        kind, config = class_at(base), config_at(base)
        x = _input(arguments, config)
        labels = _labels(config, kind.__name__, x)
        named = {"input_ids": x, **_decoded(config, x), **labels, **({"use_cache": False} if labels else {})}
        batch = x if x.is_floating_point() else named
        given = given if technique is None else (technique, *given)
        make = factory_of(base, kind=kind)
        found = plan_model(
            str(base),
            lambda: plan(make, *given, batch=batch, skip=dense, **_options(arguments, training)),
        )
    return with_stored(found, nbytes) if stored else found, x


def _check_step(arguments: argparse.Namespace, measured: bool) -> None:
    """Raise, before anything is measured, if the arguments contradict each other or the picture cannot be written."""
    for option in ("memory", "rank", "plot"):
        if getattr(arguments, option) is not None and not measured:
            raise ValueError(
                f"--{option} applies to a measured training step: add its optimizer, such as --training adamw, and "
                "leave out --plan and --at-most"
            )
    if measured and arguments.all:
        raise ValueError("--all lists the layers of a model: leave it out, or --training")
    if arguments.device != "cpu" and (arguments.plan is not None or arguments.at_most is not None):
        raise ValueError(f"--plan and --at-most measure nothing: leave --device={arguments.device} out")
    path = arguments.plot
    if path is None:
        return
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(
            f"--plot {str(path)!r} must end with {', '.join(_ENDINGS[:-1])}: the ending selects the format"
        )
    check_extra("lowmem stats --plot")
    check_writable(path)


def _print_steps(arguments: argparse.Namespace, device: torch.device) -> int:
    """Measure a training step of each model, and print and draw where its memory goes."""
    found = {name: _measured_step(arguments, name, device) for name in arguments.models or VARIANTS}
    if arguments.plot is not None:
        _draw(arguments, found)
    if arguments.json:
        print_json([{"model": name, "memory": arguments.memory} | one.as_json() for name, one in found.items()])
        return 0
    parts = dict.fromkeys(part for one in found.values() for part in one.parts)
    order = sorted(parts, key=lambda part: (part == "scratch", part.startswith("activations")))
    rows = [[part, *(mib(one.parts.get(part, 0)) for one in found.values())] for part in order]
    rows.append(["peak", *(mib(one.total_bytes) for one in found.values())])
    rows.append(["peak in", *(one.moment for one in found.values())])
    print_table(["MiB", *found], rows, markdown=arguments.markdown)
    return 0


def _measured_step(arguments: argparse.Namespace, name: str, device: torch.device) -> TrainingMemory:
    own = folder_of(name) is None and any(isinstance(one, LoRA) for one in recipe_of(name)[1])  # adapters
    model = make_model(name, seed=arguments.seed, rank=arguments.rank if own else None)
    config = _config_of(name, model)
    x = _input(arguments, config).to(device)
    with user_code(f"model={name!r} cannot be trained"):
        if arguments.rank is not None and not own and not adapter_names(model):
            model = convert(model, LoRA(arguments.rank))
        model = model.to(device)
        trains = any(one.requires_grad for one in model.parameters())
        if trains and arguments.memory is not None:
            prepare_training(model, arguments.memory)
    if not trains:
        raise ValueError(f"model={name!r} has no parameter that trains; --rank N adds adapters that do")
    labels: dict[str, Any] = _labels(config, type(model).__name__, x)
    return run_model(name, lambda: training_memory(model, x, optimizer=arguments.training, **labels))


def _draw(arguments: argparse.Namespace, found: Mapping[str, TrainingMemory]) -> None:
    from lowmem.report.page import picture

    title = f"A training step with {arguments.training}" + f", {arguments.memory}" * (arguments.memory is not None)
    names = {shown(name): one for name, one in found.items()}
    write_atomically(arguments.plot, picture(title, names, arguments.plot.suffix.lower()))
