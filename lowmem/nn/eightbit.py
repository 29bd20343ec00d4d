"""The 8-bit technique and its layers, which are subclasses of the 4-bit ones."""

from __future__ import annotations

from torch import nn

from lowmem.nn.conv import Conv1d4Bit, Conv2d4Bit
from lowmem.nn.embedding import Embedding4Bit
from lowmem.nn.fourbit import Linear4Bit
from lowmem.nn.stored import EightBitForm
from lowmem.nn.stored_module import LAYERS

__all__ = [
    "Conv1d8Bit",
    "Conv2d8Bit",
    "Embedding8Bit",
    "Linear8Bit",
]


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
