"""How models of folders differ on a text: predictions of language models, embeddings of encoders, and which layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lowmem.errors import refusal
from lowmem.integrations.transformers.config_facts import refuse_pairs
from lowmem.integrations.transformers.folder import load_folder
from lowmem.integrations.transformers.intervals import interval
from lowmem.integrations.transformers.tokenizing import padded_batches, paragraphs_of, tokenizer_errors, tokenizer_in
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.calibration.runs import computing
from lowmem.transforms.registry import layer_name, module_paths

__all__ = ["Layer", "Likeness", "Score", "compare_text"]

WINDOW = 512  # tokens that a model sees at a time, if it takes as many
AT_ONCE = 8  # paragraphs that an encoder sees at a time

Interval: TypeAlias = tuple[float, float] | None
"""The ends of a 95% interval, by the bootstrap over the parts of the text; None: the text has one part."""


@dataclass(frozen=True)
class Layer:
    """What a model loses if one layer of it is another model's.

    Args:
        path: of the layer.
        loss: what ``Score.divergence`` is then, or 1 minus ``Likeness.cosine``.
    """

    path: str
    loss: float


@dataclass(frozen=True)
class Score:
    """What a language model makes of a text.

    Args:
        model: the name of its folder.
        tokens: how many were predicted.
        perplexity: ``exp`` of the mean negative log-likelihood of a token.
        divergence: the mean Kullback-Leibler divergence of its predictions from the first model's, in nats a token.
        tokens_per_second: of its forward passes, which took turns with those of the first model.
        ratio: its perplexity over the first model's.
        agreement: the share of tokens at which both find the same token the likeliest.
        divergence_interval, ratio_interval, agreement_interval: of these.
        layers: each stored layer alone in the first model, the one that loses most first; empty if not asked for.
    """

    model: str
    tokens: int
    perplexity: float
    divergence: float
    tokens_per_second: float
    ratio: float = 1.0
    agreement: float = 1.0
    divergence_interval: Interval = None
    ratio_interval: Interval = None
    agreement_interval: Interval = None
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Likeness:
    """How alike an encoder's embeddings of paragraphs are to the first model's.

    Args:
        model: the name of its folder.
        paragraphs: how many there are.
        cosine: the mean of the cosines of both models' embeddings: the mean of a paragraph's last hidden states, over
            its tokens, without padding.
        lowest: the least of the cosines.
        tokens_per_second: as in ``Score``.
        cosine_interval: of the mean.
        layers: as in ``Score``.
    """

    model: str
    paragraphs: int
    cosine: float
    lowest: float
    tokens_per_second: float
    cosine_interval: Interval = None
    layers: tuple[Layer, ...] = ()


def compare_text(
    folders: Sequence[Path],
    text: str,
    *,
    layers: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Any]:
    """Compare the models of folders on a text with the first one, whose tokenizer divides it.

    Language models read it in windows that do not overlap; encoders, models that return hidden states and no logits,
    a paragraph at a time, which an empty line ends, cut to as many tokens as they take. Two models are in memory at
    a time.

    Args:
        folders: of models.
        text: to be read.
        layers: whether to also run the first model once for each layer that another stores, with the other's layer in
            its place and all else as it was.
        progress: called with how many runs with another's layer are done, and how many there are.

    Returns:
        For each folder a ``Score``, or of encoders a ``Likeness``.

    Raises:
        FileError: a folder that cannot be loaded, has no tokenizer, or whose model predicts or embeds nothing, or not
            the first's tokens.
        ValueError: a text of less than two tokens; no paragraph.
    """
    base, *others = folders
    tokenizer = tokenizer_in(base)
    first: Any = load_folder(base)
    refuse_pairs(base, first, "compare")
    length = min(WINDOW, getattr(first.config.get_text_config(), "max_position_embeddings", None) or WINDOW)
    tokens = _tokens(base, tokenizer, text)
    kind: Any = _Predictions if _predicts(first, tokens[:length]) else _Embeddings
    parts = kind.parts(tokenizer, tokens, text, length)
    scores: list[Any] = []
    for folder in others or [base]:
        other: Any = first if folder == base else load_folder(folder)
        refuse_pairs(folder, other, "compare")
        places = _places(first, other) if layers else {}
        runs, done = len(parts) * len(places), 0
        own: Any = kind(base, len(places))
        its: Any = kind(folder, len(places))
        own.run(first, parts[0]), its.run(other, parts[0])  # what is made once does not count
        for part in parts:
            before = own.add(first, part, None)
            its.add(other, part, before)
            for number, (here, there) in enumerate(places.values()):
                with computing(here, there.forward):
                    its.add_layer(number, first, part, before)
                done += 1
                progress(done, runs)
            del before
        scores = scores or [own.score(own, ())]
        if others:
            scores.append(its.score(own, places))
        del other, places
    return scores


def _places(first: nn.Module, other: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return the layers that one of two models stores, by their paths, which both have."""
    found = {path: module for module, paths in module_paths(other).items() for path in paths[:1]}
    return {
        paths[0]: (module, found[paths[0]])
        for module, paths in module_paths(first).items()
        if paths[0] in found
        and any(isinstance(one, StoredModule) for one in (module, found[paths[0]]))
        and type(module).forward is not nn.Module.forward
    }


class _Predictions:
    """Sums over windows of what a language model predicts: one number a window each."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder = folder
        self.tokens, self.losses, self.divergences, self.agreed = (list[float]() for _ in range(4))
        self._layers = [0.0] * layers
        self._seen, self._seconds = 0, 0.0

    @staticmethod
    def parts(tokenizer: Any, tokens: Tensor, text: str, length: int) -> list[Tensor]:
        """Return the windows.

        Raises:
            ValueError: there is none.
        """
        windows = [window for window in tokens.split(length) if len(window) > 1]
        if not windows:
            raise ValueError(f"the text has {len(tokens)} tokens, of which none can be predicted: take a longer one")
        return windows

    def run(self, model: Any, window: Tensor, shape: Any = None) -> Tensor:
        """Return the log-probabilities of a model's predictions: (tokens, vocabulary)."""
        with torch.no_grad():
            logits = getattr(model(window[None].to(model.device)), "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(window):
            why = f"a {type(model).__name__} predicts no tokens; name a causal language model"
            raise refusal(self._folder, why, "compare")
        if shape is not None and logits[0].shape != shape:
            why = f"it predicts {logits.shape[-1]} tokens, and the first model {shape[-1]}"
            raise refusal(self._folder, why, "compare")
        return logits[0].cpu().float().log_softmax(-1)

    def add(self, model: Any, window: Tensor, base: Tensor | None) -> Tensor:
        """Add what a model predicts of a window; return it."""
        start = time.perf_counter()
        logs = self.run(model, window, None if base is None else base.shape)
        self._seconds += time.perf_counter() - start
        self._seen += len(window)
        self.tokens.append(len(window) - 1)
        self.losses.append(-float(logs[:-1].gather(1, window[1:, None]).double().sum()))
        self.divergences.append(0.0 if base is None else _divergence(base, logs))
        same = base is None or (base[:-1].argmax(-1) == logs[:-1].argmax(-1)).sum()
        self.agreed.append(float(same) if base is not None else len(window) - 1.0)
        return logs

    def add_layer(self, number: int, model: Any, window: Tensor, base: Tensor) -> None:
        """Add how far a model's predictions are with one layer of another."""
        self._layers[number] += _divergence(base, self.run(model, window))

    def score(self, first: _Predictions, places: Iterable[str]) -> Score:
        """Return the means."""
        counts = torch.tensor(self.tokens, dtype=torch.float64)
        losses, before, divergences, agreed = (
            torch.tensor(one, dtype=torch.float64)
            for one in (self.losses, first.losses, self.divergences, self.agreed)
        )
        total = float(counts.sum())
        compared = self is not first
        return Score(
            model=str(self._folder),
            tokens=int(total),
            perplexity=_exp(float(losses.sum()) / total),
            divergence=_not_below_0(float(divergences.sum()) / total),
            tokens_per_second=self._seen / max(self._seconds, 1e-9),
            ratio=_exp(float((losses - before).sum()) / total),
            agreement=float(agreed.sum()) / total,
            divergence_interval=interval(divergences, counts) if compared else None,
            ratio_interval=interval(losses - before, counts, torch.exp) if compared else None,
            agreement_interval=interval(agreed, counts) if compared else None,
            layers=_ordered(places, [one / total for one in self._layers]),
        )


class _Embeddings:
    """Cosines of an encoder's embeddings of paragraphs with the first one's."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder = folder
        self._cosines: list[Tensor] = []
        self._layers = [0.0] * layers
        self._seen, self._seconds = 0, 0.0

    @staticmethod
    def parts(tokenizer: Any, tokens: Tensor, text: str, length: int) -> list[dict[str, Tensor]]:
        """Return batches of paragraphs, as many tokens long as the longest.

        Raises:
            ValueError: there is no paragraph.
        """
        paragraphs = paragraphs_of(text)
        if not paragraphs:
            raise ValueError("the text has no paragraph: take a longer one")
        return padded_batches(tokenizer, paragraphs, length, AT_ONCE)

    def run(self, model: Any, batch: dict[str, Tensor], shape: Any = None) -> Tensor:
        """Return the embeddings of paragraphs, of length 1: (paragraphs, width)."""
        given = {name: one.to(model.device) for name, one in batch.items()}
        with torch.no_grad():
            states = getattr(model(**given), "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.shape[:2] != batch["attention_mask"].shape:
            why = f"a {type(model).__name__} returns no logits and no hidden states of its tokens"
            raise refusal(self._folder, why, "compare")
        if shape is not None and states.shape[-1] != shape[-1]:
            why = f"its embeddings have {states.shape[-1]} numbers, and the first model's {shape[-1]}"
            raise refusal(self._folder, why, "compare")
        mask = given["attention_mask"].unsqueeze(-1).double()  # (paragraphs, tokens, 1)
        return nn.functional.normalize((states.double() * mask).sum(1) / mask.sum(1), dim=-1).cpu()

    def add(self, model: Any, batch: dict[str, Tensor], base: Tensor | None) -> Tensor:
        """Add what a model embeds paragraphs as; return it."""
        start = time.perf_counter()
        found = self.run(model, batch, None if base is None else base.shape)
        self._seconds += time.perf_counter() - start
        self._seen += int(batch["attention_mask"].sum())
        self._cosines.append(((found if base is None else base) * found).sum(-1).clamp(max=1))
        return found

    def add_layer(self, number: int, model: Any, batch: dict[str, Tensor], base: Tensor) -> None:
        """Add how far a model's embeddings are with one layer of another."""
        self._layers[number] += float((1 - (base * self.run(model, batch)).sum(-1)).clamp(min=0).sum())

    def score(self, first: _Embeddings, places: Iterable[str]) -> Likeness:
        """Return the means."""
        cosines = torch.cat(self._cosines)
        return Likeness(
            model=str(self._folder),
            paragraphs=len(cosines),
            cosine=float(cosines.mean()),
            lowest=float(cosines.min()),
            tokens_per_second=self._seen / max(self._seconds, 1e-9),
            cosine_interval=interval(cosines, torch.ones_like(cosines)) if self is not first else None,
            layers=_ordered(places, [one / len(cosines) for one in self._layers]),
        )


def _divergence(base: Tensor, logs: Tensor) -> float:
    """Return the sum over tokens of the divergence of log-probabilities from those of the first model."""
    shares = base[:-1].exp()
    return float((shares * (base[:-1] - logs[:-1])).masked_fill_(shares == 0, 0).double().sum())  # 0 log 0 is 0


def _not_below_0(loss: float) -> float:
    """Return a loss, 0 where rounding has taken it below; NaN stays, which ``max`` would make 0."""
    return 0.0 if loss < 0 else loss


def _exp(mean: float) -> float:
    return math.inf if mean >= 700 else math.exp(mean)


def _ordered(places: Iterable[str], losses: Sequence[float]) -> tuple[Layer, ...]:
    found = [Layer(layer_name(path), _not_below_0(loss)) for path, loss in zip(places, losses, strict=False)]
    return tuple(sorted(found, key=lambda one: (not math.isnan(one.loss), -one.loss)))


def _predicts(model: Any, tokens: Tensor) -> bool:
    """Whether a model is to be judged by its logits: all but those that return hidden states alone."""
    if not len(tokens):
        return True
    with torch.no_grad():
        output = model(tokens[None].to(model.device))
    return getattr(output, "logits", None) is not None or getattr(output, "last_hidden_state", None) is None


def _tokens(folder: Path, tokenizer: Any, text: str) -> Tensor:
    with tokenizer_errors(folder):
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
