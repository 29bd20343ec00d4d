"""``lowmem fit --dry-run`` of folders and GGUF files: the memory that a run takes, without training."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem import measure
from lowmem.finetuning.calling_convention import logits_from_output
from lowmem.finetuning.settings import OPTIMIZERS
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.io.formats.requantization import bytes_in_storage_form, form_with_dense_dtype, warn_if_model_grows
from lowmem.io.hub_names import displayed_model_name
from lowmem.io.metadata_records import parse_form_record
from lowmem.io.model_folder import read_quantization_config, weights_or_index_path
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.nn.dot_product_attention import float32_attention_mode_if_faster
from lowmem.nn.forms import CodedForm, Form, HalfForm
from lowmem.nn.techniques import Half, blockwise_technique
from lowmem.resident import resident_bytes_or_none
from lowmem.tools.fit_job import FineTuningJob
from lowmem.tools.named_models import plan_or_raise_value_error
from lowmem.tools.output import mib_text, print_json, print_memory_plan, progress_display, warnings_printed_as_notes
from lowmem.training.prepare_training import prepare_training
from lowmem.transforms.convert import convert
from lowmem.transforms.memory_plan import (
    Plan,
    convert_on_meta_and_count_bytes,
    make_fake_and_measure_run,
    permanently_on_fake_tensors,
    plan_from_figures,
    set_grads_and_measure_step,
)
from lowmem.transforms.module_registry import Technique

MEASURED_LAYER_COUNTS = (2, 3)
"""Layers of the models that are measured: the first and the last one may need less than those between."""

FRAGMENTATION_SHARE = 0.25
"""The allocator holds this share more than the tensors of a step: 0.2 to 0.3 of a llama and of SmolLM2."""

LOADING_BYTES = 8 * 2**20
"""Bytes that loading takes beside the stored model and the largest tensor: see docs/guides/hugging-face.md."""


def print_planned_memory(arguments: argparse.Namespace, job: FineTuningJob) -> int:
    """Print the memory that a run takes: of the model, and of the process with its imports and the tokenizer."""
    from lowmem.integrations.transformers.model_facts import delayed_transformers_log, dense_model_factory

    with delayed_transformers_log(), warnings_printed_as_notes():
        with torch.device("meta"):
            # Imports the code of the model's class
            dense_model_factory(job.model_path, 1)()
        _import_optimizer_modules()
        before = resident_bytes_or_none()
    with progress_display("dry run"):
        memory_plan, peak = plan_and_peak_bytes(job)
    job.print_notes()
    print_dry_run_line(job.gguf.description())
    if job.calibration_hint is not None:
        print_dry_run_line(job.calibration_hint)
    process = None if before is None else before + peak
    if arguments.json:
        print_json(
            {"model": displayed_model_name(job.model_path), "memory": job.memory_mode, "process_bytes": process}
            | memory_plan.as_json()
        )
        return 0
    print_memory_plan(displayed_model_name(job.model_path), memory_plan)
    rows = f"{job.batch_sequences} rows of {job.length} tokens"
    print(
        f"\nforward and backward, with --memory {job.memory_mode}, of {rows}: measured on at most "
        f"{max(MEASURED_LAYER_COUNTS)} of its layers"
    )
    if before is not None and process is not None:
        print(
            f"the process: {mib_text(process)} MiB at its peak, {mib_text(before)} of which are imports and the "
            "tokenizer"
        )
    return 0


def plan_and_peak_bytes(job: FineTuningJob, is_measured: bool = True) -> tuple[Plan, int]:
    """Return what a run takes, and its peak beyond what the process takes before.

    Args:
        job: on the CPU, of one process.
        is_measured: whether steps are measured, which computes them for a few layers; else they are planned as of
            ``--memory plain``, which takes the most.
    """
    from lowmem.integrations.transformers.model_facts import delayed_transformers_log

    with delayed_transformers_log(), warnings_printed_as_notes():
        storing, dense, exact = (
            (job.technique, (), 0) if job.is_dense else technique_dense_paths_and_bytes(job.model_path)
        )
        memory_plan = plan_or_raise_value_error(
            str(job.model_path), lambda: _plan_training_steps(job, storing, dense, is_measured), is_user_input=True
        )
    largest = 0
    if job.is_dense:
        with SafetensorsCheckpoint(weights_or_index_path(job.model_path)) as source:
            largest = max(spec.nbytes for spec in source.specs.values())
    else:
        memory_plan = plan_with_stored_bytes(memory_plan, exact)
    return memory_plan, _peak_bytes(job, memory_plan, largest)


def _import_optimizer_modules() -> None:
    """Let torch import what the first step of an optimizer needs: a run has these modules in memory, too."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
    parameter.grad = torch.zeros(1, dtype=torch.float32, device="cpu")
    torch.optim.AdamW([parameter]).step()


def _peak_bytes(job: FineTuningJob, memory_plan: Plan, largest_tensor_bytes: int) -> int:
    """Return the peak of loading, evaluating and training, beyond what the process takes before."""
    step = memory_plan.training_bytes - memory_plan.stored_bytes
    peaks = [
        memory_plan.stored_bytes + largest_tensor_bytes + LOADING_BYTES,
        memory_plan.stored_bytes + LOADING_BYTES + int(step * (1 + FRAGMENTATION_SHARE)),
    ]
    if job.compares_dense:
        peaks.append(memory_plan.dense + memory_plan.forward)
    return max(peaks)


def technique_dense_paths_and_bytes(model_path: Path) -> tuple[Technique | None, tuple[str, ...], int]:
    """Return how a folder or GGUF file stores its model.

    Returns:
        The technique of most stored weights; the paths of modules outside of the blocks that are dense, such as the
        embedding, since the form of an output layer decides what a step holds; and the bytes of all weights.
    """
    from lowmem.integrations.transformers.model_facts import (
        dense_model_factory,
        model_class_from_path,
        quantizing_program_or_none,
    )

    forms: Counter[Form] = Counter()
    total, coded = 0, set[str]()
    if quantizing_program_or_none(model_path) == "lowmem":
        for record in read_quantization_config(model_path / "config.json").get("layers", ()):
            form = parse_form_record({key: value for key, value in record.items() if key != "names"})
            forms[form] += len(record["names"])
            coded |= set(record["names"])
        with SafetensorsCheckpoint(weights_or_index_path(model_path)) as source:
            names = set(source.specs)
            # Beside the codes of a weight, the weight's own name holds its format.
            total = sum(spec.nbytes for name, spec in source.specs.items() if f"{name}_packed" not in names)
    else:
        with open_foreign_checkpoint(model_path) as file:
            names = set(file.tensors)
            tensors_and_forms = [(tensor, tensor.storage_form()) for tensor in file.tensors.values()]
            # As ``load_gguf`` makes the model
            dtype = torch.float32 if file.kind == "gguf" else None
            made = [(tensor, form_with_dense_dtype(form, dtype)) for tensor, form in tensors_and_forms]
            total = sum(bytes_in_storage_form(*pair) for pair in made)
            for tensor, stored in made:
                if isinstance(stored, CodedForm):
                    forms[stored] += 1
                    coded.add(tensor.name.removesuffix(".weight"))
            warn_if_model_grows(model_path, tensors_and_forms, total, dtype)
    with torch.device("meta"):
        outer = {
            path
            for path, _ in dense_model_factory(
                model_path, model_class=model_class_from_path(model_path)
            )().named_modules()
            if not re.search(r"\d", path)
        }
    dense = outer & {name.removesuffix(".weight") for name in names} - coded
    return _technique_from_form(forms.most_common(1)[0][0]) if forms else None, tuple(sorted(dense)), total


def plan_with_stored_bytes(memory_plan: Plan, stored_bytes: int) -> Plan:
    """Return a plan in which the base takes ``stored_bytes`` bytes as it is, beside its adapters."""
    adapters = {name: size for name, size in memory_plan.stored.items() if name == "adapters"}
    return replace(memory_plan, stored={"as it is": stored_bytes} | adapters)


def _technique_from_form(form: Form) -> Technique:
    if isinstance(form, HalfForm):
        return Half(form.dtype)
    return blockwise_technique(form.format, form.block_size, form.scale_encoding, form.compute_dtype, search=False)


def _plan_training_steps(
    job: FineTuningJob, technique: Technique | None, skipped_paths: tuple[str, ...], is_measured: bool
) -> Plan:
    """Return what fine-tuning a folder's model takes, with the peak of its steps in the plan's ``backward``.

    Plans run on fake tensors, and what ``prepare_training`` keeps depends on values. So models with the same layers,
    but few of them, run forward and backward on random weights; each other layer is taken to need what one more layer
    needs.
    """
    from lowmem.integrations.transformers.model_facts import dense_model_factory, read_language_model_sizes
    from lowmem.integrations.transformers.pretrained_folder import check_tensors_fit_config

    if job.is_dense:
        check_tensors_fit_config(job.model_path)
    techniques = (*([] if technique is None else [technique]), job.adapter)
    rows, length = job.batch_sequences, job.length
    targets = torch.zeros(rows * length, dtype=torch.int64, device="cpu")
    batch: dict[str, Any] = {"input_ids": targets.view(rows, length), "use_cache": False}

    def cross_entropy_loss(output: Any) -> Tensor:
        logits = logits_from_output(output)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device), reduction="sum")

    def measure_step_bytes(layer_count: int) -> dict[str, int]:
        """Return the figures of a model with ``layer_count`` layers: its forward is planned, and a step is run."""
        planned = convert_on_meta_and_count_bytes(
            dense_model_factory(job.model_path, layer_count), techniques, None, skipped_paths
        )
        if not is_measured:
            return make_fake_and_measure_run(planned.model, batch, "sgd", cross_entropy_loss)
        forward_figures = make_fake_and_measure_run(planned.model, batch, None, None)
        print_dry_run_line(
            f"runs forward and backward of {layer_count} of the {sizes.layers} layers, with random weights"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = convert(dense_model_factory(job.model_path, layer_count)(), *techniques, skip=skipped_paths)
            if job.memory_mode != "plain":
                prepare_training(model, job.memory_mode)
            with float32_attention_mode_if_faster(model):
                return forward_figures | {"backward": measure.backward_bytes(model, loss=cross_entropy_loss, **batch)}

    sizes = read_language_model_sizes(job.model_path)
    if is_measured:
        print_dry_run_line("plans the model without its weights")
    whole = convert_on_meta_and_count_bytes(dense_model_factory(job.model_path), techniques, None, skipped_paths)
    with permanently_on_fake_tensors(whole.model):
        updated = set_grads_and_measure_step(
            [parameter for parameter in whole.model.parameters() if parameter.requires_grad],
            OPTIMIZERS[job.settings.optimizer],
        )
    if sizes.layers <= max(MEASURED_LAYER_COUNTS):
        return plan_from_figures(whole, job.settings.optimizer, measure_step_bytes(sizes.layers) | updated)
    fewer, more = map(measure_step_bytes, MEASURED_LAYER_COUNTS)
    extrapolated = {
        name: size + (sizes.layers - MEASURED_LAYER_COUNTS[1]) * (size - fewer[name]) for name, size in more.items()
    }
    return plan_from_figures(whole, job.settings.optimizer, extrapolated | updated)


def print_dry_run_line(line: str) -> None:
    """Say on stderr what a dry run does."""
    print(f"lowmem fit --dry-run: {line}", file=sys.stderr, flush=True)
