"""What is known of the model of a folder before its weights are read: whether it can be fine-tuned, and its sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem.errors import describe, refusal, show
from lowmem.integrations.transformers.config import METHOD
from lowmem.integrations.transformers.folder import check

__all__ = ["Sizes", "factory_of", "sizes_of", "stored_by"]

ADAPTER = "adapter_config.json"
"""What PEFT calls the config of an adapter, which transformers would load with the model beside it."""


def stored_by(folder: Path) -> str | None:
    """Return what has stored the weights of a folder: "lowmem", or another program; None: they are dense.

    Raises:
        FileError: the folder has an adapter already, is an adapter's, or is no model's.
    """
    if (folder / ADAPTER).exists():
        raise refusal(
            folder, f"it has an adapter ({ADAPTER}): merge it into its base, or name the base alone", "fine-tune"
        )
    stored = check(folder)[0].get("quantization_config")
    if not isinstance(stored, dict):
        return None
    if stored.get("quant_method") != METHOD:
        return str(stored.get("quant_method"))
    if stored.get("adapters"):
        name = show(min(stored["adapters"]))
        raise refusal(folder, f"its model has an adapter already, as of {name}: name the base alone", "fine-tune")
    return "lowmem"


class Sizes(NamedTuple):
    """Sizes of a language model.

    Attributes:
        vocabulary: how many tokens it knows.
        width: of its hidden states.
        positions: how many it has; None: any number.
    """

    vocabulary: int
    width: int
    positions: int | None


def sizes_of(folder: Path, task: str = "fine-tune") -> Sizes:
    """Return the sizes of a folder's model, for a task that errors name.

    Raises:
        FileError: its config.json does not say them, or is of no model that transformers has.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        vocabulary, width = config.vocab_size, config.hidden_size
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as reason:
        raise refusal(folder, f"its config.json is of no language model: {describe(reason)}", task) from reason
    positions = getattr(config, "max_position_embeddings", None)
    return Sizes(vocabulary, width, positions if isinstance(positions, int) and positions > 0 else None)


def factory_of(folder: Path) -> Callable[[], nn.Module]:
    """Return what makes the dense model of a folder with new values, in float32."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return lambda: AutoModelForCausalLM.from_config(config, dtype="float32")
