"""What a model costs and how close another comes: bytes, peak memory, error. Torch only.

Peak memory is the same in every run, and exact for what operations return: every storage is counted when it
appears and discounted when it is freed. A workspace that an operation takes and gives back inside itself (a
oneDNN convolution or LSTM has large ones) is not seen. On CUDA the allocator's own figures are taken.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.utils._python_dispatch import TorchDispatchMode
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
    "peak_bytes",
    "tensors_in",
    "theoretical_bytes",
    "weight_count",
]


@dataclass(frozen=True)
class Counts:
    """Elements of the distinct parameters, as they are stored: two 4-bit codes are one uint8 element."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """All elements."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class Difference:
    """How far one output is from another: largest and mean magnitude, and the ratio of the norms."""

    max: float
    mean: float
    relative: float


def counts(model: nn.Module) -> Counts:
    """Count the elements of the distinct parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Counts(trainable, sum(p.numel() for p in model.parameters()) - trainable)


def weight_count(model: nn.Module) -> int:
    """Count the weights that the model stands for, however few bytes hold them.

    A module that stores them in another shape says how many in an attribute ``weight_count``, and holds
    them in its first parameter. A parameter that two modules share is counted once.
    """
    declared = 0
    own: dict[nn.Parameter, int] = {}
    stored: set[nn.Parameter] = set()  # what the declared counts are of
    for module in model.modules():
        count = getattr(module, "weight_count", None)
        parameters = list(module.parameters(recurse=False))
        if isinstance(count, int) and stored.isdisjoint(parameters[:1]):
            declared += count
            stored.update(parameters)
        else:
            own.update((p, p.numel()) for p in parameters if p not in stored)
    return declared + sum(own.values())


def theoretical_bytes(model: nn.Module) -> int:
    """Sum numel * itemsize over the distinct parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in _tensors(model))


def actual_bytes(model: nn.Module) -> int:
    """Sum the bytes of the distinct storages that the parameters and buffers hold."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(storages.values())


def forward_bytes(model: nn.Module, *inputs: Any, **named: Any) -> int:
    """Return the peak bytes beyond model and inputs of one inference forward, its output included.

    The model is left as it was: mode, gradients, buffers and torch's generator.
    """

    def run() -> object:
        with torch.no_grad():
            return model(*inputs, **named)

    with _unchanged(model, training=False):
        return peak_bytes(run, _device(model, inputs, named))


def backward_bytes(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **named: Any) -> int:
    """Return the peak bytes beyond model and inputs of one forward and backward, gradients included.

    Where nothing trains, that is what the forward alone needs. The model is left as it was: mode, gradients, buffers
    and torch's generator.

    Args:
        model: any module.
        *inputs: tensors, or anything that holds some.
        loss: makes a scalar of the model's output; None takes the output's own ``loss``, or the sum of its tensors.
        **named: further inputs.

    Raises:
        TypeError: the model returns no tensor, or ``loss`` no scalar with a gradient.
    """

    with torch.inference_mode(False):  # where the caller is in it, a detached tensor could not be saved for backward
        inputs, named = tree_map_only(Tensor, Tensor.detach, (inputs, named))

    def run() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            losses = _losses(model, model(*inputs, **named), loss)  # which do not hold the output
            if losses:
                torch.autograd.backward(losses)

    with _unchanged(model, training=True):
        return peak_bytes(run, _device(model, inputs, named))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in mappings, sequences, dataclasses and what torch's pytrees know, nested in any way."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):  # Hugging Face's are mappings, too
        yield from tensors_in([getattr(value, own.name) for own in fields(value)])
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    else:
        for leaf in value if isinstance(value, list | tuple) else tree_leaves(value):
            if leaf is not value:
                yield from tensors_in(leaf)


def _losses(model: nn.Module, output: Any, loss: Callable[[Any], Tensor] | None) -> list[Tensor]:
    """Return the scalars to differentiate; none where nothing in the output has a gradient."""
    if loss is not None and any(p.requires_grad for p in model.parameters()):
        scalar = loss(output)
        if not (isinstance(scalar, Tensor) and scalar.numel() == 1 and scalar.requires_grad):
            found = (
                f"a tensor of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
            )
            raise TypeError(f"loss= must return a tensor of one element that has a gradient, found {found}")
        return [scalar]
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1 and own.requires_grad:
        return [own]
    outputs = list(tensors_in(output))
    if not outputs:
        raise TypeError(f"{type(model).__name__} returns no tensor, so there is nothing to take a gradient of")
    return [(t.abs() if t.is_complex() else t).sum() for t in outputs if t.requires_grad]


def _device(model: nn.Module, inputs: Any, named: Any) -> torch.device | None:
    """Return where a model runs: on the device of its first parameter, or else of its first input."""
    tensors = itertools.chain(model.parameters(), tensors_in([inputs, named]))
    return next((tensor.device for tensor in tensors), None)


def peak_bytes(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Return the peak of the bytes that ``run`` allocates and has not freed, what it returns included."""
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
    """Compare two outputs of one shape, in float64, or in complex128 where one is complex.

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
    """Counts the bytes of the storages that operations allocate while it is active, and their peak.

    What existed before is not counted. What an operation allocates and frees inside itself (a
    workspace of a matrix product) is not seen.

    Attributes:
        current: bytes that are allocated now.
        peak: the most that ``current`` ever was.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._known: dict[int, int | None] = {}  # storage -> bytes counted; None: it is from before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._see(tensor, new=True)
        self.peak = max(self.peak, self.current)
        return result

    def _see(self, tensor: Any, new: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = 0 if new else None
            weakref.finalize(storage, self._forget, key).atexit = False
        counted = self._known[key]
        if new and counted is not None:  # again when an operation has resized a storage that is counted
            self.current += storage.nbytes() - counted
            self._known[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self.current -= self._known.pop(key) or 0


def _tensors(model: nn.Module) -> set[Tensor]:
    return {*model.parameters(), *model.buffers()}


@contextmanager
def _unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in a mode, without gradients, and give everything back as it was."""
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    buffers = {module: dict(module._buffers) for module in model.modules()}
    copies = {b: b.clone() for b in model.buffers() if not isinstance(b, UninitializedBuffer)}
    with torch.random.fork_rng():
        try:
            model.train(training)
            for module in buffers:  # a forward may write to its buffers, or put others in their place
                module._buffers.update({k: copies.get(b, b) for k, b in module._buffers.items() if b is not None})
            for parameter in gradients:
                parameter.grad = None
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for module, own in buffers.items():
                module._buffers.clear()
                module._buffers.update(own)
