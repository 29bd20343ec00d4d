"""An optimizer that steps inside backward: a gradient is freed as soon as its parameter is updated.

Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources, arXiv 2306.09782, for any
optimizer that treats parameters one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["StepInBackward", "step_in_backward"]


class StepInBackward:
    """An optimizer that steps inside backward, until ``release``.

    Attributes:
        optimizer: with its own groups and states.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._done: set[Tensor] = set()
        self._running = False
        parameters = [one for group in optimizer.param_groups for one in group["params"] if one.requires_grad]
        self._handles: list[Any] = [one.register_post_accumulate_grad_hook(self._step) for one in parameters]
        self._handles.append(optimizer.register_step_post_hook(self._ended))

    def release(self) -> torch.optim.Optimizer:
        """Let the optimizer step when it is told to, as before; return it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.optimizer

    def _step(self, parameter: Tensor) -> None:
        """Update one parameter, whose gradient backward has completed."""
        if parameter in self._done:
            raise RuntimeError(
                "a second gradient of a parameter that was updated in backward: gradients are not accumulated here. "
                "Call optimizer.step() after each backward, which ends the step; to accumulate over batches, or to "
                "use a parameter in several reentrant checkpoints, release() the optimizer"
            )
        optimizer = self.optimizer
        groups = optimizer.param_groups
        own = next(group for group in groups if any(one is parameter for one in group["params"]))
        self._running = True
        try:
            optimizer.param_groups = [{**own, "params": [parameter]}]
            optimizer.step()
        finally:
            optimizer.param_groups, self._running = groups, False
        parameter.grad = None
        self._done.add(parameter)

    def _ended(self, *_: Any) -> None:
        if not self._running:
            self._done.clear()


def step_in_backward(optimizer: torch.optim.Optimizer) -> StepInBackward:
    """Let an optimizer update each parameter inside backward, as soon as its gradient is complete, and free that.

        handle = lowmem.step_in_backward(torch.optim.AdamW(lowmem.adapter_parameter_groups(model, lr=1e-4)))
        model(**batch).loss.backward()
        optimizer.step()  # as before: it ends the step, and finds no gradients

    The loop stays what it is, with its schedule of learning rates, which change the optimizer's groups. What needs
    all gradients at once, as clipping by their norm, finds none.

    Args:
        optimizer: one that updates parameters one by one, as AdamW and SGD do.

    Returns:
        A handle with ``release()``.

    Raises:
        TypeError: not an optimizer.
        ValueError: no parameter of it trains, one has a gradient already, or it is LBFGS, which needs all at once.
        RuntimeError: several processes train together: their gradients are averaged after backward. Or, inside
            backward, a parameter gets a second gradient before ``optimizer.step()``.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS steps with all gradients at once: take an optimizer that updates parameters one by one"
        )
    parameters = [one for group in optimizer.param_groups for one in group["params"] if one.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the optimizer trains")
    if any(one.grad is not None for one in parameters):
        raise ValueError("a parameter has a gradient already: call optimizer.step() and optimizer.zero_grad() before")
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError("gradients of several processes are averaged after backward: step when it is done")
    return StepInBackward(optimizer)
