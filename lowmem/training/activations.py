"""What autograd saves for backward, kept as 8-bit codes in blocks.

A training step's memory is mostly what the forward saves. ``compressed_activations`` replaces each large floating
tensor by signed 8-bit codes with one scale for 32 numbers, and makes it again when backward asks (Chen et al., ActNN,
arXiv 2104.14129, and Dettmers et al., 8-bit Optimizers, arXiv 2110.02861, section 2, for blocks). Its hooks are
``torch.autograd.graph.saved_tensors_hooks``, so no model needs code of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowmem.kernels.codes import BLOCK, code, decode
from lowmem.nn.frozen_linear import is_cast
from lowmem.nn.recomputed import Again, Kept, compute_again, noted
from lowmem.training.room import Room, return_holes
from lowmem.transforms.registry import check_module

__all__ = ["Codes", "compress", "compressed_activations"]

_LEAST = 2**12
"""Numbers of a tensor below which it is kept as it is: its codes would save less than they cost."""

_VANISHED = 1 / 7
"""A tensor of which a larger part would vanish is kept as it is: probabilities, decays, masks of attention."""

_VIEWED = 4
"""A tensor is kept with its whole storage, once for all views, if that has at most this many times its numbers."""


class Codes(NamedTuple):
    """Numbers in 8 bits, ``x = codes * scale`` in blocks of 32 of the flat tensor.

    Attributes:
        codes: int8 (blocks, 32), from -127 to 127.
        scales: float32 (blocks, 1): the largest magnitude of a block over 127.
        dtype: of the numbers.
        length: how many numbers there are, without the padding of the last block.
        vanished: which part of the numbers other than zero has the code of zero, at most; 1, if one is not finite.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    length: int
    vanished: float

    def values(self) -> Tensor:
        """Return the numbers: (length,)."""
        return decode(self.codes, self.scales, self.dtype).view(-1)[: self.length]


def compress(numbers: Tensor, room: Room | None = None) -> Codes:
    """Return the 8-bit codes of a flat floating tensor: ``|x - codes * scale| <= scale / 2`` but for rounding.

    A block with NaN or an infinite number becomes NaN: what went wrong stays visible.
    """
    into = None
    if room is not None and numbers.is_cpu:
        blocks = -(-numbers.numel() // BLOCK)
        codes, scales = room.take(blocks * (BLOCK + 4)).split((blocks * BLOCK, blocks * 4))
        into = codes.view(-1, BLOCK), scales.view(torch.float32).unsqueeze(1)
    coded, scales, (before, after) = code(numbers, into)
    lost = 1 - after / max(1, before) if bool(scales.isfinite().all()) else 1.0
    return Codes(coded, scales, numbers.dtype, numbers.numel(), lost)


@dataclass(eq=False)
class _Packed:
    """A saved tensor: codes of a storage, and the view of it."""

    codes: Codes
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    held: _Held


@dataclass(eq=False)
class _Held:
    """The storage that was made again last, and its codes' memory: several views of one are asked for in a row."""

    codes: Codes | None = None
    values: Tensor | None = None
    piece: int = 0


class _Seen(NamedTuple):
    """What a storage is kept as at one version: its codes, or itself for None."""

    storage: weakref.ref[Any]
    version: int
    codes: Codes | None


class _Compressor:
    """The hooks of one context.

    Args:
        exact: storages that are kept as they are, those of parameters and buffers, by their ``_cdata``.

    Attributes:
        keeps: which of the tensors that the running function saves stay as they are; None: no more than of any other.
    """

    saves_in_any_dtype = True

    def __init__(self, exact: set[int]) -> None:
        self.exact = exact
        self.seen: dict[tuple[int, torch.dtype], _Seen] = {}
        self.held = _Held()
        self.room = Room()
        self.keeps: Callable[[Tensor], bool] | None = None

    def pack(self, tensor: Tensor) -> Kept | _Packed | Again:
        """Return what autograd keeps in place of a tensor."""
        return self._packed(tensor) or Kept(tensor, tensor._version)

    def _packed(self, tensor: Tensor) -> _Packed | Again | None:
        if type(tensor) is not Tensor or not _is_large(tensor):
            return None
        if (again := noted(tensor, self.pack)) is not None:
            return again
        storage = tensor.untyped_storage()
        if storage._cdata in self.exact:
            return None
        keep = self.keeps is not None and self.keeps(tensor)
        if storage.nbytes() > _VIEWED * tensor.nbytes:
            codes = None if keep else self._codes(tensor.detach().reshape(-1))
            shape = torch.empty(tensor.shape, device="meta")
            return None if codes is None else _Packed(codes, shape.shape, shape.stride(), 0, self.held)
        codes = self._of_storage(tensor, storage, keep)
        if codes is None:
            return None
        return _Packed(codes, tensor.shape, tensor.stride(), int(tensor.storage_offset()), self.held)

    def _of_storage(self, tensor: Tensor, storage: Any, keep: bool) -> Codes | None:
        """Return the codes of a whole storage, the same ones for each view of it while it does not change.

        An address is used again after its memory is freed, and a storage can be written to: so the codes are those
        of the storage object and version that they were made from. What one function keeps as it is, later ones do.
        """
        key = storage._cdata, tensor.dtype
        seen = self.seen.get(key)
        known = seen is not None and seen.storage() is storage and seen.version == tensor._version
        if seen is None or not known or (keep and seen.codes is not None):
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            seen = _Seen(weakref.ref(storage), tensor._version, None if keep else self._codes(flat))
            self.seen = {at: one for at, one in self.seen.items() if one.storage() is not None} | {key: seen}
        return seen.codes

    def _codes(self, numbers: Tensor) -> Codes | None:
        codes = compress(numbers, self.room)
        if codes.vanished <= _VANISHED:
            return codes
        self.room.give_back()
        return None

    @staticmethod
    def unpack(packed: Kept | _Packed | Again) -> Tensor:
        """Return the tensor for backward.

        Raises:
            RuntimeError: it was kept as it is, and has been written to since.
        """
        if isinstance(packed, Kept):
            return packed.unchanged()
        if isinstance(packed, Again):
            return compute_again(packed)
        held = packed.held
        if held.codes is not packed.codes or held.values is None:
            piece = packed.codes.codes.untyped_storage()
            if piece._cdata != held.piece:  # another one was freed
                held.piece = piece._cdata
                return_holes(piece.nbytes())
            held.codes, held.values = packed.codes, packed.codes.values()
        return held.values.as_strided(packed.shape, packed.stride, packed.offset)


def _is_large(tensor: Tensor) -> bool:
    """Whether a tensor is worth compressing, and bears it: statistics of rows, of shape (..., 1), do not."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return False
    return tensor.dim() > 1 and tensor.shape[-1] > 1 and tensor.numel() >= _LEAST


_EXACT = (
    {
        functional.softmax,
        functional.log_softmax,
        functional.softmin,
        functional.cross_entropy,
        functional.nll_loss,
        functional.multi_head_attention_forward,  # its softmax cannot be told apart
        Tensor.softmax,
        Tensor.log_softmax,
        Tensor.logsumexp,
        torch.softmax,
        torch.log_softmax,
        torch.logsumexp,
        torch.special.softmax,
        torch.special.log_softmax,
        torch.special.logsumexp,
    }
    | {
        getattr(place, name)
        for place in (torch, Tensor)
        for name in (
            "div",
            "true_divide",
            "divide",
            "reciprocal",
            "log",
            "log2",
            "log10",
            "log1p",
            "sqrt",
            "rsqrt",
            "prod",
        )
    }
    | {Tensor.__truediv__, Tensor.__rtruediv__, Tensor.norm, torch.norm, torch.linalg.vector_norm}
)
"""Functions whose saves are divided by in backward, or are probabilities: 8 bits would lose the small ones."""

_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__, torch.float_power, Tensor.float_power}


class _ByFunction(TorchFunctionMode):
    """Tells the hooks what a function saves that 8 bits would harm."""

    def __init__(self, compressor: _Compressor) -> None:
        super().__init__()
        self.compressor = compressor

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keeps = _keeps(function, args, kwargs)
        if keeps is None:
            return function(*args, **kwargs)
        before, self.compressor.keeps = self.compressor.keeps, keeps
        try:
            return function(*args, **kwargs)
        finally:
            self.compressor.keeps = before


def _keeps(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[Tensor], bool] | None:
    """Return which tensors that a function saves stay as they are; None: no more than of any function."""
    if function in _EXACT or (function in _POWERS and not _is_whole(args[1] if len(args) > 1 else None)):
        return lambda saved: True
    if function is functional.group_norm:  # statistics of groups, (batch, groups)
        return lambda saved: saved.dim() == 2
    if function is functional.scaled_dot_product_attention:
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        scores = None if mask is None else tuple(mask.shape[-2:])
        # Sums of exponentials are (batch, heads, rows), masks and probabilities (batch, heads, rows, rows).
        return lambda saved: saved.dim() < 4 or tuple(saved.shape[-2:]) == scores
    if function is functional.linear and len(args) > 1 and is_cast(args[0]):
        shape = tuple(args[1].shape)  # of the weight, which autocast has cast
        return lambda saved: tuple(saved.shape) in (shape, shape[::-1])
    return None


def _is_whole(exponent: Any) -> bool:
    """Whether the gradient of a power multiplies by powers of the number, and does not divide."""
    return isinstance(exponent, int | float) and exponent >= 1 and exponent == int(exponent)


@contextmanager
def compressed_activations(model: nn.Module) -> Iterator[None]:
    """Keep in 8 bits what autograd saves in this context: a quarter of float32's bytes, and half of bfloat16's::

        with lowmem.compressed_activations(model):
            loss = model(**batch).loss
        loss.backward()

    Compressed are dense floating tensors of 16 bits or more with at least 4096 numbers and two dimensions. Each
    number is off by at most 1/254 of the largest magnitude among the 32 of its block in memory; gradients, which are
    sums over rows, by a few percent. Kept as they are: parameters and buffers, integers, complex and sparse tensors,
    statistics of rows, what softmax, cross_entropy, divisions, logarithms, roots and ``nn.MultiheadAttention`` save,
    masks of attention, and whatever has numbers that are not finite, or of which more than a seventh would become
    zero. Views are restored as views, and tensors
    that share memory are compressed once. Of a region of ``torch.utils.checkpoint`` that is the region's inputs, from
    which it is computed again.

    Args:
        model: whose parameters and buffers are kept as they are.

    Raises:
        TypeError: not a module.
        RuntimeError: inside torch.compile, whose graphs decide themselves what they save; call the compiled model in
            the context instead.
    """
    check_module(model)
    if torch.compiler.is_compiling():
        raise RuntimeError("compressed_activations inside a compiled function: enter it around the compiled call")
    compressor = _Compressor(exact := _storages(model))
    # FSDP2 makes a module's whole parameters before its forward, with storages of their own.
    sharded = [one for one in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(one).__mro__)]
    hooks = [one.register_forward_pre_hook(lambda module, _: exact.update(_storages(module))) for one in sharded]
    try:
        with saved_tensors_hooks(compressor.pack, compressor.unpack), _ByFunction(compressor):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _storages(module: nn.Module) -> set[int]:
    """Return the storages of parameters and buffers, by their ``_cdata``; shards are in none that a forward reads."""
    tensors = [one for one in (*module.parameters(), *module.buffers()) if one.layout is torch.strided]
    return {one.untyped_storage()._cdata for one in tensors if not is_traceable_wrapper_subclass(one)}
