"""Questions about a call of a layer: what records, differentiates, casts or observes it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules import module as torch_module

from lowmem.kernels import Weight, fast_matmul_dtype


def is_onnx_export_or_raise_if_quantized(weight: Weight) -> TypeGuard[Tensor]:
    """Whether torch's TorchScript-based ONNX exporter is tracing this call; ``weight`` is then a 16-bit tensor."""
    if not torch.onnx.is_in_onnx_export():
        return False
    if not isinstance(weight, Tensor):
        raise RuntimeError(
            "torch.onnx.export(..., dynamo=False) cannot write layers in 4 or 8 bits: use dynamo=True, or make them "
            "dense first, lowmem.restore(model)"
        )
    return True


def check_not_nested(x: Tensor, argument_name: str = "input") -> None:
    """Raise a TypeError for a nested tensor, whose rows have no common length."""
    if x.is_nested:
        raise TypeError(
            f"{argument_name} is a nested tensor (layout={x.layout}): pad it with "
            f"torch.nested.to_padded_tensor({argument_name}, 0.0), "
            f"or take each of {argument_name}.unbind()"
        )


def record_as_fx_leaf(module: nn.Module, input: Proxy) -> Any:
    """Record a call of a module in a graph of torch.fx, in which torch's own layers are leaves, too."""
    tracer: Any = input.tracer
    is_own_forward = type(module).forward.__module__.startswith(
        "lowmem."
    )  # and not a user's forward, which calls that of super()
    if tracer.root is module or not is_own_forward:
        raise RuntimeError(
            f"torch.fx.symbolic_trace cannot look into a {type(module).__name__}, whose weight is no plain tensor: "
            "trace a module that holds it, or make it dense before, lowmem.restore(model) or lowmem.merge(model)"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})


_PLAIN = (Tensor, nn.Parameter)
(
    _is_compiling,
    _transforms,
    _grad_enabled,
    _autocast_anywhere,
    _is_tracing,
) = (  # called often: globals are faster
    torch.compiler.is_compiling,
    torch._C._are_functorch_transforms_active,
    torch.is_grad_enabled,
    torch._C._is_any_autocast_enabled,
    torch._C._is_tracing,
)


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace records a call."""
    # Dynamo cannot trace the second call
    return not _is_compiling() and _is_tracing()


def can_bypass_autograd(*tensors: Tensor | None) -> bool:
    """Whether nothing differentiates, transforms or traces a call, so that autograd can be bypassed."""
    if _is_compiling() or _transforms() or _is_tracing() or forward_ad._current_level >= 0:
        return False
    grad_enabled = _grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or (grad_enabled and tensor.requires_grad)):
            return False
    return True


GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def call_hook_dicts(module: nn.Module) -> list[dict[Any, Any]]:
    """Return the module's dicts of hooks that a call of it runs, beside those in ``GLOBAL_HOOKS``."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return [module.__dict__[name] for name in names]


def has_customized_call(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, a replaced ``forward`` or compiled code: it must not be bypassed."""
    attributes = module.__dict__
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or attributes.get("_compiled_call_impl")
        or any(GLOBAL_HOOKS)
    )


def autocast_linear_input(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype to which autocast, if enabled, casts the input of a linear layer."""
    # The first check is 0.1 microseconds faster
    if not _autocast_anywhere() or not is_cast_by_autocast(x):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def is_autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of ``x``."""
    # There is no autocast for meta
    if not _autocast_anywhere() or x.is_meta:
        return False
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def is_cast_by_autocast(x: Tensor) -> bool:
    """Whether autocast would cast ``x`` as the input of a linear layer."""
    return is_autocast_enabled(x) and x.dtype != torch.float64


def autocast_disabled_if_slow(x: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast to a dtype in which torch is slow to multiply on the device of ``x``, for the block."""
    if is_autocast_enabled(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        if fast_matmul_dtype(dtype, x) is not dtype:
            return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
