"""What became of every layer: how it is stored, what that costs and loses, and why a layer was left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import printable
from lowmem.nn.fourbit import FourBit, FourBitStorage
from lowmem.nn.half import Half
from lowmem.nn.lora import Adapter, LoRA, LoRALinear
from lowmem.transforms.convert import keep_ties
from lowmem.transforms.paths import group_name, role_of
from lowmem.transforms.registry import MADE_BY, Technique, holders, layer_name, places, read_by_attention, why_left

__all__ = ["LayerSummary", "Summary", "summary"]

_NOT_CHOSEN = "not chosen: where=, skip= or never converted"


@dataclass(frozen=True)
class LayerSummary:
    """One row: a module that holds parameters of its own, or a converted layer with all that is in it.

    Attributes:
        path: the first path; "" is the model itself.
        also: the further paths of a module that stands in several places.
        type: the name of the module's type.
        converted: whether it is one of this library's layers.
        stored: how its weight is stored, or the dtypes of its parameters.
        adapters: the name and rank of each adapter of a LoRALinear.
        reason: why it was left as it is; None where it is converted.
        shared_with: the path of an earlier row that holds some of its tensors too; None where none does.
        weights: how many weights it stands for, without those of earlier rows.
        bytes: of its parameters and buffers, without those of earlier rows.
        bits_per_weight: of all that it holds, adapters included, whether an earlier row holds it or not.
        weight_error: what storing its weight lost, relative to it; None where that is nothing, or is not known.
    """

    path: str
    also: tuple[str, ...]
    type: str
    converted: bool
    stored: str
    adapters: tuple[tuple[str, int], ...]
    reason: str | None
    shared_with: str | None
    weights: int
    bytes: int
    bits_per_weight: float
    weight_error: float | None


class Summary(tuple[LayerSummary, ...]):
    """The rows of a model in the order of its modules, and their totals. ``print`` shows a table of plain text."""

    __slots__ = ()

    FIGURES = range(3, 7)
    """Which columns of ``cells`` are figures."""

    @property
    def weights(self) -> int:
        """All weights, each counted once."""
        return sum(row.weights for row in self)

    @property
    def bytes(self) -> int:
        """The bytes of all rows, each tensor counted once; a module that holds buffers alone has no row."""
        return sum(row.bytes for row in self)

    @property
    def bits_per_weight(self) -> float:
        """Bits that are stored for each weight; 0.0 where there are none."""
        return _bits(self.bytes, self.weights)

    @property
    def weight_error(self) -> float | None:
        """The mean of the known errors of the rows; None where none is known."""
        known = [row.weight_error for row in self if row.weight_error is not None]
        return sum(known) / len(known) if known else None

    def grouped(self) -> Summary:
        """Return the rows with those of one role, type, size and treatment as one.

        Its path names them all, its weights and bytes are those of all, its error the mean of theirs. What stands in
        several places, or shares tensors, stays a row of its own.
        """
        members: dict[object, list[LayerSummary]] = {}
        for row in self:
            alone = row.path if row.also or row.shared_with is not None else ""
            treated = (row.type, row.converted, row.stored, row.adapters, row.reason, row.weights, row.bytes)
            members.setdefault((alone, role_of(row.path), treated), []).append(row)
        return Summary(map(_as_one, members.values()))

    @property
    def columns(self) -> list[str]:
        """The titles of what ``cells`` holds."""
        return ["Layer", "Type", "Stored", "Weights", "MiB", "Bits/weight", "Error", "Left because"]

    @property
    def cells(self) -> list[list[str]]:
        """The text of each row, the totals last: names are as a model gives them, but for control characters."""
        rows = ([layer_name(r.path), r.type, _stored_text(r), *_numbers(r), r.reason or ""] for r in self)
        total = ["total", "", "", *_numbers(self), ""]
        return [[printable(cell, 2000) for cell in row] for row in (*rows, total)]

    @property
    def grouped_cells(self) -> list[list[str]]:
        """The text of each row of ``grouped``, and the totals of all layers."""
        return [*self.grouped().cells[:-1], self.cells[-1]]

    def __str__(self) -> str:
        return self.aligned(self.cells)

    def aligned(self, cells: list[list[str]]) -> str:
        """Lay out ``cells`` or ``grouped_cells`` below their titles."""
        table = [self.columns, *cells]
        widths = [max(len(line[number]) for line in table) for number in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if number in self.FIGURES else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        )


def summary(model: nn.Module) -> Summary:
    """Say what became of every layer of a model, converted or not.

    Every module that holds parameters of its own has a row. A converted layer is one row, with its base and
    adapters. A weight that several layers share is counted in the first of their rows alone, so that rows add up.

    Reasons are those of the techniques that the model shows to have been applied; of 4 bits, where it shows none.

    Raises:
        TypeError: the model is not a module.
    """
    found = places(model)
    reasons = _reasons(model, found)
    seen: dict[Tensor, str] = {}
    rows = []
    for module, (path, *also) in found.items():
        converted = type(module) in MADE_BY
        if not converted and not any(True for _ in module.parameters(recurse=False)):
            continue
        tensors = dict.fromkeys([*module.parameters(recurse=converted), *module.buffers(recurse=converted)])
        new = [tensor for tensor in tensors if tensor not in seen]
        base = cast(nn.Module, module.base) if isinstance(module, LoRALinear) else module
        weights = _weights(base)
        rows.append(
            LayerSummary(
                path=path,
                also=tuple(also),
                type=type(module).__name__,
                converted=converted,
                stored=_stored(base),
                adapters=_adapters(module),
                reason=reasons.get(module),
                shared_with=next((seen[tensor] for tensor in tensors if tensor in seen), None),
                weights=sum(count for tensor, count in weights.items() if tensor not in seen),
                bytes=_bytes(new),
                bits_per_weight=_bits(_bytes(tensors), sum(weights.values())),
                weight_error=getattr(base, "weight_error", None) if converted else None,
            )
        )
        seen.update(dict.fromkeys(new, layer_name(path)))
    return Summary(rows)


def _as_one(rows: list[LayerSummary]) -> LayerSummary:
    first, found = rows[0], Summary(rows)
    if len(rows) == 1:
        return first
    name = group_name([row.path for row in rows])
    return replace(first, path=name, weights=found.weights, bytes=found.bytes, weight_error=found.weight_error)


def _reasons(model: nn.Module, found: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Return why each module that is not converted was left, as far as the model tells."""
    techniques, inside = _techniques(model), read_by_attention(model)
    left: dict[nn.Module, str] = {}
    taken: dict[nn.Module, str] = {}
    for module in found:
        if type(module) in MADE_BY:
            continue
        whys = [why_left(technique, module) for technique in techniques]
        if module in inside and None in whys:
            left[module] = f"{type(module).__name__}: nn.MultiheadAttention reads its weight itself"
        elif None in whys:
            taken[module] = _NOT_CHOSEN
        else:
            left[module] = f"{type(module).__name__}: {whys[0]}"
    if techniques == [LoRA]:  # whose base keeps its weight, so that ties do not matter
        return left | taken
    held = holders(model)
    kept = dict(taken)
    keep_ties(model, kept)
    for module in taken:
        others = [layer_name(path) for other, path in held[id(module.weight)] if other is not module]
        if module not in kept:
            # One that convert always leaves says more than one that is left for this very tie.
            never = [
                layer_name(p) for other, p in held[id(module.weight)] if other is not module and other not in taken
            ]
            taken[module] = f"its weight is tied to `{(never or others)[0]}`, which is left"
        elif others:
            taken[module] = f"{_NOT_CHOSEN}; its weight is tied to `{others[0]}`, which is left"
    return left | taken


def _techniques(model: nn.Module) -> list[type[Technique]]:
    """Return the techniques that stored the model's converted layers; LoRA alone counts where nothing did."""
    made = {MADE_BY[type(module)] for module in model.modules() if type(module) in MADE_BY}
    storing: list[type[Technique]] = [technique for technique in (FourBit, Half) if technique in made]
    return storing or ([LoRA] if made else [FourBit])


def _weights(layer: nn.Module) -> dict[Tensor, int]:
    """Return how many weights each of a layer's own parameters stands for."""
    counts: dict[Tensor, int] = {
        parameter: 0 if is_lazy(parameter) else parameter.numel() for parameter in layer.parameters(recurse=False)
    }
    if isinstance(layer, FourBitStorage):
        counts |= {layer.packed: layer.quantized.shape.numel(), layer.scales: 0}
    return counts


def _stored(layer: nn.Module) -> str:
    if isinstance(layer, FourBitStorage):
        return f"{layer.format}, block_size={layer.block_size}, scales={layer.scale_encoding}"
    dtypes = dict.fromkeys(str(parameter.dtype) for parameter in layer.parameters(recurse=False))
    return ", ".join(dtype.removeprefix("torch.") for dtype in dtypes)


def _adapters(layer: nn.Module) -> tuple[tuple[str, int], ...]:
    if not isinstance(layer, LoRALinear):
        return ()
    return tuple((name, cast(Adapter, adapter).rank) for name, adapter in layer.adapters.items())


def _stored_text(row: LayerSummary) -> str:
    shared = "" if row.shared_with is None else f", shared with `{row.shared_with}`"
    adapters = "".join(f" + {name} (rank {rank})" for name, rank in row.adapters)
    also = f"; also at {', '.join(f'`{path}`' for path in row.also)}" if row.also else ""
    return row.stored + shared + adapters + also


def _numbers(row: LayerSummary | Summary) -> list[str]:
    error = "" if row.weight_error is None else f"{row.weight_error:.3g}"
    return [f"{row.weights:,}", f"{row.bytes / 2**20:.2f}", f"{row.bits_per_weight:.2f}", error]


def _bytes(tensors: Iterable[Tensor] | Mapping[Tensor, object]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not is_lazy(tensor))


def _bits(stored: int, weights: int) -> float:
    return 8 * stored / weights if weights else 0.0
