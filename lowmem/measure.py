"""What a model costs and how close another comes: bytes, peak memory, error. Torch only.

Peak memory is the same in every run, and exact for what operations return: every storage is counted when it
appears and discounted when it is freed. A workspace that an operation takes and gives back inside itself (a
oneDNN convolution or LSTM has large ones) is not seen. On CUDA the allocator's own figures are taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def forward_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the peak bytes beyond model and input of one inference forward, its output included.

    The model is left as it was: mode, gradients, buffers and torch's generator.
    """

    def run() -> object:
        with torch.no_grad():
            return model(x)

    with _unchanged(model, training=False):
        return peak_bytes(run, x.device)


def backward_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the peak bytes beyond model and input of one forward and backward, gradients included.

    The loss is the sum of the outputs. Where nothing trains, that is what the forward alone needs.
    The model is left as it was: mode, gradients, buffers and torch's generator.

    Raises:
        TypeError: the model returns no tensor.
    """

    x = x.detach()

    def run() -> None:
        outputs = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor)]
        if not outputs:
            raise TypeError(f"{type(model).__name__} returns no tensor, so there is nothing to take a gradient of")
        losses = [(t.abs() if t.is_complex() else t).sum() for t in outputs if t.requires_grad]
        del outputs
        if losses:
            torch.autograd.backward(losses)

    with _unchanged(model, training=True):
        return peak_bytes(run, x.device)


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
