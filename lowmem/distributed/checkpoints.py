"""The states of a run in several processes: PyTorch's distributed checkpoints, which any number of processes reads.

Each process writes its own parts, in the background, while training goes on. PyTorch writes a checkpoint's
``.metadata`` last, so one that has it is whole; that file is a pickle: go on from your own runs only.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lowmem.errors import quoted, refusal
from lowmem.finetuning.state import Saved, States, trained
from lowmem.io.atomic import write_errors

__all__ = ["Checkpoints", "has_checkpoints"]

_RECORD = "record.json"


def has_checkpoints(folder: Path) -> bool:
    """Whether a folder holds states that several processes have written."""
    return any(folder.glob("step-*/.metadata"))


class Checkpoints(States):
    """The states of a run in a folder that all processes see.

    Args:
        folder: is made by the first ``save``; one with a state of one process is read, too.
        origin: what the run was started with, as JSON: a state of another run is refused.
        may_differ: keys of ``origin`` that another value may have from now on.
        timeout: how long a process waits for the others; None: as PyTorch does.
    """

    def __init__(
        self,
        folder: Path,
        origin: Mapping[str, Any],
        may_differ: Collection[str] = (),
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__(folder, origin, may_differ)
        self._group: Any = distributed.new_group(backend="gloo", timeout=timeout) if _several() else None
        self._saving: Any = None

    def newest(self, model: nn.Module | None = None) -> Saved | None:
        """Return the newest whole state; None: there is none.

        Args:
            model: of its sharded parameters, what this process has of them is returned; None: all is whole.

        Raises:
            FileError: it is damaged, or of another run.
            OSError: it cannot be read.
        """
        folders = sorted(self.folder.glob("step-*/.metadata"), key=lambda one: _number(one.parent))
        if not folders:
            whole = super().newest()
            return None if whole is None else Saved(whole.step, _parts(whole.tensors, model), whole.record)
        folder = folders[-1].parent
        try:
            record = json.loads((folder / _RECORD).read_text())
            self._check(folder, record["origin"])
            tensors = self._read_parts(folder, model)
        except (EOFError, KeyError, json.JSONDecodeError, pickle.UnpicklingError, RuntimeError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise refusal(
                folder, f"it is damaged ({why}); remove it to go on from the one before", "go on from"
            ) from error
        self.facts = dict(record.get("facts", {}))
        self._last = _number(folder), folder.name
        return Saved(_number(folder), tensors, record)

    def save(self, saved: Saved) -> None:
        """Begin to write a state; the ones before the last whole one are removed.

        Raises:
            OSError: it, or the one before, cannot be written: nothing of it is left, and the last whole one stays.
        """
        dcp = _dcp()
        self.wait()
        folder = self.folder / f"step-{saved.step}"
        if self._last is not None and self._last[0] == saved.step:
            return  # the run went on from it; a whole one is never written over
        record = {**saved.record, "step": saved.step, "origin": self._origin, "facts": self.facts}
        tensors = {_with_rank(name, _rank()): value for name, value in saved.tensors.items()}
        with _save_errors(folder):
            if _rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)  # what a process has left that was killed meanwhile
                folder.mkdir(parents=True)
                (folder / _RECORD).write_text(json.dumps(record))
            if self._group is None:
                with _alone():
                    dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
            else:
                distributed.barrier(self._group)
                self._saving = dcp.async_save(dict(tensors), checkpoint_id=folder, process_group=self._group)
        self._written = saved.step, folder.name
        if self._group is None:
            self._end()

    def wait(self) -> None:
        """Wait until the last state is whole."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with _save_errors(self.folder / self._written[1]):
                saving.result()
            self._end()

    def kept(self) -> str:
        """Say which state is there, when the one that is being written is whole, or why it is not."""
        try:
            self.wait()
        except OSError as error:
            return f"{super().kept()}; a later one: {error}"
        return super().kept()

    def remove(self) -> None:
        """Remove the folder, when the run has ended."""
        self.wait()
        if self._group is not None:
            distributed.barrier(self._group)
        if _rank() == 0:
            super().remove()

    def _end(self) -> None:
        """Note that a state is whole, and remove those before the one before."""
        before, self._last = self._last, self._written
        kept = {self._last[1], before[1] if before else ""}
        if _rank() == 0:
            for old in self.folder.glob("step-*"):
                if old.name not in kept:
                    shutil.rmtree(old, ignore_errors=True)

    def _read_parts(self, folder: Path, model: nn.Module | None) -> dict[str, Tensor]:
        dcp = _dcp()
        found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        described: dict[str, Any] = dict(found)
        empty = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in described.items()}
        tensors = _parts(empty, model)
        with _alone(), _first_failure():
            dcp.load(tensors, checkpoint_id=folder, process_group=self._group, no_dist=self._group is None)
        own = f"@{_rank() if any(name.endswith(f'@{_rank()}') for name in tensors) else 0}"
        return {
            name.partition("@")[0]: value for name, value in tensors.items() if "@" not in name or name.endswith(own)
        }


def _parts(tensors: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """Return of whole values this process's parts, where the parameter to which one belongs is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters: dict[str, Any] = {} if model is None else trained(model)
    found = {}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        owner = rest.rpartition(".")[0] if group == "optimizer" else rest if group in ("parameters", "best") else ""
        one = parameters.get(owner)
        if isinstance(one, DTensor) and one.shape == value.shape:
            value = distribute_tensor(value.to(one.device), one.device_mesh, one.placements)
        found[name] = value
    return found


def _dcp() -> Any:
    """Import PyTorch's checkpoints, whose names are not exported for types."""
    import torch.distributed.checkpoint as dcp

    return dcp


@contextmanager
def _save_errors(folder: Path) -> Iterator[None]:
    """Turn errors of writing into an OSError, also where torch's writer misses what a full disk did not take.

    What was written is removed: every process has ended, or will, when PyTorch raises.
    """
    try:
        with write_errors(folder), _first_failure():
            yield
    except OSError:
        _remove_partial(folder)
        raise
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        _remove_partial(folder)
        raise OSError(
            f"cannot write {quoted(folder)}: not all of it could be written; choose a directory with more room"
        ) from error


def _remove_partial(folder: Path) -> None:
    """Remove a state that is not whole, and the folder of the states if it has no other."""
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raise the first process's error, for what PyTorch raises with those of all: it is no ``Exception``."""
    try:
        yield
    except _dcp().CheckpointException as error:
        raise error.failures[min(error.failures)][0] from error


def _with_rank(name: str, rank: int) -> str:
    """Return the name of a tensor in the checkpoint: each process has random states of its own."""
    return f"{name}@{rank}" if name.startswith("random.") else name


@contextmanager
def _alone() -> Iterator[None]:
    """Leave out PyTorch's warning that one process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _number(folder: Path) -> int:
    with suppress(ValueError):
        return int(folder.name.removeprefix("step-"))
    return -1


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _rank() -> int:
    return distributed.get_rank() if _several() else 0
