"""A transformer's block whose parts are recognized, computed by one call of C.

    h = x + after(out(attention(rotate(q), rotate(k), v))),   q, k, v = products of before(x)
    y = h + after_mlp(down(act(gate) up)),   gate, up = products of before_mlp(h)

Norms may be missing. Where another cache than lowmem's keeps keys and values, or torch computes the attention, C
computes what is before and what is behind. The modules stay: where one of them has hooks, was replaced or stores no
weight that C multiplies, the block runs as it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from lowmem.inference.norms_and_mlps import (
    NativeLayerCache,
    NativeLayersAndPrograms,
    NativeRMSNorm,
    append_gated_mlp,
    cpu_backend_without_grad_or_none,
    gated_mlp_layers,
)
from lowmem.kernels.cpu_rowwise import attention_work_and_struct_fields, mask_struct_fields_or_none
from lowmem.kernels.native_program import AddressOrName, NativeProgram
from lowmem.nn.dot_product_attention import MOST
from lowmem.training.fused import GatedMLPSpec

_MOST_PROGRAMS = 8  # of a block: shapes of inputs and threads
_GIVEN = "position_embeddings", "attention_mask", "cache"
_TAKEN = *_GIVEN, "position_ids", "use_cache"
ScratchAllocator: TypeAlias = Callable[[int, int, torch.dtype], Tensor]


@dataclass(frozen=True)
class AttentionProjection:
    """Queries, keys or values: columns of a layer's output, as heads, with a norm of each head."""

    layer: Any
    first_column: int  # column
    heads: int
    head_width: int  # of a head
    rotary_width: int  # the first numbers of a head, which are rotated; 0: none
    norm: NativeRMSNorm | None = None


@dataclass(frozen=True)
class BlockSpec:
    """What a block consists of."""

    attention: nn.Module
    mlp: nn.Module
    gated: GatedMLPSpec
    residual_norms: tuple[NativeRMSNorm | None, ...]  # before and behind the attention, before and behind the MLP
    projections: tuple[AttentionProjection, AttentionProjection, AttentionProjection]  # queries, keys and values
    out: Any
    scaling: float
    softcap: float | None
    attention_arguments: Mapping[str, Any]  # what else the model's attention function is given
    # Attention by the model's library, of queries, keys, values, mask and cache.
    attend: Callable[..., Tensor] = field(compare=False)
    # Returns the block's layer of a cache; None where it is not one of lowmem's.
    cached_layer: Callable[[Any], Any] = field(compare=False)
    # Whether the model's library computes attention and masks as the form says.
    is_current: Callable[[], bool] = field(compare=False)

    @property
    def projection_layers(self) -> list[Any]:
        """The layers that compute queries, keys and values."""
        return list(dict.fromkeys(projection.layer for projection in self.projections))

    @property
    def all_layers(self) -> list[Any]:
        """All layers, in the order of their products."""
        return [*self.projection_layers, self.out, *gated_mlp_layers(self.mlp, self.gated)]

    @property
    def all_norms(self) -> list[NativeRMSNorm]:
        """All norms."""
        return [
            norm for norm in (*self.residual_norms, *(role.norm for role in self.projections)) if norm is not None
        ]


class NativeBlock:
    """Computes a block by its form.

    Args:
        block: the module.
        spec: of the block.
        allocate_scratch: returns memory for what blocks compute one after another, by thread, numbers and dtype.
    """

    def __init__(self, block: nn.Module, spec: BlockSpec, allocate_scratch: ScratchAllocator) -> None:
        self.spec, self.allocate_scratch = spec, allocate_scratch
        self.layer_cache = NativeLayerCache(block, spec.all_layers, [spec.attention, spec.mlp], spec.all_norms)
        # Numbers that a token's steps compute before the attention and behind it, at most.
        inner, *others = (layer.in_features for layer in spec.all_layers[::-1])
        projected = sum(layer.out_features for layer in spec.projection_layers)
        self.max_scratch_per_token: tuple[int, int] = max(others) + 2 * projected, 3 * inner + 7 * max(others)

    def __str__(self) -> str:
        if not self.spec.is_current():
            return "as before: its attention or mask function is none of those that C stands in for"
        norms = sum(norm is not None for norm in self.spec.residual_norms)
        return f"block in one call: attention, {self.spec.gated.activation} MLP, {norms} norms, sums"

    def __call__(self, x: Any, keyword_arguments: Mapping[str, Any]) -> Tensor | None:
        """Return the block's output; None where its own forward must run."""
        kernel, (angles, mask, cache) = (
            cpu_backend_without_grad_or_none(x),
            (keyword_arguments.get(name) for name in _GIVEN),
        )
        others = any(
            value is not None and value is not False
            for name, value in keyword_arguments.items()
            if name not in _TAKEN
        )
        if kernel is None or x.dim() != 3 or others or not self.spec.is_current():
            return None
        turns, ready = (
            _cos_and_sin_dict_or_none(angles, x, self.spec.projections[0].rotary_width),
            self.layer_cache.native_layers_or_none(kernel, x.dtype),
        )
        if turns is None or ready is None:
            return None
        cached_layer = None if cache is None else self.spec.cached_layer(cache)
        few = x.shape[1] <= MOST and (x.shape[1] == 1 or mask is not None)
        out = (
            self._forward_in_one_call_or_none(ready, x, turns, cached_layer, mask)
            if few and cached_layer is not None
            else None
        )
        return self._forward_in_two_calls_or_none(ready, x, turns, cache, mask) if out is None else out

    def _forward_in_one_call_or_none(
        self,
        native_layers: NativeLayersAndPrograms,
        x: Tensor,
        cos_and_sin: dict[str, Tensor],
        cached_layer: Any,
        mask: Any,
    ) -> Tensor | None:
        """Return the output of few tokens, whose keys and values lowmem's cache keeps."""
        spec, (batch, tokens, _) = self.spec, x.shape
        (q, k, v), cached = spec.projections, cached_layer.cached.values()
        places = [
            of.places((batch, projection.heads, tokens, projection.head_width), x)
            for of, projection in zip(cached, (k, v), strict=True)
        ]
        if None in places:
            return None
        (keys, seen_keys, count), (values, seen_values, _) = places
        unread = mask is not None and (type(mask) is not Tensor or mask.dim() != 4 or mask.shape[3] != count)
        hidden = None if unread else mask_struct_fields_or_none(mask, (batch, q.heads, tokens, count))
        if hidden is None:
            return None
        steps, query, mixed = self._cached_program_query_and_out(native_layers, x, cos_and_sin)
        sizes = batch, k.heads, q.heads // k.heads, tokens, count, q.head_width, v.head_width
        states = *query, *seen_keys, *seen_values, *hidden
        work, fields = attention_work_and_struct_fields(sizes, states, spec.scaling, spec.softcap, mixed)
        out = torch.empty_like(x)
        if not steps.try_run(x=x, out=out, keys=keys, values=values, attention=(work, *fields), **cos_and_sin):
            return None
        cached_layer.grow(tokens)
        return out

    def _cached_program_query_and_out(
        self, native_layers: NativeLayersAndPrograms, x: Tensor, cos_and_sin: dict[str, Tensor]
    ) -> tuple[NativeProgram, tuple[int, ...], int]:
        """Return the steps for few tokens, kept for each shape; states of queries; where attention is to write."""
        key = get_ident(), x.shape, *(item.shape for item in cos_and_sin.values())
        program_query_and_out: tuple[NativeProgram, tuple[int, ...], int] | None = native_layers.programs.get(key)
        if program_query_and_out is None:
            spec, (batch, tokens, _) = self.spec, x.shape
            per_token = sum(self.max_scratch_per_token) + native_layers.update_scratch_per_row
            steps = NativeProgram(
                native_layers.backend,
                self.allocate_scratch(get_ident(), batch * tokens * per_token, x.dtype),
            )
            query, *new = self._append_qkv_and_return_fields(steps, native_layers, x, cos_and_sin)
            for name, item, states in zip(("keys", "values"), spec.projections[1:], new, strict=True):
                steps.append_state_encoding((batch, item.heads, tokens, item.head_width), states, name)
            mixed = steps.append_attention("attention", batch * tokens * spec.out.in_features)
            self._append_output_after_attention(steps, native_layers, x, mixed)
            if len(native_layers.programs) >= _MOST_PROGRAMS:
                native_layers.programs.clear()
            program_query_and_out = native_layers.programs[key] = steps, query, mixed
        return program_query_and_out

    def _forward_in_two_calls_or_none(
        self, native_layers: NativeLayersAndPrograms, x: Tensor, cos_and_sin: dict[str, Tensor], cache: Any, mask: Any
    ) -> Tensor | None:
        """Return the output, with the attention of the model's library between two calls of C."""
        spec, (batch, tokens, _) = self.spec, x.shape
        before, behind = (size + native_layers.update_scratch_per_row for size in self.max_scratch_per_token)
        first = NativeProgram(native_layers.backend, x.new_empty(batch * tokens * before))
        projected, room = self._append_qkv_and_return_fields(first, native_layers, x, cos_and_sin), first.scratch
        if not first.try_run(x=x, **cos_and_sin):
            return None
        states = [
            room.as_strided(
                (batch, item.heads, tokens, item.head_width), (*steps, 1), (at - room.data_ptr()) // first.itemsize
            )
            for item, (_, at, _, *steps, _, _, _) in zip(spec.projections, projected, strict=True)
        ]
        mixed = spec.attend(*states, mask, cache).reshape(batch, tokens, -1).contiguous()
        # A cache may have kept them; else their memory is free now
        del first, room, states
        last = NativeProgram(native_layers.backend, x.new_empty(batch * tokens * behind))
        out = torch.empty_like(x)
        self._append_output_after_attention(last, native_layers, x, "mixed")
        if last.try_run(x=x, mixed=mixed, out=out):
            return out
        after, before_mlp, after_mlp = (
            nn.Identity() if item is None else item.module for item in spec.residual_norms[1:]
        )
        total = x + after(spec.out(mixed))
        return cast(Tensor, total + after_mlp(spec.mlp(before_mlp(total))))

    def _append_qkv_and_return_fields(
        self,
        program: NativeProgram,
        native_layers: NativeLayersAndPrograms,
        x: Tensor,
        cos_and_sin: dict[str, Tensor],
    ) -> list[tuple[int, ...]]:
        """Add what computes queries, keys and values, and return them as C takes them."""
        (batch, tokens, columns), first = x.shape, self.spec.projection_layers
        at = _append_norm_if_any(self.spec.residual_norms[0], program, "x", x.numel())
        made = program.append_products(at, batch * tokens, columns, native_layers.layers[: len(first)])
        places = dict(zip(first, made, strict=True))
        states: list[tuple[int, ...]] = []
        for projection in self.spec.projections:
            token = projection.layer.out_features
            start = _append_norm_if_any(
                projection.norm,
                program,
                places[projection.layer] + projection.first_column * program.itemsize,
                batch * tokens * token,
            )
            if projection.rotary_width:
                program.append_rotary_embedding(
                    start,
                    (batch, tokens, projection.heads),
                    (projection.head_width, token),
                    cos_and_sin["cos"].shape,
                    *cos_and_sin,
                )
            states.append((program.type_id, start, 0, tokens * token, projection.head_width, token, 0, 0, 0))
        return states

    def _append_output_after_attention(
        self, program: NativeProgram, native_layers: NativeLayersAndPrograms, x: Tensor, attention_out: AddressOrName
    ) -> None:
        """Add what computes the output from that of the attention."""
        spec, rows, count = self.spec, x.shape[0] * x.shape[1], x.numel()
        (_, behind, before_mlp, behind_mlp), (out, *mlp) = (
            spec.residual_norms,
            native_layers.layers[len(spec.projection_layers) :],
        )
        (added,) = program.append_products(attention_out, rows, spec.out.in_features, [out])
        total = program.append_sum("x", _append_norm_if_any(behind, program, added, count), count)
        added = append_gated_mlp(
            program, spec.gated, _append_norm_if_any(before_mlp, program, total, count), rows, mlp
        )
        program.append_sum(total, _append_norm_if_any(behind_mlp, program, added, count), count, "out")


def _append_norm_if_any(
    norm: NativeRMSNorm | None, program: NativeProgram, x: AddressOrName, element_count: int
) -> Any:
    """Add a norm, if there is one, and return the address of the result."""
    return x if norm is None else norm.append_to_program(program, x, element_count)


def _cos_and_sin_dict_or_none(position_embeddings: Any, x: Tensor, rotary_width: int) -> dict[str, Tensor] | None:
    """Return cosines and sines (sequences or 1, tokens, rotated) of the dtype of x; None where C cannot read them."""
    if not rotary_width:
        return {}
    cos, sin = (
        position_embeddings
        if isinstance(position_embeddings, tuple) and len(position_embeddings) == 2
        else cast(Any, (None, None))
    )
    plain = all(
        type(tensor) is Tensor and tensor.dtype is x.dtype and tensor.is_contiguous() for tensor in (cos, sin)
    )
    shapes = (1, x.shape[1], rotary_width), (x.shape[0], x.shape[1], rotary_width)
    return {"cos": cos, "sin": sin} if plain and cos.shape == sin.shape and cos.shape in shapes else None
