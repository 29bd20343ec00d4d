"""Converts a model to 4 bits, with linear layers quantized by what they get of sample inputs, block by block."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from torch import Tensor, nn

from lowmem.errors import check_callable_with, checked_path, short_repr
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, FourBit
from lowmem.quant.tensor import QuantizedTensor
from lowmem.resident import release_memory_after_call
from lowmem.transforms.bit_budget import BudgetChoice
from lowmem.transforms.calibration.block_replay import (
    BlockReplay,
    DroppedOutputRead,
    keep_all_outputs_and_refusal,
    recording_first_input_samples,
)
from lowmem.transforms.calibration.calibration_units import (
    CalibrationUnit,
    run_and_group_into_units,
    select_block_lists,
)
from lowmem.transforms.calibration.gptq_solver import (
    prepare_hessian_or_none,
    quantize_gptq,
    quantize_with_column_importance,
)
from lowmem.transforms.calibration.input_moments import (
    InputMomentCollector,
    RunningMoments,
    unpadded_token_mask_or_none,
)
from lowmem.transforms.calibration.model_runs import (
    check_batches_reiterable,
    evaluation_without_gradients,
    linear_layers_in_fast_dtype,
    replaced_forward,
    run_batch,
)
from lowmem.transforms.calibration.random_tokens import random_token_batches
from lowmem.transforms.calibration.resume_files import FinishedUnitFiles, calibration_digest
from lowmem.transforms.calibration.self_generated_text import check_token_count, self_generated_token_batches
from lowmem.transforms.converted_copies import StoreFactory, cached_store_factory, converted_copy
from lowmem.transforms.model_checks import check_layers_are_changeable
from lowmem.transforms.module_registry import (
    LayerTechnique,
    ModuleFilter,
    abbreviated_layer_names,
    layer_display_name,
    storable_parameter_names,
)
from lowmem.transforms.module_replacement import commit_replacements_and_freeze_if_adapted
from lowmem.transforms.module_selection import record_user_exclusions, select_paths_and_names_by_module
from lowmem.transforms.technique_assignment import techniques_and_budget_by_layer
from lowmem.transforms.tied_weights import weight_memory_key

M = TypeVar("M", bound=nn.Module)

_DEFAULT = FourBit()
WITHOUT_TEXT = ("self", "random")
"""In place of batches: the model generates a text, or its tokens are drawn evenly."""

_BY_WEIGHTS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)  # which nobody expects to be calibrated


@release_memory_after_call
def calibrate(
    model: M,
    batches: Iterable[Any] | Literal["self", "random"],
    technique: FourBit | Budget = _DEFAULT,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
    damping: float = 0.01,
    blocks: str | Iterable[str] | None = None,
    diagonal: bool = False,
    offload: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, float], object] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    temperature: float = 1.0,
    tokens: int = 4096,
) -> M:
    """Convert a model to 4 bits as ``convert`` does, with linear layers calibrated on sample inputs.

    GPTQ, arXiv 2210.17323, then coordinate descent and scales that are fitted again: minimizes
    ``|X W^T - X W_q^T|^2`` for the inputs X of each layer, instead of the error of each weight. Where a layer has a
    bias of its own, the bias takes over the mean of the error, and the covariance of the inputs counts alone.

    The model is done block by block, in the order of its calls, on the inputs that the quantized blocks before
    compute: two runs of each block in all, and one of the model over the first batch. Peak memory is what the blocks
    before return for all batches (the hidden states), and the second moments of one block's inputs: float32 (in, in)
    for each input, with a few copies of the largest. Blocks are the children of the outermost nn.ModuleList or
    nn.Sequential that hold linear layers, if they are of one type. Layers outside of blocks, and models whose blocks
    are called several times, are done input by input: a run of what lies before them for each.

    The model runs in evaluation mode without gradients. In batches with an ``attention_mask`` (batch, tokens) the
    rows of tokens count where it is not 0. Embeddings, output layers in 8 bits, convolutions and linear layers with a
    shared weight are quantized by their weights alone, and so are, with a warning, layers that no batch reaches, and
    those of other types: subclasses of nn.Linear, transformers' Conv1D, attention of torch, recurrent layers,
    experts. Scales are searched for, unless ``search=False``.

    Args:
        model: any module; the root itself can be the layer.
        batches: typical inputs of the model, a few thousand rows in all, the same at each iteration (a list, a
            DataLoader). Each is a Tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
            "self": texts of 128 tokens, which a causal language model generates itself (LLM-QAT, arXiv 2305.17888).
            "random": rows of 256 token ids, drawn evenly from the vocabulary without special tokens, for a causal
            language model or an encoder with an embedding. Both are shorter where the model takes fewer positions.
        technique: how to store; of several formats each layer gets the one with the least weighted error. A
            ``Budget`` is divided first, by its ``inputs``, or else by these batches: the dense model runs forward and
            backward on each once. Layers that get 8 bits keep the nearest codes.
        where, skip: as in ``convert``.
        damping: above 0, added to the Hessian's diagonal, as a fraction of its mean; more trusts the inputs less.
            Of fewer rows than columns it is as many times larger.
        blocks: glob patterns of the blocks' paths, as "encoder.layer.*"; () for none; None finds them as
            described above.
        diagonal: weigh each column in the search of scales by its mean square alone, from one run of the model as it
            is. Faster, in the memory of a row for each layer, and not as good. It takes no ``blocks``, ``offload`` or
            ``resume``, and calls ``progress`` once.
        offload: a folder to hold hidden states, instead of memory; empty again afterwards. A process that is killed
            leaves a folder ``hidden-states-...`` in it, which nothing reads: remove it.
        resume: a folder to hold the layers of each block that is done. A call with the same arguments after the
            process was ended takes them from there, and returns the same, byte for byte.
        progress: called after each block with how many are done, how many there are, and the seconds left.
        tokenizer, seed, temperature, tokens: of what "self" and "random" draw: the model's tokenizer, as transformers
            has it, without which "random" draws from all rows of the embedding but the tokens that the model's config
            names; with a temperature of 1, "self" draws tokens as the model predicts; how many there are.

    Returns:
        The model, changed in place. Calibrated layers have the ``quantized.method`` "calibrated", or "search" with
        ``diagonal``.

    Raises:
        TypeError: batches that can be iterated only once, a batch or technique of another type, or "self" without a
            tokenizer.
        ValueError: no batches, a batch of padding alone, inputs of a layer that are NaN or infinite (it is named), a
            bad damping, ``blocks`` that match nothing or cannot be run one by one, options that ``diagonal`` does not
            take, "self" with a model that does not generate, "random" with one that has no embedding, either with a
            tokenizer of another vocabulary, or what ``convert`` rejects. After any error, also one of the model's
            own, the model is unchanged.
        FileError: a file in ``resume`` is damaged, or of another model, other batches or settings.
        OSError: ``offload`` or ``resume`` cannot be written.

    Warns:
        UserWarning: layers of other types, that no batch reached, whose inputs were all zero or all alike, or had
            fewer rows than columns; blocks that read more than what those before them return.
    """
    _check_calibration_arguments(batches, technique, damping, progress)
    if not isinstance(diagonal, bool):
        raise ValueError(f"diagonal={short_repr(diagonal)} must be True or False")
    for name, value in {"blocks": blocks, "offload": offload, "resume": resume}.items():
        if diagonal and value is not None:
            raise ValueError(
                f"{name}={short_repr(value)} does not apply with diagonal=True, which runs the model once and keeps "
                "nothing of it: use only one of them"
            )
    where = cache(where) if callable(where) else where  # it may be slow, or ask a person
    selection = select_paths_and_names_by_module(model, (technique,), where, skip)
    candidates = {layer: path for layer, (path, _) in selection.items()}
    check_layers_are_changeable("calibrate", candidates)
    if isinstance(batches, str):
        check_token_count(tokens)
        batches = (
            self_generated_token_batches(model, tokenizer, seed, temperature, tokens)
            if batches == "self"
            else random_token_batches(model, tokenizer, seed, tokens)
        )
    if not any(True for _ in batches):
        raise ValueError("batches is empty: pass one batch at least, or use convert, which needs none")
    steps, chosen = _techniques_with_search_and_budget(model, technique, selection, where, batches)
    with linear_layers_in_fast_dtype(model), evaluation_without_gradients(model) as overrides:
        run = _CalibrationRun(model, batches, candidates, damping, overrides, progress, steps)
        lists = [] if diagonal else select_block_lists(model, run.layers_to_calibrate, blocks)
        run.quantize_uncalibrated_layers()
        if diagonal:
            run.quantize_by_column_mean_squares()
        else:
            if resume is not None:
                stored = sorted((candidates[layer], str(layer_steps)) for layer, layer_steps in steps.items())
                digest = calibration_digest(model, batches, f"{damping} {blocks} {stored}")
                run.finished_units = FinishedUnitFiles(checked_path("resume", resume), digest)
            folder = None if offload is None else checked_path("offload", offload)
            units = run.find_units_and_set_replay_mode(lists, folder, blocks_requested=blocks is not None)
            run.calibrate_units(units, lists, folder)
        run.quantize_unreached_layers(run.layers_to_calibrate)
    for layer, budget_choice in chosen.items():
        cast(StoredModule, run.replacements[layer]).chosen_because = budget_choice.why
    for text in run.iterate_warning_texts():
        # The caller of the wrapped function
        warnings.warn(text, UserWarning, stacklevel=3)
    commit_replacements_and_freeze_if_adapted(model, run.replacements)
    record_user_exclusions(model, where, skip, FourBit)
    return model


def _check_calibration_arguments(batches: object, technique: object, damping: object, progress: object) -> None:
    if isinstance(batches, FourBit | Budget):
        raise TypeError(
            f"batches={short_repr(batches)} is a technique: the order is calibrate(model, batches, technique)"
        )
    if type(technique) not in (FourBit, Budget):
        raise TypeError(
            f"technique={short_repr(technique)} must be a FourBit or a Budget; convert applies the others"
        )
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise ValueError(f"damping={short_repr(damping)} must be a number above 0; 0.01 suits most models")
    if progress is not None:
        check_callable_with("progress", progress, "callable with two counts and seconds, or None", 1, 1, 0.0)
    if not (isinstance(batches, str) and batches in WITHOUT_TEXT):
        check_batches_reiterable(batches)


def _techniques_with_search_and_budget(
    model: nn.Module,
    technique: FourBit | Budget,
    selection: Mapping[nn.Module, tuple[str, list[str]]],
    where: ModuleFilter,
    batches: Iterable[Any],
) -> tuple[dict[nn.Module, tuple[LayerTechnique, ...]], dict[nn.Module, BudgetChoice]]:
    """Return how each layer is stored, with a search of scales, and what it got of a budget."""
    if isinstance(technique, Budget) and technique.inputs is None:
        technique = replace(technique, inputs=batches)
    steps, chosen = techniques_and_budget_by_layer(model, (technique,), selection, where)
    for layer, (first, *rest) in steps.items():
        if isinstance(first, FourBit):
            steps[layer] = (replace(first, search=first.search is not False), *rest)
    return steps, chosen


@dataclass
class _CalibrationRun:
    """What a calibration has made so far, while the model is as it was."""

    model: nn.Module
    batches: Iterable[Any]
    candidates: dict[nn.Module, str]
    damping: float
    overrides: ExitStack
    progress: Callable[[int, int, float], object] | None
    steps: Mapping[nn.Module, tuple[LayerTechnique, ...]]  # how each layer is stored
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    uncalibrated: dict[nn.Module, str] = field(default_factory=dict)  # quantized by their weights alone, and why
    few_rows: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)  # fewer rows than columns: both numbers
    finished_units: FinishedUnitFiles | None = None  # None: nothing is written
    keep_all: bool | None = (
        False  # the outputs of all blocks that are done; None: of no block, as replay_refusal says
    )
    replay_refusal: str = ""
    store_factory: StoreFactory = field(default_factory=cached_store_factory)

    @cached_property
    def layers_to_calibrate(self) -> list[nn.Module]:
        """The layers to calibrate, which are stored in 4 bits."""
        layers: list[Any] = list(self.candidates)
        held = Counter(
            weight_memory_key(layer._parameters[name]) for layer in layers for name in storable_parameter_names(layer)
        )
        plain = [
            candidate
            for candidate in layers
            if type(candidate) is nn.Linear and held[weight_memory_key(candidate.weight)] == 1
        ]
        return [layer for layer in plain if isinstance(self.steps[layer][0], FourBit)]

    @cached_property
    def bias_corrected_layers(self) -> set[nn.Module]:
        """Those of ``layers_to_calibrate`` with a bias of their own, which can make up for the mean of the error."""
        biases = Counter(id(module._parameters.get("bias")) for module in self.model.modules())
        biases_by_layer = {layer: layer._parameters["bias"] for layer in self.layers_to_calibrate}
        return {layer for layer, bias in biases_by_layer.items() if bias is not None and biases[id(bias)] == 1}

    def quantize_and_replace_forward(self, layer: nn.Module, store_factory: StoreFactory) -> Any:
        """Make what a layer becomes, and let it compute in the layer's place."""
        made: Any = converted_copy(layer, self.steps[layer], self.candidates[layer], {}, store_factory)
        self.replacements[layer] = made
        self.overrides.enter_context(replaced_forward(layer, made.forward))
        return made

    def quantize_by_weight_alone(self, layer: nn.Module, warning_reason: str = "") -> Any:
        """Quantize a layer by its weight alone; a warning says why, if there is a reason."""
        if warning_reason:
            self.uncalibrated[layer] = warning_reason
        return self.quantize_and_replace_forward(layer, self.store_factory)

    def quantize_uncalibrated_layers(self) -> None:
        """Quantize by their weights alone what is not calibrated."""
        for layer in [candidate for candidate in self.candidates if candidate not in self.layers_to_calibrate]:
            expected = type(layer) is nn.Linear or isinstance(layer, _BY_WEIGHTS)
            needs_warning = not expected and isinstance(self.steps[layer][0], FourBit)
            self.quantize_by_weight_alone(
                layer, f"of type {type(layer).__name__}, not nn.Linear itself" if needs_warning else ""
            )

    def quantize_unreached_layers(self, layers: Iterable[nn.Module]) -> None:
        """Quantize by their weights alone the layers that no batch has reached."""
        for layer in layers:
            if layer not in self.replacements:
                self.quantize_by_weight_alone(layer, "no batch reached it")

    def iterate_warning_texts(self) -> Iterator[str]:
        """Yield what to warn of."""
        alike: dict[str, list[str]] = {}
        for layer, why in self.uncalibrated.items():
            alike.setdefault(why, []).append(self.candidates[layer])
        if alike:
            texts = "; ".join(f"{abbreviated_layer_names(paths)}: {why}" for why, paths in alike.items())
            yield f"layers were quantized by their weights alone ({texts})"
        if self.replay_refusal:
            yield (
                f"blocks read more than what those before them return ({self.replay_refusal}): all before a block "
                "were run "
                "anew for it, which takes time by the square of the depth"
            )
        if self.few_rows:
            layer, (rows, columns) = max(self.few_rows.items(), key=lambda item: item[1][1] / item[1][0])
            yield (
                f"fewer rows than columns reached {len(self.few_rows)} layers, least of all "
                f"{layer_display_name(self.candidates[layer])} ({rows} rows, {columns} columns), which are damped "
                "the more: "
                "pass more samples"
            )

    def find_units_and_set_replay_mode(
        self, block_lists: list[list[nn.Module]], offload_folder: Path | None, *, blocks_requested: bool
    ) -> list[CalibrationUnit]:
        """Return the calibration units, and find out by the first batch what has to be kept of those done."""
        blocks = [block for block_list in block_lists for block in block_list]
        inside = {layer for block in blocks for layer in block.modules()}
        noted = (
            [*blocks, *(layer for layer in self.layers_to_calibrate if layer not in inside)] if block_lists else []
        )
        with recording_first_input_samples(noted) as entries:
            units = run_and_group_into_units(
                self.model,
                self.batches,
                self.layers_to_calibrate,
                block_lists,
                self.bias_corrected_layers,
                blocks_requested=blocks_requested,
            )
        if any(unit.block is not None for unit in units):
            first = next(iter(self.batches))
            self.keep_all, self.replay_refusal = keep_all_outputs_and_refusal(
                self.model, first, block_lists, units, entries, offload_folder
            )
        return units

    def calibrate_units(
        self, units: list[CalibrationUnit], block_lists: list[list[nn.Module]], offload_folder: Path | None
    ) -> None:
        """Quantize the layers of all units, in their order."""
        for keep_all in (True,) if self.keep_all else (False, True):
            with (
                BlockReplay(self.model, block_lists, offload_folder, keep_all) as replay,
                suppress(DroppedOutputRead),
            ):  # what is done runs again
                self._calibrate_or_resume_units(units, replay)
                return

    def _calibrate_or_resume_units(self, units: list[CalibrationUnit], replay: BlockReplay) -> None:
        start, done = time.monotonic(), 0
        for number, unit in enumerate(units):
            if not any(layer in self.replacements for layer in unit.layers) and not self._substitute_unit_if_saved(
                number, unit
            ):
                self._quantize_unit(unit, replay)
                self._save_unit_if_resumable(number, unit)
                done += 1
            if unit.block is not None and self.keep_all is not None and number + 1 < len(units):
                replay.cache_and_replay_block(unit.block, self.batches)
            if self.progress is not None:
                left = (time.monotonic() - start) / max(1, done) * (len(units) - number - 1)
                self.progress(number + 1, len(units), left)

    def _quantize_unit(self, unit: CalibrationUnit, replay: BlockReplay) -> None:
        """Quantize a unit's layers by the moments of its inputs; DroppedOutputRead if they may be of dropped ones."""
        moments, groups = replay.collect_input_moments_and_groups(unit, self.batches, self.bias_corrected_layers)
        if replay.has_dropped and not all(input_moments.is_finite() for input_moments in moments.values()):
            # Before a layer is replaced: all of the unit are done again
            raise DroppedOutputRead
        self._check_finite_moments(moments)
        for group in groups:
            input_moments = moments.pop(group[0])
            hessian = prepare_hessian_or_none(
                input_moments.second_moments_or_covariance(),
                self.damping * max(1.0, input_moments.columns / max(1, input_moments.rows)),
            )
            group_store_factory = (
                None if hessian is None else _store_factory_from_function(partial(quantize_gptq, hessian=hessian))
            )
            self._quantize_and_correct_biases(group, input_moments, group_store_factory)
            if group_store_factory is not None and input_moments.rows < input_moments.columns:
                self.few_rows |= dict.fromkeys(group, (input_moments.rows, input_moments.columns))
            # Before the next one is computed
            del hessian, group_store_factory
        self.quantize_unreached_layers(unit.layers)

    def _check_finite_moments(self, moments_by_layer: Mapping[nn.Module, RunningMoments]) -> None:
        for layer, input_moments in moments_by_layer.items():
            if not input_moments.is_finite():
                raise ValueError(
                    f"{layer_display_name(self.candidates[layer])}: its inputs hold NaN or infinite values, or too "
                    "large "
                    "ones to square: look for a broken batch or weight before it, or leave it out with skip="
                )

    def _quantize_and_correct_biases(
        self, layers: list[Any], input_moments: RunningMoments, store_factory: StoreFactory | None
    ) -> None:
        """Quantize layers with one input; None: by their weights alone, as their input tells nothing of the weights.

        The bias of a layer takes over the mean of the error: ``(W - W_q) E[x]``.
        """
        for layer in layers:
            if store_factory is None:
                constant = layer in self.bias_corrected_layers and bool(input_moments.mean.any())
                made = self.quantize_by_weight_alone(layer, f"its inputs are all {'alike' if constant else 'zero'}")
            else:
                made = self.quantize_and_replace_forward(layer, store_factory)
            if layer in self.bias_corrected_layers:
                mean = (layer.weight.float() - made.quantized.dequantize()) @ input_moments.mean
                self._set_replacement_bias(layer, (layer.bias.float() + mean).to(layer.bias.dtype))

    def _set_replacement_bias(self, layer: Any, bias: Tensor) -> None:
        self.replacements[layer]._parameters["bias"] = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)

    def quantize_by_column_mean_squares(self) -> None:
        """Quantize all layers with scales searched for by the mean square of each column of their inputs."""
        inputs = InputMomentCollector(
            self.layers_to_calibrate, self.bias_corrected_layers, set(self.layers_to_calibrate), diagonal=True
        )
        with inputs.collecting_inputs():
            for number, batch in enumerate(self.batches):
                inputs.start_batch(unpadded_token_mask_or_none(batch, number))
                run_batch(self.model, batch)
        self._check_finite_moments(inputs.moments)
        for layer, input_moments in inputs.moments.items():
            importance = input_moments.second_moments_or_covariance()
            mean = float(importance.mean())
            layer_store_factory = _store_factory_from_function(
                partial(quantize_with_column_importance, importance=importance.add(self.damping * mean))
            )
            self._quantize_and_correct_biases([layer], input_moments, layer_store_factory if mean > 0 else None)
        if self.progress is not None:
            self.progress(1, 1, 0.0)

    def _save_unit_if_resumable(self, unit_index: int, unit: CalibrationUnit) -> None:
        """Write the file of a unit."""
        tensors, records = dict[str, Tensor](), list[Any]()
        for place, layer in enumerate(unit.layers):
            made: Any = self.replacements[layer]
            weight: QuantizedTensor = made.quantized
            tensors |= {f"{place}.packed": weight.packed, f"{place}.scales": weight.scales}
            tensors |= {f"{place}.bias": made.bias} if layer in self.bias_corrected_layers else {}
            how = [weight.format, weight.block_size, weight.scale_encoding, weight.method]
            records.append([self.uncalibrated.get(layer), self.few_rows.get(layer), *how])
        if self.finished_units is not None:
            self.finished_units.save_unit(unit_index, tensors, records)

    def _substitute_unit_if_saved(self, unit_index: int, unit: CalibrationUnit) -> bool:
        """Take the layers of a unit from its file; return whether there is one."""
        tensors, records = (self.finished_units and self.finished_units.load_unit_or_none(unit_index)) or ({}, [])
        layers: list[Any] = unit.layers
        for place, (layer, (why, few_rows, *how)) in enumerate(zip(layers, records, strict=False)):
            packed, scales = (tensors[f"{place}.{part}"].to(layer.weight.device) for part in ("packed", "scales"))
            weight = QuantizedTensor(packed, scales, layer.weight.shape, *how)
            self.quantize_and_replace_forward(layer, _store_factory_from_function(lambda *_, weight=weight: weight))
            if layer in self.bias_corrected_layers:
                self._set_replacement_bias(layer, tensors[f"{place}.bias"].to(layer.bias.device))
            self.uncalibrated |= {} if why is None else {layer: why}
            self.few_rows |= {} if few_rows is None else {layer: tuple(few_rows)}
        return bool(records)


def _store_factory_from_function(quantize_weight: Callable[[Tensor, FourBit], QuantizedTensor]) -> StoreFactory:
    """Return a replacement for ``cached_store_factory`` that quantizes by a function of a weight and a technique."""
    return lambda technique: lambda weight, name: quantize_weight(weight, technique)
