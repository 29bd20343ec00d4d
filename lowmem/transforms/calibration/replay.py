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

from lowmem.errors import describe, unwritable
from lowmem.transforms.calibration.blocks import Unit
from lowmem.transforms.calibration.moments import Inputs, Moments, Regroup, counted_rows
from lowmem.transforms.calibration.runs import Stop, computing, hooked, run_batch
from lowmem.transforms.registry import layer_name

_SAMPLED = 512  # numbers of each tensor that are compared, evenly spread
_SHARE = 0.01  # of these, which may differ: a model may add up in another order at each run


class Stale(BaseException):
    """A model has read an output of a block that was no longer kept."""


class Replay(ExitStack):
    """A model of which some blocks are done: inside a ``with`` statement they return their outputs of the last run.

    Args:
        model: in ``evaluation_mode``.
        lists: the blocks, by the list that holds them, each in the order of their calls.
        offload: a folder for what is kept; None: memory.
        keep_all: whether the outputs of all blocks are kept, and not only the last of each list.

    Attributes:
        has_dropped: whether a model that computes NaN may have read an output that is no longer kept.
    """

    def __init__(
        self, model: nn.Module, lists: Iterable[list[nn.Module]], offload: Path | None, keep_all: bool
    ) -> None:
        super().__init__()
        self._model, self._keep_all = model, keep_all
        self._list = {block: number for number, blocks in enumerate(lists) for block in blocks}
        self._last: dict[int, nn.Module] = {}  # the last block of each list that is done
        self._kept: dict[nn.Module, dict[int, Any]] = {}
        self.has_dropped = False
        self._run = 0  # the number of the batch
        self._stale: dict[int, Any] = {}  # of this run, by list: an output that is NaN throughout
        self._folder: Path | None = None
        if offload is not None:
            if offload.is_file():
                raise NotADirectoryError(f"offload={str(offload)!r} is a file: name a folder")
            offload.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix="hidden-states-", dir=offload)
            self._folder = Path(self.enter_context(made))
        self.callback(self._kept.clear)

    def run(self, number: int, batch: Any) -> None:
        """Run a batch, until a hook raises ``Stop``."""
        self._run = number
        self._stale.clear()
        with suppress(Stop):
            run_batch(self._model, batch)

    @contextmanager
    def ending_at(self, block: nn.Module, keep: Callable[[Any], None] = lambda output: None) -> Iterator[None]:
        """End runs inside the ``with`` when this block has computed its output, and give that to ``keep``."""
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            keep(own(*args, **kwargs))
            raise Stop

        with computing(block, forward):
            yield

    def finish(self, block: nn.Module, batches: Iterable[Any]) -> None:
        """Compute a block's outputs and keep them: from now on it returns them.

        Raises:
            Stale: the block has read an output that was not kept.
        """
        kept = self._kept[block] = {}
        before = self._last.get(self._list[block])

        def keep(output: Any) -> None:
            if self.has_dropped and _holds_nan(output):
                raise Stale
            kept[self._run] = _Output(output, self._folder)
            if before is not None and not self._keep_all:
                self._kept[before].pop(self._run, None)
                self.has_dropped = True

        with self.ending_at(block, keep):
            for number, batch in enumerate(batches):
                self.run(number, batch)
        self._last[self._list[block]] = block
        self.enter_context(computing(block, lambda *args, **kwargs: self._output(block)))

    def moments(
        self, unit: Unit, batches: Iterable[Any], centred: set[nn.Module]
    ) -> tuple[dict[nn.Module, Moments], list[list[nn.Module]]]:
        """Return the moments of a unit's inputs by the first layer that gets them, and the layers that do.

        Of the layers in ``centred`` the mean is taken off.
        """
        alone: set[nn.Module] = set()
        layers = unit.layers if unit.block is not None else unit.layers[:1]
        while True:
            inputs = Inputs(layers, centred, alone, stop_after=unit.calls if unit.block is None else None)
            ending = nullcontext() if unit.block is None else self.ending_at(unit.block)
            try:
                with inputs.taken(), ending:
                    for number, batch in enumerate(batches):
                        inputs.start_batch(counted_rows(batch, number))
                        self.run(number, batch)
                groups = inputs.groups()
            except Regroup:
                continue
            return inputs.moments, groups if unit.block is not None or not groups else [unit.layers]

    def _output(self, block: nn.Module) -> Any:
        if self._run in self._kept[block]:
            return self._kept[block][self._run].copy()
        number = self._list[block]
        if number not in self._stale:
            latest = self._kept[self._last[number]].get(self._run)
            if latest is None:
                raise ValueError(
                    f"batch {self._run + 1} of batches is another one than before, or the model took another way "
                    "through its blocks: pass batches that are the same at each iteration, or blocks=() to calibrate "
                    "layer by layer"
                )
            self._stale[number] = pytree.tree_map(_nan, latest.copy())
        return self._stale[number]


class _Output:
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
                raise unwritable(folder.parent, reason) from reason
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


def _nan(leaf: Any) -> Any:
    return leaf.fill_(torch.nan) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _holds_nan(output: Any) -> bool:
    leaves = pytree.tree_leaves(output)
    return any(bool(x.isnan().any()) for x in leaves if isinstance(x, Tensor) and x.is_floating_point())


@contextmanager
def noted_inputs(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Yield what modules get when they are first called inside the block: some numbers of each tensor."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in seen:
            seen[module] = [_sampled(one) for one in _tensors(args, kwargs)]

    with hooked(modules, note):
        yield seen


def way_to_replay(
    model: nn.Module,
    batch: Any,
    lists: Iterable[list[nn.Module]],
    units: Sequence[Unit],
    entries: dict[nn.Module, list[Tensor]],
    offload: Path | None,
) -> tuple[bool | None, str]:
    """Return whether ``Replay`` has to keep the outputs of all blocks; None, and why, if that is not enough.

    Each block is run once, and none of its layers changes. A model of which no two runs are alike passes. ``entries``
    are the ``noted_inputs`` of the model's own run on the batch.
    """
    why = ""
    for keep_all in (False, True):
        with Replay(model, lists, offload, keep_all) as replay:
            try:
                why = _difference(model, batch, replay, units, entries)
            except Stale:
                continue
            except Exception as error:  # noqa: BLE001 - the model's own: it misses what a block would have left
                why = describe(error)
            if not why:
                return keep_all, ""
    with noted_inputs(entries) as again:
        run_batch(model, batch)
    return (False, "") if any(_differ(entries[one], found) for one, found in again.items()) else (None, why)


def _difference(
    model: nn.Module, batch: Any, replay: Replay, units: Sequence[Unit], entries: dict[nn.Module, list[Tensor]]
) -> str:
    """Return which unit gets other inputs in a replay, "" if none does; Stale if a unit gets NaN instead."""
    paths = {module: path for path, module in model.named_modules()}
    for unit in units:
        first = unit.layers[0] if unit.block is None else unit.block
        if first not in entries:
            continue
        with noted_inputs([first]) as found:
            if unit.block is None:
                with hooked([first], _stop):
                    replay.run(0, batch)
            else:
                replay.finish(unit.block, [batch])
        got = found.get(first, [])
        if not _differ(entries[first], got):
            continue
        if replay.has_dropped and any(bool(one.isnan().any()) for one in got):
            raise Stale
        return f"{layer_name(paths[first])} gets other inputs where blocks before it are not run"
    return ""


def _stop(*_: Any) -> None:
    raise Stop


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors in arguments, and in tuples, lists and dictionaries of them; caches are left out."""

    def is_leaf(value: Any) -> bool:
        return not isinstance(value, tuple | list | dict)

    return [leaf for leaf in pytree.tree_leaves((args, kwargs), is_leaf=is_leaf) if isinstance(leaf, Tensor)]


def _sampled(tensor: Tensor) -> Tensor:
    """Return some numbers of a tensor, evenly spread, as float64 on the CPU."""
    flat = tensor.detach().reshape(-1)
    numbers = torch.arange(min(_SAMPLED, len(flat)), dtype=torch.int64, device=flat.device)
    return flat[numbers * len(flat) // max(1, len(numbers))].to("cpu", torch.float64)


def _differ(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether more numbers differ than rounding explains."""
    if [one.shape for one in expected] != [one.shape for one in found]:
        return True
    return any(_changed(*both) > _SHARE * both[0].numel() for both in zip(expected, found, strict=True))


def _changed(expected: Tensor, found: Tensor) -> int:
    typical = expected.abs().nanmedian() if expected.numel() else expected.sum()
    same = (found - expected).abs() <= 1e-4 * (expected.abs() + typical)
    same |= (found == expected) | (found.isnan() & expected.isnan())
    return int(same.numel() - same.sum())
