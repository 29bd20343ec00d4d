"""Merges adapters into the weights of their bases, and measures what that loses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch
from torch import nn

from lowmem.errors import is_one_of, printable_line, short_repr
from lowmem.nn.adapted_module import AdaptedModule, embedding_table_id_or_none, share_embedding_table
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.adapter_buffers import discard_inactive_buffers
from lowmem.nn.fold import MergedCopyAndErrors, merged_copy_and_errors, unadapted_shallow_copy
from lowmem.nn.forms import CodedForm
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import QuantizedTensor
from lowmem.resident import release_memory_after_call
from lowmem.transforms.merge_output_errors import layer_output_errors_and_model_error
from lowmem.transforms.model_checks import (
    check_layers_are_changeable,
    check_model_is_changeable,
    check_no_foreign_tensor_class,
    check_no_peft_conflict,
)
from lowmem.transforms.model_summary import aligned_table_lines
from lowmem.transforms.module_registry import all_paths_by_module, layer_display_name, layer_or_parameter_path
from lowmem.transforms.module_replacement import (
    let_integrations_adopt_model,
    replace_modules_and_update_encoder_nesting,
    with_model_lock,
)

M = TypeVar("M", bound=nn.Module)

_SAME: Literal["same format"] = "same format"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class MergedLayer:
    """One weight of a report: relative errors against base + adapter, ``rms(x - exact) / rms(exact)``.

    Attributes:
        path: the first path of the layer, "" for the model itself; then the parameter's name, but for ``weight``.
        adapters: the names of those that were merged.
        before: the error of the base's weight without the adapters: how much they change it.
        after: the error of the weight as it is stored now. Where it is not far below ``before``, storing the weight
            has lost the adapter.
        output_before: as ``before``, of the outputs for the example inputs; None where no input reached the layer.
        output_after: as ``after``, of the outputs.
    """

    path: str
    adapters: tuple[str, ...]
    before: float
    after: float
    output_before: float | None = None
    output_after: float | None = None

    @property
    def largest(self) -> float:
        """The largest error after the merge, of weight and outputs; infinite where one is NaN."""
        errors = [error for error in (self.after, self.output_after) if error is not None]
        return max(math.inf if math.isnan(error) else error for error in errors)


class MergeReport(tuple[MergedLayer, ...]):
    """The merged layers, in the order of the model. ``print`` shows a plain-text table.

    Attributes:
        output_before: the relative error of the whole model's outputs for the example inputs, of its floating-point
            tensors together, without the adapters; None without inputs, or where outputs cannot be compared.
        output_after: as ``output_before``, of the merged model.
    """

    output_before: float | None = None
    output_after: float | None = None

    @property
    def worst(self) -> MergedLayer:
        """The layer with the largest error after the merge."""
        return max(self, key=lambda row: row.largest)

    @property
    def columns(self) -> list[str]:
        """The titles of the columns of ``cells``."""
        return ["Layer", "Adapters", "Before", "After", "Outputs before", "Outputs after"]

    @property
    def cells(self) -> list[list[str]]:
        """The texts of each row, and the whole model's if there are any; control characters in names are escaped."""

        def error_text(error: float | None) -> str:
            return "" if error is None else f"{error:.4g}"

        rows = [
            [
                layer_display_name(row.path),
                printable_line(", ".join(row.adapters), 2000),
                *map(error_text, (row.before, row.after, row.output_before, row.output_after)),
            ]
            for row in self
        ]
        if self.output_after is not None:
            rows.append(["whole model", "", "", "", error_text(self.output_before), error_text(self.output_after)])
        return rows

    def __str__(self) -> str:
        return "\n".join(aligned_table_lines([self.columns, *self.cells], right_aligned=()))


@overload
def merge(
    model: M,
    to: torch.dtype | Literal["same format"] = ...,
    *,
    at_most: float | None = ...,
    inputs: Any = ...,
    report: Literal[False] = ...,
) -> M: ...


@overload
def merge(
    model: M,
    to: torch.dtype | Literal["same format"] = ...,
    *,
    at_most: float | None = ...,
    inputs: Any = ...,
    report: Literal[True],
) -> tuple[M, MergeReport]: ...


@release_memory_after_call
@with_model_lock
def merge(
    model: M,
    to: torch.dtype | Literal["same format"] = _SAME,
    *,
    at_most: float | None = None,
    inputs: Any = None,
    report: bool = False,
) -> M | tuple[M, MergeReport]:
    """Merge the active adapters into their bases permanently: ``W + s B A``, with the scaling s of each.

    Inactive adapters are dropped, so the output does not change. A half-precision weight is rounded once more. A
    4-bit weight is quantized once more, and a warning gives the error that this adds, unless a report does. Where all
    of its adapters are fresh (B all zero, as of ``init="zero"``), a base is kept, bit for bit. Parameters stay
    frozen. ``merge_adapter`` merges reversibly.

    Args:
        model: has adapters.
        to: "same format": a weight is stored as that of its base; or a floating-point dtype of 16 bits or more: the
            parameters of each adapted module become dense and of that dtype, biases included; it takes inputs of that
            dtype.
        at_most: the largest relative error after the merge that is accepted, of any weight and, with ``inputs``, of
            any layer's outputs and the model's; None accepts any.
        inputs: one batch for the model (a Tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments), with which errors of the layers' outputs and the model's are measured, in evaluation mode: the
            model runs three times.
        report: whether to return a report, too.

    Returns:
        The model, changed in place. With ``report=True`` a tuple of that and a ``MergeReport``, which has a row for
        each adapted weight.

    Raises:
        TypeError: the model is not a module, or ``inputs`` are of another type.
        RuntimeError: inference mode is active, or was when a parameter was made.
        ValueError: no adapter is left (merged already?), no adapter is active, an adapted weight cannot be stored, is
            sharded, without values, inside a layer of PEFT, or shared with a module for which the merged one differs,
            the model is wrapped for several processes, an error is above ``at_most`` (the worst layer
            is named), an invalid ``to`` or ``at_most``, or ``inputs`` without ``report`` or ``at_most``. The model is
            left as it was.
    """
    _check_merge_arguments(to, at_most, inputs, report)
    check_model_is_changeable("merge", model)
    layers = first_path_by_adapted_layer(model)
    check_no_peft_conflict(model, layers, will_merge=True)
    check_layers_are_changeable("merge", layers)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no adapter to merge: it was never adapted, or is merged already"
        )
    if not any(layer.adapters.active_or_merged_names for layer in layers):
        raise ValueError(f"no adapter of {type(model).__name__} is active: activate one, or delete them")
    dtype = None if isinstance(to, str) else to
    merge_results = merged_copy_and_errors_by_layer(
        model, {layer: layer.adapters.active_or_merged_names for layer in layers}, dtype
    )
    _check_tied_weights_merge_equally(model, merge_results, dtype)
    outputs, of_model = (
        ({}, None) if inputs is None else layer_output_errors_and_model_error(model, merge_results, inputs, dtype)
    )
    merge_report = MergeReport(
        MergedLayer(
            layer_or_parameter_path(path, name),
            tuple(
                adapter_name
                for adapter_name in layer.adapters.active_or_merged_names
                if name in layer.adapters.adapters_by_parameter(adapter_name)
            ),
            *errors,
            *outputs.get(layer, ()),
        )
        for layer, path in layers.items()
        for name, errors in merge_results[layer].errors.items()
    )
    merge_report.output_before, merge_report.output_after = of_model or (None, None)
    if at_most is not None:
        _check_errors_at_most(merge_report, at_most)
    if not report:
        warn_of_requantization_errors(merge_results, layers)
    unchanged_layers = {
        layer
        for layer, done in merge_results.items()
        if dtype is None and not any(b for b, _ in done.errors.values())
    }
    copies = {
        layer: unadapted_shallow_copy(layer) if layer in unchanged_layers else done.layer
        for layer, done in merge_results.items()
    }
    replace_modules_and_update_encoder_nesting(model, copies)
    discard_inactive_buffers(model)
    let_integrations_adopt_model(model)
    return (model, merge_report) if report else model


def _check_errors_at_most(report: MergeReport, at_most: float) -> None:
    """Raise a ValueError for a layer, or a whole model's outputs, with a larger error."""
    worst = report.worst
    for place, error, whose in (
        (f"{layer_display_name(worst.path)}: ", worst.largest, ""),
        ("", report.output_after, " of the whole model's outputs"),
    ):
        if error is not None and not error <= at_most:
            raise ValueError(
                f"{place}merging gives a relative error of {error:.4g}{whose}, above at_most={at_most:g}; merge to a "
                "dtype, as to=torch.bfloat16, or keep the adapter apart"
            )


def first_path_by_adapted_layer(model: nn.Module) -> dict[AdaptedModule, str]:
    """Return every layer with adapters, with its first path."""
    return {
        module: paths[0] for module, paths in all_paths_by_module(model).items() if isinstance(module, AdaptedModule)
    }


def merged_copy_and_errors_by_layer(
    model: nn.Module, adapters_by_layer: Mapping[AdaptedModule, Sequence[str]], dtype: torch.dtype | None = None
) -> dict[AdaptedModule, MergedCopyAndErrors]:
    """Return a copy of each layer with the adapters ``names[layer]`` merged; an error names the path of the layer."""
    paths = first_path_by_adapted_layer(model)
    merge_results: dict[AdaptedModule, MergedCopyAndErrors] = {}
    tables: dict[Any, nn.Module] = {}
    keep = "keep the adapter apart, or adapt the dense model"
    for layer, chosen in adapters_by_layer.items():
        for name in dict.fromkeys(
            part for adapter_name in chosen for part in layer.adapters.adapters_by_parameter(adapter_name)
        ):
            check_no_foreign_tensor_class(
                "merging", layer_or_parameter_path(paths[layer], name), unadapted_parameter(layer, name), keep
            )
    for layer, chosen in adapters_by_layer.items():
        try:
            merge_results[layer] = merged_copy_and_errors(layer, chosen, dtype)
        except ValueError as reason:
            message = str(reason).partition(";")[0]
            raise ValueError(
                f"{layer_display_name(paths[layer])}: the adapted {message}; scale the adapter down, or convert the "
                "base "
                "otherwise"
            ) from reason
        if (
            embedding_table_id_or_none(layer) is not None
        ):  # a table that embeddings share, and its adapters, are merged into one
            adapters = [id(layer.adapters.adapters_by_parameter(name).get("weight")) for name in chosen]
            first = tables.setdefault((embedding_table_id_or_none(layer), *adapters), merge_results[layer].layer)
            share_embedding_table(merge_results[layer].layer, first)
    return merge_results


def _check_tied_weights_merge_equally(
    model: nn.Module, merge_results: Mapping[Any, MergedCopyAndErrors], dtype: torch.dtype | None
) -> None:
    """Raise a ValueError if modules share a weight whose merged values would differ."""
    seen: dict[int, tuple[str, Any]] = {}
    for layer, paths in all_paths_by_module(model).items():
        for name in (*layer._parameters.keys(), *(layer.forms if isinstance(layer, StoredModule) else ())):
            parameter = unadapted_parameter(layer, name)
            if parameter is None:
                continue
            place = layer_or_parameter_path(paths[0], name)
            now = _parameter_after_merge(merge_results.get(layer), name, parameter, dtype)
            other, differs = seen.setdefault(id(parameter), (place, now))
            if now is not differs and not _are_equal_weights(now, differs):
                raise ValueError(
                    f"{layer_display_name(place)} shares its weight with {layer_display_name(other)}, and their "
                    "merged weights would "
                    "differ: keep the adapter apart, or untie them before convert (give one a copy of the weight)"
                )


def _parameter_after_merge(
    merge_result: MergedCopyAndErrors | None, name: str, parameter: Any, dtype: torch.dtype | None
) -> Any:
    """Return what becomes of a parameter: itself, where no adapter changes it."""
    if (
        merge_result is None
        or name not in merge_result.errors
        or (dtype is None and not merge_result.errors[name][0])
    ):
        return parameter
    return unadapted_parameter(merge_result.layer, name)


def _are_equal_weights(first: Any, second: Any) -> bool:
    pair = [
        tensor.kernel_weight if isinstance(tensor, StoredTensor) else tensor.detach() for tensor in (first, second)
    ]
    if type(pair[0]) is not type(pair[1]):
        return False
    wide = [stored.dequantize() if isinstance(stored, QuantizedTensor) else stored for stored in pair]
    return wide[0].dtype == wide[1].dtype and torch.equal(*wide)


def warn_of_requantization_errors(
    merge_results: Mapping[AdaptedModule, MergedCopyAndErrors], layer_paths: Mapping[AdaptedModule, str]
) -> None:
    """Warn of the errors of weights that were quantized to 4 or 8 bits again, if there are any."""
    errors, bits, lost = dict[str, float](), set[int](), 0
    for layer, done in merge_results.items():
        for name, (before, after) in done.errors.items():
            form = done.layer.forms.get(name) if isinstance(done.layer, StoredModule) else None
            if isinstance(form, CodedForm) and after:
                errors[layer_display_name(layer_or_parameter_path(layer_paths[layer], name))] = after
                bits.add(get_format(form.format).bits)
                lost += after > before / 2
    if errors:
        worst, stored = max(errors, key=errors.__getitem__), " and ".join(map(str, sorted(bits)))
        loss = (
            f"; in {lost} of them that is more than half of what the adapter changed: merge into 16 bits"
            if lost
            else ""
        )
        warnings.warn(
            f"merge quantized {len(errors)} adapted weights to {stored} bits again: that adds a relative error of "
            f"{sum(errors.values()) / len(errors):.3g} on average, at most {errors[worst]:.3g} ({worst}){loss}",
            stacklevel=5,  # the caller of the function that both decorators wrap
        )


def _check_merge_arguments(to: object, at_most: object, inputs: object, report: bool) -> None:
    if not is_one_of(to, (_SAME, *_DTYPES)):
        raise ValueError(
            f"to={short_repr(to)} must be {short_repr(_SAME)}, or a floating-point torch.dtype of 16 bits or more"
        )
    if at_most is not None and (
        isinstance(at_most, bool) or not isinstance(at_most, int | float) or not at_most >= 0
    ):
        raise ValueError(f"at_most={short_repr(at_most)} must be a number of at least 0, or None")
    if inputs is not None and not report and at_most is None:
        raise ValueError("inputs= measure errors for report=True or at_most=: pass one of these, or no inputs")
