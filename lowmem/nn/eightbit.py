"""The 8-bit technique and its layers, which are subclasses of the 4-bit ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from lowmem.nn.blockwise import Blockwise, check_compute_dtype
from lowmem.nn.conv import Conv1d4Bit, Conv2d4Bit
from lowmem.nn.embedding import Embedding4Bit
from lowmem.nn.fourbit import FourBit, Linear4Bit
from lowmem.nn.stored import EightBitForm
from lowmem.nn.stored_module import LAYERS
from lowmem.quant.formats import get_format
from lowmem.quant.packing import check_block_size
from lowmem.quant.scales import ENCODINGS, OFFSETS

__all__ = ["Conv1d8Bit", "Conv2d8Bit", "EightBit", "Embedding8Bit", "Linear8Bit", "blockwise", "of_embeddings"]


@dataclass(frozen=True)
class EightBit(Blockwise):
    """8-bit quantization: weights are stored as integers from -127 to 127 with a scale per block, frozen.

    Biases are unchanged. A weight is off by at most 1/254 of the largest magnitude in its block, plus the effect of
    rounding the scale (``QuantizedTensor.error_bound``). It is absmax quantization as in LLM.int8(), arXiv
    2208.07339, section 2, in blocks as in arXiv 2110.02861.

    Args:
        block_size: weights per scale, even, 8 to 4096; None: 64.
        scales: "float32", "float16" or "double" (8 bits per scale, and a float16 for each row); None: "double".
        compute_dtype: as in ``FourBit``.

    Raises:
        ValueError: unknown scales, a bad block size, or a ``compute_dtype`` that ``FourBit`` rejects.
    """

    block_size: int | None = None
    scales: str | None = None
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None:
            check_block_size(self.block_size)
        if self.scales is not None and self.scales not in ENCODINGS:
            why = "has offsets" if self.scales in OFFSETS else "is unknown"
            raise ValueError(f"scales={self.scales!r} {why}: choose from {', '.join(ENCODINGS)}")
        check_compute_dtype(self.compute_dtype)

    @property
    def format(self) -> str:
        """The key of the only format."""
        return "int8"


def of_embeddings(technique: FourBit) -> EightBit | FourBit:
    """Return the technique with which ``technique`` stores embeddings and the output layer."""
    if technique.embeddings == "4bit":
        return technique
    dtype = technique.compute_dtype
    return EightBit(compute_dtype=None if dtype is torch.int8 else dtype)  # no kernel multiplies 8-bit codes in int8


def blockwise(
    format: str | None,
    block_size: int | None = None,
    scales: str | None = None,
    compute_dtype: torch.dtype | None = None,
    search: bool | None = None,
    embeddings: str = "8bit",
) -> FourBit | EightBit:
    """Return the technique that stores weights in a format; None: ``FourBit``'s default.

    Raises:
        ValueError: what ``FourBit`` or ``EightBit`` rejects, or an unknown format.
    """
    if format is not None and get_format(format).bits == 8:
        return EightBit(block_size, scales, compute_dtype)
    return FourBit(cast(str, format), block_size, scales, compute_dtype, search, embeddings=embeddings)


class Linear8Bit(Linear4Bit):
    """``y = x W^T + b`` with W stored in 8 bits and frozen. Arguments are those of ``Linear4Bit``."""

    form_class = EightBitForm


class Embedding8Bit(Embedding4Bit):
    """An nn.Embedding whose table is stored in 8 bits and frozen. Arguments are those of ``Embedding4Bit``."""

    form_class = EightBitForm


class Conv1d8Bit(Conv1d4Bit):
    """An nn.Conv1d in 8 bits."""

    form_class = EightBitForm


class Conv2d8Bit(Conv2d4Bit):
    """An nn.Conv2d in 8 bits."""

    form_class = EightBitForm


LAYERS.update(
    {
        (nn.Linear, EightBitForm): Linear8Bit,
        (nn.Embedding, EightBitForm): Embedding8Bit,
        (nn.Conv1d, EightBitForm): Conv1d8Bit,
        (nn.Conv2d, EightBitForm): Conv2d8Bit,
    }
)
