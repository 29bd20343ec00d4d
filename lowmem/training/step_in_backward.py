"""Optimizer steps inside backward: each gradient is freed as soon as its parameter is updated (Lv et al., arXiv
2306.09782; here for any optimizer that updates parameters independently of each other)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from lowmem.nn.torch_functions import METADATA


class FreedGradient(Tensor):
    """Placeholder, without memory, for a freed gradient: reading it is an error, not a norm of zero."""

    @staticmethod
    def __new__(cls, parameter: Tensor) -> FreedGradient:
        """Make one with the shape, dtype and device of a parameter."""
        made: FreedGradient = torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        # zero_grad(set_to_none=False)
        if function in (Tensor.zero_, Tensor.detach_, Tensor.requires_grad_):
            return args[0]
        raise RuntimeError(
            f"{getattr(function, '__name__', function)} of a gradient that step_in_backward has used and freed: "
            "clipping by the norm of all gradients needs them at once. Do not clip (max_grad_norm=0 in a Trainer's "
            "arguments), or release() the optimizer"
        )

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(_SECOND)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"a gradient of shape {tuple(self.shape)} that was used and freed in backward"


_SECOND = (
    "a second gradient of a parameter that was updated in backward: gradients are not accumulated here. "
    "Call optimizer.step() after each backward, which ends the step; to accumulate over batches, or to "
    "use a parameter in several reentrant checkpoints, release() the optimizer"
)


class StepInBackward:
    """Lets an optimizer step inside backward, until ``release``.

    Attributes:
        optimizer: the optimizer, with its own groups and states.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._done: set[Tensor] = set()
        self._running = False
        self._group_of = {
            parameter: n for n, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        }
        trained = [parameter for parameter in self._group_of if parameter.requires_grad]
        self._handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._step_parameter_and_free_grad) for parameter in trained
        ]
        self._handles.append(optimizer.register_step_pre_hook(self._remove_freed_gradients))

    def release(self) -> torch.optim.Optimizer:
        """Let the optimizer update parameters in ``step()`` again; return it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._remove_freed_gradients()
        return self.optimizer

    def _step_parameter_and_free_grad(self, parameter: Tensor) -> None:
        """Update one parameter, whose gradient is complete, and free the gradient."""
        if parameter in self._done:
            raise RuntimeError(_SECOND)
        optimizer = self.optimizer
        groups = optimizer.param_groups
        self._running = True
        try:
            optimizer.param_groups = [{**groups[self._group_of[parameter]], "params": [parameter]}]
            optimizer.step()
        finally:
            optimizer.param_groups, self._running = groups, False
        parameter.grad = FreedGradient(parameter)
        self._done.add(parameter)

    def _remove_freed_gradients(self, *_: Any) -> None:
        """Before the loop's ``optimizer.step()``, remove the placeholders, so that it updates nothing twice."""
        if not self._running:
            for parameter in self._done:
                if isinstance(parameter.grad, FreedGradient):
                    parameter.grad = None
            self._done.clear()


def step_in_backward(optimizer: torch.optim.Optimizer) -> StepInBackward:
    """Let an optimizer update each parameter inside backward, and free its gradient, as soon as that is complete::

        handle = lowmem.step_in_backward(torch.optim.AdamW(lowmem.adapter_parameter_groups(model, lr=1e-4)))
        model(**batch).loss.backward()
        optimizer.step()  # still needed: it marks the end of the step, and has nothing left to update

    The training loop and its learning rate schedule stay unchanged. What needs all gradients at once, such as
    clipping by their norm, is a RuntimeError: a Trainer needs ``max_grad_norm=0``.

    Args:
        optimizer: one that updates parameters independently of each other, as AdamW and SGD do.

    Returns:
        A handle with ``release()``, which undoes this.

    Raises:
        TypeError: not an optimizer.
        ValueError: no parameter of it trains, one has a gradient already, or it is LBFGS, which needs all gradients
            at once.
        RuntimeError: several processes train together, which average their gradients after backward. Later, inside
            backward: a parameter gets a second gradient before ``optimizer.step()``.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS steps with all gradients at once: take an optimizer that updates parameters one by one"
        )
    parameters = [
        parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad
    ]
    if not parameters:
        raise ValueError("no parameter of the optimizer trains")
    if any(parameter.grad is not None for parameter in parameters):
        raise ValueError("a parameter has a gradient already: call optimizer.step() and optimizer.zero_grad() before")
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"world_size={distributed.get_world_size()} processes train together, and average their gradients after "
            "backward: leave step_in_backward out, and call optimizer.step() when backward is done"
        )
    return StepInBackward(optimizer)
