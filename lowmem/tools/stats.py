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
from lowmem.io.filesystem import check_writable, write_atomically
from lowmem.io.hub_names import HubName, displayed_model_name, hub_name_and_commit_or_none, is_hub_name
from lowmem.io.model_folder import CONFIG, read_quantization_config
from lowmem.nn.techniques import FourBit, LoRA
from lowmem.tools.arguments import (
    DEFAULT_RANK,
    add_device_argument,
    add_json_and_markdown_arguments,
    add_random_input_arguments,
    make_random_or_zero_input,
    parse_byte_size,
    parse_nonempty_path,
    parse_positive_int,
    parse_techniques,
    select_local_rank_device,
)
from lowmem.tools.hub_arguments import (
    add_revision_argument,
    check_revision_applicable,
    fetch_model,
    fetch_named_model,
)
from lowmem.tools.named_models import (
    build_or_load_named_model,
    call_or_raise_input_error,
    exceptions_as_value_error,
    factory_and_techniques,
    folder_or_gguf_or_none,
    model_folder_or_none,
    move_to_device,
    plan_or_raise_value_error,
)
from lowmem.tools.output import (
    escaped_and_truncated,
    mib_text,
    print_json,
    print_layer_summary,
    print_memory_plan,
    print_table,
)
from lowmem.tools.report import check_chart_packages_installed
from lowmem.training.prepare_training import prepare_training
from lowmem.training.step_memory import NAMED_OPTIMIZERS, TrainingMemory, training_memory
from lowmem.transforms.convert import convert
from lowmem.transforms.memory_plan import OPTIMIZERS, Plan, plan
from lowmem.transforms.model_summary import Summary, summary
from lowmem.transforms.module_registry import Technique
from lowmem.transforms.named_adapters import adapter_names
from lowmem.variants import VARIANTS
from lowmem.version import install_command

_ENDINGS = (".svg", ".png", ".html", ".htm")
DEFAULT_TOKENS = 128  # that a folder's model is measured with


@dataclass(frozen=True)
class ModelStats:
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


def measure_model_stats(model_name: str, model: nn.Module, x: Tensor, **other_inputs: Any) -> ModelStats:
    """Measure a model on the input ``x``, and maybe others by name; ``model_name`` is for errors."""
    forward = call_or_raise_input_error(model_name, lambda: measure.forward_bytes(model, x, **other_inputs))
    backward = call_or_raise_input_error(model_name, lambda: measure.backward_bytes(model, x, **other_inputs))
    with exceptions_as_value_error(f"model={model_name!r} cannot be measured"):
        counts = measure.counts(model)
        stored = measure.theoretical_bytes(model)
        weights = measure.weight_count(model)
        return ModelStats(
            model=model_name,
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
        help="VARIANT, module:factory, module:factory@VARIANT, or a Hugging Face folder or name on the Hub (default: "
        "every variant of BigNet); a folder gets 128 tokens, or as many as it has positions, or --input-shape N",
    )
    add_revision_argument(parser)
    add_random_input_arguments(parser)
    parser.set_defaults(input_shape=None, input_dtype=None)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--all", action="store_true", help="list every layer of a module:factory instead of groups of similar layers"
    )
    kind.add_argument(
        "--plan",
        nargs="?",
        const=(),
        type=parse_techniques,
        metavar="TECHNIQUES",
        help="predict the memory with these techniques, without the weights; joined by commas: "
        "FourBit[:format[:block_size[:scales]]], EightBit[:block_size[:scales]], Budget:bits, Half[:dtype], "
        f"LoRA[:rank] (default FourBit,LoRA:{DEFAULT_RANK}; FourBit with --training none); also of a GGUF file; "
        "weights that "
        "are stored stay as they are",
    )
    kind.add_argument(
        "--at-most",
        type=parse_byte_size,
        metavar="SIZE",
        help="propose techniques that fit into this memory, such as 24GiB",
    )
    parser.add_argument(
        "--tokens",
        type=parse_positive_int,
        metavar="N",
        help="with --plan and --at-most: also plan the keys and values of so many tokens of each of --batch "
        "sequences, which a language model keeps while it generates",
    )
    parser.add_argument("--cache-bits", type=int, choices=[8], metavar="8", help="with --tokens: keep them in 8 bits")
    parser.add_argument(
        "--training",
        choices=["none", *NAMED_OPTIMIZERS],
        help="break down the memory of a training step with this optimizer; with --plan and --at-most: the optimizer "
        "to plan for (default adamw), or none for inference",
    )
    parser.add_argument(
        "--memory", choices=["fast", "lean"], help="with --training: call prepare_training with this mode"
    )
    parser.add_argument(
        "--rank",
        type=parse_positive_int,
        metavar="N",
        help="with --training: add LoRA of this rank, or change the rank of a variant's LoRA",
    )
    parser.add_argument(
        "--plot",
        type=parse_nonempty_path,
        metavar="FILE",
        help=f"with --training: draw stacked bars to a .svg, .png or .html ({install_command('report')})",
    )
    add_device_argument(parser, "where models are measured; peaks on cuda are those of torch's allocator")
    add_json_and_markdown_arguments(parser, "print JSON with integer bytes")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    planned = arguments.plan is not None or arguments.at_most is not None
    measures_step = not planned and arguments.training not in (None, "none")
    _check_step_options_and_plot_path(arguments, measures_step)
    check_revision_applicable(arguments.revision, arguments.models)
    # A plan needs no weights, unless they are stored
    arguments.models = [fetch_named_model(name, arguments.revision, weights=not planned) for name in arguments.models]
    if planned:
        return _make_and_print_memory_plans(arguments)
    device = select_local_rank_device(arguments.device)
    if arguments.tokens is not None:
        raise ValueError(f"--tokens {arguments.tokens} plans a cache: add --plan or --at-most, or leave it out")
    if measures_step:
        memory_by_model = {
            name: _build_model_and_measure_step(arguments, name, device) for name in arguments.models or VARIANTS
        }
        if arguments.plot is not None:
            _write_step_memory_plot(arguments, memory_by_model)
        _print_step_memory(arguments, memory_by_model)
        return 0
    rows: list[ModelStats] = []
    layers: dict[str, Summary] = {}  # of the user's models
    for name in arguments.models or VARIANTS:
        model = move_to_device(name, build_or_load_named_model(name, seed=arguments.seed), device)
        config = _transformers_config_or_none(name, model)
        x = _make_input_for_config(arguments, config).to(device)
        rows.append(measure_model_stats(displayed_model_name(name), model, x, **_decoder_input_kwargs(config, x)))
        if ":" in name or config is not None:
            with exceptions_as_value_error(f"model={name!r} cannot be listed by layers"):
                layers[displayed_model_name(name)] = summary(model)
    if arguments.json:
        listed = {
            name: {"layers": [asdict(layer) for layer in layer_summary]} for name, layer_summary in layers.items()
        }
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
                *map(mib_text, (row.theoretical_bytes, row.actual_bytes, row.forward_bytes, row.backward_bytes)),
                f"{row.bits_per_weight:.2f}",
            ]
            for row in rows
        ],
        markdown=arguments.markdown,
    )
    for name, layer_summary in layers.items():
        print(f"\n{escaped_and_truncated(name)}\n")
        print_layer_summary(layer_summary, grouped=not arguments.all, markdown=arguments.markdown)
    return 0


def _transformers_config_or_none(model_name: str, model: Any) -> Any:
    """Return the config of a folder's model; None for models of another kind."""
    return None if model_folder_or_none(model_name) is None else model.config


def _make_input_for_config(arguments: argparse.Namespace, config: Any = None) -> Tensor:
    """Return the input that the arguments describe: by default BigNet's, or tokens for a folder's config."""
    tokens = config is not None and arguments.input_dtype is None and len(arguments.input_shape or (1,)) == 1
    length = DEFAULT_TOKENS
    if tokens:
        from lowmem.integrations.transformers.model_facts import capped_context_window

        length = capped_context_window(config, DEFAULT_TOKENS)
    described = copy(arguments)
    described.input_shape = arguments.input_shape or (length if tokens else 1024,)
    described.input_dtype = arguments.input_dtype or ("int64" if tokens else "float32")
    return make_random_or_zero_input(described)


def _decoder_input_kwargs(config: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the decoder's input of an encoder-decoder model: the tokens of the encoder."""
    both = config is not None and config.is_encoder_decoder and not x.is_floating_point()
    return {"decoder_input_ids": x} if both else {}


def _language_model_label_kwargs(config: Any, class_name: str, x: Tensor) -> dict[str, Tensor]:
    """Return the labels of a folder's language model, whose class is called ``class_name``: its input."""
    is_language_model = config is not None and class_name.endswith(("ForCausalLM", "LMHeadModel"))
    return {"labels": x} if is_language_model and not x.is_floating_point() else {}


def _make_and_print_memory_plans(arguments: argparse.Namespace) -> int:
    training = None if arguments.training == "none" else arguments.training or "adamw"
    if training is not None and training not in OPTIMIZERS:
        raise ValueError(
            f"--training {training} is measured, not planned: leave out --plan and --at-most, or choose from none, "
            f"{', '.join(OPTIMIZERS)}"
        )
    plans: dict[str, tuple[Plan, Tensor]] = {}
    for name in arguments.models or ["bignet"]:
        base = folder_or_gguf_or_none(name)
        plans[displayed_model_name(name)] = (
            _named_model_plan_and_input(arguments, name, training)
            if base is None
            else _folder_or_gguf_plan_and_input(arguments, base, training)
        )
    if arguments.json:
        rows = [(name, list(x.shape), memory_plan.as_json()) for name, (memory_plan, x) in plans.items()]
        print_json([{"model": name, "input_shape": shape} | memory_plan for name, shape, memory_plan in rows])
        return 0
    for number, (name, (memory_plan, x)) in enumerate(plans.items()):
        print("\n" * (number > 0), end="")
        print_memory_plan(name, memory_plan, markdown=arguments.markdown)
        if is_hub_name(name) or folder_or_gguf_or_none(name) is not None:
            what = " x ".join(map(str, x.shape)) + (" numbers" if x.is_floating_point() else " tokens")
            print(f"\nof an input of {what}: --batch and --input-shape change them")
    return 0


def _techniques_to_plan(
    arguments: argparse.Namespace, optimizer: str | None, is_stored: bool
) -> tuple[Technique, ...]:
    """Return the techniques to plan: those of ``--plan``, or its default, of which a stored base takes adapters."""
    if arguments.plan or arguments.plan is None:
        return arguments.plan or ()
    return (*([] if is_stored else [FourBit()]), *([LoRA(DEFAULT_RANK)] if optimizer else []))


def _plan_kwargs(arguments: argparse.Namespace, optimizer: str | None) -> dict[str, Any]:
    """Return the options of ``plan`` that are the same for every model."""
    cached = {} if arguments.tokens is None else {"tokens": arguments.tokens, "sequences": arguments.batch}
    return {"training": optimizer, "at_most": arguments.at_most, "cache_bits": arguments.cache_bits} | cached


def _named_model_plan_and_input(
    arguments: argparse.Namespace, model_name: str, optimizer: str | None
) -> tuple[Plan, Tensor]:
    """Return the plan of a model and its input."""
    make, variant_techniques = factory_and_techniques(model_name)
    if variant_techniques:
        raise ValueError(
            f"model={model_name!r} has techniques of its own: name the model without them, and the techniques in "
            "--plan"
        )
    x, planned_techniques = _make_input_for_config(arguments), _techniques_to_plan(arguments, optimizer, False)
    return plan_or_raise_value_error(
        model_name, lambda: plan(make, *planned_techniques, batch=x, **_plan_kwargs(arguments, optimizer))
    ), x


def _folder_or_gguf_plan_and_input(
    arguments: argparse.Namespace, model_path: Path, optimizer: str | None
) -> tuple[Plan, Tensor]:
    """Return the plan of the model of a folder or GGUF file, and its input; of weights, only headers are read."""
    from lowmem.integrations.transformers.foreign_checkpoint import transformers_config
    from lowmem.integrations.transformers.model_facts import (
        delayed_transformers_log,
        dense_model_factory,
        model_class_from_path,
        quantizing_program_or_none,
    )
    from lowmem.tools.fit_dry_run import plan_with_stored_bytes, technique_dense_paths_and_bytes

    with delayed_transformers_log():
        cached = hub_name_and_commit_or_none(model_path)
        # Of a dense model of the Hub, the config is enough
        if cached is not None and not read_quantization_config(model_path / CONFIG):
            stored = False
        else:
            model_path = model_path if cached is None else fetch_model(HubName(cached[0]), cached[1])
            stored = quantizing_program_or_none(model_path, "plan") is not None
        planned_techniques = _techniques_to_plan(arguments, optimizer, stored)
        if stored and (
            arguments.at_most or not all(isinstance(asked_technique, LoRA) for asked_technique in planned_techniques)
        ):
            raise ValueError(
                f"model={str(model_path)!r} is stored already: leave out --at-most, and name LoRA alone in --plan"
            )
        technique, dense, nbytes = technique_dense_paths_and_bytes(model_path) if stored else (None, (), 0)
        kind, config = model_class_from_path(model_path), transformers_config(model_path)
        x = _make_input_for_config(arguments, config)
        labels = _language_model_label_kwargs(config, kind.__name__, x)
        named = {
            "input_ids": x,
            **_decoder_input_kwargs(config, x),
            **labels,
            **({"use_cache": False} if labels else {}),
        }
        batch = x if x.is_floating_point() else named
        planned_techniques = planned_techniques if technique is None else (technique, *planned_techniques)
        make = dense_model_factory(model_path, model_class=kind)
        memory_plan = plan_or_raise_value_error(
            str(model_path),
            lambda: plan(make, *planned_techniques, batch=batch, skip=dense, **_plan_kwargs(arguments, optimizer)),
        )
    return plan_with_stored_bytes(memory_plan, nbytes) if stored else memory_plan, x


def _check_step_options_and_plot_path(arguments: argparse.Namespace, measures_step: bool) -> None:
    """Raise, before anything is measured, if the arguments contradict each other or the picture cannot be written."""
    for option in ("memory", "rank", "plot"):
        if getattr(arguments, option) is not None and not measures_step:
            raise ValueError(
                f"--{option} applies to a measured training step: add its optimizer, such as --training adamw, and "
                "leave out --plan and --at-most"
            )
    if measures_step and arguments.all:
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
    check_chart_packages_installed("lowmem stats --plot")
    check_writable(path)


def _print_step_memory(arguments: argparse.Namespace, memory_by_model: Mapping[str, TrainingMemory]) -> None:
    """Print where the memory of each model's training step goes."""
    if arguments.json:
        print_json(
            [
                {"model": name, "memory": arguments.memory} | step_memory.as_json()
                for name, step_memory in memory_by_model.items()
            ]
        )
        return
    parts = dict.fromkeys(part for step_memory in memory_by_model.values() for part in step_memory.parts)
    order = sorted(parts, key=lambda part: (part == "scratch", part.startswith("activations")))
    rows = [
        [part, *(mib_text(step_memory.parts.get(part, 0)) for step_memory in memory_by_model.values())]
        for part in order
    ]
    rows.append(["peak", *(mib_text(step_memory.total_bytes) for step_memory in memory_by_model.values())])
    rows.append(["peak in", *(step_memory.moment for step_memory in memory_by_model.values())])
    print_table(["MiB", *memory_by_model], rows, markdown=arguments.markdown)


def _build_model_and_measure_step(
    arguments: argparse.Namespace, model_name: str, device: torch.device
) -> TrainingMemory:
    has_variant_adapters = model_folder_or_none(model_name) is None and any(
        isinstance(item, LoRA) for item in factory_and_techniques(model_name)[1]
    )  # adapters
    model = build_or_load_named_model(
        model_name, seed=arguments.seed, rank=arguments.rank if has_variant_adapters else None
    )
    config = _transformers_config_or_none(model_name, model)
    x = _make_input_for_config(arguments, config).to(device)
    with exceptions_as_value_error(f"model={model_name!r} cannot be trained"):
        if arguments.rank is not None and not has_variant_adapters and not adapter_names(model):
            model = convert(model, LoRA(arguments.rank))
        model = model.to(device)
        trains = any(item.requires_grad for item in model.parameters())
        if trains and arguments.memory is not None:
            prepare_training(model, arguments.memory)
    if not trains:
        raise ValueError(f"model={model_name!r} has no parameter that trains; --rank N adds adapters that do")
    labels: dict[str, Any] = _language_model_label_kwargs(config, type(model).__name__, x)
    return call_or_raise_input_error(
        model_name, lambda: training_memory(model, x, optimizer=arguments.training, **labels)
    )


def _write_step_memory_plot(arguments: argparse.Namespace, memory_by_model: Mapping[str, TrainingMemory]) -> None:
    from lowmem.report.page import step_memory_chart_file_bytes

    title = f"A training step with {arguments.training}" + f", {arguments.memory}" * (arguments.memory is not None)
    names = {escaped_and_truncated(name): step_memory for name, step_memory in memory_by_model.items()}
    write_atomically(arguments.plot, step_memory_chart_file_bytes(title, names, arguments.plot.suffix.lower()))
