"""The 4-bit technique, the base of all 4-bit layers, and the linear layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from lowmem.nn.frozen_linear import FrozenStorage, autocast, freeze, frozen_linear
from lowmem.quant.formats import get_format
from lowmem.quant.packing import check_block_size
from lowmem.quant.quantize import method_of, quantize
from lowmem.quant.scales import get_encoding
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["FourBit", "FourBitStorage", "FourBitStore", "Linear4Bit", "format_keys"]

FourBitStore: TypeAlias = Callable[[Tensor, str], QuantizedTensor]
"""Quantizes a weight, given with its name for errors: ``FourBit.store``, or a replacement for it."""


@dataclass(frozen=True)
class FourBit:
    """4-bit quantization: weights are stored as 4-bit codes with a scale per block, frozen; biases are unchanged.

    QLoRA, arXiv 2305.14314, section 2.

    Args:
        format: a key of ``FORMATS``; or several, of which each weight gets the one with the least squared error.
        block_size: weights per scale, even, 8 to 4096; None: the format's default.
        scales: "float32", "float16" or "double"; None: the format's default.
        compute_dtype: to multiply in; None: the dtype of the input. With torch.int8, linear layers round inputs, and
            levels that need it, to 8 bits (``lowmem.kernels.int8``) and multiply integers; gradients and other layers
            use the dtype of the input.
        search: whether to search for the scales with the least squared error; None: the format's default.

    Raises:
        ValueError: an unknown format or scales, a bad block size, or a dtype that is not floating point.
    """

    format: str | tuple[str, ...] = "nf4"
    block_size: int | None = None
    scales: str | None = None
    compute_dtype: torch.dtype | None = None
    search: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, str):
            object.__setattr__(self, "format", tuple(self.format))  # a list would not be hashable
        if not self.format:
            raise ValueError(f"format={self.format!r} names no format: name one, or several to choose from")
        for name in [self.format] if isinstance(self.format, str) else self.format:
            get_format(name)
        if self.block_size is not None:
            check_block_size(self.block_size)
        if self.scales is not None:
            get_encoding(self.scales)
        dtype = self.compute_dtype
        if dtype not in (None, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"compute_dtype={dtype!r} must be a floating-point torch.dtype of 16 bits or more, or torch.int8, "
                "or None"
            )

    def store(self, weight: Tensor, name: str = "weight") -> QuantizedTensor:
        """Quantize a weight; codes and scales become frozen parameters.

        Args:
            weight: floating point (..., n), finite.
            name: unused; ``FourBitStore`` has it for errors.

        Raises:
            TypeError, ValueError: a weight that ``quantize`` rejects.
        """
        return _freeze(
            quantize(weight, self.format, block_size=self.block_size, scales=self.scales, search=self.search)
        )

    def skeleton(self, weight: Tensor, name: str = "weight") -> QuantizedTensor:
        """Return what ``store`` would return, on the meta device.

        Raises:
            ValueError: several formats; choosing one needs the weight's values.
        """
        if not isinstance(self.format, str):
            raise ValueError(f"format={self.format!r}: without values there is no choosing; name one format")
        form = get_format(self.format)
        size = form.block_size if self.block_size is None else self.block_size
        method = method_of(form, self.search)
        return _freeze(
            QuantizedTensor.empty(weight.shape, form.name, size, self.scales or form.scales, method, device="meta")
        )


def format_keys(model: nn.Module) -> set[str]:
    """Return the state_dict keys that hold formats of 4-bit layers; lowmem's files keep formats in their metadata."""
    layers = model.named_modules(remove_duplicate=False)
    return {f"{path}.{_EXTRA_STATE_KEY_SUFFIX}".lstrip(".") for path, m in layers if isinstance(m, FourBitStorage)}


def _format_of(state: Any, unread: object) -> object:
    """Return the format in an extra state; ``unread`` where it has no values (meta or fake tensors)."""
    if isinstance(state, Tensor) and (state.is_meta or isinstance(state, FakeTensor)):
        return unread
    if isinstance(state, Tensor) and state.dtype == torch.uint8 and state.dim() == 1:
        return bytes(state.tolist()).decode(errors="replace")
    return f"something else than a format ({type(state).__name__})"


def _freeze(weight: QuantizedTensor) -> QuantizedTensor:
    return replace(weight, packed=freeze(weight.packed), scales=freeze(weight.scales))


class FourBitStorage(FrozenStorage):
    """Base of all layers with a frozen 4-bit weight, held as the parameters ``packed`` and ``scales``.

    Args:
        weight: quantized (rows, n).
    """

    stored = ("packed", "scales")

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.format, self.block_size, self.scale_encoding = weight.format, weight.block_size, weight.scale_encoding
        # torch saves _version in a state_dict's metadata, which a plain dict lacks: hence get_extra_state, too.
        self._version = f"{self.format}, block_size={self.block_size}, scales={self.scale_encoding}"  # type: ignore[assignment]
        self.packed, self.scales = freeze(weight.packed), freeze(weight.scales)
        self._quantized = replace(weight, packed=self.packed, scales=self.scales)  # built once, for speed

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor of the layer's own parameters, not copied."""
        known, stored = self._quantized, self._parameters
        if known.packed is not stored.get("packed") or known.scales is not stored.get("scales"):
            known = replace(known, packed=self.packed, scales=self.scales)
            if isinstance(known.packed, nn.Parameter) and isinstance(known.scales, nn.Parameter):
                self._quantized = known  # but not the tensors that torch.func puts there for one call
        return known

    def get_extra_state(self) -> Tensor:
        """Return the format as text in a uint8 tensor, which safetensors can hold."""
        return torch.tensor(list(str(self._version).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: a layer's format never changes, and ``_load_from_state_dict`` has compared them."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Reject codes of another format; warn if the state names no format, as those of older versions do not."""
        key, own = prefix + _EXTRA_STATE_KEY_SUFFIX, str(self._version)
        missing, errors = rest[-3], rest[-1]
        found = local_metadata.get("version")
        if key in state_dict:
            found = _format_of(state_dict[key], own if found is None else found)
        if isinstance(found, str) and found != own:
            errors.append(f"{prefix.rstrip('.') or 'the layer'} stores {own}; the state holds {found}")
            return
        if not isinstance(found, str) and prefix + "packed" in state_dict:
            warnings.warn(
                f"nothing in the state says how its 4-bit codes are stored: they are taken for {own}, and are noise "
                "if they are not; load what this version's state_dict() gives, or a file with lowmem.load",
                UserWarning,
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if key in missing:
            missing.remove(key)

    @property
    def weight_count(self) -> int:
        """The number of weights that the layer stores, bias included."""
        bias = getattr(self, "bias", None)
        return self._quantized.shape.numel() + (0 if bias is None else int(bias.numel()))

    def extra_repr(self) -> str:
        """Describe the format."""
        return f"format={self._version}"


class Linear4Bit(FourBitStorage):
    """``y = x W^T + b`` with W stored in 4 bits and frozen; the bias is unchanged.

    Args:
        weight: quantized (out_features, in_features).
        bias: floating point (out_features,), or None.
        compute_dtype: to multiply in; None: the dtype of the input; torch.int8: 8-bit integers.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: QuantizedTensor, bias: nn.Parameter | None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", bias)

    @classmethod
    def from_layer(cls, layer: nn.Linear, technique: FourBit, store: FourBitStore | None = None) -> Linear4Bit:
        """Build it from a dense layer, whose weight is stored by ``store``, or ``technique.store`` for None.

        Raises:
            TypeError, ValueError: weights that ``quantize`` rejects.
        """
        return cls((store or technique.store)(layer.weight, "weight"), layer.bias, technique.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the input's dtype, for input (..., in_features)."""
        x = autocast(input)
        own = self._parameters  # faster than attributes; a parametrization may have moved some out
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401 - get would evaluate self.bias each time
        return frozen_linear(x, self.quantized, self.compute_dtype or x.dtype, bias)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, and how it is stored."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{super().extra_repr()}"
        )
