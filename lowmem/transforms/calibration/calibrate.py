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

from lowmem.errors import as_path, check_function, show
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, FourBit
from lowmem.quant.tensor import QuantizedTensor
from lowmem.resident import returns_free_pages
from lowmem.transforms.assign import assign
from lowmem.transforms.budget import Chosen
from lowmem.transforms.calibration.blocks import Unit, find_blocks, units_of
from lowmem.transforms.calibration.finished_units import FinishedUnits, digest_of
from lowmem.transforms.calibration.generated import generated_batches
from lowmem.transforms.calibration.gptq import prepare_hessian, quantize_gptq, quantize_weighted
from lowmem.transforms.calibration.moments import Inputs, Moments, counted_rows
from lowmem.transforms.calibration.replay import Replay, Stale, noted_inputs, way_to_replay
from lowmem.transforms.calibration.runs import check_batches, computing, evaluation_mode, run_batch
from lowmem.transforms.commit import commit
from lowmem.transforms.refusals import refuse_layers
from lowmem.transforms.registry import Step, Where, layer_name, layer_names, parameters_to_store
from lowmem.transforms.select import note_left, select_to_convert
from lowmem.transforms.store import StoreBy, rebuild, storing_once
from lowmem.transforms.ties import weight_key

M = TypeVar("M", bound=nn.Module)

_DEFAULT = FourBit()
_BY_WEIGHTS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)  # which nobody expects to be calibrated


@returns_free_pages
def calibrate(
    model: M,
    batches: Iterable[Any] | Literal["self"],
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
            "self": 4096 tokens, 32 texts of 128, which a causal language model generates itself (LLM-QAT, arXiv
            2305.17888), fewer where it takes fewer positions.
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
        tokenizer, seed, temperature: of what "self" draws: the model's tokenizer, as transformers has it; with a
            temperature of 1, tokens are drawn as the model predicts.

    Returns:
        The model, changed in place. Calibrated layers have the ``quantized.method`` "calibrated", or "search" with
        ``diagonal``.

    Raises:
        TypeError: batches that can be iterated only once, a batch or technique of another type, or "self" without a
            tokenizer.
        ValueError: no batches, a batch of padding alone, inputs of a layer that are NaN or infinite (it is named), a
            bad damping, ``blocks`` that match nothing or cannot be run one by one, options that ``diagonal`` does not
            take, "self" with a model that does not generate or a tokenizer of another vocabulary, or what ``convert``
            rejects. After any error, also one of the model's own, the model is unchanged.
        FileError: a file in ``resume`` is damaged, or of another model, other batches or settings.
        OSError: ``offload`` or ``resume`` cannot be written.

    Warns:
        UserWarning: layers of other types, that no batch reached, whose inputs were all zero or all alike, or had
            fewer rows than columns; blocks that read more than what those before them return.
    """
    _check_arguments(batches, technique, damping, progress)
    if not isinstance(diagonal, bool):
        raise ValueError(f"diagonal={show(diagonal)} must be True or False")
    for name, value in {"blocks": blocks, "offload": offload, "resume": resume}.items():
        if diagonal and value is not None:
            raise ValueError(
                f"{name}={show(value)} does not apply with diagonal=True, which runs the model once and keeps "
                "nothing of it: use only one of them"
            )
    where = cache(where) if callable(where) else where  # it may be slow, or ask a person
    found = select_to_convert(model, (technique,), where, skip)
    candidates = {layer: path for layer, (path, _) in found.items()}
    refuse_layers("calibrate", candidates)
    if isinstance(batches, str):
        batches = generated_batches(model, tokenizer, seed, temperature)
    if not any(True for _ in batches):
        raise ValueError("batches is empty: pass one batch at least, or use convert, which needs none")
    steps, chosen = _steps(model, technique, found, where, batches)
    with evaluation_mode(model) as overrides:
        run = _Run(model, batches, candidates, damping, overrides, progress, steps)
        lists = [] if diagonal else find_blocks(model, run.linear, blocks)
        run.replace_others()
        if diagonal:
            run.weigh_columns()
        else:
            if resume is not None:
                stored = sorted((candidates[layer], str(own)) for layer, own in steps.items())
                digest = digest_of(model, batches, f"{damping} {blocks} {stored}")
                run.finished = FinishedUnits(as_path("resume", resume), digest)
            folder = None if offload is None else as_path("offload", offload)
            units = run.find_units(lists, folder, asked=blocks is not None)
            run.calibrate(units, lists, folder)
        run.replace_unreached(run.linear)
    for layer, one in chosen.items():
        cast(StoredModule, run.replacements[layer]).chosen_because = one.why
    for text in run.warnings():
        warnings.warn(text, UserWarning, stacklevel=3)  # the caller of the wrapped function
    commit(model, run.replacements)
    note_left(model, where, skip, FourBit)
    return model


def _check_arguments(batches: object, technique: object, damping: object, progress: object) -> None:
    if isinstance(batches, FourBit | Budget):
        raise TypeError(f"batches={show(batches)} is a technique: the order is calibrate(model, batches, technique)")
    if type(technique) not in (FourBit, Budget):
        raise TypeError(f"technique={show(technique)} must be a FourBit or a Budget; convert applies the others")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise ValueError(f"damping={show(damping)} must be a number above 0; 0.01 suits most models")
    if progress is not None:
        check_function("progress", progress, "callable with two counts and seconds, or None", 1, 1, 0.0)
    if not (isinstance(batches, str) and batches == "self"):
        check_batches(batches)


def _steps(
    model: nn.Module,
    technique: FourBit | Budget,
    found: Mapping[nn.Module, tuple[str, list[str]]],
    where: Where,
    batches: Iterable[Any],
) -> tuple[dict[nn.Module, tuple[Step, ...]], dict[nn.Module, Chosen]]:
    """Return how each layer is stored, with a search of scales, and what it got of a budget."""
    if isinstance(technique, Budget) and technique.inputs is None:
        technique = replace(technique, inputs=batches)
    steps, chosen = assign(model, (technique,), found, where)
    for layer, (first, *rest) in steps.items():
        if isinstance(first, FourBit):
            steps[layer] = (replace(first, search=first.search is not False), *rest)
    return steps, chosen


@dataclass
class _Run:
    """What a calibration has made so far, while the model is as it was."""

    model: nn.Module
    batches: Iterable[Any]
    candidates: dict[nn.Module, str]
    damping: float
    overrides: ExitStack
    progress: Callable[[int, int, float], object] | None
    steps: Mapping[nn.Module, tuple[Step, ...]]  # how each layer is stored
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    uncalibrated: dict[nn.Module, str] = field(default_factory=dict)  # quantized by their weights alone, and why
    few: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)  # fewer rows than columns: both numbers
    finished: FinishedUnits | None = None  # None: nothing is written
    keep_all: bool | None = False  # the outputs of all blocks that are done; None: of no block, and why_not
    why_not: str = ""
    store_by: StoreBy = field(default_factory=storing_once)

    @cached_property
    def linear(self) -> list[nn.Module]:
        """The layers to calibrate, which are stored in 4 bits."""
        layers: list[Any] = list(self.candidates)
        held = Counter(weight_key(layer._parameters[name]) for layer in layers for name in parameters_to_store(layer))
        plain = [one for one in layers if type(one) is nn.Linear and held[weight_key(one.weight)] == 1]
        return [layer for layer in plain if isinstance(self.steps[layer][0], FourBit)]

    @cached_property
    def centred(self) -> set[nn.Module]:
        """Those of ``linear`` with a bias of their own, which can make up for the mean of the error."""
        biases = Counter(id(module._parameters.get("bias")) for module in self.model.modules())
        own = {layer: layer._parameters["bias"] for layer in self.linear}
        return {layer for layer, bias in own.items() if bias is not None and biases[id(bias)] == 1}

    def replace(self, layer: nn.Module, store_by: StoreBy) -> Any:
        """Make what a layer becomes, and let it compute in the layer's place."""
        made: Any = rebuild(layer, self.steps[layer], self.candidates[layer], {}, store_by)
        self.replacements[layer] = made
        self.overrides.enter_context(computing(layer, made.forward))
        return made

    def replace_by_weight(self, layer: nn.Module, why: str = "") -> Any:
        """Quantize a layer by its weight alone; a warning says why, if there is a reason."""
        if why:
            self.uncalibrated[layer] = why
        return self.replace(layer, self.store_by)

    def replace_others(self) -> None:
        """Quantize by their weights alone what is not calibrated."""
        for layer in [one for one in self.candidates if one not in self.linear]:
            expected = type(layer) is nn.Linear or isinstance(layer, _BY_WEIGHTS)
            told = not expected and isinstance(self.steps[layer][0], FourBit)
            self.replace_by_weight(layer, f"of type {type(layer).__name__}, not nn.Linear itself" if told else "")

    def replace_unreached(self, layers: Iterable[nn.Module]) -> None:
        """Quantize by their weights alone the layers that no batch has reached."""
        for layer in layers:
            if layer not in self.replacements:
                self.replace_by_weight(layer, "no batch reached it")

    def warnings(self) -> Iterator[str]:
        """Yield what to warn of."""
        alike: dict[str, list[str]] = {}
        for layer, why in self.uncalibrated.items():
            alike.setdefault(why, []).append(self.candidates[layer])
        if alike:
            texts = "; ".join(f"{layer_names(paths)}: {why}" for why, paths in alike.items())
            yield f"layers were quantized by their weights alone ({texts})"
        if self.why_not:
            yield (
                f"blocks read more than what those before them return ({self.why_not}): all before a block were run "
                "anew for it, which takes time by the square of the depth"
            )
        if self.few:
            layer, (rows, columns) = max(self.few.items(), key=lambda one: one[1][1] / one[1][0])
            yield (
                f"fewer rows than columns reached {len(self.few)} layers, least of all "
                f"{layer_name(self.candidates[layer])} ({rows} rows, {columns} columns), which are damped the more: "
                "pass more samples"
            )

    def find_units(self, lists: list[list[nn.Module]], offload: Path | None, *, asked: bool) -> list[Unit]:
        """Return the units, as ``units_of``, and find out by the first batch what has to be kept of those done."""
        blocks = [block for own in lists for block in own]
        inside = {layer for block in blocks for layer in block.modules()}
        noted = [*blocks, *(layer for layer in self.linear if layer not in inside)] if lists else []
        with noted_inputs(noted) as entries:
            units = units_of(self.model, self.batches, self.linear, lists, self.centred, asked=asked)
        if any(unit.block is not None for unit in units):
            first = next(iter(self.batches))
            self.keep_all, self.why_not = way_to_replay(self.model, first, lists, units, entries, offload)
        return units

    def calibrate(self, units: list[Unit], lists: list[list[nn.Module]], offload: Path | None) -> None:
        """Quantize the layers of all units, in their order."""
        for keep_all in (True,) if self.keep_all else (False, True):
            with Replay(self.model, lists, offload, keep_all) as replay, suppress(Stale):  # what is done runs again
                self._calibrate(units, replay)
                return

    def _calibrate(self, units: list[Unit], replay: Replay) -> None:
        start, done = time.monotonic(), 0
        for number, unit in enumerate(units):
            if not any(layer in self.replacements for layer in unit.layers) and not self._load(number, unit):
                self._quantize(unit, replay)
                self._save(number, unit)
                done += 1
            if unit.block is not None and self.keep_all is not None and number + 1 < len(units):
                replay.finish(unit.block, self.batches)
            if self.progress is not None:
                left = (time.monotonic() - start) / max(1, done) * (len(units) - number - 1)
                self.progress(number + 1, len(units), left)

    def _quantize(self, unit: Unit, replay: Replay) -> None:
        """Quantize a unit's layers by the moments of its inputs; Stale if what was not kept may be read."""
        moments, groups = replay.moments(unit, self.batches, self.centred)
        if replay.has_dropped and not all(own.is_finite() for own in moments.values()):
            raise Stale  # before a layer is replaced: all of the unit are done again
        self._refuse_not_finite(moments)
        for group in groups:
            own = moments.pop(group[0])
            hessian = prepare_hessian(own.second(), self.damping * max(1.0, own.columns / max(1, own.rows)))
            found = None if hessian is None else _storing(partial(quantize_gptq, hessian=hessian))
            self._replace_group(group, own, found)
            if found is not None and own.rows < own.columns:
                self.few |= dict.fromkeys(group, (own.rows, own.columns))
            del hessian, found  # before the next one is computed
        self.replace_unreached(unit.layers)

    def _refuse_not_finite(self, moments: Mapping[nn.Module, Moments]) -> None:
        for layer, own in moments.items():
            if not own.is_finite():
                raise ValueError(
                    f"{layer_name(self.candidates[layer])}: its inputs hold NaN or infinite values, or too large "
                    "ones to square: look for a broken batch or weight before it, or leave it out with skip="
                )

    def _replace_group(self, group: list[Any], own: Moments, store_by: StoreBy | None) -> None:
        """Quantize layers with one input; None: by their weights alone, as their input tells nothing of the weights.

        The bias of a layer takes over the mean of the error: ``(W - W_q) E[x]``.
        """
        for layer in group:
            if store_by is None:
                constant = layer in self.centred and bool(own.mean.any())
                made = self.replace_by_weight(layer, f"its inputs are all {'alike' if constant else 'zero'}")
            else:
                made = self.replace(layer, store_by)
            if layer in self.centred:
                mean = (layer.weight.float() - made.quantized.dequantize()) @ own.mean
                self._set_bias(layer, (layer.bias.float() + mean).to(layer.bias.dtype))

    def _set_bias(self, layer: Any, bias: Tensor) -> None:
        self.replacements[layer]._parameters["bias"] = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)

    def weigh_columns(self) -> None:
        """Quantize all layers with scales searched for by the mean square of each column of their inputs."""
        inputs = Inputs(self.linear, self.centred, set(self.linear), diagonal=True)
        with inputs.taken():
            for number, batch in enumerate(self.batches):
                inputs.start_batch(counted_rows(batch, number))
                run_batch(self.model, batch)
        self._refuse_not_finite(inputs.moments)
        for layer, own in inputs.moments.items():
            importance = own.second()
            mean = float(importance.mean())
            found = _storing(partial(quantize_weighted, importance=importance.add(self.damping * mean)))
            self._replace_group([layer], own, found if mean > 0 else None)
        if self.progress is not None:
            self.progress(1, 1, 0.0)

    def _save(self, number: int, unit: Unit) -> None:
        """Write the file of a unit."""
        tensors, records = dict[str, Tensor](), list[Any]()
        for place, layer in enumerate(unit.layers):
            made: Any = self.replacements[layer]
            weight: QuantizedTensor = made.quantized
            tensors |= {f"{place}.packed": weight.packed, f"{place}.scales": weight.scales}
            tensors |= {f"{place}.bias": made.bias} if layer in self.centred else {}
            how = [weight.format, weight.block_size, weight.scale_encoding, weight.method]
            records.append([self.uncalibrated.get(layer), self.few.get(layer), *how])
        if self.finished is not None:
            self.finished.save(number, tensors, records)

    def _load(self, number: int, unit: Unit) -> bool:
        """Take the layers of a unit from its file; return whether there is one."""
        tensors, records = (self.finished and self.finished.load(number)) or ({}, [])
        layers: list[Any] = unit.layers
        for place, (layer, (why, few, *how)) in enumerate(zip(layers, records, strict=False)):
            packed, scales = (tensors[f"{place}.{part}"].to(layer.weight.device) for part in ("packed", "scales"))
            weight = QuantizedTensor(packed, scales, layer.weight.shape, *how)
            self.replace(layer, _storing(lambda *_, weight=weight: weight))
            if layer in self.centred:
                self._set_bias(layer, tensors[f"{place}.bias"].to(layer.bias.device))
            self.uncalibrated |= {} if why is None else {layer: why}
            self.few |= {} if few is None else {layer: tuple(few)}
        return bool(records)


def _storing(quantized: Callable[[Tensor, FourBit], QuantizedTensor]) -> StoreBy:
    """Return a replacement for ``storing_once`` that quantizes by a function of a weight and a technique."""
    return lambda technique: lambda weight, name: quantized(weight, technique)
