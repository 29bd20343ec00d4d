"""Whether C may compute a call: tensors must hold plain CPU memory, and nothing may be recording operations."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes, _pop_mode, _push_mode

# enum type of csrc/kernel.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_F = TypeVar("_F", bound=Callable[..., Any])
_KEYS = torch._C._TorchDispatchModeKey
_RECORDERS = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)
_CHECKPOINTS = "_CachingTorchDispatchMode", "_CachedTorchDispatchMode"  # of torch.utils.checkpoint
# Called for every product: globals are faster than attribute lookups.
_is_compiling, _tracing = torch.compiler.is_compiling, torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack


@lru_cache(maxsize=64)
def c_float_array(values: tuple[float, ...]) -> array[float]:
    """Return numbers for C, in float32; not as a tensor, which an active dispatch mode could replace."""
    return array("f", values)


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its values: no subclass, lazy negation or zero tensor."""
    kind = type(tensor)
    return (kind is Tensor or kind is Parameter) and not tensor.is_neg() and not tensor._is_zerotensor()


def is_plain_cpu_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU and its memory holds its values."""
    return tensor.is_cpu and has_plain_memory(tensor)


def is_c_readable_float32(tensor: Tensor) -> bool:
    """Whether C may read a tensor as contiguous float32."""
    return tensor.dtype is torch.float32 and tensor.is_contiguous() and is_plain_cpu_tensor(tensor)


def is_c_array(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether C may read and write a tensor as contiguous numbers of a dtype and shape."""
    return tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and is_plain_cpu_tensor(tensor)


def is_c_vector(tensor: Tensor, size: int) -> bool:
    """Whether C may read a tensor as ``size`` contiguous numbers of one of ``TYPES``."""
    return (
        tensor.shape == (size,) and tensor.dtype in TYPES and tensor.is_contiguous() and is_plain_cpu_tensor(tensor)
    )


def is_batched_or_under_functorch(tensor: Tensor) -> bool:
    """Whether a gradient stands for several, as those of ``is_grads_batched``: it has no memory to add to."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_recording_operations() -> bool:
    """Whether a tracer or dispatch mode records operations or runs them on fake tensors: it cannot see into C."""
    if _is_compiling() or _tracing() is not None:
        return True
    return _modes() > 0 and is_recorder_mode_active()


def is_recorder_mode_active() -> bool:
    """Whether a dispatch mode records operations, or runs them on fake tensors."""
    return _modes() > 0 and any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDERS)


def is_selective_checkpointing() -> bool:
    """Whether a selective checkpoint keeps what operators return, which must not be written to then."""
    return any(map(_is_checkpoint_mode, _active_dispatch_modes()))


def _active_dispatch_modes() -> list[Any]:
    return [torch._C._get_dispatch_stack_at(at) for at in range(_modes())]


def _is_checkpoint_mode(mode: Any) -> bool:
    return type(mode).__name__ in _CHECKPOINTS


def hide_from_selective_checkpoints(function: _F) -> _F:
    """Let selective checkpoints see a function's result alone, and not what it writes to on the way.

    Other modes, such as one that measures memory, see each operation.
    """

    @wraps(function)
    def run_without_checkpoint_modes(*args: Any, **kwargs: Any) -> Any:
        if not _modes() or not is_selective_checkpointing():
            return function(*args, **kwargs)
        others = [mode for mode in _active_dispatch_modes() if not _is_checkpoint_mode(mode)]
        with _disable_current_modes():
            for mode in others:
                _push_mode(mode)
            try:
                return function(*args, **kwargs)
            finally:
                for _ in others:
                    _pop_mode()

    return cast(_F, run_without_checkpoint_modes)
