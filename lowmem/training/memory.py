"""Breaks the peak memory of a training step down to the byte. Allocations are logged with the layer whose forward
made them, and classified afterwards: what outlives the forward of its layer is an activation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import CodeType, FrameType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowmem import measure
from lowmem.errors import show
from lowmem.nn.adapter import Adapter
from lowmem.training.optimizer import AdamW8bit
from lowmem.training.prepared_module import trained_parameters
from lowmem.transforms.plan import OPTIMIZERS
from lowmem.transforms.registry import check_module
from lowmem.transforms.summary import aligned

TRAINERS: MappingProxyType[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = MappingProxyType(
    {**OPTIMIZERS, "adamw8bit": AdamW8bit}
)
"""The optimizers that ``training_memory`` knows by name."""

_LOSS = "loss"  # stands for the layer's class where activations are made outside of any module
_MIB = 2**20


@dataclass(frozen=True)
class TrainingMemory:
    """The bytes of a training step at its peak. ``print`` shows a table.

    Attributes:
        optimizer_name: the given name, or the name of the optimizer's class.
        moment: phase of the peak: "forward", "backward" or "update".
        weights: bytes of parameters and buffers of the model, without adapters.
        adapters: bytes of the parameters of adapters.
        inputs: bytes of the batch.
        gradients: bytes of the parameters' gradients.
        optimizer: bytes of the optimizer's state.
        activations: bytes by the class of the layer in whose forward they were made, largest first: storages that
            outlive that forward, for the next layer or for backward. "loss": those made outside of any layer.
        scratch: bytes of temporaries and of gradients of activations.
    """

    optimizer_name: str
    moment: str
    weights: int
    adapters: int
    inputs: int
    gradients: int
    optimizer: int
    activations: Mapping[str, int]
    scratch: int

    @property
    def total_bytes(self) -> int:
        """The sum of all parts: model, inputs and ``step_bytes``."""
        return sum(self.parts.values())

    @property
    def step_bytes(self) -> int:
        """The peak beyond model and inputs, as ``lowmem.measure.peak_bytes`` counts it."""
        return self.total_bytes - self.weights - self.adapters - self.inputs

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part, by its name in the table; activations have one part for each layer class."""
        first = ("weights", "adapters", "inputs", "gradients", "optimizer")
        found: dict[str, int] = {name: getattr(self, name) for name in first}
        found |= {f"activations: {kind}": size for kind, size in self.activations.items()}
        return found | {"scratch": self.scratch}

    def __str__(self) -> str:
        rows = [*self.parts.items(), (f"peak, in {self.moment}", self.total_bytes)]
        table = [("Memory", "MiB"), *((name, f"{size / _MIB:.2f}") for name, size in rows)]
        return "\n".join(aligned(table, right=(1,)))

    def as_json(self) -> dict[str, Any]:
        """Return all fields, ``step_bytes`` and ``total_bytes``, as integers and strings that JSON can hold."""
        own = {one.name: getattr(self, one.name) for one in fields(self)} | {"activations": dict(self.activations)}
        return own | {"step_bytes": self.step_bytes, "total_bytes": self.total_bytes}


def training_memory(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: str | Callable[[list[Tensor]], torch.optim.Optimizer] = "adamw",
    **named: Any,
) -> TrainingMemory:
    """Return what the memory of a training step consists of, at its peak::

        print(lowmem.training_memory(model, ids, labels=ids))

    Two steps are run, since the optimizer's state exists only from the end of the first one on; the higher peak
    counts. Learning rate and gradients are zero in the update, and the model, its mode, gradients and buffers, and
    torch's random state are restored. Storages are counted, as in ``lowmem.measure``: the parts add up to the size of
    the model, its inputs and the peak of ``PeakMemory``, to the byte. Not counted are workspaces inside an operation,
    and tensors that ``torch.tensor`` makes from Python numbers, such as AdamW's step count. On CUDA the peak is that
    of torch's allocator, and what it takes beyond the storages is scratch.

    Args:
        model: has parameters that train; convert and prepare it (``prepare_training``) before, as for training.
        *inputs: positional arguments of the model: tensors, or structures that contain them.
        loss: returns a scalar for the model's output; None takes the output's ``loss``, or the sum of its tensors.
        optimizer: "adamw", "adamw8bit" or "sgd" (without momentum), or a callable that makes one for a list of
            parameters, such as ``functools.partial(torch.optim.SGD, momentum=0.9)``.
        **named: keyword arguments of the model.

    Raises:
        TypeError: the model is not a module, or returns no tensor; ``loss`` returns no scalar with a gradient; or
            ``optimizer`` makes none.
        ValueError: an unknown optimizer, one that steps more than once (LBFGS), a model in which nothing trains, or
            whose output has no gradient.
    """
    check_module(model)
    if isinstance(optimizer, str) and optimizer not in TRAINERS:
        raise ValueError(
            f"optimizer={show(optimizer)} is unknown: choose from {', '.join(TRAINERS)}, or give a callable"
        )
    if not isinstance(optimizer, str) and not callable(optimizer):
        raise TypeError(f"optimizer={show(optimizer)} must be a name, or a callable that makes an optimizer")
    trained: list[Tensor] = [*trained_parameters(model)]
    weights, adapters = _resident(model)
    given = sum(one.nbytes for one in dict.fromkeys(measure.tensors_in([inputs, named])))
    # In a caller's inference mode, the optimizer's state would be inference tensors, which the second step rejects.
    with torch.inference_mode(False), torch.enable_grad():
        inputs, named = tree_map_only(Tensor, Tensor.detach, (inputs, named))
        memory = StepMemory()
        with measure.unchanged(model, training=True):
            made = _make(optimizer, trained)

            def run() -> None:
                with memory.modules():
                    for _ in range(2):
                        _step(memory, model, made, loss, inputs, named)

            device, allocated = trained[0].device, 0
            if device.type == "cuda":
                allocated = measure.peak_bytes(run, device)
            else:
                run()
    parts = memory.parts()
    parts["scratch"] += max(0, allocated - memory.peak)
    return TrainingMemory(
        optimizer_name=optimizer if isinstance(optimizer, str) else type(made).__name__,
        moment=memory.peak_phase,
        weights=weights,
        adapters=adapters,
        inputs=given,
        **parts,
    )


def _make(optimizer: str | Callable[[list[Tensor]], torch.optim.Optimizer], trained: list[Tensor]) -> Any:
    made = TRAINERS[optimizer](trained) if isinstance(optimizer, str) else optimizer(trained)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer={show(optimizer)} makes a {type(made).__name__}, not a torch.optim.Optimizer")
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("LBFGS runs the model more than once in a step: take an optimizer that steps once")
    for group in made.param_groups:
        group["lr"] = 0.0
    return made


def _step(
    memory: StepMemory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any], Tensor] | None,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> None:
    """Take a step that changes no parameter."""
    trained = [one for one in model.parameters() if one.requires_grad]
    with memory:
        optimizer.zero_grad()
        memory.phase = "forward"
        with memory.frame(_LOSS):
            losses = measure.losses_of(model, model(*inputs, **named), loss)  # no local name keeps the output alive
        if not losses:
            raise ValueError(
                f"{type(model).__name__} returns no tensor with a gradient, as its classes and ids have none: return "
                "what they are computed of, such as logits, too, or their loss"
            )
        memory.phase = "backward"
        torch.autograd.backward(losses)
        del losses
    gradients = [one.grad for one in trained if one.grad is not None]
    memory.name(gradients, "gradients")
    with torch.no_grad():
        for gradient in gradients:  # so that the moments, and thus the update, are zero, too
            gradient.zero_()
    del gradients
    memory.phase = "update"
    with memory:
        optimizer.step()
    memory.name(measure.tensors_in(list(optimizer.state.values())), "optimizer")


def _resident(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the distinct storages of weights and buffers, and those of adapters."""
    adapters = _storages(p for m in model.modules() if isinstance(m, Adapter) for p in m.parameters())
    others = _storages([*model.parameters(), *model.buffers()])
    return sum(size for key, size in others.items() if key not in adapters), sum(adapters.values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {one._cdata: one.nbytes() for tensor in tensors for one in measure.storages_of(tensor)}


@dataclass(eq=False)
class _Block:
    """A storage that a step has allocated."""

    made_in: str  # the class of the layer in whose forward it was made, or "loss"; "" outside of any frame
    kept: bool = False  # whether it was still alive when that forward returned
    name: str = ""  # "gradients" or "optimizer"; "" for others


class StepMemory(measure.PeakMemory):
    """A ``PeakMemory`` that also knows what the storages at the peak were for. May be entered several times.

    The caller sets ``phase``; ``peak_phase`` is its value at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = self.peak_phase = "forward"
        self._blocks: dict[int, _Block] = {}  # by the address of the storage, while it lives
        self._log: list[tuple[_Block, int, int]] = []  # (changed block, its change in bytes, all bytes after it)
        self._at_peak = 0  # length of the log at the peak
        self._frames: list[tuple[str, list[tuple[int, _Block]], FrameType | None]] = []
        self._call: CodeType | None = None  # of modules, while their calls are watched

    def parts(self) -> dict[str, Any]:
        """Return the bytes at the peak by the attributes of ``TrainingMemory``."""
        sizes: dict[_Block, int] = {}
        for block, size, _ in self._log[: self._at_peak]:
            sizes[block] = sizes.get(block, 0) + size
        found = dict.fromkeys(("gradients", "optimizer", "scratch"), 0)
        activations: dict[str, int] = {}
        for block, size in sizes.items():
            if block.kept and not block.name:
                activations[block.made_in] = activations.get(block.made_in, 0) + size
            else:
                found[block.name or "scratch"] += size
        largest = sorted(activations.items(), key=lambda one: (-one[1], one[0]))
        return found | {"activations": {kind: size for kind, size in largest if size}}

    def name(self, tensors: Iterable[Tensor], name: str) -> None:
        """Set what the storages of these tensors are for: a ``_Block.name``."""
        for key in _storages(tensors):
            if key in self._blocks:
                self._blocks[key].name = name

    @contextmanager
    def frame(self, kind: str) -> Iterator[None]:
        """Attribute storages that are made inside, but not in an inner frame, to a layer of class ``kind``."""
        self._frames.append((kind, [], None))
        try:
            yield
        finally:
            self._close()

    def _close(self) -> None:
        _, made, _ = self._frames.pop()
        for key, block in made:
            block.kept = self._blocks.get(key) is block

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Open a frame for each call of a module inside.

        Python's profiler reports the calls, and changes none: with hooks, layers would leave their fast paths.

        Raises:
            RuntimeError: another profiler runs.
        """
        if (other := sys.getprofile()) is not None:
            raise RuntimeError(
                f"training_memory watches calls by sys.setprofile, which {type(other).__name__} uses: end that first"
            )
        self._call = nn.Module.__call__.__code__
        sys.setprofile(self._watch)
        try:
            yield
        finally:
            self._call = None
            sys.setprofile(None)

    def _watch(self, frame: FrameType, event: str, _: Any) -> None:
        if self._call is None:  # in a thread of autograd, after the measurement
            sys.setprofile(None)
        elif frame.f_code is self._call:
            if event == "call":
                module = frame.f_locals[self._call.co_varnames[0]]
                self._frames.append((type(module).__name__, [], frame))
            elif event == "return" and self._frames and self._frames[-1][2] is frame:
                self._close()

    def _change(self, key: int, size: int) -> None:
        super()._change(key, size)
        block = self._blocks.get(key)
        if block is None:
            if self._call is not None and sys.getprofile() is None:  # a thread of autograd, which computes again
                sys.setprofile(self._watch)
            kind, made, _ = self._frames[-1] if self._frames else ("", [], None)
            block = self._blocks[key] = _Block(kind)
            made.append((key, block))
        self._log.append((block, size, self.current))

    def _forget(self, key: int) -> None:
        super()._forget(key)
        self._blocks.pop(key, None)

    def _reach(self) -> None:
        at = len(self._log)
        current = self._log[at - 1][2] if at else 0  # not self.current: garbage may have been collected since
        if current > self.peak:
            self.peak, self._at_peak, self.peak_phase = current, at, self.phase
