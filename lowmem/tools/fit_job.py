"""The job of ``lowmem fit`` on a folder: its arguments are checked, and its texts are read."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lowmem.distributed.checkpoints import Checkpoints
from lowmem.errors import FileError, quoted
from lowmem.finetuning.loop import Outcome
from lowmem.finetuning.metrics import check_log, check_metrics, check_plot
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.state import States, changes
from lowmem.finetuning.text import Texts, read_examples
from lowmem.io.adapters import adapter_facts
from lowmem.io.atomic import check_free, check_outside, check_writable, open_regular, read_errors
from lowmem.io.formats.peft.reading import CONFIG, WEIGHTS
from lowmem.io.model_folder import weights_in
from lowmem.io.shards import INDEX, read_index
from lowmem.nn.techniques import Blockwise, Budget, EightBit, FourBit, Half, LoRA, blockwise
from lowmem.tools.arguments import RANK, option_of
from lowmem.tools.output import finite, shown
from lowmem.version import __version__

LENGTH = 512
RECORD = "training.json"
"""The file beside an adapter that says how it was trained."""

Storing: TypeAlias = Half | EightBit | FourBit | Budget | None
"""How to store a folder's model; None: as it is."""

CUT_SHARE = 0.1
"""Share of the answers that may lose the token that ends them without --cut."""

MAY_DIFFER = ("lr", "clip", "save_every", "batch_size", "accumulate", "processes", "device")
"""Settings that may change when a run resumes: those that help after a loss that was not finite, how often states are
saved, how the rows of a step are divided, and the device."""


@dataclass(frozen=True)
class Job:
    """A job, whose texts are read."""

    folder: Path
    base: str  # the digest of the folder's files
    technique: Storing
    dense: bool  # whether the folder is
    skip_dense: bool
    vocabulary: int
    adapter: LoRA  # of a new adapter
    targets: tuple[str, ...]  # names of the layers to adapt; none: all linear layers
    start: Path | None  # an adapter to continue from; None: a new one
    base_name: str  # of the base in the adapter's config
    tokenizer: Any
    memory: str
    length: int
    settings: FineTuning
    data: Path
    texts: Texts
    held_out: Texts | None
    save: Path | None
    processes: int | None  # that train together; None: this one alone
    device: torch.device
    timeout: timedelta
    notes: tuple[str, ...]  # on the texts, to be printed behind what is said of the model

    def tell(self) -> None:
        """Print the notes to stderr."""
        for note in self.notes:
            print(f"lowmem fit: {note}", file=sys.stderr)

    @property
    def has_public_base(self) -> bool:
        """Whether the adapter names its base as the Hub does, and not by its path here."""
        return self.base_name != str(self.folder.resolve())

    @property
    def public_base(self) -> str:
        """The base's name for files that may be shared: as the Hub has it, or without the folders of this machine."""
        return self.base_name if self.has_public_base else self.folder.resolve().name

    def origin(self) -> dict[str, Any]:
        """Return what decides the result, as JSON."""
        return {
            "base": self.base,
            "format": _name_of(self.technique),
            "embeddings": getattr(self.technique, "embeddings", None),  # None, too, of runs before there was a choice
            "rank": self.adapter.rank,
            "alpha": self.adapter.alpha,
            "dropout": self.adapter.dropout,
            "targets": list(self.targets),
            "from": None if self.start is None else _digest_of(_files_of(self.start)),
            "memory": self.memory,
            "length": self.length,
            "data": self.texts.digest,
            "examples": len(self.texts.examples),
            "held_out": None if self.held_out is None else self.held_out.digest,
            **asdict(self.settings),
            "processes": self.processes or 1,
            "device": self.device.type,
            "rows_of_a_step": self.settings.batch_size * self.settings.accumulate * (self.processes or 1),
        }

    def states(self) -> States | None:
        """Return the states of the run; all of its processes call this method."""
        if self.save is None:
            return None
        given = states_folder(self.save), self.origin(), MAY_DIFFER
        return States(*given) if self.processes is None else Checkpoints(*given, self.timeout)

    def is_done(self) -> bool:
        """Whether the run has written its folder already; its states are then removed.

        Raises:
            FileError: another run has written it; the first thing that differs is named.
        """
        assert self.save is not None
        try:
            with open_regular(self.save / RECORD) as file:
                run = dict(json.load(file)["run"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return False
        changes(self.save, run, self.origin(), MAY_DIFFER)
        states = self.states()
        if states is not None:
            states.remove()
        return True

    def document(self, outcome: Outcome, perplexities: dict[str, float]) -> dict[str, Any]:
        """Return how the adapter was trained, as JSON: the same for the same run, resumed or not."""
        return {
            "lowmem": __version__,
            "base": self.public_base,
            "data": self.data.name,
            "run": self.origin(),
            "steps": len(outcome.losses),
            "adapter_after": outcome.step,
            "stopped_early": outcome.stopped,
            "last_loss": outcome.losses[-1],
            "perplexity": {name: finite(value) for name, value in perplexities.items()},
        }


def log_of(job: Job) -> Path:
    """Return the folder of the log of a run."""
    assert job.save is not None
    return Path(f"{job.save}.log")


def states_folder(out: Path) -> Path:
    """Return the folder of the states of a run that writes ``out``."""
    return Path(f"{out}.training")


def job_of(
    arguments: argparse.Namespace, folder: Path, processes: int | None, device: torch.device, timeout: timedelta
) -> Job:
    """Check the arguments, and read the texts; no weights are read but for the digest of their files."""
    if arguments.data is None:
        raise ValueError(f"--data must name a FILE.txt or FILE.jsonl to train model={str(folder)!r} on")
    if arguments.resume and arguments.save is None:
        raise ValueError("--resume continues from the state beside OUT: name OUT with --save")
    if arguments.log is not None and arguments.save is None:
        raise ValueError(f"--log={arguments.log} writes a folder beside OUT: name OUT with --save")
    share = arguments.eval_share
    if share is not None and share >= 1:
        raise ValueError(f"--eval-share={share:g} must be below 1")
    evaluates = share is not None or arguments.eval_data is not None
    if arguments.eval_every is not None and not evaluates:
        raise ValueError("--eval-every needs held-out text: add --eval-data or --eval-share")
    technique, dense = _technique(folder, arguments.format, arguments.bits)
    adapter = _adapter(arguments)
    settings = _settings(arguments, adapter.rank)
    from lowmem.integrations.transformers.config_facts import held_back, sizes_of
    from lowmem.integrations.transformers.folder import check_shapes
    from lowmem.integrations.transformers.tokenizing import TextTokenizer, read_tokenizer

    with held_back(shown=False):  # what it says comes again when the model is loaded
        vocabulary, width, positions, _ = sizes_of(folder)
        try:
            tokenizer = TextTokenizer(read_tokenizer(folder, vocabulary))
        except FileError:
            if dense:
                check_shapes(folder)  # where config.json and weights differ, the tokenizer may be right
            raise
    if adapter.rank > width:
        raise ValueError(
            f"--rank={adapter.rank} is more than the {width} columns of the model's hidden states, so an adapter "
            "would not be smaller than its weight: lower it"
        )
    length = arguments.length or min(LENGTH, positions or LENGTH)
    if positions is not None and length > positions:
        raise ValueError(f"--length={length} is more than the {positions} positions that the model has: lower it")
    texts = read_examples(arguments.data, tokenizer, length)
    notes = _notes_of(texts, arguments.data, positions)
    if texts.lost_ends > CUT_SHARE * len(texts.ends) and not arguments.cut:
        raise ValueError(f"{notes[0]}; or add --cut to train without them")
    held_out = None if arguments.eval_data is None else read_examples(arguments.eval_data, tokenizer, length)
    if held_out is not None:
        notes += _notes_of(held_out, arguments.eval_data, positions)
    if share is not None:
        texts, held_out = texts.split(share, arguments.seed)
    return Job(
        folder,
        _digest(folder),
        technique,
        dense,
        arguments.skip_dense,
        vocabulary,
        adapter,
        tuple(arguments.target or ()),
        getattr(arguments, "from"),
        arguments.base_name or str(folder.resolve()),
        tokenizer.tokenizer,
        arguments.memory or "fast",
        length,
        settings,
        Path(arguments.data),
        texts,
        held_out,
        arguments.save,
        processes,
        device,
        timeout,
        tuple(notes),
    )


def _notes_of(texts: Texts, data: str | Path, positions: int | None) -> list[str]:
    """Return notes on the examples of a file that do not fit, with the length that they need."""
    notes, name = [], shown(str(data))
    if texts.cut:
        note = f"{texts.cut} of {len(texts.ends)} examples of {name} are cut to --length {texts.length}"
        if texts.lost_ends:
            need = texts.length_of_ends(0.99)
            remedy = f"--length {need} keeps 99% of the ends"
            if positions is not None and need > positions:
                remedy = f"99% of the ends take {need}, of the model's {positions} positions; shorten the texts"
            note += f", and {texts.lost_ends} lose the token that ends the answer: {remedy}"
        notes.append(note)
    if texts.dropped:
        notes.append(f"{texts.dropped} examples of {name} are left out, since nothing that counts is left")
    return notes


def _settings(arguments: argparse.Namespace, rank: int) -> FineTuning:
    given: dict[str, Any] = {own.name: getattr(arguments, own.name, None) for own in fields(FineTuning)}
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("lr", default_lr(rank))
    if given.get("clip") == 0:
        given["clip"] = None
    return FineTuning(**given)


def default_lr(rank: int) -> float:
    """Return the learning rate for a rank where none is given: 2e-4 for 16, less for more, by the square root."""
    return float(f"{2e-4 * (RANK / rank) ** 0.5:.2g}")


def _adapter(arguments: argparse.Namespace) -> LoRA:
    """Return the adapter to train: a new one, or one of the rank of ``--from``."""
    start = getattr(arguments, "from")  # a word of Python's own
    if start is None:
        dropout = arguments.dropout or 0.0
        if dropout >= 1:
            raise ValueError(f"--dropout={dropout:g} must be below 1")
        return LoRA(arguments.rank or RANK, arguments.alpha, dropout)
    for name in ("rank", "alpha", "dropout", "target"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{option_of(name)} is that of the adapter that --from names: leave it out")
    if arguments.dry_run:
        raise ValueError("--dry-run plans a new adapter: give --rank in place of --from")
    return LoRA(adapter_facts(start).rank)


def _files_of(adapter: Path) -> list[Path]:
    return [adapter] if adapter.is_file() else [adapter / CONFIG, adapter / WEIGHTS]


def _technique(folder: Path, name: str | None, bits: float | None = None) -> tuple[Storing, bool]:
    """Return how to store a folder's model, and whether it is dense now."""
    from lowmem.integrations.transformers.config_facts import stored_by

    method = stored_by(folder)
    if method is not None and (name is not None or bits is not None):
        option = f"--format={name}" if bits is None else f"--bits={bits:g}"
        raise ValueError(f"{option} does not apply to model={str(folder)!r}, which is stored already: leave it out")
    if method is not None:
        return None, False
    if name == "dense":
        return None, True
    if name in ("bfloat16", "float16"):
        return Half(getattr(torch, name)), True
    return (blockwise(name) if bits is None else Budget(bits)), True


def _name_of(technique: Storing) -> str:
    if isinstance(technique, Half):
        return str(technique.dtype).removeprefix("torch.")
    if isinstance(technique, Budget):
        return f"{technique.bits:g} bits"
    return str(technique.format) if isinstance(technique, Blockwise) else technique or "as it is"


def _digest(folder: Path) -> str:
    """Return the SHA-256 of the files that a base is made of."""
    if folder.is_file():
        return _digest_of([folder])
    weights = weights_in(folder)
    names = sorted({*read_index(weights).values()}) if weights.name.endswith(INDEX) else [weights.name]
    return _digest_of([folder / name for name in ("config.json", *names)])


def _digest_of(files: Iterable[Path]) -> str:
    sha256 = hashlib.sha256()
    for file in files:
        with open_regular(file) as opened, read_errors(file):
            hashlib.file_digest(opened, lambda: sha256)
    return sha256.hexdigest()


def check_outputs(arguments: argparse.Namespace, job: Job) -> None:
    """Raise, before anything is trained, if an output cannot be written."""
    if job.save is not None:
        check_free(job.save)
        check_writable(job.save)
    _check_apart(arguments, job)
    if arguments.log is not None:
        check_log(arguments.log, log_of(job), arguments.resume)
    if arguments.metrics is not None:
        check_metrics(arguments.metrics, arguments.resume)
    if arguments.plot is not None:
        check_plot(arguments.plot)


def _check_apart(arguments: argparse.Namespace, job: Job) -> None:
    """Raise an error if two outputs have one name, one is in the other and would go with it, or states have none; or
    if one is an input, or lies in one."""
    states = None if job.save is None else states_folder(job.save)
    places = {"--metrics": arguments.metrics, "--plot": arguments.plot, "--save": job.save}
    places["the folder of states of --save"] = states
    if arguments.log is not None:
        places["the folder of --log"] = log_of(job)
    if states is not None and os.path.lexists(states) and not states.is_dir():
        raise FileExistsError(f"{quoted(states)} exists, where states go; remove it or choose another name")
    inputs = {"MODEL": job.folder, "--from": job.start, "--data": job.data, "--eval-data": arguments.eval_data}
    for option, path in places.items():
        if path is not None:
            check_outside(path, inputs, option)
    found = [(option, Path(os.path.abspath(path))) for option, path in places.items() if path is not None]
    for number, (option, path) in enumerate(found):
        for other, place in found[number + 1 :]:
            if path == place or place in path.parents:
                raise ValueError(
                    f"{option}={shown(str(path))} and {other}, {shown(str(place))}, are the same place: rename one"
                )
