"""An input that backward computes again, in place of keeping it.

The input of a layer that is the cheap function of tensors that backward keeps anyway, as ``act(a) * b`` is, needs not
be kept: ``recomputed_input`` is the context in which the layer is called. What autograd saves of the tensor there,
whatever saves it, becomes a note of how to compute it (Chen et al., arXiv 1604.06174, for one tensor). A tensor that
several layers read, as what a norm returns, carries such a note itself (``note_recompute``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Again",
    "Kept",
    "can_recompute",
    "compute_again",
    "differentiable_once",
    "in_checkpoint",
    "note_recompute",
    "noted",
    "recompute_of",
    "recomputed_input",
    "saves_in_any_dtype",
]

_autograd: Any = torch._C._autograd
_outer_hooks = getattr(_autograd, "_top_saved_tensors_default_hooks", None)

Recompute = Callable[[torch.dtype | None], Tensor]
"""Computes the input in a dtype, or in its own."""


class _Inputs(threading.local):
    """The inputs of layers that this thread calls."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, int, Recompute]] = []


_inputs = _Inputs()


def can_recompute() -> bool:
    """Whether torch says which hooks are active; older versions do not, and keep inputs, as where hooks are off."""
    return _outer_hooks is not None and bool(_autograd._saved_tensors_hooks_is_enabled())


def recompute_of(tensor: Tensor) -> Recompute | None:
    """Return how to compute the input of a layer again, for functions that keep a copy of it in another dtype."""
    for known, version, recompute in reversed(_inputs.found):
        if known is tensor and tensor._version == version:
            return recompute
    if _outer_hooks is None or tensor.grad_fn is None or not tensor.is_contiguous():
        return None
    found = noted(tensor, _pack_of(_outer_hooks(False)))
    return None if found is None else partial(compute_again, found)


class Again(NamedTuple):
    """A saved tensor that is computed again: the view of the whole that it was."""

    recompute: Recompute
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Note(NamedTuple):
    """How to compute the numbers of a storage.

    Attributes:
        version: of the tensor that they were.
        pack: the hook that was active, None without: in a checkpoint, only what was computed in it is computed again.
        dtype: of the numbers.
        read: returns how to compute them, for one that will; None: no more.
    """

    version: int
    pack: Any
    dtype: torch.dtype
    read: Callable[[], Recompute | None]


def note_recompute(tensor: Tensor, read: Callable[[], Recompute | None]) -> None:
    """Note how to compute a tensor that owns its memory again; one that is not contiguous is kept.

    Args:
        tensor: the result of what ``read`` computes.
        read: returns how to compute it, and is asked for each tensor that is not kept; None: it has to be.
    """
    if can_recompute() and tensor.is_contiguous():
        now = tensor._version, _pack_of(cast(Any, _outer_hooks)(False)), tensor.dtype
        cast(Any, tensor.untyped_storage()).lowmem_note = _Note(*now, read)  # lives as long as the memory


def noted(tensor: Tensor, pack: Any) -> Again | None:
    """Return how to compute a view of a noted tensor again, if it was not written to since, under the same hook."""
    note = getattr(tensor.untyped_storage(), "lowmem_note", None)
    if note is None or (note.version, note.pack, note.dtype) != (tensor._version, pack, tensor.dtype):
        return None
    recompute = note.read()
    return (
        None if recompute is None else Again(recompute, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
    )


def compute_again(again: Again, dtype: torch.dtype | None = None) -> Tensor:
    """Return the saved tensor, in a dtype or in its own."""
    return again.recompute(dtype).as_strided(again.shape, again.stride, again.offset)


def differentiable_once(x: Tensor) -> Tensor:
    """Return what a backward has computed without a graph, of which a second derivative is refused."""
    if not torch.is_grad_enabled():
        return x
    refuse = torch._C._functions.DelayedError(
        "what a prepared model computes again has no second derivative: call lowmem.release_training(model) first", 1
    )
    return refuse(x.detach().requires_grad_())


def in_checkpoint() -> bool:
    """Whether a checkpoint of torch may run, which saves the same dtypes each time that it computes its region."""
    if not can_recompute():
        return True
    pack = _pack_of(cast(Any, _outer_hooks)(False))
    return getattr(pack, "__module__", None) == checkpoint.__module__


def _pack_of(hooks: Any) -> Any:
    return None if hooks is None else hooks[0]


def saves_in_any_dtype() -> bool:
    """Whether what is saved takes the same bytes in any dtype, and once for each memory: it is best left as it is."""
    if not can_recompute():
        return False
    pack = _pack_of(cast(Any, _outer_hooks)(False))
    return bool(getattr(getattr(pack, "__self__", None), "saves_in_any_dtype", False))


class Kept(NamedTuple):
    """A tensor that is saved as it is, at one version: torch does not check versions of what hooks return."""

    tensor: Tensor
    version: int

    def unchanged(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it has been written to since.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}, and was saved "
                f"at version {self.version}"
            )
        return self.tensor


class _Outer(NamedTuple):
    """What the hooks outside made of a tensor, and how they make the tensor of that."""

    packed: Any
    unpack: Callable[[Any], Tensor]


@contextmanager
def recomputed_input(tensor: Tensor, recompute: Recompute) -> Iterator[None]:
    """Keep nothing of a contiguous tensor that is saved in this context; all other tensors are saved as outside.

    Args:
        tensor: the input of a layer that is called in the context.
        recompute: returns its numbers, contiguous.
    """
    storage, version, dtype = tensor.untyped_storage()._cdata, tensor._version, tensor.dtype
    outer: Any = cast(Any, _outer_hooks)(False)

    def pack(saved: Tensor) -> Any:  # autograd keeps it: so it must not refer to the tensor
        plain = type(saved) is Tensor and saved.layout is torch.strided and saved.dtype is dtype
        if plain and saved.untyped_storage()._cdata == storage and saved._version == version:
            return Again(recompute, saved.shape, saved.stride(), int(saved.storage_offset()))
        if outer is None:
            return Kept(saved, saved._version)
        return _Outer(outer[0](saved), outer[1])

    _inputs.found.append((tensor, version, recompute))
    try:
        with saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        _inputs.found.pop()


def _unpack(packed: Again | Kept | _Outer) -> Tensor:
    if isinstance(packed, _Outer):
        return packed.unpack(packed.packed)
    if isinstance(packed, Again):
        return compute_again(packed)
    return packed.unchanged()
