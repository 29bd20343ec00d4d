"""Runs of a model over sample inputs: batches, the model's mode meanwhile, hooks and replaced forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.quant.backend import fast_matmul_dtype


class StopModelRun(BaseException):
    """Ends a run of the model once its result is known; no Exception, which a model might catch."""


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch, as ``check_batch_type`` takes it, and return its output."""
    check_batch_type(batch)
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def check_batch_type(batch: Any) -> None:
    """Raise a TypeError unless a batch is a Tensor, a tuple or list of arguments, or a mapping of named ones."""
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise TypeError(
            f"a batch is a {type(batch).__name__}; it must be a Tensor, a tuple or list of the model's arguments, or "
            "a mapping of its keyword arguments"
        )


def check_batches_reiterable(batches: object) -> None:
    """Raise a TypeError unless ``batches`` can be iterated several times."""
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which can be read only once; pass a list of it: list(batches)"
        )
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; pass a list of batches, if only of one: [batch]")


@contextmanager
def evaluation_without_gradients(model: nn.Module) -> Iterator[ExitStack]:
    """Put the model in evaluation mode without gradients; yield a stack of contexts that ends with the block."""
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # which bypasses the linear layers of encoder layers
        with torch.no_grad(), ExitStack() as stack:
            yield stack
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes.items():
            module.training = training


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module call ``forward`` inside the block; then it has its own again, or that of a user."""
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward", None)
        if before is not None:
            attributes["forward"] = before


@contextmanager
def linear_layers_in_fast_dtype(model: nn.Module) -> Iterator[None]:
    """Let dense linear layers compute in float32 inside the block, where torch is slow at their dtype.

    Results have the dtype of the input. Layers with a ``forward`` of their own keep it.
    """

    def forward_in(layer: nn.Linear, wide: torch.dtype, input: Tensor) -> Tensor:
        if input.dtype is not layer.weight.dtype:
            # As torch refuses it
            return nn.functional.linear(input, layer.weight, layer.bias)
        bias = None if layer.bias is None else layer.bias.to(wide)
        return nn.functional.linear(input.to(wide), layer.weight.to(wide), bias).to(input.dtype)

    with ExitStack() as stack:
        for layer in model.modules():
            if type(layer) is nn.Linear and "forward" not in vars(layer):
                wide = fast_matmul_dtype(layer.weight.dtype, layer.weight)
                if wide is not layer.weight.dtype:
                    stack.enter_context(replaced_forward(layer, partial(forward_in, layer, wide)))
        yield


@contextmanager
def registered_forward_pre_hooks(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(module, args, kwargs)`` before each call of one of the modules inside the block."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
