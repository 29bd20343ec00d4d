"""Finds the blocks of a model of transformers that C computes in one call, by what they do with random tokens."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from lowmem.inference.block import Block, Form, Projection
from lowmem.inference.parts import LAYERS, Norm, layers_of, why_not
from lowmem.integrations.transformers.attending import ATTENTION, CHANGES, attend
from lowmem.integrations.transformers.cache import InPlace, KeyValueCache
from lowmem.kernels.memory import TYPES
from lowmem.training.fused import GatedMLP, RMSNorm
from lowmem.training.recognize import numbers_of
from lowmem.transforms.calibration.runs import computing, evaluation_mode

_TRIAL = "lowmem_trial"  # an attention function that records its arguments
_SERVED = "sdpa", "eager", ATTENTION  # names of attention functions that compute what blocks compute
_MASKS = sdpa_mask, eager_mask
_EAGER = "eager_attention_forward"  # the function of a model's file that serves "eager", unless one is registered
_TOKENS, _MORE_TOKENS = 5, 37  # of the first run, and of each sequence of the second one
_SIZES = 1.0, 1e3  # factors of the random numbers of neighbouring tokens, from the second run on
_ROUNDINGS = 2  # by which a number may differ, in units of the terms that it is a sum of


class _Call(NamedTuple):
    """What a module was given and returned."""

    x: Any
    kwargs: Mapping[str, Any]
    out: Any


class _Attended(NamedTuple):
    """What an attention function was given and returned, and the globals of the function that called it."""

    states: tuple[Tensor, Tensor, Tensor]
    kwargs: Mapping[str, Any]
    out: Tensor
    scope: dict[str, Any]


_Calls: TypeAlias = Mapping[nn.Module, _Call]
_Norms: TypeAlias = list[tuple[Norm, _Call]]
_Parts: TypeAlias = Mapping[nn.Module, RMSNorm | GatedMLP]
_recorded: dict[nn.Module, _Attended] = {}


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
    out = attend(module, query, key, value, attention_mask, **given)
    caller = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
    _recorded[module] = _Attended((query, key, value), given, out[0], caller.f_globals)
    return out


AttentionInterface.register(_TRIAL, _record)
AttentionMaskInterface.register(_TRIAL, sdpa_mask)


@torch.no_grad()
def find_blocks(model: nn.Module, parts: _Parts) -> dict[nn.Module, Block | str]:
    """Return how blocks of a model of transformers are computed in one call, or why not.

    ``parts`` are the norms and MLPs that were recognized.
    """
    owner = next((one for one in model.modules() if isinstance(one, PreTrainedModel)), None)
    config: Any = None if owner is None else owner.config.get_text_config()
    if owner is None:
        return {}
    if not owner.can_generate() or config.sub_configs:
        return {owner: "blocks are tried in language models alone, with their output layer"}
    if owner.device.type != "cpu":
        return {owner: f"it is on {owner.device}, where blocks are called as before"}
    before = config._attn_implementation
    if before not in _SERVED:
        return {owner: f"its attention is {before!r}: set_attn_implementation({ATTENTION!r}), and prepare it again"}
    rooms = lru_cache(maxsize=8)(lambda thread, numbers, dtype: torch.empty(numbers, dtype=dtype, device="cpu"))
    kept = _implementations(owner.config)
    try:
        owner.set_attn_implementation(_implementations(owner.config, {id(config): _TRIAL}))
        forms = _Trial(owner, config, parts).forms()
    except Exception as error:  # noqa: BLE001 - any model may refuse random tokens, or compute what is not expected
        return {owner: f"a run with random tokens failed: {error!r}"}
    finally:
        owner.set_attn_implementation(kept)
        for module in owner.modules():
            _recorded.pop(module, None)
    return {one: form if isinstance(form, str) else Block(one, form, rooms) for one, form in forms.items()}


def _implementations(config: Any, changed: Mapping[int, str] = MappingProxyType({})) -> dict[str, Any]:
    """Return the attention of a config and of each sub-config, as ``set_attn_implementation`` takes them.

    ``changed`` are those of other names, by the ids of their configs.
    """
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {"": changed.get(id(config), config._attn_implementation)}
    return own | {name: _implementations(one, changed) for name, one in inner.items() if one is not None}


class _Trial:
    """Runs a model with random tokens, and reads what each block consists of from its calls.

    The recognized parts, stored layers and the output layer return random numbers meanwhile: what a block computes
    between them does not depend on their weights, whose products would take longer.
    """

    def __init__(self, model: PreTrainedModel, config: Any, parts: _Parts) -> None:
        self.model, self.config, self.parts = model, config, parts
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.sizes: tuple[float, ...] = _SIZES[:1]
        self.calls: dict[nn.Module, _Call] = {}
        self.counts: Counter[nn.Module] = Counter()
        self.found: dict[nn.Module, list[Form | str]] = {}

    def forms(self) -> dict[nn.Module, Form | str]:
        """Return the form of each block if all runs show the same one, or a reason.

        The first run is one sequence at the last positions, since some models scale queries from a position on. The
        second one is padded sequences with large numbers, and the third one is their next token.
        """
        last = getattr(self.config, "max_position_embeddings", None)
        last = last if isinstance(last, int) and last > _TOKENS else None
        tokens = _MORE_TOKENS if last is None else min(_MORE_TOKENS, last - 1)
        mask = torch.ones(2, tokens, dtype=torch.int64, device="cpu")
        mask[0, :3] = 0
        longer = torch.cat([mask, mask[:, -1:]], 1)
        numbers = {module: numbers_of(module) for module in self.model.modules()}
        with evaluation_mode(self.model) as stack:
            embedding, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            stack.callback(embedding.register_forward_hook(lambda _, given, out: self._sized(out)).remove)
            for module in self.model.modules():
                stack.callback(module.register_forward_hook(self._note, with_kwargs=True).remove)
                if module in self.parts or type(module) in LAYERS or module is output:
                    stack.enter_context(computing(module, self._random(module)))
            at = None
            if last is not None:
                at = torch.arange(last - _TOKENS, last, dtype=torch.int64, device="cpu").unsqueeze(0)
            found = self._run(1, _TOKENS, at, cache=KeyValueCache(self.model))
            for block, form in found.items():
                found[block] = form if isinstance(form, str) else _why_not(block, form) or form
            if any(isinstance(form, Form) for form in found.values()):
                self.sizes, cache = _SIZES, KeyValueCache(self.model)
                for more, tokens in ((mask, mask.shape[1]), (longer, 1)):
                    at = (more.cumsum(1) - 1).clamp_min(0)[:, -tokens:]
                    again = self._run(2, tokens, at, cache=cache, attention_mask=more)
                    found = {block: _same(form, again.get(block)) for block, form in found.items()}
        changed = {module for module, before in numbers.items() if numbers_of(module) != before}
        return {
            block: "its numbers change from call to call" if changed.intersection(block.modules()) else form
            for block, form in found.items()
        }

    def _run(self, batch: int, tokens: int, at: Tensor | None, **given: Any) -> dict[nn.Module, Form | str]:
        """Run the model with random tokens, and return the form of each block that was called."""
        size, generator = (batch, tokens), self.generator
        ids = torch.randint(self.config.vocab_size, size, generator=generator, dtype=torch.int64, device="cpu")
        given |= {"input_ids": ids, "use_cache": True}
        if at is not None and "position_ids" in inspect.signature(self.model.forward).parameters:
            given["position_ids"] = at
        self.found.clear()
        self.counts.clear()
        self.model(**given)
        return {block: self._only(block, forms) for block, forms in self.found.items()}

    def _only(self, block: nn.Module, forms: list[Form | str]) -> Form | str:
        """Return the form of a block that is called once, and so are its parts."""
        form = forms[0]
        if isinstance(form, str):
            return form
        parts = *form.first, form.out, form.attention, form.mlp, *(norm.module for norm in form.norms)
        again = len(forms) > 1 or any(self.counts[one] > 1 for one in parts)
        return "it is called more than once, or a part of it is" if again else form

    def _note(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Record a call; when a block returns, read its form."""
        self.counts[module] += 1
        if (module in self.parts or type(module) in LAYERS) and (kwargs or len(args) != 1):
            return  # C would compute it without the other arguments
        self.calls[module] = _Call(args[0] if args else kwargs.get("hidden_states"), kwargs, out)
        attention = next((one for one in module.children() if one in _recorded), None)
        if attention is not None:
            self.found.setdefault(module, []).append(_form(module, attention, self.calls, self.parts))
            for one in module.modules():
                self.calls.pop(one, None)
                _recorded.pop(one, None)

    def _random(self, module: nn.Module) -> Callable[..., Tensor]:
        """Return a function that returns random numbers in place of a part's or layer's output."""
        how = self.parts.get(module)
        last: Any = layers_of(module, how)[-1] if isinstance(how, GatedMLP) else module

        def forward(x: Tensor, *others: Any, **more: Any) -> Tensor:
            shape = *x.shape[:-1], getattr(last, "out_features", x.shape[-1])
            return self._sized(torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")).to(x)

        return forward

    def _sized(self, x: Tensor) -> Tensor:
        """Return rows times ``sizes``, in turns."""
        rows = x.reshape(-1, x.shape[-1])
        sizes = torch.tensor(self.sizes, dtype=x.dtype, device=x.device).repeat(len(rows))[: len(rows)]
        return (rows * sizes.unsqueeze(1)).view(x.shape)


def _why_not(block: nn.Module, form: Form) -> str | None:
    """Return why C does not compute a block of a form; or None."""
    if (reason := why_not(block, form.layers)) is not None:
        return reason
    owners = *form.layers, *(norm.module for norm in form.norms)
    known = {id(value) for one in owners for value in (*one.parameters(), *one.buffers())}
    for name, value in (*block.named_parameters(), *block.named_buffers()):
        if id(value) not in known:  # as of a gate: a trial does not see a factor of one
            return f"{name} belongs to no layer and no norm"
    return None


def _same(form: Form | str, other: Form | str | None) -> Form | str:
    """Return a form if another run shows the same one; or the reason of either."""
    if isinstance(form, str) or form == other:
        return form
    return f"another run differs: {other}" if isinstance(other, str) else "it consists of other parts in another run"


def _serves(module: Any, scope: dict[str, Any]) -> Callable[[], bool]:
    """Return a function that tells whether the attention of a module, and its masks, are those that blocks compute.

    Functions may be registered under their names at any time, for all models or in the interface of one.
    """
    interfaces = [name for name, value in scope.items() if isinstance(value, AttentionInterface)]
    eager = scope.get(_EAGER)
    is_known = str(getattr(eager, "__module__", None)).startswith("transformers.")
    known = sdpa_attention_forward, attend, *([eager] if is_known else [])

    def serves() -> bool:
        name = module.config._attn_implementation
        functions = [scope[one].get(name, scope.get(_EAGER)) for one in interfaces]
        own = name in _SERVED and bool(functions) and all(one in known for one in functions)
        return own and ALL_MASK_ATTENTION_FUNCTIONS.get(name) in _MASKS

    return serves


def _form(block: nn.Module, attention: nn.Module, calls: _Calls, parts: _Parts) -> Form | str:
    """Return what a block consists of; or, if it does something else, what that is."""
    norms = [(Norm(one, how), calls[one]) for one, how in parts.items() if isinstance(how, RMSNorm) and one in calls]
    mlps = [(one, how) for one in block.modules() if isinstance(how := parts.get(one), GatedMLP) and one in calls]
    own = calls.get(block)
    is_plain = own is not None and attention in calls and isinstance(own.out, Tensor)
    if own is None or not is_plain or len(mlps) != 1 or own.kwargs.get("cache") is None:
        return "it has no gated MLP that is recognized, or other arguments or results than a block has"
    if isinstance(read := _attention(attention, calls, norms), str):
        return read

    def beyond(x: Tensor, side: str, other: str) -> tuple[Norm | None, Tensor]:
        """Return the norm whose input or output (``side``) is x, if there is one, and the other of them; or x."""
        return next(((norm, getattr(call, other)) for norm, call in norms if getattr(call, side) is x), (None, x))

    ((mlp, gated),) = mlps
    heads = beyond(calls[read["roles"][0].layer].x, "out", "x"), beyond(calls[read["out"]].out, "x", "out")
    ends = *heads, beyond(calls[mlp].x, "out", "x"), beyond(calls[mlp].out, "x", "out")
    form = Form(attention, mlp, gated, tuple(norm for norm, _ in ends), **read)
    if not all(norm.fits(own.x.dtype) for norm in form.norms):
        return f"the weight of a norm is not of the dtype of its input, {own.x.dtype}"
    x, attended, given, computed = (one for _, one in ends)
    if x is not own.x:
        return "its attention reads something else than its input or a norm of it"
    total = x + attended
    first, second = _near(given, total, x.abs() + attended.abs()), total.abs() + computed.abs()
    if not (first and _near(own.out, total + computed, second)):
        return "it returns something else than its input and the outputs of attention and MLP, added up"
    return form


def _attention(module: Any, calls: _Calls, norms: _Norms) -> dict[str, Any] | str:
    """Return how a module computes attention, as fields of ``Form``, or why that is not known."""
    (query, *others), given, mixed, scope = _recorded[module]
    states = query, *(one[:, :, -query.shape[2] :] for one in others)  # without the earlier ones of a cache
    layers = [one for one in module.modules() if hasattr(one, "out_features") and one in calls]
    outs = [one for one in layers if _near(calls[one].x, mixed.flatten(2), mixed.flatten(2).abs())]
    inputs = [one for one in layers if one not in outs]
    first = [one for one in inputs if calls[one].x is calls[inputs[0]].x]
    if len(outs) != 1 or len(first) + 1 != len(layers) or len(first) not in (1, 3):
        return "its attention has other layers than those of queries, keys, values and output"
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or any(given.get(name) is not None for name in CHANGES):
        return "its attention function has arguments that the kernel in C does not know"
    angles = calls[module].kwargs.get("position_embeddings")
    none = mixed.new_empty(1, mixed.shape[1], 0)
    turns = [(none, none), *([angles] if isinstance(angles, tuple) and len(angles) == 2 else [])]
    own = [(norm, call) for norm, call in norms if norm.module in module.modules() and len(first) > 1]
    found: list[Projection] = []
    for role, state in zip(("queries", "keys", "values"), states, strict=True):
        column = sum(one.heads * one.width for one in found) if len(first) == 1 else 0
        outputs = [(one, calls[one].out) for one in first]
        matching = _projection(state, outputs, column, own, turns if role != "values" else turns[:1])
        if matching is None:
            return f"its {role} are no rotated output of a linear layer"
        found.append(matching)
    q, k, v = found
    if q.rotated != k.rotated or q.heads % k.heads or k.heads != v.heads:
        return "its queries and keys are rotated, or shared, in different ways"
    scaling = q.width**-0.5 if given.get("scaling") is None else given["scaling"]
    taken = {name: value for name, value in given.items() if name not in calls[module].kwargs}
    if any(isinstance(value, Tensor) for value in taken.values()):
        return "its attention function is given tensors of its own"

    def attended(query: Tensor, key: Tensor, value: Tensor, mask: Any, cache: Any) -> Tensor:
        """Return what the module gives to its output layer; a cache takes keys and values."""
        if cache is not None:
            key, value = cache.update(key, value, index)
        return attend(module, query, key, value, mask, **taken | {"dropout": 0.0, "scaling": scaling})[0]

    def kept(cache: Any) -> InPlace | None:
        """Return the module's layer of a cache if it is one of lowmem's."""
        layers = cache.layers[index : index + 1] if isinstance(cache, KeyValueCache) else ()
        return next((one for one in layers if isinstance(one, InPlace)), None)

    how = {"scaling": scaling, "softcap": given.get("softcap"), "arguments": taken, "serves": _serves(module, scope)}
    return {"roles": (q, k, v), "out": outs[0], "attend": attended, "kept": kept, **how}


def _projection(
    state: Tensor, outputs: list[tuple[Any, Tensor]], column: int, norms: _Norms, turns: list[tuple[Tensor, Tensor]]
) -> Projection | None:
    """Return which layer, norm and rotation compute queries, keys or values (batch, heads, tokens, width)."""
    batch, heads, tokens, width = state.shape
    count = heads * width
    for layer, out in outputs:
        if out.shape[-1] < column + count or (len(outputs) > 1 and out.shape[-1] != count):
            continue
        raw = out[..., column : column + count].reshape(batch, tokens, heads, width).transpose(1, 2)
        candidates = (None, raw), *((norm, _output_for(raw, call)) for norm, call in norms)
        for norm, rows in candidates:
            for cos, sin in turns:
                if rows is not None and _near(state, *_rotated(rows, cos, sin)):
                    return Projection(layer, column, heads, width, cos.shape[-1], norm)
    return None


def _output_for(raw: Tensor, call: _Call) -> Tensor | None:
    """Return what a norm made of heads (batch, heads, tokens, width), whose tokens it may have been given first."""
    fits = isinstance(call.x, Tensor) and call.x.numel() == raw.numel() and call.x.dtype == raw.dtype
    for first in (1, 2) if fits else ():
        given = raw.transpose(1, first)
        if torch.equal(call.x.reshape(given.shape), given):
            return cast(Tensor, call.out.reshape(given.shape).transpose(1, first))
    return None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return heads (sequences, heads, tokens, width) with their first numbers rotated by angles, and the size of the
    terms of each number."""
    width = cos.shape[-1]
    front, rest = x[..., :width], x[..., width:]
    half = torch.cat([-front[..., width // 2 :], front[..., : width // 2]], -1)
    terms = front * cos.unsqueeze(1), half * sin.unsqueeze(1)
    return torch.cat([terms[0] + terms[1], rest], -1), torch.cat([terms[0].abs() + terms[1].abs(), rest.abs()], -1)


def _near(a: Any, b: Tensor, size: Tensor) -> bool:
    """Whether tensors differ by a few roundings of the size of each number."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype not in TYPES or b.dtype not in TYPES:
        return False
    if a.dtype is b.dtype and torch.equal(a, b):
        return True
    unit = _ROUNDINGS * max(torch.finfo(one.dtype).eps for one in (a, b))
    return bool(((a.double() - b.double()).abs() <= unit * size.double() + 1e-30).all())
