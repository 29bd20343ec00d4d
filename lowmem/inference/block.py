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

from lowmem.inference.parts import Norm, Ready, Taken, add_mlp, kernel_for, layers_of
from lowmem.kernels.cpu_rows import attention_call, mask_states
from lowmem.kernels.sequence import Address, Steps
from lowmem.nn.dot_product_attention import MOST
from lowmem.training.fused import GatedMLP

_MOST_PROGRAMS = 8  # of a block: shapes of inputs and threads
_GIVEN = "position_embeddings", "attention_mask", "cache"
_TAKEN = *_GIVEN, "position_ids", "use_cache"
Rooms: TypeAlias = Callable[[int, int, torch.dtype], Tensor]


@dataclass(frozen=True)
class Projection:
    """Queries, keys or values: columns of a layer's output, as heads, with a norm of each head."""

    layer: Any
    first: int  # column
    heads: int
    width: int  # of a head
    rotated: int  # the first numbers of a head, which are rotated; 0: none
    norm: Norm | None = None


@dataclass(frozen=True)
class Form:
    """What a block consists of."""

    attention: nn.Module
    mlp: nn.Module
    gated: GatedMLP
    ends: tuple[Norm | None, ...]  # before and behind the attention, before and behind the MLP
    roles: tuple[Projection, Projection, Projection]  # queries, keys and values
    out: Any
    scaling: float
    softcap: float | None
    arguments: Mapping[str, Any]  # what else the model's attention function is given
    # Attention by the model's library, of queries, keys, values, mask and cache.
    attend: Callable[..., Tensor] = field(compare=False)
    # Returns the block's layer of a cache; None where it is not one of lowmem's.
    kept: Callable[[Any], Any] = field(compare=False)
    # Whether the model's library computes attention and masks as the form says.
    serves: Callable[[], bool] = field(compare=False)

    @property
    def first(self) -> list[Any]:
        """The layers that compute queries, keys and values."""
        return list(dict.fromkeys(one.layer for one in self.roles))

    @property
    def layers(self) -> list[Any]:
        """All layers, in the order of their products."""
        return [*self.first, self.out, *layers_of(self.mlp, self.gated)]

    @property
    def norms(self) -> list[Norm]:
        """All norms."""
        return [one for one in (*self.ends, *(role.norm for role in self.roles)) if one is not None]


class Block:
    """Computes a block by its form.

    Args:
        block: the module.
        form: of the block.
        rooms: returns memory for what blocks compute one after another, by thread, numbers and dtype.
    """

    def __init__(self, block: nn.Module, form: Form, rooms: Rooms) -> None:
        self.form, self.rooms = form, rooms
        self.taken = Taken(block, form.layers, [form.attention, form.mlp], form.norms)
        # Numbers that a token's steps compute, at most.
        inner, *others = (layer.in_features for layer in form.layers[::-1])
        self.most: int = 3 * inner + 8 * max(others) + 2 * sum(layer.out_features for layer in form.first)

    def __str__(self) -> str:
        if not self.form.serves():
            return "as before: its attention or mask function is none of those that C stands in for"
        norms = sum(one is not None for one in self.form.ends)
        return f"block in one call: attention, {self.form.gated.activation} MLP, {norms} norms, sums"

    def __call__(self, x: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Return the block's output; None where its own forward must run."""
        kernel, (angles, mask, cache) = kernel_for(x), (given.get(name) for name in _GIVEN)
        others = any(value is not None and value is not False for name, value in given.items() if name not in _TAKEN)
        if kernel is None or x.dim() != 3 or others or not self.form.serves():
            return None
        turns, ready = _turns(angles, x, self.form.roles[0].rotated), self.taken.ready(kernel, x.dtype)
        if turns is None or ready is None:
            return None
        kept = None if cache is None else self.form.kept(cache)
        few = x.shape[1] <= MOST and (x.shape[1] == 1 or mask is not None)
        out = self._at_once(ready, x, turns, kept, mask) if few and kept is not None else None
        return self._in_two(ready, x, turns, cache, mask) if out is None else out

    def _at_once(self, ready: Ready, x: Tensor, turns: dict[str, Tensor], kept: Any, mask: Any) -> Tensor | None:
        """Return the output of few tokens, whose keys and values lowmem's cache keeps."""
        form, (batch, tokens, _) = self.form, x.shape
        (q, k, v), cached = form.roles, kept.cached.values()
        places = [of.places((batch, one.heads, tokens, one.width), x) for of, one in zip(cached, (k, v), strict=True)]
        if None in places:
            return None
        (keys, seen_keys, count), (values, seen_values, _) = places
        unread = mask is not None and (type(mask) is not Tensor or mask.dim() != 4 or mask.shape[3] != count)
        hidden = None if unread else mask_states(mask, (batch, q.heads, tokens, count))
        if hidden is None:
            return None
        steps, query, mixed = self._program(ready, x, turns)
        sizes = batch, k.heads, q.heads // k.heads, tokens, count, q.width, v.width
        states = *query, *seen_keys, *seen_values, *hidden
        work, fields = attention_call(sizes, states, form.scaling, form.softcap, mixed)
        out = torch.empty_like(x)
        if not steps.run(x=x, out=out, keys=keys, values=values, attention=(work, *fields), **turns):
            return None
        kept.grow(tokens)
        return out

    def _program(self, ready: Ready, x: Tensor, turns: dict[str, Tensor]) -> tuple[Steps, tuple[int, ...], int]:
        """Return the steps for few tokens, kept for each shape; states of queries; where attention is to write."""
        key = get_ident(), x.shape, *(one.shape for one in turns.values())
        found: tuple[Steps, tuple[int, ...], int] | None = ready.programs.get(key)
        if found is None:
            form, (batch, tokens, _) = self.form, x.shape
            steps = Steps(ready.kernel, self.rooms(get_ident(), batch * tokens * self.most, x.dtype))
            query, *new = self._project(steps, ready, x, turns)
            for name, one, states in zip(("keys", "values"), form.roles[1:], new, strict=True):
                steps.store((batch, one.heads, tokens, one.width), states, name)
            mixed = steps.attention("attention", batch * tokens * form.out.in_features)
            self._finish(steps, ready, x, mixed)
            if len(ready.programs) >= _MOST_PROGRAMS:
                ready.programs.clear()
            found = ready.programs[key] = steps, query, mixed
        return found

    def _in_two(self, ready: Ready, x: Tensor, turns: dict[str, Tensor], cache: Any, mask: Any) -> Tensor | None:
        """Return the output, with the attention of the model's library between two calls of C."""
        form, (batch, tokens, _) = self.form, x.shape
        first, last = (Steps(ready.kernel, x.new_empty(batch * tokens * self.most)) for _ in range(2))
        found, room = self._project(first, ready, x, turns), first.room
        if not first.run(x=x, **turns):
            return None
        states = [
            room.as_strided((batch, one.heads, tokens, one.width), (*steps, 1), (at - room.data_ptr()) // first.size)
            for one, (_, at, _, *steps, _, _, _) in zip(form.roles, found, strict=True)
        ]
        mixed = form.attend(*states, mask, cache).reshape(batch, tokens, -1).contiguous()
        out = torch.empty_like(x)
        self._finish(last, ready, x, "mixed")
        if last.run(x=x, mixed=mixed, out=out):
            return out
        behind, before_mlp, behind_mlp = (nn.Identity() if one is None else one.module for one in form.ends[1:])
        total = x + behind(form.out(mixed))
        return cast(Tensor, total + behind_mlp(form.mlp(before_mlp(total))))

    def _project(self, steps: Steps, ready: Ready, x: Tensor, turns: dict[str, Tensor]) -> list[tuple[int, ...]]:
        """Add what computes queries, keys and values, and return them as C takes them."""
        (batch, tokens, columns), first = x.shape, self.form.first
        at = _normed(self.form.ends[0], steps, "x", x.numel())
        made = steps.products(at, batch * tokens, columns, ready.layers[: len(first)])
        places = dict(zip(first, made, strict=True))
        states: list[tuple[int, ...]] = []
        for one in self.form.roles:
            token = one.layer.out_features
            start = _normed(one.norm, steps, places[one.layer] + one.first * steps.size, batch * tokens * token)
            if one.rotated:
                steps.rotate(start, (batch, tokens, one.heads), (one.width, token), turns["cos"].shape, *turns)
            states.append((steps.type, start, 0, tokens * token, one.width, token, 0, 0, 0))
        return states

    def _finish(self, steps: Steps, ready: Ready, x: Tensor, mixed: Address) -> None:
        """Add what computes the output from that of the attention."""
        form, rows, count = self.form, x.shape[0] * x.shape[1], x.numel()
        (_, behind, before_mlp, behind_mlp), (out, *mlp) = form.ends, ready.layers[len(form.first) :]
        (added,) = steps.products(mixed, rows, form.out.in_features, [out])
        total = steps.add("x", _normed(behind, steps, added, count), count)
        added = add_mlp(steps, form.gated, _normed(before_mlp, steps, total, count), rows, mlp)
        steps.add(total, _normed(behind_mlp, steps, added, count), count, "out")


def _normed(norm: Norm | None, steps: Steps, x: Address, count: int) -> Any:
    """Add a norm, if there is one, and return the address of the result."""
    return x if norm is None else norm.add(steps, x, count)


def _turns(angles: Any, x: Tensor, rotated: int) -> dict[str, Tensor] | None:
    """Return cosines and sines (sequences or 1, tokens, rotated) of the dtype of x; None where C cannot read them."""
    if not rotated:
        return {}
    cos, sin = angles if isinstance(angles, tuple) and len(angles) == 2 else cast(Any, (None, None))
    plain = all(type(one) is Tensor and one.dtype is x.dtype and one.is_contiguous() for one in (cos, sin))
    shapes = (1, x.shape[1], rotated), (x.shape[0], x.shape[1], rotated)
    return {"cos": cos, "sin": sin} if plain and cos.shape == sin.shape and cos.shape in shapes else None
