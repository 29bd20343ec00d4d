"""Finds the blocks of a model, and the order in which it calls them and the linear layers outside of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lowmem.errors import show
from lowmem.transforms.calibration.moments import FirstReaders
from lowmem.transforms.calibration.runs import hooked, run_batch
from lowmem.transforms.registry import layer_name


@dataclass
class Unit:
    """Layers that are quantized together: those of a block, or some outside of blocks (None) that get one input.

    ``calls`` counts the calls of the first layer in one run of the model; 0: unknown.
    """

    layers: list[nn.Module] = field(default_factory=list)
    block: nn.Module | None = None
    calls: int = 0


def find_blocks(
    model: nn.Module, layers: Collection[nn.Module], blocks: str | Iterable[str] | None
) -> list[list[nn.Module]]:
    """Return the blocks of a model, by the module that holds them: what the glob patterns ``blocks`` name, if given.

    Else they are the children that hold ``layers`` of the outermost nn.ModuleList or nn.Sequential in which these
    children, two at least, are of one type.
    """
    holds = {module for module in model.modules() if any(inside in layers for inside in module.modules())}
    if blocks is None:
        return list(_lists_in(model, holds))
    patterns = (blocks,) if isinstance(blocks, str) or not isinstance(blocks, Iterable) else tuple(blocks)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"blocks={show(blocks)} must be glob patterns of paths, or None")
    found: dict[str, list[nn.Module]] = {}
    outer: list[str] = []
    for pattern in patterns:
        if not any(module in holds and fnmatchcase(path, pattern) for path, module in model.named_modules()):
            raise ValueError(
                f"blocks={show(pattern)} matches no module of {type(model).__name__} that holds layers to calibrate; "
                "check the pattern"
            )
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{one}.") for one in outer)
        if path and module in holds and not inside and any(fnmatchcase(path, pattern) for pattern in patterns):
            outer.append(path)
            found.setdefault(path.rpartition(".")[0], []).append(module)
    return list(found.values())


def _lists_in(module: nn.Module, holds: Collection[nn.Module]) -> Iterator[list[nn.Module]]:
    children = [child for child in module.children() if child in holds]
    alike = len(children) > 1 and len({type(child) for child in children}) == 1
    if alike and isinstance(module, nn.ModuleList | nn.Sequential):
        yield children
        return
    for child in children:
        yield from _lists_in(child, holds)


def units_of(
    model: nn.Module,
    batches: Iterable[Any],
    layers: list[nn.Module],
    lists: list[list[nn.Module]],
    centred: Collection[nn.Module],
    *,
    asked: bool,
) -> list[Unit]:
    """Return the layers to quantize together, in the order in which the model calls them.

    Without blocks (``lists``) all batches are run, once; with them, the first one, and layers outside of blocks that
    it does not reach follow, each alone. ``centred`` layers share moments among themselves alone. Blocks that are
    called several times, or have layers that are called outside, are a ValueError where the user ``asked`` for them.
    """
    if lists:
        units, reason = _units_by_blocks(model, next(iter(batches)), layers, lists, centred)
        if reason is None:
            return units
        if asked:
            raise ValueError(f"{reason}: name other blocks, or blocks=() to calibrate layer by layer")
    groups, calls, _ = _group_by_input(model, batches, layers, centred)
    return [Unit(group, None, calls[group[0]]) for group in groups]


def _units_by_blocks(
    model: nn.Module,
    batch: Any,
    layers: list[nn.Module],
    lists: list[list[nn.Module]],
    centred: Collection[nn.Module],
) -> tuple[list[Unit], str | None]:
    """Return the units of a model with blocks; or why it has none."""
    paths = {module: path for path, module in model.named_modules()}
    owner: dict[nn.Module, nn.Module] = {}
    for block in (block for blocks in lists for block in blocks):
        for layer in (inside for inside in block.modules() if inside in layers):
            if owner.setdefault(layer, block) is not block:
                return [], f"{layer_name(paths[layer])} is in several blocks"
    called: Counter[nn.Module] = Counter()
    now: list[nn.Module] = []
    order: dict[nn.Module, None] = {}
    outside: list[nn.Module] = []

    def enter(block: nn.Module, *_: Any) -> None:
        called[block] += 1
        now.append(block)
        order.setdefault(block)

    def leave(block: nn.Module, *_: Any) -> None:
        now.pop()

    def see(layer: nn.Module, *_: Any) -> None:
        if owner[layer] not in now:
            outside.append(layer)

    free = [layer for layer in layers if layer not in owner]
    inner = dict.fromkeys(owner.values())
    with ExitStack() as stack, hooked(inner, enter), hooked(owner, see):
        for block in inner:
            stack.callback(block.register_forward_hook(leave).remove)
        groups, calls, seen = _group_by_input(model, [batch], free, centred, order)
    if outside:
        return [], f"{layer_name(paths[outside[0]])} is called outside of its block, too"
    often = next((block for block, count in called.items() if count > 1), None)
    if often is not None:
        return [], f"{layer_name(paths[often])} is called {called[often]} times in one run"
    of_leader = {group[0]: group for group in groups}
    units = []
    for module in order:
        if module in called:
            units.append(Unit([layer for layer, block in owner.items() if block is module], module))
        elif module in of_leader:
            units.append(Unit(of_leader[module], None, calls[module]))
    return [*units, *(Unit([layer]) for layer in free if layer not in seen)], None


def _group_by_input(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Iterable[nn.Module],
    centred: Collection[nn.Module],
    order: dict[nn.Module, None] | None = None,
) -> tuple[list[list[nn.Module]], Counter[nn.Module], set[nn.Module]]:
    """Return groups of layers with the same inputs, in call order; their most calls in a run; and all called."""
    total, most, now = (Counter[nn.Module]() for _ in range(3))
    first: dict[nn.Module, set[nn.Module]] = {}  # for each layer, the first layers that got its inputs
    readers = FirstReaders()

    def see(layer: nn.Module, args: Any, kwargs: Any) -> None:
        first.setdefault(layer, set()).add(readers.of(layer, args, kwargs, layer in centred)[1])
        now[layer] += 1
        if order is not None:
            order.setdefault(layer)

    with hooked(layers, see):
        for batch in batches:
            run_batch(model, batch)
            total += now
            most |= now  # element-wise maximum
            now.clear()
            readers = FirstReaders()
    groups: dict[nn.Module, list[nn.Module]] = {}
    for layer, leaders in first.items():
        leader = next(iter(leaders))
        together = len(leaders) == 1 and leader in groups and total[leader] == total[layer]
        groups.setdefault(leader if together else layer, []).append(layer)
    return list(groups.values()), most, set(first)
