"""Facts about the model of a folder, from its config.json: whether it can be fine-tuned, and its sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowmem.errors import FileError, describe, refusal, show
from lowmem.integrations.transformers.config import METHOD, LowmemConfig
from lowmem.integrations.transformers.exact import config_at
from lowmem.integrations.transformers.folder import check, class_of, load_errors
from lowmem.io.model_folder import read_model_config


def stored_by(folder: Path, task: str = "fine-tune") -> str | None:
    """Return which program stored the weights of a folder or GGUF file, such as "lowmem"; None if it is dense.

    Raises:
        FileError: as ``check``; or lowmem stored the weights in a way that this version does not read, or the model
            has an adapter.
    """
    if folder.is_file():
        return "gguf"
    stored = check(folder, task)[0].get("quantization_config")
    if not isinstance(stored, dict):
        return None
    if stored.get("quant_method") != METHOD:
        return str(stored.get("quant_method"))
    with load_errors(folder):
        LowmemConfig(**stored)  # as loading checks the record
    if stored.get("adapters"):
        name = show(min(stored["adapters"]))
        raise refusal(folder, f"its model has an adapter already, as of {name}: name the base alone", task)
    return "lowmem"


@contextmanager
def held_back(shown: bool = True) -> Iterator[None]:
    """Delay the log of transformers until the block ends; drop the log after an error, or unless ``shown``."""
    logger = logging.getLogger("transformers")
    handlers, held = logger.handlers, MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1)
    logger.handlers = [held]
    try:
        yield
    finally:
        logger.handlers = handlers
    for record in held.buffer if shown else ():
        logger.handle(record)


class Sizes(NamedTuple):
    """Sizes of a language model."""

    vocabulary: int  # tokens
    width: int  # of the hidden states
    positions: int | None  # None: any number
    layers: int


def sizes_of(folder: Path, task: str = "fine-tune") -> Sizes:
    """Return the sizes of the model of a folder or GGUF file; a FileError names the task if they are not said."""
    try:
        config = config_at(folder).get_text_config()
        vocabulary, width, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    except FileError:
        raise
    except Exception as reason:  # of the libraries that check a config, which have no common class
        raise refusal(folder, f"its config is of no language model: {describe(reason)}", task) from reason
    positions = getattr(config, "max_position_embeddings", None)
    return Sizes(vocabulary, width, positions if isinstance(positions, int) and positions > 0 else None, layers)


def window_of(config: Any, most: int) -> int:
    """Return how many tokens a config's model sees at a time: ``most``, or as many as it has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(most, positions) if isinstance(positions, int) and positions > 0 else most


def refuse_pairs(folder: Path, model: nn.Module, task: str) -> None:
    """Raise a FileError if a model is an encoder and a decoder, which a text alone does not feed."""
    own: Any = model
    if getattr(own.config, "is_encoder_decoder", False):
        why = (
            f"a {type(model).__name__} is an encoder and a decoder, and a text feeds one alone: name a causal "
            "language model or an encoder"
        )
        raise refusal(folder, why, task)


def class_at(path: Path) -> Any:
    """Return the class of the model of a folder or GGUF file."""
    return AutoModelForCausalLM if path.is_file() else class_of(path, read_model_config(path / "config.json"))


def factory_of(folder: Path, layers: int | None = None, kind: Any = AutoModelForCausalLM) -> Callable[[], nn.Module]:
    """Return what makes the dense model of a folder with new values, in the dtype of its config, or float32.

    Args:
        folder: the folder, whose config.json alone is read, or a GGUF file.
        layers: how many of its layers the model has; None: all.
        kind: the model's class, or an Auto class.
    """
    config = config_at(folder)
    text = config.get_text_config()
    if layers is not None:
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == text.num_hidden_layers:  # layer_types, and the like
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    dtype = text.dtype or torch.float32

    def make() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with load_errors(folder):
                if hasattr(kind, "from_config"):
                    model: nn.Module = kind.from_config(config, dtype=dtype, trust_remote_code=False)
                else:
                    model = kind(config)
        finally:
            torch.set_default_dtype(before)
        return model

    return make
