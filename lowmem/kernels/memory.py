"""What C may read: the checks that keep it from reading past an end, and what it is told of a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["HALVES", "TYPES", "Prepared", "is_float", "is_real", "is_traced", "takes"]

# enum type of csrc/kernel.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = (torch.bfloat16, torch.float16)

_KEYS = torch._C._TorchDispatchModeKey
_RECORDERS = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)


class Prepared:
    """A weight as C knows it, for as long as the addresses hold."""

    __slots__ = ("bias", "handle", "kernel", "packed", "scales", "sizes")

    def __init__(self, kernel: Any, handle: Any, packed: int, scales: int) -> None:
        self.kernel, self.handle, self.packed, self.scales = kernel, handle, packed, scales
        self.sizes: dict[tuple[int, int, bool], int] = {}
        self.bias: tuple[Tensor | None, int, int] = None, 0, 0  # the last one, its address and its type

    def bias_arguments(self, bias: Tensor | None, rows: int) -> tuple[int, int] | None:
        """Return a bias as C takes it, or None where C cannot read it."""
        if bias is None:
            return 0, 0
        known, address, kind = self.bias
        if known is not bias or bias.data_ptr() != address:
            if bias.dtype not in TYPES or bias.shape != (rows,) or not bias.is_contiguous() or not is_real(bias):
                return None
            address, kind = bias.data_ptr(), TYPES[bias.dtype]
            if self.scales:  # what is known of 16-bit weights outlives them: it must not keep a bias
                self.bias = bias, address, kind
        return address, kind

    def scratch(self, batch: int, threads: int, transposed: bool) -> int:
        """Return how many bytes of scratch a product takes."""
        key = batch, threads, transposed
        size = self.sizes.get(key)
        if size is None:
            if len(self.sizes) > 64:  # a batch of every size has been here
                self.sizes.clear()
            size = self.sizes[key] = self.kernel.native.scratch(self.handle, batch, threads, transposed)
        return size


def takes(x: Tensor, features: int) -> bool:
    """Whether C can read a batch."""
    shape = x.shape
    return len(shape) == 2 and shape[1] == features and shape[0] > 0 and is_real(x)


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
