"""Finds the blocks of a model, and the order in which it calls them and the linear layers outside of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lowmem.errors import short_repr
from lowmem.transforms.calibration.input_moments import SharedInputTracker
from lowmem.transforms.calibration.model_runs import registered_forward_pre_hooks, run_batch
from lowmem.transforms.module_registry import layer_display_name


@dataclass
class CalibrationUnit:
    """Layers that are quantized together: those of a block, or some outside of blocks (None) that get one input.

    ``calls`` counts the calls of the first layer in one run of the model; 0: unknown.
    """

    layers: list[nn.Module] = field(default_factory=list)
    block: nn.Module | None = None
    calls: int = 0


def select_block_lists(
    model: nn.Module, layers: Collection[nn.Module], path_patterns: str | Iterable[str] | None
) -> list[list[nn.Module]]:
    """Return the blocks of a model, by the module that holds them: what the glob patterns ``path_patterns`` name, if
    given.

    Else they are the children that hold ``layers`` of the outermost nn.ModuleList or nn.Sequential in which these
    children, two at least, are of one type.
    """
    holds = {module for module in model.modules() if any(inside in layers for inside in module.modules())}
    if path_patterns is None:
        return list(_iterate_repeated_children_with_layers(model, holds))
    patterns = (
        (path_patterns,)
        if isinstance(path_patterns, str) or not isinstance(path_patterns, Iterable)
        else tuple(path_patterns)
    )
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"blocks={short_repr(path_patterns)} must be glob patterns of paths, or None")
    lists_by_parent: dict[str, list[nn.Module]] = {}
    outer: list[str] = []
    for pattern in patterns:
        if not any(module in holds and fnmatchcase(path, pattern) for path, module in model.named_modules()):
            raise ValueError(
                f"blocks={short_repr(pattern)} matches no module of {type(model).__name__} that holds layers to "
                "calibrate; "
                "check the pattern"
            )
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer_path}.") for outer_path in outer)
        if path and module in holds and not inside and any(fnmatchcase(path, pattern) for pattern in patterns):
            outer.append(path)
            lists_by_parent.setdefault(path.rpartition(".")[0], []).append(module)
    return list(lists_by_parent.values())


def _iterate_repeated_children_with_layers(
    module: nn.Module, modules_with_layers: Collection[nn.Module]
) -> Iterator[list[nn.Module]]:
    children = [child for child in module.children() if child in modules_with_layers]
    alike = len(children) > 1 and len({type(child) for child in children}) == 1
    if alike and isinstance(module, nn.ModuleList | nn.Sequential):
        yield children
        return
    for child in children:
        yield from _iterate_repeated_children_with_layers(child, modules_with_layers)


def run_and_group_into_units(
    model: nn.Module,
    batches: Iterable[Any],
    layers: list[nn.Module],
    block_lists: list[list[nn.Module]],
    centered_layers: Collection[nn.Module],
    *,
    blocks_requested: bool,
) -> list[CalibrationUnit]:
    """Return the layers to quantize together, in the order in which the model calls them.

    Without blocks (``block_lists``) all batches are run, once; with them, the first one, and layers outside of
    blocks that
    it does not reach follow, each alone. ``centered_layers`` layers share moments among themselves alone. Blocks
    that are called several times, or have layers that are called outside, are a ValueError where the user
    ``blocks_requested`` for them.
    """
    if block_lists:
        units, reason = _block_units_and_refusal(model, next(iter(batches)), layers, block_lists, centered_layers)
        if reason is None:
            return units
        if blocks_requested:
            raise ValueError(f"{reason}: name other blocks, or blocks=() to calibrate layer by layer")
    groups, calls = _input_groups_and_call_counts(model, batches, layers, centered_layers)
    return [CalibrationUnit(group, None, calls[group[0]]) for group in groups]


def _block_units_and_refusal(
    model: nn.Module,
    batch: Any,
    layers: list[nn.Module],
    block_lists: list[list[nn.Module]],
    centered_layers: Collection[nn.Module],
) -> tuple[list[CalibrationUnit], str | None]:
    """Return the units of a model with blocks; or why it has none."""
    paths = {module: path for path, module in model.named_modules()}
    owner: dict[nn.Module, nn.Module] = {}
    for block in (block for blocks in block_lists for block in blocks):
        for layer in (inside for inside in block.modules() if inside in layers):
            if owner.setdefault(layer, block) is not block:
                return [], f"{layer_display_name(paths[layer])} is in several blocks"
    called: Counter[nn.Module] = Counter()
    now: list[nn.Module] = []
    order: dict[nn.Module, None] = {}
    outside: list[nn.Module] = []

    def record_block_entry(block: nn.Module, *_: Any) -> None:
        called[block] += 1
        now.append(block)
        order.setdefault(block)

    def record_block_exit(block: nn.Module, *_: Any) -> None:
        now.pop()

    def record_call_outside_block(layer: nn.Module, *_: Any) -> None:
        if owner[layer] not in now:
            outside.append(layer)

    free = [layer for layer in layers if layer not in owner]
    inner = dict.fromkeys(owner.values())
    with (
        ExitStack() as stack,
        registered_forward_pre_hooks(inner, record_block_entry),
        registered_forward_pre_hooks(owner, record_call_outside_block),
    ):
        for block in inner:
            stack.callback(block.register_forward_hook(record_block_exit).remove)
        groups, calls = _input_groups_and_call_counts(model, [batch], free, centered_layers, order)
    if outside:
        return [], f"{layer_display_name(paths[outside[0]])} is called outside of its block, too"
    often = next((block for block, count in called.items() if count > 1), None)
    if often is not None:
        return [], f"{layer_display_name(paths[often])} is called {called[often]} times in one run"
    of_leader = {group[0]: group for group in groups}
    units = []
    for module in order:
        if module in called:
            units.append(CalibrationUnit([layer for layer, block in owner.items() if block is module], module))
        elif module in of_leader:
            units.append(CalibrationUnit(of_leader[module], None, calls[module]))
    return [*units, *(CalibrationUnit([layer]) for layer in free if layer not in calls)], None


def _input_groups_and_call_counts(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Iterable[nn.Module],
    centered_layers: Collection[nn.Module],
    call_order_to_extend: dict[nn.Module, None] | None = None,
) -> tuple[list[list[nn.Module]], Counter[nn.Module]]:
    """Return groups of layers with the same inputs, in call order; and the most calls of each called one in a run."""
    total, most, now = (Counter[nn.Module]() for _ in range(3))
    # For each layer, the first layers that got its inputs
    first: dict[nn.Module, set[nn.Module]] = {}
    readers = SharedInputTracker()

    def record_layer_input(layer: nn.Module, args: Any, kwargs: Any) -> None:
        first.setdefault(layer, set()).add(
            readers.input_and_its_first_layer(layer, args, kwargs, layer in centered_layers)[1]
        )
        now[layer] += 1
        if call_order_to_extend is not None:
            call_order_to_extend.setdefault(layer)

    with registered_forward_pre_hooks(layers, record_layer_input):
        for batch in batches:
            run_batch(model, batch)
            total += now
            # Element-wise maximum
            most |= now
            now.clear()
            readers = SharedInputTracker()
    groups: dict[nn.Module, list[nn.Module]] = {}
    for layer, leaders in first.items():
        leader = next(iter(leaders))
        together = len(leaders) == 1 and leader in groups and total[leader] == total[layer]
        groups.setdefault(leader if together else layer, []).append(layer)
    return list(groups.values()), most
