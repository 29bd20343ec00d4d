"""Summarizes a model by layer: how each is stored, its bytes and error, and why a layer was not converted."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem import measure
from lowmem.errors import printable
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.coded_module import CodedModule
from lowmem.nn.forms import CodedForm
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import EightBit, FourBit, Half, LoRA
from lowmem.transforms.placement import takes_adapter
from lowmem.transforms.registry import (
    Technique,
    dense_because,
    how_computed,
    layer_name,
    made_by,
    module_paths,
    parameters_to_store,
    skip_reason,
    stored_by,
)
from lowmem.transforms.roles import embeddings_and_outputs, output_layers, routers
from lowmem.transforms.ties import parameter_owners

_INDEX = re.compile(r"[0-9]{1,9}")
_LISTED = 3  # non-consecutive indices are listed up to this many; beyond, only the first and the last are


@dataclass(frozen=True)
class LayerSummary:
    """One row: a module with parameters of its own, or a converted layer with its base and adapters.

    Attributes:
        path: the first path; "" is the model itself.
        also: the other paths of a module that occurs several times.
        type: the name of the module's type.
        converted: whether it is one of this library's layers.
        stored: how its weights are stored, or the dtypes of its parameters.
        adapters: the name and rank of each adapter; once where several parameters have the same rank.
        reason: why it was not converted, why it is in 8 bits where other layers are in 4, or why it has no adapter
            where other layers have; None otherwise.
        shared_with: the path of an earlier row that shares tensors with it; None where none does.
        weights: the number of its weights, without those of earlier rows.
        bytes: of its parameters and buffers, without those of earlier rows.
        bits_per_weight: of all its tensors, adapters and shared tensors included.
        weight_error: ``rms(stored - weight) / rms(weight)``; None where it is not converted, or not known.
        computed: how calls compute with what is stored: "as stored", in products and gathers of its codes; or how it
            is dequantized, and by which operators, which is known of a module's own code after a call; "" if dense.
            And what ``prepare_training`` did to it.
        chosen_because: what its bits save of the loss of all layers, if a ``Budget`` chose them; else "".
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
    computed: str = ""
    chosen_because: str = ""


class Summary(tuple[LayerSummary, ...]):
    """The rows of a model in the order of its modules, and their totals. ``print`` shows a plain-text table."""

    __slots__ = ()

    FIGURES = range(3, 7)
    """The columns of ``cells`` that hold numbers."""

    @property
    def weights(self) -> int:
        """All weights, each counted once."""
        return sum(row.weights for row in self)

    @property
    def bytes(self) -> int:
        """The bytes of all rows, each tensor counted once; modules without parameters have no row."""
        return sum(row.bytes for row in self)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight; 0.0 without weights."""
        return _bits(self.bytes, self.weights)

    @property
    def weight_error(self) -> float | None:
        """The mean of the rows' known errors; None without any."""
        known = [row.weight_error for row in self if row.weight_error is not None]
        return sum(known) / len(known) if known else None

    def grouped(self) -> Summary:
        """Return a summary with one row for all layers of the same role, type, size and treatment.

        Such a row has a path for all of them, the sum of their weights and bytes, and the mean of their errors. A
        module that occurs several times, or shares tensors, keeps its own row.
        """
        members: dict[object, list[LayerSummary]] = {}
        for row in self:
            alone = row.path if row.also or row.shared_with is not None else ""
            alike = replace(row, path="", bits_per_weight=0.0, weight_error=None, chosen_because="")
            members.setdefault((alone, role_of(row.path), alike), []).append(row)
        return Summary(map(_as_one, members.values()))

    @property
    def columns(self) -> list[str]:
        """The titles of the columns of ``cells``; the last one is there where a ``Budget`` chose."""
        titles = ["Layer", "Type", "Stored", "Weights", "MiB", "Bits/weight", "Error", "Computed", "Left because"]
        return [*titles, "Chosen because"] if self._chosen else titles

    @property
    def _chosen(self) -> bool:
        return any(row.chosen_because for row in self)

    @property
    def cells(self) -> list[list[str]]:
        """The texts of each row, and the totals last; control characters in names are escaped."""
        rows = [[layer_name(r.path), r.type, _stored_text(r), *_numbers(r), r.computed, r.reason or ""] for r in self]
        total = ["total", "", "", *_numbers(self), "", ""]
        if self._chosen:
            rows = [[*cells, row.chosen_because] for cells, row in zip(rows, self, strict=True)]
            total.append("")
        return [[printable(cell, 2000) for cell in row] for row in (*rows, total)]

    @property
    def grouped_cells(self) -> list[list[str]]:
        """The texts of each row of ``grouped``, and the totals of all layers."""
        return [*self.grouped().cells[:-1], self.cells[-1]]

    def __str__(self) -> str:
        return self.aligned(self.cells)

    def aligned(self, cells: list[list[str]]) -> str:
        """Return ``cells`` or ``grouped_cells`` as aligned columns below their titles."""
        return "\n".join(aligned([self.columns, *cells], self.FIGURES))


def aligned(rows: Sequence[Sequence[str]], right: Container[int]) -> list[str]:
    """Return the lines of a table whose columns have one width each; those in ``right`` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def summary(model: nn.Module) -> Summary:
    """Return how every layer of a model is stored, its bytes and error, and why it was not converted.

    In a model with adapters, output layers without one say why, too.

    Every module with parameters of its own has a row, and one that is prepared for training; a converted layer has
    one row with its base and adapters. A weight that several layers share is counted only in the first of their rows,
    so that rows add up.

    Reasons are those of the techniques that some layer was converted by; of ``FourBit`` if there are none. Of a layer
    that such a technique takes, they say which call left it dense (``where=``, ``skip=``, ``restore``), that the file
    has it dense, or that no call took it in.

    Raises:
        TypeError: the model is not a module.
    """
    found = module_paths(model)
    reasons = _reasons(model, found)
    seen: dict[Tensor, str] = {}
    rows = []
    for module, (path, *also) in found.items():
        converted = made_by(module) is not None
        prepared = hasattr(type(module), "released_by")
        note = str(getattr(module, "note", "")) if prepared else ""
        if not converted and not prepared and not any(True for _ in module.parameters(recurse=False)):
            continue
        adapters = module.adapters.stored() if isinstance(module, AdaptedModule) else ()
        tensors = dict.fromkeys([*module.parameters(recurse=False), *module.buffers(recurse=False), *adapters])
        new = [tensor for tensor in tensors if tensor not in seen]
        weights = _weights(module)
        rows.append(
            LayerSummary(
                path=path,
                also=tuple(also),
                type=type(module).__name__,
                converted=converted,
                stored=_stored(module),
                adapters=_adapters(module),
                reason=reasons.get(module),
                shared_with=next((seen[tensor] for tensor in tensors if tensor in seen), None),
                weights=sum(count for tensor, count in weights.items() if tensor not in seen),
                bytes=measure.nbytes(new),
                bits_per_weight=_bits(measure.nbytes(tensors), sum(weights.values())),
                weight_error=getattr(module, "weight_error", None) if converted else None,
                chosen_because=getattr(module, "chosen_because", "") if converted else "",
                computed="; ".join(filter(None, (how_computed(module), note))),
            )
        )
        seen.update(dict.fromkeys(new, layer_name(path)))
    return Summary(rows)


def _as_one(rows: list[LayerSummary]) -> LayerSummary:
    first, found = rows[0], Summary(rows)
    if len(rows) == 1:
        return first
    whys = {row.chosen_because for row in rows}
    return replace(
        first,
        path=group_name([row.path for row in rows]),
        weights=found.weights,
        bytes=found.bytes,
        weight_error=found.weight_error,
        chosen_because=first.chosen_because if len(whys) == 1 else f"{len(rows)} layers, each for its own gain",
    )


def role_of(path: str) -> tuple[str | None, ...]:
    """Return the parts of a path with None in place of indices: equal for layers of one role."""
    return tuple(None if _INDEX.fullmatch(part) else part for part in path.split("."))


def group_name(paths: Sequence[str]) -> str:
    """Return one name for paths of one role, which lists their indices."""
    parts = []
    for column in zip(*(path.split(".") for path in paths), strict=True):
        numbers = [int(part) for part in column if _INDEX.fullmatch(part)]
        parts.append(indices(numbers) if len(numbers) == len(column) else column[0])
    return layer_name(".".join(parts))


def indices(found: Iterable[int]) -> str:
    """Format indices: ``0-29``, ``0,2,5``, or ``0...58`` for many that are not consecutive."""
    listed = sorted(set(found))
    first, last = listed[0], listed[-1]
    if len(listed) > 2 and last - first == len(listed) - 1:
        return f"{first}-{last}"
    return ",".join(map(str, listed)) if len(listed) <= _LISTED else f"{first}...{last}"


def _reasons(model: nn.Module, found: Collection[nn.Module]) -> dict[nn.Module, str]:
    """Return why each dense module was not converted, as far as the model shows."""
    techniques, nothing = _techniques(model), not any(map(made_by, found))
    unasked = "never converted" if nothing else "never converted: convert was called on other layers"
    wider = _in_8_bits(model) if FourBit in techniques else {}
    left: dict[nn.Module, str] = {}
    taken: dict[nn.Module, str] = {}
    bare = _without_adapter(model)
    for module in found:
        if made_by(module) is not None:
            continue
        whys = [skip_reason(technique, module) for technique in techniques]
        if None in whys:
            taken[module] = dense_because(module) or unasked
        else:
            left[module] = f"{type(module).__name__}: {whys[0]}"
    if techniques == [LoRA]:  # LoRA keeps the weight, and with it all ties
        return left | taken | {module: why for module, why in bare.items() if module not in left}
    left |= {module: why for module, why in bare.items() if made_by(module) is not None}
    left |= {module: "; ".join(filter(None, (why, left.get(module)))) for module, why in wider.items()}
    owners = parameter_owners(model)
    for module in (one for one in taken if dense_because(one) is None):
        tied = [
            (other in taken, layer_name(path))  # a module that convert cannot take is named first
            for name in parameters_to_store(module)
            for other, path in owners[id(module._parameters[name])]
            if other is not module
        ]
        could, other = min(tied, key=lambda one: one[0], default=(True, ""))
        if tied and not (could and nothing):
            taken[module] = f"its weight is tied to `{other}`, which is left"
    return left | taken


def _without_adapter(model: nn.Module) -> dict[nn.Module, str]:
    """Return the output layers and routers without an adapter, and why, if other layers have adapters."""
    if not any(isinstance(module, AdaptedModule) for module in model.modules()):
        return {}
    left = {**routers(model), **output_layers(model)}
    return {
        module: f"no adapter: {why}; where= would give it one"
        for module, why in left.items()
        if takes_adapter(module) and not isinstance(module, AdaptedModule)
    }


def _in_8_bits(model: nn.Module) -> dict[nn.Module, str]:
    """Return what is in 8 bits as ``FourBit`` leaves it, and why; none where a ``Budget``, ``EightBit`` or another
    program chose."""
    wider = embeddings_and_outputs(model)
    found = [module for module in module_paths(model) if stored_by(module) is EightBit]
    chosen = any(getattr(base, "chosen_because", "") or not _stored(base).startswith("int8") for base in found)
    if chosen or not set(found) <= wider.keys():
        return {}
    return {
        module: f"8 bits, since {why}: FourBit(embeddings='4bit') stores it in 4"
        for module, why in wider.items()
        if module in found
    }


def _techniques(model: nn.Module) -> list[type[Technique]]:
    """Return which techniques store layers; else LoRA if there are adapters; else FourBit."""
    made = {one for module in model.modules() for one in (made_by(module), stored_by(module))} - {None}
    storing: list[type[Technique]] = [technique for technique in (FourBit, EightBit, Half) if technique in made]
    return storing or ([LoRA] if made else [FourBit])


def _weights(layer: nn.Module) -> dict[Tensor, int]:
    """Return the number of weights that each of a layer's own parameters stores."""
    counts: dict[Tensor, int] = {
        parameter: 0 if is_lazy(parameter) else parameter.numel() for parameter in layer.parameters(recurse=False)
    }
    if isinstance(layer, StoredModule):
        for name, form in layer.forms.items():
            first, *others = (getattr(layer, f"{name}_{part}") for part in form.parts)
            counts |= {first: layer.stored_size(name), **dict.fromkeys(others, 0)}
    return counts


def _stored(layer: nn.Module) -> str:
    if isinstance(layer, CodedModule):
        names: dict[str, list[str]] = {}
        for name, one in layer.forms.items():
            if isinstance(one, CodedForm):
                names.setdefault(str(one), []).append(name)
        if len(names) == 1:
            return next(iter(names))
        return "; ".join(f"{', '.join(own)}: {form}" for form, own in names.items())
    dtypes = dict.fromkeys(str(parameter.dtype) for parameter in layer.parameters(recurse=False))
    return ", ".join(dtype.removeprefix("torch.") for dtype in dtypes)


def _adapters(layer: nn.Module) -> tuple[tuple[str, int], ...]:
    if not isinstance(layer, AdaptedModule):
        return ()
    bank = layer.adapters
    return tuple(dict.fromkeys((name, part.rank) for name in bank.names for part in bank.parts(name).values()))


def _stored_text(row: LayerSummary) -> str:
    shared = "" if row.shared_with is None else f", shared with `{row.shared_with}`"
    adapters = "".join(f" + {name} (rank {rank})" for name, rank in row.adapters)
    also = f"; also at {', '.join(f'`{path}`' for path in row.also)}" if row.also else ""
    return row.stored + shared + adapters + also


def _numbers(row: LayerSummary | Summary) -> list[str]:
    error = "" if row.weight_error is None else f"{row.weight_error:.3g}"
    return [f"{row.weights:,}", f"{row.bytes / 2**20:.2f}", f"{row.bits_per_weight:.2f}", error]


def _bits(stored: int, weights: int) -> float:
    return 8 * stored / weights if weights else 0.0
