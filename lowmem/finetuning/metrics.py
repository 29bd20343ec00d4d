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

from lowmem.errors import file_error, short_repr
from lowmem.io.filesystem import (
    check_not_exists,
    check_writable,
    open_regular_file,
    read_errors_with_path,
    write_atomically,
    write_errors_with_path,
)
from lowmem.version import install_command

_UNDATED: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Metadata that leaves dates and versions out of a plot, by suffix."""


class JSONLinesWriter:
    """Writes a line of JSON for each step to a file.

    Args:
        path: of the file.
        resume_step: number of steps after which the run resumes; lines of later steps are dropped. None: a new run.

    Raises:
        FileExistsError: the run is new, and ``path`` exists.
        FileError: the run resumes, and the file is not a metrics file.
        OSError: the file cannot be read or written.
    """

    _start, _first = b'{"step": ', re.compile(rb'\{"step": \d.*\n?')  # a kill may cut the first line anywhere

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self._path = path
        if resume_step is None:
            check_not_exists(path)
        write_atomically(
            path, b"" if resume_step is None or not path.exists() else self.read_lines_up_to_step(path, resume_step)
        )
        with write_errors_with_path(path):
            self._file = open(path, "ab")  # noqa: SIM115

    @classmethod
    def read_lines_up_to_step(cls, path: Path, last_step: int) -> bytes:
        """Return the complete lines of a file up to a step; raise a FileError if the file is of another kind."""
        with open_regular_file(path) as file, read_errors_with_path(path):
            lines = file.read().splitlines(keepends=True)
        if lines and not (cls._first.fullmatch(lines[0]) or cls._start.startswith(lines[0])):
            raise file_error(path, "it has no metrics of a run to go on with; choose another name", "write")
        content = b""
        for line in lines:
            try:
                number = cls._parse_step(line)
            except (ValueError, TypeError, KeyError):
                # Truncated by a kill
                break
            if type(number) is not int or number > last_step or not line.endswith(b"\n"):
                break
            content += line
        return content

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line, and flush it."""
        with write_errors_with_path(self._path):
            self._file.write(self._encode_line(record))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        # Close flushes again what could not be written
        with suppress(OSError):
            self._file.close()

    @staticmethod
    def _parse_step(line: bytes) -> Any:
        return json.loads(line)["step"]

    def _encode_line(self, record: Mapping[str, Any]) -> bytes:
        return json.dumps(record).encode() + b"\n"


class MetricsWriter(Protocol):
    """Takes the metrics of each step."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the metrics of a step."""

    def close(self) -> None:
        """End the log."""


class _CSVMetricsWriter(JSONLinesWriter):
    """Writes a table, metrics.csv; ``LOGS`` describes the arguments."""

    _start, _first = b"step,", re.compile(rb"step,.*\n?")

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume_step: int | None) -> None:
        with write_errors_with_path(folder):
            folder.mkdir(exist_ok=True)
        super().__init__(folder / "metrics.csv", resume_step)

    @staticmethod
    def _parse_step(line: bytes) -> int:
        return 0 if line.startswith(_CSVMetricsWriter._start) else int(line.partition(b",")[0])

    def _encode_line(self, record: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(record), lineterminator="\n")
        if not self._file.tell():
            writer.writeheader()
        writer.writerow(record)
        return text.getvalue().encode()


class _TensorBoardWriter:
    """Writes events of TensorBoard with torch's own writer; ``LOGS`` describes the arguments."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume_step: int | None) -> None:
        with _import_errors_with_install_hint("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer: Any = SummaryWriter(folder, purge_step=None if resume_step is None else resume_step + 1)
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


class _WandBWriter:
    """Writes a run of Weights & Biases; WANDB_MODE=offline keeps the run here. ``LOGS`` describes the arguments."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume_step: int | None) -> None:
        with _import_errors_with_install_hint("wandb"):
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


LOGS: dict[str, Callable[[Path, Mapping[str, Any], int | None], MetricsWriter]] = {
    "csv": _CSVMetricsWriter,
    "tensorboard": _TensorBoardWriter,
    "wandb": _WandBWriter,
}
"""The writers of ``--log`` by the tool's name. Each takes the folder to write into, the settings of the run, and the
number of steps after which the run resumes, or None for a new run. Lines of later steps are dropped."""


@contextmanager
def _import_errors_with_install_hint(package: str) -> Iterator[None]:
    """Turn a failed import in the block into an error that says how to install a package."""
    try:
        yield
    except ImportError as reason:
        raise ImportError(f"--log {package} needs the package {package}: {install_command('log')}") from reason


def check_log_package_and_folder(package: str, folder: Path, resumes: bool) -> None:
    """Raise, before anything is trained, if the package of a log is missing, or its folder exists in a new run."""
    with _import_errors_with_install_hint(package):
        if package != "csv":
            import_module(package)
    if not resumes:
        check_not_exists(folder)


def check_metrics_file(path: Path, resumes: bool) -> None:
    """Raise the errors of ``JSONLinesWriter``, before anything is trained."""
    if not resumes:
        check_not_exists(path)
    elif path.exists():
        JSONLinesWriter.read_lines_up_to_step(path, 0)
    check_writable(path)


def process_peak_bytes_or_none(device: torch.device) -> int | None:
    """Return the process's peak memory in bytes: of tensors on the GPU, else resident memory; None on Windows."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        # Windows
        return None
    if sys.platform == "linux":
        # Where ru_maxrss begins at what the process that started this one had resident
        status = Path("/proc/self/status").read_text(encoding="utf8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_plot_path(path: Path) -> None:
    """Raise, before anything is trained, if a plot of this suffix cannot be drawn or written."""
    if path.suffix not in _UNDATED:
        raise ValueError(f"plot={short_repr(str(path))} must end in {', '.join(_UNDATED)}")
    _make_matplotlib_figure()
    check_writable(path)


def plot_losses(
    path: Path,
    losses: Sequence[float],
    evaluations: Sequence[tuple[int, float]] = (),
    initial_perplexities: Mapping[str, float] | None = None,
) -> None:
    """Draw the losses of a run. The same figures give the same bytes.

    Args:
        path: of a ``.png``, ``.svg`` or ``.pdf`` file.
        losses: of each step, in nats per token.
        evaluations: pairs of a number of completed steps and the perplexity of the held-out text after them.
        initial_perplexities: perplexities of the held-out text before the first step, by name; at most three are
            drawn.

    Raises:
        ValueError, ImportError, OSError: as ``check_plot_path``.
    """
    check_plot_path(path)
    figure = _make_matplotlib_figure()
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
    finite = [(name, value) for name, value in (initial_perplexities or {}).items() if math.isfinite(value)]
    for style, (name, value) in zip((":", "--", "-."), finite, strict=False):
        axes.axhline(math.log(value), color="#c40", linewidth=0.8, linestyle=style, label=f"held out, {name}")
    axes.set(xlabel="step", ylabel="loss, nats")
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], metadata=_UNDATED[path.suffix])
    write_atomically(path, content.getvalue())


def _make_matplotlib_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError(f"plot needs matplotlib: {install_command('plot')}") from reason
    return Figure(figsize=(7, 4), layout="constrained")
