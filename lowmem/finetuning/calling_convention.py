"""How a language model is called in training, whether it is causal, and whether examples in one row can attend to
each other: found out from its signature, and by trying it on random tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import error_type_and_first_line

_LENGTHS = (7, 6)
"""Tokens of the two texts that are tried: few, so that both lie in one block of blockwise attention; odd in all."""

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names that transformers' models and configs have for the factor of ``aux_loss``."""

_LEAK = 1e-3
"""Influence of a later or other text that still counts as rounding, relative to the influence within one text:
kernels may split rows differently."""


@dataclass(frozen=True)
class CallingConvention:
    """Whether a model takes ``position_ids``, ``attention_mask`` and ``use_cache``, which training sets to False.

    ``isolates_texts``: texts packed into one row, each with positions from 0, do not attend to each other.
    """

    positions: bool = False
    mask: bool = False
    takes_use_cache: bool = False
    isolates_texts: bool = False

    def forward_kwargs(self, input_ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
        """Return the keyword arguments of a call, for int64 tensors (rows, tokens).

        ``positions`` are for rows of several texts; ``mask`` is 1 for tokens and 0 for the padding after them.
        """
        kwargs: dict[str, Any] = {"input_ids": input_ids}
        if positions is not None:
            kwargs["position_ids"] = positions
        if mask is not None and self.mask:
            kwargs["attention_mask"] = mask
        if self.takes_use_cache:
            kwargs["use_cache"] = False
        return kwargs


def logits_from_output(output: Any) -> Tensor:
    """Return the logits (rows, tokens, vocabulary) of a model's output.

    Raises:
        TypeError: it has none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        description = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        raise TypeError(f"it returned {description}, and no logits (rows, tokens, vocabulary)")
    return logits


def scaled_load_balancing_loss_or_none(model: nn.Module, output: Any) -> Tensor | None:
    """Return the load-balancing loss that a mixture of experts adds to the mean loss of a batch.

    Models of transformers return it, unscaled, as ``aux_loss`` if ``output_router_logits`` of their config is set.
    Their own loss adds it times a coefficient of the config, as is done here. None: the model adds nothing.

    Raises:
        ValueError: neither the model nor its config has the coefficient.
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


def detect_calling_convention(model: nn.Module, vocabulary_size: int) -> CallingConvention:
    """Find out how a causal language model is called.

    Args:
        model: is called as ``model(input_ids=...)`` with int64 (rows, tokens), and with ``position_ids``,
            ``attention_mask`` and ``use_cache`` if its forward has parameters of these names. It returns logits
            (rows, tokens, vocabulary), or an object or mapping that has ``logits``.
        vocabulary_size: number of tokens that it knows.

    Raises:
        ValueError: it cannot be called like this, its logits are not finite, or it is not causal.
    """
    names = inspect.signature(model.forward).parameters
    convention = CallingConvention("position_ids" in names, "attention_mask" in names, "use_cache" in names)
    with eval_mode_without_grad(model), torch.random.fork_rng():
        return replace(
            convention, isolates_texts=_check_causal_and_probe_isolation(model, convention, vocabulary_size)
        )


@contextmanager
def eval_mode_without_grad(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode for the block, without gradients; restore the modes of its modules at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_causal_and_probe_isolation(model: nn.Module, convention: CallingConvention, vocabulary_size: int) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    device = next(model.parameters()).device
    first, second = _LENGTHS
    ids = torch.randint(vocabulary_size, (1, first + second), generator=generator, dtype=torch.int64, device="cpu")
    before, after = ids.clone(), ids.clone()
    before[:, :first] = (ids[:, :first] + 1) % vocabulary_size
    after[:, first:] = (ids[:, first:] + 1) % vocabulary_size

    def checked_finite_logits(ids: Tensor, positions: Tensor | None = None) -> Tensor:
        try:
            inputs = convention.forward_kwargs(
                ids.to(device), None if positions is None else positions.to(device), None
            )
            logits = logits_from_output(model(**inputs))[0].double()
        except Exception as error:
            # A user's model may raise anything
            raise ValueError(
                f"a {type(model).__name__} cannot be trained to predict the next token: "
                f"{error_type_and_first_line(error)}; take a "
                "causal language model"
            ) from error
        if len(logits) != first + second or not bool(logits.isfinite().all()):
            raise ValueError(
                f"a {type(model).__name__} returns logits of shape {tuple(logits.shape)} for {first + second} "
                "tokens, or such as are not finite: take a causal language model whose weights are whole"
            )
        return logits

    whole = checked_finite_logits(ids)
    changed = checked_finite_logits(after)
    if not _is_only_rounding(changed[:first] - whole[:first], changed[first:] - whole[first:]):
        raise ValueError(
            f"a {type(model).__name__} predicts a token from those after it: take a causal language model, as "
            "AutoModelForCausalLM loads"
        )
    if not convention.positions:
        return False
    positions = torch.tensor([[*range(first), *range(second)]], dtype=torch.int64, device="cpu")
    apart = checked_finite_logits(ids, positions)[first:] - checked_finite_logits(before, positions)[first:]
    return _is_only_rounding(apart, whole[first:] - checked_finite_logits(before)[first:])


def _is_only_rounding(change: Tensor, reference_change: Tensor) -> bool:
    """Whether the change ``change`` is only rounding, compared with the change ``reference_change``."""
    return float(change.norm()) <= _LEAK * float(reference_change.norm())
