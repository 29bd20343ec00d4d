"""Measures bytes and peak memory of a model, and the difference of two outputs. Needs torch only.

Peak memory is deterministic, and exact for the outputs of operations: every storage is added when it appears and
subtracted when it is freed. Workspaces inside an operation (large ones in oneDNN's convolutions and LSTMs) are not
counted. On CUDA the figures of the caching allocator are used. What computes is what computes without measuring; the
first measurement of a process takes seconds longer, since torch imports its compiler when an operation meets a mode.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "Counts",
    "Difference",
    "PeakMemory",
    "actual_bytes",
    "backward_bytes",
    "counts",
    "difference",
    "forward_bytes",
    "losses_of",
    "nbytes",
    "peak_bytes",
    "storages_of",
    "tensors_in",
    "theoretical_bytes",
    "unchanged",
    "weight_count",
]


@dataclass(frozen=True)
class Counts:
    """Elements of the distinct parameters as stored: two 4-bit codes are one uint8 element."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """All elements."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class Difference:
    """The difference of two outputs: its largest and mean magnitude, and its norm relative to that of the base."""

    max: float
    mean: float
    relative: float


def counts(model: nn.Module) -> Counts:
    """Count the elements of the distinct parameters.

    A module whose parameters hold the bytes of other elements (scales) declares how many these are, by the names of
    the parameters, in an attribute ``element_counts``.
    """
    sizes: dict[nn.Parameter, int] = {}
    for module in model.modules():
        declared: Any = getattr(module, "element_counts", None)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                known = declared.get(name) if isinstance(declared, dict) else None
                sizes.setdefault(parameter, parameter.numel() if known is None else known)
    trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    return Counts(trainable, sum(sizes.values()) - trainable)


def weight_count(model: nn.Module) -> int:
    """Count the weights of the dense model, whatever the storage: two 4-bit codes are two weights.

    A module that packs its weights declares their number in an attribute ``weight_count``, and stores them in its
    first parameter. Shared parameters are counted once.
    """
    declared = 0
    dense_sizes: dict[nn.Parameter, int] = {}
    # Parameters of modules with a declared count
    stored: set[nn.Parameter] = set()
    for module in model.modules():
        count = getattr(module, "weight_count", None)
        parameters = list(module.parameters(recurse=False))
        if isinstance(count, int) and stored.isdisjoint(parameters[:1]):
            declared += count
            stored.update(parameters)
        else:
            dense_sizes.update((p, p.numel()) for p in parameters if p not in stored)
    return declared + sum(dense_sizes.values())


def theoretical_bytes(model: nn.Module) -> int:
    """Sum numel * itemsize over the distinct parameters and buffers."""
    return nbytes(_parameters_and_buffers(model))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Sum numel * itemsize over tensors; those without a shape yet, of lazy modules, count as 0."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not is_lazy(tensor))


def actual_bytes(model: nn.Module) -> int:
    """Sum the bytes of the distinct storages that the parameters and buffers hold."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _parameters_and_buffers(model)}
    return sum(storages.values())


def forward_bytes(model: nn.Module, *inputs: Any, **named: Any) -> int:
    """Return the peak bytes of one inference forward beyond model and inputs, its output included.

    The model's mode, gradients and buffers and torch's generator are restored.
    """

    def run_forward_without_grad() -> object:
        with torch.no_grad():
            return model(*inputs, **named)

    with unchanged(model, training=False):
        return peak_bytes(run_forward_without_grad, _first_device_or_none(model, inputs, named))


def backward_bytes(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **named: Any) -> int:
    """Return the peak bytes of one forward and backward beyond model and inputs, gradients included.

    For a model without trainable parameters, that is the peak of the forward alone. The model's mode, gradients and
    buffers and torch's generator are restored.

    Args:
        model: any module.
        *inputs: positional arguments: tensors, or structures that hold some.
        loss: returns a scalar for the model's output; None: the output's ``loss``, or the sum of its tensors.
        **named: keyword arguments.

    Raises:
        TypeError: the model returns no tensor, or ``loss`` returns no scalar with a gradient.
    """

    # Inside the caller's, detached tensors could not be saved for backward
    with torch.inference_mode(False):
        inputs, named = tree_map_only(Tensor, Tensor.detach, (inputs, named))

    def run_forward_and_backward() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            # Does not keep the output alive
            losses = losses_of(model, model(*inputs, **named), loss)
            if losses:
                torch.autograd.backward(losses)

    with unchanged(model, training=True):
        return peak_bytes(run_forward_and_backward, _first_device_or_none(model, inputs, named))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, sequences, dataclasses and types that torch's pytrees know."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        # First: Hugging Face's are mappings, too
        # One may not be set
        yield from tensors_in([getattr(value, field.name, None) for field in fields(value)])
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    else:
        for leaf in value if isinstance(value, list | tuple) else tree_leaves(value):
            if leaf is not value:
                yield from tensors_in(leaf)


def losses_of(model: nn.Module, output: Any, loss: Callable[[Any], Tensor] | None) -> list[Tensor]:
    """Return the scalars to differentiate: of ``loss``, or the output's own, or the sums of its tensors.

    Returns:
        [] where no tensor of the output requires a gradient.

    Raises:
        TypeError: the output holds no tensor, or ``loss`` returns no scalar with a gradient.
    """
    if loss is not None and any(p.requires_grad for p in model.parameters()):
        scalar = loss(output)
        if not (isinstance(scalar, Tensor) and scalar.numel() == 1 and scalar.requires_grad):
            description = (
                f"a tensor of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
            )
            raise TypeError(f"loss= must return a tensor of one element that has a gradient, found {description}")
        return [scalar]
    output_loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output_loss, Tensor) and output_loss.numel() == 1 and output_loss.requires_grad:
        return [output_loss]
    outputs = list(tensors_in(output))
    if not outputs:
        raise TypeError(f"{type(model).__name__} returns no tensor, so there is nothing to take a gradient of")
    return [(t.abs() if t.is_complex() else t).sum() for t in outputs if t.requires_grad]


def _first_device_or_none(model: nn.Module, inputs: Any, keyword_inputs: Any) -> torch.device | None:
    """Return the device of the model's first parameter, or else of the first input."""
    tensors = itertools.chain(model.parameters(), tensors_in([inputs, keyword_inputs]))
    return next((tensor.device for tensor in tensors), None)


def storages_of(tensor: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of a dense tensor, or of those that a wrapper subclass holds; none for anything else."""
    if is_traceable_wrapper_subclass(tensor):  # it has no memory of its own, but those in it have
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages_of(getattr(tensor, name))
    elif isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
        yield tensor.untyped_storage()


def peak_bytes(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Return the peak of the bytes that ``run`` has allocated and not yet freed, its result included."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    memory = PeakMemory()
    with memory:
        run()
    return memory.peak


def difference(base: Tensor, other: Tensor) -> Difference:
    """Compare two outputs of the same shape in float64, or in complex128 if one is complex.

    Raises:
        ValueError: their shapes differ.
    """
    if base.shape != other.shape:
        raise ValueError(f"shapes {tuple(base.shape)} and {tuple(other.shape)} cannot be compared")
    if base.numel() == 0:
        return Difference(0.0, 0.0, 0.0)
    wide = torch.complex128 if base.is_complex() or other.is_complex() else torch.float64
    base = base.detach().to(wide)
    error = (base - other.detach().to(wide)).abs()
    norm = float(base.norm())
    relative = float(error.norm()) / norm if norm else float(error.norm())
    return Difference(float(error.max()), float(error.mean()), relative)


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of the storages that operations allocate while it is active, and their peak.

    Storages that existed before are not counted, nor are workspaces inside an operation.

    Attributes:
        current: bytes allocated now.
        peak: the largest value of ``current``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        # Address of a storage -> counted bytes; None: existed before
        self._known: dict[int, int | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._track_storages_and_count_outputs(tensor, is_output=False)
        if any(issubclass(kind, Tensor) and hasattr(kind, "__tensor_flatten__") for kind in types):
            # The subclass runs operations of its own, which come here one by one
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._track_storages_and_count_outputs(tensor, is_output=True)
        self._update_peak()
        return result

    def _track_storages_and_count_outputs(self, tensor: Any, is_output: bool) -> None:
        for storage in storages_of(tensor):
            key = storage._cdata
            if key not in self._known:
                self._known[key] = 0 if is_output else None
                weakref.finalize(storage, self._uncount_freed_storage, key).atexit = False
            counted = self._known[key]
            if (
                is_output and counted is not None and counted != storage.nbytes()
            ):  # also when an operation has resized it
                self._known[key] = storage.nbytes()
                self._change_current_bytes(key, storage.nbytes() - counted)

    def _uncount_freed_storage(self, address: int) -> None:
        if counted := self._known.pop(address):
            self._change_current_bytes(address, -counted)

    def _change_current_bytes(self, address: int, byte_change: int) -> None:
        """Count bytes that the storage at an address has got, or lost."""
        self.current += byte_change

    def _update_peak(self) -> None:
        """Look, after an operation, whether this is the peak."""
        self.peak = max(self.peak, self.current)


def _parameters_and_buffers(model: nn.Module) -> set[Tensor]:
    return {*model.parameters(), *model.buffers()}


@contextmanager
def unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the model's mode and clear its gradients; restore mode, gradients, buffers and generator at the end."""
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    buffers = {module: dict(module._buffers) for module in model.modules()}
    copies = {b: b.clone() for b in model.buffers() if not isinstance(b, UninitializedBuffer)}
    with torch.random.fork_rng():
        try:
            model.train(training)
            # Copies, since a forward may write to its buffers or replace them
            for module in buffers:
                _replace_buffers(
                    module, {k: b if b is None else copies.get(b, b) for k, b in buffers[module].items()}
                )
            for parameter in gradients:
                parameter.grad = None
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for module, saved_buffers in buffers.items():
                _replace_buffers(module, saved_buffers)


def _replace_buffers(module: nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
    """Make these the buffers of a module; a scripted one has no dictionary of them, but takes one after the other."""
    current_buffers = module._buffers
    for name in {*current_buffers.keys()} - buffers.keys():
        del current_buffers[name]
    for name, buffer in buffers.items():
        current_buffers[name] = buffer
