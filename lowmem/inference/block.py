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

from lowmem.inference.parts import Norm, Watched, add_gated, kernel_for, layer_of, tensors_of
from lowmem.kernels.cpu import Kernel
from lowmem.kernels.cpu_rows import NO_STATES, attention_call, mask_states
from lowmem.kernels.sequence import Layer, Steps
from lowmem.nn.dot_product_attention import MOST
from lowmem.training.fused import GatedMLP

_MOST_PROGRAMS = 8  # of a block: shapes of inputs and threads

_STATES = "keys", "values"
_GIVEN = "position_embeddings", "attention_mask", "cache"
_TAKEN = "attention_mask", "position_ids", "cache", "use_cache", "position_embeddings"


@dataclass(frozen=True)
class Projection:
    """Queries, keys or values: columns of a layer's output, as heads, with a norm of each head."""

    layer: Any
    first: int  # column
    heads: int
    norm: Norm | None = None


@dataclass(frozen=True)
class Attention:
    """How a module computes attention."""

    module: nn.Module
    q: Projection
    k: Projection
    v: Projection
    out: Any
    width: int  # of a head of queries and keys
    value_width: int
    rotated: int  # the first numbers of a head, which are rotated; 0: none
    scaling: float
    softcap: float | None
    given: Mapping[str, Any]  # further arguments of the model's attention function
    index: int  # of its layer of the cache
    attend: Callable[..., Any]  # an attention function of the model's library

    @property
    def layers(self) -> list[Any]:
        """The layers that compute queries, keys and values."""
        return list(dict.fromkeys((self.q.layer, self.k.layer, self.v.layer)))


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


class _Cells(NamedTuple):
    """Places in the fields of steps: of addresses, of the states that are stored, and of the attention."""

    addresses: list[list[int]]  # of the input, the output, cosines and sines
    stores: list[int]
    attention: int


class _Program(NamedTuple):
    """The steps of a block for inputs of one shape and dtype, and what they depend on."""

    steps: Steps
    watched: Watched
    query: tuple[int, ...]
    mixed: int  # address of the attention's output
    cells: _Cells


class Block:
    """Computes a block by its form.

    Args:
        block: the module.
        form: of the block.
        owner: returns the layer of a cache by its index; None where it is not one of lowmem's.
        serves: whether attention is computed as the form says.
        rooms: memory for what the blocks of a model compute on the way, one after another.
    """

    why_not: str | None = None

    def __init__(
        self,
        block: nn.Module,
        form: Form,
        owner: Callable[[Any, int], Any],
        serves: Callable[[], bool],
        rooms: dict[Any, Tensor],
    ) -> None:
        self.form, self.owner, self.serves, self.rooms = form, owner, serves, rooms
        self.programs: dict[Any, _Program] = {}
        self.refused: set[Any] = set()  # keys of programs with a product that C does not compute
        attention, mlp = form.attention, form.mlp
        gated: list[Any] = [getattr(mlp, name) for name in (form.gated.gate, form.gated.up) if name]
        down: Any = getattr(mlp, form.gated.down)
        self.first, self.out, self.down = attention.layers, attention.out, down
        self.layers = [*self.first, self.out, *gated, down]
        self.block, self.watched = block, Watched(block)
        # Numbers such as the scaling of scores, which a model's code may read from its modules.
        self.numbers = [
            (vars(one), name, value)
            for one in (block, attention.module)
            for name, value in vars(one).items()
            if type(value) in (int, float)
        ]
        self.hidden: int = down.out_features
        norms = form.before, form.after, form.before_mlp, form.after_mlp
        of_heads = attention.q.norm, attention.k.norm, attention.v.norm
        self.norms = [one for one in (*norms, *of_heads) if one is not None]
        # Numbers that steps before and behind the attention compute of a token, at most.
        self.before: int = self.hidden + 2 * sum(layer.out_features for layer in self.first)
        self.behind: int = 6 * self.hidden + 3 * down.in_features

    def __str__(self) -> str:
        norms = [name for name in ("before", "after", "before_mlp", "after_mlp") if getattr(self.form, name)]
        return f"block in one call: attention, {self.form.gated.activation} MLP, {len(norms)} norms, sums"

    def __call__(self, x: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Return the block's output; None where its own forward must run."""
        attention, kernel = self.form.attention, kernel_for(x)
        angles, mask, cache = (given.get(name) for name in _GIVEN)
        if kernel is None or x.dim() != 3 or not self.serves() or not _fit(angles, x, attention.rotated):
            return None
        if any(value is not None and value is not False for name, value in given.items() if name not in _TAKEN):
            return None
        kept: Any = None if cache is None else self.owner(cache, attention.index)
        few = x.shape[1] <= MOST and kept is not None and (x.shape[1] == 1 or mask is not None)
        if few and kept.get_seq_length():
            return self._at_once(kernel, x, angles, kept, mask)
        layers = self._layers(kernel, x)
        return None if layers is None else self._in_two(kernel, layers, x, angles, cache, mask)

    def _layers(self, kernel: Kernel, x: Tensor) -> list[Layer] | None:
        """Return the layers as C takes them; None where parts were changed, or C does not take one."""
        if not self.watched.holds() or not all(norm.fits(x) for norm in self.norms):
            return None
        if any(own.get(name) != value for own, name, value in self.numbers):
            return None
        found = [layer_of(kernel, one, x.dtype) for one in self.layers]
        return None if None in found else found  # type: ignore[return-value]

    def _at_once(self, kernel: Kernel, x: Tensor, angles: Any, kept: Any, mask: Tensor | None) -> Tensor | None:
        """Return the output of few tokens, whose keys and values lowmem's cache keeps."""
        attention, (batch, tokens, _) = self.form.attention, x.shape
        heads, widths = attention.k.heads, (attention.width, attention.value_width)
        shapes = [(name, (batch, heads, tokens, width)) for name, width in zip(_STATES, widths, strict=True)]
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
            return None
        seen = mask_states(mask, (batch, attention.q.heads, tokens, 0 if mask is None else mask.shape[-1]))
        if seen is None or not all(kept.cached[name].takes(shape, x) for name, shape in shapes):
            return None
        rows = [kept.cached[name].row_for(shape, x) for name, shape in shapes]
        first = kept.cached[_STATES[0]].first_seen
        keys = rows[0] + tokens - first
        if mask is not None and mask.shape[-1] != keys:
            return None
        turns = angles[0].shape[0] if attention.rotated else 0
        key = get_ident(), batch, tokens, turns, x.dtype, torch.get_num_threads(), kernel
        program = self.programs.get(key)
        holds = program is not None and program.watched.holds()
        if holds and key in self.refused:
            return None
        if program is None or not holds:
            layers = self._layers(kernel, x)
            if layers is None:
                return None
            if len(self.programs) >= _MOST_PROGRAMS:
                self.programs.clear()
            self.refused.discard(key)
            program = self.programs[key] = self._program(kernel, layers, x, angles, shapes, key)
        out = torch.empty_like(x)
        steps, cells, fields = program.steps, program.cells, program.steps.fields
        for places, tensor in zip(cells.addresses, (x, out, *angles) if attention.rotated else (x, out), strict=True):
            address = tensor.data_ptr()
            for place in places:
                fields[place] = address
        states: list[int] = [*program.query]
        for place, row, (name, shape) in zip(cells.stores, rows, shapes, strict=True):
            fields[place : place + len(NO_STATES)] = kept.cached[name].fields(row, shape[3])
            states += kept.cached[name].fields(first, shape[3])
        sizes = batch, heads, attention.q.heads // heads, tokens, keys, *widths
        states += seen
        work, found, _scratch = attention_call(sizes, states, attention.scaling, attention.softcap, program.mixed)
        fields[cells.attention : cells.attention + len(found) + 1] = work, *found
        if not steps.run():
            self.refused.add(key)
            return None
        kept.grow(tokens)
        return out

    def _program(
        self, kernel: Kernel, layers: list[Layer], x: Tensor, angles: Any, shapes: list[Any], key: Any
    ) -> _Program:
        """Build the steps for inputs of one shape and dtype, with places for what differs from call to call."""
        attention = self.form.attention
        numbers = x.shape[0] * x.shape[1] * (self.before + self.out.in_features + self.behind)
        steps = Steps(kernel, x, numbers, self.rooms.get((key, numbers)))
        if len(self.rooms) >= _MOST_PROGRAMS:
            self.rooms.clear()
        self.rooms[key, numbers] = steps.room
        query, *new = self._projected(steps, layers, x, angles)
        stores = []
        for (_, shape), states in zip(shapes, new, strict=True):
            steps.store(shape, states, NO_STATES)
            stores.append(len(steps.fields) - len(NO_STATES))
        batch, heads, tokens, _ = shapes[0][1]
        sizes = batch, heads, attention.q.heads // heads, tokens, 1, attention.width, attention.value_width
        place = len(steps.fields) + 1
        mixed = steps.attention(sizes, (*query, *NO_STATES * 3), attention.scaling, attention.softcap)
        out = torch.empty_like(x)
        self._behind(steps, layers, x, mixed, out)
        ends = [one.data_ptr() for one in (x, out, *(angles if attention.rotated else ()))]
        places = [[i for i, value in enumerate(steps.fields) if value == end] for end in ends]
        tensors = [one for layer in self.layers for one in tensors_of(layer)]
        tensors += [(norm.module._parameters, norm.how.weight) for norm in self.norms]
        tensors += [(norm.module.__dict__, norm.how.eps) for norm in self.norms]
        tensors += [(own, name) for own, name, _ in self.numbers]
        return _Program(steps, Watched(self.block, tensors), query, mixed, _Cells(places, stores, place))

    def _in_two(
        self, kernel: Kernel, layers: list[Layer], x: Tensor, angles: Any, cache: Any, mask: Tensor | None
    ) -> Tensor | None:
        attention, (batch, tokens, _) = self.form.attention, x.shape
        before = Steps(kernel, x, batch * tokens * self.before)
        found = self._projected(before, layers, x, angles)
        if not before.run():
            return None
        states = []
        for one, (_, at, _, *steps) in zip((attention.q, attention.k, attention.v), found, strict=True):
            width = attention.value_width if one is attention.v else attention.width
            room = before.room
            place = (at - room.data_ptr()) // room.element_size()
            shape = batch, one.heads, tokens, width
            states.append(room.as_strided(shape, (*steps[:3], 1), place))
        q, k, v = states
        if cache is not None:
            k, v = cache.update(k, v, attention.index)
        given = {"dropout": 0.0, "scaling": attention.scaling, "softcap": attention.softcap, **attention.given}
        mixed = attention.attend(attention.module, q, k, v, mask, **given)[0]
        mixed = mixed.reshape(batch, tokens, -1).contiguous()
        out, behind = torch.empty_like(x), Steps(kernel, x, batch * tokens * self.behind)
        self._behind(behind, layers, x, mixed.data_ptr(), out)
        return out if behind.run() else self._behind_by_modules(x, mixed)

    def _projected(self, steps: Steps, layers: list[Layer], x: Tensor, angles: Any) -> list[tuple[int, ...]]:
        """Add what computes queries, keys and values, and return them as C takes them."""
        attention, (batch, tokens, columns) = self.form.attention, x.shape
        rows, before = batch * tokens, self.form.before
        at = x.data_ptr() if before is None else before.add(steps, x.data_ptr(), rows)
        count = len(self.first)
        places = dict(zip(self.first, steps.products(at, rows, columns, layers[:count]), strict=True))
        states: list[tuple[int, ...]] = []
        for one in (attention.q, attention.k, attention.v):
            width = attention.value_width if one is attention.v else attention.width
            start, token = places[one.layer] + one.first * steps.size, one.layer.out_features
            if one.norm is not None:
                start = one.norm.add(steps, start, rows * token // one.norm.columns)
            if attention.rotated and one is not attention.v:
                steps.rotate(start, (batch, tokens, one.heads), width, token, *angles)
            states.append((steps.type, start, 0, tokens * token, width, token, 0, 0, 0))
        return states

    def _behind(self, steps: Steps, layers: list[Layer], x: Tensor, mixed: int, out: Tensor) -> None:
        """Add what computes the output from that of the attention."""
        form, rows, count = self.form, x.shape[0] * x.shape[1], len(self.first)
        (added,) = steps.products(mixed, rows, self.out.in_features, layers[count : count + 1])
        added = added if form.after is None else form.after.add(steps, added, rows)
        total = steps.add(x.data_ptr(), added, x.numel())
        at = total if form.before_mlp is None else form.before_mlp.add(steps, total, rows)
        hidden = add_gated(steps, form.gated, at, rows, self.hidden, layers[count + 1 : -1], self.down.in_features)
        (added,) = steps.products(hidden, rows, self.down.in_features, layers[-1:])
        added = added if form.after_mlp is None else form.after_mlp.add(steps, added, rows)
        steps.add(total, added, x.numel(), out.data_ptr())

    def _behind_by_modules(self, x: Tensor, mixed: Tensor) -> Tensor:
        form = self.form
        added = self.out(mixed)
        total = x + (added if form.after is None else form.after.module(added))
        added = form.mlp(total if form.before_mlp is None else form.before_mlp.module(total))
        result: Tensor = total + (added if form.after_mlp is None else form.after_mlp.module(added))
        return result


def _fit(angles: Any, x: Tensor, rotated: int) -> bool:
    """Whether C can read cosines and sines (sequences or 1, tokens, rotated) of the dtype of x."""
    if not rotated:
        return True
    if not isinstance(angles, tuple) or len(angles) != 2:
        return False
    shapes = (1, x.shape[1], rotated), (x.shape[0], x.shape[1], rotated)
    plain = all(type(one) is Tensor and one.dtype is x.dtype and one.is_contiguous() for one in angles)
    return plain and angles[0].shape == angles[1].shape and angles[0].shape in shapes
