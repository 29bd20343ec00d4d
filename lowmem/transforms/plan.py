"""Plans the memory of a model before it is converted, without its weights: stored bytes of empty layers, and forward,
backward and an optimizer's step on fake tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from lowmem import measure
from lowmem.errors import check_function, show
from lowmem.kernels.cpu import OFFSETS_SCRATCH
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter
from lowmem.nn.embedding import CodedEmbedding, HalfEmbedding
from lowmem.nn.forms import CodedForm
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, LoRA
from lowmem.quant.scales import get_encoding
from lowmem.transforms.bits import SMALLEST, text_of
from lowmem.transforms.commit import commit, integrations_of
from lowmem.transforms.convert import convert, rebuild_all
from lowmem.transforms.meta import check_factory, make_on_meta
from lowmem.transforms.registry import Technique, Where, stored_by
from lowmem.transforms.store import storing_once
from lowmem.transforms.summary import aligned

OPTIMIZERS: MappingProxyType[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = MappingProxyType(
    {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_SCRATCH = 2**20  # bytes that a product with a stored weight takes at most, beside its output
_STORING = 2**21  # bytes for a chunk of rows that is quantized, and one whose error is measured


@dataclass(frozen=True)
class Plan:
    """The bytes that a model takes. ``print`` shows a table.

    Attributes:
        techniques: in their order.
        training: the optimizer; None if inference alone was planned.
        dense: parameters and buffers of the model before it is converted.
        stored: those of the converted model, by technique: "dense", "Half", "FourBit", "EightBit", "adapters". Exact.
        inputs: the batch.
        forward: peak of an inference forward beyond model and inputs, output included.
        scratch: what the products with stored weights take beside that, at most; 0 without any.
        gradients: of the parameters that get one. Exact.
        optimizer: its state. Exact, with AdamW's count of steps for each parameter.
        backward: peak of a training forward and backward beyond model, inputs and optimizer, gradients included.
        update: peak of the optimizer's step beyond the model: gradients, state and temporaries.
        load: peak of ``lowmem.load``: the mapped file, buffers, and one dense parameter while the factory makes it.
        conversion: peak of ``lowmem.convert``: the dense model, what is stored anew, and temporaries.
        cache: keys and values of the planned tokens, with the room of a ``lowmem.KeyValueCache``. Exact.
    """

    techniques: tuple[Technique, ...]
    training: str | None
    dense: int
    stored: Mapping[str, int]
    inputs: int
    forward: int
    scratch: int
    gradients: int
    optimizer: int
    backward: int
    update: int
    load: int
    conversion: int
    cache: int = 0

    @property
    def stored_bytes(self) -> int:
        """All parameters and buffers of the converted model."""
        return sum(self.stored.values())

    @property
    def inference_bytes(self) -> int:
        """Peak of an inference forward: model, inputs, activations, scratch, and the cache of keys and values."""
        return self.stored_bytes + self.inputs + self.forward + self.scratch + self.cache

    @property
    def training_bytes(self) -> int:
        """Peak of a training step: model, inputs, gradients, optimizer, activations, scratch; 0 without training."""
        if self.training is None:
            return 0
        step = max(self.optimizer + self.backward, self.update)
        return self.stored_bytes + self.inputs + step + self.scratch

    @property
    def total_bytes(self) -> int:
        """What has to fit: that of training, or that of inference without training."""
        return self.training_bytes or self.inference_bytes

    @property
    def rows(self) -> list[tuple[str, int]]:
        """The lines of the table: what takes the bytes, and how many."""
        found = [("dense model", self.dense)]
        found += [(f"stored: {name}", size) for name, size in self.stored.items()]
        found += [("inputs", self.inputs), ("forward", self.forward), ("scratch, at most", self.scratch)]
        found += [("keys and values", self.cache)] if self.cache else []
        if self.training is not None:
            found += [
                ("gradients", self.gradients),
                (f"{self.training} state", self.optimizer),
                ("forward and backward", self.backward),
                (f"{self.training} step", self.update),
            ]
        found += [("peak of load", self.load), ("peak of convert", self.conversion)]
        found += [("total for inference", self.inference_bytes)]
        return found if self.training is None else [*found, ("total for training", self.training_bytes)]

    @property
    def columns(self) -> list[str]:
        """The titles of the columns of ``cells``."""
        return ["Memory", "MiB"]

    @property
    def cells(self) -> list[list[str]]:
        """The texts of the table: ``rows``, in MiB."""
        return [[name, f"{size / 2**20:.2f}"] for name, size in self.rows]

    def __str__(self) -> str:
        return "\n".join([text_of(self.techniques), *aligned([self.columns, *self.cells], right=(1,))])

    def as_json(self) -> dict[str, Any]:
        """Return the figures as integers, and the techniques as text: what JSON can hold."""
        totals = ("stored_bytes", "inference_bytes", "training_bytes")
        figures = asdict(self) | {name: getattr(self, name) for name in totals}
        return figures | {"techniques": [text_of([technique]) for technique in self.techniques]}


@dataclass(frozen=True)
class Skeleton:
    """A converted model on the meta device, and the ``Plan`` figures of its making."""

    model: nn.Module
    techniques: tuple[Technique, ...]
    dense: int
    load: int
    conversion: int


def plan(
    make: Callable[[], nn.Module],
    *techniques: Technique,
    batch: Any,
    training: str | None = "adamw",
    loss: Callable[[Any], Tensor] | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
    at_most: str | int | None = None,
    tokens: int | None = None,
    sequences: int = 1,
    cache_bits: int | None = None,
) -> Plan:
    """Return the memory that a model takes, converted by techniques; its weights are never allocated.

    Stored bytes, gradients and optimizer state are exact. Peaks are those of ``lowmem.measure`` on a CPU: outputs of
    operations count, workspaces inside one (an LSTM's backward) do not, and the output is not held in the backward.
    ``scratch`` is the most that a product with a stored weight takes; where torch multiplies large inputs (256
    rows and more, see ``lowmem.kernels.explain``), it is at most 767 dequantized rows or columns of a weight instead.

    Args:
        make: makes the dense model. It is called with the meta device as torch's default; if it needs values of its
            own tensors, once more with its parameters alone there.
        techniques: as ``convert`` takes them; none: the dense model. What a ``Budget`` chooses depends on values: it
            is divided as among normal weights, so that stored bytes are those of ``convert`` to a step of one layer.
        batch: inputs of the model, of which only shapes and dtypes matter (they may be on the meta device): a tensor,
            a tuple of positional arguments, or a mapping of named ones.
        training: "adamw", "sgd" (without momentum), or None for inference.
        loss: returns a scalar for the model's output; None takes the output's ``loss``, or the sum of its tensors.
        where, skip: as in ``convert``.
        at_most: bytes, or text such as "24GiB", that the total may take, in place of ``techniques``: the first that
            fits is taken, from the dense model to 4 bits in blocks of 4096 (with ``LoRA()`` for training).
        tokens: of each sequence, prompt and answer, whose keys and values a ``lowmem.KeyValueCache`` keeps while a
            language model of transformers generates; None plans no cache.
        sequences: that are generated at once.
        cache_bits: ``bits`` of the cache.

    Raises:
        TypeError: a technique, model or batch of another type.
        ValueError: another ``training``; techniques that ``convert`` rejects; a model that needs values to be made or
            run; ``tokens`` of a model without such a cache; or nothing fits ``at_most``: the least that is possible
            is named.
    """
    if training is not None and training not in OPTIMIZERS:
        raise ValueError(f"training={show(training)} is unknown: choose from None, {', '.join(OPTIMIZERS)}")
    if loss is not None:
        check_function("loss", loss, "a function of the model's output, or None", None)
    if tokens is None and (sequences != 1 or cache_bits is not None):
        raise ValueError(
            f"sequences={show(sequences)}, cache_bits={show(cache_bits)}: plan a cache, and give its tokens"
        )
    if min(1 if tokens is None else tokens, sequences) < 1:
        raise ValueError(f"tokens={tokens!r} and sequences={sequences!r} must be at least 1")
    cached = None if tokens is None else (sequences, tokens, cache_bits)
    if at_most is None:
        given = skeleton_of(make, techniques, where, skip)
        return plan_of(given, training, run_figures(given.model, batch, training, loss, cached))
    if techniques:
        raise ValueError(f"at_most={show(at_most)} proposes techniques: leave out {text_of(techniques)}")
    limit = bytes_of(at_most)
    runs: dict[tuple[type, ...], dict[str, int]] = {}  # block size and scales have no influence on them
    plans: list[Plan] = []
    tight: list[tuple[int, Skeleton]] = []  # what does not fit by its stored bytes alone
    refused = None

    def planned(found: Skeleton) -> Plan:
        kinds = tuple(map(type, found.techniques))
        if kinds not in runs:
            runs[kinds] = run_figures(found.model, batch, training, loss, cached)
        return plan_of(found, training, runs[kinds])

    for tried in _proposals(training):
        try:
            found = skeleton_of(make, tried, where, skip)
        except ValueError as reason:
            if not tried:
                raise
            refused = reason  # the model has no layers for it
            continue
        stored = measure.theoretical_bytes(found.model)
        if stored > limit:
            tight.append((stored, found))
            continue
        plans.append(planned(found))
        if plans[-1].total_bytes <= limit:
            return plans[-1]
    for stored, found in sorted(tight, key=lambda one: one[0]):
        if all(stored < one.total_bytes for one in plans):  # else it need not be run, which takes longest
            plans.append(planned(found))
    least = min(plans, key=lambda one: one.total_bytes)
    unit, size = _unit(least.total_bytes)
    remedy = "take a smaller batch, or a smaller model" if refused is None else refused
    raise ValueError(
        f"at_most={at_most!r} is out of reach: the least that is possible is {least.total_bytes / size:.2f} {unit} "
        f"({least.total_bytes:,} bytes), with {text_of(least.techniques)}; {remedy}"
    )


def skeleton_of(
    make: Callable[[], nn.Module],
    techniques: tuple[Technique, ...],
    where: Where = None,
    skip: str | Iterable[str] = (),
) -> Skeleton:
    """Make and convert a model on the meta device; raises as ``plan``."""
    check_factory("make", make)
    if techniques:
        # The trial's one layer has no paths that a LoRA's patterns match, and is too small for its rank.
        # Nor can its short rows be stored in every budget of bits.
        tried = [replace(t, rank=1, ranks=(), alphas=()) if isinstance(t, LoRA) else t for t in techniques]
        tried = [t.choices[0] if isinstance(t, Budget) else t for t in tried]
        with torch.random.fork_rng(devices=[]):
            convert(
                nn.Linear(8, 8, dtype=torch.float32, device="cpu"), *tried
            )  # raises where the techniques alone are wrong
    try:
        with torch.device("meta"):
            model = make_on_meta(make)
    except (TypeError, ValueError):  # some compute rates or tables: their values may be real, and parameters not
        model = make_on_meta(make)
    dense = dict.fromkeys([*model.parameters(), *model.buffers()])
    if any(map(is_lazy, dense)):
        raise ValueError(f"{type(model).__name__} has lazy parameters: make it with their sizes")
    largest = max((p.nbytes for p in model.parameters()), default=0)
    kept = {id(value) for value in model.state_dict(keep_vars=True).values()}
    replaced = sum(buffer.nbytes for buffer in model.buffers() if id(buffer) in kept)
    storing = 0
    if techniques:
        replacements = rebuild_all(model, techniques, where, skip, None, storing_once(empty=True))
        storing = _STORING if any(isinstance(one, StoredModule) for one in replacements.values()) else 0
        commit(model, replacements)
    after = dict.fromkeys([*model.parameters(), *model.buffers()])
    before = measure.nbytes(dense)
    return Skeleton(
        model=model,
        techniques=techniques,
        dense=before,
        load=measure.nbytes(after) + replaced + largest,
        conversion=before + measure.nbytes(tensor for tensor in after if tensor not in dense) + storing,
    )


def plan_of(skeleton: Skeleton, training: str | None, run: Mapping[str, Any]) -> Plan:
    """Return the plan of a model on the meta device, with the figures that ``run_figures`` gave."""
    forms = [form for m in skeleton.model.modules() if isinstance(m, StoredModule) for form in m.forms.values()]
    offsets = any(isinstance(form, CodedForm) and get_encoding(form.scale_encoding).offsets for form in forms)
    scratch = OFFSETS_SCRATCH if offsets else _SCRATCH if forms else 0
    own = {f.name: getattr(skeleton, f.name) for f in fields(skeleton) if f.name != "model"}
    return Plan(training=training, stored=_stored(skeleton.model), scratch=scratch, **own, **run)


def _stored(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the distinct parameters and buffers by what stores them, in the order of the model."""
    kinds: dict[Tensor, str] = {}
    for module in model.modules():
        if isinstance(module, Adapter):
            kinds |= dict.fromkeys(module.parameters(), "adapters")
        elif isinstance(module, StoredModule):
            by = cast(type, stored_by(module)).__name__
            kinds |= dict.fromkeys((getattr(module, name) for name in module.part_names), by)
    found = Counter({"dense": 0})
    for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
        found[kinds.get(tensor, "dense")] += tensor.nbytes
    return dict(found)


def run_figures(
    model: nn.Module,
    batch: Any,
    training: str | None,
    loss: Callable[[Any], Tensor] | None,
    cached: tuple[int, int, int | None] | None = None,
) -> dict[str, int]:
    """Run the model, and the optimizer, on fake tensors, which stay in it; return the ``Plan`` figures of the run.

    ``cached`` is the sequences, their tokens and the bits of a cache of keys and values.
    """
    with on_fake_tensors(model):
        inputs, named = fake_inputs(batch)
        given = measure.nbytes(dict.fromkeys(measure.tensors_in([inputs, named])))
        found = dict.fromkeys(("inputs", "forward", "gradients", "optimizer", "backward", "update"), 0)
        found |= {"inputs": given, "forward": measure.forward_bytes(model, *inputs, **named)}
        found |= {"cache": 0 if cached is None else _cached_bytes(model, *cached)}
        if training is None:
            return found
        trained: dict[Tensor, None] = {}  # in whose backward a gradient arrives
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: trained.setdefault(p))
            for p in model.parameters()
            if p.requires_grad
        ]
        backward = measure.backward_bytes(model, *inputs, loss=loss, **named)
        for hook in hooks:
            hook.remove()
        return found | {"backward": backward} | update_figures(list(trained), training)


def update_figures(trained: list[Tensor], training: str) -> dict[str, int]:
    """Run the optimizer's first step on fake parameters, and return its ``Plan`` figures."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    gradients, state, memory = measure.nbytes(trained), 0, measure.PeakMemory()
    if trained:
        optimizer = OPTIMIZERS[training](trained)
        with memory:
            optimizer.step()
        state = measure.nbytes(dict.fromkeys(measure.tensors_in(list(optimizer.state.values()))))
    return {"gradients": gradients, "optimizer": state, "update": gradients + memory.peak}


def _cached_bytes(model: nn.Module, sequences: int, tokens: int, bits: int | None) -> int:
    """Return the bytes of keys and values, for a number of sequences of ``tokens`` tokens each."""
    lost = f"the keys and values of a {type(model).__name__} cannot be planned"
    for integration in integrations_of(model, lost, "The rest of the plan needs no integration"):
        size: int = integration.cached_bytes(model, sequences, tokens, bits)
        if size:
            return size
    raise ValueError(
        f"tokens={tokens} plans the keys and values of a causal language model of transformers, and a "
        f"{type(model).__name__} keeps none: leave it out, and add nbytes of your lowmem.CachedStates"
    )


@contextmanager
def on_fake_tensors(model: nn.Module) -> Iterator[None]:
    """Replace the tensors of a model by fake ones on the CPU, with which it runs inside the block.

    Raises:
        ValueError: what runs inside needs a value.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        known: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            for values in (module._parameters, module._buffers, vars(module)):
                tensors: dict[str, Any] = values
                for name, tensor in list(tensors.items()):
                    if isinstance(tensor, Tensor):
                        tensors[name] = known.setdefault(id(tensor), (tensor, _fake(tensor)))[1]
            if isinstance(module, HalfEmbedding | CodedEmbedding) and not isinstance(module, AdaptedModule):
                # else it would dequantize all rows at once
                module.forward = partial(_rows, module)  # type: ignore[method-assign]
        try:
            yield
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedFakeTensorException,
            UnsupportedOperatorException,
        ) as reason:
            raise ValueError(
                f"{type(model).__name__} cannot be planned: its forward needs the values of tensors, or an operator "
                f"without shapes ({reason}); measure a smaller one with lowmem.measure"
            ) from reason


def fake_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named inputs in a batch, with fake tensors in place of its tensors."""
    if not any(True for _ in measure.tensors_in(batch)):
        raise TypeError(f"batch={show(batch)} must be a tensor, or a tuple or mapping that holds the model's inputs")
    named = dict(batch) if isinstance(batch, Mapping) else {}
    inputs = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, _fake, (inputs, named))
    return found


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _rows(layer: HalfEmbedding | CodedEmbedding, indices: Tensor) -> Tensor:
    return torch.empty(*indices.shape, layer.embedding_dim, dtype=layer.dtype, device=indices.device)


def _proposals(training: str | None) -> list[tuple[Technique, ...]]:
    """Return what ``at_most`` tries, from what loses least to what takes least."""
    bases: list[tuple[Technique, ...]] = [(), (Half(torch.bfloat16),), (EightBit(),)]
    bases += [(FourBit(block_size=n, embeddings=e),) for n in (None, 64, 128, 512) for e in ("8bit", "4bit")]
    bases += [(one,) for one in SMALLEST if (one,) not in bases]
    return bases if training is None else [(), *((*base, LoRA()) for base in bases)]


def bytes_of(size: str | int) -> int:
    """Return a number of bytes, given as it is or as text with a unit, such as "24GiB"."""
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise TypeError(f"{show(size)} must be a number of bytes, or a size such as 2GB or 500MiB")
    number = size if isinstance(size, int) else 0
    if isinstance(size, str) and len(size) <= 20:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size, re.ASCII)
        number = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if number < 1:
        raise ValueError(f"{show(size)} must be a size such as 2GB or 500MiB")
    return number


def _unit(size: int) -> tuple[str, int]:
    return ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)
