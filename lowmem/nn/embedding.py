"""Embeddings with tables in 4, 8 or 16 bits: stored rows are gathered, and only these are dequantized."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.functional import embedding

from lowmem.kernels import ops
from lowmem.kernels.frozen_weight_operator import QuantizedOperands, is_fake_call_without_gradient
from lowmem.nn.call_context import (
    can_bypass_autograd,
    check_not_nested,
    is_onnx_export_or_raise_if_quantized,
    record_as_fx_leaf,
)
from lowmem.nn.module_copy import LAYERS, stored_parameter_property
from lowmem.nn.quantized_module import QuantizedModule
from lowmem.nn.stored_module import StoredModule, is_exporting_or_jit_tracing
from lowmem.quant.tensor import row_slices_within_scratch

# Scratch per element of a chunk: for dequantizing, the gathered bytes, and the value before the copy
_BYTES = 24


class _StoredEmbedding(StoredModule, nn.Embedding):
    """Base of the stored embeddings, which implement ``rows``."""

    dense_class = nn.Embedding
    stored_names = ("weight",)
    weight = stored_parameter_property("weight")

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
            return record_as_fx_leaf(self, input)
        if self.max_norm is not None:
            raise RuntimeError(
                f"max_norm={self.max_norm!r} rescales rows in place, and stored ones are read-only: set it to None, "
                "or lowmem.restore the layer"
            )
        if input.layout is torch.strided:
            check_not_nested(input)
        chunks = []
        if can_bypass_autograd(input):
            chunks = list(row_slices_within_scratch(input.numel(), self.embedding_dim, _BYTES, device=input.device))
        # Also under a compiler or transform, which must not see a loop
        if len(chunks) <= 1:
            return self.rows(input)
        flat = input.reshape(-1)
        out = torch.empty(flat.shape[0], self.embedding_dim, dtype=self.dtype, device=flat.device)
        for chunk in chunks:
            out[chunk] = self.rows(flat[chunk])
        return out.view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Embedding does, with the dtype of its rows."""
        return f"{super().extra_repr()}, dtype={self.dtype}"


class HalfEmbedding(_StoredEmbedding):
    """An nn.Embedding whose table is stored in 16 bits and frozen.

    It returns rows in ``dtype``; casts of the model (``model.half()``, ``model.to(dtype)``) change it.
    ``padding_idx`` has no effect, since no row trains.
    """

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of indices (...), cast to ``dtype``."""
        return embedding(indices, cast(Tensor, self.weight_rounded)).to(self.dtype)


class QuantizedEmbedding(QuantizedModule, _StoredEmbedding):
    """An nn.Embedding whose table is stored in codes and frozen."""

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of indices (...), dequantized to ``dtype``."""
        check_not_nested(indices, "input")
        recorded = is_exporting_or_jit_tracing()
        if torch.compiler.is_compiling() and not recorded:
            return embedding(indices, self.stored_tensor("weight"))
        table = self.quantized
        # Before the gather, which would not notice that rows of the table are missing
        table.check_layout()
        packed, scales = (
            embedding(indices, table.packed),
            embedding(indices, table.scales),
        )  # (..., bytes), (..., blocks)
        if recorded:
            is_onnx_export_or_raise_if_quantized(table)
            packed, scales = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (packed, scales))
            gathered_parts = QuantizedOperands(packed, scales, table.description)  # type: ignore[attr-defined]
            values = ops.dequantize_by_operator(gathered_parts, self.dtype)
            return values.view(*indices.shape, self.embedding_dim)
        shape = torch.Size((*indices.shape, self.embedding_dim))
        gathered = replace(table, packed=packed, scales=scales, shape=shape)
        if can_bypass_autograd(indices):
            return gathered.dequantize(self.dtype)
        if is_fake_call_without_gradient((indices,)):
            # By which peaks are planned: the definition has temporaries that the kernels have not
            return ops.dequantize_by_operator(gathered.as_matrix(), self.dtype).view(shape)
        return gathered.restore(slice(None)).to(self.dtype).view(shape)


class Embedding4Bit(QuantizedEmbedding):
    """An nn.Embedding whose table is stored in 4 bits and frozen.

    It returns rows in ``dtype``, dequantized in float32 and rounded once; casts of the model (``model.half()``,
    ``model.to(dtype)``) change it. ``padding_idx`` has no effect, since no row trains.
    """


class Embedding8Bit(QuantizedEmbedding):
    """An nn.Embedding whose table is stored in 8 bits and frozen; otherwise as ``Embedding4Bit``."""

    stored_bits = 8


LAYERS.update({(nn.Embedding, 4): Embedding4Bit, (nn.Embedding, 8): Embedding8Bit, (nn.Embedding, 16): HalfEmbedding})
