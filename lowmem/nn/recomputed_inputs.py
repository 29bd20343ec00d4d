"""Inputs of layers that are recomputed in backward instead of saved, where they are a cheap function of tensors that
are saved anyway, such as ``act(a) * b`` (Chen et al., arXiv 1604.06174, applied to one tensor)."""

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

_autograd: Any = torch._C._autograd
_outer_hooks: Callable[[bool], Any] = _autograd._top_saved_tensors_default_hooks

Recompute = Callable[[torch.dtype | None], Tensor]
"""Recomputes a tensor in the given dtype; None: in its own."""


class _ThreadRecomputedInputs(threading.local):
    """The inputs of the ``recomputed_instead_of_saved`` contexts that this thread is in."""

    def __init__(self) -> None:
        self.entries: list[tuple[Tensor, int, Recompute]] = []


_inputs = _ThreadRecomputedInputs()


def are_saved_tensor_hooks_allowed() -> bool:
    """Whether inputs can be recomputed: torch must allow saved-tensor hooks."""
    return bool(_autograd._saved_tensors_hooks_is_enabled())


def recompute_function_or_none(tensor: Tensor) -> Recompute | None:
    """Return how to recompute a layer's input, for functions that would save a cast copy of it; or None."""
    for known, version, recompute in reversed(_inputs.entries):
        if known is tensor and tensor._version == version:
            return recompute
    if tensor.grad_fn is None or not tensor.is_contiguous():
        return None
    recomputed = recomputable_view_or_none(tensor, _pack_hook_or_none(_outer_hooks(False)))
    return None if recomputed is None else partial(recompute_tensor, recomputed)


class RecomputableView(NamedTuple):
    """A saved tensor that is recomputed: how, and its shape, strides and offset as a view of the whole tensor."""

    recompute: Recompute
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _StorageRecomputeRecord(NamedTuple):
    """How to recompute the contents of a storage.

    Attributes:
        version: of the tensor when it was noted.
        pack: the saved-tensor hook that was active then, or None: inside a checkpoint, only tensors that were made in
            it can be recomputed.
        dtype: of the tensor.
        get_recompute: called by each reader; returns how to recompute the tensor, or None if it has to be saved.
    """

    version: int
    pack: Any
    dtype: torch.dtype
    get_recompute: Callable[[], Recompute | None]


def register_recompute_if_contiguous(tensor: Tensor, get_recompute: Callable[[], Recompute | None]) -> None:
    """Note on a tensor's storage how to recompute it; a tensor that is not contiguous gets no note.

    Args:
        tensor: owns its memory.
        get_recompute: called for each tensor that would be saved; returns how to recompute it, or None if it has to
            be saved.
    """
    if are_saved_tensor_hooks_allowed() and tensor.is_contiguous():
        now = tensor._version, _pack_hook_or_none(_outer_hooks(False)), tensor.dtype
        cast(Any, tensor.untyped_storage()).lowmem_note = _StorageRecomputeRecord(
            *now, get_recompute
        )  # lives as long as the storage


def recomputable_view_or_none(tensor: Tensor, pack_hook: Any) -> RecomputableView | None:
    """Return how to recompute a view of a noted tensor; None if it was changed since, or under another hook."""
    note = getattr(tensor.untyped_storage(), "lowmem_note", None)
    if note is None or (note.version, note.pack, note.dtype) != (tensor._version, pack_hook, tensor.dtype):
        return None
    recompute = note.get_recompute()
    return (
        None
        if recompute is None
        else RecomputableView(recompute, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
    )


def recompute_tensor(recomputed: RecomputableView, dtype: torch.dtype | None = None) -> Tensor:
    """Return the saved tensor, in a dtype or in its own."""
    return recomputed.recompute(dtype).as_strided(recomputed.shape, recomputed.stride, recomputed.offset)


def with_double_backward_error(x: Tensor) -> Tensor:
    """Return a result that a backward computed without a graph, such that differentiating it is an error."""
    if not torch.is_grad_enabled():
        return x
    refuse = torch._C._functions.DelayedError(
        "what a prepared model computes again has no second derivative: call lowmem.release_training(model) first", 1
    )
    return refuse(x.detach().requires_grad_())


def is_possibly_in_checkpoint() -> bool:
    """Whether a torch checkpoint may be running, which must save the same dtypes when it recomputes its region."""
    if not are_saved_tensor_hooks_allowed():
        return True
    pack = _pack_hook_or_none(_outer_hooks(False))
    return getattr(pack, "__module__", None) == checkpoint.__module__


def _pack_hook_or_none(hooks: Any) -> Any:
    return None if hooks is None else hooks[0]


def has_dtype_independent_pack_hook() -> bool:
    """Whether the active hook takes the same bytes for any dtype, and packs a storage once: casts save nothing."""
    if not are_saved_tensor_hooks_allowed():
        return False
    pack = _pack_hook_or_none(_outer_hooks(False))
    return bool(getattr(getattr(pack, "__self__", None), "saves_in_any_dtype", False))


class VersionedTensor(NamedTuple):
    """A tensor that a hook saves unchanged, with its version: torch does not check versions of what hooks return."""

    tensor: Tensor
    version: int

    def unmodified_tensor_or_raise(self) -> Tensor:
        """Return the tensor."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}, and was saved "
                f"at version {self.version}"
            )
        return self.tensor


class _TensorPackedByOuterHooks(NamedTuple):
    """A tensor as packed by the hooks of the outer context, and their unpack function."""

    packed: Any
    unpack: Callable[[Any], Tensor]


@contextmanager
def recomputed_instead_of_saved(tensor: Tensor, recompute: Recompute) -> Iterator[None]:
    """Do not save a contiguous tensor in this context, but recompute it; all other tensors are saved as outside.

    Args:
        tensor: the input of a layer that is called in the context.
        recompute: returns its values as a contiguous tensor.
    """
    storage, version, dtype = tensor.untyped_storage()._cdata, tensor._version, tensor.dtype
    outer = _outer_hooks(False)

    # Autograd keeps this function, so it must not refer to the tensor
    def pack(saved: Tensor) -> Any:
        plain = type(saved) is Tensor and saved.layout is torch.strided and saved.dtype is dtype
        if plain and saved.untyped_storage()._cdata == storage and saved._version == version:
            return RecomputableView(recompute, saved.shape, saved.stride(), int(saved.storage_offset()))
        if outer is None:
            return VersionedTensor(saved, saved._version)
        return _TensorPackedByOuterHooks(outer[0](saved), outer[1])

    _inputs.entries.append((tensor, version, recompute))
    try:
        with saved_tensors_hooks(pack, _unpack_saved):
            yield
    finally:
        _inputs.entries.pop()


def _unpack_saved(packed: RecomputableView | VersionedTensor | _TensorPackedByOuterHooks) -> Tensor:
    if isinstance(packed, _TensorPackedByOuterHooks):
        return packed.unpack(packed.packed)
    if isinstance(packed, RecomputableView):
        return recompute_tensor(packed)
    return packed.unmodified_tensor_or_raise()
