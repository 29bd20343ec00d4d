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
from lowmem.integrations.transformers.config_facts import refuse_pairs, window_of
from lowmem.integrations.transformers.folder import load_folder
from lowmem.integrations.transformers.tokenizing import (
    padded_batches,
    paragraphs_of,
    read_tokenizer,
    tokenizer_errors,
)
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.calibration.runs import computing
from lowmem.transforms.registry import layer_name, module_paths

WINDOW = 512  # tokens that a model sees at a time, if it takes as many
AT_ONCE = 8  # paragraphs that an encoder sees at a time
RESAMPLES = 2000  # another seed moves the ends of an interval by some hundredths of its width

Interval: TypeAlias = tuple[float, float] | None
"""The ends of a 95% interval, by the bootstrap over the parts of the text; None: the text has one part."""


@dataclass(frozen=True)
class Layer:
    """What a model loses if one layer of it is another model's."""

    path: str
    loss: float  # ``Score.divergence``, or 1 minus ``Likeness.cosine``


@dataclass(frozen=True)
class Score:
    """How well a language model predicts a text."""

    model: str  # the name of the folder
    tokens: int  # predicted
    perplexity: float  # ``exp`` of the mean negative log-likelihood of a token
    divergence: float  # the mean Kullback-Leibler divergence from the first model's predictions, in nats a token
    tokens_per_second: float  # of forward passes, which took turns with those of the first model
    ratio: float = 1.0  # of the perplexity to the first model's
    agreement: float = 1.0  # the share of tokens at which both models find the same token the likeliest
    divergence_interval: Interval = None
    ratio_interval: Interval = None
    agreement_interval: Interval = None
    layers: tuple[Layer, ...] = ()  # each stored layer alone in the first model, the largest loss first


@dataclass(frozen=True)
class Likeness:
    """How alike an encoder's embeddings of paragraphs are to the first model's.

    An embedding is the mean of the last hidden states of a paragraph's tokens, without padding.
    """

    model: str  # the name of the folder
    paragraphs: int
    cosine: float  # the mean of the cosines of both models' embeddings
    lowest: float  # cosine
    tokens_per_second: float  # as in ``Score``
    cosine_interval: Interval = None
    layers: tuple[Layer, ...] = ()  # as in ``Score``


def compare_text(
    folders: Sequence[Path],
    text: str,
    *,
    layers: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Any]:
    """Compare the models of folders on a text with the first one, whose tokenizer divides it.

    Language models read windows of the text that do not overlap. Encoders (models that return hidden states and no
    logits) read paragraphs, which an empty line ends, cut to the model's positions. Two models are in memory.

    Args:
        layers: whether to also run the first model once for each layer that another model stores, with that layer in
            the place of its own.
        device: where the models run.
        progress: called with the number of runs for ``layers`` that are done, and of all.

    Returns:
        For each folder a ``Score``, or a ``Likeness`` of encoders.

    Raises:
        FileError: a folder cannot be loaded or has no tokenizer, or its model predicts other tokens than the first
            model's, or nothing.
        ValueError: a text of less than two tokens, or without a paragraph.
    """
    base, *others = folders
    tokenizer = read_tokenizer(base)
    first: Any = load_folder(base).to(device)
    refuse_pairs(base, first, "compare")
    length = window_of(first.config, WINDOW)
    with tokenizer_errors(base):
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long, device="cpu")
    kind: Any = _Predictions if _predicts(first, tokens[:length]) else _Embeddings
    parts = kind.parts(tokenizer, tokens, text, length)
    scores: list[Any] = []
    for folder in others or [base]:
        other: Any = first if folder == base else load_folder(folder).to(device)
        refuse_pairs(folder, other, "compare")
        places = _places(first, other) if layers else {}
        runs, done = len(parts) * len(places), 0
        own: Any = kind(base, len(places))
        its: Any = kind(folder, len(places))
        own.run(first, parts[0]), its.run(other, parts[0])  # first calls allocate, and are not timed
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


class _Comparison:
    """Runs the model of a folder on the parts of a text, and sums how its results differ from the first model's."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder, self._layers = folder, [0.0] * layers
        self._seen, self._seconds = 0, 0.0

    def run(self, model: Any, part: Any, base: Tensor | None = None) -> Tensor:
        """Return a model's result on a part, of the shape of ``base``."""
        raise NotImplementedError

    def _timed(self, model: Any, part: Any, base: Tensor | None, tokens: int) -> Tensor:
        start = time.perf_counter()
        found = self.run(model, part, base)
        self._seconds += time.perf_counter() - start
        self._seen += tokens
        return found

    def _refusal(self, why: str) -> Exception:
        return refusal(self._folder, why, "compare")

    @property
    def _speed(self) -> float:
        return self._seen / max(self._seconds, 1e-9)


class _Predictions(_Comparison):
    """Losses and divergences of a language model's predictions: one number for each window."""

    def __init__(self, folder: Path, layers: int) -> None:
        super().__init__(folder, layers)
        self.tokens, self.losses, self.divergences, self.agreed = (list[float]() for _ in range(4))

    @staticmethod
    def parts(tokenizer: Any, tokens: Tensor, text: str, length: int) -> list[Tensor]:
        """Return the windows, or raise a ValueError if there is none."""
        windows = [window for window in tokens.split(length) if len(window) > 1]
        if not windows:
            raise ValueError(f"the text has {len(tokens)} tokens, of which none can be predicted: take a longer one")
        return windows

    def run(self, model: Any, part: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the log-probabilities of a model's predictions: (tokens, vocabulary)."""
        with torch.no_grad():
            logits = getattr(model(part[None].to(model.device)), "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(part):
            raise self._refusal(f"a {type(model).__name__} predicts no tokens; name a causal language model")
        if base is not None and logits[0].shape != base.shape:
            raise self._refusal(f"it predicts {logits.shape[-1]} tokens, and the first model {base.shape[-1]}")
        return logits[0].cpu().float().log_softmax(-1)

    def add(self, model: Any, window: Tensor, base: Tensor | None) -> Tensor:
        """Add a model's predictions of a window; return them."""
        logs = self._timed(model, window, base, len(window))
        self.tokens.append(len(window) - 1)
        self.losses.append(-float(logs[:-1].gather(1, window[1:, None]).double().sum()))
        self.divergences.append(0.0 if base is None else _divergence(base, logs))
        same = None if base is None else (base[:-1].argmax(-1) == logs[:-1].argmax(-1)).sum()
        self.agreed.append(len(window) - 1.0 if same is None else float(same))
        return logs

    def add_layer(self, number: int, model: Any, window: Tensor, base: Tensor) -> None:
        """Add how far a model's predictions are with one layer of another."""
        self._layers[number] += _divergence(base, self.run(model, window))

    def score(self, first: _Predictions, places: Iterable[str]) -> Score:
        """Return the means."""
        counts, losses, before, divergences, agreed = (
            torch.tensor(one, dtype=torch.float64, device="cpu")
            for one in (self.tokens, self.losses, first.losses, self.divergences, self.agreed)
        )
        total = float(counts.sum())
        compared = self is not first
        return Score(
            model=str(self._folder),
            tokens=int(total),
            perplexity=_exp(float(losses.sum()) / total),
            divergence=_not_below_0(float(divergences.sum()) / total),
            tokens_per_second=self._speed,
            ratio=_exp(float((losses - before).sum()) / total),
            agreement=float(agreed.sum()) / total,
            divergence_interval=interval(divergences, counts) if compared else None,
            ratio_interval=interval(losses - before, counts, torch.exp) if compared else None,
            agreement_interval=interval(agreed, counts) if compared else None,
            layers=_ordered(places, [one / total for one in self._layers]),
        )


class _Embeddings(_Comparison):
    """Cosines of an encoder's embeddings of paragraphs with the first one's."""

    def __init__(self, folder: Path, layers: int) -> None:
        super().__init__(folder, layers)
        self._cosines: list[Tensor] = []

    @staticmethod
    def parts(tokenizer: Any, tokens: Tensor, text: str, length: int) -> list[dict[str, Tensor]]:
        """Return batches of paragraphs, or raise a ValueError if there is no paragraph."""
        paragraphs = paragraphs_of(text)
        if not paragraphs:
            raise ValueError("the text has no paragraph: take a longer one")
        return padded_batches(tokenizer, paragraphs, length, AT_ONCE)

    def run(self, model: Any, part: dict[str, Tensor], base: Tensor | None = None) -> Tensor:
        """Return the embeddings of paragraphs, of length 1: (paragraphs, width)."""
        given = {name: one.to(model.device) for name, one in part.items()}
        with torch.no_grad():
            states = getattr(model(**given), "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.shape[:2] != part["attention_mask"].shape:
            raise self._refusal(f"a {type(model).__name__} returns no logits and no hidden states of its tokens")
        if base is not None and states.shape[-1] != base.shape[-1]:
            raise self._refusal(
                f"its embeddings have {states.shape[-1]} numbers, and the first model's {base.shape[-1]}"
            )
        mask = given["attention_mask"].unsqueeze(-1).double()  # (paragraphs, tokens, 1)
        return nn.functional.normalize((states.double() * mask).sum(1) / mask.sum(1), dim=-1).cpu()

    def add(self, model: Any, batch: dict[str, Tensor], base: Tensor | None) -> Tensor:
        """Add a model's embeddings of paragraphs; return them."""
        found = self._timed(model, batch, base, int(batch["attention_mask"].sum()))
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
            tokens_per_second=self._speed,
            cosine_interval=interval(cosines, torch.ones_like(cosines)) if self is not first else None,
            layers=_ordered(places, [one / len(cosines) for one in self._layers]),
        )


def _divergence(base: Tensor, logs: Tensor) -> float:
    """Return the sum over tokens of the divergence of log-probabilities from those of the first model."""
    shares = base[:-1].exp()
    return float((shares * (base[:-1] - logs[:-1])).masked_fill_(shares == 0, 0).double().sum())  # 0 log 0 is 0


def _not_below_0(loss: float) -> float:
    """Return a loss, 0 where rounding has taken the loss below; NaN stays, which ``max`` would make 0."""
    return 0.0 if loss < 0 else loss


def _exp(mean: float) -> float:
    return math.inf if mean >= 700 else math.exp(mean)


def _ordered(places: Iterable[str], losses: Sequence[float]) -> tuple[Layer, ...]:
    found = [Layer(layer_name(path), _not_below_0(loss)) for path, loss in zip(places, losses, strict=False)]
    return tuple(sorted(found, key=lambda one: (not math.isnan(one.loss), -one.loss)))


def _predicts(model: Any, tokens: Tensor) -> bool:
    """Whether a model is compared by its logits: all but models that return hidden states alone."""
    if not len(tokens):
        return True
    with torch.no_grad():
        output = model(tokens[None].to(model.device))
    return getattr(output, "logits", None) is not None or getattr(output, "last_hidden_state", None) is None


def interval(
    sums: Tensor, counts: Tensor, of: Callable[[Tensor], Tensor] = lambda mean: mean
) -> tuple[float, float] | None:
    """Return the 95% interval of ``of(sum(sums) / sum(counts))``, by the bootstrap over parts; None for one part.

    As many parts (windows, paragraphs) as there are are drawn, with replacement (Efron, Bootstrap methods: another
    look at the jackknife, 1979). For fewer than ten parts the interval is too narrow. The seed is fixed.

    Args:
        sums, counts: (parts,).
        of: a monotone function, such as ``torch.exp``.
    """
    parts = len(sums)
    if parts < 2:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(parts, (RESAMPLES, parts), generator=generator, dtype=torch.int64, device="cpu")
    means = of(sums.double()[drawn].sum(1) / counts.double()[drawn].sum(1))
    low, high = means.sort().values[[int(0.025 * RESAMPLES), int(0.975 * RESAMPLES)]].tolist()
    return low, high
