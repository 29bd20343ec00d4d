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
from lowmem.transforms.bit_budget import RowAndColumnImportance
from lowmem.transforms.calibration.model_runs import (
    StopModelRun,
    evaluation_without_gradients,
    registered_forward_pre_hooks,
    run_batch,
)
from lowmem.transforms.module_registry import layer_display_name


def measure_importance_by_weight(
    model: nn.Module, batches: Iterable[Any], weights_and_columns: Mapping[str, tuple[nn.Parameter, int]]
) -> dict[str, RowAndColumnImportance]:
    """Return how much squared errors of weights change the model's output, relative to the output's squared norm.

    With a random sign for each number y of the output, ``(sum of sign * y)^2`` has the expectation |y|^2 (Hutchinson,
    A stochastic estimator of the trace of the influence matrix, 1989). The gradient of the sum for each batch is thus
    a sample of how the output depends on a weight; the squares of its values are summed over rows and over columns.
    Outputs at positions that an ``attention_mask`` of the batch leaves out do not count. The model runs in evaluation
    mode; the signs are the same in each run. Peak memory beside a training step's is one gradient.

    ``weights_and_columns`` have, by names for errors, the number of columns as which they are stored; those on which
    the output
    does not depend are left out. No batches, an output without gradients, or gradients that are not finite are a
    ValueError; the layer is named.
    """
    rows = {
        name: torch.zeros(weight.numel() // columns, dtype=torch.float64, device="cpu")
        for name, (weight, columns) in weights_and_columns.items()
    }
    sums = {
        name: torch.zeros(columns, dtype=torch.float64, device="cpu")
        for name, (_, columns) in weights_and_columns.items()
    }

    def accumulate_squares_and_clear_grad(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        squares = parameter.grad.detach().reshape(-1, len(sums[name])).double().square_().cpu()  # (rows, columns)
        rows[name] += squares.sum(1)
        sums[name] += squares.sum(0)
        parameter.grad = None

    generator = torch.Generator("cpu").manual_seed(0)
    size, runs = 0.0, 0
    with (
        _evaluation_with_weight_grads_only(model, [weight for weight, _ in weights_and_columns.values()]),
        ExitStack() as stack,
    ):
        for name, (weight, _) in weights_and_columns.items():
            stack.callback(
                weight.register_post_accumulate_grad_hook(partial(accumulate_squares_and_clear_grad, name)).remove
            )
        for batch in batches:
            output = run_batch(model, batch)
            projected, squared = _random_sign_sum_and_squared_norm(output, batch, generator)
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
    importances = {}
    for name in weights_and_columns:
        total = float(rows[name].sum())
        if not math.isfinite(total) or not math.isfinite(size):
            broken = _path_of_nonfinite_input_or_none(
                model, batches, [weight for weight, _ in weights_and_columns.values()]
            )
            if broken is not None:
                raise ValueError(
                    f"{layer_display_name(broken)}: its inputs hold NaN or infinite values: look for a broken batch "
                    "or "
                    "weight before it"
                )
            raise ValueError(
                f"{layer_display_name(name)}: the gradients of the samples hold NaN or infinite values: leave out "
                "the "
                "batches whose outputs do"
            )
        if total and size:
            importances[name] = RowAndColumnImportance(rows[name] / size, sums[name] / total)
    return importances


def _path_of_nonfinite_input_or_none(
    model: nn.Module, batches: Iterable[Any], weights: Iterable[nn.Parameter]
) -> str | None:
    """Return the path of the first module with one of the weights whose inputs are no finite numbers."""
    ids, broken = set(map(id, weights)), list[str]()
    paths = {
        module: path
        for path, module in model.named_modules()
        if any(id(parameter) in ids for parameter in module._parameters.values())
    }

    def stop_at_nonfinite_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        # Masks behind it may well be infinite
        first = next(measure.tensors_in((args, kwargs)), None)
        if first is not None and not first.isfinite().all():
            broken.append(paths[module])
            raise StopModelRun

    with (
        evaluation_without_gradients(model),
        suppress(StopModelRun),
        registered_forward_pre_hooks(paths, stop_at_nonfinite_input),
    ):
        for batch in batches:
            run_batch(model, batch)
    return broken[0] if broken else None


def _random_sign_sum_and_squared_norm(
    output: Any, batch: Any, generator: torch.Generator
) -> tuple[Tensor | None, float]:
    """Return the sum of an output's numbers with random signs, and the sum of their squares."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    projected, squared = None, 0.0
    for tensor in _logits_or_output_tensors(output):
        if not tensor.is_floating_point() or not tensor.requires_grad:
            continue
        bits = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int64, device="cpu")
        sign = bits.mul_(2).sub_(1).to(tensor.device, torch.float32)
        if isinstance(mask, Tensor) and tensor.dim() > 2 and tensor.shape[:2] == mask.shape:
            sign *= (mask != 0).to(sign)[..., None]
        values = tensor.float() * sign
        projected = values.sum() if projected is None else projected + values.sum()
        squared += float(values.detach().double().square().sum())
    return projected, squared


def _logits_or_output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output; of a language model's or an encoder's the logits, or the last hidden state."""
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(output, name, None)
        if isinstance(tensor, Tensor):
            return [tensor]
    return list(dict.fromkeys(measure.tensors_in(output)))


@contextmanager
def _evaluation_with_weight_grads_only(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only some weights have gradients in the block, in evaluation mode; everything is put back afterwards."""
    parameters = list(model.parameters())
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    with evaluation_without_gradients(model), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            for parameter in weights:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, trains, gradient in before:
                parameter.requires_grad_(trains)
                parameter.grad = gradient
