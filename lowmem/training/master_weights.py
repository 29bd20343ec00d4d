"""Float32 master weights for bfloat16 parameters, stored as the parameter and the 16 bits that it lacks.

    bits(master) = (bits(parameter) << 16) + rest,  -2^15 <= rest < 2^15

A bfloat16 parameter is its master, rounded to nearest; the optimizer's state keeps ``rest`` as int16. Together they
are the float32 number, bit for bit, in four bytes, and the gradient takes two more (Micikevicius et al., Mixed
Precision Training, arXiv 1710.03740, section 3.1, for master weights; Kalamkar et al., Optimizing Deep Learning
Recommender Systems' Training On CPU Cluster Architectures, arXiv 2005.04680, for storing the two halves separately).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lowmem.nn.sharded_parameters import imported_dtensor_types
from lowmem.training.step_in_backward import FreedGradient

REST = "master_rest"
"""The key of ``rest`` in an optimizer's state."""

_HALF = 2**15  # of bfloat16's unit in the last place, in float32's bits


def split_into_bfloat16_and_rest(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest bfloat16 numbers (ties away from zero), and ``rest`` as int16, both in the same shape."""
    bits = master.view(torch.int32)
    upper = (bits + _HALF) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join_bfloat16_and_rest(parameter: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 numbers that ``split_into_bfloat16_and_rest`` was given."""
    upper = parameter.detach().contiguous().view(torch.int16).to(torch.int32)
    return (upper << 16).add_(rest).view(torch.float32)


class MasterWeights:
    """Lets an optimizer update float32 masters of its bfloat16 parameters, until ``release``.

    Attributes:
        optimizer: the optimizer; between steps, its groups and states are those of the model's parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._stepping: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
        self._loading: dict[str, Any] = {}
        for parameter in filter(
            _is_trainable_bfloat16, list(optimizer.state)
        ):  # Adagrad makes its state before the first step
            state = optimizer.state[parameter]
            tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
            state.update({name: tensor.float() for name, tensor in tensors.items() if tensor.dtype is torch.bfloat16})
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._run_closure_and_swap_in_masters),
            optimizer.register_step_post_hook(self._write_back_and_restore_groups),
            optimizer.register_state_dict_pre_hook(self._write_back_and_restore_groups),
            optimizer.register_load_state_dict_pre_hook(self._load_state_dict_pre_hook),
            optimizer.register_load_state_dict_post_hook(self._restore_loaded_state_dtypes),
        ]

    def release(self) -> torch.optim.Optimizer:
        """Let the optimizer update the bfloat16 parameters themselves, as before; return it."""
        self._write_back_and_restore_groups()
        for handle in self._handles:
            handle.remove()
        for state in self.optimizer.state.values():
            state.pop(REST, None)
        return self.optimizer

    def master(self, parameter: Tensor) -> Tensor:
        """Return a copy of a parameter's master, in float32."""
        rest = self.optimizer.state[parameter].get(REST) if parameter in self.optimizer.state else None
        return parameter.detach().float() if rest is None else join_bfloat16_and_rest(parameter, rest)

    @torch.no_grad()
    def _run_closure_and_swap_in_masters(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a step, replace the parameters in the optimizer's groups by masters with gradients and states."""
        # In case the last step raised an error halfway
        self._write_back_and_restore_groups()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:  # it computes the parameters' gradients, so it must run before they are copied
            with torch.enable_grad():
                loss = closure()
            args, kwargs = args[:1], {**kwargs, "closure": lambda: loss}
        for group in optimizer.param_groups:
            parameters = group["params"]
            wide = [
                self._make_master_and_move_state(parameter)
                if _is_trainable_bfloat16(parameter) and _has_unfreed_gradient(parameter)
                else parameter
                for parameter in parameters
            ]
            self._stepping.append((group, parameters, wide))
            group["params"] = wide
        return args, kwargs

    def _make_master_and_move_state(self, parameter: Tensor) -> Tensor:
        master = self.master(parameter)
        master.grad = cast(Tensor, parameter.grad).float()
        if parameter in self.optimizer.state:
            state = self.optimizer.state.pop(parameter)
            state.pop(REST, None)
            if state:
                self.optimizer.state[master] = state
        return master

    @torch.no_grad()
    def _write_back_and_restore_groups(self, *_: Any) -> None:
        """After a step, write the masters back and restore the parameters in the optimizer's groups and states."""
        for group, parameters, wide in self._stepping:
            group["params"] = parameters
            for parameter, master in zip(parameters, wide, strict=True):
                if master is not parameter:
                    upper, rest = split_into_bfloat16_and_rest(master)
                    parameter.copy_(upper)
                    self.optimizer.state[parameter] = {**self.optimizer.state.pop(master, {}), REST: rest}
        self._stepping = []

    def _load_state_dict_pre_hook(self, _: Any, state_dict: dict[str, Any]) -> None:
        self._write_back_and_restore_groups()
        self._loading = state_dict

    def _restore_loaded_state_dtypes(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the loaded tensors by uncast copies: torch casts the states of bfloat16 parameters to bfloat16."""
        for parameter, state in parameter_loaded_state_pairs(optimizer, self._loading):
            if _is_trainable_bfloat16(parameter):
                replace_state_with_uncast_copies(optimizer, parameter, state)
        self._loading = {}


def parameter_loaded_state_pairs(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> list[tuple[Tensor, Any]]:
    """Return each parameter of an optimizer, and what a state_dict has for it, or {}; torch checks their numbers."""
    saved_indices = (number for group in state_dict["param_groups"] for number in group["params"])
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [
        (parameter, state_dict["state"].get(number, {}))
        for number, parameter in zip(saved_indices, parameters, strict=False)
    ]


def replace_state_with_uncast_copies(
    optimizer: torch.optim.Optimizer, parameter: Tensor, loaded_state: Mapping[str, Any]
) -> None:
    """Replace the tensors in a loaded parameter's state by copies in their own dtypes, not the parameter's."""
    copies = {
        name: tensor.to(parameter.device, copy=True)
        for name, tensor in loaded_state.items()
        if isinstance(tensor, Tensor)
    }
    if copies:
        optimizer.state[parameter].update(copies)


def _is_trainable_bfloat16(parameter: Tensor) -> bool:
    return parameter.dtype is torch.bfloat16 and parameter.requires_grad


def _has_unfreed_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and not isinstance(parameter.grad, FreedGradient)


def master_weights(optimizer: torch.optim.Optimizer) -> MasterWeights:
    """Let an optimizer keep and update float32 master weights of its bfloat16 parameters::

        lowmem.convert(model, lowmem.FourBit(), lowmem.LoRA(16, dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW(lowmem.adapter_parameter_groups(model, lr=1e-4))
        lowmem.master_weights(optimizer)

    Without a master, an update smaller than 1/512 of a bfloat16 number is rounded away. Training is as with float32
    parameters that are rounded to bfloat16 whenever the model reads them. Parameters, gradients and the communication
    between processes take half of float32's bytes. The optimizer's state takes 2 bytes per number beside its float32
    moments, and 8 more during ``step()``. Parameters of other dtypes are updated as before.

    ``optimizer.state_dict()`` holds the lower bits of each master, and the model's ``state_dict()`` the bfloat16
    numbers: load both. If a parameter is overwritten, its lower bits stay; they move the new master by at most half a
    unit in the last place.

    Args:
        optimizer: of ``torch.optim``, ``AdamW8bit``, or another that steps with gradients it is given. Call this
            before ``load_state_dict``.

    Returns:
        A handle with ``release()``, which undoes this, and ``master(parameter)``, which returns the float32 numbers.

    Raises:
        TypeError: not an optimizer.
        ValueError: no parameter that trains is bfloat16; a parameter is sharded (FSDP2 can keep float32 shards
            itself); the optimizer has master weights already, has loaded a state with master weights before, or is
            LBFGS, which keeps parameters of its own.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS keeps parameters of its own: take an optimizer that steps with given gradients")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(_is_trainable_bfloat16(parameter) for parameter in parameters):
        dtypes = sorted({str(parameter.dtype) for parameter in parameters if parameter.requires_grad})
        raise ValueError(
            f"no parameter that trains is torch.bfloat16, found {', '.join(dtypes) or 'none that trains'}: make "
            "adapters with LoRA(dtype=torch.bfloat16)"
        )
    if any(isinstance(parameter, imported_dtensor_types()) for parameter in parameters):
        raise ValueError(
            "parameters are sharded (DTensors): leave them in float32 and give fully_shard "
            "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16), which keeps float32 shards"
        )
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), MasterWeights) for hook in hooks):
        raise ValueError(f"this {type(optimizer).__name__} has master weights already")
    rests = [state[REST] for state in optimizer.state.values() if REST in state]
    if any(rest.dtype is not torch.int16 for rest in rests):
        raise ValueError(
            "the optimizer has loaded a state with master weights, which torch has cast to bfloat16: call "
            "master_weights before load_state_dict"
        )
    return MasterWeights(optimizer)
