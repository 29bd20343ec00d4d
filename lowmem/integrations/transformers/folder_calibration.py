"""Calibrates the model of a folder: on a text, on what it generates itself, or on random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import file_error
from lowmem.integrations.transformers.model_facts import (
    capped_context_window,
    check_not_encoder_decoder,
    read_language_model_sizes,
)
from lowmem.integrations.transformers.pretrained_folder import (
    architecture_class,
    check_folder_is_dense,
    load_folder,
    write_model_folder,
)
from lowmem.integrations.transformers.text_tokenizer import padded_batches, read_tokenizer, split_paragraphs
from lowmem.io.convert_checkpoint import TensorConversionRow
from lowmem.io.filesystem import check_not_exists, read_text_and_sha256
from lowmem.io.model_folder import CONFIG, read_checked_model_config
from lowmem.nn.techniques import Budget, FourBit
from lowmem.transforms.calibration.calibrate import calibrate

UNCALIBRATED_RATIO, SELF_CALIBRATED_RATIO = 1.173, 1.060
"""Perplexity of SmolLM2-135M in 4 bits, divided by the dense model's, on Python's manual: the table of
docs/guides/calibration.md has them."""

# CPU seconds a weight, for 4096 tokens
_SECONDS_PER_WEIGHT = 480e-9

# Tokens of a text, if the model takes as many
WINDOW = 256
WINDOWS = 32  # that are read, evenly spread over a text: 8192 tokens
_PARAGRAPHS = 64  # that are read, for models that see the whole of a text at once
# Windows or paragraphs
_BATCH = 8


def load_calibrate_and_write_folder(
    source: Path,
    target: Path,
    technique: FourBit | Budget,
    text: Path | str,
    *,
    skip: str | Iterable[str] = (),
    shard_bytes: int | None = None,
    diagonal: bool = False,
    resume: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, float], object] | None = None,
) -> list[TensorConversionRow]:
    """Write a folder with the weights of another one calibrated, as ``quantize_folder``.

    The dense model is in memory, in the dtype of the folder.

    Args:
        source: a dense folder, with the model's tokenizer.
        target, skip, shard_bytes: as for ``quantize_folder``.
        technique: how to store the weights; a ``Budget`` is divided by what its layers get, too.
        text: a file of text in UTF-8; or "self" or "random", for which calibrate makes 4096 tokens with seed 0,
            at a temperature of 1.
        device: where the model runs.
        diagonal, resume, progress: as for ``lowmem.calibrate``.

    Raises:
        FileError, FileExistsError, OSError: as ``quantize_folder``; or the folder is of an encoder and a decoder, its
            tokenizer is missing or of another vocabulary, or the text has too few tokens.
        ValueError: as ``lowmem.calibrate``.
    """
    check_not_exists(target)
    check_folder_is_dense(source)
    tokenizer = read_tokenizer(source, read_language_model_sizes(source, "calibrate").vocabulary)
    written = read_text_and_sha256(text)[0] if isinstance(text, Path) else None
    model: Any = load_folder(source).to(device)
    check_not_encoder_decoder(source, model, "calibrate")
    batches: Any = text if written is None else calibration_batches(model, tokenizer, written)
    if isinstance(text, Path) and not batches:
        raise file_error(
            text, "it has too few tokens to calibrate a model: take a text of a few thousand", "calibrate"
        )
    calibrate(
        model,
        batches,
        technique,
        skip=skip,
        diagonal=diagonal,
        resume=resume,
        progress=progress,
        tokenizer=tokenizer,
    )
    return write_model_folder(model.to("cpu"), source, target, shard_bytes)


def self_calibration_hint_or_none(folder: Path, weight_count: int) -> str | None:
    """Return what it would gain and cost to calibrate a dense folder's model, of which ``weight_count`` are stored,
    on its own text; None if it writes none."""
    kind = architecture_class(folder, read_checked_model_config(folder / CONFIG))
    # A class that finds the model's by its config has no such method
    if not (hasattr(kind, "can_generate") and kind.can_generate()):
        return None
    seconds = max(1.0, _SECONDS_PER_WEIGHT * weight_count)
    time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    return (
        f"--calibrate self brings the perplexity of SmolLM2-135M from {UNCALIBRATED_RATIO:.3f} to "
        f"{SELF_CALIBRATED_RATIO:.3f} times the dense model's; for this model it takes about {time} of CPU time, and "
        "the model writes 4096 tokens"
    )


def calibration_batches(model: nn.Module, tokenizer: Any, text: str) -> list[Tensor] | list[dict[str, Tensor]]:
    """Return parts of a text, evenly spread, as batches of a model's inputs.

    A model that generates gets windows of the text; an encoder gets paragraphs with what the tokenizer puts around
    them, padded and masked. Batches are on the model's device.
    """
    pretrained_model: Any = model
    length = capped_context_window(pretrained_model.config, WINDOW)
    if pretrained_model.can_generate():
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long, device="cpu")
        windows = [window for window in tokens.split(length) if len(window) == length]
        return (
            list(torch.stack(_evenly_spaced_items(windows, WINDOWS)).to(pretrained_model.device).split(_BATCH))
            if windows
            else []
        )
    batches = padded_batches(tokenizer, _evenly_spaced_items(split_paragraphs(text), _PARAGRAPHS), length, _BATCH)
    return [{name: tensor.to(pretrained_model.device) for name, tensor in batch.items()} for batch in batches]


def _evenly_spaced_items(items: list[Any], count: int) -> list[Any]:
    """Return at most ``count`` of the parts, evenly spread."""
    return [items[number * len(items) // count] for number in range(count)] if len(items) > count else items
