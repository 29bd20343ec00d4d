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
from lowmem.errors import short_repr
from lowmem.nn.adapter import Adapter
from lowmem.training.adamw_8bit import AdamW8bit
from lowmem.training.prepared_module import trainable_parameters_or_raise
from lowmem.transforms.memory_plan import OPTIMIZERS
from lowmem.transforms.model_summary import aligned_table_lines
from lowmem.transforms.module_registry import check_is_module

NAMED_OPTIMIZERS: MappingProxyType[str, Callable[..., torch.optim.Optimizer]] = MappingProxyType(
    {**OPTIMIZERS, "adamw8bit": AdamW8bit}
)
"""The optimizers that ``training_memory`` knows by name; ``finetune`` trains with all but "sgd"."""

# Stands for the layer's class where activations are made outside of any module
_LOSS = "loss"
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
        sizes: dict[str, int] = {name: getattr(self, name) for name in first}
        sizes |= {f"activations: {kind}": size for kind, size in self.activations.items()}
        return sizes | {"scratch": self.scratch}

    def __str__(self) -> str:
        rows = [*self.parts.items(), (f"peak, in {self.moment}", self.total_bytes)]
        table = [("Memory", "MiB"), *((name, f"{size / _MIB:.2f}") for name, size in rows)]
        return "\n".join(aligned_table_lines(table, right_aligned=(1,)))

    def as_json(self) -> dict[str, Any]:
        """Return all fields, ``step_bytes`` and ``total_bytes``, as integers and strings that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {
            "activations": dict(self.activations)
        }
        return values | {"step_bytes": self.step_bytes, "total_bytes": self.total_bytes}


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
    check_is_module(model)
    if isinstance(optimizer, str) and optimizer not in NAMED_OPTIMIZERS:
        raise ValueError(
            f"optimizer={short_repr(optimizer)} is unknown: choose from {', '.join(NAMED_OPTIMIZERS)}, or give a "
            "callable"
        )
    if not isinstance(optimizer, str) and not callable(optimizer):
        raise TypeError(f"optimizer={short_repr(optimizer)} must be a name, or a callable that makes an optimizer")
    trained: list[Tensor] = [*trainable_parameters_or_raise(model)]
    weights, adapters = _weight_and_adapter_bytes(model)
    input_bytes = sum(tensor.nbytes for tensor in dict.fromkeys(measure.tensors_in([inputs, named])))
    # In a caller's inference mode, the optimizer's state would be inference tensors, which the second step rejects.
    with torch.inference_mode(False), torch.enable_grad():
        inputs, named = tree_map_only(Tensor, Tensor.detach, (inputs, named))
        memory = CategorizedPeakMemory()
        with measure.unchanged(model, training=True):
            made = _make_zero_lr_optimizer(optimizer, trained)

            def profile_two_no_op_steps() -> None:
                with memory.profiled_module_calls():
                    for _ in range(2):
                        _run_measured_no_op_step(memory, model, made, loss, inputs, named)

            device, allocated = trained[0].device, 0
            if device.type == "cuda":
                allocated = measure.peak_bytes(profile_two_no_op_steps, device)
            else:
                profile_two_no_op_steps()
    parts = memory.peak_bytes_by_category()
    parts["scratch"] += max(0, allocated - memory.peak)
    return TrainingMemory(
        optimizer_name=optimizer if isinstance(optimizer, str) else type(made).__name__,
        moment=memory.peak_phase,
        weights=weights,
        adapters=adapters,
        inputs=input_bytes,
        **parts,
    )


def _make_zero_lr_optimizer(
    optimizer: str | Callable[[list[Tensor]], torch.optim.Optimizer], parameters: list[Tensor]
) -> Any:
    made = NAMED_OPTIMIZERS[optimizer](parameters) if isinstance(optimizer, str) else optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={short_repr(optimizer)} makes a {type(made).__name__}, not a torch.optim.Optimizer"
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("LBFGS runs the model more than once in a step: take an optimizer that steps once")
    for group in made.param_groups:
        group["lr"] = 0.0
    return made


def _run_measured_no_op_step(
    memory: CategorizedPeakMemory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any], Tensor] | None,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Take a step that changes no parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with memory:
        optimizer.zero_grad()
        memory.phase = "forward"
        with memory.allocations_attributed_to(_LOSS):
            # No local name keeps the output alive
            losses = measure.losses_of(model, model(*inputs, **kwargs), loss)
        if not losses:
            raise ValueError(
                f"{type(model).__name__} returns no tensor with a gradient, as its classes and ids have none: return "
                "what they are computed of, such as logits, too, or their loss"
            )
        memory.phase = "backward"
        torch.autograd.backward(losses)
        del losses
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    memory.label_storages(gradients, "gradients")
    with torch.no_grad():
        # So that the moments, and thus the update, are zero, too
        for gradient in gradients:
            gradient.zero_()
    del gradients
    memory.phase = "update"
    with memory:
        optimizer.step()
    memory.label_storages(measure.tensors_in(list(optimizer.state.values())), "optimizer")


def _weight_and_adapter_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the distinct storages of weights and buffers, and those of adapters."""
    adapters = _storage_nbytes_by_key(p for m in model.modules() if isinstance(m, Adapter) for p in m.parameters())
    others = _storage_nbytes_by_key([*model.parameters(), *model.buffers()])
    return sum(size for key, size in others.items() if key not in adapters), sum(adapters.values())


def _storage_nbytes_by_key(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {storage._cdata: storage.nbytes() for tensor in tensors for storage in measure.storages_of(tensor)}


@dataclass(eq=False)
class _StorageOrigin:
    """A storage that a step has allocated."""

    made_in: str  # the class of the layer in whose forward it was made, or "loss"; "" outside of any frame
    outlived_forward: bool = False  # whether it was still alive when that forward returned
    name: str = ""  # "gradients" or "optimizer"; "" for others


class CategorizedPeakMemory(measure.PeakMemory):
    """A ``PeakMemory`` that also knows what the storages at the peak were for. May be entered several times.

    The caller sets ``phase``; ``peak_phase`` is its value at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = self.peak_phase = "forward"
        # By the address of the storage, while it lives
        self._blocks: dict[int, _StorageOrigin] = {}
        self._log: list[
            tuple[_StorageOrigin, int, int]
        ] = []  # (changed block, its change in bytes, all bytes after it)
        # Length of the log at the peak
        self._at_peak = 0
        self._frames: list[tuple[str, list[tuple[int, _StorageOrigin]], FrameType | None]] = []
        self._call: CodeType | None = None  # of modules, while their calls are watched

    def peak_bytes_by_category(self) -> dict[str, Any]:
        """Return the bytes at the peak by the attributes of ``TrainingMemory``."""
        sizes: dict[_StorageOrigin, int] = {}
        for block, size, _ in self._log[: self._at_peak]:
            sizes[block] = sizes.get(block, 0) + size
        totals = dict.fromkeys(("gradients", "optimizer", "scratch"), 0)
        activations: dict[str, int] = {}
        for block, size in sizes.items():
            if block.outlived_forward and not block.name:
                activations[block.made_in] = activations.get(block.made_in, 0) + size
            else:
                totals[block.name or "scratch"] += size
        largest = sorted(activations.items(), key=lambda item: (-item[1], item[0]))
        return totals | {"activations": {kind: size for kind, size in largest if size}}

    def label_storages(self, tensors: Iterable[Tensor], label: str) -> None:
        """Set what the storages of these tensors are for: a ``_StorageOrigin.name``."""
        for key in _storage_nbytes_by_key(tensors):
            if key in self._blocks:
                self._blocks[key].name = label

    @contextmanager
    def allocations_attributed_to(self, layer_class_name: str) -> Iterator[None]:
        """Attribute storages that are made inside, but not in an inner frame, to a layer of class
        ``layer_class_name``."""
        self._frames.append((layer_class_name, [], None))
        try:
            yield
        finally:
            self._pop_frame_and_mark_survivors()

    def _pop_frame_and_mark_survivors(self) -> None:
        _, made, _ = self._frames.pop()
        for key, block in made:
            block.outlived_forward = self._blocks.get(key) is block

    @contextmanager
    def profiled_module_calls(self) -> Iterator[None]:
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
        sys.setprofile(self._track_frame_and_mark_survivors)
        try:
            yield
        finally:
            self._call = None
            sys.setprofile(None)

    def _track_frame_and_mark_survivors(self, frame: FrameType, event: str, _: Any) -> None:
        # In a thread of autograd, after the measurement
        if self._call is None:
            sys.setprofile(None)
        elif frame.f_code is self._call:
            if event == "call":
                module = frame.f_locals[self._call.co_varnames[0]]
                self._frames.append((type(module).__name__, [], frame))
            elif event == "return" and self._frames and self._frames[-1][2] is frame:
                self._pop_frame_and_mark_survivors()

    def _change_current_bytes(self, address: int, byte_change: int) -> None:
        super()._change_current_bytes(address, byte_change)
        block = self._blocks.get(address)
        if block is None:
            # A thread of autograd, which computes again
            if self._call is not None and sys.getprofile() is None:
                sys.setprofile(self._track_frame_and_mark_survivors)
            kind, made, _ = self._frames[-1] if self._frames else ("", [], None)
            block = self._blocks[address] = _StorageOrigin(kind)
            made.append((address, block))
        self._log.append((block, byte_change, self.current))

    def _uncount_freed_storage(self, address: int) -> None:
        super()._uncount_freed_storage(address)
        self._blocks.pop(address, None)

    def _update_peak(self) -> None:
        at = len(self._log)
        # Not self.current: garbage may have been collected since
        current = self._log[at - 1][2] if at else 0
        if current > self.peak:
            self.peak, self._at_peak, self.peak_phase = current, at, self.phase
