"""The training loop of fine-tuning."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem.errors import short_repr
from lowmem.finetuning.calling_convention import logits_from_output, scaled_load_balancing_loss_or_none
from lowmem.finetuning.evaluation import perplexity
from lowmem.finetuning.packed_rows import RowBatch, Rows, ShuffledRowOrder, check_rows_type, rank_batches
from lowmem.finetuning.preferences import PreferenceBatch, PreferenceRows, evaluate_preferences
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.finetuning.settings import OPTIMIZERS, FineTuning
from lowmem.finetuning.text_examples import IGNORED
from lowmem.finetuning.training_state import (
    SavedState,
    States,
    forked_rng,
    load_model_and_optimizer_state,
    named_trainable_parameters,
    rng_states_by_device_type,
    set_rng_states,
    state_tensors_and_record,
    trainable_parameters_and_buffers,
)
from lowmem.io.checkpoint import unwrap_data_parallel
from lowmem.resident import trim_heap_unless_small
from lowmem.transforms.module_registry import check_is_module


@dataclass(frozen=True)
class Step:
    """Figures of a completed step.

    Args:
        number: of the step, from 1.
        steps: number of steps of the run.
        loss: mean loss of the tokens that count, or of the pairs, before the update, in nats.
        norm: norm of the gradient before clipping.
        lr: learning rate.
        tokens: tokens that the models of all processes got, without padding.
        seconds: time of gradient and update, without evaluating and saving the state.
        perplexity: of the held-out text after the step; None if it was not evaluated.
        metrics: of preferences: ``accuracy`` and ``margin`` before the update, and ``held_out_loss``,
            ``held_out_accuracy`` and ``held_out_margin``, which are None if not evaluated.
    """

    number: int
    steps: int
    loss: float
    norm: float
    lr: float
    tokens: int
    seconds: float
    perplexity: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        losses: of each step, as in ``Step``.
        evaluations: pairs of a number of completed steps and the perplexity of the held-out text after them, or the
            loss of held-out preferences.
        step: number of steps after which the final model was taken: those of the best evaluation with ``patience``,
            else all.
        stopped: whether the run was stopped early.
        held_out_metrics: of preferences, ``loss``, ``accuracy`` and ``margin`` by the number of completed steps.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    step: int = 0
    stopped: bool = False
    held_out_metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, float]:
        """The evaluation with the lowest perplexity or loss, the first of equal ones."""
        return min(self.evaluations, key=lambda evaluation: (evaluation[1], evaluation[0]))


def finetune(
    model: nn.Module,
    rows: Rows,
    settings: FineTuning,
    *,
    held_out: Rows | None = None,
    states: States | None = None,
    ranks: TrainingProcessGroup | None = None,
    watch: Callable[[Step], object] = lambda step: None,
) -> Outcome:
    """Train the parameters of a causal language model that require gradients, to predict the next token or by
    preferences.

    The same settings, rows and model give the same weights, to the bit, also if the run is killed at any moment and
    resumed from its states.

    Args:
        model: has an adapter, or other parameters that train; call ``prepare_training`` before to save memory.
        rows: to train on; ``PreferenceRows`` are pairs of answers.
        settings: steps, batches, rates.
        held_out: rows of the same kind to evaluate on, every ``eval_every`` steps and at the end.
        states: where states are saved; if there is one, the run resumes from it.
        ranks: the processes that train together; None if this process trains alone.
        watch: is called after each step.

    Returns:
        Losses and evaluations, including those from before the run was resumed.

    Raises:
        TypeError: an argument is of another type.
        ValueError: nothing trains; ``patience`` without ``held_out``; fewer rows than processes; or a loss, a
            gradient, a perplexity or a weight is no longer finite: the step is named, and the last good state is
            kept.
        FileError: the state is damaged, or of another run.
        OSError: a state cannot be read or written.
    """
    check_is_module(model)
    check_rows_type("rows", rows)
    if held_out is not None:
        check_rows_type("held_out", held_out)
        if isinstance(held_out, PreferenceRows) != isinstance(rows, PreferenceRows):
            raise TypeError("rows and held_out must both be PreferenceRows, or neither")
    if not isinstance(settings, FineTuning):
        raise TypeError(f"settings={short_repr(settings)} must be lowmem.FineTuning(steps=...)")
    if not named_trainable_parameters(model):
        raise ValueError(f"{type(model).__name__} has no parameter that trains: lowmem.add_adapter adds an adapter")
    if settings.patience is not None and held_out is None:
        raise ValueError(f"patience={settings.patience} needs held_out text to evaluate on")
    with forked_rng(next(model.parameters()).device):
        torch.manual_seed(settings.seed)
        outcome = _FineTuningRun(
            model, rows, settings, held_out, states, ranks or TrainingProcessGroup(), watch
        ).run()
    trim_heap_unless_small(model)
    return outcome


@dataclass
class _FineTuningRun:
    _model: nn.Module
    _rows: Rows
    _settings: FineTuning
    _held_out: Rows | None
    _states: States | None
    _ranks: TrainingProcessGroup
    _watch: Callable[[Step], object]

    def run(self) -> Outcome:
        """Train from the first step, or from the newest state, to the end."""
        settings, count, world = self._settings, len(self._rows), self._ranks.world
        if count < world:
            raise ValueError(f"{world} processes cannot share {count} rows of text: start fewer, or take more text")
        self._device = next(self._model.parameters()).device
        per_step = settings.batch_size * settings.accumulate * world
        self._order = ShuffledRowOrder(count, per_step, settings.seed, settings.total_rows(count, world))
        parameters = list(named_trainable_parameters(self._model).values())
        self._optimizer = OPTIMIZERS[settings.optimizer](
            parameters, lr=settings.lr, weight_decay=settings.weight_decay
        )
        self._outcome, self._best = Outcome(), dict[str, Tensor]()
        self._start = self._restore_state_and_get_step()
        # Drop gradients that the model had before the run
        self._optimizer.zero_grad(set_to_none=True)
        self._model.train()
        for step in range(self._start, self._order.step_count):
            self._train_step(step)
            if self._outcome.stopped:
                break
        self._restore_best_and_check_finite()
        return self._outcome

    def _restore_state_and_get_step(self) -> int:
        saved = None if self._states is None else self._states.newest(self._model)
        if saved is None:
            self._compute_references()
            return 0
        try:
            for name, pairs in self._preference_rows().items():
                pairs.reference = saved.tensors[f"reference.{name}"].view_as(pairs.reference).clone()
            self._outcome.held_out_metrics = dict(saved.record.get("held_out_metrics", ()))
            self._outcome.losses = saved.tensors["losses"].tolist()
            self._outcome.evaluations = [
                (step, math.inf if value is None else value) for step, value in saved.record["evaluations"]
            ]
            if len(self._outcome.losses) != saved.step:
                raise TypeError(f"step={saved.step} beside {len(self._outcome.losses)} losses")
            self._best = {name: value.clone() for name, value in saved.tensors_with_prefix("best").items()}
            load_model_and_optimizer_state(saved, self._model, self._optimizer)
            set_rng_states(saved.tensors_with_prefix("random"), self._device)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            # Crafted: its digest is right
            raise ValueError(
                f"the state after step {saved.step} is no state of this run ({type(error).__name__}: {error}): "
                "remove its folder to begin anew"
            ) from error
        return saved.step

    def _preference_rows(self) -> dict[str, PreferenceRows]:
        rows = {"rows": self._rows, "held_out": self._held_out}
        return {name: pairs for name, pairs in rows.items() if isinstance(pairs, PreferenceRows)}

    def _compute_references(self) -> None:
        for name, pairs in self._preference_rows().items():
            if name == "rows" and self._ranks.world == 1:
                pairs.reference = pairs.training_log_probabilities(self._model, self._settings.batch_size)
            else:
                pairs.reference = pairs.log_probabilities(self._model, self._ranks)

    def _train_step(self, step: int) -> None:
        """Do one step. No parameter changes unless its loss and gradient are finite."""
        before, started = rng_states_by_device_type(self._device), time.perf_counter()
        indices = self._order.row_indices(step)
        loss, tokens, metrics = self._backward_loss_token_count_and_metrics(indices)
        norm = self._ranks.clip_grad_norm(named_trainable_parameters(self._model).values(), self._settings.clip)
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                what = f"the {name} is {value} in step {step + 1}"
                raise self._zero_grad_and_divergence_error(
                    what, self._save_if_finite_or_get_error(step, before, known_finite=name != "loss")
                )
        seconds = time.perf_counter() - started
        if self._states is not None and step > self._start and self._is_save_due(step):
            self._states.save(
                self._make_saved_state(step, before)
            )  # the finite loss shows that the state before it is good
        lr, started = self._settings.lr_at(step, self._order.step_count), time.perf_counter()
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - started
        self._outcome.losses.append(loss)
        evaluation = self._evaluate_and_maybe_stop_if_due(step + 1)
        if metrics:
            evaluation, held_out = None, self._outcome.held_out_metrics.get(step + 1, {})
            metrics |= {f"held_out_{name}": held_out.get(name) for name in ("loss", *metrics)}
        self._watch(Step(step + 1, self._order.step_count, loss, norm, lr, tokens, seconds, evaluation, metrics))

    def _is_save_due(self, step: int) -> bool:
        """Whether to save the state after ``step`` steps: multiples of ``save_every``; below it, powers of two."""
        every = self._settings.save_every
        return step % every == 0 or (step < every and step & (step - 1) == 0)

    def _save_if_finite_or_get_error(
        self, step: int, rng_states: dict[str, Tensor], known_finite: bool
    ) -> OSError | None:
        """Save the state after ``step`` steps if it, or its last loss, is finite; return the error if that fails."""
        if (
            self._states is None
            or step == self._start
            or not (known_finite or math.isfinite(self._recompute_step_loss(step - 1)))
        ):
            return None
        try:
            self._states.save(self._make_saved_state(step, rng_states))
        except OSError as error:
            # Reported together with the loss
            return error
        return None

    def _recompute_step_loss(self, step: int) -> float:
        """Return the summed loss of a step's rows with the current weights."""
        settings, ranks, loss = self._settings, self._ranks, 0.0
        with torch.no_grad():
            for batch_indices in rank_batches(
                self._order.row_indices(step), settings.batch_size, ranks.rank, ranks.world
            ):
                batch = self._rows.batch(batch_indices, self._device)
                loss += float(_summed_loss_and_metrics(self._model, batch)[0])
        ranks.free_gathered_parameters(self._model)
        return ranks.all_reduce_sum(loss)

    def _backward_loss_token_count_and_metrics(self, row_indices: list[int]) -> tuple[float, int, dict[str, Any]]:
        """Accumulate the gradient of the mean loss of some rows; return that loss, their tokens, and mean metrics."""
        settings, ranks = self._settings, self._ranks
        # In all processes: each knows the rows of all
        total = max(1, int(self._rows.counted[row_indices].sum()))
        batches = rank_batches(row_indices, settings.batch_size, ranks.rank, ranks.world)
        loss, tokens, sums = 0.0, 0, Counter[str]()
        for number, batch_indices in enumerate(batches, 1):
            batch = self._rows.batch(batch_indices, self._device)
            with ranks.gradient_sync_on_last_batch(self._model, number == len(batches)):
                summed, metrics = _summed_loss_and_metrics(self._model, batch)
                mean = summed / total
                (mean * ranks.gradient_scale).backward()
            loss += float(mean.detach())
            tokens += batch.tokens
            sums.update(metrics)
        means = {name: ranks.all_reduce_sum(value) / total for name, value in sums.items()}
        return ranks.all_reduce_sum(loss), int(ranks.all_reduce_sum(tokens)), means

    def _evaluate_and_maybe_stop_if_due(self, step: int) -> float | None:
        """Evaluate if it is due, and set ``stopped`` if patience has run out; return the perplexity or loss."""
        every, patience = self._settings.eval_every, self._settings.patience
        due = step == self._order.step_count or (every is not None and step % every == 0)
        if self._held_out is None or not due:
            return None
        if isinstance(self._held_out, PreferenceRows):
            metrics = evaluate_preferences(self._model, self._held_out, self._ranks)
            what, value = "loss of the held-out pairs", metrics["loss"]
            self._outcome.held_out_metrics[step] = metrics
        else:
            what, value = "perplexity of the held-out text", perplexity(self._model, self._held_out, self._ranks)
        if math.isnan(value):
            raise self._zero_grad_and_divergence_error(f"the {what} is {value} after step {step}")
        self._outcome.evaluations.append((step, value))
        if patience is not None:
            best = self._outcome.best[0]
            if best == step:
                self._best = {
                    name: tensor.detach().clone()
                    for name, tensor in trainable_parameters_and_buffers(self._model).items()
                }
            since = sum(number > best for number, _ in self._outcome.evaluations)
            self._outcome.stopped = since >= patience and step < self._order.step_count
        return value

    def _make_saved_state(self, step: int, rng_states: dict[str, Tensor]) -> SavedState:
        tensors, record = state_tensors_and_record(self._model, self._optimizer)
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        tensors |= {f"random.{name}": value for name, value in rng_states.items()}
        tensors |= {f"reference.{name}": pairs.reference for name, pairs in self._preference_rows().items()}
        tensors["losses"] = torch.tensor(self._outcome.losses, dtype=torch.float64, device="cpu")
        evaluations = [[step, value if math.isfinite(value) else None] for step, value in self._outcome.evaluations]
        # JSON has no infinity
        held_out_metrics = [[step, metrics] for step, metrics in self._outcome.held_out_metrics.items()]
        record |= {"evaluations": evaluations}
        if held_out_metrics:
            # Of preferences alone: states of other runs keep their layout
            record |= {"held_out_metrics": held_out_metrics}
        return SavedState(step, tensors, record)

    def _restore_best_and_check_finite(self) -> None:
        self._outcome.step = len(self._outcome.losses)
        if self._best:
            self._outcome.step = self._outcome.best[0]
            with torch.no_grad():
                for name, value in trainable_parameters_and_buffers(self._model).items():
                    value.copy_(self._best[name])
        for name, parameter in named_trainable_parameters(self._model).items():
            # No loss was computed after the last update
            if not bool(parameter.isfinite().all()):
                raise self._zero_grad_and_divergence_error(
                    f"{name!r} is no longer finite after step {self._outcome.step}"
                )

    def _zero_grad_and_divergence_error(self, message: str, save_error: OSError | None = None) -> ValueError:
        self._optimizer.zero_grad(set_to_none=True)
        state_text = "" if self._states is None else f"; {self._states.kept()}"
        state_text += "" if save_error is None else f"; a later one: {save_error}"
        return ValueError(f"{message}: lower lr={self._settings.lr:g}{state_text}")


def _summed_loss_and_metrics(model: nn.Module, batch: RowBatch) -> tuple[Tensor, dict[str, float]]:
    """Return the sum of the losses of the tokens or pairs that count, and of preferences sums of metrics."""
    output = model(**batch.inputs)
    logits = logits_from_output(output)
    if isinstance(batch, PreferenceBatch):
        loss, metrics = batch.summed_loss_and_metrics(logits)
        count: Any = batch.reference.shape[1]
    else:
        loss, metrics = (
            functional.cross_entropy(
                logits.flatten(0, 1).float(),  # (rows * tokens, vocabulary)
                batch.targets.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            ),
            {},
        )
        count = batch.targets.ne(IGNORED).sum()
    balance = scaled_load_balancing_loss_or_none(unwrap_data_parallel(model), output)
    return (loss if balance is None else loss + balance * count), metrics
