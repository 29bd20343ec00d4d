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
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowmem
from benchmarks.cases import BATCHES, Block, Training, built_variant, dense_model, inference_input, weight_to_quantize

Call = Callable[[], object]

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BATCHES_ON_ALL_CORES = (1, 128)
SMALL = 16  # columns and rows of a layer in which the call counts, not the product
ROWS, COLUMNS = 128, 512  # of a layer whose product is counted in instructions


@dataclass(frozen=True)
class Workload:
    """What is timed."""

    set_up: Callable[[], Call]  # returns the call that is timed
    threads: int = 1  # that torch may use
    clock: str = "cpu"  # seconds of this process, or "wall" seconds


def inference(variant: str, batch: int) -> Call:
    return _forward(built_variant(variant), inference_input(batch))


def small_layer(techniques: tuple[Any, ...]) -> Call:
    """Return the call of one small layer at batch 1: mostly Python."""
    torch.manual_seed(0)
    fitting = [replace(one, rank=SMALL) if isinstance(one, lowmem.LoRA) else one for one in techniques]
    layer = lowmem.convert(nn.Linear(SMALL, SMALL).eval(), *fitting)
    return _forward(layer, torch.randn(1, SMALL))


def _forward(model: nn.Module, x: torch.Tensor) -> Call:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    return run


def product(technique: object, batch: int, gradient: bool = False) -> Call:
    """Return the product of a layer with a batch, or that and the gradient of its input."""
    torch.manual_seed(0)
    layer = lowmem.convert(nn.Linear(COLUMNS, ROWS).eval(), technique)
    x = torch.randn(batch, COLUMNS, requires_grad=gradient)
    out = torch.ones(batch, ROWS)
    return (lambda: torch.autograd.grad(layer(x), x, out)) if gradient else _forward(layer, x)


def training_step(variant: str) -> Call:
    """Return a training step, after one that made the optimizer's state."""
    training = Training(variant, body=copy.deepcopy(built_variant(variant)))  # to build it again takes longer
    training.step()
    return training.step


def decode_step(dtype: torch.dtype) -> Call:
    """Return the call of two blocks of a language model in 4 bits, which computes one token."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block()).to(dtype).eval()
    lowmem.convert(blocks, lowmem.FourBit("q4_0", block_size=32))
    return _forward(blocks, torch.randn(1, 1, 576, dtype=dtype))


def quantize(form: str, rows: int = 4096) -> Call:
    return partial(lowmem.quantize, weight_to_quantize(rows), form)


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
    for dtype in (torch.float32, torch.bfloat16):
        name, step = f"decode step, {str(dtype).removeprefix('torch.')}", partial(decode_step, dtype)
        found[name], found[f"{name}, all cores"] = Workload(step), Workload(step, CORES, "wall")
    for form in lowmem.FORMATS:
        found[f"quantize {form}"] = Workload(partial(quantize, form))
    for name, work in (("save", save), ("load", load)):
        found[name] = Workload(work)
        found[f"{name}, waiting"] = Workload(work, clock="wall")
    return found


def counted() -> dict[str, Callable[[], Call]]:
    """Return what sets up the workloads whose instructions are counted, by name."""
    found: dict[str, Callable[[], Call]] = {
        f"layer's Python, {variant}": partial(small_layer, techniques)
        for variant, techniques in lowmem.VARIANTS.items()
        if techniques
    }
    techniques = {"nf4": lowmem.FourBit("nf4"), "int4": lowmem.FourBit("int4", block_size=16), "half": lowmem.Half()}
    for name, technique in techniques.items():
        for batch in (1, 8, 32):
            found[f"portable kernel, {name} batch {batch}"] = partial(product, technique, batch)
        found[f"portable kernel, {name} gradient"] = partial(product, technique, 8, True)
    for form in lowmem.FORMATS:
        found[f"portable kernel, quantize {form}"] = partial(quantize, form, rows=8)
    return found


@cache
def _saved() -> tuple[Path, nn.Module]:
    """Return a directory with a saved model, and the model. The directory is the worker's own, which is removed."""
    directory = Path(tempfile.mkdtemp(dir=os.getcwd()))
    torch.manual_seed(0)
    model = lowmem.convert(dense_model(), lowmem.FourBit("nf4"))
    lowmem.save(model, directory / "converted")
    return directory, copy.deepcopy(model)
