"""How a language model is called in training, found out by its signature and by what it computes.

Whether examples in one row see each other, and whether a token sees those after it, is tried on random tokens. Names
of classes say neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import describe

__all__ = ["Calling", "balance_of", "calling_of", "logits_of"]

_LENGTHS = (7, 6)
"""Tokens of the two texts that are tried; the sum is odd, and no model's block is as short."""

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What models of transformers, and their configs, call the factor of ``aux_loss``."""

_LEAK = 1e-3
"""What may be left of the influence of one text on the next: rounding in kernels that divide rows otherwise."""


@dataclass(frozen=True)
class Calling:
    """How a model is called.

    Args:
        positions: it takes ``position_ids``.
        mask: it takes ``attention_mask``.
        cache: it takes ``use_cache``, which training has no use for.
        isolates: of texts in one row, whose positions begin at 0 each, none sees another.
    """

    positions: bool = False
    mask: bool = False
    cache: bool = False
    isolates: bool = False

    def inputs(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
        """Return the arguments of a model.

        Args:
            ids: int64 (rows, tokens).
            positions: int64 (rows, tokens), for rows of several texts; else None.
            mask: int64 (rows, tokens), 1 for tokens and 0 for padding after them; None: there is none.
        """
        found: dict[str, Any] = {"input_ids": ids}
        if positions is not None:
            found["position_ids"] = positions
        if mask is not None and self.mask:
            found["attention_mask"] = mask
        if self.cache:
            found["use_cache"] = False
        return found


def logits_of(output: Any) -> Tensor:
    """Return the logits (rows, tokens, vocabulary) of a model's output.

    Raises:
        TypeError: it has none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        raise TypeError(f"it returned {found}, and no logits (rows, tokens, vocabulary)")
    return logits


def balance_of(model: nn.Module, output: Any) -> Tensor | None:
    """Return what a mixture of experts adds to the mean loss of a batch, so that its router uses all experts.

    Models of transformers return it as ``aux_loss`` if their config has ``output_router_logits``, and add it where
    they compute a loss themselves, times a coefficient of the config.

    Args:
        model: that has returned the output.
        output: of a forward.

    Returns:
        A scalar; None: it adds nothing.

    Raises:
        ValueError: the model does not say by which factor.
    """
    balance = output.get("aux_loss") if isinstance(output, Mapping) else getattr(output, "aux_loss", None)
    if not isinstance(balance, Tensor):
        return None
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner in (model, text):
        for name in _COEFFICIENTS:
            factor = getattr(owner, name, None)
            if isinstance(factor, int | float):
                return balance * factor if factor else None
    raise ValueError(
        f"a {type(model).__name__} returns aux_loss, and has none of {', '.join(_COEFFICIENTS)}: set "
        "output_router_logits of its config to false"
    )


def calling_of(model: nn.Module, vocabulary: int) -> Calling:
    """Find out how a causal language model is called.

    Args:
        model: is called as ``model(input_ids=...)`` with int64 (rows, tokens), and with ``position_ids``,
            ``attention_mask`` and ``use_cache`` if its forward names them. It returns logits (rows, tokens,
            vocabulary), or something that has ``logits``.
        vocabulary: how many tokens it knows.

    Raises:
        ValueError: it cannot be called so, its logits are not finite, or a token sees those after it.
    """
    names = inspect.signature(model.forward).parameters
    found = Calling("position_ids" in names, "attention_mask" in names, "use_cache" in names)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            isolates = _isolates(model.eval(), found, vocabulary)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Calling(found.positions, found.mask, found.cache, isolates)


def _isolates(model: nn.Module, calling: Calling, vocabulary: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    first, second = _LENGTHS
    ids = torch.randint(vocabulary, (1, first + second), generator=generator)
    before, after = ids.clone(), ids.clone()
    before[:, :first] = (ids[:, :first] + 1) % vocabulary
    after[:, first:] = (ids[:, first:] + 1) % vocabulary

    def run(ids: Tensor, positions: Tensor | None = None) -> Tensor:
        try:
            inputs = calling.inputs(ids.to(device), None if positions is None else positions.to(device), None)
            logits = logits_of(model(**inputs))[0].double()
        except Exception as error:  # a user's model may raise anything
            raise ValueError(
                f"a {type(model).__name__} cannot be trained to predict the next token: {describe(error)}; take a "
                "causal language model"
            ) from error
        if len(logits) != first + second or not bool(logits.isfinite().all()):
            raise ValueError(
                f"a {type(model).__name__} returns logits of shape {tuple(logits.shape)} for {first + second} "
                "tokens, or such as are not finite: take a causal language model whose weights are whole"
            )
        return logits

    whole = run(ids)
    changed = run(after)
    if not _small(changed[:first] - whole[:first], changed[first:] - whole[first:]):
        raise ValueError(
            f"a {type(model).__name__} predicts a token from those after it: take a causal language model, as "
            "AutoModelForCausalLM loads"
        )
    if not calling.positions:
        return False
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None]
    apart = run(ids, positions)[first:] - run(before, positions)[first:]
    return _small(apart, whole[first:] - run(before)[first:])


def _small(left: Tensor, whole: Tensor) -> bool:
    """Whether what is left of an influence is nothing but rounding."""
    return float(left.norm()) <= _LEAK * float(whole.norm())
