"""A transformer's block whose parts are recognized, computed by one call of C.

    h = x + after(out(attention(rotate(q), rotate(k), v))),   q, k, v = products of before(x)
    y = h + after_mlp(down(act(gate) up)),   gate, up = products of before_mlp(h)

Norms may be missing. Where another cache than lowmem's keeps keys and values, or torch computes the attention, C
computes what is before and what is behind. The modules stay: where one of them has hooks, was replaced or stores no
weight that C multiplies, the block runs as it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowmem.inference.parts import Norm, Watched, add_mlp, as_taken, kernel_for, layers_of
from lowmem.kernels.cpu import Kernel
from lowmem.kernels.cpu_rows import attention_call, mask_states
from lowmem.kernels.sequence import Address, Layer, Steps
from lowmem.nn.dot_product_attention import MOST
from lowmem.training.fused import GatedMLP

_MOST_PROGRAMS = 8  # of a block: shapes of inputs and threads
_GIVEN = "position_embeddings", "attention_mask", "cache"
_TAKEN = *_GIVEN, "position_ids", "use_cache"


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
class Attention:
    """How a module computes attention."""

    module: nn.Module
    roles: tuple[Projection, Projection, Projection]  # queries, keys and values
    out: Any
    scaling: float
    softcap: float | None
    given: Mapping[str, Any]  # further arguments of the model's attention function
    index: int  # of its layer of the cache
    attend: Callable[..., Any]  # an attention function of the model's library

    @property
    def layers(self) -> list[Any]:
        """The layers that compute queries, keys and values."""
        return list(dict.fromkeys(one.layer for one in self.roles))


@dataclass(frozen=True)
class Form:
    """What a block consists of."""

    attention: Attention
    mlp: nn.Module
    gated: GatedMLP
    before: Norm | None
    after: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None

    @property
    def layers(self) -> list[Any]:
        """All layers, in the order of their products."""
        return [*self.attention.layers, self.attention.out, *layers_of(self.mlp, self.gated)]

    @property
    def norms(self) -> list[Norm]:
        """All norms."""
        found = self.before, self.after, self.before_mlp, self.after_mlp, *(one.norm for one in self.attention.roles)
        return [one for one in found if one is not None]


_Program = tuple[Steps, tuple[int, ...], int]
"""Steps of few tokens, the states of their queries, and the address of the attention's output."""


class _Ready(NamedTuple):
    """A block's layers as C takes them, and programs of them; they serve until something has changed."""

    kernel: Kernel
    dtype: torch.dtype
    watched: Watched
    layers: list[Layer]
    programs: dict[Any, _Program]


class Block:
    """Computes a block by its form.

    Args:
        block: the module.
        form: of the block.
        owner: returns the layer of a cache by its index; None where it is not one of lowmem's.
        serves: whether attention is computed as the form says.
        rooms: returns memory for what the blocks of a model compute one after another, by thread, numbers and dtype.
    """

    def __init__(
        self,
        block: nn.Module,
        form: Form,
        owner: Callable[[Any, int], Any],
        serves: Callable[[], bool],
        rooms: Callable[[int, int, torch.dtype], Tensor],
    ) -> None:
        self.block, self.form, self.owner, self.serves, self.rooms = block, form, owner, serves, rooms
        # Numbers such as the scaling of scores and epsilons, which a model's code may read from its modules.
        modules = block, form.attention.module, *(norm.module for norm in form.norms)
        numbers = [
            (vars(one), name) for one in modules for name in vars(one) if type(vars(one)[name]) in (int, float)
        ]
        self.layers, self.watched, self.numbers = form.layers, Watched(block, numbers), numbers
        self.ready: _Ready | None = None
        # Numbers that a token's steps compute, at most.
        inner, *others = (layer.in_features for layer in self.layers[::-1])
        self.most: int = 3 * inner + 8 * max(others) + 2 * sum(layer.out_features for layer in form.attention.layers)

    def __str__(self) -> str:
        norms = [name for name in ("before", "after", "before_mlp", "after_mlp") if getattr(self.form, name)]
        return f"block in one call: attention, {self.form.gated.activation} MLP, {len(norms)} norms, sums"

    def __call__(self, x: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Return the block's output; None where its own forward must run."""
        attention, kernel = self.form.attention, kernel_for(x)
        angles, mask, cache = (given.get(name) for name in _GIVEN)
        if kernel is None or x.dim() != 3 or not self.serves():
            return None
        turns = _turns(angles, x, attention.roles[0].rotated)
        if turns is None or any(
            value is not None and value is not False for name, value in given.items() if name not in _TAKEN
        ):
            return None
        ready = self._made_ready(kernel, x.dtype)
        if ready is None:
            return None
        kept = None if cache is None else self.owner(cache, attention.index)
        few = x.shape[1] <= MOST and (x.shape[1] == 1 or mask is not None)
        out = self._at_once(ready, x, turns, kept, mask) if few and kept is not None else None
        return self._in_two(ready, x, turns, cache, mask) if out is None else out

    def _made_ready(self, kernel: Kernel, dtype: torch.dtype) -> _Ready | None:
        """Return layers as C takes them; None where parts were changed, or C does not take one."""
        ready = self.ready
        if ready is not None and ready.kernel is kernel and ready.dtype is dtype and ready.watched.holds():
            return ready
        if not self.watched.holds() or not all(norm.fits(dtype) for norm in self.form.norms):
            return None
        layers = as_taken(kernel, self.layers, dtype)
        if layers is None:
            return None
        tensors = [(one._parameters, name) for one in self.layers for name in one._parameters]
        tensors += [(one._kept, "weight") for one in self.layers]
        tensors += [(norm.module._parameters, norm.how.weight) for norm in self.form.norms]
        self.ready = ready = _Ready(kernel, dtype, Watched(self.block, [*tensors, *self.numbers]), layers, {})
        return ready

    def _at_once(self, ready: _Ready, x: Tensor, turns: dict[str, Tensor], kept: Any, mask: Any) -> Tensor | None:
        """Return the output of few tokens, whose keys and values lowmem's cache keeps."""
        attention, (batch, tokens, _) = self.form.attention, x.shape
        q, k, v = attention.roles
        both = zip(kept.cached.values(), (k, v), strict=True)
        places = [cached.places((batch, one.heads, tokens, one.width), x) for cached, one in both]
        if None in places:
            return None
        (keys, seen_keys, count), (values, seen_values, _) = places
        if mask is not None and (type(mask) is not Tensor or mask.dim() != 4 or mask.shape[3] != count):
            return None
        hidden = mask_states(mask, (batch, q.heads, tokens, count))
        if hidden is None:
            return None
        steps, query, mixed = self._program(ready, x, turns)
        sizes = batch, k.heads, q.heads // k.heads, tokens, count, q.width, v.width
        states, how = (*query, *seen_keys, *seen_values, *hidden), (attention.scaling, attention.softcap)
        work, fields, _scratch = attention_call(sizes, states, *how, mixed)
        out = torch.empty_like(x)
        if not steps.run(x=x, out=out, keys=keys, values=values, attention=(work, *fields), **turns):
            return None
        kept.grow(tokens)
        return out

    def _program(self, ready: _Ready, x: Tensor, turns: dict[str, Tensor]) -> _Program:
        """Return the steps for few tokens, which are kept for inputs of each shape."""
        key = get_ident(), x.shape, *(one.shape for one in turns.values())
        found = ready.programs.get(key)
        if found is None:
            attention, (batch, tokens, _) = self.form.attention, x.shape
            steps = Steps(ready.kernel, self.rooms(get_ident(), batch * tokens * self.most, x.dtype))
            query, *new = self._project(steps, ready, x, turns)
            for name, one, states in zip(("keys", "values"), attention.roles[1:], new, strict=True):
                steps.store((batch, one.heads, tokens, one.width), states, name)
            mixed = steps.attention("attention", batch * tokens * attention.out.in_features)
            self._finish(steps, ready, x, mixed)
            if len(ready.programs) >= _MOST_PROGRAMS:
                ready.programs.clear()
            found = ready.programs[key] = steps, query, mixed
        return found

    def _in_two(self, ready: _Ready, x: Tensor, turns: dict[str, Tensor], cache: Any, mask: Any) -> Tensor | None:
        """Return the output, with the attention of the model's library between two calls of C."""
        attention, (batch, tokens, _) = self.form.attention, x.shape
        before, behind = (Steps(ready.kernel, x.new_empty(batch * tokens * self.most)) for _ in range(2))
        found, room = self._project(before, ready, x, turns), before.room
        if not before.run(x=x, **turns):
            return None
        states = [
            room.as_strided((batch, one.heads, tokens, one.width), (*steps, 1), (at - room.data_ptr()) // before.size)
            for one, (_, at, _, *steps, _, _, _) in zip(attention.roles, found, strict=True)
        ]
        if cache is not None:
            states[1:] = cache.update(*states[1:], attention.index)
        given = {"dropout": 0.0, "scaling": attention.scaling, "softcap": attention.softcap, **attention.given}
        mixed = attention.attend(attention.module, *states, mask, **given)[0].reshape(batch, tokens, -1).contiguous()
        out = torch.empty_like(x)
        self._finish(behind, ready, x, "mixed")
        return out if behind.run(x=x, mixed=mixed, out=out) else self._finish_by_modules(x, mixed)

    def _project(self, steps: Steps, ready: _Ready, x: Tensor, turns: dict[str, Tensor]) -> list[tuple[int, ...]]:
        """Add what computes queries, keys and values, and return them as C takes them."""
        attention, (batch, tokens, columns), first = self.form.attention, x.shape, self.form.attention.layers
        at = _normed(self.form.before, steps, "x", x.numel())
        places = dict(
            zip(first, steps.products(at, batch * tokens, columns, ready.layers[: len(first)]), strict=True)
        )
        states: list[tuple[int, ...]] = []
        for one in attention.roles:
            token = one.layer.out_features
            start = _normed(one.norm, steps, places[one.layer] + one.first * steps.size, batch * tokens * token)
            if one.rotated:
                steps.rotate(start, (batch, tokens, one.heads), one.width, token, turns["cos"].shape, *turns)
            states.append((steps.type, start, 0, tokens * token, one.width, token, 0, 0, 0))
        return states

    def _finish(self, steps: Steps, ready: _Ready, x: Tensor, mixed: Address) -> None:
        """Add what computes the output from that of the attention."""
        form, rows, first = self.form, x.shape[0] * x.shape[1], len(self.form.attention.layers)
        out, *mlp = ready.layers[first:]
        (added,) = steps.products(mixed, rows, form.attention.out.in_features, [out])
        total = steps.add("x", _normed(form.after, steps, added, x.numel()), x.numel())
        added = add_mlp(steps, form.gated, _normed(form.before_mlp, steps, total, x.numel()), rows, mlp)
        steps.add(total, _normed(form.after_mlp, steps, added, x.numel()), x.numel(), "out")

    def _finish_by_modules(self, x: Tensor, mixed: Tensor) -> Tensor:
        form, added = self.form, self.form.attention.out(mixed)
        total = x + (added if form.after is None else form.after.module(added))
        added = form.mlp(total if form.before_mlp is None else form.before_mlp.module(total))
        result: Tensor = total + (added if form.after_mlp is None else form.after_mlp.module(added))
        return result


def _normed(norm: Norm | None, steps: Steps, x: Address, count: int) -> Any:
    """Add a norm, if there is one, and return the address of the result."""
    return x if norm is None else norm.add(steps, x, count)


def _turns(angles: Any, x: Tensor, rotated: int) -> dict[str, Tensor] | None:
    """Return cosines and sines (sequences or 1, tokens, rotated) of the dtype of x; None where C cannot read them."""
    if not rotated:
        return {}
    if not isinstance(angles, tuple) or len(angles) != 2:
        return None
    shapes = (1, x.shape[1], rotated), (x.shape[0], x.shape[1], rotated)
    plain = all(type(one) is Tensor and one.dtype is x.dtype and one.is_contiguous() for one in angles)
    fits = plain and angles[0].shape == angles[1].shape and angles[0].shape in shapes
    return {"cos": angles[0], "sin": angles[1]} if fits else None
