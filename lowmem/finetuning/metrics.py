"""The metrics of a run: a file with one line of JSON for each step, which a resumed run continues, and a plot."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from lowmem.errors import refusal, show
from lowmem.io.atomic import check_free, check_writable, open_regular, read_errors, write_atomically, write_errors
from lowmem.version import install_command

_UNDATED: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Metadata that leaves dates and versions out of a plot, by suffix."""


class Metrics:
    """Writes a line of JSON for each step to a file.

    Args:
        path: of the file.
        step: number of steps after which the run resumes; lines of later steps are dropped. None: a new run.

    Raises:
        FileExistsError: the run is new, and ``path`` exists.
        FileError: the run resumes, and the file is not a metrics file.
        OSError: the file cannot be read or written.
    """

    _start, _first = b'{"step": ', re.compile(rb'\{"step": \d.*\n?')  # a kill may cut the first line anywhere

    def __init__(self, path: Path, step: int | None = None) -> None:
        self._path = path
        if step is None:
            check_free(path)
        write_atomically(path, b"" if step is None or not path.exists() else self.lines_until(path, step))
        with write_errors(path):
            self._file = open(path, "ab")  # noqa: SIM115

    @classmethod
    def lines_until(cls, path: Path, step: int) -> bytes:
        """Return the complete lines of a file up to a step; raise a FileError if the file is of another kind."""
        with open_regular(path) as file, read_errors(path):
            lines = file.read().splitlines(keepends=True)
        if lines and not (cls._first.fullmatch(lines[0]) or cls._start.startswith(lines[0])):
            raise refusal(path, "it has no metrics of a run to go on with; choose another name", "write")
        kept = b""
        for line in lines:
            try:
                number = cls._step_of(line)
            except (ValueError, TypeError, KeyError):  # truncated by a kill
                break
            if type(number) is not int or number > step or not line.endswith(b"\n"):
                break
            kept += line
        return kept

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line, and flush it."""
        with write_errors(self._path):
            self._file.write(self._line_of(record))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # close flushes again what could not be written
            self._file.close()

    @staticmethod
    def _step_of(line: bytes) -> Any:
        return json.loads(line)["step"]

    def _line_of(self, record: Mapping[str, Any]) -> bytes:
        return json.dumps(record).encode() + b"\n"


class Writer(Protocol):
    """Takes the metrics of each step."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the metrics of a step."""

    def close(self) -> None:
        """End the log."""


class _CSV(Metrics):
    """Writes a table, metrics.csv; ``LOGS`` describes the arguments."""

    _start, _first = b"step,", re.compile(rb"step,.*\n?")

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int | None) -> None:
        with write_errors(folder):
            folder.mkdir(exist_ok=True)
        super().__init__(folder / "metrics.csv", step)

    @staticmethod
    def _step_of(line: bytes) -> int:
        return 0 if line.startswith(_CSV._start) else int(line.partition(b",")[0])

    def _line_of(self, record: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(record), lineterminator="\n")
        if not self._file.tell():
            writer.writeheader()
        writer.writerow(record)
        return text.getvalue().encode()


class _TensorBoard:
    """Writes events of TensorBoard with torch's own writer; ``LOGS`` describes the arguments."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int | None) -> None:
        with _needs("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer: Any = SummaryWriter(folder, purge_step=None if step is None else step + 1)
        self._writer.add_text("settings", json.dumps(settings, indent=2))

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a scalar for each number."""
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class _WandB:
    """Writes a run of Weights & Biases; WANDB_MODE=offline keeps the run here. ``LOGS`` describes the arguments."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int | None) -> None:
        with _needs("wandb"):
            import wandb
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(f"{folder.resolve()} {json.dumps(settings)}".encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project="lowmem", name=folder.stem, dir=folder, id=name, resume="allow", config=dict(settings)
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of a step."""
        self._run.log({name: value for name, value in record.items() if value is not None}, step=record["step"])

    def close(self) -> None:
        """End the run."""
        self._run.finish()


LOGS: dict[str, Callable[[Path, Mapping[str, Any], int | None], Writer]] = {
    "csv": _CSV,
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
}
"""The writers of ``--log`` by the tool's name. Each takes the folder to write into, the settings of the run, and the
number of steps after which the run resumes, or None for a new run. Lines of later steps are dropped."""


@contextmanager
def _needs(package: str) -> Iterator[None]:
    """Turn a failed import in the block into an error that says how to install a package."""
    try:
        yield
    except ImportError as reason:
        raise ImportError(f"--log {package} needs the package {package}: {install_command('log')}") from reason


def check_log(name: str, folder: Path, resume: bool) -> None:
    """Raise, before anything is trained, if the package of a log is missing, or its folder exists in a new run."""
    with _needs(name):
        if name != "csv":
            import_module(name)
    if not resume:
        check_free(folder)


def check_metrics(path: Path, resume: bool) -> None:
    """Raise the errors of ``Metrics``, before anything is trained."""
    if not resume:
        check_free(path)
    elif path.exists():
        Metrics.lines_until(path, 0)
    check_writable(path)


def peak_memory(device: torch.device) -> int | None:
    """Return the process's peak memory in bytes: of tensors on the GPU, else resident memory; None on Windows."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_plot(path: Path) -> None:
    """Raise, before anything is trained, if a plot of this suffix cannot be drawn or written."""
    if path.suffix not in _UNDATED:
        raise ValueError(f"plot={show(str(path))} must end in {', '.join(_UNDATED)}")
    _figure()
    check_writable(path)


def plot_losses(
    path: Path,
    losses: Sequence[float],
    evaluations: Sequence[tuple[int, float]] = (),
    before: Mapping[str, float] | None = None,
) -> None:
    """Draw the losses of a run. The same figures give the same bytes.

    Args:
        path: of a ``.png``, ``.svg`` or ``.pdf`` file.
        losses: of each step, in nats per token.
        evaluations: pairs of a number of completed steps and the perplexity of the held-out text after them.
        before: perplexities of the held-out text before the first step, by name; at most three are drawn.

    Raises:
        ValueError, ImportError, OSError: as ``check_plot``.
    """
    check_plot(path)
    figure = _figure()
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9ab", linewidth=0.8, label="training, each step")
    width = max(1, len(losses) // 20)
    if width > 1:
        means = [math.fsum(losses[max(0, end - width) : end]) / min(end, width) for end in steps]
        axes.plot(steps, means, color="#247", label=f"training, mean of {width} steps")
    shown = [(step, math.log(value)) for step, value in evaluations if math.isfinite(value)]
    if shown:
        axes.plot(*zip(*shown, strict=True), color="#c40", marker="o", label="held out")
    finite = [(name, value) for name, value in (before or {}).items() if math.isfinite(value)]
    for style, (name, value) in zip((":", "--", "-."), finite, strict=False):
        axes.axhline(math.log(value), color="#c40", linewidth=0.8, linestyle=style, label=f"held out, {name}")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], metadata=_UNDATED[path.suffix])
    write_atomically(path, content.getvalue())


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError(f"plot needs matplotlib: {install_command('plot')}") from reason
    return Figure(figsize=(7, 4), layout="constrained")
