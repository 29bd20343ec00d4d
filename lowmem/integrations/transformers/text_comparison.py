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

from lowmem.errors import file_error
from lowmem.integrations.transformers.model_facts import capped_context_window, check_not_encoder_decoder
from lowmem.integrations.transformers.pretrained_folder import load_folder
from lowmem.integrations.transformers.text_tokenizer import (
    padded_batches,
    read_tokenizer,
    split_paragraphs,
    tokenizer_errors_as_file_errors,
)
from lowmem.io.hub_names import displayed_model_name
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.calibration.model_runs import replaced_forward
from lowmem.transforms.module_registry import all_paths_by_module, layer_display_name

# Tokens that a model sees at a time, if it takes as many
WINDOW = 512
# Paragraphs that an encoder sees at a time
AT_ONCE = 8
# Another seed moves the ends of an interval by some hundredths of its width
RESAMPLES = 2000

Interval: TypeAlias = tuple[float, float] | None
"""The ends of a 95% interval, by the bootstrap over the parts of the text; None: the text has one part."""


@dataclass(frozen=True)
class LayerReplacementLoss:
    """What a model loses if one layer of it is another model's."""

    path: str
    loss: float  # ``Score.divergence``, or 1 minus ``Likeness.cosine``


@dataclass(frozen=True)
class LanguageModelScore:
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
    layers: tuple[
        LayerReplacementLoss, ...
    ] = ()  # each stored layer alone in the first model, the largest loss first


@dataclass(frozen=True)
class EmbeddingSimilarity:
    """How alike an encoder's embeddings of paragraphs are to the first model's.

    An embedding is the mean of the last hidden states of a paragraph's tokens, without padding.
    """

    model: str  # the name of the folder
    paragraphs: int
    cosine: float  # the mean of the cosines of both models' embeddings
    lowest: float  # cosine
    tokens_per_second: float  # as in ``LanguageModelScore``
    cosine_interval: Interval = None
    layers: tuple[LayerReplacementLoss, ...] = ()  # as in ``LanguageModelScore``


def compare_folders_on_text(
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
        For each folder a ``LanguageModelScore``, or a ``EmbeddingSimilarity`` of encoders.

    Raises:
        FileError: a folder cannot be loaded or has no tokenizer, or its model predicts other tokens than the first
            model's, or nothing.
        ValueError: a text of less than two tokens, or without a paragraph.
    """
    base, *others = folders
    tokenizer = read_tokenizer(base)
    first: Any = load_folder(base).to(device)
    check_not_encoder_decoder(base, first, "compare")
    length = capped_context_window(first.config, WINDOW)
    with tokenizer_errors_as_file_errors(base):
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long, device="cpu")
    kind: Any = _PredictionComparison if _is_compared_by_logits(first, tokens[:length]) else _EmbeddingComparison
    parts = kind.split_text_or_raise(tokenizer, tokens, text, length)
    scores: list[Any] = []
    for folder in others or [base]:
        other: Any = first if folder == base else load_folder(folder).to(device)
        check_not_encoder_decoder(folder, other, "compare")
        places = _stored_layer_pairs_by_path(first, other) if layers else {}
        runs, done = len(parts) * len(places), 0
        base_comparison: Any = kind(base, len(places))
        other_comparison: Any = kind(folder, len(places))
        # First calls allocate, and are not timed
        base_comparison.compute_checked_result(first, parts[0])
        other_comparison.compute_checked_result(other, parts[0])
        for part in parts:
            before = base_comparison.add_and_return_result(first, part, None)
            other_comparison.add_and_return_result(other, part, before)
            for number, (here, there) in enumerate(places.values()):
                with replaced_forward(here, there.forward):
                    other_comparison.add_layer_loss(number, first, part, before)
                done += 1
                progress(done, runs)
            del before
        scores = scores or [base_comparison.mean_score(base_comparison, ())]
        if others:
            scores.append(other_comparison.mean_score(base_comparison, places))
        del other, places
    return scores


def _stored_layer_pairs_by_path(first: nn.Module, other: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return the layers that one of two models stores, by their paths, which both have."""
    other_modules = {path: module for module, paths in all_paths_by_module(other).items() for path in paths[:1]}
    return {
        paths[0]: (module, other_modules[paths[0]])
        for module, paths in all_paths_by_module(first).items()
        if paths[0] in other_modules
        and any(isinstance(layer, StoredModule) for layer in (module, other_modules[paths[0]]))
        and type(module).forward is not nn.Module.forward
    }


class _TextComparison:
    """Runs the model of a folder on the parts of a text, and sums how its results differ from the first model's."""

    def __init__(self, folder: Path, layer_count: int) -> None:
        self._folder, self._layers = folder, [0.0] * layer_count
        self._seen, self._seconds = 0, 0.0

    def compute_checked_result(self, model: Any, text_part: Any, reference: Tensor | None = None) -> Tensor:
        """Return a model's result on a part, of the shape of ``reference``."""
        raise NotImplementedError

    def _add_time_and_get_result(self, model: Any, text_part: Any, reference: Tensor | None, tokens: int) -> Tensor:
        start = time.perf_counter()
        result = self.compute_checked_result(model, text_part, reference)
        self._seconds += time.perf_counter() - start
        self._seen += tokens
        return result

    def _comparison_error(self, reason: str) -> Exception:
        return file_error(self._folder, reason, "compare")

    @property
    def _tokens_per_second(self) -> float:
        return self._seen / max(self._seconds, 1e-9)


class _PredictionComparison(_TextComparison):
    """Losses and divergences of a language model's predictions: one number for each window."""

    def __init__(self, folder: Path, layer_count: int) -> None:
        super().__init__(folder, layer_count)
        self.tokens, self.losses, self.divergences, self.agreed = (list[float]() for _ in range(4))

    @staticmethod
    def split_text_or_raise(tokenizer: Any, tokens: Tensor, text: str, max_tokens: int) -> list[Tensor]:
        """Return the windows, or raise a ValueError if there is none."""
        windows = [window for window in tokens.split(max_tokens) if len(window) > 1]
        if not windows:
            raise ValueError(f"the text has {len(tokens)} tokens, of which none can be predicted: take a longer one")
        return windows

    def compute_checked_result(self, model: Any, text_part: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return the log-probabilities of a model's predictions: (tokens, vocabulary)."""
        with torch.no_grad():
            logits = getattr(model(text_part[None].to(model.device)), "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(text_part):
            raise self._comparison_error(f"a {type(model).__name__} predicts no tokens; name a causal language model")
        if reference is not None and logits[0].shape != reference.shape:
            raise self._comparison_error(
                f"it predicts {logits.shape[-1]} tokens, and the first model {reference.shape[-1]}"
            )
        return logits[0].cpu().float().log_softmax(-1)

    def add_and_return_result(self, model: Any, window: Tensor, reference: Tensor | None) -> Tensor:
        """Add a model's predictions of a window; return them."""
        logs = self._add_time_and_get_result(model, window, reference, len(window))
        self.tokens.append(len(window) - 1)
        self.losses.append(-float(logs[:-1].gather(1, window[1:, None]).double().sum()))
        self.divergences.append(0.0 if reference is None else _summed_kl_without_last_token(reference, logs))
        same = None if reference is None else (reference[:-1].argmax(-1) == logs[:-1].argmax(-1)).sum()
        self.agreed.append(len(window) - 1.0 if same is None else float(same))
        return logs

    def add_layer_loss(self, layer_index: int, model: Any, window: Tensor, reference: Tensor) -> None:
        """Add how far a model's predictions are with one layer of another."""
        self._layers[layer_index] += _summed_kl_without_last_token(
            reference, self.compute_checked_result(model, window)
        )

    def mean_score(self, baseline: _PredictionComparison, layer_paths: Iterable[str]) -> LanguageModelScore:
        """Return the means."""
        counts, losses, before, divergences, agreed = (
            torch.tensor(value, dtype=torch.float64, device="cpu")
            for value in (self.tokens, self.losses, baseline.losses, self.divergences, self.agreed)
        )
        total = float(counts.sum())
        compared = self is not baseline
        return LanguageModelScore(
            model=displayed_model_name(self._folder),
            tokens=int(total),
            perplexity=_exp_or_inf(float(losses.sum()) / total),
            divergence=_loss_clamped_at_zero(float(divergences.sum()) / total),
            tokens_per_second=self._tokens_per_second,
            ratio=_exp_or_inf(float((losses - before).sum()) / total),
            agreement=float(agreed.sum()) / total,
            divergence_interval=bootstrap_95_interval_or_none(divergences, counts) if compared else None,
            ratio_interval=bootstrap_95_interval_or_none(losses - before, counts, torch.exp) if compared else None,
            agreement_interval=bootstrap_95_interval_or_none(agreed, counts) if compared else None,
            layers=_layer_losses_descending(layer_paths, [value / total for value in self._layers]),
        )


class _EmbeddingComparison(_TextComparison):
    """Cosines of an encoder's embeddings of paragraphs with the first one's."""

    def __init__(self, folder: Path, layer_count: int) -> None:
        super().__init__(folder, layer_count)
        self._cosines: list[Tensor] = []

    @staticmethod
    def split_text_or_raise(tokenizer: Any, tokens: Tensor, text: str, max_tokens: int) -> list[dict[str, Tensor]]:
        """Return batches of paragraphs, or raise a ValueError if there is no paragraph."""
        paragraphs = split_paragraphs(text)
        if not paragraphs:
            raise ValueError("the text has no paragraph: take a longer one")
        return padded_batches(tokenizer, paragraphs, max_tokens, AT_ONCE)

    def compute_checked_result(
        self, model: Any, text_part: dict[str, Tensor], reference: Tensor | None = None
    ) -> Tensor:
        """Return the embeddings of paragraphs, of length 1: (paragraphs, width)."""
        inputs = {name: tensor.to(model.device) for name, tensor in text_part.items()}
        with torch.no_grad():
            states = getattr(model(**inputs), "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.shape[:2] != text_part["attention_mask"].shape:
            raise self._comparison_error(
                f"a {type(model).__name__} returns no logits and no hidden states of its tokens"
            )
        if reference is not None and states.shape[-1] != reference.shape[-1]:
            raise self._comparison_error(
                f"its embeddings have {states.shape[-1]} numbers, and the first model's {reference.shape[-1]}"
            )
        mask = inputs["attention_mask"].unsqueeze(-1).double()  # (paragraphs, tokens, 1)
        return nn.functional.normalize((states.double() * mask).sum(1) / mask.sum(1), dim=-1).cpu()

    def add_and_return_result(self, model: Any, batch: dict[str, Tensor], reference: Tensor | None) -> Tensor:
        """Add a model's embeddings of paragraphs; return them."""
        embeddings = self._add_time_and_get_result(model, batch, reference, int(batch["attention_mask"].sum()))
        self._cosines.append(((embeddings if reference is None else reference) * embeddings).sum(-1).clamp(max=1))
        return embeddings

    def add_layer_loss(self, layer_index: int, model: Any, batch: dict[str, Tensor], reference: Tensor) -> None:
        """Add how far a model's embeddings are with one layer of another."""
        self._layers[layer_index] += float(
            (1 - (reference * self.compute_checked_result(model, batch)).sum(-1)).clamp(min=0).sum()
        )

    def mean_score(self, baseline: _EmbeddingComparison, layer_paths: Iterable[str]) -> EmbeddingSimilarity:
        """Return the means."""
        cosines = torch.cat(self._cosines)
        return EmbeddingSimilarity(
            model=displayed_model_name(self._folder),
            paragraphs=len(cosines),
            cosine=float(cosines.mean()),
            lowest=float(cosines.min()),
            tokens_per_second=self._tokens_per_second,
            cosine_interval=bootstrap_95_interval_or_none(cosines, torch.ones_like(cosines))
            if self is not baseline
            else None,
            layers=_layer_losses_descending(layer_paths, [loss / len(cosines) for loss in self._layers]),
        )


def _summed_kl_without_last_token(reference_log_probs: Tensor, log_probs: Tensor) -> float:
    """Return the sum over tokens of the divergence of log-probabilities from those of the first model."""
    shares = reference_log_probs[:-1].exp()
    return float(
        (shares * (reference_log_probs[:-1] - log_probs[:-1])).masked_fill_(shares == 0, 0).double().sum()
    )  # 0 log 0 is 0


def _loss_clamped_at_zero(loss: float) -> float:
    """Return a loss, 0 where rounding has taken the loss below; NaN stays, which ``max`` would make 0."""
    return 0.0 if loss < 0 else loss


def _exp_or_inf(mean: float) -> float:
    return math.inf if mean >= 700 else math.exp(mean)


def _layer_losses_descending(layer_paths: Iterable[str], losses: Sequence[float]) -> tuple[LayerReplacementLoss, ...]:
    layer_losses = [
        LayerReplacementLoss(layer_display_name(path), _loss_clamped_at_zero(loss))
        for path, loss in zip(layer_paths, losses, strict=False)
    ]
    return tuple(sorted(layer_losses, key=lambda layer: (not math.isnan(layer.loss), -layer.loss)))


def _is_compared_by_logits(model: Any, tokens: Tensor) -> bool:
    """Whether a model is compared by its logits: all but models that return hidden states alone."""
    if not len(tokens):
        return True
    with torch.no_grad():
        output = model(tokens[None].to(model.device))
    return getattr(output, "logits", None) is not None or getattr(output, "last_hidden_state", None) is None


def bootstrap_95_interval_or_none(
    sums: Tensor, counts: Tensor, transform: Callable[[Tensor], Tensor] = lambda mean: mean
) -> tuple[float, float] | None:
    """Return the 95% interval of ``of(sum(sums) / sum(counts))``, by the bootstrap over parts; None for one part.

    As many parts (windows, paragraphs) as there are are drawn, with replacement (Efron, Bootstrap methods: another
    look at the jackknife, 1979). For fewer than ten parts the interval is too narrow. The seed is fixed.

    Args:
        sums, counts: (parts,).
        transform: a monotone function, such as ``torch.exp``.
    """
    parts = len(sums)
    if parts < 2:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(parts, (RESAMPLES, parts), generator=generator, dtype=torch.int64, device="cpu")
    means = transform(sums.double()[drawn].sum(1) / counts.double()[drawn].sum(1))
    low, high = means.sort().values[[int(0.025 * RESAMPLES), int(0.975 * RESAMPLES)]].tolist()
    return low, high
