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

from lowmem.errors import FileError, error_type_and_first_line, file_error, short_repr
from lowmem.integrations.transformers.foreign_checkpoint import transformers_config
from lowmem.integrations.transformers.pretrained_folder import (
    architecture_class,
    checked_config_and_tensor_bytes,
    quiet_load_with_file_errors,
)
from lowmem.integrations.transformers.quantization_config import METHOD, LowmemConfig
from lowmem.io.model_folder import read_checked_model_config


def quantizing_program_or_none(folder: Path, task: str = "fine-tune") -> str | None:
    """Return which program stored the weights of a folder or GGUF file, such as "lowmem"; None if it is dense.

    Raises:
        FileError: as ``checked_config_and_tensor_bytes``;
            or lowmem stored the weights in a way that this version does not read, or the model
            has an adapter.
    """
    if folder.is_file():
        return "gguf"
    stored = checked_config_and_tensor_bytes(folder, task)[0].get("quantization_config")
    if not isinstance(stored, dict):
        return None
    if stored.get("quant_method") != METHOD:
        return str(stored.get("quant_method"))
    with quiet_load_with_file_errors(folder):
        # As loading checks the record
        LowmemConfig(**stored)
    if stored.get("adapters"):
        name = short_repr(min(stored["adapters"]))
        raise file_error(folder, f"its model has an adapter already, as of {name}: name the base alone", task)
    return "lowmem"


@contextmanager
def delayed_transformers_log(replay: bool = True) -> Iterator[None]:
    """Delay the log of transformers until the block ends; drop the log after an error, or unless ``replay``."""
    logger = logging.getLogger("transformers")
    handlers, held = logger.handlers, MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1)
    logger.handlers = [held]
    try:
        yield
    finally:
        logger.handlers = handlers
    for record in held.buffer if replay else ():
        logger.handle(record)


class LanguageModelSizes(NamedTuple):
    """Sizes of a language model."""

    vocabulary: int  # tokens
    width: int  # of the hidden states
    positions: int | None  # None: any number
    layers: int


def read_language_model_sizes(folder: Path, task: str = "fine-tune") -> LanguageModelSizes:
    """Return the sizes of the model of a folder or GGUF file; a FileError names the task if they are not said."""
    try:
        config = transformers_config(folder).get_text_config()
        vocabulary, width, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    except FileError:
        raise
    except Exception as reason:  # of the libraries that check a config, which have no common class
        raise file_error(
            folder, f"its config is of no language model: {error_type_and_first_line(reason)}", task
        ) from reason
    positions = getattr(config, "max_position_embeddings", None)
    return LanguageModelSizes(
        vocabulary, width, positions if isinstance(positions, int) and positions > 0 else None, layers
    )


def capped_context_window(config: Any, max_tokens: int) -> int:
    """Return how many tokens a config's model sees at a time: ``max_tokens``, or as many as it has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(max_tokens, positions) if isinstance(positions, int) and positions > 0 else max_tokens


def check_not_encoder_decoder(folder: Path, model: nn.Module, task: str) -> None:
    """Raise a FileError if a model is an encoder and a decoder, which a text alone does not feed."""
    pretrained_model: Any = model
    if getattr(pretrained_model.config, "is_encoder_decoder", False):
        why = (
            f"a {type(model).__name__} is an encoder and a decoder, and a text feeds one alone: name a causal "
            "language model or an encoder"
        )
        raise file_error(folder, why, task)


def model_class_from_path(path: Path) -> Any:
    """Return the class of the model of a folder or GGUF file."""
    return (
        AutoModelForCausalLM
        if path.is_file()
        else architecture_class(path, read_checked_model_config(path / "config.json"))
    )


def dense_model_factory(
    folder: Path, num_layers: int | None = None, model_class: Any = AutoModelForCausalLM
) -> Callable[[], nn.Module]:
    """Return what makes the dense model of a folder with new values, in the dtype of its config, or float32.

    Args:
        folder: the folder, whose config.json alone is read, or a GGUF file.
        num_layers: how many of its layers the model has; None: all.
        model_class: the model's class, or an Auto class.
    """
    config = transformers_config(folder)
    text = config.get_text_config()
    if num_layers is not None:
        for name, value in list(vars(text).items()):
            # layer_types, and the like
            if isinstance(value, list) and len(value) == text.num_hidden_layers:
                setattr(text, name, value[:num_layers])
        text.num_hidden_layers = num_layers
    dtype = text.dtype or torch.float32

    def make_dense_model() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with quiet_load_with_file_errors(folder):
                if hasattr(model_class, "from_config"):
                    model: nn.Module = model_class.from_config(config, dtype=dtype, trust_remote_code=False)
                else:
                    model = model_class(config)
        finally:
            torch.set_default_dtype(before)
        return model

    return make_dense_model
