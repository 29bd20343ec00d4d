"""Checks that blocks get the same when those before them return what they returned, and are not run.

A block may read more than what those before it return: a dictionary that they write to, a tensor that they change in
place, keys and values that they leave in a cache for it. ``Replay`` would hand it something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowmem.errors import describe
from lowmem.transforms.calibration.batches import run_batch
from lowmem.transforms.calibration.blocks import Unit
from lowmem.transforms.calibration.replay import Overrides, Replay, Stale, Stop
from lowmem.transforms.registry import layer_name

__all__ = ["Entries", "way_to_replay"]

_SAMPLED = 512  # numbers of each tensor that are compared, evenly spread
_SHARE = 0.01  # of these, which may differ: a model may add up in another order at each run


class Entries:
    """What modules get when they are first called in a run: some numbers of each tensor.

    Args:
        modules: blocks, and layers outside of them.

    Attributes:
        seen: by the module.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self.seen: dict[nn.Module, list[Tensor]] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what they get in the ``with`` block."""
        handles = [one.register_forward_pre_hook(self._note, with_kwargs=True) for one in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self.seen:
            self.seen[module] = [_sampled(one) for one in _tensors(args, kwargs)]


def way_to_replay(
    model: nn.Module,
    batch: Any,
    overrides: Overrides,
    lists: Iterable[list[nn.Module]],
    units: Sequence[Unit],
    entries: Entries,
    offload: Path | None,
) -> tuple[bool | None, str]:
    """Return whether ``Replay`` has to keep the outputs of all blocks; None, and why, if that is not enough.

    Each block is run once, and none of its layers changes. A model of which no two runs are alike passes.

    Args:
        model: in ``evaluation_mode``.
        batch: an input of it.
        overrides: as that yields.
        lists: its blocks.
        units: in the order of their calls.
        entries: of the model's own run on the batch.
        offload: a folder for what blocks return; None: memory.
    """
    why = ""
    for keep_all in (False, True):
        with Replay(model, overrides, lists, offload, keep_all) as replay:
            try:
                why = _difference(model, batch, replay, units, entries)
            except Stale:
                continue
            except Exception as error:  # noqa: BLE001 - the model's own: it misses what a block would have left
                why = describe(error)
            if not why:
                return keep_all, ""
    again = Entries(entries.seen)
    with again.noted():
        run_batch(model, batch)
    if any(_differ(entries.seen[module], found) for module, found in again.seen.items()):
        return False, ""
    return None, why


def _difference(model: nn.Module, batch: Any, replay: Replay, units: Sequence[Unit], entries: Entries) -> str:
    """Return which unit gets other inputs in a replay; "" if none does.

    Raises:
        Stale: it gets NaN in their place, as where it reads what is not kept.
    """
    paths = {module: path for path, module in model.named_modules()}
    for unit in units:
        first = unit.layers[0] if unit.block is None else unit.block
        if first not in entries.seen:
            continue
        found = Entries([first])
        with found.noted():
            if unit.block is None:
                with _ending_before(first):
                    replay.run(0, batch)
            else:
                replay.finish(unit.block, [batch])
        expected, got = entries.seen[first], found.seen.get(first, [])
        if not _differ(expected, got):
            continue
        if replay.has_dropped and any(bool(one.isnan().any()) for one in got):
            raise Stale
        return f"{layer_name(paths[first])} gets other inputs where blocks before it are not run"
    return ""


@contextmanager
def _ending_before(layer: nn.Module) -> Iterator[None]:
    """End runs where a layer is called."""

    def stop(*_: Any) -> None:
        raise Stop

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors in arguments, and in tuples, lists and dictionaries of them: caches are let be."""

    def is_leaf(value: Any) -> bool:
        return not isinstance(value, tuple | list | dict)

    return [leaf for leaf in pytree.tree_leaves((args, kwargs), is_leaf=is_leaf) if isinstance(leaf, Tensor)]


def _sampled(tensor: Tensor) -> Tensor:
    """Return some numbers of a tensor, evenly spread, as float64 on the CPU."""
    flat = tensor.detach().reshape(-1)
    numbers = torch.arange(min(_SAMPLED, len(flat)), device=flat.device)
    return flat[numbers * len(flat) // max(1, len(numbers))].to("cpu", torch.float64)


def _differ(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether more numbers differ than rounding explains."""
    if [one.shape for one in expected] != [one.shape for one in found]:
        return True
    return any(_changed(*both) > _SHARE * both[0].numel() for both in zip(expected, found, strict=True))


def _changed(expected: Tensor, found: Tensor) -> int:
    """Return how many numbers are others."""
    typical = expected.abs().nanmedian() if expected.numel() else expected.sum()
    same = (found - expected).abs() <= 1e-4 * (expected.abs() + typical)
    same |= (found == expected) | (found.isnan() & expected.isnan())
    return int(same.numel() - same.sum())
