"""RMS norms and gated MLPs of stored layers, each computed by one call of C where nothing records gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lowmem.kernels.cpu import CpuBackend
from lowmem.kernels.cpu_rowwise import ROW_TYPES
from lowmem.kernels.native_program import (
    AddressOrName,
    NativeLayer,
    NativeProgram,
    update_scratch_per_row,
)
from lowmem.kernels.rms_norm_and_gating import ACTIVATIONS
from lowmem.kernels.tensor_checks import (
    TYPES,
    is_c_readable_float32,
    is_plain_cpu_tensor,
    is_recording_operations,
)
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter, is_inactive_dropout
from lowmem.nn.call_context import GLOBAL_HOOKS, call_hook_dicts, can_bypass_autograd, is_autocast_enabled
from lowmem.nn.linear import HalfLinear, Linear4Bit, Linear8Bit, QuantizedLinear
from lowmem.nn.lora_forward import base_module_class_and_adapters
from lowmem.nn.quantized_module import cached_quantized_weight_or_none
from lowmem.quant.backend import LowRank, backend_of
from lowmem.training.fused import GatedMLPSpec, RMSNormSpec

NATIVE_LAYER_CLASSES = Linear4Bit, Linear8Bit, HalfLinear
"""Classes of layers whose weights C multiplies, with or without adapters."""


def cpu_backend_without_grad_or_none(x: Any) -> CpuBackend | None:
    """Return the backend of x if C computes with it: rows of float32 or bfloat16, without recorded gradients."""
    if (
        torch.is_grad_enabled()
        or not isinstance(x, Tensor)
        or not can_bypass_autograd(x)
        or is_recording_operations()
    ):
        return None
    kernel = backend_of(x)
    fits = x.dim() > 1 and x.dtype in ROW_TYPES and x.is_contiguous() and x.numel() > 0
    return (
        kernel
        if isinstance(kernel, CpuBackend) and fits and is_plain_cpu_tensor(x) and not is_autocast_enabled(x)
        else None
    )


@dataclass(frozen=True)
class NativeRMSNorm:
    """Computes an RMS norm: the module, and how it computes."""

    module: nn.Module
    spec: RMSNormSpec

    def __str__(self) -> str:
        fits = self.weight.dtype in ROW_TYPES
        return "RMS norm in one call" if fits else f"as before: C computes no norms of {self.weight.dtype}"

    @property
    def weight(self) -> Any:
        """The weight."""
        return self.module._parameters.get(self.spec.weight)

    def has_c_readable_weight(self, dtype: torch.dtype) -> bool:
        """Whether C multiplies with the weight, and results have the dtype of inputs."""
        factor = self.weight
        return (
            type(factor) is nn.Parameter
            and factor.dtype is dtype
            and factor.is_contiguous()
            and is_plain_cpu_tensor(factor)
        )

    def append_to_program(
        self, program: NativeProgram, x: AddressOrName, element_count: int, out: AddressOrName = 0
    ) -> Any:
        """Add the norm of rows, ``element_count`` numbers; return the address of the result (``out``, or new
        room)."""
        spec, factor = self.spec, self.weight
        terms = factor, getattr(self.module, spec.eps), spec.offset, spec.rounds_first
        return program.append_norm(x, element_count // len(factor), *terms, out)

    def __call__(self, x: Any, keyword_arguments: Mapping[str, Any]) -> Tensor | None:
        """Return the norm of rows; None where the module's own forward must run."""
        kernel = cpu_backend_without_grad_or_none(x)
        if (
            keyword_arguments
            or kernel is None
            or not self.has_c_readable_weight(x.dtype)
            or x.shape[-1] != len(self.weight)
        ):
            return None
        out, steps = torch.empty_like(x), NativeProgram(kernel, x.new_empty(0))
        self.append_to_program(steps, "x", x.numel(), "out")
        return out if steps.try_run(x=x, out=out) else None


class NativeGatedMLP:
    """Computes a gated MLP."""

    def __init__(self, module: nn.Module, spec: GatedMLPSpec) -> None:
        self.spec, self.layer_cache = spec, NativeLayerCache(module, gated_mlp_layers(module, spec))

    def __str__(self) -> str:
        return f"gated MLP in one call ({self.spec.activation})"

    def __call__(self, x: Any, keyword_arguments: Mapping[str, Any]) -> Tensor | None:
        """Return the output; None where the module's own forward must run."""
        kernel, down = cpu_backend_without_grad_or_none(x), self.layer_cache.layers[-1]
        if keyword_arguments or kernel is None or x.shape[-1] != down.out_features:
            return None
        ready = self.layer_cache.native_layers_or_none(kernel, x.dtype)
        if ready is None:
            return None
        rows, out = x.numel() // x.shape[-1], torch.empty_like(x)
        per_row = 3 * down.in_features + ready.update_scratch_per_row
        steps = NativeProgram(kernel, x.new_empty(rows * per_row))
        append_gated_mlp(steps, self.spec, "x", rows, ready.layers, "out")
        return out if steps.try_run(x=x, out=out) else None


def make_unchanged_check(
    module: nn.Module, extra_entries: Iterable[tuple[dict[str, Any], str]] = ()
) -> Callable[[], bool]:
    """Return a function that tells whether all that calls depend on is as it is now.

    Args:
        module: each module inside it must stay where it is, of its class, in evaluation mode and without hooks.
        extra_entries: (dict, key) of each tensor that is read by its address, or of another object that must stay.
    """
    parts = [part for part in module.modules() if part is not module]
    places = [*extra_entries, *((item._modules, name) for item in module.modules() for name in item._modules)]
    entries = [(attributes, key, attributes.get(key)) for attributes, key in places]
    for attributes in map(vars, parts):
        entries += [
            (attributes, "forward", None),
            (attributes, "_compiled_call_impl", None),
            (attributes, "training", False),
        ]
    dicts, keys, values = zip(*entries, strict=True)
    kinds, tensors = list(map(type, parts)), [item for item in values if isinstance(item, Tensor)]
    addresses = list(map(Tensor.data_ptr, tensors))
    # C checks the layout of codes, scales and 16-bit weights itself
    others = [
        value
        for key, value in zip(keys, values, strict=True)
        if isinstance(value, Tensor) and not key.startswith("weight_")
    ]
    sizes, strides = list(map(Tensor.size, others)), list(map(Tensor.stride, others))
    hooks = [*GLOBAL_HOOKS, *(item for part in parts for item in call_hook_dicts(part))]
    # Asked at each call, hence without a loop in Python.
    return lambda: (
        all(map(is_, map(dict.get, dicts, keys), values))
        and list(map(type, parts)) == kinds
        and list(map(Tensor.data_ptr, tensors)) == addresses
        and list(map(Tensor.size, others)) == sizes
        and list(map(Tensor.stride, others)) == strides
        and not any(hooks)
    )


class NativeLayersAndPrograms(NamedTuple):
    """Layers as C takes them, and what is made of them; they serve until something has changed."""

    backend: CpuBackend
    dtype: torch.dtype
    is_unchanged: Callable[[], bool]
    layers: list[NativeLayer]
    programs: dict[Any, Any]

    @property
    def update_scratch_per_row(self) -> int:
        """Numbers of scratch that the layers' adapters take for a row."""
        updates = (update for layer in self.layers for update in layer.updates)
        return update_scratch_per_row(updates, self.dtype.itemsize)


class NativeLayerCache:
    """Layers and norms inside a module, which C reads where they are.

    Args:
        module: as of ``make_unchanged_check``.
        layers: inside it.
        other_modules: modules whose numbers and functions its code reads, such as the scaling of scores, beside
            norms.
        norms: inside it.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: list[Any],
        other_modules: Iterable[nn.Module] = (),
        norms: Sequence[NativeRMSNorm] = (),
    ) -> None:
        self.module, self.layers, self.norms = module, layers, norms
        owners = module, *other_modules, *(owner.module for owner in norms)
        owned = [(vars(owner), *item) for owner in owners for item in vars(owner).items()]
        self.watched_entries = [
            (attributes, key) for attributes, key, value in owned if type(value) in (int, float) or callable(value)
        ]
        self.is_unchanged, self.native_layers = (
            make_unchanged_check(module, self.watched_entries),
            cast("NativeLayersAndPrograms | None", None),
        )

    def native_layers_or_none(self, backend: CpuBackend, dtype: torch.dtype) -> NativeLayersAndPrograms | None:
        """Return layers as C takes them; None where parts were changed, or C does not take one."""
        native_layers = self.native_layers
        if (
            native_layers is not None
            and native_layers.backend is backend
            and native_layers.dtype is dtype
            and native_layers.is_unchanged()
        ):
            return native_layers
        taken = layers_for_c_or_none(backend, self.layers, dtype) if self.is_unchanged() else None
        if taken is None or not all(norm.has_c_readable_weight(dtype) for norm in self.norms):
            return None
        entries = [entry for layer in self.layers for entry in _entries_that_calls_read(layer)]
        entries += [(norm.module._parameters, norm.spec.weight) for norm in self.norms]
        self.native_layers = NativeLayersAndPrograms(
            backend, dtype, make_unchanged_check(self.module, [*entries, *self.watched_entries]), taken, {}
        )
        return self.native_layers


def append_gated_mlp(
    program: NativeProgram,
    spec: GatedMLPSpec,
    x: AddressOrName,
    rows: int,
    layers: Sequence[NativeLayer],
    *outs: AddressOrName,
) -> Any:
    """Add ``down(act(gate) up)`` of rows to steps, and return the address of the result (``outs``, or new room)."""
    *first, down = layers
    wide = first[0].out_features
    inner = wide if spec.up is not None else wide // 2
    gate, *others = program.append_products(x, rows, down.out_features, first)
    sides = gate, others[0] if others else gate + inner * program.itemsize
    sides = sides if spec.gate_first else sides[::-1]
    hidden = program.append_gated(*sides, rows, inner, wide, ACTIVATIONS[spec.activation])
    return program.append_products(hidden, rows, inner, [down], *outs)[0]


def gated_mlp_layers(module: nn.Module, spec: GatedMLPSpec) -> list[Any]:
    """Return the layers of a gated MLP: gate, up if there is one, and down."""
    return [getattr(module, name) for name in (spec.gate, spec.up, spec.down) if name]


def is_native_layer(module: nn.Module) -> bool:
    """Whether a module is a layer whose weight C multiplies; C adds its adapters."""
    return _class_without_adapters(module) in NATIVE_LAYER_CLASSES


def _class_without_adapters(module: nn.Module) -> type[nn.Module]:
    return module._plain_class if isinstance(module, AdaptedModule) else type(module)


def _base_and_adapters(layer: Any) -> tuple[Any, list[Any]]:
    """Return the module whose parameters a layer reads, and the adapters that it adds."""
    if not isinstance(layer, AdaptedModule):
        return layer, []
    base, _, adapters = base_module_class_and_adapters(layer)
    return base, adapters


def _entries_that_calls_read(layer: Any) -> list[tuple[dict[str, Any], str]]:
    """Return (dict, key) of each object that a layer's calls read: parameters, and which adapters are active."""
    base, adapters = _base_and_adapters(layer)
    entries = [(base._parameters, name) for name in base._parameters] + [(base._kept, "weight")]
    if isinstance(layer, AdaptedModule):
        bank = layer.adapters
        entries += [(vars(bank), name) for name in ("active", "merged_copy")]
        holders = (bank._modules.get(name) for name in bank.active)
        entries += [(holder._modules, "weight") for holder in holders if holder is not None]
    for adapter in adapters:
        entries += [(adapter._parameters, name) for name in ("lora_a", "lora_b")] + [(vars(adapter), "scaling")]
    return entries


def layers_for_c_or_none(backend: CpuBackend, layers: Iterable[Any], dtype: torch.dtype) -> list[NativeLayer] | None:
    """Return layers as C takes them, if products with inputs of a dtype are all computed in that dtype, or in 8-bit
    integers; an adapter's in float32."""
    native_layers: list[NativeLayer] = []
    for layer in layers:
        base, adapters = _base_and_adapters(layer)
        parameters, in_int8 = base._parameters, False
        if isinstance(base, QuantizedLinear):
            weight, bias = cached_quantized_weight_or_none(base) or base.quantized, parameters.get("bias")
            computed = base._forms["weight"].form.compute_dtype
            in_int8 = computed is torch.int8
            fits = in_int8 or computed in (None, dtype)
            native_weight = backend.native_weight_or_none(weight, in_int8) if fits else None
        else:
            stored, bias = parameters.get("weight_rounded"), parameters.get("bias_rounded", parameters.get("bias"))
            fits = type(stored) is nn.Parameter and (dtype is torch.float32 or stored.dtype is dtype)
            native_weight = (None, stored, None) if fits else None
        if native_weight is None or (bias is not None and (bias.dtype not in TYPES or not bias.is_contiguous())):
            return None
        updates = tuple(_update_for_c_or_none(adapter, layer) for adapter in adapters)
        if None in updates:
            return None
        native_layers.append(
            NativeLayer(native_weight, layer.out_features, bias, in_int8, cast("tuple[LowRank, ...]", updates))
        )
    return native_layers


def _update_for_c_or_none(adapter: Any, layer: Any) -> LowRank | None:
    """Return what an adapter adds to a layer, as C takes it; None where its own forward must run."""
    parameters = adapter._parameters
    a, b = parameters.get("lora_a"), parameters.get("lora_b")
    is_plain = type(adapter) is Adapter and is_inactive_dropout(adapter._modules["dropout"])
    if not is_plain or not all(type(each) is nn.Parameter and is_c_readable_float32(each) for each in (a, b)):
        return None
    rank = len(a)
    fits = a.shape == (rank, layer.in_features) and b.shape == (layer.out_features, rank) and rank > 0
    return (a, b, float(adapter.scaling)) if fits else None


def unsupported_layer_reason_or_none(module: nn.Module, layers: Iterable[Any]) -> str | None:
    """Return which of a module's layers C does not multiply with, and why; or None."""
    names = {submodule: name for name, submodule in module.named_modules()}
    for layer in layers:
        if not is_native_layer(layer):
            kind = _class_without_adapters(layer)
            why = "is dense" if kind is nn.Linear else f"is a {kind.__name__}"
            return f"{names[layer]} {why}"
        form, dtype = layer._forms["weight"].form, layer._forms["weight"].dtype
        computed = getattr(form, "compute_dtype", None) or dtype
        if computed not in (dtype, torch.int8) or dtype not in ROW_TYPES:
            return (
                f"{names[layer]} takes {dtype} and computes in {computed}: C needs float32 for both, or bfloat16, or "
                "computes in torch.int8"
            )
    return None
