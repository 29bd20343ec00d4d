"""Runs a model up to one of its blocks, where the blocks before it return what they returned the last time, or NaN
where that is not kept, which shows where a model reads it after all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowmem.errors import error_type_and_first_line, unwritable_file_error
from lowmem.transforms.calibration.calibration_units import CalibrationUnit
from lowmem.transforms.calibration.input_moments import (
    InputMomentCollector,
    RegroupingNeeded,
    RunningMoments,
    unpadded_token_mask_or_none,
)
from lowmem.transforms.calibration.model_runs import (
    StopModelRun,
    registered_forward_pre_hooks,
    replaced_forward,
    run_batch,
)
from lowmem.transforms.module_registry import layer_display_name

# Numbers of each tensor that are compared, evenly spread
_SAMPLED = 512
_SHARE = 0.01  # of these, which may differ: a model may add up in another order at each run


class DroppedOutputRead(BaseException):
    """A model has read an output of a block that was no longer kept."""


class BlockReplay(ExitStack):
    """A model of which some blocks are done: inside a ``with`` statement they return their outputs of the last run.

    Args:
        model: in ``evaluation_without_gradients``.
        block_lists: the blocks, by the list that holds them, each in the order of their calls.
        offload_folder: a folder for what is kept; None: memory.
        keep_all_outputs: whether the outputs of all blocks are kept, and not only the last of each list.

    Attributes:
        has_dropped: whether a model that computes NaN may have read an output that is no longer kept.
    """

    def __init__(
        self,
        model: nn.Module,
        block_lists: Iterable[list[nn.Module]],
        offload_folder: Path | None,
        keep_all_outputs: bool,
    ) -> None:
        super().__init__()
        self._model, self._keep_all = model, keep_all_outputs
        self._list = {block: number for number, blocks in enumerate(block_lists) for block in blocks}
        # The last block of each list that is done
        self._last: dict[int, nn.Module] = {}
        self._cached_outputs: dict[nn.Module, dict[int, Any]] = {}
        self.has_dropped = False
        # The number of the batch
        self._run = 0
        self._stale: dict[int, Any] = {}  # of this run, by list: an output that is NaN throughout
        self._folder: Path | None = None
        if offload_folder is not None:
            if offload_folder.is_file():
                raise NotADirectoryError(f"offload={str(offload_folder)!r} is a file: name a folder")
            offload_folder.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix="hidden-states-", dir=offload_folder)
            self._folder = Path(self.enter_context(made))
        self.callback(self._cached_outputs.clear)

    def run_batch_until_stop(self, batch_index: int, batch: Any) -> None:
        """Run a batch, until a hook raises ``StopModelRun``."""
        self._run = batch_index
        self._stale.clear()
        with suppress(StopModelRun):
            run_batch(self._model, batch)

    @contextmanager
    def runs_stopped_after(
        self, block: nn.Module, on_output: Callable[[Any], None] = lambda output: None
    ) -> Iterator[None]:
        """End runs inside the ``with`` when this block has computed its output, and give that to ``on_output``."""
        original_forward = block.forward

        def forward_and_stop(*args: Any, **kwargs: Any) -> Any:
            on_output(original_forward(*args, **kwargs))
            raise StopModelRun

        with replaced_forward(block, forward_and_stop):
            yield

    def cache_and_replay_block(self, block: nn.Module, batches: Iterable[Any]) -> None:
        """Compute a block's outputs and keep them: from now on it returns them.

        Raises:
            DroppedOutputRead: the block has read an output that was not kept.
        """
        block_outputs = self._cached_outputs[block] = {}
        before = self._last.get(self._list[block])

        def cache_output_and_drop_previous(output: Any) -> None:
            if self.has_dropped and _has_nan(output):
                raise DroppedOutputRead
            block_outputs[self._run] = _CachedOutput(output, self._folder)
            if before is not None and not self._keep_all:
                self._cached_outputs[before].pop(self._run, None)
                self.has_dropped = True

        with self.runs_stopped_after(block, cache_output_and_drop_previous):
            for number, batch in enumerate(batches):
                self.run_batch_until_stop(number, batch)
        self._last[self._list[block]] = block
        self.enter_context(replaced_forward(block, lambda *args, **kwargs: self._cached_output_or_nan(block)))

    def collect_input_moments_and_groups(
        self, unit: CalibrationUnit, batches: Iterable[Any], centered_layers: set[nn.Module]
    ) -> tuple[dict[nn.Module, RunningMoments], list[list[nn.Module]]]:
        """Return the moments of a unit's inputs by the first layer that gets them, and the layers that do.

        Of the layers in ``centered_layers`` the mean is taken off.
        """
        alone: set[nn.Module] = set()
        layers = unit.layers if unit.block is not None else unit.layers[:1]
        while True:
            inputs = InputMomentCollector(
                layers, centered_layers, alone, stop_after=unit.calls if unit.block is None else None
            )
            ending = nullcontext() if unit.block is None else self.runs_stopped_after(unit.block)
            try:
                with inputs.collecting_inputs(), ending:
                    for number, batch in enumerate(batches):
                        inputs.start_batch(unpadded_token_mask_or_none(batch, number))
                        self.run_batch_until_stop(number, batch)
                groups = inputs.layer_groups_by_input_or_raise()
            except RegroupingNeeded:
                continue
            return inputs.moments, groups if unit.block is not None or not groups else [unit.layers]

    def _cached_output_or_nan(self, block: nn.Module) -> Any:
        if self._run in self._cached_outputs[block]:
            return self._cached_outputs[block][self._run].copy()
        number = self._list[block]
        if number not in self._stale:
            latest = self._cached_outputs[self._last[number]].get(self._run)
            if latest is None:
                raise ValueError(
                    f"batch {self._run + 1} of batches is another one than before, or the model took another way "
                    "through its blocks: pass batches that are the same at each iteration, or blocks=() to calibrate "
                    "layer by layer"
                )
            self._stale[number] = pytree.tree_map(_fill_with_nan, latest.copy())
        return self._stale[number]


class _CachedOutput:
    """What a block returned for a batch: tensors in any structure, in memory or in a file."""

    def __init__(self, output: Any, folder: Path | None) -> None:
        self._leaves, self._structure = pytree.tree_flatten(output)
        self._path: Path | None = None
        tensors = {str(number): leaf for number, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)}
        self._devices = {name: tensor.device for name, tensor in tensors.items()}
        if folder is not None and tensors:
            from safetensors import SafetensorError
            from safetensors.torch import save_file

            self._path = folder / f"{id(self):x}.safetensors"
            try:
                save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, self._path)
            except (OSError, SafetensorError) as reason:
                raise unwritable_file_error(folder.parent, reason) from reason
            self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]

    def copy(self) -> Any:
        """Return the output anew: a model may write to what its blocks return."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        if self._path is not None:
            from safetensors.torch import load_file

            for name, tensor in load_file(self._path).items():
                leaves[int(name)] = tensor.to(self._devices[name])
        return pytree.tree_unflatten(leaves, self._structure)

    def __del__(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _fill_with_nan(leaf: Any) -> Any:
    return leaf.fill_(torch.nan) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _has_nan(output: Any) -> bool:
    leaves = pytree.tree_leaves(output)
    return any(bool(x.isnan().any()) for x in leaves if isinstance(x, Tensor) and x.is_floating_point())


@contextmanager
def recording_first_input_samples(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Yield what modules get when they are first called inside the block: some numbers of each tensor."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def record_first_input_sample(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in seen:
            seen[module] = [
                _evenly_spaced_sample(tensor) for tensor in _argument_tensors_outside_caches(args, kwargs)
            ]

    with registered_forward_pre_hooks(modules, record_first_input_sample):
        yield seen


def keep_all_outputs_and_refusal(
    model: nn.Module,
    batch: Any,
    block_lists: Iterable[list[nn.Module]],
    units: Sequence[CalibrationUnit],
    expected_inputs: dict[nn.Module, list[Tensor]],
    offload_folder: Path | None,
) -> tuple[bool | None, str]:
    """Return whether ``BlockReplay`` has to keep the outputs of all blocks; None, and why, if that is not enough.

    Each block is run once, and none of its layers changes. A model of which no two runs are alike passes.
    ``expected_inputs`` are the ``recording_first_input_samples`` of the model's own run on the batch.
    """
    why = ""
    for keep_all in (False, True):
        with BlockReplay(model, block_lists, offload_folder, keep_all) as replay:
            try:
                why = _replay_and_describe_changed_input(model, batch, replay, units, expected_inputs)
            except DroppedOutputRead:
                continue
            except Exception as error:  # noqa: BLE001 - the model's own: it misses what a block would have left
                why = error_type_and_first_line(error)
            if not why:
                return keep_all, ""
    with recording_first_input_samples(expected_inputs) as again:
        run_batch(model, batch)
    return (
        (False, "")
        if any(
            _are_different_beyond_rounding(expected_inputs[module], second_inputs)
            for module, second_inputs in again.items()
        )
        else (None, why)
    )


def _replay_and_describe_changed_input(
    model: nn.Module,
    batch: Any,
    replay: BlockReplay,
    units: Sequence[CalibrationUnit],
    expected_inputs: dict[nn.Module, list[Tensor]],
) -> str:
    """Return which unit gets other inputs in a replay, "" if none does; DroppedOutputRead if a unit gets NaN."""
    paths = {module: path for path, module in model.named_modules()}
    for unit in units:
        first = unit.layers[0] if unit.block is None else unit.block
        if first not in expected_inputs:
            continue
        with recording_first_input_samples([first]) as actual_inputs:
            if unit.block is None:
                with registered_forward_pre_hooks([first], _raise_stop_hook):
                    replay.run_batch_until_stop(0, batch)
            else:
                replay.cache_and_replay_block(unit.block, [batch])
        got = actual_inputs.get(first, [])
        if not _are_different_beyond_rounding(expected_inputs[first], got):
            continue
        if replay.has_dropped and any(bool(tensor.isnan().any()) for tensor in got):
            raise DroppedOutputRead
        return f"{layer_display_name(paths[first])} gets other inputs where blocks before it are not run"
    return ""


def _raise_stop_hook(*_: Any) -> None:
    raise StopModelRun


def _argument_tensors_outside_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors in arguments, and in tuples, lists and dictionaries of them; caches are left out."""

    def is_leaf(value: Any) -> bool:
        return not isinstance(value, tuple | list | dict)

    return [leaf for leaf in pytree.tree_leaves((args, kwargs), is_leaf=is_leaf) if isinstance(leaf, Tensor)]


def _evenly_spaced_sample(tensor: Tensor) -> Tensor:
    """Return some numbers of a tensor, evenly spread, as float64 on the CPU."""
    flat = tensor.detach().reshape(-1)
    numbers = torch.arange(min(_SAMPLED, len(flat)), dtype=torch.int64, device=flat.device)
    return flat[numbers * len(flat) // max(1, len(numbers))].to("cpu", torch.float64)


def _are_different_beyond_rounding(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    """Whether more numbers differ than rounding explains."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return True
    return any(
        _count_changed_beyond_rounding(*both) > _SHARE * both[0].numel()
        for both in zip(expected, actual, strict=True)
    )


def _count_changed_beyond_rounding(expected: Tensor, actual: Tensor) -> int:
    typical = expected.abs().nanmedian() if expected.numel() else expected.sum()
    same = (actual - expected).abs() <= 1e-4 * (expected.abs() + typical)
    same |= (actual == expected) | (actual.isnan() & expected.isnan())
    return int(same.numel() - same.sum())
