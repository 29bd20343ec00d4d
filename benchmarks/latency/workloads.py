"""What the gate times: each workload is a name and what sets it up. Base and head run the same ones, these.

Most run on one thread and are timed in seconds of the processor, to which another process's load adds little. Those
named ``all cores`` or ``waiting`` are timed by the clock, so that waiting counts: for threads, locks and disks. Files
are read and written in both ways: beside another load, the clock alone hides what the processor does more.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

import lowmem
from benchmarks.cases import BATCHES, Training, dense_model, inference_input, weight_to_quantize

Call = Callable[[], object]

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BATCHES_ON_ALL_CORES = (1, 128)
SMALL = 16  # columns and rows of a layer in which the call counts, not the product


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        set_up: prepares it, and returns the call that is timed.
        threads: that torch may use.
        clock: ``cpu`` seconds of this process, or ``wall`` seconds.
    """

    set_up: Callable[[], Call]
    threads: int = 1
    clock: str = "cpu"


def inference(variant: str, batch: int) -> Call:
    model, x = _model(variant), inference_input(batch)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    return run


def small_layer(techniques: tuple[object, ...]) -> Call:
    """Return the call of one small layer at batch 1: mostly Python."""
    torch.manual_seed(0)
    layer = lowmem.convert(nn.Linear(SMALL, SMALL).eval(), *techniques)
    x = torch.randn(1, SMALL)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def training_step(variant: str) -> Call:
    """Return a training step, after one that made the optimizer's state."""
    training = Training(variant, body=copy.deepcopy(_model(variant)))  # to build it again takes longer
    training.step()
    return training.step


def quantize(form: str) -> Call:
    return partial(lowmem.quantize, weight_to_quantize(), form)


def save() -> Call:
    directory, model = _saved()
    return partial(lowmem.save, model, directory / "again")


def load() -> Call:
    directory, _ = _saved()
    return partial(lowmem.load, directory / "converted", dense_model)


def workloads() -> dict[str, Workload]:
    """Return the workloads by name, in the order in which they are timed and shown."""
    found: dict[str, Workload] = {}
    for variant in lowmem.VARIANTS:
        for batch in BATCHES:
            found[f"inference {variant} batch {batch}"] = Workload(partial(inference, variant, batch))
        for batch in BATCHES_ON_ALL_CORES:
            found[f"inference {variant} batch {batch}, all cores"] = Workload(
                partial(inference, variant, batch), CORES, "wall"
            )
        found[f"training step {variant}"] = Workload(partial(training_step, variant))
        if lowmem.VARIANTS[variant]:
            found[f"small layer {variant}"] = Workload(partial(small_layer, lowmem.VARIANTS[variant]))
    for form in lowmem.FORMATS:
        found[f"quantize {form}"] = Workload(partial(quantize, form))
    for name, work in (("save", save), ("load", load)):
        found[name] = Workload(work)
        found[f"{name}, waiting"] = Workload(work, clock="wall")
    return found


@cache
def _model(variant: str) -> nn.Module:
    return lowmem.build(variant).eval()


@cache
def _saved() -> tuple[Path, nn.Module]:
    """Return a directory with a saved model, and the model. The directory is the worker's own, which is removed."""
    directory = Path(tempfile.mkdtemp(dir=os.getcwd()))
    torch.manual_seed(0)
    model = lowmem.convert(dense_model(), lowmem.FourBit("nf4"))
    lowmem.save(model, directory / "converted")
    return directory, copy.deepcopy(model)
