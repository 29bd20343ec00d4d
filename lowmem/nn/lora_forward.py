"""The forwards of layers with adapters, ``base(x) + s up(down(dropout(x)))``: of linear layers, embeddings and
convolutions. QLoRA (arXiv 2305.14314) is ``linear_lora_forward`` over a 4-bit layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional

from lowmem import kernels
from lowmem.kernels import ops
from lowmem.nn import conv, embedding  # noqa: F401 - register stored layers
from lowmem.nn.adapter import Adapter, is_inactive_dropout, is_transformers_conv1d_class
from lowmem.nn.adapter_autograd import fused_lora_product_or_none, fusible_lora_matrices_or_none
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.call_context import (
    autocast_disabled_if_slow,
    can_bypass_autograd,
    is_autocast_enabled,
    record_as_fx_leaf,
)
from lowmem.nn.linear import GatheredLinear4Bit, HalfLinear, Linear4Bit, Linear8Bit
from lowmem.nn.module_copy import LAYERS
from lowmem.nn.quantized_module import cached_quantized_weight_or_none
from lowmem.nn.stored_module import StoredModule
from lowmem.quant.backend import backend_of

_IN_FLOAT32 = (None, torch.float32)


def linear_lora_forward(layer: Any, input: Tensor) -> Tensor:
    """Return (..., out_features) in the dtype of the layer without adapters, for input (..., in_features).

    y = W x + b + sum s B A x    over the active adapters, in the order of ``active``
    """
    if isinstance(input, Proxy):
        return record_as_fx_leaf(layer, input)
    base, kind, adapters = base_module_class_and_adapters(layer)
    if len(adapters) == 1:
        fused = _fused_kernel_output_or_none(base, kind, adapters[0], input)
        if fused is None:
            fused = _fused_training_product_or_none(base, adapters[0], input, transposed=False)
        if fused is not None:
            return fused
    if _has_forward_for_stored_weight(kind):
        out: Tensor = kind.forward(base, input)
    else:
        out = functional.linear(
            input, _unadapted_parameter_or_attribute(base, "weight"), _unadapted_parameter_or_attribute(base, "bias")
        )
    for adapter in adapters:
        # Not __call__, for speed
        out = adapter.forward(out, input)
    return out


def transformers_conv1d_lora_forward(layer: Any, x: Tensor) -> Tensor:
    """Return (..., out) for x (..., in): the forward of transformers' Conv1D, whose weight is (in, out)."""
    base, _, adapters = base_module_class_and_adapters(layer)
    if (
        len(adapters) == 1
        and (fused := _fused_training_product_or_none(base, adapters[0], x, transposed=True)) is not None
    ):
        return fused
    weight, bias = _unadapted_parameter_or_attribute(base, "weight"), _unadapted_parameter_or_attribute(base, "bias")
    out = torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    for adapter in adapters:
        out = adapter.forward(out, x)
    return out


def embedding_lora_forward(layer: Any, input: Tensor) -> Tensor:
    """Return (..., embedding_dim) for indices (...): rows of W, and rows of A^T times B^T."""
    if isinstance(input, Proxy):
        return record_as_fx_leaf(layer, input)
    base, kind, adapters = base_module_class_and_adapters(layer)
    if _has_forward_for_stored_weight(kind):
        out: Tensor = kind.forward(base, input)
    elif layer.max_norm is not None:
        # Writes to the weight, which is an error if it has adapters
        return nn.Embedding.forward(layer, input)
    else:
        options = layer.padding_idx, None, layer.norm_type, layer.scale_grad_by_freq, layer.sparse
        out = functional.embedding(input, _unadapted_parameter_or_attribute(base, "weight"), *options)
    for adapter in adapters:
        left, right, scaling, *_ = adapter.low_rank_update()
        narrow = functional.embedding(input, left, layer.padding_idx, None, 2.0, layer.scale_grad_by_freq) * scaling
        with autocast_disabled_if_slow(narrow):
            out = out + (narrow @ right).to(out.dtype)
    return out


def embedding_bag_lora_forward(
    layer: Any, input: Tensor, offsets: Any = None, per_sample_weights: Any = None
) -> Tensor:
    """Return (bags, embedding_dim): bags of rows of W, and of A^T, times B^T."""
    # Writes to the weight, or is not linear in it
    if layer.max_norm is not None or layer.mode == "max":
        out: Tensor = nn.EmbeddingBag.forward(layer, input, offsets, per_sample_weights)
        return out
    base, _, adapters = base_module_class_and_adapters(layer)

    def embedding_bag_over(table: Any, sparse: bool) -> Tensor:
        options = layer.norm_type, layer.scale_grad_by_freq, layer.mode, sparse, per_sample_weights
        ends = layer.include_last_offset, layer.padding_idx
        return functional.embedding_bag(input, table, offsets, None, *options, *ends)

    out = embedding_bag_over(_unadapted_parameter_or_attribute(base, "weight"), layer.sparse)
    for adapter in adapters:
        left, right, scaling, *_ = adapter.low_rank_update()
        with autocast_disabled_if_slow(out):
            out = out + ((embedding_bag_over(left.contiguous(), False) * scaling) @ right).to(out.dtype)
    return out


def convolution_lora_forward(layer: Any, input: Tensor, output_size: Any = None) -> Tensor:
    """Convolve: A convolves to ``rank`` channels of each group, and B is a kernel of one element."""
    if isinstance(input, Proxy):
        return record_as_fx_leaf(layer, input)
    base, kind, adapters = base_module_class_and_adapters(layer)
    if _has_forward_for_stored_weight(kind):
        out: Tensor = kind.forward(base, input)
    else:
        out = _convolve_with_kernel(
            layer,
            input,
            _unadapted_parameter_or_attribute(base, "weight"),
            _unadapted_parameter_or_attribute(base, "bias"),
            output_size,
        )
    for adapter in adapters:
        update = adapter.low_rank_update()
        if input.dtype in (torch.bfloat16, torch.float16) and backend_of(input).is_asynchronous:
            # As the layer itself: tensor cores take float32 many times as long
            update = update.with_matrices(update.left.to(input.dtype), update.right.to(input.dtype))
        first, second, *kernel = adapter.layout.shape
        groups, ones = layer.groups, (1,) * len(kernel)
        if layer.transposed:
            down, up = update.right.view(first, -1, *kernel), update.left.repeat(groups, 1)  # (in, rank, *kernel)
        else:
            down, up = update.right.view(-1, second, *kernel), update.left  # (rank, in / groups, *kernel)
            down = down if groups == 1 else down.repeat(groups, 1, *ones)
        expand = getattr(functional, f"conv{len(kernel)}d")
        with autocast_disabled_if_slow(input):
            narrow = (
                _convolve_with_kernel(layer, update.cast_and_apply_dropout(input), down, None, output_size)
                * update.scaling
            )
            out = out + expand(narrow, up.view(*up.shape, *ones), groups=groups).to(out.dtype)
    return out


def _convolve_with_kernel(layer: Any, x: Tensor, kernel: Any, bias: Any, output_size: Any) -> Tensor:
    """Convolve as a layer does, with another kernel of the same size."""
    if not layer.transposed:
        return layer._conv_forward(x, kernel, bias)  # type: ignore[no-any-return]
    dims = len(layer.kernel_size)
    sizes = layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
    padding = layer._output_padding(x, output_size, *sizes)
    convolve = getattr(functional, f"conv_transpose{dims}d")
    out: Tensor = convolve(x, kernel, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
    return out


def _fused_training_product_or_none(base: Any, adapter: Any, x: Tensor, transposed: bool) -> Tensor | None:
    """Return the product with weight and adapter as one autograd node, or None (``fused_lora_product_or_none``)."""
    matrices = fusible_lora_matrices_or_none(adapter, x)
    # Before the weight is read, which tracers record
    if matrices is None:
        return None
    return fused_lora_product_or_none(
        x,
        _unadapted_parameter_or_attribute(base, "weight"),
        adapter,
        matrices,
        _unadapted_parameter_or_attribute(base, "bias"),
        transposed,
    )


def base_module_class_and_adapters(layer: Any) -> tuple[Any, Any, list[Any]]:
    """Return the module whose parameters a forward reads, its class without adapters, and the adapters to add."""
    bank = layer._modules["adapters"]
    # Read once, and an adapter may be None: another thread may change them
    active, merged, adapter_modules = bank.active, bank.merged_copy, bank._modules
    if merged is None:
        base, kind, merged_name = layer, layer._plain_class, None
    else:
        merged_name, base = merged
        kind = type(base)
    # A loop, which takes fewer instructions than a comprehension: this is most of what a small layer computes
    adapters = []
    for name in active:
        if name != merged_name:
            parts = adapter_modules.get(name)
            adapter = None if parts is None else parts._modules.get("weight")
            if adapter is not None:
                adapters.append(adapter)
    return base, kind, adapters


def _unadapted_parameter_or_attribute(base: Any, parameter_name: str) -> Any:
    """Return a parameter without adapters; one that a parametrization has moved out is computed."""
    parameter = unadapted_parameter(base, parameter_name)
    return (
        getattr(base, parameter_name) if parameter is None and parameter_name not in base._parameters else parameter
    )


def _has_forward_for_stored_weight(layer_class: Any) -> bool:
    """Whether a class computes with the parts of its stored weight, and not with ``self.weight``."""
    return layer_class in _STORED_LAYERS or layer_class.__bases__[0] in _STORED_LAYERS


def _fused_kernel_output_or_none(base: Any, base_class: Any, adapter: nn.Module | None, x: Tensor) -> Tensor | None:
    """Return the output of a layer and its adapter from one call of the kernel; None if it cannot take both."""
    if base_class is Linear4Bit or base_class is Linear8Bit:
        # Faster than the property
        if base._forms["weight"].form.compute_dtype not in _IN_FLOAT32:
            return None
    elif base_class is not HalfLinear:
        return None
    if type(adapter) is not Adapter:
        return None
    # Faster than attributes
    attributes, bases = adapter.__dict__, base._parameters
    key = "bias" if "bias" in bases else "bias_rounded"
    update, dropout = attributes["_parameters"], attributes["_modules"]["dropout"]
    a, b = update.get("lora_a"), update.get("lora_b")
    plain = can_bypass_autograd(x, bases.get(key), a, b)
    if (
        a is None
        or b is None
        or key not in bases  # a parametrization has moved it out
        or "forward" in attributes
        or not (plain or torch.compiler.is_compiling())
        or not (x.dtype is a.dtype is b.dtype is torch.float32 and not x.is_nested)
        or not (x.dim() == 2 or (plain and x.dim() > 2))
        or not is_inactive_dropout(dropout)
        or is_autocast_enabled(x)
    ):
        return None
    if base_class is HalfLinear:
        weight: Any = bases.get("weight_rounded")
        # A parametrization has moved it out
        if weight is None:
            return None
    else:
        linear = cast(Linear4Bit, base)
        weight = (
            cached_quantized_weight_or_none(linear) if plain else None
        ) or linear.quantized  # cached_quantized_weight_or_none is faster
    if plain:
        return kernels.linear(x, weight, torch.float32, bases[key], (a, b, adapter.scaling))
    return ops.product(x, weight, torch.float32, False, bases[key], a, b, adapter.scaling)


LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, HalfLinear, Linear4Bit, Linear8Bit, GatheredLinear4Bit)
"""The exact types of layers that become a ``LoRALinear``."""

_STORED_LAYERS = frozenset(LAYERS.values()) | {GatheredLinear4Bit}

_LORA_FORWARDS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Linear: linear_lora_forward,
    nn.Embedding: embedding_lora_forward,
    nn.EmbeddingBag: embedding_bag_lora_forward,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution_lora_forward),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), convolution_lora_forward),
}
"""Class of a dense layer -> its forward with adapters; beside Conv1D, all other modules read an ``AdaptedWeight``."""


def replaced_class_and_lora_forward(module_class: Any) -> tuple[Any, Callable[[Any, Tensor], Tensor] | None]:
    """Return the class whose forward is replaced in a module of class ``module_class`` with adapters, and by what.

    It is ``module_class`` itself for layers of torch, dense or stored, and the layer of torch among the bases of a
    user's class. The forward is None if there is no such layer.
    """
    dense = module_class.dense_class if issubclass(module_class, StoredModule) else module_class
    for kind in dense.__mro__:
        forward = transformers_conv1d_lora_forward if is_transformers_conv1d_class(kind) else _LORA_FORWARDS.get(kind)
        if hasattr(kind, "_conv_forward") and dense._conv_forward is not kind._conv_forward:
            return module_class, None  # of a user's class, which may compute another kernel of the weight
        if forward is not None:
            return (
                module_class if module_class is kind or _has_forward_for_stored_weight(module_class) else kind
            ), forward
    return module_class, None
