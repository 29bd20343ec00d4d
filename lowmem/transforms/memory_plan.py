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
from lowmem.errors import check_callable_with, short_repr
from lowmem.kernels.cpu import OFFSETS_SCRATCH
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter
from lowmem.nn.embedding import HalfEmbedding, QuantizedEmbedding
from lowmem.nn.forms import CodedForm
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, LoRA
from lowmem.quant.scale_encodings import get_scale_encoding
from lowmem.transforms.bits_per_weight import SMALLEST, techniques_as_code
from lowmem.transforms.convert import build_replacements, convert
from lowmem.transforms.converted_copies import cached_store_factory
from lowmem.transforms.meta_device import check_model_factory, make_model_with_meta_parameters
from lowmem.transforms.model_summary import aligned_table_lines
from lowmem.transforms.module_registry import ModuleFilter, Technique, storage_technique_type_or_none
from lowmem.transforms.module_replacement import (
    commit_replacements_and_freeze_if_adapted,
    iterate_integrations_or_warn,
)

OPTIMIZERS: MappingProxyType[str, Callable[..., torch.optim.Optimizer]] = MappingProxyType(
    {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
)
"""The optimizers that ``plan`` knows."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# Bytes that a product with a stored weight takes at most, beside its output
_SCRATCH = 2**20
# Bytes for a chunk of rows that is quantized, and one whose error is measured
_STORING = 2**21


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
        table_rows = [("dense model", self.dense)]
        table_rows += [(f"stored: {name}", size) for name, size in self.stored.items()]
        table_rows += [("inputs", self.inputs), ("forward", self.forward), ("scratch, at most", self.scratch)]
        table_rows += [("keys and values", self.cache)] if self.cache else []
        if self.training is not None:
            table_rows += [
                ("gradients", self.gradients),
                (f"{self.training} state", self.optimizer),
                ("forward and backward", self.backward),
                (f"{self.training} step", self.update),
            ]
        table_rows += [("peak of load", self.load), ("peak of convert", self.conversion)]
        table_rows += [("total for inference", self.inference_bytes)]
        return table_rows if self.training is None else [*table_rows, ("total for training", self.training_bytes)]

    @property
    def columns(self) -> list[str]:
        """The titles of the columns of ``cells``."""
        return ["Memory", "MiB"]

    @property
    def cells(self) -> list[list[str]]:
        """The texts of the table: ``rows``, in MiB."""
        return [[name, f"{size / 2**20:.2f}"] for name, size in self.rows]

    def __str__(self) -> str:
        return "\n".join(
            [
                techniques_as_code(self.techniques),
                *aligned_table_lines([self.columns, *self.cells], right_aligned=(1,)),
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """Return the figures as integers, and the techniques as text: what JSON can hold."""
        totals = ("stored_bytes", "inference_bytes", "training_bytes")
        figures = asdict(self) | {name: getattr(self, name) for name in totals}
        return figures | {"techniques": [techniques_as_code([technique]) for technique in self.techniques]}


@dataclass(frozen=True)
class MetaModelAndByteCounts:
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
        raise ValueError(f"training={short_repr(training)} is unknown: choose from None, {', '.join(OPTIMIZERS)}")
    if loss is not None:
        check_callable_with("loss", loss, "a function of the model's output, or None", None)
    if tokens is None and (sequences != 1 or cache_bits is not None):
        raise ValueError(
            f"sequences={short_repr(sequences)}, cache_bits={short_repr(cache_bits)}: plan a cache, and give its "
            "tokens"
        )
    if min(1 if tokens is None else tokens, sequences) < 1:
        raise ValueError(f"tokens={tokens!r} and sequences={sequences!r} must be at least 1")
    cached = None if tokens is None else (sequences, tokens, cache_bits)
    if at_most is None:
        requested = convert_on_meta_and_count_bytes(make, techniques, where, skip)
        return plan_from_figures(
            requested, training, make_fake_and_measure_run(requested.model, batch, training, loss, cached)
        )
    if techniques:
        raise ValueError(
            f"at_most={short_repr(at_most)} proposes techniques: leave out {techniques_as_code(techniques)}"
        )
    limit = parse_byte_count(at_most)
    # Block size and scales have no influence on them
    runs: dict[tuple[type, ...], dict[str, int]] = {}
    plans: list[Plan] = []
    # What does not fit by its stored bytes alone
    tight: list[tuple[int, MetaModelAndByteCounts]] = []
    refused = None

    def plan_with_cached_figures(converted: MetaModelAndByteCounts) -> Plan:
        kinds = tuple(map(type, converted.techniques))
        if kinds not in runs:
            runs[kinds] = make_fake_and_measure_run(converted.model, batch, training, loss, cached)
        return plan_from_figures(converted, training, runs[kinds])

    for tried in _storage_candidates(with_lora=training is not None):
        try:
            converted = convert_on_meta_and_count_bytes(make, tried, where, skip)
        except ValueError as reason:
            if not tried:
                raise
            # The model has no layers for it
            refused = reason
            continue
        stored = measure.theoretical_bytes(converted.model)
        if stored > limit:
            tight.append((stored, converted))
            continue
        plans.append(plan_with_cached_figures(converted))
        if plans[-1].total_bytes <= limit:
            return plans[-1]
    for stored, converted in sorted(tight, key=lambda candidate: candidate[0]):
        # Else it need not be run, which takes longest
        if all(stored < candidate.total_bytes for candidate in plans):
            plans.append(plan_with_cached_figures(converted))
    least = min(plans, key=lambda candidate: candidate.total_bytes)
    unit, size = _byte_unit_and_factor(least.total_bytes)
    remedy = "take a smaller batch, or a smaller model" if refused is None else refused
    raise ValueError(
        f"at_most={at_most!r} is out of reach: the least that is possible is {least.total_bytes / size:.2f} {unit} "
        f"({least.total_bytes:,} bytes), with {techniques_as_code(least.techniques)}; {remedy}"
    )


def convert_on_meta_and_count_bytes(
    make_model: Callable[[], nn.Module],
    techniques: tuple[Technique, ...],
    where: ModuleFilter = None,
    skip: str | Iterable[str] = (),
) -> MetaModelAndByteCounts:
    """Make and convert a model on the meta device; raises as ``plan``."""
    check_model_factory("make", make_model)
    if techniques:
        _check_techniques_by_a_trial(techniques)
    try:
        with torch.device("meta"):
            model = make_model_with_meta_parameters(make_model)
    except (TypeError, ValueError):
        # Some compute rates or tables: their values may be real, and parameters not
        model = make_model_with_meta_parameters(make_model)
    dense = dict.fromkeys([*model.parameters(), *model.buffers()])
    if any(map(is_lazy, dense)):
        raise ValueError(f"{type(model).__name__} has lazy parameters: make it with their sizes")
    largest = max((p.nbytes for p in model.parameters()), default=0)
    saved_ids = {id(value) for value in model.state_dict(keep_vars=True).values()}
    replaced = sum(buffer.nbytes for buffer in model.buffers() if id(buffer) in saved_ids)
    storing = 0
    if techniques:
        replacements = build_replacements(model, techniques, where, skip, None, cached_store_factory(on_meta=True))
        storing = (
            _STORING if any(isinstance(replacement, StoredModule) for replacement in replacements.values()) else 0
        )
        commit_replacements_and_freeze_if_adapted(model, replacements)
    after = dict.fromkeys([*model.parameters(), *model.buffers()])
    before = measure.nbytes(dense)
    return MetaModelAndByteCounts(
        model=model,
        techniques=techniques,
        dense=before,
        load=measure.nbytes(after) + replaced + largest,
        conversion=before + measure.nbytes(tensor for tensor in after if tensor not in dense) + storing,
    )


def _check_techniques_by_a_trial(techniques: tuple[Technique, ...]) -> None:
    """Raise the errors of ``convert`` for techniques that no model can have."""
    # The trial's one layer has no paths that a LoRA's patterns match, and is too small for its rank.
    # Nor can its short rows be stored in every budget of bits.
    tried = [replace(t, rank=1, ranks=(), alphas=()) if isinstance(t, LoRA) else t for t in techniques]
    tried = [t.choices[0] if isinstance(t, Budget) else t for t in tried]
    with torch.random.fork_rng(devices=[]):
        convert(nn.Linear(8, 8, dtype=torch.float32, device="cpu"), *tried)


def plan_from_figures(
    converted: MetaModelAndByteCounts, optimizer_name: str | None, figures: Mapping[str, Any]
) -> Plan:
    """Return the plan of a model on the meta device, with the figures that ``make_fake_and_measure_run`` gave."""
    forms = [form for m in converted.model.modules() if isinstance(m, StoredModule) for form in m.forms.values()]
    offsets = any(isinstance(form, CodedForm) and get_scale_encoding(form.scale_encoding).offsets for form in forms)
    scratch = OFFSETS_SCRATCH if offsets else _SCRATCH if forms else 0
    conversion_figures = {f.name: getattr(converted, f.name) for f in fields(converted) if f.name != "model"}
    return Plan(
        training=optimizer_name,
        stored=_bytes_by_storage_kind(converted.model),
        scratch=scratch,
        **conversion_figures,
        **figures,
    )


def _bytes_by_storage_kind(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the distinct parameters and buffers by what stores them, in the order of the model."""
    kinds: dict[Tensor, str] = {}
    for module in model.modules():
        if isinstance(module, Adapter):
            kinds |= dict.fromkeys(module.parameters(), "adapters")
        elif isinstance(module, StoredModule):
            by = cast(type, storage_technique_type_or_none(module)).__name__
            kinds |= dict.fromkeys((getattr(module, name) for name in module.part_parameter_names), by)
    sizes = Counter({"dense": 0})
    for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
        sizes[kinds.get(tensor, "dense")] += tensor.nbytes
    return dict(sizes)


def make_fake_and_measure_run(
    model: nn.Module,
    batch: Any,
    optimizer_name: str | None,
    loss: Callable[[Any], Tensor] | None,
    kv_cache_size: tuple[int, int, int | None] | None = None,
) -> dict[str, int]:
    """Run the model, and the optimizer, on fake tensors, which stay in it; return the ``Plan`` figures of the run.

    ``kv_cache_size`` is the sequences, their tokens and the bits of a cache of keys and values.
    """
    with permanently_on_fake_tensors(model):
        inputs, named = fake_args_and_kwargs(batch)
        input_bytes = measure.nbytes(dict.fromkeys(measure.tensors_in([inputs, named])))
        figures = dict.fromkeys(("inputs", "forward", "gradients", "optimizer", "backward", "update"), 0)
        figures |= {"inputs": input_bytes, "forward": measure.forward_bytes(model, *inputs, **named)}
        figures |= {"cache": 0 if kv_cache_size is None else _kv_cache_bytes(model, *kv_cache_size)}
        if optimizer_name is None:
            return figures
        # In whose backward a gradient arrives
        trained: dict[Tensor, None] = {}
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: trained.setdefault(p))
            for p in model.parameters()
            if p.requires_grad
        ]
        backward = measure.backward_bytes(model, *inputs, loss=loss, **named)
        for hook in hooks:
            hook.remove()
        return (
            figures | {"backward": backward} | set_grads_and_measure_step(list(trained), OPTIMIZERS[optimizer_name])
        )


def set_grads_and_measure_step(
    parameters: list[Tensor], make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> dict[str, int]:
    """Run the optimizer's first step on fake parameters, and return its ``Plan`` figures."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    gradients, state, memory = measure.nbytes(parameters), 0, measure.PeakMemory()
    if parameters:
        optimizer = make_optimizer(parameters)
        with memory:
            optimizer.step()
        state = measure.nbytes(dict.fromkeys(measure.tensors_in(list(optimizer.state.values()))))
    return {"gradients": gradients, "optimizer": state, "update": gradients + memory.peak}


def _kv_cache_bytes(model: nn.Module, sequences: int, tokens: int, bits: int | None) -> int:
    """Return the bytes of keys and values, for a number of sequences of ``tokens`` tokens each."""
    consequence = f"the keys and values of a {type(model).__name__} cannot be planned"
    for integration in iterate_integrations_or_warn(model, consequence, "The rest of the plan needs no integration"):
        size: int = integration.cached_bytes(model, sequences, tokens, bits)
        if size:
            return size
    raise ValueError(
        f"tokens={tokens} plans the keys and values of a causal language model of transformers, and a "
        f"{type(model).__name__} keeps none: leave it out, and add nbytes of your lowmem.CachedStates"
    )


@contextmanager
def permanently_on_fake_tensors(model: nn.Module) -> Iterator[None]:
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
                        tensors[name] = known.setdefault(id(tensor), (tensor, _fake_cpu_tensor_like(tensor)))[1]
            if isinstance(module, HalfEmbedding | QuantizedEmbedding) and not isinstance(module, AdaptedModule):
                # else it would dequantize all rows at once
                module.forward = partial(_empty_embedding_output, module)  # type: ignore[method-assign]
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


def fake_args_and_kwargs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named inputs in a batch, with fake tensors in place of its tensors."""
    if not any(True for _ in measure.tensors_in(batch)):
        raise TypeError(
            f"batch={short_repr(batch)} must be a tensor, or a tuple or mapping that holds the model's inputs"
        )
    named = dict(batch) if isinstance(batch, Mapping) else {}
    inputs = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    fakes: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, _fake_cpu_tensor_like, (inputs, named))
    return fakes


def _fake_cpu_tensor_like(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _empty_embedding_output(layer: HalfEmbedding | QuantizedEmbedding, indices: Tensor) -> Tensor:
    return torch.empty(*indices.shape, layer.embedding_dim, dtype=layer.dtype, device=indices.device)


def _storage_candidates(with_lora: bool) -> list[tuple[Technique, ...]]:
    """Return the techniques that ``at_most`` tries, from what loses least to what takes least."""
    bases: list[tuple[Technique, ...]] = [(), (Half(torch.bfloat16),), (EightBit(),)]
    bases += [(FourBit(block_size=n, embeddings=e),) for n in (None, 64, 128, 512) for e in ("8bit", "4bit")]
    bases += [(technique,) for technique in SMALLEST if (technique,) not in bases]
    return [(), *((*base, LoRA()) for base in bases)] if with_lora else bases


def parse_byte_count(size: str | int) -> int:
    """Return a number of bytes, given as it is or as text with a unit, such as "24GiB"."""
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise TypeError(f"{short_repr(size)} must be a number of bytes, or a size such as 2GB or 500MiB")
    number = size if isinstance(size, int) else 0
    if isinstance(size, str) and len(size) <= 20:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size, re.ASCII)
        number = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if number < 1:
        raise ValueError(f"{short_repr(size)} must be a size such as 2GB or 500MiB")
    return number


def _byte_unit_and_factor(byte_count: int) -> tuple[str, int]:
    return ("GiB", 2**30) if byte_count >= 2**30 else ("MiB", 2**20)
