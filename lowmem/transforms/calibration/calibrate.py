"""Converts a model to 4 bits, with linear layers quantized by what they get of sample inputs, block by block."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from torch import Tensor, nn

from lowmem.errors import show
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, FourBit
from lowmem.quant.tensor import QuantizedTensor
from lowmem.resident import returns_free_pages
from lowmem.transforms.assign import divided, techniques_by_layer
from lowmem.transforms.budget import Chosen
from lowmem.transforms.calibration.blocks import NO_BATCHES, Unit, find_blocks, units_of
from lowmem.transforms.calibration.finished_units import FinishedUnits, digest_of
from lowmem.transforms.calibration.generated import generated_batches
from lowmem.transforms.calibration.gptq import prepare_hessian, quantize_gptq, quantize_weighted
from lowmem.transforms.calibration.moments import Inputs, Moments, Regroup, counted_rows
from lowmem.transforms.calibration.replay import Replay, Stale, noted_inputs, way_to_replay
from lowmem.transforms.calibration.runs import computing, evaluation_mode, run_batch
from lowmem.transforms.commit import commit
from lowmem.transforms.refusals import refuse_layers
from lowmem.transforms.registry import Step, layer_name, layer_names, parameters_to_store
from lowmem.transforms.select import select_to_convert
from lowmem.transforms.store import rebuild, storing_once
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
    before return for all batches (the hidden states; those of other lists of blocks, too, as an encoder's), and the
    second moments of one block's inputs: float32 (in, in) for each input, with a few copies of the largest. Blocks
    are the children of the outermost nn.ModuleList or nn.Sequential that hold linear layers, if they are of one type.
    Layers outside of blocks, and all of a model without blocks or with blocks that are called several times, are done
    input by input: a run of what lies before them for each.

    The model runs in evaluation mode without gradients. In batches with an ``attention_mask`` (batch, tokens) the
    rows of tokens count where it is not 0, elsewhere all do. Embeddings, output layers in 8 bits, convolutions and
    linear layers with a shared weight are quantized by their weights alone, and so are, with a warning, layers that
    no batch reaches, and those of other types: subclasses of nn.Linear, transformers' Conv1D, attention of torch,
    recurrent layers, experts. Scales are searched for, unless ``search=False``.

    Args:
        model: any module; the root itself can be the layer.
        batches: typical inputs of the model, a few thousand rows in all, the same at each iteration (a list, a
            DataLoader). Each is a Tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
            "self": 4096 tokens, 32 texts of 128, which a causal language model generates itself (LLM-QAT, arXiv
            2305.17888), fewer where it takes fewer positions.
        technique: how to store; of several formats each layer gets the one with the least weighted error. A
            ``Budget`` is divided first, as ``convert`` does, by its ``inputs``, or else by these batches: the dense
            model runs forward and backward on each once. Layers that get 8 bits keep the nearest codes.
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
        The model, changed in place. Calibrated layers have ``quantized.method == "calibrated"``, with ``diagonal``
        "search".

    Raises:
        TypeError: batches that can be iterated only once, a batch of another type, a technique but FourBit and
            Budget, or "self" without a tokenizer.
        ValueError: no batches, a batch of padding alone, inputs of a layer that are NaN or infinite (it is named), a
            bad damping, ``blocks`` that match nothing or cannot be run one by one, options that ``diagonal`` does not
            take, "self" with a model that does not generate or a tokenizer of another vocabulary, or what ``convert``
            rejects.
        FileError: a file in ``resume`` is damaged, or of another model, other batches or settings.
        OSError: ``offload`` or ``resume`` cannot be written.

        After any error, also one of the model's own, the model is unchanged.

    Warns:
        UserWarning: layers of other types, that no batch reached, whose inputs were all zero or all alike, or had
            fewer rows than columns; blocks that read more than what those before them return.
    """
    _check_arguments(batches, technique, damping)
    for name, value in {"blocks": blocks, "offload": offload, "resume": resume}.items():
        if diagonal and value is not None:
            raise ValueError(
                f"{name}={show(value)} does not apply with diagonal=True, which runs the model once and keeps "
                "nothing of it: use only one of them"
            )
    found = select_to_convert(model, (technique,), where, skip)
    candidates = {layer: path for layer, (path, _) in found.items()}
    refuse_layers("calibrate", candidates)
    if isinstance(batches, str):
        batches = generated_batches(model, tokenizer, seed, temperature)
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
                run.finished = FinishedUnits(Path(resume), digest)
            folder = None if offload is None else Path(offload)
            units = run.find_units(lists, folder, asked=blocks is not None)
            run.calibrate(units, lists, folder)
        run.replace_unreached(run.linear)
    for layer, one in chosen.items():
        cast(StoredModule, run.replacements[layer]).chosen_because = one.why
    for text in run.warnings():
        warnings.warn(text, UserWarning, stacklevel=3)  # the caller of the wrapped function
    commit(model, run.replacements)
    return model


def _check_arguments(batches: object, technique: object, damping: object) -> None:
    if type(technique) not in (FourBit, Budget):
        raise TypeError(f"technique={technique!r} must be a FourBit or a Budget; convert applies the others")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise ValueError(f"damping={damping!r} must be a number above 0; 0.01 suits most models")
    if isinstance(batches, str) and batches == "self":
        return
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which can be read only once; pass a list of it: list(batches)"
        )
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; pass a list of batches, if only of one: [batch]")


def _steps(
    model: nn.Module,
    technique: FourBit | Budget,
    found: Mapping[nn.Module, tuple[str, list[str]]],
    where: Callable[[str, nn.Module], bool] | None,
    batches: Iterable[Any],
) -> tuple[dict[nn.Module, tuple[Step, ...]], dict[nn.Module, Chosen]]:
    """Return how each layer is stored, with a search of scales, and what it got of a budget."""
    chosen: dict[nn.Module, Chosen] = {}
    if isinstance(technique, Budget):
        if technique.inputs is None:
            if not any(True for _ in batches):
                raise ValueError(NO_BATCHES)
            technique = replace(technique, inputs=batches)
        chosen = divided(model, technique, found)
        steps: dict[nn.Module, tuple[Step, ...]] = {layer: (one.technique,) for layer, one in chosen.items()}
    else:
        steps = techniques_by_layer(model, (technique,), found, where)
    for layer, (first, *rest) in steps.items():
        if isinstance(first, FourBit):
            steps[layer] = (replace(first, search=first.search is not False), *rest)
    return steps, chosen


@dataclass
class _Run:
    """What a calibration has made so far, while the model is as it was.

    Attributes:
        steps: how each layer is stored: embeddings and output layers in 8 bits, if the technique says so.
        linear: the layers to calibrate, which are stored in 4 bits.
        centred: those of them with a bias of their own, which can make up for the mean of the error.
        replacements: what layers become.
        uncalibrated: layers that were quantized by their weights alone, and why.
        few: layers with fewer rows than columns, with both numbers.
        finished: files of units that are done; None: nothing is written.
        keep_all: whether the outputs of all blocks that are done are kept; None: of none, and ``why_not``.
    """

    model: nn.Module
    batches: Iterable[Any]
    candidates: dict[nn.Module, str]
    damping: float
    overrides: ExitStack
    progress: Callable[[int, int, float], object] | None
    steps: Mapping[nn.Module, tuple[Step, ...]]
    linear: list[nn.Module] = field(init=False)
    centred: set[nn.Module] = field(init=False)
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    uncalibrated: dict[nn.Module, str] = field(default_factory=dict)
    few: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    finished: FinishedUnits | None = None
    keep_all: bool | None = False
    why_not: str = ""
    store_by: Callable[[Any], Callable[[Tensor, str], Any]] = field(default_factory=storing_once)

    def __post_init__(self) -> None:
        layers: list[Any] = list(self.candidates)
        held = Counter(weight_key(layer._parameters[name]) for layer in layers for name in parameters_to_store(layer))
        self.linear = [
            layer
            for layer in layers
            if type(layer) is nn.Linear
            and held[weight_key(layer.weight)] == 1
            and isinstance(self.steps[layer][0], FourBit)
        ]
        biases = Counter(id(module._parameters.get("bias")) for module in self.model.modules())
        self.centred = {one for one in self.linear if one.bias is not None and biases[id(one.bias)] == 1}

    def path(self, layer: nn.Module) -> str:
        """Return what messages call a layer."""
        return layer_name(self.candidates[layer])

    def replace(self, layer: nn.Module, store_by: Callable[[Any], Callable[[Tensor, str], Any]]) -> Any:
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
                f"fewer rows than columns reached {len(self.few)} layers, least of all {self.path(layer)} "
                f"({rows} rows, {columns} columns), which are damped the more: pass more samples"
            )

    def find_units(self, lists: list[list[nn.Module]], offload: Path | None, *, asked: bool) -> list[Unit]:
        """Return the units, as ``units_of``, and find out by the first batch what has to be kept of those done."""
        inside = {layer for blocks in lists for block in blocks for layer in block.modules()}
        noted = [*chain(*lists), *(layer for layer in self.linear if layer not in inside)] if lists else []
        with noted_inputs(noted) as entries:
            units = units_of(self.model, self.batches, self.linear, lists, self.centred, asked=asked)
        if any(unit.block is not None for unit in units):
            first = next(iter(self.batches))
            self.keep_all, self.why_not = way_to_replay(self.model, first, lists, units, entries, offload)
        return units

    def calibrate(self, units: list[Unit], lists: list[list[nn.Module]], offload: Path | None) -> None:
        """Quantize the layers of all units, in their order."""
        for keep_all in (True,) if self.keep_all else (False, True):
            with Replay(self.model, lists, offload, keep_all) as replay:
                try:
                    self._calibrate(units, replay)
                except Stale:  # what is done is kept, and runs again
                    continue
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
        moments, groups = self._moments(unit, replay)
        if replay.has_dropped and not all(own.is_finite() for own in moments.values()):
            raise Stale  # before a layer is replaced: all of the unit are done again
        self._refuse_not_finite(moments)
        for group in groups:
            own = moments.pop(group[0])
            hessian = prepare_hessian(own.second(), self.damping * max(1.0, own.columns / max(1, own.rows)))
            if hessian is None:
                self._replace_constant(group, own)
                continue
            for layer in group:
                self.replace(layer, _storing(partial(quantize_gptq, hessian=hessian)))
                self._correct_bias(layer, own)
            if own.rows < own.columns:
                self.few |= dict.fromkeys(group, (own.rows, own.columns))
            del hessian  # before the next one is computed
        self.replace_unreached(unit.layers)

    def _moments(self, unit: Unit, replay: Replay) -> tuple[dict[nn.Module, Moments], list[list[nn.Module]]]:
        """Return the moments of a unit's inputs by the first layer that gets them, and the layers that do."""
        alone: set[nn.Module] = set()
        layers = unit.layers if unit.block is not None else unit.layers[:1]
        while True:
            inputs = Inputs(layers, self.centred, alone, stop_after=unit.calls if unit.block is None else None)
            ending = nullcontext() if unit.block is None else replay.ending_at(unit.block)
            try:
                with inputs.taken(), ending:
                    for number, batch in enumerate(self.batches):
                        inputs.start_batch(counted_rows(batch, number))
                        replay.run(number, batch)
                groups = inputs.groups()
            except Regroup:
                continue
            return inputs.moments, groups if unit.block is not None or not groups else [unit.layers]

    def _refuse_not_finite(self, moments: Mapping[nn.Module, Moments]) -> None:
        for layer, own in moments.items():
            if not own.is_finite():
                raise ValueError(
                    f"{self.path(layer)}: its inputs hold NaN or infinite values, or too large ones to square: look "
                    "for a broken batch or weight before it, or leave the layer out with skip="
                )

    def _replace_constant(self, group: list[nn.Module], own: Moments) -> None:
        """Quantize by their weights alone layers whose inputs tell nothing of the weights; biases make up for it."""
        for layer in group:
            constant = layer in self.centred and bool(own.mean.any())
            self.replace_by_weight(layer, "its inputs are all alike" if constant else "its inputs are all zero")
            self._correct_bias(layer, own)

    def _correct_bias(self, layer: Any, own: Moments) -> None:
        """Let the bias of a layer take over the mean of the error: ``(W - W_q) E[x]``."""
        if layer not in self.centred:
            return
        made: Any = self.replacements[layer]
        mean = (layer.weight.float() - made.quantized.dequantize()) @ own.mean
        bias = (layer.bias.float() + mean).to(layer.bias.dtype)
        made._parameters["bias"] = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)

    def weigh_columns(self) -> None:
        """Quantize all layers with scales searched for by the mean square of each column of their inputs."""
        inputs = Inputs(self.linear, self.centred, set(self.linear), diagonal=True)
        runs = 0
        with inputs.taken():
            for number, batch in enumerate(self.batches):
                inputs.start_batch(counted_rows(batch, number))
                run_batch(self.model, batch)
                runs += 1
        if not runs:
            raise ValueError(NO_BATCHES)
        self._refuse_not_finite(inputs.moments)
        for layer, own in inputs.moments.items():
            importance = own.second()
            mean = float(importance.mean())
            if mean <= 0:
                self._replace_constant([layer], own)
                continue
            weights = importance.add(self.damping * mean)
            self.replace(layer, _storing(partial(quantize_weighted, importance=weights)))
            self._correct_bias(layer, own)
        if self.progress is not None:
            self.progress(1, 1, 0.0)

    def _save(self, number: int, unit: Unit) -> None:
        """Write the file of a unit."""
        if self.finished is None:
            return
        tensors: dict[str, Tensor] = {}
        records: list[dict[str, Any]] = []
        for place, layer in enumerate(unit.layers):
            made: Any = self.replacements[layer]
            if layer in self.centred:
                tensors[f"{place}.bias"] = made.bias
            if layer in self.uncalibrated:
                records.append({"why": self.uncalibrated[layer]})
                continue
            weight: QuantizedTensor = made.quantized
            tensors |= {f"{place}.packed": weight.packed, f"{place}.scales": weight.scales}
            how = [weight.format, weight.block_size, weight.scale_encoding, weight.method]
            records.append({"how": how, "few": self.few.get(layer)})
        self.finished.save(number, tensors, records)

    def _load(self, number: int, unit: Unit) -> bool:
        """Take the layers of a unit from its file; return whether there is one."""
        found = None if self.finished is None else self.finished.load(number)
        if found is None:
            return False
        tensors, records = found
        for place, (layer, record) in enumerate(zip(unit.layers, records, strict=True)):
            one: Any = layer
            if "why" in record:
                made = self.replace_by_weight(layer, record["why"])
            else:
                packed, scales = (tensors[f"{place}.{part}"].to(one.weight.device) for part in ("packed", "scales"))
                weight = QuantizedTensor(packed, scales, one.weight.shape, *record["how"])
                made = self.replace(layer, _storing(lambda *_, weight=weight: weight))
            if layer in self.centred:
                bias = tensors[f"{place}.bias"].to(one.bias.device)
                made._parameters["bias"] = nn.Parameter(bias, requires_grad=one.bias.requires_grad)
            if record.get("few") is not None:
                self.few[layer] = tuple(record["few"])
        return True


def _storing(
    quantized: Callable[[Tensor, FourBit], QuantizedTensor],
) -> Callable[[Any], Callable[[Tensor, str], QuantizedTensor]]:
    """Return a replacement for ``storing_once`` that quantizes by a function of a weight and a technique."""
    return lambda technique: lambda weight, name: quantized(weight, technique)
