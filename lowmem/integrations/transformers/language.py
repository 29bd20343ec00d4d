"""How language models differ on a text: perplexity, divergence from the first, and speed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lowmem.errors import describe, refusal
from lowmem.integrations.transformers.folder import load_folder

__all__ = ["Score", "compare_text"]

WINDOW = 512  # tokens that a model sees at a time, if it takes as many


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    Args:
        model: the name of its folder.
        tokens: how many were predicted.
        perplexity: ``exp`` of the mean negative log-likelihood of a token.
        divergence: the mean Kullback-Leibler divergence of its predictions from the first model's, in nats a token.
        tokens_per_second: of its forward passes, which took turns with those of the first model.
    """

    model: str
    tokens: int
    perplexity: float
    divergence: float
    tokens_per_second: float


def compare_text(folders: list[Path], text: str) -> list[Score]:
    """Score the models of folders on a text; the first one's tokenizer divides it.

    The text is read in windows that do not overlap. Two models are in memory at a time.

    Raises:
        FileError: a folder that cannot be loaded, has no tokenizer, or is no language model of the first's tokens.
        ValueError: a text of less than two tokens.
    """
    base, *others = folders
    tokens = _tokens(base, text)
    first: Any = load_folder(base)
    length = min(WINDOW, getattr(first.config.get_text_config(), "max_position_embeddings", None) or WINDOW)
    windows = [window for window in tokens.split(length) if len(window) > 1]
    if not windows:
        raise ValueError(f"the text has {len(tokens)} tokens, of which none can be predicted: take a longer one")
    scores: list[Score] = []
    for folder in others or [base]:
        other = first if folder == base else load_folder(folder)
        own, its = _Sums(), _Sums()
        _logits(base, first, windows[0]), _logits(folder, other, windows[0])  # what is made once does not count
        for window in windows:
            before = own.add(window, *_timed(base, first, window), None)
            its.add(window, *_timed(folder, other, window, before.shape), before)
            del before
        scores = scores or [own.score(base)]
        if folder != base:
            scores.append(its.score(folder))
        del other
    return scores


class _Sums:
    """Sums over windows."""

    def __init__(self) -> None:
        self.tokens, self.seen = 0, 0
        self.loss = self.divergence = self.seconds = 0.0

    def add(self, window: Tensor, logits: Tensor, seconds: float, base: Tensor | None) -> Tensor:
        """Add what a model predicts of a window: logits (tokens, vocabulary); return their log-probabilities."""
        logs = logits.float().log_softmax(-1)
        self.tokens += len(window) - 1
        self.seen += len(window)
        self.seconds += seconds
        self.loss -= float(logs[:-1].gather(1, window[1:, None]).double().sum())
        if base is not None:
            self.divergence += float((base[:-1].exp() * (base[:-1] - logs[:-1])).double().sum())
        return logs

    def score(self, folder: Path) -> Score:
        """Return the means."""
        mean = self.loss / self.tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        divergence = max(0.0, self.divergence / self.tokens)  # rounding may take that of equal ones below 0
        return Score(str(folder), self.tokens, perplexity, divergence, self.seen / max(self.seconds, 1e-9))


def _tokens(folder: Path, text: str) -> Tensor:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as reason:
        raise refusal(folder, f"it has no tokenizer that transformers can load: {describe(reason)}") from reason


def _timed(folder: Path, model: Any, window: Tensor, shape: Any = None) -> tuple[Tensor, float]:
    start = time.perf_counter()
    logits = _logits(folder, model, window)
    seconds = time.perf_counter() - start
    if shape is not None and logits.shape != shape:
        raise refusal(folder, f"it predicts {logits.shape[-1]} tokens, and the first model {shape[-1]}", "compare")
    return logits, seconds


def _logits(folder: Path, model: Any, window: Tensor) -> Tensor:
    """Return what a model predicts at each token of a window: (tokens, vocabulary)."""
    with torch.no_grad():
        logits = getattr(model(window[None].to(model.device)), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(window):
        raise refusal(folder, f"a {type(model).__name__} predicts no tokens; name a causal language model", "compare")
    return logits[0].cpu()
