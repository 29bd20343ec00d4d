"""``lowmem fit`` of folders: fine-tunes a language model on text, and writes an adapter."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, TimeRemainingColumn
from torch import nn

from lowmem.distributed.processes import TIMEOUT, joined, start_words
from lowmem.errors import printable, quoted, refusal, refusing
from lowmem.finetuning.calling import Calling, calling_of
from lowmem.finetuning.evaluation import perplexity
from lowmem.finetuning.loop import Outcome, Step, finetune
from lowmem.finetuning.metrics import LOGS, Metrics, Writer, peak_memory, plot_losses
from lowmem.finetuning.ranks import Ranks
from lowmem.finetuning.rows import Rows
from lowmem.finetuning.state import States, forked_random
from lowmem.finetuning.text import Texts
from lowmem.io.adapters import load_adapter
from lowmem.io.atomic import owned
from lowmem.nn.dot_product_attention import without_slow_attention
from lowmem.tools.arguments import device_of
from lowmem.tools.fit_job import RECORD, Job, Storing, check_outputs, job_of, log_of, states_folder
from lowmem.tools.fit_plan import dry_run
from lowmem.tools.fit_result import command_of, next_commands, save
from lowmem.tools.output import finite, mib, print_json, print_saved, progress, rate, shown, warnings_as_notes
from lowmem.training.prepare import prepare_training, release_training
from lowmem.transforms.adapters import add_adapter
from lowmem.transforms.registry import parameters_to_adapt

_LONGEST = 10**8
"""Seconds, three years: PyTorch's times overflow with much more."""


def run(arguments: argparse.Namespace, folder: Path) -> int:
    """Run the command for a folder."""
    how = "shard" if arguments.shard else "replicate" if arguments.replicate else None
    if arguments.timeout is not None and how is None:
        raise ValueError("--timeout applies to several processes: add --shard or --replicate")
    if arguments.timeout is not None and not 0.001 <= arguments.timeout <= _LONGEST:
        raise ValueError(f"--timeout={arguments.timeout:g} must be from 0.001 to {_LONGEST} seconds")
    timeout = TIMEOUT if arguments.timeout is None else timedelta(seconds=arguments.timeout)
    device = device_of(arguments.device)
    if arguments.dry_run:
        if how is not None:
            raise ValueError(f"--dry-run plans one process: leave --{how} out, and see docs/guides/many-machines.md")
        return dry_run(arguments, job_of(arguments, folder, None, device, timeout))
    with joined(how, device, timeout) as ranks, _silent(ranks.rank > 0), _owned(arguments.save, ranks):
        processes = None if how is None else ranks.world
        return _run(arguments, job_of(arguments, folder, processes, device, timeout), ranks)


@contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """Print nothing in the block if ``silent``: of several processes, one prints for all."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def _owned(out: Path | None, ranks: Ranks) -> Iterator[None]:
    """Own the folder to write and that of the states for the block; the first process does so for all of a run.

    Raises:
        OSError: another run owns one of them, or the place cannot be written.
    """
    with ExitStack() as owner:
        refused: OSError | None = None
        if out is not None and ranks.rank == 0:
            try:
                owner.enter_context(owned(out))
                owner.enter_context(owned(states_folder(out)))
            except OSError as error:  # raised when the others know
                refused = error
        if ranks.sum(float(refused is not None)):
            raise refused or OSError(f"{quoted(str(out))} cannot be written: rank 0 says why")
        yield


def _run(arguments: argparse.Namespace, job: Job, ranks: Ranks) -> int:
    if job.save is not None and arguments.resume and job.is_done():
        print(f"{shown(str(job.save))} is complete already", file=sys.stderr)
        if arguments.json:
            print_json(json.loads((job.save / RECORD).read_text()))
        return 0
    check_outputs(arguments, job)
    ranks.sum(0.0)  # all have looked before the first one writes
    states = job.states()
    saved = None if states is None else states.newest()
    if saved is not None and not arguments.resume:
        assert states is not None
        raise FileExistsError(
            f"{str(states.folder)!r} has the state of an unfinished run: continue with --resume, or "
            "remove it to start again"
        )
    out = sys.stderr if arguments.json else sys.stdout
    report = _Report(out, job.device)
    writers: list[Writer] = []
    try:
        facts = {} if states is None else states.facts
        with progress(f"{job.folder.name}, before its first step"):
            found = _Training(job, ranks, facts, lambda line: print(line, file=out, flush=True))
        for change in [] if states is None else states.changed:
            print(f"lowmem fit: {change}", file=sys.stderr)
        step = saved.step if saved else 0 if arguments.resume else None
        if arguments.metrics is not None and ranks.rank == 0:
            writers.append(Metrics(arguments.metrics, step))
        if arguments.log is not None and ranks.rank == 0:
            writers.append(LOGS[arguments.log](log_of(job), job.origin(), step))
        columns = MofNCompleteColumn, "steps {task.fields[figures]}", TimeRemainingColumn
        with progress(job.folder.name, *columns, figures="") as update:
            outcome = found.train(states, lambda step: report(step, update, writers))
        document = job.document(outcome, found.perplexities)
        if arguments.plot is not None and ranks.rank == 0:  # first: a run whose folder is complete is not done again
            before = {name: value for name, value in found.perplexities.items() if name != "adapted"}
            plot_losses(arguments.plot, outcome.losses, outcome.evaluations, before)
        if states is not None:
            if found.model is not None:
                save(job, states.folder, found.model, document, command_of(arguments, short=True))
            states.remove()
    except KeyboardInterrupt:
        if states is None:
            raise
        where = " on each machine" if "--nnodes" in start_words() else ""
        command = f"{command_of(arguments)} --resume"
        raise KeyboardInterrupt(f"interrupted; {states.kept()}: continue{where} with `{command}`") from None
    finally:
        for writer in writers:
            writer.close()
    if ranks.rank > 0:
        return 0
    figures = {"losses": outcome.losses, "evaluations": outcome.evaluations} | report.figures()
    _print_result(arguments, document | figures, [] if job.save is None else next_commands(job))
    return 0


class _Training:
    """A base with an adapter, its rows, and what it predicts before it trains.

    Attributes:
        model: after the training None in all processes but the first.
        perplexities: of the held-out text: "dense", "stored", and "adapted" at last.
    """

    def __init__(self, job: Job, ranks: Ranks, facts: dict[str, Any], tell: Any) -> None:
        self._job, self._ranks, self._tell = job, ranks, tell
        self.perplexities: dict[str, float] = dict(facts.get("perplexity", {}))
        self._calling: Calling | None = None
        known = bool(self.perplexities)
        if job.dense and job.technique is not None and job.held_out is not None and not (known or job.skip_dense):
            self._evaluate("dense", self._load(None))
            gc.collect()
        model = self._load(job.technique)
        job.tell()
        if job.held_out is not None and not known:
            self._evaluate("dense" if job.dense and job.technique is None else "stored", model)
        facts["perplexity"] = dict(self.perplexities)
        with forked_random(job.device):
            torch.manual_seed(job.settings.seed)
            self.model: nn.Module | None = _adapted(job, model)
        self._rows = self._rows_of(job.texts)
        if not self._rows.calling.isolates and len(job.texts.examples) > 1:
            tell("examples are not packed: in this model, those in one row would see each other")

    def train(self, states: States | None, watch: Any) -> Outcome:
        """Train the adapter."""
        job, ranks = self._job, self._ranks
        assert self.model is not None
        if job.memory != "plain":
            prepare_training(self.model, job.memory)
        held_out = None if job.held_out is None else self._rows_of(job.held_out)
        model = ranks.wrap(self.model)
        with without_slow_attention(model):
            outcome = finetune(
                model, self._rows, job.settings, held_out=held_out, states=states, ranks=ranks, watch=watch
            )
        self.model = ranks.whole(model)
        if self.model is not None:
            release_training(self.model)
        if outcome.evaluations:
            self.perplexities["adapted"] = dict(outcome.evaluations)[outcome.step]
        return outcome

    def _load(self, technique: Storing) -> nn.Module:
        from lowmem.integrations.transformers.config import LowmemConfig
        from lowmem.integrations.transformers.config_facts import held_back
        from lowmem.integrations.transformers.folder import load_model

        with held_back(), warnings_as_notes():
            model = load_model(self._job.folder, None if technique is None else LowmemConfig(technique))
        model = model.to(self._job.device)
        if self._calling is None:
            try:
                self._calling = calling_of(model, self._job.vocabulary)
            except ValueError as reason:
                raise refusal(self._job.folder, str(reason), "fine-tune") from reason
        return model

    def _rows_of(self, texts: Texts) -> Rows:
        assert self._calling is not None
        return Rows(texts.examples, self._job.length, self._calling)

    def _evaluate(self, name: str, model: nn.Module) -> None:
        assert self._job.held_out is not None
        found = perplexity(model, self._rows_of(self._job.held_out), self._ranks)
        if math.isnan(found):
            raise refusal(self._job.folder, "its predictions are not finite; get its weights again", "fine-tune")
        self.perplexities[name] = found
        self._tell(f"perplexity of the held-out text, {name}: {found:.4f}")


def _adapted(job: Job, model: nn.Module) -> nn.Module:
    """Return the model with the adapter to train."""
    if job.start is not None:
        with refusing(job.start, "continue from"):
            return load_adapter(model, job.start, "default").train()
    if not job.targets:
        return add_adapter(model, "default", job.adapter)
    paths = [path for path, module in model.named_modules() if parameters_to_adapt(module)]
    for name in job.targets:
        if not any(_is_named(path, [name]) for path in paths):
            known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise ValueError(f"--target={name!r} names no layer that can be adapted: there are {printable(known)}")
    return add_adapter(model, "default", job.adapter, where=lambda path, _: _is_named(path, job.targets))


def _is_named(path: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the path of a layer, its end, or a pattern of either."""
    return any(fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}") for name in names)


class _Report:
    """Shows steps as they are done: a bar on a terminal, some lines, and a line of JSON for each."""

    def __init__(self, out: Any, device: torch.device) -> None:
        self._out, self._device, self._seconds, self._tokens, self._steps = out, device, 0.0, 0, 0

    def __call__(self, step: Step, update: Callable[..., None], writers: Sequence[Writer]) -> None:
        """Show a step."""
        self._seconds, self._tokens = self._seconds + step.seconds, self._tokens + step.tokens
        self._steps += 1
        left = self._seconds / self._steps * (step.steps - step.number)
        memory = peak_memory(self._device)
        speed = self._tokens / max(self._seconds, 1e-9)
        figures = f"{rate(speed)} tokens/s" + ("" if memory is None else f"  {memory / 2**20:.0f} MiB")
        update(completed=step.number, total=step.steps, figures=f"{step.loss:.4f}  {figures}")
        line = {**asdict(step), "perplexity": None if step.perplexity is None else finite(step.perplexity)}
        line = {"step": line.pop("number"), **line}
        for writer in writers:
            writer.write(line | {"tokens_per_second": speed, "peak_bytes": memory, "seconds_left": left})
        every = max(1, step.steps // 10)
        if step.number % every == 0 or step.number == step.steps or step.perplexity is not None:
            held_out = "" if step.perplexity is None else f"  held-out perplexity {step.perplexity:.4f}"
            clock = f"{int(left) // 60}:{int(left) % 60:02} left"
            told = f"step {step.number}/{step.steps}  loss {step.loss:.4f}{held_out}  {figures}  {clock}"
            print(told, file=self._out, flush=True)

    def figures(self) -> dict[str, Any]:
        """Return what this process has measured, as JSON."""
        return {
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / max(self._seconds, 1e-9),
            "seconds_per_step": self._seconds / max(self._steps, 1),
            "peak_bytes": peak_memory(self._device),
        }


def _print_result(arguments: argparse.Namespace, document: dict[str, Any], commands: Sequence[str]) -> None:
    if arguments.json:
        print_json(document | {"evaluations": [[step, finite(value)] for step, value in document["evaluations"]]})
    else:
        for name, value in document["perplexity"].items():
            print(f"perplexity of the held-out text, {name}: {math.inf if value is None else value:.4f}")
        if document["peak_bytes"] is not None:
            print(f"peak memory of the process: {mib(document['peak_bytes'])} MiB")
        speed = f"{rate(document['tokens_per_second'])} tokens a second"
        print(f"time of a step: {document['seconds_per_step']:.3f} s, {speed}", flush=True)
    if arguments.save is not None:
        print_saved(arguments.save)
        for command in commands:
            print(f"next: {command}", file=sys.stderr)
