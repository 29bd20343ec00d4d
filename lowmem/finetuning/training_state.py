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

from lowmem.errors import FileError, file_error, quoted_path, short_repr
from lowmem.io.checkpoint import unwrap_data_parallel
from lowmem.io.filesystem import write_errors_with_path
from lowmem.io.lowmem_file import verify_and_map_file, write_tensors_returning_digest
from lowmem.nn.adapter_buffers import current_buffers_by_name

_CHANGES = {
    "base": "its adapter is of another base: ",
    "held_out": "its held-out text was another, of --eval-data or --eval-share: ",
}
"""What is said of values that differ, before them."""

KIND = "training"
FILES = ("state-0.safetensors", "state-1.safetensors")


@dataclass(frozen=True)
class SavedState:
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

    def tensors_with_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with ``name.``, by the rest of their names."""
        start = f"{prefix}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


class States:
    """The states of a run in a folder.

    Args:
        folder: is created by the first ``save``.
        origin: what the run was started with, as JSON: a state of another run is an error.
        may_differ: keys of ``origin`` whose values may differ from those in the state.

    Attributes:
        changed: texts on values that differ and on damaged states that were skipped, set by ``newest``.
        facts: values for JSON that are saved with each state, and set again where one is read.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any], may_differ: Collection[str] = ()) -> None:
        self.folder, self._origin, self._may_differ = folder, dict(origin), may_differ
        self.changed: list[str] = []
        self.facts: dict[str, Any] = {}
        # The step of the newest state, and its file
        self._last: tuple[int, str] | None = None

    def newest(self, model: nn.Module | None = None) -> SavedState | None:
        """Return the newest undamaged state, or None. ``model`` is not used: the parameters are whole.

        Raises:
            FileError: all states are damaged, the newest is of another run: the first difference is named; or the
                states are pickles.
            OSError: a file cannot be read.
        """
        if any(self.folder.glob("step-*/.metadata")):
            raise file_error(
                self.folder,
                "its states are pickles (step-*/.metadata): nothing was read or executed; remove it to begin anew",
                "go on from",
            )
        states_and_names, damaged = self._read_states_and_errors()
        if not states_and_names:
            if damaged:
                why = f"none of its states is whole: {damaged[-1]}; remove it to begin anew"
                raise file_error(self.folder, why, "go on from")
            return None
        saved, name = max(states_and_names, key=lambda pair: pair[0].step)
        self.changed = check_and_describe_changes(
            self.folder / name, saved.record["origin"], self._origin, self._may_differ
        )
        self.changed += [f"{error}; going on from the state after step {saved.step}" for error in damaged]
        self.facts = dict(saved.record.get("facts", {}))
        self._last = saved.step, name
        return saved

    def newest_origin_or_none(self) -> dict[str, Any] | None:
        """Return what the run of the newest undamaged state was started with; ``newest`` reports damaged ones."""
        states_and_names, _ = self._read_states_and_errors()
        saved = max((saved for saved, _ in states_and_names), key=lambda saved: saved.step, default=None)
        if saved is None:
            return None
        self.facts = dict(saved.record.get("facts", {}))
        return dict(saved.record["origin"])

    def _read_states_and_errors(self) -> tuple[list[tuple[SavedState, str]], list[str]]:
        """Return the undamaged states with their names, and the errors of the others."""
        states_and_names: list[tuple[SavedState, str]] = []
        damaged: list[str] = []
        for name in FILES:
            path = self.folder / name
            if os.path.lexists(path):
                try:
                    states_and_names.append((self._read_checked_state(path), name))
                except FileError as error:
                    damaged.append(_error_text_without_remedy(error))
        return states_and_names, damaged

    def save(self, saved: SavedState) -> None:
        """Write a state in place of the older of the two, or of what is no file.

        Raises:
            OSError: it cannot be written; the newer of the two is kept.
        """
        with write_errors_with_path(self.folder):
            self.folder.mkdir(exist_ok=True)
        name = FILES[0] if self._last is None or self._last[1] == FILES[1] else FILES[1]
        record = {**saved.record, "kind": KIND, "step": saved.step, "origin": self._origin, "facts": self.facts}
        path = self.folder / name
        try:
            # ``newest`` has told of it
            if os.path.lexists(path) and not path.is_file():
                with write_errors_with_path(path):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            write_tensors_returning_digest(path, saved.tensors, record)
        finally:
            with suppress(OSError):  # it has states
                self.folder.rmdir()
        self._last = saved.step, name

    def kept(self) -> str:
        """Return a text that says which state exists."""
        if self._last is None:
            return "no state was saved before"
        return f"the last good state, after step {self._last[0]}, is kept in {quoted_path(self.folder)}"

    def remove(self) -> None:
        """Remove the folder after the end of the run."""
        with write_errors_with_path(self.folder), suppress(FileNotFoundError):
            shutil.rmtree(self.folder)

    def _read_checked_state(self, path: Path) -> SavedState:
        if not path.is_file():
            raise file_error(path, "it is a directory, a device, a pipe or a link to nowhere")
        file = verify_and_map_file(path)
        record = file.metadata
        whole = type(record.get("step")) is int and isinstance(record.get("origin"), dict)
        if record.get("kind") != KIND or not whole or not isinstance(record.get("facts", {}), dict):
            raise file_error(path, "it is no state of a training run; name the run's own folder")
        return SavedState(record["step"], file.tensors, record)


def _error_text_without_remedy(error: FileError) -> str:
    """Return the error of a state without the remedy to get the file again."""
    what, _, remedy = str(error).rpartition("; ")
    return what if "get it again" in remedy else str(error)


def check_and_describe_changes(
    path: Path, origin: Mapping[str, Any], current: Mapping[str, Any], may_differ: Collection[str] = ()
) -> list[str]:
    """Return a text for each value that differs between the ``origin`` of a run and ``current``.

    Raises:
        FileError: a value differs that is not in ``may_differ``; the first one and ``path``, the run's, are named.
    """
    texts = []
    for key in (*origin, *(key for key in current if key not in origin)):
        if origin.get(key) == current.get(key):
            continue
        was, to = (_abbreviated_text(values.get(key)) for values in (origin, current))
        if key not in may_differ:
            raise file_error(
                path,
                f"{_CHANGES.get(key, '')}{key} was {was} and is {to}: go on with what the run was started with, or "
                "choose another name to begin anew",
                "go on from",
            )
        texts.append(f"{key} was {was} until here, and is {to}")
    return texts


def _abbreviated_text(value: Any) -> str:
    """Return a value as text for errors; a digest is abbreviated."""
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"{value[:12]}..." if is_digest else short_repr(value)


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores torch's random state on the CPU and, if it is a GPU, on ``device``."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def rng_states_by_device_type(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators on the CPU and, if it is a GPU, on ``device``."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the states of torch's generators to those of ``rng_states_by_device_type``."""
    torch.set_rng_state(states["cpu"].clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)


def state_tensors_and_record(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and record of a ``SavedState``: trained parameters, optimizer and buffers; nothing is copied."""
    tensors = {
        f"buffers.{name}": buffer for name, buffer in current_buffers_by_name(unwrap_data_parallel(model)).items()
    }
    numbers: dict[str, Any] = {}
    for name, parameter in named_trainable_parameters(model).items():
        tensors[f"parameters.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                numbers[f"{name}.{key}"] = value
    return tensors, {"optimizer": numbers}


def load_model_and_optimizer_state(saved: SavedState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what ``state_tensors_and_record`` returned into a model and its optimizer.

    Raises:
        ValueError: the state is of other parameters; nothing was changed.
    """
    model_parameters, parameters = named_trainable_parameters(model), saved.tensors_with_prefix("parameters")
    buffers, saved_buffers = (
        current_buffers_by_name(unwrap_data_parallel(model)),
        saved.tensors_with_prefix("buffers"),
    )
    shapes, others = (
        {name: tuple(tensor.shape) for name, tensor in group.items()}
        for group in ({**model_parameters, **buffers}, {**parameters, **saved_buffers})
    )
    if shapes != others:
        name = min(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
        raise ValueError(
            f"the state has {short_repr(name)} of shape {short_repr(others.get(name))}, and the model one of "
            f"{short_repr(shapes.get(name))}: go on with the model that the run was started with"
        )
    states: dict[str, dict[str, Any]] = {name: {} for name in model_parameters}
    for full, value in saved.tensors_with_prefix("optimizer").items():
        name, _, key = full.rpartition(".")
        states[name][key] = value.clone()
    for full, number in saved.record["optimizer"].items():
        name, _, key = full.rpartition(".")
        states[name][key] = number
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(saved_buffers[name])
        for name, parameter in model_parameters.items():
            parameter.copy_(parameters[name])
            if states[name]:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) and key != "step" else value
                    for key, value in states[name].items()
                }


def named_trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name, without the prefix that a DDP or FSDP wrapper adds."""
    return {
        name: parameter
        for name, parameter in unwrap_data_parallel(model).named_parameters()
        if parameter.requires_grad
    }


def trainable_parameters_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: parameters, and buffers such as the running statistics of BatchNorm."""
    return {**named_trainable_parameters(model), **current_buffers_by_name(unwrap_data_parallel(model))}
