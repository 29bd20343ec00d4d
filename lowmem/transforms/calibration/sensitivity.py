"""Measures how much a model's output changes with errors of each weight, by gradients of random projections of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowmem import measure
from lowmem.transforms.budget import Importance
from lowmem.transforms.calibration.runs import Stop, evaluation_mode, hooked, run_batch
from lowmem.transforms.registry import layer_name


def importance_of(
    model: nn.Module, batches: Iterable[Any], weights: Mapping[str, tuple[nn.Parameter, int]]
) -> dict[str, Importance]:
    """Return how much squared errors of weights change the model's output, relative to the output's squared norm.

    With a random sign for each number y of the output, ``(sum of sign * y)^2`` has the expectation |y|^2 (Hutchinson,
    A stochastic estimator of the trace of the influence matrix, 1989). The gradient of the sum for each batch is thus
    a sample of how the output depends on a weight; the squares of its values are summed over rows and over columns.
    Outputs at positions that an ``attention_mask`` of the batch leaves out do not count. The model runs in evaluation
    mode; the signs are the same in each run. Peak memory beside a training step's is one gradient.

    ``weights`` have, by names for errors, the number of columns as which they are stored; those on which the output
    does not depend are left out. No batches, an output without gradients, or gradients that are not finite are a
    ValueError; the layer is named.
    """
    rows = {
        name: torch.zeros(one.numel() // columns, dtype=torch.float64, device="cpu")
        for name, (one, columns) in weights.items()
    }
    sums = {name: torch.zeros(columns, dtype=torch.float64, device="cpu") for name, (_, columns) in weights.items()}

    def add(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        squares = parameter.grad.detach().reshape(-1, len(sums[name])).double().square_().cpu()  # (rows, columns)
        rows[name] += squares.sum(1)
        sums[name] += squares.sum(0)
        parameter.grad = None

    generator = torch.Generator("cpu").manual_seed(0)
    size, runs = 0.0, 0
    with _gradients_of(model, [one for one, _ in weights.values()]), ExitStack() as stack:
        for name, (one, _) in weights.items():
            stack.callback(one.register_post_accumulate_grad_hook(partial(add, name)).remove)
        for batch in batches:
            output = run_batch(model, batch)
            projected, squared = _projection(output, batch, generator)
            if projected is None:
                raise ValueError(
                    f"the output of {type(model).__name__} does not depend on its weights by gradients: "
                    "convert(model, Budget(bits)) divides a budget without samples"
                )
            projected.backward()
            size, runs = size + squared, runs + 1
            del output, projected
    if not runs:
        raise ValueError("inputs is empty: pass one batch at least, or leave it out")
    found = {}
    for name in weights:
        total = float(rows[name].sum())
        if not math.isfinite(total) or not math.isfinite(size):
            broken = _first_that_gets_none(model, batches, [one for one, _ in weights.values()])
            if broken is not None:
                raise ValueError(
                    f"{layer_name(broken)}: its inputs hold NaN or infinite values: look for a broken batch or "
                    "weight before it"
                )
            raise ValueError(
                f"{layer_name(name)}: the gradients of the samples hold NaN or infinite values: leave out the "
                "batches whose outputs do"
            )
        if total and size:
            found[name] = Importance(rows[name] / size, sums[name] / total)
    return found


def _first_that_gets_none(model: nn.Module, batches: Iterable[Any], weights: Iterable[nn.Parameter]) -> str | None:
    """Return the path of the first module with one of the weights whose inputs are no finite numbers."""
    ids, broken = set(map(id, weights)), list[str]()
    paths = {
        module: path
        for path, module in model.named_modules()
        if any(id(one) in ids for one in module._parameters.values())
    }

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        first = next(measure.tensors_in((args, kwargs)), None)  # masks behind it may well be infinite
        if first is not None and not first.isfinite().all():
            broken.append(paths[module])
            raise Stop

    with evaluation_mode(model), suppress(Stop), hooked(paths, see):
        for batch in batches:
            run_batch(model, batch)
    return broken[0] if broken else None


def _projection(output: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor | None, float]:
    """Return the sum of an output's numbers with random signs, and the sum of their squares."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    projected, squared = None, 0.0
    for one in _tensors_of(output):
        if not one.is_floating_point() or not one.requires_grad:
            continue
        bits = torch.randint(0, 2, one.shape, generator=generator, dtype=torch.int64, device="cpu")
        sign = bits.mul_(2).sub_(1).to(one.device, torch.float32)
        if isinstance(mask, Tensor) and one.dim() > 2 and one.shape[:2] == mask.shape:
            sign *= (mask != 0).to(sign)[..., None]
        values = one.float() * sign
        projected = values.sum() if projected is None else projected + values.sum()
        squared += float(values.detach().double().square().sum())
    return projected, squared


def _tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of an output; of a language model's or an encoder's the logits, or the last hidden state."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return [found]
    return list(dict.fromkeys(measure.tensors_in(output)))


@contextmanager
def _gradients_of(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only some weights have gradients in the block, in evaluation mode; everything is put back afterwards."""
    parameters = list(model.parameters())
    before = [(one, one.requires_grad, one.grad) for one in parameters]
    with evaluation_mode(model), torch.enable_grad():
        try:
            for one in parameters:
                one.requires_grad_(False)
                one.grad = None
            for one in weights:
                one.requires_grad_(True)
            yield
        finally:
            for one, trains, gradient in before:
                one.requires_grad_(trains)
                one.grad = gradient
