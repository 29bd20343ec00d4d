"""The training loop of fine-tuning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem.errors import show
from lowmem.finetuning.calling import balance_of, logits_of
from lowmem.finetuning.evaluation import perplexity
from lowmem.finetuning.ranks import Ranks
from lowmem.finetuning.rows import Batch, Order, Rows, check_rows, part
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.state import (
    Saved,
    States,
    capture,
    forked_random,
    put_back,
    random_states,
    set_random_states,
    trained,
    trained_values,
)
from lowmem.finetuning.text import IGNORED
from lowmem.io.checkpoint import unwrap
from lowmem.resident import trim_heap
from lowmem.transforms.registry import check_module


@dataclass(frozen=True)
class Step:
    """Figures of a completed step.

    Args:
        number: of the step, from 1.
        steps: number of steps of the run.
        loss: mean loss of the tokens that count, before the update, in nats.
        norm: norm of the gradient before clipping.
        lr: learning rate.
        tokens: tokens that the models of all processes got, without padding.
        seconds: time of gradient and update, without evaluating and saving the state.
        perplexity: of the held-out text after the step; None if it was not evaluated.
    """

    number: int
    steps: int
    loss: float
    norm: float
    lr: float
    tokens: int
    seconds: float
    perplexity: float | None = None


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        losses: of each step, as in ``Step``.
        evaluations: pairs of a number of completed steps and the perplexity of the held-out text after them.
        step: number of steps after which the final model was taken: those of the best evaluation with ``patience``,
            else all.
        stopped: whether the run was stopped early.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    step: int = 0
    stopped: bool = False

    @property
    def best(self) -> tuple[int, float]:
        """The evaluation with the lowest perplexity, the first of equal ones."""
        return min(self.evaluations, key=lambda one: (one[1], one[0]))


def finetune(
    model: nn.Module,
    rows: Rows,
    settings: FineTuning,
    *,
    held_out: Rows | None = None,
    states: States | None = None,
    ranks: Ranks | None = None,
    watch: Callable[[Step], object] = lambda step: None,
) -> Outcome:
    """Train the parameters of a causal language model that require gradients, with AdamW, to predict the next token.

    The same settings, rows and model give the same weights, to the bit, also if the run is killed at any moment and
    resumed from its states.

    Args:
        model: has an adapter, or other parameters that train; call ``prepare_training`` before to save memory.
        rows: to train on.
        settings: steps, batches, rates.
        held_out: rows to evaluate on, every ``eval_every`` steps and at the end.
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
    check_module(model)
    check_rows("rows", rows)
    if held_out is not None:
        check_rows("held_out", held_out)
    if not isinstance(settings, FineTuning):
        raise TypeError(f"settings={show(settings)} must be lowmem.FineTuning(steps=...)")
    if not trained(model):
        raise ValueError(f"{type(model).__name__} has no parameter that trains: lowmem.add_adapter adds an adapter")
    if settings.patience is not None and held_out is None:
        raise ValueError(f"patience={settings.patience} needs held_out text to evaluate on")
    with forked_random(next(model.parameters()).device):
        torch.manual_seed(settings.seed)
        outcome = _Run(model, rows, settings, held_out, states, ranks or Ranks(), watch).run()
    trim_heap(model)
    return outcome


@dataclass
class _Run:
    _model: nn.Module
    _rows: Rows
    _settings: FineTuning
    _held_out: Rows | None
    _states: States | None
    _ranks: Ranks
    _watch: Callable[[Step], object]

    def run(self) -> Outcome:
        """Train from the first step, or from the newest state, to the end."""
        settings, count, world = self._settings, len(self._rows), self._ranks.world
        if count < world:
            raise ValueError(f"{world} processes cannot share {count} rows of text: start fewer, or take more text")
        self._device = next(self._model.parameters()).device
        per_step = settings.batch_size * settings.accumulate * world
        self._order = Order(count, per_step, settings.seed, settings.total_rows(count, world))
        parameters = list(trained(self._model).values())
        self._optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self._done, self._best = Outcome(), dict[str, Tensor]()
        self._start = self._resume()
        self._optimizer.zero_grad(set_to_none=True)  # drop gradients that the model had before the run
        self._model.train()
        for step in range(self._start, self._order.steps):
            self._step(step)
            if self._done.stopped:
                break
        self._finish()
        return self._done

    def _resume(self) -> int:
        saved = None if self._states is None else self._states.newest(self._model)
        if saved is None:
            return 0
        try:
            self._done.losses = saved.tensors["losses"].tolist()
            self._done.evaluations = [
                (step, math.inf if value is None else value) for step, value in saved.record["evaluations"]
            ]
            if len(self._done.losses) != saved.step:
                raise TypeError(f"step={saved.step} beside {len(self._done.losses)} losses")
            self._best = {name: value.clone() for name, value in saved.group("best").items()}
            put_back(saved, self._model, self._optimizer)
            set_random_states(saved.group("random"), self._device)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # crafted: its digest is right
            raise ValueError(
                f"the state after step {saved.step} is no state of this run ({type(error).__name__}: {error}): "
                "remove its folder to begin anew"
            ) from error
        return saved.step

    def _step(self, step: int) -> None:
        """Do one step. No parameter changes unless its loss and gradient are finite."""
        before, started = random_states(self._device), time.perf_counter()
        indices = self._order.indices(step)
        loss, tokens = self._gradient(indices)
        norm = self._ranks.clip(trained(self._model).values(), self._settings.clip)
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                what = f"the {name} is {value} in step {step + 1}"
                raise self._diverged(what, self._keep(step, before, good=name != "loss"))
        seconds = time.perf_counter() - started
        if self._states is not None and step > self._start and self._is_due(step):
            self._states.save(self._saved(step, before))  # the finite loss shows that the state before it is good
        lr, started = self._settings.lr_at(step, self._order.steps), time.perf_counter()
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - started
        self._done.losses.append(loss)
        found = self._evaluate(step + 1)
        self._watch(Step(step + 1, self._order.steps, loss, norm, lr, tokens, seconds, found))

    def _is_due(self, step: int) -> bool:
        """Whether to save the state after ``step`` steps: multiples of ``save_every``; below it, powers of two."""
        every = self._settings.save_every
        return step % every == 0 or (step < every and step & (step - 1) == 0)

    def _keep(self, step: int, random: dict[str, Tensor], good: bool) -> OSError | None:
        """Save the state after ``step`` steps if it, or its last loss, is finite; return the error if that fails."""
        if self._states is None or step == self._start or not (good or math.isfinite(self._loss_again(step - 1))):
            return None
        try:
            self._states.save(self._saved(step, random))
        except OSError as error:  # reported together with the loss
            return error
        return None

    def _loss_again(self, step: int) -> float:
        """Return the summed loss of a step's rows with the current weights."""
        settings, ranks, loss = self._settings, self._ranks, 0.0
        with torch.no_grad():
            for own in part(self._order.indices(step), settings.batch_size, ranks.rank, ranks.world):
                loss += float(_loss(self._model, self._rows.batch(own, self._device)))
        ranks.rest(self._model)
        return ranks.sum(loss)

    def _gradient(self, indices: list[int]) -> tuple[float, int]:
        """Accumulate the gradient of the mean loss of some rows; return that loss, and the tokens of these rows."""
        settings, ranks = self._settings, self._ranks
        total = max(1, int(self._rows.counted[indices].sum()))  # in all processes: each knows the rows of all
        parts = part(indices, settings.batch_size, ranks.rank, ranks.world)
        loss, tokens = 0.0, 0
        for number, own in enumerate(parts, 1):
            batch = self._rows.batch(own, self._device)
            with ranks.accumulating(self._model, number == len(parts)):
                mean = _loss(self._model, batch) / total
                (mean * ranks.gradient_scale).backward()
            loss += float(mean.detach())
            tokens += batch.tokens
        return ranks.sum(loss), int(ranks.sum(tokens))

    def _evaluate(self, step: int) -> float | None:
        """Evaluate if it is due, and set ``stopped`` if patience has run out; return the perplexity."""
        every, patience = self._settings.eval_every, self._settings.patience
        due = step == self._order.steps or (every is not None and step % every == 0)
        if self._held_out is None or not due:
            return None
        found = perplexity(self._model, self._held_out, self._ranks)
        if math.isnan(found):
            raise self._diverged(f"the perplexity of the held-out text is {found} after step {step}")
        self._done.evaluations.append((step, found))
        if patience is not None:
            best = self._done.best[0]
            if best == step:
                self._best = {name: one.detach().clone() for name, one in trained_values(self._model).items()}
            since = sum(number > best for number, _ in self._done.evaluations)
            self._done.stopped = since >= patience and step < self._order.steps
        return found

    def _saved(self, step: int, random: dict[str, Tensor]) -> Saved:
        tensors, record = capture(self._model, self._optimizer)
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        tensors |= {f"random.{name}": value for name, value in random.items()}
        tensors["losses"] = torch.tensor(self._done.losses, dtype=torch.float64, device="cpu")
        found = [[step, value if math.isfinite(value) else None] for step, value in self._done.evaluations]
        return Saved(step, tensors, {**record, "evaluations": found})  # JSON has no infinity

    def _finish(self) -> None:
        self._done.step = len(self._done.losses)
        if self._best:
            self._done.step = self._done.best[0]
            with torch.no_grad():
                for name, value in trained_values(self._model).items():
                    value.copy_(self._best[name])
        for name, parameter in trained(self._model).items():
            if not bool(parameter.isfinite().all()):  # no loss was computed after the last update
                raise self._diverged(f"{name!r} is no longer finite after step {self._done.step}")

    def _diverged(self, what: str, unwritten: OSError | None = None) -> ValueError:
        self._optimizer.zero_grad(set_to_none=True)
        kept = "" if self._states is None else f"; {self._states.kept()}"
        kept += "" if unwritten is None else f"; a later one: {unwritten}"
        return ValueError(f"{what}: lower lr={self._settings.lr:g}{kept}")


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of the losses of the tokens that count."""
    output = model(**batch.inputs)
    loss = functional.cross_entropy(
        logits_of(output).flatten(0, 1).float(),  # (rows * tokens, vocabulary)
        batch.targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    balance = balance_of(unwrap(model), output)
    return loss if balance is None else loss + balance * batch.targets.ne(IGNORED).sum()
