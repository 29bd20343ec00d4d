"""The job of ``lowmem fit`` on a folder: its arguments are checked, and its texts are read."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lowmem.distributed.distributed_checkpoints import DistributedCheckpoints
from lowmem.errors import FileError, quoted_path
from lowmem.finetuning.loop import Outcome
from lowmem.finetuning.metrics import check_log_package_and_folder, check_metrics_file, check_plot_path
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.text_examples import Texts
from lowmem.finetuning.training_state import States, check_and_describe_changes
from lowmem.io.adapter_files import read_adapter_summary
from lowmem.io.filesystem import (
    check_not_exists,
    check_outside_inputs,
    check_writable,
    open_regular_file,
)
from lowmem.io.formats.gguf.gguf_outlook import LLAMA_CPP, GGUFOutlook, gguf_outlook
from lowmem.io.formats.peft.peft_reader import CONFIG, WEIGHTS
from lowmem.io.hub_names import displayed_model_name
from lowmem.io.model_folder import weights_or_index_path
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.io.training_record import (
    RECORD_FILE,
    StorageTechnique,
    base_files_sha256,
    combined_sha256,
    technique_format_name,
)
from lowmem.nn.techniques import Budget, FourBit, Half, LoRA, blockwise_technique
from lowmem.tools.arguments import DEFAULT_RANK, option_string, select_local_rank_device
from lowmem.tools.chat_arguments import RECORD_KEY
from lowmem.tools.fit_config import check_digests_of_config
from lowmem.tools.fit_data import FitTexts, check_data_options, read_fit_texts
from lowmem.tools.fit_samples import samples_record
from lowmem.tools.fit_settings import (
    DPO_LEARNING_RATE,
    STATE_FACT,
    WARMUP_RATIO,
    batches_of_default_step,
    is_given,
    options_for_state,
    run_of_record,
    take_options_of_run,
    take_options_of_state,
)
from lowmem.tools.output import escaped_and_truncated, finite_or_none
from lowmem.version import __version__

KEPT_BASE_WEIGHTS = 10**9
"""Weights above which ``--keep-base`` is named: storing as many takes minutes."""

_MAX_TIMEOUT = 10**8
"""Seconds, three years: PyTorch's times overflow with much more."""

MAY_DIFFER = ("lr", "clip", "save_every", "batch_size", "accumulate", "processes", "device", "keep", "samples")
"""Settings that may change when a run resumes: those that help after a loss that was not finite, how often states are
saved, how the rows of a step are divided, the device, and what is written beside the adapter."""


@dataclass(frozen=True)
class FineTuningJob:
    """A job, whose texts are read."""

    model_path: Path
    base_digest: str  # the digest of the folder's files
    technique: StorageTechnique
    is_dense: bool  # whether the folder is
    compare_dense: bool  # whether to measure the perplexity of the dense model
    vocabulary_size: int
    adapter: LoRA  # of a new adapter
    targets: tuple[str, ...]  # names of the layers to adapt; none: all linear layers
    start_adapter: Path | None  # an adapter to continue from; None: a new one
    base_name: str  # of the base in the adapter's config
    tokenizer: Any
    memory_mode: str
    length: int
    settings: FineTuning
    data: FitTexts
    save_path: Path | None
    process_count: int | None  # that train together; None: this one alone
    device: torch.device
    timeout: timedelta
    keep_base: bool  # whether the stored base is written beside the adapter
    keep: int | None  # number of adapters to keep of moments in the run
    sample_count: int | None  # if it is given as a number
    notes: tuple[str, ...]  # on the base
    resumed_run: Mapping[str, Any] | None
    options_for_state: Mapping[str, Any]
    gguf: GGUFOutlook  # of the base as it is stored for training
    calibration_hint: str | None  # what a calibrated base would gain

    @property
    def texts(self) -> Texts:
        """The texts to train on."""
        return self.data.texts

    @property
    def held_out(self) -> Texts | None:
        """The texts to evaluate on."""
        return self.data.held_out

    @property
    def batch_sequences(self) -> int:
        """The number of sequences that are computed at a time, two for each pair of ``--method dpo``."""
        return self.settings.batch_size * (1 if self.data.beta is None else 2)

    def print_notes(self) -> None:
        """Print the notes to stderr, behind what is said of the model."""
        for note in (*self.data.notes, *self.notes):
            print(f"lowmem fit: {note}", file=sys.stderr)

    @property
    def compares_dense(self) -> bool:
        """Whether the perplexity of the dense model is measured before that of the stored one."""
        return self.compare_dense and self.is_dense and self.technique is not None and self.held_out is not None

    @property
    def has_public_base_name(self) -> bool:
        """Whether the adapter names its base as the Hub does, or ``--base-name``, and not by its path here."""
        return self.base_name != str(self.model_path.resolve())

    @property
    def public_base_name(self) -> str:
        """The base's name for files that may be shared: as the Hub has it, or without the folders of this machine."""
        return self.base_name if self.has_public_base_name else self.model_path.resolve().name

    def run_identity_dict(self) -> dict[str, Any]:
        """Return what decides the result, as JSON; ``options_of_run`` reads options from it."""
        identity = {
            "base": self.base_digest,
            "format": technique_format_name(self.technique),
            "embeddings": getattr(self.technique, "embeddings", None),  # None, too, of runs before there was a choice
            "rank": self.adapter.rank,
            "alpha": self.adapter.alpha,
            "dropout": self.adapter.dropout,
            "targets": list(self.targets),
            "from": None if self.start_adapter is None else combined_sha256(_adapter_file_paths(self.start_adapter)),
            "memory": self.memory_mode,
            "length": self.length,
            "data": self.texts.digest,
            "examples": len(self.texts.examples),
            "held_out": None if self.held_out is None else self.held_out.digest,
            **asdict(self.settings),
            # None, too, of runs before there were options
            "optimizer": None if self.settings.optimizer == "adamw" else self.settings.optimizer,
            "rank_stabilized": self.adapter.rank_stabilized or None,
            "block_size": getattr(self.technique, "block_size", None),
            "processes": self.process_count or 1,
            "device": self.device.type,
            "keep": self.keep,
            "samples": self.sample_count,
            **self.data.identity(),
            "rows_of_a_step": self.settings.batch_size * self.settings.accumulate * (self.process_count or 1),
        }
        if self.resumed_run is not None and "block_size" not in self.resumed_run:
            # Of a version that did not record it
            del identity["block_size"]
        return identity

    def make_states_or_none(self) -> States | None:
        """Return the states of the run; all of its processes call this method."""
        if self.save_path is None:
            return None
        states_arguments = states_folder(self.save_path), self.run_identity_dict(), MAY_DIFFER
        return (
            States(*states_arguments)
            if self.process_count is None
            else DistributedCheckpoints(*states_arguments, self.timeout)
        )

    def remove_states_if_complete(self) -> bool:
        """Whether the run has written its folder already; its states are then removed.

        Raises:
            FileError: another run has written it; the first thing that differs is named.
        """
        assert self.save_path is not None
        run = _completed_run_or_none(self.save_path)
        if run is None:
            return False
        # A held-out file that is not given is not needed any more
        may_differ = MAY_DIFFER if self.held_out is not None else (*MAY_DIFFER, "held_out")
        check_and_describe_changes(self.save_path, run, self.run_identity_dict(), may_differ)
        states = self.make_states_or_none()
        if states is not None:
            states.remove()
        return True

    def training_record(
        self, outcome: Outcome, perplexities: dict[str, float], answers: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """Return how the adapter was trained, as JSON: the same for the same run, resumed or not."""
        return {
            "lowmem": __version__,
            "base": self.public_base_name,
            "data": ", ".join(self.data.names),
            RECORD_KEY: self.data.chat.as_json(),
            "run": self.run_identity_dict(),
            "steps": len(outcome.losses),
            "adapter_after": outcome.step,
            "stopped_early": outcome.stopped,
            "last_loss": outcome.losses[-1],
            "perplexity": {name: finite_or_none(value) for name, value in perplexities.items()},
            **({"held_out": outcome.held_out_metrics[outcome.step]} if outcome.held_out_metrics else {}),
            # Blocks of the base; None: the format's, or no blocks
            "block_size": getattr(self.technique, "block_size", None),
            **({"samples": samples_record(self.data.samples, self.tokenizer, answers)} if answers else {}),
        }


def _completed_run_or_none(save_path: Path) -> dict[str, Any] | None:
    try:
        with open_regular_file(save_path / RECORD_FILE) as file:
            return run_of_record(json.load(file))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def log_folder(job: FineTuningJob) -> Path:
    """Return the folder of the log of a run."""
    assert job.save_path is not None
    return Path(f"{job.save_path}.log")


def states_folder(save_path: Path) -> Path:
    """Return the folder of the states of a run that writes ``save_path``."""
    return Path(f"{save_path}.training")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise an error for options that are wrong for any model: a model of the Hub is fetched after this.

    Raises:
        ValueError: an option's value is out of range, or needs another option.
        OSError: a file that an option names is not here, or OUT is.
    """
    if arguments.data is None:
        raise ValueError(f"--data must name a file of texts to train model={arguments.model!r} on, as FILE.jsonl")
    if arguments.resume and arguments.save is None:
        raise ValueError("--resume continues from the state beside OUT: name OUT with --save")
    if arguments.log is not None and arguments.save is None:
        raise ValueError(f"--log={arguments.log} writes a folder beside OUT: name OUT with --save")
    for name in ("eval_share", "warmup_ratio"):
        share = getattr(arguments, name)
        if share is not None and share >= 1:
            raise ValueError(f"{option_string(name)}={share:g} must be below 1")
    for name in ("keep", "keep_base"):
        if is_given(arguments, name) and arguments.save is None:
            raise ValueError(f"{option_string(name)} writes into OUT: name OUT with --save")
    for name in ("keep", "samples"):
        if is_given(arguments, name) and arguments.shard:
            raise ValueError(f"{option_string(name)} needs a whole model in one process: leave it or --shard out")
    _check_optimizer(arguments)
    how = "shard" if arguments.shard else "replicate" if arguments.replicate else None
    if arguments.timeout is not None and how is None:
        raise ValueError("--timeout applies to several processes: add --shard or --replicate")
    if arguments.timeout is not None and not 0.001 <= arguments.timeout <= _MAX_TIMEOUT:
        raise ValueError(f"--timeout={arguments.timeout:g} must be from 0.001 to {_MAX_TIMEOUT} seconds")
    if arguments.dry_run and how is not None:
        raise ValueError(f"--dry-run plans one process: leave --{how} out, and see docs/guides/many-machines.md")
    select_local_rank_device(arguments.device)
    _lora_from_arguments(arguments)
    check_data_options(arguments)
    if arguments.save is not None and not (arguments.resume or arguments.dry_run or arguments.show):
        check_not_exists(arguments.save)


def check_arguments_and_make_job(
    arguments: argparse.Namespace,
    model_path: Path,
    process_count: int | None,
    device: torch.device,
    timeout: timedelta,
) -> FineTuningJob:
    """Check the arguments, and read the texts; no weights are read but for the digest of their files."""
    from lowmem.integrations.transformers.model_facts import (
        delayed_transformers_log,
        quantizing_program_or_none,
        read_language_model_sizes,
    )
    from lowmem.integrations.transformers.pretrained_folder import check_tensors_fit_config
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    resumed_run = resumed_run_or_none(arguments)
    for run in (resumed_run, arguments.configured_run):
        if run is not None:
            take_options_of_run(arguments, run, quantizing_program_or_none(model_path) is None, process_count or 1)
    _check_optimizer(arguments)
    is_for_llama_cpp = getattr(arguments, "for") is not None
    technique, dense = _technique_and_is_dense(model_path, arguments.format, arguments.bits, is_for_llama_cpp)
    gguf = gguf_outlook(model_path, technique, arguments.target or ())
    if is_for_llama_cpp:
        gguf.check_exact(model_path, "fine-tune")
    base_notes = _check_and_describe_kept_base(arguments, model_path, technique)
    adapter = _lora_from_arguments(arguments)
    lr = DPO_LEARNING_RATE if arguments.method == "dpo" else default_learning_rate(adapter.rank)
    settings = _fine_tuning_settings(arguments, lr)

    # What it says comes again when the model is loaded
    with delayed_transformers_log(replay=False):
        vocabulary, width, positions, _ = read_language_model_sizes(model_path)
        try:
            tokenizer = read_tokenizer(model_path, vocabulary)
        except FileError:
            if dense:
                check_tensors_fit_config(
                    model_path
                )  # where config.json and weights differ, the tokenizer may be right
            raise
    if adapter.rank > width:
        raise ValueError(
            f"--rank={adapter.rank} is more than the {width} columns of the model's hidden states, so an adapter "
            "would not be smaller than its weight: lower it"
        )
    data = read_fit_texts(arguments, tokenizer, positions, resumed_run or arguments.configured_run)
    if arguments.eval_every is not None and data.held_out is None:
        raise ValueError("--eval-every needs held-out text: add --eval-data or --eval-share")
    if arguments.batch_size is None and arguments.accumulate is None:
        batch_size, accumulate = batches_of_default_step(data.texts, process_count or 1)
        settings = replace(settings, batch_size=batch_size, accumulate=accumulate)
    job = FineTuningJob(
        model_path,
        base_files_sha256(model_path),
        technique,
        dense,
        arguments.compare_dense,
        vocabulary,
        adapter,
        tuple(arguments.target or ()),
        getattr(arguments, "from"),
        arguments.base_name or displayed_model_name(model_path.resolve()),
        data.tokenizer,
        arguments.memory or "fast",
        data.length,
        settings,
        data,
        arguments.save,
        process_count,
        device,
        timeout,
        arguments.keep_base,
        arguments.keep,
        arguments.samples if isinstance(arguments.samples, int) else None,
        tuple(base_notes),
        resumed_run,
        options_for_state(arguments),
        gguf,
        _calibration_hint_or_none(arguments, model_path, technique),
    )
    if arguments.configured_run is not None:
        check_digests_of_config(arguments, job.run_identity_dict())
    return job


def _check_optimizer(arguments: argparse.Namespace) -> None:
    if arguments.shard and arguments.optimizer == "adamw8bit":
        raise ValueError("--optimizer=adamw8bit has states that --shard cannot divide: take adamw, or --replicate")


def resumed_run_or_none(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the settings of the run that ``--resume`` continues, or None if there is no such run.

    Options that are not given are set to those that the run's state has beside its settings.

    Raises:
        ValueError: the run went on from an adapter, which is neither given nor in a state.
    """
    if not arguments.resume:
        return None
    run = _completed_run_or_none(arguments.save)
    if run is None:
        states = States(states_folder(arguments.save), {})
        run = states.newest_origin_or_none()
        take_options_of_state(arguments, states.facts.get(STATE_FACT, {}))
    if run is not None and run.get("from") is not None and getattr(arguments, "from") is None:
        raise ValueError("--resume goes on with a run that began from another adapter: name it with --from ADAPTER")
    return run


def _check_and_describe_kept_base(
    arguments: argparse.Namespace, model_path: Path, technique: StorageTechnique
) -> list[str]:
    """Check ``--keep-base``; return a note that names it where storing the base again would take long."""
    if arguments.keep_base:
        if technique is None:
            raise ValueError(
                f"--keep-base keeps a base that is stored for training, and model={str(model_path)!r} is used as it "
                "is: leave it out"
            )
        return []
    if arguments.save is None or technique is None:
        return []
    count = _weight_count(model_path)
    if count <= KEPT_BASE_WEIGHTS:
        return []
    return [
        f"lowmem generate, serve and export of {escaped_and_truncated(str(arguments.save))} need the base in this "
        f"format, and storing {count / 1e9:.1f} billion weights again takes minutes: --keep-base writes it into OUT"
    ]


def _calibration_hint_or_none(
    arguments: argparse.Namespace, model_path: Path, technique: StorageTechnique
) -> str | None:
    """Return what a calibrated base would gain, where the base is stored in 4 bits without calibration."""
    from lowmem.integrations.transformers.folder_calibration import self_calibration_hint_or_none

    if not isinstance(technique, FourBit | Budget) or getattr(arguments, "for") is not None:
        return None
    hint = self_calibration_hint_or_none(model_path, _weight_count(model_path))
    return hint and f"the base is not calibrated: `lowmem quantize` writes one that is, which fit takes; {hint}"


def _weight_count(folder: Path) -> int:
    with SafetensorsCheckpoint(weights_or_index_path(folder)) as source:
        return sum(math.prod(spec.shape) for spec in source.specs.values())


def _fine_tuning_settings(arguments: argparse.Namespace, default_lr: float) -> FineTuning:
    values: dict[str, Any] = {setting.name: getattr(arguments, setting.name, None) for setting in fields(FineTuning)}
    values = {name: value for name, value in values.items() if value is not None}
    values.setdefault("lr", default_lr)
    if "warmup" not in values:
        values.setdefault("warmup_ratio", WARMUP_RATIO)
    if values.get("clip") == 0:
        values["clip"] = None
    return FineTuning(**values)


def default_learning_rate(rank: int) -> float:
    """Return the learning rate for a rank where none is given: 2e-4 for 16, less for more, by the square root."""
    return float(f"{2e-4 * (DEFAULT_RANK / rank) ** 0.5:.2g}")


def _lora_from_arguments(arguments: argparse.Namespace) -> LoRA:
    """Return the adapter to train: a new one, or one of the rank of ``--from``."""
    # A word of Python's own
    start = getattr(arguments, "from")
    if start is None:
        dropout = arguments.dropout or 0.0
        if dropout >= 1:
            raise ValueError(f"--dropout={dropout:g} must be below 1")
        return LoRA(arguments.rank or DEFAULT_RANK, arguments.alpha, dropout, arguments.rslora)
    for name in ("rank", "alpha", "dropout", "target", "rslora"):
        if is_given(arguments, name):
            raise ValueError(f"{option_string(name)} is that of the adapter that --from names: leave it out")
    if arguments.dry_run:
        raise ValueError("--dry-run plans a new adapter: give --rank in place of --from")
    return LoRA(read_adapter_summary(start).rank)


def _adapter_file_paths(adapter_path: Path) -> list[Path]:
    return [adapter_path] if adapter_path.is_file() else [adapter_path / CONFIG, adapter_path / WEIGHTS]


def _technique_and_is_dense(
    model_path: Path, format_name: str | None, bits: float | None = None, is_for_llama_cpp: bool = False
) -> tuple[StorageTechnique, bool]:
    """Return how to store a folder's model, and whether it is dense now."""
    from lowmem.integrations.transformers.model_facts import quantizing_program_or_none

    method = quantizing_program_or_none(model_path)
    if method is not None and (format_name is not None or bits is not None):
        option = f"--format={format_name}" if bits is None else f"--bits={bits:g}"
        raise ValueError(
            f"{option} does not apply to model={str(model_path)!r}, which is stored already: leave it out"
        )
    if method is not None:
        return None, False
    if is_for_llama_cpp:
        return LLAMA_CPP, True
    if format_name == "dense":
        return None, True
    if format_name in ("bfloat16", "float16"):
        return Half(getattr(torch, format_name)), True
    return (blockwise_technique(format_name) if bits is None else Budget(bits)), True


def check_outputs_writable(arguments: argparse.Namespace, job: FineTuningJob) -> None:
    """Raise, before anything is trained, if an output cannot be written."""
    if job.save_path is not None:
        check_not_exists(job.save_path)
        check_writable(job.save_path)
    _check_output_paths_disjoint(arguments, job)
    if arguments.log is not None:
        check_log_package_and_folder(arguments.log, log_folder(job), arguments.resume)
    if arguments.metrics is not None:
        check_metrics_file(arguments.metrics, arguments.resume)
    if arguments.plot is not None:
        check_plot_path(arguments.plot)


def _check_output_paths_disjoint(arguments: argparse.Namespace, job: FineTuningJob) -> None:
    """Raise an error if two outputs have one name, one is in the other and would go with it, or states have none; or
    if one is an input, or lies in one."""
    states = None if job.save_path is None else states_folder(job.save_path)
    outputs = {"--metrics": arguments.metrics, "--plot": arguments.plot, "--save": job.save_path}
    outputs["the folder of states of --save"] = states
    if arguments.log is not None:
        outputs["the folder of --log"] = log_folder(job)
    if states is not None and os.path.lexists(states) and not states.is_dir():
        raise FileExistsError(f"{quoted_path(states)} exists, where states go; remove it or choose another name")
    inputs = {"MODEL": job.model_path, "--from": job.start_adapter, "--eval-data": arguments.eval_data}
    inputs["--samples"] = arguments.samples if job.sample_count is None else None
    for option, path in outputs.items():
        for data_path in job.data.paths if path is not None else ():
            check_outside_inputs(path, inputs | {"--data": data_path}, option)
    absolute_outputs = [(option, Path(os.path.abspath(path))) for option, path in outputs.items() if path is not None]
    for number, (option, path) in enumerate(absolute_outputs):
        for other, other_path in absolute_outputs[number + 1 :]:
            if path == other_path or other_path in path.parents:
                raise ValueError(
                    f"{option}={escaped_and_truncated(str(path))} and {other}, "
                    f"{escaped_and_truncated(str(other_path))}, are the same place: rename one"
                )
