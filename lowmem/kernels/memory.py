"""What C may read: whether a tensor's memory is its value, and whether something watches that would not see C."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["TYPES", "is_float", "is_real", "is_traced", "is_vector"]

# enum type of csrc/kernel.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_KEYS = torch._C._TorchDispatchModeKey
_RECORDERS = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)
_is_compiling, _tracing, _modes = (  # asked in every call: faster than attributes of attributes
    torch.compiler.is_compiling,
    torch._C._get_tracing_state,
    torch._C._len_torch_dispatch_stack,
)


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


def is_vector(tensor: Tensor, size: int) -> bool:
    """Whether C may read a tensor as ``size`` numbers of one of its types."""
    return tensor.shape == (size,) and tensor.dtype in TYPES and tensor.is_contiguous() and is_real(tensor)


def is_traced() -> bool:
    """Whether something records operations, or runs them on tensors without values: it would not see C."""
    if _is_compiling() or _tracing() is not None:
        return True
    return _modes() > 0 and any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDERS)
