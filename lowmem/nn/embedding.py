"""Embeddings with tables in 4, 8 or 16 bits: stored rows are gathered, and only these are dequantized."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.functional import embedding

from lowmem.kernels import ops
from lowmem.kernels.frozen_operator import StoredParts
from lowmem.nn.calls import exports_to_onnx, is_plain_call, recorded_call, refuse_nested
from lowmem.nn.coded_module import CodedModule
from lowmem.nn.module_copy import LAYERS, stored_property
from lowmem.nn.stored_module import StoredModule, is_exported
from lowmem.quant.tensor import row_chunks

_BYTES = 24  # scratch per element of a chunk: for dequantizing, the gathered bytes, and the value before the copy


class _Embedding(StoredModule, nn.Embedding):
    """Base of the stored embeddings, which implement ``rows``."""

    dense_class = nn.Embedding
    stored_names = ("weight",)
    weight = stored_property("weight")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the returned rows; casts of the model change it."""
        return self._forms["weight"].dtype

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of indices (...), in ``dtype``."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., embedding_dim) in ``dtype``, for int32 or int64 indices (...)."""
        if isinstance(input, Proxy):
            return recorded_call(self, input)
        if self.max_norm is not None:
            raise RuntimeError(
                f"max_norm={self.max_norm!r} rescales rows in place, and stored ones are read-only: set it to None, "
                "or lowmem.restore the layer"
            )
        if input.layout is torch.strided:
            refuse_nested(input)
        chunks = []
        if is_plain_call(input):
            chunks = list(row_chunks(input.numel(), self.embedding_dim, _BYTES, device=input.device))
        if len(chunks) <= 1:  # also under a compiler or transform, which must not see a loop
            return self.rows(input)
        flat = input.reshape(-1)
        out = torch.empty(flat.shape[0], self.embedding_dim, dtype=self.dtype, device=flat.device)
        for chunk in chunks:
            out[chunk] = self.rows(flat[chunk])
        return out.view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Embedding does, with the dtype of its rows."""
        return f"{super().extra_repr()}, dtype={self.dtype}"


class HalfEmbedding(_Embedding):
    """An nn.Embedding whose table is stored in 16 bits and frozen.

    It returns rows in ``dtype``; casts of the model (``model.half()``, ``model.to(dtype)``) change it.
    ``padding_idx`` has no effect, since no row trains.
    """

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of indices (...), cast to ``dtype``."""
        return embedding(indices, cast(Tensor, self.weight_rounded)).to(self.dtype)


class CodedEmbedding(CodedModule, _Embedding):
    """An nn.Embedding whose table is stored in codes and frozen."""

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of indices (...), dequantized to ``dtype``."""
        refuse_nested(indices, "input")
        recorded = is_exported()
        if torch.compiler.is_compiling() and not recorded:
            return embedding(indices, self.stored_tensor("weight"))
        table = self.quantized
        table.check_layout()  # before the gather, which would not notice that rows of the table are missing
        packed, scales = (
            embedding(indices, table.packed),
            embedding(indices, table.scales),
        )  # (..., bytes), (..., blocks)
        if recorded:
            exports_to_onnx(table)
            packed, scales = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (packed, scales))
            gathered_parts = StoredParts(packed, scales, table.text)  # type: ignore[attr-defined]
            values = ops.dequantize_rows(gathered_parts, self.dtype)
            return values.view(*indices.shape, self.embedding_dim)
        shape = torch.Size((*indices.shape, self.embedding_dim))
        gathered = replace(table, packed=packed, scales=scales, shape=shape)
        if is_plain_call(indices):
            return gathered.dequantize(self.dtype)
        return gathered.restore(slice(None)).to(self.dtype).view(shape)


class Embedding4Bit(CodedEmbedding):
    """An nn.Embedding whose table is stored in 4 bits and frozen.

    It returns rows in ``dtype``, dequantized in float32 and rounded once; casts of the model (``model.half()``,
    ``model.to(dtype)``) change it. ``padding_idx`` has no effect, since no row trains.
    """


class Embedding8Bit(CodedEmbedding):
    """An nn.Embedding whose table is stored in 8 bits and frozen; otherwise as ``Embedding4Bit``."""

    stored_bits = 8


LAYERS.update({(nn.Embedding, 4): Embedding4Bit, (nn.Embedding, 8): Embedding8Bit, (nn.Embedding, 16): HalfEmbedding})
