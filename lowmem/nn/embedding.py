"""Embeddings with tables in 16 or 4 bits: rows are gathered as stored, and only these are dequantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from lowmem.kernels import ops
from lowmem.nn.fourbit import FourBit, FourBitStorage, FourBitStore
from lowmem.nn.frozen_linear import (
    FrozenStorage,
    exports_to_onnx,
    freeze,
    is_jit_tracing,
    is_plain_call,
    refuse_nested,
)
from lowmem.nn.half import Half, HalfStore
from lowmem.quant.tensor import QuantizedTensor, row_chunks

__all__ = ["Embedding4Bit", "HalfEmbedding"]

_BYTES = 24  # scratch per weight of a chunk: dequantizing it, its gathered bytes, and its value before the copy


class _Embedding(FrozenStorage):
    """Base of both embeddings; they implement ``rows``."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    dtype: torch.dtype

    def _describe(self, shape: torch.Size, dtype: torch.dtype, padding_idx: int | None) -> None:
        self.num_embeddings, self.embedding_dim = shape
        self.dtype, self.padding_idx = dtype, padding_idx

    @staticmethod
    def refuses(layer: nn.Embedding) -> str | None:
        """Return why a layer cannot be converted; None where it can."""
        return None if layer.max_norm is None else "max_norm rescales its rows in place"

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of indices (...), in ``dtype``."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., embedding_dim) in ``dtype``, for int32 or int64 indices (...).

        Raises:
            IndexError, RuntimeError: indices out of range, or of another dtype, as in nn.Embedding.
            TypeError: a nested tensor; a jagged one is taken where rows are stored in 16 bits.
        """
        if input.layout is torch.strided:
            refuse_nested(input)
        chunks = list(row_chunks(input.numel(), self.embedding_dim, _BYTES)) if is_plain_call(input) else []
        if len(chunks) <= 1:  # also under a compiler or transform, which must not see a loop
            return self.rows(input)
        flat = input.reshape(-1)
        out = torch.empty(flat.shape[0], self.embedding_dim, dtype=self.dtype, device=flat.device)
        for chunk in chunks:
            out[chunk] = self.rows(flat[chunk])
        return out.view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # casting a model casts its rows
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Embedding does, with the dtype of its rows."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.dtype}"


class HalfEmbedding(_Embedding):
    """An nn.Embedding whose table is stored in 16 bits and frozen.

    It returns rows in ``dtype``, which casts of the model change (``model.half()``, ``model.to(dtype)``).

    Args:
        weight: float16 or bfloat16 (num_embeddings, embedding_dim).
        dtype: of the returned rows.
        padding_idx: as in nn.Embedding; without effect, since no row trains.
    """

    stored = ("weight",)

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None) -> None:
        super().__init__()
        self._describe(weight.shape, dtype, padding_idx)
        self.weight = freeze(weight)

    @classmethod
    def from_layer(cls, layer: nn.Embedding, technique: Half, store: HalfStore | None = None) -> HalfEmbedding:
        """Build it from a dense layer, whose table is stored by ``store``, or ``technique.store`` for None.

        Raises:
            TypeError, ValueError: weights that are not floating point, have no values, or exceed the range of the
                dtype.
        """
        return cls((store or technique.store)(layer.weight, "weight"), layer.weight.dtype, layer.padding_idx)

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of indices (...), cast to ``dtype``."""
        return embedding(indices, self.weight).to(self.dtype)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Embedding does, and how it is stored."""
        return f"{super().extra_repr()}, stored={self.weight.dtype}"


class Embedding4Bit(_Embedding, FourBitStorage):
    """An nn.Embedding whose table is stored in 4 bits and frozen.

    It returns rows in ``dtype``, which casts of the model change (``model.half()``, ``model.to(dtype)``).

    Args:
        weight: quantized (num_embeddings, embedding_dim).
        dtype: of the returned rows, which are dequantized in float32 and rounded once.
        padding_idx: as in nn.Embedding; without effect, since no row trains.
    """

    def __init__(
        self, weight: QuantizedTensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
    ) -> None:
        FourBitStorage.__init__(self, weight)
        self._describe(weight.shape, dtype, padding_idx)

    @classmethod
    def from_layer(cls, layer: nn.Embedding, technique: FourBit, store: FourBitStore | None = None) -> Embedding4Bit:
        """Build it from a dense layer, whose table is stored by ``store``, or ``technique.store`` for None.

        Raises:
            TypeError, ValueError: weights that ``quantize`` rejects.
        """
        return cls((store or technique.store)(layer.weight, "weight"), layer.weight.dtype, layer.padding_idx)

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of indices (...), dequantized to ``dtype``."""
        refuse_nested(indices, "input")
        table = self.quantized
        table.check_layout()  # here: the gathered rows do not show whether the table has all of its rows
        packed, scales = (
            embedding(indices, table.packed),
            embedding(indices, table.scales),
        )  # (..., bytes), (..., blocks)
        if is_jit_tracing():
            exports_to_onnx(table)
            packed, scales = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (packed, scales))
            values = ops.dequantize_rows(replace(table, packed=packed, scales=scales), self.dtype)
            return values.view(*indices.shape, self.embedding_dim)
        shape = torch.Size((*indices.shape, self.embedding_dim))
        gathered = replace(table, packed=packed, scales=scales, shape=shape)
        if is_plain_call(indices):
            return gathered.dequantize(self.dtype)
        return gathered.restore(slice(None)).to(self.dtype).view(shape)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Embedding does, and how it is stored."""
        return f"{super().extra_repr()}, {FourBitStorage.extra_repr(self)}"
