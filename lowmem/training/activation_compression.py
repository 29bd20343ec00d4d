"""Activation compression: tensors that autograd saves for backward are kept as 8-bit codes in blocks of 32 (Chen et
al., ActNN, arXiv 2104.14129; Dettmers et al., arXiv 2110.02861, section 2, for blocks)."""

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

from lowmem.kernels.codes_8bit import BLOCK, decode_roots, empty_codes_and_scales, encode_roots
from lowmem.nn.call_context import is_cast_by_autocast
from lowmem.nn.recomputed_inputs import (
    RecomputableView,
    VersionedTensor,
    recomputable_view_or_none,
    recompute_tensor,
)
from lowmem.nn.sharded_parameters import is_fsdp2_module
from lowmem.quant.backend import backend_of
from lowmem.resident import trim_heap_before_allocation
from lowmem.transforms.module_registry import check_is_module

_LEAST = 2**12
"""Tensors with fewer elements are not compressed: it would save less than it costs."""

_VANISHED = 1 / 7
"""A tensor is not compressed if a larger share of its nonzero elements would become zero, as in probabilities, decays
and attention masks."""

_VIEWED = 4
"""If a view's storage is at most this many times as large as the view, the whole storage is compressed, once for all
of its views; otherwise only a copy of the view is."""


# Bytes: a cache line
_ALIGNED = 64
# A new piece has 1/8 of the bytes of all pieces so far
_PART = 8


class ActivationArena:
    """An arena for tensors that live from forward to backward: views of few large pieces, freed with their last view.

    Tensors of about a megabyte, allocated one by one between temporaries of the same size, fragment the heap: in
    "lean", the resident peak of 8 layers of SmolLM2's sizes on 2048 tokens is then 234 MiB in place of 190.
    """

    def __init__(self) -> None:
        self._piece: Tensor | None = None
        self._used = self._total = self._last = 0

    def allocate_int8(self, nbytes: int) -> Tensor:
        """Return uninitialized int8 (size,) on the CPU, aligned for any dtype."""
        if self._piece is None or self._used + nbytes > len(self._piece):
            whole = -(-nbytes // _ALIGNED) * _ALIGNED
            # A multiple: tensors of one size waste nothing
            length = max(1, self._total // _PART // whole) * whole
            trim_heap_before_allocation(length)
            self._piece = torch.empty(length, dtype=torch.int8, device="cpu")
            self._used, self._total = 0, self._total + length
        self._last = self._used
        self._used += -(-nbytes // _ALIGNED) * _ALIGNED
        return self._piece[self._last : self._last + nbytes]

    def free_last_allocation(self) -> None:
        """Free what the last ``allocate_int8`` returned, which must not be used any more."""
        self._used = self._last


class QuantizedActivation(NamedTuple):
    """A tensor in 8 bits: ``x = codes * scale`` in blocks of 32 of its elements, or codes of roots."""

    codes: Tensor  # int8 (blocks, 32)
    scales: Tensor  # float32 (blocks, 1)
    dtype: torch.dtype  # of the original tensor
    length: int  # number of elements, without the padding of the last block
    vanished: float | None  # share of nonzero elements whose code is zero; 1 if any is not finite; of roots None

    def dequantize(self) -> Tensor:
        """Decode: (length,), in the original dtype."""
        decode = decode_roots if self.vanished is None else backend_of(self.codes).decode_8bit
        return decode(self.codes, self.scales, self.dtype).view(-1)[: self.length]


def quantize_activation(x: Tensor, arena: ActivationArena | None = None) -> QuantizedActivation:
    """Return the 8-bit codes of a flat floating point tensor: ``|x - codes * scale| <= scale / 2``, up to rounding.

    A block that contains NaN or infinity decodes to NaN, so that the failure stays visible. On a GPU the codes are
    those of roots. ``arena`` allocates codes and scales of CPU tensors; without one, torch does.
    """
    if backend_of(x).is_asynchronous:
        codes, scales = empty_codes_and_scales(x)
        encode_roots(x, (codes, scales))
        return QuantizedActivation(codes, scales, x.dtype, x.numel(), None)
    if arena is not None:
        blocks = -(-x.numel() // BLOCK)
        flat, of_scales = arena.allocate_int8(blocks * (BLOCK + 4)).split((blocks * BLOCK, blocks * 4))
        codes, scales = flat.view(-1, BLOCK), of_scales.view(torch.float32).unsqueeze(1)
    else:
        codes, scales = empty_codes_and_scales(x)
    before, after = backend_of(x).encode_8bit(x, (codes, scales))
    lost = 1 - after / max(1, before) if bool(scales.isfinite().all()) else 1.0
    return QuantizedActivation(codes, scales, x.dtype, x.numel(), lost)


@dataclass(eq=False)
class _QuantizedView:
    """A saved tensor: the codes of a storage, and the view's shape, strides and offset in it."""

    codes: QuantizedActivation
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    held: _LastDequantizedStorage


@dataclass(eq=False)
class _LastDequantizedStorage:
    """The storage that was decoded last, since backward often unpacks several views of one storage in a row."""

    codes: QuantizedActivation | None = None
    values: Tensor | None = None
    piece: int = 0  # identifies the storage that holds the codes


class _CachedStorageCodes(NamedTuple):
    """How a storage is kept at one version: as codes, or, if they are None, uncompressed."""

    storage: weakref.ref[Any]
    version: int
    codes: QuantizedActivation | None


class _SavedTensorCompressor:
    """The saved-tensor hooks of one ``compressed_activations`` context.

    Attributes:
        exact_storage_keys: storages that are never compressed (those of parameters and buffers), by their ``_cdata``.
        keeps: whether a tensor that the running torch function saves must stay uncompressed; None: the function needs
            no exception.
    """

    saves_in_any_dtype = True

    def __init__(self, exact_storage_keys: set[int]) -> None:
        self.exact = exact_storage_keys
        self.seen: dict[tuple[int, torch.dtype], _CachedStorageCodes] = {}
        self.held = _LastDequantizedStorage()
        self.room = ActivationArena()
        self.keeps: Callable[[Tensor], bool] | None = None

    def pack(self, tensor: Tensor) -> VersionedTensor | _QuantizedView | RecomputableView:
        """Return what autograd keeps instead of a tensor."""
        return self._packed_or_none(tensor) or VersionedTensor(tensor, tensor._version)

    def _packed_or_none(self, tensor: Tensor) -> _QuantizedView | RecomputableView | None:
        if type(tensor) is not Tensor or not _is_compressible(tensor):
            return None
        if (again := recomputable_view_or_none(tensor, self.pack)) is not None:
            return again
        storage = tensor.untyped_storage()
        if storage._cdata in self.exact:
            return None
        keep = self.keeps is not None and self.keeps(tensor)
        if storage.nbytes() > _VIEWED * tensor.nbytes:
            codes = None if keep else self._quantize_or_free_if_lossy(tensor.detach().reshape(-1))
            shape = torch.empty(tensor.shape, dtype=torch.float32, device="meta")
            return None if codes is None else _QuantizedView(codes, shape.shape, shape.stride(), 0, self.held)
        codes = self._cached_storage_codes_or_none(tensor, storage, keep)
        if codes is None:
            return None
        return _QuantizedView(codes, tensor.shape, tensor.stride(), int(tensor.storage_offset()), self.held)

    def _cached_storage_codes_or_none(
        self, tensor: Tensor, storage: Any, keep_uncompressed: bool
    ) -> QuantizedActivation | None:
        """Return the codes of a whole storage, shared by its views while it does not change; None: keep it, as for
        all functions once one needs it uncompressed. Addresses are reused: an entry is of one storage object and
        version."""
        key = storage._cdata, tensor.dtype
        seen = self.seen.get(key)
        known = seen is not None and seen.storage() is storage and seen.version == tensor._version
        if seen is None or not known or (keep_uncompressed and seen.codes is not None):
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            seen = _CachedStorageCodes(
                weakref.ref(storage),
                tensor._version,
                None if keep_uncompressed else self._quantize_or_free_if_lossy(flat),
            )
            self.seen = {at: entry for at, entry in self.seen.items() if entry.storage() is not None} | {key: seen}
        return seen.codes

    def _quantize_or_free_if_lossy(self, x: Tensor) -> QuantizedActivation | None:
        codes = quantize_activation(x, self.room)
        if codes.vanished is None or codes.vanished <= _VANISHED:
            return codes
        self.room.free_last_allocation()
        return None

    @staticmethod
    def unpack(packed: VersionedTensor | _QuantizedView | RecomputableView) -> Tensor:
        """Return the tensor for backward."""
        if isinstance(packed, VersionedTensor):
            return packed.unmodified_tensor_or_raise()
        if isinstance(packed, RecomputableView):
            return recompute_tensor(packed)
        held = packed.held
        if held.codes is not packed.codes or held.values is None:
            piece = packed.codes.codes.untyped_storage()
            # The piece before was probably freed, which left a hole
            if piece._cdata != held.piece:
                held.piece = piece._cdata
                trim_heap_before_allocation(piece.nbytes())
            held.codes, held.values = packed.codes, packed.codes.dequantize()
        return held.values.as_strided(packed.shape, packed.stride, packed.offset)


def _is_compressible(tensor: Tensor) -> bool:
    """Whether a tensor is large enough to compress, and not sensitive: per-row statistics (..., 1) stay exact."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return False
    return tensor.dim() > 1 and tensor.shape[-1] > 1 and tensor.numel() >= _LEAST


_EXACT = {
    *(functional.softmin, functional.cross_entropy, functional.nll_loss),
    functional.multi_head_attention_forward,  # the hooks cannot tell its softmax from its other tensors
    *(Tensor.__truediv__, Tensor.__rtruediv__, Tensor.norm, torch.norm, torch.linalg.vector_norm),
    *(
        getattr(place, name)
        for place in (torch, Tensor, functional, torch.special)
        for name in (
            *("softmax", "log_softmax", "logsumexp", "div", "true_divide", "divide", "reciprocal"),
            *("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "prod"),
        )
        if hasattr(place, name)
    ),
}
"""Functions that save divisors or probabilities for backward: 8 bits would lose the small ones."""

_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__, torch.float_power, Tensor.float_power}


class _CompressionExemptionMode(TorchFunctionMode):
    """Tells the hooks which tensors the running torch function needs uncompressed."""

    def __init__(self, compressor: _SavedTensorCompressor) -> None:
        super().__init__()
        self.compressor = compressor

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keeps = _exempt_tensor_predicate_or_none(function, args, kwargs)
        if keeps is None:
            return function(*args, **kwargs)
        before, self.compressor.keeps = self.compressor.keeps, keeps
        try:
            return function(*args, **kwargs)
        finally:
            self.compressor.keeps = before


def _exempt_tensor_predicate_or_none(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[Tensor], bool] | None:
    """Return whether a tensor that ``function`` saves must stay uncompressed; None: no exception for it."""
    if function in _EXACT or (
        function in _POWERS and not _is_positive_whole_number(args[1] if len(args) > 1 else None)
    ):
        return lambda saved: True
    # Statistics per group: (batch, groups)
    if function is functional.group_norm:
        return lambda saved: saved.dim() == 2
    if function is functional.scaled_dot_product_attention:
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        scores = None if mask is None else tuple(mask.shape[-2:])
        # Keeps the log-sum-exp (batch, heads, queries), masks and probabilities (batch, heads, queries, keys).
        return lambda saved: saved.dim() < 4 or tuple(saved.shape[-2:]) == scores
    if function is functional.linear and len(args) > 1 and is_cast_by_autocast(args[0]):
        # The weight's: autocast saves a cast copy of it, which is not in ``exact``
        shape = tuple(args[1].shape)
        return lambda saved: tuple(saved.shape) in (shape, shape[::-1])
    return None


def _is_positive_whole_number(exponent: Any) -> bool:
    """Whether the gradient of ``x ** exponent`` needs no division by x: a whole exponent of at least 1."""
    return isinstance(exponent, int | float) and exponent >= 1 and exponent == int(exponent)


@contextmanager
def compressed_activations(model: nn.Module) -> Iterator[None]:
    """Keep tensors that autograd saves in this context in 8 bits: about a quarter of float32, half of bfloat16::

        with lowmem.compressed_activations(model):
            loss = model(**batch).loss
        loss.backward()

    Dense floating point tensors of 16 bits or more, with at least 4096 elements and two dimensions, are compressed.
    Each element is off by at most 1/254 of the largest magnitude in its block of 32 elements; gradients, which are
    sums over rows, are off by a few percent. Not compressed are parameters and buffers, integer, complex and sparse
    tensors, per-row statistics, what softmax, cross_entropy, divisions, logarithms, roots and
    ``nn.MultiheadAttention`` save, attention masks, and tensors with elements that are not finite or of which more
    than a seventh would become zero. Views stay views, and tensors that share memory are compressed once. Of a
    ``torch.utils.checkpoint`` region, the saved inputs are compressed; the rest is recomputed from them.

    On a GPU the host would wait to learn which tensors those are, so all have codes of roots: an element x is off by
    at most ``sqrt(|x| m) / 126 + m / 252^2`` in a block whose largest magnitude is m, and infinities and NaN stay.

    Args:
        model: its parameters and buffers are not compressed.

    Raises:
        TypeError: not a module.
        RuntimeError: inside a function that torch.compile traces, since the compiler decides what its graphs save;
            enter the context around the compiled call. In backward: an uncompressed tensor was modified in place.
    """
    check_is_module(model)
    if torch.compiler.is_compiling():
        raise RuntimeError("compressed_activations inside a compiled function: enter it around the compiled call")
    compressor = _SavedTensorCompressor(exact := _parameter_and_buffer_storage_keys(model))
    # FSDP2 gathers a module's parameters before its forward, into new storages.
    sharded = filter(is_fsdp2_module, model.modules())
    hooks = [
        unit.register_forward_pre_hook(lambda module, _: exact.update(_parameter_and_buffer_storage_keys(module)))
        for unit in sharded
    ]
    try:
        with saved_tensors_hooks(compressor.pack, compressor.unpack), _CompressionExemptionMode(compressor):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _parameter_and_buffer_storage_keys(module: nn.Module) -> set[int]:
    """Return the storages of parameters and buffers, by ``_cdata``; no forward reads DTensor shards directly."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.layout is torch.strided]
    return {tensor.untyped_storage()._cdata for tensor in tensors if not is_traceable_wrapper_subclass(tensor)}
