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

from lowmem.distributed.torchrun_processes import TIMEOUT, restart_command_words, torchrun_process_group
from lowmem.errors import file_error, printable_line, quoted_path, value_errors_as_file_errors
from lowmem.finetuning.calling_convention import CallingConvention, detect_calling_convention
from lowmem.finetuning.evaluation import perplexity
from lowmem.finetuning.loop import Outcome, Step, finetune
from lowmem.finetuning.metrics import LOGS, JSONLinesWriter, MetricsWriter, plot_losses, process_peak_bytes_or_none
from lowmem.finetuning.packed_rows import Rows
from lowmem.finetuning.preferences import PreferenceRows
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.finetuning.row_kinds import PREFERENCES, PROMPTS
from lowmem.finetuning.text_examples import Texts
from lowmem.finetuning.training_state import States, forked_rng
from lowmem.io.adapter_files import load_adapter
from lowmem.io.filesystem import exclusive_write_lock
from lowmem.io.training_record import RECORD_FILE, StorageTechnique, kept_base_or_none
from lowmem.nn.dot_product_attention import float32_attention_mode_if_faster
from lowmem.testing.disturbance import thread_wait_seconds_or_none
from lowmem.tools.arguments import select_local_rank_device
from lowmem.tools.fit_config import options_as_text
from lowmem.tools.fit_dry_run import print_planned_memory
from lowmem.tools.fit_job import (
    FineTuningJob,
    check_arguments_and_make_job,
    check_outputs_writable,
    log_folder,
    states_folder,
)
from lowmem.tools.fit_memory import split_rows_or_refuse
from lowmem.tools.fit_result import (
    remove_later_checkpoints,
    reproducing_shell_command,
    suggested_next_commands,
    write_adapter_folder,
    write_checkpoint,
)
from lowmem.tools.fit_samples import evenly_spaced_steps, generate_answers, prompts_digest
from lowmem.tools.fit_settings import FEW_STEPS, STATE_FACT, options_of_run
from lowmem.tools.fit_show import print_examples
from lowmem.tools.output import (
    escaped_and_truncated,
    finite_or_none,
    mib_text,
    print_json,
    print_saved_path_to_stderr,
    progress_display,
    tokens_per_second_text,
    warnings_printed_as_notes,
)
from lowmem.training.prepare_training import prepare_training, release_training
from lowmem.transforms.module_registry import adaptable_parameter_names
from lowmem.transforms.named_adapters import add_adapter

TIMED_STEPS = 5
"""Steps after which the time that is left, as the first step has it, is corrected."""
# Seconds that threads wait for cores in a second of steps, from which on other programs cost much of the time
BUSY = 0.5


def run(arguments: argparse.Namespace, model_path: Path) -> int:
    """Run the command for a folder."""
    how = "shard" if arguments.shard else "replicate" if arguments.replicate else None
    timeout = TIMEOUT if arguments.timeout is None else timedelta(seconds=arguments.timeout)
    if arguments.show is not None:
        return print_examples(arguments, model_path)
    device = select_local_rank_device(arguments.device)
    if arguments.dry_run:
        return print_planned_memory(
            arguments, check_arguments_and_make_job(arguments, model_path, None, device, timeout)
        )
    with (
        torchrun_process_group(how, device, timeout) as ranks,
        _suppressed_output(ranks.rank > 0),
        _output_locked_by_rank_zero(arguments.save, ranks),
    ):
        processes = None if how is None else ranks.world
        return _run_training_job(
            arguments, check_arguments_and_make_job(arguments, model_path, processes, device, timeout), ranks
        )


@contextmanager
def _suppressed_output(suppressed: bool) -> Iterator[None]:
    """Print nothing in the block if ``suppressed``: of several processes, one prints for all."""
    if not suppressed:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def _output_locked_by_rank_zero(save_path: Path | None, ranks: TrainingProcessGroup) -> Iterator[None]:
    """Own the folder to write and that of the states for the block; the first process does so for all of a run.

    Raises:
        OSError: another run owns one of them, or the place cannot be written.
    """
    with ExitStack() as owner:
        lock_error: OSError | None = None
        if save_path is not None and ranks.rank == 0:
            try:
                owner.enter_context(exclusive_write_lock(save_path))
                owner.enter_context(exclusive_write_lock(states_folder(save_path)))
            except OSError as error:
                # Raised when the others know
                lock_error = error
        if ranks.all_reduce_sum(float(lock_error is not None)):
            raise lock_error or OSError(f"{quoted_path(str(save_path))} cannot be written: rank 0 says why")
        yield


def _run_training_job(arguments: argparse.Namespace, job: FineTuningJob, ranks: TrainingProcessGroup) -> int:
    if job.save_path is not None and arguments.resume and job.remove_states_if_complete():
        lacks_base = job.keep_base and kept_base_or_none(job.save_path) is None
        lack = ", without the base that --keep-base asks for: remove it to train again" if lacks_base else ""
        print(f"{escaped_and_truncated(str(job.save_path))} is complete already{lack}", file=sys.stderr)
        if arguments.json:
            print_json(json.loads((job.save_path / RECORD_FILE).read_text()))
        return 0
    check_outputs_writable(arguments, job)
    if job.process_count is None and job.device.type == "cpu" and not arguments.anyway:
        with progress_display("memory"):
            job = split_rows_or_refuse(job)
    # All have looked before the first one writes
    ranks.all_reduce_sum(0.0)
    states = job.make_states_or_none()
    saved = None if states is None else states.newest()
    if saved is not None and not arguments.resume:
        assert states is not None
        raise FileExistsError(
            f"{str(states.folder)!r} has the state of an unfinished run: continue with --resume, or "
            "remove it to start again"
        )
    if job.save_path is not None and ranks.rank == 0:
        remove_later_checkpoints(job.save_path, saved.step if saved else 0)
    out = sys.stderr if arguments.json else sys.stdout
    # Errors that come before the first result are one line
    options = options_of_run(job.run_identity_dict(), job.is_dense)
    if arguments.chat_template is None or job.texts.kinds.keys().isdisjoint({PROMPTS, PREFERENCES}):
        # What a run that goes on takes, also where no row is a prompt without a template; conversations have theirs
        options.pop("chat_template", None)
    settings = options_as_text(options)
    opening = [job.data.description(), f"settings: {printable_line(settings, 2000)}", job.gguf.description()]
    if job.calibration_hint is not None:
        opening.append(job.calibration_hint)
    if job.save_path is None:
        opening.append("nothing will be saved: --save OUT keeps the adapter")

    def print_lines(*lines: str) -> None:
        for line in (*opening, *lines):
            print(line, file=out, flush=True)
        opening.clear()

    report = _StepReporter(out, job.device)
    writers: list[MetricsWriter] = []
    try:
        facts = {} if states is None else states.facts
        with progress_display(f"{job.public_base_name}, before its first step"):
            training = _LanguageModelTraining(job, ranks, facts, print_lines)
        print_lines()
        for change in [] if states is None else states.changed:
            print(f"lowmem fit: {change}", file=sys.stderr)
        step = saved.step if saved else 0 if arguments.resume else None
        if arguments.metrics is not None and ranks.rank == 0:
            writers.append(JSONLinesWriter(arguments.metrics, step))
        if arguments.log is not None and ranks.rank == 0:
            writers.append(LOGS[arguments.log](log_folder(job), job.run_identity_dict(), step))
        columns = MofNCompleteColumn, "steps {task.fields[figures]}", TimeRemainingColumn
        with progress_display(job.public_base_name, *columns, figures="") as update:
            outcome = training.train(states, lambda step: report(step, update, writers))
        document = job.training_record(outcome, training.perplexities, training.answers)
        # First: a run whose folder is complete is not done again
        if arguments.plot is not None and ranks.rank == 0:
            before = {name: value for name, value in training.perplexities.items() if name != "adapted"}
            evaluations = outcome.evaluations
            if job.data.beta is not None:
                # As perplexities, whose logarithms are drawn
                evaluations = [(step, math.exp(min(loss, 700))) for step, loss in evaluations]
            plot_losses(arguments.plot, outcome.losses, evaluations, before)
        if states is not None:
            if training.model is not None:
                write_adapter_folder(
                    job,
                    states.folder,
                    training.model,
                    document,
                    reproducing_shell_command(arguments, short_paths=True),
                )
            states.remove()
    except KeyboardInterrupt:
        if states is None:
            raise
        where = " on each machine" if "--nnodes" in restart_command_words() else ""
        command = f"{reproducing_shell_command(arguments)} --resume"
        kept = f"{states.kept()}, as --save-every {job.settings.save_every} says"
        raise KeyboardInterrupt(f"interrupted; {kept}: continue{where} with `{command}`") from None
    finally:
        for writer in writers:
            writer.close()
    if ranks.rank > 0:
        return 0
    figures = {"losses": outcome.losses, "evaluations": outcome.evaluations} | report.run_statistics()
    commands = [] if job.save_path is None else suggested_next_commands(job)
    _print_training_result(arguments, document | figures | {"next": commands})
    return 0


class _LanguageModelTraining:
    """A base with an adapter, its rows, and what it predicts before it trains.

    Attributes:
        model: after the training None in all processes but the first.
        perplexities: of the held-out text: "dense", "stored", and "adapted" at last.
        answers: to the prompts of the samples, by the number of completed steps.
    """

    def __init__(
        self, job: FineTuningJob, ranks: TrainingProcessGroup, saved_facts: dict[str, Any], print_line: Any
    ) -> None:
        self._job, self._ranks, self._print_line = job, ranks, print_line
        self.perplexities: dict[str, float] = dict(saved_facts.get("perplexity", {}))
        self._calling_convention: CallingConvention | None = None
        # Preferences have none
        known = bool(self.perplexities) or job.data.beta is not None
        if job.compares_dense and not known:
            self._measure_and_record_perplexity("dense", self._load_base_model(None))
            gc.collect()
        model = self._load_base_model(job.technique)
        job.print_notes()
        if job.data.beta is not None and job.held_out is not None:
            self._print_line(
                f"held-out pairs start at loss {math.log(2):.4f}, accuracy 0.5 and margin 0: their margins count "
                "from the model before training"
            )
        if known:
            self._print_line(*(_perplexity_line(name, value) for name, value in self.perplexities.items()))
        elif job.held_out is not None:
            self._measure_and_record_perplexity(
                "dense" if job.is_dense and job.technique is None else "stored", model
            )
        saved_facts["perplexity"] = dict(self.perplexities)
        with forked_rng(job.device):
            torch.manual_seed(job.settings.seed)
            self.model: nn.Module | None = _add_or_load_adapter(job, model)
        prompts, self.answers = prompts_digest(job.data.samples), dict[str, list[str]]()
        # A state of before there was a digest has answers to these
        if saved_facts.get("prompts", prompts) == prompts:
            self.answers |= saved_facts.get("answers", {})
        if not self.answers:
            self._answer_samples(0)
        saved_facts |= {"answers": dict(self.answers), "prompts": prompts, STATE_FACT: job.options_for_state}
        self._rows = self._rows_from_texts(job.texts)
        rows = job.run_identity_dict()["rows_of_a_step"]
        steps = math.ceil(len(self._rows) / rows)
        if job.settings.steps is None and job.settings.epochs is None and job.data.beta is None and steps < FEW_STEPS:
            print_line(
                f"one pass over these texts is {steps} step{'s' * (steps != 1)}, which hardly teaches facts: "
                "--epochs 10 --lr 1e-3 --batch-size 4 --accumulate 1 taught 27 of 30 to SmolLM2-135M"
            )
        if job.data.beta is None and not self._rows.calling.isolates_texts and len(job.texts.examples) > 1:
            print_line(
                "examples are not packed: in this model, those in one row would see each other; a step has "
                f"{rows} of them, as --batch-size and --accumulate say"
            )

    def train(self, states: States | None, on_step: Any) -> Outcome:
        """Train the adapter."""
        job, ranks = self._job, self._ranks
        assert self.model is not None
        if job.memory_mode != "plain":
            prepare_training(self.model, job.memory_mode)
        held_out = None if job.held_out is None else self._rows_from_texts(job.held_out)
        model = ranks.wrap_model(self.model)

        def watch(step: Step) -> None:
            on_step(step)
            self._keep_and_answer(step)
            if states is not None:
                states.facts["answers"] = dict(self.answers)

        with float32_attention_mode_if_faster(model):
            outcome = finetune(
                model, self._rows, job.settings, held_out=held_out, states=states, ranks=ranks, watch=watch
            )
        self.model = ranks.full_model_on_rank_zero(model)
        if self.model is not None:
            release_training(self.model)
            self._answer_samples(outcome.step)
        if outcome.evaluations and job.data.beta is None:
            self.perplexities["adapted"] = dict(outcome.evaluations)[outcome.step]
        return outcome

    def _keep_and_answer(self, step: Step) -> None:
        """Write a checkpoint and answer the samples, where it is time."""
        job = self._job
        if self._ranks.rank == 0 and step.number in evenly_spaced_steps(step.steps, job.keep or 0):
            assert self.model is not None
            moment = job.training_record(Outcome([step.loss], step=step.number), {}, {}) | {"steps": step.number}
            write_checkpoint(job, self.model, moment)
        if step.number in evenly_spaced_steps(step.steps, job.keep or 1):
            self._answer_samples(step.number)

    def _answer_samples(self, step: int) -> None:
        job = self._job
        if not job.data.samples or self._ranks.rank > 0:
            return
        from lowmem.integrations.transformers.text_generation import end_token_ids

        model: Any = self.model
        config, chats = model.generation_config, bool(job.texts.chats)
        ends = end_token_ids(config, job.tokenizer, chats, job.data.chat.template_kwargs)
        answers = generate_answers(model, job.tokenizer, ends, job.data.samples, job.length)
        self.answers[str(step)] = answers
        for number, answer in enumerate(answers, 1):
            self._print_line(f"sample {number} after {step} steps: {escaped_and_truncated(answer)}")

    def _load_base_model(self, technique: StorageTechnique) -> nn.Module:
        from lowmem.integrations.transformers.model_facts import delayed_transformers_log
        from lowmem.integrations.transformers.pretrained_folder import load_folder_or_gguf
        from lowmem.integrations.transformers.quantization_config import LowmemConfig

        with delayed_transformers_log(), warnings_printed_as_notes():
            model = load_folder_or_gguf(self._job.model_path, None if technique is None else LowmemConfig(technique))
        model = model.to(self._job.device)
        if self._calling_convention is None:
            try:
                self._calling_convention = detect_calling_convention(model, self._job.vocabulary_size)
            except ValueError as reason:
                raise file_error(self._job.model_path, str(reason), "fine-tune") from reason
        return model

    def _rows_from_texts(self, texts: Texts) -> Rows:
        assert self._calling_convention is not None
        beta = self._job.data.beta
        if beta is not None:
            return PreferenceRows(texts.examples, self._job.length, self._calling_convention, beta)
        return Rows(texts.examples, self._job.length, self._calling_convention)

    def _measure_and_record_perplexity(self, name: str, model: nn.Module) -> None:
        assert self._job.held_out is not None
        value = perplexity(model, self._rows_from_texts(self._job.held_out), self._ranks)
        if math.isnan(value):
            raise file_error(
                self._job.model_path, "its predictions are not finite; get its weights again", "fine-tune"
            )
        self.perplexities[name] = value
        self._print_line(_perplexity_line(name, value))


def _perplexity_line(name: str, value: float) -> str:
    return f"perplexity of the held-out text, {name}: {value:.4f}"


def _add_or_load_adapter(job: FineTuningJob, model: nn.Module) -> nn.Module:
    """Return the model with the adapter to train."""
    if job.start_adapter is not None:
        with value_errors_as_file_errors(job.start_adapter, "continue from"):
            return load_adapter(model, job.start_adapter, "default").train()
    if not job.targets:
        return add_adapter(model, "default", job.adapter)
    paths = [path for path, module in model.named_modules() if adaptable_parameter_names(module)]
    for name in job.targets:
        if not any(_is_matched_by_any(path, [name]) for path in paths):
            known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise ValueError(
                f"--target={name!r} names no layer that can be adapted: there are {printable_line(known)}"
            )
    return add_adapter(model, "default", job.adapter, where=lambda path, _: _is_matched_by_any(path, job.targets))


def _is_matched_by_any(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the names is the path of a layer, its end, or a pattern of either."""
    return any(fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}") for name in patterns)


class _StepReporter:
    """Shows steps as they are done: a bar on a terminal, some lines, and a line of JSON for each."""

    def __init__(self, stream: Any, device: torch.device) -> None:
        self._out, self._device, self._seconds, self._tokens, self._steps = stream, device, 0.0, 0, 0
        self._first_seconds = 0.0
        self._waited_before = thread_wait_seconds_or_none()

    def __call__(self, step: Step, update: Callable[..., None], writers: Sequence[MetricsWriter]) -> None:
        """Show a step."""
        self._seconds, self._tokens = self._seconds + step.seconds, self._tokens + step.tokens
        self._steps += 1
        if self._steps == 1:
            self._first_seconds = step.seconds
        others = step.steps - step.number
        # Without the first step, which warms up
        mean = step.seconds if self._steps == 1 else (self._seconds - self._first_seconds) / (self._steps - 1)
        left = mean * others
        if others and self._steps in (1, TIMED_STEPS):
            # Without evaluations and saved states
            time_left = f"the other {others} take about {timedelta(seconds=round(left))}"
            if self._steps > 1:
                text = f"steps {step.number - self._steps + 2} to {step.number} took {mean:.2g} s each: {time_left}"
            else:
                text = f"step {step.number} took {mean:.2g} s, with warm-up: at this rate {time_left}"
                if others >= TIMED_STEPS:
                    text += f"; corrected after step {step.number + TIMED_STEPS - 1}"
            print(text, file=self._out, flush=True)
            self._print_busy_processor_hint()
        memory = process_peak_bytes_or_none(self._device)
        speed = self._tokens / max(self._seconds, 1e-9)
        figures = f"{tokens_per_second_text(speed)} tokens/s" + (
            "" if memory is None else f"  {memory / 2**20:.0f} MiB"
        )
        update(completed=step.number, total=step.steps, figures=f"{step.loss:.4f}  {figures}")
        line = {**asdict(step), "perplexity": None if step.perplexity is None else finite_or_none(step.perplexity)}
        line = {"step": line.pop("number"), **line.pop("metrics"), **line}
        for writer in writers:
            writer.write(line | {"tokens_per_second": speed, "peak_bytes": memory, "seconds_left": left})
        every = max(1, step.steps // 10)
        figured = {name: value for name, value in step.metrics.items() if value is not None}
        is_evaluated = step.perplexity is not None or "held_out_loss" in figured
        if step.number % every == 0 or step.number == step.steps or is_evaluated:
            held_out = "" if step.perplexity is None else f"  held-out perplexity {step.perplexity:.4f}"
            for name, value in figured.items():
                held_out += f"  {name.replace('held_out_', 'held-out ')} {value:.4f}"
            clock = f"{int(left) // 60}:{int(left) % 60:02} left"
            text = f"step {step.number}/{step.steps}  loss {step.loss:.4f}{held_out}  {figures}  {clock}"
            print(text, file=self._out, flush=True)

    def _print_busy_processor_hint(self) -> None:
        """Say what helps where threads wait for cores: those of libgomp spin, unless they are told not to."""
        waited = thread_wait_seconds_or_none() if self._device.type == "cpu" and sys.platform == "linux" else None
        if waited is None or self._waited_before is None or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            return
        waited -= self._waited_before
        if waited > BUSY * self._seconds:
            print(
                f"other programs take the processor: in {self._seconds:.2g} s of steps, threads waited {waited:.2g} "
                "s for a core. Beside them, steps are faster with GOMP_SPINCOUNT=1000 before the command (--resume)",
                file=self._out,
                flush=True,
            )

    def run_statistics(self) -> dict[str, Any]:
        """Return what this process has measured, as JSON."""
        return {
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / max(self._seconds, 1e-9),
            "seconds_per_step": self._seconds / max(self._steps, 1),
            "peak_bytes": process_peak_bytes_or_none(self._device),
        }


def _print_training_result(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    if arguments.json:
        print_json(record | {"evaluations": [[step, finite_or_none(value)] for step, value in record["evaluations"]]})
    else:
        # The others were printed before the first step
        if "adapted" in record["perplexity"]:
            value = record["perplexity"]["adapted"]
            print(_perplexity_line("adapted", math.inf if value is None else value))
        for name, value in record.get("held_out", {}).items():
            print(f"{name} of the held-out pairs, adapted: {value:.4f}")
        if record["peak_bytes"] is not None:
            print(f"peak memory of the process: {mib_text(record['peak_bytes'])} MiB")
        speed = f"{tokens_per_second_text(record['tokens_per_second'])} tokens a second"
        print(f"time of a step: {record['seconds_per_step']:.3f} s, {speed}", flush=True)
    if arguments.save is not None:
        print_saved_path_to_stderr(arguments.save)
        for command in record["next"]:
            print(f"next: {command}", file=sys.stderr)
