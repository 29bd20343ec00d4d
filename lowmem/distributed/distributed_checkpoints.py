"""The states of a run in several processes: files of whole values, which any number of processes reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lowmem.finetuning.training_state import SavedState, States, named_trainable_parameters


class DistributedCheckpoints(States):
    """The states of a run in a folder that all processes see. All of them call each method but ``wait`` and ``kept``.

    Args:
        folder: is created by the first ``save``; it may hold states of one process, or of any number.
        origin: what the run was started with, as JSON: a state of another run is an error.
        may_differ: keys of ``origin`` whose values may differ from those in the state.
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
        self._group: Any = distributed.new_group(backend="gloo", timeout=timeout)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def newest(self, model: nn.Module | None = None) -> SavedState | None:
        """Return the newest undamaged state, or None if there is no state.

        Args:
            model: this process gets its own part of the values of the model's sharded parameters; None: all values
                are returned whole.

        Raises:
            FileError: all states are damaged, or the newest is of another run: the first difference is named.
            OSError: a file cannot be read.
        """
        saved = super().newest()
        if saved is None:
            return None
        rank, tensors = distributed.get_rank(), saved.tensors
        local_tensors = {
            name: tensors.get(_name_with_rank_if_random_state(name, rank), value) for name, value in tensors.items()
        }
        return SavedState(saved.step, _local_shards_or_same_tensors(local_tensors, model), saved.record)

    def save(self, saved: SavedState) -> None:
        """Begin to write a state in place of the older of the two.

        Raises:
            OSError: the state before cannot be written; the one before that is kept.
        """
        self.wait_for_last_save()
        tensors = self._random_states_of_all_ranks(saved.tensors) | _whole_tensors_on_rank_zero(saved.tensors)
        if distributed.get_rank() == 0:
            self._writing = self._writer.submit(super().save, SavedState(saved.step, tensors, saved.record))

    def wait_for_last_save(self) -> None:
        """Wait until the last state is complete.

        Raises:
            OSError: it cannot be written; the one before is kept.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def kept(self) -> str:
        """Return a text that says which state exists, when the last one is complete, and why it is not."""
        if distributed.get_rank() > 0:
            return "rank 0 says which state is kept"
        try:
            self.wait_for_last_save()
        except OSError as error:
            return f"{super().kept()}; a later one: {error}"
        return super().kept()

    def remove(self) -> None:
        """Remove the folder after the end of the run.

        Raises:
            OSError: it cannot be removed, or the last state could not be written.
        """
        self.wait_for_last_save()
        distributed.barrier(self._group)
        if distributed.get_rank() == 0:
            super().remove()

    def _random_states_of_all_ranks(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the random states among ``tensors`` of all processes, by their names with the rank."""
        gathered: dict[str, Tensor] = {}
        for name, own_state in tensors.items():
            if name.startswith("random."):
                states = [torch.empty_like(own_state) for _ in range(distributed.get_world_size())]
                distributed.all_gather(states, own_state, group=self._group)
                gathered |= {_name_with_rank_if_random_state(name, rank): state for rank, state in enumerate(states)}
        return gathered


def _whole_tensors_on_rank_zero(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, in the first process, copies of the whole values on the CPU, without random states; {} in others."""
    whole_tensors: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not name.startswith("random."):
            sharded: Any = value
            whole: Tensor = sharded.full_tensor() if hasattr(value, "full_tensor") else value
            if distributed.get_rank() == 0:
                whole_tensors[name] = whole.to("cpu", copy=True)
    return whole_tensors


def _local_shards_or_same_tensors(tensors: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """Return this process's parts of whole values whose parameter is sharded, and the others as they are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters: dict[str, Any] = {} if model is None else named_trainable_parameters(model)
    local_tensors = {}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        owner = rest.rpartition(".")[0] if group == "optimizer" else rest if group in ("parameters", "best") else ""
        parameter = parameters.get(owner)
        if isinstance(parameter, DTensor) and parameter.shape == value.shape:
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        local_tensors[name] = value
    return local_tensors


def _name_with_rank_if_random_state(tensor_name: str, rank: int) -> str:
    """Return the name of a process's own tensor in a state: those of the first one are as of one process."""
    return f"{tensor_name}@{rank}" if rank and tensor_name.startswith("random.") else tensor_name
