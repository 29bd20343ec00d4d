"""What C may read: the checks that keep it from reading past an end, and what it is told of a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["HALVES", "TYPES", "Prepared", "bias_arguments", "is_float", "is_real", "is_traced", "takes"]

# enum type of csrc/kernel.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = (torch.bfloat16, torch.float16)

_KEYS = torch._C._TorchDispatchModeKey
_RECORDERS = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)


class Prepared:
    """A weight as C knows it, for as long as the addresses hold."""

    __slots__ = ("handle", "kernel", "levels", "packed", "packed_shape", "scales", "scales_shape", "sizes")

    def __init__(
        self,
        kernel: Any,
        handle: Any,
        levels: object = None,
        packed: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        self.kernel, self.handle, self.levels = kernel, handle, levels  # the levels live as long as what points there
        if packed is not None and scales is not None:
            self.packed, self.packed_shape = packed.data_ptr(), packed.shape
            self.scales, self.scales_shape = scales.data_ptr(), scales.shape
        self.sizes: dict[tuple[int, int, bool, int], int] = {}

    def scratch(self, batch: int, threads: int, transposed: bool, kind: int) -> int:
        """Return how many bytes of scratch a product takes."""
        key = batch, threads, transposed, kind
        size = self.sizes.get(key)
        if size is None:
            if len(self.sizes) > 64:  # a batch of every size has been here
                self.sizes.clear()
            size = self.sizes[key] = self.kernel.native.scratch(self.handle, batch, threads, transposed, kind)
        return size


def bias_arguments(bias: Tensor, rows: int) -> tuple[int, int] | None:
    """Return the address and the type of a bias, or None where C cannot read it.

    Asked in every call: ``is_real`` in place, whose last question the address answers.
    """
    kind, address, python_type = TYPES.get(bias.dtype), bias.data_ptr(), type(bias)
    if (
        kind is None
        or not address  # a zero without memory, or freed storage
        or bias.numel() != rows
        or bias.dim() != 1
        or not bias.is_contiguous()
        or not (python_type is Parameter or python_type is Tensor)
        or not bias.is_cpu
        or bias.is_neg()
    ):
        return None
    return address, kind


def takes(x: Tensor, features: int) -> int:
    """Return how many inputs C can read in a batch of so many features: 0 if it is none."""
    shape = x.shape
    return shape[0] if len(shape) == 2 and shape[1] == features and is_real(x) else 0


def is_real(tensor: Tensor) -> bool:
    """Whether a tensor's memory on the CPU is its value: no wrapper, no lazy negation, no zero without memory."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is Parameter)
        and tensor.is_cpu
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def is_float(tensor: Tensor) -> bool:
    """Whether C may read a tensor as float32 from its first element on."""
    return tensor.dtype is torch.float32 and tensor.is_contiguous() and is_real(tensor)


def is_traced() -> bool:
    """Whether something records operations, or runs them on tensors without values: it would not see C."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None for key in _RECORDERS
    )
