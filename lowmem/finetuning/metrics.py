"""A file with one line of JSON for each step; a resumed run continues it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch

from lowmem.errors import refusal
from lowmem.io.atomic import check_free, check_writable, open_regular, read_errors, write_atomically, write_errors

__all__ = ["Metrics", "check_metrics", "peak_memory"]

_LINE = re.compile(rb'\{"step": \d.*\n?|' + b"|".join(re.escape(b'{"step": '[:end]) for end in range(1, 10)))
"""Matches the first line of a metrics file, which a full disk or a kill may have truncated anywhere."""


class Metrics:
    """Writes metrics to a file.

    Args:
        path: of the file.
        step: number of steps after which the run resumes; lines of later steps are dropped. None: a new run.

    Raises:
        FileExistsError: the run is new, and ``path`` exists.
        FileError: the run resumes, and the file is not a metrics file.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        self._path = path
        kept = b"" if step is None or not path.exists() else _lines_until(path, step)
        if step is None:
            check_free(path)
        write_atomically(path, kept)
        with write_errors(path):
            self._file: BufferedWriter = open(path, "ab")  # noqa: SIM115

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line, and flush it.

        Raises:
            OSError: it cannot be written.
        """
        with write_errors(self._path):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # close flushes again what could not be written
            self._file.close()


def check_metrics(path: Path, resume: bool) -> None:
    """Raise, before anything is trained, if metrics cannot be written.

    Raises:
        FileExistsError: the run is new, and ``path`` exists.
        FileError: the run resumes, and the file at ``path`` is not a metrics file.
        OSError: no file can be written there.
    """
    if not resume:
        check_free(path)
    elif path.exists():
        _lines_until(path, 0)
    check_writable(path)


def _lines_until(path: Path, step: int) -> bytes:
    """Return the complete lines of a metrics file up to a step.

    Raises:
        FileError: the first line is neither one that ``Metrics`` writes nor the start of one.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file, read_errors(path):
        lines = file.read().splitlines(keepends=True)
    if lines and not _LINE.fullmatch(lines[0]):
        raise refusal(path, "it has no metrics of a run to go on with; choose another name", "write")
    kept = b""
    for line in lines:
        try:
            number = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):  # truncated by a kill
            break
        if type(number) is not int or number > step or not line.endswith(b"\n"):
            break
        kept += line
    return kept


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
