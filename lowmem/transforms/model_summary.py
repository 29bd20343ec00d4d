"""Summarizes a model by layer: how each is stored, its bytes and error, and why a layer was not converted."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem import measure
from lowmem.errors import printable_line
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.forms import CodedForm
from lowmem.nn.quantized_module import QuantizedModule
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import EightBit, FourBit, Half, LoRA
from lowmem.transforms.adapter_placement import can_have_adapter
from lowmem.transforms.layer_roles import (
    embedding_or_output_reason_by_module,
    output_layer_reason_by_module,
    router_reason_by_module,
)
from lowmem.transforms.module_registry import (
    Technique,
    all_paths_by_module,
    applied_technique_type_or_none,
    conversion_skip_reason,
    layer_display_name,
    recorded_dense_reason_or_none,
    storable_parameter_names,
    storage_technique_type_or_none,
    stored_computation_text,
)
from lowmem.transforms.tied_weights import owners_and_paths_by_parameter_id

_INDEX = re.compile(r"[0-9]{1,9}")
# Non-consecutive indices are listed up to this many; beyond, only the first and the last are
_LISTED = 3


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
        return _bits_per_weight(self.bytes, self.weights)

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
            members.setdefault((alone, path_parts_with_none_for_indices(row.path), alike), []).append(row)
        return Summary(map(_combined_row, members.values()))

    @property
    def columns(self) -> list[str]:
        """The titles of the columns of ``cells``; the last one is there where a ``Budget`` chose."""
        titles = ["Layer", "Type", "Stored", "Weights", "MiB", "Bits/weight", "Error", "Computed", "Left because"]
        return [*titles, "Chosen because"] if self._has_budget_choices else titles

    @property
    def _has_budget_choices(self) -> bool:
        return any(row.chosen_because for row in self)

    @property
    def cells(self) -> list[list[str]]:
        """The texts of each row, and the totals last; control characters in names are escaped."""
        rows = [
            [
                layer_display_name(r.path),
                r.type,
                _stored_column_text(r),
                *_number_cells(r),
                r.computed,
                r.reason or "",
            ]
            for r in self
        ]
        total = ["total", "", "", *_number_cells(self), "", ""]
        if self._has_budget_choices:
            rows = [[*cells, row.chosen_because] for cells, row in zip(rows, self, strict=True)]
            total.append("")
        return [[printable_line(cell, 2000) for cell in row] for row in (*rows, total)]

    @property
    def grouped_cells(self) -> list[list[str]]:
        """The texts of each row of ``grouped``, and the totals of all layers."""
        return [*self.grouped().cells[:-1], self.cells[-1]]

    def __str__(self) -> str:
        return self.aligned(self.cells)

    def aligned(self, cells: list[list[str]]) -> str:
        """Return ``cells`` or ``grouped_cells`` as aligned columns below their titles."""
        return "\n".join(aligned_table_lines([self.columns, *cells], self.FIGURES))


def aligned_table_lines(rows: Sequence[Sequence[str]], right_aligned: Container[int]) -> list[str]:
    """Return the lines of a table whose columns have one width each; those in ``right_aligned`` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right_aligned else cell.ljust(width)
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
    paths_by_module = all_paths_by_module(model)
    reasons = _unconverted_reason_by_module(model, paths_by_module)
    seen: dict[Tensor, str] = {}
    rows = []
    for module, (path, *also) in paths_by_module.items():
        converted = applied_technique_type_or_none(module) is not None
        prepared = hasattr(type(module), "released_by")
        note = str(getattr(module, "report_note", "")) if prepared else ""
        if not converted and not prepared and not any(True for _ in module.parameters(recurse=False)):
            continue
        adapters = module.adapters.parameters_with_merged_copy() if isinstance(module, AdaptedModule) else ()
        tensors = dict.fromkeys([*module.parameters(recurse=False), *module.buffers(recurse=False), *adapters])
        new = [tensor for tensor in tensors if tensor not in seen]
        weights = _weight_count_by_parameter(module)
        rows.append(
            LayerSummary(
                path=path,
                also=tuple(also),
                type=type(module).__name__,
                converted=converted,
                stored=_storage_text(module),
                adapters=_adapter_name_rank_pairs(module),
                reason=reasons.get(module),
                shared_with=next((seen[tensor] for tensor in tensors if tensor in seen), None),
                weights=sum(count for tensor, count in weights.items() if tensor not in seen),
                bytes=measure.nbytes(new),
                bits_per_weight=_bits_per_weight(measure.nbytes(tensors), sum(weights.values())),
                weight_error=getattr(module, "weight_error", None) if converted else None,
                chosen_because=getattr(module, "chosen_because", "") if converted else "",
                computed="; ".join(filter(None, (stored_computation_text(module), note))),
            )
        )
        seen.update(dict.fromkeys(new, layer_display_name(path)))
    return Summary(rows)


def _combined_row(rows: list[LayerSummary]) -> LayerSummary:
    first, combined = rows[0], Summary(rows)
    if len(rows) == 1:
        return first
    whys = {row.chosen_because for row in rows}
    return replace(
        first,
        path=display_name_with_index_ranges([row.path for row in rows]),
        weights=combined.weights,
        bytes=combined.bytes,
        weight_error=combined.weight_error,
        chosen_because=first.chosen_because if len(whys) == 1 else f"{len(rows)} layers, each for its own gain",
    )


def path_parts_with_none_for_indices(path: str) -> tuple[str | None, ...]:
    """Return the parts of a path with None in place of indices: equal for layers of one role."""
    return tuple(None if _INDEX.fullmatch(part) else part for part in path.split("."))


def display_name_with_index_ranges(paths: Sequence[str]) -> str:
    """Return one name for paths of one role, which lists their indices."""
    parts = []
    for column in zip(*(path.split(".") for path in paths), strict=True):
        numbers = [int(part) for part in column if _INDEX.fullmatch(part)]
        parts.append(index_ranges_text(numbers) if len(numbers) == len(column) else column[0])
    return layer_display_name(".".join(parts))


def index_ranges_text(numbers: Iterable[int]) -> str:
    """Format indices: ``0-29``, ``0,2,5``, or ``0...58`` for many that are not consecutive."""
    listed = sorted(set(numbers))
    first, last = listed[0], listed[-1]
    if len(listed) > 2 and last - first == len(listed) - 1:
        return f"{first}-{last}"
    return ",".join(map(str, listed)) if len(listed) <= _LISTED else f"{first}...{last}"


def _unconverted_reason_by_module(model: nn.Module, modules: Collection[nn.Module]) -> dict[nn.Module, str]:
    """Return why each dense module was not converted, as far as the model shows."""
    techniques, nothing = _technique_types_or_default(model), not any(map(applied_technique_type_or_none, modules))
    unasked = "never converted" if nothing else "never converted: convert was called on other layers"
    wider = _eight_bit_reason_by_module(model) if FourBit in techniques else {}
    left: dict[nn.Module, str] = {}
    taken: dict[nn.Module, str] = {}
    bare = _missing_adapter_reason_by_module(model)
    for module in modules:
        if applied_technique_type_or_none(module) is not None:
            continue
        whys = [conversion_skip_reason(technique, module) for technique in techniques]
        if None in whys:
            taken[module] = recorded_dense_reason_or_none(module) or unasked
        else:
            left[module] = f"{type(module).__name__}: {whys[0]}"
    # LoRA keeps the weight, and with it all ties
    if techniques == [LoRA]:
        return left | taken | {module: why for module, why in bare.items() if module not in left}
    left |= {module: why for module, why in bare.items() if applied_technique_type_or_none(module) is not None}
    left |= {module: "; ".join(filter(None, (why, left.get(module)))) for module, why in wider.items()}
    owners = owners_and_paths_by_parameter_id(model)
    for module in (candidate for candidate in taken if recorded_dense_reason_or_none(candidate) is None):
        tied = [
            (other in taken, layer_display_name(path))  # a module that convert cannot take is named first
            for name in storable_parameter_names(module)
            for other, path in owners[id(module._parameters[name])]
            if other is not module
        ]
        could, other = min(tied, key=lambda candidate: candidate[0], default=(True, ""))
        if tied and not (could and nothing):
            taken[module] = f"its weight is tied to `{other}`, which is left"
    return left | taken


def _missing_adapter_reason_by_module(model: nn.Module) -> dict[nn.Module, str]:
    """Return the output layers and routers without an adapter, and why, if other layers have adapters."""
    if not any(isinstance(module, AdaptedModule) for module in model.modules()):
        return {}
    left = {**router_reason_by_module(model), **output_layer_reason_by_module(model)}
    return {
        module: f"no adapter: {why}; where= would give it one"
        for module, why in left.items()
        if can_have_adapter(module) and not isinstance(module, AdaptedModule)
    }


def _eight_bit_reason_by_module(model: nn.Module) -> dict[nn.Module, str]:
    """Return what is in 8 bits as ``FourBit`` leaves it, and why; none where a ``Budget``, ``EightBit`` or another
    program chose."""
    wider = embedding_or_output_reason_by_module(model)
    eight_bit_modules = [
        module for module in all_paths_by_module(model) if storage_technique_type_or_none(module) is EightBit
    ]
    chosen = any(
        getattr(module, "chosen_because", "")
        or any(isinstance(form, CodedForm) and form.method == "imported" for form in module.forms.values())
        for module in eight_bit_modules
        if isinstance(module, StoredModule)
    )
    if chosen or not set(eight_bit_modules) <= wider.keys():
        return {}
    return {
        module: f"8 bits, since {why}: FourBit(embeddings='4bit') stores it in 4"
        for module, why in wider.items()
        if module in eight_bit_modules
    }


def _technique_types_or_default(model: nn.Module) -> list[type[Technique]]:
    """Return which techniques store layers; else LoRA if there are adapters; else FourBit."""
    made = {
        technique_type
        for module in model.modules()
        for technique_type in (applied_technique_type_or_none(module), storage_technique_type_or_none(module))
    } - {None}
    storing: list[type[Technique]] = [technique for technique in (FourBit, EightBit, Half) if technique in made]
    return storing or ([LoRA] if made else [FourBit])


def _weight_count_by_parameter(layer: nn.Module) -> dict[Tensor, int]:
    """Return the number of weights that each of a layer's own parameters stores."""
    counts: dict[Tensor, int] = {
        parameter: 0 if is_lazy(parameter) else parameter.numel() for parameter in layer.parameters(recurse=False)
    }
    if isinstance(layer, StoredModule):
        for name, form in layer.forms.items():
            first, *other_parts = (getattr(layer, f"{name}_{part}") for part in form.parts)
            counts |= {first: layer.stored_numel(name), **dict.fromkeys(other_parts, 0)}
    return counts


def _storage_text(layer: nn.Module) -> str:
    if isinstance(layer, QuantizedModule):
        names: dict[str, list[str]] = {}
        for name, stored_form in layer.forms.items():
            if isinstance(stored_form, CodedForm):
                names.setdefault(str(stored_form), []).append(name)
        if len(names) == 1:
            return next(iter(names))
        return "; ".join(f"{', '.join(parameter_names)}: {form}" for form, parameter_names in names.items())
    dtypes = dict.fromkeys(str(parameter.dtype) for parameter in layer.parameters(recurse=False))
    return ", ".join(dtype.removeprefix("torch.") for dtype in dtypes)


def _adapter_name_rank_pairs(layer: nn.Module) -> tuple[tuple[str, int], ...]:
    if not isinstance(layer, AdaptedModule):
        return ()
    bank = layer.adapters
    return tuple(
        dict.fromkeys((name, part.rank) for name in bank.names for part in bank.adapters_by_parameter(name).values())
    )


def _stored_column_text(row: LayerSummary) -> str:
    shared = "" if row.shared_with is None else f", shared with `{row.shared_with}`"
    adapters = "".join(f" + {name} (rank {rank})" for name, rank in row.adapters)
    also = f"; also at {', '.join(f'`{path}`' for path in row.also)}" if row.also else ""
    return row.stored + shared + adapters + also


def _number_cells(row: LayerSummary | Summary) -> list[str]:
    error = "" if row.weight_error is None else f"{row.weight_error:.3g}"
    return [f"{row.weights:,}", f"{row.bytes / 2**20:.2f}", f"{row.bits_per_weight:.2f}", error]


def _bits_per_weight(stored_bytes: int, weight_count: int) -> float:
    return 8 * stored_bytes / weight_count if weight_count else 0.0
