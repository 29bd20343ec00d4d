"""The saved state of a training run, from which a run that was killed at any moment can resume: two files with
digests, written alternately; if the newer one is damaged, the older one is read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import FileError, quoted, refusal, show
from lowmem.io.atomic import write_errors
from lowmem.io.checkpoint import unwrap
from lowmem.io.container import read, write_tensors
from lowmem.nn.adapter_buffers import buffers_in_use

KIND = "training"
FILES = ("state-0.safetensors", "state-1.safetensors")


@dataclass(frozen=True)
class Saved:
    """The state after some steps.

    Args:
        step: number of completed steps; the position in the data follows from it.
        tensors: ``parameters.NAME``, ``optimizer.NAME.KEY``, ``best.NAME``, ``buffers.NAME``, ``random.DEVICE``, and
            ``losses``.
        record: everything else, as values that JSON can hold.
    """

    step: int
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with ``name.``, by the rest of their names."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


class States:
    """The states of a run in a folder.

    Args:
        folder: is created by the first ``save``.
        origin: what the run was started with, as JSON: a state of another run is an error.
        may_differ: keys of ``origin`` whose values may differ from those in the state.

    Attributes:
        changed: texts on values that differ and on damaged states that were skipped, set by ``newest``.
        facts: values for JSON that are saved with each state, and set again by ``newest``.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any], may_differ: Collection[str] = ()) -> None:
        self.folder, self._origin, self._may_differ = folder, dict(origin), may_differ
        self.changed: list[str] = []
        self.facts: dict[str, Any] = {}
        self._last: tuple[int, str] | None = None  # the step of the newest state, and its file

    def newest(self, model: nn.Module | None = None) -> Saved | None:
        """Return the newest undamaged state, or None. ``model`` is not used: the parameters are whole.

        Raises:
            FileError: all states are damaged, the newest is of another run: the first difference is named; or the
                states are pickles.
            OSError: a file cannot be read.
        """
        if any(self.folder.glob("step-*/.metadata")):
            raise refusal(
                self.folder,
                "its states are pickles (step-*/.metadata): nothing was read or executed; remove it to begin anew",
                "go on from",
            )
        found: list[tuple[Saved, str]] = []
        damaged: list[str] = []
        for name in FILES:
            path = self.folder / name
            if os.path.lexists(path):
                try:
                    found.append((self._read(path), name))
                except FileError as error:
                    damaged.append(_without_remedy(error))
        if not found:
            if damaged:
                why = f"none of its states is whole: {damaged[-1]}; remove it to begin anew"
                raise refusal(self.folder, why, "go on from")
            return None
        saved, name = max(found, key=lambda one: one[0].step)
        self.changed = changes(self.folder / name, saved.record["origin"], self._origin, self._may_differ)
        self.changed += [f"{error}; going on from the state after step {saved.step}" for error in damaged]
        self.facts = dict(saved.record.get("facts", {}))
        self._last = saved.step, name
        return saved

    def save(self, saved: Saved) -> None:
        """Write a state in place of the older of the two, or of what is no file.

        Raises:
            OSError: it cannot be written; the newer of the two is kept.
        """
        with write_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        name = FILES[0] if self._last is None or self._last[1] == FILES[1] else FILES[1]
        record = {**saved.record, "kind": KIND, "step": saved.step, "origin": self._origin, "facts": self.facts}
        path = self.folder / name
        try:
            if os.path.lexists(path) and not path.is_file():  # ``newest`` has told of it
                with write_errors(path):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            write_tensors(path, saved.tensors, record)
        finally:
            with suppress(OSError):  # it has states
                self.folder.rmdir()
        self._last = saved.step, name

    def kept(self) -> str:
        """Return a text that says which state exists."""
        if self._last is None:
            return "no state was saved before"
        return f"the last good state, after step {self._last[0]}, is kept in {quoted(self.folder)}"

    def remove(self) -> None:
        """Remove the folder after the end of the run."""
        with write_errors(self.folder), suppress(FileNotFoundError):
            shutil.rmtree(self.folder)

    def _read(self, path: Path) -> Saved:
        if not path.is_file():
            raise refusal(path, "it is a directory, a device, a pipe or a link to nowhere")
        file = read(path)
        record = file.metadata
        whole = type(record.get("step")) is int and isinstance(record.get("origin"), dict)
        if record.get("kind") != KIND or not whole or not isinstance(record.get("facts", {}), dict):
            raise refusal(path, "it is no state of a training run; name the run's own folder")
        return Saved(record["step"], file.tensors, record)


def _without_remedy(error: FileError) -> str:
    """Return the error of a state without the remedy to get the file again."""
    what, _, remedy = str(error).rpartition("; ")
    return what if "get it again" in remedy else str(error)


def changes(
    path: Path, origin: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str] = ()
) -> list[str]:
    """Return a text for each value that differs between the ``origin`` of a run and ``now``.

    Raises:
        FileError: a value differs that is not in ``may_differ``; the first one and ``path``, the run's, are named.
    """
    found = []
    for key in (*origin, *(key for key in now if key not in origin)):
        if origin.get(key) == now.get(key):
            continue
        was, to = (_short(values.get(key)) for values in (origin, now))
        if key not in may_differ:
            other = "its adapter is of another base: " if key == "base" else ""
            raise refusal(
                path,
                f"{other}{key} was {was} and is {to}: go on with what the run was started with, or choose "
                "another name to begin anew",
                "go on from",
            )
        found.append(f"{key} was {was} until here, and is {to}")
    return found


def _short(value: Any) -> str:
    """Return a value as text for errors; a digest is abbreviated."""
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"{value[:12]}..." if is_digest else show(value)


def forked_random(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores torch's random state on the CPU and, if it is a GPU, on ``device``."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators on the CPU and, if it is a GPU, on ``device``."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the states of torch's generators to those of ``random_states``."""
    torch.set_rng_state(states["cpu"].clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and record of a ``Saved``, of trained parameters, optimizer and buffers; nothing is copied."""
    tensors = {f"buffers.{name}": one for name, one in buffers_in_use(unwrap(model)).items()}
    numbers: dict[str, Any] = {}
    for name, parameter in trained(model).items():
        tensors[f"parameters.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                numbers[f"{name}.{key}"] = value
    return tensors, {"optimizer": numbers}


def put_back(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what ``capture`` returned into a model and its optimizer.

    Raises:
        ValueError: the state is of other parameters; nothing was changed.
    """
    own, parameters = trained(model), saved.group("parameters")
    buffers, given = buffers_in_use(unwrap(model)), saved.group("buffers")
    shapes, others = (
        {name: tuple(one.shape) for name, one in group.items()}
        for group in ({**own, **buffers}, {**parameters, **given})
    )
    if shapes != others:
        name = min(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
        raise ValueError(
            f"the state has {show(name)} of shape {show(others.get(name))}, and the model one of "
            f"{show(shapes.get(name))}: go on with the model that the run was started with"
        )
    states: dict[str, dict[str, Any]] = {name: {} for name in own}
    for full, value in saved.group("optimizer").items():
        name, _, key = full.rpartition(".")
        states[name][key] = value.clone()
    for full, number in saved.record["optimizer"].items():
        name, _, key = full.rpartition(".")
        states[name][key] = number
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(given[name])
        for name, parameter in own.items():
            parameter.copy_(parameters[name])
            if states[name]:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) and key != "step" else value
                    for key, value in states[name].items()
                }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name, without the prefix that a DDP or FSDP wrapper adds."""
    return {name: one for name, one in unwrap(model).named_parameters() if one.requires_grad}


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: ``trained``, and buffers such as the running statistics of BatchNorm."""
    return {**trained(model), **buffers_in_use(unwrap(model))}
