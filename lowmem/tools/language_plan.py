"""``lowmem fit --dry-run`` of folders: what the steps take, with ``--memory`` as it is given.

Plans run on fake tensors, and what ``prepare_training`` keeps depends on values. So a model with the same layers, but
few of them, takes two steps on random weights, and the others are taken to need what one more layer needs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.finetuning.calling import logits_of
from lowmem.nn.techniques import LoRA
from lowmem.training.memory import training_memory
from lowmem.training.prepare import prepare_training
from lowmem.transforms.convert import convert
from lowmem.transforms.plan import Plan, plan
from lowmem.transforms.registry import Technique

__all__ = ["FEW", "plan_steps"]

FEW = (2, 3)
"""Layers of the models that are measured: the first and the last one may need less than those between."""


def plan_steps(folder: Path, storing: Technique | None, rank: int, memory: str, rows: int, length: int) -> Plan:
    """Return what fine-tuning a folder's dense model takes, with the peak of its steps in the plan's ``backward``.

    Args:
        folder: of the model.
        storing: how to store it; None: as it is.
        rank: of the adapter.
        memory: "fast", "lean" or "plain".
        rows: of a batch.
        length: tokens of each.

    Raises:
        FileError: the folder has a tensor in another shape than its config.json says.
        ValueError: the model cannot be planned or run.
    """
    from lowmem.integrations.transformers.config_facts import factory_of, sizes_of
    from lowmem.integrations.transformers.folder import check_shapes

    check_shapes(folder)
    techniques = (*([] if storing is None else [storing]), LoRA(rank))
    targets = torch.zeros(rows * length, dtype=torch.int64)
    batch: dict[str, Any] = {"input_ids": targets.view(rows, length), "use_cache": False}

    def loss(output: Any) -> Tensor:
        logits = logits_of(output)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device), reduction="sum")

    def step(layers: int) -> int:
        """Return the peak of a step of a model of so many layers, beyond model and inputs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = convert(factory_of(folder, layers)(), *techniques)
            if memory != "plain":
                prepare_training(model, memory)
            return training_memory(model, loss=loss, **batch).step_bytes

    found, layers = plan(factory_of(folder), *techniques, batch=batch, loss=loss), sizes_of(folder).layers
    if layers <= max(FEW):
        return replace(found, backward=step(layers) - found.optimizer)
    fewer, more = map(step, FEW)
    return replace(found, backward=more + (layers - FEW[1]) * (more - fewer) - found.optimizer)
