"""Common base of the techniques that store weights as codes with a scale for each block."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowmem.nn.stored_module import freeze
from lowmem.quant.formats import get_format
from lowmem.quant.quantize import method_of, quantize
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Blockwise", "check_compute_dtype"]


class Blockwise:
    """Base of ``FourBit`` and ``EightBit``.

    Attributes:
        block_size: weights per scale; None: the format's default.
        scales: their encoding, a key of ``ENCODINGS``; None: the format's default.
        compute_dtype: dtype of products; None: the dtype of the input.
    """

    block_size: int | None
    scales: str | None
    compute_dtype: torch.dtype | None

    @property
    def format(self) -> str | tuple[str, ...]:
        """The key of a format; or several, of which each weight gets the one with the smallest squared error."""
        raise NotImplementedError

    @property
    def search(self) -> bool | None:
        """Whether to search for the scales with the smallest squared error; None: the format's default."""
        return None

    def store(self, weight: Tensor, name: str = "weight") -> QuantizedTensor:
        """Quantize a weight; codes and scales become frozen parameters.

        Args:
            weight: floating point (..., n), finite.
            name: unused here; replacements for this method name it in errors.

        Raises:
            TypeError, ValueError: a weight that ``quantize`` rejects.
        """
        return _freeze(
            quantize(weight, self.format, block_size=self.block_size, scales=self.scales, search=self.search)
        )

    def skeleton(self, weight: Tensor, name: str = "weight") -> QuantizedTensor:
        """Return what ``store`` would return, on the meta device.

        Raises:
            ValueError: ``format`` names several; to choose one takes the weight's values.
        """
        if not isinstance(self.format, str):
            raise ValueError(f"format={self.format!r}: without values there is no choosing; name one format")
        form = get_format(self.format)
        size = form.block_size if self.block_size is None else self.block_size
        method = method_of(form, self.search)
        return _freeze(
            QuantizedTensor.empty(weight.shape, form.name, size, self.scales or form.scales, method, device="meta")
        )


def check_compute_dtype(dtype: torch.dtype | None) -> None:
    """Check a ``compute_dtype``.

    Raises:
        ValueError: it is not a floating point dtype of at least 16 bits, torch.int8 or None.
    """
    if dtype not in (None, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"compute_dtype={dtype!r} must be a floating-point torch.dtype of 16 bits or more, or torch.int8, or None"
        )


def _freeze(weight: QuantizedTensor) -> QuantizedTensor:
    return replace(weight, packed=freeze(weight.packed), scales=freeze(weight.scales))
