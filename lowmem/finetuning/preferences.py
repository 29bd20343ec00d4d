"""Pairs of answers to one prompt, of which one is preferred: their tokens, and the rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem.finetuning.calling_convention import (
    CallingConvention,
    eval_mode_without_grad,
    logits_from_output,
)
from lowmem.finetuning.evaluation import summed_negative_log_likelihood
from lowmem.finetuning.packed_rows import RowBatch, Rows, rank_batches
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.finetuning.row_kinds import Preference, RowOptions, convert_row
from lowmem.finetuning.text_examples import IGNORED, EncodedRow, Example, Tokenizer, encode_converted_row

DEFAULT_BETA = 0.1
"""Factor of the rewards, from log-probabilities in nats: how strongly the policy is held to the reference."""

PREFERENCES_AS_CHAT = "preferences in the chat template"


@dataclass(frozen=True, eq=False)
class PreferencePair(Example):
    """Two sequences, each of the prompt and an answer: those of the chosen answer, and behind them the rejected one.

    Args:
        chosen_length: number of tokens of the first sequence.
    """

    chosen_length: int

    @property
    def sequences(self) -> dict[str, Example]:
        """The two sequences, which the model sees apart, by names for messages."""
        cut = self.chosen_length
        first, second = Example(self.ids[:cut], self.targets[:cut]), Example(self.ids[cut:], self.targets[cut:])
        return {", chosen": first, ", rejected": second}

    @property
    def counted(self) -> int:
        """The number of tokens to be predicted; 0, where nothing is learned: one has none, or both are the same."""
        first, second = self.sequences.values()
        counts = first.counted, second.counted
        return 0 if min(counts) == 0 or torch.equal(first.ids, second.ids) else sum(counts)


@dataclass(frozen=True)
class EncodedPreference(EncodedRow):
    """The tokens of both sequences of a pair, one behind the other.

    Args:
        chosen_length: number of tokens of the first one.
    """

    chosen_length: int = 0

    @property
    def token_count(self) -> int:
        """The number of tokens of the longer sequence."""
        return max(self.chosen_length, len(self.tokens) - self.chosen_length)

    def examples(self, length: int) -> Sequence[Example]:
        """Return the pair, of which each sequence is cut to ``length`` tokens."""
        cut = self.chosen_length
        parts = [slice(0, min(cut, length)), slice(cut, cut + length)]
        first, second = (Example.of(self.tokens[part], [*map(bool, self.counts[part])]) for part in parts)
        ids, targets = torch.cat([first.ids, second.ids]), torch.cat([first.targets, second.targets])
        return [PreferencePair(ids, targets, len(first.ids))]


def encode_preference(
    place: str, content: Any, tokenizer: Tokenizer, options: RowOptions, start: list[int]
) -> EncodedPreference:
    """Return the tokens of a row of preferences, as ``encode_row`` does of other rows."""
    kind, preference = convert_row(content, options)
    assert isinstance(preference, Preference)
    chosen, rejected = (
        encode_converted_row(place, kind, answer, tokenizer, start)
        for answer in (preference.chosen, preference.rejected)
    )
    return EncodedPreference(
        place,
        PREFERENCES_AS_CHAT if chosen.is_chat else chosen.kind,
        chosen.tokens + rejected.tokens,
        chosen.counts + rejected.counts,
        max(chosen.end or 0, rejected.end or 0),
        is_chat=chosen.is_chat,
        findings=tuple(dict.fromkeys((*chosen.findings, *rejected.findings))),
        chosen_length=len(chosen.tokens),
    )


@dataclass(frozen=True)
class PreferenceBatch(RowBatch):
    """The model's input for some pairs: the sequences of all chosen answers, and then those of the rejected ones.

    Args:
        reference: float64 (2, pairs): log-probabilities of chosen and rejected answers by the model before training.
        beta: factor of the rewards.
    """

    reference: Tensor
    beta: float

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Return those of the answers, float64 (2, pairs), of logits (2 * pairs, tokens, vocabulary)."""
        # Each sequence apart, of which a prepared model computes a few rows of logits at a time
        losses = [
            functional.cross_entropy(logits[row].float(), targets, ignore_index=IGNORED, reduction="sum")
            for row, targets in enumerate(self.targets)
        ]
        # One row without targets is that of a process whose part of a step is empty
        return -torch.stack(losses).double().view(2, -1) if len(losses) > 1 else losses[0].double().expand(2, 1)

    def summed_loss_and_metrics(self, logits: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the sum of the losses of the pairs, and sums of metrics, as ``PreferenceRows`` explains them."""
        pairs = self.reference.shape[1]
        margins = _margins(self.log_probabilities(logits)[:, :pairs], self.reference, self.beta)
        return -functional.logsigmoid(margins).sum(), _summed_metrics(margins.detach())


class PreferenceRows(Rows):
    """Pairs of answers, for direct preference optimization (Rafailov et al., arXiv 2305.18290, equation 7). A row is
    a pair, each of whose sequences is padded to a row of its own. The loss of a pair is

        -log sigmoid(margin),  margin = beta (log p(chosen) / p0(chosen) - log p(rejected) / p0(rejected)),

    where p0 is the model before the first step, without dropout. Metrics are the mean margin and the accuracy, the
    share of pairs whose margin is positive, where a margin of 0 counts as a half.

    Args:
        pairs: each a ``PreferencePair``, whose sequences have at most ``length`` tokens each.
        length: the most tokens of a sequence.
        calling: how the model is called.
        beta: factor of the rewards.

    Attributes:
        counted: int64 (pairs,), ones: the loss of a step is a mean over pairs.
        reference: as in ``PreferenceBatch``, of all pairs.
    """

    reference: Tensor

    def __init__(
        self, pairs: Sequence[Example], length: int, calling: CallingConvention, beta: float = DEFAULT_BETA
    ) -> None:
        sequences = [sequence for pair in pairs for sequence in pair.sequences.values()]
        super().__init__(sequences, length, replace(calling, isolates_texts=False))
        self.beta = beta
        self.counted = torch.ones(len(pairs), dtype=torch.int64, device="cpu")
        self.reference = torch.zeros(2, len(pairs), dtype=torch.float64, device="cpu")

    def __len__(self) -> int:
        return len(self.counted)

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> PreferenceBatch:
        """Return some pairs; without indices, a row of one token without a target, as ``Rows.batch`` does."""
        batch = super().batch([2 * index + part for part in (0, 1) for index in indices], device)
        reference = self.reference[:, list(indices)].to(device)
        return PreferenceBatch(batch.inputs, batch.targets, batch.tokens, reference, self.beta)

    def log_probabilities(self, model: nn.Module, ranks: TrainingProcessGroup) -> Tensor:
        """Return those of the answers in eval mode, float64 (2, pairs), computed one sequence at a time."""
        device, values = next(model.parameters()).device, [0.0] * (2 * len(self))
        try:
            with eval_mode_without_grad(model):
                for start in range(0, len(values), ranks.world):
                    indices = [index for index in (start + ranks.rank,) if index < len(values)]
                    batch = super().batch(indices, device)
                    logits = logits_from_output(model(**batch.inputs))
                    for index in indices:
                        values[index] = -summed_negative_log_likelihood(logits, batch.targets)
        finally:
            ranks.free_gathered_parameters(model)
        sums = [ranks.all_reduce_sum(value) for value in values]
        return torch.tensor(sums, dtype=torch.float64, device="cpu").view(-1, 2).t().contiguous()

    def training_log_probabilities(self, model: nn.Module, batch_size: int) -> Tensor:
        """Return those of the answers as training steps compute them, or in eval mode if the model has dropout.

        Kernels of training and of evaluation round 16-bit numbers differently, by up to 1 nat in an answer.
        """
        device, parts = next(model.parameters()).device, rank_batches([*range(len(self))], batch_size)

        def compute(part: list[int]) -> Tensor:
            batch = self.batch(part, device)
            return batch.log_probabilities(logits_from_output(model(**batch.inputs))).detach().cpu()

        model.train()
        if not torch.equal(compute(parts[0]), compute(parts[0])):
            return self.log_probabilities(model, TrainingProcessGroup())
        return torch.cat([compute(part) for part in parts], dim=1)


def evaluate_preferences(model: nn.Module, rows: PreferenceRows, ranks: TrainingProcessGroup) -> dict[str, float]:
    """Return the mean ``loss``, ``accuracy`` and ``margin`` of pairs."""
    margins = _margins(rows.log_probabilities(model, ranks), rows.reference, rows.beta)
    sums = {"loss": -float(functional.logsigmoid(margins).sum()), **_summed_metrics(margins)}
    return {name: value / len(margins) for name, value in sums.items()}


def _margins(log_probabilities: Tensor, reference: Tensor, beta: float) -> Tensor:
    chosen, rejected = log_probabilities - reference  # (pairs,) each
    margins: Tensor = beta * (chosen - rejected)
    return margins


def _summed_metrics(margins: Tensor) -> dict[str, float]:
    return {"accuracy": float((margins.sign() + 1).sum() / 2), "margin": float(margins.sum())}
