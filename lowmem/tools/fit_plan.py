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
from lowmem.finetuning.calling import logits_of
from lowmem.io.formats.recognize import open_foreign
from lowmem.io.formats.requantizing import kept_bytes, warn_of_growth, with_dtype
from lowmem.io.metadata import form_of
from lowmem.io.model_folder import quantization_of, weights_in
from lowmem.io.source import Source
from lowmem.nn.dot_product_attention import without_slow_attention
from lowmem.nn.forms import CodedForm, Form, HalfForm
from lowmem.nn.techniques import Half, blockwise
from lowmem.resident import resident_bytes
from lowmem.tools.fit_job import Job
from lowmem.tools.models import plan_model
from lowmem.tools.output import mib, print_json, print_plan, progress, warnings_as_notes
from lowmem.training.prepare import prepare_training
from lowmem.transforms.convert import convert
from lowmem.transforms.plan import Plan, on_fake_tensors, plan_of, run_figures, skeleton_of, update_figures
from lowmem.transforms.registry import Technique

FEW = (2, 3)
"""Layers of the models that are measured: the first and the last one may need less than those between."""

HOLES = 0.25
"""The allocator holds this share more than the tensors of a step: 0.2 to 0.3 of a llama and of SmolLM2."""

LOADING = 8 * 2**20
"""Bytes that loading takes beside the stored model and the largest tensor: see docs/guides/hugging-face.md."""


def dry_run(arguments: argparse.Namespace, job: Job) -> int:
    """Print the memory that a run takes: of the model, and of the process with its imports and the tokenizer."""
    from lowmem.integrations.transformers.config_facts import factory_of, held_back

    with held_back(), warnings_as_notes():
        with torch.device("meta"):
            factory_of(job.folder, 1)()  # imports the code of the model's class
        _import_optimizer()
        before = resident_bytes()
        storing, dense, exact = (job.technique, (), 0) if job.dense else stored_as(job.folder)
    with held_back(), warnings_as_notes(), progress("dry run"):
        found = plan_model(str(job.folder), lambda: _plan_steps(job, storing, dense), given=True)
    job.tell()
    largest = 0
    if job.dense:
        with Source(weights_in(job.folder)) as source:
            largest = max(spec.nbytes for spec in source.specs.values())
    else:
        found = with_stored(found, exact)
    process = None if before is None else before + _peak(job, found, largest)
    if arguments.json:
        print_json({"model": str(job.folder), "memory": job.memory, "process_bytes": process} | found.as_json())
        return 0
    print_plan(str(job.folder), found)
    rows = f"{job.settings.batch_size} rows of {job.length} tokens"
    print(
        f"\nforward and backward, with --memory {job.memory}, of {rows}: measured on at most {max(FEW)} of its layers"
    )
    if before is not None and process is not None:
        print(f"the process: {mib(process)} MiB at its peak, {mib(before)} of which are imports and the tokenizer")
    return 0


def _import_optimizer() -> None:
    """Let torch import what the first step of an optimizer needs: a run has these modules in memory, too."""
    one = nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
    one.grad = torch.zeros(1, dtype=torch.float32, device="cpu")
    torch.optim.AdamW([one]).step()


def _peak(job: Job, found: Plan, largest: int) -> int:
    """Return the peak of loading, evaluating and training, beyond what the process takes before."""
    step = found.training_bytes - found.stored_bytes
    peaks = [found.stored_bytes + largest + LOADING, found.stored_bytes + LOADING + int(step * (1 + HOLES))]
    if job.dense and job.technique is not None and job.held_out is not None and not job.skip_dense:
        peaks.append(found.dense + found.forward)
    return max(peaks)


def stored_as(base: Path) -> tuple[Technique | None, tuple[str, ...], int]:
    """Return how a folder or GGUF file stores its model.

    Returns:
        The technique of most stored weights; the paths of modules outside of the blocks that are dense, such as the
        embedding, since the form of an output layer decides what a step holds; and the bytes of all weights.
    """
    from lowmem.integrations.transformers.config_facts import class_at, factory_of, stored_by

    forms: Counter[Form] = Counter()
    total, coded = 0, set[str]()
    if stored_by(base) == "lowmem":
        for record in quantization_of(base / "config.json").get("layers", ()):
            form = form_of({key: value for key, value in record.items() if key != "names"})
            forms[form] += len(record["names"])
            coded |= set(record["names"])
        with Source(weights_in(base)) as source:
            names = set(source.specs)
            # Beside the codes of a weight, the weight's own name holds its format.
            total = sum(spec.nbytes for name, spec in source.specs.items() if f"{name}_packed" not in names)
    else:
        with open_foreign(base) as file:
            names = set(file.tensors)
            kept = [(tensor, tensor.kept()) for tensor in file.tensors.values()]
            dtype = torch.float32 if file.kind == "gguf" else None  # as ``load_gguf`` makes the model
            made = [(tensor, with_dtype(form, dtype)) for tensor, form in kept]
            total = sum(kept_bytes(*pair) for pair in made)
            for tensor, stored in made:
                if isinstance(stored, CodedForm):
                    forms[stored] += 1
                    coded.add(tensor.name.removesuffix(".weight"))
            warn_of_growth(base, kept, total, dtype)
    with torch.device("meta"):
        outer = {
            path for path, _ in factory_of(base, kind=class_at(base))().named_modules() if not re.search(r"\d", path)
        }
    dense = outer & {name.removesuffix(".weight") for name in names} - coded
    return _technique_of(forms.most_common(1)[0][0]) if forms else None, tuple(sorted(dense)), total


def with_stored(found: Plan, stored: int) -> Plan:
    """Return a plan in which the base takes ``stored`` bytes as it is, beside its adapters."""
    adapters = {name: size for name, size in found.stored.items() if name == "adapters"}
    return replace(found, stored={"as it is": stored} | adapters)


def _technique_of(form: Form) -> Technique:
    if isinstance(form, HalfForm):
        return Half(form.dtype)
    return blockwise(form.format, form.block_size, form.scale_encoding, form.compute_dtype, search=False)


def _plan_steps(job: Job, storing: Technique | None, skip: tuple[str, ...]) -> Plan:
    """Return what fine-tuning a folder's model takes, with the peak of its steps in the plan's ``backward``.

    Plans run on fake tensors, and what ``prepare_training`` keeps depends on values. So models with the same layers,
    but few of them, run forward and backward on random weights; each other layer is taken to need what one more layer
    needs.
    """
    from lowmem.integrations.transformers.config_facts import factory_of, sizes_of
    from lowmem.integrations.transformers.folder import check_shapes

    if job.dense:
        check_shapes(job.folder)
    techniques = (*([] if storing is None else [storing]), job.adapter)
    rows, length = job.settings.batch_size, job.length
    targets = torch.zeros(rows * length, dtype=torch.int64, device="cpu")
    batch: dict[str, Any] = {"input_ids": targets.view(rows, length), "use_cache": False}

    def loss(output: Any) -> Tensor:
        logits = logits_of(output)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device), reduction="sum")

    def figures(layers: int) -> dict[str, int]:
        """Return the figures of a model with ``layers`` layers: its forward is planned, and a step is run."""
        planned = skeleton_of(factory_of(job.folder, layers), techniques, None, skip)
        found = run_figures(planned.model, batch, None, None)
        tell(f"runs forward and backward of {layers} of the {sizes.layers} layers, with random weights")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = convert(factory_of(job.folder, layers)(), *techniques, skip=skip)
            if job.memory != "plain":
                prepare_training(model, job.memory)
            with without_slow_attention(model):
                return found | {"backward": measure.backward_bytes(model, loss=loss, **batch)}

    sizes = sizes_of(job.folder)
    tell("plans the model without its weights")
    whole = skeleton_of(factory_of(job.folder), techniques, None, skip)
    with on_fake_tensors(whole.model):
        updated = update_figures([one for one in whole.model.parameters() if one.requires_grad], "adamw")
    if sizes.layers <= max(FEW):
        return plan_of(whole, "adamw", figures(sizes.layers) | updated)
    fewer, more = map(figures, FEW)
    extrapolated = {name: size + (sizes.layers - FEW[1]) * (size - fewer[name]) for name, size in more.items()}
    return plan_of(whole, "adamw", extrapolated | updated)


def tell(line: str) -> None:
    """Say on stderr what a dry run does."""
    print(f"lowmem fit --dry-run: {line}", file=sys.stderr, flush=True)
