"""The named variants of a model, each a tuple of techniques. A new variant is one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from lowmem.bignet import BigNet
from lowmem.errors import is_one_of, short_repr
from lowmem.nn.techniques import EightBit, FourBit, Half, LoRA
from lowmem.quant.formats import get_format
from lowmem.transforms.convert import convert
from lowmem.transforms.module_registry import Technique

_INT4 = FourBit("int4", block_size=16, scales="float16")

VARIANTS: MappingProxyType[str, tuple[Technique, ...]] = MappingProxyType(
    {
        "bignet": (),
        "half_precision": (Half(),),
        "lora": (Half(), LoRA(rank=32)),
        "four_bit": (FourBit(),),
        "qlora_4bit": (FourBit(), LoRA(rank=32)),
        "eight_bit": (EightBit(),),
        "qlora_8bit": (EightBit(), LoRA(rank=32)),
        "low_precision": (_INT4,),
        "qlora": (_INT4, LoRA(rank=32)),
        "low_precision_nf4": (FourBit("nf4"),),
        "qlora_nf4": (FourBit("nf4"), LoRA(rank=32)),
    }
)


def variant_description(variant_name: str) -> str:
    """Return what ``VARIANTS[name]`` is, in words: ``4-bit weights (bof4s in blocks of 32), LoRA of rank 32``."""
    words = []
    for technique in VARIANTS[variant_name]:
        if isinstance(technique, LoRA):
            words.append(f"LoRA of rank {technique.rank}")
            continue
        words.append(f"{technique.bits}-bit weights")
        if isinstance(technique, FourBit):
            size = technique.block_size or get_format(str(technique.format)).block_size
            words[-1] += f" ({technique.format} in blocks of {size})"
    return ", ".join(words) or "dense, as the model is made"


def variant_techniques(variant_name: str, rank: int | None = None) -> tuple[Technique, ...]:
    """Return ``VARIANTS[name]``, with another LoRA rank if one is given.

    Raises:
        ValueError: an unknown variant (the choices are listed), a bad rank, or a rank for a variant without LoRA.
    """
    if not is_one_of(variant_name, VARIANTS):
        raise ValueError(f"variant={short_repr(variant_name)} is unknown: choose from {', '.join(VARIANTS)}")
    techniques = VARIANTS[variant_name]
    if rank is None:
        return techniques
    if not any(isinstance(t, LoRA) for t in techniques):
        adapted = [other for other, parts in VARIANTS.items() if any(isinstance(t, LoRA) for t in parts)]
        raise ValueError(
            f"rank={rank} has no use for variant={variant_name!r}, which has no LoRA; {', '.join(adapted)} have"
        )
    return tuple(replace(t, rank=rank) if isinstance(t, LoRA) else t for t in techniques)


def build(
    name: str, factory: Callable[[], nn.Module] = BigNet, *, seed: int = 0, rank: int | None = None
) -> nn.Module:
    """Build a variant. All variants with the same seed are converted from the same weights.

    Args:
        name: a key of ``VARIANTS``.
        factory: makes the float32 model.
        seed: of torch's generator while the model is built; the global generator's state is restored.
        rank: LoRA rank; None takes the variant's own.

    Returns:
        The model, in the training or evaluation mode of ``factory``.

    Raises:
        ValueError: an unknown variant, a bad rank or a rank without LoRA; or what ``convert`` rejects.
    """
    techniques = variant_techniques(name, rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory()
        return convert(model, *techniques) if techniques else model
